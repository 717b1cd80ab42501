"""Outcome rewards: the text of a completion -> [0, 1], and where in it the reasoning stands.

A completion is `<think> reasoning </think> <answer> answer </answer>`. Its outcome reward r is the
verifiable reward of the answer, by the kind of question; a completion without an answer in its tags
is worth 0. Which characters are reasoning is decided here, on the text; which tokens spell them is
found by decoding more and more of the completion's own tokens (`Policy.tokens_to_spell`), never by
tokenising again.

Three readers say what an answer says: `normalize` for words, `first_number`, and `options_named`. The
truth is read by the same reader as the answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from types import SimpleNamespace
from typing import Protocol

from hallucination.words import objects_named


class Question(Protocol):
    """What a reward reads of a `data.Example`."""

    kind: str
    answer: str
    objects: Collection[str]
    vocabulary: Collection[str]


RewardFunction = Callable[[str, Question], float]  # (completion, its example) -> [0, 1]

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


# ---------------------------------------------------------------------------------------------
# Tags
# ---------------------------------------------------------------------------------------------
def reasoning_span(completion: str) -> tuple[int, int] | None:
    """(start, end) characters of the reasoning between the first closed <think> tags, or None.

    None means no reasoning tokens: the completion gets its outcome reward and no causal reward.
    """
    match = _THINK.search(completion)
    return match.span(1) if match else None


def answer_span(completion: str) -> tuple[int, int] | None:
    """(start, end) characters inside the last closed <answer> after the reasoning, or None."""
    after = completion.rfind("</think>") + 1
    matches = list(_ANSWER.finditer(completion, after))
    return matches[-1].span(1) if matches else None


def extract_answer(completion: str) -> str | None:
    """The text of the last closed <answer> after the reasoning, stripped; None where there is none."""
    span = answer_span(completion)
    return completion[slice(*span)].strip() if span else None


def final_answer(completion: str) -> str:
    """What a completion says in the end, for scorers that know no tags.

    Its answer where it has one in tags, also in a tag that was never closed, as servers that stop at
    </answer> leave it; else what follows the reasoning; else all of it. Nothing, where the reasoning
    never ends.
    """
    answer = extract_answer(completion)
    if answer is not None:
        return answer
    before, closed, rest = completion.rpartition("</think>")
    if not closed and "<think>" in before + rest:
        return ""
    _, opened, unclosed = rest.rpartition("<answer>")
    if opened:
        return unclosed.strip()
    return rest.strip() if closed else completion


def well_formed(completion: str) -> bool:
    """Whether a completion has a closed reasoning span and an answer after it."""
    return reasoning_span(completion) is not None and extract_answer(completion) is not None


# ---------------------------------------------------------------------------------------------
# Rewards by the kind of question
# ---------------------------------------------------------------------------------------------
def outcome_reward(completion: str, example: Question) -> float:
    """r(Y) in [0, 1]: how right the answer of a completion is, by the kind of its question."""
    answer = extract_answer(completion)
    return 0.0 if not answer else _BY_KIND[example.kind](answer, example)


def yes_no(answer: str, example: Question) -> float:
    """1 if the answer says the right one of yes and no, and not the other."""
    said = {"yes", "no"} & set(normalize(answer).split())
    return float(said == {normalize(example.answer)})


def number(answer: str, example: Question) -> float:
    """1 if the first number of the answer is the right one; in digits, or in words up to hundreds."""
    value = first_number(answer)
    return float(value is not None and value == first_number(example.answer))


def choice(answer: str, example: Question) -> float:
    """1 for the right option or options: by letter ("(B) red" for B), or by the text that the truth has."""
    letters, text = _option_and_text(example.answer)
    said = options_named(answer)
    if letters and said:
        return float(said == letters)
    own = _option_and_text(answer)[1] or answer
    return float(bool(text) and normalize(text) in (normalize(answer), normalize(own)))


def short_text(answer: str, example: Question) -> float:
    """1 if the answer is the right one after normalisation."""
    said = normalize(answer)
    return float(said != "" and said == normalize(example.answer))


def grounded_caption(answer: str, example: Question) -> float:
    """F1 of the objects that a caption names against those that the image holds."""
    return object_f1(answer, example.objects, example.vocabulary)


_BY_KIND = {
    "yesno": yes_no,
    "number": number,
    "choice": choice,
    "text": short_text,
    "caption": grounded_caption,
}
KINDS = tuple(_BY_KIND)


def format_reward(completion: str, example: Question) -> float:
    """1 for a completion that reasons and answers in its tags: `--reward rewards:format_reward`."""
    return float(well_formed(completion))


def object_f1(caption: str, objects: Collection[str], vocabulary: Collection[str]) -> float:
    """F1 of the distinct objects a caption names against those that are there."""
    named, there = set(objects_named(caption, vocabulary)), set(objects)
    if not named and not there:
        return 1.0
    return 2 * len(named & there) / (len(named) + len(there))


# ---------------------------------------------------------------------------------------------
# Truths, as a file gives them
# ---------------------------------------------------------------------------------------------
def guess_kind(answer: str) -> str:
    """The kind of a question by its truth: "yesno", "number" (one number and no more), else "text".

    Digits after a leading zero are a name ("007"), no number.
    """
    plain = _plain(answer).strip(" .$")
    if plain.lower() in ("yes", "no"):
        return "yesno"
    found = _NUMBER.fullmatch(plain.removesuffix("%").strip().lower())
    return "number" if found and not re.match(r"0\d", found["digits"] or "") else "text"


def truth_problem(kind: str, answer: str, objects: Sequence[str] = ()) -> str | None:
    """Why nobody could ever be right about this truth, or None: said back, it must earn 1."""
    if kind == "caption":
        if not objects:
            return "a caption needs 'objects', what it should name"
        unnamed = [name for name in objects if objects_named(name, objects) != [name]]
        return f"no caption can name the object {unnamed[0]!r}" if unnamed else None
    truth = SimpleNamespace(kind=kind, answer=answer)
    if _BY_KIND[kind](answer, truth) == 1:
        return None
    wanted = {
        "yesno": "yes or no",
        "number": "a number",
        "choice": "a letter, several letters, or a text",
        "text": "a text with a word or a sign in it",
    }
    return (
        f"no answer can ever be right: the truth {answer!r} of kind {kind} must be {wanted[kind]}"
    )


# ---------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------
_TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63\uff0d", "-")
    | dict.fromkeys("\u2018\u2019\u201b\u02bc\u2032", "'")
    | dict.fromkeys("\u201c\u201d\u201f\u00ab\u00bb", '"')
    | dict.fromkeys("\u00a0\u2007\u2009\u202f\u3000", " ")
    | {chr(code): chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}  # full width
    | {
        "\u3002": ".",
        "\u3001": ",",
        "\u3010": "[",
        "\u3011": "]",
        "\ufe0f": None,
        "\u200b": None,
        "\u2044": "/",
    }
)
_FRACTION = re.compile("[\u00bc-\u00be\u2150-\u215e]")  # in one character: "2\u00bd" is 2 1/2
_LATEX = (
    (re.compile(r"\\[dt]?frac\{(.*?)\}\{(.*?)\}"), r"\1/\2"),
    (re.compile(r"\\(?:boxed|text|mathrm|mathbf|textbf|mbox)\s*\{(.*?)\}"), r" \1 "),
    (re.compile(r"\{,\}"), ","),
    (re.compile(r"\\[,;! ]"), " "),
)


def _plain(text: str) -> str:
    """A text without what is only typography or LaTeX: one way to write accents, quotes, dashes, digits."""
    text = _FRACTION.sub(lambda found: " " + unicodedata.normalize("NFKC", found[0]), text)
    text = unicodedata.normalize("NFC", text).translate(_TYPOGRAPHY)
    for pattern, plain in _LATEX * 2:  # \boxed{\text{B}}
        text = pattern.sub(plain, text)
    return "".join(
        str(unicodedata.decimal(c)) if not c.isascii() and c.isdecimal() else c for c in text
    )


def normalize(text: str) -> str:
    """What a text says, in lower case: its words, numbers and signs; "The  Cat." -> "cat".

    Punctuation says nothing, nor does an article before another word. Signs do ("C++" is not "C#", "x+1"
    not "x-1"), and so does a text of punctuation alone. A hyphen between letters parts words.

    >>> normalize("Line A"), normalize("a well-known caf\u00e9!"), normalize("\u22125,000"), normalize("+")
    ('line a', 'well known caf\u00e9', '-5000', '+')
    """
    text = _plain(text).lower()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text)
    words, word = [], ""
    for i, c in enumerate(text):
        before, after = text[i - 1 : i], text[i + 1 : i + 2]
        category = unicodedata.category(c)
        inside = c in ".'" and (
            before.isdigit() and after.isdigit() if c == "." else before.isalpha()
        )
        if category[0] in "LNM" or (inside and after.isalnum()):
            word += c
            continue
        sign = (category[0] == "S" and c not in "$`") or c in "#%&@/"
        minus = c == "-" and after.isdigit()
        words += [word] if word else []
        word = "-" if minus else ""
        words += [c] if sign else []
    words += [word] if word else []
    last = len(words) - 1
    kept = [w for i, w in enumerate(words) if i == last or w not in ("a", "an", "the")]
    return " ".join(kept) or "".join(text.split())


# ---------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------
_UNITS = [  # index = value
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven",
    "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = [
    "twenty",
    "thirty",
    "forty",
    "fifty",
    "sixty",
    "seventy",
    "eighty",
    "ninety",
]  # 20, 30, ...
_SCALE = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_UNIT, _TEN, _BIG = "|".join(_UNITS), "|".join(_TENS), "|".join(_SCALE)
_SMALL = rf"(?:(?:{_TEN})(?:[ -]+(?:{'|'.join(_UNITS[1:10])}))?|{_UNIT})"
_NUMBER = re.compile(
    rf"""
    (?P<sign> (?<![\w.)]) [-+] \s* )?
    (?: (?<![^\W_]) (?<!\d[.,])
        (?: (?: (?P<whole>\d+) \s+ )? (?P<top>\d+) \s*/\s* (?P<bottom>0*[1-9]\d*) (?![\d/])
          | (?P<digits> (?: \d{{1,3}} (?:[, '_]\d{{3}})+ (?!\d) | \d+ ) (?:\.\d+)? | \.\d+ )
            (?: e (?P<exponent>[-+]?\d+)
              | \s* [x\u00d7*] \s* 10 \^? \{{? (?P<ten>[-+]?\d+) \}}?
              | \^ \{{? (?P<power>\d+) \}}? )?
            (?: \s+ (?P<scale>{_BIG}) \b )? )
      | \b (?P<words> (?: (?:an?|{_SMALL}) [ -]+ )? (?:{_BIG}) (?: \s+ (?:and\s+)? {_SMALL} )?
                    | {_SMALL} ) \b )
    """.replace("[ -]", r"[\x20-]").replace("[, '_]", r"[,\x20'_]"),
    re.VERBOSE,
)
_MOST = 400  # digits of a power: more are no answer, and would take the memory


def first_number(text: str) -> Fraction | None:
    """The first number of a text, exactly, in any common form; None where there is none.

    Digits of any script with separators, decimals, fractions, exponents and signs in any typography; words
    up to hundreds. Digits within a name ("A380") are none.

    >>> [str(first_number(t)) for t in ("1,000.5", "minus \u221212", "\u00bd cup", "1.5e3", "twenty-one")]
    ['2001/2', '-12', '1/2', '1500', '21']
    """
    found = _NUMBER.search(_plain(text).lower())
    return None if found is None else _value(found)


def _value(found: re.Match) -> Fraction | None:
    sign = -1 if (found["sign"] or "").startswith("-") else 1
    if found["words"]:
        return sign * _value_of_words(re.split(r"[\s-]+", found["words"]))
    if found["top"]:
        return sign * (int(found["whole"] or 0) + Fraction(int(found["top"]), int(found["bottom"])))
    value = Fraction(re.sub("[, '_]", "", found["digits"]))
    exponent = int(found["exponent"] or found["ten"] or 0)
    power = int(found["power"] or 1)
    if max(abs(exponent), power * len(found["digits"])) > _MOST:
        return None
    return sign * value**power * Fraction(10) ** exponent * _SCALE.get(found["scale"], 1)


def _value_of_words(words: Sequence[str]) -> Fraction:
    total, below = 0, 0
    for word in words:
        if word in _SCALE:
            total, below = (below or 1) * _SCALE[word], 0
        elif word in _UNITS:
            below += _UNITS.index(word)
        elif word in _TENS:
            below += 20 + 10 * _TENS.index(word)
    return Fraction(total + below)


# ---------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------
_LEAD = re.compile(
    r"\W*(?:(?:so|thus|hence|therefore)\W+)?(?:i (?:choose|pick|select|think)\W+|it(?: is| s)\b\W*)?"
    r"(?:(?:the|my|final|correct|right|best) )*(?:answers?|options?|choices?)?"
    r"(?: (?:is|are|would be)\b)?(?: (?:the )?(?:options?|choices?)\b)?\W*",
    re.IGNORECASE,
)
_JOINT = r"\s*(?:[,;/&+]|\band\b|\bor\b|,\s*(?:and|or)\b)?\s*"
_LETTER = r"[\[({<]?\s*([A-Za-z])(?:\s*[\])}>])?"
# What may follow an option's letter: no word right after it, or it is an article or a pronoun.
_END = re.compile(
    r"\s*$|\s*[\n)\]}>.:,;!?-]|\s+(?:is|because|since|as)\b|\s*(?:and|or|&|/)\s+[\[({<]?[A-Za-z]\b",
    re.IGNORECASE,
)
_RUN = re.compile(r"[A-Z]{2,6}")


def options_named(text: str) -> set[str]:
    """The option letters that an answer gives, upper case; empty where it gives none or leaves it open.

    A letter counts in any dress at the beginning of the answer or after "the answer is", where no word
    follows at once: "A red car" and "I see" name none. "A or B" leaves it open.

    >>> [sorted(options_named(t)) for t in ("**B**", "Final answer: (J) red", "A and C", "A red car")]
    [['B'], ['J'], ['A', 'C'], []]
    """
    text = re.sub(r"[*$`\"'_]", " ", _plain(text)).strip()
    run = _RUN.fullmatch(text)
    if run and sorted(set(text)) == list(text):
        return set(text)
    starts = {0, _LEAD.match(text).end()}
    for start in sorted(starts, reverse=True):
        rest = text[start:].lstrip(" \t([{<") if start else text
        found = re.match(rf"\W*{_LETTER}", rest)
        if (found and _END.match(rest, found.end())) or (found and rest[found.end() - 1] in ")]}>"):
            return _with_others(rest, found)
    return set()


def _with_others(text: str, first: re.Match) -> set[str]:
    """The first letter, and those that stand in a list with it."""
    letters, place = {first[1].upper()}, first.end()
    following = re.compile(
        rf"(?P<joint>{_JOINT}){_LETTER}(?=\s*(?:$|[\n,;/&.)]|[\[({{<]|and\b|or\b))"
    )
    while found := following.match(text, place):
        bracketed = found[0].rstrip()[-1] in ")]}>"
        if not (found["joint"].strip() or bracketed):
            break
        if "or" in found["joint"].lower():
            return set()
        letters.add(found[2].upper())
        place = found.end()
    return letters


def _option_and_text(truth: str) -> tuple[set[str], str]:
    """Letters and text of an option: "B. red" -> {B}, "red"; "A, C" -> {A, C}, ""; "red" -> {}, "red"."""
    labelled = re.fullmatch(r"\s*[\[({<]?([A-Za-z])[\])}>.:]+\s+(\S.*)", _plain(truth), re.DOTALL)
    letters = options_named(truth)
    if labelled and len(letters) <= 1:
        return {labelled[1].upper()}, labelled[2]
    return letters, "" if letters else truth
