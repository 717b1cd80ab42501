"""The figures of the claims, from the rows that tables.py reads; how the cost of scoring grows; the map.

Each is drawn twice, for a light ground and for a dark one (page/palette.py). A title says what was found.
A large dot is a mean over seeds with its 95 % interval, where there is more than one seed.
"""

import io
import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from PIL import Image

from experiments.statistics import interval, paired
from experiments.tables import (
    CLASSES,
    CONFOUNDED,
    COUNTED,
    CREDITS,
    GROWTH,
    MASKS,
    SENSITIVITY,
    Costs,
    Runs,
    Tokens,
    counted,
)
from page.palette import DARK, LIGHT, Scheme

# Inches. On a phone 358 px wide, 7.5 points are then 9 px; so panels stand below each other.
WIDTH = 4.1


def save(draw: Callable[[Scheme], Figure], path: Path) -> None:
    """Write a figure for a light ground and, as NAME-dark.png, for a dark one; both are transparent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for scheme, name in ((LIGHT, path), (DARK, path.with_stem(f"{path.stem}-dark"))):
        figure, drawn = draw(scheme), io.BytesIO()
        figure.savefig(drawn)
        plt.close(figure)
        # 64 colours are enough for lines and letters, and take a third of the bytes.
        few = Image.open(drawn).convert("RGBA").quantize(64, method=Image.Quantize.FASTOCTREE)
        few.save(name, optimize=True)


def _figure(scheme: Scheme, title: str, height: float) -> Figure:
    """An empty figure below its title."""
    plt.rcParams |= {
        "font.size": 8, "axes.titlesize": 8, "xtick.labelsize": 7.5, "ytick.labelsize": 8,
        "legend.frameon": False, "axes.spines.top": False, "axes.spines.right": False,
        "figure.facecolor": "none", "axes.facecolor": "none", "grid.alpha": 0.3, "lines.markersize": 4.5,
    }  # fmt: skip
    inked = ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")
    plt.rcParams |= dict.fromkeys(inked, scheme.ink)
    plt.rcParams |= dict.fromkeys(("axes.edgecolor", "xtick.color", "ytick.color"), scheme.soft)
    plt.rcParams |= {"grid.color": scheme.soft}
    figure = plt.figure(figsize=(WIDTH, height), dpi=240, layout="constrained")
    title = textwrap.fill(title, int(12.5 * WIDTH))
    figure.suptitle(title, x=0.01, ha="left", fontsize=9, fontweight="bold")
    return figure


def _dot(axis, y: float, values: Sequence[float], color: str, mark: str = "o", **more) -> None:
    """A mean at height y with its interval; nothing where there are no values."""
    if values:
        _whisker(axis, y, *interval(list(values)), color, mark, **more)


def _whisker(axis, y: float, mean: float, half: float, color: str, mark: str, **more) -> None:
    error = None if math.isnan(half) else half
    axis.errorbar(mean, y, xerr=error, fmt=mark, color=color, linewidth=1.3, **more)


def _line(axis, points: Mapping[float, Sequence[float]], color: str, style: str, **more) -> None:
    """Means over x with their intervals, joined."""
    found = {x: interval(list(values)) for x, values in points.items() if values}
    means, halves = ([pair[i] for pair in found.values()] for i in (0, 1))
    halves = [0 if math.isnan(half) else half for half in halves]
    axis.errorbar(list(found), means, halves, fmt=style, color=color, linewidth=1.3, **more)


def _rows(axis, names: Sequence[str], width: int = 30) -> None:
    """Names down the side, the first at the top."""
    axis.set_yticks(range(len(names)), [textwrap.fill(name, width) for name in names])
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x")


def _legend(figure: Figure, axis, columns: int) -> None:
    named = {label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=columns)


def shortcut(runs: Runs, scheme: Scheme) -> Figure:
    """Claim 1, assertion (i): flip rate, adversarial POPE, CHAIR_S before and after GRPO, in each world."""
    worlds = {
        "images in fog": ("warm start", "grpo", 40),
        "clear images": ("warm start, clear", "grpo, clear", 40),
        "words": ("warm start, in words", "grpo, in words", 40),
        "counting in crowds": ("warm start, crowded", counted("grpo", "0"), 80),
    }
    title = "GRPO weakens the shortcut where answers hang on what is named, not in crowds"
    figure = _figure(scheme, title, 4.9)
    axes = figure.subplots(3, 1)
    for axis, (name, heading) in zip(axes, (
        ("flip_rate", "flip rate (lower is better)"),
        ("pope_adversarial", "POPE F1, adversarial (higher is better)"),
        ("chair_s", "CHAIR_S (lower is better)"),
    ), strict=True):  # fmt: skip
        for y, (before, after, step) in enumerate(worlds.values()):
            label = None if y else "warm start"
            values = runs.values(before, 0, "independent", name).values()
            _dot(axis, y - 0.15, values, scheme.ink, "s", label=label)
            label = None if y else "after GRPO (in crowds: 80 steps, β = 0)"
            values = runs.values(after, step, "independent", name).values()
            _dot(axis, y + 0.15, values, scheme.hues["GRPO"], label=label)
        _rows(axis, list(worlds))
        axis.set_title(heading)
    _legend(figure, axes[0], 2)
    return figure


def confounding(runs: Runs, scheme: Scheme) -> Figure:
    """Claim 2, assertion (ii): GRPO's hallucination over its steps in crowds, and by confounding in fog."""
    title = "Hallucination grows as GRPO trains in crowds, and with confounding in fog"
    figure, color = _figure(scheme, title, 4.6), scheme.hues["GRPO"]
    left, right = figure.subplots(2, 1)
    for beta, style, face, aside in (("0", "o-", color, 0), ("0.04", "s--", "none", 1.5)):
        steps = {0: "warm start, crowded", **dict.fromkeys((40, 80), counted("grpo", beta))}
        of = {n: runs.values(arm, n, "independent", "counts_chair_s") for n, arm in steps.items()}
        seeds = set.intersection(*map(set, of.values()))  # a line is of the same ones throughout
        points = {n + aside: [of[n][seed] for seed in sorted(seeds)] for n in steps}
        _line(left, points, color, style, markerfacecolor=face, label=f"β = {beta}")
    left.set(title="crowds: CHAIR_S of the reasoning", xlabel="steps", xticks=[0, 40, 80])
    left.legend(loc="upper left")
    found = {
        float(rho): runs.values(arm, 40, "independent", "chair_s")
        for rho, arm in CONFOUNDED["grpo"].items()
    }
    for seed in sorted(set.intersection(*(set(of) for of in found.values()))):
        right.plot(
            list(found), [of[seed] for of in found.values()], color=scheme.soft, lw=0.6, alpha=0.6
        )
    _line(right, {rho: list(of.values()) for rho, of in found.items()}, color, "o-")
    right.set(
        title="fog, 40 steps: CHAIR_S (thin: one seed)", xlabel="confounding of the training scenes"
    )
    for axis in (left, right):
        axis.set_ylim(0, None)
        axis.grid(axis="y")
    return figure


def remedy(runs: Runs, scheme: Scheme) -> Figure:
    """Claim 3: counting in crowds, each arm less GRPO on the same seeds."""
    title = "Counting in crowds, no form of COPO was found to hallucinate less than GRPO"
    arms = [
        (method, beta)
        for beta in ("0", "0.04")
        for method in COUNTED
        if method != "grpo" and runs.seeds(counted(method, beta), 80)
    ]
    figure = _figure(scheme, title, 5.2)
    axes = figure.subplots(2, 1)
    for axis, name in zip(axes, ("counts_chair_s", "counts"), strict=True):
        for y, (method, beta) in enumerate(arms):
            of_arm, of_grpo = (
                runs.values(counted(m, beta), 80, "independent", name) for m in (method, "grpo")
            )
            mean, half, _, n = paired(of_arm, of_grpo)
            if n:
                color = _hue(scheme, method)
                _whisker(axis, y, mean, half, color, "o" if beta == "0" else "s")
        axis.axvline(0, color=scheme.ink, linewidth=0.9)
        _rows(axis, [f"{COUNTED[method]}, β = {beta}" for method, beta in arms])
    axes[0].set_title("CHAIR_S of the reasoning,\nless GRPO's (below 0 is better)")
    axes[1].set_title("counts right,\nless GRPO's (above 0 is better)")
    return figure


def _hue(scheme: Scheme, method: str) -> str:
    """The colour of an arm: of its method, or none."""
    first = method.split(",")[0]
    meaning = {"grpo": "GRPO", "truth": "truth", "voted": "vote"}.get(first, "COPO")
    return scheme.soft if first in CREDITS and first != "voted" else scheme.hues[meaning]


def credits(runs: Runs, scheme: Scheme) -> Figure:
    """Claim 8: hallucination and accuracy in the crowded world by what is paid, with every seed."""
    title = "Of the credits without the truth, the warm start's vote comes nearest to it"
    arms = ("grpo", "copo", "truth", *CREDITS)
    figure = _figure(scheme, title, 8)
    axes = figure.subplots(2, 1)
    for axis, name in zip(axes, ("counts_chair_s", "counts"), strict=True):
        begun = runs.values("warm start, crowded", 0, "independent", name).values()
        _dot(axis, 0, begun, scheme.ink, "s")
        for y, method in enumerate(arms, 1):
            values = runs.values(counted(method, "0"), 80, "independent", name).values()
            color = _hue(scheme, method)
            axis.plot(list(values), [y + 0.25] * len(values), "o", color=color, ms=2, alpha=0.7)
            _dot(axis, y, values, color)
        _rows(axis, ["warm start", *((COUNTED | CREDITS)[method] for method in arms)], 26)
    axes[0].set_title("CHAIR_S of the reasoning (lower is better)")
    axes[1].set_title("counts right (higher is better)")
    figure.supxlabel("in crowds, β = 0, after 80 steps; small dots: seeds", fontsize=8)
    return figure


def sensitivity(runs: Runs, scheme: Scheme) -> Figure:
    """Claim 4: CHAIR_S as one setting of COPO changes, less the default's on the same seeds."""
    title = "No setting of COPO was found to matter"
    arms = [
        (f"{panel}: {name}" if panel in ("λ_s, λ_n", "zero variance") else name, arm)
        for panel, group in SENSITIVITY.items()
        for arm, name in group.items()
        if arm != "copo"
    ]  # fmt: skip
    figure = _figure(scheme, title, 3.9)
    axis = figure.subplots()
    default = runs.values("copo", 40, "independent", "chair_s")
    for y, (_, arm) in enumerate(arms):
        mean, half, _, n = paired(runs.values(arm, 40, "independent", "chair_s"), default)
        if n:
            _whisker(axis, y, mean, half, _hue(scheme, arm), "o")
    axis.axvline(0, color=scheme.ink, linewidth=0.9)
    _rows(axis, [f"{name} (GRPO)" if arm == "grpo" else name for name, arm in arms])
    axis.set_title(
        "CHAIR_S in fog after 40 steps, less the\ndefault's on the same seeds (below 0 is better)"
    )
    axis.set_xlabel("default: λ_s = λ_n = 0.35, H = 4, β = 0.04,\nzero variance: keep")
    return figure


def estimator(tokens: Tokens, scheme: Scheme) -> Figure:
    """Claim 5: what equation 2 expects under each pairing, between its bounds; and what it costs to know."""
    title = "With independent pairs equation 2 is mostly noise; coupled pairs remove most of it"
    figure = _figure(scheme, title, 4.9)
    axes = figure.subplot_mosaic([["mean", "mean"], ["variance", "floor"]])
    axes = [axes[name] for name in ("mean", "variance", "floor")]
    for y, kind in enumerate(CLASSES):
        bounds = [tokens.values(name, **{"class": kind}) for name in ("lower", "upper")]
        if all(bounds):
            axes[0].hlines(y, *map(fmean, bounds), color=scheme.soft, linewidth=7, alpha=0.3)
        for name, shift in (("coupled", -0.12), ("independent", 0.12)):
            label = None if y else f"{name} pairs"
            values = tokens.values(name, **{"class": kind})
            _dot(axes[0], y + shift, values, scheme.hues[name], label=label)
    _rows(axes[0], CLASSES, 13)
    axes[0].set_title("expected S_suff (band: its bounds)")
    for name in ("independent", "coupled"):
        sizes = [H for H in ("1", "2", "4", "8") if tokens.values("variance", pairing=name, H=H)]
        for axis, of in zip(axes[1:], ("variance", "floor"), strict=True):
            points = [
                [fmean(tokens.values(f, pairing=name, H=H)) for H in sizes]
                for f in ("token_forwards", of)
            ]
            axis.plot(*points, "o-", color=scheme.hues[name])
            for H, x, y in zip(sizes, *points, strict=True):
                axis.annotate(H, (x, y), fontsize=7.5, xytext=(2, 4), textcoords="offset points")
    for axis, heading in zip(
        axes[1:], ("variance of S_suff", "S_suff of tokens\nthat change nothing"), strict=True
    ):
        axis.set(
            xscale="log" if tokens.rows else "linear",
            title=heading,
            xlabel="token positions run;\nnumbers: H",
        )
        axis.margins(y=0.12)
        axis.grid(alpha=0.3)
    axes[1].set_yscale("log" if tokens.rows else "linear")
    _legend(figure, axes[0], 2)
    return figure


def mask(tokens: Tokens, scheme: Scheme) -> Figure:
    """Claim 6: necessity by each mask against the truth, by class; and its agreement."""
    title = "A zeroed embedding finds what grounded objects do on average, and little else"
    looks = {"truth": (scheme.hues["truth"], "o"), "zero": (scheme.hues["COPO"], "o")}
    looks |= {way: (scheme.soft, mark) for way, mark in zip(MASKS[1:], "sD^", strict=True)}
    labels = {"truth": "never held (truth)", "zero": "zero embedding (paper)"}
    kinds = CLASSES[:-1]  # it is nearly always sure of a question repeated
    figure = _figure(scheme, title, 5.4)
    left, right = figure.subplots(2, 1, height_ratios=(2.6, 1))
    for k, (way, (color, mark)) in enumerate(looks.items()):
        column, of = ("truth", "zero") if way == "truth" else ("score", way)
        for y, kind in enumerate(kinds):
            values = tokens.values(column, **{"mask": of, "class": f"{kind}, open"})
            label = None if y else labels.get(way, way)
            _dot(left, y + 0.16 * (k - 2), values, color, mark, label=label)
        if way != "truth":
            values = tokens.values("correlation", **{"mask": way, "class": "open"})
            _dot(right, k - 1, values, color, mark)
    _rows(left, kinds, 13)
    _rows(right, MASKS)
    left.set_title("mean necessity of a token the policy was not sure of")
    right.set_title("correlation with the truth, within completions")
    for axis in (left, right):
        axis.axvline(0, color=scheme.soft, linewidth=0.9)
    _legend(figure, left, 2)
    return figure


def credit(tokens: Tokens, scheme: Scheme) -> Figure:
    """Claim 7: which of two objects earns more; and what tokens of each class earn, under both pairings."""
    title = "With coupled pairs, the hallucinated of two objects earns more, more often than not"
    scores = {"sufficiency": "S_suff", "necessity": "S_nec", "causal_reward": "causal reward"}
    figure = _figure(scheme, title, 7.6)
    axes = figure.subplot_mosaic(
        [["auc"], *([name] for name in scores)], height_ratios=(2, 3, 3, 3)
    )
    for pairing, shift in (("coupled", -0.13), ("independent", 0.13)):
        color = scheme.hues[pairing]
        for k, name in enumerate(scores):
            of = tokens.values(name, **{"pairing": pairing, "class": "auc"})
            _dot(axes["auc"], k + shift, of, color, label=None if k else f"{pairing} pairs")
            for y, kind in enumerate(CLASSES):
                values = tokens.values(name, **{"pairing": pairing, "class": kind})
                _dot(axes[name], y + shift, values, color)
    for name, heading in scores.items():
        _rows(axes[name], CLASSES, 14)
        axes[name].set_title(f"mean {heading}")
    _rows(axes["auc"], list(scores.values()))
    axes["auc"].axvline(0.5, color=scheme.ink, linewidth=0.9)
    axes["auc"].set_title("AUC: chance that the grounded object\nearns more (line: a half)")
    _legend(figure, axes["auc"], 2)
    return figure


def growth(costs: Costs, scheme: Scheme) -> Figure:
    """Token positions against T, H and G, on logarithmic axes."""
    title = "Token positions run, by T, H and G: sharing and coupling each save"
    panels = {
        "reasoning_tokens": ("T, reasoning tokens", (16, 32, 64, 128)),
        "num_continuations": ("H, continuations per set", (1, 2, 4, 8)),
        "num_generations": ("G, completions per prompt", (4, 8, 16)),
    }
    ways = {
        "(a) generate, by its formula": ("o-", scheme.soft),
        "(d) shared, independent": ("s-", scheme.hues["independent"]),
        "(e) shared, coupled": ("^-", scheme.hues["coupled"]),
        "necessity, shared": ("d--", scheme.ink),
    }
    figure = _figure(scheme, title, 6.2)
    axes = figure.subplots(3, 1, sharey=True)
    for axis, (name, (heading, values)) in zip(axes, panels.items(), strict=True):
        for way, (style, color) in ways.items():
            points = [
                costs.value(GROWTH, f"token_forwards, {name} {value}", way) for value in values
            ]
            axis.plot(values, points, style, color=color, label=way)
        axis.set(xscale="log", yscale="log", xlabel=heading)
        axis.set_xticks(values, [str(value) for value in values])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[1].set_ylabel("token positions run")
    _legend(figure, axes[0], 1)
    return figure


UNIT_MARKS = {  # beginning of a way's name -> its mark and its name in the legend
    "tokens": ("o", "tokens"), "words": ("s", "words"), "runs of 8": ("^", "runs of 8"),
    "runs of 16": ("v", "runs of 16"), "the": ("D", "the least sure"), "every": ("P", "every 4th or 8th"),
}  # fmt: skip


def asking(rows: Sequence[Mapping], scheme: Scheme) -> Figure:
    """A dot per way of asking: what it costs, and how well it tells words that matter from others."""
    title = "Long reasoning: brief questions serve necessity, not sufficiency"
    figure = _figure(scheme, title, 5.2)
    axes = figure.subplots(2, 2, sharex="col", sharey=True)
    for of_question, question in zip(axes, ("sufficiency", "necessity"), strict=True):
        for axis, policy in zip(of_question, ("short", "long"), strict=True):
            of = [
                r
                for r in rows
                if (r["question"], r["policy"]) == (question, policy) and r["auc"] != ""
            ]
            for way in dict.fromkeys(row["way"] for row in of):
                found = [row for row in of if row["way"] == way]
                x, y = (fmean(float(row[k]) for row in found) for k in ("per_grpo_step", "auc"))
                mark, unit = next(of for name, of in UNIT_MARKS.items() if way.startswith(name))
                brief = "brief" in way
                label = f"{unit}, brief" if brief else unit
                fill = "none" if brief else "full"
                axis.plot(x, y, mark, color=scheme.ink, fillstyle=fill, label=label, ms=5)
            axis.set_xscale("log")
            axis.set_xticks((0.5, 1, 2, 5, 10), ("0.5", "1", "2", "5", "10"))
            axis.minorticks_off()
            axis.axhline(0.5, color=scheme.soft, linewidth=0.8)
            axis.grid(alpha=0.3)
            axis.set_title(f"{question},\n{policy} reasoning")
        of_question[0].set_ylabel("AUC")
    for axis in axes[1]:
        axis.set_xlabel("token positions,\nin GRPO steps")
    _legend(figure, axes[0, 1], 2)
    return figure


SWEEPS = {  # of credit_map.csv: row of the figure -> the column that varies, and what the others are
    "prompts per step": ("prompts", {"length": 32, "share": 0.5, "rate": 0.1}),
    "words per completion, T": ("length", {"prompts": 1, "share": 0.5, "rate": 0.1}),
    "share of the places that decide": ("share", {"prompts": 1, "length": 32, "rate": 0.1}),
    "learning rate (T = 64)": ("rate", {"prompts": 1, "length": 64, "share": 0.5}),
    "learning rate (16 prompts)": ("rate", {"prompts": 16, "length": 32, "share": 0.5}),
}


def credit_map(rows: Sequence[Mapping], scheme: Scheme) -> Figure:
    """A row per setting, a column per measure, a line per method, with bands of 95 %."""
    title = (
        "COPO saves steps where prompts are few or right answers rare, and draws more words for it"
    )
    hues = scheme.hues
    looks = {
        "GRPO": ("o-", hues["GRPO"]), "GRPO, G = 16": ("s--", hues["GRPO"]),
        "COPO, λ = 0.35, H = 4": ("o-", hues["COPO"]), "COPO, λ = 1, H = 1": ("s--", hues["COPO"]),
        "exact change": ("^-", scheme.soft), "truth": ("o-", hues["truth"]),
    }  # fmt: skip
    measures = {
        "steps_ratio": ("steps", "steps to 90 %\nright, as a share\nof GRPO's"),
        "words_ratio": ("words", "words drawn\nuntil then, as a\nshare of GRPO's"),
        "wrong": ("wrong", "chance that an\nidle word is wrong\nthen (first 0.2)"),
    }
    figure = _figure(scheme, title, 8.2)
    axes = figure.subplots(len(SWEEPS), len(measures), sharex="row", sharey="col")
    for of_sweep, (heading, (column, fixed)) in zip(axes, SWEEPS.items(), strict=True):
        for name, (style, color) in looks.items():
            found = sorted((row for row in rows if row["method"] == name and row["optimizer"] == "Adam"
                            and all(float(row[k]) == v for k, v in fixed.items())),
                           key=lambda row: float(row[column]))  # fmt: skip
            for axis, (mean, (field, _)) in zip(of_sweep, measures.items(), strict=True):
                places, y, low, high = ([float(row[k] or "nan") for row in found] for k in
                                        (column, mean, f"{field}_low", f"{field}_high"))  # fmt: skip
                axis.plot(places, y, style, color=color, label=name, ms=2.5, linewidth=1)
                axis.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)
        of_sweep[1].set_xlabel(heading)
        of_sweep[0].set_xscale("linear" if column == "share" else "log")
        of_sweep[0].set_xticks(places, [f"{place:g}".removeprefix("0") for place in places])
    ticks = (0.1, 1, 10)
    axes[0, 1].set_yscale("log")
    axes[0, 1].set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    for axis, (_, heading) in zip(axes[0], measures.values(), strict=True):
        axis.set_title(heading)
    for axis in axes.flat:
        axis.minorticks_off()
        axis.grid(axis="y")
    _legend(figure, axes[0, 0], 2)
    return figure
