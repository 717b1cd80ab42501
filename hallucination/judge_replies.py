"""A judge's reply in words -> its scores, in whatever layout a judge writes them."""

import re
from collections import defaultdict

from rewards import final_answer

CRITERIA = ("accuracy", "correctness", "detailedness")
Scores = dict[str, tuple[float, float]]  # criterion -> scores of the first and the second answer

_NOISE = (  # (pattern, replacement), in this order
    (r"[*_`#>\"'\[\]{}]", " "),  # Markdown and JSON
    (r"[\u2010-\u2015\u2212]", "-"),
    (r"\uff1a", ":"),
    (r"\|", ";"),  # a table's cells
    (r"[^\S\n]+", " "),
    (r"\s*\n\s*", "\n"),
    (r"^ ?[-•+] ", ""),  # marks of a list
    (r"^ ?(?:criterion )?\(?[0-9]{1,2} ?[.):-]{1,2} ?(?=[^\W\d])", ""),  # "1. ", "(1) ", "1: "
    (r"(?<=[0-9]) ?(?:/|out of) ?10(?:\.0+)?(?![0-9])", ""),  # 7/10 is a 7
    (r"\([^()\n,0-9]*(?:1 ?(?:-|to) ?)?10\)", ""),  # (1-10), (out of 10)
)
_SCORE = r"(?<![\w.+-])([0-9]+(?:\.[0-9]+)?)(?![\w%/]|[.-][0-9])"
_WHAT = r"(?:answer|assistant|response|description|caption|model|candidate|output)"
_WHICH = r"(1|2|one|two|a|b|first|second)"
_LABEL = rf"(?:the )?(?:{_WHAT} ?)?{_WHICH}(?: {_WHAT})?(?: scores?)? ?[:=] ?"
_TO_SCORE = r"[\s:=;(-]*"
_LAYOUT = re.compile(
    rf"^[^\w\n]*({'|'.join(CRITERIA)})\b{_TO_SCORE}"
    rf"(?:(?:scores?|ratings?)\b[^\n\d:]*:{_TO_SCORE})?"
    rf"(?:{_LABEL})?{_SCORE}"
    r"(?: |[,;&-]|\band\b|\bvs\b\.?)*"
    # on another line the second score has a label or stands alone, else it may be of the reason
    rf"(?:\n?{_LABEL}|\n(?=[0-9.]+ ?$))?{_SCORE}"
    r"(?! ?(?:[,;&]|and)? ?[0-9])"  # a third number: who knows which two are meant
    r"(?= ?(?:$|[^\w\s]|reason|because))",  # "2 3 dogs" are no scores
    re.IGNORECASE | re.MULTILINE,
)
_SECOND = ("2", "two", "b", "second")


def parse_reply(text: str) -> Scores:
    """The scores of a judge's reply, by criterion; a criterion that cannot be read is left out.

    A criterion opens a line and its two scores follow, on that line or after it: "Accuracy: 7 9", "7, 9",
    "7.5 and 9", "7/10 9/10", "Scores of the two answers: 7 9", "Answer 1: 7, Answer 2: 9" (in either
    order).  Unread: one score or three, a score outside [1, 10], a criterion scored twice and unequally.
    """
    text = final_answer(text)
    for pattern, replacement in _NOISE:
        text = re.sub(pattern, replacement, text, flags=re.IGNORECASE | re.MULTILINE)
    found: dict[str, set[tuple[float, float] | None]] = defaultdict(set)
    for criterion, which_1, score_1, which_2, score_2 in _LAYOUT.findall(text):
        found[criterion.lower()].add(_ordered(which_1, float(score_1), which_2, float(score_2)))
    return {
        criterion: scores
        for criterion in CRITERIA
        for scores in found[criterion]
        if len(found[criterion]) == 1 and scores
    }


def _ordered(
    which_1: str, score_1: float, which_2: str, score_2: float
) -> tuple[float, float] | None:
    """Scores of the first and the second answer, by their labels; None if they cannot be."""
    swapped = which_1.lower() in _SECOND
    if which_2 and (which_2.lower() in _SECOND) == swapped:
        return None  # both of one answer
    if not (1 <= score_1 <= 10 and 1 <= score_2 <= 10):
        return None
    return (score_2, score_1) if swapped else (score_1, score_2)
