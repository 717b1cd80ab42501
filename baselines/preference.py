"""Learn from pairs of answers, one preferred: HA-DPO, CHAIR-DPO, POVID and CSR, by one loss.

    python baselines/preference.py --pairs hadpo --output runs/hadpo     the tiny model, as train.py makes it
    python baselines/preference.py --pairs chair --model DIR --coco COCO/ --images train2014/ --output O

    hadpo   a true correction against the model's own text       pairs.py
    chair   the truest of K own texts against the falsest        chair_dpo.py
    povid   a true description against one with an error         povid.py
    csr     the model's own search, ranked by the image          csr.py

Prompts are scenes, or captions to write of photographs: COCO's (--coco), or a file's (--data) whose lines
have kind caption and objects.

A run makes its pairs, then takes steps on them; it saves as it goes and is resumed with --resume. Its
checkpoint is an ordinary model folder: `evaluate.py` takes it, and so does the next round (POVID's
--stage 2, CSR's second and third) as --model.

A log-probability of an answer is the SUM over its tokens, EOS included, prompt and image left out, at
temperature 1 and without dropout. --loss likelihood learns the chosen texts alone: the null control, which
tells what the pair adds to a better text.
"""

import argparse
import dataclasses
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: see train.py
if not __package__:  # run as a file: Python then looks for modules in this folder alone
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from baselines import povid
from baselines.making import METHODS, Method, make_pairs, prompts
from baselines.pairs import Pair
from data import DataError, Example, collate, explain, opening
from hallucination.files import write_whole
from model import Policy
from runs import (
    ABOUT,
    LOWER,
    Log,
    Settings,
    about,
    add_flag,
    check,
    default_dtype,
    open_run,
    own_folder,
    read_or_empty,
    restore_optimizer,
    save_checkpoint,
)
from scm import world_of
from tiny import IN_CROWDS, WarmStart, encode, warm_start
from train import batches, clip_gradients, generator_for, load

FLAGS = (  # of train.py, that mean the same here
    "model", "resume", "steps", "save_steps", "keep_checkpoints", "seed", "device", "dtype",
    "trust_remote_code", "debug", "data", "images", "skip_bad", "confounding", "fog", "crowds", "batch_size",
    "max_completion_length", "learning_rate", "max_grad_norm", "train_vision", "lora_rank",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The loss
# ---------------------------------------------------------------------------------------------
def dpo_loss(
    policy_chosen: Tensor,
    policy_rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float = 0.1,
) -> Tensor:
    """Direct preference optimisation (Rafailov et al., arXiv 2305.18290, equation 7), per pair.

        r(y) = log pi(y) - log pi_ref(y),   loss = -log sigmoid(beta (r(chosen) - r(rejected)))

    policy_chosen, policy_rejected: (P,) log pi of the two answers, with gradient.
    reference_chosen, reference_rejected: (P,) log pi_ref; no gradient flows into them.
    Returns (P,).  log 2 at the reference, whatever the lengths.  beta 0.1 is the three methods' own.
    ValueError where the four are not of one shape (P,).

    >>> import torch
    >>> dpo_loss(*torch.tensor([[-42.0], [-50.5], [-44.0], [-47.5]]))  # margin 0.1 (2.0 + 3.0)
    tensor([0.4741])
    """
    shapes = [
        tuple(x.shape)
        for x in (policy_chosen, policy_rejected, reference_chosen, reference_rejected)
    ]
    if len(shapes[0]) != 1 or len(set(shapes)) > 1:
        raise ValueError(f"all four log-probabilities must be (P,), got {shapes}")
    # Differences before the sum: each is small, and the sums over long answers are not.
    chosen = policy_chosen - reference_chosen.detach()
    rejected = policy_rejected - reference_rejected.detach()
    return -F.logsigmoid(beta * (chosen - rejected))


def povid_loss(policy: Tensor, reference: Tensor, beta: float = 0.1) -> Tensor:
    """POVID's second stage, per pair: half of the loss against each of the two rejected texts.

    policy, reference: (3, P) log-probabilities of the chosen text, of the rejected one, and of the
    model's own words under the noised image.  Returns (P,).
    """
    of_text = dpo_loss(policy[0], policy[1], reference[0], reference[1], beta)
    of_own = dpo_loss(policy[0], policy[2], reference[0], reference[2], beta)
    return (of_text + of_own) / 2


# ---------------------------------------------------------------------------------------------
# A step
# ---------------------------------------------------------------------------------------------
def log_probabilities(
    policy: Policy, examples: list[Example], ids: Tensor, mask: Tensor, own: Tensor | None = None
) -> Tensor:
    """(2, P) log pi of the chosen and the rejected texts; (3, P) with those of the model's own words.

    ids, mask: (2 P, C), the chosen texts first.  own: (P, C) words under the noised image.
    What equals a pair's chosen text has its very log-probability, so that their gradients cancel exactly.
    """
    P = len(examples)
    prefix = policy.prefill(collate(examples, policy.processor))
    logps, _ = policy.per_token_logps(
        prefix, torch.arange(P, device=ids.device).repeat(2), ids, mask
    )
    chosen, rejected = logps.sum(1).view(2, P)
    # Two rows of one text differ by rounding, of which AdamW would make a whole step.
    same = (ids[:P] == ids[P:]).all(1) & (mask[:P] == mask[P:]).all(1)
    sums = torch.stack([chosen, torch.where(same, chosen, rejected)])
    if own is None:
        return sums
    of_own = povid.own_logps(povid.next_logits(policy, prefix, ids[:P]), own, mask[:P])
    same = ((own == ids[:P]) | ~mask[:P]).all(1)
    return torch.cat([sums, torch.where(same, chosen, of_own)[None]])


def texts_of(policy: Policy, pairs: Sequence[Pair]) -> tuple[Tensor, Tensor]:
    """Token ids and mask (2 P, C) of the chosen, then of the rejected texts, each with its EOS.

    A tag that the prompt has opened is not said again.
    """
    end, both = policy.tokenizer.eos_token, []
    for text_of in (lambda pair: pair.chosen, lambda pair: pair.rejected):
        for pair in pairs:
            opened = opening(pair.example, policy.processor)
            both.append([(text_of(pair).removeprefix(opened) + end, 1.0)])
    ids, weights = encode(policy, both)
    return ids.to(policy.device), (weights > 0).to(policy.device)


@torch.no_grad()
def words_under_noise(
    policy: Policy, examples: list[Example], ids: Tensor, method: Method, generator: torch.Generator
) -> Tensor:
    """(P, C): after each prefix of the texts (P, C), the likeliest word had the image been noised."""
    dimmed = [povid.noised(example, method.noise_step, generator) for example in examples]
    prefix = policy.prefill(collate(dimmed, policy.processor))
    return povid.next_logits(policy, prefix, ids).argmax(-1)


def update(
    policy: Policy,
    reference: Policy,
    optimizer: torch.optim.Optimizer,
    pairs: Sequence[Pair],
    method: Method,
    settings: Settings,
    step: int,
) -> dict[str, float]:
    """One optimiser step on P pairs.  Returns the row of metrics.csv, means over the pairs before the step:

    margin, accuracy: beta (r(chosen) - r(rejected)), and how often it is above 0.  logp_gain_*: r; both
    falling together is DPO's known drift.  length_*: tokens, EOS included.  own_differs: of POVID's second
    stage, the share of places where noise changes the likeliest word.
    Raises FloatingPointError where loss or gradient is not finite; the weights are then as before.
    """
    began, P = time.perf_counter(), len(pairs)
    examples, own = [pair.example for pair in pairs], None
    ids, mask = texts_of(policy, pairs)
    if method.stage == 2:
        generator = generator_for(settings.seed, step, "noise")
        own = words_under_noise(policy, examples, ids[:P], method, generator)
    with torch.no_grad():
        before = log_probabilities(reference, examples, ids, mask, own)
    now = log_probabilities(policy, examples, ids, mask, own)
    if method.loss == "likelihood":
        loss = -now[0].sum() / mask[:P].sum()
    elif own is None:
        loss = dpo_loss(now[0], now[1], before[0], before[1], method.beta).mean()
    else:
        loss = povid_loss(now, before, method.beta).mean()
    optimizer.zero_grad()
    loss.backward()
    norm = clip_gradients(policy, settings)
    if not (math.isfinite(loss.item()) and math.isfinite(norm)):
        raise FloatingPointError(
            f"step {step + 1}: loss or gradient is not finite: begin anew with a lower --learning-rate "
            f"and another --output"
        )
    optimizer.step()
    gained = (now - before).detach()
    margin, lengths = method.beta * (gained[0] - gained[1]), mask.sum(1).float().view(2, P).mean(1)
    differs = mask[:P] & (own != ids[:P]) if own is not None else mask[:P] & False
    return {
        "step": step + 1,
        "loss": loss.item(),
        "margin": margin.mean().item(),
        "accuracy": (margin > 0).float().mean().item(),
        "logp_gain_chosen": gained[0].mean().item(),
        "logp_gain_rejected": gained[1].mean().item(),
        "length_chosen": lengths[0].item(),
        "length_rejected": lengths[1].item(),
        "own_differs": (differs.sum() / mask[:P].sum()).item(),
        "grad_norm": norm,
        "seconds": time.perf_counter() - began,
    }


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------
def learn(settings: Settings, method: Method, start: Path | None = None) -> None:
    """A whole run: load, make pairs, take steps.  Raises DataError for what cannot be used.

    start: a warm start to begin at, for experiments; without it --model, or the tiny model's own.
    """
    check(settings)
    with own_folder(settings) as folder:
        _learn(settings, method, folder, start)


def _learn(settings: Settings, method: Method, folder: Path, start: Path | None) -> None:
    """A whole run in a folder that no other process writes to."""
    settings = dataclasses.replace(
        settings, beta=method.beta, dtype=settings.dtype or default_dtype(settings)
    )
    checkpoint, arguments = open_run(settings, folder)
    facts, trained = dataclasses.asdict(method), folder / "checkpoint"
    before = read_or_empty(folder / "args.json").get("method")
    changed = [name for name in facts if before and facts[name] != before.get(name)]
    if settings.resume and changed:
        name = changed[0]
        raise DataError(
            f"{folder}: cannot resume with another --{name.replace('_', '-')}: the run has "
            f"{before.get(name)}, this call {facts[name]}"
        )
    if settings.data or method.coco:  # what cannot be used is told before a model is loaded
        next(prompts(method, settings))
    to_warm = IN_CROWDS if settings.crowds else WarmStart(world_of(settings.fog))
    start = start or settings.model or warm_start(folder.parent, to_warm)
    policy, reference, optimizer = load(settings, start, checkpoint)
    write_whole(
        folder / "args.json", json.dumps(json.loads(arguments) | {"method": facts}, indent=2) + "\n"
    )
    done = restore_optimizer(checkpoint, optimizer) if checkpoint else 0
    if not checkpoint:
        write_whole(folder / ABOUT, json.dumps(about(policy), indent=2) + "\n")
    pairs = make_pairs(reference, method, settings, folder)
    if len(pairs) < settings.batch_size:
        raise DataError(
            f"{len(pairs)} pairs do not fill one batch: lower --batch-size to {len(pairs)}"
        )
    take_steps(policy, reference, optimizer, pairs, method, settings, done)
    print(f"{trained}  measure it: python evaluate.py scenes --model {trained}")


def take_steps(
    policy: Policy,
    reference: Policy,
    optimizer: torch.optim.Optimizer,
    pairs: list[Pair],
    method: Method,
    settings: Settings,
    done: int,
) -> None:
    """Steps on shuffled epochs of the pairs, each logged; a checkpoint now and then, and at the end."""
    folder, log = settings.output, Log(settings.output, done)
    parts = itertools.islice(batches(settings, pairs), done, settings.steps)
    bar = tqdm(parts, desc=method.loss, initial=done, total=settings.steps, unit="step")
    for step, part in enumerate(bar, done):
        row = update(policy, reference, optimizer, part, method, settings, step)
        log.write(row, [])
        bar.set_postfix(loss=f"{row['loss']:.3f}", accuracy=f"{row['accuracy']:.2f}")
        if (step + 1) % settings.save_steps == 0 or step + 1 == settings.steps:
            save_checkpoint(
                folder / "checkpoint", policy, optimizer, step + 1, settings.keep_checkpoints
            )


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[Settings, Method]:
    """The command line; --help lists every flag.  Raises DataError for a value out of its range."""
    parser = argparse.ArgumentParser(
        prog="python baselines/preference.py",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    own = parser.add_argument_group("pairs and loss; baselines/README.md says what they are")
    names = "{" + ",".join(METHODS) + "}"
    own.add_argument("--pairs", required=True, metavar=names, help="where the pairs come from")
    own.add_argument("--output", type=Path, required=True, help="folder of the run")
    defaults = {field.name: field.default for field in dataclasses.fields(Method)}
    for flag, kind, choices, help_ in (
        ("--num-pairs", int, None, "pairs to make"),
        ("--beta", float, None, "of the DPO loss; without it 0.2 for chair, 0.1 for the others"),
        ("--loss", str, ("dpo", "likelihood"), "likelihood: the chosen texts alone, the null control"),
        ("--temperature", float, None, "of hadpo's and chair's draws; without it 1, or 0.7 for chair"),
        ("--num-samples", int, None, "texts that chair draws for a prompt"),
        ("--prompts-at-once", int, None, "prompts asked together; another number, other draws"),
        ("--judge", str, ("pull", "oracle"), "of csr: the model's image pull, or the truth"),
        ("--stage", int, (1, 2), "of povid: 2 adds the model's own words under a noised image"),
        ("--noise-step", int, None, "of the diffusion, for povid's second stage and csr's pull"),
        ("--coco", str, None, "folder of COCO's annotation files, 2014; --images has its photographs"),
    ):  # fmt: skip
        name = flag[2:].replace("-", "_")
        default = None if name in ("beta", "temperature") else defaults[name]
        own.add_argument(flag, type=kind, choices=choices, default=default, help=help_)
    group = parser.add_argument_group("as in train.py")
    for name in FLAGS:
        add_flag(group, name)
    given = vars(parser.parse_args(argv))
    beta, temperature, _ = METHODS.get(given["pairs"], (None, None, None))  # Method refuses others
    given["beta"] = beta if given["beta"] is None else given["beta"]
    given["temperature"] = temperature if given["temperature"] is None else given["temperature"]
    method = {name: given.pop(name) for name in defaults}
    return Settings(**given), Method(**method)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    debug = False
    disable_progress_bar()
    try:
        settings, method = parse_arguments(argv)
        debug = settings.debug
        learn(settings, method)
    except KeyboardInterrupt:
        print("stopped; go on with the same command and --resume", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        print(f"error: out of memory: {LOWER}", file=sys.stderr)
        return 2
    except Exception as error:
        print(explain(error, debug), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
