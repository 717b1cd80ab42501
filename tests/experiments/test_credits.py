"""Credit for what is named: by the truth, by agreement, by asking, by the background."""

import math
from types import SimpleNamespace

import pytest
import torch

from experiments import credits
from experiments.credits import (
    FROZEN,
    Paid,
    agreement,
    asked,
    charge_repeats,
    contrast,
    mentions_in,
    pay_mentions,
    truth,
    unmoved,
    voted,
)
from experiments.tokens import sample_batch
from interventions import Cost, Interventions
from model import load_policy
from runs import Limits, Settings
from scm import CLEAR, Scene, Thing, question_about

SETTINGS = Settings(lambda_s=0.5, lambda_n=0.25)


def score_with(scoring, policy, prefix, rollouts, settings=SETTINGS):
    generator = torch.Generator().manual_seed(3)
    return scoring(policy, prefix, rollouts, settings, generator, Limits(settings))


def completions(policy, texts):
    """Two prompts about a boat in the snow, two reasoning spans each, as far as credit looks at them."""
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
        examples=[
            question_about(scene, "yesno", "snowman"),
            question_about(scene, "number", "boat"),
        ],
        prompt_index=torch.tensor([0, 0, 1, 1]),
        completion_ids=torch.tensor(padded),
        reasoning_mask=reasoning,
        rewards=torch.tensor([1.0, 0.0, 1.0, 0.0]),
        totals=torch.tensor([1.0, 0.0, 1.0, 0.0]),
    )
    return rollouts, words


def earned_by_truth(policy, texts):
    rollouts, words = completions(policy, texts)
    named = mentions_in(policy, rollouts)
    earned = pay_mentions(
        rollouts, named, charge_repeats(named, truth(policy, None, rollouts, named, None)[0]), 0.5
    )
    return [
        dict(zip(of, row.tolist(), strict=False)) for of, row in zip(words, earned, strict=True)
    ]


def test_the_words_that_lead_to_a_mention_are_paid_for_it(policy):
    texts = ("a boat and a tree. A snowman?", "a boat and a boat.", "a tree.", "I see.")
    first, second, third, fourth = earned_by_truth(policy, texts)
    assert first["boat"] == 0.5 and first["and"] == first["tree"] == -0.5
    # not the snowman, which is only asked about, nor what stands outside the tags
    assert first["."] == first["snowman"] == first["<think>"] == first["</think>"] == 0
    assert second["and"] == second["boat"] == -0.5  # a second boat is not there
    assert third["tree"] == third["a"] == -0.5 and not any(fourth.values())


def test_truth_asks_the_policy_nothing(policy, prefix, monkeypatch):
    rollouts, _ = completions(policy, ("a boat.", "a tree.", "a boat.", "a tree."))
    monkeypatch.setattr(Interventions, "__init__", None)  # none is made
    scores = score_with(Paid(truth), policy, prefix, rollouts)
    assert scores.evidence.cost == Cost() and not scores.sufficiency.any()
    named = mentions_in(policy, rollouts)
    worth, _ = truth(policy, prefix, rollouts, named, None)
    assert worth == [1.0, -1.0, 1.0, -1.0]
    expected = pay_mentions(rollouts, named, worth, SETTINGS.lambda_s)
    assert expected.any() and torch.equal(scores.causal_rewards, expected)
    gained = scores.token_advantages - scores.advantages[:, None]
    assert torch.allclose(gained, expected, atol=1e-6)


# -- without the truth --------------------------------------------------------------------------
TEXTS = ("a boat and a tree and a tree. A snowman?", "a boat.", "a tree.", "a boat.")


def test_what_is_named_is_found_up_to_the_first_full_stop(policy):
    rollouts, words = completions(policy, TEXTS)
    found = mentions_in(policy, rollouts)
    assert [(n, c) for n, _, c in found] == [
        (0, "boat"), (0, "tree"), (0, "tree"), (1, "boat"), (2, "tree"), (3, "boat"),
    ]  # fmt: skip
    assert all(words[n][t] == category for n, t, category in found)


def test_agreement_is_the_share_of_the_others_that_name_it_too(policy):
    rollouts, _ = completions(policy, TEXTS)
    named = mentions_in(policy, rollouts)
    # a thing named twice by one completion is named by no other
    assert agreement(policy, None, rollouts, named, None) == ([1, -1, -1, 1, -1, -1], 0)
    four = SimpleNamespace(**vars(rollouts))
    four.examples, four.prompt_index = rollouts.examples[:1], torch.zeros(4, dtype=torch.long)
    worth, _ = agreement(policy, None, four, named, None)
    assert worth == pytest.approx([1 / 3, -1 / 3, -1 / 3, 1 / 3, -1 / 3, 1 / 3])
    # of the other image's completions, half name a boat and half a tree
    worth, _ = contrast(policy, None, rollouts, named, None)
    assert worth == pytest.approx([0.5, -0.5, -0.5, 0.5, -0.5, -1.0])


def test_asked_believes_what_the_policy_says_of_each_thing_once_per_image(policy, monkeypatch):
    rollouts, _ = completions(policy, TEXTS)
    questions = []

    def answer(examples):
        questions.extend((example.scene, example.question) for example in examples)
        return [
            f"<think> </think> <answer> {'yes' if 'boat' in example.question else 'no'} </answer>"
            for example in examples
        ]

    monkeypatch.setattr(policy, "answer", answer)
    prefix = SimpleNamespace(mask=torch.ones(2, 5))
    worth, tokens = asked(policy, prefix, rollouts, mentions_in(policy, rollouts), None)
    assert worth == [1, -1, -1, 1, -1, 1]
    assert [question for _, question in questions] == ["Is there a boat?", "Is there a tree?"] * 2
    assert tokens > 4 * 5
    assert asked(policy, prefix, rollouts, [], None) == ([], 0)


def test_unmoved_charges_what_a_word_loses_over_another_background(policy, monkeypatch):
    rollouts, _ = completions(policy, TEXTS)
    rollouts.completion_mask = torch.ones_like(rollouts.completion_ids, dtype=torch.bool)
    rollouts.lengths = rollouts.completion_mask.sum(1)
    named = mentions_in(policy, rollouts)
    shown = []
    monkeypatch.setattr(credits, "collate", lambda examples, _: shown.extend(examples))
    monkeypatch.setattr(policy, "prefill", lambda _: "elsewhere")

    def logps(prefix, *_):
        found = torch.full(rollouts.completion_ids.shape, -1.0)
        if prefix == "elsewhere":
            found[0] = -3.0  # completion 0 loses 2 nats per word, completion 1 gains half of one
            found[1] = -0.5
        return found, None

    monkeypatch.setattr(policy, "per_token_logps", logps)
    worth, _ = unmoved(policy, "here", rollouts, named, None)
    left = 2 * math.exp(-2) - 1
    assert worth == pytest.approx([left, left, left, 1, 1, 1])
    for example, before in zip(shown, rollouts.examples, strict=True):
        assert example.scene.things == before.scene.things
        assert example.scene.background != before.scene.background


@pytest.mark.parametrize("judge", [agreement, contrast, voted, asked, unmoved])
def test_a_credit_scores_completions_that_name_things_and_pays_reasoning_alone(judge, speaker):
    batch = sample_batch(load_policy(speaker), 0, 8, 4, CLEAR)
    assert mentions_in(batch.policy, batch.rollouts)
    scores = score_with(Paid(judge), batch.policy, batch.prefix, batch.rollouts)
    assert scores.causal_rewards.isfinite().all() and scores.causal_rewards.any()
    assert not scores.causal_rewards[~batch.rollouts.reasoning_mask].any()


def test_a_judge_that_must_not_be_talked_round_is_the_frozen_start(
    policy, prefix, rollouts, speaker, monkeypatch
):
    asked_of = []

    def judge(policy, prefix, rollouts, mentions, generator):
        asked_of.append((policy, prefix))
        return [0.0] * len(mentions), 0

    score_with(Paid(judge, speaker), policy, prefix, rollouts)
    monkeypatch.setattr(credits, "FROZEN", (judge,))
    score_with(Paid(judge, speaker), policy, prefix, rollouts)
    (training, own), (start, other) = asked_of
    assert training is policy and own is prefix
    assert start is not policy and other is not prefix
    assert voted in FROZEN and asked in FROZEN
