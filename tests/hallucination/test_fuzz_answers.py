"""Answer files of five other tools, broken in a thousand ways each: figures or one line, and never a lie."""

import json
import random

import pytest

import evaluate
from data import DataError
from hallucination.coco import COCO_CATEGORIES

THINGS = ("dog", "cat", "car", "bus", "boat", "tie")
LABELS = ("yes", "no", "no", "yes", "yes", "no")
SAID = ("Yes, a dog.", "yes", "No", "There is no bus.", "<think> hm </think> yes", "I cannot tell")
VALUES = (
    None, True, 0, 1, 2.0, -1, 1e400, float("nan"), 2**70, "", " ", "yes", "no", "\x00", "\u2028", "\ufeff",
    "\ud800", "\U0001f436", "<think>", "<answer>", "Is there a dog in the image?", [], [[]], ["yes"],
    [["no"]], {}, {"question": 1}, {"a": ["b"]}, "9" * 5000, "COCO_val2014_000000000001.jpg",
)  # fmt: skip
BYTES = (
    b"\x00",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xe2\x80\xa8",
    b"\r",
    b"\n",
    b"{",
    b"}",
    b"[",
    b'"',
    b",",
    b"\\",
)


def question(i):
    return f"Is there a {THINGS[i]} in the image?"


def rows_of(form, said=SAID):
    """Six rows as a tool writes them."""
    make = {
        "VLMEvalKit": lambda i: {
            "index": i, "category": "random", "question": question(i), "answer": LABELS[i].title(),
            "prediction": said[i],
        },
        "lmms-eval": lambda i: {
            "doc_id": i, "doc": {"question": question(i), "answer": LABELS[i]}, "target": LABELS[i],
            "resps": [[said[i] + " "]], "filtered_resps": [said[i]],
        },
        "LLaVA": lambda i: {
            "question_id": i, "prompt": f"{question(i)}\nAnswer with a single word.", "text": said[i],
            "answer_id": "x", "model_id": "m", "metadata": {},
        },
        "POPE": lambda i: {"question": question(i), "answer": said[i]},
        "CHAIR": lambda i: {"image_id": i, "caption": f"A picture of a {THINGS[i]}."},
    }[form]  # fmt: skip
    return [make(i) for i in range(6)]


FORMS = ("VLMEvalKit", "lmms-eval", "LLaVA", "POPE", "CHAIR")


def mutated(rows, rng):
    """The bytes of a file with one to three faults in its rows, its form, or its bytes."""
    rows = json.loads(json.dumps(rows))
    for _ in range(rng.randint(1, 3)):
        row, other = rng.choice(rows), rng.choice(rows)
        key = rng.choice([*row, "text", "answer"])
        kind = rng.randrange(7)
        if kind == 0:
            row.pop(key, None)
        elif kind == 1:
            row[key] = rng.choice(VALUES)
        elif kind == 2:
            row[key], other[key] = other.get(key), row.get(key)
        elif kind == 3:
            rows.insert(rng.randrange(len(rows)), json.loads(json.dumps(row)))
        elif kind == 4 and len(rows) > 1:
            rows.pop(rng.randrange(len(rows)))
        elif kind == 5:
            value = rng.choice(VALUES)
            rows = [r | {key: value} for r in rows]
        else:
            row[rng.choice(("text", "answer", "response", "prediction"))] = row.get(key)
    raw = json.dumps(rows) if rng.random() < 0.3 else "".join(json.dumps(r) + "\n" for r in rows)
    if rng.random() < 0.1:
        raw = json.dumps({"imgToEval": dict(enumerate(rows))})
    raw = raw.encode()
    if rng.random() < 0.3:
        at = rng.randrange(len(raw) + 1)
        raw = raw[:at] + (rng.choice(BYTES) + raw[at:] if rng.random() < 0.7 else b"")
    return raw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Questions of POPE, and a folder like COCO 2014's where each picture holds what its caption names."""
    root = tmp_path_factory.mktemp("answers")
    rows = [
        {"question_id": i, "image": f"{i}.jpg", "text": question(i), "label": LABELS[i]}
        for i in range(6)
    ]
    (root / "q.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    names = list(COCO_CATEGORIES)
    images = [{"id": i, "file_name": f"{i}.jpg", "width": 9, "height": 9} for i in range(6)]
    there = [
        {"image_id": i, "category_id": names.index(thing), "bbox": [1, 1, 2, 2]}
        for i, thing in enumerate(THINGS)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(names)]
    instances = {"images": images, "annotations": there, "categories": categories}
    (root / "instances_val2014.json").write_text(json.dumps(instances))
    (root / "captions_val2014.json").write_text(json.dumps({"images": images, "annotations": []}))
    return root


def figures_of(folder, form, raw, skip_bad=False):
    """Figures of a file's bytes, or None where it is refused; anything but a DataError is a fault."""
    path = folder / "answers.json"
    path.write_bytes(raw)
    if form == "CHAIR":
        argv = ["chair", "--coco", str(folder), "--captions", str(path)]
    else:
        argv = ["pope", "--questions", str(folder / "q.json"), "--answers", str(path)]
    args = parsed(tuple(argv + ["--skip-bad"] * skip_bad))
    try:
        figures, text = args.run(args)
    except DataError as error:
        assert str(error) and "\n" not in str(error)
        return None
    json.dumps(figures)
    assert text
    return figures


PARSED = {}


def parsed(argv):
    if argv not in PARSED:
        PARSED[argv] = evaluate.parse_arguments(argv)
    return PARSED[argv]


@pytest.mark.parametrize("form", FORMS)
def test_a_whole_file_of_every_tool_is_scored(folder, form):
    figures = figures_of(folder, form, json.dumps(rows_of(form)).encode())
    assert figures["n"] == 6
    assert form == "CHAIR" or figures["accuracy"] == pytest.approx(3 / 6)


@pytest.mark.parametrize("form", FORMS)
def test_a_broken_file_gives_figures_or_one_line(folder, form, capsys):
    rng, scored = random.Random(f"answers {form}"), 0
    for i in range(1000):
        figures = figures_of(folder, form, mutated(rows_of(form), rng), skip_bad=i % 2)
        scored += figures is not None
        capsys.readouterr()
    assert 0 < scored < 1000


@pytest.mark.parametrize("form", FORMS)
def test_a_file_of_questions_or_of_labels_never_scores_in_silence(folder, form, capsys):
    rng = random.Random(f"labels {form}")
    for i in range(200):
        rows = rows_of(form, LABELS)
        for row in rows:
            for key in ("prediction", "resps", "filtered_resps", "caption"):
                row.pop(key, None)  # what the model has said
            if form == "LLaVA":
                row |= {"text": question(row["question_id"]), "label": LABELS[row["question_id"]]}
        rows = rng.sample(rows, 6) if form == "LLaVA" else rows
        raw = (
            json.dumps(rows).encode() if i % 2 else b"\n".join(json.dumps(r).encode() for r in rows)
        )
        capsys.readouterr()
        figures = figures_of(folder, form, raw, skip_bad=i % 3 == 0)
        assert figures is None or "is this a file of labels?" in capsys.readouterr().err
        assert figures is None or form == "POPE"  # rows of question and answer tell nothing more


def test_the_command_ends_with_code_2(folder, capsys):
    path = folder / "answers.json"
    path.write_text('{"question_id": 1, "label": "yes"}\n')
    assert (
        evaluate.main(["pope", "--questions", str(folder / "q.json"), "--answers", str(path)]) == 2
    )
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "holds no answer" in said
