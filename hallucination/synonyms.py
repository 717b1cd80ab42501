"""Lists of COCO's synonyms as tables of phrases, and what they find in a caption.

Our own list is `words.own_synonyms`. The official `synonyms.txt` is read in one of three modes:

    fixed       what the list means, by the definition
    strict      the same, but for the four entries that its scorer never meets in a caption: two with a
                second space before them, one with a capital letter, one of three words
    published   what its scorer finds in a caption, its slips included: the figures of papers

In `published`, and in it alone, (i) no "bus", "ties", "canoes", "thieves" or "doggies" counts: undoing
their plural spoils them; (ii) "baby" and "adult" name nobody before twelve words and "passenger" before
two, "mother" and "father" name somebody before any; (iii) hyphens, slashes and apostrophes keep words
together, so that a "hot-dog" is nothing, and only the pairs of a fixed list are one name.
"""

import re
from pathlib import Path

from data import DataError
from hallucination.coco import COCO_CATEGORIES
from hallucination.files import read_text
from hallucination.words import (
    LONGEST,
    NOTHING,
    Synonyms,
    list_lines,
    longest_first,
    phrase_of,
    singular,
    split,
    with_modifiers,
)

MODES = ("strict", "fixed", "published")


class Published(dict[str, str | None]):
    """Words and pairs of words in the published scorer's spelling, which `objects_in` reads as it does."""


def read_synonyms(path: Path, mode: str = "fixed") -> Synonyms:
    """A list of synonyms, one category per line, its COCO name first: "bicycle, bike".

    mode: of MODES.  Entries after "nothing" are compounds that name no category.

    Raises DataError for an unknown category, one without a line, or an entry of two categories.
    """
    assert mode in MODES, f"mode {mode!r} is none of {MODES}"
    table: Synonyms = dict.fromkeys(NOTHING) | {"bow tie": "tie"}
    published = Published()
    for number, category, entries in list_lines(read_text(path)):
        where = f"{path}:{number}"
        if category != "nothing" and category not in COCO_CATEGORIES:
            raise DataError(f"{where}: {category!r} is not one of the 80 COCO categories")
        names = None if category == "nothing" else category
        entries = [category, *entries] if names else entries
        published.update(dict.fromkeys(entries, names))
        for entry in entries:
            phrase, value = phrase_of(entry), names
            if mode == "strict" and _is_dead(entry):
                if phrase.count(" ") > 1:
                    continue  # its shorter entries still count: the oven of a stove top oven
                value = None  # it is one name and not in the list: no bike in a motor bike
            if not 0 < len(phrase.split()) <= LONGEST:
                raise DataError(f"{where}: {entry!r} is not one to {LONGEST} words")
            if table.setdefault(phrase, value) != value:
                raise DataError(f"{where}: {entry!r} already names something else")
    if missing := COCO_CATEGORIES.keys() - table.values():
        raise DataError(f"{path}: no line for {', '.join(sorted(missing))}")
    if mode == "published":
        return Published(published | {pair: published.get(word) for pair, word in _PAIRED.items()})
    return with_modifiers(table)


def _is_dead(entry: str) -> bool:
    """Whether the published scorer never meets an entry of the official list."""
    return len(entry.split()) > 2 or entry != entry.lower().lstrip()


def objects_in(caption: str, table: Synonyms) -> list[str]:
    """The categories that a caption mentions, in order, repeats kept: the longest entry wins."""
    if isinstance(table, Published):
        return _published_in(caption, table)
    words = split(caption)
    if "toilet" in map(singular, words):  # the seat of a toilet is no chair: the published rule
        words = [word for word in words if singular(word) != "seat"]
    return [category for _, category in longest_first(words, table, LONGEST) if category]


# --------------------------------------------------------------------------------------------------
# As the published scorer reads (github.com/LisaAnne/Hallucination, utils/chair.py)
# --------------------------------------------------------------------------------------------------
_PAIRS = (
    "motor bike", "motor cycle", "air plane", "traffic light", "street light", "traffic signal",
    "stop light", "fire hydrant", "stop sign", "parking meter", "suit case", "baseball bat",
    "baseball glove", "wine glass", "hot dog", "cell phone", "mobile phone", "teddy bear",
    "hair drier", "potted plant", "laptop computer", "home plate", "train track",
)  # fmt: skip
_ANIMALS = (
    "bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe", "animal",
    "cub",
)  # fmt: skip
_PAIRED = {  # two words in a row -> the one name that they count as
    **{pair: pair for pair in _PAIRS},
    **{f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS},
    **{f"passenger {vehicle}": vehicle for vehicle in ("jet", "train")},
    **{"bow tie": "tie", "toilet seat": "toilet", "wine glas": "wine glass"},
}
_SPOILED = {"bus", "minibus", "airbus", "ties", "canoes", "thieves", "doggies"}
_PARTS = (  # what is a word of its own: marks, a full stop that ends a word, quotes and 's
    re.compile(r"([;@#$%&?!\"()\[\]{}<>,:\u2018\u2019\u201c\u201d\u00ab\u00bb]|--)"),
    re.compile(r"(\.+(?!\S))"),
    re.compile(r"((?<!\S)'|'(?:s|m|d|ll|re|ve)?(?!\S))"),
)


def _published_in(caption: str, table: Published) -> list[str]:
    """Pairs first, from left to right; then what of the words is listed."""
    caption = caption.lower()
    for part in _PARTS:
        caption = part.sub(r" \1 ", caption)
    words = ["" if word in _SPOILED else singular(word) for word in caption.split()]
    found, start = [], 0
    while start < len(words):
        pair = " ".join(words[start : start + 2])
        found.append(pair if pair in _PAIRED else words[start])
        start += 2 if pair in _PAIRED else 1
    if {"toilet", "toilet seat"} & set(found):
        found = [word for word in found if word != "seat"]
    return [category for category in map(table.get, found) if category]
