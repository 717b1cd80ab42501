"""The systems of baselines.csv by name, and their table on the results page.

Trained systems begin at one warm start and take 40 steps: GRPO and COPO on 16 prompts of 8 completions, as
runs.csv has them; the others on 16 pairs. What is decoded is that warm start itself.
"""

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
    "csr-oracle": "CSR-oracle (upper bound)",
    "hadpo, chosen alone": "HA-DPO's control: the chosen texts alone",
    "povid, chosen alone": "POVID's control: the chosen texts alone",
}
NAMES |= {f"{name}, rate 1e-5": f"{NAMES[name]}, rate 1e-5" for name in PAIRED}
FIGURES = (
    "chair_s", "chair_i", "recall", "length", "pope_adversarial", "yes_ratio_adversarial", "flip_rate",
)  # fmt: skip
HEADS = (
    "independent scenes in fog", "scenes", "seeds", "CHAIR_S", "CHAIR_I", "recall", "words", "POPE adv.",
    "yes-ratio adv.", "flip rate", "forwards per token", "training seconds", "CHAIR_S, less COPO",
)  # fmt: skip
MAIN = "hadpo"  # the one comparison that was fixed before the runs: it less COPO
IN_RUNS = {
    "warm start": ("greedy", "0"),
    "grpo": ("grpo", "40"),
    "copo": ("copo", "40"),
    "truth": ("truth", "40"),
}
SCENES = 150


def committed(runs: list[dict], start: str) -> list[dict]:
    """Rows of runs.csv that began at these weights, as rows of baselines.csv."""
    found = []
    for row in runs:
        system, step = IN_RUNS.get(row["arm"], ("", ""))
        if system and (row["step"], row["setting"], row["start"]) == (step, "independent", start):
            found.append(row | {"system": system, "scenes": str(SCENES)})
    return found


def table(folder: Path) -> str:
    """Every system that was run, in the order above; differences are of the same seed."""
    rows = read_csv(folder / "baselines.csv")
    starts = {row["start"] for row in rows}
    for start in starts:
        rows = committed(read_csv(folder / "runs.csv"), start) + rows
    lines = [HEADS, ["---"] * len(HEADS)]
    forwards = dict(DECODED)
    for system in (*forwards, *TRAINED):
        for scenes in sorted(
            {r["scenes"] for r in rows if r["system"] == system}, key=int, reverse=True
        ):
            of = [r for r in rows if (r["system"], r["scenes"]) == (system, scenes)]
            lines.append(
                [NAMES.get(system, system), scenes, str(len(of))]
                + [_cell([float(r[figure]) for r in of if r[figure]]) for figure in FIGURES]
                + [forwards.get(system, "1"), _cell(_seconds(of), 0), _less_copo(rows, system)]
            )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _seconds(rows: list[dict]) -> list[float]:
    return [float(row["seconds"]) for row in rows if row["seconds"]]


def _cell(values: list[float], digits: int = 3) -> str:
    if not values:
        return "-"
    mean, half = interval(values)
    return f"{mean:.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def _less_copo(rows: list[dict], system: str) -> str:
    """CHAIR_S of a trained system less COPO's; tested for the main comparison alone."""
    if system not in TRAINED or system == "copo":
        return ""
    of = [
        {r["seed"]: float(r["chair_s"]) for r in rows if r["system"] == name}
        for name in (system, "copo")
    ]
    found = difference(*of)
    return str(found) if system == MAIN else found.untested()
