"""ask.py shows what training would have logged, and says what its reward means."""

import dataclasses
import random

import pytest
import torch
from pages import read_page
from PIL import Image

import ask
import train
from data import Example
from model import load_policy
from page.terminal import by_word
from runs import Limits, Settings
from scm import question_about, sample_scene

SETTINGS = Settings(dtype="float32", device="cpu", max_completion_length=32, seed=3)


@pytest.fixture(scope="module")
def spoken(speaker):
    return load_policy(speaker)


def logged(policy, example, settings):
    """What a training step on this one prompt writes to samples.jsonl."""
    settings = dataclasses.replace(settings, num_generations=1)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=0.0, weight_decay=0.0)
    _, rows = train.train_step(policy, None, optimizer, [example], settings, Limits(settings), 0)
    return rows[0]


@pytest.mark.parametrize("kind", ["yesno", "number", "caption"])
def test_a_question_gets_the_row_that_a_training_step_logs(spoken, kind):
    example = question_about(sample_scene(random.Random(5)), kind, "boat")
    settings = dataclasses.replace(SETTINGS, pairing="independent")
    row = ask.ask(spoken, example, settings)
    assert row == logged(spoken, example, settings)
    assert any(row["reasoning"]) and max(row["causal_reward"]) > 0


def test_without_a_truth_the_completion_agrees_with_itself(spoken):
    example = question_about(sample_scene(random.Random(5)), "yesno", "boat")
    unknown = Example(example.image, example.question, "")
    row = ask.ask(spoken, unknown, SETTINGS)
    assert row["reward"] == 1.0 and row["answer"] in "".join(row["tokens"])
    told = dataclasses.replace(example, answer=row["answer"], kind=row["kind"])
    of_told = logged(spoken, told, SETTINGS)
    for name in ("tokens", "sufficiency", "necessity", "causal_reward"):
        assert row[name] == of_told[name]


def test_words_have_the_sums_of_their_tokens():
    row = {
        "tokens": ["<think>", " sn", "ow", "man", ".", " I"],
        "reasoning": [False, True, True, True, True, True],
        "sufficiency": [0, 0.25, 0.5, 0, 0.125, 0], "necessity": [0, 0, 0, 1, 0, 0],
        "causal_reward": [0, 0.1, 0.2, 0.3, 0.05, 0], "advantage": [0, 0.1, 0.2, 0.3, 0.05, 0],
    }  # fmt: skip
    words = by_word(row)
    assert words["tokens"] == ["<think>", " snowman", ".", " I"]
    assert words["causal_reward"] == [0, 0.6, 0.05, 0] and words["necessity"] == [0, 1, 0, 0]
    assert words["sufficiency"] == [0, 0.75, 0.125, 0]


def run(speaker, folder, *flags):
    common = ["--model", str(speaker), "--html", str(folder / "a.html"), "--max-new-tokens", "32"]
    return ask.main([*common, *map(str, flags)])


def test_a_scene_and_a_photo_are_asked_and_the_page_says_what_reward_means(
    speaker, tmp_path, capsys
):
    assert run(speaker, tmp_path, "--scene", 3, "How many things are there?") == 0
    assert ask.REWARD["truth"] in capsys.readouterr().out
    Image.effect_noise((40, 30), 90).convert("RGB").save(tmp_path / "a.jpg")
    assert run(speaker, tmp_path, "--image", tmp_path / "a.jpg", "Is there a <b>?") == 0
    said = capsys.readouterr().out
    assert "the model's own: " in said and ask.REWARD["agreement"] in said
    text = read_page((tmp_path / "a.html").read_text())
    assert "Is there a <b>?" in text and ask.REWARD["agreement"] in text
    flags = ["--image", tmp_path / "a.jpg", "--objects", "boat,dog", "--absent", "car"]
    assert run(speaker, tmp_path, *flags, "Describe the image.", "--words") == 0
    assert ask.REWARD["caption"] in capsys.readouterr().out
    read_page((tmp_path / "a.html").read_text())


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--image", "no.jpg", "Is it?"], "image no.jpg does not exist"),
        (["--scene", "1", " "], "the question is empty"),
        (["Is it?"], "give one of --image FILE and --scene N"),
        (["--scene", "1", "--image", "a.jpg", "Is it?"], "give one of"),
        (["--scene", "1", "--answer", "", "Is it?"], "--answer is empty"),
        (["--scene", "1", "--answer", "red", "--kind", "yesno", "Is it?"], "yes or no"),
        (["--scene", "1", "--num-continuations", "0", "Is it?"], "--num-continuations is 0"),
        (["--scene", "1", "Is it?", "--model", "./nope"], "model ./nope: there is no such folder"),
        (["--scene", "1", "--absent", "cat", "Is it?"], "--absent goes with --objects"),
        (["--scene", "1", "Is it?", "--model", ""], "model : cannot be loaded"),
        (["--scene", "1", "An <image>?"], "the question holds <image>"),
    ],
)
def test_bad_input_ends_with_code_2_and_one_line(speaker, tmp_path, capsys, flags, reason):
    assert run(speaker, tmp_path, *flags) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error and "\n" not in error and not (tmp_path / "a.html").exists()


def test_a_flag_spelt_wrong_is_one_line_that_names_the_flag_meant(capsys):
    with pytest.raises(SystemExit) as end:
        ask.main(["--model", "DIR", "--sceen", "3", "Is it?"])
    error = capsys.readouterr().err.strip()
    assert end.value.code == 2 and "did you mean --scene?" in error and "\n" not in error


def test_help_says_what_is_paid_without_a_truth(capsys):
    with pytest.raises(SystemExit) as end:
        ask.main(["--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0 and all(text in said for text in ask.REWARD.values())
