"""The forms of the causal reward, against numbers worked by hand."""

import dataclasses

import pytest
import torch

import train
from copo import causal_completeness, inject, necessity, sufficiency
from experiments.variants import SecondBest, centred, difference, score_as, signed
from interventions import Interventions
from rollouts import Cost, Evidence
from runs import Limits, Settings
from train import Scores

# Two completions of three tokens, the last of which is not reasoning; H = 2.
WITH = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
WITHOUT = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
OUTCOMES = torch.tensor([1.0, 0.0])
MASKED = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
ADVANTAGES = torch.tensor([0.7, -0.7])
REASONING = torch.tensor([[True, True, False], [True, True, False]])
SETTINGS = Settings(lambda_s=0.5, lambda_n=0.25, num_continuations=2, temperature=1.5)


def scores_by_hand() -> Scores:
    suff, nec = sufficiency(WITH, WITHOUT), necessity(OUTCOMES[:, None], MASKED)
    causal = causal_completeness(suff, nec, SETTINGS.lambda_s, SETTINGS.lambda_n)
    evidence = Evidence(WITH, WITHOUT, MASKED, REASONING, True, Cost())
    return Scores(suff, nec, causal, ADVANTAGES, inject(ADVANTAGES, causal, REASONING), evidence)


def earned(form):
    return form(scores_by_hand(), None, SETTINGS)


def test_the_paper_s_form_is_equation_4():
    expected = torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.25, 0.0]])
    assert torch.allclose(scores_by_hand().causal_rewards, expected)


def test_centred_moves_causal_reward_within_a_completion_and_adds_none():
    expected = torch.tensor([[0.25, -0.25], [-0.125, 0.125]])
    assert torch.allclose(earned(centred)[:, :2], expected)
    assert earned(centred).sum(1).abs().max() < 1e-6  # tokens that were not asked about earn 0


def test_signed_charges_what_caused_an_answer_below_the_group_s_mean():
    assert torch.allclose(earned(signed), torch.tensor([[0.5, 0.0, 0.0], [0.0, -0.25, 0.0]]))


def test_difference_clamps_nothing():
    # token 1 of the first: 0.5 (1 - 0.5) + 0.25 (1 - 0); of the second: 0.5 (0 - 0.5) + 0.25 (0 - 1)
    expected = torch.tensor([[0.5, -0.25, 0.0], [-0.5, 0.25, 0.0]])
    assert torch.allclose(earned(difference), expected)


@pytest.mark.parametrize("form", [centred, signed, difference])
def test_no_form_writes_into_its_arguments(form):
    given = (WITH, WITHOUT, OUTCOMES, MASKED, ADVANTAGES, REASONING)
    before, scores = [x.clone() for x in given], scores_by_hand()
    paper = scores.causal_rewards.clone()
    form(scores, None, SETTINGS)
    assert all(torch.equal(old, new) for old, new in zip(before, given, strict=True))
    assert torch.equal(scores.causal_rewards, paper)


# -- scoring ------------------------------------------------------------------------------------
def score_with(scoring, policy, prefix, rollouts, settings=SETTINGS):
    generator = torch.Generator().manual_seed(3)
    return scoring(policy, prefix, rollouts, settings, generator, Limits(settings))


def test_a_form_is_paid_on_what_the_paper_s_questions_found(policy, prefix, rollouts):
    paper = score_with(train.score, policy, prefix, rollouts)
    found = score_with(score_as(difference), policy, prefix, rollouts)
    assert torch.equal(found.sufficiency, paper.sufficiency)
    assert torch.equal(found.necessity, paper.necessity)
    assert torch.equal(found.causal_rewards, difference(paper, rollouts, SETTINGS))
    assert not torch.equal(found.causal_rewards, paper.causal_rewards)
    gained = found.token_advantages - found.advantages[:, None]
    expected = torch.where(rollouts.reasoning_mask, found.causal_rewards, 0.0)
    assert torch.allclose(gained, expected, atol=1e-6)


def test_another_mask_changes_necessity_alone(policy, prefix, rollouts):
    settings = dataclasses.replace(SETTINGS, lambda_s=0.5)
    zero = score_with(score_as(difference), policy, prefix, rollouts, settings)
    other = score_with(score_as(difference, SecondBest), policy, prefix, rollouts, settings)
    assert torch.equal(zero.sufficiency, other.sufficiency)
    assert not torch.equal(zero.necessity, other.necessity)


def test_the_second_best_is_the_likeliest_of_the_other_tokens(policy, prefix, rollouts):
    asked = SecondBest(policy, prefix, rollouts, 0)
    n, t = rollouts.reasoning_mask.nonzero(as_tuple=True)
    own = rollouts.completion_ids[n, t]
    best, second = policy.logits(asked.hidden(n, t)).topk(2).indices.unbind(1)
    expected = torch.where(best == own, second, best)
    assert (expected != own).all() and (best == own).any()
    assert torch.equal(asked.stand_in(n, t), policy.embed(expected))
    assert not Interventions(policy, prefix, rollouts, 0).stand_in(n, t).any()
