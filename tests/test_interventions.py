"""The engine's answers to both questions equal those of reference.py: one row, full forwards, no cache."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TEMPERATURE, fingerprint
from families import build

import reference
from data import DataError
from interventions import Interventions, similar_widths
from model import Policy
from tiny import build_tiny_policy

H = 2


def ask(policy, prefix, rollouts, pairing="coupled", seed=3, way=Interventions, **settings):
    settings = {"num_continuations": H, "temperature": TEMPERATURE, **settings}
    generator = torch.Generator().manual_seed(seed)
    return way(policy, prefix, rollouts, generator, pairing=pairing, **settings)


class Dealt(Interventions):
    """The engine with numbers that depend on completion, place and k alone: the reference gets the same."""

    def numbers(self, n, j, k):
        """(L,) numbers of the k-th completion that leaves completion n at place j."""
        generator = torch.Generator().manual_seed(1_000_000 * n + 1_000 * j + k)
        return torch.rand(self._longest, generator=generator)

    def _uniforms(self, N, C, draws):
        of = [
            [[self.numbers(n, j, k)[j] for k in range(draws)] for j in range(C)] for n in range(N)
        ]
        return torch.tensor(of)

    def _row_uniforms(self, n, j, k):
        rows = zip(n.tolist(), j.tolist(), k.tolist(), strict=True)
        return torch.stack([self.numbers(*row).roll(-row[1]) for row in rows])


def assert_continuations_equal_the_reference(policy, prefix, rollouts, prompts, pairing):
    asked = ask(policy, prefix, rollouts, pairing, way=Dealt)
    with_, without = asked.continuation_rewards()
    N, C = rollouts.completion_ids.shape
    differences = 0
    for n in range(N):
        start, end = int(rollouts.reasoning_start[n]), int(rollouts.reasoning_end[n])
        expected = torch.zeros(2, C, H)
        if end > start:
            uniforms = [[asked.numbers(n, j, k) for k in range(H)] for j in range(C)]
            sets = reference.beginnings(
                policy,
                prompts[int(rollouts.prompt_index[n])],
                rollouts.completion_ids[n, : rollouts.lengths[n]],
                (start, end),
                fingerprint,
                torch.stack([torch.stack(row) for row in uniforms]),
                pairing == "coupled",
                TEMPERATURE,
            )
            expected[0, start:end], expected[1, start:end] = sets[1:], sets[:-1]
        assert torch.equal(torch.stack([with_[n], without[n]]), expected)
        differences += int((with_[n] != without[n]).sum())
    assert differences  # the sets are not all alike


def assert_masked_answers_equal_the_reference(policy, prefix, rollouts, prompts):
    masked = ask(policy, prefix, rollouts).masked_rewards()
    expected = rollouts.rewards[:, None].repeat(1, masked.shape[1])
    for n, t in rollouts.reasoning_mask.nonzero().tolist():
        answer = reference.masked_answer(
            policy,
            prompts[int(rollouts.prompt_index[n])],
            rollouts.completion_ids[n, : rollouts.lengths[n]],
            int(rollouts.answer_start[n]),
            t,
            rollouts.uniforms[n],
            TEMPERATURE,
        )
        expected[n, t] = fingerprint(answer)
    assert torch.equal(masked, expected)
    own = rollouts.rewards[:, None].expand_as(masked)[rollouts.reasoning_mask]
    assert (masked[rollouts.reasoning_mask] != own).any()  # masking does change some answers


@pytest.mark.parametrize("pairing", ["coupled", "independent"])
def test_continuations_equal_the_reference_token_for_token(
    policy, prefix, rollouts, prompts, pairing
):
    assert_continuations_equal_the_reference(policy, prefix, rollouts, prompts, pairing)


def test_masked_answers_equal_the_reference_token_for_token(policy, prefix, rollouts, prompts):
    assert_masked_answers_equal_the_reference(policy, prefix, rollouts, prompts)


def test_continuations_are_exact_in_every_family(family):
    assert_continuations_equal_the_reference(*family, "coupled")


def test_masked_answers_are_exact_in_every_family(family):
    assert_masked_answers_equal_the_reference(*family)


def test_models_that_shared_prefixes_cannot_serve_are_refused():
    model, inputs = build("llava")
    policy = Policy(model, SimpleNamespace(tokenizer=build_tiny_policy().tokenizer))
    policy.decoder.config.attn_logit_softcapping = 50.0
    with pytest.raises(DataError, match="attn_logit_softcapping"):
        policy.prefill(inputs)


@pytest.mark.parametrize("pairing", ["coupled", "independent"])
@pytest.mark.parametrize("max_rows", [1, 7])
def test_the_row_budget_changes_no_result(policy, prefix, rollouts, pairing, max_rows):
    def answers(**settings):
        asked = ask(policy, prefix, rollouts, pairing, **settings)
        return [*asked.continuation_rewards(), asked.masked_rewards()]

    for small, large in zip(answers(max_rows=max_rows), answers(), strict=True):
        assert torch.equal(small, large)


def test_neighbouring_tokens_share_their_sets(policy, prefix, rollouts):
    with_, without = ask(policy, prefix, rollouts).continuation_rewards()
    inside = rollouts.reasoning_mask[:, :-1] & rollouts.reasoning_mask[:, 1:]
    assert torch.equal(with_[:, :-1][inside], without[:, 1:][inside])


def test_coupling_decodes_fewer_rows_and_leaves_most_pairs_equal(policy, prefix, rollouts):
    coupled, independent = (ask(policy, prefix, rollouts, p) for p in ("coupled", "independent"))
    equal = [
        (with_ == without)[rollouts.reasoning_mask].float().mean()
        for with_, without in (coupled.continuation_rewards(), independent.continuation_rewards())
    ]
    assert coupled.cost.rows < independent.cost.rows
    assert equal[0] > equal[1]


def test_both_pairings_have_the_same_marginal_reward_in_every_set(policy, prefix, rollouts):
    draws = 400
    parity = dataclasses.replace(rollouts, reward=lambda n, tokens: float(tokens.sum() % 2))
    parity.rewards = torch.tensor(
        [
            parity.reward(n, ids[:length])
            for n, (ids, length) in enumerate(
                zip(rollouts.completion_ids, rollouts.lengths, strict=True)
            )
        ]
    )
    means = []
    for pairing, seed in (("coupled", 11), ("independent", 12)):
        asked = ask(policy, prefix, parity, pairing, seed, num_continuations=draws)
        with_, without = asked.continuation_rewards()
        means.append(torch.cat([with_, without], 1).mean(-1))
    reasoning = rollouts.reasoning_mask.repeat(1, 2)
    difference = (means[0] - means[1])[reasoning]
    z = difference / math.sqrt(2 * 0.25 / draws)
    assert z.abs().max() < 4.5 and z.square().mean() < 2


def test_a_completion_without_reasoning_gets_no_scores(policy, prefix, rollouts):
    asked = ask(policy, prefix, rollouts)
    with_, without = asked.continuation_rewards()
    assert (with_[-1] == 0).all() and (without[-1] == 0).all()
    assert (asked.masked_rewards()[-1] == rollouts.rewards[-1]).all()


def test_rollouts_without_any_reasoning_are_scored_without_a_row(policy, prefix, rollouts):
    none = dataclasses.replace(
        rollouts, reasoning_start=rollouts.reasoning_end, answer_start=rollouts.reasoning_end
    )
    asked = ask(policy, prefix, none)
    with_, without = asked.continuation_rewards()
    assert (with_ == 0).all() and (without == 0).all() and asked.cost.rows == 0
    assert torch.equal(
        asked.masked_rewards(), none.rewards[:, None].expand(none.completion_ids.shape)
    )


def test_copies_of_a_text_run_once_but_draw_their_own_continuations(policy, prefix, rollouts):
    asked = ask(policy, prefix, rollouts)
    assert (
        len(asked.trajectories.hidden) == len(rollouts.prompt_index) - 1
        and asked.trajectories.copy_of[0] == asked.trajectories.copy_of[1]
    )
    with_, _ = asked.continuation_rewards()
    assert (with_[0] != with_[1]).any()


def test_asking_changes_neither_rollouts_nor_prefix(policy, prefix, rollouts):
    tensors = [
        rollouts.completion_ids,
        rollouts.rewards,
        rollouts.uniforms,
        prefix.logits,
        *prefix.key_values.keys,
    ]
    before = [t.clone() for t in tensors]
    asked = ask(policy, prefix, rollouts)
    asked.continuation_rewards(), asked.masked_rewards()
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_similar_widths_cover_every_row_once_and_waste_at_most_a_third():
    width = torch.tensor([3, 100, 90, 2, 40, 76, 1])
    pieces = similar_widths(width)
    assert sorted(torch.cat(pieces).tolist()) == list(range(7))
    assert all(width[piece].min() * 4 >= width[piece].max() * 3 for piece in pieces)


def test_scoring_fewer_tokens_scores_those_the_policy_was_least_sure_of(policy, prefix, rollouts):
    with torch.no_grad():
        logps, _ = policy.per_token_logps(
            prefix,
            rollouts.prompt_index,
            rollouts.completion_ids,
            rollouts.completion_mask,
            TEMPERATURE,
        )
    asked = ask(policy, prefix, rollouts, max_scored_tokens=2)
    for n in range(len(rollouts.prompt_index) - 1):
        reasoning = rollouts.reasoning_mask[n].nonzero()[:, 0]
        least = reasoning[logps[n, reasoning].argsort()[:2]]
        assert asked.scored[n].nonzero()[:, 0].tolist() == sorted(least.tolist())
    assert not asked.scored[-1].any()


@pytest.mark.parametrize("pairing", ["coupled", "independent"])
def test_scoring_fewer_tokens_decodes_less_and_nothing_beside_them(
    policy, prefix, rollouts, pairing
):
    few, all_ = (ask(policy, prefix, rollouts, pairing, max_scored_tokens=k) for k in (2, None))
    with_, without = few.continuation_rewards()
    masked = few.masked_rewards()
    all_.continuation_rewards(), all_.masked_rewards()
    assert few.cost.rows < all_.cost.rows
    assert (with_[~few.scored] == 0).all() and (without[~few.scored] == 0).all()
    own = rollouts.rewards[:, None].expand_as(masked)
    assert torch.equal(masked[~few.scored], own[~few.scored])
    # Which tokens are masked does not depend on which others are.
    if pairing == "coupled":
        assert torch.equal(
            masked[few.scored], ask(policy, prefix, rollouts).masked_rewards()[few.scored]
        )


@pytest.fixture
def endless(policy, monkeypatch):
    """The policy without an end token: every row runs to its budget."""
    monkeypatch.setattr(policy, "eos_ids", torch.tensor([len(policy.forbidden)]))
    return policy


def without_copies(rollouts):
    """Four different trajectories, the reasoning of each at places 2..6, all as long as the longest."""
    keep = torch.tensor([0, 2, 3, 4])
    fields = (
        "prompt_index",
        "completion_ids",
        "reasoning_start",
        "reasoning_end",
        "answer_start",
        "uniforms",
        "truncated",
        "rewards",
    )
    ids = rollouts.completion_ids.shape[1]
    return dataclasses.replace(
        rollouts,
        lengths=torch.full((4,), ids),
        **{name: getattr(rollouts, name)[keep] for name in fields},
    )


def test_independent_continuations_take_the_token_forwards_of_the_formula(
    endless, prefix, rollouts
):
    r = without_copies(rollouts)
    N, T, L = 4, 5, r.uniforms.shape[1]
    asked = ask(endless, prefix, r, "independent")
    assert len(asked.trajectories.hidden) == 4  # their pass is counted apart
    told = asked.cost.token_forwards
    asked.continuation_rewards()
    A = L - int(r.reasoning_end[0])  # what is left for the answer after all T reasoning tokens
    assert told == N * (r.completion_ids.shape[1] - 1)
    assert asked.cost.rows == N * H * (T + 1)
    # the first token of a row costs nothing: H sum_t (T - t + A - 1), t = 0..T
    assert asked.cost.token_forwards - told == N * H * (T + 1) * (T / 2 + A - 1)


def test_coupled_continuations_take_the_token_forwards_of_the_formula(endless, prefix, rollouts):
    r = without_copies(rollouts)
    draws, L = 300, r.uniforms.shape[1]
    asked = ask(endless, prefix, r, "coupled", num_continuations=draws)
    assert len(asked.trajectories.hidden) == 4  # their pass is counted apart
    told = asked.cost.token_forwards
    asked.continuation_rewards()
    with torch.no_grad():
        logps, _ = endless.per_token_logps(
            prefix, r.prompt_index, r.completion_ids, torch.ones_like(r.completion_ids), TEMPERATURE
        )
    p = logps.exp()
    rows = forwards = variance = 0.0
    for n in range(4):
        arrives = 1.0
        for j in range(int(r.reasoning_start[n]), r.completion_ids.shape[1]):
            chance = arrives * (1 - p[n, j]).item()
            rows += draws * chance
            forwards += draws * chance * (L - j - 1)
            variance += draws * chance * (1 - chance) * (L - j - 1) ** 2
            if j >= int(
                r.reasoning_end[n]
            ):  # after the last set, only completions that stayed go on
                arrives *= p[n, j].item()
    assert abs(asked.cost.token_forwards - told - forwards) < 5 * math.sqrt(variance)
    assert abs(asked.cost.rows - rows) < 5 * math.sqrt(rows)
