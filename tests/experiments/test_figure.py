"""The README's picture: one credit on a true word, one on a false word, of the same run."""

import json

import pytest
from PIL import Image

pytest.importorskip("matplotlib", reason="pip install -r experiments/requirements.txt")

from data import DataError, describe_image
from experiments import figure
from experiments.records import read_csv
from scm import Scene, Thing, question_about

SCENE = Scene((Thing("boat", "red", 0.27, 0.27, 0.4),), "sea")


def sample(words, paid, reward=1.0, image=None):
    """A completion of a question about SCENE; paid: the causal reward of each word."""
    tokens = ["<think>", *words, "</think>"]
    scores = [0.0, *paid, 0.0]
    return {
        "step": 3, "prompt": "Is there a fish?", "answer": "no", "reward": reward,
        "image": image or describe_image(question_about(SCENE, "caption", "")),
        "tokens": tokens, "reasoning": [False, *[True] * len(words), False],
        "sufficiency": scores, "necessity": scores, "causal_reward": scores, "advantage": scores,
    }  # fmt: skip


GOOD = sample([" a", " boat", ".", " fish"], [0.0, 0.5, 0.1, 0.0])
BAD = sample([" a", " fish", ".", " fish"], [0.1, 0.4, 0.0, 0.6])


def test_the_most_paid_word_before_the_full_stop_decides():
    assert figure.most_paid(BAD) == (0.4, "fish")  # the second only repeats the question
    less = sample([" a", " boat", "."], [0.0, 0.2, 0.0])
    wrong = sample([" a", " boat", "."], [0.0, 0.7, 0.0], reward=0.0)
    elsewhere = sample([" a", " boat", "."], [0.7, 0.6, 0.0])
    every = [less, wrong, elsewhere, GOOD, BAD]
    assert figure.choose(every, there=True) is GOOD
    assert figure.choose(every, there=False) is BAD


def test_a_run_without_such_a_credit_or_without_scenes_is_refused():
    with pytest.raises(DataError, match="no credit falls on a false word"):
        figure.choose([GOOD], there=False)
    with pytest.raises(DataError, match="not about scenes"):
        figure.choose([sample([" a"], [0.5], image="photo.jpg")], there=True)


def test_both_are_drawn_and_their_numbers_written(tmp_path, capsys):
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(s) + "\n" for s in (GOOD, BAD)))
    picture, scores = tmp_path / "credit.png", tmp_path / "completion.csv"
    assert figure.main([str(tmp_path), "--figure", str(picture), "--csv", str(scores)]) == 0
    grounds = []
    for path in (picture, tmp_path / "credit-dark.png"):
        with Image.open(path) as image:
            assert image.width == 1300
            grounds.append(
                image.convert("RGBA").getpixel((650, 450))[:3]
            )  # on the first card, below its text
    for ground, color in zip(grounds, [(255, 255, 255), (13, 17, 23)], strict=True):
        assert ground == pytest.approx(color, abs=1)  # of a palette of few colours
    rows = read_csv(scores)
    assert [(r["credit"], r["tokens"]) for r in rows if r["causal_reward"] in ("0.5", "0.4")] == [
        ("true", " boat"), ("false", " fish"),
    ]  # fmt: skip
    assert all(row["command"].startswith("python -m experiments.figure") for row in rows)
    assert figure.main([str(tmp_path / "none"), "--figure", str(picture)]) == 2
    assert capsys.readouterr().err.startswith("error: ")
