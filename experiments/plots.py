"""The figures of the claims, from the rows that tables.py reads; and how the cost of scoring grows."""

import math
from collections.abc import Sequence
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from experiments.statistics import interval, paired
from experiments.tables import (
    CLASSES,
    COLOURS,
    CONFOUNDED,
    COUNTED,
    CREDITS,
    GROWTH,
    HEADINGS,
    MASKS,
    METHODS,
    SENSITIVITY,
    Costs,
    Runs,
    Tokens,
    confounded_runs,
    counted,
)

COLORS = ("#0067a8", "#e08a00", "#7a3b8f", "#3c8c5a", "#8c8c8c", "#b03a2e", "#4a4a4a", "#c06ba0")
METHOD_COLORS = {
    "grpo": "#5a5a5a", "copo": "#e08a00", "truth": "#2f7d4f", "voted, lambda 0.35": "#0067a8",
    "agreement": "#b07cc6", "asked": "#56b4e9", "unmoved": "#b03a2e",
}  # fmt: skip
LOOK = {"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}


def _axes(columns: int, width: float, height: float, **more):
    """A figure with its axes in a row."""
    plt.rcParams |= LOOK
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


def shortcut(runs: Runs):
    """Claim 1, assertion (i): flip rate and adversarial POPE before and after GRPO, of eyes and of words."""
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
        (COLORS[0], "after 40 steps of GRPO at confounding 0.9"),
    ):
        axes[0].bar(0, 0, color=color, label=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def confounding(runs: Runs):
    """Claim 2, assertion (ii): hallucination against flip rate, one point per checkpoint of GRPO."""
    figure, (axis,) = _axes(1, 6, 4)

    def scatter(rows: Sequence[dict], **look) -> None:
        axis.scatter(*([float(r[k]) for r in rows] for k in ("flip_rate", "chair_s")), **look)

    here = [row for row in runs.rows if row["setting"] == "independent"]
    before = [row for row in here if row["arm"] == "warm start"]
    scatter(before, color="black", marker="*", s=90, label="warm start")
    others = [r for r in here if r["arm"] == "grpo" and r["step"] != "40"]
    scatter(others, color="0.75", s=12, label="confounding 0.9, at 20, 60, 80, 100 steps")
    points = confounded_runs(runs)
    for (rho, arm), color in zip(CONFOUNDED["grpo"].items(), COLORS, strict=False):
        scatter(
            [r for r in points if r["arm"] == arm],
            color=color,
            s=24,
            label=f"confounding {float(rho):g}",
        )
    if len(points) > 2:
        columns = ([float(row[k]) for row in points] for k in ("flip_rate", "chair_s"))
        r = np.corrcoef(*columns)[0, 1]
        axis.set_title(f"GRPO; the {len(points)} runs after 40 steps: r = {r:.2f}")
    axis.set(xlabel="flip rate under do(background)", ylabel="CHAIR_S, independent scenes")
    axis.legend(fontsize=6.5, loc="lower right")
    return figure


def remedy(runs: Runs):
    """Claim 3: colours alone by the weight of the KL, over the steps; and counting, each arm less GRPO."""
    plt.rcParams |= LOOK
    figure = plt.figure(figsize=(9, 6.4), dpi=140, layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    _learning(runs, above)
    axes = below.subplots(1, 2, sharey=True)
    arms = {
        method: name
        for method, name in COUNTED.items()
        if method != "grpo" and runs.seeds(counted(method, "0"), 80)
    }
    for axis, figure_ in zip(axes, ("counts_chair_s", "counts"), strict=True):
        for i, method in enumerate(arms):
            for shift, beta, mark in ((-0.13, "0", "o"), (0.13, "0.04", "s")):
                _less_grpo(axis, runs, method, beta, figure_, i + shift, mark)
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.set_title(f"{HEADINGS[figure_]}, less GRPO's")
        axis.grid(axis="x", alpha=0.25)
    axes[0].set_yticks(range(len(arms)), list(arms.values()))
    axes[0].invert_yaxis()
    for mark, beta in (("o", "0"), ("s", "0.04")):
        label = f"counting in crowds, 80 steps, β = {beta}"
        axes[1].plot([], [], mark, color="0.4", markersize=4, label=label)
    below.legend(*axes[1].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return figure


def _less_grpo(axis, runs: Runs, method: str, beta: str, figure: str, y: float, mark: str) -> None:
    """A dot with its interval: an arm of the crowded world less GRPO, over the seeds of both."""
    found = [
        runs.values(counted(name, beta), 80, "independent", figure) for name in (method, "grpo")
    ]
    mean, half, _, n = paired(*found)
    if n:
        color = METHOD_COLORS.get(method.split(",")[0], METHOD_COLORS["copo"])
        axis.errorbar(
            mean, y, xerr=None if math.isnan(half) else half, fmt=mark, color=color, markersize=4, capsize=2
        )  # fmt: skip


def _learning(runs: Runs, figure) -> None:
    """Colours alone: CHAIR_S on independent scenes against the steps, by the weight of the KL."""
    shown = {beta: arms for beta, arms in COLOURS.items() if runs.steps(arms["grpo"])}
    axes = figure.subplots(1, max(len(shown), 1), sharey=True, squeeze=False)[0]
    begun = runs.values("warm start, clear", 0, "independent", "chair_s").values()
    for axis, (beta, arms) in zip(axes, shown.items(), strict=False):
        for method, arm in arms.items():
            points = {0: (fmean(begun), 0.0)} if begun else {}
            for step in runs.steps(arm):
                values = runs.values(arm, step, "independent", "chair_s").values()
                points[step] = interval(list(values))
            steps = sorted(points)
            means, halves = (np.array([points[step][i] for step in steps]) for i in (0, 1))
            color = METHOD_COLORS[method]
            axis.plot(steps, means, "o-", color=color, label=METHODS[method], markersize=3)
            axis.fill_between(
                steps, means - halves, means + halves, color=color, alpha=0.15, linewidth=0
            )
        axis.set(title=f"colours alone, β = {beta}", xlabel="steps", ylim=(0, None), xlim=(0, 82))
    axes[0].set_ylabel("CHAIR_S of captions")
    axes[0].legend()


def credits(runs: Runs):
    """Claim 8: accuracy against hallucination in the crowded world, one point per seed."""
    figure, (axis,) = _axes(1, 6.5, 4)
    begun = [
        runs.values("warm start, crowded", 0, "independent", name)
        for name in ("counts_chair_s", "counts")
    ]
    axis.scatter(
        *(list(of.values()) for of in begun), color="black", marker="*", s=60, label="warm starts"
    )
    for method, name in (COUNTED | CREDITS).items():
        if method not in METHOD_COLORS:
            continue
        x, y = (
            runs.values(counted(method, "0"), 80, "independent", of)
            for of in ("counts_chair_s", "counts")
        )
        color = METHOD_COLORS[method]
        axis.scatter(list(x.values()), list(y.values()), color=color, s=14, alpha=0.5)
        if x:
            axis.scatter(fmean(x.values()), fmean(y.values()), color=color, s=60, label=name)
    axis.set(xlabel="CHAIR_S of the reasoning (lower is better)", ylabel="counts right")
    axis.set_title("counting in crowds, β = 0, after 80 steps: one dot per seed; large, their mean")
    axis.legend()
    return figure


def sensitivity(runs: Runs):
    """Claim 4: CHAIR_S as one setting changes, beside GRPO."""
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


def estimator(tokens: Tokens):
    """Claim 5: what equation 2 expects under each pairing, between its bounds; and what it costs to know."""
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
    if tokens.rows:
        axes[1].set_yscale("log")
    return figure


def mask(tokens: Tokens):
    """Claim 6: necessity by each mask against the truth, by class; and its agreement."""
    figure, axes = _axes(2, 10, 3.2, width_ratios=(2.2, 1))
    ways, kinds = (
        ("truth", *MASKS),
        CLASSES[:-1],
    )  # it is nearly always sure of a question repeated
    for k, way in enumerate(ways):
        for i, kind in enumerate(kinds):
            column, mask = ("truth", "zero") if way == "truth" else ("score", way)
            values = tokens.values(column, **{"mask": mask, "class": f"{kind}, open"})
            label = {"truth": "never held (truth)", "zero": "zero embedding (paper)"}.get(way, way)
            color = "0.2" if way == "truth" else COLORS[k - 1]
            _bar(axes[0], i + 0.16 * (k - 2), values, color, 0.16, label=None if i else label)
    axes[0].set_xticks(range(len(kinds)), [kind.replace(" ", "\n") for kind in kinds])
    axes[0].set_title("mean necessity of a token the policy was not sure of")
    axes[0].legend(fontsize=7)
    for k, mask in enumerate(MASKS):
        _bar(axes[1], k, tokens.values("correlation", **{"mask": mask, "class": "open"}), COLORS[k])
    axes[1].set_xticks(range(len(MASKS)), MASKS)
    axes[1].set_title("correlation with the truth,\nwithin completions")
    return figure


def credit(tokens: Tokens):
    """Claim 7: sufficiency and necessity by the class of the token, under both pairings."""
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


def growth(costs: Costs):
    """Token positions against T, H and G, on logarithmic axes."""
    panels = {
        "reasoning_tokens": ("T, reasoning tokens", (16, 32, 64, 128)),
        "num_continuations": ("H, continuations per set", (1, 2, 4, 8)),
        "num_generations": ("G, completions per prompt", (4, 8, 16)),
    }
    ways = {
        "(a) generate, by its formula": ("o-", COLORS[4]),
        "(d) shared, independent": ("s-", COLORS[1]),
        "(e) shared, coupled": ("^-", COLORS[0]),
        "necessity, shared": ("d--", COLORS[2]),
    }
    figure, axes = _axes(3, 10, 3.2, sharey=True)
    for axis, (name, (title, values)) in zip(axes, panels.items(), strict=True):
        for way, (style, color) in ways.items():
            points = [
                costs.value(GROWTH, f"token_forwards, {name} {value}", way) for value in values
            ]
            axis.plot(values, points, style, color=color, label=way, markersize=4)
        axis.set(xscale="log", yscale="log", xlabel=title, xticks=values)
        axis.set_xticklabels([str(value) for value in values])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("token positions run")
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside upper center", ncols=4, fontsize=8)
    return figure
