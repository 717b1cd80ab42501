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
import contextlib
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import train
from data import DataError
from experiments import tokens
from experiments.arms import ARMS, BEFORE, IN_FOG, QUICK, Arm
from experiments.credits import Paid
from experiments.records import commit, read_csv, write_csv
from hallucination.saliency import saliency_sheet, words_sheet
from hallucination.scenes import compare_rows, evaluate_scenes
from model import Policy, load_policy
from runs import Settings
from tiny import warm_start

SCENES = 150  # held out, of each of the two settings
ELSEWHERE = "processors round differently; give --output another folder and run them all here"
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
    folder = work / f"{slug(name, seed)}-{weights}"
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


def hash_of(start: Path) -> str:
    """Which weights a run begins with."""
    return hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()[:12]


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


def slug(name: str, seed: int | str) -> str:
    """What a run's folder is called."""
    return f"{name.replace(', ', '-').replace(' ', '-')}-{seed}".lower()


def log_of(work: Path, name: str, seed: int | str) -> Path:
    """Where a run's own output goes."""
    return work / "logs" / f"{slug(name, seed)}.log"


def in_worker(name: str, arm: Arm, seed: int | str, work: Path, scenes: int) -> list[dict]:
    """`run_arm` in a process of its own, on one thread, its output in a file."""
    torch.set_num_threads(1)
    disable_progress_bar()
    log = log_of(work, name, seed)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        return run_arm(name, arm, seed, work, scenes)


# ---------------------------------------------------------------------------------------------
# All runs
# ---------------------------------------------------------------------------------------------
def run_all(
    arms: dict[str, Arm], seeds: int | None, output: Path, work: Path, scenes: int, workers: int
) -> list[str]:
    """Every arm with every seed that the CSV does not hold yet; returns what failed, and why.

    Rows are written as soon as they are known. The arms of a warm start follow once it is there. Runs
    from another warm start are not added: they could be paired with none.
    Without `seeds` every arm has its own number of them.
    """
    rows, of, failed = read_csv(output), commit(), []
    following = missing_runs(arms, seeds, rows)  # warm start -> the runs that begin at it
    known, jobs = BEFORE | arms, {}
    bar = tqdm(total=sum(map(len, following.values())), desc="runs", unit="run")
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    def submit(name: str, seed: int | str) -> Future:
        job = pool.submit(in_worker, name, known[name], seed, work, scenes)
        jobs[job] = name, seed
        return job

    try:
        left = {submit(*start) for start in following}
        while left:
            ended, left = wait(left, return_when=FIRST_COMPLETED)
            for job in ended:
                name, seed = jobs[job]
                try:
                    found = job.result()
                except Exception as error:  # the others go on
                    failed.append(f"{name} {seed}: {error}: see {log_of(work, name, seed)}")
                    continue
                held = {row.get("start") for row in rows if run_of(row) == (name, str(seed))}
                if name in BEFORE and held - {found[0]["start"]}:
                    failed.append(
                        f"{name} {seed}: not the one that {output} has runs of: {ELSEWHERE}"
                    )
                    continue
                left |= {submit(*pair) for pair in following.get((name, seed), ())}
                bar.update(name not in BEFORE)
                if not is_done(rows, name, known[name], seed):
                    rows = [row for row in rows if run_of(row) != (name, str(seed))]
                    rows += [row | {"commit": of} for row in found]
                    write_csv(output, rows, COLUMNS)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


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
def ask_tokens(seeds: int, folder: Path, work: Path, workers: int) -> list[str]:
    """Every question of tokens.py, of the warm start in fog, for seeds that its CSV does not hold yet.

    Rows are written as soon as they are known.  Returns the questions that were not asked, because the CSV
    is of another warm start.
    """
    start, failed, missing = warm_start(work, IN_FOG), [], []
    facts = {"start": hash_of(start), "commit": commit()}
    rows = {name: read_csv(folder / f"{name}.csv") for name in tokens.QUESTIONS}
    for name, held in rows.items():
        if {row.get("start") for row in held} - {facts["start"]}:
            failed.append(f"{folder / name}.csv: of another warm start: {ELSEWHERE}")
            continue
        done = {row["seed"] for row in held}
        missing += [(name, seed) for seed in range(seeds) if str(seed) not in done]
    missing.sort(key=lambda pair: (pair[1], -tokens.QUESTIONS[pair[0]][1]))  # the longest first
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    try:
        jobs = [pool.submit(ask, name, seed, start) for name, seed in missing]
        asked = zip(missing, jobs, strict=True)
        for (name, seed), job in tqdm(asked, "tokens", len(missing), unit="question"):
            of_seed = {"seed": seed, **facts, "command": "python -m experiments.claims tokens"}
            rows[name] += [of_seed | row for row in job.result()]
            columns = tuple(dict.fromkeys(key for row in rows[name] for key in row))
            write_csv(folder / f"{name}.csv", rows[name], columns)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def ask(name: str, seed: int, start: Path) -> list[dict]:
    """The answer to a question of tokens.py with one seed, in a process of its own, on one thread."""
    torch.set_num_threads(1)
    disable_progress_bar()
    question, prompts = tokens.QUESTIONS[name]
    batch = tokens.sample_batch(load_policy(start), seed, prompts, 4, IN_FOG.world)
    return question(batch, seed)


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
        if "runs" in args.what:
            output = args.output / "runs.csv"
            failed += run_all(arms, args.seeds, output, work, SCENES, args.workers)
        if "tokens" in args.what:
            failed += ask_tokens(args.seeds or Arm.seeds, args.output, work, args.workers)
        if "first" in args.what:
            failed += first_run(args.output / "first.csv", work)
    except (DataError, OSError) as error:
        failed.append(str(error))
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
