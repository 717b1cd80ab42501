"""Two questions about every reasoning token, asked of the policy itself.

    Is it sufficient?  Keep o_1..o_t, hide what follows, let the policy complete H times: do the
                       answers do better than those of H completions of o_1..o_(t-1)?   (equation 2)
    Is it necessary?   Zero the input embedding of o_t, keep every other reasoning token, let the
                       policy answer again: does the answer break?                      (equation 3)
                       `mask="second-best"` puts the policy's next choice there instead.

Both are answered in one way. The trajectory runs through the network once (as it is, or with one
token masked); that gives the law of the next token at every place. Then a completion is drawn against
it. As long as its draws spell the trajectory there is nothing to decode; where a draw leaves the
trajectory, one row is decoded from there. A completion that never leaves *is* the trajectory, and its
reward is known.

`pairing` decides what is compared with what:
  coupled      (default) The k-th completion of the set "without o_t" first draws a token in the place
               of o_t. If it draws o_t itself, it is from there on the k-th completion of the set "with
               o_t": the same draw, a difference of exactly 0. The masked answer is drawn with the
               same numbers as the trajectory's own: what differs, differs because of the mask.
  independent  Every completion of every set, and the masked answer, is drawn afresh: equation 2
               read literally. A token that changes nothing then scores not 0 but p (1 - p), for a
               chance p of a right answer.
Under both, every completion is an exact sample of the policy from its prefix, and the H completions
of one set are independent of each other.

The set "without o_t" is the set "with o_(t-1)": T + 1 sets serve T tokens.
"""

from collections.abc import Generator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from model import Policy, Prefix
from rollouts import Rollouts
from shared import Reading, Rows, Texts

PAIRINGS = ("coupled", "independent")
MASKS = ("zero", "second-best")

# What R rows read of earlier rows: their texts, which of them each, and which of its tokens, (R, S) bool.
Kept = tuple[Texts, Tensor, Tensor]


class Leaving(NamedTuple):
    """R completions that leave their trajectories, to be decoded from there."""

    n: Tensor  # (R,) trajectory
    place: Tensor  # (R,) where each leaves it
    first: Tensor  # (R,) the token drawn there
    numbers: Tensor  # (R, L) that draw it and the tokens after it
    kept: list[Kept]  # what they read besides the prompt


# A question yields completions to decode, is sent their outcome rewards (R,), and returns its answer.
Question = Generator[Leaving, Tensor, tuple[Tensor, ...]]


@dataclass
class Cost:
    """What scoring took."""

    rows: int = 0  # completions decoded
    token_forwards: int = 0  # token positions run through the decoder


@dataclass
class Interventions:
    """Both questions, asked about all reasoning tokens of some rollouts."""

    policy: Policy
    prefix: Prefix
    rollouts: Rollouts
    generator: torch.Generator
    num_continuations: int = 4  # H
    pairing: str = "coupled"
    mask: str = "zero"
    temperature: float = 1.0
    max_rows: int = 4096  # rows in one batch: bounds the memory, never changes a result
    max_scored_tokens: int | None = None  # of a trajectory: those it was least sure of
    asked: Tensor | None = None  # (N,) bool, trajectories to ask about; without it, all
    cost: Cost = field(default_factory=Cost)

    def __post_init__(self):
        """Run every different trajectory through the network once, for both questions.

        Completions of a group are often the same text. copy_of (N,) says which of the U different
        texts completion n is, original (U,) the first completion that is text u.
        hidden: (U, C - 1, D), place j - 1 predicts token j.
        """
        ids, which = self.rollouts.completion_ids, self.rollouts.which
        prompt_and_ids = torch.cat([which[:, None], ids], 1)
        texts, self.copy_of = torch.unique(prompt_and_ids, dim=0, return_inverse=True)
        n = torch.arange(len(ids), device=ids.device)
        first = n.new_full((len(texts),), len(ids))
        self.original = first.scatter_reduce(0, self.copy_of, n, "amin")
        self.places = torch.arange(ids.shape[1], device=ids.device)
        with torch.no_grad():
            told = self.policy.rows(self.prefix, texts[:, 0])
            self.hidden = told.extend(self.policy.embed(texts[:, 1:-1]))
        self.told = told.texts
        self.cost.token_forwards += told.forwarded
        self.scored = self.rollouts.reasoning_mask  # (N, C), the tokens to ask about
        if self.asked is not None:
            self.scored &= self.asked[:, None]
        if self.max_scored_tokens is not None:
            self.scored = self._least_sure(self.max_scored_tokens)

    def _least_sure(self, count: int) -> Tensor:
        """(N, C) bool: of the tokens to ask about, the `count` least probable of each trajectory."""
        reasoning = self.scored
        n, j = reasoning.nonzero(as_tuple=True)
        hidden, token = self.hidden[self.copy_of[n], j - 1], self.rollouts.completion_ids[n, j]
        logps = torch.full(reasoning.shape, torch.inf, device=reasoning.device)
        logps[n, j] = self.policy.token_logps(hidden, token, self.temperature)
        rank = logps.argsort(dim=1, stable=True).argsort(dim=1)
        return reasoning & (rank < count)

    def continuation_rewards(self) -> tuple[Tensor, Tensor]:
        """Equation 2's two sets for every reasoning token o_t.

        Returns the rewards of the H completions that keep o_1..o_t, and of those that keep
        o_1..o_(t-1): (N, C, H) each, at the token's place in the completion, 0 elsewhere.
        """
        with_, without = self._answer([self._continuations()])[0]
        return with_, without

    def masked_rewards(self) -> Tensor:
        """Equation 3's r(Y^mask_t): the outcome of the answer given with o_t masked.

        Returns (N, C) at the token's place in the completion; elsewhere the trajectory's own outcome.
        """
        return self._answer([self._masks()])[0][0]

    def rewards(self, sufficient: bool, necessary: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Both questions, what they need decoded in one batch: cheaper than one after the other.

        Returns what `continuation_rewards` and `masked_rewards` return. Of a question that is not asked,
        the two sets are alike, or the masked answer earns what the trajectory earns: a score of 0.
        """
        asked = {"sets": self._continuations()} if sufficient else {}
        asked |= {"masked": self._masks()} if necessary else {}
        answers = dict(zip(asked, self._answer(list(asked.values())), strict=True))
        own = self.rollouts.rewards[:, None].expand(self.scored.shape)
        with_, without = answers.get("sets", (own[..., None], own[..., None]))
        return with_, without, *answers.get("masked", (own,))

    def _continuations(self) -> Question:
        """Is it sufficient?  Draw from the trajectory's own laws; decode the draws that leave it."""
        rollouts, ids, H = self.rollouts, self.rollouts.completion_ids, self.num_continuations
        (N, C), places = ids.shape, self.places
        # From the first reasoning token to the end: wherever a completion could leave.
        on_the_way = (places >= rollouts.start[:, None]) & (places < rollouts.lengths[:, None])
        on_the_way &= self.scored.any(1, keepdim=True)  # (N, C)
        n, j = on_the_way.nonzero(as_tuple=True)
        draws = torch.zeros(N, C, H, dtype=torch.long, device=ids.device)
        hidden, numbers = self.hidden[self.copy_of[n], j - 1], self._uniforms(N, C, H)[n, j]
        draws[n, j] = self.policy.draw(hidden, numbers, self.temperature)

        # A set begins before and after every scored token; its completions reach the places after
        # that by staying on the trajectory.
        stays = on_the_way[..., None] & (draws == ids[..., None]) & (self.pairing == "coupled")
        begins = self.scored | F.pad(self.scored, (1, 0))[:, :-1]
        reached = begins[..., None].repeat(1, 1, H)
        for place in range(1, C):
            reached[:, place] |= reached[:, place - 1] & stays[:, place - 1]
        leaves = on_the_way[..., None] & reached & ~stays  # (N, C, H): one row to decode each
        n, j, k = leaves.nonzero(as_tuple=True)
        kept = [(self.told, self.copy_of[n], places[:-1] < j[:, None])]
        numbers = self._uniforms(len(n), self._longest)
        values = torch.zeros(N, C, H, device=ids.device)
        values[n, j, k] = yield Leaving(n, j, draws[n, j, k], numbers, kept)

        # A completion that stays at j is the one of place j + 1; at the very end, the trajectory.
        sets = [rollouts.rewards[:, None].expand(N, H)]
        for place in reversed(range(C)):
            sets.append(torch.where(leaves[:, place], values[:, place], sets[-1]))
        sets = torch.stack(sets[::-1], 1)  # (N, C + 1, H): at place j, the completions of o_<j
        scored = self.scored[..., None]
        return torch.where(scored, sets[:, 1:], 0.0), torch.where(scored, sets[:, :-1], 0.0)

    def _masks(self) -> Question:
        """Is it necessary?  Mask each token and draw the answer with the trajectory's own numbers.

        The trajectory's answer is the draft of the masked one: checked in one pass, and decoded only
        from the first token on which the two differ.
        """
        rollouts, places = self.rollouts, self.places
        rewards = rollouts.rewards[:, None].repeat(1, len(places))
        numbers = rollouts.uniforms[:, None]  # (N, 1, L), those of the trajectory for every mask
        if self.pairing == "independent":
            numbers = self._uniforms(*rollouts.completion_ids.shape, self._longest)
        variants = self.scored[self.original].nonzero()  # (V, 2): a text, a masked place
        for chunk in pieces(variants, self.max_rows):
            u, t = chunk.unbind(1)
            width = rollouts.lengths[self.original[u]] - 1 - t  # the masked token and all after it
            found = [
                self._departures(u[piece], t[piece], int(width[piece].max()), numbers)
                for piece in similar_widths(width)
            ]
            n, u, t, same, first = (torch.cat([d[i] for d in found]) for i in range(5))
            width = int(width.max())
            masked = Texts.join([d.texts.take(d.row, width) for d in found])
            kept = [
                (self.told, u, places[:-1] < t[:, None]),
                (masked, torch.arange(len(n), device=n.device), places[:width] <= same[:, None]),
            ]
            place = t + 1 + same
            later = place[:, None] + torch.arange(self._longest, device=n.device)
            own = numbers.expand(-1, len(places), -1)[n, t]
            own = own.gather(1, later.clamp(max=self._longest - 1))  # the numbers from `place` on
            rewards[n, t] = yield Leaving(n, place, first, own, kept)
        return (rewards,)

    def _departures(self, u: Tensor, t: Tensor, width: int, numbers: Tensor) -> "Departures":
        """Run texts u (R,) with the token at place t (R,) masked, and see where answers depart from theirs.

        Every copy of a text draws its own answer against the masked law.
        """
        policy, rollouts, ids = self.policy, self.rollouts, self.rollouts.completion_ids
        ahead = torch.arange(width, device=ids.device)
        n = self.original[u, None]
        spelt = ids[n, (t[:, None] + ahead).clamp(max=ids.shape[1] - 1)]  # (R, width)
        embeddings = policy.embed(spelt)
        embeddings[:, 0] = self.stand_in(n[:, 0], t, self.mask)  # the intervention
        before = (self.told, u, self.places[:-1] < t[:, None])
        rows = self._rows(rollouts.which[n[:, 0]], [before], t)
        hidden = rows.extend(embeddings)  # (R, width, D): column i predicts the token at t + 1 + i
        self.cost.token_forwards += rows.forwarded

        row, n = (self.copy_of == u[:, None]).nonzero(as_tuple=True)  # (pairs,)
        place = t[row, None] + 1 + ahead  # (pairs, width)
        answering = (place >= rollouts.answer[n, None]) & (place < rollouts.lengths[n, None])
        pair, i = answering.nonzero(as_tuple=True)
        own = numbers.expand(-1, ids.shape[1], -1)[n[pair], t[row[pair]], place[pair, i]]
        draws = torch.zeros_like(place)
        drawn = policy.draw(hidden[row[pair], i], own[:, None], self.temperature)
        draws[pair, i] = drawn[:, 0]
        differs = answering & (draws != ids[n[:, None], place.clamp(max=ids.shape[1] - 1)])
        pair, same = (differs & (differs.cumsum(1) == 1)).nonzero(as_tuple=True)  # the first place
        row, n = row[pair], n[pair]
        return Departures(n, u[row], t[row], same, draws[pair, same], rows.texts, row)

    def stand_in(self, n: Tensor, t: Tensor, mask: str) -> Tensor:
        """(R, D) what is put in the place of the embeddings of tokens t (R,) of completions n (R,)."""
        if mask == "zero":
            return self.hidden.new_zeros(len(n), self.policy.embed.weight.shape[1])
        if mask == "second-best":
            return self.policy.embed(self.others(n, t).argmax(-1))
        raise ValueError(f"no such mask: {mask}")

    def others(self, n: Tensor, t: Tensor) -> Tensor:
        """(R, V) logits of the token after o_<t of completions n (R,), o_t itself ruled out."""
        logits = self.policy.logits(self.hidden[self.copy_of[n], t - 1])
        return logits.scatter(1, self.rollouts.completion_ids[n, t, None], -torch.inf)

    @property
    def _longest(self) -> int:
        """No completion is longer than a rollout may be."""
        return self.rollouts.uniforms.shape[1]

    def _uniforms(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.policy.device)

    def _rows(self, which: Tensor, kept: list[Kept], place: Tensor) -> Rows:
        """Rows that go on at `place` of a completion, after their prompt and the tokens they keep."""
        kept = [text for text in kept if (text[1] >= 0).any()]
        readings = [self.prefix.read_by(which), *(Reading(*text) for text in kept)]
        return Rows(self.policy.decoder, readings, self.prefix.position[which] + place)

    @torch.no_grad()
    def _answer(self, questions: list[Question]) -> list[tuple[Tensor, ...]]:
        """Run questions side by side: what they wait for at the same time is decoded in one batch."""
        answers: dict[Question, tuple[Tensor, ...]] = {}
        told: dict[Question, Tensor | None] = dict.fromkeys(questions)  # None: begin
        while told:
            waiting = {}
            for question, outcomes in told.items():
                try:
                    waiting[question] = question.send(outcomes)
                except StopIteration as end:
                    answers[question] = end.value
            told = dict(zip(waiting, self._complete(list(waiting.values())), strict=True))
        return [answers[question] for question in questions]

    def _complete(self, parts: list[Leaving]) -> tuple[Tensor, ...]:
        """Outcome rewards (R,) of each part's completions, all decoded in one batch."""
        if not parts:
            return ()
        policy, rollouts = self.policy, self.rollouts
        n, j, first, numbers = (torch.cat([part[i] for part in parts]) for i in range(4))
        kept = _side_by_side(parts)
        outcomes = []
        for piece in pieces(torch.arange(len(n), device=policy.device), self.max_rows):
            kept_piece = [(texts, source[piece], seen[piece]) for texts, source, seen in kept]
            rows = self._rows(rollouts.which[n[piece]], kept_piece, j[piece])
            budget = self._longest - j[piece]
            ids, lengths = policy.decode(
                rows, first[piece], budget, numbers[piece], self.temperature
            )
            self.cost.rows += len(piece)
            self.cost.token_forwards += rows.forwarded
            spelt, ids = rollouts.completion_ids[n[piece]].cpu(), ids.cpu()
            where = zip(n[piece].tolist(), j[piece].tolist(), lengths.tolist(), strict=True)
            outcomes += [
                rollouts.reward(i, torch.cat([spelt[r, :place], ids[r, :length]]))
                for r, (i, place, length) in enumerate(where)
            ]
        outcomes = torch.tensor(outcomes, device=policy.device, dtype=rollouts.rewards.dtype)
        return outcomes.split([len(part.n) for part in parts])


def _side_by_side(parts: list[Leaving]) -> list[Kept]:
    """What the rows of all parts read: one entry a set of texts, source -1 where a part reads none of it."""
    texts = {id(kept[0]): kept[0] for part in parts for kept in part.kept}
    joined = []
    for key, shared in texts.items():
        source, seen = [], []
        for part in parts:
            absent = (
                part.n.new_full(part.n.shape, -1),
                part.n.new_zeros(len(part.n), shared.keys[0].shape[2], dtype=torch.bool),
            )
            of_part = next((kept[1:] for kept in part.kept if id(kept[0]) == key), absent)
            source.append(of_part[0])
            seen.append(of_part[1])
        joined.append((shared, torch.cat(source), torch.cat(seen)))
    return joined


class Departures(NamedTuple):
    """Masked answers that depart from a trajectory's own, each a pair of a completion and a mask."""

    n: Tensor  # (pairs,) completion
    u: Tensor  # the text it is a copy of
    t: Tensor  # masked place
    same: Tensor  # tokens after the masked one that agree
    first: Tensor  # the token drawn where they no longer do
    texts: Texts  # keys and values of the masked token and those after it
    row: Tensor  # which of these texts is the pair's


def pieces(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Pieces of at most `size` rows; none of no rows."""
    return rows.split(size) if len(rows) else ()


def similar_widths(width: Tensor) -> list[Tensor]:
    """Row indices in pieces padded by at most a third, widest first: a triangle in a few rectangles."""
    order = width.argsort(descending=True, stable=True)
    widths = width[order].tolist()
    cuts = [0]
    for row, value in enumerate(widths):
        if value * 4 < widths[cuts[-1]] * 3:
            cuts.append(row)
    return [order[a:b] for a, b in zip(cuts, [*cuts[1:], len(widths)], strict=True)]
