"""GRPO, the row without causal rewards: its equation in numbers, as the other systems have theirs."""

import math

import pytest
import torch

from copo import copo_loss, group_advantages


def test_advantages_of_three_right_among_eight_worked_by_hand():
    # mean 3/8; squares 3 (5/8)^2 + 5 (3/8)^2 = 1.875, over 7: deviation 0.517549, and 1e-4
    advantages = group_advantages(torch.tensor([[1.0, 0, 0, 1, 1, 0, 0, 0]]))
    right, wrong = 0.625 / (math.sqrt(1.875 / 7) + 1e-4), -0.375 / (math.sqrt(1.875 / 7) + 1e-4)
    assert (right, wrong) == pytest.approx((1.207381, -0.724429), abs=1e-6)
    want = [right if place in (0, 3, 4) else wrong for place in range(8)]
    assert advantages[0].tolist() == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize(
    ("logp", "old", "ref", "want"),
    [
        # ratio e^0.3 = 1.349859 is cut to 1.2: 1.8, less 0.04 (e^-0.2 + 0.2 - 1)
        (-1.0, -1.3, -1.2, 1.799251),
        (
            -1.0,
            -0.7,
            -1.2,
            1.110478,
        ),  # ratio e^-0.3 = 0.740818, not cut where the advantage is above 0
        (-1.0, -1.0, -1.0, 1.5),
    ],
)
def test_the_objective_of_a_token_worked_by_hand(logp, old, ref, want):
    one = torch.ones(1, 1)
    loss, _ = copo_loss(logp * one, old * one, ref * one, 1.5 * one, one, epsilon=0.2, beta=0.04)
    assert loss.item() == pytest.approx(-want, abs=1e-5)
