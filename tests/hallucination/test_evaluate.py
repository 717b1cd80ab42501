"""The figures of the scene world, by hand; saved answers score as the model's own."""

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

import evaluate
from data import DataError
from hallucination import command, scenes
from hallucination.files import repair_lines
from hallucination.scenes import Probe, chair, make_probes, pope, score
from scm import Scene, Thing, question_about

BOAT, CAR = Thing("boat", "red", 0.27, 0.27, 0.4), Thing("car", "blue", 0.73, 0.73, 0.4)
SCENE = Scene((BOAT, CAR), "snow")  # the snowman is not at home


def said(answer):
    return f"<think> I see. </think> <answer> {answer} </answer>"


def test_chair_by_hand():
    example = question_about(SCENE, "caption", "")
    captions = [
        (example, "a red boat and a blue car"),  # 2 mentions, both there
        (example, "a boat and a snowman and a snowman"),  # 3 mentions, 2 absent
        (example, ""),
    ]
    figures = chair(captions)
    assert figures["chair_s"] == pytest.approx(1 / 3)
    assert figures["chair_i"] == pytest.approx(2 / 5)
    assert figures["recall"] == pytest.approx(3 / 6)
    assert figures["length"] == pytest.approx((7 + 8 + 0) / 3)


def test_a_figure_over_nothing_is_none_and_a_dash_in_the_table():
    figures = chair([(question_about(SCENE, "caption", ""), "a picture")])
    assert figures["chair_i"] is None and figures["chair_s"] == figures["recall"] == 0
    assert set(chair([]).values()) == {None}
    assert pope([]) == {"n": 0} | dict.fromkeys(
        ("accuracy", "precision", "recall", "f1", "yes_ratio")
    )
    probe = Probe(question_about(SCENE, "yesno", "boat"), ("random",))
    caption = Probe(question_about(SCENE, "caption", ""))
    twin = Probe(caption.example, redrawn=True)
    scored = score([probe, caption, twin], [said("yes"), said("a picture"), said("a picture")])
    table = scenes.compare_table({"model": dict.fromkeys(scenes.HELD_OUT, scored)})
    assert [line.split()[-1] for line in table.split("\n") if "adversarial" in line] == ["-"] * 4
    assert [line.split()[-1] for line in table.split("\n") if "CHAIR_I" in line] == ["-"] * 2


def test_pope_by_hand_yes_is_positive_and_anything_else_a_no():
    rows = [("yes", "yes"), ("yes", "no"), ("no", "Yes."), ("no", "no"), ("no", "")]
    figures = pope(rows)
    assert figures["accuracy"] == 3 / 5 and figures["yes_ratio"] == 2 / 5
    assert figures["precision"] == figures["recall"] == figures["f1"] == 1 / 2


def test_what_is_counted_is_what_the_reasoning_names():
    counted = [
        ("<think> I see a red boat and a snowman. </think> <answer> 2 </answer>", True, 1, 1 / 2),
        ("<think> I see a red boat. </think> <answer> 2 </answer>", True, 0, 1 / 2),
        ("I see a snowman. <answer> 3 </answer>", False, 0, 0),  # no reasoning
    ]
    for text, right, hallucinates, recall in counted:
        probe = Probe(question_about(SCENE, "number", ""))
        twin = Probe(probe.example, redrawn=True)
        found = score([probe, twin], [text, text])["counting"]
        assert (found["accuracy"], found["chair_s"], found["recall"]) == (
            right, hallucinates, recall,
        )  # fmt: skip


def test_score_by_hand():
    elsewhere = SCENE.do(background="sea")
    probes, answers = [], []
    for kind, topic, splits, here, there in (
        ("caption", "", (), "a boat", "a boat and a snowman"),  # flips: another set of objects
        ("number", "", (), "2", "two"),  # right; flips: other words
        ("yesno", "boat", ("random",), "yes", "Yes"),  # right; the same
        ("yesno", "snowman", ("random", "adversarial"), "yes", "no"),  # wrong; flips
    ):
        probes += [
            Probe(question_about(SCENE, kind, topic), splits),
            Probe(question_about(elsewhere, kind, topic), splits, True),
        ]
        answers += [said(here), said(there)]
    figures = score(probes, answers)
    assert figures["n"] == 1 and figures["malformed"] == 0
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["flip_rate"] == 3 / 4
    assert figures["chair_s"] == 0 and figures["recall"] == 1 / 2
    assert figures["pope"]["random"]["accuracy"] == 1 / 2 and figures["pope"]["random"]["n"] == 2
    # the one count's reasoning is "I see.": right, and names nothing
    assert figures["counting"]["accuracy"] == 1 and figures["counting"]["chair_s"] == 0
    assert figures["pope"]["adversarial"]["yes_ratio"] == 1 and figures["pope"]["popular"]["n"] == 0


def test_every_question_is_asked_again_over_another_background_with_the_same_answer():
    probes = make_probes(30, 0.5, seed=1)
    for here, there in zip(probes[::2], probes[1::2], strict=True):
        assert there.redrawn and not here.redrawn
        assert here.example.question == there.example.question
        assert here.example.answer == there.example.answer
        assert here.example.scene.things == there.example.scene.things
        assert here.example.scene.background != there.example.scene.background


def test_pope_splits_are_half_yes_and_adversarial_asks_for_the_absent_home():
    asked = [p for p in make_probes(60, 1 / 8, seed=2) if not p.redrawn]
    for split in scenes.SPLITS:
        labels = [p.example.answer for p in asked if split in p.splits]
        assert labels.count("yes") == labels.count("no") > 0
    for probe in asked:
        if probe.splits == ("adversarial",):
            assert (
                probe.example.topic
                == probe.example.scene.home
                not in probe.example.scene.categories
            )


def test_held_out_scenes_are_the_same_every_time():
    assert make_probes(5, 0.9, 3) != make_probes(5, 0.9, 4)
    a, b = make_probes(5, 0.9, 3), make_probes(5, 0.9, 3)
    assert [p.example.scene for p in a] == [p.example.scene for p in b]


def test_saved_answers_score_as_the_model_did_without_loading_it(
    policy, tmp_path, capsys, monkeypatch
):
    policy.save(tmp_path / "model")
    flags = ["scenes", "--scenes", "4"]
    saved, first, second = (str(tmp_path / name) for name in ("answers.jsonl", "1.json", "2.json"))
    model = ["--model", str(tmp_path / "model"), "--save", saved, "--json", first]
    model += ["--batch-size", "7"]
    assert evaluate.main([*flags, *model]) == 0
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("a model was loaded"))
    assert evaluate.main([*flags, "--answers", saved, "--json", second]) == 0
    with open(first) as a, open(second) as b:
        assert json.load(a) == json.load(b)
    assert "CHAIR_S" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"text": "a"}\n', "1 answers"),
        ("{\n", ":1: "),
        ("[1]", "not an object"),
        ("", "no usable entry"),
        (None, "answers.jsonl"),
    ],
)
def test_answers_that_cannot_be_used_end_with_code_2_and_one_line(tmp_path, capsys, text, reason):
    path = tmp_path / "answers.jsonl"
    if text is not None:
        path.write_text(text)
    assert evaluate.main(["scenes", "--answers", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error and "\n" not in error


# -- the commands, from end to end -------------------------------------------------------------
@pytest.fixture(scope="module")
def model(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    policy.save(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    """Three pictures of different sizes under COCO's names."""
    folder = tmp_path / "val2014"
    folder.mkdir()
    for i, side in enumerate((40, 64, 52), 1):
        SCENE.render(side).crop((0, 0, side, 32)).save(folder / f"COCO_val2014_{i:012d}.jpg")
    return folder


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def run(arguments, tmp_path, batch_size, name):
    """Figures and saved completions of a command that asks the model."""
    save, figures = tmp_path / f"{name}.jsonl", tmp_path / f"{name}.json"
    code = evaluate.main(
        [*arguments, "--batch-size", str(batch_size), "--save", str(save), "--json", str(figures)]
    )
    assert code == 0
    return json.loads(figures.read_text()), save


def assert_the_same_for_batch_size_1_and_16(arguments, tmp_path):
    one, answers = run([*arguments, "--max-new-tokens", "8"], tmp_path, 1, "one")
    many, again = run([*arguments, "--max-new-tokens", "8"], tmp_path, 16, "many")
    assert answers.read_text() == again.read_text() and one == many
    return one, answers


def test_pope_end_to_end(model, pictures, tmp_path, capsys):
    names = sorted(path.name for path in pictures.iterdir())
    files = [
        lines(
            tmp_path / f"coco_pope_{split}.json",
            [
                {
                    "question_id": i,
                    "image": name,
                    "text": f"Is there a {what} in the image?",
                    "label": label,
                }
                for i, (name, what, label) in enumerate(
                    zip(names * 2, ("boat", "car", "cat") * 2, ("yes", "no") * 3, strict=True), 1
                )
            ],
        )
        for split in ("random", "popular")
    ]
    asked = ["pope", "--questions", *files, "--images", str(pictures), "--model", model]
    figures, answers = assert_the_same_for_batch_size_1_and_16(asked, tmp_path)
    assert figures["coco_pope_random"]["n"] == 6 and figures["mean"]["n"] == 12
    assert "accuracy" in capsys.readouterr().out

    again = str(tmp_path / "again.json")
    saved = ["pope", "--questions", *files, "--answers", str(answers), "--json", again]
    assert evaluate.main(saved) == 0
    with open(again) as file:
        assert json.load(file) == figures
    limited, _ = run([*asked, "--limit", "2"], tmp_path, 4, "limited")
    assert limited["mean"]["n"] == 4


def test_mme_end_to_end(model, pictures, tmp_path):
    root = tmp_path / "MME"
    for task in ("existence", "color"):
        (root / task).mkdir(parents=True)
        for picture in pictures.iterdir():
            (root / task / picture.name).write_bytes(picture.read_bytes())
            (root / task / f"{picture.stem}.txt").write_text("Is it?\tYes\nIs it not?\tNo\n")
    figures, _ = assert_the_same_for_batch_size_1_and_16(
        ["mme", "--root", str(root), "--model", model], tmp_path
    )
    assert figures["tasks"]["existence"]["n"] == 6 and figures["cognition"] is None
    assert figures["perception"] == figures["hallucination"]


@pytest.mark.parametrize(
    ("image", "reason"),
    [("absent.jpg", "does not exist"), ("../secret.jpg", "lies outside"), ("", "does not exist")],
)
def test_an_image_that_cannot_be_had_ends_with_code_2_before_a_model_is_loaded(
    pictures, tmp_path, capsys, monkeypatch, image, reason
):
    monkeypatch.setattr(command, "load_model", lambda *_: pytest.fail("a model was loaded"))
    rows = [{"question_id": 1, "image": image, "text": "Is there a cat?", "label": "no"}]
    questions = lines(tmp_path / "q.json", rows)
    asked = ["pope", "--questions", questions, "--images", str(pictures), "--model", "m"]
    assert evaluate.main(asked) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error and "\n" not in error


def test_saved_answers_are_scored_without_importing_torch(tmp_path):
    rows = [{"question_id": 1, "image": "a.jpg", "text": "Is there a cat?", "label": "no"}]
    questions = lines(tmp_path / "q.json", rows)
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 1, "text": "no"}])
    code = (
        f"import sys, evaluate; evaluate.main(['pope', '--questions', {questions!r}, '--answers', "
        f"{answers!r}]); sys.exit('torch' in sys.modules)"
    )
    root = Path(evaluate.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, stdout=subprocess.DEVNULL)


def test_a_pickle_is_never_opened(tmp_path, capsys):
    path = tmp_path / "chair.pkl"
    path.write_bytes(pickle.dumps({"a": 1}))
    assert evaluate.main(["pope", "--questions", str(path), "--answers", str(path)]) == 2
    assert "pickle" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["pope", "--questions", "q.json"],
        ["pope", "--questions", "q.json", "--model", "m"],
        ["pope", "--questions", "q.json", "--model", "m", "--answers", "a"],
        ["scenes", "--model", "m", "--batch-size", "0"],
    ],
)
def test_flags_that_do_not_fit_together_end_with_usage_and_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        evaluate.main(arguments)
    assert end.value.code == 2 and "usage" in capsys.readouterr().err


def test_judge_end_to_end_with_a_local_model(model, pictures, tmp_path, capsys):
    names = sorted(path.name for path in pictures.iterdir())
    for side, text in (
        ("a", "a boat and a car"),
        ("b", "<think> hm </think> <answer> sky </answer>"),
    ):
        rows = [{"question_id": i, "image": name, "text": text} for i, name in enumerate(names)]
        lines(tmp_path / f"{side}.jsonl", rows)
    prompts, replies = str(tmp_path / "prompts.jsonl"), str(tmp_path / "replies.jsonl")
    figures = tmp_path / "figures.json"
    answers = [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl")]
    exported = ["judge", "export", "--answers", *answers, "--names", "GRPO", "COPO"]
    assert evaluate.main([*exported, "--output", prompts]) == 0
    short = tmp_path / "short.txt"  # the tiny model reads no more than a thousand tokens
    short.write_text("{question} {answer_1} {answer_2}")
    assert evaluate.main([*exported, "--output", prompts, "--prompt", str(short)]) == 0
    judged = ["judge", "run", "--prompts", prompts, "--save", replies, "--images", str(pictures)]
    judged += ["--judge-model", model, "--max-new-tokens", "4"]
    assert evaluate.main(judged) == 0
    before = Path(replies).read_text()
    assert len(before.splitlines()) == 6 and evaluate.main(judged) == 0
    assert Path(replies).read_text() == before  # nothing is asked twice
    imported = ["judge", "import", "--prompts", prompts, "--replies", replies]
    assert evaluate.main([*imported, "--json", str(figures)]) == 0
    assert json.loads(figures.read_text())["unread"] == 18  # a random model scores nothing
    rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    lines(
        tmp_path / "replies.jsonl",
        [
            {"id": row["id"], "reply": "Accuracy: 7 9\nCorrectness: 5 5\nDetailedness: 3 1"}
            for row in rows
        ],
    )
    assert evaluate.main([*imported, "--json", str(figures)]) == 0
    result = json.loads(figures.read_text())
    assert result["accuracy"]["GRPO"] == 8 and result["accuracy"]["win"]["tie"] == 1
    assert result["order_bias"] == {"accuracy": -2, "correctness": 0, "detailedness": 2}
    assert "GRPO wins" in capsys.readouterr().out


def test_a_file_that_is_no_file_of_answers_is_left_as_it_is(tmp_path):
    path = tmp_path / "config.json"
    for text in ('{"a": 1,\n "b": 2}', "[1, 2]"):
        path.write_text(text)
        with pytest.raises(DataError):
            repair_lines(path)
        assert path.read_text() == text


def test_ctrl_c_is_one_line_and_code_130(tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "load_model", stopped)
    monkeypatch.setattr(scenes, "load_model", stopped, raising=False)
    assert evaluate.main(["scenes", "--model", str(tmp_path)]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped")
