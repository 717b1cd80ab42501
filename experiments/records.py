"""Figures on disk: CSVs whose rows name the command and the commit that they come from."""

import csv
import io
import subprocess
from pathlib import Path

from hallucination.files import write_whole


def read_csv(path: Path) -> list[dict]:
    """The rows of a CSV, none where there is no such file."""
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write_csv(path: Path, rows: list[dict], columns: tuple[str, ...]) -> None:
    """Write rows; numbers to five digits."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        values = (row.get(column, "") for column in columns)
        writer.writerow([f"{v:.5g}" if isinstance(v, float) else v for v in values])
    write_whole(path, text.getvalue())


def commit() -> str:
    """The commit of the code, with a plus where the tree differs in more than results and pages."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git(
        "status",
        "--porcelain",
        "-uno",
        "--",
        ".",
        ":!experiments/results",
        ":!experiments/figures",
        ":!*.md",
    )
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
