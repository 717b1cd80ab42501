"""COCO annotation files on disk: the 80 categories, the objects of each image, its human captions.

The files are the official `instances_*.json` and `captions_*.json`.  Every annotation is checked once,
when it is read; what comes out names categories by their names and images by their ids.
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from data import DataError
from hallucination.files import Bad, read_text

_BY_SUPERCATEGORY = {  # in the official order
    "person": "person",
    "vehicle": "bicycle, car, motorcycle, airplane, bus, train, truck, boat",
    "outdoor": "traffic light, fire hydrant, stop sign, parking meter, bench",
    "animal": "bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe",
    "accessory": "backpack, umbrella, handbag, tie, suitcase",
    "sports": "frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, "
    "skateboard, surfboard, tennis racket",
    "kitchen": "bottle, wine glass, cup, fork, knife, spoon, bowl",
    "food": "banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake",
    "furniture": "chair, couch, potted plant, bed, dining table, toilet",
    "electronic": "tv, laptop, mouse, remote, keyboard, cell phone",
    "appliance": "microwave, oven, toaster, sink, refrigerator",
    "indoor": "book, clock, vase, scissors, teddy bear, hair drier, toothbrush",
}
COCO_CATEGORIES: dict[str, str] = {  # name -> supercategory
    name: kind for kind, names in _BY_SUPERCATEGORY.items() for name in names.split(", ")
}
_SPLITS = ("train2014", "val2014")
_KINDS = ("instances", "captions")


class Instance(NamedTuple):
    """One annotated object.  The outline is polygons, a run-length code, or None where there is none."""

    category: str
    box: list[float]  # x, y, width, height in pixels of the image
    outline: list | dict | None


@dataclass(frozen=True)
class Instances:
    """The images of an instances file, and what is annotated on each; an image may hold nothing."""

    images: dict[int, tuple[str, int, int]]  # image id -> file name, width, height
    objects: dict[int, list[Instance]]


def find_annotations(coco_dir: Path) -> list[tuple[Path, Path]]:
    """(instances, captions) of the 2014 splits under `coco_dir/annotations` or `coco_dir` itself.

    A split counts where both its files are there, and one of the two splits is enough; what is missing is
    said on stderr.  Raises DataError where no split is complete.
    """
    folders = (coco_dir / "annotations", coco_dir)
    pairs, missing = [], []
    for split in _SPLITS:
        names = [f"{kind}_{split}.json" for kind in _KINDS]
        found = [next((f / n for f in folders if (f / n).is_file()), None) for n in names]
        missing += [name for name, file in zip(names, found, strict=True) if file is None]
        if None not in found:
            pairs.append(tuple(found))
    if not pairs:
        raise DataError(
            f"{coco_dir}: no complete pair of annotation files: no {', '.join(missing)}"
        )
    if missing:
        print(f"{coco_dir}: goes without {', '.join(missing)}", file=sys.stderr)
    return pairs


def read_instances(path: Path, bad: Bad, outlines: bool = True) -> Instances:
    """Read an instances file; without `outlines` they are dropped while parsing, which saves most memory.

    Through `bad`: an unusable image, category or annotation.  Raises DataError for a file of another shape.
    """
    root = _read_tables(path, ("images", "annotations", "categories"), outlines)
    images = {}
    for where, row in _rows(path, root, "images", bad):
        name, width, height = (row.get(key) for key in ("file_name", "width", "height"))
        if not (_is_id(row.get("id")) and isinstance(name, str)):
            bad(where, "needs a whole number as id and a file_name")
        elif not (_is_id(width) and _is_id(height) and width > 0 and height > 0):
            bad(where, f"image {row['id']}: width and height must be whole numbers above 0")
        elif row["id"] in images:
            bad(where, f"image {row['id']} is listed twice")
        else:
            images[row["id"]] = (name, width, height)
    categories = {}
    for where, row in _rows(path, root, "categories", bad):
        if not _is_id(row.get("id")):
            bad(where, "needs a whole number as id")
        elif str(row.get("name")) not in COCO_CATEGORIES:
            bad(where, f"{row.get('name')!r} is not one of the 80 COCO categories")
        else:
            categories[row["id"]] = row["name"]
    objects = {image_id: [] for image_id in images}
    for where, row in _rows(path, root, "annotations", bad):
        image_id, category_id = row.get("image_id"), row.get("category_id")
        outline = row.get("segmentation")
        if not _is_id(image_id) or image_id not in images:
            bad(where, f"annotation of an image that is not listed: {image_id!r}")
        elif not _is_id(category_id) or category_id not in categories:
            bad(where, f"image {image_id}: category id {category_id!r} is not listed")
        elif not (_are_numbers(row.get("bbox")) and len(row["bbox"]) == 4):
            bad(where, f"image {image_id}: bbox is not [x, y, width, height]")
        elif outline is not None and (reason := _outline_fault(outline, *images[image_id][1:])):
            bad(where, f"image {image_id}: {reason}")
        else:
            objects[image_id].append(Instance(categories[category_id], row["bbox"], outline))
    return Instances(images, objects)


def read_captions(path: Path, bad: Bad) -> dict[int, list[str]]:
    """The human captions of every listed image, in the file's order.

    Through `bad`: an unusable image or annotation.  Raises DataError for a file of another shape.
    """
    root = _read_tables(path, ("images", "annotations"))
    captions = {}
    for where, row in _rows(path, root, "images", bad):
        if _is_id(row.get("id")):
            captions[row["id"]] = []
        else:
            bad(where, "needs a whole number as id")
    for where, row in _rows(path, root, "annotations", bad):
        image_id, caption = row.get("image_id"), row.get("caption")
        if not _is_id(image_id) or image_id not in captions:
            bad(where, f"caption of an image that is not listed: {image_id!r}")
        elif not isinstance(caption, str):
            bad(where, f"image {image_id}: no caption")
        else:
            captions[image_id].append(caption)
    return captions


def _read_tables(path: Path, keys: Sequence[str], outlines: bool = True) -> dict:
    """The JSON object of an annotation file, which must hold a list under each of `keys`."""
    text = read_text(path)
    try:
        root = json.loads(text, object_hook=None if outlines else _without_outline)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None
    missing = [k for k in keys if not (isinstance(root, dict) and isinstance(root.get(k), list))]
    if missing:
        raise DataError(f"{path}: not a COCO annotation file: no list under {', '.join(missing)}")
    return root


def _without_outline(row: dict) -> dict:
    row.pop("segmentation", None)
    return row


def _rows(path: Path, root: dict, key: str, bad: Bad) -> Iterator[tuple[str, dict]]:
    for i, row in enumerate(root[key]):
        if isinstance(row, dict):
            yield f"{path}:{key}[{i}]", row
        else:
            bad(f"{path}:{key}[{i}]", "not an object like {...}")


def _is_id(value: Any) -> bool:
    return type(value) is int  # a bool is an int too


def _are_numbers(values: Any) -> bool:
    # the bound is false of NaN and infinity, which Python's JSON lets through
    return isinstance(values, list) and all(
        type(v) in (int, float) and abs(v) < 1e9 for v in values
    )


def _outline_fault(outline: Any, width: int, height: int) -> str | None:
    """Why an outline cannot be drawn, or None where it can."""
    if isinstance(outline, list):
        if all(_are_numbers(polygon) and len(polygon) % 2 == 0 for polygon in outline):
            return None
        return "segmentation is not lists of x, y, x, y, ..."
    counts = outline.get("counts") if isinstance(outline, dict) else None
    if isinstance(counts, str):
        return None
    if not _are_numbers(counts) or outline.get("size") != [height, width]:
        return f"segmentation is neither polygons nor a run-length code of size {[height, width]}"
    if sum(counts) != width * height or not all(_is_id(c) and c >= 0 for c in counts):
        return f"the runs of the segmentation do not add up to {width * height} pixels"
    return None


def object_mask(
    objects: Sequence[Instance], width: int, height: int, size: tuple[int, int]
) -> np.ndarray:
    """Where the objects of a `width` x `height` image are, resized to `size` = (w, h): bool (h, w).

    A cell is True where objects cover at least half of it.  Outlines are good to a pixel; an object
    without one, or with a compressed run-length code, counts as its box.
    """
    canvas = Image.new("L", (width, height))
    draw = ImageDraw.Draw(canvas)
    runs = np.zeros((height, width), bool)
    for _, (x, y, w, h), outline in objects:
        if isinstance(outline, dict) and isinstance(outline["counts"], list):
            # runs of 0, 1, 0, 1, ... down the columns
            values = np.arange(len(outline["counts"])) % 2 == 1
            runs |= np.repeat(values, outline["counts"]).reshape(height, width, order="F")
        elif isinstance(outline, list) and outline:
            for polygon in outline:
                if len(polygon) >= 6:  # less than three corners has no area
                    draw.polygon(polygon, fill=255)
        elif w > 0 and h > 0:
            left, top = max(int(x), 0), max(int(y), 0)
            runs[top : max(int(np.ceil(y + h)), 0), left : max(int(np.ceil(x + w)), 0)] = True
    covered = Image.fromarray(np.where(runs, np.uint8(255), np.asarray(canvas)))
    return np.asarray(covered.resize(size, Image.Resampling.BOX)) >= 128  # (h, w)


def image_id_of(name: str) -> int:
    """The image id in a COCO file name, its last run of digits: "COCO_val2014_000000310196.jpg" -> 310196.

    Raises DataError where there is none.
    """
    digits = re.findall(r"[0-9]+", PurePath(name).stem)
    if not digits or len(digits[-1]) > 18:
        raise DataError(f"{name!r}: no image id in this file name")
    return int(digits[-1])
