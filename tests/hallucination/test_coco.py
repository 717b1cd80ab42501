"""COCO's files: what is read, what is refused, and where the objects lie."""

import json

import numpy as np
import pytest

from data import DataError
from hallucination.coco import (
    COCO_CATEGORIES,
    Instance,
    image_id_of,
    object_mask,
    read_captions,
    read_instances,
)
from hallucination.files import Bad

IMAGE = {"id": 1, "file_name": "COCO_val2014_000000000001.jpg", "width": 4, "height": 2}
CAT = {"id": 17, "name": "cat"}
BOX = {"image_id": 1, "category_id": 17, "bbox": [0, 0, 2, 2]}


def write(path, **tables):
    path.write_text(json.dumps(tables))
    return path


def instances(path, image=IMAGE, category=CAT, annotation=BOX):
    return write(path, images=[image], categories=[category], annotations=[annotation])


def test_there_are_80_categories_in_12_groups():
    assert len(COCO_CATEGORIES) == 80 and len(set(COCO_CATEGORIES.values())) == 12
    assert list(COCO_CATEGORIES)[:3] == ["person", "bicycle", "car"]
    assert list(COCO_CATEGORIES)[-1] == "toothbrush"


def test_objects_are_read_by_image_and_name_and_an_empty_image_is_one(tmp_path):
    path = write(
        tmp_path / "i.json",
        images=[IMAGE, {**IMAGE, "id": 2}],
        categories=[CAT],
        annotations=[{**BOX, "segmentation": [[0, 0, 2, 0, 2, 2]]}],
    )
    read = read_instances(path, Bad())
    assert read.images[1] == ("COCO_val2014_000000000001.jpg", 4, 2)
    assert read.objects == {1: [("cat", [0, 0, 2, 2], [[0, 0, 2, 0, 2, 2]])], 2: []}
    assert read_instances(path, Bad(), outlines=False).objects[1] == [("cat", [0, 0, 2, 2], None)]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"image": {**IMAGE, "id": "1"}}, "whole number as id"),
        ({"image": {**IMAGE, "width": 0}}, "width and height"),
        ({"category": {"id": 17, "name": "okapi"}}, "'okapi' is not one of"),
        ({"category": {"id": 17, "name": ["cat"]}}, "is not one of"),
        ({"category": {"id": "17", "name": "cat"}}, "whole number as id"),
        ({"annotation": {**BOX, "bbox": [0, 0, float("nan"), 1]}}, "bbox"),
        ({"annotation": {**BOX, "image_id": 9}}, "not listed: 9"),
        ({"annotation": {**BOX, "category_id": 18}}, "category id 18"),
        ({"annotation": {**BOX, "bbox": [1, 2]}}, "bbox"),
        ({"annotation": {**BOX, "segmentation": [[0, 0, 1]]}}, "not lists of x, y"),
        ({"annotation": {**BOX, "segmentation": {"counts": [3], "size": [2, 4]}}}, "add up to 8"),
        ({"annotation": None}, "not an object"),
    ],
)
def test_an_entry_that_cannot_be_used_is_named_or_dropped(tmp_path, changes, reason):
    path = instances(tmp_path / "i.json", **changes)
    with pytest.raises(DataError, match=reason):
        read_instances(path, Bad())
    bad = Bad(skip=True)
    read_instances(path, bad)
    assert bad.dropped >= 1


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not JSON"),
        ("[]", "no list under images"),
        ("7", "no list under images"),
        ('{"images": []}', "annotations"),
        ('{"images": {}, "annotations": {}, "categories": {}}', "no list under images"),
        ('{"images": [' + "9" * 5000 + "]}", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("id\tcaption\n", "not JSON"),
    ],
)
def test_a_file_of_another_kind_is_refused(tmp_path, text, reason):
    path = tmp_path / "i.json"
    path.write_text(text)
    for read in (read_instances, read_captions):
        with pytest.raises(DataError, match=reason):
            read(path, Bad())


def test_captions_are_read_by_image(tmp_path):
    rows = [{"image_id": 1, "caption": "a"}, {"image_id": 1, "caption": "b"}]
    path = write(tmp_path / "c.json", images=[IMAGE], annotations=rows)
    assert read_captions(path, Bad()) == {1: ["a", "b"]}


@pytest.mark.parametrize(
    "outline",
    [
        None,  # its box
        {"counts": [0, 4, 4], "size": [2, 4]},  # two columns, top to bottom
        {"counts": "compressed", "size": [2, 4]},  # its box
        [[-0.5, -0.5, 1.4, -0.5, 1.4, 1.4, -0.5, 1.4]],
    ],
)
def test_an_object_lies_where_its_outline_or_its_box_is(outline):
    mask = object_mask([Instance("cat", [0, 0, 2, 2], outline)], 4, 2, (4, 2))
    assert np.array_equal(mask, [[True, True, False, False]] * 2)


def test_masks_are_resized_and_a_bare_image_has_none():
    mask = object_mask([Instance("cat", [0, 0, 2, 2], None)], 4, 2, (2, 1))
    assert np.array_equal(mask, [[True, False]])
    assert not object_mask([], 4, 2, (2, 1)).any()


def test_image_ids_are_the_last_digits_of_a_name():
    assert image_id_of("COCO_val2014_000000310196.jpg") == image_id_of("310196") == 310196
    with pytest.raises(DataError, match="no image id"):
        image_id_of("cat.jpg")


VALUES = (
    None,
    True,
    -1,
    1.5,
    1e400,
    float("nan"),
    2**80,
    "",
    "1",
    [],
    [1],
    {},
    {"a": 1},
    [[]],
    [{}],
)


@pytest.mark.parametrize("table", ["images", "categories", "annotations"])
def test_no_value_in_any_place_ends_in_a_traceback(tmp_path, table):
    rows = {
        "images": IMAGE,
        "categories": CAT,
        "annotations": BOX | {"segmentation": [[0, 0, 1, 0, 1, 1]]},
    }
    for key in [*rows[table], "segmentation", "caption", None]:
        for value in VALUES:
            row = value if key is None else rows[table] | {key: value}
            path = write(tmp_path / "i.json", **{k: [v] for k, v in (rows | {table: row}).items()})
            for read in (read_instances, read_captions):
                try:
                    read(path, Bad(skip=True))
                except DataError as error:
                    assert "\n" not in str(error)


@pytest.mark.parametrize("name", ["cat.jpg", "", "9" * 5000, "." * 300])
def test_a_name_without_an_id_of_an_image_is_refused(name):
    with pytest.raises(DataError, match="no image id"):
        image_id_of(name)
