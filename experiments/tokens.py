"""What single tokens earn, beside what they should: the estimator, the mask, the causal reward.

On completions of one policy about scenes whose causes are known, with as many draws as it takes:

    estimator   equation 2 as it is estimated, coupled and independent, against its own expectation and
                against the bounds that hold for every pairing:
                    max(0, p_t - p_(t-1))  <=  P(right with o_t, wrong without)  <=  min(p_t, 1 - p_(t-1))
                p_t is the chance of a right answer after o_1..o_t. The expectations are
                    independent    p_t (1 - p_(t-1))
                    coupled        p_t (1 - p_(t-1)) - pi_t p_t (1 - p_t),   pi_t = pi(o_t | o_<t)
                since the two completions of a coupled pair differ only where the draw is not o_t.
    mask        equation 3's zeroed embedding, and three other ways to take a token away, against what
                the policy says when it goes on from o_<t with any token but o_t
    credit      sufficiency, necessity and causal reward of grounded and hallucinated objects, of their
                attributes, of what only repeats the question, and of the rest
"""

import functools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from copo import causal_completeness, necessity, sufficiency
from data import Example, collate
from experiments.tables import CLASSES, MASKS
from interventions import PAIRINGS, Departures, Interventions
from model import Policy, Prefix, sample_tokens
from rollouts import Rollouts, rollout
from scm import CATEGORIES, COLORS, World, sample_example

MANY = 128  # draws that make an expectation
LENGTH = 64  # most tokens of a completion
SURE = (
    0.99  # a token likelier than this was never in doubt: no other token is there to compare with
)


@dataclass
class Batch:
    """Completions of one policy, and the class of every reasoning token in them."""

    policy: Policy
    prefix: Prefix
    rollouts: Rollouts
    n: Tensor  # (K,) completion of each reasoning token
    t: Tensor  # (K,) its place
    kinds: list[str]  # K, each of CLASSES

    def of(self, kind: str) -> Tensor:
        """(K,) bool: tokens of one class."""
        return torch.tensor([k == kind for k in self.kinds])

    def ask(self, seed: int, H: int, pairing: str = "coupled", way=Interventions) -> Interventions:
        """The interventions (of the class `way`), with random numbers of their own."""
        numbers = seed_of(f"{way.__name__} {pairing} {H}", seed)
        return way(self.policy, self.prefix, self.rollouts, numbers, H, pairing)


def seed_of(purpose: str, seed: int) -> int:
    """Of the random numbers of one purpose: what scores a completion is not what drew it."""
    return random.Random(f"{purpose} {seed}").getrandbits(63)


@torch.no_grad()
def sample_batch(policy: Policy, seed: int, prompts: int, completions: int, world: World) -> Batch:
    """Completions of questions with a right or wrong answer about fresh scenes (confounding 0.9).

    completions: per prompt.
    """
    rng, examples = random.Random(f"tokens {seed}"), []
    while len(examples) < prompts:
        example = sample_example(rng, world=world)
        if example.kind != "caption":
            examples.append(example)
    prefix = policy.prefill(collate(examples, policy.processor))
    generator = torch.Generator().manual_seed(seed_of("rollout", seed))
    rollouts = rollout(policy, prefix, examples, completions, LENGTH, generator)
    n, t = rollouts.reasoning_mask.nonzero(as_tuple=True)
    return Batch(policy, prefix, rollouts, n, t, reasoning_classes(policy, rollouts))


def reasoning_classes(policy: Policy, rollouts: Rollouts) -> list[str]:
    """The class of each reasoning token, one completion after the other."""
    classes: list[str] = []
    for n, ids in enumerate(rollouts.completion_ids):
        words = [policy.text([i]).strip() for i in ids[rollouts.reasoning_mask[n]].tolist()]
        classes += token_classes(rollouts.examples[int(rollouts.prompt_index[n])], words)
    return classes


def token_classes(example: Example, words: Sequence[str]) -> list[str]:
    """The class of each reasoning token of a completion about a scene, by the word it spells.

    What follows the first full stop repeats the question: naming its topic claims nothing.
    """
    classes, ended = [], False
    for word in words:
        if ended:
            classes.append("question repeated")
        elif word in CATEGORIES:
            there = word in example.scene.categories
            classes.append("grounded object" if there else "hallucinated object")
        else:
            classes.append("attribute" if word in COLORS else "filler")
        ended = ended or "." in word
    return classes


# ---------------------------------------------------------------------------------------------
# The estimator
# ---------------------------------------------------------------------------------------------
@dataclass
class Chances:
    """Of each token o_t, (K,): the chance of a right answer with it and without it, and its own."""

    with_: Tensor
    without: Tensor
    own: Tensor
    draws: int = MANY

    @property
    def nothing_changes(self) -> Tensor:
        """(K,) bool: the two chances differ by at most two standard errors and 0.01."""
        spread = 2 * (1 - self.own) * self.with_ * (1 - self.with_) / self.draws
        return (self.with_ - self.without).abs() <= 2 * spread.sqrt() + 0.01

    def expected(self, pairing: str) -> Tensor:
        """The expectation (K,) of equation 2 under a pairing."""
        independent = self.with_ * (1 - self.without)
        if pairing == "independent":
            return independent
        return independent - self.own * self.with_ * (1 - self.with_)

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """The least and the most (K,) of any pairing (Tian and Pearl's bounds of the PNS)."""
        lower = (self.with_ - self.without).clamp(min=0)
        return lower, torch.minimum(self.with_, 1 - self.without)


def chances(batch: Batch, seed: int, draws: int) -> Chances:
    """From many completions of every set: coupled ones, which are exact samples and cost little."""
    asked = batch.ask(seed, draws)
    with_, without = (x[batch.n, batch.t].mean(-1) for x in asked.continuation_rewards())
    return Chances(with_, without, own_chance(asked, batch.n, batch.t), draws)


def own_chance(asked: Interventions, n: Tensor, t: Tensor) -> Tensor:
    """(K,) the probability that the policy gave the tokens at places t of completions n."""
    token = asked.rollouts.completion_ids[n, t]
    return asked.policy.token_logps(asked.hidden(n, t), token).exp()


def estimator_rows(
    batch: Batch,
    seed: int,
    repeats: int = 4,
    sizes: Sequence[int] = (1, 2, 4, 8),
    draws: int = MANY,
) -> list[dict]:
    """One row per pairing and H with bias, variance and cost; one row per class with expectations.

    still: the share of tokens after which nothing changes; floor and above_floor are the mean
    estimates of those tokens and of the others.
    """
    exact = chances(batch, seed, draws)
    lower, upper = exact.bounds
    still = exact.nothing_changes
    rows = []
    for pairing in PAIRINGS:
        expected = exact.expected(pairing)
        for H in sizes:
            found, forwards = [], 0
            for repeat in range(repeats):
                asked = batch.ask(1000 * (seed + 1) + repeat, H, pairing)
                found.append(sufficiency(*asked.continuation_rewards())[batch.n, batch.t])
                forwards += asked.cost.token_forwards
            scores = torch.stack(found)  # (repeats, K)
            rows.append({
                "pairing": pairing, "H": H, "n": len(lower),
                "still": still.float().mean().item(),
                "floor": scores[:, still].mean().item(),
                "above_floor": scores[:, ~still].mean().item(),
                "mean": scores.mean().item(),
                "lower": lower.mean().item(),
                "expected": expected.mean().item(),
                "variance": scores.var(0).mean().item(),
                "error_to_lower_bound": (scores - lower).square().mean().sqrt().item(),
                "correlation_with_lower_bound": correlation(scores[0], lower),
                "token_forwards": forwards / repeats,
            })  # fmt: skip
    for kind in CLASSES:
        these = batch.of(kind)
        if these.any():
            rows.append({
                "class": kind, "n": int(these.sum()),
                "lower": lower[these].mean().item(),
                "coupled": exact.expected("coupled")[these].mean().item(),
                "independent": exact.expected("independent")[these].mean().item(),
                "upper": upper[these].mean().item(),
                "own": exact.own[these].mean().item(),
            })  # fmt: skip
    return rows


def correlation(a: Tensor, b: Tensor) -> float:
    """Pearson's correlation; 0 where either does not vary."""
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = a.norm() * b.norm()
    return float(a @ b / scale) if scale > 0 else 0.0


# ---------------------------------------------------------------------------------------------
# The mask
# ---------------------------------------------------------------------------------------------
def other_logits(asked: Interventions, n: Tensor, t: Tensor) -> Tensor:
    """(K, V) logits of the token after o_<t of completions n, with o_t itself ruled out."""
    logits = asked.policy.logits(asked.hidden(n, t))
    return logits.scatter(1, asked.rollouts.completion_ids[n, t, None], -torch.inf)


class Counterfactuals(Interventions):
    """Answers without o_t: a policy that goes on from o_<t, and four ways to take the token away."""

    @functools.cached_property
    def generator(self) -> torch.Generator:
        """Every completion is drawn by itself: copies of a text do not share."""
        return torch.Generator().manual_seed(self.seed)

    def _uniforms(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def never_held(self, n: Tensor, t: Tensor, draws: int) -> Tensor:
        """The truth: mean outcome (K,) of going on from o_<t with any token but o_t."""
        first = sample_tokens(other_logits(self, n, t), self._uniforms(len(n), draws))
        n, t = n.repeat_interleave(draws), t.repeat_interleave(draws)
        uniforms = self._uniforms(len(n), self._longest)
        ids = self.rollouts.completion_ids[n]
        left = self._longest - t
        departures = Departures(n, ids, t, first.flatten(), left, uniforms, self._before(t))
        return self._decode(departures).view(-1, draws).mean(1)

    def taken_away(self, n: Tensor, t: Tensor, mask: str, draws: int) -> Tensor:
        """Mean outcome (K,) of answers drawn after o_1..o_T with o_t masked; "none" leaves it there.

        zero: its embedding is 0 (equation 3).  hidden: no later token attends to it.  deleted: those
        after it move up.  second-best: the policy's next choice stands in its place.
        """
        outcomes = torch.zeros(len(n), device=n.device)
        width = self.rollouts.answer_start[n] - t
        for w in width.unique().tolist():  # rows of one width need no padding
            (these,) = (width == w).nonzero(as_tuple=True)
            for piece in these.split(max(1, self.max_rows // draws)):
                outcomes[piece] = self._answers(n[piece], t[piece], w, mask, draws)
        return outcomes

    def _answers(self, n: Tensor, t: Tensor, width: int, mask: str, draws: int) -> Tensor:
        """`taken_away` of tokens that all stand `width` places before their answers."""
        policy, rollouts, ids = self.policy, self.rollouts, self.rollouts.completion_ids
        places = t[:, None] + torch.arange(width, device=n.device)
        embeddings = policy.embed(ids[n[:, None], places])  # (K, width, D)
        if mask in ("hidden", "deleted"):
            embeddings = embeddings[:, 1:]
        elif mask == "second-best":
            embeddings[:, 0] = policy.embed(other_logits(self, n, t).argmax(-1))
        elif mask == "zero":
            embeddings[:, 0] = self.stand_in(n, t)
        position = t + (mask == "hidden")  # the place of a hidden token stays empty
        rows = self._rows(n, position, self._before(t))
        hidden = rows.extend(embeddings)[:, -1]
        first = policy.draw(hidden, self._uniforms(len(n), draws)).flatten()

        again = torch.arange(len(n), device=n.device).repeat_interleave(draws)
        n, t, position = n[again], t[again], position[again] + embeddings.shape[1]
        seen = torch.ones(len(again), embeddings.shape[1], dtype=torch.bool, device=n.device)
        decoding = self._rows(n, position, self._before(t), (rows.key_values, again, seen))
        start = rollouts.answer_start[n]
        uniforms = self._uniforms(len(n), self._longest)
        drawn, lengths = policy.decode(decoding, first, self._longest - start, uniforms)
        of_row = zip(n.tolist(), start.tolist(), drawn.cpu(), lengths.tolist(), strict=True)
        completions = [torch.cat([ids[i, :kept], row[:length]]) for i, kept, row, length in of_row]
        outcomes = rollouts.reward(n.tolist(), completions)
        return torch.tensor(outcomes, device=n.device).view(-1, draws).mean(1)


@torch.no_grad()
def mask_rows(batch: Batch, seed: int, draws: int = 32) -> list[dict]:
    """One row per mask and class: mean necessity by truth and by mask, error, agreement.

    Necessity is the mean outcome of answers after the whole reasoning, less that without the token.
    The truth lets the policy reason on without it; every mask keeps the reasoning that followed it.
    "open" are the tokens that the policy was not SURE of. Where it was sure, the truth is what
    follows a very unlikely draw.
    error: root mean square of score less truth, corrected for the noise of so few draws.
    correlation: of score and truth among the tokens of one completion. Differences between whole
    completions are left out: truth and score share them, whatever the mask.
    """
    asked = batch.ask(seed, 1, way=Counterfactuals)
    n, t = batch.n, batch.t
    held, never = asked.taken_away(n, t, "none", draws), asked.never_held(n, t, draws)
    unsure = own_chance(asked, n, t) < SURE
    classes = {"all": torch.ones_like(unsure), "open": unsure}
    classes |= {f"{kind}, open": batch.of(kind) & unsure for kind in CLASSES}
    rows = []
    for mask in MASKS:
        taken = asked.taken_away(n, t, mask, draws)
        noise = sum(p * (1 - p) / (draws - 1) for p in (taken, never))
        for kind, these in classes.items():
            if these.any():
                apart = never[these] - taken[these]  # score less truth: `held` cancels
                square = (apart.square() - noise[these]).mean().clamp(min=0)
                rows.append({
                    "mask": mask, "class": kind, "n": int(these.sum()),
                    "truth": (held - never)[these].mean().item(),
                    "score": (held - taken)[these].mean().item(),
                    "bias": apart.mean().item(),
                    "error": square.sqrt().item(),
                    "correlation": correlation(
                        *(within(x[these], n[these]) for x in (taken, never))
                    ),
                })  # fmt: skip
    return rows


def within(values: Tensor, groups: Tensor) -> Tensor:
    """Values less the mean of their group.

    >>> within(torch.tensor([1.0, 3.0, 5.0]), torch.tensor([0, 0, 4]))
    tensor([-1.,  1.,  0.])
    """
    _, group = groups.unique(return_inverse=True)
    sums = torch.zeros(int(group.max()) + 1).index_add_(0, group, values)
    return values - (sums / group.bincount())[group]


# ---------------------------------------------------------------------------------------------
# The causal reward
# ---------------------------------------------------------------------------------------------
def credit_rows(batch: Batch, seed: int, H: int = 4) -> list[dict]:
    """One row per pairing and class with mean scores; one per pairing on how they tell objects apart.

    auc: the chance that a grounded object scores above a hallucinated one of the same completion, ties
    counted half. Pairs from two completions would only tell right answers from wrong ones, since a
    wrong answer cannot break.
    """
    rows = []
    for pairing in PAIRINGS:
        asked = batch.ask(seed, H, pairing)
        suff = sufficiency(*asked.continuation_rewards())
        nec = necessity(batch.rollouts.rewards[:, None], asked.masked_rewards()).clamp(0, 1)
        scores = {
            "sufficiency": suff,
            "necessity": nec,
            "causal_reward": causal_completeness(suff, nec),
        }
        scores = {name: score[batch.n, batch.t] for name, score in scores.items()}
        for kind in CLASSES:
            these = batch.of(kind)
            if these.any():
                means = {name: score[these].mean().item() for name, score in scores.items()}
                rows.append({"pairing": pairing, "class": kind, "n": int(these.sum()), **means})
        grounded, absent = batch.of("grounded object"), batch.of("hallucinated object")
        together = batch.n[grounded, None] == batch.n[absent]
        if together.any():
            aucs = {
                name: auc(score[grounded], score[absent], together)
                for name, score in scores.items()
            }
            rows.append({"pairing": pairing, "class": "auc", "n": int(together.sum()), **aucs})
    return rows


def auc(high: Tensor, low: Tensor, pairs: Tensor) -> float:
    """The chance that a value of `high` is above one of `low`, ties counted half, over `pairs` (bool).

    >>> auc(torch.tensor([1.0, 0.0]), torch.tensor([0.0]), torch.tensor([[True], [True]]))
    0.75
    """
    above = (high[:, None] > low).float() + 0.5 * (high[:, None] == low).float()
    return above[pairs].mean().item()


QUESTIONS: dict[str, tuple[Callable[[Batch, int], list[dict]], int]] = {  # and of how many prompts
    "estimator": (estimator_rows, 16),
    "mask": (mask_rows, 48),
    "credit": (credit_rows, 64),
}
