"""The figures of the scene world, by hand; saved answers score as the model's own."""

import json

import pytest

import evaluate
from data import Scene, Thing, ask
from hallucination import scenes
from hallucination.scenes import Probe, chair, make_probes, pope, score

BOAT, CAR = Thing("boat", "red", 0.27, 0.27, 0.4), Thing("car", "blue", 0.73, 0.73, 0.4)
SCENE = Scene((BOAT, CAR), "snow")  # the snowman is not at home


def said(answer):
    return f"<think> I see. </think> <answer> {answer} </answer>"


def test_chair_by_hand():
    example = ask(SCENE, "caption", "")
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


def test_captions_that_name_nothing_divide_by_nothing():
    assert chair([(ask(SCENE, "caption", ""), "a picture")])["chair_i"] == 0


def test_pope_by_hand_yes_is_positive_and_anything_else_a_no():
    rows = [("yes", "yes"), ("yes", "no"), ("no", "Yes."), ("no", "no"), ("no", "")]
    figures = pope(rows)
    assert figures["accuracy"] == 3 / 5 and figures["yes_ratio"] == 2 / 5
    assert figures["precision"] == figures["recall"] == figures["f1"] == 1 / 2


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
            Probe(ask(SCENE, kind, topic), splits),
            Probe(ask(elsewhere, kind, topic), splits, True),
        ]
        answers += [said(here), said(there)]
    figures = score(probes, answers)
    assert figures["n"] == 1 and figures["malformed"] == 0
    assert figures["accuracy"] == pytest.approx(2 / 3)
    assert figures["flip_rate"] == 3 / 4
    assert figures["chair_s"] == 0 and figures["recall"] == 1 / 2
    assert figures["pope"]["random"]["accuracy"] == 1 / 2 and figures["pope"]["random"]["n"] == 2
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
    model = [
        "--model",
        str(tmp_path / "model"),
        "--save",
        saved,
        "--json",
        first,
        "--batch-size",
        "7",
    ]
    assert evaluate.main([*flags, *model]) == 0
    monkeypatch.setattr("model.load_policy", lambda *_: pytest.fail("a model was loaded"))
    assert evaluate.main([*flags, "--answers", saved, "--json", second]) == 0
    with open(first) as a, open(second) as b:
        assert json.load(a) == json.load(b)
    assert "CHAIR_S" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"completion": "a"}\n', "1 answers"),
        ("{\n", ":1: "),
        ('{"text": "a"}\n', ":1: "),
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
