"""What a run says: the making of its warm start, its first lines, a bar or plain lines, an example."""

import io
import json
import re
import sys
from pathlib import Path

import pytest

import tiny
import train
from page.terminal import example_of, in_time, opening, stage
from runs import Settings

FEW = ["--batch-size", "2", "--num-generations", "2", "--max-completion-length", "24",
       "--eval-scenes", "0", "--device", "cpu"]  # fmt: skip


def sample(**changes):
    """A row of samples.jsonl about an image whose truth is known: a red boat."""
    row = {
        "step": 7, "prompt": "Is there a boat?", "kind": "yesno", "answer": "yes", "reward": 1.0,
        "image": {"things": [{"category": "boat", "color": "red"}]},
        "tokens": ["<think>", " a", " red", " bo", "at", " car", "</think>", " yes"],
        "reasoning": [False, True, True, True, True, True, False, False],
        "causal_reward": [0.0, 0.0, 0.1, 0.2, 0.15, 0.25, 0.0, 0.0],
    } | changes  # fmt: skip
    zeros = [0.0] * len(row["tokens"])
    return {"sufficiency": zeros, "necessity": zeros, "advantage": zeros} | row


def test_an_example_shows_what_was_asked_said_and_earned_with_its_best_paid_words_first():
    assert example_of(sample()).splitlines() == [
        "step 7, its first completion",
        "  question    Is there a boat?",
        "  completion  <think> a red boat car</think> yes",
        "  outcome     1.00; right answer: yes",
        "  causal      boat 0.35, car 0.25 (false), red 0.10",
    ]


def test_an_example_without_causal_reward_says_so_and_white_space_is_named():
    assert "no word earned" in example_of(sample(causal_reward=[0.0] * 8))
    tokens = ["<think>", "\n\n", *["a"] * 5, "</think>"]
    row = sample(tokens=tokens, causal_reward=[0.0, 0.3, *[0.0] * 6])
    assert "causal      white space 0.30" in example_of(row)


def test_an_example_is_five_short_lines_whatever_the_model_wrote():
    tokens = ["<think>", "\x1b[2J", "\n", "\r", *["word" * 40] * 4]
    lines = example_of(sample(tokens=tokens, prompt="\x07")).split("\n")
    assert len(lines) == 5 and all(line.isprintable() for line in lines)
    assert max(map(len, lines)) <= 320


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(4.21, "4.2 seconds"), (150, "2.5 minutes"), (9000, "2.5 hours")],
)
def test_a_time_is_in_the_unit_that_suits_it(seconds, words):
    assert in_time(seconds) == words


def test_a_run_opens_with_its_model_its_data_and_its_folder():
    lines = opening(
        Settings(dtype="float32", device="cpu"), Path("runs/a"), 1_050_000, 670_000, None
    )
    assert lines.splitlines() == [
        "COPO on the tiny LLaVA: 0.67 M of 1.05 M parameters are trained, float32 on cpu",
        "data: fresh scenes; 40 steps of 16 prompts x 8 completions",
        "writes to runs/a",
    ]
    large = Settings(model="DIR", data=Path("q.jsonl"), lambda_s=0.0, lambda_n=0.0)
    first, second, _ = opening(large, Path("a"), 7_615_600_000, 20_000_000, [None] * 3).split("\n")
    assert first.startswith("GRPO on DIR: 20.00 M of 7,616 M parameters")
    assert second.startswith("data: q.jsonl, 3 examples; ")


def test_without_a_terminal_a_step_is_one_line_and_a_checkpoint_shows_an_example(
    speaker, tmp_path, capsys
):
    flags = [*FEW, "--model", str(speaker), "--output", str(tmp_path)]
    assert train.main([*flags, "--steps", "4", "--save-steps", "3"]) == 0
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert lines[0].startswith(f"COPO on {speaker}: ") and lines[2] == f"writes to {tmp_path}"
    starts = [line.split(":")[0] for line in lines if line.startswith("step ") and "/4" in line]
    assert starts == ["step 1/4", "step 2/4", "step 3/4", "step 4/4"]
    assert [line for line in lines if "to step 4" in line] == [lines[5]]  # after the second
    rows = map(json.loads, (tmp_path / "samples.jsonl").read_text().splitlines())
    for step in (3, 4):
        first = next(row for row in rows if row["step"] == step)  # they are in order
        assert example_of(first) in said
    assert said.count("its first completion") == 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_on_a_terminal_the_steps_are_on_a_bar_alone(speaker, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    flags = [*FEW, "--model", str(speaker), "--output", str(tmp_path), "--steps", "2"]
    assert train.main(flags) == 0
    said = sys.stderr.getvalue()
    assert "\rCOPO" in said and "step 1/2" not in said and "its first completion" in said


def test_into_a_pipe_a_stage_of_the_warm_start_is_one_line(capsys):
    steps = stage(3, "eyes")
    assert next(steps) == 0 and capsys.readouterr().err == ""
    assert list(steps) == [1, 2]
    said = capsys.readouterr().err
    assert re.fullmatch(r"warm start: eyes took \d+\.\d seconds, 3 steps\n", said)


def test_on_a_terminal_a_stage_of_the_warm_start_is_a_bar_alone(monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert list(stage(3, "eyes")) == [0, 1, 2]
    said = sys.stderr.getvalue()
    assert "\rwarm start: eyes" in said and "took" not in said


def test_the_warm_start_made_without_a_terminal_says_a_line_per_stage(tmp_path, capsys):
    few = {"vision_steps": 1, "reading_steps": 1, "speech_steps": 1}
    tiny.warm_start(tmp_path, tiny.WarmStart(**few, vision_batch_size=2, batch_size=2))
    said = capsys.readouterr().err
    assert re.findall(r"^warm start: (\w+) took .* 1 steps$", said, re.MULTILINE) == [
        "eyes", "reading", "speech",
    ]  # fmt: skip
