"""Benchmark files as they are published: JSON or JSON lines, read into rows that know where they stand.

What we write is whole or not there. No pickle is ever opened, and nothing that is read is evaluated.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data import DataError

_ANSWER_KEYS = ("text", "answer", "response", "caption", "completion", "output", "outputs")


class Bad:
    """What becomes of bad input: it ends the program, or with `skip` it is dropped and counted."""

    def __init__(self, skip: bool = False):
        self.skip, self.dropped = skip, 0

    def __call__(self, where: object, reason: str) -> None:
        """Report something unusable at `where`: a file, a line, an id.  Raises DataError unless skipping."""
        if not self.skip:
            raise DataError(f"{where}: {reason} (--skip-bad drops such entries)")
        print(f"skipped: {where}: {reason}", file=sys.stderr)
        self.dropped += 1


def read_text(path: Path) -> str:
    """The text of a UTF-8 file.  Raises DataError for anything else: binary files, pickles, folders."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if raw[:1] == b"\x80" or path.suffix in (".pkl", ".pickle"):
        raise DataError(f"{path}: a pickle can run code when it is read and is never opened")
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
    except (json.JSONDecodeError, RecursionError) as error:
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
    if text.lstrip().partition("\n")[0].strip() == "{":
        yield from _values(path, text)
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (json.JSONDecodeError, RecursionError) as error:
                bad(f"{path}:{number}", f"not JSON: {error}")


def _values(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    decoder, place = json.JSONDecoder(), 0
    while rest := len(text[place:].lstrip()):
        place = len(text) - rest
        where = f"{path}:{text.count(chr(10), 0, place) + 1}"
        try:
            value, place = decoder.raw_decode(text, place)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{where}: not JSON: {error}") from None
        yield where, value


def answer_of(row: dict) -> str | None:
    """What a saved row says, under any of the names that tools give it; None where it says nothing."""
    for key in _ANSWER_KEYS:
        if isinstance(row.get(key), str):
            return row[key]
    return None


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
        except ValueError as error:
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
