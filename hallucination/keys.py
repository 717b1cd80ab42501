"""Which key of a saved row holds the answer, and which the id: one place for the habits of many tools.

A row beside what was asked, as tools write it; the answer is in capitals:

    LLaVA          question_id, prompt, TEXT, answer_id, model_id
    POPE           question, ANSWER;  or its question row with ANSWER added: text is the question
    VLMEvalKit     index, question, answer (the label), PREDICTION
    lmms-eval      doc, target (the label), resps, FILTERED_RESPS (a list of one text)
    CHAIR's tools  image_id, CAPTION;  or caption (a reference) beside PREDICTION
    others         question or text (the prompt), RESPONSE, OUTPUT(S), COMPLETION, PRED, MODEL_ANSWER

So: 1. a key that only a model fills (MODEL) holds the answers of a file, whatever else is there; 2. in a
file without one it is `answer`, `caption` or `text`; 3. what was asked is no answer, and neither is what
all rows repeat while another key differs, or what asks for something while another key does not; 4. two
keys that are left and differ are a fault. `label`, `target` and the like are never an answer.
"""

import re
import sys
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from data import DataError

MODEL = (
    "prediction", "pred", "model_answer", "model_output", "response", "output", "outputs",
    "completion", "generated_text", "filtered_resps", "resps",
)  # fmt: skip
EITHER = ("answer", "caption", "text")  # of a model, or of the data set
_ASKED = ("question", "prompt", "query", "instruction")
_PLACEHOLDER = re.compile(
    r"<\|?/?(?:image|img|vision|ImageHere)\w*\|?>(?:\s*</\w+>)?", re.IGNORECASE
)
_INSTRUCTION = re.compile(
    r"[\s(]*(?:please )?(?:answer|respond|reply)\b(?: the question| this question)?[\s,]*"
    r"(?:using|with|in|by|only|yes|directly|briefly|shortly)\b[^.?!]*[.)!]*\s*$",
    re.IGNORECASE,
)
_REQUEST = re.compile(
    r"(?:please|kindly|can you|could you)\b.*\b(?:describe|tell|write|provide|give|explain|generate)"
    r"|(?:describe|write|generate|provide|give|explain|caption|summari[sz]e|list)\s+"
    r"(?:this|the|an?|me|in|what|all|every|your|briefly)\b",
    re.IGNORECASE | re.DOTALL,
)

_SHORT = re.compile(r"\W*(?:(?:yes|no)\b|\S+\W*$)", re.IGNORECASE)


def answers_in(
    rows: Sequence[dict], asked: Sequence[str | None] | None = None
) -> list[tuple[str | None, str]]:
    """(answer, "") of each row of a file, or (None, why the row has none), by the rules above.

    asked: the question of each row as its caller knows it, beside those that the row itself tells.
    """
    asked = asked or [None] * len(rows)
    said = [_texts_of(row, MODEL) for row in rows]
    if not any(said):
        said = [_texts_of(row, EITHER) for row in rows]
    left = [_unasked(texts, row, q) for texts, row, q in zip(said, rows, asked, strict=True)]
    prompts = _repeated(left)
    found = []
    for texts, kept in zip(said, left, strict=True):
        found.append(_choose({k: v for k, v in kept.items() if k not in prompts}, texts))
    answers = [answer for answer, _ in found if answer is not None]
    # a single answer may ask back
    if answers and all(map(asks if len(answers) > 1 else _requests, answers)):
        fault = "holds no answer: every row of the file asks for something"
        return [(None, why or fault) for _, why in found]
    return found


def answer_in(row: dict, asked: str | None = None) -> tuple[str | None, str]:
    """What `answers_in` says of a row alone."""
    return answers_in([row], [asked])[0]


def is_asked(text: str, question: str | None) -> bool:
    """Whether a text is the question; white space, image marks and "Answer with one word." do not tell."""
    return bool(question) and _bare(text) == _bare(question) != ""


@lru_cache(maxsize=10_000)
def _bare(text: str) -> str:
    text = " ".join(_PLACEHOLDER.sub(" ", text).split()).casefold()
    return _INSTRUCTION.sub("", text).strip() or text


def asks(text: str) -> bool:
    """Whether a text asks for something, as a prompt does and an answer seldom."""
    return _requests(text) or text.rstrip().endswith("?")


def _requests(text: str) -> bool:
    return _REQUEST.match(_bare(text)) is not None


def _texts_of(row: dict, keys: Sequence[str]) -> dict[str, str]:
    """The texts under some keys; of a model's keys a list of one text is that text."""
    found = {}
    for key in keys:
        value = row.get(key)
        while key in MODEL and isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, str):
            found[key] = value
    if "filtered_resps" in found:
        found.pop("resps", None)
    return found


def _unasked(texts: dict[str, str], row: dict, asked: str | None) -> dict[str, str]:
    """Without what was asked, and what asks for something while another text does not."""
    doc = row["doc"] if isinstance(row.get("doc"), dict) else {}
    questions = [asked, *(place.get(key) for place in (row, doc) for key in _ASKED)]
    questions = [question for question in questions if isinstance(question, str)]
    left = {k: v for k, v in texts.items() if not any(is_asked(v, q) for q in questions)}
    telling = {k: v for k, v in left.items() if not asks(v)}
    return telling or left


def _repeated(rows: Sequence[dict[str, str]]) -> set[str]:
    """Keys of one text in all rows of a file, where another has several; but all may be a yes or a no."""
    texts = {key: {row.get(key) for row in rows} for key in EITHER}
    several = any(len(found - {None}) > 1 for found in texts.values())
    once = {key: found.pop() for key, found in texts.items() if len(found) == 1 and len(rows) > 1}
    return {k for k, text in once.items() if several and text and not _SHORT.match(text)}


def _choose(left: dict[str, str], said: dict[str, str]) -> tuple[str | None, str]:
    """The answer among the texts that are `left` of those that a row has `said`."""
    found = {key: text for key, text in left.items() if text.strip()} or left
    first = next(iter(found), "")
    other = next((key for key in found if found[key].strip() != found[first].strip()), None)
    if other:
        return None, f"`{first}` and `{other}` may both hold the answer, and they differ: drop one"
    if found:
        return found[first], ""
    if said:
        return None, f"holds no answer: `{next(iter(said))}` is what was asked"
    return None, "holds no answer (prediction, response, answer, text, caption, ...)"


def doubt_labels(answers: Sequence[str], labels: Sequence[str], of_data_set: bool = False) -> None:
    """Say on stderr that saved answers are the labels word for word: most likely a file of labels.

    Raises DataError for rows that are `of_data_set` in their other keys, too.
    """
    pairs = zip(answers, labels, strict=True)
    if len(answers) < 2 or any(said.strip().lower() != label for said, label in pairs):
        return
    told = "every answer is the label of its question, word for word"
    if of_data_set:
        raise DataError(f"{told}, in rows of a data set: put a model's answers under `prediction`")
    print(f"{told}: is this a file of labels?", file=sys.stderr)


def id_of(value: Any) -> str | None:
    """An id as text: of a text or a whole number, which pandas may have written as 12.0; else None."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int and not isinstance(value, str):
        return None
    return re.sub(r"^(-?[0-9]+)\.0+$", r"\1", str(value).strip()) or None
