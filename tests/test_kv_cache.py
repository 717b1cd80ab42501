"""Rows that share prefixes attend to them as each row would by itself."""

import pytest
import torch

from kv_cache import KeyValues, PrefixView, attend, merge

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
    outputs, masses = view.attend(query, 0)
    for r, (prefix, length) in enumerate(zip(source.tolist(), seen.tolist(), strict=True)):
        keys, values = (x[0][prefix, :, :length] for x in (shared.keys, shared.values))
        output, mass = attend(query[r], keys, values)
        assert torch.allclose(outputs[r], output, atol=1e-6)
        assert torch.allclose(masses[r], mass, atol=1e-5)


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


def test_a_view_of_which_nothing_is_seen_adds_nothing(shared):
    view, query, source, _ = rows_of(shared, [0, 1, 1, 2])
    nothing = PrefixView(shared, source, torch.zeros(4, S, dtype=torch.bool))
    alone = view.attend(query, 0)
    assert torch.equal(merge([alone, nothing.attend(query, 0)]), merge([alone]))
