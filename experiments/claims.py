"""The paper's claims, tested where the truth is known: the runs behind experiments/results/*.csv.

    make results                     every run, each resumed where it stopped; then plots and tables
    make results QUICK=1             one row of each table, beside the committed one

    python -m experiments.claims runs      trainings, by arm and seed              -> runs.csv
    python -m experiments.claims runs --arms grpo copo --seeds 2
    python -m experiments.claims tokens    what single tokens earn, and should     -> estimator.csv, mask.csv,
                                                                                  credit.csv (tokens.py)
    python -m experiments.claims first     what `make train` does to the model     -> first.csv

The arms are in arms.py. A finished run is a line of the CSV and is not run again.
"""

import os

# Before torch: its idle threads spin, which on a busy machine takes the cores from what they wait for.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import argparse
import itertools
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from transformers.utils.logging import disable_progress_bar

import train
from data import DataError
from experiments import tokens
from experiments.arms import ARMS, BEFORE, IN_FOG, QUICK, Arm
from experiments.credits import Paid
from experiments.jobs import Job, do_all, hash_of, slug
from experiments.records import commit, read_csv, write_csv
from hallucination.saliency import saliency_sheet, words_sheet
from hallucination.scenes import compare_rows, evaluate_scenes
from model import Policy, load_policy
from runs import Settings
from tiny import warm_start

SCENES = 150  # held out, of each of the two settings
FIGURES = ("accuracy", "chair_s", "chair_i", "recall", "length", "flip_rate", "malformed")
COLUMNS = (
    "arm", "seed", "step", "rho", "fog", "setting", *FIGURES,
    "pope_random", "pope_popular", "pope_adversarial", "yes_ratio_adversarial",
    "counts", "counts_chair_s", "counts_chair_i", "counts_recall", "counts_length",
    "background_share", "idle_words_share", "reward", "causal_share", "token_forwards", "seconds",
    "measuring_seconds", "start", "commit", "command",
)  # fmt: skip
RESULTS = Path("experiments/results")
WORK = Path("runs/results")


# ---------------------------------------------------------------------------------------------
# One run, and what is measured of it
# ---------------------------------------------------------------------------------------------
def run_arm(name: str, arm: Arm, seed: int | str, work: Path, scenes: int) -> list[dict]:
    """Train one arm with one seed, or go on with it; returns its rows of the CSV.

    Raises RuntimeError where training ended before its last step.
    """
    start = warm_start(work, arm.start_of(seed))
    weights = hash_of(start)
    facts = {"arm": name, "seed": seed, "start": weights}
    if name in BEFORE:
        facts |= {"step": 0, "command": "train.py (its warm start)"}
        return [facts | row for row in measure(load_policy(start), arm, scenes)]
    facts["command"] = f'python -m experiments.claims runs --arms "{name}" --seeds {seed + 1}'
    # The weights are part of the name: from another warm start, no run of this one is resumed.
    folder = work / f"{slug(f'{name} {seed}')}-{weights}"
    logged = train_arm(arm, seed, start, folder)
    rows = []
    for step in arm.steps:
        checkpoint = folder / ("checkpoint" if step == arm.steps[-1] else f"checkpoint-{step}")
        last, stages = logged[max(step - 10, 0) : step], ("rollout", "score", "update")
        of_step = {
            "step": step,
            "reward": sum(float(row["reward"]) for row in last) / len(last),
            "causal_share": sum(float(row["causal_share"]) for row in last) / len(last),
            "token_forwards": sum(
                forwards(arm.settings(seed, folder), row) for row in logged[:step]
            ),
            "seconds": sum(float(row[f"{s}_seconds"]) for row in logged[:step] for s in stages),
        }
        rows += [facts | of_step | row for row in measure(load_policy(checkpoint), arm, scenes)]
    return rows


def train_arm(arm: Arm, seed: int, start: Path, folder: Path) -> list[dict]:
    """Train to the last step.  Returns the rows of metrics.csv; raises RuntimeError if it ended early."""
    reason = ""
    try:
        scoring = arm.scoring
        if isinstance(scoring, Paid):
            scoring = replace(scoring, start=start)
        train.train(arm.settings(seed, folder), start, arm.sample, scoring)
    except (DataError, FloatingPointError, OSError) as error:
        reason = f": {error}"
    logged = read_csv(folder / "metrics.csv")
    if reason or len(logged) != arm.steps[-1]:
        raise RuntimeError(f"training ended at step {len(logged)}{reason}")
    return logged


def forwards(settings: Settings, row: dict) -> float:
    """Completion tokens that a step ran through the decoder: drawn, updated, under the reference, scored.

    row: of metrics.csv.  Prompts are not counted.
    """
    drawn = settings.batch_size * settings.num_generations * float(row["completion_length"])
    passes = 2 + (settings.beta > 0)
    return passes * drawn + float(row["scoring_token_forwards"])


def measure(policy: Policy, arm: Arm, scenes: int) -> list[dict]:
    """A policy's figures on the two settings of held-out scenes, and the seconds it took to have both."""
    began = time.monotonic()
    world, words = arm.start.world, arm.start.in_words
    figures = evaluate_scenes(policy, scenes, world=world, words=words, settings=arm.measured_on)
    rows = []
    for setting, found in figures.items():
        row = {"rho": arm.confounding, "fog": world.fog, "setting": setting}
        row |= {key: found[key] for key in FIGURES}
        row |= {f"pope_{split}": found["pope"][split]["f1"] for split in found["pope"]}
        row["yes_ratio_adversarial"] = found["pope"]["adversarial"]["yes_ratio"]
        row["counts"] = found["counting"].pop("accuracy")
        row |= {f"counts_{key}": value for key, value in found["counting"].items()}
        if words:
            row["idle_words_share"] = words_sheet(policy, setting)["idle_words_share"]
        elif (
            len(arm.kinds) > 1
        ):  # where one kind alone is trained, no claim is about where it looks
            sheet = saliency_sheet(policy, "saliency", world, setting, count=20, shown=0)
            row["background_share"] = sheet.get("background_share", "")
        rows.append(row)
    return [row | {"measuring_seconds": time.monotonic() - began} for row in rows]


# ---------------------------------------------------------------------------------------------
# All runs
# ---------------------------------------------------------------------------------------------
def run_jobs(
    arms: dict[str, Arm], seeds: int | None, output: Path, work: Path, scenes: int
) -> list[Job]:
    """Every arm with every seed that the CSV does not hold yet, and the figures of what they begin at.

    Without `seeds` every arm has its own number of them.
    """
    rows, of, jobs = read_csv(output), commit(), []

    def keep(run: tuple[str, str], found: list[dict]) -> None:
        nonlocal rows
        rows = [row for row in rows if run_of(row) != run]
        rows += [row | {"commit": of} for row in found]
        write_csv(output, rows, COLUMNS)

    for before, missing in missing_runs(arms, seeds, rows).items():
        name, seed = before
        beside = frozenset(row["start"] for row in rows if run_of(row) == (name, str(seed)))
        measured = is_done(rows, name, BEFORE[name], seed)
        for name, seed in missing if measured else [before, *missing]:
            arm = (BEFORE | arms)[name]
            given, kept = (name, arm, seed, work, scenes), partial(keep, (name, str(seed)))
            named = f"{name} {seed}".strip()
            jobs.append(Job(named, arm.start_of(seed), run_arm, given, kept, output, beside))
    return jobs


def missing_runs(
    arms: dict[str, Arm], seeds: int | None, rows: list[dict]
) -> dict[tuple[str, int | str], list[tuple[str, int]]]:
    """(warm start, its seed) -> (arm, seed) of the runs that begin at it and are not in `rows`.

    Seed by seed, so that at any time what is done can be paired.
    """
    numbers = {name: seeds or arm.seeds for name, arm in arms.items()}
    missing: dict[tuple[str, int | str], list[tuple[str, int]]] = {}
    for seed in range(max(numbers.values())):
        for name, arm in arms.items():
            if seed < numbers[name] and not is_done(rows, name, arm, seed):
                start = start_of(arm), seed if arm.own_start else ""
                missing.setdefault(start, []).append((name, seed))
    return missing


def run_of(row: dict) -> tuple[str, str]:
    """The run that a row belongs to: arm, seed."""
    return row["arm"], str(row["seed"])


def is_done(rows: list[dict], name: str, arm: Arm, seed: int | str) -> bool:
    """Whether rows hold every measured step of a run."""
    held = {int(row["step"]) for row in rows if run_of(row) == (name, str(seed))}
    return held >= set(arm.steps)


def start_of(arm: Arm) -> str:
    """The name of the warm start that an arm begins at."""
    return next(name for name, before in BEFORE.items() if before.start == arm.start)


# ---------------------------------------------------------------------------------------------
# Single tokens
# ---------------------------------------------------------------------------------------------
def token_jobs(seeds: int, folder: Path, work: Path) -> list[Job]:
    """Every question of tokens.py, of the warm start in fog, for seeds that its CSV does not hold yet."""
    of, jobs = commit(), []
    rows = {name: read_csv(folder / f"{name}.csv") for name in tokens.QUESTIONS}

    def keep(name: str, found: list[dict]) -> None:
        rows[name] += [row | {"commit": of} for row in found]
        columns = tuple(dict.fromkeys(key for row in rows[name] for key in row))
        write_csv(folder / f"{name}.csv", rows[name], columns)

    longest_first = sorted(tokens.QUESTIONS, key=lambda name: -tokens.QUESTIONS[name][1])
    for seed, name in itertools.product(range(seeds), longest_first):
        if str(seed) not in {row["seed"] for row in rows[name]}:
            beside = frozenset(row["start"] for row in rows[name])
            given, kept, output = (name, seed, work), partial(keep, name), folder / f"{name}.csv"
            jobs.append(Job(f"{name} {seed}", IN_FOG, ask, given, kept, output, beside))
    return jobs


def ask(name: str, seed: int, work: Path) -> list[dict]:
    """The answer to a question of tokens.py with one seed: its rows of the CSV."""
    start = warm_start(work, IN_FOG)
    question, prompts = tokens.QUESTIONS[name]
    batch = tokens.sample_batch(load_policy(start), seed, prompts, 4, IN_FOG.world)
    facts = {"start": hash_of(start), "command": "python -m experiments.claims tokens"}
    return [{"seed": seed, **facts} | row for row in question(batch, seed)]


# ---------------------------------------------------------------------------------------------
# The run of `make train`
# ---------------------------------------------------------------------------------------------
FIRST = {  # column of first.csv -> the folder of its run, and its flags
    "copo": ("run", ()),
    "grpo": ("grpo", ("--lambda-s", "0", "--lambda-n", "0")),
}


def first_run(path: Path, work: Path, seeds: int = 3) -> list[str]:
    """What `python train.py` does from nothing, beside plain GRPO, as rows; returns what failed.

    The last row of a seed is the seconds that each took, which are not known of a run that was resumed. COPO
    goes first, and that of seed 0 makes the warm start that all begin at: its time is that of `make train`.
    """
    rows, of = read_csv(path), commit()
    for seed in range(seeds):
        if str(seed) in {str(row["seed"]) for row in rows}:
            continue
        figures, took, commands = {}, {}, []
        for name, (run, flags) in FIRST.items():
            # in a folder of its own: the warm start is made anew
            folder = work / "first" / (f"{run}-{seed}" if seed else run)
            command = ["--output", str(folder), *flags, *(("--seed", str(seed)) if seed else ())]
            resumed, began = folder.exists(), time.monotonic()
            failed = train.main([*command, "--resume"])
            took[name] = "" if resumed else f"{time.monotonic() - began:.0f}"
            measured = {} if failed else json.loads((folder / "evaluation.json").read_text())
            if "after" not in measured:
                return [f"{folder}: training ended early"]
            figures |= {"warm_start": measured["before"], name: measured["after"]}
            commands.append(f"train.py {' '.join(command)}")
        facts = {"seed": seed, "command": "; ".join(commands), "commit": of}
        rows += [
            {"scenes": title, "figure": heading, **dict(zip(figures, values, strict=True)), **facts}
            for title, found in compare_rows(figures).items()
            for heading, values in found
        ]
        rows.append({"figure": "seconds", **took, **facts})
        columns = ("scenes", "figure", "seed", "warm_start", "grpo", "copo", "command", "commit")
        write_csv(path, rows, columns)
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing.  Returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.claims",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "what", nargs="+", choices=("runs", "tokens", "first"), help="which of the three"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="only these")
    parser.add_argument(
        "--seeds", type=int, help="of each arm and of the tokens; without it 5, of some arms more"
    )
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, a thread each")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the CSVs")
    parser.add_argument(
        "--quick",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="one seed of one row of the tables of the claims, into runs/quick, whatever else is asked",
    )
    args = parser.parse_args(argv)
    arms, work = {name: ARMS[name] for name in args.arms or ARMS}, WORK
    if args.quick:
        arms = {name: replace(ARMS[name], steps=(steps,)) for name, steps in QUICK.items()}
        args.seeds, args.output, work = 1, Path("runs/quick"), Path("runs/quick")
    disable_progress_bar()
    failed = []
    try:
        if min(args.workers, 1 if args.seeds is None else args.seeds) < 1:
            raise DataError("--seeds and --workers must be at least 1")
        jobs = []
        if "runs" in args.what:
            jobs += run_jobs(arms, args.seeds, args.output / "runs.csv", work, SCENES)
        if "tokens" in args.what:
            jobs += token_jobs(args.seeds or Arm.seeds, args.output, work)
        failed += do_all(jobs, work, args.workers)
        if "first" in args.what:
            failed += first_run(args.output / "first.csv", work)
    except (DataError, OSError) as error:
        failed.append(str(error))
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
