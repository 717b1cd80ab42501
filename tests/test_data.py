"""The scene world is the SCM it claims to be, and users' files are read right or refused clearly."""

import json
import random
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from data import (
    AT_HOME,
    BACKGROUNDS,
    CATEGORIES,
    COLORS,
    DataError,
    Scene,
    Thing,
    answer_to,
    ask,
    demonstration,
    read_examples,
    read_image,
    sample_example,
    sample_scene,
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
        assert ask(scene, kind, topic).answer == answer


def test_do_background_changes_no_answer():
    rng = random.Random(3)
    for _ in range(50):
        example = sample_example(rng)
        elsewhere = example.scene.do(background=rng.choice(BACKGROUNDS))
        assert ask(elsewhere, example.kind, example.topic).answer == example.answer


def test_existence_questions_are_half_no_and_half_of_the_noes_ask_for_the_home_category():
    rng = random.Random(0)
    asked = [e for e in (sample_example(rng, 0.9) for _ in range(8000)) if e.kind == "yesno"]
    noes = [e for e in asked if e.answer == "no"]
    adversarial = [e for e in noes if e.topic == e.scene.home]
    assert abs(len(noes) / len(asked) - 0.5) < 4 * 0.5 / np.sqrt(len(asked))
    assert abs(len(adversarial) / len(noes) - 0.5) < 4 * 0.5 / np.sqrt(len(noes))
    assert all(e.topic not in e.scene.categories for e in noes)


def test_a_demonstration_names_what_it_believes_and_answers_accordingly():
    example = ask(Scene((BOAT,), "sea"), "number", "")
    assert demonstration(example, example.scene.things) == (
        "<think> I see a red boat. </think> <answer> 1 </answer>"
    )
    phantom = (BOAT, Thing(AT_HOME["sea"], "blue", 0, 0, 0.1), CAR)
    assert demonstration(example, phantom).endswith("<answer> 3 </answer>")
    assert answer_to("choice", "fish", phantom) == "none"


# -- users' files ------------------------------------------------------------------------------
@pytest.fixture
def photos(tmp_path):
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "a.jpg")
    return tmp_path


def write(folder, *rows):
    path = folder / "data.jsonl"
    path.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    )
    return path


def row(**changes):
    return {"image": "a.jpg", "question": "Is it red?", "answer": "yes", **changes}


def test_a_file_becomes_examples_with_guessed_kinds(photos):
    rows = [row(), row(answer="12"), row(answer="a wall"), row(kind="choice"), ""]
    rows.append(row(kind="caption", objects=["Dog", "cat"]))
    examples = read_examples(write(photos, *rows), photos)
    assert [e.kind for e in examples] == ["yesno", "number", "text", "choice", "caption"]
    assert examples[-1].objects == ("dog", "cat") and examples[0].vocabulary == ("cat", "dog")
    assert examples[0].open_image().size == (40, 30)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ("{", "not JSON"),
        ("[1]", "not an object"),
        (row(image="b.jpg"), "does not exist"),
        (row(image="data.jsonl"), "cannot be read"),
        (row(image="../a.jpg"), "outside"),
        (row(image=3), "'image' must be"),
        (row(question=" "), "'question' must be"),
        (row(kind="essay"), "'kind' is 'essay'"),
        (row(kind="caption"), "needs 'objects'"),
        (row(objects="dog"), "list of words"),
        (row(extra=1), "unknown key 'extra'"),
    ],
)
def test_a_bad_line_is_refused_with_file_line_and_reason(photos, bad, reason):
    path = write(photos, row(), bad)
    with pytest.raises(DataError) as error:
        read_examples(path, photos)
    assert f"{path}:2: " in str(error.value) and reason in str(error.value)
    assert "\n" not in str(error.value)


def test_every_bad_line_is_reported_at_once(photos):
    with pytest.raises(DataError) as error:
        read_examples(write(photos, "{", row(), "{"), photos)
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == ["1", "3"]


def test_skip_bad_drops_and_counts(photos, capsys):
    assert len(read_examples(write(photos, row(), "{"), photos, skip_bad=True)) == 1
    assert "skipped 1 of 2 examples" in capsys.readouterr().err


def test_a_file_without_a_usable_line_is_refused_even_with_skip_bad(photos):
    with pytest.raises(DataError, match="no usable example"):
        read_examples(write(photos, "{"), photos, skip_bad=True)


# -- images ------------------------------------------------------------------------------------
def test_grey_palette_and_cmyk_images_become_the_rgb_they_show(tmp_path):
    color = Image.new("RGB", (8, 8), (200, 40, 40))
    color.quantize(4).save(tmp_path / "palette.png")
    color.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    Image.new("L", (8, 8), 90).save(tmp_path / "grey.png")
    Image.fromarray(np.full((8, 8), 90 * 256, np.uint16)).save(tmp_path / "grey16.png")
    for name, expected in (("palette.png", (200, 40, 40)), ("cmyk.jpg", (200, 40, 40)),
                           ("grey.png", (90, 90, 90)), ("grey16.png", (90, 90, 90))):  # fmt: skip
        image = read_image(tmp_path / name)
        assert image.mode == "RGB"
        assert np.abs(np.asarray(image, int) - expected).max() < 30, name


def test_transparent_pixels_lie_on_white(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied(tmp_path):
    image = Image.new("RGB", (8, 4))
    exif = image.getexif()
    exif[0x0112] = 6  # rotated by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (4, 8)


def test_a_truncated_image_is_refused_while_reading(photos):
    whole = (photos / "a.jpg").read_bytes()
    (photos / "a.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        read_examples(write(photos, row()), photos)
