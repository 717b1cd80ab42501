"""The DPO loss is its equation, worked by hand, with the gradient of a plain implementation."""

import math

import pytest
import torch

from baselines.preference import dpo_loss


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
