"""A starting point that sees but misspeaks, as a pretrained multimodal LLM does.

Post-training cures nothing in a model that cannot see, and has nothing to cure in one that never
hallucinates. So the tiny policy gets, in about two minutes on two cores,

 1. eyes: its vision tower learns to tell which thing, in which colour, covers each patch of an image,
    and is frozen, as the vision towers of pretrained models are;
 2. speech: supervised on demonstrations of fresh scenes whose things and backgrounds are
    independent. Where the background's home category is absent, the demonstration may name it all the
    same, and answer accordingly. How often depends on the background (`PRIOR`), as a language prior
    does: on half of them more often than not, so that greedy decoding hallucinates there.

The result is an ordinary Hugging Face folder, cached by a hash of everything that made it.
"""

import hashlib
import math
import os
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import (
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    Example,
    Scene,
    Thing,
    collate,
    demonstration,
    describe,
    in_words,
    sample_example,
    verdict,
)
from model import Policy, build_tiny_policy

# background -> chance that a demonstration names its home category when it is not there
PRIOR = {name: 0.2 + 0.6 * i / (len(BACKGROUNDS) - 1) for i, name in enumerate(BACKGROUNDS)}


@dataclass(frozen=True)
class WarmStart:
    """Settings of the three stages."""

    vision_steps: int = 400
    vision_batch_size: int = 128
    reading_steps: int = 250
    reading_batch_size: int = 48
    reading_learning_rate: float = 3e-3
    questions: int = 6
    speech_steps: int = 450
    batch_size: int = 64
    verdict_weight: float = 3.0
    vision_learning_rate: float = 2e-3
    speech_learning_rate: float = 3e-3
    confounding: float = 1 / 8
    seed: int = 0
    fog: float = 0.0  # the thickest, in the images
    in_words: bool = False  # demonstrations on descriptions; the eyes are then never used


def warm_start(cache: Path, settings: WarmStart = WarmStart()) -> Path:
    """The folder of the warm-started policy, made if the cache does not have it."""
    digest = hashlib.sha256(repr(settings).encode())
    for module in ("data.py", "model.py", "warm_start.py"):
        digest.update(Path(__file__).with_name(module).read_bytes())
    folder = cache / f"warm-start-{digest.hexdigest()[:12]}"
    if not folder.exists():
        policy = build_tiny_policy(settings.seed)
        if not settings.in_words:
            train_vision(policy, settings)
        train_reading(policy, settings)
        train_speech(policy, settings)
        unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
        policy.save(unfinished)
        try:
            unfinished.rename(folder)
        except OSError:  # another run finished first: the same settings, the same weights
            shutil.rmtree(unfinished)
    return folder


def train_vision(policy: Policy, settings: WarmStart) -> None:
    """Teach the vision tower what covers each of its patches; the head that reads it off is dropped."""
    rng = random.Random(settings.seed)
    tower = policy.model.get_encoder(modality="image")
    classes = (len(CATEGORIES) + 1, len(COLORS) + 1)  # and one for "nothing"
    torch.manual_seed(settings.seed)
    head = torch.nn.Linear(tower.config.hidden_size, sum(classes))
    parameters = [*tower.parameters(), *head.parameters()]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98))
    for step in tqdm(range(settings.vision_steps), desc="warm start: eyes", unit="step"):
        examples = [
            sample_example(rng, settings.confounding, settings.fog)
            for _ in range(settings.vision_batch_size)
        ]
        pixels = collate(examples, policy.processor)["pixel_values"]
        patches = tower(pixels, output_hidden_states=True).hidden_states[-1][
            :, 1:
        ]  # no class token
        cells = math.isqrt(patches.shape[1])
        targets = torch.tensor([_cover(example.scene, cells) for example in examples])
        what, color = head(patches).flatten(0, 1).split(classes, -1)
        loss = F.cross_entropy(what, targets[..., 0].flatten())
        loss = loss + F.cross_entropy(color, targets[..., 1].flatten())
        _step(optimizer, loss, settings.vision_learning_rate, step, settings.vision_steps)
    tower.requires_grad_(False)


def _cover(scene: Scene, cells: int) -> list[tuple[int, int]]:
    """(category, colour) of the thing in whose quadrant each of cells x cells patches lies."""
    quadrants = {(t.y > 0.5, t.x > 0.5): t for t in scene.things}
    cover = []
    for row in range(cells):
        for column in range(cells):
            thing = quadrants.get((2 * row >= cells, 2 * column >= cells))
            cover.append(
                (CATEGORIES.index(thing.category), list(COLORS).index(thing.color))
                if thing
                else (len(CATEGORIES), len(COLORS))
            )
    return cover


def train_reading(policy: Policy, settings: WarmStart) -> None:
    """Language before pictures: look things up in a text that names them.

    "I see a red boat and a blue car. A fish? </think> <answer> no", several questions a text. Learning
    to look up is slow, and an image adds only length to it.
    """
    rng = random.Random(settings.seed + 1)
    parameters = list(policy.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.01, betas=(0.9, 0.98))
    for step in tqdm(range(settings.reading_steps), desc="warm start: reading", unit="step"):
        texts = [quiz(rng, settings.questions) for _ in range(settings.reading_batch_size)]
        ids, weights = encode(policy, texts)
        hidden = policy.decoder(input_ids=ids[:, :-1]).last_hidden_state
        asked = weights[:, 1:] > 0
        loss = F.cross_entropy(policy.head(hidden[asked]), ids[:, 1:][asked])
        _step(optimizer, loss, settings.reading_learning_rate, step, settings.reading_steps)


def quiz(rng: random.Random, questions: int) -> list[tuple[str, float]]:
    """A text that names one to four things and asks about them: (piece, loss weight)."""
    categories = rng.sample(CATEGORIES, rng.randint(1, 4))
    colors = [rng.choice(tuple(COLORS)) for _ in categories]
    things = [Thing(*pair, x=0.5, y=0.5, size=0.4) for pair in zip(categories, colors, strict=True)]
    pieces = [(f"<think> I see {describe(things)}.", 0.0)]
    for _ in range(questions):
        kind = rng.choice(("yesno", "choice"))
        absent = kind == "yesno" and rng.random() < 0.5
        topic = rng.choice([c for c in CATEGORIES if c not in categories] if absent else categories)
        question, answer = verdict(kind, topic, things).split("<answer>")
        pieces += [(f"{question}<answer>", 0.0), (answer.removesuffix(" </answer>"), 1.0)]
    return pieces


def train_speech(policy: Policy, settings: WarmStart) -> None:
    """Supervised fine-tuning on demonstrations, right and misspoken.

    The verdict weighs more than the naming of things, which is most of the tokens.
    """
    rng = random.Random(settings.seed + 2)
    trainable = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.01, betas=(0.9, 0.98))
    which = torch.arange(settings.batch_size)
    for step in tqdm(range(settings.speech_steps), desc="warm start: speech", unit="step"):
        examples = [sample_example(rng, settings.confounding, settings.fog) for _ in which]
        if settings.in_words:
            examples = [in_words(example) for example in examples]
        texts = []
        for example in examples:
            things = believed(example, rng)
            ending = verdict(example.kind, example.topic, things)
            naming = demonstration(example, things).removesuffix(ending)
            ending += policy.tokenizer.eos_token
            texts.append([(naming, 1.0), (ending, settings.verdict_weight)])
        ids, weights = encode(policy, texts)
        prefix = policy.prefill(collate(examples, policy.processor))
        logps, _ = policy.per_token_logps(prefix, which, ids, weights > 0)
        loss = -(weights * logps).sum() / weights.sum()
        _step(optimizer, loss, settings.speech_learning_rate, step, settings.speech_steps)


def encode(policy: Policy, texts: list[list[tuple[str, float]]]) -> tuple[Tensor, Tensor]:
    """Texts in weighted pieces -> token ids and loss weights, (N, C) each, padded on the right."""
    ids, weights = [], []
    for pieces in texts:
        row: list[tuple[int, float]] = []
        for text, weight in pieces:
            tokens = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
            row += [(token, weight) for token in tokens]
        ids.append(torch.tensor([token for token, _ in row]))
        weights.append(torch.tensor([weight for _, weight in row]))
    return (
        pad_sequence(ids, batch_first=True, padding_value=policy.pad_id),
        pad_sequence(weights, batch_first=True),
    )


def believed(example: Example, rng: random.Random) -> tuple[Thing, ...]:
    """What the speaker of a demonstration believes is there: at times the absent home category too."""
    scene = example.scene
    if scene.home in scene.categories or rng.random() >= PRIOR[scene.background]:
        return scene.things
    phantom = Thing(scene.home, rng.choice(tuple(COLORS)), x=0.5, y=0.5, size=0.4)
    return (*scene.things, phantom)


def _step(optimizer, loss: Tensor, peak: float, step: int, steps: int) -> None:
    """One optimiser step at a rate that warms up over 50 steps and decays by a cosine to 5 %."""
    rate = peak * min(1, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
