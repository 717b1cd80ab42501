"""The results page and all tables, from experiments/results/*.csv and nothing else.

    python -m experiments.build                       figures/*.png, the tables of the three pages that have
                                                      marks for them, and runs/results.html (web.py)
    python -m experiments.build --compare runs/quick  the rows of a quick run beside the committed ones

What the tables hold is said in tables.py; plots.py draws.
"""

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure

from data import DataError
from experiments import plots, systems, tables, web
from experiments.records import read_csv
from experiments.tables import HEADINGS, Costs, Runs, Tokens
from hallucination.files import write_whole
from page.palette import Scheme

HERE = Path(__file__).parent
PAGES = (HERE.parent / "README.md", HERE / "README.md", HERE.parent / "docs" / "models.md")
TOKENS = ("estimator", "mask", "credit")
NEEDED = {  # CSV -> what writes it
    "runs": "python -m experiments.claims runs",
    **dict.fromkeys(TOKENS, "python -m experiments.claims tokens"),
    "repeated": "python -m experiments.claims runs --arms ... --output DIR",
    "first": "python -m experiments.claims first",
    "memory": "python -m experiments.models",
    "cost": "python -m experiments.cost ... --csv experiments/results/cost.csv",
    "card": "python -m experiments.card ... --csv experiments/results/card.csv",
    "credit_map": "python -m experiments.credit_map",
    "levels": "python -m experiments.levels",
    "asking": "python -m experiments.asking",
    "baselines": "python -m experiments.baselines",
    "real": "python -m experiments.real train",
    "paper": None,  # copied from it
}


class Claim(NamedTuple):
    """One claim: what draws its figure, its table, and the CSV that both are of."""

    draw: Callable[[Scheme], Figure]
    table: str
    csv: str


def claims(folder: Path) -> dict[str, Claim]:
    """All eight, by name.  Raises DataError where runs and tokens began at different weights."""
    runs = Runs(folder)
    estimator, mask, credit = (Tokens(folder / f"{n}.csv") for n in ("estimator", "mask", "credit"))
    starts = {row["start"] for row in runs.rows if row["arm"] == "warm start"}
    starts |= {row["start"] for of in (estimator, mask, credit) for row in of.rows}
    if len(starts) > 1:
        raise DataError(f"{folder}: runs and tokens are of different warm starts: {sorted(starts)}")
    found = (
        ("1-shortcut", plots.shortcut, runs, tables.shortcut),
        ("2-confounding", plots.confounding, runs, tables.confounding),
        ("3-remedy", plots.remedy, runs, tables.counting),
        ("4-sensitivity", plots.sensitivity, runs, tables.sensitivity),
        ("5-estimator", plots.estimator, estimator, tables.estimator),
        ("6-mask", plots.mask, mask, tables.mask),
        ("7-credit", plots.credit, credit, tables.credit),
        ("8-credits", plots.credits, runs, tables.credits),
    )
    return {
        name: Claim(partial(draw, rows), table(rows), rows.name)
        for name, draw, rows, table in found
    }


def all_tables(folder: Path) -> dict[str, str]:
    """Every table of the pages, by name, each with its source."""
    costs = Costs(folder / "cost.csv")
    found = {name: (of_rows(read_csv(folder / f"{name}.csv")), name) for name, of_rows in (
        ("first", tables.first), ("paper", tables.reported), ("memory", tables.memory),
        ("real", tables.real), ("asking", tables.asking), ("levels", tables.levels),
    )}  # fmt: skip
    for world in systems.WORLDS:
        found[f"baselines, {world}"] = systems.table(folder, world), "baselines"
    found["first-seeds"] = tables.first_seeds(read_csv(folder / "first.csv")), "first"
    found |= {name: (of_costs(costs), "cost") for name, of_costs in (
        ("ways", tables.ways), ("shapes", tables.shapes), ("step", tables.step), ("growth", tables.growth),
        ("long", tables.long),
    )}  # fmt: skip
    found["card"] = tables.card(Costs(folder / "card.csv")), "card"
    runs = Runs(folder)
    found |= {name: (of_runs(runs), "runs") for name, of_runs in (
        ("total", tables.total), ("bred", tables.bred), ("colours", tables.colours),
        ("fog", tables.in_fog), ("few", tables.few), ("planned", tables.planned),
        ("again", tables.again), ("harm", tables.harm),
    )}  # fmt: skip
    found["repeated"] = tables.repeated(runs, Runs(folder, "repeated")), "repeated"
    found |= {name: (claim.table, claim.csv) for name, claim in claims(folder).items()}
    return {name: sourced(*table) for name, table in found.items()}


def sourced(table: str, csv: str) -> str:
    """A table with a line below it that says where its numbers are from."""
    how = f"written by `{NEEDED[csv]}`" if NEEDED[csv] else "copied from the paper"
    return f"{table}\n\n*From `experiments/results/{csv}.csv`, {how}.*"


def fill(pages: dict[Path, str], found: dict[str, str]) -> dict[Path, str]:
    """The pages with every table put between its marks, <!-- results NAME --> and <!-- end -->.

    Raises DataError for a table without a place, or with two, and for a place without a table.
    """
    filled = dict(pages)
    for name, table in found.items():
        marks = re.compile(rf"(<!-- results {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
        places = [path for path, text in filled.items() for _ in marks.findall(text)]
        if len(places) != 1:
            raise DataError(f"{len(places)} places for the table {name!r}: there must be one")
        path = places[0]
        filled[path] = marks.sub(lambda m, table=table: f"{m[1]}{table}\n{m[2]}", filled[path])
    for path, text in filled.items():
        for name in set(re.findall(r"<!-- results (.*?) -->", text)) - set(found):
            raise DataError(f"{path}: no table is called {name!r}")
    return filled


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
    for name in TOKENS:
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
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the CSVs")
    parser.add_argument("--figures", type=Path, default=HERE / "figures", help="where figures go")
    parser.add_argument(
        "--pages", type=Path, nargs="+", default=PAGES, help="whose tables are filled in"
    )
    parser.add_argument(
        "--html", type=Path, default=Path("runs/results.html"), help="all claims as one page"
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
        build(args.results, args.figures, args.pages, args.html)
        print(f"{args.figures}/*.png, {args.html}, {', '.join(map(str, args.pages))}")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build(results: Path, figures: Path, pages: Sequence[Path], page_file: Path) -> None:
    """Draw every figure, write the page, fill every table in; nothing where a table has no place."""
    texts = {path: path.read_text(encoding="utf-8") for path in pages}
    filled = fill(texts, all_tables(results))
    sections = []
    for name, claim in claims(results).items():
        picture = figures / f"claim-{name}.png"
        plots.save(claim.draw, picture)
        how = f"From experiments/results/{claim.csv}.csv, written by {NEEDED[claim.csv]}."
        sections.append(web.Section(name, picture, claim.table, how))
    plots.save(partial(plots.growth, Costs(results / "cost.csv")), figures / "growth.png")
    rows = read_csv(results / "credit_map.csv")
    plots.save(partial(plots.credit_map, rows), figures / "credit_map.png")
    rows = read_csv(results / "asking.csv")
    plots.save(partial(plots.asking, rows), figures / "asking.png")
    said = (HERE / "README.md").read_text(encoding="utf-8")
    write_whole(page_file, web.page(sections, said))
    for path, text in filled.items():
        write_whole(path, text)


if __name__ == "__main__":
    sys.exit(main())
