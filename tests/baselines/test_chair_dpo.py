"""The truest of several descriptions against the falsest, by CHAIR_I worked by hand."""

import pytest

from baselines.chair_dpo import best_against_worst, chair_i
from baselines.pairs import Pair
from data import Example

SEEN = Example(
    None, "Describe the image.", "", "caption", ("boat", "car"), ("boat", "car", "fish", "tree")
)


def said(caption):
    return f"<think> I see {caption}. </think> <answer> {caption} </answer>"


@pytest.mark.parametrize(
    ("caption", "want"),
    [
        ("a boat and a car", 0.0),
        ("a boat and a fish", 1 / 2),
        ("a boat and a fish and a tree", 2 / 3),
        ("a fish", 1.0),
        ("a cloud", None),  # names nothing that could be judged
    ],
)
def test_chair_i_is_the_share_of_named_things_that_are_absent(caption, want):
    assert chair_i(SEEN, said(caption)) == (want and pytest.approx(want))


def test_the_answer_is_judged_and_not_the_reasoning():
    assert chair_i(SEEN, "<think> I see a fish. </think> <answer> a boat </answer>") == 0


def test_the_lowest_stands_against_the_highest_and_the_first_of_equals_is_taken():
    texts = [said(c) for c in ("a fish and a car", "a fish", "a boat", "a car", "a tree", "a sky")]
    assert best_against_worst(SEEN, texts) == Pair(SEEN, texts[2], texts[1])


@pytest.mark.parametrize("captions", [[], ["a boat"], ["a boat", "a car"], ["a boat", "a sky"]])
def test_a_tie_and_a_text_that_stands_alone_make_no_pair(captions):
    assert best_against_worst(SEEN, [said(caption) for caption in captions]) is None
