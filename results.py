"""Figures and the README's tables, from results/*.csv and nothing else.

    python results.py                      figures/claim-*.png, the tables in README.md, runs/results/report.html
    python results.py --compare runs/quick the rows of a quick run beside the committed ones

A value is the mean over seeds; its interval is Student's 95 % interval over seeds; differences are of
the same seed (the same scenes, in the same order, from the same warm start), and their p is that of
the paired two-sided t-test. Nothing is corrected for the number of comparisons.
"""

import argparse
import base64
import html
import math
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from experiments import ARMS, read_csv
from tokens import CLASSES, MASKS

COLORS = ("#0067a8", "#e08a00", "#7a3b8f", "#3c8c5a", "#8c8c8c", "#b03a2e", "#4a4a4a", "#c06ba0")
SHOWN = (  # figure, its heading, whether less is better
    ("chair_s", "CHAIR_S", True),
    ("chair_i", "CHAIR_I", True),
    ("recall", "recall", False),
    ("length", "words", None),
    ("accuracy", "accuracy", False),
    ("pope_random", "POPE random", False),
    ("pope_popular", "POPE popular", False),
    ("pope_adversarial", "POPE adv.", False),
    ("flip_rate", "flip rate", True),
    ("background_share", "background share", True),
)


# ---------------------------------------------------------------------------------------------
# Statistics
# ---------------------------------------------------------------------------------------------
def t_tail(t: float, df: int) -> float:
    """P(|T| > t) of Student's t with df degrees of freedom, by Simpson's rule.

    >>> round(t_tail(2.776, 4), 3), round(t_tail(0.0, 4), 3)
    (0.05, 1.0)
    """
    x = np.linspace(0, math.atan(abs(t) / math.sqrt(df)), 2001)  # t = sqrt(df) tan x
    y = np.cos(x) ** (df - 1)
    weights = np.ones_like(x)
    weights[1:-1:2], weights[2:-1:2] = 4, 2
    scale = math.gamma((df + 1) / 2) / (math.sqrt(math.pi) * math.gamma(df / 2))
    return float(1 - 2 * scale * (weights * y).sum() * (x[1] - x[0]) / 3)


def t_quantile(df: int) -> float:
    """The t that 5 % lie beyond, on both sides together.

    >>> round(t_quantile(4), 3), round(t_quantile(9), 3)
    (2.776, 2.262)
    """
    low, high = 0.0, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if t_tail(middle, df) > 0.05 else (low, middle)
    return low


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and the half-width of its 95 % interval (NaN for a single value)."""
    if len(values) < 2:
        return fmean(values), math.nan
    half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return fmean(values), half


def paired(a: dict[str, float], b: dict[str, float]) -> tuple[float, float, float, int]:
    """Mean of a - b over the seeds that both have, half of its 95 % interval, p, and the number of pairs.

    >>> [round(x, 3) for x in paired({"0": 3.0, "1": 4.0, "2": 8.0}, {"0": 1.0, "1": 3.0, "2": 5.0})]
    [2.0, 2.484, 0.074, 3]
    """
    differences = [a[seed] - b[seed] for seed in a if seed in b]
    n = len(differences)
    mean, half = interval(differences)
    if n < 2:
        return mean, half, math.nan, n
    error = stdev(differences) / math.sqrt(n)
    p = t_tail(mean / error, n - 1) if error else float(mean == 0)
    return mean, half, p, n


class Runs:
    """results/runs.csv, by arm, step and setting."""

    def __init__(self, folder: Path):
        self.rows = read_csv(folder / "runs.csv")

    def values(self, arm: str, step: int, setting: str, figure: str) -> dict[str, float]:
        """seed -> value."""
        return {
            row["seed"]: float(row[figure])
            for row in self.rows
            if (row["arm"], int(row["step"]), row["setting"]) == (arm, step, setting)
            and row[figure]
        }

    def cell(self, arm: str, step: int, setting: str, figure: str) -> str:
        """Mean ± half interval, as text."""
        values = list(self.values(arm, step, setting, figure).values())
        if not values:
            return "–"
        mean, half = interval(values)
        digits = 1 if figure == "length" else 3
        return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")

    def seeds(self, arm: str, step: int) -> int:
        """How many seeds an arm has."""
        return len(self.values(arm, step, "independent", "chair_s"))
