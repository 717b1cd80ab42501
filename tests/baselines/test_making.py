"""Pairs are made batch by batch, each from its own random numbers, and kept: a stop changes none."""

import functools
import json

import pytest
import torch

from baselines import making
from baselines.making import PAIRS, make_pairs, pairs_of, prompts
from data import DataError
from model import load_policy
from runs import Settings

SCENES = Settings(max_completion_length=40, fog=0.9)
Method = functools.partial(making.Method, prompts_at_once=4)


@pytest.fixture(scope="module")
def talker(speaker):
    return load_policy(speaker)


def what(pairs):
    return [
        (pair.example.question, pair.example.scene, pair.chosen, pair.rejected) for pair in pairs
    ]


@pytest.mark.parametrize(
    "method",
    [
        Method("hadpo"),
        Method("chair", num_samples=3, temperature=1.5),
        Method("povid"),
        Method("csr"),
        Method("csr", judge="oracle"),
    ],
    ids=lambda method: f"{method.pairs} {method.judge}",
)
def test_a_batch_gives_the_same_pairs_of_its_own_prompts_every_time(talker, method):
    found = []
    for number, examples in zip(range(3), prompts(method, SCENES), strict=False):
        pairs = pairs_of(talker, examples, method, SCENES, number)
        assert what(pairs) == what(pairs_of(talker, examples, method, SCENES, number))
        assert all(any(pair.example is example for example in examples) for pair in pairs)
        assert all(pair.chosen != pair.rejected for pair in pairs)
        found += pairs
    assert found
    assert {e.kind for e in examples} <= {"caption"} or method.pairs == "hadpo"


def test_pairs_that_are_on_disk_are_not_made_again(talker, tmp_path, monkeypatch):
    method = Method("povid", num_pairs=10)
    whole = make_pairs(talker, method, SCENES, tmp_path)
    assert len(whole) == 10
    path = tmp_path / PAIRS
    lines = path.read_text().splitlines()
    assert [json.loads(line)["prompts"] for line in lines] == [4, 4, 4]
    path.write_text(lines[0] + "\n" + lines[1] + "\n" + lines[2][:30])  # cut short by a kill
    made, real = [], making.pairs_of
    monkeypatch.setattr(making, "pairs_of", lambda *args: made.append(args[4]) or real(*args))
    assert what(make_pairs(talker, method, SCENES, tmp_path)) == what(whole)
    assert made == [2] and path.read_text().splitlines() == lines


def test_prompts_that_give_too_few_pairs_are_given_up(talker, tmp_path, monkeypatch):
    monkeypatch.setattr(making, "pairs_of", lambda *_: [])
    with pytest.raises(
        DataError, match="100 prompts gave 0 pairs of 2: lower --num-pairs, or raise"
    ):
        make_pairs(talker, Method("chair", num_pairs=2), SCENES, tmp_path)


def test_captions_of_a_file_are_asked_once_and_other_kinds_left_out(talker, tmp_path):
    from scm import CATEGORIES

    rows = [{"image": "a.png", "question": "Describe it.", "answer": name, "kind": "caption",
             "objects": [name]} for name in CATEGORIES[:6]]  # fmt: skip
    rows.append({"image": "a.png", "question": "Is there a boat?", "answer": "no"})
    data = tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    next(prompts(Method("povid"), SCENES))[0].open_image().save(tmp_path / "a.png")
    settings = Settings(max_completion_length=40, data=data, images=tmp_path)
    for method in (
        Method("chair", num_samples=3, temperature=1.5),
        Method("csr", judge="oracle"),
        Method("hadpo"),
        Method("povid"),
    ):
        batches = list(prompts(method, settings))
        assert [len(batch) for batch in batches] == [4, 2]
        pairs_of(talker, batches[1], method, settings, 1)
    data.write_text(json.dumps(rows[-1]) + "\n")
    with pytest.raises(DataError, match="no line has kind caption and objects"):
        next(prompts(Method("chair"), settings))


def test_texts_that_were_cut_off_make_no_pairs(talker):
    short = Settings(max_completion_length=8)
    for method in (Method("hadpo"), Method("chair"), Method("csr")):
        assert pairs_of(talker, next(prompts(method, short)), method, short, 0) == []


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pairs": "dpo"}, "--pairs must be one of hadpo, chair, povid, csr, got 'dpo'"),
        ({"num_pairs": 0}, "--num-pairs is 0, must be at least 1"),
        ({"beta": 0.0}, "--beta is 0.0, must be at least"),
        ({"beta": float("nan")}, "--beta is nan"),
        ({"temperature": 0.0}, "--temperature is 0.0"),
        ({"num_samples": 1}, "--num-samples is 1, must be at least 2"),
        ({"noise_step": 1000}, "--noise-step is 1000, must be between 0 and 999"),
        ({"stage": 2}, "--stage 2 is POVID's: it does not go with --pairs chair"),
    ],
)
def test_values_out_of_range_are_refused(wrong, message):
    with pytest.raises(DataError, match=message):
        Method(**{"pairs": "chair"} | wrong)


def test_making_pairs_moves_no_weight(talker):
    before = {name: weight.clone() for name, weight in talker.model.state_dict().items()}
    for name in ("hadpo", "csr"):
        method = Method(name)
        pairs_of(talker, next(prompts(method, SCENES)), method, SCENES, 0)
    assert all(torch.equal(weight, before[n]) for n, weight in talker.model.state_dict().items())
