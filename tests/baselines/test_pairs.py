"""A chosen text is the rejected one made true, and nothing else; what needs no correction makes no pair."""

import random

import pytest

from baselines.pairs import Pair, corrected, description_pair, ha_dpo_pairs, yes_no_pair
from data import Example
from rewards import outcome_reward
from scm import CATEGORIES, Scene, Thing, demonstration, question_about, sample_example

BOAT, CAR = Thing("boat", "blue", 0.3, 0.3, 0.4), Thing("car", "orange", 0.7, 0.7, 0.4)
SCENE = Scene((BOAT, CAR), "reef")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("I see a blue boat.", "I see a blue boat."),
        ("I see a red boat.", "I see a blue boat."),
        ("I see a blue boat and a red fish.", "I see a blue boat."),
        ("I see a red fish and a blue boat.", "I see a blue boat."),
        ("I see a red car and a tree and a boat.", "I see an orange car and a boat."),
        ("I see an orange boat and a blue boat.", "I see a blue boat."),  # one boat is there
        ("a boat and a car", "a boat and a car"),
        ("I see a red fish.", None),
        ("I see a blue boat. A fish? </think> a green fish", None),
        ("I see a blue boat. A fish?", "I see a blue boat. A fish?"),
        ("A snow scene", "A snow scene"),
        ("a boathouse and a red boater", "a boathouse and a red boater"),
    ],
)
def test_corrections_by_hand(text, want):
    assert corrected(text, SCENE.things) == want


def test_a_description_is_corrected_in_its_reasoning_and_in_its_answer():
    example = question_about(SCENE, "caption", "")
    said = "<think> I see a red boat and a fish. </think> <answer> a red boat and a fish </answer>"
    right = "<think> I see a blue boat. </think> <answer> a blue boat </answer>"
    assert description_pair(example, said) == Pair(example, right, said)
    assert description_pair(example, right) is None  # what it leaves unsaid is no hallucination


@pytest.mark.parametrize(
    ("topic", "said", "chosen"),
    [
        (
            "fish",
            "<think> I see a blue boat and a red fish. A fish? </think> <answer> yes </answer>",
            "<think> I see a blue boat. A fish? </think> <answer> no </answer>",
        ),
        (
            "car",
            "<think> I see a blue boat. A car? </think> <answer> no </answer>",
            "<think> I see a blue boat and an orange car. A car? </think> <answer> yes </answer>",
        ),
        ("car", "<think> I see a fish. A car? </think> <answer> yes </answer>", None),  # right
        ("fish", "<think> I see a red fish. A fish? </think> <answer> yes </answer>", None),
        ("fish", "<think> I see a blue boat. A fish? </think> <answer> red </answer>", None),
        ("fish", "<think> I see a blue boat. A fish?", None),
    ],
)
def test_wrong_answers_alone_make_pairs_of_questions(topic, said, chosen):
    example = question_about(SCENE, "yesno", topic)
    assert yes_no_pair(example, said) == (chosen and Pair(example, chosen, said))


def test_an_epoch_has_wrong_answers_once_and_descriptions_twice():
    asked, shown = question_about(SCENE, "yesno", "fish"), question_about(SCENE, "caption", "")
    counted = question_about(SCENE, "number", "")
    wrong = "<think> I see a blue boat. A fish? </think> <answer> yes </answer>"
    right = wrong.replace("yes", "no")
    false = "<think> I see a red boat. </think> <answer> a red boat </answer>"
    examples = [asked] * 300 + [shown] * 200 + [counted] * 7
    completions = [wrong] * 120 + [right] * 180 + [false] * 207
    pairs = ha_dpo_pairs(examples, completions, random.Random(0))
    assert len(pairs) == 120 + 2 * 200
    assert [pair.example.kind for pair in pairs].count("caption") == 400
    assert pairs == ha_dpo_pairs(examples, completions, random.Random(0))
    assert [pair.example.kind for pair in pairs[:120]] != ["yesno"] * 120  # shuffled


def test_chosen_texts_of_speakers_who_believe_other_things_are_true():
    rng, made = random.Random(3), 0
    for _ in range(400):
        example = sample_example(rng)
        things = [*example.scene.things, *sample_example(rng).scene.things]
        believed = rng.sample(things, rng.randint(1, len(things)))
        completion = demonstration(example, believed)
        for pair in ha_dpo_pairs([example], [completion], rng):
            made += 1
            assert pair.rejected == completion != pair.chosen
            named = {
                c for c in CATEGORIES if f" {c}" in pair.chosen.replace(f"A {example.topic}?", "")
            }
            assert named <= set(example.scene.categories)
            assert example.kind == "caption" or outcome_reward(pair.chosen, example) == 1
            assert ha_dpo_pairs([example], [pair.chosen], rng) == []  # nothing is left to correct
    assert made > 100


def test_an_example_without_its_scene_is_refused():
    with pytest.raises(ValueError, match="has no scene"):
        description_pair(Example(None, "Describe the image.", "", kind="caption"), "a boat")
