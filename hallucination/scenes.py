"""Hallucination on the scene world, where what is there and what merely looks likely are both known.

Every held-out scene is asked

    a caption            CHAIR_S: share of captions that name an absent category; CHAIR_I: share of
                         mentions that are absent; recall: share of things that are named
    POPE questions       "Is there a X?" about a category that is there, and about absent ones: any
                         (random), the most frequent (popular), the background's home (adversarial:
                         scenes without their home category only)
    a count, a colour    with the yes/no questions, the accuracy

and everything again with only the background redrawn, do(L_s). No right answer changes; the share of
answers that do is the flip rate, the direct measure of the arrow from L_s to the answer.
"""

import argparse
import functools
import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from data import DataError, Example
from hallucination.command import (
    Result,
    add_model,
    ask_model,
    at_least_0,
    at_least_1,
    cell,
    new_command,
    one_source,
    share,
)
from hallucination.files import Bad, read_rows
from hallucination.keys import answers_in
from rewards import extract_answer, normalize, objects_named, outcome_reward, reasoning_span
from scm import (
    BACKGROUNDS,
    CATEGORIES,
    CLEAR,
    World,
    in_words,
    question_about,
    sample_scene,
    world_of,
)

HELD_OUT = {"confounded": 0.9, "independent": 1 / 8}  # kind of scenes -> their confounding
HELD_OUT_SEED = 2508_04182
SPLITS = ("random", "popular", "adversarial")


@dataclass(frozen=True)
class Probe:
    """One question about one held-out scene: `splits` are the POPE splits that count it."""

    example: Example
    splits: tuple[str, ...] = ()
    redrawn: bool = (
        False  # do(L_s): its twin, with the scene's own background, stands just before it
    )


def make_probes(scenes: int, confounding: float, seed: int, world: World = CLEAR) -> list[Probe]:
    """The questions about `scenes` held-out scenes, each followed by its twin under do(L_s)."""
    rng = random.Random(f"held-out {seed}")
    drawn = [sample_scene(rng, confounding, world=world) for _ in range(scenes)]
    frequency = Counter(category for scene in drawn for category in scene.categories)
    probes = []
    for scene in drawn:
        absent = [c for c in CATEGORIES if c not in scene.categories]
        topic = rng.choice(scene.categories)
        no_home = scene.home in absent
        questions = [
            ("caption", topic, ()),
            ("number", topic, ()),
            ("choice", topic, ()),
            ("yesno", topic, SPLITS if no_home else SPLITS[:2]),
            ("yesno", rng.choice(absent), ("random",)),
            ("yesno", max(absent, key=lambda c: (frequency[c], c)), ("popular",)),
        ]
        if no_home:
            questions.append(("yesno", scene.home, ("adversarial",)))
        elsewhere = scene.do(
            background=rng.choice([b for b in BACKGROUNDS if b != scene.background])
        )
        for kind, category, splits in questions:
            probes.append(Probe(question_about(scene, kind, category), splits))
            probes.append(Probe(question_about(elsewhere, kind, category), splits, redrawn=True))
    return probes


def score(probes: Sequence[Probe], completions: Sequence[str]) -> dict:
    """The figures of completions given to probes, as fractions in [0, 1].

    accuracy, flip_rate, malformed (completions without an answer), chair_s, chair_i, recall, length
    (words per caption); counting: accuracy of the counts, and the same four of their reasoning, where
    nothing but the count is asked for; pope: by split n, accuracy, precision, recall, f1, yes_ratio.
    """
    assert len(probes) == len(completions), f"{len(probes)} probes, {len(completions)} completions"
    answers = [extract_answer(text) or "" for text in completions]
    asked = [  # (probe, completion, answer) on the scenes as they were drawn
        row for row in zip(probes, completions, answers, strict=True) if not row[0].redrawn
    ]
    captions = [(p.example, answer) for p, _, answer in asked if p.example.kind == "caption"]
    counts = [(p.example, text) for p, text, _ in asked if p.example.kind == "number"]
    flips = [
        what_it_says(probe.example, answers[i]) != what_it_says(probe.example, answers[i - 1])
        for i, probe in enumerate(probes)
        if probe.redrawn
    ]
    return {
        "n": len(captions),
        "accuracy": fmean(
            outcome_reward(text, p.example) for p, text, _ in asked if p.example.kind != "caption"
        ),
        "flip_rate": fmean(flips),
        "malformed": fmean(not answer for answer in answers),
        **chair(captions),
        "counting": {
            "accuracy": share(sum(outcome_reward(text, e) for e, text in counts), len(counts)),
            **chair([(example, reasoning_of(text)) for example, text in counts]),
        },
        "pope": {
            split: pope([(p.example.answer, a) for p, _, a in asked if split in p.splits])
            for split in SPLITS
        },
    }


def reasoning_of(completion: str) -> str:
    """What stands in the reasoning tags; nothing without them."""
    start, end = reasoning_span(completion) or (0, 0)
    return completion[start:end]


def what_it_says(example: Example, answer: str) -> object:
    """What an answer says: of a caption, the objects it names; of any other, its words."""
    if example.kind == "caption":
        return set(objects_named(answer, example.vocabulary))
    return normalize(answer)


def chair(captions: Sequence[tuple[Example, str]]) -> dict[str, float | None]:
    """CHAIR_S, CHAIR_I (by mention), recall of the things that are there, and words per caption.

    None for a share of nothing: CHAIR_I of captions that name nothing.
    """
    mentioned = absent = found = there = hallucinating = 0
    for example, caption in captions:
        named = objects_named(caption, example.vocabulary)
        wrong = [name for name in named if name not in example.objects]
        mentioned, absent = mentioned + len(named), absent + len(wrong)
        found, there = found + len(set(named) & set(example.objects)), there + len(example.objects)
        hallucinating += bool(wrong)
    return {
        "chair_s": share(hallucinating, len(captions)),
        "chair_i": share(absent, mentioned),
        "recall": share(found, there),
        "length": share(sum(len(caption.split()) for _, caption in captions), len(captions)),
    }


def pope(rows: Sequence[tuple[str, str]]) -> dict[str, float | None]:
    """(label, answer) pairs -> POPE's figures; yes is the positive class, anything but yes is a no.

    None where there is no question to have a figure of; precision is 0 where nothing is a yes.
    """
    said_yes = [normalize(answer) == "yes" for _, answer in rows]
    is_yes = [label == "yes" for label, _ in rows]
    hits = sum(a and b for a, b in zip(said_yes, is_yes, strict=True))
    return {
        "n": len(rows),
        "accuracy": share(sum(a == b for a, b in zip(said_yes, is_yes, strict=True)), len(rows)),
        "precision": share(hits, max(sum(said_yes), 1)) if rows else None,
        "recall": share(hits, sum(is_yes)),
        "f1": share(2 * hits, sum(said_yes) + sum(is_yes)) if any(is_yes) else None,
        "yes_ratio": share(sum(said_yes), len(rows)),
    }


# ---------------------------------------------------------------------------------------------
# Held-out scenes of both kinds
# ---------------------------------------------------------------------------------------------
def scene_questions(
    count: int, world: World = CLEAR, settings: Iterable[str] = HELD_OUT
) -> list[tuple[dict, Example]]:
    """All questions on `count` held-out scenes of each setting."""
    of_world = {name: value for name, value in vars(world).items() if value != getattr(CLEAR, name)}
    return [
        ({"setting": setting, "question_id": i} | of_world, probe.example)
        for setting in settings
        for i, probe in enumerate(held_out_probes(setting, count, world))
    ]


def score_scenes(
    count: int,
    completions: Sequence[str],
    world: World = CLEAR,
    settings: Iterable[str] = HELD_OUT,
) -> dict:
    """Figures by setting.  Raises DataError where there are not as many completions as questions."""
    figures, left = {}, list(completions)
    for setting in settings:
        probes = held_out_probes(setting, count, world)
        figures[setting] = score(probes, left[: len(probes)])
        left = left[len(probes) :]
    return figures


@functools.cache
def held_out_probes(setting: str, count: int, world: World = CLEAR) -> list[Probe]:
    """The questions of one kind of held-out scenes, made once."""
    return make_probes(count, HELD_OUT[setting], HELD_OUT_SEED, world)


def evaluate_scenes(
    policy,
    count: int,
    what: str = "evaluation",
    world: World = CLEAR,
    words: bool = False,
    settings: Iterable[str] = HELD_OUT,
    save: Path | None = None,
) -> dict:
    """Figures of a model on confounded and on independent held-out scenes, or on their descriptions.

    save: keep its completions there, a file of `evaluate.py scenes --answers`.
    """
    from hallucination.answers import Decoding, answer_all

    questions = scene_questions(count, world, settings)
    if words:
        questions = [(key, in_words(example)) for key, example in questions]
    completions = answer_all(lambda: policy, questions, Decoding(what), save, 128, what=what)
    return score_scenes(count, completions, world, settings)


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------
# what the table shows: heading -> key into the figures of a setting, and whether less is better
_ROWS = {
    "accuracy": ("accuracy",),
    "POPE F1, random": ("pope", "random", "f1"),
    "POPE F1, popular": ("pope", "popular", "f1"),
    "POPE F1, adversarial": ("pope", "adversarial", "f1"),
    "POPE yes-ratio, adversarial": ("pope", "adversarial", "yes_ratio"),
    "CHAIR_S  (lower is better)": ("chair_s",),
    "CHAIR_I  (lower is better)": ("chair_i",),
    "caption recall": ("recall",),
    "caption length, words": ("length",),
    "counts right": ("counting", "accuracy"),
    "CHAIR_S, counting  (lower is better)": ("counting", "chair_s"),
    "flip rate under do(L_s)  (lower is better)": ("flip_rate",),
}


def compare_rows(columns: dict[str, dict]) -> dict[str, list[tuple[str, list[str]]]]:
    """Figures side by side: setting, with its number of scenes -> (heading, a number for each column)."""

    def number(figures: dict, keys: tuple[str, ...]) -> str:
        # "-" for a figure that runs did not have when they were made
        value = functools.reduce(lambda value, key: (value or {}).get(key), keys, figures)
        return cell(value, ".1f" if keys == ("length",) else ".3f")

    n = {setting: next(iter(columns.values()))[setting]["n"] for setting in HELD_OUT}
    return {
        f"{setting} scenes (n = {n[setting]})": [
            (heading, [number(figures[setting], keys) for figures in columns.values()])
            for heading, keys in _ROWS.items()
        ]
        for setting in HELD_OUT
    }


def compare_table(columns: dict[str, dict]) -> str:
    """Runs side by side: {heading: figures of `evaluate_scenes`} -> a table in text."""
    return rows_as_text(list(columns), compare_rows(columns))


def rows_as_text(headings: Sequence[str], found: dict[str, list[tuple[str, list[str]]]]) -> str:
    """What `compare_rows` returns, as text."""
    lines = []
    for title, rows in found.items():
        lines.append(f"{title:<44}" + "".join(f"{heading:>10}" for heading in headings))
        for heading, values in rows:
            lines.append(f"  {heading:<42}" + "".join(f"{value:>10}" for value in values))
        lines.append("")
    return "\n".join(lines)


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------
def add_command(commands) -> None:
    """Add `evaluate.py scenes`."""
    command = new_command(commands, "scenes", run, "the scene world, where truth is known", check)
    command.add_argument("--answers", type=Path, help="saved completions; no model is loaded")
    command.add_argument(
        "--scenes", type=at_least_1, default=300, help="held-out scenes of each setting"
    )
    command.add_argument(
        "--fog", type=at_least_0, default=0.0, help="the thickest fog in them, from 0 to 1"
    )
    command.add_argument("--crowds", action="store_true", help="crowded ones, in clear air")
    add_model(command, max_new_tokens=64, batch_size=128)


def check(args: argparse.Namespace) -> str | None:
    """Why the flags do not fit together, or None."""
    return one_source(args, "answers")


def run(args: argparse.Namespace) -> Result:
    """CHAIR, POPE, accuracy and flip rate where what is there is known."""
    world = world_of(args.fog, args.crowds)
    bad, questions = Bad(), scene_questions(args.scenes, world)
    if args.answers:
        completions = read_completions(args.answers, questions, bad)
    else:
        completions = ask_model(args, questions, bad)
    figures = score_scenes(args.scenes, completions, world)
    return figures, compare_table({"model": figures})


def read_completions(path: Path, questions: Sequence[tuple[dict, Example]], bad: Bad) -> list[str]:
    """Saved completions, in the order of the questions.  Raises DataError where it is not one each."""
    rows = list(read_rows(path, bad))
    if len(rows) != len(questions):
        raise DataError(
            f"{path}: {len(rows)} answers for {len(questions)} questions: give --scenes the number they "
            f"were made with"
        )
    if all("max_new_tokens" in row and isinstance(row.get("text"), str) for _, row in rows):
        return [row["text"] for _, row in rows]  # our own file, whatever the model said
    asked = [example.question for _, example in questions]
    texts = answers_in([row for _, row in rows], asked)
    for (where, _), (text, fault) in zip(rows, texts, strict=True):
        if text is None:
            bad(where, fault)
    return [text for text, _ in texts]
