"""Saliency: gradients against differences, layouts against pictures, shares by hand."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from families import FAMILIES, build
from PIL import Image
from transformers import (
    Idefics3ImageProcessorPil,
    LlavaOnevisionImageProcessorPil,
    Qwen2VLImageProcessorPil,
)

import evaluate
from data import DataError, collate
from hallucination import gradients, saliency
from hallucination.files import Bad
from hallucination.gradients import paint, tiles
from hallucination.saliency import SaliencyQuestion
from model import Policy
from scm import Scene, Thing, in_words, question_about

SCENE = Scene((Thing("boat", "red", 0.27, 0.27, 0.4), Thing("car", "blue", 0.7, 0.7, 0.4)), "snow")
ANSWER = "<think> I see. </think> <answer> a boat </answer>"


# -- the gradient ------------------------------------------------------------------------------
def test_the_gradient_is_that_of_the_answer_alone_given_its_reasoning(policy):
    """log p of the answer's tokens, summed by hand over one step at a time."""
    example = question_about(SCENE, "caption", "")
    inputs = collate([example], policy.processor)
    logp = gradients._answer_logp(policy, inputs, ANSWER)
    ids = policy.tokenizer(ANSWER, add_special_tokens=False, return_tensors="pt")["input_ids"]
    logits = policy.full_logits(inputs, ids, torch.ones_like(ids))[0].log_softmax(-1)
    first = next(
        i for i in range(ids.shape[1]) if policy.text(ids[0, : i + 1]).endswith("<answer> a")
    )
    last = next(i for i in range(ids.shape[1]) if policy.text(ids[0, : i + 1]).endswith("a boat"))
    by_hand = sum(logits[i, ids[0, i]] for i in range(first, last + 1))
    assert torch.allclose(logp, by_hand, atol=1e-4)


def test_the_gradient_equals_a_difference_of_two_pixels(policy):
    example = question_about(SCENE, "caption", "")
    inputs = collate([example], policy.processor)
    pixels = inputs["pixel_values"].requires_grad_()
    (gradient,) = torch.autograd.grad(gradients._answer_logp(policy, inputs, ANSWER), pixels)
    where = gradient.abs().flatten().argmax()
    step = torch.zeros_like(pixels).flatten()
    step[where] = 0.05
    with torch.no_grad():
        up, down = (
            gradients._answer_logp(
                policy, {**inputs, "pixel_values": pixels + sign * step.view_as(pixels)}, ANSWER
            )
            for sign in (1, -1)
        )
    assert (up - down).item() / 0.1 == pytest.approx(gradient.flatten()[where].item(), rel=0.02)


def test_an_empty_answer_has_no_gradient(policy):
    with pytest.raises(ValueError, match="empty"):
        gradients.pixel_mass(
            policy, question_about(SCENE, "caption", ""), "<answer> </answer>", (48, 48)
        )


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_has_a_gradient_on_every_tile(name, policy):
    model, inputs = build(name)
    layout = SimpleNamespace(patch_size=14, merge_size=2, temporal_patch_size=2)
    processor = SimpleNamespace(tokenizer=policy.tokenizer, image_processor=layout)
    of_family = Policy(model, processor)
    pixels = inputs["pixel_values"] = inputs["pixel_values"].requires_grad_()
    ids = torch.tensor([[40, 41, 42]])
    logits = of_family.full_logits(inputs, ids, torch.ones_like(ids))
    (gradient,) = torch.autograd.grad(logits[..., 50].sum(), pixels)
    pieces = tiles(of_family, inputs, gradient, (56, 56))
    assert all(piece.sum() > 0 for piece, _ in pieces)
    total = paint(pieces, (56, 56))
    assert total.shape == (56, 56) and np.isfinite(total).all()
    assert total.sum() == pytest.approx(sum(piece.sum() for piece, _ in pieces), rel=0.05)


# -- layouts -----------------------------------------------------------------------------------
def picture(w, h):
    """A white disc at three quarters of the width and one quarter of the height, on black."""
    y, x = np.mgrid[:h, :w]
    disc = (x - 0.75 * w) ** 2 + (y - 0.25 * h) ** 2 < (0.15 * min(w, h)) ** 2
    return Image.fromarray(np.uint8(disc[..., None] * np.full(3, 255)))


def centre(mass):
    """Where the mass lies, in units of the image."""
    h, w = mass.shape
    y, x = np.mgrid[:h, :w]
    return (mass * (x + 0.5)).sum() / mass.sum() / w, (mass * (y + 0.5)).sum() / mass.sum() / h


def laid_out(processor, image, **config):
    """The picture as its processor lays it out, put back: pixels stand in for their gradient."""
    policy = SimpleNamespace(
        processor=SimpleNamespace(image_processor=processor),
        model=SimpleNamespace(config=SimpleNamespace(**config)),
    )
    inputs = processor([image], return_tensors="pt", do_normalize=False)
    return paint(tiles(policy, inputs, inputs["pixel_values"], image.size), image.size)


@pytest.mark.parametrize("size", [(168, 112), (112, 224)])
def test_qwens_patches_go_back_to_their_places(size):
    processor = Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=10**6, do_normalize=False)
    mass = laid_out(processor, picture(*size))
    assert centre(mass) == pytest.approx((0.75, 0.25), abs=0.01)
    rows = np.asarray(picture(*size), float)[..., 0] / 255
    assert np.abs(mass / mass.max() - rows).mean() < 0.02  # the picture itself


@pytest.mark.parametrize("size", [(160, 90), (90, 160), (100, 100)])
def test_idefics_tiles_and_overview_go_back_to_their_places(size):
    processor = Idefics3ImageProcessorPil(
        size={"longest_edge": 128}, max_image_size={"longest_edge": 32}, do_normalize=False
    )
    assert centre(laid_out(processor, picture(*size))) == pytest.approx((0.75, 0.25), abs=0.02)


@pytest.mark.parametrize("size", [(160, 90), (90, 160), (100, 100)])
def test_llava_tiles_on_padding_go_back_to_their_places(size):
    pinpoints = [[32, 64], [64, 32], [64, 64], [96, 32]]
    processor = LlavaOnevisionImageProcessorPil(
        size={"height": 32, "width": 32}, image_grid_pinpoints=pinpoints, do_normalize=False
    )
    mass = laid_out(processor, picture(*size), image_grid_pinpoints=pinpoints)
    assert centre(mass) == pytest.approx((0.75, 0.25), abs=0.02)


def test_a_centre_crop_lies_in_the_middle_and_nothing_beside_it():
    processor = SimpleNamespace(do_center_crop=True)
    policy = SimpleNamespace(processor=SimpleNamespace(image_processor=processor))
    mass = paint(tiles(policy, {}, torch.ones(1, 3, 8, 8), (40, 20)), (40, 20))
    assert mass[:, :9].sum() == mass[:, 31:].sum() == 0 and mass[:, 11:29].min() > 0
    assert mass.sum() == pytest.approx(3 * 64, rel=0.02)


def test_gradients_are_of_pixels_not_of_normalised_values():
    processor = SimpleNamespace(do_normalize=True, image_std=[0.5, 0.25, 1.0])
    policy = SimpleNamespace(processor=SimpleNamespace(image_processor=processor))
    ((mass, _),) = tiles(policy, {}, -torch.ones(1, 3, 1, 1), (1, 1))
    assert mass[0, 0] == 1 / 0.5 + 1 / 0.25 + 1


# -- shares ------------------------------------------------------------------------------------
def test_background_share_by_hand(monkeypatch, policy):
    objects = np.array([[True, False], [False, False]])
    masses = {"a": [[6, 1], [1, 2]], "b": [[0, 4], [0, 4]], "c": [[9, 0], [0, 1]]}
    monkeypatch.setattr(
        gradients, "pixel_mass", lambda policy, example, text, *_: np.array(masses[text], float)
    )
    asked = [SaliencyQuestion({"question_id": i, "image": i // 2}, None, objects) for i in range(3)]
    figures, kept = saliency.score(policy, asked, ["a", "b", "c"], True, Bad())
    # image 0: shares 0.4 and 1, mean 0.7; image 1: 0.1.  mean 0.4, sd sqrt(0.18), n 2
    assert figures["n"] == 2 and figures["background_area"] == 0.75
    assert figures["background_share"] == pytest.approx(0.4)
    half = 1.96 * 0.18**0.5 / 2**0.5
    assert figures["background_share_interval"] == pytest.approx([0.4 - half, 0.4 + half])
    assert kept[1].sum() == 8
    assert saliency.normal_interval([0.5]) == (0.5, None)


def test_the_words_of_a_description_carry_the_mass_of_their_tokens(policy):
    example = in_words(question_about(SCENE, "yesno", "car"))
    words = gradients.word_mass(policy, example, "<answer> yes </answer>")
    assert " ".join(word for word, _ in words) == (
        "the background is snow i see a red boat and a blue car"
    )
    assert all(mass > 0 for _, mass in words)


def test_words_that_bear_on_a_question():
    def bearing(kind):
        return saliency.bearing_words(question_about(SCENE, kind, "car"))

    assert bearing("yesno") == {"car"} and bearing("choice") == {"car", "blue"}
    assert bearing("number") == bearing("caption") == {"car", "blue", "boat", "red"}


def test_a_model_that_needs_an_image_cannot_be_asked_in_words(policy):
    model, _ = build("instructblip")
    blind = Policy(model, policy.processor)
    with pytest.raises(DataError, match="without an image"):
        gradients.word_mass(blind, in_words(question_about(SCENE, "yesno", "car")), "yes")


# -- the command -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def model(policy, tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    policy.save(folder)
    return str(folder)


def saliency_of(tmp_path, *arguments):
    figures = tmp_path / "figures.json"
    assert evaluate.main(["saliency", *arguments, "--json", str(figures)]) == 0
    return json.loads(figures.read_text())


def test_models_side_by_side_on_scenes_and_in_words(model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # answers are kept under runs/answers
    drawn = tmp_path / "overlays.png"
    both = ["--model", model, "--compare", f"{model}/", "--scenes", "2", "--words"]
    both += ["--max-new-tokens", "8", "--figure", str(drawn)]
    figures = saliency_of(tmp_path, *both)
    one, two = figures.values()
    assert one == two and 0 < one["background_share"] < 1 and 0 < one["idle_words_share"] < 1
    with Image.open(drawn) as image:
        assert image.size[0] > 100
    assert "background share" in capsys.readouterr().out


def test_on_coco_batches_of_one_and_of_sixteen_give_the_same(model, tmp_path):
    images = tmp_path / "val2014"
    images.mkdir()
    annotations, questions = [], []
    for i, side in enumerate((40, 64), 1):
        name = f"COCO_val2014_{i:012d}.jpg"
        SCENE.render(side).save(images / name)
        annotations.append(
            {"id": i, "image_id": i, "category_id": 9, "bbox": [2, 2, 20, 20], "iscrowd": 0}
        )
        questions.append(
            {"question_id": i, "image": name, "text": "Is there a boat?", "label": "yes"}
        )
    coco = tmp_path / "instances.json"
    coco.write_text(
        json.dumps(
            {
                "images": [
                    {"id": i, "file_name": q["image"], "width": side, "height": side}
                    for i, side, q in zip((1, 2), (40, 64), questions, strict=True)
                ],
                "annotations": annotations,
                "categories": [{"id": 9, "name": "boat"}],
            }
        )
    )
    (tmp_path / "q.json").write_text("".join(json.dumps(q) + "\n" for q in questions))
    results = []
    for size in ("1", "16"):
        asked = ["--model", model, "--questions", str(tmp_path / "q.json"), "--coco", str(coco)]
        asked += ["--images", str(images), "--batch-size", size, "--max-new-tokens", "8"]
        results.append(saliency_of(tmp_path, *asked, "--save", str(tmp_path / f"{size}.jsonl")))
    assert results[0] == results[1] and results[0]["n"] == 2
    area = ((1 - 400 / 1600) + (1 - 400 / 4096)) / 2
    assert results[0]["background_area"] == pytest.approx(area, abs=0.01)
