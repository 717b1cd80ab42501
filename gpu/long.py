"""Long reasoning: cheaper questions than the paper's, about runs of tokens.

Asked of every token, the paper's questions cost as much as the square of the reasoning's length T: each
completion reasons on to the end, and each masked trajectory runs again from the mask on. `Brief` asks

    Is it sufficient?  Close the reasoning after o_1..o_t, as the trajectory closed it: how good is the
                       answer that the policy gives now, against the one it gives just before?
    Is it necessary?   Hide o_t from the answer alone: does it break?

which takes as many tokens per question as an answer is long. `ways_of_asking` asks them about so few runs
of tokens that the cost grows with T. What that costs in agreement with the truth is measured in
experiments/asking.py.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from interventions import Departures, Interventions, joined
from rollouts import Rollouts

MOST_UNITS = 24  # of one reasoning that are asked about


class Brief(Interventions):
    """Answers at once in place of continuations, and tokens hidden from the answer in place of masked ones.

    With coupled pairing the H answers are drawn with the same numbers wherever a set begins: what differs,
    differs because of the tokens in between. An answer may be twice as long as the trajectory's own.
    """

    exact = False

    def _continuations(self) -> tuple[Departures, Tensor, Tensor]:
        """Of every set, the H answers that the policy gives where the set begins.

        Returns the rows to decode, where they begin, (N, C, H) bool, and for each of these its row.
        """
        rollouts, H, parts = self.rollouts, self.num_continuations, []
        begins = self.begins
        n, j = begins.nonzero(as_tuple=True)
        tag = rollouts.answer_start - rollouts.reasoning_end  # (N,) tokens
        for width in tag[n].unique().tolist():
            m, i = n[tag[n] == width], j[tag[n] == width]
            at = torch.arange(width, device=m.device)
            closing = rollouts.completion_ids[m[:, None], rollouts.reasoning_end[m, None] + at]
            rows = self._rows(m, i, self._before(i))
            hidden = rows.extend(self.policy.embed(closing))[:, -1]
            self.cost.token_forwards += rows.forwarded
            k = torch.arange(H, device=m.device)
            since = torch.zeros_like(i) if self.coupled else i  # 0: the same numbers for all
            first = self.policy.draw(
                hidden, self.numbers(m[:, None], since[:, None], k, 0), self.temperature
            )
            ids = rollouts.completion_ids[m].scatter(1, i[:, None] + at, closing)
            which = torch.arange(len(m), device=m.device).repeat_interleave(H)
            m, i, k = m[which], i[which], k.repeat(len(m))
            altered = (
                rows.key_values,
                which,
                torch.ones(len(m), width, dtype=torch.bool).to(i.device),
            )
            numbers = self.numbers(m[:, None], since[which, None], k[:, None], self._steps)
            # A thought cut short may be followed by no answer at all: that is found out soon enough.
            own = rollouts.lengths[m] - rollouts.answer_start[m]
            left = (2 * own).minimum(self._longest - rollouts.answer_start[m]).clamp(min=1)
            parts.append(Departures(
                m, ids[which], i + width, first.flatten(), left, numbers, self._before(i), altered
            ))  # fmt: skip
        order = torch.cat([p.n * len(self.places) + p.place - tag[p.n] for p in parts])
        row = order.argsort(stable=True)  # as `begins` lists them
        return joined(parts), begins[..., None].expand(-1, -1, H), row

    def _sets(self, values: Tensor, leaves: Tensor, row: Tensor) -> Tensor:
        """(N, C + 1, H) rewards of the answers, at the places where their sets begin; elsewhere 0."""
        of_place = torch.zeros(leaves.shape, device=values.device)
        of_place[leaves] = values[row]
        return F.pad(of_place, (0, 0, 0, 1))

    def runs_again_from(self, n: Tensor, t: Tensor) -> Tensor:
        """(R,) the closing tag: what was reasoned after the hidden tokens stays as it was.

        A completion cut off with that tag runs from the token before it: it has no answer that could differ.
        """
        return self.rollouts.reasoning_end[n].minimum(self.rollouts.lengths[n] - 2)


def ways_of_asking(rollouts: Rollouts, unit: str, num_continuations: int) -> dict:
    """Who asks, about what, and how often: of "auto", what one can afford; the rest of `causal_rewards`.

    The paper's questions of every token, while completions reason for MOST_UNITS tokens in the mean. Beyond
    that, brief ones of so many runs of tokens, with one answer each: four answers, drawn alike at every
    beginning, agree no better with the truth. Any other unit is asked the paper's questions.
    """
    reasoning = rollouts.reasoning_mask.sum(1)
    mean = int(reasoning.sum()) / max(int((reasoning > 0).sum()), 1)
    if unit != "auto" or mean <= MOST_UNITS:
        unit = "token" if unit == "auto" else unit
        return {
            "interventions": Interventions, "unit": unit, "num_continuations": num_continuations,
        }  # fmt: skip
    run = -int(-mean // MOST_UNITS)
    return {"interventions": Brief, "unit": run, "num_continuations": 1}
