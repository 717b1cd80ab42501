"""The paper's claims, tested where the truth is known: the runs behind results/*.csv.

    make results                     every run, each resumed where it stopped; then figures and tables
    make results QUICK=1             one row of each table, beside the committed one

    python experiments.py runs       trainings, by arm and seed                     -> results/runs.csv
    python experiments.py runs --arms grpo copo --seeds 2
    python experiments.py tokens     what single tokens earn, and should            -> results/estimator.csv,
                                                                          mask.csv, credit.csv (tokens.py)
    python experiments.py first      what `make train` does to the model            -> results/first.csv

An arm is a setting of train.py; all arms of a seed see the same scenes and start from the same warm
start, so that they can be compared in pairs. A finished run is a line of the CSV and is not run again.
Most of it happens in fog (`FOG`): where a thing may be invisible, the background is worth knowing, as it
is to a model of photographs; in clear air the tiny policy's eyes leave the background nothing to tell.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import tokens
import train
from data import DataError
from evaluate import SETTINGS, compare_rows, evaluate_scenes, saliency_sheet, words_sheet
from model import Policy, load_policy
from records import commit, read_csv, write_csv
from warm_start import WarmStart, warm_start

FOG = 0.9
SCENES = 150  # held out, of each setting
WORK = Path("runs/results")
GRPO = ("--lambda-s", "0", "--lambda-n", "0")


@dataclass(frozen=True)
class Arm:
    """One setting of train.py."""

    flags: tuple[str, ...] = ()
    steps: tuple[int, ...] = (40,)  # after which the policy is measured
    fog: float = FOG
    seeds: int = 5

    @property
    def rho(self) -> float:
        """The confounding of its training scenes."""
        return float(self._value("--confounding", 0.9))

    @property
    def in_words(self) -> bool:
        """Whether it reads a description in the place of the image."""
        return "--in-words" in self.flags

    def command(self, seed: int, folder: Path) -> list[str]:
        """Its command line, after `python train.py`."""
        every = self.steps[0]
        kept = ["--save-steps", str(every), "--keep-checkpoints", str(self.steps[-1] // every)]
        return [
            *self.flags, "--fog", str(self.fog), "--seed", str(seed), "--steps", str(self.steps[-1]),
            *kept, "--eval-scenes", "0", "--device", "cpu", "--dtype", "float32",
            "--output", str(folder),
        ]  # fmt: skip

    def _value(self, flag: str, default: float) -> str | float:
        return self.flags[self.flags.index(flag) + 1] if flag in self.flags else default


RHOS = ("0.125", "0.5", "0.7", "1.0")  # beside 0.9
DIFFERENCE = ("--causal-form", "difference", "--mask", "second-best")
BOLD = (*DIFFERENCE, "--lambda-s", "1", "--lambda-n", "1")
TRUTH = ("--causal-form", "truth", "--lambda-s", "1", "--lambda-n", "0")
QUESTIONS = ("--kinds", "yesno", "number", "choice")
ARMS = {
    "grpo": Arm(GRPO, (20, 40, 60, 80, 100)),  # COPO's 40 take as long as about 90 of these
    "copo": Arm((), (20, 40, 80)),
    "without S_suff": Arm(("--lambda-s", "0")),
    "without S_nec": Arm(("--lambda-n", "0")),
    # what follows from the causes found: variants.py, and the paper's pairing
    "centred": Arm(("--causal-form", "centred")),
    "signed": Arm(("--causal-form", "signed")),
    "difference": Arm(("--causal-form", "difference")),
    "second best": Arm(DIFFERENCE),
    "second best, lambda 1": Arm(BOLD),
    "independent": Arm(("--pairing", "independent")),
    # the language-model control
    "grpo, in words": Arm((*GRPO, "--in-words")),
    # clear air
    "grpo, clear": Arm(GRPO, fog=0.0),
    "copo, clear": Arm((), fog=0.0),
    # trained without captions: no outcome speaks of all that is named
    "grpo, questions": Arm((*GRPO, *QUESTIONS)),
    "copo, questions": Arm(QUESTIONS),
    "second best, lambda 1, questions": Arm((*BOLD, *QUESTIONS)),
    # confounding
    **{f"grpo, rho {rho}": Arm((*GRPO, "--confounding", rho)) for rho in RHOS},
    **{f"copo, rho {rho}": Arm(("--confounding", rho)) for rho in RHOS},
    # sensitivity; 0.35 and 0 are above
    **{
        f"lambda {s} {n}": Arm(("--lambda-s", str(s), "--lambda-n", str(n)))
        for s, n in ((1.0, 1.0), (0.0, 1.0), (1.0, 0.0), (0.35, 1.0), (1.0, 0.35))
    },
    **{f"H {h}": Arm(("--num-continuations", str(h))) for h in (1, 2, 8)},
    **{f"beta {beta}": Arm(("--beta", f"{beta:g}")) for beta in (0.0, 0.01, 0.16)},
    **{f"zero variance {way}": Arm(("--zero-variance", way)) for way in ("gate", "drop")},
    # what right credit would do (variants.py)
    "truth": Arm(TRUTH),
    # clear air and questions of colour alone, which are answered as well by who names what is not there
    **{
        f"{name}, colours": Arm((*flags, "--kinds", "choice"), (20, 40, 80), 0.0, seeds=10)
        for name, flags in (
            ("grpo", GRPO),
            ("copo", ()),
            ("second best, lambda 1", BOLD),
            ("truth", TRUTH),
        )
    },
    # the first steps of the same runs
    **{
        f"{name}{', clear' if not fog else ''}, early": Arm(flags, (5, 10), fog)
        for fog in (FOG, 0.0)
        for name, flags in (("grpo", GRPO), ("copo", ()), ("truth", TRUTH))
    },
    # no question asks for what the background suggests
    "grpo, no existence": Arm((*GRPO, "--kinds", "number", "choice", "caption")),
}
ELSEWHERE = "processors round differently; give --output another folder and run them all here"
QUICK = {"grpo": 40, "copo": 40, "H 1": 40, "grpo, early": 5, "grpo, colours": 20}  # arm -> steps
BEFORE = {
    "warm start": Arm(steps=(0,)),
    "warm start, in words": Arm(("--in-words",), steps=(0,)),
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
    folder = (
        work / f"{slug(name, seed)}-{weights}"
    )  # another start never goes on with this one's runs
    command = arm.command(seed, folder)
    failed = train.main([*command, "--resume"])
    logged = read_csv(folder / "metrics.csv")
    if failed or len(logged) != arm.steps[-1]:
        raise RuntimeError(f"training ended at step {len(logged)}")
    rows = []
    for step in arm.steps:
        checkpoint = folder / ("checkpoint" if step == arm.steps[-1] else f"checkpoint-{step}")
        last, stages = logged[max(step - 10, 0) : step], ("rollout", "score", "update")
        of_step = {
            "step": step,
            "reward": sum(float(row["reward"]) for row in last) / len(last),
            "causal_share": sum(float(row["causal_share"]) for row in last) / len(last),
            "seconds": sum(float(row[f"{s}_seconds"]) for row in logged[:step] for s in stages),
            "command": f"train.py {' '.join(command)}",
        }
        rows += [facts | of_step | row for row in measure(load_policy(checkpoint), arm, scenes)]
    return rows


def hash_of(start: Path) -> str:
    """Which weights a run begins with."""
    return hashlib.sha256((start / "model.safetensors").read_bytes()).hexdigest()[:12]


def measure(policy: Policy, arm: Arm, scenes: int) -> list[dict]:
    """A policy's figures on the two kinds of held-out scenes, and how long it took to have both."""
    began = time.monotonic()
    figures = evaluate_scenes(policy, scenes, fog=arm.fog, words=arm.in_words)
    rows = []
    for setting in SETTINGS:
        found = figures[setting]
        row = {"rho": arm.rho, "fog": arm.fog, "setting": setting}
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


def log_of(work: Path, name: str, seed: int) -> Path:
    """Where a run's own output goes."""
    return work / "logs" / f"{slug(name, seed)}.log"


def in_worker(name: str, arm: Arm, seed: int | str, work: Path, scenes: int) -> list[dict]:
    """`run_arm` in a process of its own, on one thread, its output in a file."""
    torch.set_num_threads(1)
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

    Rows are written as soon as they are known. The arms of a warm start follow once it is there; seed by
    seed, so that what is done is in pairs. Runs from another warm start are not added: no pair would hold.
    Without `seeds` every arm has its own number of them.
    """
    rows, of, failed = read_csv(output), commit(), []
    measured = {(row["arm"], row["seed"], int(row["step"])) for row in rows}
    arms = {name: replace(arm, seeds=seeds or arm.seeds) for name, arm in arms.items()}
    most = max(arm.seeds for arm in arms.values())
    done = {
        (name, str(seed))
        for name, arm in (BEFORE | arms).items()
        for seed in ("", *range(most))
        if all((name, str(seed), step) in measured for step in arm.steps)
    }
    starts = {
        name: arm for name, arm in BEFORE.items() if any(begins_at(a, arm) for a in arms.values())
    }
    following = {
        start: [
            (name, seed)
            for seed in range(most)
            for name, arm in arms.items()
            if seed < arm.seeds and begins_at(arm, before) and (name, str(seed)) not in done
        ]
        for start, before in starts.items()
    }
    bar = tqdm(total=sum(map(len, following.values())), desc="runs", unit="run")
    pool = ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn"))
    jobs: dict[Future, tuple[str, int | str]] = {}

    def submit(name: str, seed: int | str) -> Future:
        arm = BEFORE[name] if name in BEFORE else arms[name]
        job = pool.submit(in_worker, name, arm, seed, work, scenes)
        jobs[job] = name, seed
        return job

    try:
        left = {submit(name, "") for name in starts if following[name]}
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
                if (name, str(seed)) not in done:
                    rows = [r for r in rows if (r["arm"], r["seed"]) != (name, str(seed))]
                    rows += [row | {"commit": of} for row in found]
                    write_csv(output, rows, COLUMNS)
    finally:
        pool.shutdown(cancel_futures=True)
    return failed


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
            of_seed = {"seed": seed, **facts, "command": "experiments.py tokens"}
            rows += [of_seed | row for row in question(batch, seed)]
            write_csv(path, rows, tuple(dict.fromkeys(key for row in rows for key in row)))
    return failed


# ---------------------------------------------------------------------------------------------
# The run of `make train`
# ---------------------------------------------------------------------------------------------
def first_run(path: Path, work: Path) -> list[str]:
    """What `make train` does from nothing, or what is left of it, as rows; returns what failed.

    The last row is the seconds that it took, which are not known of a run that was resumed.
    """
    if path.exists():
        return []
    folder = work / "first" / "run"  # in a folder of its own: the warm start is made anew
    of, flags = commit(), ["--output", str(folder)]
    resumed, began = folder.exists(), time.monotonic()
    failed = train.main([*flags, "--resume"])
    took = "" if resumed else f"{time.monotonic() - began:.0f}"
    figures = {} if failed else json.loads((folder / "evaluation.json").read_text())
    if "after" not in figures:
        return [f"{folder}: training ended early"]
    facts = {"command": f"train.py {' '.join(flags)}", "commit": of}
    rows = [
        {"scenes": title, "figure": heading, "before": before, "after": after, **facts}
        for title, found in compare_rows(figures).items()
        for heading, (before, after) in found
    ]
    rows.append({"figure": "seconds", "after": took, **facts})
    write_csv(path, rows, tuple(rows[0]))
    return []


def main(argv: Sequence[str] | None = None) -> int:
    """Run what is missing.  Returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "what", nargs="+", choices=("runs", "tokens", "first"), help="which of the three"
    )
    parser.add_argument("--arms", nargs="+", choices=ARMS, metavar="ARM", help="only these")
    parser.add_argument(
        "--seeds", type=int, help="of each arm and of the tokens; without it 5, of some arms more"
    )
    parser.add_argument("--workers", type=int, default=2, help="trainings at once, a thread each")
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the CSVs")
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
