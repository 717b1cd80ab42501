"""Ways of asking are compared word by word, at what they cost."""

import pytest
import torch

from experiments import asking
from model import load_policy
from scm import CLEAR


@pytest.fixture(scope="module")
def batch(speaker):
    return asking.sample(load_policy(speaker), 0, 2, 40, CLEAR)


def test_every_reasoning_token_belongs_to_one_word_and_words_follow_each_other(batch):
    inside = batch.word[batch.word >= 0]
    assert torch.equal(batch.word >= 0, batch.rollouts.reasoning_mask)
    assert inside.unique().tolist() == list(range(len(batch.first)))
    assert torch.equal(batch.word.flatten()[batch.first], torch.arange(len(batch.first)))
    assert (inside.diff() >= 0).all()


def test_scores_of_tokens_add_up_over_a_word_and_larger_units_give_it_their_mean():
    word = torch.tensor([[-1, 0, 0, 1], [2, 2, 2, -1]])
    asked = asking.Asked(None, None, None, 0, word, torch.tensor([1, 3, 4]))
    scores = torch.tensor([[9.0, 0.5, 0.25, 1.0], [0.0, 0.25, 0.5, 9.0]])
    assert asked.of_words(scores, "token").tolist() == [0.75, 1.0, 0.75]
    assert asked.of_words(scores, 8).tolist() == [0.375, 1.0, 0.25]


def test_the_truth_is_between_0_and_1_and_asks_nothing_of_wrong_answers(batch):
    truth = asking.truths(batch, 4, 2)
    for values in truth.values():
        assert values.shape == (len(batch.first),) and values.min() >= 0 and values.max() <= 1
    wrong = (batch.rollouts.rewards == 0)[batch.first // batch.word.shape[1]]
    assert not truth["necessity"][wrong].any()


def test_every_way_is_asked_and_larger_units_and_brief_questions_cost_less(batch):
    rows = asking.asking_rows(batch, draws=4, masked_draws=1)
    cost = {(row["question"], row["way"]): row["token_forwards"] for row in rows}
    assert len(cost) == len(rows) == sum(map(len, asking.WAYS.values()))
    assert all(-1 <= row["correlation"] <= 1 and row["per_grpo_step"] > 0 for row in rows)
    masked = [cost["necessity", way] for way in ("runs of 8, brief", "runs of 8", "tokens")]
    assert masked == sorted(set(masked))
    assert cost["sufficiency", "runs of 16, brief, H 1"] < cost["sufficiency", "tokens, H 4"]


def test_spaced_tokens_are_every_so_many_th_of_each_reasoning_and_others_lie_between(batch):
    mask, word = batch.rollouts.reasoning_mask, batch.word
    asked = batch.interventions("one", **asking.WAYS["necessity"]["every 4th"])
    for n in range(len(mask)):
        assert torch.equal(asked.scored[n].nonzero(), mask[n].nonzero()[::4])
    whole = batch.interventions("one").masked_rewards()
    assert torch.equal(asked.masked_rewards()[asked.scored], whole[asked.scored])
    straight = torch.arange(word.shape[1]).expand(word.shape) * 0.5  # a line is found again
    found = asking.between(straight * asked.scored, asked.scored, mask)
    known = mask & (asked.scored.flip(1).cumsum(1).flip(1) > 0)  # up to the last that is scored
    assert torch.allclose(found[known], straight[known]) and not found[~mask].any()


def test_only_ways_that_the_csv_lacks_are_asked_and_not_of_another_warm_start(
    batch, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(asking, "warm_start", lambda work, settings: tmp_path)
    monkeypatch.setattr(asking, "load_policy", lambda start: None)
    monkeypatch.setattr(asking, "sample", lambda *_: batch)
    monkeypatch.setattr(asking, "hash_of", lambda start: "a")
    monkeypatch.setattr(asking, "DRAWS", dict.fromkeys(asking.STARTS, (2, 1)))
    path = tmp_path / "asking.csv"
    given = ["--seeds", "1", "--policies", "short", "--output", str(path)]
    every = asking.WAYS
    few = {q: {way: ways[way] for way in list(ways)[:1]} for q, ways in every.items()}
    more = {q: {way: ways[way] for way in list(ways)[:2]} for q, ways in every.items()}
    monkeypatch.setattr(asking, "WAYS", few)
    assert asking.main(given) == 0
    first = path.read_text()
    monkeypatch.setattr(asking, "WAYS", more)
    assert asking.main(given) == 0
    assert path.read_text().startswith(first)
    ways = [(row["question"], row["way"]) for row in asking.read_csv(path)]
    assert sorted(ways) == sorted((q, way) for q, ways in more.items() for way in ways)
    monkeypatch.setattr(asking, "hash_of", lambda start: "b")
    assert asking.main(given) == 2 and "another warm start" in capsys.readouterr().err


def test_bad_input_is_one_line(capsys):
    assert asking.main(["--seeds", "0"]) == 2
    assert capsys.readouterr().err == "error: --seeds must be at least 1\n"
