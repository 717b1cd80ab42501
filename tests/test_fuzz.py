"""Broken input of every kind gets an answer or one clear line: no traceback, no hang, nothing touched.

1,000 mutated files in CI; `pytest tests/test_fuzz.py --fuzz 100000` for longer.
"""

import contextlib
import io
import json
import random
import signal

import pytest
from PIL import Image

import evaluate
import report
import train
from hallucination.coco import COCO_CATEGORIES

SNIPPETS = (
    b"\x00", b"\xff\xfe", b"\x80\x04", b"null", b"{}", b"[]", b"NaN", b"-1", b"1e999", b"true", b'"',
    b"\\u0000", b"../../etc/passwd", b"<think>", b"</answer>", b"\n", b"\t", b",", b":", b"{", b"]",
    b"9" * 400, "\N{SNOWMAN}".encode(), b"[" * 3000,
)  # fmt: skip


def mutate(raw, rng):
    """One to three edits of bytes: flip, cut, drop, repeat, insert, or a value for a value."""
    for _ in range(rng.randint(1, 3)):
        a, b = sorted(rng.randrange(len(raw) + 1) for _ in range(2))
        b = min(b, a + 40)
        kind = rng.randrange(6)
        if kind == 0 and raw:
            a = min(a, len(raw) - 1)
            raw = raw[:a] + bytes([raw[a] ^ 1 << rng.randrange(8)]) + raw[a + 1 :]
        elif kind == 1:
            raw = raw[:a]
        elif kind == 2:
            raw = raw[:a] + raw[b:]
        elif kind == 3:
            raw = raw[:b] + raw[a:b] + raw[b:]
        elif kind == 4:
            raw = raw[:a] + rng.choice(SNIPPETS) + raw[a:]
        else:
            values = [b"1", b'"yes"', b'"no"', b'"text"', b"[", b"Yes"]
            old = rng.choice(values)
            raw = raw.replace(old, rng.choice(SNIPPETS), rng.randint(1, 3))
    return raw


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with one small input of every kind, and the commands that read each of its files."""
    root = tmp_path_factory.mktemp("fuzz")
    images = root / "images"
    images.mkdir()
    names = [f"COCO_val2014_{i:012d}.jpg" for i in (1, 2)]
    for name in (*names, "a.png"):
        Image.new("RGB", (12, 8), "red").save(images / name)
    questions = [
        {"question_id": i, "image": name, "text": "Is there a dog?", "label": label}
        for i, (name, label) in enumerate(zip(names, ("yes", "no"), strict=True), 1)
    ]
    categories = [{"id": i, "name": name} for i, name in enumerate(COCO_CATEGORIES, 1)]
    pictures = [
        {"id": i, "file_name": name, "width": 12, "height": 8} for i, name in enumerate(names, 1)
    ]
    boxes = [
        {
            "image_id": i,
            "category_id": i,
            "bbox": [1, 1, 4, 4],
            "segmentation": [[1, 1, 5, 1, 5, 5]],
        }
        for i in (1, 2)
    ]
    files = {
        "data.jsonl": lines(
            [{"image": "a.png", "question": "Is it?", "answer": "yes", "objects": ["dog"]}] * 2
        ),
        "questions.json": lines(questions),
        "answers.jsonl": lines([{"question_id": i, "text": "yes"} for i in (1, 2)]),
        "captions.json": json.dumps(
            {"imgToEval": {str(i): {"image_id": i, "caption": "a dog"} for i in (1, 2)}}
        ),
        "synonyms.txt": "\n".join(f"{name}, a {name}" for name in COCO_CATEGORIES),
        "coco/instances_val2014.json": json.dumps(
            {"images": pictures, "annotations": boxes, "categories": categories}
        ),
        "coco/captions_val2014.json": json.dumps(
            {"images": pictures, "annotations": [{"image_id": 1, "caption": "A dog"}]}
        ),
        "mme/existence.txt": "a.png\tIs it?\tYes\tYes\na.png\tIs it not?\tNo\tno\n",
        "prompt.txt": "{question} {answer_1} {answer_2}",
        "prompts.jsonl": lines(
            {"id": f"1:{o}", "prompt": "?", "first": o[0], "second": o[1]} for o in ("ab", "ba")
        ),
        "replies.jsonl": lines({"id": f"1:{o}", "reply": "Accuracy: 7 9"} for o in ("ab", "ba")),
        "scenes.jsonl": lines([{"text": "<answer> yes </answer>"}] * 24),
        "run/metrics.csv": "step,reward,sufficiency,necessity,causal_share,kl,entropy,rows_scored,"
        "scoring_token_forwards,rollout_seconds,score_seconds,update_seconds\n1"
        + ",0.5" * 11
        + "\n",
        "run/samples.jsonl": lines(
            [
                {
                    "step": 1,
                    "prompt": "?",
                    "answer": "yes",
                    "image": str(images / "a.png"),
                    "reward": 1,
                    "tokens": ["a"],
                    "reasoning": [True],
                    "sufficiency": [0.5],
                    "necessity": [0.5],
                    "causal_reward": [0.3],
                    "advantage": [0.1],
                }
            ]
        ),
        "run/args.json": "{}",
        "model/config.json": json.dumps({"model_type": "llava", "text_config": {}}),
    }
    for name, text in files.items():
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(text)

    def path(name):
        return str(root / name)

    pope = ["pope", "--questions", path("questions.json"), "--answers", path("answers.jsonl")]
    chair = ["chair", "--coco", path("coco"), "--captions", path("captions.json")]
    answers = [path("answers.jsonl")] * 2
    build = ["pope-build", "--coco", path("coco/instances_val2014.json"), "--pairs", "1"]
    judge = ["--prompts", path("prompts.jsonl"), "--replies", path("replies.jsonl")]
    data = ["--data", path("data.jsonl"), "--images", path("images"), "--model", path("model")]
    export = ["judge", "export", "--answers", *answers, "--prompt", path("prompt.txt")]
    commands = [
        (train.main, [*data, "--output", path("out/run")], ["data.jsonl", "images/a.png"]),
        (train.main, [*data, "--output", path("out/run")], ["model/config.json"]),
        (evaluate.main, pope, ["questions.json", "answers.jsonl"]),
        (
            evaluate.main,
            [*pope, "--skip-bad", "--parser", "strict"],
            ["questions.json", "answers.jsonl"],
        ),
        (evaluate.main, chair, ["captions.json", "coco/captions_val2014.json"]),
        (evaluate.main, [*chair, "--skip-bad"], ["captions.json", "coco/instances_val2014.json"]),
        (evaluate.main, [*chair, "--synonyms", path("synonyms.txt")], ["synonyms.txt"]),
        (evaluate.main, [*build, "--output", path("out/q.json")], ["coco/instances_val2014.json"]),
        (evaluate.main, ["mme", "--root", path("mme")], ["mme/existence.txt"]),
        (evaluate.main, [*export, "--output", path("out/p")], ["answers.jsonl", "prompt.txt"]),
        (evaluate.main, ["judge", "import", *judge], ["prompts.jsonl", "replies.jsonl"]),
        (
            evaluate.main,
            ["scenes", "--scenes", "1", "--answers", path("scenes.jsonl")],
            ["scenes.jsonl"],
        ),
        (report.main, [path("run")], ["run/metrics.csv", "run/samples.jsonl", "run/args.json"]),
    ]
    return root, commands


def told(main, arguments):
    """The exit code and what was said; a hang of 5 seconds fails."""

    def hang(*_):
        raise TimeoutError("hangs")

    said = io.StringIO()
    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(5)
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            return main(arguments), said.getvalue()
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def snapshot(root):
    ours = ("out/", "run/report.html", "coco/chair_ground_truth")
    files = {p.relative_to(root).as_posix(): p for p in root.rglob("*") if p.is_file()}
    return {name: p.read_bytes() for name, p in files.items() if not name.startswith(ours)}


def test_mutated_input_gets_an_answer_or_one_clear_line(world, request, monkeypatch):
    root, commands = world
    monkeypatch.chdir(root)
    rng = random.Random(0)
    untouched = snapshot(root)
    refused = 0
    for i in range(request.config.getoption("--fuzz")):
        main, arguments, names = commands[i % len(commands)]
        target = root / rng.choice(names)
        original = target.read_bytes()
        target.write_bytes(mutate(original, rng))
        try:
            code, said = told(main, arguments)
        except BaseException as error:
            pytest.fail(f"input {i}, {target.name}: {error!r}\n{target.read_bytes()[:2000]!r}")
        finally:
            target.write_bytes(original)
        assert code in (0, 2), (i, target.name, code)
        if code == 2:
            refused += 1
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            assert errors, (i, target.name, said)
            assert len(errors) == 1 or "data.jsonl" in said, (i, said)  # a line for each bad line
    assert snapshot(root) == untouched
    assert refused > request.config.getoption("--fuzz") / 4  # the mutations do break things


def test_the_files_are_good_before_they_are_mutated(world):
    for main, arguments, names in world[1]:
        if main is not train.main:  # its model is none
            assert told(main, arguments)[0] == 0, names
