"""Keys and values that many rows read and none copies: attention over shared prefixes.

Everything COPO asks of a policy is rows of tokens that continue a shared text: G completions of one
prompt, hundreds of continuations of one trajectory, a trajectory over and over with another token
masked. `Rows` runs such rows through the text decoder of any transformers model whose layers attend
to everything before them. A row holds the keys and values of the tokens that it added itself; what it
shares with other rows is a `SharedText`, held once. `shared_attention` reads both under one softmax;
it stands in for the decoder's attention during `Rows.extend` and at no other time.

The image never comes here: it is part of a prompt, and a prompt has been through the whole model once.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, DynamicCache


class SharedText:
    """One copy of keys and values of M texts, read by R rows: row r reads text source[r].

    keys, values: a tensor a layer, (M, kv heads, S, head size).
    source: (R,) which text a row reads.  visible: (R, S) bool, which of its tokens.
    """

    def __init__(self, keys: list[Tensor], values: list[Tensor], source: Tensor, visible: Tensor):
        self.keys, self.values = keys, values
        self.select(source, visible)

    def select(self, source: Tensor, visible: Tensor) -> None:
        """Let these rows read these texts."""
        self.source, self.visible = source, visible
        texts = len(self.keys[0])
        counts = torch.bincount(source, minlength=texts)
        self.slots = int(counts.max())  # the most rows that any one text has
        order = source.argsort(stable=True)
        rank = torch.empty_like(source)
        rank[order] = torch.arange(len(source), device=source.device) - (
            counts.cumsum(0) - counts
        ).repeat_interleave(counts)
        place = source * self.slots + rank  # (R,) where a row sits when rows are dealt to their texts
        tidy = len(source) == texts * self.slots and bool((rank[1:] >= 0).all())
        in_order = tidy and torch.equal(place, torch.arange(len(place), device=place.device))
        self.place = None if in_order else place

    def deal(self, rows: Tensor) -> Tensor:
        """(R, heads, m, d) -> (M, heads, slots * m, d): the rows of each text side by side."""
        R, heads, m, d = rows.shape
        if self.place is not None:
            dealt = rows.new_zeros(len(self.keys[0]) * self.slots, heads, m, d)
            rows = dealt.index_copy(0, self.place, rows)
        return rows.view(-1, self.slots, heads, m, d).transpose(1, 2).flatten(2, 3)

    def collect(self, dealt: Tensor, m: int) -> Tensor:
        """The inverse of `deal`: (M, heads, slots * m, x) -> (R, heads, m, x)."""
        rows = dealt.unflatten(2, (self.slots, m)).transpose(1, 2).flatten(0, 1)
        return rows if self.place is None else rows[self.place]

    def scores(self, query: Tensor, layer: int) -> Tensor:
        """q K^T of every row with its text in one product: (R, heads, m, d) -> (R, heads, m, S)."""
        scores = self.collect(self.deal(query) @ self.keys[layer].transpose(2, 3), query.shape[2])
        return scores.masked_fill(~self.visible[:, None, None], -torch.inf)

    def mix(self, weights: Tensor, layer: int) -> Tensor:
        """w V likewise: (R, heads, m, S) -> (R, heads, m, d)."""
        return self.collect(self.deal(weights) @ self.values[layer], weights.shape[2])


def shared_attention(
    module, query: Tensor, key: Tensor, value: Tensor, attention_mask, scaling=None, rows=None, **_
):
    """softmax([q K_1', q K_2', ..., q k']) [V_1; V_2; ...; v]: one softmax over shared and own keys.

    query: (R, heads, n, d), the row's n new tokens.  key, value: (R, kv heads, s, d), its own tokens.
    rows.texts hold the K_i, V_i that the rows share, one copy each.  Returns (R, n, heads, d).
    """
    (R, heads, n, d), (kv_heads, own) = query.shape, key.shape[1:3]
    groups = heads // kv_heads  # query heads that read the same keys stand side by side
    query = (query * scaling).reshape(R, kv_heads, groups * n, d)
    own_scores = query @ key.transpose(2, 3)  # (R, kv heads, groups * n, own)
    if n > 1:  # several new tokens at once are causal among themselves
        later = torch.ones(n, own, dtype=torch.bool, device=query.device).triu(own - n + 1)
        own_scores = own_scores.masked_fill(later.repeat(groups, 1), -torch.inf)
    scores = [text.scores(query, module.layer_idx) for text in rows.texts]
    weights = torch.cat([*scores, own_scores], -1).softmax(-1, dtype=torch.float32).to(query.dtype)
    *shared_weights, own_weights = weights.split([*(s.shape[-1] for s in scores), own], -1)
    out = own_weights @ value
    for text, w in zip(rows.texts, shared_weights, strict=True):
        out = out + text.mix(w, module.layer_idx)
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
    """R rows of new tokens that continue shared texts.

    decoder: the text decoder of the model.  position: (R,) rotary position of the next token.
    texts: what the rows share, in order (a prompt; a prompt and a trajectory).
    """

    def __init__(self, decoder: nn.Module, texts: list[SharedText], position: Tensor):
        self.decoder, self.texts, self.position = decoder, texts, position
        self.own = DynamicCache()
        self.forwarded = 0  # tokens run through the decoder so far, all rows together

    def extend(self, embeddings: Tensor) -> Tensor:
        """Append n tokens a row: (R, n, D) input embeddings -> (R, n, D) last hidden states."""
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
        self.position = self.position + n
        self.forwarded += embeddings.shape[0] * n
        return hidden

    def keep(self, index: Tensor) -> None:
        """Go on with these rows alone: (R',) indices into the present rows."""
        self.position = self.position[index]
        for text in self.texts:
            text.select(text.source[index], text.visible[index])
        if len(self.own):
            self.own.batch_select_indices(index)

    def as_text(self, source: Tensor, visible: Tensor) -> SharedText:
        """What the rows added, to be shared by further rows: row r' reads row source[r'] of these."""
        layers = self.own.layers
        return SharedText([x.keys for x in layers], [x.values for x in layers], source, visible)
