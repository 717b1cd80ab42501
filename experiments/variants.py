"""What one might pay a reasoning token in place of equation 4: forms, and `scoring` for train.train.

The paper's causal reward is never negative and has no baseline: it pays whatever was sampled, in wrong
completions too. Each form below keeps the paper's two questions and answers that in another way.

    centred     equation 4, less its mean over the completion's scored tokens: it moves credit between
                the tokens of a completion and adds none to it
    signed      equation 4, times the sign of the completion's advantage: a token that caused an answer
                below the group's mean is charged for it, and silent groups stay silent
    difference  lambda_s (p_t - p_(t-1)) + lambda_n (r(Y) - r(Y^mask_t)), neither clamped. p_t is the mean
                reward of the completions that keep o_1..o_t, so the first term is the advantage of the
                token itself: over the policy's own choice of o_t its mean is 0
"""

import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from copo import inject
from experiments.tokens import other_logits
from interventions import Interventions
from model import Policy, Prefix
from rollouts import Rollouts
from runs import Limits, Settings
from train import Scores, score

# What every token of a step earns, (N, C), from its scores.
Form = Callable[[Scores, Rollouts, Settings], Tensor]


# ---------------------------------------------------------------------------------------------
# Forms: (N, C) from the scores of a step; `score` has been called with equation 4
# ---------------------------------------------------------------------------------------------
def centred(scores: Scores, rollouts: Rollouts, settings: Settings) -> Tensor:
    """Equation 4, less its mean over the completion's scored tokens; 0 on tokens not scored."""
    scored, paper = scores.evidence.scored, scores.causal_rewards
    tokens = scored.sum(1, keepdim=True).clamp(min=1)
    mean = torch.where(scored, paper, 0.0).sum(1, keepdim=True) / tokens
    return torch.where(scored, paper - mean, 0.0)


def signed(scores: Scores, rollouts: Rollouts, settings: Settings) -> Tensor:
    """Equation 4, times the sign of the completion's advantage."""
    return scores.causal_rewards * scores.advantages.sign()[:, None]


def difference(scores: Scores, rollouts: Rollouts, settings: Settings) -> Tensor:
    """The two differences of equations 2 and 3, weighted but not clamped."""
    evidence = scores.evidence
    gain = (evidence.rewards_with - evidence.rewards_without).mean(-1)
    return settings.lambda_s * gain + settings.lambda_n * scores.necessity


def score_as(form: Form, interventions: type[Interventions] | None = None) -> Callable[..., Scores]:
    """A `scoring` that asks the paper's questions (with these interventions) and pays `form`."""
    return functools.partial(_score, form, interventions)  # a closure would not pass to a worker


def _score(
    form: Form,
    interventions: type[Interventions] | None,
    policy: Policy,
    prefix: Prefix,
    rollouts: Rollouts,
    settings: Settings,
    generator: torch.Generator,
    limits: Limits,
) -> Scores:
    scores = score(
        policy, prefix, rollouts, settings, generator, limits, interventions=interventions
    )
    return _pay(scores, rollouts, form(scores, rollouts, settings))


def _pay(scores: Scores, rollouts: Rollouts, causal_rewards: Tensor) -> Scores:
    """The same scores with other causal rewards (N, C), injected as in equation 5."""
    token_advantages = inject(scores.advantages, causal_rewards, rollouts.reasoning_mask)
    return dataclasses.replace(
        scores, causal_rewards=causal_rewards, token_advantages=token_advantages
    )


# ---------------------------------------------------------------------------------------------
# Another mask
# ---------------------------------------------------------------------------------------------
class SecondBest(Interventions):
    """Necessity with the policy's next choice in place of o_t, where equation 3 puts zeros."""

    def stand_in(self, n: Tensor, t: Tensor) -> Tensor:
        """(R, D) embeddings of the tokens that were likeliest at places t but for o_t itself."""
        return self.policy.embed(other_logits(self, n, t).argmax(-1))
