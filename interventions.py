"""Two questions about every reasoning token, asked of the policy itself.

    Is it sufficient?  Keep o_1..o_t, hide what follows, let the policy complete H times: do the
                       answers do better than those of H completions of o_1..o_(t-1)?   (equation 2)
    Is it necessary?   Zero the input embedding of o_t, keep every other reasoning token, let the
                       policy answer again: does the answer break?                      (equation 3)

`reference.py` asks them word for word, one completion at a time; this file gives the same answers,
token for token, and decodes as little as it can. Both questions are answered in one way. The trajectory
runs through the network once (as it is, or with one token masked). That gives the distribution of the
next token at every place, and a completion is drawn against it. As long as its draws spell the
trajectory there is nothing to decode; where a draw leaves the trajectory, one row is decoded from there.

An example: H = 1, and a trajectory that reasons "I see boats". The first draw at each place says

    place         1       2       3
    trajectory    I       see     boats
    draw          I       see     ships
                  stays   stays   leaves: one row is decoded from "I see ships"

The completion of "" stays at "I": it *is* the completion of "I", which stays at "see" and is the
completion of "I see", which leaves at "boats". One row serves three sets; and r(Y_t) = r(Y_(t-1)) for "I"
and "see", whose sufficiency is exactly 0. The completion of "I see boats" is drawn on its own.

`pairing` decides what is compared with what:
  coupled      (default) as above: the k-th completion "without o_t" that draws o_t is the k-th completion
               "with o_t". The masked answer is drawn with the numbers that drew the trajectory's own:
               what differs, differs because of the mask.
  independent  Every completion of every set, and the masked answer, is drawn afresh: equation 2
               read literally. A token that changes nothing then scores not 0 but p (1 - p), for a
               chance p of a right answer.
Under both, every completion is an exact sample of the policy from its beginning, and the H completions
of one set are independent of each other.

The set "without o_t" is the set "with o_(t-1)": T + 1 sets serve T tokens. A random number is a function
of the text that it continues: completions of a prompt that begin alike share what is drawn from there,
it is decoded once, and no score depends on what else is asked.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from copo import causal_completeness, necessity, sufficiency
from kv_cache import KeyValues, PrefixView, Rows, first_of_each
from model import Policy, Prefix, sample_tokens
from rollouts import Causal, Cost, Evidence, Rollouts

PAIRINGS = ("coupled", "independent")
UNITS = r"auto|token|word|[1-9]\d*"  # auto: gpu/long.py chooses
OWN = -1  # in place of k: the completion is the trajectory itself

# What R rows read: key-values, which of them each row reads (R,), and what it sees of it (R, S), bool.
Reads = tuple[KeyValues, Tensor, Tensor]


class Departures(NamedTuple):
    """R completions that depart from their trajectories, each to be decoded from there."""

    n: Tensor  # (R,) trajectory
    ids: Tensor  # (R, C) what the completion holds before `place`
    place: Tensor  # (R,) where it departs
    token: Tensor  # (R,) the token drawn there
    budget: Tensor  # (R,) most tokens to draw, this one included
    numbers: Tensor  # (R, L) by step, not by place: column i draws the i-th token after `token`
    seen: Tensor  # (R, C - 1) what it reads of its trajectory, bool
    altered: Reads | None = None  # what it reads of tokens that are not the trajectory's any more


class Trajectories(NamedTuple):
    """Every different trajectory after its one pass: U texts, of which the N completions are copies."""

    copy_of: Tensor  # (N,) text of completion n
    original: Tensor  # (U,) the first completion that is text u
    hidden: Tensor  # (U, C - 1, D); place j - 1 predicts token j
    key_values: KeyValues  # of all tokens but the last


class Interventions:
    """Both questions, asked about the reasoning tokens of some rollouts.

    seed: of all random numbers.  num_continuations: H.
    max_rows: rows in one batch; it bounds the memory and never changes a result.
    max_scored_tokens: of each trajectory, the tokens that the policy was least sure of; None for all.
    unit: what is kept, or masked, at a time: a "token", a "word", or so many tokens, which share the scores.
    asked: (N,) bool, the trajectories to ask about; None for all.
    prompt_number: (B,) int64, by which the random numbers of two prompts differ; None for 0 .. B - 1.
    """

    exact = True  # these are the paper's own questions

    def __init__(
        self,
        policy: Policy,
        prefix: Prefix,
        rollouts: Rollouts,
        seed: int,
        num_continuations: int = 4,
        pairing: str = "coupled",
        temperature: float = 1.0,
        max_rows: int = 4096,
        max_scored_tokens: int | None = None,
        unit: str | int = "token",
        asked: Tensor | None = None,
        prompt_number: Tensor | None = None,
    ):
        self.policy, self.prefix, self.rollouts, self.seed = policy, prefix, rollouts, seed
        self.num_continuations, self.coupled = num_continuations, pairing == "coupled"
        self.temperature, self.max_rows = temperature, max_rows
        self.max_scored_tokens, self.asked = max_scored_tokens, asked
        self.prompt_number, self.unit = prompt_number, int(unit) if str(unit).isdigit() else unit
        self.places = torch.arange(rollouts.completion_ids.shape[1], device=policy.device)
        self.cost = Cost()

    @functools.cached_property
    def trajectories(self) -> Trajectories:
        """One pass over every different trajectory, run when it is first needed, for both questions."""
        ids, prompts = self.rollouts.completion_ids, self.rollouts.prompt_index
        original, copy_of = first_of_each(self.keys[:, -1])
        last = self.rollouts.lengths[original, None] - 1  # it predicts nothing
        text = self.keys[original[:, None], self.places[1:].minimum(last)]
        with torch.no_grad():
            rows = self.policy.rows(self.prefix, prompts[original])
            hidden = rows.extend(self.policy.embed(ids[original, :-1]), text)
        self.cost.token_forwards += rows.forwarded
        return Trajectories(copy_of, original, hidden, rows.key_values)

    @property
    def first_copy(self) -> Tensor:
        """(N,) which completion is asked in place of n: the first that spells the same."""
        return self.trajectories.original[self.trajectories.copy_of]

    @functools.cached_property
    def units(self) -> tuple[Tensor, Tensor]:
        """Where the unit of each reasoning token begins, and one past its end: (N, C) twice."""
        rollouts, places = self.rollouts, self.places
        start, end = rollouts.reasoning_start[:, None], rollouts.reasoning_end[:, None]
        if self.unit == "word":
            begins = self.policy.begins_word(rollouts.completion_ids)
        else:
            begins = (places - start) % (1 if self.unit == "token" else self.unit) == 0
        begins = begins | (places == start)
        first = torch.where(begins, places, 0).cummax(1).values
        # The next beginning after each place, found from the right.
        later = F.pad(torch.where(begins, places, len(places))[:, 1:], (0, 1), value=len(places))
        return first, later.flip(1).cummin(1).values.flip(1).minimum(end)

    @functools.cached_property
    def heads(self) -> Tensor:
        """(N, C) bool: the first token of every unit that is asked about."""
        heads = self.rollouts.reasoning_mask & (self.places == self.units[0])
        if self.asked is not None:
            heads = heads & self.asked[:, None]
        if self.max_scored_tokens is None or not heads.any():
            return heads
        n, j = heads.nonzero(as_tuple=True)
        token = self.rollouts.completion_ids[n, j]
        logps = torch.full(heads.shape, torch.inf, device=heads.device)
        logps[n, j] = self.policy.token_logps(self.hidden(n, j), token, self.temperature)
        # Predicted by the prompt, not by the trajectory: the last to be asked about.
        logps[:, 0] = torch.inf
        rank = logps.argsort(dim=1, stable=True).argsort(dim=1)
        return heads & (rank < self.max_scored_tokens)

    @functools.cached_property
    def scored(self) -> Tensor:
        """(N, C) bool: the tokens of the units that are asked about."""
        return self.heads.gather(1, self.units[0]) & self.rollouts.reasoning_mask

    def hidden(self, n: Tensor, j: Tensor) -> Tensor:
        """(K, D) hidden states that predict the token at places j > 0 of completions n."""
        return self.trajectories.hidden[self.trajectories.copy_of[n], j - 1]

    # -- random numbers ----------------------------------------------------------------------
    @functools.cached_property
    def keys(self) -> Tensor:
        """(N, C + 1) int64: all that stands before place j of completion n as one number, the prompt too."""
        ids, prompts = self.rollouts.completion_ids, self.rollouts.prompt_index
        number = prompts if self.prompt_number is None else self.prompt_number[prompts]
        of_prompt = scrambled(number + self.seed)[:, None]
        of_token = scrambled((self.places << 32) + ids)
        return torch.cat([of_prompt, of_prompt + of_token.cumsum(1)], 1)

    def stream(self, n: Tensor, j: Tensor, k: Tensor | int) -> Tensor:
        """int64 by which the numbers of the k-th completion that leaves completion n at place j are drawn."""
        return scrambled(self.keys[n, j] + k)

    def numbers(self, n: Tensor, j: Tensor, k: Tensor | int, steps: Tensor | int) -> Tensor:
        """Random numbers of that completion: step 0 draws the token in place j, step i the i-th after it."""
        bits = scrambled(self.stream(n, j, k) + steps)
        return (bits >> 40 & 0xFFFFFF).float() / 2**24  # all that float32 holds in [0, 1)

    @functools.cached_property
    def own_numbers(self) -> Tensor:
        """(N, L) numbers that draw the trajectories' own answers, place by place; random after their end.

        Given the token that it drew, a number is uniform over that token's stretch of the distribution
        function: drawn from there, it is as good as the one that was used.
        """
        rollouts, n = self.rollouts, self.trajectories.original
        places = torch.arange(self._longest, device=n.device)
        numbers = self.numbers(n[:, None], rollouts.lengths[n, None], OWN, places)  # (U, L)
        answering = self.places >= rollouts.answer_start[n, None].clamp(min=1)
        u, j = (answering & rollouts.completion_mask[n]).nonzero(as_tuple=True)
        low, high = self.policy.stretches(
            self.trajectories.hidden[u, j - 1], rollouts.completion_ids[n[u], j], self.temperature
        ).unbind(1)
        numbers[u, j] = low + numbers[u, j] * (high - low)
        return numbers[self.trajectories.copy_of]

    # -- both questions ----------------------------------------------------------------------
    def continuation_rewards(self) -> tuple[Tensor, Tensor]:
        """Equation 2's two sets for every reasoning token o_t.

        Returns the rewards of the H completions that keep o_1..o_t, and of those that keep
        o_1..o_(t-1): (N, C, H) each, at the token's place in the completion, 0 elsewhere.
        """
        return self.rewards(necessary=False)[:2]

    def masked_rewards(self) -> Tensor:
        """Equation 3's r(Y^mask_t): the outcome of the answer given with o_t masked.

        Returns (N, C) at the token's place in the completion; elsewhere the trajectory's own outcome.
        """
        return self.rewards(sufficient=False)[2]

    @torch.inference_mode()
    def rewards(
        self, sufficient: bool = True, necessary: bool = True
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Both of the above, their rows decoded together; a question that is not asked changes nothing."""
        own = self.rollouts.rewards[:, None].expand(self.rollouts.completion_ids.shape)
        if not self.heads.any():
            none = torch.zeros(*own.shape, self.num_continuations, device=own.device)
            return none, none, own
        masked, values, (first, end) = own.clone(), own.new_zeros(0), self.units
        waiting, *sets = self._continuations() if sufficient else (None,)
        masks = self.heads[self.trajectories.original].nonzero() if necessary else own.new_zeros(0)
        for u, t in (chunk.unbind(1) for chunk in pieces(masks, self.max_rows)):
            t, departures = self._masked_answers(self.trajectories.original[u], t)
            found = self._decode(joined([waiting, departures] if waiting else [departures]))
            before = len(found) - len(t)
            values, waiting = (found[:before], None) if waiting else (values, None)
            masked[departures.n, t] = found[before:]
        if waiting:
            values = self._decode(waiting)
        masked = masked[self.first_copy].gather(1, first)
        masked = torch.where(self.scored, masked, own)
        if not sufficient:
            return own[..., None], own[..., None], masked
        sets = self._sets(values, *sets)[self.first_copy]  # (N, C + 1, H), by what is kept
        with_, without = (
            sets.gather(1, at[..., None].expand_as(sets[:, 1:])) for at in (end, first)
        )
        scored = self.scored[..., None]
        return torch.where(scored, with_, 0), torch.where(scored, without, 0), masked

    # -- equation 2 --------------------------------------------------------------------------
    @property
    def begins(self) -> Tensor:
        """(N, C) bool: where sets begin: before and after every unit that is asked about, of first copies."""
        n, j = self.heads.nonzero(as_tuple=True)
        begins = self.heads.clone()
        begins[n, self.units[1][n, j]] = True
        return begins & (self.first_copy == torch.arange(len(begins), device=n.device))[:, None]

    def _continuations(self) -> tuple[Departures, Tensor, Tensor]:
        """Of every set that begins somewhere, the completions that leave their trajectories.

        Returns the rows to decode, where they leave, (N, C, H) bool, and for each of these its row.
        """
        rollouts, ids, H = self.rollouts, self.rollouts.completion_ids, self.num_continuations
        (N, C), places, begins = ids.shape, self.places, self.begins
        # From the first reasoning token to the end: wherever a completion could leave.
        on_the_way = places >= rollouts.reasoning_start[:, None]
        on_the_way &= places < rollouts.lengths[:, None]
        on_the_way &= begins.any(1, keepdim=True)  # (N, C)
        n, j = on_the_way.nonzero(as_tuple=True)
        draws = torch.zeros(N, C, H, dtype=torch.long, device=ids.device)
        k = torch.arange(H, device=ids.device)
        draws[n, j] = self._draw(n, j, self.numbers(n[:, None], j[:, None], k, 0))

        stays = on_the_way[..., None] & (draws == ids[..., None])  # (N, C, H)
        if not self.coupled:
            stays = torch.zeros_like(stays)
        # A set's completions reach the places after its beginning by staying on the trajectory.
        reached = begins[..., None].repeat(1, 1, H)
        for place in range(1, C):
            reached[:, place] |= reached[:, place - 1] & stays[:, place - 1]
        leaves = on_the_way[..., None] & reached & ~stays
        n, j, k = leaves.nonzero(as_tuple=True)
        # One row to decode for each, but one only for all that leave the same text with the same draw.
        first, row = first_of_each(self.stream(n, j, k))
        n, j, k = n[first], j[first], k[first]
        numbers = self.numbers(n[:, None], j[:, None], k[:, None], self._steps)
        left = self._longest - j
        rows = Departures(n, ids[n], j, draws[n, j, k], left, numbers, self._before(j))
        return rows, leaves, row

    def _sets(self, values: Tensor, leaves: Tensor, row: Tensor) -> Tensor:
        """(N, C + 1, H) rewards of the k-th completion of every beginning o_<j, from those of the rows."""
        of_place = torch.zeros(leaves.shape, device=values.device)
        of_place[leaves] = values[row]
        return rewards_of_sets(of_place, leaves, self.rollouts.rewards)

    # -- equation 3 --------------------------------------------------------------------------
    def masked_numbers(self, n: Tensor, t: Tensor) -> Tensor:
        """(R, L) numbers that draw, place by place, the answers of completions n with place t masked."""
        if self.coupled:  # those of the trajectory for every mask
            return self.own_numbers[n]
        after = self.rollouts.lengths[n, None]
        return self.numbers(n[:, None], after, OWN - 1 - t[:, None], self._steps)

    def _masked_answers(self, n: Tensor, t: Tensor) -> tuple[Tensor, Departures]:
        """Masked place (R,) and departure of every masked answer that is not its trajectory's own.

        The trajectory's answer is the draft of the masked one: checked in one pass, and decoded only
        from the first token on which the two differ.
        """
        numbers, rollouts, places = self.masked_numbers(n, t), self.rollouts, self.places
        start = self.runs_again_from(n, t)
        gone = (places >= t[:, None]) & (places < self.units[1][n, t][:, None])
        seen = self._before(start) & ~gone[:, :-1]
        width = rollouts.lengths[n] - 1 - start  # up to the last token, which predicts nothing
        found = []
        for i in similar_widths(width):
            of_piece = (x[i] for x in (n, t, start, gone, seen, numbers))
            found.append((i, *self._check_drafts(*of_piece, int(width[i].max()))))
        widest = int(width.max())
        key_values = KeyValues.join([rows.take(row, widest) for *_, rows, row in found])
        index = torch.cat([i[row] for i, *_, row in found])
        same, token = (torch.cat([f[x] for f in found]) for x in (1, 2))
        place = start[index] + 1 + same
        steps = (place[:, None] + self._steps).clamp(max=self._longest - 1)  # from `place` on
        which = torch.arange(len(index), device=n.device)
        return t[index], Departures(
            n[index], rollouts.completion_ids[n[index]], place, token, self._longest - place,
            numbers[index].gather(1, steps), seen[index],
            (key_values, which, places[:widest] <= same[:, None]),
        )  # fmt: skip

    def _check_drafts(
        self,
        n: Tensor,
        t: Tensor,
        start: Tensor,
        gone: Tensor,
        seen: Tensor,
        numbers: Tensor,
        width: int,
    ):
        """Run completions n (R,) again from `start`, without what is gone, and see where answers differ.

        Returns, for each that differs: how many tokens after `start` agree, the first that does not;
        then the key-values of the R rows, and which of them it is.
        """
        policy, rollouts, ids = self.policy, self.rollouts, self.rollouts.completion_ids
        at = start[:, None] + torch.arange(width, device=ids.device)  # (R, width)
        inside = at.minimum(rollouts.lengths[n, None] - 2)
        embeddings = policy.embed(ids[n[:, None], inside])
        row, i = gone.gather(1, inside).nonzero(as_tuple=True)
        embeddings[row, i] = self.stand_in(n[row], inside[row, i])  # the intervention
        rows = self._rows(n, start, seen)
        # Completions that begin alike, with the same token masked, run as one until they part.
        masked = scrambled(scrambled(t) + self.units[1][n, t])[:, None]
        text = masked + self.keys[n[:, None], inside + 1]
        hidden = rows.extend(embeddings, text)  # column i predicts place start + 1 + i
        self.cost.token_forwards += rows.forwarded

        place = at + 1
        answering = place >= rollouts.answer_start[n, None]
        answering &= place < rollouts.lengths[n, None]
        row, i = answering.nonzero(as_tuple=True)
        draws = torch.zeros_like(place)
        own = numbers[row, place[row, i], None]
        draws[row, i] = policy.draw(hidden[row, i], own, self.temperature)[:, 0]
        differs = answering & (draws != ids[n[:, None], place.clamp(max=ids.shape[1] - 1)])
        row, same = (differs & (differs.cumsum(1) == 1)).nonzero(as_tuple=True)  # the first place
        return same, draws[row, same], rows.key_values, row

    def runs_again_from(self, n: Tensor, t: Tensor) -> Tensor:
        """(R,) from which place completions n with place t masked go through the network again."""
        return t

    def stand_in(self, n: Tensor, t: Tensor) -> Tensor:
        """(R, D) what takes the place of the embeddings of tokens t of completions n: zeros."""
        return self.policy.embed.weight.new_zeros(len(n), self.policy.embed.weight.shape[1])

    # -- what both share ---------------------------------------------------------------------
    def _draw(self, n: Tensor, j: Tensor, uniforms: Tensor) -> Tensor:
        """(K, H) tokens drawn at places j of completions n; that at place 0 is predicted by the prompt."""
        drawn = self.policy.draw(self.hidden(n, j), uniforms, self.temperature)
        if (first := j == 0).any():
            logits = self.prefix.logits[self.rollouts.prompt_index[n[first]]]
            drawn[first] = sample_tokens(logits, uniforms[first], self.temperature)
        return drawn

    @property
    def _longest(self) -> int:
        """No completion is longer than a rollout may be."""
        return self.rollouts.longest

    @property
    def _steps(self) -> Tensor:
        return torch.arange(self._longest, device=self.policy.device)

    def _before(self, place: Tensor) -> Tensor:
        """(R, C - 1) bool: the tokens of a trajectory before `place`."""
        return self.places[:-1] < place[:, None]

    def _rows(self, n: Tensor, place: Tensor, seen: Tensor, *others: Reads) -> Rows:
        """Rows at `place` that read the prompts of completions n, what is seen of these, and others."""
        prompts, trajectories = self.rollouts.prompt_index[n], self.trajectories
        own = PrefixView(trajectories.key_values, trajectories.copy_of[n], seen)
        views = [self.prefix.view(prompts), own, *(PrefixView(*read) for read in others)]
        return Rows(self.policy.decoder, views, self.prefix.position[prompts] + place)

    def _decode(self, departures: Departures) -> Tensor:
        """Outcome rewards (R,) of the completions that departed."""
        policy, rollouts, outcomes = self.policy, self.rollouts, []
        *tensors, altered = departures
        for piece in pieces(torch.arange(len(departures.n), device=policy.device), self.max_rows):
            n, ids, place, token, budget, numbers, seen = (x[piece] for x in tensors)
            others = [(altered[0], altered[1][piece], altered[2][piece])] if altered else []
            rows = self._rows(n, place, seen, *others)
            drawn, lengths = policy.decode(rows, token, budget, numbers, self.temperature)
            self.cost.rows += len(piece)
            self.cost.token_forwards += rows.forwarded
            # What the completion held before it departed, then what was drawn, as one text per row.
            step = self._steps - place[:, None]
            kept = F.pad(ids, (0, self._longest - len(self.places)))
            drawn = F.pad(drawn, (0, 1)).gather(1, step.clamp(0, drawn.shape[1]))
            texts = torch.where(step < 0, kept, drawn).cpu()
            ends = (place + lengths).tolist()
            completions = [row[:end] for row, end in zip(texts, ends, strict=True)]
            outcomes += rollouts.reward(n.tolist(), completions)
        return torch.tensor(outcomes, device=policy.device, dtype=rollouts.rewards.dtype)


def joined(parts: list[Departures]) -> Departures:
    """Departures of both questions as one: rows that altered nothing see nothing of what others did."""
    parts = [part for part in parts if len(part.n)] or parts[:1]
    key_values = [part.altered[0] for part in parts if part.altered]
    tensors = [torch.cat(of_parts) for of_parts in zip(*(part[:-1] for part in parts), strict=True)]
    if not key_values:
        return Departures(*tensors)
    width = max(x.keys[0].shape[2] for x in key_values)
    source, seen, before = [], [], 0
    for part in parts:
        if part.altered:
            held, which, visible = part.altered
            source.append(before + which)
            seen.append(F.pad(visible, (0, width - visible.shape[1])))
            before += len(held.keys[0])
        else:
            source.append(torch.zeros_like(part.n))
            seen.append(torch.zeros(len(part.n), width, dtype=torch.bool, device=part.n.device))
    held = KeyValues.join([x.take(slice(None), width) for x in key_values])
    return Departures(*tensors, (held, torch.cat(source), torch.cat(seen)))


def scrambled(x: Tensor) -> Tensor:
    """int64 that look random, one for each int64: the last steps of SplitMix64 (Steele et al., OOPSLA 2014).

    torch has generators, but none that gives the number of a text without those of the texts before it.
    """
    x = (x ^ x >> 30 & 2**34 - 1) * (0xBF58476D1CE4E5B9 - 2**64)
    x = (x ^ x >> 27 & 2**37 - 1) * (0x94D049BB133111EB - 2**64)
    return x ^ x >> 31 & 2**33 - 1


def rewards_of_sets(values: Tensor, leaves: Tensor, rewards: Tensor) -> Tensor:
    """Rewards of the k-th completion of every beginning o_<j: (N, C + 1, H), at place j.

    values: (N, C, H) of the rows decoded where `leaves` (bool) is true.  rewards: (N,) the trajectories'.
    A completion that does not leave at j is the one of place j + 1; at the very end, the trajectory.

    The example above: it leaves at the third place only, where the decoded row earns 0.25. The
    trajectory earns 1, and so does the completion of "I see boats", which never leaves.

    >>> leaves = torch.tensor([[[False], [False], [True]]])
    >>> rewards_of_sets(leaves * 0.25, leaves, torch.tensor([1.0]))[0, :, 0]
    tensor([0.2500, 0.2500, 0.2500, 1.0000])
    """
    N, C, H = values.shape
    sets = [rewards[:, None].expand(N, H)]
    for place in reversed(range(C)):
        sets.append(torch.where(leaves[:, place], values[:, place], sets[-1]))
    return torch.stack(sets[::-1], 1)


def causal_rewards(
    policy: Policy,
    prefix: Prefix,
    rollouts: Rollouts,
    seed: int,
    lambda_s: float = 0.35,
    lambda_n: float = 0.35,
    causal_reward: Callable[..., Tensor] = causal_completeness,
    interventions: type[Interventions] = Interventions,
    **how,
) -> Causal:
    """Equations 2 to 4 of every reasoning token: what a trainer adds to its advantages.

    prefix, rollouts: as `Policy.prefill` and `Rollouts.of` make them.  how: of `Interventions`.
    seed: another for each step, or all steps draw alike.
    A question whose weight is 0 is not asked: its rewards are then the trajectory's own.

    What a trainer hands over: its model, prompts, completions as ids, and what a completion is worth.

    >>> import random, scm, tiny
    >>> from copo import group_advantages, inject
    >>> from data import collate
    >>> policy = tiny.build_tiny_policy()  # yours: Policy(model, processor)
    >>> question = scm.sample_example(random.Random(0))  # yours: data.Example(image, question, answer)
    >>> prefix = policy.prefill(collate([question], policy.processor))
    >>> said = [f"<think> a {c} boat</think><answer> yes</answer>" for c in ("red", "blue")]
    >>> ids = policy.tokenizer(said, add_special_tokens=False, return_tensors="pt")["input_ids"]
    >>> lengths = torch.tensor([len(row) for row in ids])  # where they differ: ids padded on the right
    >>> def worth(which, completions):  # in [0, 1], of other ids in place of completions `which`
    ...     return [float("red" in policy.text(tokens)) for tokens in completions]
    >>> prompt_of_each = torch.tensor([0, 0])
    >>> rollouts = Rollouts.of(policy, prompt_of_each, ids, lengths, 32, worth)
    >>> causal = causal_rewards(policy, prefix, rollouts, seed=1)
    >>> causal.rewards.shape == ids.shape, rollouts.reasoning_mask.sum(1).tolist()
    (True, [3, 3])
    >>> advantages = group_advantages(rollouts.rewards.view(1, 2)).flatten()
    >>> inject(advantages, causal.rewards, rollouts.reasoning_mask).shape  # (N, C), for your loss
    torch.Size([2, 8])
    """
    N, C = rollouts.completion_ids.shape
    own = rollouts.rewards[:, None].expand(N, C)
    with_, without, masked = own[..., None], own[..., None], own
    scored, cost, exact = torch.zeros_like(own, dtype=torch.bool), Cost(), True
    if lambda_s or lambda_n:
        asked = interventions(policy, prefix, rollouts, seed, **how)
        with policy.evaluating():
            found = *asked.rewards(bool(lambda_s), bool(lambda_n)), asked.scored
        # Copied, because autograd refuses tensors of inference mode.
        with_, without, masked, scored = (x.clone() for x in found)
        cost, exact = asked.cost, asked.exact
    suff = sufficiency(with_, without)  # equation 2, (N, C)
    nec = necessity(rollouts.rewards[:, None], masked)  # equation 3, (N, C)
    causal = causal_reward(suff, nec, lambda_s, lambda_n)  # equation 4, (N, C)
    evidence = Evidence(with_, without, masked, scored, exact, cost)
    return Causal(causal, suff, nec, evidence)


def pieces(rows: Tensor, size: int) -> tuple[Tensor, ...]:
    """Pieces of at most `size` rows; none of no rows."""
    return rows.split(size) if len(rows) else ()


def similar_widths(width: Tensor) -> list[Tensor]:
    """Row indices in pieces padded by at most a third, widest first: a triangle in a few rectangles.

    >>> similar_widths(torch.tensor([3, 100, 90, 2]))
    [tensor([1, 2]), tensor([0]), tensor([3])]
    """
    order = width.argsort(descending=True, stable=True)
    widths = width[order].tolist()
    cuts = [0]
    for row, value in enumerate(widths):
        if value * 4 < widths[cuts[-1]] * 3:
            cuts.append(row)
    return [order[a:b] for a, b in zip(cuts, [*cuts[1:], len(widths)], strict=True)]
