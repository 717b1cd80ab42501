"""Two questions about every reasoning token, asked of the policy itself.

    Is it sufficient?  Keep o_1..o_t, hide what follows, let the policy complete H times: do the
                       answers do better than those of H completions of o_1..o_(t-1)?   (equation 2)
    Is it necessary?   Zero the input embedding of o_t, keep every other reasoning token, let the
                       policy answer again: does the answer break?                      (equation 3)

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

from dataclasses import dataclass, field

import torch
from torch import Tensor

from model import Policy, Prefix
from rollouts import Rollouts
from shared import Rows

PAIRINGS = ("coupled", "independent")


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
    temperature: float = 1.0
    max_rows: int = 4096  # rows in one batch: bounds the memory, never changes a result
    cost: Cost = field(default_factory=Cost)

    @torch.no_grad()
    def continuation_rewards(self) -> tuple[Tensor, Tensor]:
        """Equation 2's two sets for every reasoning token o_t.

        Returns the rewards of the H completions that keep o_1..o_t, and of those that keep
        o_1..o_(t-1): (N, C, H) each, at the token's place in the completion, 0 elsewhere.
        """
        rollouts, ids, H = self.rollouts, self.rollouts.completion_ids, self.num_continuations
        (N, C), places = ids.shape, torch.arange(ids.shape[1], device=ids.device)
        # From the first reasoning token to the end: wherever a completion could leave.
        on_the_way = (places >= rollouts.start[:, None]) & (places < rollouts.lengths[:, None])
        on_the_way &= (rollouts.end > rollouts.start)[:, None]  # (N, C)

        # One pass over every trajectory: the law of the next token after each of its prefixes.
        told = self.policy.rows(self.prefix, rollouts.which)
        hidden = told.extend(self.policy.embed(ids[:, :-1]))  # (N, C - 1, D): j - 1 predicts token j
        n, j = on_the_way.nonzero(as_tuple=True)
        draws = torch.zeros(N, C, H, dtype=torch.long, device=ids.device)
        draws[n, j] = self.policy.draw(hidden[n, j - 1], self._uniforms(N, C, H)[n, j], self.temperature)
        self.cost.token_forwards += told.forwarded

        # Every place up to `end` begins a set; a place after it is reached only by staying so far.
        stays = on_the_way[..., None] & (draws == ids[..., None]) & (self.pairing == "coupled")
        passable = stays | (places < rollouts.end[:, None])[..., None]
        reached = torch.cat([torch.ones_like(passable[:, :1]), passable.cumprod(1).bool()[:, :-1]], 1)
        leaves = on_the_way[..., None] & reached & ~stays  # (N, C, H): one row to decode each
        n, j, k = leaves.nonzero(as_tuple=True)
        values = torch.zeros(N, C, H, device=ids.device)
        values[n, j, k] = self._finish(told, n, n, j, draws[n, j, k], self._uniforms(len(n), self._longest))

        # A completion that stays at j is the one of place j + 1; at the very end, the trajectory.
        sets = [rollouts.rewards[:, None].expand(N, H)]
        for place in reversed(range(C)):
            sets.append(torch.where(leaves[:, place], values[:, place], sets[-1]))
        sets = torch.stack(sets[::-1], 1)  # (N, C + 1, H): at place j, the completions of o_<j
        reasoning = rollouts.reasoning_mask[..., None]
        return torch.where(reasoning, sets[:, 1:], 0.0), torch.where(reasoning, sets[:, :-1], 0.0)

    @torch.no_grad()
    def masked_rewards(self) -> Tensor:
        """Equation 3's r(Y^mask_t): the outcome of the answer given with the embedding of o_t zeroed.

        Returns (N, C) at the token's place in the completion; elsewhere the trajectory's own outcome.
        The trajectory's answer is the draft of the masked one: checked in one pass, and decoded only
        from the first token on which the two differ.
        """
        rollouts, ids = self.rollouts, self.rollouts.completion_ids
        C, places = ids.shape[1], torch.arange(ids.shape[1], device=ids.device)
        rewards = rollouts.rewards[:, None].repeat(1, C)
        all_n, all_t = rollouts.reasoning_mask.nonzero(as_tuple=True)  # one masked variant a token
        coupled = self.pairing == "coupled"
        numbers = rollouts.uniforms[all_n] if coupled else self._uniforms(len(all_n), self._longest)
        for piece in torch.arange(len(all_n), device=ids.device).split(max(1, self.max_rows // C)):
            n, t, uniforms = all_n[piece], all_t[piece], numbers[piece]
            embeddings = self.policy.embed(ids[n, :-1])  # (R, C - 1, D)
            embeddings[torch.arange(len(n)), t] = 0  # the intervention
            told = self.policy.rows(self.prefix, rollouts.which[n])
            hidden = told.extend(embeddings)
            self.cost.token_forwards += told.forwarded

            answering = (places >= rollouts.answer[n, None]) & (places < rollouts.lengths[n, None])
            row, j = answering.nonzero(as_tuple=True)
            draws = ids[n]
            draws[row, j] = self.policy.draw(hidden[row, j - 1], uniforms[row, j, None], self.temperature)[:, 0]
            differs = draws != ids[n]
            row, j = (differs & (differs.cumsum(1) == 1)).nonzero(as_tuple=True)  # the first place
            ahead = (j[:, None] + torch.arange(self._longest, device=ids.device)).clamp(max=self._longest - 1)
            ahead = uniforms[row].gather(1, ahead)  # the numbers of the places from j on
            rewards[n[row], t[row]] = self._finish(told, row, n[row], j, draws[row, j], ahead)
        return rewards

    @property
    def _longest(self) -> int:
        """No completion is longer than a rollout may be."""
        return self.rollouts.uniforms.shape[1]

    def _uniforms(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator).to(self.policy.device)

    def _finish(self, told: Rows, row: Tensor, n: Tensor, j: Tensor, first: Tensor, uniforms: Tensor) -> Tensor:
        """Outcome rewards (R,) of completions that leave trajectory n at place j with the token `first`.

        The tokens before j they read from row `row` of `told`.
        """
        policy, rollouts = self.policy, self.rollouts
        before = torch.arange(rollouts.completion_ids.shape[1] - 1, device=policy.device) < j[:, None]
        outcomes: list[float] = []
        for piece in torch.arange(len(n), device=policy.device).split(self.max_rows):
            which = rollouts.which[n[piece]]
            texts = [self.prefix.shared(which), told.as_text(row[piece], before[piece])]
            rows = Rows(policy.decoder, texts, self.prefix.position[which] + j[piece])
            budget = self._longest - j[piece]
            ids, lengths = policy.decode(rows, first[piece], budget, uniforms[piece], self.temperature)
            self.cost.rows += len(piece)
            self.cost.token_forwards += rows.forwarded
            kept, ids = rollouts.completion_ids[n[piece]].cpu(), ids.cpu()
            outcomes += [
                rollouts.reward(i, torch.cat([kept[r, :place], ids[r, :length]]))
                for r, (i, place, length) in enumerate(
                    zip(n[piece].tolist(), j[piece].tolist(), lengths.tolist(), strict=True)
                )
            ]
        return torch.tensor(outcomes, device=policy.device, dtype=rollouts.rewards.dtype)
