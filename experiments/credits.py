"""Credit for what is named, without a word of truth: ours, not the paper's.

`variants.truth` shows what credit could do if each mention of a thing were known to be right or wrong. Here
mentions are judged by what can be had without annotations:

    agreement   the share of the group's other completions that name the thing, too. G completions of one
                image are G looks at it: what is there is seen by most, what is made up by few. Costs nothing.
    asked       whether the policy says yes to "Is there a boat?" about the same image. One short batch.
    unmoved     how little the word leans on the background: -max(0, d), where
                d = log pi(o_t | I, o_<t) - log pi(o_t | do(L_s), o_<t), the image drawn again over another
                background. The paper's causal model asks for it, its equations never do. One pass.

All are paid as the truth is (`pay_mentions`): what counts is how a mention stands among those of its group.
"""

import dataclasses
import random
from collections.abc import Callable

import torch
from torch import Tensor

from copo import group_advantages, inject
from data import collate
from model import Policy, Prefix
from rewards import extract_answer, normalize
from rollouts import Rollouts
from runs import Limits, Settings
from scm import BACKGROUNDS
from train import Scores, score

# Worth of each mention, in their order, and how many token positions it took to know.
Judge = Callable[[Policy, Prefix, Rollouts, list["Mention"]], tuple[list[float], int]]
Mention = tuple[int, int, str]  # completion, place of its token, category


def mentions_in(policy: Policy, rollouts: Rollouts) -> list[Mention]:
    """What the reasoning of each completion names before its first full stop.

    After it the question is repeated, which claims nothing. A name is one token, as the tiny model's are.
    """
    found = []
    for n, ids in enumerate(rollouts.completion_ids):
        known = rollouts.examples[int(rollouts.prompt_index[n])].vocabulary
        for t in rollouts.reasoning_mask[n].nonzero()[:, 0].tolist():
            word = policy.text([int(ids[t])]).strip()
            if "." in word:
                break
            if word in known:
                found.append((n, t, word))
    return found


def pay_mentions(
    rollouts: Rollouts, mentions: list[Mention], worth: list[float], weight: float
) -> Tensor:
    """What each token earns by the worth of mentions, (N, C): DeepSeekMath's process supervision.

    From the worth of a mention the mean over its group's is taken, and the rest divided by their standard
    deviation. A token earns `weight` times the sum of what it and all tokens after it are worth.
    """
    earned = torch.zeros(rollouts.completion_ids.shape)
    G = len(rollouts.prompt_index) // len(rollouts.examples)
    for group in range(len(rollouts.examples)):
        own = [i for i, (n, _, _) in enumerate(mentions) if n // G == group]
        if own:
            values = group_advantages(torch.tensor([[worth[i] for i in own]]))[0]
            for i, value in zip(own, values, strict=True):
                n, t, _ = mentions[i]
                earned[n, t] = value
    to_go = earned.flip(1).cumsum(1).flip(1).to(rollouts.completion_ids.device)
    return torch.where(rollouts.reasoning_mask, weight * to_go, 0.0)


@dataclasses.dataclass(frozen=True)
class Paid:
    """A `scoring` for train.train: the outcome's advantage, and lambda_s times what mentions earn."""

    judge: Judge

    def __call__(
        self,
        policy: Policy,
        prefix: Prefix,
        rollouts: Rollouts,
        settings: Settings,
        generator: torch.Generator,
        limits: Limits,
    ) -> Scores:
        """Equation 1 and equation 5, with another credit in the place of equation 4."""
        silent = dataclasses.replace(settings, lambda_s=0.0, lambda_n=0.0)
        scores = score(policy, prefix, rollouts, silent, generator, limits)
        named = mentions_in(policy, rollouts)
        worth, scores.evidence.cost.token_forwards = self.judge(policy, prefix, rollouts, named)
        credit = pay_mentions(rollouts, named, worth, settings.lambda_s)
        token_advantages = inject(scores.advantages, credit, rollouts.reasoning_mask)
        return dataclasses.replace(scores, causal_rewards=credit, token_advantages=token_advantages)


def truth(policy: Policy, prefix: Prefix, rollouts: Rollouts, mentions: list[Mention]):
    """1 for a thing of the scene, -1 for any other: what only scenes know."""
    there = [rollouts.examples[int(rollouts.prompt_index[n])].objects for n, _, _ in mentions]
    return [1.0 if c in of else -1.0 for of, (_, _, c) in zip(there, mentions, strict=True)], 0


def agreement(policy: Policy, prefix: Prefix, rollouts: Rollouts, mentions: list[Mention]):
    """The share of the group's other completions that name the thing."""
    named_by: dict[tuple[int, str], set[int]] = {}
    for n, _, category in mentions:
        named_by.setdefault((int(rollouts.prompt_index[n]), category), set()).add(n)
    others = len(rollouts.prompt_index) // len(rollouts.examples) - 1
    return [
        (len(named_by[int(rollouts.prompt_index[n]), category]) - 1) / others
        for n, _, category in mentions
    ], 0


def asked(policy: Policy, prefix: Prefix, rollouts: Rollouts, mentions: list[Mention]):
    """1 where the policy says that the thing is there, greedily; else 0."""
    pairs = sorted({(int(rollouts.prompt_index[n]), category) for n, _, category in mentions})
    questions = [
        dataclasses.replace(
            rollouts.examples[b], question=f"Is there a {category}?", kind="yesno", answer="yes"
        )
        for b, category in pairs
    ]
    answers = policy.answer(questions) if questions else []
    yes = {
        pair: float(normalize(extract_answer(text) or "") == "yes")
        for pair, text in zip(pairs, answers, strict=True)
    }
    tokens = sum(len(policy.tokenizer(text)["input_ids"]) for text in answers)
    worth = [yes[int(rollouts.prompt_index[n]), category] for n, _, category in mentions]
    return worth, tokens + len(pairs) * prefix.mask.shape[1]


def unmoved(policy: Policy, prefix: Prefix, rollouts: Rollouts, mentions: list[Mention]):
    """Minus what the word loses when the background alone is drawn again, where it loses any."""
    rng = random.Random(repr([example.scene for example in rollouts.examples]))
    redrawn = []
    for example in rollouts.examples:
        others = [name for name in BACKGROUNDS if name != example.scene.background]
        scene = example.scene.do(background=rng.choice(others))
        redrawn.append(dataclasses.replace(example, image=scene.render(), scene=scene))
    given = rollouts.prompt_index, rollouts.completion_ids, rollouts.completion_mask
    with torch.no_grad():
        elsewhere = policy.prefill(collate(redrawn, policy.processor))
        here, there = (policy.per_token_logps(p, *given)[0] for p in (prefix, elsewhere))
    lost = (here - there).clamp(min=0)
    return [-lost[n, t].item() for n, t, _ in mentions], int(2 * rollouts.lengths.sum())
