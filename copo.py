"""COPO: Causal-Oriented Policy Optimization, equations 1 to 6 of arXiv 2508.04182, in order.

Pure tensor functions: nothing here knows a model, a text or a file. GRPO pays every token of a
completion its group-relative outcome (equation 1). COPO also pays each reasoning token for having
caused that outcome: for being sufficient (2) and necessary (3) for the right answer, weighted (4),
added to the advantage (5), and optimised with GRPO's clipped objective (6).

    equation (1)  group_advantages       A_i         = (r_i - mean(r)) / std(r)
    equation (2)  sufficiency            S_suff(o_t) = mean_k max(0, r(Y^k_t) - r(Y^k_(t-1)))
    equation (3)  necessity              S_nec(o_t)  = r(Y) - r(Y^mask_t)
    equation (4)  causal_completeness    r_causal    = lambda_s S_suff + lambda_n S_nec
    equation (5)  inject                 A_(i,t)     = A_i + r_causal(o_t)  on reasoning tokens
    equation (6)  copo_loss              the clipped objective with its KL penalty

The default weights are the paper's; epsilon and beta are ours. `scale_rewards`, `loss_lengths` and
`epsilon_high` hold what later papers on GRPO vary, under TRL's names.

Shapes, here and in every other module:
    B prompts per batch         G completions per prompt        N = B * G completions
    P prompt tokens             C completion tokens             T reasoning tokens
    H continuations per set     R rows of a decoding batch      V words of the vocabulary
    D sizes of a hidden state   L most tokens of a completion   U different texts among the N
A trajectory is a completion that is asked about; ... stands for any leading dimensions. `train.py` calls
everything with (N, C, H) or (N, C): one column per completion token, of which only reasoning counts.

Where this departs from the paper's text:
 1. The standard deviation of equation 1 is the sample's (ddof 1) plus 1e-4, as in TRL, and a group
    whose rewards are all equal gets exactly 0.
 2. "Normalised to [0, 1]" (equation 4) is a clamp. An affine map of S_nec from [-1, 1] would put a
    word without effect at 0.5; the paper's own example has such words near 0.
 3. The KL of equation 6 is estimated per token by Schulman's k3.
"""

import torch
from torch import Tensor

LOSS_TYPES = ("grpo", "bnpo", "dapo", "dr_grpo")
SCALES = ("group", "batch", "none")


def group_advantages(rewards: Tensor, scale_rewards: str = "group") -> Tensor:
    """Equation 1: A_i = (r_i - mean(r_1..r_G)) / std(r_1..r_G), within each prompt's group.

    rewards: (B, G) outcome rewards.  Returns (B, G).
    scale_rewards: whose std divides: that of the "group", of the whole "batch" (arXiv 2508.08221), or "none"
        (arXiv 2503.20783: a group's std favours prompts that are nearly always or nearly never solved).
    A group whose rewards are all equal tells nothing about its members: exactly 0.

    >>> group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])).round(decimals=3)
    tensor([[ 0.8660, -0.8660, -0.8660,  0.8660],
            [ 0.0000,  0.0000,  0.0000,  0.0000]])
    """
    assert rewards.dim() == 2, f"rewards must be (B, G), got {tuple(rewards.shape)}"
    assert scale_rewards in SCALES, f"scale_rewards is {scale_rewards!r}, must be one of {SCALES}"
    all_equal = (rewards == rewards[:, :1]).all(1, keepdim=True)  # (B, 1)
    advantages = rewards - rewards.mean(1, keepdim=True)
    if scale_rewards != "none":
        of = rewards if scale_rewards == "group" else rewards.reshape(1, -1)  # (B, G) or (1, N)
        # The deviation is written out: torch.std would be NaN, with a warning, for a group of one.
        squares = (of - of.mean(1, keepdim=True)).square().sum(1, keepdim=True)
        advantages = advantages / ((squares / max(of.shape[1] - 1, 1)).sqrt() + 1e-4)
    return torch.where(all_equal, torch.zeros_like(advantages), advantages)


def sufficiency(rewards_with: Tensor, rewards_without: Tensor) -> Tensor:
    """Equation 2: S_suff(o_t) = 1/H sum_k (r(Y^k_t) - r(Y^k_(t-1))) 1[r(Y^k_t) > r(Y^k_(t-1))].

    rewards_with: (..., T, H) rewards of H completions that keep o_1..o_t.
    rewards_without: (..., T, H) rewards of H completions that keep only o_1..o_(t-1).
    Returns (..., T), in [0, 1].  The k-th completions of the two sets are compared as a pair.
    """
    assert rewards_with.shape == rewards_without.shape, (
        f"one pair per completion: {tuple(rewards_with.shape)} with, "
        f"{tuple(rewards_without.shape)} without"
    )
    return (rewards_with - rewards_without).clamp(min=0).mean(-1)


def necessity(rewards: Tensor, rewards_masked: Tensor) -> Tensor:
    """Equation 3: S_nec(o_t) = r(Y) - r(Y^mask_t).

    rewards: (..., 1) outcome of each trajectory's own answer.
    rewards_masked: (..., T) outcome of the answer given with the embedding of o_t zeroed.
    Returns (..., T), raw, in [-1, 1]: below 0 where the answer is better without the token.
    """
    assert rewards.shape == (*rewards_masked.shape[:-1], 1), (
        f"one reward per trajectory: {tuple(rewards.shape)} against {tuple(rewards_masked.shape)}"
    )
    return rewards - rewards_masked


def causal_completeness(
    suff: Tensor, nec: Tensor, lambda_s: float = 0.35, lambda_n: float = 0.35
) -> Tensor:
    """Equation 4: r_causal = lambda_s S_suff + lambda_n S_nec, both scores clamped to [0, 1] first.

    suff, nec: S_suff and S_nec, of one shape.  A weighted sum: the weights need not sum to one.

    >>> causal_completeness(torch.tensor(0.87), torch.tensor(0.81))  # "dog" in the paper's example
    tensor(0.5880)
    """
    assert suff.shape == nec.shape, (
        f"one pair per token: {tuple(suff.shape)} and {tuple(nec.shape)}"
    )
    return lambda_s * suff.clamp(0, 1) + lambda_n * nec.clamp(0, 1)


def inject(advantages: Tensor, causal_rewards: Tensor, reasoning_mask: Tensor) -> Tensor:
    """Equation 5: A_(i,t) = A_i + r_causal(o_t) on reasoning tokens, A_i on all others.

    advantages: (N,) of equation 1.  causal_rewards: (N, C), read on reasoning tokens only.
    reasoning_mask: (N, C), true on reasoning tokens.  Returns (N, C).

    >>> inject(torch.tensor([-1.0]), torch.tensor([[0.5, 0.25, 9.0]]), torch.tensor([[1, 1, 0]]))
    tensor([[-0.5000, -0.7500, -1.0000]])
    """
    assert (
        causal_rewards.shape == reasoning_mask.shape == (len(advantages), causal_rewards.shape[1])
    ), (
        f"advantages {tuple(advantages.shape)}, causal rewards {tuple(causal_rewards.shape)}, "
        f"reasoning mask {tuple(reasoning_mask.shape)}"
    )
    return advantages[:, None] + torch.where(reasoning_mask.bool(), causal_rewards, 0.0)


def loss_lengths(
    completion_mask: Tensor, loss_type: str = "grpo", max_completion_length: int | None = None
) -> Tensor:
    """Z_i of equation 6: the length that the sum over the tokens of completion i is divided by.

        grpo        Z_i = C_i         its own: all completions count the same, as in the paper
        bnpo, dapo  Z_i = mean_j C_j  the mean: all tokens count the same        (DAPO, arXiv 2503.14476)
        dr_grpo     Z_i = L           the most there can be: no length moves it  (Dr. GRPO, arXiv 2503.20783)

    completion_mask: (N, C) of all completions of the optimiser step.  max_completion_length: L, of dr_grpo.
    Returns (N,). TRL's bnpo takes the mean over each part of a step alone; with one part, it is this.

    >>> [loss_lengths(torch.tensor([[1, 1, 1], [1, 0, 0]]), name, 8).tolist() for name in LOSS_TYPES]
    [[3.0, 1.0], [2.0, 2.0], [2.0, 2.0], [8.0, 8.0]]
    """
    assert loss_type in LOSS_TYPES, f"loss_type is {loss_type!r}, must be one of {LOSS_TYPES}"
    lengths = completion_mask.sum(1).float()  # (N,)
    if loss_type == "grpo":
        return lengths.clamp(min=1)
    if loss_type == "dr_grpo":
        return torch.full_like(lengths, max_completion_length)
    return (lengths.sum().clamp(min=1) / len(lengths)).expand_as(lengths)


def copo_loss(
    per_token_logps: Tensor,
    old_per_token_logps: Tensor,
    ref_per_token_logps: Tensor | None,
    token_advantages: Tensor,
    completion_mask: Tensor,
    epsilon: float = 0.2,
    beta: float = 0.04,
    num_completions: int | None = None,
    epsilon_high: float | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """Equation 6: -1/N sum_i 1/C_i sum_t ( min(rho A, clip(rho, 1-eps, 1+eps) A) - beta KL ).

    per_token_logps: (N, C) log-probabilities of the completion tokens, with gradient.
    old_per_token_logps: (N, C) of the policy that sampled them.
    ref_per_token_logps: (N, C) of the frozen reference, or None when beta is 0.
    token_advantages: (N, C) of equation 5.  completion_mask: (N, C), true up to the first EOS.
    num_completions: of the whole optimiser step, where this is a part of it: the parts' losses then add up.
    epsilon_high: eps of the upper bound alone (DAPO's clip-higher, arXiv 2503.14476); without it, epsilon.
    lengths: (N,) of `loss_lengths`, in place of C_i, for another loss type.
    Returns the scalar to minimise and its metrics: `kl` and `clip_ratio`, means over tokens.

    On the first pass over fresh completions rho is 1 everywhere, nothing is clipped, and without
    KL the loss is just minus the mean advantage, about 0 for GRPO. That is right: the gradient is
    not 0, it is REINFORCE's.
    """
    mask = completion_mask.to(per_token_logps.dtype)  # (N, C)
    assert (
        per_token_logps.shape == old_per_token_logps.shape == token_advantages.shape == mask.shape
    ), (
        f"log-probabilities {tuple(per_token_logps.shape)}, old {tuple(old_per_token_logps.shape)}, "
        f"advantages {tuple(token_advantages.shape)}, mask {tuple(mask.shape)}"
    )
    ratio = torch.exp(per_token_logps - old_per_token_logps)
    above = epsilon if epsilon_high is None else epsilon_high
    clipped_ratio = ratio.clamp(1 - epsilon, 1 + above)
    per_token_loss = -torch.minimum(ratio * token_advantages, clipped_ratio * token_advantages)

    if beta and ref_per_token_logps is not None:
        difference = ref_per_token_logps - per_token_logps
        # Schulman's k3: unbiased, never negative
        per_token_kl = torch.exp(difference) - difference - 1
        per_token_loss = per_token_loss + beta * per_token_kl
    else:
        per_token_kl = torch.zeros_like(ratio)

    lengths = loss_lengths(mask) if lengths is None else lengths
    per_completion = (per_token_loss * mask).sum(1) / lengths  # (N,)
    loss = per_completion.sum() / (num_completions or len(mask))

    with torch.no_grad():
        tokens = mask.sum().clamp(min=1)
        # Clipped is where the minimum took the clipped branch: the gradient of that token is 0.
        clipped = (ratio * token_advantages) > (clipped_ratio * token_advantages)
        metrics = {
            "kl": ((per_token_kl * mask).sum() / tokens).item(),
            "clip_ratio": ((clipped * mask).sum() / tokens).item(),
        }
    return loss, metrics
