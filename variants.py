"""What one might pay a reasoning token in place of equation 4: a flag of train.py, a row of the results.

The paper's causal reward is never negative and has no baseline: it pays whatever was sampled, in
wrong trajectories too. Each form below but the last keeps its two questions and answers that in another way.

    paper       lambda_s S_suff + lambda_n S_nec, both clamped to [0, 1]                     (equation 4)
    centred     paper's, less its mean over the trajectory's scored tokens: it moves credit between
                the tokens of a trajectory and adds none to it
    signed      paper's, times the sign of the trajectory's advantage: what caused an answer below the
                group's mean is charged for it, and silent groups stay silent
    difference  lambda_s (p_t - p_(t-1)) + lambda_n (r(Y) - r(Y^mask_t)), neither clamped. p_t is the mean
                reward of the completions that keep o_1..o_t, so the first term is the advantage of the
                token itself: over the policy's own choice of o_t its mean is 0
    truth       nothing is asked or estimated: GRPO's process supervision (DeepSeekMath, 4.1.3) of what is
                named, beside the outcome. Each mention of a thing of the scene is worth 1, of one that is
                not there -1, less the mean of the group's mentions and over their deviation; a token earns
                lambda_s times the sum of what it and all that follow it are worth. Only scenes know it: it
                says whether credit on tokens could help at all
"""

import torch
from torch import Tensor

from copo import causal_completeness, group_advantages, necessity, sufficiency
from model import Policy
from rollouts import Rollouts
from tokens import reasoning_classes

FORMS = ("paper", "centred", "signed", "difference")  # and "truth"
WORTH = {"grounded object": 1.0, "hallucinated object": -1.0}


def causal_rewards(
    form: str,
    with_and_without: tuple[Tensor, Tensor],
    outcomes: Tensor,
    masked: Tensor,
    advantages: Tensor,
    scored: Tensor,
    lambda_s: float,
    lambda_n: float,
) -> Tensor:
    """What each reasoning token earns, (N, C), in one of FORMS.

    with_and_without: (N, C, H) each, rewards of equation 2's two sets.  outcomes: (N,), the trajectories'
    own.  masked: (N, C), rewards of the masked answers.  advantages: (N,) of equation 1.
    scored: (N, C) bool, the reasoning tokens that were asked about.
    """
    with_, without = with_and_without
    nec = necessity(outcomes[:, None], masked)
    if form == "difference":
        return lambda_s * (with_ - without).mean(-1) + lambda_n * nec
    paper = causal_completeness(sufficiency(with_, without), nec, lambda_s, lambda_n)
    if form == "centred":
        tokens = scored.sum(1, keepdim=True).clamp(min=1)
        mean = torch.where(scored, paper, 0.0).sum(1, keepdim=True) / tokens
        return torch.where(scored, paper - mean, 0.0)
    if form == "signed":
        return paper * advantages.sign()[:, None]
    return paper


def truth_rewards(policy: Policy, rollouts: Rollouts, lambda_s: float) -> Tensor:
    """What each token earns by what the scene holds, (N, C): the form `truth`."""
    reasoning = rollouts.reasoning_mask
    worth = torch.zeros_like(rollouts.completion_ids, dtype=torch.float32)  # 0: names nothing
    worth[reasoning] = torch.tensor(
        [WORTH.get(kind, 0.0) for kind in reasoning_classes(policy, rollouts)], device=worth.device
    )
    for of_group in worth.view(len(rollouts.examples), -1):
        mentions = of_group != 0
        of_group[mentions] = group_advantages(of_group[mentions][None])[0]
    to_go = worth.flip(1).cumsum(1).flip(1)
    return torch.where(reasoning, lambda_s * to_go, 0.0)
