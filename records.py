"""Figures on disk: files that are whole or not there, and CSVs whose rows name command and commit."""

import csv
import io
import os
import subprocess
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


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
    """The commit of the code, with a plus where the tree differs from it in more than its results."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "-uno", "--", ".", ":!results")
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
