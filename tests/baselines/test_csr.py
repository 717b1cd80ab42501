"""CSR's ranks, search and judges: by hand, and against one sentence at a time without a cache."""

import math
import random

import pytest
import torch

from baselines.csr import (
    Node,
    best_and_worst,
    costs,
    csr_pairs,
    go_on_with,
    ranks,
    sentences,
)
from baselines.povid import noised
from data import collate
from model import load_policy
from rewards import objects_named
from scm import sample_of_kinds, world_of


def tree():
    """Two sentences deep; C ends after one. Likelihood and image of each, by hand."""

    def node(likelihood, image, *children):
        return Node([], likelihood, image, ended=not children, children=list(children))

    a1, a2 = node(-0.5, 25.0), node(-0.9, 22.0)
    b1, b2 = node(-0.6, 18.0), node(-1.0, 23.0)
    a, b, c = node(-0.2, 20.0, a1, a2), node(-0.4, 24.0, b1, b2), node(-0.9, 15.0)
    return Node([], children=[a, b, c]), {"A1": a1, "A2": a2, "B1": b1, "B2": b2, "C": c}


def test_costs_are_mean_ranks_over_the_nodes_the_root_included():
    root, named = tree()
    found = {
        name: cost for cost, node in costs(root) for name, other in named.items() if node is other
    }
    # A costs 0.1 / 3 + 0.9 2/3 = 0.6333 and A1 0.1 / 2 + 0.9 / 2 = 0.5: (0 + 0.6333 + 0.5) / 3
    want = {"A1": 0.377778, "A2": 0.544444, "B1": 0.438889, "B2": 0.305556, "C": 0.5}
    assert found == pytest.approx(want, abs=1e-6)
    assert best_and_worst(root) == (named["B2"], named["A2"])


def test_equal_costs_make_no_pair_and_a_text_that_did_not_end_takes_no_part():
    one = Node([], ended=True)
    assert best_and_worst(Node([], children=[one])) is None
    assert best_and_worst(Node([], children=[one, Node([], ended=True)])) is None  # both rank first
    assert best_and_worst(Node([], children=[one, Node([], -1.0), Node([], -2.0)])) is None


def test_an_only_child_ranks_last_as_in_the_code():
    assert ranks([3.0]) == [1.0]


@pytest.mark.parametrize(
    ("scores", "want"),
    [
        ((-0.5, -0.1, -3.0, -0.9, -1.4, -2.0), [-0.1, -2.0, -3.0]),  # the best and the two worst
        ((-3.0, -1.0, -2.0, -0.5), [-3.0, -1.0, -2.0, -0.5]),  # fewer than five: all
    ],
)
def test_the_search_goes_on_with_the_best_and_the_worst(scores, want):
    assert [n.total for n in go_on_with([Node([], total=s) for s in scores])] == want


# ---------------------------------------------------------------------------------------------
# The search, against the slow way
# ---------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def talker(speaker):
    return load_policy(speaker)


@pytest.fixture(scope="module")
def captions(talker):
    rng = random.Random(1)
    return [sample_of_kinds(rng, 0.9, world_of(), ("caption",)) for _ in range(3)]


@pytest.fixture(scope="module")
def prefix(talker, captions):
    with torch.no_grad():
        return talker.prefill(collate(captions, talker.processor))


def slow_sentences(policy, example, start, longest, width, penalty):
    """(ids, mean score) of each group, whole passes alone, one step of all groups after the other."""
    inputs = collate([example], policy.processor)
    stop = policy.tokenizer("a.", add_special_tokens=False)["input_ids"][-1]
    stops = {stop, *policy.eos_ids.tolist()}
    texts, scores, ended = (
        [list(start) for _ in range(width)],
        [[] for _ in range(width)],
        [False] * width,
    )
    for _ in range(longest - len(start)):
        said = []
        for g in range(width):
            if ended[g]:
                continue
            ids = torch.tensor([[*texts[g], 0]])
            logps = policy.full_logits(inputs, ids, torch.ones_like(ids))[0, -1].log_softmax(-1)
            for token in said:
                logps[token] -= penalty
            token = int(logps.argmax())
            said.append(token)
            texts[g].append(token)
            scores[g].append(logps[token].item())
            ended[g] = token in stops
    return [(texts[g], sum(scores[g]) / len(scores[g])) for g in range(width) if ended[g]]


@pytest.mark.parametrize("penalty", [0.0, 3.0])
def test_sentences_are_those_of_whole_passes_without_a_cache(talker, captions, prefix, penalty):
    which, starts = torch.tensor([2, 0, 2]), [[], [], []]
    with torch.no_grad():
        for _ in range(2):  # from nothing, then from texts of different lengths
            found = sentences(talker, prefix, which, starts, 40, 3, penalty)
            for b, start, nodes in zip(which.tolist(), starts, found, strict=True):
                slow = slow_sentences(talker, captions[b], start, 40, 3, penalty)
                assert [node.ids for node in nodes] == [ids for ids, _ in slow]
                assert [n.likelihood for n in nodes] == pytest.approx(
                    [s for _, s in slow], abs=1e-4
                )
                assert all(node.ended == (node.ids[-1] in talker.eos_ids) for node in nodes)
            starts = [nodes[i % len(nodes)].ids if nodes else [] for i, nodes in enumerate(found)]
            assert len({len(start) for start in starts}) > 1


def test_groups_that_avoid_one_another_say_different_things(talker, prefix):
    which = torch.arange(3)
    apart = sentences(talker, prefix, which, [[]] * 3, 40, 5, 3.0)
    alike = sentences(talker, prefix, which, [[]] * 3, 40, 5, 0.0)
    assert any(len({tuple(node.ids) for node in nodes}) > 1 for nodes in apart)
    assert all(len({tuple(node.ids) for node in nodes}) <= 1 for nodes in alike) and any(alike)


def test_a_sentence_that_the_budget_cuts_off_is_dropped(talker, prefix):
    assert sentences(talker, prefix, torch.tensor([0]), [[]], 3, 2) == [[]]
    assert sentences(talker, prefix, torch.tensor([0]), [[270, 280, 290]], 3, 2) == [[]]


# ---------------------------------------------------------------------------------------------
# Judges and pairs
# ---------------------------------------------------------------------------------------------
def test_the_oracle_prefers_what_is_there(talker, captions, prefix):
    pairs = csr_pairs(talker, prefix, captions, None, 48)
    assert pairs
    for pair in pairs:

        def false(text, example=pair.example):
            named = objects_named(text, example.vocabulary)
            return sum(name not in example.objects for name in named) / max(len(named), 1)

        assert pair.chosen != pair.rejected and false(pair.chosen) <= false(pair.rejected)


def test_the_pull_is_how_much_likelier_the_image_makes_a_sentence(
    talker, captions, prefix, monkeypatch
):
    from baselines import csr

    kept = []
    judge = csr._judge_by_pull
    monkeypatch.setattr(csr, "_judge_by_pull", lambda *args: (judge(*args), kept.extend(args[3])))
    dim = [noised(e, 500, torch.Generator().manual_seed(i)) for i, e in enumerate(captions)]
    with torch.no_grad():
        csr_pairs(talker, prefix, captions, talker.prefill(collate(dim, talker.processor)), 48, 3)

        def logp(example, ids, first):
            inputs = collate([example], talker.processor)
            text = torch.tensor([ids])
            logps = talker.full_logits(inputs, text, torch.ones_like(text))[0].log_softmax(-1)
            of = logps.gather(-1, text[0, :, None])[first:, 0]
            return of.sum().item() / len(of)

        assert {len(parent.ids) > 0 for _, parent, _ in kept} == {True, False}
        for b, parent, child in kept:
            first = len(parent.ids)
            pull = logp(captions[b], child.ids, first) - logp(dim[b], child.ids, first)
            assert child.image == pytest.approx(pull, abs=1e-4) and math.isfinite(pull)
