"""The policy's fast paths equal the plain full forward, and it never says what it must not."""

import os
import random

import pytest
import torch

import model
from data import collate
from model import load_policy, sample_tokens
from scm import sample_example
from tiny import build_tiny_policy


@pytest.fixture(scope="module")
def completions(policy, prefix):
    """Five completions of three prompts, of different lengths, padded on the right."""
    ids = torch.randint(10, 300, (5, 7), generator=torch.Generator().manual_seed(0))
    lengths = torch.tensor([7, 3, 1, 5, 7])
    mask = torch.arange(7) < lengths[:, None]
    return torch.tensor([0, 0, 1, 2, 2]), torch.where(mask, ids, policy.pad_id), mask


def plain_logps(policy, inputs, ids):
    """Log-probabilities of one completion after one prompt: a full forward, no cache, no padding."""
    real = inputs["attention_mask"][0].bool()
    whole = torch.cat([inputs["input_ids"][0, real], ids])[None]
    logits = policy.model(
        input_ids=whole, attention_mask=torch.ones_like(whole), pixel_values=inputs["pixel_values"]
    ).logits[0, -len(ids) - 1 : -1]
    logits = logits.float().masked_fill(policy.forbidden, -torch.inf)
    return logits.log_softmax(-1).gather(-1, ids[:, None])[:, 0]


def one_by_one(policy, examples):
    return [collate([example], policy.processor) for example in examples]


def test_log_probabilities_equal_full_forwards_one_row_at_a_time(
    policy, prefix, examples, completions
):
    which, ids, mask = completions
    with torch.no_grad():
        logps, _ = policy.per_token_logps(prefix, which, ids, mask)
        inputs = one_by_one(policy, examples)
        for n in range(len(ids)):
            plain = plain_logps(policy, inputs[which[n]], ids[n, mask[n]])
            assert torch.allclose(logps[n, mask[n]], plain, atol=1e-4)
            assert (logps[n, ~mask[n]] == 0).all()


def test_gradients_through_the_shared_prompt_equal_those_of_full_forwards(
    policy, examples, completions
):
    which, ids, mask = completions
    parameters = [p for p in policy.model.parameters() if p.requires_grad]

    def gradients(loss):
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    prefix = policy.prefill(collate(examples, policy.processor))
    shared_ = gradients(policy.per_token_logps(prefix, which, ids, mask)[0].sum())
    inputs = one_by_one(policy, examples)
    plain = gradients(
        sum(plain_logps(policy, inputs[which[n]], ids[n, mask[n]]).sum() for n in range(5))
    )
    compared = 0
    for a, b in zip(shared_, plain, strict=True):
        if b is not None and b.abs().max() > 0:
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6
            compared += 1
    assert compared > 50


def test_checkpointed_log_probabilities_and_gradients_equal_the_shared_ones(examples, completions):
    policy = build_tiny_policy(seed=1)
    which, ids, mask = completions
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    prefix = policy.prefill(collate(examples, policy.processor))
    shared_, entropy = policy.per_token_logps(prefix, which, ids, mask)
    expected = torch.autograd.grad(shared_.sum(), parameters, allow_unused=True)
    policy.checkpoint_activations()
    logps, same_entropy = policy.full_per_token_logps(examples, which, ids, mask)
    assert torch.allclose(logps, shared_, atol=1e-4)
    assert torch.allclose(same_entropy, entropy, atol=1e-4)
    gradients = torch.autograd.grad(logps.sum(), parameters, allow_unused=True)
    for a, b in zip(gradients, expected, strict=True):
        if b is not None:
            assert (a - b).abs().max() <= 1e-4 * b.abs().max() + 1e-6
    assert not policy.decoder.training


def test_checkpointed_layers_drop_nothing_out(examples, completions):
    policy = build_tiny_policy(seed=1)
    which, ids, mask = completions
    expected, _ = policy.full_per_token_logps(examples, which, ids, mask)
    for layer in policy.decoder.layers:
        layer.self_attn.attention_dropout = 0.5
    policy.checkpoint_activations()
    logps, _ = policy.full_per_token_logps(examples, which, ids, mask)
    logps.sum().backward()
    assert torch.allclose(logps, expected, atol=1e-5)


def test_a_single_token_is_predicted_by_the_prompt(policy, prefix, examples, completions):
    which, ids, mask = completions
    whole = policy.per_token_logps(prefix, which, ids, mask)[0][:, :1]
    one = ids[:, :1], mask[:, :1]
    assert torch.allclose(policy.per_token_logps(prefix, which, *one)[0], whole, atol=1e-5)
    full = policy.full_per_token_logps(examples, which, *one)[0]
    assert torch.allclose(full, whole, atol=1e-4)


@pytest.mark.parametrize("told", ["MemFree: 1 kB\nMemAvailable:   2048 kB\n", "", None])
def test_free_memory_is_what_programs_may_take_on_every_system(monkeypatch, told):
    def read_text(_):
        if told is None:
            raise FileNotFoundError
        return told

    monkeypatch.setattr(model.Path, "read_text", read_text)
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    assert model.free_memory() == (2048 * 1024 if told else half)
    monkeypatch.delattr(model.os, "sysconf")
    assert model.free_memory() == (2048 * 1024 if told else 4 * 2**30)


def test_more_rows_fit_where_rows_are_shorter(policy):
    short, long = policy.rows_that_fit(30, 16), policy.rows_that_fit(30, 512)
    assert short > long >= 1


def test_greedy_decoding_equals_generate(policy, prefix, examples):
    budget = torch.tensor([12, 12, 12])
    first = sample_tokens(prefix.logits, None)
    ids, lengths = policy.decode(policy.rows(prefix, torch.arange(3)), first, budget)
    bad = [[i] for i in policy.forbidden.nonzero()[:, 0].tolist()]
    for n, inputs in enumerate(one_by_one(policy, examples)):
        plain = policy.model.generate(
            **inputs, max_new_tokens=12, do_sample=False, bad_words_ids=bad
        )
        plain = plain[0, inputs["input_ids"].shape[1] :]
        assert ids[n, : lengths[n]].tolist() == plain.tolist()


def test_a_rows_text_depends_on_its_own_numbers_alone(policy, prefix):
    numbers = torch.rand(6, 9, generator=torch.Generator().manual_seed(1))
    which = torch.tensor([0, 0, 1, 1, 2, 2])

    def sample(rows):
        first = sample_tokens(prefix.logits[which[rows]], numbers[rows, :1])[:, 0]
        budget = torch.full((len(rows),), 9)
        return policy.decode(policy.rows(prefix, which[rows]), first, budget, numbers[rows])[0]

    together = sample(torch.arange(6))
    apart = torch.cat([sample(torch.tensor([n])) for n in (4, 1)])
    assert torch.equal(together[[4, 1]], apart)
    assert not torch.equal(together[0], together[1])  # rows of a group differ


def test_rows_stop_at_their_budget_and_at_the_end_token(policy, prefix):
    end = int(policy.eos_ids[0])
    budget = torch.tensor([5, 2, 9])
    first = torch.tensor([40, 41, end])
    ids, lengths = policy.decode(policy.rows(prefix, torch.arange(3)), first, budget)
    assert lengths.tolist()[1:] == [2, 1] and lengths[0] <= 5
    assert (ids[1, 2:] == policy.pad_id).all() and (ids[2, 1:] == policy.pad_id).all()


def test_left_padding_changes_no_log_probability(policy, examples):
    ids, mask = torch.tensor([[50, 60, 70]]), torch.ones(1, 3, dtype=torch.bool)
    which = torch.tensor([0])
    with torch.no_grad():
        padded = policy.prefill(collate(examples, policy.processor))
        short = int(padded.position.argmin())
        alone = policy.prefill(collate([examples[short]], policy.processor))
        a, _ = policy.per_token_logps(padded, which + short, ids, mask)
        b, _ = policy.per_token_logps(alone, which, ids, mask)
    assert not padded.mask[short].all() and alone.mask.all()
    assert torch.allclose(a, b, atol=1e-5)


# -- sampling ----------------------------------------------------------------------------------
def test_sampling_inverts_the_distribution_function():
    logits = torch.tensor([[0.5, 0.25, 0.0, 0.25]]).log()
    numbers = torch.tensor([[0.0, 0.49, 0.5, 0.74, 0.76, 0.999999999]])
    assert sample_tokens(logits, numbers).tolist() == [[0, 0, 1, 1, 3, 3]]


def test_samples_follow_the_distribution_at_the_temperature():
    logits, n = torch.tensor([[0.0, 1.0, -torch.inf, 2.0]]), 40_000
    numbers = torch.rand(1, n, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(sample_tokens(logits, numbers, 0.5)[0], minlength=4) / n
    expected = (logits[0] / 0.5).softmax(0)
    assert counts[2] == 0
    assert ((counts - expected).abs() < 4 * (0.25 / n) ** 0.5).all()


def test_special_multimodal_tokens_are_never_sampled(policy, prefix):
    image = policy.model.config.image_token_id
    assert (
        policy.forbidden[[image, policy.pad_id]].all()
        and not policy.forbidden[policy.eos_ids].any()
    )
    numbers = torch.rand(3, 5000, generator=torch.Generator().manual_seed(0))
    drawn = sample_tokens(prefix.logits, numbers, temperature=100.0)
    assert not policy.forbidden[drawn].any() and len(drawn.unique()) > 300


# -- attention ---------------------------------------------------------------------------------
def test_the_decoders_own_attention_is_put_back(policy, prefix):
    before = policy.decoder.config._attn_implementation
    with pytest.raises(RuntimeError):
        policy.rows(prefix, torch.tensor([0])).extend(torch.zeros(1, 1, 3))
    assert policy.decoder.config._attn_implementation == before


def test_tokens_that_are_alike_run_once_and_give_what_each_row_alone_gives(policy, prefix):
    prompts = torch.tensor([0, 0, 0, 1])
    ids = torch.tensor([[11, 12, 13, 14], [11, 12, 15, 14], [11, 12, 13, 14], [11, 12, 13, 14]])
    text = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6], [1, 2, 3, 4], [-1, -2, -3, -4]])
    apart, once = policy.rows(prefix, prompts), policy.rows(prefix, prompts)
    with torch.no_grad():
        expected = apart.extend(policy.embed(ids))
        assert torch.allclose(once.extend(policy.embed(ids), text), expected, atol=1e-5)
    assert (apart.forwarded, once.forwarded) == (16, 10)
    for kept, plain in zip(once.key_values.values, apart.key_values.values, strict=True):
        assert kept.shape == plain.shape and torch.allclose(kept, plain, atol=1e-5)


# -- folders -----------------------------------------------------------------------------------
def test_a_saved_policy_comes_back_the_same(policy, prefix, examples, tmp_path):
    policy.save(tmp_path)
    again = load_policy(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and list(tmp_path.glob("*.safetensors"))
    inputs = collate(examples, again.processor)
    assert torch.equal(inputs["input_ids"], collate(examples, policy.processor)["input_ids"])
    with torch.no_grad():
        assert torch.equal(again.prefill(inputs).logits, prefix.logits)
    assert torch.equal(again.forbidden, policy.forbidden)


def test_the_words_of_the_world_are_single_tokens_and_any_text_can_be_spelt(policy):
    rng = random.Random(1)
    for _ in range(50):
        for word in sample_example(rng).answer.split():
            assert len(policy.tokenizer(f" {word}", add_special_tokens=False)["input_ids"]) == 1
    ids = policy.tokenizer("Zürich 你好", add_special_tokens=False)["input_ids"]
    assert policy.text(ids) == "Zürich 你好"


def test_tokens_to_spell_counts_leading_tokens(policy):
    ids = policy.tokenizer("<think> I see a boat.", add_special_tokens=False)["input_ids"]
    assert [policy.tokens_to_spell(ids, n) for n in (0, 1, 7, 8, 9, 10)] == [0, 1, 1, 2, 2, 3]
