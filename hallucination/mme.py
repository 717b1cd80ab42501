"""MME: two yes/no questions per image, one of each answer, over fourteen tasks (Fu et al., 2023).

    acc    share of right answers            acc+    share of images with both answers right
    score  100 acc + 100 acc+, at most 200   perception, cognition: the sums over ten and four tasks

An answer is a yes or a no if it is one, in lower case, or else if its first four characters hold "yes"
or "no"; "Not sure" is a no, and what is neither is wrong and counted as other. The hallucination subset
is existence, count, position and color.

Departures from the published script:

1.  The final answer is read of a completion that reasons in tags.
2.  Pairs are made by image, not by neighbouring lines. An image with one answer of its two is bad input,
    where the script fails without a word of which.
3.  A sum over no task is not there (None, "-").
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from data import DataError, Example
from hallucination.command import (
    Result,
    add_model,
    answered,
    ask_model,
    cell,
    new_command,
    refuse_limit,
    with_dropped,
)
from hallucination.files import Bad, read_text
from hallucination.keys import doubt_labels, is_asked
from rewards import final_answer

PERCEPTION = (
    "existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark",
    "artwork", "OCR",
)  # fmt: skip
COGNITION = (
    "commonsense_reasoning",
    "numerical_calculation",
    "text_translation",
    "code_reasoning",
)
HALLUCINATION = ("existence", "count", "position", "color")
TASKS = PERCEPTION + COGNITION
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")


@dataclass(frozen=True)
class MMEQuestion:
    """One question about one image of a task."""

    task: str
    image: str  # path relative to the release folder, or the name in a result file
    text: str
    label: str  # "yes" or "no"


def parse(text: str) -> str:
    """ "yes", "no" or "other", by the rule of the official tool."""
    text = text.lower()
    if text in ("yes", "no"):
        return text
    return next((word for word in ("yes", "no") if word in text[:4]), "other")


def score(questions: Sequence[MMEQuestion], answers: Sequence[str]) -> dict:
    """tasks: by task n, acc, acc_plus (fractions), score (0 to 200), other (count); and the sums.

    perception, cognition and hallucination sum the tasks that are there; None where none of them is.
    """
    images: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    other: dict[str, int] = defaultdict(int)
    for question, answer in zip(questions, answers, strict=True):
        said = parse(final_answer(answer))
        images[question.task][question.image].append(said == question.label)
        other[question.task] += said == "other"
    tasks = {}
    for task, right in images.items():
        acc = fmean(hit for hits in right.values() for hit in hits)
        acc_plus = fmean(all(hits) for hits in right.values())
        tasks[task] = {
            "n": sum(map(len, right.values())),
            "acc": acc,
            "acc_plus": acc_plus,
            "score": 100 * acc + 100 * acc_plus,
            "other": other[task],
        }

    def total(names: Sequence[str]) -> float | None:
        there = [tasks[name]["score"] for name in names if name in tasks]
        return sum(there) if there else None

    return {
        "tasks": tasks,
        "perception": total(PERCEPTION),
        "cognition": total(COGNITION),
        "hallucination": total(HALLUCINATION),
    }


def table(figures: dict) -> str:
    """The figures as text, one line per task; a sum says of how many tasks it is."""
    tasks = figures["tasks"]
    lines = [f"{'':<26}{'n':>6}{'acc':>9}{'acc+':>9}{'score':>9}{'other':>7}"]
    for name, task in tasks.items():
        lines.append(
            f"{name:<26}{task['n']:>6}{task['acc']:>9.4f}{task['acc_plus']:>9.4f}"
            f"{task['score']:>9.2f}{task['other']:>7}"
        )
    for name, of in (
        ("perception", PERCEPTION),
        ("cognition", COGNITION),
        ("hallucination", HALLUCINATION),
    ):
        there = sum(task in tasks for task in of)
        lines.append(f"{name + f' ({there} of {len(of)} tasks)':<50}{cell(figures[name], '>9.2f')}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------
def read_release(root: Path, tasks: Sequence[str] | None, bad: Bad) -> list[MMEQuestion]:
    """The questions of a release folder: one folder per task, images and texts side by side or apart."""
    questions = []
    for task in _tasks(root, tasks, lambda name: (root / name).is_dir()):
        pictures = {
            path.stem: path
            for path in sorted((root / task).rglob("*"))
            if path.suffix.lower() in _PICTURES
        }
        for path in sorted((root / task).rglob("*.txt")):
            pairs = [line.split("\t") for line in _lines(path)]
            if path.stem not in pictures:
                bad(path, "has no image of its name")
            elif len(pairs) != 2 or any(len(pair) != 2 for pair in pairs):
                bad(path, "must hold two lines: a question, a tab, Yes or No")
            elif any(label.strip().lower() not in ("yes", "no") for _, label in pairs):
                bad(path, "an answer is neither Yes nor No")
            else:
                image = str(pictures[path.stem].relative_to(root))
                for text, label in pairs:
                    questions.append(MMEQuestion(task, image, text, label.strip().lower()))
    if not questions:
        raise DataError(f"{root}: no question in it: not the folder of an MME release")
    return questions


def read_results(
    root: Path, tasks: Sequence[str] | None, bad: Bad
) -> tuple[list[MMEQuestion], list[str]]:
    """Questions and answers of the official result files: <task>.txt of image, question, label, answer."""
    questions, answers = [], []
    for task in _tasks(root, tasks, lambda name: (root / f"{name}.txt").is_file()):
        path = root / f"{task}.txt"
        seen = set()
        for number, line in enumerate(_lines(path), 1):
            fields = line.split("\t")
            if len(fields) != 4:
                bad(
                    f"{path}:{number}",
                    f"{len(fields)} fields, must be image, question, label, answer",
                )
            elif fields[2].strip().lower() not in ("yes", "no"):
                bad(f"{path}:{number}", f"label is {fields[2]!r}, must be Yes or No")
            elif (fields[0], fields[1]) in seen:
                bad(f"{path}:{number}", f"asks this of {fields[0]} for the second time")
            elif is_asked(fields[3], fields[1]):
                bad(f"{path}:{number}", "holds no answer: its last field is the question")
            else:
                seen.add((fields[0], fields[1]))
                questions.append(MMEQuestion(task, fields[0], fields[1], fields[2].strip().lower()))
                answers.append(fields[3])
    if not questions:
        raise DataError(f"{root}: no answer in its result files")
    doubt_labels(answers, [question.label for question in questions])
    return whole_pairs(questions, answers, bad)


def whole_pairs(
    questions: Sequence[MMEQuestion], answers: Sequence[str], bad: Bad
) -> tuple[list[MMEQuestion], list[str]]:
    """Without images that lack one of their two answers; these are bad."""
    of_image = Counter((question.task, question.image) for question in questions)
    for (task, image), count in of_image.items():
        if count % 2:
            bad(f"{task}, {image}", f"answers: {count}, must be a pair: acc+ needs both")
    pairs = zip(questions, answers, strict=True)
    kept = [(q, answer) for q, answer in pairs if of_image[q.task, q.image] % 2 == 0]
    if not kept:
        raise DataError("no image has both its answers")
    return [q for q, _ in kept], [answer for _, answer in kept]


def holds_results(root: Path) -> bool:
    """Whether a folder holds result files rather than the tasks' folders."""
    return any((root / f"{task}.txt").is_file() for task in TASKS)


def _tasks(root: Path, wanted: Sequence[str] | None, there) -> list[str]:
    """The tasks to read, in the official order.  Raises DataError for one that is not there."""
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder")
    found = [task for task in TASKS if there(task)]
    for task in wanted or ():
        if task not in TASKS:
            raise DataError(f"--tasks {task}: no task of MME; they are {', '.join(TASKS)}")
        if task not in found:
            raise DataError(f"{root}: task {task} is not in it")
    if not found:
        raise DataError(f"{root}: none of MME's tasks is in it ({TASKS[0]}/, {TASKS[1]}/, ...)")
    return [task for task in found if not wanted or task in wanted]


def _lines(path: Path) -> list[str]:
    """The lines of a text file that are not empty; the official files end in either way.

    Only a line feed ends one, with or without a carriage return: other separators are part of answers.
    """
    lines = (line.removesuffix("\r") for line in read_text(path).split("\n"))
    return [line for line in lines if line.strip()]


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------
def add_command(commands) -> None:
    """Add `evaluate.py mme`."""
    command = new_command(commands, "mme", run, "yes/no pairs over fourteen tasks")
    command.add_argument(
        "--root", type=Path, required=True, help="release folder, or folder of result files"
    )
    command.add_argument("--tasks", nargs="+", metavar="TASK", help="only these; without it, all")
    add_model(command, max_new_tokens=128)


def run(args: argparse.Namespace) -> Result:
    """The release folder answered by a model, or official result files."""
    bad = Bad(args.skip_bad)
    if not args.model:
        refuse_limit(args)
        if not holds_results(args.root):
            raise DataError(
                f"{args.root}: holds no result files (existence.txt, ...): give --model to answer"
            )
        kept, texts = read_results(args.root, args.tasks, bad)
    else:
        limit = args.limit and args.limit + args.limit % 2  # whole pairs
        questions = read_release(args.root, args.tasks, bad)[:limit]
        asked = [
            (
                {"task": q.task, "image": q.image, "question": q.text},
                Example(args.root / q.image, q.text, q.label, "yesno"),
            )
            for q in questions
        ]
        kept, texts = answered(questions, ask_model(args, asked, bad))
    return with_dropped(score(kept, texts), table, bad)
