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
