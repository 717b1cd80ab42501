"""Cheaper questions for long reasoning: each against the plain slow way, and when they are asked."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from conftest import TEMPERATURE, H, ask, fingerprint, without_copies

import reference
from gpu import long
from gpu.long import Brief, ways_of_asking
from interventions import Interventions


@pytest.mark.parametrize("pairing", ["coupled", "independent"])
def test_an_answer_at_once_closes_the_beginning_with_the_trajectory_s_own_tag(
    policy, prefix, rollouts, prompts, pairing
):
    asked = ask(policy, prefix, rollouts, pairing, way=Brief)
    with_, without = asked.continuation_rewards()
    told = 0
    for n, t in rollouts.reasoning_mask.nonzero().tolist():
        ids = rollouts.completion_ids[n, : rollouts.lengths[n]]
        closing = ids[rollouts.reasoning_end[n] : rollouts.answer_start[n]]
        for found, j in ((with_, t + 1), (without, t)):
            begun = torch.cat([ids[:j], closing])
            for k in range(H):
                at = torch.tensor(0 if pairing == "coupled" else j)
                steps = torch.arange(rollouts.longest)
                numbers = asked.numbers(torch.tensor(n), at, k, steps).roll(len(begun))
                start = int(rollouts.answer_start[n])
                left = min(2 * (len(ids) - start), rollouts.longest - start)
                numbers = numbers[: len(begun) + left]
                prompt = prompts[int(rollouts.prompt_index[n])]
                done = reference.complete(policy, prompt, begun, numbers, TEMPERATURE)
                assert found[n, t, k] == fingerprint(done)
                told += found[n, t, k] != rollouts.rewards[n]
    assert told


def test_a_token_hidden_from_the_answer_is_what_a_mask_of_attention_hides(
    policy, prefix, rollouts, prompts, monkeypatch
):
    """The plain way: everything through the whole model, with that token's column ruled out."""
    asked = ask(policy, prefix, rollouts, way=Brief, unit=2)
    masked = asked.masked_rewards()
    changed = 0
    for n, t in asked.heads.nonzero().tolist():
        end, start = int(asked.units[1][n, t]), int(rollouts.reasoning_end[n])
        prompt = prompts[int(rollouts.prompt_index[n])]
        P = prompt["input_ids"].shape[1]

        def full_logits(prompt, ids, mask, P=P, t=t, end=end, start=start):
            inputs = policy.quirks.append(dict(prompt), ids, mask)
            seen = torch.ones(P + ids.shape[1], P + ids.shape[1]).tril().bool()
            seen[P + start :, P + t : P + end] = False
            inputs["attention_mask"] = torch.where(seen, 0.0, torch.finfo().min)[None, None]
            logits = policy.model(**inputs, use_cache=False).logits[:, P - 1 : -1]
            return policy._allowed(logits)

        with monkeypatch.context() as patch:
            patch.setattr(policy, "full_logits", full_logits)
            answer = reference.complete(
                policy,
                prompt,
                rollouts.completion_ids[n, : rollouts.answer_start[n]],
                asked.own_numbers[n],
                TEMPERATURE,
            )
        assert (masked[n, t:end] == fingerprint(answer)).all()
        changed += masked[n, t] != rollouts.rewards[n]
    assert changed


def test_answering_at_once_and_hiding_run_only_closing_tags_and_answers_again(
    endless, prefix, rollouts
):
    r = without_copies(rollouts)
    N, T, L = 4, 5, r.longest
    tag, A = 1, L - int(r.answer_start[0])
    asked = ask(endless, prefix, r, way=Brief)
    told = len(asked.trajectories.hidden) * (r.completion_ids.shape[1] - 1)
    asked.continuation_rewards()
    # T + 1 beginnings: the tag once, then H answers, of which the first token is free
    assert asked.cost.token_forwards - told == N * (T + 1) * (tag + H * (A - 1))
    before = asked.cost.token_forwards
    asked.masked_rewards()
    drafts = N * T * (r.completion_ids.shape[1] - 1 - 7)
    assert drafts <= asked.cost.token_forwards - before <= drafts + N * T * (A - 1)


@pytest.mark.parametrize(
    ("lengths", "who", "unit"),
    [
        ((24, 24, 0), Interventions, "token"),  # the one without reasoning does not count
        ((24, 25), Brief, 2),
        ((512,), Brief, 22),
        ((), Interventions, "token"),
    ],
)
def test_what_is_affordable_goes_by_the_mean_length_of_the_reasoning(lengths, who, unit):
    mask = torch.arange(600) < torch.tensor(lengths)[:, None]
    ways = ways_of_asking(SimpleNamespace(reasoning_mask=mask), "auto", 4)
    H = 1 if who is Brief else 4
    assert ways == {"interventions": who, "unit": unit, "num_continuations": H}


def test_another_unit_is_asked_the_paper_s_questions_however_long_the_reasoning(
    rollouts, monkeypatch
):
    monkeypatch.setattr(long, "MOST_UNITS", 1)
    for unit in ("token", "word", "4"):
        ways = ways_of_asking(rollouts, unit, 4)
        assert ways == {"interventions": Interventions, "unit": unit, "num_continuations": 4}
    assert ways_of_asking(rollouts, "auto", 4)["interventions"] is Brief


def test_without_reasoning_nothing_is_asked(policy, prefix, rollouts):
    none = torch.zeros(len(rollouts.lengths), dtype=torch.bool)
    asked = ask(policy, prefix, rollouts, way=Brief, asked=none)
    with_, without, masked = asked.rewards()
    assert not with_.any() and not without.any() and asked.cost.rows == 0
    assert torch.equal(masked, rollouts.rewards[:, None].expand_as(masked))


@pytest.mark.parametrize("pairing", ["coupled", "independent"])
def test_completions_cut_off_with_their_closing_tag_have_no_answer_that_could_break(
    policy, prefix, rollouts, pairing
):
    cut = dataclasses.replace(
        rollouts,
        completion_ids=rollouts.completion_ids[:, :8],
        lengths=torch.full((6,), 8),  # the tag is in place 7
        longest=8,
    )
    asked = ask(policy, prefix, cut, pairing, way=Brief, unit=2)
    *_, masked = asked.rewards()
    assert torch.equal(masked, cut.rewards[:, None].expand_as(masked))
