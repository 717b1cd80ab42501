"""CHAIR (Rohrbach et al. 2018): which objects do captions name that are not in the image?

    mention      a place in a caption that names one of the 80 COCO categories; repeats count
    truth        of an image: the categories of its annotated instances and those that its human
                 captions name
    CHAIR_I      hallucinated mentions / mentions, over all captions
    CHAIR_S      captions with at least one hallucinated mention / captions; an empty caption is one
    recall       distinct true categories named / true categories, each summed over the captions
    F1           harmonic mean of 1 - CHAIR_I and recall

Departures from the published scorer, all but 1, 6 and 7 undone by `--synonyms-mode published`:

1.  The synonyms are our own, in `coco_synonyms.txt`; `--synonyms` reads the official list.
2.  Plurals are undone by rules that know "bus", "ties", "canoes", "thieves" and "doggies"; the published
    scorer spoils these and never counts them. This alone moves CHAIR_S by up to 1.4 points.
3.  "baby", "adult", "mother", "father" before an animal and "passenger" before a vehicle name nobody; the
    published scorer has "baby" and "adult" before twelve words and "passenger" before two.
4.  Hyphens, slashes and apostrophes part words, so "hot-dog" and "dog's" name a dog of their kind, and a
    "horse-drawn" carriage a horse; but "o'clock" is no clock and "man-made" no man. Other punctuation
    parts names, too; white space, line breaks among it, does not.
5.  Every listed entry of up to three words counts, not a fixed list of pairs. Four entries of the
    official list that its scorer never meets count in `fixed` and do not in `strict`.
6.  A ratio without a denominator is not there (None, "-"), where the published scorer divides by zero.
7.  Length is in words between white space; OPERA's counts the tokens of NLTK, punctuation among them.
    The final answer is read of a completion that reasons in tags.

An image may be captioned once; the ports of the scorer count one that is repeated twice.
"""

import argparse
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from data import DataError, Example, short
from hallucination import coco, synonyms, words
from hallucination.coco import image_id_of
from hallucination.command import (
    Result,
    add_model,
    answered,
    ask_model,
    cell,
    decoding_in_words,
    images_of_model,
    new_command,
    one_source,
    refuse_limit,
    rule_of,
    share,
    with_dropped,
)
from hallucination.files import Bad, read_rows, read_text
from hallucination.keys import answers_in, id_of
from hallucination.synonyms import MODES, objects_in, read_synonyms
from hallucination.words import Synonyms, own_synonyms
from rewards import final_answer

Truth = dict[int, set[str]]  # image id -> categories

_ID_KEYS = ("image_id", "image", "image_file", "file_name", "question_id")


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
    facts = [type(table).__name__, sorted(table.items())]
    digest = hashlib.sha256(json.dumps(facts).encode())
    for module in (coco.__file__, synonyms.__file__, words.__file__, __file__):
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
    path: Path, bad: Bad, known: Collection[int] | None = None, prompt: str | None = None
) -> tuple[list[tuple[int, str]], dict[str, Any]]:
    """(image id, caption) of saved captions, in the file's order; and how its rows say they were decoded.

    The file is JSON lines, a JSON array, `{"annotations": [...]}` or the published scorer's
    `{"imgToEval": {id: {...}}}`.  An id is a number, or a COCO file name with one in it; `keys.answers_in`
    says which key holds the caption.  prompt: what was asked, where rows do not say.
    max_new_tokens and decoding are there where every row names the same.

    Through `bad`: a missing, repeated or (with `known`) unknown id, a missing caption.
    """
    captions: dict[int, str] = {}
    told = []
    rows = list(_caption_rows(path, bad))
    texts = answers_in([row for _, row in rows], [prompt] * len(rows))
    for (where, row), (caption, fault) in zip(rows, texts, strict=True):
        value = next((row[key] for key in _ID_KEYS if row.get(key) is not None), None)
        image_id = _image_id(value)
        if image_id is None:
            among = f"no image id under any of {', '.join(_ID_KEYS)}"
            bad(where, among if value is None else f"no image id in {short(value)}")
        elif image_id in captions:
            bad(where, f"image {image_id} has a caption already")
        elif known is not None and image_id not in known:
            bad(where, f"image {image_id} is not in the annotations")
        elif caption is None:
            bad(where, f"image {image_id}: {fault}")
        else:
            captions[image_id] = caption
            told.append(tuple(map(row.get, ("max_new_tokens", "temperature", "decoding"))))
    decoding = {}
    if told and len(set(map(str, told))) == 1:
        tokens, temperature, rule = told[0]
        decoding["max_new_tokens"] = tokens
        if isinstance(temperature, int | float):
            decoding["decoding"] = decoding_in_words(rule, temperature)
    return list(captions.items()), decoding


def _caption_rows(path: Path, bad: Bad) -> Iterator[tuple[str, dict]]:
    text = read_text(path)
    try:
        root = json.loads(text)
    except (ValueError, RecursionError):
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


def _image_id(value: Any) -> int | None:
    try:
        return coco.image_id_of(id_of(value) or "")
    except DataError:
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
    """CHAIR of (image id, caption) pairs, as fractions in [0, 1]; None for a ratio of nothing.

    n (captions), chair_s, chair_i, recall, f1 = 2 p r / (p + r) with p = 1 - chair_i and r = recall,
    mean_length (words per caption), mean_mentions (per caption), and image_ids_sha256 of the sorted ids,
    one per line: figures compare only on the same images.  Raises DataError for an image without truth.
    """
    rows = per_caption(captions, truth, table)
    n = len(rows)
    mentions = sum(len(row["mentions"]) for row in rows)
    chair_i = share(sum(len(row["hallucinated"]) for row in rows), mentions)
    found = sum(len(truth[row["image_id"]].intersection(row["mentions"])) for row in rows)
    recall = share(found, sum(len(truth[row["image_id"]]) for row in rows))
    f1 = None
    if chair_i is not None and recall is not None:
        # p + r is 0 only where every mention is hallucinated, and then so is p r
        f1 = 2 * (1 - chair_i) * recall / ((1 - chair_i + recall) or 1)
    ids = "\n".join(str(image_id) for image_id in sorted(row["image_id"] for row in rows))
    return {
        "n": n,
        "chair_s": share(sum(bool(row["hallucinated"]) for row in rows), n),
        "chair_i": chair_i,
        "recall": recall,
        "f1": f1,
        "mean_length": share(sum(len(caption.split()) for _, caption in captions), n),
        "mean_mentions": share(mentions, n),
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
        + "".join(cell(figures[k], f">14.{1 if k.startswith('mean') else 4}f") for k in shares)
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
        choices=MODES,
        default="fixed",
        help="the official list by its sense; without four entries that its scorer never meets; or, for "
        "figures beside published ones, as its scorer reads",
    )
    add_model(command, max_new_tokens=512)


def check(args: argparse.Namespace) -> str | None:
    """Why the flags do not fit together, or None."""
    if args.synonyms_mode != "fixed" and not args.synonyms:
        return f"--synonyms-mode {args.synonyms_mode} needs --synonyms: it is a way to read the official list"
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
        captions, told = read_caption_file(args.captions, bad, truth, args.prompt)
        decoding |= told
    else:
        images = _caption_images(args, truth, bad)[: args.limit]
        asked = [({"image_id": i}, Example(path, args.prompt, "", "caption")) for i, path in images]
        kept, captions = answered([i for i, _ in images], ask_model(args, asked, bad))
        captions = list(zip(kept, captions, strict=True))
        decoding["max_new_tokens"] = args.max_new_tokens
        rule, temperature = rule_of(args)
        decoding["decoding"] = decoding_in_words(rule and rule.facts(), temperature)
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
