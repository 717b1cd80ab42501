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
from functools import lru_cache
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
    """r(Y) in [0, 1]: how right the answer of a completion is, by the kind of its question.

    An answer that says nothing is worth 0, whatever the question.
    """
    answer = extract_answer(completion)
    return _BY_KIND[example.kind](answer, example) if answer and normalize(answer) else 0.0


def yes_no(answer: str, example: Question) -> float:
    """1 if the answer says the right one of yes and no, and not the other."""
    said, right = ({"yes", "no"} & set(normalize(t).split()) for t in (answer, example.answer))
    return float(len(right) == 1 and said == right)


def number(answer: str, example: Question) -> float:
    """1 if the first number of the answer is the right one, in whatever form."""
    value = first_number(answer)
    return float(value is not None and value == first_number(example.answer))


def choice(answer: str, example: Question) -> float:
    """1 for the right option or options: by letter ("(B) red" for B), or by the text that the truth has."""
    right, said = options_named(example.answer), options_named(answer)
    if re.fullmatch("[A-Z]{2,}", example.answer) and sorted(right) != list(example.answer):
        right = frozenset()  # "DOG" is a word, "AC" may be two options
    if right and right == said:
        return 1.0
    texts = {normalize(example.answer)}
    labelled = _LABELLED.fullmatch(_plain(example.answer))
    if labelled and len(right) == 1:
        texts.add(normalize(labelled[1]))
    own = _LABELLED.fullmatch(_plain(answer))  # "B. red" for red, where the truth has no letter
    return float(normalize(own[1] if own and not right else answer) in texts)


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

    Digits after a leading zero are a name ("007"), no number; so are dates, times, versions and ranges.
    """
    if normalize(answer) in ("yes", "no"):
        return "yesno"
    plain = re.sub(r"^[\"'(\[](.*)[\"')\]]$", r"\1", _for_numbers(answer).rstrip(" .!"))
    found = _NUMBER.fullmatch(plain.rstrip(" .!"))
    named = found and re.match(r"0\d", found["digits"] or "")
    return "number" if found and not named and _value(found) is not None else "text"


_WANTED = {
    "yesno": "yes or no",
    "number": "a number",
    "choice": "a letter, several letters, or a text",
    "text": "a text with a word or a sign in it",
}


def truth_problem(kind: str, answer: str, objects: Sequence[str] = ()) -> str | None:
    """Why nobody could ever be right about this truth, or None: said back, it must earn 1."""
    if kind == "caption":
        if not objects:
            return "a caption needs 'objects', what it should name"
        unnamed = [name for name in objects if not _can_be_named(name, objects)]
        return f"no caption can name the object {unnamed[0]!r}" if unnamed else None
    truth = SimpleNamespace(kind=kind, answer=answer)
    if outcome_reward(f"<answer>{answer}</answer>", truth) == 1:
        return None
    return (
        f"no answer can ever be right: the truth {answer!r} of kind {kind} must be {_WANTED[kind]}"
    )


def _can_be_named(name: str, objects: Collection[str]) -> bool:
    return objects_named(name, objects) == [name] and any(map(str.isalnum, name))


# ---------------------------------------------------------------------------------------------
# Words
# ---------------------------------------------------------------------------------------------
# How Unicode calls characters that are another one in other clothes. A superscript is none: "2" is not "²".
_CLOTHES = {"<wide>", "<narrow>", "<font>", "<noBreak>", "<fraction>"}
_CLOTHES |= {"<initial>", "<medial>", "<final>", "<isolated>"}
_TYPOGRAPHY = {
    **dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2212\ufe63", "-"),
    **dict.fromkeys("\u2018\u2019\u201b\u02bc\u02bb\u00b4", "'"),
    **dict.fromkeys("\u201c\u201d\u201e\u201f\u00ab\u00bb", '"'),
    **{"\u2044": "/", "\u2215": "/", "\u066b": ".", "\u066c": ",", "\ufe0e": "", "\ufe0f": ""},
    **{"\u20e3": "", "\u3002": ".", "\u3001": ","},
}


class _Characters(dict):
    """Code point -> what is written for it, worked out when it is first met."""

    def __missing__(self, code: int) -> str:
        c = chr(code)
        tag, category = unicodedata.decomposition(c).partition(" ")[0], unicodedata.category(c)
        if category == "Nd":
            plain = str(unicodedata.decimal(c))
        elif tag in _CLOTHES or (tag == "<compat>" and category[0] in "LZ"):
            plain = unicodedata.normalize("NFKC", c)
        else:
            plain = "" if category == "Cf" else c
        self[code] = "".join(_TYPOGRAPHY.get(c, c) for c in plain)
        return self[code]


_CHARACTERS = _Characters()
_DRESS = [  # LaTeX, Markdown and HTML around a text; each makes it shorter
    (re.compile(pattern, re.DOTALL | re.IGNORECASE), plain)
    for pattern, plain in (
        (r"(?<=\d)\\([dt]?)frac", r" \\frac"),
        (r"\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", r"\1\2/\3\4"),
        (r"\\(?:boxed|fbox|mbox|text\w*|math\w*)\s*\{([^{}]*)\}", r"\1"),
        (r"\{,\}", ","),
        (r"\^\{([^{}]*)\}", r"^\1"),
        (r"\\(?:times|cdot)(?![a-z])", "\u00d7"),
        (r"\\[,;:! ()\[\]]|\$\$", " "),
        (r"\\([%$#&_])", r"\1"),
        (r"\$([^$]*)\$", r"\1"),
        (r"(?<!\w)([*_~]{1,3}|`{1,3})(?=[^\s*_~`])(.+?)(?<=\S)\1(?!\w)", r"\2"),
        (r"<(b|i|em|strong|u|p|code)>(.*?)</\1>", r"\2"),
        (r"</s>|<\|\w+\|>", ""),
    )
]


@lru_cache(maxsize=10_000)
def _plain(text: str) -> str:
    """A text without its dress: one way to write accents, digits, quotes and dashes; no LaTeX, no bold."""
    if not text.isascii():
        text = re.sub(r"\u2212\s+(?=[\d.])", "-", unicodedata.normalize("NFC", text))
        text = re.sub("(?<=\\d)(?=[\u00bc-\u00be\u2150-\u215f])", " ", text)  # "2½" is 2 1/2
        text = unicodedata.normalize("NFC", text.translate(_CHARACTERS))
    for _ in range(4):  # \boxed{\text{B}}
        if not re.search(r"[\\$*_`~<{]", text):
            break
        for pattern, plain in _DRESS:
            text = pattern.sub(plain, text)
    return text.strip()


_LETTER = r"[^\W\d_]"
_SPOKEN = [  # what marks say nothing, or say the same in two ways; after lower case
    (re.compile(pattern, re.MULTILINE), plain)
    for pattern, plain in (
        (r'"', " "),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),  # thousands
        (rf"(?<!\w)(?:{_LETTER}\.)+{_LETTER}(?!\w)\.?", lambda found: found[0].replace(".", "")),
        (rf"^\s*#+\s+(?={_LETTER})|(?<!\S)[-*]+\s+(?={_LETTER}{{2}}|a )", " "),  # headings, lists
        (rf"(?<={_LETTER}{{2}})-+(?={_LETTER})|(?<={_LETTER})-+(?={_LETTER}{{2}})", " "),  # hyphens
        (r"(?<![\w'-])(?:the|an)\s+(?=\S)", ""),
        # "A" is a name before a sign, another letter and where something is said of it.
        (rf"(?<![\w'-])(?:a\s+)+(?={_LETTER}{{2}})(?!(?:and|or|is|to|vs)\b)", ""),
        (rf"\.(?!\d)|(?<={_LETTER})\.", " "),
        (r"'(?!\w)|(?<!\w)'|!(?!=)", " "),
    )
]


class _Marks(dict):
    """Code point -> itself in a word, apart where it is a sign, a space where it says nothing."""

    def __missing__(self, code: int) -> str:
        c = chr(code)
        category = unicodedata.category(c)
        word = category[0] in "LMN" or category in ("Co", "Cn", "Cs") or c in "._'"
        sign = category[0] == "S" or c in "#%&@/*-!\u2032\u2033\u2030\u00a7"
        self[code] = c if word else f" {c} " if sign else " "
        return self[code]


_MARKS = _Marks()


@lru_cache(maxsize=10_000)
def normalize(text: str) -> str:
    """What a text says, in lower case: its words, numbers and signs; "The  Cat." -> "cat".

    Punctuation says nothing, nor does an article before another word. Signs do ("C++" is not "C#", "x+1"
    not "x-1"), and so does a text of punctuation alone. A hyphen between letters parts words.

    >>> normalize("Line A"), normalize("a well-known caf\u00e9!"), normalize("\u22125,000"), normalize("+")
    ('line a', 'well known caf\u00e9', '- 5000', '+')
    """
    folded = unicodedata.normalize("NFC", _plain(text).casefold())
    spoken = folded
    for pattern, plain in _SPOKEN:
        spoken = pattern.sub(plain, spoken)
    words = spoken.translate(_MARKS).split()
    return " ".join(words) or "".join(
        c for c in folded if not c.isspace() and unicodedata.category(c) != "Cc"
    )


# ---------------------------------------------------------------------------------------------
# Numbers
# ---------------------------------------------------------------------------------------------
_UNITS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
_TEENS = [
    "ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen",
    "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_SCALE = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_PARTS = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4}
_WORDS = {"zero": 0} | {word: i for i, word in enumerate(_UNITS + _TEENS, 1)}
_WORDS |= {word: i for i, word in zip(range(20, 100, 10), _TENS, strict=True)}
_UNIT, _TEEN, _TEN, _BIG, _PART = map("|".join, (_UNITS, _TEENS, _TENS, _SCALE, _PARTS))
_SMALL = rf"(?:(?:{_TEN})(?:[\x20-](?:{_UNIT}))?|{_TEEN}|{_UNIT})"
_SCALED = rf"(?:(?:a|{_SMALL})[\x20-])?(?:{_BIG})(?:[\x20-](?:{_BIG}))*"
_NUMBER = re.compile(
    rf"""
    (?P<sign> (?<![\w)\]]) [-+] | \b(?:minus|negative)\s+ )?
    (?: (?<!\w)
        (?: (?: (?P<whole>\d+) [\s-] )? (?P<top>\d+) \s?/\s? (?P<bottom>\d+)
          | (?P<digits> (?: \d{{1,3}}(?:,\d{{2,3}})*,\d{{3}} | \d{{1,3}}(?:[\x20']\d{{3}})+(?!\x20\d)
                          | \d+ )? (?:\.\d+)? (?<=\d) )
            (?: e(?P<exponent>[-+]?\d+) | \s?[x\u00d7*\u00b7]\s?10\^(?P<ten>[-+]?\d+)
              | \^(?P<power>[-+]?\d+) )?
            (?: [\x20-](?P<scale>{_BIG})\b )? )
        (?! \d | [.,:/'^*+-]\d | \s?/\s?\d | e[-+]?\d ) (?: \s? (?:%|percent\b|per\ cent\b) )?
      | \b(?P<words> zero | (?:{_SCALED}(?:\ and)?[\x20-])* (?:{_SCALED}|{_SMALL}) )\b
        (?: [\x20-](?P<part>{_PART})\b )? (?!\ point\b)
      | \A(?:an?\ )?(?P<only_half>half)\Z )
    (?P<and_half> \ and\ a\ half\b )?
    | (?P<other> (?<!\w)\w*\d (?: \w | [.,:/'^*+-](?=\d) )* | \b(?:{_UNIT}|zero)\ point\b )
    """,
    re.VERBOSE,
)
_MOST = 400  # digits: more are no answer, and would take the memory
_RAISED = str.maketrans(
    "\u2070\u00b9\u00b2\u00b3\u2074\u2075\u2076\u2077\u2078\u2079\u207a\u207b", "0123456789+-"
)


def _for_numbers(text: str) -> str:
    """A text as its numbers are looked for: exponents with ^, a sign beside its number."""
    text = re.sub(
        "(?<=\\d)[\u207a\u207b]?[\u2070\u00b9\u00b2\u00b3\u2074-\u2079]+",
        lambda found: "^" + found[0].translate(_RAISED),
        _plain(text).lower(),
    )
    return re.sub(r"(\A|[=:(]\s?)([-+])\s+(?=[\d.,/e^]+\W*\Z)", r"\1\2", text)


@lru_cache(maxsize=10_000)
def first_number(text: str) -> Fraction | None:
    """The first number of a text, exactly, in any common form; None where there is none.

    Digits of any script with separators, decimals, fractions, exponents and signs in any typography; words
    up to billions. What is no number as a whole is passed over: names ("A380"), times, dates, versions,
    ranges ("3-4") and what may be either of two ("3,5").

    >>> [str(first_number(t)) for t in ("1,000.5", "minus \u221212", "\u00bd cup", "1.5e3", "twenty-one")]
    ['2001/2', '-12', '1/2', '1500', '21']
    """
    values = map(_value, _NUMBER.finditer(_for_numbers(text)))
    return next((value for value in values if value is not None), None)


def _value(found: re.Match) -> Fraction | None:
    """The value of what _NUMBER found; None for what is no number, or one that nobody would write."""
    if found["other"] or len(found[0]) > _MOST:
        return None
    if found["words"]:
        value = _value_of_words(found["words"]) / _PARTS.get(found["part"], 1)
    elif found["only_half"]:
        value = Fraction(1, 2)
    elif found["top"]:
        if not int(found["bottom"]):
            return None
        value = int(found["whole"] or 0) + Fraction(int(found["top"]), int(found["bottom"]))
    else:
        value = Fraction(re.sub("[, ']", "", found["digits"]))
        exponent, power = int(found["exponent"] or found["ten"] or 0), int(found["power"] or 1)
        if max(abs(exponent), abs(power) * len(found["digits"])) > _MOST or power < 0 == value:
            return None
        value = value**power * Fraction(10) ** exponent * _SCALE.get(found["scale"], 1)
    value += Fraction(1, 2) if found["and_half"] else 0
    return -value if (found["sign"] or "+")[0] in "-mn" else value


def _value_of_words(words: str) -> Fraction:
    total = below = 0
    for word in re.split(r"[\s-]", words):
        if word in _SCALE:
            below = (below or 1) * _SCALE[word]
            if _SCALE[word] >= 1000:
                total, below = total + below, 0
        else:
            below += _WORDS.get(word, 0)  # "a" and "and" are worth nothing
    return Fraction(total + below)


# ---------------------------------------------------------------------------------------------
# Options
# ---------------------------------------------------------------------------------------------
_LEAD = re.compile(
    r"(?:[^\w-]|-(?!\w)|\b(?:so|thus|hence|therefore|i'll|i'd|i(?=\s+(?:would|will|choose|pick|select|think"
    r"|believe|go))|would|will|choose|pick|select|think|believe|go|with|it's|it|that|is|are|be|the|my|both"
    r"|final|correct|right|best|ans|answers?|options?|choices?|letters?)\b"
    r"|\u7b54\u6848|\u9009\u9879|\u9009|\u662f|\u4e3a)*",
    re.IGNORECASE,
)
_ONE = r"(?<![A-Za-z0-9_])(?<!\w')([{0}])(?!\w)"  # a letter alone; {0}: A-Z or a-z
# What follows the letter of an option: nothing, a mark, a text in brackets, or what is said of an answer.
_END = (
    r"(?![+#&%\u00b0=/*\u2032]|-(?!\s)|'\w)(?:\W*\Z|[^\w\s'-]|'|\s+[:,)\]]|\s*\n|\s+-+\s|-\s"
    r"|\s+\([^()]*\)\W*\Z|\s+(?:because|since|as)\b"
    r"|\s+(?:is|are)\s+(?:the\s+)?(?:correct|right|best|answer))"
)
# Letters alone, one after the other; no article and no "I" before a word.
_LIST = r"(?:[^\w]|{1}(?!\s+(?!(?:and|or|are)\b)[^\W\dA-Z])|(?<=\W)(?:and|or|options?|choices?)\b)+"
# Another option elsewhere in the answer: in brackets, at the beginning of a line, or with a text of its own.
_OTHER = (
    r"(?<!not )(?<!than )(?:[(\[]([{0}])[)\]](?!\s+(?:is|are|was)\b)|\b(?:option|choice)\s+{1}" + _END
    + r"|^\W*{1}\W*$|(?<![-\u00b0(\[]){1}(?:[):](?!\w)|\.(?=\s+\S)|\s+-\s))"
)  # fmt: skip
_READERS = {
    case: [
        re.compile(pattern.format(case, _ONE.format(case)), re.MULTILINE)
        for pattern in (_ONE, _LIST, _OTHER)
    ]
    for case in ("A-Z", "a-z")
}
_GLUED = re.compile(r"([A-Z]{2,})" + _END)
_FIRST = re.compile(_ONE.format("A-Za-z") + f"(?P<end>{_END})?")
_LABELLED = re.compile(
    r"\W*[A-Za-z](?:\s*[\])}>.:]+\s*|\s+-+\s+|\s*\n\s*)((?!\w\W*\Z)\S.*)", re.DOTALL
)


@lru_cache(maxsize=10_000)
def options_named(text: str) -> frozenset[str]:
    """The option letters that an answer gives, upper case; empty where it gives none or leaves it open.

    A letter counts in any dress at the beginning of the answer or after "the answer is", where no word
    follows at once: "A red car" and "I see" name none. "A or B" leaves it open.

    >>> [sorted(options_named(t)) for t in ("**B**", "Final answer: (J) red", "A and C", "A red car")]
    [['B'], ['J'], ['A', 'C'], []]
    """
    text = _plain(text)
    for start in (_LEAD.match(text).end(), 0):
        start += re.match(r"\W*", text[start:]).end()
        glued = _GLUED.match(text, start)
        if glued and len(set(glued[1])) == len(glued[1]):
            return frozenset(glued[1])
        first = _FIRST.match(text, start)
        if first:
            return _with_others(text, first)
    return frozenset()


def _with_others(text: str, first: re.Match) -> frozenset[str]:
    """The first letter, and those that stand in a list with it or as another option after it."""
    one, together, other = _READERS["A-Z" if first[1].isupper() else "a-z"]
    run = together.match(text, first.start())
    letters = set(one.findall(run[0])) if run else {first[1]}
    if (run and re.search(r"\bor\b", run[0])) or (len(letters) == 1 and first["end"] is None):
        return frozenset()
    for found in other.finditer(text, first.end(1)):
        letters |= {letter for letter in found.groups() if letter}
    return frozenset(letter.upper() for letter in letters)
