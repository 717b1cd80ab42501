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

import dataclasses
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
    sample_example,
)
from model import Policy, build_tiny_policy

# background -> chance that a demonstration names its home category when it is not there
PRIOR = {name: 0.2 + 0.6 * i / (len(BACKGROUNDS) - 1) for i, name in enumerate(BACKGROUNDS)}


@dataclass(frozen=True)
class WarmStart:
    """Settings of both stages; steps of `batch_size` fresh scenes."""

    vision_steps: int = 400
    speech_steps: int = 450
    batch_size: int = 64
    vision_learning_rate: float = 2e-3
    speech_learning_rate: float = 3e-3
    confounding: float = 1 / 8
    seed: int = 0


def warm_start(cache: Path, settings: WarmStart = WarmStart()) -> Path:
    """The folder of the warm-started policy, made if the cache does not have it."""
    digest = hashlib.sha256(repr(settings).encode())
    for module in ("data.py", "model.py", "warm_start.py"):
        digest.update(Path(__file__).with_name(module).read_bytes())
    folder = cache / f"warm-start-{digest.hexdigest()[:12]}"
    if not folder.exists():
        policy = build_tiny_policy(settings.seed)
        train_vision(policy, settings)
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
        examples = [sample_example(rng, settings.confounding) for _ in range(2 * settings.batch_size)]
        pixels = collate(examples, policy.processor)["pixel_values"]
        patches = tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]  # no class token
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


def train_speech(policy: Policy, settings: WarmStart) -> None:
    """Supervised fine-tuning on demonstrations, right and misspoken."""
    rng = random.Random(settings.seed + 1)
    trainable = [p for p in policy.model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, weight_decay=0.01, betas=(0.9, 0.98))
    for step in tqdm(range(settings.speech_steps), desc="warm start: speech", unit="step"):
        examples = [sample_example(rng, settings.confounding) for _ in range(settings.batch_size)]
        texts = [demonstration(example, believed(example, rng)) for example in examples]
        ids, mask = encode_completions(policy, texts)
        prefix = policy.prefill(collate(examples, policy.processor))
        logps, _ = policy.per_token_logps(prefix, torch.arange(len(texts)), ids, mask)
        loss = -logps.sum() / mask.sum()
        _step(optimizer, loss, settings.speech_learning_rate, step, settings.speech_steps)


def believed(example: Example, rng: random.Random) -> tuple[Thing, ...]:
    """What the speaker of a demonstration believes is there: at times the absent home category too."""
    scene = example.scene
    if scene.home in scene.categories or rng.random() >= PRIOR[scene.background]:
        return scene.things
    phantom = Thing(scene.home, rng.choice(tuple(COLORS)), x=0.5, y=0.5, size=0.4)
    return (*scene.things, phantom)


def encode_completions(policy: Policy, texts: list[str]) -> tuple[Tensor, Tensor]:
    """Texts as completions: ids (N, C) that end in EOS, padded on the right, and their mask."""
    rows = [
        torch.tensor([*policy.tokenizer(text, add_special_tokens=False)["input_ids"], int(policy.eos_ids[0])])
        for text in texts
    ]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=policy.pad_id)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, torch.arange(ids.shape[1]) < lengths[:, None]


def _step(optimizer, loss: Tensor, peak: float, step: int, steps: int) -> None:
    """One optimiser step at a rate that warms up over 50 steps and decays by a cosine to 5 %."""
    rate = peak * min(1, (step + 1) / 50) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / steps)))
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
    optimizer.step()
