"""COPO inside TRL, in one step of one trainer.  `make integrations` runs the rest."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="needs integrations/requirements.txt")

from trl_scenes import LONGEST, G, Watched, moved_tokens, scenes, settings, trainer_of

import train
from data import DataError, collate
from integrations.trl import COPOTrainer
from integrations.trl_config import objections
from model import load_policy
from rewards import outcome_reward
from rollouts import Rollouts
from runs import Limits, Settings

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and the libraries below it


def scores_of_ours(folder, examples, scored, trainer):
    """`train.score` of a policy loaded anew, for the same completions and random numbers."""
    policy = load_policy(folder)
    # TRL lets every token but the image's be sampled.
    policy.forbidden[:] = False
    policy.forbidden[policy.tokenizer.image_token_id] = True
    ids, lengths = scored.rollouts.completion_ids, scored.rollouts.lengths

    def outcomes(which, completions):
        texts = [policy.text(tokens) for tokens in completions]
        return [outcome_reward(t, examples[n // G]) for t, n in zip(texts, which, strict=True)]

    prompts = torch.arange(len(examples)).repeat_interleave(G)
    rollouts = Rollouts.of(policy, prompts, ids, lengths, LONGEST, outcomes, examples)
    given = Settings(num_continuations=trainer.args.num_continuations)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randint", lambda *_, **__: torch.tensor(scored.seed))
        prefix = policy.prefill(collate(examples, policy.processor))
        return train.score(policy, prefix, rollouts, given, None, Limits(given))


def order_of(trainer, examples):
    """The examples of the first batch, in TRL's order."""
    rows = [trainer.train_dataset[i] for i in list(trainer._get_train_sampler())[: 2 * G : G]]
    by_picture = {example.image.tobytes(): example for example in examples}
    return [by_picture[row["image"].tobytes()] for row in rows]


def test_a_step_pays_reasoning_tokens_what_train_score_pays_them(speaker, tmp_path):
    trainer = trainer_of(speaker, tmp_path, Watched, max_steps=1)
    examples = order_of(trainer, scenes())
    trainer.train()
    scored = trainer.scored[0]
    ours = scores_of_ours(speaker, examples, scored, trainer)
    assert scored.causal.rewards.max() > 0.05
    assert torch.allclose(scored.causal.rewards, ours.causal_rewards, atol=1e-5)
    assert torch.allclose(scored.advantages, ours.token_advantages, atol=1e-5)
    moved, inside = moved_tokens(trainer.learned[0], trainer.processing_class.tokenizer)
    assert moved == inside > 0
    assert trainer.state.log_history[0]["copo/causal_reward"] > 0


@pytest.mark.parametrize(
    "changed",
    [
        {"top_p": 0.9},
        {"top_k": 5},
        {"min_p": 0.1},
        {"repetition_penalty": 1.1},
        {"generation_kwargs": {"num_beams": 2}},
        {"loss_type": "vespo"},
        {"importance_sampling_level": "sequence"},
        {"off_policy_mask_threshold": 0.5},
        {"multi_objective_aggregation": "normalize_then_sum"},
        {"pairing": "loose"},
        {"num_continuations": 0},
        {"max_scored_tokens": 0},
        {"lambda_s": -0.1},
        {"lambda_n": 1.5},
        {"unit": "tokens"},
        {"unit": "0"},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_settings_that_cannot_be_scored_are_refused_in_a_line_that_names_them(changed, tmp_path):
    (line,) = objections(settings(tmp_path, **changed), len)
    assert line.startswith(next(iter(changed))) and "\n" not in line


async def late(completions, **_):
    return [0.0 for _ in completions]


@pytest.mark.parametrize("rewards", ["a/reward-model", torch.nn.Linear(1, 1), late])
def test_rewards_that_cannot_be_asked_again_are_refused(rewards, tmp_path):
    (line,) = objections(settings(tmp_path), [len, rewards])
    assert line.startswith("reward_funcs: ")


def test_fsdp_is_refused():
    spread = SimpleNamespace(_dist=SimpleNamespace(is_fsdp=True))
    with pytest.raises(DataError, match=r"\AFSDP: .*\Z"):
        COPOTrainer._check_model(spread)
