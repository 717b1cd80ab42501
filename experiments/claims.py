"""The paper's claims, tested where the truth is known: the runs behind experiments/results/*.csv.

    make results                     every run, each resumed where it stopped; then plots and tables
    make results QUICK=1             one row of each table, beside the committed one

    python -m experiments.claims runs      trainings, by arm and seed              -> runs.csv
    python -m experiments.claims runs --arms grpo copo --seeds 2
    python -m experiments.claims tokens    what single tokens earn, and should     -> estimator.csv, mask.csv,
                                                                                  credit.csv (tokens.py)
    python -m experiments.claims first     what `make train` does to the model     -> first.csv

An arm is one way to train. All arms of a seed see the same scenes and start from the same warm start, so
that they can be compared in pairs. A finished run is a line of the CSV and is not run again.
Unless an arm says otherwise it trains in fog (`FOG`). Where a thing may be invisible, the background is
worth knowing, as it is to a model of photographs; in clear air the tiny policy sees so well that the
background tells it nothing new.
"""

import os

# Before torch: its idle threads spin, which on a busy machine takes the cores from what they wait for.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import train
from data import DataError, Example
from experiments import tokens
from experiments.records import commit, read_csv, write_csv
from experiments.tables import RHOS
from experiments.variants import SecondBest, centred, difference, score_as, signed, truth
from hallucination.saliency import saliency_sheet, words_sheet
from hallucination.scenes import compare_rows, evaluate_scenes
from model import Policy, load_policy
from runs import Settings
from scm import KINDS, in_words, sample_example
from tiny import WarmStart, warm_start

FOG = 0.9
SCENES = 150  # held out, of each of the two settings
RESULTS = Path("experiments/results")
WORK = Path("runs/results")


# ---------------------------------------------------------------------------------------------
# The arms
# ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Arm:
    """One way to train: what differs from the default settings, questions and causal reward."""

    changes: dict[str, object] = field(default_factory=dict)  # of Settings
    steps: tuple[int, ...] = (40,)  # after which the policy is measured
    fog: float = FOG
    seeds: int = 5
    kinds: tuple[str, ...] = KINDS  # of questions
    in_words: bool = False  # a description in place of the image
    scoring: Callable[..., train.Scores] | None = None  # without it, equations 1 to 5

    def settings(self, seed: int, folder: Path) -> Settings:
        """The settings of its run with one seed, which is resumed where it has begun."""
        every = self.steps[0]
        return Settings(
            **self.changes, fog=self.fog, seed=seed, steps=self.steps[-1], save_steps=every,
            keep_checkpoints=self.steps[-1] // every, eval_scenes=0, device="cpu", dtype="float32",
            output=folder, resume=True,
        )  # fmt: skip

    @property
    def confounding(self) -> float:
        """The chance, in its training scenes, of a background's home category."""
        return self.changes.get("confounding", Settings.confounding)

    def sample(self, rng: random.Random) -> Example:
        """A question of its kinds about a fresh scene."""
        while True:
            example = sample_example(rng, self.confounding, self.fog)
            if example.kind in self.kinds:
                return in_words(example) if self.in_words else example


GRPO = {"lambda_s": 0.0, "lambda_n": 0.0}
ONES = {"lambda_s": 1.0, "lambda_n": 1.0}
PAID_TRUTH = {"lambda_s": 1.0, "lambda_n": 0.0}
SECOND_BEST = score_as(difference, SecondBest)
QUESTIONS = ("yesno", "number", "choice")
METHODS = {  # name -> its settings and its scoring
    "grpo": (GRPO, None),
    "copo": ({}, None),
    "second best, lambda 1": (ONES, SECOND_BEST),
    "truth": (PAID_TRUTH, truth),
}
ARMS = {
    "grpo": Arm(GRPO, (20, 40, 60, 80, 100)),  # COPO's 40 steps take as long as about 90 of these
    "copo": Arm(steps=(20, 40, 80)),
    "without S_suff": Arm({"lambda_s": 0.0}),
    "without S_nec": Arm({"lambda_n": 0.0}),
    # what follows from the causes found: variants.py, and the paper's pairing
    "centred": Arm(scoring=score_as(centred)),
    "signed": Arm(scoring=score_as(signed)),
    "difference": Arm(scoring=score_as(difference)),
    "second best": Arm(scoring=SECOND_BEST),
    "second best, lambda 1": Arm(ONES, scoring=SECOND_BEST),
    "independent": Arm({"pairing": "independent"}),
    # the language-model control
    "grpo, in words": Arm(GRPO, in_words=True),
    # clear air
    "grpo, clear": Arm(GRPO, fog=0.0),
    "copo, clear": Arm(fog=0.0),
    # trained without captions: no outcome depends on all that is named
    **{
        f"{name}, questions": Arm(changes, kinds=QUESTIONS, scoring=scoring)
        for name, (changes, scoring) in METHODS.items()
        if name != "truth"
    },
    # confounding
    **{f"grpo, rho {rho}": Arm(GRPO | {"confounding": float(rho)}) for rho in RHOS},
    **{f"copo, rho {rho}": Arm({"confounding": float(rho)}) for rho in RHOS},
    # sensitivity; 0.35 and 0 are above
    **{
        f"lambda {s} {n}": Arm({"lambda_s": s, "lambda_n": n})
        for s, n in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.35, 1.0), (1.0, 0.35))
    },
    **{f"H {h}": Arm({"num_continuations": h}) for h in (1, 2, 8)},
    **{f"beta {beta}": Arm({"beta": beta}) for beta in (0.0, 0.01, 0.16)},
    **{f"zero variance {way}": Arm({"zero_variance": way}) for way in ("gate", "drop")},
    # what a right causal reward would do (variants.py)
    "truth": Arm(PAID_TRUTH, scoring=truth),
    # clear air and questions of colour alone: naming things that are not there costs no answer
    **{
        f"{name}, colours": Arm(changes, (20, 40, 80), 0.0, 10, ("choice",), scoring=scoring)
        for name, (changes, scoring) in METHODS.items()
    },
    # the first steps of the same runs
    **{
        f"{name}{', clear' if not fog else ''}, early": Arm(changes, (5, 10), fog, scoring=scoring)
        for fog in (FOG, 0.0)
        for name, (changes, scoring) in METHODS.items()
        if name != "second best, lambda 1"
    },
    # no question asks for what the background suggests
    "grpo, no existence": Arm(GRPO, kinds=("number", "choice", "caption")),
}
ELSEWHERE = "processors round differently; give --output another folder and run them all here"
QUICK = {"grpo": 40, "copo": 40, "H 1": 40, "grpo, early": 5, "grpo, colours": 20}  # arm -> steps
BEFORE = {
    "warm start": Arm(steps=(0,)),
    "warm start, in words": Arm(steps=(0,), in_words=True),
    "warm start, clear": Arm(steps=(0,), fog=0.0),
}
FIGURES = ("accuracy", "chair_s", "chair_i", "recall", "length", "flip_rate", "malformed")
COLUMNS = (
    "arm", "seed", "step", "rho", "fog", "setting", *FIGURES,
    "pope_random", "pope_popular", "pope_adversarial", "yes_ratio_adversarial",
    "background_share", "idle_words_share", "reward", "causal_share", "seconds", "measuring_seconds",
    "start", "commit", "command",
)  # fmt: skip


# ---------------------------------------------------------------------------------------------
# One run, and what is measured of it
# ---------------------------------------------------------------------------------------------
def run_arm(name: str, arm: Arm, seed: int | str, work: Path, scenes: int) -> list[dict]:
    """Train one arm with one seed, or go on with it; returns its rows of the CSV.

    Raises RuntimeError where training ended before its last step.
    """
    start = warm_start(work, WarmStart(fog=arm.fog, in_words=arm.in_words))
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
            "seconds": sum(float(row[f"{s}_seconds"]) for row in logged[:step] for s in stages),
        }
        rows += [facts | of_step | row for row in measure(load_policy(checkpoint), arm, scenes)]
    return rows


def train_arm(arm: Arm, seed: int, start: Path, folder: Path) -> list[dict]:
    """Train to the last step.  Returns the rows of metrics.csv; raises RuntimeError if it ended early."""
    reason = ""
    try:
        train.train(arm.settings(seed, folder), start, arm.sample, arm.scoring)
    except (DataError, FloatingPointError, OSError) as error:
        reason = f": {error}"
    logged = read_csv(folder / "metrics.csv")
    if reason or len(logged) != arm.steps[-1]:
        raise RuntimeError(f"training ended at step {len(logged)}{reason}")
    return logged


def hash_of(start: Path) -> str:
    """Which weights a run begins with."""
    return hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()[:12]


def measure(policy: Policy, arm: Arm, scenes: int) -> list[dict]:
    """A policy's figures on the two settings of held-out scenes, and the seconds it took to have both."""
    began = time.monotonic()
    figures = evaluate_scenes(policy, scenes, fog=arm.fog, words=arm.in_words)
    rows = []
    for setting, found in figures.items():
        row = {"rho": arm.confounding, "fog": arm.fog, "setting": setting}
        row |= {key: found[key] for key in FIGURES}
        row |= {f"pope_{split}": found["pope"][split]["f1"] for split in found["pope"]}
        row["yes_ratio_adversarial"] = found["pope"]["adversarial"]["yes_ratio"]
        if arm.in_words:
            row["idle_words_share"] = words_sheet(policy, setting)["idle_words_share"]
        else:
            sheet = saliency_sheet(policy, "saliency", arm.fog, setting, count=20, shown=0)
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
    following = missing_runs(arms, seeds, rows)
    known, jobs = BEFORE | arms, {}
    bar = tqdm(total=sum(map(len, following.values())), desc="runs", unit="run")
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))

    def submit(name: str, seed: int | str) -> Future:
        job = pool.submit(in_worker, name, known[name], seed, work, scenes)
        jobs[job] = name, seed
        return job

    try:
        left = {submit(name, "") for name, runs in following.items() if runs}
        while left:
            ended, left = wait(left, return_when=FIRST_COMPLETED)
            for job in ended:
                name, seed = jobs[job]
                try:
                    found = job.result()
                except Exception as error:  # the others go on
                    failed.append(f"{name} {seed}: {error}: see {log_of(work, name, seed)}")
                    continue
                held = {row.get("start") for row in rows if row["arm"] == name}
                if name in BEFORE and held - {found[0]["start"]}:
                    failed.append(f"{name}: not the one that {output} has runs of: {ELSEWHERE}")
                    continue
                left |= {submit(*pair) for pair in following.get(name, ())}
                bar.update(name not in BEFORE)
                if not is_done(rows, name, known[name], seed):
                    rows = [r for r in rows if (r["arm"], str(r["seed"])) != (name, str(seed))]
                    rows += [row | {"commit": of} for row in found]
                    write_csv(output, rows, COLUMNS)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


def missing_runs(
    arms: dict[str, Arm], seeds: int | None, rows: list[dict]
) -> dict[str, list[tuple[str, int]]]:
    """Warm start -> (arm, seed) of the runs that begin at it and are not in `rows`, seed by seed.

    Seed by seed, so that at any time what is done can be paired.
    """
    numbers = {name: seeds or arm.seeds for name, arm in arms.items()}
    return {
        start: [
            (name, seed)
            for seed in range(max(numbers.values()))
            for name, arm in arms.items()
            if seed < numbers[name]
            and begins_at(arm, before)
            and not is_done(rows, name, arm, seed)
        ]
        for start, before in BEFORE.items()
    }


def is_done(rows: list[dict], name: str, arm: Arm, seed: int | str) -> bool:
    """Whether rows hold every measured step of a run."""
    run = name, str(seed)
    held = {int(row["step"]) for row in rows if (row["arm"], str(row["seed"])) == run}
    return held >= set(arm.steps)


def begins_at(arm: Arm, before: Arm) -> bool:
    """Whether an arm begins at this warm start."""
    return (arm.fog, arm.in_words) == (before.fog, before.in_words)


# ---------------------------------------------------------------------------------------------
# Single tokens
# ---------------------------------------------------------------------------------------------
def ask_tokens(questions: dict, seeds: int, folder: Path, work: Path) -> list[str]:
    """Every question of tokens.py, of the warm start in fog, for seeds that its CSV does not hold yet.

    Returns the questions that were not asked, because the CSV is of another warm start.
    """
    start, failed = warm_start(work, WarmStart(fog=FOG)), []
    policy, facts = load_policy(start), {"start": hash_of(start), "commit": commit()}
    for name, (question, prompts) in questions.items():
        path = folder / f"{name}.csv"
        rows = read_csv(path)
        if {row.get("start") for row in rows} - {facts["start"]}:
            failed.append(f"{path}: of another warm start: {ELSEWHERE}")
            continue
        done = {row["seed"] for row in rows}
        for seed in tqdm([s for s in range(seeds) if str(s) not in done], desc=name, unit="seed"):
            batch = tokens.sample_batch(policy, seed, prompts, 4, FOG)
            of_seed = {"seed": seed, **facts, "command": "python -m experiments.claims tokens"}
            rows += [of_seed | row for row in question(batch, seed)]
            write_csv(path, rows, tuple(dict.fromkeys(key for row in rows for key in row)))
    return failed


# ---------------------------------------------------------------------------------------------
# The run of `make train`
# ---------------------------------------------------------------------------------------------
FIRST = {  # column of first.csv -> the folder of its run, and its flags
    "copo": ("run", ()),
    "grpo": ("grpo", ("--lambda-s", "0", "--lambda-n", "0")),
}


def first_run(path: Path, work: Path) -> list[str]:
    """What `python train.py` does from nothing, beside plain GRPO, as rows; returns what failed.

    The last row is the seconds that each took, which are not known of a run that was resumed. COPO goes
    first and makes the warm start that both begin at, so that its time is that of `make train`.
    """
    if path.exists():
        return []
    of, figures, took, commands = commit(), {}, {}, []
    for name, (run, flags) in FIRST.items():
        folder = work / "first" / run  # in a folder of its own: the warm start is made anew
        command = ["--output", str(folder), *flags]
        resumed, began = folder.exists(), time.monotonic()
        failed = train.main([*command, "--resume"])
        took[name] = "" if resumed else f"{time.monotonic() - began:.0f}"
        measured = {} if failed else json.loads((folder / "evaluation.json").read_text())
        if "after" not in measured:
            return [f"{folder}: training ended early"]
        figures |= {"warm_start": measured["before"], name: measured["after"]}
        commands.append(f"train.py {' '.join(command)}")
    facts = {"command": "; ".join(commands), "commit": of}
    rows = [
        {"scenes": title, "figure": heading, **dict(zip(figures, values, strict=True)), **facts}
        for title, found in compare_rows(figures).items()
        for heading, values in found
    ]
    rows.append({"figure": "seconds", **took, **facts})
    write_csv(path, rows, ("scenes", "figure", "warm_start", "grpo", "copo", "command", "commit"))
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
            failed += ask_tokens(tokens.QUESTIONS, args.seeds or Arm.seeds, args.output, work)
        if "first" in args.what:
            failed += first_run(args.output / "first.csv", work)
    except (DataError, OSError) as error:
        failed.append(str(error))
    for line in failed:
        print(f"error: {line}", file=sys.stderr)
    return 2 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
