"""POVID: one error is put in by rule; the second stage is its equations, worked by hand."""

import dataclasses
import random

import pytest
import torch

from baselines import povid
from baselines.povid import injected_pair, next_logits, noised, noised_bytes, own_logps
from baselines.preference import dpo_loss, povid_loss
from data import Example, collate
from scm import Scene, Thing, question_about, sample_example

BOAT, FISH = Thing("boat", "blue", 0.3, 0.3, 0.4), Thing("fish", "red", 0.7, 0.7, 0.4)


# -- stage 1 ----------------------------------------------------------------------------------------
def test_the_absent_home_category_is_named_beside_what_is_there():
    example = question_about(Scene((BOAT,), "reef"), "caption", "")
    pair = injected_pair(example, random.Random(0))
    assert pair.chosen == "<think> I see a blue boat. </think> <answer> a blue boat </answer>"
    caption = pair.rejected.split("<answer> ")[1].removesuffix(" </answer>")
    assert caption.startswith("a blue boat and a") and caption.endswith(" fish")
    assert pair.rejected == f"<think> I see {caption}. </think> <answer> {caption} </answer>"


def test_where_the_home_category_is_there_one_colour_is_wrong():
    example = question_about(Scene((BOAT, FISH), "reef"), "caption", "")
    for seed in range(20):
        pair = injected_pair(example, random.Random(seed))
        right, wrong = pair.chosen.split(), pair.rejected.replace(" an ", " a ").split()
        changed = [(a, b) for a, b in zip(right, wrong, strict=True) if a != b]
        assert len(set(changed)) == 1 and changed[0][0] in ("blue", "red")
        assert injected_pair(example, random.Random(seed)) == pair


def test_an_error_needs_a_scene_that_is_known():
    with pytest.raises(ValueError, match="has no scene"):
        injected_pair(Example(None, "Describe the image.", "", kind="caption"), random.Random(0))


# -- the noised image -------------------------------------------------------------------------------
def test_noise_is_of_pixels_between_0_and_1_and_what_leaves_them_is_clipped():
    # sqrt(abar_500) = 0.86302, sqrt(1 - abar_500) = 0.50517: -0.4189, 0.5325, 0.5241, 1.2819
    pixels, noise = torch.tensor([0.1, 0.5, 0.9, 0.9]), torch.tensor([-1.0, 0.2, -0.5, 1.0])
    assert noised_bytes(pixels, 500, noise).tolist() == [0, 135, 133, 255]


def test_the_noised_image_is_another_picture_of_the_same_size_and_of_its_generator(examples):
    image = examples[0].open_image()
    dim = [noised(examples[0], 500, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1)]
    assert dim[0].image.tobytes() == dim[1].image.tobytes() != dim[2].image.tobytes()
    assert dim[0].image.size == image.size and dim[0].image.tobytes() != image.tobytes()
    assert dataclasses.replace(dim[0], image=image) == examples[0]  # which stays as it was
    still = noised(examples[0], 0, torch.Generator().manual_seed(0))  # abar_0 is nearly 1
    apart = [abs(a - b) for a, b in zip(still.image.tobytes(), image.tobytes(), strict=True)]
    assert max(apart) < 10


# -- stage 2 ----------------------------------------------------------------------------------------
CHOSEN = torch.tensor([[0, 0, 0]])
POLICY = torch.tensor([[[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.6, 0.1, 0.3]]])
REFERENCE = torch.tensor([[[0.6, 0.3, 0.1], [0.5, 0.3, 0.2], [0.6, 0.3, 0.1]]])
UNDER_NOISE = torch.tensor([[[0.3, 0.6, 0.1], [0.5, 0.3, 0.2], [0.2, 0.3, 0.5]]])
EVERY = torch.ones(1, 3, dtype=torch.bool)


def logps(clean, words):
    return own_logps(clean.log(), words, EVERY)


def test_the_own_words_are_read_off_the_clean_forward_of_the_chosen_text():
    words = UNDER_NOISE.argmax(-1)
    assert words.tolist() == [[1, 0, 2]]
    # log 0.2 + log 0.5 + log 0.3, and under the reference log 0.3 + log 0.5 + log 0.1
    assert logps(POLICY, words).item() == pytest.approx(-3.506558, abs=1e-5)
    assert logps(REFERENCE, words).item() == pytest.approx(-4.199705, abs=1e-5)
    masked = own_logps(POLICY.log(), words, torch.tensor([[True, False, True]]))
    assert masked.item() == pytest.approx(-2.813411, abs=1e-5)


def test_the_loss_of_stage_two_worked_by_hand():
    words = UNDER_NOISE.argmax(-1)
    text = torch.tensor([-6.0]), torch.tensor([-5.0])  # the rejected text, policy and reference
    policy = torch.stack([logps(POLICY, CHOSEN), text[0], logps(POLICY, words)])
    reference = torch.stack([logps(REFERENCE, CHOSEN), text[1], logps(REFERENCE, words)])
    assert povid_loss(policy, reference).item() == pytest.approx(0.678782, abs=1e-5)


def test_the_parts_of_that_loss_and_its_official_form_worked_by_hand():
    text = torch.tensor([-6.0]), torch.tensor([-5.0])  # the rejected text, policy and reference
    own, theirs = (
        UNDER_NOISE.argmax(-1),
        torch.tensor([[1, 1, 1]]),
    )  # the reference's, under its noise
    chosen = logps(POLICY, CHOSEN), logps(REFERENCE, CHOSEN)
    assert [x.item() for x in chosen] == pytest.approx([-1.560648, -1.714798], abs=1e-5)
    # log 0.3 three times: other tokens than the policy's, which is why we take the same
    assert logps(REFERENCE, theirs).item() == pytest.approx(-3.611918, abs=1e-5)
    of_text = dpo_loss(chosen[0], text[0], chosen[1], text[1]).item()
    assert of_text == pytest.approx(0.637104, abs=1e-5)
    for words, of_own, whole in ((own, 0.720460, 0.678782), (theirs, 0.690711, 0.663907)):
        gained = logps(POLICY, own), logps(REFERENCE, words)
        assert dpo_loss(chosen[0], gained[0], chosen[1], gained[1]).item() == pytest.approx(
            of_own, abs=1e-5
        )
        policy, reference = (torch.stack(x) for x in zip(chosen, text, gained, strict=True))
        assert povid_loss(policy, reference).item() == pytest.approx(whole, abs=1e-5)


def test_where_noise_changes_no_word_the_own_part_is_log_2_and_moves_nothing():
    logits = POLICY.log().requires_grad_()
    chosen = own_logps(logits, CHOSEN, EVERY)
    same = torch.stack([chosen, chosen, chosen])
    loss = povid_loss(same, same.detach())
    loss.sum().backward()
    assert loss.item() == pytest.approx(0.693147, abs=1e-6)
    assert logits.grad.abs().max() < 1e-7


def test_the_logits_are_those_of_a_whole_pass_without_a_cache(policy, examples, prompts):
    ids = torch.tensor([[270, 280, 290, 300], [300, 290, 280, 270], [275, 285, 295, 305]])
    assert not policy.forbidden[ids].any()
    with torch.no_grad():
        prefix = policy.prefill(collate(examples, policy.processor))
        found = next_logits(policy, prefix, ids)
        for row, inputs, text in zip(found, prompts, ids, strict=True):
            plain = policy.full_logits(inputs, text[None], torch.ones(1, 4).long())[0]
            allowed = ~policy.forbidden
            assert torch.allclose(row[:, allowed], plain[:, allowed], atol=1e-4)


def test_errors_are_false_and_texts_are_those_of_the_scene_world():
    rng = random.Random(5)
    for _ in range(200):
        example = sample_example(rng)
        pair = injected_pair(example, rng)
        names = {str(thing) for thing in example.scene.things}
        assert all(name in pair.chosen for name in names) and pair.chosen != pair.rejected
        assert not all(f"{name}." in f"{pair.rejected}." for name in names) or (
            example.scene.home in pair.rejected
        )
    assert povid.Pair is type(pair)
