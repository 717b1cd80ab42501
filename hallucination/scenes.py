"""Hallucination on the scene world, where what is there and what merely looks likely are both known.

Every held-out scene is asked

    a caption            CHAIR_S: share of captions that name an absent category; CHAIR_I: share of
                         mentions that are absent; recall: share of things that are named
    POPE questions       "Is there a X?" about a category that is there, and about absent ones: any
                         (random), the most frequent (popular), the background's home (adversarial:
                         scenes without their home category only)
    a count, a colour    with the yes/no questions, the accuracy

and everything again with only the background redrawn, do(L_s). No right answer changes; the share of
answers that do is the flip rate, the direct measure of the arrow from L_s to the answer.
"""

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from data import BACKGROUNDS, CATEGORIES, Example, ask, sample_scene
from rewards import extract_answer, normalize, objects_named, outcome_reward

SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Probe:
    """One question about one held-out scene: `splits` are the POPE splits that count it."""

    example: Example
    splits: tuple[str, ...] = ()
    redrawn: bool = (
        False  # do(L_s): its twin, with the scene's own background, stands just before it
    )


def make_probes(scenes: int, confounding: float, seed: int, fog: float = 0.0) -> list[Probe]:
    """The questions about `scenes` held-out scenes, each followed by its twin under do(L_s)."""
    rng = random.Random(f"held-out {seed}")
    world = [sample_scene(rng, confounding, fog=fog) for _ in range(scenes)]
    frequency = Counter(category for scene in world for category in scene.categories)
    probes = []
    for scene in world:
        absent = [c for c in CATEGORIES if c not in scene.categories]
        topic = rng.choice(scene.categories)
        no_home = scene.home in absent
        questions = [
            ("caption", topic, ()),
            ("number", topic, ()),
            ("choice", topic, ()),
            ("yesno", topic, SPLITS if no_home else SPLITS[:2]),
            ("yesno", rng.choice(absent), ("random",)),
            ("yesno", max(absent, key=lambda c: (frequency[c], c)), ("popular",)),
        ]
        if no_home:
            questions.append(("yesno", scene.home, ("adversarial",)))
        elsewhere = scene.do(
            background=rng.choice([b for b in BACKGROUNDS if b != scene.background])
        )
        for kind, category, splits in questions:
            probes.append(Probe(ask(scene, kind, category), splits))
            probes.append(Probe(ask(elsewhere, kind, category), splits, redrawn=True))
    return probes


def score(probes: Sequence[Probe], completions: Sequence[str]) -> dict:
    """The figures of completions given to probes, as fractions in [0, 1].

    accuracy, flip_rate, malformed (completions without an answer), chair_s, chair_i, recall, length
    (words a caption), and pope: by split n, accuracy, precision, recall, f1, yes_ratio.
    """
    assert len(probes) == len(completions), f"{len(probes)} probes, {len(completions)} completions"
    answers = [extract_answer(text) or "" for text in completions]
    asked = [  # (probe, completion, answer) on the scenes as they were drawn
        row for row in zip(probes, completions, answers, strict=True) if not row[0].redrawn
    ]
    captions = [(p.example, answer) for p, _, answer in asked if p.example.kind == "caption"]
    flips = [
        _said(probe.example, answers[i]) != _said(probe.example, answers[i - 1])
        for i, probe in enumerate(probes)
        if probe.redrawn
    ]
    return {
        "n": len(captions),
        "accuracy": fmean(
            outcome_reward(text, p.example) for p, text, _ in asked if p.example.kind != "caption"
        ),
        "flip_rate": fmean(flips),
        "malformed": fmean(not answer for answer in answers),
        **chair(captions),
        "pope": {
            split: pope([(p.example.answer, a) for p, _, a in asked if split in p.splits])
            for split in SPLITS
        },
    }


def _said(example: Example, answer: str) -> object:
    """What an answer says: of a caption, the objects it names; of any other, its words."""
    if example.kind == "caption":
        return set(objects_named(answer, example.vocabulary))
    return normalize(answer)


def chair(captions: Sequence[tuple[Example, str]]) -> dict[str, float]:
    """CHAIR_S, CHAIR_I (by mention), recall of the things that are there, and words a caption."""
    mentioned = absent = found = there = hallucinating = 0
    for example, caption in captions:
        named = objects_named(caption, example.vocabulary)
        wrong = [name for name in named if name not in example.objects]
        mentioned, absent = mentioned + len(named), absent + len(wrong)
        found, there = found + len(set(named) & set(example.objects)), there + len(example.objects)
        hallucinating += bool(wrong)
    return {
        "chair_s": hallucinating / max(len(captions), 1),
        "chair_i": absent / max(mentioned, 1),
        "recall": found / max(there, 1),
        "length": sum(len(caption.split()) for _, caption in captions) / max(len(captions), 1),
    }


def pope(rows: Sequence[tuple[str, str]]) -> dict[str, float]:
    """(label, answer) pairs -> POPE's figures; yes is the positive class, anything but yes is a no."""
    said_yes = [normalize(answer) == "yes" for _, answer in rows]
    is_yes = [label == "yes" for label, _ in rows]
    hits = sum(a and b for a, b in zip(said_yes, is_yes, strict=True))
    precision, recall = hits / max(sum(said_yes), 1), hits / max(sum(is_yes), 1)
    n = max(len(rows), 1)
    return {
        "n": len(rows),
        "accuracy": sum(a == b for a, b in zip(said_yes, is_yes, strict=True)) / n,
        "precision": precision,
        "recall": recall,
        "f1": 2 * hits / max(sum(said_yes) + sum(is_yes), 1),
        "yes_ratio": sum(said_yes) / n,
    }
