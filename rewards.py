"""Outcome rewards: the text of a completion -> [0, 1], and where in it the reasoning stands.

A completion is `<think> reasoning </think> <answer> answer </answer>`. Its outcome reward r is the
verifiable reward of the answer, by the kind of question; a completion without an answer in its tags
is worth 0. Which characters are reasoning is decided here, on the text; which tokens spell them is
found by decoding more and more of the completion's own tokens (`Policy.tokens_to_spell`), never by
tokenising again.
"""

import importlib
import math
import re
import sys
from collections.abc import Callable, Collection

from data import DataError, Example

RewardFunction = Callable[[str, Example], float]  # (completion, its example) -> [0, 1]

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
_LETTER = re.compile(r"\W*([A-Ha-h])\W*")
# A letter alone or marked as an option: "a boat" and "A, B or C" name none.
_OPTION = re.compile(
    r"\W*(?:(?:i choose |the |correct )*(?:answer|option|choice)?(?: is)?\W*)?"
    r"([a-h])(?=[).:]|\s*$)",
    re.IGNORECASE,
)
_NUMBER_WORDS = [  # index = value
    "zero", "one", "two", "three", "four", "five", "six",
    "seven", "eight", "nine", "ten", "eleven", "twelve",
]  # fmt: skip


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

    Its answer where it has one in tags; else what follows the reasoning; else all of it. Nothing, where
    the reasoning never ends.
    """
    answer = extract_answer(completion)
    if answer is not None:
        return answer
    _, closed, rest = completion.rpartition("</think>")
    if closed:
        return rest.strip()
    return "" if "<think>" in completion else completion


def well_formed(completion: str) -> bool:
    """Whether a completion has a closed reasoning span and an answer after it."""
    return reasoning_span(completion) is not None and extract_answer(completion) is not None


def outcome_reward(completion: str, example: Example) -> float:
    """r(Y) in [0, 1]: how right the answer of a completion is, by the kind of its question."""
    answer = extract_answer(completion)
    return 0.0 if answer is None else _BY_KIND[example.kind](answer, example)


def yes_no(answer: str, example: Example) -> float:
    """1 if the answer says the right one of yes and no, and not the other."""
    said = {"yes", "no"} & set(normalize(answer).split())
    return float(said == {normalize(example.answer)})


def number(answer: str, example: Example) -> float:
    """1 if the first number of the answer is the right one; in digits, or in words up to twelve."""
    value = _number(answer)
    return float(value is not None and value == _number(example.answer))


def choice(answer: str, example: Example) -> float:
    """1 for the right option: by its letter where that is the answer ("(B) red" for B), else by its text."""
    right = _LETTER.fullmatch(example.answer.strip())
    if right:
        said = _OPTION.match(answer)
        return float(said is not None and said[1].upper() == right[1].upper())
    return short_text(answer, example)


def short_text(answer: str, example: Example) -> float:
    """1 if the answer is the right one after normalisation."""
    return float(normalize(answer) == normalize(example.answer))


def grounded_caption(answer: str, example: Example) -> float:
    """F1 of the objects that a caption names against those that the image holds."""
    return object_f1(answer, example.objects, example.vocabulary)


_BY_KIND = {
    "yesno": yes_no,
    "number": number,
    "choice": choice,
    "text": short_text,
    "caption": grounded_caption,
}


def format_reward(completion: str, example: Example) -> float:
    """1 for a completion that reasons and answers in its tags: `--reward rewards:format_reward`."""
    return float(well_formed(completion))


def load_reward(name: str) -> RewardFunction:
    """A user's own reward, "my_module:my_function", from the working directory or wherever Python looks.

    It gets the text of a completion and its Example, and must return a number in [0, 1].
    Raises DataError where it cannot be loaded, and later where it returns anything else.
    """
    module, _, function = name.partition(":")
    sys.path.insert(0, "")
    try:
        reward = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise DataError(f"--reward {name}: must be module:function: {error}") from None
    finally:
        sys.path.remove("")
    if not callable(reward):
        raise DataError(f"--reward {name}: is not a function")

    def checked(completion: str, example: Example) -> float:
        value = reward(completion, example)
        if not isinstance(value, int | float) or not (math.isfinite(value) and 0 <= value <= 1):
            raise DataError(f"--reward {name}: returned {value!r}, must be a number in [0, 1]")
        return float(value)

    return checked


def normalize(text: str) -> str:
    """Lower case, words and numbers only, no articles: "The  Cat." -> "cat"."""
    words = re.findall(r"\w+(?:[.']\w+)*", text.lower())
    return " ".join(word for word in words if word not in ("a", "an", "the"))


def _number(text: str) -> float | None:
    """The first number of a text, in digits or in words up to twelve."""
    for word in re.findall(r"-?\d+(?:\.\d+)?|[a-z]+", text.lower()):
        if word in _NUMBER_WORDS:
            return float(_NUMBER_WORDS.index(word))
        if not word.isalpha():
            return float(word)
    return None


def objects_named(text: str, vocabulary: Collection[str]) -> list[str]:
    """The words of `vocabulary` in a text, in order, repeats kept; a plural counts as its singular."""
    words = re.findall(r"[a-z]+", text.lower())
    found = ((word, word.removesuffix("s"), word.removesuffix("es")) for word in words)
    hits = (next((form for form in forms if form in vocabulary), None) for forms in found)
    return [hit for hit in hits if hit]


def object_f1(caption: str, objects: Collection[str], vocabulary: Collection[str]) -> float:
    """F1 of the distinct objects a caption names against those that are there."""
    named, there = set(objects_named(caption, vocabulary)), set(objects)
    if not named and not there:
        return 1.0
    return 2 * len(named & there) / (len(named) + len(there))
