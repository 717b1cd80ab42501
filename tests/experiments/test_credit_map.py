"""The map's estimators against numbers by hand and against every completion there is; then the map itself."""

import itertools
import math

import pytest
import torch

from copo import copo_loss
from experiments import credit_map
from experiments.credit_map import METHODS, Method, Step, gradient, train
from experiments.records import read_csv

DECIDES = torch.tensor([True, False, True])
CHANCE = torch.tensor([0.5, 0.8, 0.6])
EVERY = torch.tensor(list(itertools.product([False, True], repeat=3)))  # (8, 3) completions


def step_of(right, chance=CHANCE):
    right = torch.as_tensor(right)
    return Step(chance.expand(len(right), 3), right, DECIDES)


def likelihood(words, chance=CHANCE):
    return math.prod(float(c if word else 1 - c) for word, c in zip(words, chance, strict=True))


def hope(beginning):
    """Chance of a right answer after these words, summed over every way to go on."""
    ends = itertools.product([False, True], repeat=3 - len(beginning))
    every = [(*beginning, *end) for end in ends]
    mass = sum(likelihood(words) for words in every)
    return sum(likelihood(words) for words in every if words[0] and words[2]) / mass


def uphill(chance=CHANCE):
    """(3,) the gradient of the chance of a right answer in the logits, by autograd."""
    logits = chance.logit().requires_grad_()
    logits.sigmoid()[DECIDES].prod().backward()
    return logits.grad


def expected_gradient(earned, chance=CHANCE):
    """(3,) of what words earn alone: in a group of one every advantage is 0."""
    step = step_of(EVERY, chance)
    mass = torch.tensor([likelihood(words, chance) for words in EVERY.tolist()])
    return (mass[:, None] * gradient(step, earned, G=1, S=len(EVERY))).sum(0)


def numbers(N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.rand(N, *shape, generator=generator)


def all_zero(N):
    """Every draw is a right word, and every continuation that can be right is."""
    return lambda *shape: torch.zeros(N, *shape)


# -- by hand ----------------------------------------------------------------------------------------
def test_the_deciding_places_are_spread_over_the_completion():
    assert credit_map.deciding(4, 0.5).tolist() == [False, True, False, True]
    assert credit_map.deciding(8, 0.25).tolist() == [False, False, False, True] * 2
    assert credit_map.deciding(32, 0.75).sum() == 24 and credit_map.deciding(5, 1.0).all()


def test_what_is_kept_and_what_lies_ahead_by_hand():
    step = step_of([[True, False, True], [True, True, False], [False, True, True]])
    assert step.kept.tolist() == [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0]]
    torch.testing.assert_close(step.ahead[0], torch.tensor([0.3, 0.6, 0.6, 1.0]))
    change, drawn = credit_map.exact_change(step, None)
    by_hand = [[0.3, 0.0, 0.4], [0.3, 0.0, -0.6], [-0.3, 0.0, 0.0]]
    torch.testing.assert_close(change, torch.tensor(by_hand))
    assert not drawn.any()


def test_the_truth_charges_idle_words_too_and_grpo_pays_no_word():
    step = step_of([[True, False, False]])
    assert credit_map.truth(step, None)[0].tolist() == [[1, -1, -1]]
    assert credit_map.nothing(step, None)[0].tolist() == [[0, 0, 0]]


def test_copo_by_hand_where_every_draw_is_right():
    step = step_of([[True, True, True], [True, False, True], [False, True, True]])
    earned, drawn = credit_map.copo(step, all_zero(3), H=2)
    # The first never leaves. The second leaves at its idle word, to no better end. The third is wrong from
    # its first word on: what leaves there is right, so no word of it was sufficient.
    necessary = [0.35, 0.0, 0.35]
    torch.testing.assert_close(earned, torch.tensor([necessary, necessary, [0.0, 0.0, 0.0]]))
    assert drawn.tolist() == [0, 2 * 2, 2 * 3]


# -- against every completion --------------------------------------------------------------------------
@pytest.mark.parametrize("words", EVERY.tolist())
def test_the_chances_are_those_of_all_ways_to_go_on(words):
    step = step_of([words])
    expected = [hope(words[:t]) for t in range(3)] + [float(words[0] and words[2])]
    torch.testing.assert_close((step.kept * step.ahead)[0], torch.tensor(expected))


@pytest.mark.parametrize("words", EVERY.tolist())
def test_sufficiency_and_its_price_are_unbiased(words):
    step, H = step_of([words] * 4000), 4
    earned, drawn = credit_map.copo(step, numbers(4000), lambda_s=1, lambda_n=0, H=H)
    odds = [1 - likelihood([word], [c]) for word, c in zip(words, CHANCE, strict=True)]
    expected = [  # the draw is the other word, the answer is wrong with that and right with this
        odds[t] * hope(words[: t + 1]) * (1 - hope([*words[:t], not words[t]])) for t in range(3)
    ]
    torch.testing.assert_close(earned.mean(0), torch.tensor(expected), atol=0.016, rtol=0)
    price = H * sum(odd * (3 - t) for t, odd in enumerate(odds))
    assert drawn.float().mean().item() == pytest.approx(price, rel=0.03)


def test_the_exact_change_alone_climbs_the_chance_of_a_right_answer():
    earned, _ = credit_map.exact_change(step_of(EVERY), None)
    torch.testing.assert_close(expected_gradient(earned), uphill())


def test_grpo_climbs_the_same_way_and_is_silent_about_idle_words():
    pairs = torch.tensor(list(itertools.product(range(8), repeat=2)))  # every group of two
    mass = torch.tensor([likelihood(words) for words in EVERY.tolist()])
    step = step_of(EVERY[pairs.flatten()])
    of_pair = gradient(step, torch.zeros(128, 3), G=2, S=64)
    expected = (mass[pairs].prod(1)[:, None] * of_pair).sum(0)
    assert expected[1].abs() < 1e-6 and expected[0] > 0.01
    torch.testing.assert_close(expected / expected[0], uphill() / uphill()[0])


@pytest.mark.parametrize("idle", [0.2, 0.5, 0.8])
def test_sufficiency_pulls_an_idle_word_towards_a_coin_flip(idle):
    chance = torch.tensor([0.5, idle, 0.6])
    earned, _ = credit_map.copo(step_of(EVERY, chance), numbers(8), 1, 0, H=20_000)
    # It is paid (1 - pi) p (1 - p), with p = 0.6 if the first word is right and 0 if not.
    expected = 0.5 * idle * (1 - idle) * (1 - 2 * idle) * 0.6 * 0.4
    assert expected_gradient(earned, chance)[1].item() == pytest.approx(expected, abs=0.001)


def test_the_gradient_is_that_of_equation_6_without_kl():
    step, earned = step_of(EVERY), torch.rand(8, 3, generator=torch.Generator().manual_seed(0))
    logits = CHANCE.logit().requires_grad_()
    logps = torch.where(EVERY, logits.sigmoid(), 1 - logits.sigmoid()).log()
    advantages = credit_map.group_advantages(step.kept[:, -1].view(2, 4)).view(8, 1) + earned
    mask = torch.ones(8, 3)
    copo_loss(logps, logps.detach(), None, advantages, mask)[0].backward()
    torch.testing.assert_close(gradient(step, earned, G=4, S=1)[0], -3 * logits.grad)  # C_i = 3


# -- the training and the map ---------------------------------------------------------------------------
SMALL = {"length": 8, "rate": 0.4}


def test_a_seed_does_not_depend_on_how_many_run_beside_it():
    for name in ("GRPO", "COPO, λ = 1, H = 1"):
        few, many = (train(METHODS[name], **SMALL, seeds=seeds) for seeds in (2, 4))
        for short, long in zip(few, many, strict=True):
            torch.testing.assert_close(short, long[:2])
    assert len(set(many.words.tolist())) > 1


def test_copo_without_weight_is_grpo_and_asking_is_paid_for():
    grpo, copo, silent = (
        train(method, **SMALL, seeds=3)
        for method in (METHODS["GRPO"], Method.copo(), Method.copo(lambda_s=0, lambda_n=0))
    )
    assert all(torch.equal(a, b) for a, b in zip(grpo, silent, strict=True))
    assert torch.equal(grpo.words, grpo.steps * 8 * 8)  # G = 8 completions of T = 8 words
    assert (copo.words > copo.steps * 8 * 8).all()


def test_a_training_that_does_not_arrive_says_so(monkeypatch):
    monkeypatch.setattr(credit_map, "LIMIT", 2)
    row = credit_map.measure("GRPO", {"length": 8, "rate": 0.01}, 2)
    assert (row["steps"], row["unfinished"]) == (2, 2)
    assert row["words"] == 2 * 8 * 8


def test_the_map_is_printed_written_and_drawn(monkeypatch, tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="pip install -r experiments/requirements.txt")
    sweeps = {
        "share of the places that decide": [{"share": 0.5}, {"share": 1.0}],
        "prompts per step": [{"prompts": 1}, {"prompts": 2}],
    }
    monkeypatch.setattr(credit_map, "CENTRE", credit_map.CENTRE | SMALL)
    for name, value in (
        ("SWEEPS", sweeps),
        ("ASIDE", []),
        ("LONG", {}),
        ("MANY", {}),
        ("BOTH", {}),
    ):
        monkeypatch.setattr(credit_map, name, value)
    assert credit_map.main([], tmp_path, seeds=2) == 0
    rows = read_csv(tmp_path / "results" / "credit_map.csv")
    names = [row["method"] for row in rows]
    assert set(names) == {*METHODS, *credit_map.MORE} and set(names[:6]) == set(METHODS)
    assert all(row["command"] == "python -m experiments.credit_map" for row in rows)
    assert all(
        row[f"{f}_ratio"] == "1"
        for row in rows
        if row["method"] == "GRPO"
        for f in ("steps", "words")
    )
    printed = capsys.readouterr().out
    assert "seeds 0 to 1" in printed and all(name in printed for name in METHODS)
    assert (tmp_path / "figures" / "credit_map.png").stat().st_size > 10_000
