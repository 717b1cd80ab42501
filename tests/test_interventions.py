"""The engine's answers to both questions equal those of reference.py: one row, full forwards, no cache."""

import dataclasses
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import TEMPERATURE, H, ask, fingerprint, mark, without_copies
from families import build
from torch.utils._python_dispatch import TorchDispatchMode

import reference
from data import DataError, collate
from interventions import Interventions, causal_rewards, similar_widths
from kv_cache import Rows
from model import Policy
from rollouts import rollout
from tiny import build_tiny_policy


def by_place(asked, n, j, k):
    """(L,) numbers of the k-th completion that leaves completion n at place j; the j-th draws place j."""
    longest = asked.rollouts.longest
    n, j = torch.tensor(n), torch.tensor(j)
    return asked.numbers(n, j, k, torch.arange(longest)).roll(int(j))


def assert_continuations_equal_the_reference(policy, prefix, rollouts, prompts, pairing):
    asked = ask(policy, prefix, rollouts, pairing)
    with_, without = asked.continuation_rewards()
    N, C = rollouts.completion_ids.shape
    differences = 0
    for n in range(N):
        start, end = int(rollouts.reasoning_start[n]), int(rollouts.reasoning_end[n])
        expected = torch.zeros(2, C, H)
        if end > start:
            uniforms = [torch.stack([by_place(asked, n, j, k) for k in range(H)]) for j in range(C)]
            sets = reference.beginnings(
                policy,
                prompts[int(rollouts.prompt_index[n])],
                rollouts.completion_ids[n, : rollouts.lengths[n]],
                (start, end),
                fingerprint,
                torch.stack(uniforms),
                pairing == "coupled",
                TEMPERATURE,
            )
            expected[0, start:end], expected[1, start:end] = sets[1:], sets[:-1]
        assert torch.equal(torch.stack([with_[n], without[n]]), expected)
        differences += int((with_[n] != without[n]).sum())
    assert differences  # the sets are not all alike


def assert_masked_answers_equal_the_reference(policy, prefix, rollouts, prompts, pairing="coupled"):
    asked = ask(policy, prefix, rollouts, pairing)
    masked = asked.masked_rewards()
    expected = rollouts.rewards[:, None].repeat(1, masked.shape[1])
    for n, t in rollouts.reasoning_mask.nonzero().tolist():
        answer = reference.masked_answer(
            policy,
            prompts[int(rollouts.prompt_index[n])],
            rollouts.completion_ids[n, : rollouts.lengths[n]],
            int(rollouts.answer_start[n]),
            t,
            asked.masked_numbers(torch.tensor([n]), torch.tensor([t]))[0],
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


@pytest.mark.parametrize("pairing", ["coupled", "independent"])
def test_masked_answers_equal_the_reference_token_for_token(
    policy, prefix, rollouts, prompts, pairing
):
    assert_masked_answers_equal_the_reference(policy, prefix, rollouts, prompts, pairing)


@pytest.mark.parametrize("pairing", ["coupled", "independent"])
@pytest.mark.parametrize("unit", ["word", 2, 3])
def test_the_sets_of_a_unit_are_those_before_its_first_token_and_after_its_last(
    policy, prefix, rollouts, unit, pairing
):
    asked, of_tokens = (
        ask(policy, prefix, rollouts, pairing, unit=unit),
        ask(policy, prefix, rollouts, pairing),
    )
    with_, without = asked.continuation_rewards()
    with_token, without_token = of_tokens.continuation_rewards()
    told = 0
    for n, t in rollouts.reasoning_mask.nonzero().tolist():
        first, end = (int(x[n, t]) for x in asked.units)
        assert first <= t < end <= rollouts.reasoning_end[n]
        assert torch.equal(with_[n, t], with_token[n, end - 1])
        assert torch.equal(without[n, t], without_token[n, first])
        told += end - first > 1
    assert told and torch.equal(asked.scored, rollouts.reasoning_mask)


@pytest.mark.parametrize("unit", ["word", 3])
def test_the_tokens_of_a_unit_are_masked_together(policy, prefix, rollouts, prompts, unit):
    asked = ask(policy, prefix, rollouts, unit=unit)
    masked = asked.masked_rewards()
    for n, t in asked.heads.nonzero().tolist():
        end = int(asked.units[1][n, t])
        answer = reference.masked_answer(
            policy,
            prompts[int(rollouts.prompt_index[n])],
            rollouts.completion_ids[n, : rollouts.lengths[n]],
            int(rollouts.answer_start[n]),
            torch.arange(t, end),
            asked.own_numbers[n],
            TEMPERATURE,
        )
        assert (masked[n, t:end] == fingerprint(answer)).all()


def test_words_begin_where_letters_do_not_go_on(policy):
    ids = policy.tokenizer("I see a zebrafish.", add_special_tokens=False)["input_ids"]
    begins = policy.begins_word(torch.tensor([ids]))[0].tolist()
    pieces = [policy.text([i]) for i in ids]
    words = []
    for piece, new in zip(pieces, begins, strict=True):
        words = [*words, piece] if new else [*words[:-1], words[-1] + piece]
    assert words == ["I", " see", " a", " zebrafish", "."] and len(pieces) > len(words)


def test_own_numbers_draw_the_trajectories_own_answers(policy, prefix, rollouts, prompts):
    asked, again = (ask(policy, prefix, rollouts, seed=seed) for seed in (3, 4))
    told = 0
    for n, length in enumerate(rollouts.lengths.tolist()[:-1]):
        ids = rollouts.completion_ids[n, :length]
        numbers = asked.own_numbers[n]
        for place in range(int(rollouts.answer_start[n]), length):
            prompt = prompts[int(rollouts.prompt_index[n])]
            drawn = reference.next_token(
                policy, prompt, ids[:place], float(numbers[place]), TEMPERATURE
            )
            assert drawn == ids[place]
            told += 1
    assert told > 10
    assert (asked.own_numbers != again.own_numbers).any()


def test_own_numbers_of_sampled_tokens_are_uniform(policy, prefix, examples):
    # A trajectory's number is unknown, but over all trajectories it was uniform: so must these be.
    drawn = rollout(policy, prefix, examples, 200, 3, torch.Generator().manual_seed(1), TEMPERATURE)
    everything = dataclasses.replace(drawn, answer_start=torch.ones_like(drawn.lengths))
    numbers = ask(policy, prefix, everything).own_numbers[:, 1:]
    numbers = numbers[drawn.completion_mask[:, 1:]].sort().values
    even = (torch.arange(len(numbers)) + 0.5) / len(numbers)
    assert len(numbers) > 500
    assert (numbers - even).abs().max() < 1.63 / len(numbers) ** 0.5  # Kolmogorov and Smirnov, 1 %


def test_numbers_are_uniform_and_those_of_different_texts_and_k_unrelated(policy, prefix, rollouts):
    asked = ask(policy, prefix, rollouts)
    n, j, k = torch.meshgrid(
        torch.tensor([0, 2, 4]), torch.arange(8), torch.arange(500), indexing="ij"
    )  # of three prompts
    x = asked.numbers(n, j, k, 0)
    assert x.min() >= 0 and x.max() < 1
    assert (x.mean(-1) - 0.5).abs().max() < 4.5 * (1 / 12 / 500) ** 0.5
    z = (x - 0.5) * 12**0.5
    for other in (z.roll(1, 0), z.roll(1, 1), z.roll(1, 2), asked.numbers(n, j, k, 1) * 2 - 1):
        assert (z * other).mean().abs() < 4 / z.numel() ** 0.5


def test_a_number_depends_on_seed_prompt_text_and_k_and_on_nothing_else(policy, prefix, rollouts):
    asked, other = ask(policy, prefix, rollouts), ask(policy, prefix, rollouts, seed=4)
    places = torch.arange(6)

    def numbers(asked, n, k):
        return asked.numbers(torch.tensor(n), places, k, 0)

    first = numbers(asked, 0, 0)
    assert torch.equal(first, numbers(asked, 1, 0))  # a copy
    same = (rollouts.completion_ids[2:4] == rollouts.completion_ids[2]).cumprod(1)[1].sum()
    equal = numbers(asked, 2, 0) == numbers(asked, 3, 0)
    assert equal[: int(same) + 1].all() and not equal[int(same) + 1 :].any()
    for unlike in (numbers(other, 0, 0), numbers(asked, 0, 1), numbers(asked, 4, 0)):
        assert (first != unlike).all()


def test_a_prompt_keeps_its_scores_whatever_stands_beside_it(policy, prefix, rollouts, examples):
    with torch.no_grad():
        alone = policy.prefill(collate(examples[1:2], policy.processor))
    fields = ("completion_ids", "lengths", "reasoning_start", "reasoning_end", "answer_start")
    fields += ("truncated", "rewards")
    part = dataclasses.replace(
        rollouts,
        prompt_index=torch.zeros(2, dtype=torch.long),
        **{name: getattr(rollouts, name)[2:4] for name in fields},
    )
    numbered = ask(policy, alone, part, prompt_number=torch.tensor([1]))
    together = ask(policy, prefix, rollouts)
    for one, all_ in zip(
        (*numbered.continuation_rewards(), numbered.masked_rewards()),
        (*together.continuation_rewards(), together.masked_rewards()),
        strict=True,
    ):
        assert torch.equal(one, all_[2:4])


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
    parity = dataclasses.replace(
        rollouts, reward=lambda n, completions: [float(ids.sum() % 2) for ids in completions]
    )
    own = zip(rollouts.completion_ids, rollouts.lengths, strict=True)
    parity.rewards = torch.tensor(parity.reward(range(6), [ids[:length] for ids, length in own]))
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


@pytest.mark.parametrize("most", [None, 1])
def test_completions_of_one_token_are_scored_without_a_row(policy, prefix, examples, most):
    drawn = rollout(policy, prefix, examples, 2, 1, torch.Generator().manual_seed(5), TEMPERATURE)
    asked = ask(policy, prefix, drawn, max_scored_tokens=most)
    with_, without, masked = asked.rewards()
    assert with_.shape == (6, 1, H) and not with_.any() and not without.any()
    assert torch.equal(masked, drawn.rewards[:, None]) and asked.cost.rows == 0


@pytest.mark.parametrize("pairing", ["coupled", "independent"])
def test_completions_that_begin_alike_share_their_draws_and_are_decoded_once(
    policy, prefix, rollouts, pairing
):
    asked = ask(policy, prefix, rollouts, pairing)
    assert len(asked.trajectories.hidden) == len(rollouts.prompt_index) - 1
    assert asked.first_copy.tolist() == [0, 0, 2, 3, 4, 5]
    answers = [*asked.continuation_rewards(), asked.masked_rewards()]
    assert all(torch.equal(answer[0], answer[1]) for answer in answers)
    # completions 2 and 3, made alike up to the middle of their reasoning
    alike = dataclasses.replace(rollouts, completion_ids=rollouts.completion_ids.clone())
    alike.completion_ids[3, :5] = alike.completion_ids[2, :5]
    rows = {}
    for name, which in {"both": [2, 3], "one": [2], "other": [3]}.items():
        among = torch.zeros(6, dtype=torch.bool)
        among[which] = True
        asked = ask(policy, prefix, alike, pairing, asked=among)
        asked.continuation_rewards()
        rows[name] = asked.cost.rows
    assert max(rows["one"], rows["other"]) < rows["both"] < rows["one"] + rows["other"]


def test_asking_changes_neither_rollouts_nor_prefix(policy, prefix, rollouts):
    tensors = [
        rollouts.completion_ids,
        rollouts.rewards,
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
    everything = ask(policy, prefix, rollouts, pairing)
    for found, whole in zip(
        (with_, without, masked),
        (*everything.continuation_rewards(), everything.masked_rewards()),
        strict=True,
    ):  # what a token scores does not depend on which others are asked about
        assert torch.equal(found[few.scored], whole[few.scored])


def test_independent_continuations_take_the_token_forwards_of_the_formula(
    endless, prefix, rollouts
):
    r = without_copies(rollouts)
    N, T, L = 4, 5, r.longest
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
    draws, L = 300, r.longest
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


@pytest.mark.parametrize("pairing", ["coupled", "independent"])
def test_where_no_masked_answer_differs_the_continuations_are_decoded_alone(
    policy, prefix, rollouts, pairing
):
    class Unmasked(Interventions):
        def stand_in(self, n, t):
            return self.policy.embed(self.rollouts.completion_ids[n, t])

    settings = {"num_continuations": H, "temperature": TEMPERATURE, "pairing": pairing}
    asked = Unmasked(policy, prefix, rollouts, 3, **settings)
    with_, without, masked = asked.rewards()
    alone = ask(policy, prefix, rollouts, pairing).continuation_rewards()
    assert torch.equal(with_, alone[0]) and torch.equal(without, alone[1])
    if pairing == "coupled":  # the numbers are the trajectory's own, and so is the answer
        assert torch.equal(masked, rollouts.rewards[:, None].expand_as(masked))


class RoundTrips(TorchDispatchMode):
    """Counts what makes the host wait for the device: values read, and tensors as long as values say."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "_unique2",
        "unique_dim",
        "masked_select",
        "is_nonzero",
    )

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        boolean = name in ("index", "index_put_") and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        self.count += name in self.WAITING or boolean
        return func(*args, **(kwargs or {}))


def test_the_host_waits_for_the_device_per_decoding_step_and_not_per_row(
    policy, prefix, examples, monkeypatch
):
    steps, extend = 0, Rows.extend

    def counted(self, *arguments):
        nonlocal steps
        steps += 1
        return extend(self, *arguments)

    monkeypatch.setattr(Rows, "extend", counted)
    trips_of = []
    for G in (2, 12):
        generator = torch.Generator().manual_seed(5)
        drawn = mark(rollout(policy, prefix, examples, G, 14, generator, TEMPERATURE))
        steps, trips = 0, RoundTrips()
        asked = ask(policy, prefix, drawn)
        with trips:
            asked.rewards()
        assert asked.cost.rows > 20 * G and trips.count <= 10 * steps
        trips_of.append(trips.count / steps)
    assert trips_of[1] < 1.3 * trips_of[0]  # for ten times as many rows


def test_nothing_that_a_trainer_gets_is_an_inference_tensor(policy, prefix, examples):
    """Autograd refuses to keep those: what is drawn and scored in inference mode is copied out of it."""
    rollouts = mark(rollout(policy, prefix, examples, 2, 14, torch.Generator().manual_seed(3)))
    found = causal_rewards(policy, prefix, rollouts, seed=0, num_continuations=1)
    parts = [*vars(rollouts).values(), *found, *vars(found.evidence).values()]
    tensors = [x for x in parts if isinstance(x, torch.Tensor)]
    assert len(tensors) > 10 and found.evidence.cost.rows
    assert not any(x.is_inference() for x in tensors)
