"""Credit for what is named, without a word of truth: ours, not the paper's.

What could credit do if each mention of a thing were known to be right or wrong? `truth` says: it is what
scenes alone know. The others judge mentions by what can be had without annotations:

    agreement   the share of the group's other completions that name the thing, too. G completions of one
                image are G looks at it: what is there is seen by most, what is made up by few. Costs nothing.
    contrast    agreement, less the share of the completions about the batch's other images that name it:
                what is said of every image tells nothing about this one.
    asked       whether the policy says yes to "Is there a boat?" about the same image. One short batch.
    unmoved     how little the word leans on the background: 2 min(1, e^-d) - 1, where
                d = log pi(o_t | I, o_<t) - log pi(o_t | do(L_s), o_<t), the image drawn again over another
                background. The paper's causal model asks for it, its equations never do. One pass.

A mention is worth between -1 and 1, and the words that lead to it earn lambda_s times that (`pay_mentions`):
"and a red boat" is paid for the boat. To name a thing again is worth -1: it claims a second one.
"""

import dataclasses
import random
from collections.abc import Callable

import torch
from torch import Tensor

from copo import inject
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
    """(N, C): the tokens from after the last mention to this one earn `weight` times what it is worth."""
    earned = torch.zeros(rollouts.completion_ids.shape)
    last = -1, -1  # completion and place of the mention before
    for (n, t, _), value in zip(mentions, worth, strict=True):
        earned[n, last[1] + 1 if last[0] == n else 0 : t + 1] = weight * value
        last = n, t
    return torch.where(rollouts.reasoning_mask, earned.to(rollouts.completion_ids.device), 0.0)


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
        seen = set()
        for i, (n, _, category) in enumerate(named):
            worth[i] = -1.0 if (n, category) in seen else worth[i]
            seen.add((n, category))
        credit = pay_mentions(rollouts, named, worth, settings.lambda_s)
        token_advantages = inject(scores.advantages, credit, rollouts.reasoning_mask)
        return dataclasses.replace(scores, causal_rewards=credit, token_advantages=token_advantages)


def truth(policy: Policy, prefix: Prefix, rollouts: Rollouts, mentions: list[Mention]):
    """1 for a thing of the scene, -1 for any other: what only scenes know."""
    there = [rollouts.examples[int(rollouts.prompt_index[n])].objects for n, _, _ in mentions]
    return [1.0 if c in of else -1.0 for of, (_, _, c) in zip(there, mentions, strict=True)], 0


def agreement(policy: Policy, prefix: Prefix, rollouts: Rollouts, mentions: list[Mention]):
    """Twice the share of the group's other completions that name the thing, less 1."""
    named_by = naming(rollouts, mentions)
    others = len(rollouts.prompt_index) // len(rollouts.examples) - 1
    groups = rollouts.prompt_index.tolist()
    return [2 * (len(named_by[groups[n], c]) - 1) / others - 1 for n, _, c in mentions], 0


def contrast(policy: Policy, prefix: Prefix, rollouts: Rollouts, mentions: list[Mention]):
    """The share of the group's others that name it, less that of the completions about other images."""
    named_by, groups = naming(rollouts, mentions), rollouts.prompt_index.tolist()
    B, N = len(rollouts.examples), len(groups)
    worth, _ = agreement(policy, prefix, rollouts, mentions)
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


def asked(policy: Policy, prefix: Prefix, rollouts: Rollouts, mentions: list[Mention]):
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


def unmoved(policy: Policy, prefix: Prefix, rollouts: Rollouts, mentions: list[Mention]):
    """Twice the share of a word's probability that another background leaves it (at most 1), less 1."""
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
    left = (there - here).clamp(max=0).exp()
    return [2 * left[n, t].item() - 1 for n, t, _ in mentions], int(2 * rollouts.lengths.sum())
