"""The tables of README.md, of experiments/README.md and of docs/models.md, from experiments/results/*.csv.

Cells are means over seeds with their 95 % interval; differences are of the same seed (statistics.py).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import numpy as np

from experiments.records import read_csv
from experiments.statistics import Difference, difference, holm, interval

# What the CSVs speak of; experiments.claims and experiments.tokens write them.
RHOS = ("0.125", "0.5", "0.7", "1.0")  # confounding of the training scenes, beside 0.9
CLASSES = ("grounded object", "hallucinated object", "attribute", "filler", "question repeated")
MASKS = ("zero", "hidden", "deleted", "second-best")

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
    ("counts", "counts right", False),
    ("counts_chair_s", "CHAIR_S of the reasoning", True),
    ("counts_recall", "recall of the reasoning", False),
)
HEADINGS = {figure: heading for figure, heading, _ in SHOWN}
CONFOUNDED = {  # confounding of the training scenes -> the arm of a method
    method: dict(sorted({"0.9": method, **{rho: f"{method}, rho {rho}" for rho in RHOS}}.items()))
    for method in ("grpo", "copo")
}
SENSITIVITY = {  # panel -> arm -> what is written below it
    "λ_s, λ_n": {
        "grpo": "0, 0",
        "without S_nec": "0.35, 0",
        "without S_suff": "0, 0.35",
        "copo": "0.35, 0.35",
        "lambda 0.0 1.0": "0, 1",
        "lambda 1.0 0.0": "1, 0",
        "lambda 0.35 1.0": "0.35, 1",
        "lambda 1.0 0.35": "1, 0.35",
        "lambda 1.0 1.0": "1, 1",
    },
    "H": {"H 1": "H = 1", "H 2": "H = 2", "copo": "H = 4", "H 8": "H = 8"},
    "β": {
        "beta 0.0": "β = 0",
        "beta 0.01": "β = 0.01",
        "copo": "β = 0.04",
        "beta 0.16": "β = 0.16",
    },
    "zero variance": {"copo": "keep", "zero variance gate": "gate", "zero variance drop": "drop"},
}


class Runs:
    """runs.csv, or another such file, by arm, step and setting."""

    def __init__(self, folder: Path, name: str = "runs"):
        self.rows, self.name = read_csv(folder / f"{name}.csv"), name

    def values(self, arm: str, step: int | None, setting: str, figure: str) -> dict[str, float]:
        """seed -> value; without a step, of the first checkpoint that took as long as 40 steps of COPO."""
        step = self.equal_time(arm) if step is None else step
        return {
            row["seed"]: float(row[figure])
            for row in self.rows
            if (row["arm"], row["step"], row["setting"]) == (arm, str(step), setting)
            and row[figure]
        }

    def steps(self, arm: str) -> list[int]:
        """The checkpoints at which an arm was measured."""
        return sorted({int(row["step"]) for row in self.rows if row["arm"] == arm})

    def equal_time(self, arm: str) -> int | None:
        """The first checkpoint that all seeds together took at least as long for as for 40 steps of COPO."""
        copo = self.values("copo", 40, "independent", "seconds")
        for step in self.steps(arm):
            took = self.values(arm, step, "independent", "seconds")
            if copo and took.keys() >= copo.keys() and sum(took[k] - copo[k] for k in copo) >= 0:
                return step
        return None

    def cell(self, arm: str, step: int | None, setting: str, figure: str) -> str:
        """Mean ± half interval, as text."""
        values = list(self.values(arm, step, setting, figure).values())
        if not values:
            return "-"
        scale = 1e6 if figure == "token_forwards" else 1
        mean, half = (x / scale for x in interval(values))
        digits = {"seconds": 0, "token_forwards": 2}.get(figure, 3)
        return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")

    def seeds(self, arm: str, step: int | None) -> int:
        """How many seeds an arm has."""
        return len(self.values(arm, step, "independent", "chair_s"))


class Tokens:
    """One of the CSVs of tokens.py."""

    def __init__(self, path: Path):
        self.rows = read_csv(path)
        self.name = path.stem

    def values(self, figure: str, **where: str) -> list[float]:
        """A figure of every seed, in the rows where the columns have these values."""
        return [
            float(row[figure])
            for row in self.rows
            if row[figure] and all(row[key] == str(value) for key, value in where.items())
        ]


# ---------------------------------------------------------------------------------------------
# The claims, one table each
# ---------------------------------------------------------------------------------------------
def markdown(head: Sequence[str], rows: Sequence[Sequence[str | Difference]]) -> str:
    """A table; the p of its differences are corrected for their number."""
    tests = [cell for row in rows for cell in row if isinstance(cell, Difference) and cell.n > 1]
    corrected = iter(holm([test.p for test in tests]))
    lines = [head, ["---"] * len(head)]
    for row in rows:
        lines.append(
            [
                cell._replace(p=next(corrected))
                if isinstance(cell, Difference) and cell.n > 1
                else cell
                for cell in row
            ]
        )
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def shortcut(runs: Runs) -> str:
    """Claim 1, assertion (i): GRPO before and after, reading images and reading descriptions."""
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
            ("grpo, no existence", "images, after GRPO, no existence questions", 40),
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


def confounding(runs: Runs) -> str:
    """Claim 2, assertion (ii): GRPO by the confounding of its training scenes; and COPO less GRPO."""
    figures, tested = (
        ("chair_s", "flip_rate", "pope_adversarial", "recall"),
        ("chair_s", "flip_rate"),
    )
    rows = []
    for rho, arm in CONFOUNDED["grpo"].items():
        cells = [runs.cell(arm, 40, "independent", figure) for figure in figures]
        for a, b in ((arm, "grpo"), (CONFOUNDED["copo"][rho], arm)):
            for f in tested:
                pair = (runs.values(x, 40, "independent", f) for x in (a, b))
                cells.append("" if a == b else difference(*pair))
        rows.append([rho, str(runs.seeds(arm, 40)), *cells])
    slopes = {figure: slopes_on_rho(runs, "grpo", figure) for figure in figures}
    cells = [difference(of_seed, dict.fromkeys(of_seed, 0.0)) for of_seed in slopes.values()]
    less = [difference(slopes_on_rho(runs, "copo", f), slopes[f]) for f in tested]
    rows.append(["slope", str(len(slopes["chair_s"])), *cells, "", "", *less])
    heads = [HEADINGS[f] for f in figures]
    heads += [
        f"{HEADINGS[f]}{what}"
        for what in (", less confounding 0.9", ", COPO less GRPO")
        for f in tested
    ]
    return markdown(["confounding", "seeds", *heads], rows)


def slopes_on_rho(runs: Runs, method: str, figure: str) -> dict[str, float]:
    """seed -> slope of the line through a method's runs at every confounding, least squares."""
    found = {
        rho: runs.values(arm, 40, "independent", figure) for rho, arm in CONFOUNDED[method].items()
    }
    rhos = [float(rho) for rho in found]
    seeds = set.intersection(*(set(of_rho) for of_rho in found.values()))
    return {s: float(np.polyfit(rhos, [found[r][s] for r in found], 1)[0]) for s in sorted(seeds)}


class Remedy(NamedTuple):
    """A line of claim 3: an arm after some steps, and the arm that it is compared with, if any."""

    arm: str
    name: str
    step: int | None = 40  # None: in the time of 40 steps of COPO
    grpo: str | None = None
    than: int | None = None  # the step of that one, where it is another


REMEDIES = (  # in fog and in clear air, asked all kinds of questions
    Remedy("warm start", "warm start", 0),
    Remedy("grpo", "GRPO, 20 steps", 20),
    Remedy("grpo", "GRPO"),
    Remedy("grpo", "GRPO, 80 steps", 80),
    Remedy("grpo", "GRPO, COPO's time", None),
    Remedy("copo", "COPO, 20 steps", 20),
    Remedy("copo", "COPO"),
    Remedy("copo", "COPO, 80 steps", 80),
    Remedy("without S_suff", "COPO without S_suff"),
    Remedy("without S_nec", "COPO without S_nec"),
    Remedy("independent", "COPO, independent pairs"),
    Remedy("centred", "COPO, centred"),
    Remedy("signed", "COPO, signed"),
    Remedy("difference", "COPO, difference"),
    Remedy("second best", "COPO, second best"),
    Remedy("second best, lambda 1", "COPO, second best, λ = 1"),
    Remedy("truth", "the truth as credit"),
    Remedy("grpo, questions", "GRPO, no captions"),
    Remedy("copo, questions", "COPO, no captions"),
    Remedy("second best, lambda 1, questions", "COPO, second best, λ = 1, no captions"),
    Remedy("grpo, clear", "GRPO, clear air"),
    Remedy("copo, clear", "COPO, clear air"),
)
METHODS = {"grpo": "GRPO", "copo": "COPO", "truth": "the truth as credit"}
COLOURS = {  # weight of the KL -> method -> its arm, on questions of colour alone
    beta: {
        method: f"{method}, colours{'' if beta == '0.04' else f', beta {beta}'}"
        for method in METHODS
    }
    for beta in ("0", "0.01", "0.04")
}
COUNTED = {  # arms of the crowded world: what they are called
    "grpo": "GRPO",
    "grpo, G 16": "GRPO, G = 16",
    "copo": "COPO",
    "copo, lambda 1": "COPO, λ = 1",
    "copo, independent": "COPO, independent pairs",
    "without S_suff": "COPO without S_suff",
    "without S_nec": "COPO without S_nec",
    "difference, lambda 1": "COPO, difference, λ = 1",
    "truth": "the truth as credit",
}
CREDITS = {  # credits that ask for no truth
    "agreement": "agreement within the group",
    "contrast": "agreement, less other images",
    "voted": "a vote of the frozen warm start",
    "voted, lambda 0.35": "the vote, λ = 0.35",
    "truth, lambda 0.35": "the truth, λ = 0.35",
    "asked": "the frozen warm start asked about each thing",
    "unmoved": "the word's hold on the background",
}
FEW = ("grpo", "grpo, G 16", "copo", "copo, lambda 1", "truth")  # at one and two prompts per step
CROWDED = ("counts", "counts_chair_s", "counts_recall", "chair_s", "pope_adversarial", "flip_rate")


def counted(method: str, beta: str) -> str:
    """The arm of a method where the count alone is asked for."""
    return f"{method}, counting, beta {beta}"


def colours(runs: Runs) -> str:
    """Questions of colour alone, by the weight of the KL: each less GRPO, and GRPO less itself elsewhere."""
    rows = [
        Remedy(arms[method], f"β = {beta}, {name}", 80, arms["grpo"] if method != "grpo" else None)
        for beta, arms in COLOURS.items()
        for method, name in METHODS.items()
    ]
    default = COLOURS["0.04"]["grpo"]
    rows += [
        Remedy(COLOURS[beta]["grpo"], f"β = {beta}, GRPO, less β = 0.04", 80, default)
        for beta in ("0", "0.01")
    ]
    rows.append(Remedy(default, "β = 0.04, GRPO, less its own 20 steps", 80, default, 20))
    rows = [Remedy("warm start, clear", "warm start", 0), *rows]
    return compared(runs, rows, ("chair_s", "recall"), ("chair_s", "recall", "flip_rate"))


def against_grpo() -> list[Remedy]:
    """REMEDIES, each beside GRPO asked the same kinds of questions, after as many steps."""
    rows = []
    for row in REMEDIES:
        of_kind = row.arm.partition(", ")[2]
        grpo = f"grpo, {of_kind}" if of_kind in ("questions", "clear") else "grpo"
        if row.arm.endswith(", questions"):
            grpo = "grpo, questions"
        compare = row.step and row.arm != grpo and not row.arm.startswith("warm start")
        rows.append(row._replace(grpo=grpo) if compare else row)
    return rows


def in_fog(runs: Runs) -> str:
    """All kinds of questions, in fog and in clear air: each arm less GRPO after as many steps."""
    rows = against_grpo()
    return compared(runs, rows, ("chair_s", "recall", "flip_rate"), ("chair_s", "recall"))


def harm(runs: Runs) -> str:
    """How many uncorrected tests tell COPO's forms from GRPO in fog and in clear air, and which way."""
    figures = ("chair_s", "recall", "flip_rate", "pope_adversarial")
    less_is_better = {figure: better for figure, _, better in SHOWN}
    forms = [row for row in against_grpo() if row.grpo and row.arm != "truth"]
    told, worse = [], 0
    for form in forms:
        for figure in figures:
            values = (
                runs.values(arm, form.step, "independent", figure) for arm in (form.arm, form.grpo)
            )
            found = difference(*values)
            if found.p < 0.05:
                told.append((form.grpo, form.step))
                worse += (found.mean > 0) == less_is_better[figure]
    tests = len(forms) * len(figures)
    shared = max((told.count(baseline) for baseline in told), default=0)
    return (
        f"In fog and clear air there are {tests} tests of COPO against GRPO on independent scenes: of "
        f"{len(forms)} forms and lengths, by CHAIR_S, recall, flip rate and adversarial POPE. Before "
        f"correction {len(told)} have p < 0.05, where chance would give {tests / 20:.1f}; {worse} of them "
        f"are to COPO's disadvantage. {shared} share one baseline, and so are not independent evidence."
    )


def counting(runs: Runs) -> str:
    """The crowded world, asked for the count alone: each arm less GRPO, on the same seeds."""
    rows = [Remedy("warm start, crowded", "warm start", 0)]
    for beta in ("0", "0.04"):
        grpo = counted("grpo", beta)
        rows += [
            Remedy(
                counted(method, beta), f"β = {beta}, {name}", 80, None if method == "grpo" else grpo
            )
            for method, name in COUNTED.items()
        ]
        rows += [
            Remedy(counted(method, beta), f"β = {beta}, {COUNTED[method]}, 40 steps", 40, grpo, 80)
            for method in ("grpo, G 16", "copo")
        ]
    return compared(runs, rows, ("token_forwards", *CROWDED), ("counts_chair_s", "counts"))


def bred(runs: Runs) -> str:
    """What an outcome reward breeds: GRPO in the crowded world, less the warm start of each seed."""
    rows = [Remedy("warm start, crowded", "warm start", 0)]
    rows += [
        Remedy(counted("grpo", beta), f"β = {beta}, {step} steps", step, "warm start, crowded", 0)
        for beta in ("0", "0.04")
        for step in (40, 80)
    ]
    less = ("counts_chair_s", "counts", "chair_s", "flip_rate")
    return compared(runs, rows, CROWDED, less, "warm start")


def credits(runs: Runs) -> str:
    """Credits without the truth, less GRPO; and how much of the gap to the truth they close."""
    rows, grpo = [], counted("grpo", "0")
    for method, name in (COUNTED | CREDITS).items():
        if method in ("grpo", "copo", "truth", *CREDITS):
            than = None if method == "grpo" else grpo
            rows.append(Remedy(counted(method, "0"), name, 80, than))
    shares = [gap_closed(runs, row.arm) for row in rows]
    closed = ["-" if math.isnan(share) else f"{share:.2f}" for share in shares]
    figures = ("token_forwards", "counts", "counts_chair_s", "counts_recall", "chair_s", "recall")
    return compared(runs, rows, figures, ("counts_chair_s", "counts"), more={"gap closed": closed})


def gap_closed(runs: Runs, arm: str) -> float:
    """(GRPO - arm) / (GRPO - truth) in mean CHAIR_S of the reasoning, over the seeds that all have."""
    found = [
        runs.values(name, 80, "independent", "counts_chair_s")
        for name in (counted("grpo", "0"), arm, counted("truth", "0"))
    ]
    seeds = set.intersection(*map(set, found))
    if not seeds:
        return math.nan
    grpo, own, truth = (fmean(of[seed] for seed in seeds) for of in found)
    return (grpo - own) / (grpo - truth) if grpo != truth else math.nan


def few(runs: Runs) -> str:
    """One, two and four prompts per step in the crowded world, β = 0: each arm less GRPO."""
    rows = []
    for B in (1, 2, 4):
        arm = {method: f"{method}, counting, {f'B {B}' if B < 4 else 'beta 0'}" for method in FEW}
        rows += [
            Remedy(arm[m], f"B = {B}, {COUNTED[m]}", 80, None if m == "grpo" else arm["grpo"])
            for m in FEW
        ]
    return compared(runs, rows, ("token_forwards", "counts", "counts_chair_s"), ("counts",))


def levels(rows: list[dict]) -> str:
    """levels.csv: in how many steps and token positions training reached a level; medians over seeds."""
    found = sorted({row["level"] for row in rows}, key=float)
    lines = []
    for name in dict.fromkeys(row["arm"] for row in rows):
        method, _, prompts = name.partition(", counting, ")
        line = [f"{prompts.replace('B ', 'B = ').replace('beta 0', 'B = 4')}, {COUNTED[method]}"]
        for level in found:
            of = [row for row in rows if (row["arm"], row["level"]) == (name, level)]
            steps, positions = (
                median(float(row[figure] or "inf") for row in of)
                for figure in ("step", "token_forwards")
            )
            there = sum(bool(row["step"]) for row in of)
            line += [f"{there} of {len(of)}"]
            line += ["", ""] if steps == math.inf else [f"{steps:.0f}", f"{positions / 1000:,.0f}"]
        lines.append(line)
    heads = [
        f"{what} {level}"
        for level in found
        for what in ("reach", "steps to", "thousand positions to")
    ]
    return markdown(["counting, β = 0", *heads], lines)


PLANNED = (  # question, what is compared, figure, arm, its step, the arm it is compared with, its step
    ("A", "colours: GRPO at β = 0, less at β = 0.04", "chair_s",
     "grpo, colours, beta 0", 80, "grpo, colours", 80),
    ("A", "colours, β = 0: the truth, less GRPO", "chair_s",
     "truth, colours, beta 0", 80, "grpo, colours, beta 0", 80),
    ("B", "counting, β = 0: COPO, less GRPO", "counts_chair_s",
     "copo, counting, beta 0", 80, "grpo, counting, beta 0", 80),
    ("B", "counting, β = 0: GRPO, less its warm start", "counts_chair_s",
     "grpo, counting, beta 0", 80, "warm start, crowded", 0),
    ("B", "counting, β = 0: GRPO, less its warm start", "counts",
     "grpo, counting, beta 0", 80, "warm start, crowded", 0),
    ("C", "counting, one prompt per step: COPO, less GRPO", "counts",
     "copo, counting, B 1", 80, "grpo, counting, B 1", 80),
)  # fmt: skip


def planned(runs: Runs) -> str:
    """The main comparisons of PLAN.md, corrected together."""
    rows = []
    for question, what, figure, *arms in PLANNED:
        pair = [runs.values(arm, step, "independent", figure) for arm, step in (arms[:2], arms[2:])]
        rows.append(
            [
                question,
                what,
                HEADINGS[figure],
                str(len(set(pair[0]) & set(pair[1]))),
                difference(*pair),
            ]
        )
    return markdown(["", "main comparison", "figure", "seeds", "difference"], rows)


ADDED = ("5", "6", "7", "8", "9")  # seeds run after the first five had been seen


def again(runs: Runs) -> str:
    """COPO and the vote in crowds, by the added seeds alone, by which nothing was chosen."""
    rows = []
    for name, arm in {"COPO": "copo", "the vote, λ = 0.35": "voted, lambda 0.35"}.items():
        cells = []
        for figure in ("counts_chair_s", "counts"):
            pair = [
                {seed: value for seed, value in found.items() if seed in ADDED}
                for found in (
                    runs.values(f"{of}, counting, beta 0", 80, "independent", figure)
                    for of in (arm, "grpo")
                )
            ]
            found = difference(*pair)
            cells.append(found if figure == "counts_chair_s" else found.untested())
        rows.append([name, *cells])
    heads = [f"{HEADINGS[figure]}, less GRPO" for figure in ("counts_chair_s", "counts")]
    return markdown(["seeds 5 to 9", *heads], rows)


def repeated(runs: Runs, anew: Runs) -> str:
    """COPO in crowds at β = 0, made once and again beside GRPO; the planned difference is tested."""
    rows = []
    for B, arm in ((4, "beta 0"), (2, "B 2"), (1, "B 1")):
        cells = [
            of.cell(f"copo, counting, {arm}", 80, "independent", "token_forwards")
            for of in (runs, anew)
        ]
        for figure in ("counts_chair_s", "counts"):
            then, now, grpo = (
                of.values(f"{method}, counting, {arm}", 80, "independent", figure)
                for of, method in ((runs, "copo"), (anew, "copo"), (runs, "grpo"))
            )
            both = {seed: (then[seed] + now[seed]) / 2 for seed in then if seed in now}
            planned = B == 4 and figure == "counts_chair_s"
            found = [difference(of, grpo) for of in (then, now, both)]
            cells += [
                found[0].untested(),
                found[1] if planned else found[1].untested(),
                found[2].untested(),
            ]
        rows.append([f"B = {B}", str(anew.seeds(f"copo, counting, {arm}", 80)), *cells])
    heads = [f"{HEADINGS[figure]}, less GRPO" for figure in ("counts_chair_s", "counts")]
    heads = [f"{head}, {which}" for head in heads for which in ("once", "again", "mean")]
    return markdown(["COPO", "seeds", "million token positions, once", "again", *heads], rows)


def compared(
    runs: Runs,
    rows: Sequence[Remedy],
    figures: Sequence[str],
    less: Sequence[str],
    than: str = "GRPO",
    more: dict[str, list[str]] | None = None,
) -> str:
    """Arms after so many steps on independent scenes, and each less the arm that it is compared with.

    less: figures of these differences; the first is tested, of the others the interval alone is given.
    """
    lines = []
    for i, row in enumerate(rows):
        if not runs.seeds(row.arm, row.step):
            continue  # not run yet
        cells = [runs.cell(row.arm, row.step, "independent", figure) for figure in figures]
        for figure in less:
            pair = (
                runs.values(arm, step, "independent", figure)
                for arm, step in (
                    (row.arm, row.step),
                    (row.grpo, row.step if row.than is None else row.than),
                )
            )
            found = difference(*pair)
            tested = found if figure == less[0] else found.untested()
            cells.append(tested if row.grpo else "")
        cells += [column[i] for column in (more or {}).values()]
        lines.append([row.name, str(runs.seeds(row.arm, row.step)), *cells])
    names = HEADINGS | {"token_forwards": "million token positions"}
    heads = [*(names[f] for f in figures), *(f"{names[f]}, less {than}" for f in less)]
    return markdown(["independent scenes", "seeds", *heads, *(more or {})], lines)


def sensitivity(runs: Runs) -> str:
    """Claim 4: one setting changed at a time, on independent scenes, less the default on the same seeds."""
    figures = ("chair_s", "recall", "pope_adversarial", "flip_rate")
    rows = []
    for group in SENSITIVITY.values():
        for arm, name in group.items():
            found, default = (
                [runs.values(a, 40, "independent", figure) for figure in figures]
                for a in (arm, "copo")
            )
            less = [
                "" if arm == "copo" else difference(*pair)
                for pair in zip(found, default, strict=True)
            ]
            rows.append(
                [name, str(len(found[0])), runs.cell(arm, 40, "independent", "chair_s"), *less]
            )
    heads = [f"{HEADINGS[figure]}, less the default" for figure in figures]
    return markdown(["", "seeds", "CHAIR_S", *heads], rows)


def estimator(tokens: Tokens) -> str:
    """Equation 2 as it is estimated, by pairing and H."""
    heads = {
        "floor": "tokens that change nothing",
        "above_floor": "the others",
        "mean": "all",
        "expected": "its expectation",
        "variance": "variance",
        "correlation_with_lower_bound": "correlation with max(0, p_t − p_(t−1))",
        "token_forwards": "token positions",
    }
    rows = [
        [pairing, H, *(_mean(tokens.values(f, pairing=pairing, H=H)) for f in heads)]
        for pairing in ("independent", "coupled")
        for H in ("1", "2", "4", "8")
    ]
    still, lower = (_mean(tokens.values(f, pairing="coupled", H="4")) for f in ("still", "lower"))
    rows.append(["share of the tokens", "", still, "", "", "", "", "", ""])
    rows.append(["max(0, p_t − p_(t−1))", "", "", "", lower, "", "", "", ""])
    return markdown(["pairing", "H", *heads.values()], rows)


def mask(tokens: Tokens) -> str:
    """What each way to take a token away finds, by class, against never having held it."""

    def cells(kind: str, figure: str) -> list[str]:
        return [_mean(tokens.values(figure, **{"mask": mask, "class": kind})) for mask in MASKS]

    kinds = {"all": "all tokens", "open": "those the policy was not sure of"}
    kinds |= {f"{kind}, open": f"{kind}" for kind in CLASSES}
    rows = [
        [name, _mean(tokens.values("n", **{"mask": "zero", "class": kind}), 0),
         cells(kind, "truth")[0], *cells(kind, "score")]
        for kind, name in kinds.items()
    ]  # fmt: skip
    rows += [
        [f"{name}, not sure", "", "", *cells("open", figure)]
        for figure, name in (("error", "error (rms)"), ("correlation", "correlation"))
    ]
    return markdown(["token", "per seed", "truth: never held", *MASKS], rows)


def credit(tokens: Tokens) -> str:
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


def _mean(values: Sequence[float], digits: int = 3) -> str:
    if not values:
        return "-"
    mean, half = interval(values)
    if abs(mean) >= 100 or not digits:
        return f"{mean:,.0f}"
    return f"{mean:.3f}" + ("" if math.isnan(half) else f" ± {half:.3f}")


# ---------------------------------------------------------------------------------------------
# Cost, memory, the first run, what the paper reports
# ---------------------------------------------------------------------------------------------
class Costs:
    """cost.csv, what experiments.cost measured."""

    def __init__(self, path: Path):
        self.rows = read_csv(path)

    def value(self, command: str, figure: str, way: str = "") -> float:
        """One figure of a command (its words after the program); NaN where it was not measured."""
        key = (command, figure, way)
        found = [
            row["value"]
            for row in self.rows
            if (row["command"].partition(" ")[2], row["figure"], row["way"]) == key
        ]
        return float(found[0]) if found else math.nan


STAGES = ("rollout", "score", "update", "step")
GROWTH = "growth --temperature 0.12"
TRAINED = "interventions --model runs/first/checkpoint"
WAYS = (  # way, what it is called
    ("(a) generate a continuation", "(a) `generate` per continuation"),
    ("(b) generate a set", "(b) `generate` per set"),
    ("(c) copied cache", "(c) copied prefix cache"),
    ("(d) shared, independent", "(d) shared prefix, independent pairing"),
    ("(e) shared, coupled", "**(e) shared prefix, coupled pairing**"),
    ("necessity: generate a token", "necessity: `generate` per masked token"),
    ("necessity: copied cache", "necessity: copied prefix cache"),
    ("necessity: shared", "**necessity: shared prefix**"),
)


def ways(costs: Costs) -> str:
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


def shapes(costs: Costs) -> str:
    """The same on random weights, for one trajectory and for eight."""
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


def step(costs: Costs) -> str:
    """A whole step of COPO and of GRPO, and the update on the shared prompt."""
    step, update = (
        "step --model runs/first/checkpoint --repeats 20",
        "update --shape mid --prompt-tokens 400",
    )
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


def growth(costs: Costs) -> str:
    """The caption of figures/growth.png."""
    p = costs.value(GROWTH, "mean_probability")
    return (
        f"*A random decoder at a temperature at which its tokens have a mean probability of {p:.2f}; "
        "P = 256, A = 6; otherwise T = 32, H = 4, G = 8.*"
    )


LONG = "long --temperature 0.11"
LENGTHS = (16, 32, 64, 128, 256, 512, 1024)


def long(costs: Costs) -> str:
    """What the default asks of reasoning of T tokens, in GRPO steps, beside the paper's questions."""
    rows = []
    for T in LENGTHS:
        figures = ("mean_probability", "grpo_forwards", "exact_over_grpo", "default_over_grpo",
                   "rollout_kv_megabytes", "default_kv_megabytes")  # fmt: skip
        p, grpo, exact, default, held, asked = (costs.value(LONG, f, f"T = {T}") for f in figures)
        cells = [
            f"{p:.2f}",
            f"{grpo:,.0f}",
            f"{exact:.1f}",
            f"{default:.1f}",
            f"{held:.1f} MB",
            f"{asked:.1f} MB",
        ]
        rows.append([str(T), *cells])
    heads = [
        "mean probability of a token",
        "GRPO step, token positions",
        "the paper's questions, in GRPO steps",
        "the default, in GRPO steps",
    ]
    return markdown(["T", *heads, "KV of the rollouts", "KV at most, scoring"], rows)


def number(value: float, form: str, unit: str = "") -> str:
    """A cell of a table, empty for what was not measured."""
    return "" if math.isnan(value) else f"{value:{form}}{unit}"


ON_CARD = ("--exact", "--reasoning-tokens 512 --repeats 2")  # T = 128, the default, and 512


def card(costs: Costs) -> str:
    """card.csv: a decoder of a real size on one card, by length of reasoning."""
    exact, lines = "score, the paper's questions", []
    for T, command in zip((128, 512), ON_CARD, strict=True):

        def figure(stage: str, name: str, command: str = command) -> float:
            return costs.value(command, name, stage)

        def seconds(stage: str, figure=figure) -> str:
            took, steps = (figure(stage, name) for name in ("step_seconds", "in_grpo_steps"))
            return "" if math.isnan(took) else f"{took:.2f} s ({steps:.2f})"

        slower = figure("rollout", "step_seconds") / figure("rollout", "floor_seconds")
        peak, guess = (figure("update", f"{name}_gigabytes") for name in ("peak", "estimated"))
        lines.append([
            str(T), number(figure("", "mean_probability"), ".2f"),
            number(figure("rollout", "step_seconds"), ".1f", " s"), number(slower, ".0f"),
            number(figure("update", "step_seconds"), ".2f", " s"), seconds("score"), seconds(exact),
            number(peak, ".1f", " GB"), number(guess, ".1f", " GB"), number(figure("", "flipped"), ".3f"),
        ])  # fmt: skip
    heads = ["T", "mean probability", "rollout", "times its floor", "update", "default score (GRPO steps)",
             "the paper's questions"]  # fmt: skip
    return markdown([*heads, "update, peak", "estimated", "draws that flip"], lines)


ASKED = {  # the ways of asking.csv that the table shows
    "sufficiency": (
        "tokens, H 4", "words, H 4", "the 8 least sure, H 4", "every 8th, H 4", "runs of 8, H 4",
        "words, brief, H 4", "runs of 8, brief, H 4", "runs of 16, brief, H 4", "runs of 8, brief, H 1",
    ),
    "necessity": (
        "tokens", "words", "the 8 least sure", "every 8th", "runs of 8", "words, brief", "runs of 8, brief",
        "runs of 16, brief",
    ),
}  # fmt: skip


def asking(rows: list[dict]) -> str:
    """Ways of asking: what they cost in GRPO steps, and how they agree with the truth."""
    lines = []
    for question, ways_ in ASKED.items():
        for way in ways_:
            cells = []
            for policy in ("short", "long"):
                of = [
                    r
                    for r in rows
                    if (r["policy"], r["question"], r["way"]) == (policy, question, way)
                ]
                for figure, digits in (("per_grpo_step", 1), ("correlation", 2), ("auc", 2)):
                    values = [float(row[figure]) for row in of if row[figure] != ""]
                    mean, half = interval(values) if values else (math.nan, math.nan)
                    spread = (
                        ""
                        if math.isnan(half) or figure == "per_grpo_step"
                        else f" ± {half:.{digits}f}"
                    )
                    cells.append(f"{mean:.{digits}f}{spread}")
            lines.append([f"{question}: {way}", *cells])
    heads = [
        f"{name}, {policy}"
        for policy in ("short", "long")
        for name in ("GRPO steps", "correlation", "AUC")
    ]
    return markdown(["asked", *heads], lines)


def memory(rows: list[dict]) -> str:
    """What training takes, by model, G, completion length and what is trained."""
    heads = {
        "model": "model", "generations": "G", "tokens": "tokens per completion", "trained": "trained",
        "stays_gb": "weights and optimiser", "peak_gb": "peak",
    }  # fmt: skip
    cells = [
        [f"{row[key]} GB" if key.endswith("_gb") else row[key] for key in heads] for row in rows
    ]
    return markdown(list(heads.values()), cells)


FIRST = {  # column of first.csv -> its heading
    "warm_start": "warm start",
    "grpo": "GRPO",
    "copo": "COPO",
}


OF_EVALUATION = {  # figure of an evaluation -> how the tables call it
    "accuracy": "accuracy",
    "POPE F1, adversarial": "POPE F1, adversarial",
    "CHAIR_S  (lower is better)": "CHAIR_S (lower is better)",
    "caption recall": "caption recall",
    "flip rate under do(L_s)  (lower is better)": "flip rate (lower is better)",
}


def side_by_side(rows: list[dict]) -> tuple[str, list[list[str]]]:
    """Warm start, GRPO and COPO on independent scenes, means over seeds: what it is of, and lines."""
    (title,) = {row["scenes"] for row in rows if row["scenes"].startswith("independent")}
    lines = []
    for figure, name in OF_EVALUATION.items():
        of_seeds = [row for row in rows if (row["scenes"], row["figure"]) == (title, figure)]
        means = [fmean(float(row[column]) for row in of_seeds) for column in FIRST]
        lines.append([name, *(f"{mean:.3f}" for mean in means)])
    seeds = len({row["seed"] for row in rows})
    return f"{title[:-1]}; seeds: {seeds})", lines


def real(rows: list[dict]) -> str:
    """GRPO and COPO from a published language model; seconds of a step: medians, then means over seeds."""
    title, lines = side_by_side(rows)

    def means(figure: str) -> list[float]:
        of_seeds = [row for row in rows if row["figure"] == figure]
        return [fmean(float(row[name]) for row in of_seeds) for name in ("grpo", "copo")]

    figures = [f"seconds per step: {stage}" for stage in ("rollout", "score", "update")]
    grpo, copo = map(sum, zip(*map(means, figures), strict=True))
    for figure in (*figures, "hours of training"):
        lines.append([figure, "", *(f"{x:.1f}" for x in means(figure))])
    lines.append(["a step, in GRPO steps", "", "1", f"{copo / grpo:.2f}"])
    return markdown([title, *FIRST.values()], lines)


def first(rows: list[dict]) -> str:
    """What `python train.py` does to the model, beside GRPO: means over seeds; and how long seed 0 took."""
    title, lines = side_by_side(rows)
    seconds = next(row for row in rows if (row["figure"], str(row["seed"])) == ("seconds", "0"))
    minutes = (f"{float(seconds[c]) / 60:.1f}" if seconds[c] else "" for c in FIRST)
    lines.append(["minutes, seed 0 (COPO: with the warm start)", *minutes])
    return markdown([title, *FIRST.values()], lines)


def first_seeds(rows: list[dict]) -> str:
    """The default run seed by seed, on independent scenes."""
    figures = {
        "accuracy": "accuracy",
        "CHAIR_S  (lower is better)": "CHAIR_S",
        "caption recall": "recall",
    }
    heads = [f"{FIRST[c]}, {name}" for name in figures.values() for c in FIRST]
    lines = []
    for seed in sorted({row["seed"] for row in rows}):
        found = {
            row["figure"]: row
            for row in rows
            if row["seed"] == seed and row["scenes"].startswith("independent")
        }
        lines.append([str(seed), *(found[figure][c] for figure in figures for c in FIRST)])
    return markdown(["seed", *heads], lines)


def reported(rows: list[dict]) -> str:
    """What the paper reports."""
    heads = {
        "model": "model",
        "method": "",
        "chair_s": "CHAIR_S",
        "chair_i": "CHAIR_I",
        "pope_f1": "POPE F1",
    }
    return markdown(list(heads.values()), [[row[key] or "–" for key in heads] for row in rows])


def total(runs: Runs) -> str:
    """How many trainings there are, and what they take on two cores."""
    last: dict[tuple[str, str], float] = {}
    timed = {}
    for row in runs.rows:
        if row["step"] != "0":
            key = row["arm"], row["seed"]
            last[key] = max(last.get(key, 0.0), float(row["seconds"]))
            timed[(*key, row["step"])] = row["measuring_seconds"]
    known = [float(seconds) for seconds in timed.values() if seconds]
    measuring = fmean(known) if known else 0.0
    hours = (sum(last.values()) + len(timed) * measuring) / 3600
    return (
        f"{len(last)} trainings; {sum(last.values()) / 3600:.1f} hours of training in all, each on one core; "
        f"{measuring:.0f} seconds to measure each of {len(timed)} checkpoints (timed for {len(known)}): "
        f"{hours / 2:.1f} hours on two cores. Single tokens and the first run come on top."
    )
