"""The DPO loss is its equation, worked by hand; a run learns by it, and a stop changes no weight."""

import dataclasses
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from baselines import preference
from baselines.making import Method
from baselines.povid import injected_pair
from baselines.preference import dpo_loss, log_probabilities, texts_of, update
from data import collate
from model import load_policy
from runs import Settings, own_folder
from scm import sample_example
from train import load


def pairs(*columns):
    return [torch.tensor(column) for column in columns]


def test_dpo_loss_worked_by_hand():
    # rewards 0.1 (-42 + 44) = 0.2 and 0.1 (-50.5 + 47.5) = -0.3; the second pair is the first reversed
    loss = dpo_loss(*pairs([-42.0, -50.5], [-50.5, -42.0], [-44.0, -47.5], [-47.5, -44.0]))
    by_hand = [math.log(1 + math.exp(-0.5)), math.log(1 + math.exp(0.5))]
    assert loss.tolist() == pytest.approx(by_hand, abs=1e-6)
    assert loss[0].item() == pytest.approx(0.474077, abs=1e-6)


def test_at_the_reference_the_loss_is_log_2_whatever_the_lengths():
    loss = dpo_loss(*pairs([-44.0, -900.0], [-47.5, -3.0], [-44.0, -900.0], [-47.5, -3.0]))
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_the_gradient_is_that_of_a_plain_implementation(beta):
    generator = torch.Generator().manual_seed(0)
    values = 20 * torch.randn(4, 6, generator=generator)
    inputs = [value.clone().requires_grad_() for value in values]
    dpo_loss(*inputs, beta=beta).sum().backward()
    # d loss / d log pi(chosen) = -beta sigmoid(-margin), the opposite for the rejected answer
    for pair in range(6):
        c, r, ref_c, ref_r = values[:, pair].tolist()
        margin = beta * ((c - ref_c) - (r - ref_r))
        slope = -beta / (1 + math.exp(margin))
        assert inputs[0].grad[pair].item() == pytest.approx(slope, abs=1e-5)
        assert inputs[1].grad[pair].item() == pytest.approx(-slope, abs=1e-5)
    assert inputs[2].grad is None and inputs[3].grad is None


def test_a_pair_of_identical_texts_moves_nothing():
    weight = torch.tensor([0.3, -0.2], requires_grad=True)
    logp = (weight * torch.tensor([[3.0, 5.0]])).sum(1)  # one text, so one log-probability, twice
    loss = dpo_loss(logp, logp, torch.tensor([-4.0]), torch.tensor([-4.0]))
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2)) and weight.grad.tolist() == [0.0, 0.0]


def test_huge_margins_give_a_finite_loss():
    loss = dpo_loss(*pairs([0.0, -1e5], [-1e5, 0.0], [-1e5, 0.0], [0.0, -1e5]))
    assert loss.tolist() == pytest.approx([0.0, 2e4])


@pytest.mark.parametrize("shapes", [[(), (), (), ()], [(2,), (1,), (2,), (2,)], [(2, 1)] * 4])
def test_four_shapes_that_are_not_one_list_of_pairs_are_refused(shapes):
    with pytest.raises(ValueError, match=r"must be \(P,\), got"):
        dpo_loss(*[torch.zeros(shape) for shape in shapes])


# ---------------------------------------------------------------------------------------------
# A step, and the command
# ---------------------------------------------------------------------------------------------
def drawn_pairs(count=4):
    rng = random.Random(0)
    return [injected_pair(sample_example(rng), rng) for _ in range(count)]


def fresh(speaker, method, **changes):
    """Settings of a run, its policy, reference and optimiser."""
    settings = Settings(
        model=str(speaker), learning_rate=1e-4, beta=method.beta, dtype="float32", device="cpu",
        **changes,
    )  # fmt: skip
    return settings, *load(settings, speaker, None)


def test_a_log_probability_is_the_sum_over_the_texts_tokens_and_its_end(speaker):
    policy, pairs = load_policy(speaker), drawn_pairs(3)
    ids, mask = texts_of(policy, pairs)
    with torch.no_grad():
        found = log_probabilities(policy, [pair.example for pair in pairs], ids, mask)
        for p, pair in enumerate(pairs):
            for row, text in enumerate((pair.chosen, pair.rejected)):
                tokens = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
                tokens = torch.tensor([[*tokens, policy.tokenizer.eos_token_id]])
                inputs = collate([pair.example], policy.processor)
                logits = policy.full_logits(inputs, tokens, torch.ones_like(tokens))
                each = logits.log_softmax(-1).gather(-1, tokens[..., None])
                assert found[row, p].item() == pytest.approx(each.sum().item(), abs=1e-3)


@pytest.mark.parametrize("stage", [1, 2])
def test_the_first_step_has_loss_log_2_and_two_steps_move_every_trained_weight(speaker, stage):
    method = Method("povid", stage=stage)
    settings, policy, reference, optimizer = fresh(speaker, method)
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    for step in range(2):
        row = update(policy, reference, optimizer, drawn_pairs(), method, settings, step)
        assert (row["loss"] == pytest.approx(math.log(2), abs=1e-5)) == (step == 0)
        assert (row["own_differs"] > 0) == (stage == 2)
    for name, weight in policy.model.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad, name
    assert not any("vision" in n and w.requires_grad for n, w in policy.model.named_parameters())


def test_the_gradient_of_a_step_is_that_of_one_text_at_a_time_without_a_cache(speaker):
    method, pairs = Method("povid"), drawn_pairs(2)
    settings, policy, reference, _ = fresh(speaker, method)
    with torch.no_grad():  # away from the reference
        for weight in policy.decoder.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    weights = [w for w in policy.model.parameters() if w.requires_grad]

    def logp(model, example, text):
        tokens = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([[*tokens, policy.tokenizer.eos_token_id]])
        logits = model.full_logits(collate([example], policy.processor), tokens, tokens * 0 + 1)
        return logits.log_softmax(-1).gather(-1, tokens[..., None]).sum()

    losses = []
    for pair in pairs:
        gains = [
            logp(policy, pair.example, text) - logp(reference, pair.example, text).detach()
            for text in (pair.chosen, pair.rejected)
        ]
        losses.append(torch.log1p(torch.exp(-method.beta * (gains[0] - gains[1]))))
    plain = torch.autograd.grad(sum(losses) / 2, weights, allow_unused=True)
    changed = dataclasses.replace(settings, max_grad_norm=1e9)  # not clipped
    still = torch.optim.SGD(weights, lr=0.0)
    row = update(policy, reference, still, pairs, method, changed, 0)
    assert row["loss"] == pytest.approx((sum(losses) / 2).item(), abs=1e-5)
    for weight, want in zip(weights, plain, strict=True):
        want = torch.zeros_like(weight) if want is None else want
        found = torch.zeros_like(weight) if weight.grad is None else weight.grad
        assert torch.allclose(found, want, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_pairs_of_identical_texts_move_no_weight_by_adamw_either(speaker, stage, monkeypatch):
    method = Method("povid", stage=stage)
    settings, policy, reference, optimizer = fresh(speaker, method)
    with torch.no_grad():  # away from the reference
        for weight in policy.decoder.parameters():
            weight += 0.01 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    same = [dataclasses.replace(pair, rejected=pair.chosen) for pair in drawn_pairs()]
    # an image whose noise changes no word
    monkeypatch.setattr(preference, "words_under_noise", lambda policy, examples, ids, *_: ids)
    for step in range(2):
        row = update(policy, reference, optimizer, same, method, settings, step)
        assert row["loss"] == pytest.approx(math.log(2))
        assert (row["grad_norm"], row["margin"], row["logp_gain_chosen"] != 0) == (0, 0, True)
    assert all(torch.equal(w, before[name]) for name, w in policy.model.named_parameters())


def test_the_null_control_learns_the_chosen_texts_alone(speaker):
    method = Method("povid", loss="likelihood")
    settings, policy, reference, optimizer = fresh(speaker, method)
    other = [dataclasses.replace(pair, rejected="<think> A") for pair in drawn_pairs()]
    rows = [
        update(policy, reference, torch.optim.SGD(policy.model.parameters(), lr=0.0), pairs, method,
               settings, 0)
        for pairs in (drawn_pairs(), other)
    ]  # fmt: skip
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], abs=1e-5)
    update(policy, reference, optimizer, drawn_pairs(), method, settings, 0)
    assert (
        update(policy, reference, optimizer, drawn_pairs(), method, settings, 1)["loss"]
        < rows[0]["loss"]
    )


def test_a_max_grad_norm_of_0_clips_nothing(speaker):
    found = []
    for norm in (0.0, 1e9):
        settings, policy, reference, optimizer = fresh(speaker, Method("povid"))
        settings = dataclasses.replace(settings, max_grad_norm=norm)
        update(policy, reference, optimizer, drawn_pairs(), Method("povid"), settings, 0)
        found.append({name: w.clone() for name, w in policy.model.named_parameters()})
    start = load_policy(speaker).model.state_dict()
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert any(not torch.equal(found[0][name], start[name]) for name in found[0])


def test_a_folder_that_another_process_trains_in_is_refused(speaker, tmp_path, capsys):
    flags = ["--pairs", "povid", "--model", str(speaker), "--output", str(tmp_path / "run")]
    with own_folder(Settings(output=tmp_path / "run")):
        assert preference.main([*flags, "--device", "cpu"]) == 2
    assert "another process is training there" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_takes_no_step(speaker):
    method = Method("povid")
    settings, policy, reference, optimizer = fresh(speaker, method)
    before = {name: weight.clone() for name, weight in policy.model.named_parameters()}
    with torch.no_grad():
        reference.head.weight[0, 0] = math.nan
    with pytest.raises(FloatingPointError, match="step 1: loss or gradient is not finite"):
        update(policy, reference, optimizer, drawn_pairs(), method, settings, 0)
    assert all(torch.equal(w, before[name]) for name, w in policy.model.named_parameters())


def flags(speaker, folder, *others):
    return [
        "--pairs", "povid", "--model", str(speaker), "--output", str(folder), "--num-pairs", "6",
        "--batch-size", "2", "--learning-rate", "1e-4", "--save-steps", "2", "--device", "cpu", *others,
    ]  # fmt: skip


def test_a_run_that_was_stopped_ends_with_the_same_weights(speaker, tmp_path, monkeypatch, capsys):
    assert preference.main(flags(speaker, tmp_path / "whole", "--steps", "4")) == 0
    # stopped in its third step, one after the last checkpoint
    real = preference.update
    monkeypatch.setattr(
        preference, "update", lambda *args: real(*args) if args[-1] < 3 else interrupted()
    )
    cut = flags(speaker, tmp_path / "cut", "--steps", "4")
    assert preference.main(cut) == 130 and "--resume" in capsys.readouterr().err
    monkeypatch.setattr(preference, "update", real)
    assert preference.main(cut) == 2 and "add --resume" in capsys.readouterr().err
    assert preference.main([*cut, "--resume"]) == 0
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = (load_file(tmp_path / run / "checkpoint" / name) for run in ("whole", "cut"))
        assert all(torch.equal(one[key], other[key]) for key in one), name
    for name in ("pairs.jsonl", "samples.jsonl"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "cut" / name).read_text()
    rows = [
        [line.split(",")[:9] for line in (tmp_path / run / "metrics.csv").read_text().splitlines()]
        for run in ("whole", "cut")
    ]
    assert rows[0] == rows[1] and len(rows[0]) == 5
    # the checkpoint is a model folder, for the next round as for evaluate.py
    assert load_policy(tmp_path / "cut" / "checkpoint")
    about = tmp_path / "cut" / "args.json"  # a run from before a flag was there has no word of it
    about.write_text(about.read_text().replace(',\n    "coco": null', ""))
    assert "coco" not in about.read_text() and preference.main([*cut, "--resume"]) == 0
    capsys.readouterr()
    assert preference.main([*cut, "--resume", "--beta", "0.3"]) == 2
    assert (
        capsys.readouterr()
        .err.strip()
        .endswith("cannot resume with another --beta: the run has 0.1, this call 0.3")
    )


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--beta", "0"], "error: --beta is 0.0, must be at least 1e-06"),
        (["--steps", "0"], "error: --steps is 0, must be at least 1"),
        (["--model", "nowhere"], "error: model nowhere: cannot be loaded"),
        (["--pairs", "dpo"], "error: --pairs must be one of hadpo, chair, povid, csr, got 'dpo'"),
        (["--data", "nowhere.jsonl"], "error: "),
        (["--coco", "nowhere"], "error: --coco needs --images, the folder of its photographs"),
        (
            ["--coco", "nowhere", "--images", "nowhere"],
            "error: nowhere: no complete pair of annotation files: no instances_train2014.json",
        ),
        (["--batch-size", "7"], "error: 6 pairs do not fill one batch: lower --batch-size to 6"),
    ],
)
def test_input_that_cannot_be_used_is_one_line_and_exit_code_2(
    speaker, tmp_path, capsys, wrong, message
):
    (tmp_path / "nowhere.jsonl").write_text("{}\n")
    given = [str(tmp_path / w) if w == "nowhere.jsonl" else w for w in wrong]
    assert preference.main(flags(speaker, tmp_path / "run", *given)) == 2
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(told) == 1 and told[0].startswith(message)


@pytest.mark.parametrize("form", [[preference.__file__], ["-m", "baselines.preference"]])
def test_help_lists_every_flag_and_ends_with_0_in_either_form_of_the_command(form, tmp_path):
    root = Path(preference.__file__).parent.parent
    where = root if "-m" in form else tmp_path  # as a file it runs from any folder
    ran = subprocess.run(
        [sys.executable, *form, "--help"], cwd=where, capture_output=True, text=True
    )
    assert ran.returncode == 0 and "--num-pairs" in ran.stdout, ran.stderr
