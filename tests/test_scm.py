"""The scene world is the SCM it claims to be."""

import random
from collections import Counter

import numpy as np

from scm import (
    AT_HOME,
    BACKGROUNDS,
    CATEGORIES,
    CLEAR,
    COLORS,
    CROWDED,
    Scene,
    Thing,
    answer_to,
    demonstration,
    question_about,
    sample_example,
    sample_scene,
    world_of,
)

BOAT, CAR = Thing("boat", "red", 0.27, 0.27, 0.4), Thing("car", "blue", 0.73, 0.73, 0.4)


def scenes(count, confounding, seed=0):
    rng = random.Random(seed)
    return [sample_scene(rng, confounding) for _ in range(count)]


# -- the world ---------------------------------------------------------------------------------
def test_there_are_eight_categories_and_homes_and_six_colours():
    assert len(CATEGORIES) == len(set(BACKGROUNDS)) == 8 and len(COLORS) == 6


def test_scenes_hold_one_to_three_different_things_in_places_that_do_not_overlap():
    for scene in scenes(300, 0.9):
        assert 1 <= len(scene.things) == len(set(scene.categories)) <= 3
        masks = [Scene((thing,), scene.background).mask(96).astype(int) for thing in scene.things]
        assert sum(masks).max() == 1 and all(mask.sum() > 300 for mask in masks)


def test_a_crowded_scene_holds_three_to_six_things_in_places_that_do_not_overlap():
    rng = random.Random(0)
    for scene in (sample_scene(rng, 1 / 8, world=CROWDED) for _ in range(300)):
        assert 3 <= len(scene.things) == len(set(scene.categories)) <= 6
        masks = [Scene((thing,), scene.background).mask(96).astype(int) for thing in scene.things]
        assert sum(masks).max() == 1 and all(mask.sum() > 70 for mask in masks)
        assert scene.do(background="sea").things == scene.things


def test_a_world_s_places_are_centred_and_in_reading_order():
    assert CLEAR.places == [(0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)]
    assert len(CROWDED.places) == 16
    assert CROWDED.places == sorted(CROWDED.places, key=lambda place: place[::-1])


def test_the_scenes_of_the_old_world_are_those_they_were():
    rng = random.Random(7)
    thing = sample_scene(rng, 0.9).things[-1]
    assert (thing.category, thing.color, round(thing.x, 6), round(thing.y, 6)) == (
        "rocket",
        "red",
        0.271435,
        0.264628,
    )


def test_flags_ask_for_a_world_and_crowds_are_seen_in_clear_air():
    assert world_of() == CLEAR and world_of(0.5).fog == 0.5 and world_of(0.5).side == 2
    assert world_of(0.5, crowds=True) == CROWDED and CROWDED.fog == 0


def test_confounding_puts_the_home_category_into_the_scene():
    share = np.mean([scene.home in scene.categories for scene in scenes(4000, 0.9)])
    # rho, and what chance adds: of the two other things expected 1 of 7 categories is the home
    assert abs(share - (0.9 + 0.1 * 1 / 7)) < 4 * np.sqrt(0.09 / 4000)


def test_at_one_eighth_things_and_background_are_independent():
    world = scenes(8000, 1 / 8)
    together = Counter((s.background, c) for s in world for c in s.categories)
    expected = sum(together.values()) / 64
    chi_square = sum(
        (together[b, c] - expected) ** 2 / expected for b in BACKGROUNDS for c in CATEGORIES
    )
    assert chi_square < 49 + 4 * np.sqrt(2 * 49)
    assert abs(np.mean([s.home in s.categories for s in world]) - 2 / 8) < 0.02


def test_full_confounding_always_has_the_home_category():
    assert all(scene.home in scene.categories for scene in scenes(200, 1.0))


def test_redrawing_the_background_moves_no_pixel_of_a_thing():
    scene = Scene((BOAT, CAR), "sea", lighting=1.0, texture_seed=5)
    other = scene.do(background="desert")
    mask = scene.mask(96)
    before, after = np.asarray(scene.render(96)), np.asarray(other.render(96))
    assert (before[mask] == after[mask]).all() and other.things == scene.things
    assert (before[~mask] != after[~mask]).any(-1).mean() > 0.95


def test_lighting_changes_brightness_and_nothing_else():
    scene = Scene((BOAT,), "snow")
    dark = scene.do(lighting=0.5)
    assert np.abs(np.asarray(dark.render(64), float) - np.asarray(scene.render(64)) / 2).max() <= 1


def test_every_background_has_its_own_look_and_the_same_seed_the_same_texture():
    looks = [np.asarray(Scene((), name, texture_seed=1).render(48)) for name in BACKGROUNDS]
    assert all((a != b).any(-1).mean() > 0.5 for i, a in enumerate(looks) for b in looks[:i])
    assert (looks[0] == np.asarray(Scene((), BACKGROUNDS[0], texture_seed=1).render(48))).all()
    assert (looks[0] != np.asarray(Scene((), BACKGROUNDS[0], texture_seed=2).render(48))).any()


# -- questions ---------------------------------------------------------------------------------
def test_answers_by_hand():
    scene = Scene((BOAT, CAR), "sea")
    answers = {
        ("yesno", "boat"): "yes",
        ("yesno", "fish"): "no",
        ("number", ""): "2",
        ("choice", "car"): "blue",
        ("caption", ""): "a red boat and a blue car",
    }
    for (kind, topic), answer in answers.items():
        assert question_about(scene, kind, topic).answer == answer


def test_do_background_changes_no_answer():
    rng = random.Random(3)
    for _ in range(50):
        example = sample_example(rng)
        elsewhere = example.scene.do(background=rng.choice(BACKGROUNDS))
        assert question_about(elsewhere, example.kind, example.topic).answer == example.answer


def test_existence_questions_are_half_no_and_half_of_the_noes_ask_for_the_home_category():
    rng = random.Random(0)
    asked = [e for e in (sample_example(rng, 0.9) for _ in range(8000)) if e.kind == "yesno"]
    noes = [e for e in asked if e.answer == "no"]
    adversarial = [e for e in noes if e.topic == e.scene.home]
    assert abs(len(noes) / len(asked) - 0.5) < 4 * 0.5 / np.sqrt(len(asked))
    assert abs(len(adversarial) / len(noes) - 0.5) < 4 * 0.5 / np.sqrt(len(noes))
    assert all(e.topic not in e.scene.categories for e in noes)


def test_a_demonstration_names_what_it_believes_and_answers_accordingly():
    example = question_about(Scene((BOAT,), "sea"), "number", "")
    assert demonstration(example, example.scene.things) == (
        "<think> I see a red boat. </think> <answer> 1 </answer>"
    )
    phantom = (BOAT, Thing(AT_HOME["sea"], "blue", 0, 0, 0.1), CAR)
    assert demonstration(example, phantom).endswith("<answer> 3 </answer>")
    assert answer_to("choice", "fish", phantom) == "none"
