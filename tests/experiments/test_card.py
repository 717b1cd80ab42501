"""What a step takes on a card, on the tiny shape and a CPU: counts and floors, no times."""

from dataclasses import replace

import pytest
import torch

from experiments import card, cost
from experiments.records import read_csv

WORKLOAD = cost.Workload(
    shape="tiny", prompt_tokens=40, reasoning_tokens=2, answer_tokens=1, repeats=1
)


@pytest.fixture(scope="module")
def policy():
    return cost.random_policy(WORKLOAD, tied=False)


def test_the_floor_of_a_pass_is_its_arithmetic_or_the_reading_of_the_weights(policy):
    passes, weights = card.Passes(policy), 4 * (128 * 128 * 4 + 128 * 344 * 3)  # 4 layers
    with passes.watched(), torch.no_grad():
        policy.decoder(inputs_embeds=torch.zeros(2, 5, 128))
    policy.decoder(inputs_embeds=torch.zeros(1, 3, 128))  # not watched
    ((tokens, counted, gradients),) = passes.seen
    assert tokens == 10 and not gradients
    assert 0 <= counted - weights < 0.01 * weights  # norms and biases
    assert passes.floor(card.Card(2.0, 1e99)) == pytest.approx(10 * counted)
    assert passes.floor(card.Card(1e99, 2.0)) == pytest.approx(2 * counted)  # four bytes each
    passes.seen = [(10, counted, True)]
    assert passes.floor(card.Card(2.0, 1e99)) == pytest.approx(30 * counted)


def test_drawn_tokens_are_about_as_sure_as_asked(policy):
    torch.manual_seed(0)  # of the prompts
    inputs = cost.random_batch(WORKLOAD, policy)[1]
    temperature = card.temperature_of(policy, inputs)
    workload = replace(WORKLOAD, reasoning_tokens=60, temperature=temperature)
    uniforms = torch.rand(8, 62, generator=torch.Generator().manual_seed(0))
    _, inputs, rollouts = cost.random_batch(workload, policy, uniforms)
    again = card.drawn_again(policy, inputs, rollouts, uniforms, temperature)
    assert 0.7 < again["mean_probability"] < 0.99
    assert again["flipped"] == 0  # in float32
    wrong = card.drawn_again(policy, inputs, rollouts, 1 - uniforms, temperature)
    assert wrong["flipped"] > 0.02


def test_each_stage_is_timed_counted_and_kept_with_its_machine(tmp_path):
    path = tmp_path / "card.csv"
    command = [
        "--shape",
        "tiny",
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--repeats",
        "1",
        "--exact",
    ]
    command += ["--prompt-tokens", "40", "--reasoning-tokens", "30", "--answer-tokens", "2"]
    assert card.main([*command, "--csv", str(path)]) == 0
    rows = {(row["way"], row["figure"]): row for row in read_csv(path)}
    # The prompt and the completions but for their last token: once with gradients, once without.
    assert int(rows["update", "tokens"]["value"]) == 2 * (40 + 8 * 33)
    # Prefill, and a decoding step per token after the first.
    assert int(rows["rollout", "tokens"]["value"]) == 40 + 8 * 33
    default, exact = (
        int(rows[name, "tokens"]["value"]) for name in ("score", "score, the paper's questions")
    )
    assert default < exact
    assert float(rows["score", "in_grpo_steps"]["value"]) > 0
    assert "--reasoning-tokens 30" in rows["update", "tokens"]["command"]


def test_without_a_card_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert card.main([]) == 2
    assert "no CUDA card is here" in capsys.readouterr().err
