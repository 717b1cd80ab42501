"""Steps and token positions until training reaches a level: COPO beside GRPO with G = 8 and with G = 16.

    python -m experiments.levels          from the runs that `make results` left     -> levels.csv

A run is at a level from the first step on at which its last 20 steps earned that much in the mean: a step
has so few prompts that it alone says little. Runs of 80 steps that never get there have an empty step.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from data import DataError
from experiments.arms import ARMS
from experiments.claims import RESULTS, WORK, forwards
from experiments.jobs import slug
from experiments.records import commit, read_csv, write_csv

LEVELS, WINDOW, SEEDS = (0.7, 0.8), 20, 5
METHODS = ("grpo", "grpo, G 16", "copo")
PROMPTS = {1: "B 1", 2: "B 2", 4: "beta 0"}  # per step: how the arms of counting are called
COLUMNS = ("arm", "seed", "level", "step", "token_forwards", "commit", "command")


def reached(rewards: Sequence[float], level: float) -> int | None:
    """The first step, counted from 1, at which the last WINDOW of them were worth `level` in the mean.

    >>> reached([0.5] * 20 + [1.0] * 20, 0.75)
    30
    """
    steps = range(WINDOW, len(rewards) + 1)
    return next((s for s in steps if fmean(rewards[s - WINDOW : s]) >= level), None)


def rows_of(work: Path, name: str, seed: int) -> list[dict]:
    """One run's rows, a level each.  Raises DataError where the run is not there."""
    folders = sorted(work.glob(f"{slug(f'{name} {seed}')}-{'[0-9a-f]' * 12}"))
    if not folders:
        raise DataError(
            f'{work}: no run of "{name}", seed {seed}: python -m experiments.claims runs --arms "{name}"'
        )
    logged = read_csv(folders[-1] / "metrics.csv")
    run = ARMS[name].settings(seed, folders[-1])
    rows = []
    for level in LEVELS:
        step = reached([float(row["reward"]) for row in logged], level)
        positions = sum(forwards(run, row) for row in logged[:step]) if step else ""
        rows.append({
            "arm": name, "seed": seed, "level": level, "step": step or "", "token_forwards": positions,
            "commit": commit(), "command": "python -m experiments.levels",
        })  # fmt: skip
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Write the CSV.  Returns the exit code: 0, or 2 where a run is missing."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the runs")
    parser.add_argument("--output", type=Path, default=RESULTS / "levels.csv", help="the CSV")
    args = parser.parse_args(argv)
    names = [f"{method}, counting, {called}" for called in PROMPTS.values() for method in METHODS]
    try:
        rows = [
            r for name in names for seed in range(SEEDS) for r in rows_of(args.work, name, seed)
        ]
        write_csv(args.output, rows, COLUMNS)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
