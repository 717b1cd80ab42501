"""POPE: every parser rule, every figure by hand, every way a file can be wrong."""

import json
import random

import pytest

from data import DataError, read_examples
from hallucination import pope
from hallucination.coco import Instances
from hallucination.files import Bad
from hallucination.pope import PopeQuestion, official, opera, strict

YES, NO = ("yes", True), ("no", True)
UNKNOWN = ("yes", False)  # counted as a yes, but no rule knew it


@pytest.mark.parametrize(
    ("text", "by_official", "by_opera", "by_strict"),
    [
        ("Yes", YES, YES, YES),
        ("yes", YES, YES, YES),
        ("no", NO, NO, NO),
        ("No", NO, NO, NO),
        ("NO", UNKNOWN, NO, NO),
        (" No ", NO, NO, NO),
        ("Yes.", YES, YES, (None, False)),
        ("No.", NO, NO, (None, False)),
        ("No, there is not.", NO, NO, (None, False)),
        ("Yes, there is a dog", YES, YES, (None, False)),
        ("There is not a dog", NO, NO, (None, False)),
        ("There isn't a dog", UNKNOWN, NO, (None, False)),
        ("There is a dog. No cat.", UNKNOWN, NO, (None, False)),  # official stops at the full stop
        ("Nope", UNKNOWN, UNKNOWN, (None, False)),
        ("**No**", UNKNOWN, UNKNOWN, (None, False)),
        ("No\n", UNKNOWN, UNKNOWN, NO),  # the scripts split at spaces only
        ("I cannot tell", UNKNOWN, UNKNOWN, (None, False)),
        ("a snowboard, I know", UNKNOWN, UNKNOWN, (None, False)),
        ("", UNKNOWN, UNKNOWN, (None, False)),
    ],
)
def test_every_rule_of_every_parser(text, by_official, by_opera, by_strict):
    assert official(text) == by_official
    assert opera(text) == by_opera
    assert strict(text) == by_strict


def test_figures_by_hand():
    labels = ["yes", "yes", "yes", "no", "no"]
    answers = ["Yes", "yes, a dog", "No", "I cannot tell", "no"]
    # said: yes yes no yes no.  hits 2, said yes 3, positives 3, right 3 of 5.
    assert pope.score(labels, answers) == {
        "n": 5,
        "accuracy": 3 / 5,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "f1": 2 / 3,
        "yes_ratio": 3 / 5,
        "unrecognised": 1,
    }


def test_under_strict_what_is_neither_is_wrong_and_no_yes():
    figures = pope.score(["yes", "no", "yes"], ["Yes.", "Sure", "yes"], "strict")
    assert figures["accuracy"] == 1 / 3 and figures["precision"] == 1 and figures["recall"] == 1 / 2
    assert figures["yes_ratio"] == 1 / 3 and figures["unrecognised"] == 2


@pytest.mark.parametrize(
    ("completion", "said"),
    [
        ("<think> no dog? not sure </think> <answer> yes </answer>", "yes"),
        ("<think> a dog </think> No.", "no"),
        ("<think> no, no, not", "yes"),  # it never answers: nothing, which is a yes
        ("<answer>No</answer>", "no"),
    ],
)
def test_the_answer_is_read_not_the_reasoning(completion, said):
    figures = pope.score(["yes"], [completion])
    assert figures["yes_ratio"] == (said == "yes")


@pytest.mark.parametrize(
    ("labels", "answers", "nothing"),
    [
        ([], [], list(pope.FIGURES)),
        (["no"], ["no"], ["recall", "f1"]),  # no question that asks for what is there
        (["no"], ["yes"], ["recall", "f1"]),
        (["yes"], ["no"], []),
    ],
)
def test_a_figure_over_no_question_is_a_dash(labels, answers, nothing):
    figures = pope.score(labels, answers)
    assert [key for key, value in figures.items() if value is None] == nothing
    assert pope.table(figures).split("\n")[1].split().count("-") == len(nothing)
    assert figures["n"] == len(labels)


def test_precision_is_0_where_nothing_is_said_to_be_there():
    assert pope.score(["yes", "no"], ["no", "no"])["precision"] == 0


def test_a_mean_with_a_dash_in_it_is_a_dash():
    questions = [PopeQuestion("a", "1", "", "", "yes"), PopeQuestion("b", "1", "", "", "no")]
    mean = pope.score_files(questions, ["yes", "yes"], "official")["mean"]
    assert mean["recall"] is None and mean["accuracy"] == 1 / 2


def test_files_are_scored_apart_and_averaged():
    questions = [PopeQuestion("a", "1", "", "", "yes"), PopeQuestion("b", "1", "", "", "no")]
    figures = pope.score_files(questions, ["yes", "yes"], "official")
    assert figures["a"]["accuracy"] == 1 and figures["b"]["accuracy"] == 0
    assert figures["mean"]["accuracy"] == 0.5 and figures["mean"]["n"] == 2
    assert (
        pope.score_files(questions[:1], ["yes"], "official")["n"] == 1
    )  # one file: no keys by file
    assert "mean" in pope.table(figures)


# -- files -------------------------------------------------------------------------------------
def row(i, label="yes", **more):
    return {
        "question_id": i,
        "image": f"{i}.jpg",
        "text": f"Is there a cat {i}?",
        "label": label,
        **more,
    }


def write(path, rows, array=False):
    text = json.dumps(rows, indent=1) if array else "".join(json.dumps(r) + "\n" for r in rows)
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("array", [False, True])
def test_lines_and_arrays_are_read_alike_whatever_the_suffix(tmp_path, array):
    path = write(tmp_path / "q.json", [row(1), row(2, "no")], array)
    questions = pope.read_questions([path], Bad())
    assert [(q.id, q.label, q.image, q.file) for q in questions] == [
        ("1", "yes", "1.jpg", "q"),
        ("2", "no", "2.jpg", "q"),
    ]


def test_answers_are_matched_by_id_in_any_order_or_else_by_order(tmp_path):
    questions = pope.read_questions([write(tmp_path / "q.json", [row(1), row(2)])], Bad())
    by_id = [{"question_id": "2", "prompt": "Is there a cat 2? One word.", "text": "b"}]
    by_id += [{"question_id": 1, "text": "a"}]
    by_order = [{"question": "Is there a cat 1?", "answer": "a"}, {"answer": "b"}]
    for answers in (by_id, by_order):
        path = write(tmp_path / "a.jsonl", answers)
        assert pope.read_answers([path], questions, Bad())[1] == ["a", "b"]


@pytest.mark.parametrize(
    "rows",
    [
        [{"question": "Is there a cat 1?", "answer": "a"}, {"answer": "b"}],  # POPE
        [row(1, answer="a"), row(2, answer="b")],  # its questions with answers added
        [  # LLaVA
            {
                "question_id": i,
                "prompt": f"<image>\nIs there a  cat {i}?\nAnswer the question using a single word.",
                "text": text,
                "answer_id": "x",
                "model_id": "m",
                "metadata": {},
            }
            for i, text in ((1, "a"), (2, "b"))
        ],
        [  # VLMEvalKit: answer is the label
            {
                "index": i,
                "category": "random",
                "question": f"Is there a cat {i}?",
                "answer": "Yes",
                "prediction": text,
            }
            for i, text in ((1, "a"), (2, "b"))
        ],
        [  # lmms-eval
            {
                "doc_id": i,
                "doc": {"question": f"Is there a cat {i}?", "answer": "yes"},
                "target": "yes",
                "resps": [[f" {text} "]],
                "filtered_resps": [text],
            }
            for i, text in ((1, "a"), (2, "b"))
        ],
        [
            {"question_id": float(i), "prompt": None, "text": text}
            for i, text in ((2, "b"), (1, "a"))
        ],
        [{"question_id": "1.0", "outputs": ["a"]}, {"question_id": "2", "outputs": ["b"]}],
    ],
)
def test_the_answer_is_found_where_each_tool_writes_it(tmp_path, rows):
    questions = pope.read_questions([write(tmp_path / "q.json", [row(1), row(2)])], Bad())
    path = write(tmp_path / "a.jsonl", rows)
    assert pope.read_answers([path], questions, Bad())[1] == ["a", "b"]


def test_answers_that_are_the_labels_are_doubted_aloud(tmp_path, capsys):
    questions = pope.read_questions([write(tmp_path / "q.json", [row(1), row(2)])], Bad())
    path = write(tmp_path / "a.jsonl", [{"question_id": i, "answer": "Yes"} for i in (1, 2)])
    pope.read_answers([path], questions, Bad())
    assert "is this a file of labels?" in capsys.readouterr().err


def test_one_file_of_answers_serves_several_files_of_questions_if_it_names_them(tmp_path):
    paths = [write(tmp_path / f"{name}.json", [row(1)]) for name in ("a", "b")]
    questions = pope.read_questions(paths, Bad())
    rows = [{"file": name, "question_id": 1, "text": name} for name in ("b", "a")]
    path = write(tmp_path / "answers.jsonl", rows)
    assert pope.read_answers([path], questions, Bad())[1] == ["a", "b"]
    nameless = write(tmp_path / "nameless.jsonl", [{"question_id": 1, "text": "yes"}])
    with pytest.raises(DataError, match="names no `file`"):
        pope.read_answers([nameless], questions, Bad())
    each = [write(tmp_path / f"{i}.jsonl", [{"question_id": 1, "text": i}]) for i in "12"]
    assert pope.read_answers(each, questions, Bad())[1] == ["1", "2"]
    with pytest.raises(DataError, match="3 files of answers"):
        pope.read_answers([*each, nameless], questions, Bad())


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([row(1), row(1)], "second time"),
        ([row(1, label="maybe")], "label is 'maybe'"),
        ([row(1, text=None)], "not a question"),
        ([[1]], "not an object"),
        ([], "no usable entry"),
    ],
)
def test_questions_that_cannot_be_used_name_their_line(tmp_path, rows, reason):
    path = write(tmp_path / "q.json", rows)
    with pytest.raises(DataError, match=reason) as error:
        pope.read_questions([path], Bad())
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"question_id": 3, "text": "yes"}], "question 3, which is not"),
        ([{"question_id": 1, "text": "a"}, {"question_id": 1, "text": "b"}], "second time"),
        ([{"question_id": 1}], "holds no answer"),
        ([{"question_id": 1, "text": "yes"}], "question 2: has no answer"),
        (
            [{"question_id": 1, "prompt": "Is there a dog?", "text": "no"}],
            "answers another question",
        ),
        ([{"text": "yes"}], "cannot be matched by order"),
        ([{"question_id": [1], "text": "yes"}], r"question_id is \[1\]"),
        ([row(1), row(2)], "holds no answer: `text` is what was asked"),
        ([{"question_id": 1, "label": "yes"}], "holds no answer"),
        ([{"question_id": 1, "answer": True}], "holds no answer"),
        ([{"question_id": 1, "prediction": "a", "response": "b"}], "`prediction` and `response`"),
        ([{"question_id": 1, "answer": "yes", "text": "no"}], "`answer` and `text` may both hold"),
        (
            [{"question_id": i, "answer": "yes", "category": "random"} for i in (1, 2)],
            "word for word, in rows of a data set",
        ),
    ],
)
def test_answers_that_cannot_be_used_say_why_or_are_dropped_and_counted(tmp_path, rows, reason):
    questions = pope.read_questions([write(tmp_path / "q.json", [row(1), row(2)])], Bad())
    path = write(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match=reason):
        pope.read_answers([path], questions, Bad())


def test_with_skip_bad_what_is_left_is_scored(tmp_path, capsys):
    questions = pope.read_questions([write(tmp_path / "q.json", [row(1), row(2)])], Bad())
    path = write(tmp_path / "a.jsonl", [{"question_id": 1, "text": "yes"}, {"question_id": 7}])
    bad = Bad(skip=True)
    kept, texts = pope.read_answers([path], questions, bad)
    assert [q.id for q in kept] == ["1"] and texts == ["yes"] and bad.dropped == 2
    assert "skipped" in capsys.readouterr().err


# -- questions of one's own --------------------------------------------------------------------
def instances():
    """Ten images; dogs stand beside cats, cars are the most frequent, a kite stands alone."""
    there = [{"cat", "dog", "car"}] * 4 + [{"car", "bus", "bike"}] * 5 + [{"kite", "cat", "oven"}]
    return Instances(
        images={i: (f"{i}.jpg", 10, 10) for i in range(10)},
        objects={
            i: [(name, (0, 0, 1, 1), None) for name in sorted(s)] for i, s in enumerate(there)
        },
    )


@pytest.mark.parametrize("split", pope.SPLITS)
def test_built_questions_are_true_half_yes_and_the_same_for_the_same_seed(split):
    rows = pope.build(instances(), split, images=6, pairs=2, seed=0)
    assert rows == pope.build(instances(), split, images=6, pairs=2, seed=0)
    assert len(rows) == 24 and sum(r["label"] == "yes" for r in rows) == 12
    for r in rows:
        name = r["text"].removesuffix(" in the image?").split(" ", 3)[3]
        there = {name for name, *_ in instances().objects[int(r["image"][0])]}
        assert (name in there) == (r["label"] == "yes")
    assert "Is there an oven in the image?" in {
        r["text"] for r in pope.build(instances(), split, 10, 3, 1)
    }


def test_popular_asks_for_what_is_frequent_and_adversarial_for_what_keeps_company():
    def absent(split, image):
        rows = pope.build(instances(), split, images=10, pairs=1, seed=0)
        return next(r["text"] for r in rows if r["image"] == f"{image}.jpg" and r["label"] == "no")

    assert absent("popular", 9) == "Is there a car in the image?"  # 9 of 10 images
    # beside the kite, cat and oven of image 9: car and dog 4 times each, with the cat
    assert absent("adversarial", 9) in (
        "Is there a car in the image?",
        "Is there a dog in the image?",
    )


def test_a_file_of_questions_is_a_data_file_for_training(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "1.jpg")
    path = write(tmp_path / "q.json", [row(1, "no")])
    (example,) = read_examples(path, tmp_path)
    assert (example.question, example.answer, example.kind) == ("Is there a cat 1?", "no", "yesno")


def test_nine_thousand_answers_are_scored_whole():
    rng = random.Random(0)
    labels = ["yes", "no"] * 4500
    answers = [rng.choice(("Yes", "No", "no, there is not", "Yes, a dog.")) for _ in labels]
    assert pope.score(labels, answers)["n"] == 9000
