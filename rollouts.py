"""Rollouts: G completions of every prompt, what they earned, and where their reasoning stands.

One `Rollouts` crosses every stage of a training step: `rollout` fills in what was sampled and paid,
`train.score` adds the causal rewards and advantages, `train.update` reads them. Token ids travel
as ids: a completion is never decoded and tokenised again.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data import Example
from model import Policy, Prefix, sample_tokens
from rewards import RewardFunction, outcome_reward, reasoning_span


@dataclass
class Rollouts:
    """N = B * G completions, in the order of their prompts (shapes: see copo.py)."""

    examples: list[Example]  # B
    which: Tensor  # (N,) the prompt that each completion continues
    completion_ids: Tensor  # (N, C) padded on the right
    lengths: Tensor  # (N,) tokens, the end-of-sequence token included
    start: Tensor  # (N,) first reasoning token
    end: Tensor  # (N,) one past the last reasoning token; equal to start where there is none
    answer: Tensor  # (N,) first token after the closed reasoning span
    uniforms: Tensor  # (N, max completion length) the numbers that drew the tokens
    truncated: Tensor  # (N,) bool, cut off at the maximal length
    rewards: Tensor  # (N,) outcome rewards
    texts: list[str]  # N
    reward: Callable[
        [int, Tensor], float
    ]  # outcome of other token ids in the place of completion n

    @property
    def completion_mask(self) -> Tensor:
        """(N, C) bool, true up to and including the first end-of-sequence token."""
        return self._places < self.lengths[:, None]

    @property
    def reasoning_mask(self) -> Tensor:
        """(N, C) bool, true on reasoning tokens."""
        return (self._places >= self.start[:, None]) & (self._places < self.end[:, None])

    @property
    def _places(self) -> Tensor:
        return torch.arange(self.completion_ids.shape[1], device=self.completion_ids.device)


@torch.no_grad()
def rollout(
    policy: Policy,
    prefix: Prefix,
    examples: Sequence[Example],
    num_generations: int,
    max_completion_length: int,
    generator: torch.Generator,
    temperature: float = 1.0,
    reward: RewardFunction = outcome_reward,
) -> Rollouts:
    """Sample G completions of every prompt of `prefix` and pay them."""
    which = torch.arange(len(examples), device=policy.device).repeat_interleave(num_generations)
    uniforms = torch.rand(len(which), max_completion_length, generator=generator).to(policy.device)
    first = sample_tokens(prefix.logits[which], uniforms[:, :1], temperature)[:, 0]
    budget = torch.full_like(which, max_completion_length)
    ids, lengths = policy.decode(policy.rows(prefix, which), first, budget, uniforms, temperature)
    ids = ids[:, : int(lengths.max())]

    prompt_of = which.tolist()

    @functools.cache  # completions repeat, those that score a group most of all
    def earned(prompt: int, tokens: tuple[int, ...]) -> float:
        return reward(policy.text(tokens), examples[prompt])

    def outcome(n: int, tokens: Tensor) -> float:
        return earned(prompt_of[n], tuple(tokens.tolist()))

    completions = [row[:length] for row, length in zip(ids.cpu(), lengths.tolist(), strict=True)]
    texts = [policy.text(tokens) for tokens in completions]
    spans = [_token_span(policy, ids, text) for ids, text in zip(completions, texts, strict=True)]
    start, end, answer = torch.tensor(spans, device=policy.device).unbind(1)
    rewards = [outcome(n, tokens) for n, tokens in enumerate(completions)]
    return Rollouts(
        examples=list(examples),
        which=which,
        completion_ids=ids,
        lengths=lengths,
        start=start,
        end=end,
        answer=answer,
        uniforms=uniforms,
        truncated=~torch.isin(ids.gather(1, lengths[:, None] - 1)[:, 0], policy.eos_ids),
        rewards=torch.tensor(rewards, device=policy.device),
        texts=texts,
        reward=outcome,
    )


def _token_span(policy: Policy, ids: Tensor, text: str) -> tuple[int, int, int]:
    """Reasoning tokens [start, end) and the first token after the closing tag; zeros without one.

    A token that holds a part of a tag is not a reasoning token.
    """
    span = reasoning_span(text)
    if span is None:
        return 0, 0, 0
    start = policy.tokens_to_spell(ids, span[0])
    end = policy.tokens_to_spell(ids, span[1] + 1) - 1
    answer = policy.tokens_to_spell(ids, span[1] + len("</think>"))
    return (start, end, answer) if start < end else (0, 0, 0)
