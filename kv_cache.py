"""One copy of keys and values, read by many rows: attention over shared prefixes.

Everything COPO asks of a policy is rows of tokens that continue a shared prefix: G completions of one
prompt, hundreds of continuations of one trajectory, a trajectory over and over with another token
masked. `Rows` runs such rows through the text decoder of any transformers model whose layers attend
to everything before them. A row holds the keys and values of the tokens that it added itself; what it
shares with other rows is one copy of `KeyValues`. `shared_attention` reads both under one softmax; it
stands in for the decoder's attention during `Rows.extend` and at no other time.

The image never comes here: it is part of a prompt, and a prompt has been through the whole model once.

The one identity that all of this rests on: a softmax over two sets of keys is the mean of the softmax
over each, weighted by their denominators Z (`attend` returns both, `merge` takes the mean).

    >>> seeded = torch.manual_seed(0)
    >>> q, k, v = (torch.randn(1, n, 4, generator=seeded) for n in (2, 5, 5))
    >>> whole, _ = attend(q, k, v)
    >>> parts = [attend(q, k[:, :3], v[:, :3]), attend(q, k[:, 3:], v[:, 3:])]
    >>> torch.allclose(merge(parts), whole, atol=1e-6)
    True
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, DynamicCache

UNSEEN = torch.finfo(torch.float32).min  # added to a score that must not count; -inf makes NaN


def attend(
    query: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(q k' + bias) v over some of the keys, and the log of that softmax's denominator.

    query: (..., m, d).  keys, values: (..., S, d).  bias: 0, or UNSEEN where a key must not be seen, by
    blocks of m / b queries: (..., b, 1 or m / b, S).
    Returns (..., m, d) and (..., m, 1) float32, which is what `merge` needs.
    """
    scores = (query @ keys.transpose(-1, -2)).float()
    if bias is not None:
        scores = (scores.unflatten(-2, (bias.shape[-3], -1)) + bias).flatten(-3, -2)
    weights = scores.softmax(-1)
    # The denominator, read off the largest weight: max w = exp(max score) / Z.
    log_mass = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
    return weights.to(values.dtype) @ values, log_mass


def merge(parts: list[tuple[Tensor, Tensor]]) -> Tensor:
    """One softmax over several sets of keys, from the softmax over each.

    softmax(q [K_1 K_2 ..]') [V_1; V_2; ..] = sum_i Z_i softmax(q K_i') V_i / sum_i Z_i,
    where Z_i = sum_s exp(q k_is), the denominator of the i-th softmax.
    parts: what `attend` returns, one pair per set.
    """
    outputs, log_masses = zip(*parts, strict=True)
    shares = torch.stack(log_masses).softmax(0)  # of the whole softmax's mass, (sets, ..., m, 1)
    return sum(
        output * share.to(output.dtype) for output, share in zip(outputs, shares, strict=True)
    )


@dataclass
class KeyValues:
    """Keys and values of M prefixes, one copy: one tensor per layer, (M, kv heads, S, head size)."""

    keys: list[Tensor]
    values: list[Tensor]

    def take(self, index: Tensor | slice, length: int) -> "KeyValues":
        """A copy of some of the prefixes, padded on the right to `length` tokens."""

        def cut(tensors: list[Tensor]) -> list[Tensor]:
            return [F.pad(x[index], (0, 0, 0, length - x.shape[2])) for x in tensors]

        return KeyValues(cut(self.keys), cut(self.values))

    def only(self, index: Tensor | slice, length: int) -> "KeyValues":
        """Some of the prefixes, cut to `length`: a copy of those of an index, none for a slice."""

        def cut(tensors: list[Tensor]) -> list[Tensor]:
            return [x[index][:, :, :length] for x in tensors]

        return KeyValues(cut(self.keys), cut(self.values))

    @staticmethod
    def join(parts: "list[KeyValues]") -> "KeyValues":
        """Prefixes of one length, one after the other."""
        return KeyValues(
            [torch.cat(layer) for layer in zip(*(part.keys for part in parts), strict=True)],
            [torch.cat(layer) for layer in zip(*(part.values for part in parts), strict=True)],
        )


class PrefixView:
    """R rows that read M prefixes: row r reads prefix source[r], of which it sees visible[r], (R, S) bool."""

    def __init__(self, prefixes: KeyValues, source: Tensor, visible: Tensor):
        self.prefixes, self.source, self.visible = prefixes, source, visible
        self._group_by_prefix()

    def keep(self, index: Tensor) -> None:
        """Go on with these rows alone: (R',) indices into the present rows."""
        self.source, self.visible, self.cell = (
            x[index] for x in (self.source, self.visible, self.cell)
        )
        if 2 * len(index) < self.cells:  # most cells of the table are empty
            self._group_by_prefix()

    def _group_by_prefix(self) -> None:
        """Lay the rows out as a table, one line per prefix: a prefix meets all its rows in one product.

        Row r stands in cell[r] of a table of (lines, slots) cells. Prefixes that no row reads, and
        keys that none sees, are left out; of the others, a bias hides what a row must not see. Where few
        prefixes have most of the rows, they get several lines, so that the table is not mostly empty.
        """
        used, which, counts = torch.unique(self.source, return_inverse=True, return_counts=True)
        self.slots = int(counts.max()) if len(counts) else 0
        if 3 * len(which) < 2 * len(used) * self.slots:
            self.slots = -(-len(which) // len(used))
        lines = (counts + self.slots - 1) // max(self.slots, 1)  # per prefix
        first = lines.cumsum(0) - lines
        total = int(lines.sum())
        self.cells = total * self.slots
        length = int(self.visible.any(0).long().cumsum(0).argmax()) + 1
        whole = total == len(used) == len(self.prefixes.keys[0])
        index = slice(None) if whole else used.repeat_interleave(lines)
        self.prefixes = self.prefixes.only(index, length)
        order = which.argsort(stable=True)
        rank = torch.empty_like(which)  # of each row among those of its prefix
        rank[order] = torch.arange(len(which), device=which.device) - (
            counts.cumsum(0) - counts
        ).repeat_interleave(counts)
        self.source = first[which] + rank // max(self.slots, 1)
        self.cell = self.source * self.slots + rank % max(self.slots, 1)
        self.visible = self.visible[:, :length]
        self.bias = None
        if not self.visible.all():
            bias = torch.zeros(self.cells, length, device=which.device)
            bias[self.cell] = torch.where(self.visible, 0.0, UNSEEN)
            self.bias = bias.view(-1, 1, self.slots, 1, length)

    def attend(self, query: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """`attend` of every row to its prefix: query and first result (R, kv heads, m, d)."""
        (_, heads, m, d), slots = query.shape, self.slots
        table = query.new_zeros(self.cells, heads, m, d).index_copy_(0, self.cell, query)
        table = table.view(-1, slots, heads, m, d).transpose(1, 2).flatten(2, 3)
        parts = attend(table, self.prefixes.keys[layer], self.prefixes.values[layer], self.bias)
        output, log_mass = (
            part.unflatten(2, (slots, m)).transpose(1, 2).flatten(0, 1)[self.cell] for part in parts
        )
        return output, log_mass


def shared_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, rows=None, **_
):
    """softmax(q [K_1 K_2 .. k]') [V_1; V_2; ..; v]: one softmax over shared keys and the row's own.

    query: (R, heads, n, d), the row's n new tokens.  key, value: (R, kv heads, s, d), its own tokens.
    rows.views hold the K_i and V_i that rows share, one copy each.  Returns (R, n, heads, d).
    """
    (R, heads, n, d), (kv_heads, own) = query.shape, key.shape[1:3]
    rows.attended = True
    groups = heads // kv_heads  # query heads that read the same keys stand side by side
    query = (query * scaling).reshape(R, kv_heads, groups * n, d)
    later = None
    if n > 1:  # several new tokens at once are causal among themselves
        later = (
            torch.full((1, n, own), UNSEEN, device=query.device)
            .triu(own - n + 1)
            .expand(groups, -1, -1)
        )
    parts = [view.attend(query, module.layer_idx) for view in rows.views]
    out = merge([*parts, attend(query, key, value, later)])
    return out.reshape(R, heads, n, d).transpose(1, 2), None


AttentionInterface.register("copo_shared", shared_attention)


@contextlib.contextmanager
def _attention(decoder: nn.Module, name: str) -> Iterator[None]:
    """Switch the decoder's attention function, and put it back."""
    config = decoder.config
    before, config._attn_implementation = config._attn_implementation, name
    try:
        yield
    finally:
        config._attn_implementation = before


class Rows:
    """R rows of new tokens that continue shared prefixes.

    decoder: the text decoder of the model.  position: (R,) rotary position of the next token.
    views: what the rows read before them, in order (a prompt; a prompt and a part of a trajectory).
    """

    def __init__(self, decoder: nn.Module, views: list[PrefixView], position: Tensor):
        self.decoder, self.views, self.position = decoder, views, position
        self.own = DynamicCache()
        self.attended = False  # set by shared_attention: proof that the decoder called it
        self.forwarded = 0  # tokens run through the decoder so far, all rows together

    def extend(self, embeddings: Tensor) -> Tensor:
        """Append n tokens to each row: (R, n, D) input embeddings -> (R, n, D) last hidden states.

        Raises RuntimeError for a decoder that ignores the attention function it is given.
        """
        n = embeddings.shape[1]
        steps = torch.arange(n, device=embeddings.device)
        with _attention(self.decoder, "copo_shared"):
            hidden = self.decoder(
                inputs_embeds=embeddings,
                position_ids=self.position[:, None] + steps,
                past_key_values=self.own,
                use_cache=True,
                rows=self,
            ).last_hidden_state
        if not self.attended:
            raise RuntimeError(
                f"{type(self.decoder).__name__} does not use the attention it is given"
            )
        self.position = self.position + n
        self.forwarded += embeddings.shape[0] * n
        return hidden

    def keep(self, index: Tensor) -> None:
        """Go on with these rows alone: (R',) indices into the present rows."""
        self.position = self.position[index]
        for view in self.views:
            view.keep(index)
        if len(self.own):
            self.own.batch_select_indices(index)

    @property
    def key_values(self) -> KeyValues:
        """What the rows added, for further rows to read."""
        layers = self.own.layers
        return KeyValues([x.keys for x in layers], [x.values for x in layers])
