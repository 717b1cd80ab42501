"""What each token of a completion says about an image whose things are known.

    >>> tokens = [" I", " see", " a", " blue", " boat", " and", " a", " red", " car", "."]
    >>> kinds_of(tokens, {"car": "red"})[3:]
    ['wrong attribute', 'absent', 'other', 'other', 'attribute', 'there', 'punctuation']

A question claims nothing: the boat of "A boat?" is another word, there or not. A colour is judged by the
thing that it stands before; one that stands alone, as in an answer, is another word.
"""

import re
from collections.abc import Collection, Mapping, Sequence

from hallucination.words import objects_named
from scm import CATEGORIES, COLORS

# kind of a token -> what a reader is told
KINDS = {
    "there": "a thing that is there",
    "absent": "a thing that is not there",
    "attribute": "a colour, right",
    "wrong attribute": "a colour, wrong",
    "punctuation": "punctuation or a space",
    "other": "another word",
}
FALSE = ("absent", "wrong attribute")
_WORD = re.compile(r"\w+(?:[-']\w+)*")
_PART = re.compile(r"[^.?!<>]*")  # of a sentence, up to where it ends


def kinds_of(
    tokens: Sequence[str],
    colors: Mapping[str, str | None],
    vocabulary: Collection[str] = CATEGORIES,
) -> list[str]:
    """The kind of each token, one of KINDS; a token that holds a part of a word says what the word does.

    colors: the things that are there, each with its colour, None where that is not known.
    vocabulary: the names that are things.  Names of several words are not looked for.
    """
    text = "".join(tokens)
    words = _words_of(text, colors, vocabulary)
    kinds, place = [], 0
    for token in tokens:
        end = place + len(token)
        inside = [kind for start, stop, kind in words if start < end and stop > place]
        kinds.append(min(inside, key=_ORDER.index) if inside else "punctuation")
        place = end
    return kinds


_ORDER = ("absent", "wrong attribute", "there", "attribute", "other")


def _words_of(
    text: str, colors: Mapping[str, str | None], vocabulary: Collection[str]
) -> list[tuple[int, int, str]]:
    """(start, end, kind) of the words of a text."""
    counted = set(objects_named(text, vocabulary))  # the dog of a hot dog is none
    found: list[tuple[int, int, str]] = []
    waiting: list[tuple[int, str]] = []  # colours before their thing: place in `found`, colour
    last = 0
    for match in _WORD.finditer(text):
        word, kind = match[0].lower(), "other"
        if re.search("[.?!<>]", text[last : match.start()]):
            waiting = []
        last = match.end()
        named = [name for name in objects_named(word, vocabulary) if name in counted]
        asked = text[_PART.match(text, last).end() :][:1] == "?"
        if asked:
            pass
        elif named:
            kind = "there" if named[0] in colors else "absent"
            for i, color in waiting:
                found[i] = (*found[i][:2], _judged(color, colors, named[0]))
            waiting = []
        elif word in COLORS:
            waiting.append((len(found), word))
        found.append((*match.span(), kind))
    return found


def _judged(color: str, colors: Mapping[str, str | None], name: str) -> str:
    """The kind of a colour that a thing is said to have."""
    own = colors.get(name, "of nothing")
    return "other" if own is None else "attribute" if own == color else "wrong attribute"
