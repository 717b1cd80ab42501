"""Rollouts find the reasoning on token ids and pay the answer."""

import pytest
import torch

from rollouts import _token_span, rollout


def ids_of(policy, text):
    return torch.tensor(policy.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_reasoning_is_between_the_tags_and_the_answer_after_them(policy):
    text = "<think> I see a red boat. </think> <answer> yes </answer>"
    ids = ids_of(policy, text)
    start, end, answer = _token_span(policy, ids, policy.text(ids))
    assert policy.text(ids[start:end]) == " I see a red boat. "
    assert policy.text(ids[answer:]) == " <answer> yes </answer>"


@pytest.mark.parametrize(
    "text", ["I see a boat", "<think> I see", "<think></think> <answer> no </answer>", "</think> a"]
)
def test_without_a_closed_span_there_are_no_reasoning_tokens(policy, text):
    ids = ids_of(policy, text)
    assert _token_span(policy, ids, policy.text(ids)) == (0, 0, 0)


def test_tokens_that_hold_a_part_of_a_tag_are_not_reasoning(policy):
    # spelt byte by byte, as a tokenizer without these tags spells them
    ids = torch.cat(
        [
            ids_of(policy, piece)
            for piece in ("<", "think", ">", " a", " b", "</", "think", ">", " c")
        ]
    )
    text = policy.text(ids)
    assert text == "<think> a b</think> c"
    start, end, answer = _token_span(policy, ids, text)
    assert policy.text(ids[start:end]) == " a b" and policy.text(ids[answer:]) == " c"


def sample(policy, prefix, examples, seed):
    return rollout(
        policy, prefix, examples, 4, 12, torch.Generator().manual_seed(seed), temperature=1.5
    )


def test_the_same_seed_repeats_and_completions_of_a_group_differ(policy, prefix, examples):
    a, b, c = (sample(policy, prefix, examples, seed) for seed in (0, 0, 1))
    assert torch.equal(a.completion_ids, b.completion_ids) and torch.equal(a.rewards, b.rewards)
    assert not torch.equal(a.completion_ids, c.completion_ids)
    assert len({tuple(row.tolist()) for row in a.completion_ids[:4]}) > 1


def test_completions_stand_in_the_order_of_their_prompts_and_masks_keep_the_end(
    policy, prefix, examples
):
    r = sample(policy, prefix, examples, 0)
    assert r.prompt_index.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert r.completion_mask.sum(1).tolist() == r.lengths.tolist()
    for n in range(12):
        last = int(r.completion_ids[n, r.lengths[n] - 1])
        assert bool(r.truncated[n]) == (last not in policy.eos_ids.tolist())
        assert r.truncated[n] <= (r.lengths[n] == 12)
    assert not (r.reasoning_mask & ~r.completion_mask).any()
