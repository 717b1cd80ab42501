"""Credit for what is named, without a word of truth: ours, not the paper's.

What could credit do if each mention of a thing were known to be right or wrong? `truth` says: it is what
scenes alone know. The others judge mentions by what can be had without annotations:

    agreement   the share of the group's other completions that name the thing, too. G completions of one
                image are G looks at it: what is there is seen by most, what is made up by few. Costs nothing.
    contrast    the same, less the share of the completions about the batch's other images that name it:
                what is said of every image tells nothing about this one.
    voted       the share of G completions by the frozen warm start that name the thing. It cannot be talked
                round by the training. Costs one more rollout.
    asked       whether the frozen warm start says yes to "Is there a boat?". One short batch.
    unmoved     how little the word leans on the background: min(1, e^-d), where
                d = log pi(o_t | I, o_<t) - log pi(o_t | do(L_s), o_<t), the image drawn again over another
                background. The paper's causal model asks for it, its equations never do. One pass.

Each is brought to a worth between -1 and 1. The words that lead to a mention earn lambda_s times its worth
(`pay_mentions`): "and a red boat" is paid for the boat. To name a thing again is worth -1: it claims a
second one.
"""

import dataclasses
import functools
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from copo import inject
from data import collate
from model import Policy, Prefix, load_policy
from rewards import extract_answer, normalize
from rollouts import Rollouts, rollout
from runs import Limits, Settings
from scm import BACKGROUNDS
from train import Scores, score

Mention = tuple[int, int, str]  # completion, place of its token, category
# (policy, its prefix, rollouts, mentions, random numbers) -> the worth of each mention, and how many token
# positions it took to know.
Judge = Callable[
    [Policy, Prefix, Rollouts, list[Mention], torch.Generator], tuple[list[float], int]
]


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
    """(N, C): the tokens from after the last mention to this one earn `weight` times what it is worth."""
    earned = torch.zeros(rollouts.completion_ids.shape)
    last = -1, -1  # completion and place of the mention before
    for (n, t, _), value in zip(mentions, worth, strict=True):
        earned[n, last[1] + 1 if last[0] == n else 0 : t + 1] = weight * value
        last = n, t
    return torch.where(rollouts.reasoning_mask, earned.to(rollouts.completion_ids.device), 0.0)


@dataclasses.dataclass(frozen=True)
class Paid:
    """A `scoring` for train.train: the outcome's advantage, and lambda_s times what mentions are worth.

    start: the folder of a frozen policy that judges in the place of the one in training.
    """

    judge: Judge
    start: Path | None = None

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
        if self.start and self.judge in FROZEN:
            policy = frozen(self.start)
            prefix = policy.prefill(collate(rollouts.examples, policy.processor))
        with torch.no_grad():
            worth, tokens = self.judge(policy, prefix, rollouts, named, generator)
        scores.evidence.cost.token_forwards = tokens
        credit = pay_mentions(rollouts, named, charge_repeats(named, worth), settings.lambda_s)
        token_advantages = inject(scores.advantages, credit, rollouts.reasoning_mask)
        return dataclasses.replace(scores, causal_rewards=credit, token_advantages=token_advantages)


@functools.cache
def frozen(start: Path) -> Policy:
    """The policy of a folder, loaded once."""
    return load_policy(start)


def charge_repeats(mentions: list[Mention], worth: list[float]) -> list[float]:
    """The same, but -1 where a completion names a thing again."""
    seen, charged = set(), []
    for (n, _, category), value in zip(mentions, worth, strict=True):
        charged.append(-1.0 if (n, category) in seen else value)
        seen.add((n, category))
    return charged


def truth(policy, prefix, rollouts: Rollouts, mentions: list[Mention], generator):
    """1 for a thing of the scene, -1 for any other: what only scenes know."""
    there = [rollouts.examples[int(rollouts.prompt_index[n])].objects for n, _, _ in mentions]
    return [1.0 if c in of else -1.0 for of, (_, _, c) in zip(there, mentions, strict=True)], 0


def agreement(policy, prefix, rollouts: Rollouts, mentions: list[Mention], generator):
    """Twice the share of the group's other completions that name the thing, less 1."""
    named_by = naming(rollouts, mentions)
    others = len(rollouts.prompt_index) // len(rollouts.examples) - 1
    groups = rollouts.prompt_index.tolist()
    return [2 * (len(named_by[groups[n], c]) - 1) / others - 1 for n, _, c in mentions], 0


def contrast(policy, prefix, rollouts: Rollouts, mentions: list[Mention], generator):
    """The share of the group's others that name it, less that of the completions about other images."""
    named_by, groups = naming(rollouts, mentions), rollouts.prompt_index.tolist()
    B, N = len(rollouts.examples), len(groups)
    worth, _ = agreement(policy, prefix, rollouts, mentions, generator)
    for i, (n, _, category) in enumerate(mentions):
        elsewhere = sum(len(named_by.get((b, category), ())) for b in range(B) if b != groups[n])
        worth[i] = (worth[i] + 1) / 2 - elsewhere / max(N - N // B, 1)
    return worth, 0


def naming(rollouts: Rollouts, mentions: list[Mention]) -> dict[tuple[int, str], set[int]]:
    """(prompt, category) -> the completions about that prompt that name it."""
    found: dict[tuple[int, str], set[int]] = {}
    for n, _, category in mentions:
        found.setdefault((int(rollouts.prompt_index[n]), category), set()).add(n)
    return found


def voted(policy, prefix, rollouts: Rollouts, mentions: list[Mention], generator):
    """Twice the share of as many fresh completions of the policy that name the thing, less 1."""
    G, longest = len(rollouts.prompt_index) // len(rollouts.examples), rollouts.longest
    drawn = rollout(policy, prefix, rollouts.examples, G, longest, generator)
    named_by, groups = naming(drawn, mentions_in(policy, drawn)), rollouts.prompt_index.tolist()
    worth = [2 * len(named_by.get((groups[n], c), ())) / G - 1 for n, _, c in mentions]
    return worth, int(drawn.lengths.sum())


def asked(policy, prefix, rollouts: Rollouts, mentions: list[Mention], generator):
    """1 where the policy says that the thing is there, greedily; else -1."""
    pairs = sorted({(int(rollouts.prompt_index[n]), category) for n, _, category in mentions})
    questions = [
        dataclasses.replace(
            rollouts.examples[b], question=f"Is there a {category}?", kind="yesno", answer="yes"
        )
        for b, category in pairs
    ]
    answers = policy.answer(questions) if questions else []
    yes = {
        pair: 1.0 if normalize(extract_answer(text) or "") == "yes" else -1.0
        for pair, text in zip(pairs, answers, strict=True)
    }
    tokens = sum(len(policy.tokenizer(text)["input_ids"]) for text in answers)
    worth = [yes[int(rollouts.prompt_index[n]), category] for n, _, category in mentions]
    return worth, tokens + len(pairs) * prefix.mask.shape[1]


def unmoved(policy, prefix, rollouts: Rollouts, mentions: list[Mention], generator):
    """Twice the share of a word's probability that another background leaves it (at most 1), less 1."""
    rng = random.Random(repr([example.scene for example in rollouts.examples]))
    redrawn = []
    for example in rollouts.examples:
        others = [name for name in BACKGROUNDS if name != example.scene.background]
        scene = example.scene.do(background=rng.choice(others))
        redrawn.append(dataclasses.replace(example, image=scene.render(), scene=scene))
    given = rollouts.prompt_index, rollouts.completion_ids, rollouts.completion_mask
    elsewhere = policy.prefill(collate(redrawn, policy.processor))
    here, there = (policy.per_token_logps(p, *given)[0] for p in (prefix, elsewhere))
    left = (there - here).clamp(max=0).exp()
    return [2 * left[n, t].item() - 1 for n, t, _ in mentions], int(2 * rollouts.lengths.sum())


FROZEN = (voted, asked)  # judges that ask the warm start, not the policy in training
