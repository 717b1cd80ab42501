"""Answers are saved as they come, resumed where they stopped, and depend on nothing but their question."""

import dataclasses
import json

import pytest

from data import DataError, Example
from hallucination import answers
from hallucination.answers import Decoding, answer_all
from hallucination.files import Bad

DECODING = Decoding("a model", max_new_tokens=6)


@pytest.fixture
def questions(examples):
    return [({"question_id": i}, example) for i, example in enumerate([*examples, examples[0]])]


def never():
    pytest.fail("the model was loaded")


def test_a_batch_of_one_and_a_batch_of_all_give_the_same_answers(policy, questions):
    for settings in (DECODING, dataclasses.replace(DECODING, temperature=1.0)):
        one = answer_all(lambda: policy, questions, settings, batch_size=1)
        assert one == answer_all(lambda: policy, questions, settings, batch_size=16)
        assert all(one)


def test_drawn_answers_differ_from_greedy_ones_and_repeat_for_the_same_seed(policy, questions):
    def drawn(seed):
        settings = dataclasses.replace(DECODING, temperature=1.0, seed=seed)
        return answer_all(lambda: policy, questions, settings)

    greedy = answer_all(lambda: policy, questions, DECODING)
    assert drawn(0) == drawn(0) != drawn(1) and drawn(0) != greedy


def test_what_is_in_the_file_is_not_asked_again(policy, questions, tmp_path):
    save = tmp_path / "folder" / "answers.jsonl"
    whole = answer_all(lambda: policy, questions, DECODING, save)
    assert answer_all(never, questions, DECODING, save) == whole

    lines = save.read_text().splitlines(keepends=True)
    save.write_text("".join(lines[:2]) + lines[2][:20])  # killed while it wrote the third
    assert answer_all(lambda: policy, questions, DECODING, save, batch_size=1) == whole
    assert save.read_text().splitlines(keepends=True) == lines


@pytest.mark.parametrize(
    "change", [{"model_id": "another"}, {"max_new_tokens": 7}, {"think": False}]
)
def test_a_file_of_other_answers_is_refused_and_left_alone(policy, questions, tmp_path, change):
    save = tmp_path / "answers.jsonl"
    answer_all(lambda: policy, questions, DECODING, save)
    before = save.read_text()
    with pytest.raises(DataError, match=f"another {next(iter(change))}"):
        answer_all(never, questions, dataclasses.replace(DECODING, **change), save)
    with pytest.raises(DataError, match="another question"):
        answer_all(never, questions[1:], DECODING, save)
    assert save.read_text() == before


def test_a_broken_image_ends_the_program_or_is_dropped_and_counted(policy, questions, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(b"not a picture")
    broken = ({"question_id": 9}, Example(tmp_path / "broken.jpg", "What is it?", "a cat"))
    asked = [questions[0], broken, questions[1]]
    with pytest.raises(DataError, match=r"broken\.jpg cannot be read"):
        answer_all(lambda: policy, asked, DECODING)
    bad = Bad(skip=True)
    texts = answer_all(lambda: policy, asked, DECODING, bad=bad)
    assert [text is None for text in texts] == [False, True, False] and bad.dropped == 1


def test_a_retrained_model_has_another_name(policy, tmp_path):
    (tmp_path / "weights").write_text("1")
    before = answers.fingerprint(str(tmp_path))
    (tmp_path / "weights").write_text("22")
    assert answers.fingerprint(str(tmp_path)) != before
    assert answers.fingerprint("hub/name") == "hub/name"


def test_without_a_name_every_model_and_list_of_questions_has_a_file_of_its_own(questions):
    files = {
        answers.answers_file("pope", asked, settings)
        for asked in (questions, questions[1:])
        for settings in (DECODING, dataclasses.replace(DECODING, seed=1))
    }
    assert len(files) == 4


def test_rows_hold_what_it_takes_to_make_them_again(policy, questions, tmp_path):
    save = tmp_path / "answers.jsonl"
    (text, *_) = answer_all(lambda: policy, questions, DECODING, save)
    row = json.loads(save.read_text().splitlines()[0])
    asked = {"question_id": 0, "prompt": questions[0][1].question}
    assert row == asked | DECODING.facts() | {"text": text}
