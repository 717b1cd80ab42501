"""The engine's answers to both questions equal those of plain loops: one row, full forward, no cache."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TEMPERATURE, fingerprint
from families import build

from data import DataError
from interventions import MASKS, Interventions, similar_widths
from model import Policy, build_tiny_policy, sample_tokens

H = 3


def ask(policy, prefix, rollouts, pairing="coupled", seed=3, **settings):
    settings = {"num_continuations": H, "temperature": TEMPERATURE, **settings}
    generator = torch.Generator().manual_seed(seed)
    return Interventions(policy, prefix, rollouts, generator, pairing=pairing, **settings)


class Plain:
    """Equations 2 and 3 the obvious way: one row at a time through the whole model, image and all."""

    def __init__(self, policy, rollouts, prompts, seed=3):
        self.policy, self.rollouts, self.prompts = policy, rollouts, prompts
        self.generator = torch.Generator().manual_seed(seed)
        self.longest = rollouts.uniforms.shape[1]

    def logits(self, n, tokens, masked=None, stand_in=None):
        inputs = dict(self.prompts[int(self.rollouts.which[n])])
        length = inputs["input_ids"].shape[1]
        for name, filler in (
            ("input_ids", tokens),
            ("attention_mask", 1),
            ("mm_token_type_ids", 0),
        ):
            if name in inputs:
                more = torch.zeros_like(tokens) + filler
                inputs[name] = torch.cat([inputs[name], more[None].to(inputs[name].dtype)], 1)

        def replace(module, args, output):
            output = output.clone()
            output[0, length + masked] = 0 if stand_in is None else stand_in
            return output

        core = getattr(self.policy.model, "model", None)
        if hasattr(core, "rope_deltas"):  # Qwen's state from the prompt before
            core.rope_deltas = None
        embeddings = self.policy.embed
        hook = embeddings.register_forward_hook(replace) if masked is not None else None
        with torch.no_grad():
            out = self.policy.model(**inputs, use_cache=False)
        if hook:
            hook.remove()
        return out.logits[0, -1:].float().masked_fill(self.policy.forbidden, -math.inf)

    def next_token(self, n, tokens, uniform, *mask):
        uniform = torch.as_tensor(uniform).view(1, 1)
        return sample_tokens(self.logits(n, tokens, *mask), uniform, TEMPERATURE)[0, 0]

    def complete(self, n, tokens, uniforms, *mask):
        """Continue `tokens`; the step that draws place j reads uniforms[j]."""
        while len(tokens) < self.longest and int(tokens[-1]) not in self.policy.eos_ids.tolist():
            token = self.next_token(n, tokens, uniforms[len(tokens)], *mask)
            tokens = torch.cat([tokens, token[None]])
        return fingerprint(tokens)

    def continuation_sets(self, coupled):
        """(N, C + 1, H) rewards of the completions of o_<j, with the numbers that the engine reads."""
        r = self.rollouts
        N, C = r.completion_ids.shape
        first = torch.rand(N, C, H, generator=self.generator)
        drawn, leaving = {}, []
        for n in range(N):
            for j in range(int(r.start[n]), int(r.lengths[n]) if r.end[n] > r.start[n] else 0):
                for k in range(H):
                    token = self.next_token(n, r.completion_ids[n, :j], first[n, j, k])
                    drawn[n, j, k] = token
                    stayed = all(
                        coupled and drawn[n, i, k] == r.completion_ids[n, i]
                        for i in range(int(r.end[n]), j)
                    )
                    if stayed and not (coupled and token == r.completion_ids[n, j]):
                        leaving.append((n, j, k))
        numbers = torch.rand(len(leaving), self.longest, generator=self.generator)
        values = {}
        for row, (n, j, k) in enumerate(leaving):
            tokens = torch.cat([r.completion_ids[n, :j], drawn[n, j, k][None]])
            values[n, j, k] = self.complete(n, tokens, [0.0] * j + numbers[row].tolist())
        sets = torch.zeros(N, C + 1, H)
        for n in range(N):
            for k in range(H):
                for j in reversed(range(C + 1)):
                    after = r.rewards[n] if j == C else sets[n, j + 1, k]
                    sets[n, j, k] = values.get((n, j, k), float(after))
        return sets

    def masked(self, mask="zero"):
        """(N, C) rewards of masked answers drawn with the trajectory's own numbers."""
        r = self.rollouts
        rewards = r.rewards[:, None].repeat(1, r.completion_ids.shape[1])
        for n, t in r.reasoning_mask.nonzero().tolist():
            kept, stand_in = r.completion_ids[n, : r.answer[n]], None
            if mask == "second-best":
                best, second = self.logits(n, kept[:t]).topk(2).indices[0]
                stand_in = self.policy.embed(second if best == kept[t] else best)
            rewards[n, t] = self.complete(n, kept, r.uniforms[n], t, stand_in)
        return rewards


def assert_continuations_equal_plain_ones(policy, prefix, rollouts, prompts, pairing):
    with_, without = ask(policy, prefix, rollouts, pairing).continuation_rewards()
    plain = Plain(policy, rollouts, prompts)
    sets = plain.continuation_sets(coupled=pairing == "coupled")
    reasoning = rollouts.reasoning_mask[..., None]
    assert torch.equal(with_, torch.where(reasoning, sets[:, 1:], 0.0))
    assert torch.equal(without, torch.where(reasoning, sets[:, :-1], 0.0))
    assert (with_[reasoning[..., 0]] != without[reasoning[..., 0]]).any()


def assert_masked_answers_equal_plain_ones(policy, prefix, rollouts, prompts, mask="zero"):
    masked = ask(policy, prefix, rollouts, mask=mask).masked_rewards()
    assert torch.equal(masked, Plain(policy, rollouts, prompts).masked(mask))
    own = rollouts.rewards[:, None].expand_as(masked)[rollouts.reasoning_mask]
    assert (masked[rollouts.reasoning_mask] != own).any()  # masking does change some answers


@pytest.mark.parametrize("pairing", ["coupled", "independent"])
def test_continuations_equal_plain_ones_token_for_token(policy, prefix, rollouts, prompts, pairing):
    assert_continuations_equal_plain_ones(policy, prefix, rollouts, prompts, pairing)


@pytest.mark.parametrize("mask", MASKS)
def test_masked_answers_equal_plain_ones_token_for_token(policy, prefix, rollouts, prompts, mask):
    assert_masked_answers_equal_plain_ones(policy, prefix, rollouts, prompts, mask)


def test_continuations_are_exact_in_every_family(family):
    assert_continuations_equal_plain_ones(*family, "coupled")


def test_masked_answers_are_exact_in_every_family(family):
    assert_masked_answers_equal_plain_ones(*family)


def test_models_that_shared_prefixes_cannot_serve_are_refused():
    model, inputs = build("llava")
    policy = Policy(model, SimpleNamespace(tokenizer=build_tiny_policy().tokenizer))
    policy.decoder.config.attn_logit_softcapping = 50.0
    with pytest.raises(DataError, match="attn_logit_softcapping"):
        policy.prefill(inputs)


@pytest.mark.parametrize("max_rows", [1, 5, 4096])
def test_both_questions_asked_together_get_the_answers_they_get_alone(
    policy, prefix, rollouts, max_rows
):
    alone = ask(policy, prefix, rollouts)
    alone = *alone.continuation_rewards(), ask(policy, prefix, rollouts).masked_rewards()
    together = ask(policy, prefix, rollouts, max_rows=max_rows).rewards(True, True)
    assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))


def test_a_question_that_is_not_asked_scores_zero_and_decodes_nothing(policy, prefix, rollouts):
    asked = ask(policy, prefix, rollouts)
    with_, without, masked = asked.rewards(False, False)
    assert torch.equal(with_, without) and asked.cost.rows == 0
    assert (masked == rollouts.rewards[:, None]).all()


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
    none = dataclasses.replace(rollouts, start=rollouts.end, answer=rollouts.end)
    asked = ask(policy, prefix, none)
    with_, without = asked.continuation_rewards()
    assert (with_ == 0).all() and (without == 0).all() and asked.cost.rows == 0
    assert torch.equal(
        asked.masked_rewards(), none.rewards[:, None].expand(none.completion_ids.shape)
    )


def test_copies_of_a_text_run_once_but_draw_their_own_continuations(policy, prefix, rollouts):
    asked = ask(policy, prefix, rollouts)
    assert len(asked.hidden) == len(rollouts.which) - 1 and asked.copy_of[0] == asked.copy_of[1]
    with_, _ = asked.continuation_rewards()
    assert (with_[0] != with_[1]).any()


def test_asking_changes_neither_rollouts_nor_prefix(policy, prefix, rollouts):
    tensors = [
        rollouts.completion_ids,
        rollouts.rewards,
        rollouts.uniforms,
        prefix.logits,
        *prefix.texts.keys,
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
            prefix, rollouts.which, rollouts.completion_ids, rollouts.completion_mask, TEMPERATURE
        )
    asked = ask(policy, prefix, rollouts, max_scored_tokens=2)
    for n in range(len(rollouts.which) - 1):
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
        "which",
        "completion_ids",
        "start",
        "end",
        "answer",
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
    told = asked.cost.token_forwards
    asked.continuation_rewards()
    A = L - int(r.end[0])  # what is left for the answer after all T reasoning tokens
    assert told == N * (r.completion_ids.shape[1] - 1)
    assert asked.cost.rows == N * H * (T + 1)
    # the first token of a row costs nothing: H sum_t (T - t + A - 1), t = 0..T
    assert asked.cost.token_forwards - told == N * H * (T + 1) * (T / 2 + A - 1)


def test_coupled_continuations_take_the_token_forwards_of_the_formula(endless, prefix, rollouts):
    r = without_copies(rollouts)
    draws, L = 300, r.uniforms.shape[1]
    asked = ask(endless, prefix, r, "coupled", num_continuations=draws)
    told = asked.cost.token_forwards
    asked.continuation_rewards()
    with torch.no_grad():
        logps, _ = endless.per_token_logps(
            prefix, r.which, r.completion_ids, torch.ones_like(r.completion_ids), TEMPERATURE
        )
    p = logps.exp()
    rows = forwards = variance = 0.0
    for n in range(4):
        arrives = 1.0
        for j in range(int(r.start[n]), r.completion_ids.shape[1]):
            chance = arrives * (1 - p[n, j]).item()
            rows += draws * chance
            forwards += draws * chance * (L - j - 1)
            variance += draws * chance * (1 - chance) * (L - j - 1) ** 2
            if j >= int(r.end[n]):  # after the last set, only completions that stayed go on
                arrives *= p[n, j].item()
    assert abs(asked.cost.token_forwards - told - forwards) < 5 * math.sqrt(variance)
    assert abs(asked.cost.rows - rows) < 5 * math.sqrt(rows)
