"""CHAIR (Rohrbach et al. 2018): which objects do captions name that are not in the image?

    mention      a place in a caption that names one of the 80 COCO categories; repeats count
    truth        of an image: the categories of its annotated instances and those that its human
                 captions name
    CHAIR_I      hallucinated mentions / mentions, over all captions
    CHAIR_S      captions with at least one hallucinated mention / captions
    recall       distinct true categories named / true categories, each summed over the captions
    F1           harmonic mean of 1 - CHAIR_I and recall

Departures from the published scorer:

1.  The synonyms are our own, in `coco_synonyms.txt`; `read_synonyms` reads the official list.
2.  Words are runs of letters, so "hot-dog" and "dog's" name a dog of their kind; punctuation parts
    them, and a compound never spans it. Plurals are undone by `singular`, a few rules and exceptions.
3.  Every listed entry of up to three words counts, not a fixed list of pairs.
4.  A ratio without a denominator is 0, where the published scorer divides by zero.
"""

import argparse
import hashlib
import json
import os
import re
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from data import DataError, Example
from hallucination import coco
from hallucination.coco import COCO_CATEGORIES, image_id_of
from hallucination.command import (
    Result,
    add_model,
    answered,
    ask_model,
    images_of_model,
    new_command,
    one_source,
    refuse_limit,
    with_dropped,
)
from hallucination.files import Bad, answer_of, read_rows, read_text
from rewards import final_answer

Synonyms = dict[str, str | None]  # words in the singular -> category, or None: names none of them
Truth = dict[int, set[str]]  # image id -> categories

_OWN = Path(__file__).with_name("coco_synonyms.txt")
_LONGEST = 3  # words of an entry
_TOKEN = re.compile(r"[a-z]+|[.,:;!?()\"\n]")
_MODIFIERS = {  # by supercategory
    "animal": ("baby", "adult", "mother", "father"),
    "vehicle": ("passenger",),
}
_ID_KEYS = ("image_id", "image", "image_file", "file_name", "question_id")

# --------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------
_IRREGULAR = {
    **{
        "people": "person",
        "children": "child",
        "grandchildren": "grandchild",
        "passersby": "passerby",
    },
    **{"feet": "foot", "teeth": "tooth", "geese": "goose", "mice": "mouse", "oxen": "ox"},
    **{"knives": "knife", "wives": "wife", "housewives": "housewife", "lives": "life"},
    **{"calves": "calf", "loaves": "loaf", "wolves": "wolf", "halves": "half", "leaves": "leaf"},
    **{"shelves": "shelf", "bookshelves": "bookshelf", "scarves": "scarf", "thieves": "thief"},
    **{"pocketknives": "pocketknife", "buses": "bus", "busses": "bus", "minibuses": "minibus"},
    **{"emus": "emu", "gnus": "gnu", "menus": "menu"},
}
_NO_PLURAL = {
    "scissors",
    "shears",
    "tennis",
    "gas",
    "lens",
    "canvas",
    "this",
    "his",
    "is",
    "was",
    "has",
}
_IE = {
    "tie",
    "bowtie",
    "necktie",
    "pie",
    "cookie",
    "brownie",
    "smoothie",
    "hoodie",
    "selfie",
    "goalie",
    "hoagie",
    "doggie",
    "movie",
}
_OE = {"shoe", "horseshoe", "snowshoe", "toe", "canoe", "hoe"}


@lru_cache(maxsize=100_000)
def singular(word: str) -> str:
    """The singular of a lower-case English word: "knives" -> "knife", "bus" -> "bus".

    Rules and their common exceptions; a rarer word may come out misspelt ("quiches" -> "quich").
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("men") and word not in ("specimen", "abdomen", "ramen", "omen"):
        return word[:-2] + "an"
    if not word.endswith("s") or word.endswith(("ss", "us")) or word in _NO_PLURAL:
        return word
    if word[:-1] in _IE or word[:-1] in _OE:
        return word[:-1]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "oes")):
        return word[:-2]
    return word[:-1]


# --------------------------------------------------------------------------------------------------
# Synonyms
# --------------------------------------------------------------------------------------------------
def own_synonyms() -> Synonyms:
    """The table of `coco_synonyms.txt`, in which "orange" before any other thing is its colour."""
    table = read_synonyms(_OWN)
    colored = {
        f"orange {phrase}": category
        for phrase, category in table.items()
        if phrase.count(" ") < _LONGEST - 1 and category != "orange"
    }
    return colored | table


def read_synonyms(path: Path, mode: str = "fixed") -> Synonyms:
    """A list of synonyms, one category a line, its COCO name first: "bicycle, bike".

    The official list has four entries that its own scorer never meets in a caption: two with a second
    space before them, one with a capital letter, one of three words.  "strict" leaves them dead,
    "fixed" repairs them.  Entries after "nothing" are compounds that name no category.

    Raises DataError for an unknown category, one without a line, or an entry of two categories.
    """
    assert mode in ("strict", "fixed"), f"mode {mode!r} is neither strict nor fixed"
    table: Synonyms = {phrase: None for phrase in ("home plate", "train track")}
    table["bow tie"] = "tie"
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        first, *entries = line.split(",")
        category = first.strip()
        if category != "nothing" and category not in COCO_CATEGORIES:
            raise DataError(f"{path}:{number}: {category!r} is not one of the 80 COCO categories")
        entries = [entry.removeprefix(" ").rstrip() for entry in entries]
        for entry in entries if category == "nothing" else [category, *entries]:
            words = [singular(word) for word in re.findall("[a-z]+", entry.lower())]
            names = None if category == "nothing" else category
            if mode == "strict" and (len(entry.split()) > 2 or entry != entry.lower().lstrip()):
                if len(words) > 2:
                    continue  # its shorter entries still count: the oven of a stove top oven
                names = None  # it is one name and not in the list: no bike in a motor bike
            if not 0 < len(words) <= _LONGEST:
                raise DataError(f"{path}:{number}: {entry!r} is not one to {_LONGEST} words")
            if table.setdefault(" ".join(words), names) != names:
                raise DataError(f"{path}:{number}: {entry!r} already names something else")
    if missing := COCO_CATEGORIES.keys() - table.values():
        raise DataError(f"{path}: no line for {', '.join(sorted(missing))}")
    return _modified(table) | table


def _modified(table: Synonyms) -> Synonyms:
    """Compounds whose first word would name a person: a baby elephant, a passenger train."""
    return {
        f"{modifier} {phrase}": category
        for phrase, category in table.items()
        if category and phrase.count(" ") < _LONGEST - 1
        for modifier in _MODIFIERS.get(COCO_CATEGORIES[category], ())
    }


def objects_in(caption: str, table: Synonyms) -> list[str]:
    """The categories that a caption mentions, in order, repeats kept: the longest entry wins."""
    words = [singular(token) for token in _TOKEN.findall(caption.lower())]
    if "toilet" in words:
        words = [word for word in words if word != "seat"]  # the published scorer's rule
    mentions, start = [], 0
    while start < len(words):
        for length in range(_LONGEST, 0, -1):
            phrase = " ".join(words[start : start + length])
            if phrase in table:
                if category := table[phrase]:
                    mentions.append(category)
                break
        start += length  # 1 where nothing matched
    return mentions


# --------------------------------------------------------------------------------------------------
# What is there
# --------------------------------------------------------------------------------------------------
def ground_truth(coco_dir: Path, table: Synonyms, bad: Bad, cache_dir: Path | None = None) -> Truth:
    """The true categories of every image of the instances files under `coco_dir`.

    Kept as `chair_ground_truth_<key>.json` in `coco_dir`, or in `cache_dir` where that cannot be
    written.  The key is of the synonyms, of the code that reads, and of the annotation files: their
    names, sizes, times of change, first and last MiB, since hashing all of them would take longer
    than scoring.  A truth from which bad entries were dropped is not kept, so that each run counts
    them.  Raises DataError for files that are missing or unusable.
    """
    pairs = coco.find_annotations(coco_dir)
    name = f"chair_ground_truth_{_key([file for pair in pairs for file in pair], table)}.json"
    caches = [folder / name for folder in (coco_dir, cache_dir) if folder]
    for cache in caches:
        if truth := _read_cache(cache):
            return truth
    print(f"reading the COCO annotations in {coco_dir}, once: a minute or so", file=sys.stderr)
    dropped, truth = bad.dropped, {}
    for instances_file, captions_file in pairs:
        instances = coco.read_instances(instances_file, bad, outlines=False)
        captions = coco.read_captions(captions_file, bad)
        for image_id, objects in instances.objects.items():
            truth[image_id] = {instance.category for instance in objects}
            for caption in captions.get(image_id, ()):
                truth[image_id].update(objects_in(caption, table))
    if bad.dropped == dropped and not any(_write_cache(cache, truth) for cache in caches):
        print(f"{coco_dir}: not writable, so it is all read again next time", file=sys.stderr)
    return truth


def _key(files: Sequence[Path], table: Synonyms) -> str:
    digest = hashlib.sha256(json.dumps(sorted(table.items())).encode())
    for module in (__file__, coco.__file__):
        digest.update(Path(module).read_bytes())
    for file in files:
        try:
            stat = file.stat()
            digest.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
            with file.open("rb") as stream:
                digest.update(stream.read(2**20))
                stream.seek(max(stat.st_size - 2**20, 0))
                digest.update(stream.read(2**20))
        except OSError as error:
            raise DataError(f"{file}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()[:16]


def _checksum(rows: Mapping[str, Sequence[str]]) -> str:
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def _read_cache(path: Path) -> Truth | None:
    """The truth in a cache, or None where the file is missing or not as it was written."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["sha256"] == _checksum(kept["truth"]):
            return {int(image_id): set(names) for image_id, names in kept["truth"].items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    return None


def _write_cache(path: Path, truth: Truth) -> bool:
    """Write a cache in one step, so that no reader meets half of it; False where it cannot be written."""
    rows = {str(image_id): sorted(names) for image_id, names in truth.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, draft = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".part")
    except OSError:
        return False
    try:
        with open(handle, "w", encoding="utf-8") as stream:
            json.dump({"sha256": _checksum(rows), "truth": rows}, stream)
        os.replace(draft, path)
    except OSError:
        with suppress(OSError):
            os.unlink(draft)
        return False
    return True


# --------------------------------------------------------------------------------------------------
# Captions
# --------------------------------------------------------------------------------------------------
def read_caption_file(
    path: Path, bad: Bad, known: Collection[int] | None = None
) -> tuple[list[tuple[int, str]], dict[str, Any]]:
    """(image id, caption) of saved captions, in the file's order; and how its rows say they were decoded.

    The file is JSON lines, a JSON array, `{"annotations": [...]}` or the published scorer's
    `{"imgToEval": {id: {...}}}`.  An id is a number, or a COCO file name with one in it.
    max_new_tokens and decoding are there where every row names the same.

    Through `bad`: a missing, repeated or (with `known`) unknown id, an empty or missing caption.
    """
    captions: dict[int, str] = {}
    told = []
    for where, row in _caption_rows(path, bad):
        image_id, caption = _image_id(row), answer_of(row)
        if image_id is None:
            bad(where, f"no image id under any of {', '.join(_ID_KEYS)}")
        elif image_id in captions:
            bad(where, f"image {image_id} has a caption already")
        elif known is not None and image_id not in known:
            bad(where, f"image {image_id} is not in the annotations")
        elif not (caption or "").strip():
            bad(where, f"image {image_id}: no caption")
        else:
            captions[image_id] = caption
            told.append((row.get("max_new_tokens"), row.get("temperature")))
    decoding = {}
    if told and len(set(map(str, told))) == 1:
        tokens, temperature = told[0]
        decoding["max_new_tokens"] = tokens
        if isinstance(temperature, int | float):
            decoding["decoding"] = f"temperature {temperature:g}" if temperature else "greedy"
    return list(captions.items()), decoding


def _caption_rows(path: Path, bad: Bad) -> Iterator[tuple[str, dict]]:
    try:
        root = json.loads(read_text(path))
    except (json.JSONDecodeError, RecursionError):
        root = None  # lines
    if isinstance(root, dict) and isinstance(root.get("imgToEval"), dict):
        rows = [
            (f"{path}:imgToEval[{key}]", {"image_id": key, **row} if isinstance(row, dict) else row)
            for key, row in root["imgToEval"].items()
        ]
    elif isinstance(root, dict) and isinstance(root.get("annotations"), list):
        rows = [(f"{path}:annotations[{i}]", row) for i, row in enumerate(root["annotations"])]
    else:
        yield from read_rows(path, bad)
        return
    for where, row in rows:
        if isinstance(row, dict):
            yield where, row
        else:
            bad(where, "not an object like {...}")


def _image_id(row: dict) -> int | None:
    value: Any = next((row[key] for key in _ID_KEYS if row.get(key) is not None), None)
    if type(value) is int:
        return value
    try:
        return coco.image_id_of(value) if isinstance(value, str) else None
    except ValueError:
        return None


# --------------------------------------------------------------------------------------------------
# Figures
# --------------------------------------------------------------------------------------------------
def per_caption(
    captions: Sequence[tuple[int, str]], truth: Truth, table: Synonyms
) -> list[dict[str, Any]]:
    """For each (image id, caption): image_id, mentions, and those of them that are hallucinated.

    Raises DataError for an image without ground truth.
    """
    rows = []
    for image_id, caption in captions:
        if image_id not in truth:
            raise DataError(f"image {image_id}: not in the COCO annotations")
        mentions = objects_in(caption, table)
        hallucinated = [name for name in mentions if name not in truth[image_id]]
        rows.append({"image_id": image_id, "mentions": mentions, "hallucinated": hallucinated})
    return rows


def score(captions: Sequence[tuple[int, str]], truth: Truth, table: Synonyms) -> dict[str, Any]:
    """CHAIR of (image id, caption) pairs, as fractions in [0, 1]; a ratio without a denominator is 0.

    n (captions), chair_s, chair_i, recall, f1 = 2 p r / (p + r) with p = 1 - chair_i and r = recall,
    mean_length (words a caption), mean_mentions (a caption), and image_ids_sha256 of the sorted ids, a
    line each: figures compare only on the same images.  Raises DataError for an image without truth.
    """
    rows = per_caption(captions, truth, table)
    n = max(len(rows), 1)
    mentions = sum(len(row["mentions"]) for row in rows)
    chair_i = sum(len(row["hallucinated"]) for row in rows) / max(mentions, 1)
    found = sum(len(truth[row["image_id"]].intersection(row["mentions"])) for row in rows)
    recall = found / max(sum(len(truth[row["image_id"]]) for row in rows), 1)
    ids = "\n".join(str(image_id) for image_id in sorted(row["image_id"] for row in rows))
    return {
        "n": len(rows),
        "chair_s": sum(bool(row["hallucinated"]) for row in rows) / n,
        "chair_i": chair_i,
        "recall": recall,
        # p + r is 0 only where every mention is hallucinated, and then so is p r
        "f1": 2 * (1 - chair_i) * recall / ((1 - chair_i + recall) or 1),
        "mean_length": sum(len(caption.split()) for _, caption in captions) / n,
        "mean_mentions": mentions / n,
        "image_ids_sha256": hashlib.sha256(ids.encode()).hexdigest(),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as text, with what they can only be compared together with."""
    shares = ("chair_s", "chair_i", "recall", "f1", "mean_length", "mean_mentions")
    said = ", ".join(
        f"{key.replace('_', ' ')} {figures[key]}"
        for key in ("max_new_tokens", "decoding")
        if figures.get(key) is not None
    )
    return (
        "".join(f"{key:>14}" for key in shares)
        + "\n"
        + "".join(f"{figures[key]:>14.{1 if key.startswith('mean') else 4}f}" for key in shares)
        + f"\n{figures['n']} captions, {said or 'decoding not known'}, image ids sha256 "
        + figures["image_ids_sha256"][:16]
    )


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------
def add_command(commands) -> None:
    """Add `evaluate.py chair`."""
    command = new_command(commands, "chair", run, "captions against COCO's annotations", check)
    command.add_argument(
        "--coco", type=Path, required=True, help="folder of COCO 2014 with its annotations/"
    )
    command.add_argument("--captions", type=Path, help="saved captions; no model is loaded")
    command.add_argument("--images", type=Path, help="folder of the images, for --model")
    command.add_argument(
        "--image-ids", type=Path, help="ids or names of the images to caption; without it, all"
    )
    command.add_argument(
        "--prompt", default="Please describe this image in detail.", help="what the model is asked"
    )
    command.add_argument(
        "--synonyms", type=Path, help="the official synonyms.txt; without it, our own list"
    )
    command.add_argument(
        "--synonyms-mode",
        choices=("strict", "fixed"),
        default="fixed",
        help="leave the four dead entries of the official list dead, or repair them",
    )
    add_model(command, max_new_tokens=512)


def check(args: argparse.Namespace) -> str | None:
    """Why the flags do not fit together, or None."""
    return one_source(args, "captions") or images_of_model(args)


def run(args: argparse.Namespace) -> Result:
    """Objects that captions name and images do not hold, by COCO's annotations of 2014."""
    bad = Bad(args.skip_bad)
    if args.synonyms:
        synonyms = read_synonyms(args.synonyms, args.synonyms_mode)
    else:
        synonyms = own_synonyms()
    truth = ground_truth(args.coco, synonyms, bad, Path("runs/cache"))
    decoding = {"max_new_tokens": None, "decoding": None}  # of saved captions: what their rows say
    if args.captions:
        refuse_limit(args)
        captions, told = read_caption_file(args.captions, bad, truth)
        decoding |= told
    else:
        images = _caption_images(args, truth, bad)[: args.limit]
        asked = [({"image_id": i}, Example(path, args.prompt, "", "caption")) for i, path in images]
        kept, captions = answered([i for i, _ in images], ask_model(args, asked, bad))
        captions = list(zip(kept, captions, strict=True))
        decoding["max_new_tokens"] = args.max_new_tokens
        decoding["decoding"] = f"temperature {args.temperature:g}" if args.temperature else "greedy"
    captions = [(i, final_answer(caption)) for i, caption in captions]
    if not captions:
        raise DataError("no caption to score")
    return with_dropped(score(captions, truth, synonyms) | decoding, table, bad)


def _caption_images(args: argparse.Namespace, truth: Truth, bad: Bad) -> list[tuple[int, Path]]:
    """(id, path) of the images to caption: those listed, or all in the folder that COCO annotates."""
    paths = {}
    for path in sorted(args.images.iterdir()):
        if path.is_file() and any(c.isdigit() for c in path.stem):
            paths[image_id_of(path.name)] = path
    if not args.image_ids:
        return [(i, path) for i, path in sorted(paths.items()) if i in truth]
    found = {}
    for number, line in enumerate(read_text(args.image_ids).split(), 1):
        where = f"{args.image_ids}, entry {number}"
        try:
            image = image_id_of(line)
        except DataError as error:
            bad(where, str(error))
            continue
        if image in found:
            bad(where, f"image {image} is listed twice")
        elif image not in truth:
            bad(where, f"image {image} is not in the annotations")
        elif image not in paths:
            bad(where, f"image {image} is not in {args.images}")
        else:
            found[image] = paths[image]
    return list(found.items())
