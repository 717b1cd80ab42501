"""Files of answers as programs leave them: marks, line ends, arrays, and formats that are no text."""

import gzip
import json
import zipfile

import pytest

from data import DataError
from hallucination.files import MOST_LINES, Bad, read_json, read_rows, read_text

ROWS = [{"id": 1, "text": "a\u2028b\u2029c\x85d"}, {"id": 2, "text": "\ud83d\ude00 \u00e9"}]


def told(path):
    with pytest.raises(DataError) as error:
        list(read_rows(path, Bad()))
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.txt", "a"])
@pytest.mark.parametrize("form", ["lines", "array", "printed", "pretty lines"])
@pytest.mark.parametrize("mark", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_lines_and_arrays_are_told_by_their_first_character(tmp_path, name, form, mark, end):
    rows = json.loads(json.dumps(ROWS))
    text = {
        "lines": "\n".join(json.dumps(row, ensure_ascii=False) for row in rows),
        "array": json.dumps(rows, ensure_ascii=False),
        "printed": json.dumps(rows, indent=2),
        "pretty lines": "\n".join(json.dumps(row, indent=2) for row in rows),
    }[form]
    path = tmp_path / name
    path.write_bytes((mark + text.replace("\n", end) + end).encode("utf-8"))
    assert [row for _, row in read_rows(path, Bad())] == rows


@pytest.mark.parametrize(
    ("raw", "what"),
    [
        (gzip.compress(b"{}", mtime=0), "gzip"),
        (b"PK\x03\x04...", "Excel"),
        (b"PAR1....", "Parquet"),
        ('{"id": 1}'.encode("utf-16"), "UTF-16"),
        ('{"id": 1}'.encode("utf-16-le"), "UTF-16"),
        (b"\x80\x04.", "pickle"),
        (b"index\tquestion\tprediction\n0\tIs it?\tyes\n", "CSV or TSV"),
        (b"index,question,prediction\n0,Is it?,yes\n", "CSV or TSV"),
        (b'{"id": "\xe9"}', "not UTF-8"),
        (b'{"id": 1}\n{"id": ', ":2: not JSON"),
        (b'{"id": ' + b"9" * 5000 + b"}", ":1: not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b'{"a":' * 100_000, ":1: not JSON"),
        (b"[1]", "not an object"),
        (b"\xef\xbb\xbf", "no usable entry"),
    ],
)
def test_what_is_no_file_of_rows_is_said_in_one_line(tmp_path, raw, what):
    path = tmp_path / "answers.jsonl"
    path.write_bytes(raw)
    assert what in told(path)


def test_a_workbook_a_folder_and_a_missing_file_are_said(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.xlsx", "w") as archive:
        archive.writestr("xl/workbook.xml", "")
    assert "Excel" in told(tmp_path / "a.xlsx")
    assert "directory" in told(tmp_path)
    assert "No such file" in told(tmp_path / "absent")


@pytest.mark.parametrize("raw", [b"9" * 5000, b"[" * 100_000, b"{", b"nul"])
def test_json_that_cannot_be_read_is_said(tmp_path, raw):
    path = tmp_path / "a.json"
    path.write_bytes(raw)
    with pytest.raises(DataError, match="not JSON"):
        read_json(path)


def test_a_mark_of_byte_order_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfa\r\nb")
    assert read_text(path) == "a\r\nb"


def test_of_many_dropped_entries_some_are_named_and_all_counted(capsys):
    bad = Bad(skip=True)
    for i in range(1000):
        bad(f"line {i}", "is bad")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == MOST_LINES and said[0] == "skipped: line 0: is bad" and bad.dropped == 1000
    assert "more" in said[-1]


def test_an_id_that_cannot_be_printed_is_told_in_one_line(capsys):
    with pytest.raises(DataError, match=r"a b\\ud800: is bad"):
        Bad()("a\nb\ud800", "is bad")
    Bad(skip=True)("a\nb\ud800", "is bad")
    assert capsys.readouterr().err == "skipped: a b\\ud800: is bad\n"
