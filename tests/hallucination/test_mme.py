"""MME: the parser, the figures by hand, the release folder in both its forms, the result files."""

import pytest

from data import DataError
from hallucination import mme
from hallucination.files import Bad
from hallucination.mme import MMEQuestion


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Yes", "yes"),
        ("NO", "no"),
        ("Yes, it is", "yes"),
        ("no.", "no"),
        (" yes", "yes"),  # within the first four characters
        ("Not sure", "no"),
        ("  No", "no"),
        ("   yes", "other"),  # beyond them
        ("I think so", "other"),
        ("Answer: yes", "other"),
        ("", "other"),
    ],
)
def test_every_rule_of_the_parser(text, said):
    assert mme.parse(text) == said


def test_figures_by_hand():
    # existence: image a both right, image b one of two; OCR: one image, both wrong, one of them other.
    questions = [
        MMEQuestion("existence", "a", "1", "yes"),
        MMEQuestion("existence", "b", "1", "yes"),
        MMEQuestion("existence", "a", "2", "no"),  # not next to its twin
        MMEQuestion("existence", "b", "2", "no"),
        MMEQuestion("OCR", "c", "1", "yes"),
        MMEQuestion("OCR", "c", "2", "no"),
        MMEQuestion("code_reasoning", "d", "1", "yes"),
        MMEQuestion("code_reasoning", "d", "2", "no"),
    ]
    answers = ["yes", "Yes", "no", "<think> no </think> <answer> yes </answer>"]
    answers += ["no", "perhaps", "yes", "no"]
    figures = mme.score(questions, answers)
    assert figures["tasks"]["existence"] == {
        "n": 4, "acc": 3 / 4, "acc_plus": 1 / 2, "score": 125.0, "other": 0,
    }  # fmt: skip
    assert figures["tasks"]["OCR"]["score"] == 0 and figures["tasks"]["OCR"]["other"] == 1
    assert figures["perception"] == 125 and figures["hallucination"] == 125
    assert figures["cognition"] == 200
    assert "perception (2 of 10 tasks)" in mme.table(figures)


def release(root):
    """One flat task and one with folders of its own, a pair of questions each."""
    lines = "Is it?  Please answer yes or no.\tYes\nIs it not?\tNo\n"
    flat, nested = root / "existence", root / "scene"
    for folder in (flat, nested / "images", nested / "questions_answers_YN"):
        folder.mkdir(parents=True)
    (flat / "0001.png").touch()
    (flat / "0001.txt").write_text(lines)
    (nested / "images" / "x.jpg").touch()
    (nested / "questions_answers_YN" / "x.txt").write_text(lines.rstrip())
    return root


def test_the_release_folder_is_read_flat_and_nested(tmp_path):
    questions = mme.read_release(release(tmp_path), None, Bad())
    assert [(q.task, q.image, q.label) for q in questions] == [
        ("existence", "existence/0001.png", "yes"),
        ("existence", "existence/0001.png", "no"),
        ("scene", "scene/images/x.jpg", "yes"),
        ("scene", "scene/images/x.jpg", "no"),
    ]
    assert questions[0].text == "Is it?  Please answer yes or no."  # its two spaces are its own
    assert len(mme.read_release(tmp_path, ["scene"], Bad())) == 2


def test_result_files_are_scored_as_they_are(tmp_path):
    (tmp_path / "count.txt").write_text("a.jpg\tq1\tYes\tYes\na.jpg\tq2\tNo\tYes, two\n")
    assert mme.holds_results(tmp_path) and not mme.holds_results(release(tmp_path / "release"))
    figures = mme.score(*mme.read_results(tmp_path, None, Bad()))
    assert figures["tasks"]["count"]["score"] == 50 + 0


def test_of_half_a_pair_nothing_is_scored(tmp_path):
    (tmp_path / "count.txt").write_text("a\tq\tYes\tYes\na\tr\tNo\tNo\nb\tq\tYes\tNo\n")
    bad = Bad(skip=True)
    figures = mme.score(*mme.read_results(tmp_path, None, bad))
    assert figures["tasks"]["count"]["n"] == 2 and figures["tasks"]["count"]["score"] == 200
    assert bad.dropped == 1


@pytest.mark.parametrize("mark", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_separator_inside_an_answer_ends_no_line(tmp_path, mark, end):
    text = f"a\tq\tYes\tYes, it is{mark}a dog{end}a\tr\tNo\tNo{end}"
    (tmp_path / "count.txt").write_bytes(text.encode())
    assert mme.score(*mme.read_results(tmp_path, None, Bad()))["perception"] == 200


def test_a_sum_over_no_task_is_a_dash():
    questions = [MMEQuestion("OCR", "c", "1", "yes"), MMEQuestion("OCR", "c", "2", "no")]
    figures = mme.score(questions, ["yes", "no"])
    assert figures["perception"] == 200
    assert figures["cognition"] is None and figures["hallucination"] is None
    lines = mme.table(figures).split("\n")
    assert lines[-2].split() == ["cognition", "(0", "of", "4", "tasks)", "-"]


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("existence/0002.txt", "a\tYes\nb\tNo\n", "no image of its name"),
        ("existence/0001.txt", "a\tYes\n", "two lines"),
        ("existence/0001.txt", "a Yes\nb No\n", "two lines"),
        ("existence/0001.txt", "a\tYes\nb\tMaybe\n", "neither Yes nor No"),
        ("existence/0001.txt", b"\xe9\xe8", "not UTF-8"),
        ("existence/0001.txt", b"\xff\xfea\0", "UTF-16"),
    ],
)
def test_a_bad_file_of_the_release_is_named(tmp_path, file, text, reason):
    path = release(tmp_path) / file
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(DataError, match=reason) as error:
        mme.read_release(tmp_path, None, Bad())
    assert path.name in str(error.value)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a\tq\tYes\n", "3 fields"),
        ("a\tq\tSure\tYes\n", "label is 'Sure'"),
        ("a\tq\tYes\tYes\na\tq\tYes\tNo\n", "second time"),
        ("\n", "no answer"),
        ("a\tIs it?\tYes\tIs it?\n", "its last field is the question"),
        ("a\tq\tYes\tYes\na\tr\tNo\tNo\nb\tq\tYes\tYes\n", "count, b: answers: 1, must be a pair"),
    ],
)
def test_a_bad_line_of_a_result_file_is_named(tmp_path, text, reason):
    (tmp_path / "count.txt").write_text(text)
    with pytest.raises(DataError, match=reason):
        mme.read_results(tmp_path, None, Bad())


def test_what_is_not_mme_is_refused(tmp_path):
    for root, tasks, reason in (
        (tmp_path, None, "none of MME's tasks"),
        (tmp_path / "absent", None, "not a folder"),
        (release(tmp_path / "r"), ["poetry"], "no task of MME"),
        (tmp_path / "r", ["OCR"], "OCR is not in it"),
    ):
        with pytest.raises(DataError, match=reason):
            mme.read_release(root, tasks, Bad())
