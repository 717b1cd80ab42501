"""Words for things in a text: the one reader of object names, for CHAIR and for the rewards of captions.

    >>> objects_named("Two knives, a hot dog and a T-shirt.", ["dog", "knife", "t-shirt"])
    ['knife', 't-shirt']

A text becomes words (`split`), a plural its singular (`forms`), and the longest phrase that a table knows
wins (`longest_first`). The own list of COCO's synonyms, in `coco_synonyms.txt`, knows the compounds that
name no such thing as one of their words does. Nothing but the standard library is imported.
"""

import re
import unicodedata
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TypeVar

Synonyms = dict[str, str | None]  # words in the singular -> category, or None: names none of them
Value = TypeVar("Value")

OWN_LIST = Path(__file__).with_name("coco_synonyms.txt")
LONGEST = 3  # words of an entry of a list
PARTED = "."  # stands among the words where punctuation parts them

# --------------------------------------------------------------------------------------------------
# Words
# --------------------------------------------------------------------------------------------------
_UNSPACED = ("CJK UNIFIED", "CJK COMPATIBILITY", "HIRAGANA", "THAI", "LAO ", "KHMER", "MYANMAR")
# On the kinds of characters: a run of letters with their marks, of katakana, or of digits; a letter of a
# script without spaces; a symbol; or what parts words, as a dash between spaces does.
_WORD = re.compile(r"w[wm]*|k[km]*|um*|d+|s|((?:^| )-+(?= )|\.)")


@cache
def _kind(character: str) -> str:
    """w(ord), k(atakana), u(nspaced), m(ark), d(igit), s(ymbol), space, "-" joins words, "." parts them."""
    if character.isspace():
        return " "
    if character in "-/'_*\u2010\u2011\u2013\u2019\u00b7`~&":
        return "-"
    category = unicodedata.category(character)
    name = unicodedata.name(character, "")
    if category[0] == "L":
        return "k" if name.startswith("KATAKANA") else "u" if name.startswith(_UNSPACED) else "w"
    return {"M": "m", "N": "d", "S": "s"}.get(category[0], ".")


def normal(text: str) -> str:
    """A text as names are compared: case, ways to write an accent, and full-width forms do not tell."""
    if text.isascii():
        return text.lower()
    folded = unicodedata.normalize("NFKC", text).casefold()
    folded = unicodedata.normalize("NFKC", folded)
    return "".join(c for c in folded if c.isspace() or unicodedata.category(c) != "Cf")


def split(text: str) -> list[str]:
    """The words of a text, with PARTED where punctuation stands between them.

    "hot-dog" is two words and "dog's" are, too; white space of any kind parts nothing.  In scripts without
    spaces every letter is a word.
    """
    text = normal(text)
    kinds = "".join(map(_kind, text))
    return [
        PARTED if found[1] else text[slice(*found.span())].strip()
        for found in _WORD.finditer(kinds)
    ]


_IRREGULAR = {
    **{"people": "person", "children": "child", "passersby": "passerby"},
    **{"feet": "foot", "teeth": "tooth", "geese": "goose", "mice": "mouse", "oxen": "ox"},
    **{"lice": "louse", "dice": "die", "cacti": "cactus", "octopi": "octopus"},
    **{"knives": "knife", "wives": "wife", "housewives": "housewife", "lives": "life"},
    **{"calves": "calf", "loaves": "loaf", "wolves": "wolf", "halves": "half", "leaves": "leaf"},
    **{"shelves": "shelf", "bookshelves": "bookshelf", "scarves": "scarf", "thieves": "thief"},
    **{"hooves": "hoof", "elves": "elf", "pocketknives": "pocketknife"},
    **{"busses": "bus", "emus": "emu", "gnus": "gnu", "menus": "menu", "zebus": "zebu"},
}
_NO_PLURAL = re.compile("scissors|shears|tennis|gas|lens|canvas|this|his|is|was|has")
_IE = re.compile(
    "(?:bow|neck)?tie|pie|cookie|brownie|smoothie|hoodie|selfie|goalie|hoagie|doggie|movie"
)
_OE = re.compile("(?:horse|snow)?shoe|toe|canoe|hoe")
# Plurals that are not many of their singular: a short man wears no shorts.
_PLURAL_ONLY = {"glasses", "shorts", "trunks", "tights", "blinds", "greens", "goods"}
_PARTICLE = re.compile(r"(?<=.)들?(?:에서|으로|이랑|하고|[이가은는을를의와과도에로만])?$")


@lru_cache(maxsize=100_000)
def singular(word: str) -> str:
    """The singular of a lower-case English word: "knives" -> "knife", "bus" -> "bus".

    Rules and their common exceptions; a rarer word may come out misspelt ("quiches" -> "quich").
    """
    if word in _IRREGULAR:
        return _IRREGULAR[word]
    if word.endswith("men") and word not in ("specimen", "abdomen", "ramen", "omen"):
        return word[:-2] + "an"
    if word.endswith(("children", "people")):
        return word.replace("children", "child").replace("people", "person")
    if not word.endswith("s") or word.endswith(("ss", "us")) or _NO_PLURAL.fullmatch(word):
        return word
    if _IE.fullmatch(word[:-1]) or _OE.fullmatch(word[:-1]):
        return word[:-1]
    if word.endswith("ies") and len(word) > 4:
        return word[:-3] + "y"
    if word.endswith(("ches", "shes", "sses", "xes", "oes", "buses")):
        return word[:-2]
    return word[:-1]


@lru_cache(maxsize=100_000)
def forms(word: str) -> tuple[str, ...]:
    """What a word of a text may be the plural of, likeliest first: itself, its singular, and where endings
    mean several things the others: "cactuses" -> "cactuses", "cactuse", "cactus"."""
    found = [word, singular(word)]
    if (
        "\uac00" <= word[0] <= "\ud7a3"
    ):  # Korean, where what a word does in its sentence is added to it
        found.append(_PARTICLE.sub("", word))
    if word.endswith(("ses", "zes", "oes", "ches")):
        found.append(word[:-2])
    if word.endswith("zzes"):
        found.append(word[:-3])
    if word.endswith("ves"):
        found += [word[:-3] + "f", word[:-3] + "fe"]
    if word.endswith("s"):
        found.append(word[:-1])
    return tuple(dict.fromkeys(found))


def longest_first(
    words: Sequence[str], table: Mapping[str, Value], longest: int
) -> Iterator[tuple[str, Value]]:
    """(phrase, its value) of the phrases of `table` in words, from left to right, the longest one first.

    A phrase is met as it is spelled or in the singular.
    """
    singulars = [singular(word) for word in words]
    start = 0
    while start < len(words):
        for length in range(min(longest, len(words) - start), 0, -1):
            last = start + length - 1
            before = " ".join(singulars[start:last]) + " " if length > 1 else ""
            phrases = [" ".join(words[start : last + 1])]
            phrases += [before + form for form in forms(words[last])]
            found = next((phrase for phrase in phrases if phrase in table), None)
            if found is not None:
                yield found, table[found]
                break
        start += length  # 1 where nothing matched


# --------------------------------------------------------------------------------------------------
# COCO's words
# --------------------------------------------------------------------------------------------------
# Compounds that name none of the categories, whatever the list: a time, a man-made lake, any cub.
NOTHING = (
    "home plate", "train track", "o clock", "man made", "baby animal", "adult animal", "baby cub",
    "adult cub",
)  # fmt: skip
# Words that would name a person, before what they do not make one.
_MODIFIERS = {
    "baby adult mother father": "bird cat dog horse sheep cow elephant bear zebra giraffe",
    "passenger": "bicycle car motorcycle airplane bus train truck boat",
}


def list_lines(text: str) -> Iterator[tuple[int, str, list[str]]]:
    """(line number, category, entries) of a list of synonyms: "bicycle, bike"; "#" opens a comment."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip() and not line.startswith("#"):
            category, *entries = line.rstrip().split(",")
            yield number, category.strip(), [entry.removeprefix(" ") for entry in entries]


def phrase_of(entry: str) -> str:
    """An entry of a list as the table spells it: words in the singular."""
    return " ".join(singular(word) for word in split(entry))


def with_modifiers(table: Synonyms) -> Synonyms:
    """The table, and before its animals and vehicles the words that would else name a person."""
    more = {
        f"{modifier} {phrase}": category
        for modifiers, categories in _MODIFIERS.items()
        for phrase, category in table.items()
        if category in categories.split() and phrase.count(" ") < LONGEST - 1
        for modifier in modifiers.split()
    }
    return more | table


@cache
def own_synonyms() -> Synonyms:
    """The table of `coco_synonyms.txt`, in which "orange" before any other thing is its colour."""
    table: Synonyms = dict.fromkeys(NOTHING) | {"bow tie": "tie"}
    for _, category, entries in list_lines(OWN_LIST.read_text(encoding="utf-8")):
        for entry in entries if category == "nothing" else [category, *entries]:
            table[phrase_of(entry)] = None if category == "nothing" else category
    table = with_modifiers(table)
    colored = {
        f"orange {phrase}": category
        for phrase, category in table.items()
        if phrase.count(" ") < LONGEST - 1 and category != "orange"
    }
    return colored | table


# --------------------------------------------------------------------------------------------------
# Names of any vocabulary
# --------------------------------------------------------------------------------------------------
def objects_named(text: str, vocabulary: Collection[str]) -> list[str]:
    """The names of `vocabulary` in a text, as the vocabulary spells them, in order, repeats kept.

    A name may have several words; the longest wins, so that a hot dog is no dog, and neither is it where
    "hot dog" is not in the vocabulary.  A plural names what its singular does.
    """
    table, longest = _table_of(tuple(vocabulary))
    found = longest_first(split(text), table, longest)
    return [name for _, names in found for name in names]


@lru_cache(maxsize=64)
def _table_of(vocabulary: tuple[str, ...]) -> tuple[dict[str, tuple[str, ...]], int]:
    """Phrases -> the names that are met in them, and the words of the longest phrase."""
    table: dict[str, tuple[str, ...]] = {}
    for spelled in (_as_it_is, _otherwise):
        for name in vocabulary:
            for phrase in spelled(split(name)):
                table.setdefault(phrase, (name,))
    table.pop("", None)
    table |= _compounds(table)
    return table, max((len(phrase.split()) for phrase in table), default=1)


def _as_it_is(words: Sequence[str]) -> Iterable[str]:
    return [" ".join(words)]


def _otherwise(words: Sequence[str]) -> Iterable[str]:
    """Other spellings of a name: without its full stops, in one word, in the singular."""
    words = [word for word in words if word != PARTED]
    yield " ".join(words)
    yield "".join(words)
    if words and words[-1] not in _PLURAL_ONLY:
        before = [singular(word) for word in words[:-1]]
        yield from (" ".join([*before, form]) for form in forms(words[-1]))


def _compounds(names: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """COCO's compounds that would be misread word by word -> the names that they do hold.

    A bus driver is no bus, but a driver where the vocabulary has that word.
    """
    own, found = own_synonyms(), {}
    for phrase, category in own.items():
        if " " not in phrase or phrase in names:
            continue
        inside = list(longest_first(phrase.split(), names, LONGEST))
        # A word that COCO's list does not know may be the compound's sense: a stop sign is a sign.
        right = [hit for hit in inside if own.get(hit[0], category) == category]
        if right != inside:
            found[phrase] = tuple(name for _, hits in right for name in hits)
    return found
