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


def completions(policy, texts):
    """Two prompts about a boat in the snow, two reasoning spans each, as far as `truth` looks at them."""
    scene = Scene((Thing("boat", "red", 0.3, 0.3, 0.4),), "snow")
    ids = [
        policy.tokenizer(f"<think> {text} </think>", add_special_tokens=False)["input_ids"]
        for text in texts
    ]
    words = [[policy.text([i]).strip() for i in row] for row in ids]
    C = max(map(len, ids))
    reasoning = torch.zeros(4, C, dtype=torch.bool)
    for mask, row in zip(reasoning, words, strict=True):
        mask[row.index("<think>") + 1 : row.index("</think>")] = True
    padded = [row + [policy.tokenizer.pad_token_id] * (C - len(row)) for row in ids]
    rollouts = SimpleNamespace(
        examples=[ask(scene, "yesno", "snowman"), ask(scene, "number", "boat")],
        which=torch.tensor([0, 0, 1, 1]),
        completion_ids=torch.tensor(padded),
        reasoning_mask=reasoning,
    )
    earned = truth_rewards(policy, rollouts, 0.5)
    return [
        dict(zip(of, row.tolist(), strict=False)) for of, row in zip(words, earned, strict=True)
    ]


def test_truth_pays_a_token_for_what_it_and_those_after_it_name(policy):
    texts = ("a boat and a tree. A snowman?", "a boat.", "a tree.", "a boat.")
    first, second, third, fourth = completions(policy, texts)
    # worth 1, -1, 1 (not the snowman, which is only asked about): mean 1/3, deviation 2 / sqrt 3
    boat, tree = 0.5 * (2 / 3) / 1.1547, 0.5 * (-4 / 3) / 1.1547
    assert first["boat"] == pytest.approx(boat + tree, abs=1e-3)
    assert first["and"] == first["tree"] == pytest.approx(tree, abs=1e-3)
    assert first["snowman"] == first["<think>"] == first["</think>"] == 0
    assert second["boat"] == second["a"] == pytest.approx(boat, abs=1e-3) and second["."] == 0
    # the other prompt's worth is -1, 1: mean 0, deviation sqrt 2
    assert third["tree"] == -fourth["boat"] == pytest.approx(-0.5 / 1.4142, abs=1e-3)


def test_truth_is_silent_where_all_mentions_are_right_or_there_is_but_one(policy):
    found = completions(policy, ("a boat.", "a boat and a boat.", "a tree.", "I see."))
    assert all(not any(of_text.values()) for of_text in found)
