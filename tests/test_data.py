"""Users' files are read right or refused clearly."""

import json

import numpy as np
import pytest
from PIL import Image

from data import DataError, read_examples, read_image


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
        (row(image=3), "'image' is"),
        (row(question=" "), "'question' is"),
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
        read_examples(write(photos, "no JSON", row(), "{]"), photos)
    assert [line.split(":")[1] for line in str(error.value).splitlines()] == ["1", "3"]


def test_skip_bad_drops_and_counts(photos, capsys):
    assert len(read_examples(write(photos, row(), "{"), photos, skip_bad=True)) == 1
    assert "skipped 1 of 2 examples" in capsys.readouterr().err


def test_a_file_without_a_usable_line_is_refused_even_with_skip_bad(photos):
    with pytest.raises(DataError, match="no usable example"):
        read_examples(write(photos, "no JSON"), photos, skip_bad=True)


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


# -- files and pictures as other programs write them -----------------------------------------------
LLAVA = [{"from": "human", "value": "<image>\nIs it red?"}, {"from": "gpt", "value": "yes"}]


@pytest.mark.parametrize(
    "text",
    [
        "\ufeff" + json.dumps(row()) + "\n",
        json.dumps(row()) + "\r\n",
        json.dumps(row(question="Is it\u2028red\u0085?"), ensure_ascii=False) + "\n",
        json.dumps([row()], indent=2),
        json.dumps(row(question="<image>\nIs it red?")),
        json.dumps({"image": "a.jpg", "id": 7, "conversations": LLAVA}),
        json.dumps(row(image=["a.jpg"], answer="<answer> yes </answer>")),
        json.dumps({"question_id": 1, "image": "a.jpg", "text": "Is it red?", "label": "yes"}),
    ],
)
def test_one_example_in_many_forms(photos, text):
    path = photos / "data.jsonl"
    path.write_bytes(text.encode())
    (found,) = read_examples(path, photos)
    assert (found.answer, found.kind) == ("yes", "yesno")
    assert "".join(found.question.split()).replace("\u0085", "") == "Isitred?"
    assert found.source.startswith(str(path))


@pytest.mark.parametrize(
    ("answer", "kind"), [(3, "number"), (3.5, "number"), ("-5", "number"), ("A", "text")]
)
def test_an_answer_may_be_a_number(photos, answer, kind):
    (found,) = read_examples(write(photos, row(answer=answer)), photos)
    assert (found.answer, found.kind) == (str(answer), kind)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(kind="yesno", answer="true"), "yes or no"),
        (row(kind="number", answer="many"), "a number"),
        (row(kind="caption", objects=[""]), "cannot|can name"),
        (row(answer=None), "'answer' is missing"),
        (row(answer=["yes", "no"]), "'answer' is"),
        (row(answer=True), "'answer' is True"),
        (row(image=["a.jpg", "a.jpg"]), "2 images"),
        ({"question": "2 + 2?", "answer": "4"}, "'image' is missing"),
        ({"image": "a.jpg", "conversations": LLAVA * 2}, "4 turns"),
        ({"image": "a.jpg", "conversations": "x"}, "list of turns"),
        (row(question="a \ud83d dog?"), "surrogate"),
        (row(image="x" * 5000), "image"),
        (row(image="a\0.jpg"), "image"),
        (row(image="data:image/png;base64," + "A" * 9000), "image"),
        (row(problem="?"), "unknown key 'problem'"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_short_line(photos, bad, reason):
    with pytest.raises(DataError, match=reason) as error:
        read_examples(write(photos, bad), photos)
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 600
    assert "data.jsonl:1: " in str(error.value)


def test_many_bad_lines_are_named_in_20_lines_and_counted(photos):
    with pytest.raises(DataError) as error:
        read_examples(write(photos, *[row(image="b.jpg")] * 500), photos)
    lines = str(error.value).splitlines()
    assert len(lines) == 20 and lines[-1] == "and 481 more of 500 examples"


def test_a_picture_may_be_a_link_as_in_a_hub_snapshot(photos):
    (photos / "hub").mkdir()
    (photos / "hub" / "b.jpg").symlink_to("../a.jpg")
    assert len(read_examples(write(photos, row(image="b.jpg")), photos / "hub")) == 1


@pytest.mark.parametrize(
    ("kind", "values", "how", "expected"),
    [
        ("uint16", [[0, 65535]], {}, [0, 255]),
        (">u2", [[0, 65535]], {}, [0, 255]),
        ("float32", [[0.0, 1.0]], {}, [0, 255]),
        ("float32", [[0.0, 255.0]], {}, [0, 255]),
        ("int32", [[0, 65535]], {}, [0, 255]),
    ],
)
def test_grey_of_many_bits_is_scaled_not_clipped(tmp_path, kind, values, how, expected):
    path = tmp_path / "grey.tif"
    Image.fromarray(np.array(values, kind)).save(path, **how)
    assert np.asarray(read_image(path))[0, :, 0].tolist() == expected


def test_transparent_grey_of_16_bits_lies_on_white(tmp_path):
    path = tmp_path / "grey.png"
    Image.fromarray(np.array([[0, 65535, 32768]], "uint16")).save(path, transparency=0)
    assert np.asarray(read_image(path))[0, :, 0].tolist() == [255, 255, 128]


@pytest.mark.parametrize("values", [[[np.nan, 0.0]], [[-1.0, 1.0]], [[0.0, 1e6]]])
def test_floats_without_a_known_white_are_refused(tmp_path, values):
    path = tmp_path / "grey.tif"
    Image.fromarray(np.array(values, "float32")).save(path)
    with pytest.raises(ValueError, match="between 0 and 65,535"):
        read_image(path)


def test_more_pixels_than_the_limit_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    Image.new("1", (200, 100)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15_000)  # a warning up to twice as many
    with pytest.raises(ValueError, match="more than 15,000 pixels"):
        read_image(path)
