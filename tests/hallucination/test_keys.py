"""Which key holds the answer: the habits of many tools, and the files that hold none."""

import pytest

from data import DataError
from hallucination.keys import answers_in, doubt_labels, id_of, is_asked

Q = "Is there a dog in the image?"


@pytest.mark.parametrize(
    ("rows", "answers"),
    [
        ([{"prompt": Q, "text": "no", "answer_id": "x", "model_id": "m"}], ["no"]),  # LLaVA
        ([{"question": Q, "answer": "no"}], ["no"]),  # POPE
        ([{"question_id": 1, "text": Q, "label": "yes", "answer": "no"}], ["no"]),
        ([{"question": Q, "answer": "Yes", "prediction": "No"}], ["No"]),  # VLMEvalKit
        (
            [
                {
                    "doc": {"question": Q},
                    "target": "yes",
                    "resps": [["no "]],
                    "filtered_resps": ["no"],
                }
            ],
            ["no"],
        ),
        ([{"target": "yes", "resps": [["no"]]}], ["no"]),
        ([{"image_id": 1, "caption": "a dog"}], ["a dog"]),  # CHAIR's tools
        ([{"caption": "a reference", "prediction": "a dog"}], ["a dog"]),
        ([{"question": Q, "answer": "yes", "response": "no"}], ["no"]),
        ([{"question": Q, "answer": "yes", "model_answer": "no"}], ["no"]),
        ([{"question": Q, "answer": "yes", "pred": "no"}], ["no"]),
        ([{"text": Q, "output": "no"}], ["no"]),
        ([{"prompt": Q, "outputs": ["no"]}], ["no"]),
        ([{"prompt": Q, "completion": "<think> hm </think> no"}], ["<think> hm </think> no"]),
        # the prompt under text, alone or again and again
        ([{"text": "Please describe this image in detail.", "answer": "a dog"}], ["a dog"]),
        ([{"text": "Describe the cat.", "caption": "a dog"}] * 2, ["a dog"] * 2),
        ([{"text": "An image of", "caption": c} for c in ("a", "b")], ["a", "b"]),
        ([{"text": c, "caption": "An image of"} for c in ("a", "b")], ["a", "b"]),
        # two keys that agree, an empty one, an empty answer
        ([{"answer": "no", "text": " no\n"}], ["no"]),
        ([{"answer": "", "text": "no"}], ["no"]),
        ([{"caption": ""}], [""]),
        ([{"text": "Describe the cat.", "caption": ""}], [""]),
        # keys by row
        ([{"text": "a dog"}, {"answer": "a cat"}], ["a dog", "a cat"]),
        # an answer may repeat the question, or ask back
        ([{"question": Q, "answer": f"{Q} Yes."}], [f"{Q} Yes."]),
        ([{"text": "Which dog?"}, {"text": "no"}], ["Which dog?", "no"]),
    ],
)
def test_the_answer_is_what_the_model_said(rows, answers):
    assert answers_in(rows) == [(answer, "") for answer in answers]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"question": Q, "text": Q}, "`text` is what was asked"),
        (
            {"prompt": f"{Q}\nAnswer the question using a single word or phrase.", "text": Q},
            "asked",
        ),
        ({"prompt": Q, "text": f"<image>\n{Q} Please answer yes or no."}, "asked"),
        ({"question": Q, "answer": "yes", "response": Q}, "`response` is what was asked"),
        ({"label": "yes"}, "holds no answer"),
        (
            {"question": Q, "label": "yes", "target": "yes", "ground_truth": "yes"},
            "holds no answer",
        ),
        ({"answer": None}, "holds no answer"),
        ({"answer": 1, "text": ["a"], "caption": {"a": 1}}, "holds no answer"),
        ({"resps": [["a", "b"]]}, "holds no answer"),
        ({}, "holds no answer"),
        ({"prediction": "no", "response": "yes"}, "`prediction` and `response` may both hold"),
        ({"caption": "a dog", "text": "a cat"}, "`caption` and `text` may both hold"),
        ({"answer": "a dog", "caption": "a dog", "text": "a cat"}, "`answer` and `text`"),
        ({"text": "yes", "answer": "no"}, "`answer` and `text`"),
        ({"text": "Please describe the image in detail."}, "every row of the file asks"),
        ({"caption": "Write a short caption for this picture."}, "holds no answer"),
    ],
)
def test_what_is_no_answer_says_why(row, reason):
    ((answer, fault),) = answers_in([row])
    assert answer is None and reason in fault


def test_what_the_caller_has_asked_is_no_answer_either():
    rows = [{"text": Q}, {"text": "no"}]
    assert [answer for answer, _ in answers_in(rows, [Q, Q])] == [None, "no"]


def test_a_model_that_always_says_yes_is_not_scored_by_the_labels_beside_it():
    rows = [{"text": "Yes", "answer": label} for label in ("yes", "no", "no")]
    assert answers_in(rows)[1][0] is None


def test_questions_that_differ_are_none_where_the_answer_is_always_the_same():
    rows = [{"text": f"Is there a {what}?", "answer": "Yes, a big one."} for what in ("cat", "dog")]
    assert [answer for answer, _ in answers_in(rows)] == ["Yes, a big one."] * 2


def test_a_file_of_questions_holds_no_answer():
    rows = [{"text": f"Is there a {what}?"} for what in ("cat", "dog", "bus")]
    assert {answer for answer, _ in answers_in(rows)} == {None}


def test_where_one_row_has_a_prediction_no_other_is_read_of_its_label():
    rows = [
        {"answer": "yes", "prediction": "no"},
        {"answer": "yes"},
        {"answer": "yes", "prediction": None},
    ]
    assert [answer for answer, _ in answers_in(rows)] == ["no", None, None]


@pytest.mark.parametrize(
    ("text", "question", "same"),
    [
        (Q, Q, True),
        (f" {Q.upper()}\n", Q, True),
        (f"<image>{Q}", Q, True),
        (f"{Q} Answer with yes or no.", Q, True),
        (Q, f"{Q}\nAnswer the question using a single word or phrase.", True),
        ("yes", Q, False),
        (f"{Q} yes", Q, False),
        ("", "", False),
        ("", None, False),
    ],
)
def test_white_space_marks_of_images_and_instructions_make_no_other_question(text, question, same):
    assert is_asked(text, question) is same


def test_answers_that_are_all_labels_are_doubted_or_refused(capsys):
    doubt_labels(["yes", "no"], ["yes", "yes"])
    doubt_labels(["yes"], ["yes"])
    assert capsys.readouterr().err == ""
    doubt_labels(["Yes ", "no"], ["yes", "no"])
    assert "file of labels?" in capsys.readouterr().err
    with pytest.raises(DataError, match="prediction"):
        doubt_labels(["yes", "no"], ["yes", "no"], of_data_set=True)


@pytest.mark.parametrize(
    ("value", "id_"),
    [
        (7, "7"), (7.0, "7"), ("7", "7"), (" 7.0 ", "7"), ("a.jpg", "a.jpg"), ("7.5", "7.5"),
        (7.5, None), (True, None), (None, None), ([7], None), ("", None), (float("nan"), None),
    ],
)  # fmt: skip
def test_ids_are_numbers_or_texts(value, id_):
    assert id_of(value) == id_
