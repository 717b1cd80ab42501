"""Pairs, made by one of four methods from a model and prompts, and kept on disk as they are made.

    pairs.jsonl    a line for each batch of prompts: how many, and [place of the prompt, chosen, rejected] of
                   each pair

Prompts are drawn from generators seeded by (seed, batch), and so is all else: a run that is resumed makes
the pairs that it would have made.
"""

import itertools
import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from baselines import photos, povid
from baselines.chair_dpo import best_against_worst
from baselines.csr import csr_pairs
from baselines.pairs import Pair, ha_dpo_pairs
from data import DataError, Example, collate, read_examples
from hallucination.files import repair_lines
from model import Policy
from rollouts import rollout
from runs import Settings
from scm import sample_of_kinds, world_of
from train import generator_for

PAIRS = "pairs.jsonl"  # in the folder of the run: a line for each batch of prompts
MOST_PROMPTS = 50  # asked for each pair that is wanted, before giving up
# name -> beta of its loss, temperature of its draws, kinds of questions
METHODS = {
    "hadpo": (0.1, 1.0, ("yesno", "caption")),
    "chair": (0.2, 0.7, ("caption",)),
    "povid": (0.1, 1.0, ("caption",)),
    "csr": (0.1, 1.0, ("caption",)),
}


@dataclass(frozen=True)
class Method:
    """How pairs are made and learnt from.  Raises DataError for a value out of its range.

    coco: the folder of COCO's annotation files, whose photographs are asked about.
    """

    pairs: str
    num_pairs: int = 640
    beta: float = 0.1
    loss: str = "dpo"
    temperature: float = 1.0
    num_samples: int = 2
    prompts_at_once: int = 16
    judge: str = "pull"
    stage: int = 1
    noise_step: int = 500
    coco: str | None = None

    def __post_init__(self):
        if self.pairs not in METHODS:
            raise DataError(f"--pairs must be one of {', '.join(METHODS)}, got {self.pairs!r}")
        for name, low in (
            ("num_pairs", 1),
            ("beta", 1e-6),
            ("temperature", 0.01),
            ("num_samples", 2),
            ("prompts_at_once", 1),
        ):
            if not low <= getattr(self, name) < math.inf:
                flag = "--" + name.replace("_", "-")
                raise DataError(f"{flag} is {getattr(self, name)}, must be at least {low}")
        if not 0 <= self.noise_step <= 999:
            raise DataError(f"--noise-step is {self.noise_step}, must be between 0 and 999")
        if self.stage == 2 and self.pairs != "povid":
            raise DataError(f"--stage 2 is POVID's: it does not go with --pairs {self.pairs}")


def pairs_of(
    policy: Policy, examples: list[Example], method: Method, settings: Settings, number: int
) -> list[Pair]:
    """The pairs that a batch of prompts gives; number: of the batch, which seeds all that is drawn."""
    rng = random.Random(f"pairs {settings.seed} {number}")
    if method.pairs == "povid":
        found = [povid.injected_pair(example, rng) for example in examples]
        return [pair for pair in found if pair]
    with torch.no_grad():
        prefix = policy.prefill(collate(examples, policy.processor))
    generator = generator_for(settings.seed, number, "pairs")
    if method.pairs == "csr":
        noised = None
        if method.judge == "pull":
            dimmed = [povid.noised(example, method.noise_step, generator) for example in examples]
            with torch.no_grad():
                noised = policy.prefill(collate(dimmed, policy.processor))
        return csr_pairs(policy, prefix, examples, noised, settings.max_completion_length)
    K = method.num_samples if method.pairs == "chair" else 1
    drawn = rollout(
        policy, prefix, examples, K, settings.max_completion_length, generator, method.temperature,
        reward=lambda *_: 0.0,
    )  # fmt: skip
    kept = [
        None if cut else text
        for text, cut in zip(drawn.texts, drawn.truncated.tolist(), strict=True)
    ]
    whole = [[text for text in texts if text is not None] for texts in _in_groups(kept, K)]
    if method.pairs == "chair":
        found = [best_against_worst(e, texts) for e, texts in zip(examples, whole, strict=True)]
        return [pair for pair in found if pair]
    said = [(example, texts[0]) for example, texts in zip(examples, whole, strict=True) if texts]
    return ha_dpo_pairs([e for e, _ in said], [text for _, text in said], rng)


def _in_groups(values: Sequence, size: int) -> list[Sequence]:
    return [values[i : i + size] for i in range(0, len(values), size)]


def prompts(method: Method, settings: Settings) -> Iterator[list[Example]]:
    """Batches of prompts: fresh scenes without end, or the captions of a file or of COCO, once."""
    B, kinds = method.prompts_at_once, METHODS[method.pairs][2]
    if method.coco and (settings.data or not settings.images):
        raise DataError("--coco needs --images, the folder of its photographs, and no --data")
    if not (method.coco or settings.data):
        world = world_of(settings.fog, settings.crowds)
        for number in itertools.count():
            rng = random.Random(f"prompts {settings.seed} {number}")
            yield [sample_of_kinds(rng, settings.confounding, world, kinds) for _ in range(B)]
    if method.coco:
        examples = photos.coco_examples(Path(method.coco), settings.images, settings.skip_bad)
    else:
        read = read_examples(settings.data, settings.images, settings.skip_bad)
        examples = [one for one in read if one.kind == "caption" and one.objects]
    if not examples:
        raise DataError(
            f"{settings.data}: no line has kind caption and objects: nothing to judge by"
        )
    yield from _in_groups(photos.tempted(examples) if method.pairs == "povid" else examples, B)


def make_pairs(policy: Policy, method: Method, settings: Settings, folder: Path) -> list[Pair]:
    """The first `num_pairs` pairs of the prompts, those in the run's folder as they are.

    Each batch of prompts is a line there, on disk before the next is asked.  Raises DataError where there
    are not enough: of scenes, after MOST_PROMPTS prompts a pair; of a file, where it has none.
    """
    path, pairs, asked = folder / PAIRS, [], 0
    lines = [json.loads(line) for line in repair_lines(path)]
    bar = tqdm(total=method.num_pairs, desc=f"pairs, {method.pairs}", unit="pair")
    for number, examples in enumerate(prompts(method, settings)):
        if len(pairs) >= method.num_pairs or asked >= MOST_PROMPTS * method.num_pairs:
            break
        if number < len(lines):
            found = [
                Pair(examples[i], chosen, rejected)
                for i, chosen, rejected in lines[number]["pairs"]
            ]
        else:
            found = pairs_of(policy, examples, method, settings, number)
            place = {id(example): i for i, example in enumerate(examples)}
            rows = [(place[id(pair.example)], pair.chosen, pair.rejected) for pair in found]
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"prompts": len(examples), "pairs": rows}) + "\n")
        pairs, asked = pairs + found, asked + len(examples)
        bar.update(min(len(pairs), method.num_pairs) - bar.n)
    bar.close()
    wanted = 1 if settings.data or method.coco else method.num_pairs
    if len(pairs) < wanted:
        raise DataError(
            f"{asked} prompts gave {len(pairs)} pairs of {method.num_pairs}: lower --num-pairs, or raise "
            f"--temperature or --num-samples"
        )
    print(f"{min(len(pairs), method.num_pairs)} pairs from {asked} prompts", file=sys.stderr)
    return pairs[: method.num_pairs]
