"""What goes wrong in long runs: kills, full disks, rotten checkpoints, changed files, no memory."""

import dataclasses
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from test_train import (
    FEW,
    LESS,
    SMALL,
    assert_equal_and_moved,
    metrics,
    run,
    step_of,
    weights,
    without_times,
)

import interventions
import report
import runs
import train
from data import DataError
from model import load_policy

# A child is forked from a server that has loaded the modules once, and no thread of torch's yet.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["train"])


def silent(arguments):
    """train.main in a child process, without its bars on the screen."""
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    raise SystemExit(train.main(arguments))


def child(model, output, *flags):
    # Three saves: with none before it, with one, and with one to be dropped.
    arguments = ["--model", str(model), "--output", str(output), *map(str, [*SMALL, *LESS])]
    arguments += ["--steps", "3", "--save-steps", "1", *flags]
    process = CONTEXT.Process(target=silent, args=(arguments,))
    process.start()
    return process


def test_a_run_killed_at_20_random_moments_ends_with_the_weights_of_one_that_was_not(
    speaker, tmp_path, monkeypatch
):
    monkeypatch.setenv("PYTHONPATH", str(Path(train.__file__).parent))  # where the server looks
    for name in ("first", "whole"):  # the first also starts the server
        started = time.monotonic()
        process = child(speaker, tmp_path / name)
        process.join()
        lasted = time.monotonic() - started
        assert process.exitcode == 0
    rng, killed, output = random.Random(0), 0, tmp_path / "killed"
    while killed < 20:
        process = child(speaker, output, "--resume")
        process.join(rng.uniform(0, lasted))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
        else:  # it came to its end before it could be killed: begin anew, what is left is a whole run
            assert process.exitcode == 0
            shutil.rmtree(output)
    process = child(speaker, output, "--resume")
    process.join()
    assert process.exitcode == 0
    assert_equal_and_moved(tmp_path / "whole", output, speaker)
    assert without_times(output) == without_times(tmp_path / "whole")


# -- checkpoints -------------------------------------------------------------------------------
def flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-7])


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "config.json"])
@pytest.mark.parametrize("harm", [flip, truncate, os.remove])
def test_a_rotten_checkpoint_is_named_and_the_one_before_it_taken(
    speaker, tmp_path, capsys, name, harm
):
    newest, before = tmp_path / "checkpoint", tmp_path / "checkpoint-1"
    for folder, step in ((before, 1), (newest, 2)):
        shutil.copytree(speaker, folder)
        (folder / "optimizer.safetensors").write_bytes(b"a few bytes")
        state = {"step": step, "sha256": runs._hashes(folder)}
        (folder / "state.json").write_text(json.dumps(state))
    assert runs.find_checkpoint(newest) == newest
    harm(newest / name)
    assert runs.find_checkpoint(newest) == before
    assert f"{name} is" in capsys.readouterr().err
    harm(before / name)
    assert runs.find_checkpoint(newest) is None


def test_a_run_goes_on_from_the_checkpoint_before_a_rotten_one(speaker, tmp_path, capsys):
    straight, rotten = tmp_path / "straight", tmp_path / "rotten"
    flags = [*LESS, "--save-steps", 1]
    assert run(straight, *flags, "--steps", 3, model=speaker) == 0
    assert run(rotten, *flags, "--steps", 2, model=speaker) == 0
    flip(rotten / "checkpoint" / "model.safetensors")
    assert run(rotten, *flags, "--steps", 3, "--resume", model=speaker) == 0
    assert "going on from" in (said := capsys.readouterr().err) and "checkpoint-1, step 1" in said
    assert_equal_and_moved(straight, rotten, speaker)


@pytest.mark.parametrize("keep", [1, 3])
def test_the_last_checkpoints_are_kept(speaker, tmp_path, keep):
    flags = [*FEW, "--steps", 4, "--save-steps", 1, "--keep-checkpoints", keep]
    assert run(tmp_path, *flags, model=speaker) == 0
    kept = sorted(path.name for path in tmp_path.glob("checkpoint*"))
    assert kept == ["checkpoint", *(f"checkpoint-{step}" for step in range(1, 4))][:1] + [
        f"checkpoint-{step}" for step in range(5 - keep, 4)
    ]
    for path in tmp_path.glob("checkpoint*"):
        assert load_file(path / "model.safetensors")


# -- files that change -------------------------------------------------------------------------
@pytest.fixture
def questions(tmp_path):
    """A data file of two questions about two pictures."""
    rows = []
    for name in ("a.png", "b.png"):
        Image.new("RGB", (48, 48), "red").save(tmp_path / name)
        rows.append({"image": name, "question": "Is there a boat?", "answer": "no"})
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_changed_data_or_another_model_cannot_be_resumed(speaker, questions, tmp_path, capsys):
    flags = [*FEW, "--data", questions]
    model = tmp_path / "model"
    shutil.copytree(speaker, model)
    assert run(tmp_path / "run", "--steps", 1, *flags, model=model) == 0
    before = questions.read_text()
    questions.write_text(before.replace("boat", "fish"))
    again = ["--steps", 2, "--resume", *flags]
    assert run(tmp_path / "run", *again, model=model) == 2
    assert "questions.jsonl has changed since the run began" in capsys.readouterr().err
    questions.write_text(before)
    (model / "config.json").write_text((model / "config.json").read_text() + "\n")
    assert run(tmp_path / "run", *again, model=model) == 2
    assert "model has changed since the run began" in capsys.readouterr().err
    (tmp_path / "run" / "args.json").write_text("{")  # torn: nothing to compare with
    assert run(tmp_path / "run", *again, model=model) == 0
    assert "args.json is broken" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "args.json").read_text())["seed"] == 0


@pytest.fixture(scope="module")
def begun(speaker, tmp_path_factory):
    """A run of two steps, to be copied and harmed."""
    folder = tmp_path_factory.mktemp("begun")
    assert run(folder, *FEW, "--save-steps", 1, "--steps", 2, model=speaker) == 0
    return folder


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("samples.jsonl", lambda text: text + '{"step": 3, "pro'),
        ("samples.jsonl", lambda text: text[:-40]),
        ("samples.jsonl", lambda text: text + "no JSON\n[1]\n{}\n"),
        ("metrics.csv", lambda text: text + "\0\0\0"),
        ("metrics.csv", lambda text: text + "\0\0\0\n3,0.5\n"),
        ("metrics.csv", lambda text: text[:-5]),
        ("evaluation.json", lambda text: '{"before": {"acc'),
        ("args.json", lambda text: ""),
    ],
)
def test_a_torn_file_of_a_run_does_not_stop_it_from_going_on(
    speaker, begun, tmp_path, capsys, name, harm
):
    path = shutil.copytree(begun, tmp_path / "run") / name
    flags = [*FEW, "--save-steps", 1]
    path.write_text(harm(path.read_text() if path.exists() else ""))
    assert run(tmp_path / "run", "--steps", 3, "--resume", *flags, model=speaker) == 0
    assert "going on from" in capsys.readouterr().err
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert rows[0].startswith("step,") and rows[-1].startswith("3,")
    steps = [
        json.loads(s)["step"] for s in (tmp_path / "run/samples.jsonl").read_text().splitlines()
    ]
    assert steps == sorted(steps) and set(steps) <= {1, 2, 3} and 3 in steps


def test_resume_without_output_goes_on_with_the_newest_run(speaker, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*FEW, "--save-steps", 1]
    for name, when in (("first", 1), ("run-2", 2)):
        assert run(tmp_path / "runs" / name, "--steps", 1, *flags, model=speaker) == 0
        os.utime(tmp_path / "runs" / name / "args.json", (when, when))
    settings = dataclasses.replace(
        train.parse_arguments([*map(str, [*SMALL, "--steps", 2, "--resume", *flags])]),
        output=None,
        model=str(speaker),
    )
    train.train(settings)
    assert "going on from runs/run-2/checkpoint, step 1" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["first", "run-2"]


def test_a_run_whose_checkpoints_are_gone_begins_again_and_keeps_its_logs(
    speaker, tmp_path, capsys
):
    flags = [*FEW, "--steps", 2, "--save-steps", 1]
    assert run(tmp_path / "run", *flags, model=speaker) == 0
    logged = (tmp_path / "run" / "metrics.csv").read_text()
    for path in (tmp_path / "run").glob("checkpoint*"):
        shutil.rmtree(path)
    assert run(tmp_path / "run", *flags, "--resume", model=speaker) == 0
    assert "no checkpoint to go on from: beginning at step 0" in capsys.readouterr().err
    assert (tmp_path / "run" / "old-metrics.csv").read_text() == logged


def test_an_image_that_vanishes_ends_the_run_with_one_line_and_its_checkpoint(
    speaker, questions, tmp_path, capsys, monkeypatch
):
    step = train.train_step

    def vanishing(*arguments):
        if step_of(arguments) == 2:
            (tmp_path / "a.png").unlink()
        return step(*arguments)

    monkeypatch.setattr(train, "train_step", vanishing)
    flags = [*FEW, "--data", questions, "--batch-size", 2, "--save-steps", 1]
    assert run(tmp_path / "run", "--steps", 4, *flags, model=speaker) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(error) == 1 and "a.png does not exist" in error[0]
    assert runs.find_checkpoint(tmp_path / "run" / "checkpoint")


def test_a_full_disk_while_the_logs_are_written_ends_with_one_line(
    speaker, tmp_path, capsys, monkeypatch
):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(runs.Log, "write", full)
    assert run(tmp_path, *FEW, "--steps", 1, model=speaker) == 2
    assert "No space left on device" in capsys.readouterr().err


# -- no memory ---------------------------------------------------------------------------------
def no_room_for_more_than(rows, monkeypatch):
    """The device runs out of memory where more than `rows` rows are decoded at once while scoring."""
    decode = interventions.Interventions._decode

    def limited(self, departures):
        if min(self.max_rows, len(departures.n)) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(self, departures)

    monkeypatch.setattr(interventions.Interventions, "_decode", limited)


TWO_STEPS = ["--max-completion-length", 20, "--steps", 2]


@pytest.fixture(scope="module")
def roomy(speaker, tmp_path_factory):
    """A run of two steps in which all rows are scored, and all prompts updated on, at once."""
    folder = tmp_path_factory.mktemp("roomy")
    assert run(folder, *TWO_STEPS, model=speaker) == 0
    return folder


def test_out_of_memory_halves_the_rows_and_gives_the_same_step(
    speaker, roomy, tmp_path, capsys, monkeypatch
):
    no_room_for_more_than(20, monkeypatch)
    assert run(tmp_path, *TWO_STEPS, "--max-rows", 64, model=speaker) == 0
    assert "out of memory: scoring" in capsys.readouterr().err
    rows = [without_times(folder) for folder in (tmp_path, roomy)]
    for row in itertools.chain(*rows):
        del row["scoring_token_forwards"]  # other batches are padded otherwise
    assert rows[0] == rows[1] and float(rows[0][0]["causal_reward"]) > 0


def test_out_of_memory_in_the_update_halves_the_micro_batch(
    speaker, roomy, tmp_path, capsys, monkeypatch
):
    logps = train.Policy.per_token_logps

    def limited(self, prefix, which, *rest):
        if len(which) > 4:  # one prompt of the three
            raise torch.OutOfMemoryError("CUDA out of memory")
        return logps(self, prefix, which, *rest)

    monkeypatch.setattr(train.Policy, "per_token_logps", limited)
    assert run(tmp_path, *TWO_STEPS, model=speaker) == 0
    assert "out of memory: updating" in capsys.readouterr().err
    a, b = weights(roomy), weights(tmp_path)
    start = load_policy(speaker).model.state_dict()
    moved = torch.cat([(a[k] - start[k]).flatten() for k in a])
    apart = torch.cat([(a[k] - b[k]).flatten() for k in a])
    assert 0 < apart.norm() < 0.02 * moved.norm()


def test_where_not_even_one_row_fits_the_run_stops_and_says_what_to_lower(
    speaker, tmp_path, capsys, monkeypatch
):
    no_room_for_more_than(0, monkeypatch)
    assert run(tmp_path, *LESS, "--steps", 1, model=speaker) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of memory: scoring") and "--max-completion-length" in error


def test_zero_variance_groups_keep_drop_or_gate_their_causal_rewards():
    groups = torch.tensor([[0.0, 0.0], [1.0, 1.0], [0.0, 1.0]])
    kept = {
        how: train.earns_causal_reward(groups, how)[:, 0].tolist()
        for how in ("keep", "drop", "gate")
    }
    assert kept == {
        "keep": [True, True, True],
        "drop": [False, False, True],
        "gate": [False, True, True],
    }


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such", "json", "json:__doc__", ":f"])
def test_a_reward_that_cannot_be_loaded_is_refused_before_anything_is_written(
    name, speaker, tmp_path, capsys
):
    assert run(tmp_path / "run", "--reward", name, model=speaker) == 2
    assert f"--reward {name}" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "code",
    [
        "import numpy\ndef f(c, e): return numpy.float32(0.5)",
        "import torch\ndef f(c, e): return torch.tensor(0.5)",
        "def f(c): return 0.5",
        "class F:\n    def __call__(self, completion, example=None): return 0.5\nf = F()",
        "def f(c, **more): return 0.5",
        "def f(c, e=None): return 0.5 if e is not None else 0.0",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass A:\n    x: int\ndef f(c, e): return 0.5",
    ],
)
@pytest.mark.parametrize("module", ["mine", "rewards", "data"])
def test_a_users_reward_may_return_any_number_take_one_argument_and_be_called_like_a_module_of_ours(
    tmp_path, monkeypatch, code, module
):
    (tmp_path / f"{module}.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    value = runs.load_reward(f"{module}:f")("a completion", "its example")
    assert value == 0.5 and type(value) is float


def test_a_users_package_may_have_the_name_of_a_module_of_ours(tmp_path, monkeypatch):
    (tmp_path / "rewards").mkdir()
    (tmp_path / "rewards" / "__init__.py").write_text("def f(c, e): return 0.5")
    monkeypatch.chdir(tmp_path)
    assert runs.load_reward("rewards:f")("a completion", None) == 0.5


def test_a_reward_of_no_or_three_arguments_is_refused(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("def f(): return 1\ndef g(a, b, c): return 1")
    monkeypatch.chdir(tmp_path)
    for name in "fg":
        with pytest.raises(DataError, match="must take a completion and its example"):
            runs.load_reward(f"mine:{name}")


@pytest.mark.parametrize(
    "returned", ["torch.ones(2)", "None", "'1'", "2", "-0.1", "float('nan')", "[1, 2]"]
)
def test_a_reward_that_is_no_number_in_0_to_1_is_refused(tmp_path, monkeypatch, returned):
    (tmp_path / "mine.py").write_text(f"import torch\ndef f(c, e): return {returned}")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="must be a number in"):
        runs.load_reward("mine:f")("a completion", None)
    if returned != "None":  # a further reward may not apply
        with pytest.raises(DataError, match="must be a number in"):
            runs.load_reward("mine:f", further=True)("a completion", None)
    else:
        assert runs.load_reward("mine:f", further=True)("a completion", None) is None


def test_a_users_own_reward_is_what_completions_earn(speaker, tmp_path, monkeypatch, capsys):
    (tmp_path / "my_rewards.py").write_text(
        "def short(completion, example):\n    return 1 / (1 + len(completion))\n"
        "def wrong(completion, example):\n    return 2\n"
    )
    monkeypatch.chdir(tmp_path)
    flags = [*LESS, "--steps", 1, "--reward", "my_rewards:short"]
    assert run(tmp_path / "run", *flags, model=speaker) == 0
    with open(tmp_path / "run" / "samples.jsonl") as lines:
        rows = [json.loads(line) for line in lines]
    assert all(0 < row["reward"] < 0.5 for row in rows)
    flags[-1] = "my_rewards:wrong"
    assert run(tmp_path / "other", *flags, model=speaker) == 2
    assert "returned 2, must be a number in [0, 1]" in capsys.readouterr().err


# -- a folder that is not this run's alone -----------------------------------------------------
def test_checkpoints_of_another_trainer_are_left_alone(speaker, tmp_path, capsys):
    names = ("checkpoint-500", "checkpoint-1000")
    for name in names:
        shutil.copytree(speaker, tmp_path / name)
    flags = [*FEW, "--steps", 1]
    assert run(tmp_path, *flags, model=tmp_path / "checkpoint-500") == 2
    assert "but no args.json of a run: choose another --output" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_what_else_is_put_beside_a_runs_checkpoints_is_not_pruned(speaker, tmp_path):
    flags = [*FEW, "--save-steps", 1, "--keep-checkpoints", 2]
    assert run(tmp_path, *flags, "--steps", 1, model=speaker) == 0
    shutil.copytree(speaker, tmp_path / "checkpoint-500")
    assert run(tmp_path, *flags, "--steps", 3, "--resume", model=speaker) == 0
    kept = sorted(path.name for path in tmp_path.glob("checkpoint*"))
    assert kept == ["checkpoint", "checkpoint-2", "checkpoint-500"]


def test_a_checkpoint_without_its_run_is_not_gone_on_from(speaker, tmp_path, capsys):
    assert run(tmp_path / "run", *FEW, "--steps", 1, model=speaker) == 0
    model = shutil.copytree(tmp_path / "run" / "checkpoint", tmp_path / "other" / "checkpoint")
    assert run(tmp_path / "other", *FEW, "--steps", 2, "--seed", 7, model=model) == 2
    assert "holds checkpoint, but no args.json" in capsys.readouterr().err
    assert not (tmp_path / "other" / "metrics.csv").exists()


def test_a_folder_that_a_run_is_writing_to_is_refused_to_another(speaker, tmp_path, capsys):
    settings = train.parse_arguments(["--output", str(tmp_path / "run")])
    with runs.own_folder(settings):
        for flags in ((), ("--resume",)):
            assert run(tmp_path / "run", *FEW, "--steps", 1, *flags, model=speaker) == 2
            assert "another process is training there" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run(tmp_path / "run", *FEW, "--steps", 1, model=speaker) == 0


def test_two_runs_that_begin_at_once_take_two_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = train.parse_arguments([])
    with runs.own_folder(settings) as first, runs.own_folder(settings) as second:
        assert (str(first), str(second)) == ("runs/first", "runs/run-2")
    assert not (tmp_path / "runs").exists()


# -- settings at their ends --------------------------------------------------------------------
def test_a_learning_rate_of_0_moves_no_weight(speaker, tmp_path):
    assert run(tmp_path, *LESS, "--steps", 2, "--learning-rate", 0, model=speaker) == 0
    before = load_policy(speaker).model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(tmp_path).items())


@pytest.mark.parametrize("flag", ["--max-grad-norm", "--learning-rate"])
@pytest.mark.parametrize("value", ["-1", "nan"])
def test_a_rate_or_norm_that_is_none_is_refused(speaker, tmp_path, capsys, flag, value):
    assert run(tmp_path / "run", *FEW, f"{flag}={value}", model=speaker) == 2
    assert f"{flag} is {float(value)}, must be at least 0" in capsys.readouterr().err


def test_a_max_grad_norm_of_0_clips_nothing(speaker, tmp_path):
    for name, norm in (("none", 0), ("wide", 1e9), ("close", 1e-4)):
        flags = (*LESS, "--steps", 1, "--max-grad-norm", norm)
        assert run(tmp_path / name, *flags, model=speaker) == 0
    none, wide, close = (
        load_file(tmp_path / name / "checkpoint" / "optimizer.safetensors")
        for name in ("none", "wide", "close")
    )
    assert all(torch.equal(none[name], wide[name]) for name in none)
    assert any(not torch.equal(none[name], close[name]) for name in none)


@pytest.mark.parametrize("how", [(), ("--gradient-checkpointing",)])
def test_a_step_of_completions_that_end_at_once_is_a_step(speaker, tmp_path, monkeypatch, how):
    real = train.rollout

    def silent_rollout(policy, prefix, *given, **named):
        prefix.logits[:] = -torch.inf
        prefix.logits[:, policy.eos_ids[0]] = 0.0
        return real(policy, prefix, *given, **named)

    monkeypatch.setattr(train, "rollout", silent_rollout)
    assert run(tmp_path, *LESS, "--steps", 2, *how, model=speaker) == 0
    assert {row["completion_length"] for row in metrics(tmp_path)} == {"1"}


def test_recomputed_activations_leave_a_step_without_reward_where_it_was(
    speaker, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "load_rewards", lambda _: [lambda *_: 0.0])
    flags = ("--steps", 2, "--gradient-checkpointing", "--micro-batch-size", 1)
    for adapted in ((), ("--lora-rank", 2)):
        output = tmp_path / f"run{len(adapted)}"
        if adapted:
            pytest.importorskip("peft")
        assert run(output, *LESS, *flags, *adapted, model=speaker) == 0
        assert {row["kl"] for row in metrics(output)} == {"0"}
        assert {row["grad_norm"] for row in metrics(output)} == {"0"}


# -- stops -------------------------------------------------------------------------------------
def test_figures_of_fewer_steps_are_dropped_when_the_run_goes_on(speaker, tmp_path, monkeypatch):
    flags = [*FEW, "--eval-scenes", 1, "--save-steps", 1]
    assert run(tmp_path, *flags, "--steps", 1, model=speaker) == 0
    assert set(runs.read_or_empty(tmp_path / "evaluation.json")) == {"before", "after"}
    real = train.train_step

    def stopped(*given, **named):
        if step_of(given) == 2:
            raise KeyboardInterrupt
        return real(*given, **named)

    monkeypatch.setattr(train, "train_step", stopped)
    assert run(tmp_path, *flags, "--steps", 3, "--resume", model=speaker) == 130
    assert set(runs.read_or_empty(tmp_path / "evaluation.json")) == {"before"}


def test_ctrl_c_outside_the_steps_is_one_line_and_code_130(speaker, tmp_path, monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "load", stopped)
    assert run(tmp_path / "run", *FEW, model=speaker) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped")
    assert not (tmp_path / "run").exists()


def test_examples_that_passed_in_a_run_say_nothing_of_another_file(speaker, questions, tmp_path):
    output = tmp_path / "run"
    assert run(output, *FEW, "--data", questions, "--steps", 1, model=speaker) == 0
    other = questions.with_name("other.jsonl")
    other.write_text(questions.read_text())
    settings = train.parse_arguments(["--model", str(speaker), "--resume"])
    assert len(train.usable_examples(settings, other, output)) == 2


def test_a_page_is_made_of_a_run_whose_last_row_is_torn(speaker, tmp_path):
    assert run(tmp_path, *LESS, "--steps", 2, model=speaker) == 0
    for name, harm in (("samples.jsonl", '{"step": 3, "pro'), ("metrics.csv", "3,0.5")):
        with open(tmp_path / name, "a") as log:
            log.write(harm)
    assert report.main([str(tmp_path)]) == 0
