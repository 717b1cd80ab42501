"""Equations 1 to 6 against numbers worked by hand."""

import math

import pytest
import torch

from copo import (
    LOSS_TYPES,
    causal_completeness,
    copo_loss,
    group_advantages,
    inject,
    loss_lengths,
    necessity,
    sufficiency,
)


def loss_of(logps, advantages, old=None, ref=None, mask=None, **kwargs):
    mask = torch.ones_like(logps) if mask is None else mask
    old = logps.detach() if old is None else old
    return copo_loss(logps, old, ref, advantages, mask, **{"beta": 0.0, **kwargs})


# -- equation 1 --------------------------------------------------------------------------------
def test_advantages_by_hand():
    # mean 0.5; deviations (0.5, -0.5, -0.5, 0.5); sample variance 4 * 0.25 / 3 = 1/3
    expected = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]]))
    assert torch.allclose(advantages, expected * torch.tensor([[1.0, -1.0, -1.0, 1.0]]))


def test_each_group_is_centred_on_its_own_mean():
    advantages = group_advantages(torch.tensor([[0.0, 1.0], [10.0, 11.0]]))
    assert torch.allclose(advantages[0], advantages[1], atol=1e-5)
    assert torch.allclose(advantages.sum(1), torch.zeros(2), atol=1e-6)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1 / 3, 1.0])
def test_a_group_of_equal_rewards_gets_exactly_zero(reward):
    assert (group_advantages(torch.full((2, 7), reward)) == 0).all()


def test_a_group_of_one_gets_zero_not_nan():
    assert group_advantages(torch.tensor([[0.7]])).item() == 0


@pytest.mark.parametrize(
    ("scale", "expected"),
    [
        ("group", 0.5 / (math.sqrt(0.5) + 1e-4)),  # deviations 0.5 and -0.5, variance 0.5 / 1
        ("batch", 0.5 / (0.5 + 1e-4)),  # of 1, 0, 1, 1: mean 0.75, variance 0.75 / 3 = 0.25
        ("none", 0.5),
    ],
)
def test_advantages_are_divided_by_the_deviation_of_the_group_the_batch_or_not_at_all(
    scale, expected
):
    advantages = group_advantages(torch.tensor([[1.0, 0.0], [1.0, 1.0]]), scale)
    assert torch.allclose(advantages, expected * torch.tensor([[1.0, -1.0], [0.0, 0.0]]))


@pytest.mark.parametrize("scale", ["batch", "none"])
def test_a_group_of_equal_rewards_gets_exactly_zero_whatever_divides(scale):
    rewards = torch.cat([torch.rand(1, 7), torch.full((1, 7), 0.1)])
    assert (group_advantages(rewards, scale)[1] == 0).all()


# -- equation 2 --------------------------------------------------------------------------------
def test_sufficiency_by_hand_pays_gains_and_ignores_losses():
    # pairs: 0 -> 1 gains 1; 1 -> 0 loses (indicator 0); 0.25 -> 0.75 gains 0.5; equal: 0
    rewards_with = torch.tensor([[1.0, 0.0, 0.75, 1.0]])
    rewards_without = torch.tensor([[0.0, 1.0, 0.25, 1.0]])
    assert sufficiency(rewards_with, rewards_without).tolist() == [(1 + 0.5) / 4]


def test_sufficiency_compares_pairs_not_means():
    # equal means, but one pair gains: the indicator stands inside the sum
    assert sufficiency(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item() == 0.5


def test_sufficiency_keeps_leading_shape():
    assert sufficiency(torch.rand(2, 3, 5, 4), torch.rand(2, 3, 5, 4)).shape == (2, 3, 5)


def test_independent_pairs_of_a_token_without_effect_score_p_times_1_minus_p():
    p, draws = 0.6, 200_000
    generator = torch.Generator().manual_seed(0)
    with_, without = (torch.rand(2, 1, draws, generator=generator) < p).float()
    deviation = 0.5 / math.sqrt(draws)
    assert abs(sufficiency(with_, without).item() - p * (1 - p)) < 4 * deviation


# -- equation 3 --------------------------------------------------------------------------------
def test_necessity_in_all_three_signs():
    rewards, masked = torch.tensor([[1.0], [0.25]]), torch.tensor([[0.0, 1.0], [1.0, 0.25]])
    assert necessity(rewards, masked).tolist() == [[1.0, 0.0], [-0.75, 0.0]]


# -- equation 4 --------------------------------------------------------------------------------
def test_scores_are_clamped_before_they_are_weighted():
    causal = causal_completeness(torch.tensor([-0.5, 2.0]), torch.tensor([-1.0, 0.5]), 0.5, 0.25)
    assert causal.tolist() == [0.0, 0.5 + 0.125]


def test_the_weights_are_a_sum_not_a_mean():
    assert causal_completeness(torch.tensor(1.0), torch.tensor(1.0), 1.0, 1.0).item() == 2.0


# -- equation 5 --------------------------------------------------------------------------------
def test_injection_reaches_reasoning_tokens_only():
    advantages, mask = torch.tensor([1.0, -2.0]), torch.tensor([[0, 1, 1, 0], [1, 0, 0, 0]])
    causal = torch.tensor([[9.0, 0.5, 0.25, 9.0], [0.125, 9.0, 9.0, 9.0]])
    assert inject(advantages, causal, mask).tolist() == [
        [1.0, 1.5, 1.25, 1.0],
        [-1.875, -2.0, -2.0, -2.0],
    ]


def test_injecting_nothing_is_grpo_bit_for_bit():
    advantages = torch.randn(5)
    injected = inject(advantages, torch.zeros(5, 3), torch.ones(5, 3))
    assert torch.equal(injected, advantages[:, None].expand(5, 3))


def test_scores_outside_the_reasoning_never_leak_even_as_nan():
    injected = inject(torch.tensor([1.0]), torch.tensor([[0.5, math.nan]]), torch.tensor([[1, 0]]))
    assert injected.tolist() == [[1.5, 1.0]]


# -- equation 6 --------------------------------------------------------------------------------
def test_first_iteration_loss_is_minus_the_mean_advantage_and_its_gradient_reinforce():
    logps = torch.tensor([[-1.0, -2.0], [-0.5, -3.0]], requires_grad=True)
    advantages = torch.tensor([[1.0, -1.0], [2.0, 0.5]])
    loss, metrics = loss_of(logps, advantages)
    loss.backward()
    assert loss.item() == pytest.approx(-(0.0 / 2 + 2.5 / 2) / 2)
    assert torch.allclose(logps.grad, -advantages / 4)  # d(-1/N sum 1/C rho A) at rho = 1
    assert metrics == {"kl": 0.0, "clip_ratio": 0.0}


@pytest.mark.parametrize(
    ("advantage", "ratio", "objective", "clipped"),
    [
        (1.0, 1.5, 1.2, True),  # a good token is not paid for more than 1 + eps
        (1.0, 0.5, 0.5, False),
        (-1.0, 0.5, -0.8, True),  # a bad one is not punished below 1 - eps
        (-1.0, 1.5, -1.5, False),  # but always for growing
    ],
)
def test_clipping_takes_the_smaller_branch_for_both_signs(advantage, ratio, objective, clipped):
    logps = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, metrics = loss_of(logps, torch.tensor([[advantage]]), old=torch.zeros(1, 1))
    loss.backward()
    assert loss.item() == pytest.approx(-objective)
    assert metrics["clip_ratio"] == float(clipped)
    assert (logps.grad.item() == 0) == clipped


def test_kl_is_zero_for_equal_policies_and_never_negative():
    logps = torch.randn(4, 6).clamp(max=0)
    same = loss_of(logps, torch.zeros(4, 6), ref=logps, beta=1.0)
    other = loss_of(logps, torch.zeros(4, 6), ref=logps + torch.randn(4, 6), beta=1.0)
    assert same[0].item() == 0 and same[1]["kl"] == 0
    assert other[1]["kl"] > 0


def test_kl_by_hand_is_k3_and_enters_with_beta():
    # ref/pi = 2: k3 = 2 - log 2 - 1
    loss, metrics = loss_of(
        torch.zeros(1, 1), torch.zeros(1, 1), ref=torch.full((1, 1), math.log(2)), beta=0.5
    )
    assert metrics["kl"] == pytest.approx(1 - math.log(2))
    assert loss.item() == pytest.approx(0.5 * (1 - math.log(2)))


def test_each_completion_counts_once_whatever_its_length():
    # equation 6 divides by T_i: completion means 1 and 3, their mean 2
    advantages = torch.tensor([[1.0, 1.0, 1.0], [3.0, 7.0, 7.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    assert loss_of(torch.zeros(2, 3), advantages, mask=mask)[0].item() == pytest.approx(-2.0)


def test_masked_tokens_get_no_gradient():
    logps = torch.randn(2, 3, requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    loss_of(logps, torch.ones(2, 3), ref=torch.randn(2, 3), mask=mask, beta=0.1)[0].backward()
    assert ((logps.grad != 0) == mask.bool()).all()


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_four_micro_batches_give_the_loss_and_gradient_of_one(loss_type):
    torch.manual_seed(0)
    logps, old, ref = torch.randn(8, 5), torch.randn(8, 5), torch.randn(8, 5)
    advantages, mask = torch.randn(8, 5), torch.arange(5) < torch.randint(1, 6, (8, 1))
    lengths = loss_lengths(mask, loss_type, 7)
    whole, parts = logps.clone().requires_grad_(), logps.clone().requires_grad_()
    loss, _ = copo_loss(whole, old, ref, advantages, mask, lengths=lengths)
    loss.backward()
    total = 0.0
    for rows in torch.arange(8).split(2):
        part, _ = copo_loss(
            parts[rows], old[rows], ref[rows], advantages[rows], mask[rows],
            num_completions=8, lengths=lengths[rows],
        )  # fmt: skip
        part.backward()
        total += part.item()
    assert total == pytest.approx(loss.item(), abs=1e-6)
    assert torch.allclose(whole.grad, parts.grad, atol=1e-7)


# -- equation 6 as later papers vary it ----------------------------------------------------------
@pytest.mark.parametrize(
    ("loss_type", "expected"),
    [
        ("grpo", -(6 / 3 + 4 / 1) / 2),
        ("bnpo", -(6 + 4) / 4),
        ("dapo", -(6 + 4) / 4),
        ("dr_grpo", -(6 + 4) / (2 * 8)),
    ],
)
def test_what_counts_the_same_by_hand(loss_type, expected):
    # advantages add up to 6 over three tokens, and to 4 over one; at most 8 tokens
    advantages = torch.tensor([[1.0, 2.0, 3.0], [4.0, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    logps = torch.zeros(2, 3, requires_grad=True)
    lengths = loss_lengths(mask, loss_type, 8)
    loss, _ = loss_of(logps, advantages, mask=mask, lengths=lengths)
    loss.backward()
    assert loss.item() == pytest.approx(expected)
    assert torch.allclose(logps.grad, -advantages * mask / (2 * lengths[:, None]))


def test_the_paper_s_loss_is_the_default():
    logps, advantages, mask = -torch.rand(4, 6), torch.randn(4, 6), torch.rand(4, 6) < 0.7
    named = loss_of(logps, advantages, mask=mask, lengths=loss_lengths(mask), epsilon_high=0.2)
    assert torch.equal(loss_of(logps, advantages, mask=mask)[0], named[0])


@pytest.mark.parametrize(
    ("advantage", "ratio", "objective"),
    [
        (1.0, 1.5, 1.28),  # a good token may grow to 1.28
        (1.0, 1.25, 1.25),  # where 0.2 would have cut it at 1.2
        (-1.0, 0.5, -0.8),  # below, epsilon holds as before
        (-1.0, 1.5, -1.5),
    ],
)
def test_the_upper_bound_moves_alone(advantage, ratio, objective):
    loss, _ = loss_of(
        torch.tensor([[math.log(ratio)]]),
        torch.tensor([[advantage]]),
        old=torch.zeros(1, 1),
        epsilon_high=0.28,
    )
    assert loss.item() == pytest.approx(-objective)


TRL = [  # loss of GRPOTrainer._compute_loss of trl 1.16.0 on the batch below, by its epsilon_high
    ("grpo", 0.2, 0.22263682),
    ("grpo", 0.28, 0.21478112),
    ("bnpo", 0.2, 0.05630628),
    ("bnpo", 0.28, 0.04622836),
    ("dapo", 0.2, 0.05630628),
    ("dapo", 0.28, 0.04622836),
    ("dr_grpo", 0.2, 0.02111486),
    ("dr_grpo", 0.28, 0.01733564),
]


@pytest.mark.parametrize(("loss_type", "epsilon_high", "expected"), TRL)
def test_each_loss_type_is_that_of_trl(loss_type, epsilon_high, expected):
    """TRL's method itself was called once, on a stand-in for the trainer that hands it these tensors.

    epsilon 0.2, beta 0.04, max_completion_length 8, use_bias_correction_kl False; its gradients were equal.
    """
    logps = torch.tensor([[-1, -2, -0.5, -1.5], [-0.25, -3, -1, 0], [-2, -1, 0, 0]])
    old = torch.tensor([[-1.5, -2, -0.1, -1.4], [-0.5, -2.5, -1.2, 0], [-1.7, -1.1, 0, 0]])
    ref = torch.tensor([[-1.2, -1.8, -0.6, -1], [-0.3, -2, -1.5, 0], [-2.5, -0.9, 0, 0]])
    advantages = torch.tensor([[1, -0.5, 0.25, 2], [-1, -1, 0.5, 0], [0.75, -2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]])
    loss, metrics = copo_loss(
        logps, old, ref, advantages, mask, 0.2, 0.04,
        epsilon_high=epsilon_high, lengths=loss_lengths(mask, loss_type, 8),
    )  # fmt: skip
    assert loss.item() == pytest.approx(expected, abs=1e-7)
    assert metrics["kl"] == pytest.approx(0.125715, abs=1e-6)
    assert metrics["clip_ratio"] == pytest.approx((3 if epsilon_high == 0.2 else 2) / 9)


# -- all ---------------------------------------------------------------------------------------
def test_no_function_writes_into_its_arguments():
    rewards, pair = torch.rand(2, 4), torch.rand(2, 3, 4)
    logps, mask = -torch.rand(2, 3), torch.ones(2, 3)
    arguments = [
        (group_advantages, [rewards]),
        (sufficiency, [pair, pair.flip(-1)]),
        (necessity, [rewards[:, :1], rewards]),
        (causal_completeness, [rewards - 0.5, rewards * 2]),
        (inject, [rewards[:, 0], logps, mask]),
        (copo_loss, [logps, logps - 0.1, logps + 0.1, logps, mask]),
        (loss_lengths, [mask]),
    ]
    for function, tensors in arguments:
        before = [t.clone() for t in tensors]
        function(*tensors)
        assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True)), (
            function.__name__
        )


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (group_advantages, [(3,)]),
        (sufficiency, [(3, 4), (3, 5)]),
        (necessity, [(3, 2), (3, 4)]),
        (causal_completeness, [(3,), (4,)]),
        (inject, [(3,), (3, 4), (3, 5)]),
    ],
)
def test_a_wrong_shape_is_named_in_the_error(function, shapes):
    with pytest.raises(
        AssertionError, match=str(shapes[-1]).replace("(", r"\(").replace(")", r"\)")
    ):
        function(*(torch.zeros(shape) for shape in shapes))
