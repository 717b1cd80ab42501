"""POPE: asking for objects that are there and for objects that are not (Li et al., EMNLP 2023).

Half of the questions "Is there a X in the image?" ask for an object that is in the picture. The other
half ask for one that is not: any (random), a frequent one (popular), or one that often keeps company
with those that are there (adversarial). Yes is the positive class:

    accuracy    right answers / n                   precision   right yes / said yes
    recall      right yes / questions of label yes  F1          their harmonic mean
    yes-ratio   said yes / n                        unrecognised   answers that no rule knows

How an answer becomes a yes or a no is a matter of the parser:

    official    up to the first full stop, commas deleted, split at spaces: any of "No", "no", "not" is a
                no; everything else is a yes, so also "", "NO", "Nope" and "I cannot tell"
    opera       full stops and commas deleted: any of "No", "no", "NO", "not" or a word in n't is a no;
                everything else is a yes
    strict      exactly "yes" or "no" once stripped and in lower case; anything else is neither, and wrong

Departures from the published script:

1.  The parsers read the final answer of a completion that reasons in tags, which the script does not know.
2.  What is counted as yes without the word "yes" in it is reported as unrecognised.
3.  Precision is 0 where nothing is said to be there; a figure over no question is not there (None, "-").
    The script divides by zero.
4.  `strict` reads as lmms-eval does, but only accuracy and precision are lmms-eval's: its recall and F1
    leave out answers that are neither, and its yes-ratio is that of the labels.
"""

import argparse
import itertools
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from data import DataError, Example, short
from hallucination.coco import Instances
from hallucination.command import (
    Result,
    add_model,
    answered,
    ask_model,
    at_least_1,
    cell,
    images_of_model,
    new_command,
    one_source,
    refuse_limit,
    share,
    with_dropped,
    with_images,
    write_lines,
)
from hallucination.files import Bad, read_rows
from hallucination.keys import answers_in, doubt_labels, id_of, is_asked
from rewards import final_answer

_DATA_SET = {
    "index",
    "category",
    "image_source",
}  # keys beside which `answer` may well be the label
SPLITS = ("random", "popular", "adversarial")
FIGURES = ("accuracy", "precision", "recall", "f1", "yes_ratio")


@dataclass(frozen=True)
class PopeQuestion:
    """One question of a POPE file."""

    file: str  # the name of its file, without the suffix
    id: str
    image: str  # file name
    text: str
    label: str  # "yes" or "no"


# ---------------------------------------------------------------------------------------------
# Parsers: the text of an answer -> "yes", "no" or None, and whether a rule knew it
# ---------------------------------------------------------------------------------------------
Verdict = tuple[str | None, bool]


def official(text: str) -> Verdict:
    """The rule of the published evaluation script."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return _no_or_yes(text, any(word in ("No", "no", "not") for word in words))


def opera(text: str) -> Verdict:
    """The rule of OPERA's script, which also knows n't and NO."""
    words = text.replace(".", "").replace(",", "").split(" ")
    negative = any(word in ("No", "no", "NO", "not") or word.endswith("n't") for word in words)
    return _no_or_yes(text, negative)


def strict(text: str) -> Verdict:
    """One word, or nothing: the rule of lmms-eval.  "Yes." with its full stop is neither."""
    word = text.strip().lower()
    return (word, True) if word in ("yes", "no") else (None, False)


def _no_or_yes(text: str, negative: bool) -> Verdict:
    says_yes = re.search(r"\byes\b", text, re.IGNORECASE) is not None
    return ("no", True) if negative else ("yes", says_yes)


PARSERS: dict[str, Callable[[str], Verdict]] = {
    "official": official,
    "strict": strict,
    "opera": opera,
}


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------
def score(labels: Sequence[str], answers: Sequence[str], parser: str = "official") -> dict:
    """Figures of completions given to questions with these labels ("yes", "no"): fractions in [0, 1].

    n and unrecognised are counts.  None where there is no question to have a figure of.
    """
    verdicts = [PARSERS[parser](final_answer(answer)) for answer in answers]
    said = [word for word, _ in verdicts]
    pairs = Counter(zip(labels, said, strict=True))
    n, hits = len(said), pairs["yes", "yes"]
    positives, said_yes = labels.count("yes"), said.count("yes")
    return {
        "n": n,
        "accuracy": share(hits + pairs["no", "no"], n),
        "precision": share(hits, max(said_yes, 1)) if n else None,
        "recall": share(hits, positives),
        "f1": share(2 * hits, said_yes + positives) if positives else None,
        "yes_ratio": share(said_yes, n),
        "unrecognised": sum(not known for _, known in verdicts),
    }


def score_files(questions: Sequence[PopeQuestion], answers: Sequence[str], parser: str) -> dict:
    """Figures by file, and their unweighted mean where there are several (counts are summed)."""
    figures = {}
    for file in dict.fromkeys(question.file for question in questions):
        of_file = [i for i, question in enumerate(questions) if question.file == file]
        figures[file] = score(
            [questions[i].label for i in of_file], [answers[i] for i in of_file], parser
        )
    if len(figures) == 1:
        return next(iter(figures.values()))
    columns = {key: [of_file[key] for of_file in figures.values()] for key in FIGURES}
    mean = {key: None if None in found else fmean(found) for key, found in columns.items()}
    counts = {key: sum(f[key] for f in figures.values()) for key in ("n", "unrecognised")}
    return {**figures, "mean": {**mean, **counts}}


def table(figures: dict) -> str:
    """The figures as text, one line per file."""
    rows = {"": figures} if "n" in figures else figures
    lines = [f"{'':<28}{'n':>7}" + "".join(f"{key:>14}" for key in (*FIGURES, "unrecognised"))]
    for name, of_file in rows.items():
        shares = "".join(cell(of_file[key], ">14.4f") for key in FIGURES)
        lines.append(f"{name:<28}{of_file['n']:>7}{shares}{of_file['unrecognised']:>14}")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------
def read_questions(paths: Sequence[Path], bad: Bad) -> list[PopeQuestion]:
    """The questions of official files: question_id, image, text, label ("question", "answer" also do)."""
    questions = []
    names = [path.stem for path in paths]
    for path in paths:
        name = path.stem if names.count(path.stem) == 1 else str(path)
        seen: set[str] = set()
        for where, row in read_rows(path, bad):
            text = row.get("text", row.get("question"))
            label = row.get("label", row.get("answer"))
            id_ = id_of(row.get("question_id"))
            if not id_ or not isinstance(text, str):
                bad(where, "not a question: question_id, image, text and label are needed")
            elif str(label).strip().lower() not in ("yes", "no"):
                bad(where, f"label is {label!r}, must be yes or no")
            elif id_ in seen:
                bad(where, f"question_id {id_} stands here for the second time")
            else:
                seen.add(id_)
                label = str(label).strip().lower()
                questions.append(PopeQuestion(name, id_, str(row.get("image", "")), text, label))
    if not questions:
        raise DataError(f"{', '.join(map(str, paths))}: no usable question")
    return questions


def read_answers(
    paths: Sequence[Path], questions: Sequence[PopeQuestion], bad: Bad
) -> tuple[list[PopeQuestion], list[str]]:
    """The questions that saved answers answer, and those answers, in the order of the questions.

    One file of answers for each file of questions, in the same order; or one for all whose rows name
    their `file`. Rows are matched by question_id; a file without any is matched by order.
    """
    files = list(dict.fromkeys(question.file for question in questions))
    if len(paths) not in (1, len(files)):
        raise DataError(
            f"{len(paths)} files of answers for {len(files)} files of questions: give one each, in the "
            f"same order, or one for all"
        )
    answered: dict[tuple[str, str], str] = {}
    of_data_set = True
    known = {(question.file, question.id): question for question in questions}
    for i, path in enumerate(paths):
        of_file = files[i] if len(paths) == len(files) else None
        rows = list(_keyed(path, of_file, questions, bad))
        asked = [known[key].text if key in known else None for _, key, _ in rows]
        texts = answers_in([row for _, _, row in rows], asked)
        for (where, key, row), (text, fault) in zip(rows, texts, strict=True):
            if key not in known:
                bad(where, f"answers question {key[1]}, which is not among the questions")
            elif key in answered:
                bad(where, f"answers question {key[1]} for the second time")
            elif text is None:
                bad(where, fault)
            elif _asks_another(row, known[key]):
                bad(where, f"answers another question than {known[key].text!r}")
            else:
                answered[key] = text
                of_data_set &= "answer" in row and bool(_DATA_SET.intersection(row))
    for key, question in known.items():
        if key not in answered:
            bad(f"{question.file}, question {question.id}", "has no answer")
    kept = [question for key, question in known.items() if key in answered]
    if not kept:
        raise DataError(f"{', '.join(map(str, paths))}: no answer to any of the questions")
    texts = [answered[question.file, question.id] for question in kept]
    doubt_labels(texts, [question.label for question in kept], of_data_set)
    return kept, texts


def _asks_another(row: dict, question: PopeQuestion) -> bool:
    """Whether a row names a question, and it is not this one, be it with an instruction around it."""
    asked = next((row[k] for k in ("question", "prompt") if isinstance(row.get(k), str)), None)
    if asked is None or is_asked(question.text, asked):
        return False
    return " ".join(question.text.split()) not in " ".join(asked.split())


def _keyed(
    path: Path, file: str | None, questions: Sequence[PopeQuestion], bad: Bad
) -> Iterator[tuple[str, tuple[str, str], dict]]:
    """Rows of answers with the key of the question that each answers."""
    rows = list(read_rows(path, bad))
    of_file = [question for question in questions if file in (None, question.file)]
    if any(row.get("question_id") is not None for _, row in rows):
        for where, row in rows:
            id_ = id_of(row.get("question_id"))
            if file is None and "file" not in row:
                raise DataError(
                    f"{where}: names no `file`, and there are several files of questions: give one file of "
                    f"answers for each (--answers A B C), or rows that name theirs"
                )
            if id_ is None:
                bad(
                    where,
                    f"question_id is {short(row.get('question_id'))}, must be a number or a text",
                )
            else:
                yield where, (str(row.get("file", file)), id_), row
    elif len(rows) != len(of_file):
        raise DataError(
            f"{path}: {len(rows)} answers without a question_id for {len(of_file)} questions: "
            f"cannot be matched by order"
        )
    else:
        for (where, row), question in zip(rows, of_file, strict=True):
            yield where, (question.file, question.id), row


# ---------------------------------------------------------------------------------------------
# Questions of one's own, from COCO's annotations
# ---------------------------------------------------------------------------------------------
def build(instances: Instances, split: str, images: int, pairs: int, seed: int) -> list[dict]:
    """Questions about objects that are annotated and, as many, about objects that are not.

    split: how an absent object is chosen: any (random), the most frequent in the file (popular), those
    that most often occur beside the ones that are there (adversarial).  images: how many, of those with
    at least `pairs` categories.  pairs: questions of each label per image.  Rows of a POPE file.
    """
    there = {image: {name for name, *_ in objects} for image, objects in instances.objects.items()}
    frequency = Counter(name for names in there.values() for name in names)
    beside = Counter(
        pair for names in there.values() for pair in itertools.combinations(sorted(names), 2)
    )
    rng = random.Random(f"pope {seed}")
    eligible = sorted(image for image, names in there.items() if len(names) >= pairs)
    chosen = sorted(rng.sample(eligible, min(images, len(eligible))))
    if not chosen:
        raise DataError(f"no image has {pairs} categories: lower --pairs")
    rows = []
    for image in chosen:
        present = sorted(there[image])
        absent = sorted(set(frequency) - there[image])
        rng.shuffle(absent)
        if split == "popular":
            absent.sort(key=lambda name: -frequency[name])
        elif split == "adversarial":
            absent.sort(key=lambda name: -sum(beside[tuple(sorted((name, p)))] for p in present))
        for yes, no in zip(rng.sample(present, pairs), absent[:pairs], strict=False):
            for name, label in ((yes, "yes"), (no, "no")):
                article = "an" if name[0] in "aeiou" else "a"
                rows.append(
                    {
                        "question_id": len(rows) + 1,
                        "image": instances.images[image][0],
                        "text": f"Is there {article} {name} in the image?",
                        "label": label,
                    }
                )
    return rows


# ---------------------------------------------------------------------------------------------
# The commands
# ---------------------------------------------------------------------------------------------
def add_command(commands) -> None:
    """Add `evaluate.py pope` and `pope-build`."""
    command = new_command(
        commands, "pope", run, "existence questions: accuracy, F1, yes-ratio", check
    )
    command.add_argument(
        "--questions", type=Path, nargs="+", required=True, help="official question files"
    )
    command.add_argument(
        "--answers", type=Path, nargs="+", help="saved answers: one file for each, or one for all"
    )
    command.add_argument("--images", type=Path, help="folder of the images, for --model")
    command.add_argument(
        "--parser", choices=tuple(PARSERS), default="official", help="what is a yes"
    )
    command.add_argument(
        "--suffix",
        default="",
        help="put after every question, e.g. ' Answer the question using a single word or phrase.'",
    )
    add_model(command, max_new_tokens=128)

    command = new_command(
        commands, "pope-build", run_build, "existence questions from COCO's annotations"
    )
    command.add_argument("--coco", type=Path, required=True, help="instances_*.json")
    command.add_argument(
        "--split", choices=SPLITS, default="adversarial", help="how absent objects are chosen"
    )
    command.add_argument("--output", type=Path, required=True, help="file of questions to write")
    command.add_argument("--image-count", type=at_least_1, default=500, help="images to ask about")
    command.add_argument("--pairs", type=at_least_1, default=3, help="yes/no pairs per image")
    command.add_argument("--seed", type=int, default=0, help="of the choice")


def check(args: argparse.Namespace) -> str | None:
    """Why the flags do not fit together, or None."""
    return one_source(args, "answers") or images_of_model(args)


def run(args: argparse.Namespace) -> Result:
    """Existence questions from official files, answered by a model or from saved answers."""
    bad = Bad(args.skip_bad)
    questions = read_questions(args.questions, bad)
    if args.answers:
        refuse_limit(args)
        kept, texts = read_answers(args.answers, questions, bad)
    else:
        by_file = itertools.groupby(questions, key=lambda question: question.file)
        questions = [q for _, of_file in by_file for q in itertools.islice(of_file, args.limit)]
        found = with_images(questions, args.images, lambda question: question.image, bad)
        asked = [
            (
                {"file": q.file, "question_id": q.id, "image": q.image, "question": q.text},
                Example(path, q.text + args.suffix, q.label, "yesno"),
            )
            for q, path in found
        ]
        kept, texts = answered([q for q, _ in found], ask_model(args, asked, bad))
    return with_dropped(score_files(kept, texts, args.parser), table, bad)


def run_build(args: argparse.Namespace) -> Result:
    """Existence questions from COCO's annotations, for `pope --questions` and `train.py --data`."""
    from hallucination.coco import read_instances

    bad = Bad(args.skip_bad)
    rows = build(
        read_instances(args.coco, bad), args.split, args.image_count, args.pairs, args.seed
    )
    write_lines(args.output, rows)
    images = len({row["image"] for row in rows})
    return {"n": len(rows), "images": images}, (
        f"{args.output}: {len(rows)} questions about {images} images, half of them no ({args.split})"
    )
