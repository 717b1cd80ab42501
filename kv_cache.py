"""One copy of keys and values, read by many rows: attention over shared prefixes.

Everything COPO asks of a policy is rows of tokens that continue a shared prefix: G completions of one
prompt, hundreds of continuations of one trajectory, a trajectory over and over with another token
masked. `Rows` runs such rows through the text decoder of any transformers model whose layers attend
to everything before them. A row holds the keys and values of the tokens that it added itself; what it
shares with other rows is one copy of `KeyValues`. `shared_attention` reads both under one softmax; it
stands in for the decoder's attention during `Rows.extend` and at no other time. Rows that begin alike
can be extended as one until they part.

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
            if isinstance(index, slice):
                return [x[index, :, :length] for x in tensors]
            return [x[:, :, :length].index_select(0, index) for x in tensors]

        return KeyValues(cut(self.keys), cut(self.values))

    @staticmethod
    def join(parts: "list[KeyValues]") -> "KeyValues":
        """Prefixes of one length, one after the other."""
        return KeyValues(
            [torch.cat(layer) for layer in zip(*(part.keys for part in parts), strict=True)],
            [torch.cat(layer) for layer in zip(*(part.values for part in parts), strict=True)],
        )


def first_of_each(values: Tensor) -> tuple[Tensor, Tensor]:
    """Where each different value stands first, (U,), in the flattened tensor; and which one each value is.

    >>> first_of_each(torch.tensor([[7, 3, 7]]))
    (tensor([1, 0]), tensor([[1, 0, 1]]))
    """
    different, which = torch.unique(values, return_inverse=True)
    cells = torch.arange(values.numel(), device=values.device)
    first = cells.new_full(different.shape, values.numel())
    return first.scatter_reduce(0, which.flatten(), cells, "amin"), which


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
        else:
            self._fill_cells()

    def _group_by_prefix(self) -> None:
        """Lay the rows out as a table, one line per prefix: a prefix meets all its rows in one product.

        Row r stands in cell[r] of a table of (lines, slots) cells. Prefixes that no row reads, and
        keys that none sees, are left out; of the others, a bias hides what a row must not see. Where few
        prefixes have most of the rows, they get several lines, so that the table is not mostly empty.
        """
        used, which, counts = torch.unique(self.source, return_inverse=True, return_counts=True)
        R, M = len(which), len(used)
        self.slots = int(counts.max()) if R else 1
        if 2 * M * self.slots > 3 * R > 0:
            self.slots = R // M
        times = (counts + self.slots - 1) // self.slots  # lines of each prefix
        order = which.argsort(stable=True)
        rank = torch.empty_like(which)  # of each row among those of its prefix
        rank[order] = torch.arange(R, device=which.device) - (
            counts.cumsum(0) - counts
        ).repeat_interleave(counts)
        self.source = (times.cumsum(0) - times)[which] + rank // self.slots
        self.cell = self.source * self.slots + rank % self.slots
        length = int(self.visible.any(0).long().cumsum(0).argmax()) + 1
        whole = int(times.sum()) == M == len(self.prefixes.keys[0])
        lines = slice(None) if whole else used.repeat_interleave(times)
        self.prefixes = self.prefixes.only(lines, length)
        self.cells = len(self.prefixes.keys[0]) * self.slots
        # The table holds the rows as they are.
        self.in_order = torch.equal(self.cell, torch.arange(self.cells, device=which.device))
        self.visible, self.bias = self.visible[:, :length], None
        if not self.visible.all():
            self.bias = torch.where(self.visible, 0.0, UNSEEN)[:, None, None]
        self._fill_cells()

    def _fill_cells(self) -> None:
        """Where each key-value head of each row stands in the table, and which one stands in each cell."""
        lines, heads = self.prefixes.keys[0].shape[:2]
        rows, head = (torch.arange(n, device=self.cell.device) for n in (len(self.cell), heads))
        # In an empty cell stands a row, too; nobody reads what it finds.
        filled = rows.new_zeros(self.cells).index_copy_(0, self.cell, rows)
        self.to_table = (filled.view(lines, 1, -1) * heads + head[:, None]).flatten()
        line, slot = self.source[:, None], self.cell[:, None] % self.slots
        self.to_rows = ((line * heads + head) * self.slots + slot).flatten()

    def scores(self, query: Tensor, layer: int) -> Tensor:
        """(R, kv heads, m, S) of every row's queries (R, kv heads, m, d) with the keys of its prefix."""
        scores = self._for_rows(query, self.prefixes.keys[layer].transpose(-1, -2))
        return scores if self.bias is None else scores + self.bias

    def mean(self, weights: Tensor, layer: int) -> Tensor:
        """(R, kv heads, m, d): the values of each row's prefix, weighted by (R, kv heads, m, S)."""
        return self._for_rows(weights, self.prefixes.values[layer])

    def _for_rows(self, x: Tensor, prefixes: Tensor) -> Tensor:
        """(R, kv heads, m, a) @ (lines, kv heads, a, b) -> (R, kv heads, m, b): a row with its line."""
        R, heads, m, a = x.shape
        if self.in_order:  # as in training: a transpose's gradient is a copy, a gather's a sum
            table = x.unflatten(0, (-1, self.slots)).transpose(1, 2).flatten(2, 3) @ prefixes
            return table.unflatten(2, (self.slots, m)).transpose(1, 2).flatten(0, 1)
        table = x.reshape(R * heads, m, a).contiguous().index_select(0, self.to_table)
        table = table.view(-1, heads, self.slots * m, a) @ prefixes
        table = table.view(-1, m, prefixes.shape[-1]).index_select(0, self.to_rows)
        return table.view(R, heads, m, -1)


def spread(x: Tensor, which: Tensor) -> Tensor:
    """(1, heads, K, d) of K tokens -> (R, heads, n, d) of rows: token which[r, i] in place i of row r."""
    # Whole lines are copied many times faster than by x[0][:, which].
    table = x[0].transpose(0, 1).flatten(1)
    return F.embedding(which, table).unflatten(2, (x.shape[1], -1)).transpose(1, 2)


def shared_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, rows=None, **_
):
    """softmax(q [K_1 K_2 .. k]') [V_1; V_2; ..; v]: one softmax over shared keys and the row's own.

    query: (R, heads, n, d), the row's n new tokens.  key, value: (R, kv heads, s, d), its own tokens.
    rows.views hold the K_i and V_i that rows share, one copy each.  Returns (R, n, heads, d).
    Where rows are alike, all of these arrive, and leave, as one row of K tokens.
    """
    if rows.alike:
        first, which = rows.alike
        query, key, value = (spread(x, which) for x in (query, key, value))
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
    out = out.reshape(R, heads, n, d).transpose(1, 2)
    return out.flatten(0, 1).index_select(0, first)[None] if rows.alike else out, None


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
        self.alike: tuple[Tensor, Tensor] | None = None
        self.attended = False  # set by shared_attention: proof that the decoder called it
        self.forwarded = 0  # tokens run through the decoder so far, all rows together

    def extend(self, embeddings: Tensor, text: Tensor | None = None) -> Tensor:
        """Append n tokens to each row: (R, n, D) input embeddings -> (R, n, D) last hidden states.

        text: (R, n) int64, equal where two tokens and all before them are the same: these run once. A row
        that is extended so is extended no further.
        Raises RuntimeError for a decoder that ignores the attention function it is given.
        """
        n = embeddings.shape[1]
        position = self.position[:, None] + torch.arange(n, device=embeddings.device)
        if text is not None:
            first, which = self.alike = first_of_each(text)
            embeddings, position = (
                x.flatten(0, 1).index_select(0, first)[None] for x in (embeddings, position)
            )
        with _attention(self.decoder, "copo_shared"):
            hidden = self.decoder(
                inputs_embeds=embeddings,
                position_ids=position,
                past_key_values=self.own,
                use_cache=True,
                rows=self,
            ).last_hidden_state
        if not self.attended:
            raise RuntimeError(
                f"{type(self.decoder).__name__} does not use the attention it is given"
            )
        self.position = self.position + n
        self.forwarded += hidden.shape[0] * hidden.shape[1]
        return hidden if text is None else F.embedding(which, hidden[0])

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
        tensors = [x.keys for x in layers], [x.values for x in layers]
        if self.alike:
            tensors = ([spread(x, self.alike[1]) for x in part] for part in tensors)
        return KeyValues(*tensors)
