"""Before against after on the same held-out scenes: differences with intervals, captions cured or spoilt.

Each figure of the scene world is a ratio of sums over scenes. The interval of its difference is a paired
bootstrap: scenes are drawn with replacement, each with its answers before and after, and both ratios are
taken again (Efron and Tibshirani 1993, the percentile method). A caption is wrong if it names something
absent; the sign test asks whether as many captions are cured as are newly wrong (McNemar, exact).
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from data import Example
from hallucination.scenes import Probe, reasoning_of, what_it_says
from rewards import extract_answer, normalize, objects_named, outcome_reward

DRAWS, SEED = 2000, 0
# figure -> is more of it better (1), less (-1), or neither (0)
FIGURES = {
    "accuracy": 1,
    "POPE F1, random": 1,
    "POPE F1, popular": 1,
    "POPE F1, adversarial": 1,
    "POPE yes-ratio, adversarial": 0,
    "CHAIR_S": -1,
    "CHAIR_I": -1,
    "caption recall": 1,
    "caption length, words": 0,
    "counts right": 1,
    "CHAIR_S, counting": -1,
    "flip rate under do(L_s)": -1,
}


@dataclass(frozen=True)
class Difference:
    """A figure before and after; None throughout where nothing was asked."""

    before: float | None
    after: float | None
    interval: tuple[float, float] | None  # of after - before, 95 %
    n: int  # questions, captions, or for the flip rate pairs of answers

    @property
    def difference(self) -> float | None:
        """After - before."""
        return None if self.before is None or self.after is None else self.after - self.before


def differences(
    probes: Sequence[Probe], before: Sequence[str], after: Sequence[str]
) -> dict[str, Difference]:
    """Every figure of FIGURES; before, after: a completion for each probe."""
    was, now = sums_by_scene(probes, before), sums_by_scene(probes, after)
    scenes = len(was["accuracy"])
    drawn = np.random.default_rng(SEED).multinomial(scenes, [1 / scenes] * scenes, DRAWS)
    found = {}
    for figure in FIGURES:
        a, b = _ratio(was[figure].sum(0)), _ratio(now[figure].sum(0))
        again = _ratio(drawn @ now[figure]) - _ratio(drawn @ was[figure])  # (DRAWS,)
        known = not (np.isnan(a) or np.isnan(b))
        low, high = np.nanpercentile(again, (2.5, 97.5)) if known else (0.0, 0.0)
        found[figure] = Difference(
            None if np.isnan(a) else float(a),
            None if np.isnan(b) else float(b),
            (float(low), float(high)) if known else None,
            int(was[figure][:, 2].sum()),
        )
    return found


def _ratio(sums: np.ndarray) -> np.ndarray:
    """(..., 3) sums -> (...) the first over the second; NaN for a share of nothing."""
    with np.errstate(invalid="ignore"):
        return np.where(sums[..., 1] > 0, sums[..., 0] / np.maximum(sums[..., 1], 1), np.nan)


def sums_by_scene(probes: Sequence[Probe], completions: Sequence[str]) -> dict[str, np.ndarray]:
    """Figure -> (scenes, 3): what it counts in each scene, of how much, in how many questions."""
    places = scene_numbers(probes)
    sums = {figure: np.zeros((places[-1] + 1, 3)) for figure in FIGURES}
    answers = [extract_answer(text) or "" for text in completions]
    for i, (probe, place) in enumerate(zip(probes, places, strict=True)):
        if probe.redrawn:
            said = [what_it_says(probe.example, answers[j]) for j in (i - 1, i)]
            sums["flip rate under do(L_s)"][place] += (said[0] != said[1], 1, 1)
            continue
        of_answer = _of_caption if probe.example.kind == "caption" else _of_question
        for figure, *counts in of_answer(probe, answers[i], completions[i]):
            sums[figure][place] += counts
    return sums


def scene_numbers(probes: Sequence[Probe]) -> list[int]:
    """The scene that each probe asks about, counted from 0: each begins with its caption."""
    first = [probe.example.kind == "caption" and not probe.redrawn for probe in probes]
    return (np.cumsum(first) - 1).tolist()


Counts = tuple[
    str, float, float, int
]  # figure, what is counted, of how much, in how many questions


def _of_caption(probe: Probe, answer: str, completion: str) -> Iterator[Counts]:
    there = probe.example.objects
    named = objects_named(answer, probe.example.vocabulary)
    absent = [name for name in named if name not in there]
    yield "CHAIR_S", bool(absent), 1, 1
    yield "CHAIR_I", len(absent), len(named), 1
    yield "caption recall", len(set(named) & set(there)), len(there), 1
    yield "caption length, words", len(answer.split()), 1, 1


def _of_question(probe: Probe, answer: str, completion: str) -> Iterator[Counts]:
    right = outcome_reward(completion, probe.example)
    yield "accuracy", right, 1, 1
    if probe.example.kind == "number":
        named = objects_named(reasoning_of(completion), probe.example.vocabulary)
        yield "counts right", right, 1, 1
        yield "CHAIR_S, counting", any(name not in probe.example.objects for name in named), 1, 1
    said_yes, is_yes = normalize(answer) == "yes", probe.example.answer == "yes"
    for split in probe.splits:
        yield f"POPE F1, {split}", 2 * (said_yes and is_yes), said_yes + is_yes, 1
    if "adversarial" in probe.splits:
        yield "POPE yes-ratio, adversarial", said_yes, 1, 1


# ---------------------------------------------------------------------------------------------
# Captions: cured, newly wrong, and the rest
# ---------------------------------------------------------------------------------------------
CASES = {  # (wrong before, wrong after) -> what it is called
    (True, False): "cured",
    (False, True): "newly wrong",
    (False, False): "right both times",
    (True, True): "wrong both times",
}


@dataclass(frozen=True)
class Caption:
    """One scene's caption before and after."""

    example: Example
    before: str
    after: str

    @property
    def case(self) -> str:
        """One of CASES.  A caption without an answer names nothing, so it is not wrong."""
        return CASES[bool(self.absent(self.before)), bool(self.absent(self.after))]

    def absent(self, caption: str) -> list[str]:
        """What a caption names that is not there, each once."""
        named = objects_named(caption, self.example.vocabulary)
        return [name for name in dict.fromkeys(named) if name not in self.example.objects]


def captions(probes: Sequence[Probe], before: Sequence[str], after: Sequence[str]) -> list[Caption]:
    """The captions of the scenes as they were drawn."""
    return [
        Caption(probe.example, extract_answer(a) or "", extract_answer(b) or "")
        for probe, a, b in zip(probes, before, after, strict=True)
        if probe.example.kind == "caption" and not probe.redrawn
    ]


def sign_test(one: int, other: int) -> float:
    """The two-sided p of a fair coin that falls `one` times on one side and `other` times on the other.

    >>> round(sign_test(5, 0), 4), sign_test(3, 3), sign_test(0, 0)
    (0.0625, 1.0, 1.0)
    """
    n = one + other
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(min(one, other) + 1)) / 2**n)
