"""Figures and the README's tables, from results/*.csv and nothing else.

    python results.py                       figures/claim-*.png, the tables in README.md, and a page
    python results.py --compare runs/quick  the rows of a quick run beside the committed ones

What the tables hold is said in tables.py; plots.py draws.
"""

import argparse
import base64
import html
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

import plots
import tables
from data import DataError
from records import read_csv, write_whole
from report import page_of
from tables import HEADINGS, Costs, Runs, Tokens
from tokens import QUESTIONS

NEEDED = {  # CSV -> what writes it
    "runs": "python experiments.py runs",
    **dict.fromkeys(QUESTIONS, "python experiments.py tokens"),
    "first": "python experiments.py first",
    "memory": "python memory.py",
    "cost": "python benchmark.py ... --csv results/cost.csv",
    "paper": None,  # copied from it
}


class Claim(NamedTuple):
    """One claim: its heading, what draws its figure, its tables, and the CSV that they are of."""

    heading: str
    draw: Callable[[], Figure]
    tables: list[str]
    csv: str


def claims(folder: Path) -> dict[str, Claim]:
    """All seven, by name.  Raises DataError where runs and tokens began at different weights."""
    runs = Runs(folder)
    estimator, mask, credit = (Tokens(folder / f"{n}.csv") for n in ("estimator", "mask", "credit"))
    starts = {row["start"] for row in runs.rows if row["arm"] == "warm start"}
    starts |= {row["start"] for of in (estimator, mask, credit) for row in of.rows}
    if len(starts) > 1:
        raise DataError(f"{folder}: runs and tokens are of different warm starts: {sorted(starts)}")
    settings = ("independent", "confounded")
    remedy = [
        table(runs, setting)
        for table in (tables.against_grpo, tables.remedy)
        for setting in settings
    ] + [
        tables.by_steps(runs, tables.EARLY),
        *(tables.by_steps(runs, tables.COLOURS, setting) for setting in settings),
    ]
    found = (
        ("1-shortcut", "Outcome reward and the shortcut", plots.shortcut, runs, [tables.shortcut(runs)]),
        ("2-confounding", "Shortcut and hallucination", plots.confounding, runs, [tables.confounding(runs)]),
        ("3-remedy", "The remedy", plots.remedy, runs, remedy),
        ("4-sensitivity", "Sensitivity", plots.sensitivity, runs, [tables.sensitivity(runs)]),
        ("5-estimator", "The estimator", plots.estimator, estimator, [tables.estimator(estimator)]),
        ("6-mask", "The mask", plots.mask, mask, [tables.mask(mask)]),
        ("7-credit", "Where the credit goes", plots.credit, credit, [tables.credit(credit)]),
    )  # fmt: skip
    return {
        name: Claim(heading, partial(draw, rows), of_claim, rows.name)
        for name, heading, draw, rows, of_claim in found
    }


def all_tables(folder: Path) -> dict[str, str]:
    """Every table of the README but the claims', by name, each with its source."""
    costs = Costs(folder / "cost.csv")
    found = {name: (of_rows(read_csv(folder / f"{name}.csv")), name) for name, of_rows in (
        ("first", tables.first), ("paper", tables.reported), ("memory", tables.memory),
    )}  # fmt: skip
    found |= {name: (of_costs(costs), "cost") for name, of_costs in (
        ("ways", tables.ways), ("shapes", tables.shapes), ("step", tables.step), ("growth", tables.growth),
    )}  # fmt: skip
    found["total"] = tables.total(Runs(folder)), "runs"
    return {name: sourced(*table) for name, table in found.items()}


def sourced(table: str, csv: str) -> str:
    """A table with a line below it that says where its numbers are from."""
    how = f"written by `{NEEDED[csv]}`" if NEEDED[csv] else "copied from the paper"
    return f"{table}\n\n*Of [`results/{csv}.csv`](results/{csv}.csv), {how}.*"


def fill(text: str, found: dict[str, str]) -> str:
    """A text with every table put between its marks, <!-- results NAME --> and <!-- end -->."""
    for name, table in found.items():
        marks = rf"(<!-- results {re.escape(name)} -->\n).*?(<!-- end -->)"
        text, places = re.subn(
            marks, lambda m, table=table: f"{m[1]}{table}\n{m[2]}", text, flags=re.S
        )
        if not places:
            raise DataError(f"README.md: no place for the table {name!r}")
    return text


def page(drawn: Sequence[tuple[Claim, Path]]) -> str:
    """All figures and tables as one self-contained page."""
    parts = ["<style>img { max-width: 100% } td { white-space: nowrap }</style>"]
    for claim, picture in drawn:
        data, heading = base64.b64encode(picture.read_bytes()).decode(), html.escape(claim.heading)
        parts.append(f"<h2>{heading}</h2><img alt='{heading}' src='data:image/png;base64,{data}'>")
        parts += [f"<div class=wide>{_as_html(table)}</div>" for table in claim.tables]
        how = f"Of results/{claim.csv}.csv, written by {NEEDED[claim.csv]}."
        parts.append(f"<p class=note>{html.escape(how)}</p>")
    return page_of("COPO: the paper's claims, tested where the truth is known", "".join(parts))


def _as_html(table: str) -> str:
    head, _, *rows = [line[2:-2].split(" | ") for line in table.splitlines()]
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
        keys = ("seed", "pairing", "H", "mask", "class")
        of = {tuple(row.get(k) for k in keys): row for row in read_csv(committed / f"{name}.csv")}
        for row in read_csv(quick / f"{name}.csv"):
            other = of.get(tuple(row.get(k) for k in keys), {})
            asked = ", ".join(row[k] for k in keys[1:] if row.get(k))
            said = [
                f"{k} {row[k]} | {other.get(k, '-')}"
                for k in row
                if row[k] and k not in (*keys, "start", "commit", "command")
            ]
            lines.append(f"{name}, {asked}: " + ", ".join(said))
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
        needed = [args.results / f"{name}.csv" for name in NEEDED]
        needed = [args.compare / "runs.csv"] if args.compare else needed
        for path in needed:
            if not path.exists():
                how = (
                    "make results QUICK=1" if args.compare else NEEDED[path.stem] or "git checkout"
                )
                raise DataError(f"{path}: not there; to have it: {how}")
        if args.compare:
            print(compare(args.compare, args.results))
            return 0
        found, drawn = all_tables(args.results), []
        args.figures.mkdir(parents=True, exist_ok=True)
        for name, claim in claims(args.results).items():
            drawn.append((claim, args.figures / f"claim-{name}.png"))
            claim.draw().savefig(drawn[-1][1])
            found |= {
                f"{name} {i}": sourced(table, claim.csv) for i, table in enumerate(claim.tables, 1)
            }
        write_whole(args.page, page(drawn))
        write_whole(args.readme, fill(args.readme.read_text(encoding="utf-8"), found))
        print(f"{args.figures}/claim-*.png, {args.page}, {args.readme}")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
