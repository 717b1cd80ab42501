"""Every command answers by every rule that --decoding names, and refuses what makes no sense in a line."""

import argparse
import dataclasses
import json

import pytest

import evaluate
from baselines.settings import OPERA, RULES, VCD, Beam, DeCo, DoLa, Plain, Rule
from data import DataError
from hallucination import answers, command
from hallucination.answers import Decoding, answer_all
from hallucination.coco import COCO_CATEGORIES
from scm import Scene, Thing

SCENE = Scene((Thing("boat", "red", 0.3, 0.3, 0.4),), "sea")
DECODING = Decoding("a model", max_new_tokens=6)


def rule_of(*flags):
    parser = argparse.ArgumentParser()
    command.add_model(parser, max_new_tokens=8)
    return command.rule_of(parser.parse_args(flags))


@pytest.fixture
def world(tmp_path, policy, monkeypatch):
    """Arguments of each command about two pictures, and a model that is there already."""
    monkeypatch.setattr(command, "load_model", lambda *_: policy)
    images, root, coco = (tmp_path / name for name in ("val2014", "MME", "coco"))
    (root / "existence").mkdir(parents=True)
    (coco / "annotations").mkdir(parents=True)
    images.mkdir()
    files = [f"COCO_val2014_{i:012d}.jpg" for i in (1, 2)]
    for i, name in enumerate(files):
        SCENE.render(40 + i).save(images / name)
        SCENE.render(40 + i).save(root / "existence" / name)
        stem = (root / "existence" / name).with_suffix(".txt")
        stem.write_text("Is it?\tYes\nIs it not?\tNo\n")
    asked = [
        {"question_id": i, "image": name, "text": f"Is there a {what}?", "label": "yes"}
        for i, (name, what) in enumerate(zip(files, ("boat", "red car"), strict=True))
    ]
    questions = tmp_path / "questions.json"
    questions.write_text("".join(json.dumps(row) + "\n" for row in asked))
    shown = [
        {"id": i, "file_name": name, "width": 40, "height": 40} for i, name in enumerate(files, 1)
    ]
    named = [{"id": i, "name": name} for i, name in enumerate(COCO_CATEGORIES, 1)]
    box = {"image_id": 1, "category_id": 1, "bbox": [0, 0, 9, 9]}
    instances = {"images": shown, "categories": named, "annotations": [box]}
    captions = {"images": shown, "annotations": [{"image_id": 1, "caption": "A boat"}]}
    for kind, value in (("instances", instances), ("captions", captions)):
        (coco / "annotations" / f"{kind}_val2014.json").write_text(json.dumps(value))
    common = ["--model", "m", "--max-new-tokens", "4"]
    return {
        "scenes": ["scenes", "--scenes", "1", *common],
        "pope": ["pope", "--questions", str(questions), "--images", str(images), *common],
        "chair": ["chair", "--coco", str(coco), "--images", str(images), *common],
        "mme": ["mme", "--root", str(root), *common],
    }


def texts(save):
    return [json.loads(line)["text"] for line in save.read_text().splitlines()]


@pytest.mark.parametrize(
    "flags",
    [
        ["greedy"],
        ["sample"],
        ["greedy", "--repetition-penalty", "1.2"],
        ["beam", "--num-beams", "2"],
        ["vcd", "--vcd-alpha", "0.5", "--vcd-noise-step", "999", "--temperature", "1"],
        ["dola", "--dola-layers", "1,2", "--dola-relative-top", "0.2"],
        ["deco", "--deco-alpha", "0.5", "--deco-top-p", "0.8"],
        ["opera", "--num-beams", "2", "--opera-candidates", "2"],
    ],
    ids=" ".join,
)
def test_every_command_answers_by_every_rule(world, tmp_path, capsys, flags):
    names = (
        ("pope",) if flags[0] in ("greedy", "sample", "beam", "opera") else ("pope", "chair", "mme")
    )
    names = (*names, "chair", "mme", "scenes") if flags[0] == "deco" else names
    for name in dict.fromkeys(names):
        save = tmp_path / f"{name}.jsonl"
        assert evaluate.main([*world[name], "--decoding", *flags, "--save", str(save)]) == 0
        rows = [json.loads(line) for line in save.read_text().splitlines()]
        plain = flags[0] in ("greedy", "sample") and len(flags) == 1
        assert all(row.get("decoding", {}).get("name") == (
            None if plain else "plain" if flags[0] == "greedy" else flags[0]
        ) for row in rows)  # fmt: skip
        assert {row["temperature"] for row in rows} == {
            1.0 if flags[0] == "sample" or "--temperature" in flags else 0.0
        }


@pytest.mark.parametrize(
    "flags",
    [
        ["vcd", "--vcd-alpha", "0"],
        ["deco", "--deco-alpha", "0"],
        ["dola", "--dola-layers", "1", "--dola-relative-top", "1", "--repetition-penalty", "1"],
        ["beam", "--num-beams", "1"],
    ],
    ids=lambda flags: flags[0],
)
def test_null_controls_answer_as_greedy_does(world, tmp_path, flags):
    greedy, null = tmp_path / "greedy.jsonl", tmp_path / "null.jsonl"
    assert evaluate.main([*world["pope"], "--save", str(greedy)]) == 0
    assert evaluate.main([*world["pope"], "--decoding", *flags, "--save", str(null)]) == 0
    assert texts(null) == texts(greedy)


def test_captions_say_how_they_were_decoded(world, tmp_path):
    figures = tmp_path / "figures.json"
    for flags, want in (
        ([], "greedy"),
        (["--decoding", "sample"], "temperature 1"),
        (["--decoding", "beam", "--num-beams", "2"], "beam (num beams 2)"),
    ):
        save = ["--save", str(tmp_path / f"{want}.jsonl"), "--json", str(figures)]
        assert evaluate.main([*world["chair"], *flags, *save]) == 0
        assert json.loads(figures.read_text())["decoding"] == want


# -- the identity of saved answers -------------------------------------------------------------
@pytest.fixture
def questions(examples):
    return [({"question_id": i}, example) for i, example in enumerate(examples)]


@pytest.mark.parametrize(
    ("first", "then"),
    [
        (None, VCD()),
        (VCD(), None),
        (VCD(), VCD(alpha=0.5)),
        (DeCo(), VCD()),
        (Beam(num_beams=2), Beam(num_beams=3)),
    ],
    ids=str,
)
def test_a_file_of_another_decoding_is_refused_and_left_alone(
    policy, questions, tmp_path, first, then
):
    save = tmp_path / "answers.jsonl"
    made, other = (dataclasses.replace(DECODING, rule=rule) for rule in (first, then))
    whole = answer_all(lambda: policy, questions, made, save)
    before = save.read_text()
    with pytest.raises(DataError, match="another decoding"):
        answer_all(lambda: pytest.fail("the model was loaded"), questions, other, save)
    assert save.read_text() == before

    lines = before.splitlines(keepends=True)
    save.write_text("".join(lines[:1]) + lines[1][:30])  # killed while it wrote the second
    assert answer_all(lambda: policy, questions, made, save, batch_size=1) == whole
    assert save.read_text() == before
    assert answers.answers_file("pope", questions, made) != answers.answers_file(
        "pope", questions, other
    )


def test_without_a_rule_a_row_says_what_it_always_said(policy, questions, tmp_path):
    save = tmp_path / "answers.jsonl"
    answer_all(lambda: policy, questions[:1], DECODING, save)
    assert list(json.loads(save.read_text())) == [
        "question_id", "prompt", "model_id", "max_new_tokens", "temperature", "seed", "think", "text",
    ]  # fmt: skip


def test_rules_meet_the_draws_that_plain_sampling_meets(policy, questions):
    drawn = dataclasses.replace(DECODING, temperature=1.0)
    plain = answer_all(lambda: policy, questions, drawn)
    null = dataclasses.replace(drawn, rule=VCD(alpha=0.0, beta=0.0))
    assert answer_all(lambda: policy, questions, null) == plain


# -- flags -------------------------------------------------------------------------------------
def test_flags_make_the_rules_with_their_authors_settings_by_default():
    assert rule_of() == rule_of("--decoding", "greedy") == (None, 0.0)
    assert rule_of("--temperature", "0.5") == (None, 0.5)
    assert rule_of("--decoding", "sample") == (None, 1.0)
    assert rule_of("--decoding", "greedy", "--repetition-penalty", "1.2") == (Plain(1.2), 0.0)
    assert rule_of("--decoding", "beam", "--num-beams", "3") == (Beam(3), 0.0)
    vcd = ["--decoding", "vcd", "--vcd-alpha", "0.5", "--vcd-beta", "0.2", "--vcd-noise-step", "9"]
    assert rule_of(*vcd, "--temperature", "1") == (VCD(0.5, 0.2, 9), 1.0)
    dola = ["--decoding", "dola", "--dola-layers", "high", "--dola-divergence", "jensen_shannon"]
    assert rule_of(*dola) == (DoLa("high", 0.1, "jensen_shannon", 1.2), 0.0)
    deco = ["--decoding", "deco", "--deco-top-k", "5", "--deco-layers", "2"]
    assert rule_of(*deco) == (DeCo(0.6, 0.9, 5, "2"), 0.0)
    opera = ["--decoding", "opera", "--num-beams", "4", "--opera-rollbacks", "0"]
    assert rule_of(*opera) == (OPERA(num_beams=4, rollbacks=0), 0.0)
    for name, kind in RULES.items():
        rule, _ = rule_of("--decoding", name)
        assert rule == (None if kind is Plain else kind())


def test_layers_are_those_of_models_of_any_depth():
    low, high, late = DoLa(), DoLa("high"), DeCo()
    assert low.layers_of(32, False) == [0, 2, 4, 6, 8, 10, 12, 14]
    assert low.layers_of(32, True) == [2, 4, 6, 8, 10, 12, 14]
    assert high.layers_of(32, True) == [16, 18, 20, 22, 24, 26, 28, 30]
    assert late.layers_of(32, True) == [20, 21, 22, 23, 24, 25, 26, 27, 28]
    ends = [(rule.layers_of(n, True)[0], rule.layers_of(n, True)[-1])
            for n in (28, 36, 30, 29) for rule in (low, high, late)]  # fmt: skip
    assert ends == [
        (2, 12), (14, 26), (18, 24),
        (2, 16), (18, 34), (23, 31),
        (2, 14), (15, 29), (19, 26),
        (2, 12), (14, 28), (19, 25),
    ]  # fmt: skip
    assert (high.layers_of(3, True), late.layers_of(3, True)) == ([1], [2])
    assert DoLa("2,1,2").layers_of(3, True) == [1, 2]


BAD = [
    (
        ["dota"],
        "--decoding must be one of greedy, sample, beam, vcd, dola, deco, opera, got 'dota'",
    ),
    (["vcd", "--vcd-alpha", "-1"], "--vcd-alpha must be at least 0, got -1"),
    (["vcd", "--vcd-beta", "1.5"], "--vcd-beta must be at least 0 and at most 1, got 1.5"),
    (["vcd", "--vcd-beta", "nan"], "--vcd-beta must be at least 0 and at most 1, got nan"),
    (["vcd", "--vcd-noise-step", "1000"], "--vcd-noise-step must be at least 0 and at most 999"),
    (
        ["dola", "--dola-layers", "middle"],
        "--dola-layers must be low, high, or numbers, as 2,4, got",
    ),
    (["dola", "--dola-layers", "1,"], "--dola-layers must be low, high"),
    (["dola"], "--dola-layers low is no layer of a model that has 3"),
    (["dola", "--dola-layers", "3"], "names layer 3: this model has 3"),
    (["dola", "--dola-relative-top", "2"], "--dola-relative-top must be at least 0 and at most 1"),
    (["dola", "--repetition-penalty", "0"], "--repetition-penalty must be above 0, got 0"),
    (["deco", "--deco-top-p", "0"], "--deco-top-p must be above 0 and at most 1, got 0"),
    (["deco", "--deco-top-k", "0"], "--deco-top-k must be at least 1, got 0"),
    (["deco", "--deco-alpha", "inf"], "--deco-alpha must be at least 0, got inf"),
    (["deco", "--deco-layers", "2,9"], "names layer 9"),
    (["opera", "--opera-sigma", "0"], "--opera-sigma must be above 0, got 0"),
    (["opera", "--num-beams", "1"], "--num-beams must be at least 2, got 1"),
    (["opera", "--opera-candidates", "1"], "--opera-candidates must be at least 2, got 1"),
    (["opera", "--temperature", "1"], "--decoding opera draws nothing: leave out --temperature"),
    (["beam", "--num-beams", "0"], "--num-beams must be at least 1, got 0"),
    (["beam", "--vcd-alpha", "1"], "--vcd-alpha is no setting of --decoding beam: leave it out"),
    (["greedy", "--temperature", "1"], "--decoding greedy draws nothing: leave out --temperature"),
    (["sample", "--temperature", "0"], "--decoding sample needs a --temperature above 0"),
]


@pytest.mark.parametrize(
    ("flags", "message"), BAD, ids=lambda x: " ".join(x) if type(x) is list else ""
)
def test_settings_that_make_no_sense_end_with_code_2_and_one_line(
    world, tmp_path, capsys, flags, message
):
    save = tmp_path / "answers.jsonl"
    assert evaluate.main([*world["pope"], "--decoding", *flags, "--save", str(save)]) == 2
    errors = [
        x for x in capsys.readouterr().err.splitlines() if "answers:" not in x and "|" not in x
    ]
    (told,) = filter(str.strip, errors)  # besides where answers go, and a bar that has been wiped
    assert told.startswith("error: ") and message in told
    assert not save.exists()


def test_a_question_without_an_image_is_refused_by_rules_about_images(policy, questions):
    bare = [(key, dataclasses.replace(example, image=None)) for key, example in questions]
    for rule in (VCD(), OPERA()):
        with pytest.raises(DataError, match="works on an image: this question has none"):
            answer_all(lambda: policy, bare, dataclasses.replace(DECODING, rule=rule))


@pytest.mark.parametrize("flags", [["vcd", "--vcd-alpha", "much"], ["deco", "--deco-top-k", "2.5"]])
def test_a_word_for_a_number_ends_with_usage_and_code_2(world, capsys, flags):
    for name in world:
        with pytest.raises(SystemExit) as end:
            evaluate.main([*world[name], "--decoding", *flags])
        told = capsys.readouterr().err
        assert end.value.code == 2 and "usage" in told and flags[-1] in told.splitlines()[-1]


def test_every_setting_is_a_flag_of_its_own_meaning():
    flags = {}
    for rule in RULES.values():
        for field in dataclasses.fields(rule):
            assert flags.setdefault(field.metadata["flag"], field.name) == field.name
    assert issubclass(OPERA, Rule) and len(flags) == 17
