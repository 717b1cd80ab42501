"""Rows that share prefixes attend to them as each row would by itself."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from kv_cache import KeyValues, PrefixView, shared_attention

HEADS, D, S, M = 2, 4, 6, 3  # kv heads, head size, tokens per prefix, prefixes
SOURCES = {
    "even": [0, 1, 2, 0, 1, 2],
    "one has nearly all": [0] * 10 + [1, 2],
    "in any order, one unread": [2, 0, 2, 2, 2, 0, 2, 2, 2, 2, 2],
    "one row": [1],
}


@pytest.fixture
def shared():
    seeded = torch.manual_seed(0)
    keys, values = torch.randn(2, M, HEADS, S, D, generator=seeded)
    return KeyValues([keys], [values])


def rows_of(shared, source):
    """A view of rows that see beginnings of different lengths, and their queries."""
    source = torch.tensor(source)
    seen = 1 + torch.arange(len(source)) % S
    query = torch.randn(len(source), HEADS, 2, D)
    return PrefixView(shared, source, torch.arange(S) < seen[:, None]), query, source, seen


def assert_each_row_attends_by_itself(view, query, shared, source, seen):
    weights = view.scores(query, 0).softmax(-1)
    outputs = view.mean(weights, 0)
    for r, (prefix, length) in enumerate(zip(source.tolist(), seen.tolist(), strict=True)):
        keys, values = (x[0][prefix, :, :length] for x in (shared.keys, shared.values))
        alone = (query[r] @ keys.transpose(-1, -2)).softmax(-1)
        assert torch.allclose(weights[r, ..., :length], alone, atol=1e-6)
        assert not weights[r, ..., length:].any()
        assert torch.allclose(outputs[r], alone @ values, atol=1e-6)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_every_row_attends_to_what_it_sees_of_its_own_prefix(shared, source):
    view, query, source, seen = rows_of(shared, source)
    assert_each_row_attends_by_itself(view, query, shared, source, seen)
    left = torch.arange(0, len(source), 3)  # a third of the rows goes on
    view.keep(left)
    assert_each_row_attends_by_itself(view, query[left], shared, source[left], seen[left])


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_the_table_of_rows_is_at_least_half_full_but_for_one_line_per_prefix(shared, source):
    view, *_ = rows_of(shared, source)
    assert view.cells <= 2 * len(source) + M


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(
    "source", [[0, 0, 1, 1, 2, 2], [2, 0, 2, 1, 2, 2]], ids=["in order", "not"]
)
def test_shared_and_own_keys_are_under_one_softmax(shared, source, n):
    """Against the library's attention over copies, one row at a time; the last view shows nothing."""
    source, R, own = torch.tensor(source), len(source), 4
    seen = torch.arange(S) < (1 + torch.arange(R) % S)[:, None]
    views = [PrefixView(shared, source, mask) for mask in (seen, seen | True, seen & False)]
    assert [view.in_order for view in views] == [source.tolist() == sorted(source.tolist())] * 3
    query = torch.randn(R, 2 * HEADS, n, D)  # two heads read the same keys
    key, value = torch.randn(2, R, HEADS, own, D)
    rows, module = SimpleNamespace(views=views, alike=None), SimpleNamespace(layer_idx=0)
    out, _ = shared_attention(module, query, key, value, None, scaling=0.5, rows=rows)
    mine = torch.ones(n, own, dtype=torch.bool).tril(own - n)
    for r in range(R):
        mask = torch.cat([seen[r].expand(n, -1), torch.ones(n, S, dtype=torch.bool), mine], 1)
        keys, values = (
            torch.cat([x[0][source[r]]] * 2 + [y[r]], 1).repeat_interleave(2, 0)
            for x, y in ((shared.keys, key), (shared.values, value))
        )
        alone = F.scaled_dot_product_attention(query[r], keys, values, mask, scale=0.5)
        assert torch.allclose(out[r], alone.transpose(0, 1), atol=1e-6)
