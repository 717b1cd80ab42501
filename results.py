"""Figures and the README's tables, from results/*.csv and nothing else.

    python results.py                       figures/claim-*.png, the tables in README.md, and a page
    python results.py --compare runs/quick  the rows of a quick run beside the committed ones

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

from data import DataError
from evaluate import write_whole
from experiments import read_csv
from memory import known_table
from report import page_of
from tokens import CLASSES, MASKS, QUESTIONS

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
HEADINGS = {figure: heading for figure, heading, _ in SHOWN}
WITHOUT_PAIR = ("warm start", "grpo")
SENSITIVITY = {  # panel -> arm -> what is written below it
    "λ_s, λ_n": {
        "grpo": "0, 0",
        "without S_nec": "0.35, 0",
        "without S_suff": "0, 0.35",
        "copo": "0.35, 0.35",
        "lambda 0.35 1.0": "0.35, 1",
        "lambda 1.0 0.35": "1, 0.35",
        "lambda 0.0 1.0": "0, 1",
        "lambda 1.0 0.0": "1, 0",
        "lambda 1.0 1.0": "1, 1",
    },
    "H": {"H 1": "H = 1", "H 2": "H = 2", "copo": "H = 4", "H 8": "H = 8"},
    "β": {
        "beta 0.0": "β = 0",
        "beta 0.01": "β = 0.01",
        "copo": "β = 0.04",
        "beta 0.16": "β = 0.16",
    },
    "zero variance": {"copo": "keep", "zero variance drop": "drop", "zero variance gate": "gate"},
}


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
    inside = 2 * scale * (weights * y).sum() * (x[1] - x[0]) / 3
    return max(0.0, float(1 - inside))


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
            return "-"
        mean, half = interval(values)
        digits = {"length": 1, "seconds": 0}.get(figure, 3)
        return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")

    def seeds(self, arm: str, step: int) -> int:
        """How many seeds an arm has."""
        return len(self.values(arm, step, "independent", "chair_s"))


class Tokens:
    """One of the CSVs of tokens.py."""

    def __init__(self, path: Path):
        self.rows = read_csv(path)

    def values(self, figure: str, **where: str) -> list[float]:
        """A figure of every seed, in the rows where the columns have these values."""
        return [
            float(row[figure])
            for row in self.rows
            if row[figure] and all(row[key] == str(value) for key, value in where.items())
        ]


# ---------------------------------------------------------------------------------------------
# The claims: each a table and a figure
# ---------------------------------------------------------------------------------------------
REMEDIES = (  # arm, what it is called, and its steps
    ("warm start", "warm start", 0),
    ("grpo", "GRPO", 40),
    ("grpo", "GRPO, 80 steps", 80),
    ("copo", "COPO", 40),
    ("without S_suff", "COPO without S_suff", 40),
    ("without S_nec", "COPO without S_nec", 40),
    ("independent", "COPO, independent pairs", 40),
    ("centred", "COPO, centred", 40),
    ("signed", "COPO, signed", 40),
    ("difference", "COPO, difference", 40),
    ("second best", "COPO, difference, second best", 40),
    ("second best, lambda 1", "the same, λ = 1", 40),
    ("copo", "COPO, 80 steps", 80),
)


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def remedy_table(runs: Runs, setting: str) -> str:
    """Every arm's figures on one kind of scenes."""
    rows = [
        [name, str(runs.seeds(arm, step)) if step else "", *(
            runs.cell(arm, step, setting, figure) for figure in (*HEADINGS, "seconds")
        )]
        for arm, name, step in REMEDIES
    ]  # fmt: skip
    return markdown(["", "seeds", *HEADINGS.values(), "seconds of training"], rows)


def against_grpo(runs: Runs) -> str:
    """Each arm less GRPO on the same seeds, on independent scenes; COPO also less twice the steps of it."""
    figures = ("chair_s", "recall", "pope_adversarial", "flip_rate")
    pairs = [(arm, name, step, step) for arm, name, step in REMEDIES if arm not in WITHOUT_PAIR]
    pairs.insert(1, ("copo", "COPO, less GRPO after 80 steps", 40, 80))
    rows = []
    for arm, name, step, of_grpo in pairs:
        cells, n = [], 0
        for figure in figures:
            values = (
                runs.values(a, s, "independent", figure)
                for a, s in ((arm, step), ("grpo", of_grpo))
            )
            mean, half, p, n = paired(*values)
            cells.append(f"{mean:+.3f} ± {half:.3f} (p = {p:.2f})" if n > 1 else "-")
        rows.append([name, str(n), *cells])
    return markdown(["less GRPO", "pairs", *(HEADINGS[figure] for figure in figures)], rows)


def shortcut_table(runs: Runs) -> str:
    """Claim i: GRPO before and after, reading images and reading descriptions."""
    figures = (
        "flip_rate",
        "pope_adversarial",
        "yes_ratio_adversarial",
        "chair_s",
        "background_share",
        "idle_words_share",
    )
    rows = [
        [name, setting, *(runs.cell(arm, step, setting, figure) for figure in figures)]
        for arm, name, step in (
            ("warm start", "images, before", 0),
            ("grpo", "images, after GRPO", 40),
            ("warm start, in words", "words, before", 0),
            ("grpo, in words", "words, after GRPO", 40),
            ("warm start, clear", "clear images, before", 0),
            ("grpo, clear", "clear images, after GRPO", 40),
        )
        for setting in ("confounded", "independent")
    ]
    headings = HEADINGS | {
        "yes_ratio_adversarial": "yes-ratio adv.",
        "idle_words_share": "idle words' share",
    }
    heads = [headings[figure] for figure in figures]
    return markdown(["", "scenes", *heads], rows)


def confounding_table(runs: Runs) -> str:
    """Claim ii: by the confounding of the training scenes, on independent scenes."""
    figures = ("chair_s", "flip_rate", "pope_adversarial", "recall")
    rows = [
        [method.upper(), rho, str(runs.seeds(arm, 40)), *(
            runs.cell(arm, 40, "independent", figure) for figure in figures
        )]
        for method in ("grpo", "copo")
        for rho, arm in confounded_arms(method).items()
    ]  # fmt: skip
    points = checkpoints_in_fog(runs)
    if len(points) > 2:
        r = np.corrcoef(*([float(row[key]) for row in points] for key in figures[:2]))[0, 1]
        rows.append(["correlation over checkpoints", "", str(len(points)), f"{r:.2f}", "", "", ""])
    return markdown(["", "rho", "seeds", *(HEADINGS[figure] for figure in figures)], rows)


def checkpoints_in_fog(runs: Runs) -> list[dict]:
    """The rows of every policy trained by GRPO or COPO on images in fog, on independent scenes."""
    arms = {arm for method in ("grpo", "copo") for arm in confounded_arms(method).values()}
    return [r for r in runs.rows if r["arm"] in arms and r["setting"] == "independent"]


def confounded_arms(method: str) -> dict[str, str]:
    """rho of the training scenes -> arm."""
    arms = {rho: f"{method}, rho {rho}" for rho in ("0.125", "0.5", "0.7", "1.0")}
    return dict(sorted({**arms, "0.9": method}.items()))


def sensitivity_table(runs: Runs) -> str:
    """Claim iv: one setting changed at a time, on independent scenes."""
    figures = ("chair_s", "recall", "pope_adversarial", "flip_rate")
    rows = [
        [name, str(runs.seeds(arm, 40)), *(
            runs.cell(arm, 40, "independent", figure) for figure in figures
        )]
        for group in SENSITIVITY.values()
        for arm, name in group.items()
    ]  # fmt: skip
    return markdown(["", "seeds", *(HEADINGS[figure] for figure in figures)], rows)


def estimator_table(tokens: Tokens) -> str:
    """Equation 2 as it is estimated, by pairing and H."""
    figures = (
        "floor",
        "mean",
        "expected",
        "variance",
        "correlation_with_lower_bound",
        "token_forwards",
    )
    heads = [
        "floor",
        "mean",
        "its expectation",
        "variance",
        "correlation with p_t − p_(t−1)",
        "token positions",
    ]
    rows = [
        [pairing, H, *(_mean(tokens.values(f, pairing=pairing, H=H)) for f in figures)]
        for pairing in ("independent", "coupled")
        for H in ("1", "2", "4", "8")
    ]
    return markdown(["pairing", "H", *heads], rows)


def mask_table(tokens: Tokens) -> str:
    """Each way to take a token away, against never having held it."""
    figures = ("truth", "score", "bias", "error", "correlation")
    rows = [
        [mask, *(_mean(tokens.values(f, **{"mask": mask, "class": "all"})) for f in figures)]
        for mask in MASKS
    ]
    return markdown(["mask", "true necessity", "found", "bias", "error (rms)", "correlation"], rows)


def credit_table(tokens: Tokens) -> str:
    """What tokens of each class earn, and how well that tells grounded objects from hallucinated ones."""
    figures = ("sufficiency", "necessity", "causal_reward")
    rows = [
        [kind if kind != "auc" else "AUC, grounded over hallucinated", *(
            _mean(tokens.values(f, **{"pairing": pairing, "class": kind}))
            for pairing in ("coupled", "independent") for f in figures
        )]
        for kind in (*CLASSES, "auc")
    ]  # fmt: skip
    heads = [
        f"{name}, {p}" for p in ("coupled", "independent") for name in ("S_suff", "S_nec", "causal")
    ]
    return markdown(["token", *heads], rows)


class Costs:
    """results/cost.csv, what benchmark.py measured."""

    def __init__(self, path: Path):
        self.rows = read_csv(path)

    def value(self, command: str, figure: str, way: str = "") -> float:
        """One figure; NaN where it was not measured."""
        key = (f"benchmark.py {command}", figure, way)
        found = [r["value"] for r in self.rows if (r["command"], r["figure"], r["way"]) == key]
        return float(found[0]) if found else math.nan


TRAINED = "interventions --model runs/first/checkpoint"
WAYS = (  # way, what it is called
    ("(a) generate a continuation", "(a) `generate` a continuation"),
    ("(b) generate a set", "(b) `generate` a set"),
    ("(c) copied cache", "(c) copied prefix cache"),
    ("(d) shared, independent", "(d) shared prefix, independent pairing"),
    ("(e) shared, coupled", "**(e) shared prefix, coupled pairing**"),
    ("necessity: generate a token", "necessity: `generate` a masked token"),
    ("necessity: copied cache", "necessity: copied prefix cache"),
    ("necessity: shared", "**necessity: shared prefix**"),
)


def ways_table(costs: Costs) -> str:
    """All ways on the batch of the trained policy."""
    rows = []
    for way, name in WAYS:
        figures = ("rows", "row_forwards", "least_forwards", "kv_megabytes")
        seconds, faster, *counts, held = (
            costs.value(TRAINED, f, way) for f in ("seconds", "times_faster", *figures)
        )
        rows.append([
            name, f"{seconds:.2f}", f"{faster:,.1f}×",
            *("" if math.isnan(x) else f"{x:,.0f}" for x in counts),
            "" if math.isnan(held) else f"{held:.1f} MB",
        ])  # fmt: skip
    return markdown(
        ["way", "seconds", "times faster", "rows", "token positions", "the least", "KV held"], rows
    )


def shapes_table(costs: Costs) -> str:
    """The same on random weights, for one trajectory and for eight; the update and the step."""
    rows = []
    for G, flag in (("1", " --num-generations 1"), ("8", "")):
        command = f"interventions --shape mid{flag} --repeats 1"
        cells = []
        for way, _ in (*WAYS[:4], WAYS[5], WAYS[7]):
            seconds, faster = (costs.value(command, f, way) for f in ("seconds", "times_faster"))
            cells.append(f"{seconds:.2f} s, {faster:.1f}×")
        held = [costs.value(command, "kv_megabytes", WAYS[i][0]) for i in (2, 3)]
        rows.append([f"G = {G}", *cells, f"{held[0] / held[1]:.0f}×"])
    heads = ["(a)", "(b)", "(c) copied", "(d) shared", "necessity, naive", "necessity, shared"]
    return markdown(["", *heads, "KV of (c) / (d)"], rows)


def step_table(costs: Costs) -> str:
    """A whole step of COPO and of GRPO, and the update on the shared prompt."""
    step, update = "step --model runs/first/checkpoint", "update --shape mid --prompt-tokens 400"
    rows = [
        [name, *(f"{costs.value(step, f'{s}_seconds', name):.2f} s" for s in STAGES)]
        for name in ("COPO", "GRPO")
    ]
    ratio = costs.value(step, "copo_over_grpo")
    rows.append(["COPO / GRPO, median of steps", "", "", "", f"**{ratio:.2f}×**"])
    faster, error = (
        costs.value(update, f) for f in ("times_faster", "largest_relative_difference_of_gradients")
    )
    told = f"{faster:.1f}× faster; gradients differ by at most {error:.1e}"
    rows.append(["update, P = 400 on the shared prompt", "", "", told, ""])
    return markdown(["", *STAGES], rows)


STAGES = ("rollout", "score", "update", "step")


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    mean, half = interval(values)
    if abs(mean) >= 100:
        return f"{mean:,.0f}"
    return f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------
def _axes(columns: int, width: float, height: float, **more):
    """A figure with its axes in a row."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams |= {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}
    figure, axes = plt.subplots(
        1, columns, figsize=(width, height), dpi=140, layout="constrained", squeeze=False, **more
    )
    return figure, axes[0]


def _bar(
    axis, place: float, values: Sequence[float], color: str, width: float = 0.8, **more
) -> None:
    """A bar of the mean with its interval; nothing where there are no values."""
    if values:
        mean, half = interval(values)
        error = None if math.isnan(half) else half
        axis.bar(place, mean, width, yerr=error, color=color, ecolor="0.3", capsize=2, **more)


def draw_shortcut(runs: Runs):
    """Claim i: flip rate and adversarial POPE before and after GRPO, of eyes and of words."""
    figure, axes = _axes(3, 9.5, 3)
    arms = {
        "images in fog": ("warm start", "grpo"),
        "clear images": ("warm start, clear", "grpo, clear"),
        "words": ("warm start, in words", "grpo, in words"),
    }
    for axis, (name, heading) in zip(axes, (
        ("flip_rate", "flip rate under do(background)\n(lower is better)"),
        ("pope_adversarial", "POPE F1, adversarial\n(higher is better)"),
        ("chair_s", "CHAIR_S\n(lower is better)"),
    ), strict=True):  # fmt: skip
        for i, (before, after) in enumerate(arms.values()):
            for shift, arm, step, color in (
                (-0.2, before, 0, COLORS[4]),
                (0.2, after, 40, COLORS[0]),
            ):
                values = list(runs.values(arm, step, "independent", name).values())
                _bar(axis, i + shift, values, color, 0.38)
        axis.set_xticks(range(len(arms)), list(arms))
        axis.set_title(heading)
    for color, label in (
        (COLORS[4], "warm start"),
        (COLORS[0], "after 40 steps of GRPO at ρ = 0.9"),
    ):
        axes[0].bar(0, 0, color=color, label=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_confounding(runs: Runs):
    """Claim ii: hallucination against flip rate, a point a checkpoint."""
    figure, (axis,) = _axes(1, 6, 4)
    points = checkpoints_in_fog(runs)
    rhos = sorted({row["rho"] for row in points}, key=float)
    for rho, color in zip(rhos, COLORS, strict=False):
        for method, marker in (("grpo", "o"), ("copo", "^")):
            rows = [r for r in points if r["rho"] == rho and r["arm"].startswith(method)]
            if rows:
                axis.scatter(
                    *([float(r[k]) for r in rows] for k in ("flip_rate", "chair_s")),
                    color=color, marker=marker, s=22, alpha=0.8,
                    label=f"ρ = {float(rho):g}, {method.upper()}",
                )  # fmt: skip
    before = [r for r in runs.rows if r["arm"] == "warm start" and r["setting"] == "independent"]
    axis.scatter(
        *([float(r[k]) for r in before] for k in ("flip_rate", "chair_s")),
        color="black", marker="*", s=90, label="warm start",
    )  # fmt: skip
    axis.set(xlabel="flip rate under do(background)", ylabel="CHAIR_S, independent scenes")
    axis.legend(fontsize=6.5, ncols=2)
    return figure


def draw_remedy(runs: Runs):
    """Claim iii: every arm on both kinds of scenes."""
    shown = ("chair_s", "chair_i", "recall", "pope_adversarial", "flip_rate", "background_share")
    figure, axes = _axes(len(shown), 12, 3.6, sharey=True)
    for axis, name in zip(axes, shown, strict=True):
        for i, (arm, _, step) in enumerate(REMEDIES):
            for shift, setting, color in (
                (-0.13, "independent", COLORS[0]),
                (0.13, "confounded", COLORS[1]),
            ):
                values = list(runs.values(arm, step, setting, name).values())
                if values:
                    mean, half = interval(values)
                    axis.errorbar(
                        mean, i + shift, xerr=None if math.isnan(half) else half, fmt="o",
                        color=color, markersize=3.5, capsize=2, label=f"{setting} scenes" if not i else None,
                    )  # fmt: skip
        better = {f: less for f, _, less in SHOWN}[name]
        axis.set_title(f"{HEADINGS[name]}\n({'lower' if better else 'higher'} is better)")
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(REMEDIES)), [name for _, name, _ in REMEDIES])
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def draw_sensitivity(runs: Runs):
    """Claim iv: CHAIR_S as one setting changes, beside GRPO."""
    figure, axes = _axes(
        len(SENSITIVITY), 11, 3.2, sharey=True, width_ratios=[len(g) for g in SENSITIVITY.values()]
    )
    grpo = list(runs.values("grpo", 40, "independent", "chair_s").values())
    for axis, (heading, group) in zip(axes, SENSITIVITY.items(), strict=True):
        for i, arm in enumerate(group):
            default = arm == "copo"
            values = list(runs.values(arm, 40, "independent", "chair_s").values())
            _bar(axis, i, values, COLORS[1] if default else COLORS[0])
        if grpo:
            axis.axhline(fmean(grpo), color=COLORS[4], linestyle="--", label="GRPO")
        axis.set_xticks(
            range(len(group)), list(group.values()), rotation=45, ha="right", fontsize=7
        )
        axis.set_title(heading)
    axes[0].set_ylabel("CHAIR_S, independent scenes")
    axes[0].legend()
    return figure


def draw_estimator(tokens: Tokens):
    """Claim v: what equation 2 expects under each pairing, between its bounds; and what it costs to know."""
    figure, axes = _axes(3, 11, 3.2, width_ratios=(2.2, 1, 1))
    names = ("lower", "coupled", "independent", "upper")
    labels = (
        "lower bound, max(0, p_t − p_(t−1))",
        "coupled pairs",
        "independent pairs",
        "upper bound",
    )
    colors = (COLORS[4], COLORS[0], COLORS[1], "0.8")
    for k, (name, label, color) in enumerate(zip(names, labels, colors, strict=True)):
        for i, kind in enumerate(CLASSES):
            values = tokens.values(name, **{"class": kind})
            _bar(axes[0], i + 0.2 * (k - 1.5), values, color, 0.2, label=None if i else label)
    axes[0].set_xticks(range(len(CLASSES)), [kind.replace(" ", "\n") for kind in CLASSES])
    axes[0].set_title("expected S_suff")
    axes[0].margins(y=0.3)  # room for the legend
    axes[0].legend(fontsize=7, ncols=2, loc="upper center")
    for pairing, color in (("independent", COLORS[1]), ("coupled", COLORS[0])):
        sizes = [H for H in ("1", "2", "4", "8") if tokens.values("variance", pairing=pairing, H=H)]
        for axis, name in zip(axes[1:], ("variance", "floor"), strict=True):
            points = [
                [fmean(tokens.values(f, pairing=pairing, H=H)) for H in sizes]
                for f in ("token_forwards", name)
            ]
            axis.plot(*points, "o-", color=color, label=pairing, markersize=4)
            for H, x, y in zip(sizes, *points, strict=True):
                axis.annotate(
                    f"H={H}", (x, y), fontsize=6, xytext=(3, 4), textcoords="offset points"
                )
    for axis, title in zip(
        axes[1:], ("variance of S_suff", "S_suff of tokens\nthat change nothing"), strict=True
    ):
        axis.set(xscale="log" if tokens.rows else "linear", title=title)
        axis.set_xlabel("token positions run")
        axis.legend(fontsize=7)
    if tokens.rows:
        axes[1].set_yscale("log")
    return figure


def draw_mask(tokens: Tokens):
    """Claim vi: necessity by each mask against the truth, by class; and its agreement."""
    figure, axes = _axes(2, 10, 3.2, width_ratios=(2.2, 1))
    ways = ("truth", *MASKS)
    for k, way in enumerate(ways):
        for i, kind in enumerate(CLASSES):
            column, mask = ("truth", "zero") if way == "truth" else ("score", way)
            values = tokens.values(column, **{"mask": mask, "class": kind})
            label = {"truth": "never held (truth)", "zero": "zero embedding (paper)"}.get(way, way)
            color = "0.2" if way == "truth" else COLORS[k - 1]
            _bar(axes[0], i + 0.16 * (k - 2), values, color, 0.16, label=None if i else label)
    axes[0].set_xticks(range(len(CLASSES)), [kind.replace(" ", "\n") for kind in CLASSES])
    axes[0].set_title("mean necessity of a token")
    axes[0].legend(fontsize=7)
    for k, mask in enumerate(MASKS):
        _bar(axes[1], k, tokens.values("correlation", **{"mask": mask, "class": "all"}), COLORS[k])
    axes[1].set_xticks(range(len(MASKS)), MASKS)
    axes[1].set_title("correlation with the truth, over all tokens")
    return figure


def draw_credit(tokens: Tokens):
    """Claim vii: sufficiency and necessity by the class of the token, under both pairings."""
    figure, axes = _axes(2, 10, 3, sharey=True)
    for axis, pairing in zip(axes, ("coupled", "independent"), strict=True):
        for k, name in enumerate(("sufficiency", "necessity", "causal_reward")):
            for i, kind in enumerate(CLASSES):
                values, label = tokens.values(name, **{"pairing": pairing, "class": kind}), None
                if i == 0:
                    label = name.replace("_", " ")
                _bar(axis, i + 0.26 * (k - 1), values, COLORS[k], 0.26, label=label)
        axis.set_xticks(range(len(CLASSES)), [kind.replace(" ", "\n") for kind in CLASSES])
        told = tokens.values("causal_reward", **{"pairing": pairing, "class": "auc"})
        note = f"; AUC grounded over hallucinated {fmean(told):.2f}" if told else ""
        axis.set_title(f"{pairing} pairs{note}")
    axes[0].legend(fontsize=7)
    return figure


# ---------------------------------------------------------------------------------------------
# README, page, comparison
# ---------------------------------------------------------------------------------------------
def claims(folder: Path) -> dict[str, tuple[str, Callable, list[str]]]:
    """name -> heading, what draws its figure, its tables."""
    runs = Runs(folder)
    estimator, mask, credit = (Tokens(folder / f"{n}.csv") for n in ("estimator", "mask", "credit"))
    return {
        "1-shortcut": ("Outcome reward and the shortcut", lambda: draw_shortcut(runs),
            [shortcut_table(runs)]),
        "2-confounding": ("Shortcut and hallucination", lambda: draw_confounding(runs),
            [confounding_table(runs)]),
        "3-remedy": (
            "The remedy",
            lambda: draw_remedy(runs),
            [remedy_table(runs, "independent"), remedy_table(runs, "confounded"), against_grpo(runs)],
        ),
        "4-sensitivity": ("Sensitivity", lambda: draw_sensitivity(runs), [sensitivity_table(runs)]),
        "5-estimator": ("The estimator", lambda: draw_estimator(estimator), [estimator_table(estimator)]),
        "6-mask": ("The mask", lambda: draw_mask(mask), [mask_table(mask)]),
        "7-credit": ("Where the credit goes", lambda: draw_credit(credit), [credit_table(credit)]),
    }  # fmt: skip


def fill(text: str, tables: dict[str, str]) -> str:
    """A text with every table put between its marks, <!-- results NAME --> and <!-- end -->."""
    for name, table in tables.items():
        marks = rf"(<!-- results {re.escape(name)} -->\n).*?(<!-- end -->)"
        text, found = re.subn(
            marks, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.S
        )
        if not found:
            raise DataError(f"README.md: no place for the table {name!r}")
    return text


def page(found: dict[str, tuple[str, Path, list[str]]]) -> str:
    """All figures and tables as one self-contained page."""
    parts = []
    for heading, picture, tables in found.values():
        data = base64.b64encode(picture.read_bytes()).decode()
        parts.append(
            f"<h2>{html.escape(heading)}</h2><img alt='{html.escape(heading)}' "
            f"src='data:image/png;base64,{data}'>"
        )
        parts += [f"<div class=wide>{_as_html(table)}</div>" for table in tables]
    return page_of("COPO: the paper's claims, tested where the truth is known", "".join(parts))


def _as_html(table: str) -> str:
    head, _, *rows = [line.strip("| ").split(" | ") for line in table.splitlines()]
    lines = [
        "<tr>" + "".join(f"<{tag}>{html.escape(cell)}" for cell in line)
        for tag, line in (("th", head), *(("td", row) for row in rows))
    ]
    return f"<table class=figures>{''.join(lines)}</table>"


def compare(quick: Path, committed: Path) -> str:
    """Every row of a quick run beside the committed row of the same arm, seed and step."""
    lines = []
    keys = ("arm", "seed", "step", "setting")
    of = {tuple(row[k] for k in keys): row for row in read_csv(committed / "runs.csv")}
    for row in read_csv(quick / "runs.csv"):
        other = of.get(tuple(row[k] for k in keys), {})
        lines.append(
            f"{row['arm']}, seed {row['seed'] or '-'}, step {row['step']}, {row['setting']} scenes"
        )
        lines += [
            f"  {HEADINGS[name]:<20}{row[name]:>10}{other.get(name, '-'):>10}"
            for name in HEADINGS
            if row[name]
        ]
    for name in QUESTIONS:
        of_seed = [r for r in read_csv(committed / f"{name}.csv") if r["seed"] == "0"]
        for row, other in zip(read_csv(quick / f"{name}.csv"), of_seed, strict=False):
            said = [
                f"{k} {row[k]} | {other[k]}"
                for k in row
                if row[k] and k not in ("seed", "commit", "command")
            ]
            lines.append(f"{name}: " + ", ".join(said))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Draw and fill in.  Returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("results"), help="folder of the CSVs")
    parser.add_argument("--figures", type=Path, default=Path("figures"), help="where figures go")
    parser.add_argument(
        "--readme", type=Path, default=Path("README.md"), help="its tables are filled in"
    )
    parser.add_argument(
        "--page", type=Path, default=Path("runs/results.html"), help="all of it as a page"
    )
    parser.add_argument(
        "--compare", type=Path, help="print a quick run beside the committed figures"
    )
    args = parser.parse_args(argv)
    try:
        for folder in filter(None, (args.results, args.compare)):
            if not (folder / "runs.csv").exists():
                raise DataError(f"{folder}: holds no runs.csv: run experiments.py first")
        if args.compare:
            print(compare(args.compare, args.results))
            return 0
        drawn, tables = {}, {}
        args.figures.mkdir(parents=True, exist_ok=True)
        for name, (heading, draw, of_claim) in claims(args.results).items():
            picture = args.figures / f"claim-{name}.png"
            draw().savefig(picture)
            drawn[name] = heading, picture, of_claim
            tables |= {f"{name} {i}": table for i, table in enumerate(of_claim, 1)}
        costs = Costs(args.results / "cost.csv")
        tables |= {
            "ways": ways_table(costs),
            "shapes": shapes_table(costs),
            "step": step_table(costs),
        }
        tables["memory"] = known_table()
        write_whole(args.page, page(drawn))
        write_whole(args.readme, fill(args.readme.read_text(encoding="utf-8"), tables))
        print(f"{args.figures}/claim-*.png, {args.page}, {args.readme}")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
