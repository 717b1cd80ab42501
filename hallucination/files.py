"""Benchmark files as they are published: JSON or JSON lines, read into rows that know where they stand.

What we write is whole or not there. No pickle is ever opened, and nothing that is read is evaluated.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

MOST_LINES = 20  # of dropped entries that are named
_FORMATS = (  # how the bytes of files begin that are no text
    (b"\x1f\x8b", "a gzip archive: unpack it first"),
    (b"PK\x03\x04", "a zip archive or an Excel workbook: save its sheet as JSON lines"),
    (b"PAR1", "a Parquet table: save it as JSON lines"),
    (b"ARROW1", "an Arrow table: save it as JSON lines"),
    (b"\xff\xfe", "UTF-16 text: save it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text: save it as UTF-8"),
    (b"{\x00", "UTF-16 text: save it as UTF-8"),
    (b"[\x00", "UTF-16 text: save it as UTF-8"),
    (b"\xd0\xcf\x11\xe0", "an old Excel workbook: save its sheet as JSON lines"),
    (b"SQLite format 3", "an SQLite database: export it as JSON lines"),
)


class DataError(ValueError):
    """Input that cannot be used: one line or more, each saying what, where and why."""


class Bad:
    """What becomes of bad input: it ends the program, or with `skip` it is dropped and counted."""

    def __init__(self, skip: bool = False):
        self.skip, self.dropped = skip, 0

    def __call__(self, where: object, reason: str) -> None:
        """Report something unusable at `where`: a file, a line, an id.  Raises DataError unless skipping."""
        # an id may hold a line feed, or half a character, which cannot be printed
        told = f"{where}: {reason}".encode("utf-8", "backslashreplace").decode()
        told = " ".join(told.splitlines())
        if not self.skip:
            raise DataError(f"{told} (--skip-bad drops such entries)")
        self.dropped += 1
        if self.dropped < MOST_LINES:
            print(f"skipped: {told}", file=sys.stderr)
        elif self.dropped == MOST_LINES:
            print("skipped: ... and more, counted below", file=sys.stderr)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.  Raises DataError for anything else: binary files, pickles, folders."""
    try:
        raw = path.read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"{path}: cannot be read: {reason}") from None
    if raw[:1] == b"\x80" or path.suffix in (".pkl", ".pickle"):
        raise DataError(f"{path}: a pickle can run code when it is read and is never opened")
    for start, what in _FORMATS:
        if raw.startswith(start):
            raise DataError(f"{path}: is {what}")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(f"{path}:{line}: not UTF-8 text (byte {error.start})") from None


def read_json(path: Path) -> Any:
    """The value of a JSON file.  Raises DataError where it is cut short or malformed."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: not JSON: {error}") from None


def read_rows(path: Path, bad: Bad) -> Iterator[tuple[str, dict]]:
    """Objects of a file of JSON lines or of one JSON array, each after its place ("file:line").

    Which of the two it is shows in its first character, whatever the file is called.
    """
    text = read_text(path)
    if text.lstrip()[:1] == "[":
        rows = ((f"{path}[{i}]", row) for i, row in enumerate(read_json(path)))
    else:
        rows = _lines(path, text, bad)
    empty = True
    for where, row in rows:
        if isinstance(row, dict):
            empty = False
            yield where, row
        else:
            bad(where, "not an object like {...}")
    if empty:
        raise DataError(f"{path}: no usable entry in it")


def _lines(path: Path, text: str, bad: Bad) -> Iterator[tuple[str, Any]]:
    """JSON lines; or values printed over several lines each, one after the other, as some tools do."""
    first = text.lstrip().partition("\n")[0].strip()
    if first == "{":
        yield from _values(path, text)
        return
    if first and "{" not in first and ("\t" in first or "," in first):
        raise DataError(f"{path}: is a table (CSV or TSV) or another text: save it as JSON lines")
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                bad(f"{path}:{number}", f"not JSON: {error}")


def _values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    decoder, place = json.JSONDecoder(), 0
    while rest := len(text[place:].lstrip()):
        place = len(text) - rest
        where = f"{path}:{text.count(chr(10), 0, place) + 1}"
        try:
            value, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from None
        yield where, value


def repair_lines(path: Path) -> list[str]:
    """Whole lines of a file that a program adds to; a last one that was cut short is cut off the file.

    None of a file that is not there. Raises DataError where an earlier line is not JSON.
    """
    if not path.exists():
        return []
    text = read_text(path)
    whole, newline, torn = text.rpartition("\n")
    lines = whole.split("\n") if whole else []
    for number, line in enumerate(lines, 1):
        try:
            json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from None
    if torn:
        if not lines and not torn.startswith("{"):
            raise DataError(f"{path}: not a file of JSON lines")
        os.truncate(path, len((whole + newline).encode()))
    return lines


def write_whole(path: Path, text: str) -> None:
    """Write a file that is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)
