"""The forms of the causal reward, against numbers worked by hand."""

from types import SimpleNamespace

import pytest
import torch

from copo import causal_completeness, necessity, sufficiency
from data import Scene, Thing, ask
from variants import FORMS, causal_rewards, truth_rewards

# Two completions of three tokens, the last of which is not reasoning; H = 2.
WITH = torch.tensor([[[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]]])
WITHOUT = torch.tensor([[[0.0, 1.0], [1.0, 1.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
OUTCOMES = torch.tensor([1.0, 0.0])
MASKED = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
ADVANTAGES = torch.tensor([0.7, -0.7])
REASONING = torch.tensor([[True, True, False], [True, True, False]])


def earned(form):
    return causal_rewards(
        form, (WITH, WITHOUT), OUTCOMES, MASKED, ADVANTAGES, REASONING, lambda_s=0.5, lambda_n=0.25
    )


def test_the_paper_s_form_is_equation_4():
    suff, nec = sufficiency(WITH, WITHOUT), necessity(OUTCOMES[:, None], MASKED)
    assert torch.equal(earned("paper"), causal_completeness(suff, nec, 0.5, 0.25))
    assert torch.allclose(earned("paper"), torch.tensor([[0.5, 0.0, 0.0], [0.0, 0.25, 0.0]]))


def test_centred_moves_credit_within_a_trajectory_and_adds_none():
    expected = torch.tensor([[0.25, -0.25], [-0.125, 0.125]])
    assert torch.allclose(earned("centred")[:, :2], expected)
    assert earned("centred").sum(1).abs().max() < 1e-6  # tokens that were not asked about earn 0


def test_signed_charges_what_caused_an_answer_below_the_group_s_mean():
    assert torch.allclose(earned("signed"), torch.tensor([[0.5, 0.0, 0.0], [0.0, -0.25, 0.0]]))


def test_difference_clamps_nothing():
    # token 1 of the first: 0.5 (1 - 0.5) + 0.25 (1 - 0); of the second: 0.5 (0 - 0.5) + 0.25 (0 - 1)
    expected = torch.tensor([[0.5, -0.25, 0.0], [-0.5, 0.25, 0.0]])
    assert torch.allclose(earned("difference"), expected)


@pytest.mark.parametrize("form", FORMS)
def test_no_form_writes_into_its_arguments(form):
    before = [x.clone() for x in (WITH, WITHOUT, OUTCOMES, MASKED, ADVANTAGES)]
    earned(form)
    for old, new in zip(before, (WITH, WITHOUT, OUTCOMES, MASKED, ADVANTAGES), strict=True):
        assert torch.equal(old, new)


def test_truth_pays_what_is_there_and_charges_what_is_not(policy):
    scene = Scene((Thing("boat", "red", 0.3, 0.3, 0.4),), "snow")
    text = "<think> I see a red boat and a blue tree. A snowman? </think> <answer> no </answer>"
    ids = torch.tensor([policy.tokenizer(text, add_special_tokens=False)["input_ids"]])
    words = [policy.text([i]).strip() for i in ids[0].tolist()]
    first, last = words.index("<think>"), words.index("</think>")
    places = torch.arange(ids.shape[1])[None]
    rollouts = SimpleNamespace(
        examples=[ask(scene, "yesno", "snowman")],
        which=torch.tensor([0]),
        completion_ids=ids,
        reasoning_mask=(places > first) & (places < last),
    )
    earned = truth_rewards(policy, rollouts, 0.5)
    assert earned.shape == ids.shape
    paid = {words[i]: earned[0, i].item() for i in earned[0].nonzero().flatten().tolist()}
    assert paid == {"boat": 0.5, "tree": -0.5}  # not the snowman, which is only asked about
