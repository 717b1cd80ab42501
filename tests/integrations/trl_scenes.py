"""What the tests of COPO in TRL share: scenes as a TRL dataset, and trainers on the tiny policy."""

import random
import re
from types import SimpleNamespace

import pytest

pytest.importorskip("trl", reason="needs integrations/requirements.txt")

from integrations.trl import COPOTrainer
from integrations.trl_config import COPOConfig
from integrations.trl_data import correct, dataset_of
from model import load_config, load_processor
from scm import demonstration, sample_example

G, LONGEST = 4, 48
ON_CPU = {
    "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "bf16": False,
    "disable_tqdm": True, "learning_rate": 1e-4, "lr_scheduler_type": "constant",
}  # fmt: skip


def scenes(number=8, seed=0):
    rng = random.Random(seed)
    return [sample_example(rng) for _ in range(number)]


def settings(folder, **changed):
    """Two prompts of G completions per step; reproducible to the bit."""
    given = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2 * G,
        "num_generations": G, "max_completion_length": LONGEST, "num_continuations": 2,
    }  # fmt: skip
    return COPOConfig(**{**ON_CPU, **given, **changed})


def trainer_of(model, folder, kind=COPOTrainer, more=None, **changed):
    """A trainer of the policy in the folder `model`.  more: its arguments; changed: its settings."""
    given = {
        "reward_funcs": correct,
        "args": settings(folder, **changed),
        "train_dataset": dataset_of(scenes()),
        **(more or {}),
    }
    if "processing_class" not in given:
        given["processing_class"] = load_processor(model, load_config(model))
    return kind(str(model), **given)


class Watched(COPOTrainer):
    """Keeps what went in and out of scoring, and every row that reached the loss."""

    def __init__(self, *args, **given):
        super().__init__(*args, **given)
        self.scored, self.learned = [], []

    def _score(self, policy):
        causal, rollouts = super()._score(policy)
        self.scored.append(SimpleNamespace(causal=causal, rollouts=rollouts, seed=self._seed()))
        return causal, rollouts

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        if self.model.training and self.scored:
            self.scored[-1].advantages = output["advantages"].clone()
        return output

    def _compute_loss(self, model, inputs):
        if self.model.training:
            self.learned.append({k: inputs[k].clone() for k in ("completion_ids", "advantages")})
        return super()._compute_loss(model, inputs)


class Recited(Watched):
    """Its completions are right and wrong demonstrations, the same for any number of processes."""

    def _generate_single_turn(self, prompt_ids, *_):
        tokenizer, examples, n = self._tokenizer, scenes(), len(prompt_ids)
        ids = []
        for row in range(
            self.accelerator.process_index * n, self.accelerator.process_index * n + n
        ):
            example = examples[(self.state.global_step + row) % len(examples)]
            text = demonstration(example, example.scene.things)
            if row % 2:
                text = re.sub("<answer>.*</answer>", "<answer> no </answer>", text)
            ids.append(tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"])
        return ids, None


def moved_tokens(learned, tokenizer):
    """(tokens whose advantage differs from their row's, those of them that are reasoning), counted.

    The last place of a row is never reasoning: it is the end of an answer, or padding, or cut off.
    Reasoning is told from the text alone, letter by letter.
    """
    moved = inside = 0
    for ids, advantages in zip(learned["completion_ids"], learned["advantages"], strict=True):
        text = tokenizer.decode(ids)
        start, end = text.find("<think>") + len("<think>"), text.find("</think>")
        for place in (advantages != advantages[-1]).nonzero()[:, 0].tolist():
            first = len(tokenizer.decode(ids[:place]))
            moved += 1
            inside += start <= first and len(tokenizer.decode(ids[: place + 1])) <= end
    return moved, inside
