"""What a run takes of the memory: the estimate against what is there, float32 copies, adapters."""

import argparse
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import runs
import train
from data import DataError, collate
from experiments.cost import random_batch
from gpu import memory
from gpu.lora import FILE, AdaptedPolicy
from gpu.master import MasterAdamW
from model import load_policy
from runs import Settings
from scm import sample_example

needs_peft = pytest.mark.skipif(
    find_spec("peft") is None, reason="pip install -r gpu/requirements.txt"
)
IDS = torch.tensor([[20, 31, 42, 53]])


def logps(policy):
    with torch.no_grad():
        inputs = collate([sample_example(random.Random(0))], policy.processor)
        which = torch.zeros(1, dtype=torch.long)
        return policy.per_token_logps(policy.prefill(inputs), which, IDS, torch.ones_like(IDS))[0]


@pytest.fixture(scope="module", params=["llava_clip", "qwen2_5_vl", "idefics3"])
def folder(request, folder_of):
    return folder_of(request.param)


# -- the estimate ------------------------------------------------------------------------------
def kept_bytes(policy, work):
    """Bytes of all tensors that autograd keeps for the backward pass, the weights left out."""
    storages, alive = {}, []

    def keep(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        alive.append(tensor)  # so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = work()
    weights = {p.untyped_storage().data_ptr() for p in policy.model.parameters()}
    return sum(size for place, size in storages.items() if place not in weights), result


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_are_what_autograd_keeps_within_a_tenth(dtype):
    args = argparse.Namespace(
        shape="tiny", seed=0, dtype=dtype, device="cpu", prompt_tokens=200, reasoning_tokens=33,
        answer_tokens=6, num_generations=4, temperature=1.0,
    )  # fmt: skip
    policy, inputs, rollouts = random_batch(args)
    policy.model.get_encoder(modality="image").requires_grad_(False)
    ids = rollouts.completion_ids
    prompt, prefix = kept_bytes(policy, lambda: policy.prefill(inputs))
    completion, _ = kept_bytes(
        policy,
        lambda: policy.per_token_logps(prefix, rollouts.prompt_index, ids, torch.ones_like(ids)),
    )
    size = getattr(torch, dtype).itemsize
    a = memory.Activations(policy.decoder.config, size, keys=200 + ids.shape[1])
    assert prompt == pytest.approx(200 * a.prompt_token, rel=0.1)
    assert completion == pytest.approx(ids.numel() * (a.completion_token + a.logits), rel=0.1)


def test_weights_and_caches_are_counted_as_they_are(folder):
    policy = load_policy(folder)
    settings = Settings(model=str(folder), dtype="float32")
    found = memory.estimate(policy.model.config, settings, prompt_tokens=50)
    assert found.weights == sum(p.nbytes for p in policy.model.parameters()) == found.reference
    tower = policy.model.get_encoder(modality="image").parameters()
    assert found.gradients == found.weights - sum(p.nbytes for p in tower)
    assert found.optimizer == 2 * found.gradients  # two moments of float32 weights
    with torch.no_grad():
        prefix = policy.prefill(collate([sample_example(random.Random(0))], policy.processor))
    tokens, held = prefix.mask.shape[1], sum(x.nbytes for x in prefix.key_values.keys) * 2
    assert memory.cache_bytes(policy.decoder.config, 4) * tokens == held


@needs_peft
def test_adapters_need_no_reference_and_few_gradients(folder):
    policy = load_policy(folder)
    settings = Settings(model=str(folder), dtype="float32", lora_rank=4)
    found = memory.estimate(policy.model.config, settings, 50)
    adapted = AdaptedPolicy(policy, 4)
    trained = sum(p.numel() for p in adapted.model.parameters() if p.requires_grad)
    assert found.trained == trained and found.reference == 0


def dry(output, *flags):
    small = ["--batch-size", "2", "--num-generations", "2", "--max-completion-length", "24"]
    given = ["--dry-run", "--device", "cpu", "--output", str(output), *small, *map(str, flags)]
    return train.main(given)


def test_a_dry_run_prints_memory_and_minutes_and_leaves_nothing_behind(folder, tmp_path, capsys):
    assert dry(tmp_path / "runs" / "run", "--model", folder, "--steps", 3) == 0
    said = capsys.readouterr().out
    assert f"COPO on {folder}: " in said and "\npeak " in said
    assert f"measured on one step of {folder}; 3 steps: " in said
    # A random model has no reasoning.
    assert "nothing of it was scored" in said and not list(tmp_path.iterdir())


def test_a_dry_run_of_the_tiny_model_is_timed_on_the_warm_start_that_is_there(
    speaker, tmp_path, capsys
):
    assert dry(tmp_path / "run") == 0
    assert "not measured: " in (said := capsys.readouterr().out) and "no warm start yet" in said
    before = sorted(speaker.parent.rglob("*"))
    assert dry(speaker.parent / "run") == 0
    assert f"measured on one step of {speaker}; " in (said := capsys.readouterr().out)
    assert "nothing of it was scored" not in said
    assert sorted(speaker.parent.rglob("*")) == before and not list(tmp_path.iterdir())


def test_a_dry_run_measures_nothing_that_does_not_fit_or_is_stopped(
    folder, tmp_path, capsys, monkeypatch
):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", stopped)
    assert dry(tmp_path / "run", "--model", folder) == 0
    assert "minutes per step: not measured: stopped" in capsys.readouterr().out
    monkeypatch.setattr(memory, "room", lambda device: 2_500_000)
    assert dry(tmp_path / "run", "--model", folder) == 0
    assert "this machine has 2 MB" in capsys.readouterr().out


# -- float32 copies ----------------------------------------------------------------------------
def test_steps_too_small_for_bfloat16_add_up_in_the_copies():
    weight = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = MasterAdamW([weight], lr=1e-3, weight_decay=0.0)
    for _ in range(8):  # each step is 0.001; bfloat16 below 1 moves by 0.0039
        optimizer.zero_grad()
        weight.sum().backward()
        optimizer.step()
    assert weight.dtype == torch.bfloat16
    assert weight.detach().float().mean() == pytest.approx(0.992, abs=2e-3)
    assert optimizer.masters[0].mean() == pytest.approx(0.992, abs=1e-4)


def test_the_copies_of_float32_weights_take_adam_s_own_steps():
    a, b = (torch.nn.Parameter(torch.linspace(-1, 1, 5)) for _ in range(2))
    plain = torch.optim.AdamW([a], lr=1e-2, weight_decay=0.0)
    copied = MasterAdamW([b], lr=1e-2, weight_decay=0.0)
    for _ in range(3):
        for weight, optimizer in ((a, plain), (b, copied)):
            optimizer.zero_grad()
            weight.pow(3).sum().backward()
            optimizer.step()
    assert torch.equal(a, b)


def test_training_in_bfloat16_goes_on_from_its_copies(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "outcome_reward", lambda text, example: len(text) % 3 / 2)
    flags = ["--model", str(folder), "--dtype", "bfloat16", "--batch-size", "2", "--device", "cpu"]
    flags += ["--num-generations", "3", "--max-completion-length", "8", "--temperature", "5"]
    flags += ["--eval-scenes", "0", "--save-steps", "1", "--learning-rate", "1e-3"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*flags, "--steps", "2", "--output", str(whole)]) == 0
    assert train.main([*flags, "--steps", "1", "--output", str(parts)]) == 0
    assert train.main([*flags, "--steps", "2", "--output", str(parts), "--resume"]) == 0
    states = [load_policy(run / "checkpoint").model.state_dict() for run in (whole, parts)]
    before = load_policy(folder, dtype=torch.bfloat16).model.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    assert any(not torch.equal(states[0][name].bfloat16(), before[name]) for name in before)


# -- adapters ----------------------------------------------------------------------------------
@needs_peft
def test_adapters_begin_as_nothing_and_their_reference_stays_there(folder):
    policy = AdaptedPolicy(load_policy(folder), 4)
    original = logps(load_policy(folder))
    assert torch.allclose(logps(policy), original, atol=1e-5)
    move(policy)
    assert (logps(policy) - original).abs().max() > 1e-2
    assert torch.equal(logps(policy.before_training()), original)
    assert (logps(policy) - original).abs().max() > 1e-2  # on again


def move(policy):
    torch.manual_seed(0)
    for layer in policy.adapted.values():
        torch.nn.init.normal_(layer.lora_B["copo"].weight, std=0.5)


@needs_peft
def test_a_folder_of_adapted_weights_is_ordinary_and_its_adapters_go_on(folder, tmp_path):
    policy = AdaptedPolicy(load_policy(folder), 4)
    move(policy)
    policy.save(tmp_path / "saved")
    assert torch.allclose(logps(load_policy(tmp_path / "saved")), logps(policy), atol=1e-4)
    again = AdaptedPolicy(load_policy(folder), 4)
    again.restore(tmp_path / "saved")
    assert torch.equal(logps(again), logps(policy))
    with pytest.raises(DataError, match="not trained with LoRA"):
        again.restore(Path(folder))
    with pytest.raises(DataError, match="another rank"):
        AdaptedPolicy(load_policy(folder), 2).restore(tmp_path / "saved")


@needs_peft
def test_training_adapters_moves_nothing_else_and_resumes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "outcome_reward", lambda text, example: len(text) % 3 / 2)
    flags = ["--model", str(folder), "--lora-rank", "4", "--batch-size", "2", "--device", "cpu"]
    flags += ["--num-generations", "3", "--max-completion-length", "8", "--temperature", "5"]
    flags += ["--eval-scenes", "0", "--save-steps", "1", "--learning-rate", "1e-2"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main([*flags, "--steps", "3", "--output", str(whole)]) == 0
    assert train.main([*flags, "--steps", "2", "--output", str(parts)]) == 0
    assert train.main([*flags, "--steps", "3", "--output", str(parts), "--resume"]) == 0
    adapters = [(run / "checkpoint" / FILE).read_bytes() for run in (whole, parts)]
    assert adapters[0] == adapters[1]
    before = load_policy(folder).model.state_dict()
    after = load_policy(whole / "checkpoint").model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved and not any("norm" in name or "embed" in name for name in moved)
    assert runs.find_checkpoint(whole / "checkpoint") == whole / "checkpoint"


def test_without_peft_a_line_says_what_to_install(folder, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(runs.importlib.util, "find_spec", lambda name: None)
    run = ["--model", str(folder), "--lora-rank", "4", "--steps", "1", "--eval-scenes", "0"]
    assert train.main([*run, "--output", str(tmp_path / "run")]) == 2
    assert "pip install peft" in capsys.readouterr().err and not (tmp_path / "run").exists()
