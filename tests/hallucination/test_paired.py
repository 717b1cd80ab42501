"""Before against after: the figures are those of the table, the cases those counted by hand."""

import doctest
import random

import pytest

from hallucination import paired
from hallucination.scenes import HELD_OUT, make_probes, score
from scm import CATEGORIES, Thing, demonstration

PATHS = {
    "accuracy": ("accuracy",), "POPE F1, random": ("pope", "random", "f1"),
    "POPE F1, popular": ("pope", "popular", "f1"), "POPE F1, adversarial": ("pope", "adversarial", "f1"),
    "POPE yes-ratio, adversarial": ("pope", "adversarial", "yes_ratio"), "CHAIR_S": ("chair_s",),
    "CHAIR_I": ("chair_i",), "caption recall": ("recall",), "caption length, words": ("length",),
    "flip rate under do(L_s)": ("flip_rate",), "counts right": ("counting", "accuracy"),
    "CHAIR_S, counting": ("counting", "chair_s"),
}  # fmt: skip


def completions(probes, seed, mistakes=0.4):
    """What a speaker says who now and then sees one more thing, and sometimes says nothing."""
    rng, texts = random.Random(seed), []
    for probe in probes:
        things = list(probe.example.scene.things)
        if rng.random() < mistakes:
            things.append(Thing(rng.choice(CATEGORIES), "red", 0.5, 0.5, 0.3))
        said = demonstration(probe.example, things)
        texts.append(said if rng.random() > 0.05 else "<think> I see")
    return texts


@pytest.mark.parametrize("setting", HELD_OUT)
def test_the_figures_are_those_of_the_table(setting):
    probes = make_probes(12, HELD_OUT[setting], 3)
    before, after = completions(probes, 1), completions(probes, 2)
    found = paired.differences(probes, before, after)
    assert set(found) == set(PATHS) == set(paired.FIGURES)
    for name, path in PATHS.items():
        for figures, value in (
            (score(probes, before), found[name].before),
            (score(probes, after), found[name].after),
        ):
            for key in path:
                figures = figures[key]
            assert value == pytest.approx(figures), name


def test_an_interval_holds_its_difference_and_turns_with_it():
    probes = make_probes(40, 1 / 8, 3)
    before, after = completions(probes, 1, 0.6), completions(probes, 2, 0.1)
    there, back = (paired.differences(probes, *pair) for pair in ((before, after), (after, before)))
    for name, change in there.items():
        low, high = change.interval
        assert low <= change.difference <= high
        assert back[name].interval == pytest.approx((-high, -low))
    assert there["CHAIR_S"].interval[1] < 0 and there["CHAIR_S"].n == 40


def test_the_interval_of_a_share_of_one_answer_a_scene_is_that_of_the_textbook():
    probes = make_probes(100, 1 / 8, 3)
    before, after = completions(probes, 1, 0.5), completions(probes, 2, 0.2)
    pairs = paired.captions(probes, before, after)
    steps = [
        bool(pair.absent(pair.after)) - bool(pair.absent(pair.before)) for pair in pairs
    ]  # -1, 0 or 1 a scene
    mean = sum(steps) / 100
    error = (sum((step - mean) ** 2 for step in steps) / 100 / 100) ** 0.5
    low, high = paired.differences(probes, before, after)["CHAIR_S"].interval
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.015)


def test_where_nothing_is_asked_nothing_is_said():
    probes = [p for p in make_probes(6, 1.0, 3) if "adversarial" not in p.splits]
    said = completions(probes, 1)
    change = paired.differences(probes, said, said)["POPE F1, adversarial"]
    assert (change.before, change.after, change.difference, change.interval, change.n) == (
        None, None, None, None, 0,
    )  # fmt: skip
    assert paired.differences(probes, said, said)["accuracy"].interval == (0, 0)


def test_captions_fall_into_four_cases():
    probes = [
        probe
        for probe in make_probes(5, 1 / 8, 3)
        if probe.example.kind == "caption" and not probe.redrawn
    ]
    right = [f"<answer> {p.example.answer} </answer>" for p in probes]
    absent = [next(c for c in CATEGORIES if c not in p.example.objects) for p in probes]
    wrong = [f"<answer> a {name} and {name}s </answer>" for name in absent]
    before = [right[0], wrong[1], right[2], wrong[3], "<think> I see"]
    after = [right[0], right[1], wrong[2], wrong[3], wrong[4]]
    pairs = paired.captions(probes, before, after)
    assert [pair.case for pair in pairs] == [
        "right both times", "cured", "newly wrong", "wrong both times", "newly wrong",
    ]  # fmt: skip
    assert pairs[1].absent(pairs[1].before) == [absent[1]]


def test_the_example_of_the_sign_test_holds():
    assert doctest.testmod(paired) == (0, 1)
