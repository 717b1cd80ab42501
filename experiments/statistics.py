"""Intervals over seeds and paired tests, by Student's t.

A value is the mean over seeds with its 95 % interval. Differences are of the same seed (the same scenes,
in the same order, from the same warm start), tested by the paired two-sided t-test. All tests of a table
are corrected together, by Holm's method; intervals are not.
"""

import functools
import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import NamedTuple

import numpy as np


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
    inside = 2 * scale * (weights * y).sum() * (x[1] - x[0]) / 3
    return max(0.0, float(1 - inside))


@functools.cache
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
    """Mean, and the half-width of its 95 % interval; NaN where there are too few values."""
    if len(values) < 2:
        return fmean(values) if values else math.nan, math.nan
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


class Difference(NamedTuple):
    """a - b over the seeds that both have: mean, half of the 95 % interval, p, and the number of pairs."""

    mean: float
    half: float
    p: float
    n: int

    def __str__(self) -> str:
        p = "p < 0.01" if self.p < 0.005 else f"p = {self.p:.2f}"
        return f"{self.untested()} ({p})" if self.n > 1 else "-"

    def untested(self) -> str:
        """The difference with its interval, and no p."""
        return f"{self.mean:+.3f} ± {self.half:.3f}" if self.n > 1 else "-"


def difference(a: dict[str, float], b: dict[str, float]) -> Difference:
    """a - b over the seeds that both have; its p is of this test alone."""
    return Difference(*paired(a, b))


def holm(ps: Sequence[float]) -> list[float]:
    """p-values corrected for their number (Holm, 1979): the k-th smallest of m, times m - k + 1.

    No corrected p is below that of a smaller one. If something is claimed wherever a corrected p is below
    0.05, the chance that any of these claims is false is below 0.05.

    >>> [round(p, 2) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    corrected, most = [0.0] * len(ps), 0.0
    for rank, i in enumerate(sorted(range(len(ps)), key=lambda i: ps[i])):
        most = max(most, min(1.0, ps[i] * (len(ps) - rank)))
        corrected[i] = most
    return corrected
