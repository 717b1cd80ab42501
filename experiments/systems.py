"""The systems of baselines.csv by name, and their tables on the results page, one per world.

Trained systems take as many steps as GRPO and COPO, whose rows are in runs.csv: in fog 40, on 16 prompts of 8
completions or on 16 pairs; in crowds 80, on 4. What is decoded is the warm start itself.
"""

from dataclasses import dataclass
from pathlib import Path

from experiments.records import read_csv
from experiments.statistics import difference, interval

DECODED = (  # the system, its forwards of one row per token
    ("greedy", "1"),
    ("sample", "1"),
    ("beam", "5"),
    ("vcd", "2"),
    ("vcd, alpha 0", "2"),
    ("dola", "1"),
    ("dola's penalty alone", "1"),
    ("deco", "1"),
    ("deco, alpha 0", "1"),
    ("opera", "30"),
    ("opera, alpha 0", "30"),
)
PAIRED = (
    "hadpo",
    "chair",
    "povid",
    "csr-pull",
    "csr-oracle",
)  # at GRPO's rate of learning, and at a tenth
TRAINED = (
    "grpo", "copo", "truth", *(f"{name}{rate}" for name in PAIRED for rate in ("", ", rate 1e-5")),
    "hadpo, chosen alone", "povid, chosen alone",
)  # fmt: skip
NAMES = {
    "sample": "sampling, T = 1",
    "beam": "beam search, 5",
    "vcd": "VCD, T = 1",
    "vcd, alpha 0": "its control: α = 0",
    "dola": "DoLa",
    "dola's penalty alone": "its control: the penalty alone",
    "deco": "DeCo",
    "deco, alpha 0": "its control: α = 0",
    "opera": "OPERA",
    "opera, alpha 0": "OPERA's control: α = 0, no steps back",
    "grpo": "GRPO",
    "copo": "COPO",
    "truth": "the truth as credit",
    "hadpo": "HA-DPO, stand-in",
    "chair": "CHAIR-DPO",
    "povid": "POVID, stand-in",
    "csr-pull": "CSR-pull",
    "csr-oracle": "CSR-oracle (the truth judges)",
    "hadpo, chosen alone": "HA-DPO's control: the chosen texts alone",
    "povid, chosen alone": "POVID's control: the chosen texts alone",
}
NAMES |= {f"{name}, rate 1e-5": f"{NAMES[name]}, rate 1e-5" for name in PAIRED}
FIGURES = (
    "chair_s", "chair_i", "recall", "length", "pope_adversarial", "yes_ratio_adversarial", "flip_rate",
)  # fmt: skip
COUNTING = ("counts", "counts_chair_s")  # where counting is what breeds hallucination
HEADS = {  # of columns in baselines.csv
    "chair_s": "CHAIR_S",
    "chair_i": "CHAIR_I",
    "recall": "recall",
    "length": "words",
    "pope_adversarial": "POPE adv.",
    "yes_ratio_adversarial": "yes-ratio adv.",
    "flip_rate": "flip rate",
    "counts": "right counts",
    "counts_chair_s": "CHAIR_S, counting",
}
SCENES = 150


@dataclass(frozen=True)
class World:
    """A world's table.  main: the one system whose comparison with COPO was fixed before the runs.

    runs: system -> its arm and step in runs.csv.
    """

    title: str
    main: str
    figures: tuple[str, ...]
    runs: dict[str, tuple[str, str]]


WORLDS = {
    "fog": World(
        "independent scenes in fog",
        "hadpo",
        FIGURES,
        {"greedy": ("warm start", "0")}
        | {name: (name, "40") for name in ("grpo", "copo", "truth")},
    ),
    "crowds": World(
        "independent crowded scenes",
        "hadpo, rate 1e-5",
        FIGURES + COUNTING,
        {"greedy": ("warm start, crowded", "0")}
        | {name: (f"{name}, counting, beta 0.04", "80") for name in ("grpo", "copo", "truth")},
    ),
}


def committed(runs: list[dict], world: str, starts: set[str]) -> list[dict]:
    """Rows of runs.csv that began at these weights, as rows of baselines.csv."""
    system_of = {run: system for system, run in WORLDS[world].runs.items()}
    return [
        row | {"system": system_of[row["arm"], row["step"]], "scenes": str(SCENES)}
        for row in runs
        if (row["arm"], row["step"]) in system_of
        and row["setting"] == "independent"
        and row["start"] in starts
    ]


def table(folder: Path, world: str) -> str:
    """Every system that was run in a world, in the order above; differences are of the same seed."""
    rows = [row for row in read_csv(folder / "baselines.csv") if row["world"] == world]
    where, starts = WORLDS[world], {row["start"] for row in rows}
    rows = committed(read_csv(folder / "runs.csv"), world, starts) + rows
    heads = (
        where.title, "scenes", "seeds", *(HEADS[figure] for figure in where.figures), "forwards per token",
        "training seconds", "CHAIR_S, less COPO",
    )  # fmt: skip
    lines = [heads, ["---"] * len(heads)]
    forwards = dict(DECODED)
    for system in (*forwards, *TRAINED):
        for scenes in sorted(
            {r["scenes"] for r in rows if r["system"] == system}, key=int, reverse=True
        ):
            of = [r for r in rows if (r["system"], r["scenes"]) == (system, scenes)]
            lines.append(
                [NAMES.get(system, system), scenes, str(len(of))]
                + [_cell([float(r[figure]) for r in of if r[figure]]) for figure in where.figures]
                + [
                    forwards.get(system, "1"),
                    _cell(_seconds(of), 0),
                    _less_copo(rows, system, where.main),
                ]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seconds(rows: list[dict]) -> list[float]:
    return [float(row["seconds"]) for row in rows if row["seconds"]]


def _cell(values: list[float], digits: int = 3) -> str:
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def _less_copo(rows: list[dict], system: str, main: str) -> str:
    """CHAIR_S of a trained system less COPO's; tested for the main comparison alone."""
    if system not in TRAINED or system == "copo":
        return ""
    of = [
        {r["seed"]: float(r["chair_s"]) for r in rows if r["system"] == name}
        for name in (system, "copo")
    ]
    found = difference(*of)
    return str(found) if system == main else found.untested()
