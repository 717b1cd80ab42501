"""What crosses the stages of a training step: completions with their outcomes, and what tokens earn.

`rollout` samples G completions per prompt and pays them: a `Rollouts`. `train.score` reads it, asks the
policy (`Evidence`), and returns causal rewards and advantages: a `Scores`. `train.update` reads both.
Token ids travel as ids: a completion is never decoded and tokenised again.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from data import Example, opening, with_opening
from model import Policy, Prefix, sample_tokens
from rewards import RewardFunction, outcome_reward, reasoning_span

# Outcome rewards of other token ids (R of (length,), on the CPU) in place of completions n (R,).
Outcomes = Callable[[Sequence[int], Sequence[Tensor]], list[float]]


@dataclass
class Rollouts:
    """N = B * G completions, in the order of their prompts (shapes: see copo.py).

    A completion without a closed reasoning span has reasoning_start = reasoning_end = answer_start = 0.
    Where the prompt opens the reasoning, the first token may be a reasoning token, and texts have the tag.
    """

    examples: list[Example]  # B
    prompt_index: Tensor  # (N,) the prompt that each completion continues
    completion_ids: Tensor  # (N, C) padded on the right
    lengths: Tensor  # (N,) tokens, the end-of-sequence token included
    reasoning_start: Tensor  # (N,) place of the first reasoning token
    reasoning_end: Tensor  # (N,) one past the last one
    answer_start: Tensor  # (N,) place of the first token after the closing tag
    longest: int  # L, the most tokens of a completion
    truncated: Tensor  # (N,) bool, cut off at the maximal length
    rewards: Tensor  # (N,) outcome rewards
    texts: list[str]  # N
    reward: Outcomes
    # Only where there are several rewards:
    components: dict[str, Tensor] = field(default_factory=dict)  # each, (N,); NaN: does not apply
    weights: Sequence[float] = ()  # of each

    @classmethod
    def of(
        cls,
        policy: Policy,
        prompt_index: Tensor,
        completion_ids: Tensor,
        lengths: Tensor,
        longest: int,
        reward: Outcomes,
        examples: Sequence[Example] = (),
        opened: Sequence[str] | None = None,
        rewards: Tensor | None = None,
    ) -> "Rollouts":
        """Completions from anywhere, their reasoning found and, without `rewards` (N,), paid.

        opened: (B,) the reasoning tag where a prompt has opened it itself, "" where not; None for "".
        """
        of_prompt = prompt_index.tolist()
        completions = [
            row[:n] for row, n in zip(completion_ids.cpu(), lengths.tolist(), strict=True)
        ]
        texts = [
            with_opening(opened[b] if opened else "", policy.text(tokens))
            for b, tokens in zip(of_prompt, completions, strict=True)
        ]
        spans = [
            _token_span(policy, tokens, text)
            for tokens, text in zip(completions, texts, strict=True)
        ]
        start, end, answer = torch.tensor(spans, device=policy.device).unbind(1)
        if rewards is None:
            rewards = torch.tensor(
                reward(range(len(completions)), completions), device=policy.device
            )
        last = completion_ids.gather(1, lengths[:, None] - 1)[:, 0]
        truncated = ~torch.isin(last, policy.eos_ids)
        return cls(
            list(examples), prompt_index, completion_ids, lengths, start, end, answer, longest,
            truncated, rewards, texts, reward,
        )  # fmt: skip

    @property
    def totals(self) -> Tensor:
        """(N,) what equation 1 compares: outcome rewards, or the weighted sum of several rewards."""
        if not self.components:
            return self.rewards
        pairs = zip(self.weights, self.components.values(), strict=True)
        return sum(weight * rewards.nan_to_num() for weight, rewards in pairs)

    @property
    def completion_mask(self) -> Tensor:
        """(N, C) bool, true up to and including the first end-of-sequence token."""
        return self._places < self.lengths[:, None]

    @property
    def reasoning_mask(self) -> Tensor:
        """(N, C) bool, true on reasoning tokens."""
        after_start = self._places >= self.reasoning_start[:, None]
        return after_start & (self._places < self.reasoning_end[:, None])

    @property
    def _places(self) -> Tensor:
        return torch.arange(self.completion_ids.shape[1], device=self.completion_ids.device)


@dataclass
class Cost:
    """What scoring took."""

    rows: int = 0  # completions decoded
    token_forwards: int = 0  # token positions run through the decoder


@dataclass
class Evidence:
    """What the policy answered to the two questions, as rewards."""

    rewards_with: Tensor  # (N, C, H) of completions that keep o_1..o_t
    rewards_without: Tensor  # (N, C, H) of completions that keep o_1..o_(t-1)
    rewards_masked: Tensor  # (N, C) of answers given with o_t masked
    scored: Tensor  # (N, C) bool, the tokens that were asked about
    exact: bool  # the paper's questions, not cheaper ones
    cost: Cost


class Causal(NamedTuple):
    """What the tokens of N completions earn for having caused the outcome; 0 outside the reasoning."""

    rewards: Tensor  # (N, C) of equation 4
    sufficiency: Tensor  # (N, C), in [0, 1]
    necessity: Tensor  # (N, C), raw, in [-1, 1]
    evidence: Evidence


@dataclass
class Scores:
    """What the tokens earn, and why."""

    sufficiency: Tensor  # (N, C), in [0, 1]
    necessity: Tensor  # (N, C), raw, in [-1, 1]
    causal_rewards: Tensor  # (N, C)
    advantages: Tensor  # (N,)
    token_advantages: Tensor  # (N, C)
    evidence: Evidence


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
    B = len(examples)
    prompt_index = torch.arange(B, device=policy.device).repeat_interleave(num_generations)
    uniforms = torch.rand(B * num_generations, max_completion_length, generator=generator)
    uniforms = uniforms.to(policy.device)
    first = sample_tokens(prefix.logits[prompt_index], uniforms[:, :1], temperature)[:, 0]
    budget = torch.full_like(prompt_index, max_completion_length)
    rows = policy.rows(prefix, prompt_index)
    ids, lengths = policy.decode(rows, first, budget, uniforms, temperature)
    ids = ids[:, : int(lengths.max())]

    opened = [opening(example, policy.processor) for example in examples]
    prompt_of, paid = prompt_index.tolist(), {}

    def outcomes(which: Sequence[int], completions: Sequence[Tensor]) -> list[float]:
        asked = [(prompt_of[n], *ids.tolist()) for n, ids in zip(which, completions, strict=True)]
        for prompt, *tokens in dict.fromkeys(asked):
            # Scoring decodes many identical completions: each is paid once.
            if (prompt, *tokens) not in paid:
                text = with_opening(opened[prompt], policy.text(tokens))
                paid[prompt, *tokens] = reward(text, examples[prompt])
        return [paid[text] for text in asked]

    return Rollouts.of(
        policy, prompt_index, ids, lengths, max_completion_length, outcomes, examples, opened
    )


def with_further(
    rollouts: Rollouts,
    names: Sequence[str],
    further: Sequence[Callable[[str, Example], float | None]],
    weights: Sequence[float] | None = None,
) -> Rollouts:
    """The same completions, paid by further rewards beside the outcome.

    They enter equation 1 alone. Equations 2 and 3 ask about the outcome, the right answer: a reward for
    format or length may move where the answer stays.
    names, weights: of the outcome and of each further reward; without weights, 1 each.
    """
    columns = [rollouts.rewards]
    for reward in further:
        paid = [
            reward(text, rollouts.examples[b])
            for text, b in zip(rollouts.texts, rollouts.prompt_index.tolist(), strict=True)
        ]
        paid = [math.nan if value is None else value for value in paid]
        columns.append(torch.tensor(paid, device=rollouts.rewards.device))
    components = dict(zip(names, columns, strict=True))
    return dataclasses.replace(
        rollouts, components=components, weights=weights or [1.0] * len(names)
    )


def _token_span(policy: Policy, ids: Tensor, text: str) -> tuple[int, int, int]:
    """Reasoning tokens [start, end) and the first token after the closing tag; zeros without one.

    A token that holds a part of a tag is not a reasoning token.  text: of `ids`, after the tag that the
    prompt has opened, if it has.
    """
    span = reasoning_span(text)
    if span is None:
        return 0, 0, 0
    opened = len(text) - len(policy.text(ids))
    first, last = max(span[0] - opened, 0), span[1] - opened
    start = policy.tokens_to_spell(ids, first)
    end = policy.tokens_to_spell(ids, last + 1) - 1
    answer = policy.tokens_to_spell(ids, last + len("</think>"))
    return (start, end, answer) if start < end else (0, 0, 0)
