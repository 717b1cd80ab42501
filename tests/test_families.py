"""Every family on the road that a user takes: a folder, train.py, evaluate.py, the folder again."""

import dataclasses
import functools
import json
import random

import pytest
import torch
from folders import FAMILIES

import evaluate
import train
from data import collate
from hallucination.saliency import saliency_sheet
from model import load_policy
from scm import sample_example


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request, folder_of):
    return folder_of(request.param)


@pytest.fixture(scope="module")
def of_family(folder):
    return load_policy(folder)


def pictures():
    """Three questions of different lengths about images of different sizes and shapes."""
    rng = random.Random(1)
    examples = [sample_example(rng) for _ in range(3)]
    boxes = ((40, (0, 0, 40, 40)), (64, (0, 0, 64, 40)), (48, (0, 0, 30, 48)))
    images = [
        example.scene.render(side).crop(box)
        for example, (side, box) in zip(examples, boxes, strict=True)
    ]
    return [
        dataclasses.replace(example, image=image)
        for example, image in zip(examples, images, strict=True)
    ]


def test_log_probabilities_of_a_batch_equal_those_one_by_one_and_those_without_a_cache(of_family):
    examples, which = pictures(), torch.arange(3)
    ids = torch.randint(10, 300, (3, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    with torch.no_grad():
        prefix = of_family.prefill(collate(examples, of_family.processor))
        batch, _ = of_family.per_token_logps(prefix, which, ids, mask)
        plain, _ = of_family.full_per_token_logps(examples, which, ids, mask)
        alone = [
            of_family.per_token_logps(
                of_family.prefill(collate([example], of_family.processor)),
                which[:1], ids[i : i + 1], mask[i : i + 1],
            )[0]
            for i, example in enumerate(examples)
        ]  # fmt: skip
        turned = [dataclasses.replace(e, image=e.image.rotate(180)) for e in examples]
        other, _ = of_family.full_per_token_logps(turned, which, ids, mask)
    assert torch.allclose(batch, plain, atol=1e-4)
    assert torch.allclose(batch, torch.cat(alone), atol=1e-4)
    assert (other - plain).abs().max() > 1e-3  # the image matters


def test_two_steps_of_training_a_folder_that_loads_again_and_an_evaluation(
    folder, tmp_path, monkeypatch
):
    # Random models earn nothing; a reward of the text alone gives them something to learn.
    monkeypatch.setattr(train, "outcome_reward", lambda text, example: len(text) % 3 / 2)
    # Of the page's 30 scenes with a gradient each, four take the same road.
    monkeypatch.setattr(train, "saliency_sheet", functools.partial(saliency_sheet, count=4))
    run = tmp_path / "run"
    flags = ["--model", folder, "--output", str(run), "--steps", "2", "--save-steps", "1"]
    flags += ["--batch-size", "2", "--num-generations", "3", "--max-completion-length", "8"]
    flags += ["--temperature", "5"]  # whatever the model's weights, its completions differ
    assert train.main([*flags, "--eval-scenes", "1", "--learning-rate", "1e-3"]) == 0
    assert len((run / "metrics.csv").read_text().splitlines()) == 3

    before, after = load_policy(folder), load_policy(run / "checkpoint")
    weights = zip(before.model.named_parameters(), after.model.parameters(), strict=True)
    moved = {name for (name, old), new in weights if not torch.equal(old, new)}
    assert any("layers.0.mlp" in name for name in moved)
    example = pictures()[:1]
    assert load_policy(run / "checkpoint").answer(example, 4) == after.answer(example, 4)

    figures = tmp_path / "figures.json"
    asked = ["scenes", "--model", str(run / "checkpoint"), "--scenes", "1", "--max-new-tokens", "4"]
    asked += ["--save", str(tmp_path / "answers.jsonl"), "--json", str(figures)]
    assert evaluate.main(asked) == 0
    assert 0 <= json.loads(figures.read_text())["independent"]["accuracy"] <= 1


def test_where_an_answer_comes_from(of_family):
    from hallucination import gradients

    for example in pictures():
        mass = gradients.pixel_mass(of_family, example, "<answer> a boat </answer>", (32, 24))
        assert mass.shape == (24, 32) and (mass >= 0).all() and mass.sum() > 0
