"""Text -> [0, 1], case by case."""

import pytest
from PIL import Image

from data import Example
from rewards import (
    extract_answer,
    format_reward,
    load_reward,
    normalize,
    object_f1,
    objects_named,
    outcome_reward,
    reasoning_span,
    well_formed,
)


def completion(answer: str, thought: str = " I see a boat. ") -> str:
    return f"<think>{thought}</think> <answer> {answer} </answer>"


def example(kind: str, answer: str, objects=(), vocabulary=()) -> Example:
    return Example(Image.new("RGB", (1, 1)), "?", answer, kind, objects, vocabulary)


@pytest.mark.parametrize(
    ("kind", "truth", "answer", "reward"),
    [
        ("yesno", "yes", "yes", 1),
        ("yesno", "yes", "Yes.", 1),
        ("yesno", "yes", "no", 0),
        ("yesno", "no", "not sure", 0),
        ("yesno", "yes", "", 0),
        ("yesno", "yes", "Yes, there is a boat.", 1),
        ("yesno", "no", "There is no boat.", 1),
        ("yesno", "yes", "yes and no", 0),
        ("yesno", "no", "I do not know", 0),
        ("number", "3", "3", 1),
        ("number", "3", "three", 1),
        ("number", "3", "There are 3 things.", 1),
        ("number", "3", "13", 0),
        ("number", "-2.5", "-2.5", 1),
        ("number", "3", "many", 0),
        ("choice", "red", "Red", 1),
        ("choice", "red", "blue", 0),
        ("choice", "B", "B", 1),
        ("choice", "(B)", "b. red", 1),
        ("choice", "B", "(B) red", 1),
        ("choice", "B", "The answer is B.", 1),
        ("choice", "B", "Option A", 0),
        ("choice", "A", "a", 1),
        ("choice", "A", "a) boat", 1),
        ("choice", "A", "a boat", 0),
        ("choice", "A", "An orange boat", 0),
        ("choice", "A", "A dog", 0),
        ("choice", "A", "A, B, C or D", 0),
        ("choice", "A", "I choose A", 1),
        ("choice", "C", "The correct option is (C).", 1),
        ("choice", "B", "a boat", 0),
        ("choice", "B", "Because it is red", 0),
        ("text", "the Eiffel Tower", "Eiffel tower.", 1),
        ("text", "St. John's", "st. john's", 1),
        ("text", "a cat", "a dog", 0),
    ],
)
def test_outcome_reward_by_kind(kind, truth, answer, reward):
    assert outcome_reward(completion(answer), example(kind, truth)) == reward


def test_a_caption_earns_the_f1_of_the_objects_it_names():
    scene = example("caption", "", ("boat", "car"), ("boat", "car", "fish"))
    assert outcome_reward(completion("a red boat and a blue car"), scene) == 1
    assert outcome_reward(completion("a boat"), scene) == pytest.approx(2 / 3)  # P 1, R 1/2
    assert outcome_reward(completion("a boat and a fish"), scene) == 0.5  # P 1/2, R 1/2
    assert outcome_reward(completion("a boat, a boat, a boat"), scene) == pytest.approx(2 / 3)
    assert outcome_reward(completion("nothing"), scene) == 0


def test_the_format_reward_looks_at_the_tags_alone():
    right = example("yesno", "yes")
    assert format_reward(completion("whatever"), right) == 1
    assert format_reward("<answer> yes </answer>", right) == 0
    assert load_reward("rewards:format_reward")(completion("no"), right) == 1


def test_f1_of_nothing_named_where_nothing_is_there_is_1():
    assert object_f1("an empty sea", (), ("boat",)) == 1


def test_objects_are_whole_words_in_order_and_plurals_count():
    vocabulary = ("boat", "fish", "bus", "car")
    assert objects_named("Boats, a buses lane, two fish; a carpet.", vocabulary) == [
        "boat",
        "bus",
        "fish",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "yes",
        "<think> no end <answer> yes </answer>",
        "<think> a </think> yes",
        "<think> a </think> <answer> yes",
        "<think> <answer> yes </answer> </think>",
        "",
    ],
)
def test_a_completion_without_its_tags_earns_nothing_and_is_malformed(text):
    assert not well_formed(text)
    if "<think> no end" not in text:
        assert outcome_reward(text, example("yesno", "yes")) == 0


def test_the_reasoning_span_is_the_text_between_the_first_tags():
    text = "<think>ab</think> <think>cd</think>"
    assert reasoning_span(text) == (7, 9)
    assert reasoning_span("<think>ab") is None


def test_the_answer_is_the_last_one_after_the_reasoning():
    text = "<think> <answer> no </answer> </think> <answer> a </answer> <answer> b </answer>"
    assert extract_answer(text) == "b"


def test_normalize():
    assert normalize("  The  Cat. ") == "cat"
