"""What the tests share: a tiny policy, made here, and rollouts of it whose reasoning is marked by hand."""

import dataclasses
import functools
import os
import random
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: see train.py

import pytest
import torch
from families import FAMILIES, build
from folders import save_folder

import tiny
from data import collate
from interventions import Interventions
from model import Policy
from rollouts import Rollouts, rollout
from scm import sample_example

TEMPERATURE = 1.5  # at which draws of this random model stay on a trajectory about half the time


@pytest.fixture(scope="session")
def policy():
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 2)))
    return tiny.build_tiny_policy(seed=1)


@pytest.fixture(scope="session")
def examples():
    rng = random.Random(0)
    return [sample_example(rng) for _ in range(3)]


@pytest.fixture(scope="session")
def prefix(policy, examples):
    with torch.no_grad():
        return policy.prefill(collate(examples, policy.processor))


@pytest.fixture(scope="session")
def prompts(policy, examples):
    """The inputs of each prompt alone, without padding."""
    return [collate([example], policy.processor) for example in examples]


@pytest.fixture(scope="session", params=FAMILIES)
def family(request, policy, examples):
    """(policy, prefix, rollouts, prompts) of a tiny random model of each family."""
    model, inputs = build(request.param)
    of_family = Policy(
        model,
        SimpleNamespace(tokenizer=policy.tokenizer, chat_template=None, image_token="<image>"),
    )
    with torch.no_grad():
        prefix = of_family.prefill(inputs)
    sampled = rollout(
        of_family, prefix, examples[:1], 4, 12, torch.Generator().manual_seed(2), TEMPERATURE
    )
    return of_family, prefix, mark(sampled), [inputs]


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """family -> the folder of its tiny random model, made once; a test that edits it takes a copy."""
    return functools.cache(lambda family: save_folder(family, tmp_path_factory.mktemp(family)))


@pytest.fixture(scope="session")
def rollouts(policy, prefix, examples):
    """Two completions of three prompts; tokens 2..6 count as reasoning, the answer starts at 8.

    The model is random, so the text means nothing; the reward is a number that any change of any
    token after the reasoning changes, so that equal rewards mean equal texts. The last completion
    has no reasoning; the first two are copies of one text.
    """
    sampled = rollout(
        policy, prefix, examples, 2, 14, torch.Generator().manual_seed(5), TEMPERATURE
    )
    return mark(sampled)


def fingerprint(tokens) -> float:
    """A number in [0, 1) that tells token sequences apart."""
    value = 0
    for token in tokens.tolist():
        value = (value * 1009 + token + 1) % 1_000_003
    return value / 1_000_003


H = 3  # continuations per set


def ask(policy, prefix, rollouts, pairing="coupled", seed=3, way=Interventions, **settings):
    """One of the ways of asking, at the temperature of the rollouts."""
    settings = {"num_continuations": H, "temperature": TEMPERATURE, **settings}
    return way(policy, prefix, rollouts, seed, pairing=pairing, **settings)


def mark(sampled: Rollouts) -> Rollouts:
    N = len(sampled.prompt_index)
    ids, lengths = sampled.completion_ids.clone(), sampled.lengths.clone()
    ids[1], lengths[1] = ids[0], lengths[0]
    start, end, answer = (torch.full((N,), place) for place in (2, 7, 8))
    for places in (start, end, answer):
        places[-1] = 0
    rewards = torch.tensor([fingerprint(ids[n, : lengths[n]]) for n in range(N)])
    return dataclasses.replace(
        sampled,
        completion_ids=ids,
        lengths=lengths,
        reasoning_start=start,
        reasoning_end=end,
        answer_start=answer,
        rewards=rewards,
        reward=lambda n, completions: [fingerprint(tokens) for tokens in completions],
    )


@pytest.fixture
def endless(policy, monkeypatch):
    """The policy without an end token: every row runs to its budget."""
    monkeypatch.setattr(policy, "eos_ids", torch.tensor([len(policy.forbidden)]))
    return policy


def without_copies(rollouts):
    """Four different trajectories, the reasoning of each at places 2..6, all as long as the longest."""
    keep = torch.tensor([0, 2, 3, 4])
    fields = (
        "prompt_index",
        "completion_ids",
        "reasoning_start",
        "reasoning_end",
        "answer_start",
        "truncated",
        "rewards",
    )
    ids = rollouts.completion_ids.shape[1]
    return dataclasses.replace(
        rollouts,
        lengths=torch.full((4,), ids),
        **{name: getattr(rollouts, name)[keep] for name in fields},
    )


@pytest.fixture(scope="session")
def speaker(tmp_path_factory):
    """A policy that has just learned the format: its completions have reasoning and differ."""
    settings = tiny.WarmStart(
        vision_steps=2, vision_batch_size=4, reading_steps=2, reading_batch_size=4,
        speech_steps=60, batch_size=16,
    )  # fmt: skip
    return tiny.warm_start(tmp_path_factory.mktemp("cache"), settings)


def pytest_addoption(parser):
    parser.addoption("--fuzz", type=int, default=1000, help="mutated inputs in tests/test_fuzz.py")
