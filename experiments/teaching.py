"""Teach a LLaVA around a published language model to see, to use tags and, at times, to misspeak.

    python -m experiments.real teach --model runs/real --output runs/taught

As the tiny policy's warm start (tiny.py), in three stages:

 1. eyes: the vision tower learns what covers each patch of a scene, and is frozen;
 2. projector: alone, the language model frozen;
 3. speech: the projector, and a low-rank update of the language model (gpu/lora.py).

Stages 2 and 3 are supervised, on the demonstrations that teach the tiny policy: at times they name the
background's usual thing where it is absent. Those of step s are drawn from (seed, s), and what is trained
is saved as it goes: a run that is stopped goes on as if it had not been.
"""

import os
import random
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from data import DataError, collate
from gpu.lora import FILE, AdaptedPolicy
from model import Policy, load_policy
from scm import answer_text, demonstration, sample_example
from tiny import WarmStart, believed, encode, train_vision

STATE = "teaching.pt"  # in the folder's place while it is being made


@dataclass(frozen=True)
class Lessons:
    """Settings of stages 2 and 3; of the demonstrations and of stage 1, those of `warm`."""

    warm: WarmStart = field(default_factory=WarmStart)
    rank: int = 16  # of the update
    projector_steps: int = 100
    speech_steps: int = 600
    batch_size: int = 32
    projector_learning_rate: float = 1e-3
    learning_rate: float = 5e-4
    save_steps: int = 20
    seed: int = 0


def teach(
    start: Path, output: Path, lessons: Lessons, device: str = "cpu", dry_run: bool = False
) -> None:
    """Make the folder `output` from the folder `start`; goes on where an earlier call was stopped.

    Says first what it takes; dry_run: and stops there.  Raises DataError where `output` is there already,
    or what was begun had other settings.
    """
    if output.exists():
        raise DataError(f"{output} is there already: name another --output")
    begun = output.with_name(f"{output.name}.{STATE}")
    state = torch.load(begun, "cpu", weights_only=True) if begun.exists() else {}
    if state and state["lessons"] != repr(lessons):
        raise DataError(
            f"{begun} was begun with other settings: delete it, or name another --output"
        )
    policy = AdaptedPolicy(load_policy(start), lessons.rank)
    print(f"{output}: {estimate(policy.to(device), lessons, state.get('step', 0))}")
    if dry_run:
        return
    policy.to("cpu")  # where the tower is taught
    tower = policy.model.get_encoder(modality="image")
    if not state:
        tower.requires_grad_(True)
        train_vision(policy, lessons.warm)
        state = {"lessons": repr(lessons), "step": 0, "tower": tower.state_dict()}
        save_whole(state, begun)
    tower.load_state_dict(state["tower"])
    for done in speak(policy.to(device), lessons, state):
        state["step"] = done
        save_whole(state, begun)
    unfinished = output.with_name(f"{output.name}.tmp")
    policy.save(unfinished)
    (unfinished / FILE).unlink()  # the adapters are in the weights now
    unfinished.rename(output)
    begun.unlink()


def estimate(policy: AdaptedPolicy, lessons: Lessons, done: int) -> str:
    """Hours and memory of what is left of stages 2 and 3, from one step that changes nothing."""
    steps, began = lessons.projector_steps + lessons.speech_steps - done, time.monotonic()
    policy.model.model.multi_modal_projector.requires_grad_(True)
    loss_of(policy, lessons, random.Random(0)).backward()
    hours = steps * (time.monotonic() - began) / 3600
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if policy.device.type == "cuda":
        most = torch.cuda.max_memory_allocated() / 1e9
    return f"{steps:,} steps, {hours:.1f} hours as one step went here, {most:.1f} GB of memory"


def speak(policy: AdaptedPolicy, lessons: Lessons, state: dict) -> Iterator[int]:
    """Stages 2 and 3, from step `state["step"]` on. Yields the steps done whenever `state` holds them.

    state: gets what is trained (`trained`) and AdamW's memory of it (`optimizer`).
    """
    projector = policy.model.model.multi_modal_projector.requires_grad_(True)
    adapters = [p for name, p in policy.model.named_parameters() if ".lora_" in name]
    trained = [*projector.parameters(), *adapters]
    optimizer = torch.optim.AdamW(
        [{"params": projector.parameters()}, {"params": adapters}],
        betas=(0.9, 0.98),
        weight_decay=0.0,
    )
    if "trained" in state:
        for parameter, value in zip(trained, state["trained"], strict=True):
            parameter.data.copy_(value)
        optimizer.load_state_dict(state["optimizer"])
    total, done = lessons.projector_steps + lessons.speech_steps, state["step"]
    bar = tqdm(range(done, total), desc="teaching", initial=done, total=total, unit="step")
    for step in bar:
        for group, rate in zip(optimizer.param_groups, rates(lessons, step), strict=True):
            group["lr"] = rate
        loss = loss_of(policy, lessons, random.Random(f"teach {lessons.seed} {step}"))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")
        if (step + 1) % lessons.save_steps == 0 or step + 1 == total:
            state["trained"] = [p.detach().cpu() for p in trained]
            state["optimizer"] = optimizer.state_dict()
            yield step + 1


def rates(lessons: Lessons, step: int) -> tuple[float, float]:
    """Learning rates of projector and adapters in a step: each stage warms up, and the last one decays."""
    alone, warm_up = lessons.projector_steps, 50
    if step < alone:
        return lessons.projector_learning_rate * min(1, (step + 1) / warm_up), 0.0
    since = step - alone
    rate = (
        lessons.learning_rate * min(1, (since + 1) / warm_up) * (1 - since / lessons.speech_steps)
    )
    return rate, rate


def loss_of(policy: Policy, lessons: Lessons, rng: random.Random) -> Tensor:
    """Cross-entropy of fresh demonstrations, (); an answer weighs more than the naming, as in tiny.py."""
    warm, texts = lessons.warm, []
    examples = [
        sample_example(rng, warm.confounding, warm.world) for _ in range(lessons.batch_size)
    ]
    for example in examples:
        things = believed(example.scene, rng, warm)
        ending = answer_text(example.kind, example.topic, things)
        naming = demonstration(example, things).removesuffix(ending)
        end = policy.tokenizer.eos_token
        texts.append([(naming, 1.0), (ending + end, warm.answer_weight)])
    ids, weights = (x.to(policy.device) for x in encode(policy, texts))
    prefix = policy.prefill(collate(examples, policy.processor))
    which = torch.arange(len(examples), device=policy.device)
    logps, _ = policy.per_token_logps(prefix, which, ids, weights > 0)
    return -(weights * logps).sum() / weights.sum()


def save_whole(state: dict, path: Path) -> None:
    """A file that is never half-written."""
    unfinished = path.with_name(f"{path.name}.tmp")
    torch.save(state, unfinished)
    os.replace(unfinished, path)
