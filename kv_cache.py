"""One copy of keys and values, read by many rows: attention over shared prefixes.

Everything COPO asks of a policy is rows of tokens that continue a shared prefix: G completions of one
prompt, hundreds of continuations of one trajectory, a trajectory over and over with another token
masked. `Rows` runs such rows through the text decoder of any transformers model whose layers attend
to everything before them. A row holds the keys and values of the tokens that it added itself; what it
shares with other rows is one copy of `KeyValues`. `shared_attention` reads both under one softmax; it
stands in for the decoder's attention during `Rows.extend` and at no other time.

The image never comes here: it is part of a prompt, and a prompt has been through the whole model once.

The one identity that all of this rests on: attention over two sets of keys is one softmax over the
scores of both, side by side, of which each part then weighs its own values.

    >>> seeded = torch.manual_seed(0)
    >>> q, k, v = (torch.randn(n, 4, generator=seeded) for n in (2, 5, 5))
    >>> whole = (q @ k.T).softmax(-1) @ v
    >>> weights = torch.cat([q @ k[:3].T, q @ k[3:].T], -1).softmax(-1)
    >>> torch.allclose(weights[:, :3] @ v[:3] + weights[:, 3:] @ v[3:], whole, atol=1e-6)
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
        self.in_order = False
        if self.bias is not None:
            self.bias = self.bias[index]
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
        in_order = torch.arange(self.cells, device=which.device)
        self.in_order = torch.equal(self.cell, in_order)  # the table holds the rows as they are
        self.visible, self.bias = self.visible[:, :length], None
        if not self.visible.all():
            self.bias = torch.where(self.visible, 0.0, UNSEEN)[:, None, None]

    def scores(self, query: Tensor, layer: int) -> Tensor:
        """(R, kv heads, m, S) of every row's queries (R, kv heads, m, d) with the keys of its prefix."""
        scores = self._of_rows(
            self._table(query) @ self.prefixes.keys[layer].transpose(-1, -2), query
        )
        return scores if self.bias is None else scores + self.bias

    def mean(self, weights: Tensor, layer: int) -> Tensor:
        """(R, kv heads, m, d): the values of each row's prefix, weighted by (R, kv heads, m, S)."""
        return self._of_rows(self._table(weights) @ self.prefixes.values[layer], weights)

    def _table(self, x: Tensor) -> Tensor:
        """(R, kv heads, m, ...) -> (lines, kv heads, slots * m, ...): each row in its cell."""
        if not self.in_order:
            x = x.new_zeros(self.cells, *x.shape[1:]).index_copy_(0, self.cell, x)
        return x.unflatten(0, (-1, self.slots)).transpose(1, 2).flatten(2, 3)

    def _of_rows(self, table: Tensor, like: Tensor) -> Tensor:
        """Back from the table to rows."""
        x = table.unflatten(2, (self.slots, like.shape[2])).transpose(1, 2).flatten(0, 1)
        return x if self.in_order else x[self.cell]


def shared_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, rows=None, **_
):
    """softmax(q [K_1 K_2 .. k]') [V_1; V_2; ..; v]: one softmax over shared keys and the row's own.

    query: (R, heads, n, d), the row's n new tokens.  key, value: (R, kv heads, s, d), its own tokens.
    rows.views hold the K_i and V_i that rows share, one copy each.  Returns (R, n, heads, d).
    """
    (R, heads, n, d), (kv_heads, own) = query.shape, key.shape[1:3]
    rows.attended = True
    groups, layer = heads // kv_heads, module.layer_idx
    # Query heads that read the same keys stand side by side.
    query = (query * scaling).reshape(R, kv_heads, groups * n, d)
    scores = query @ key.transpose(-1, -2)
    if n > 1:  # several new tokens at once are causal among themselves
        later = torch.full((n, own), UNSEEN, device=query.device).triu(own - n + 1)
        scores = (scores.unflatten(2, (groups, n)) + later).flatten(2, 3)
    scores = [*(view.scores(query, layer) for view in rows.views), scores]
    weights = torch.cat(scores, -1).float().softmax(-1).to(value.dtype)
    *shares, last = weights.split([x.shape[-1] for x in scores], -1)
    out = last @ value
    for view, share in zip(rows.views, shares, strict=True):
        out = out + view.mean(share, layer)
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
