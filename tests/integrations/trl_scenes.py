"""What the tests of COPO in TRL share: scenes as a TRL dataset, and trainers on the tiny policy."""

import random
from types import SimpleNamespace

from datasets import Dataset

from integrations.trl import COPOConfig, COPOTrainer
from model import load_config, load_processor
from rewards import outcome_reward
from scm import sample_example

G, LONGEST = 4, 48
ON_CPU = {
    "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1, "bf16": False,
    "disable_tqdm": True, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
}  # fmt: skip


def scenes(number=8, seed=0):
    rng = random.Random(seed)
    return [sample_example(rng) for _ in range(number)]


def dataset_of(examples):
    """Rows as a TRL user writes them: a conversation, a picture, and what the reward reads."""
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": example.question}],
                "image": example.image,
                "answer": example.answer,
                "kind": example.kind,
                "objects": list(example.objects),
                "vocabulary": list(example.vocabulary),
            }
            for example in examples
        ]
    )


def correct(completions, kind, answer, objects, vocabulary, **_):
    """The outcome reward of the project, as a reward function of TRL."""
    truths = zip(kind, answer, objects, vocabulary, strict=True)
    return [
        outcome_reward(
            said[0]["content"], SimpleNamespace(kind=k, answer=a, objects=o, vocabulary=v)
        )
        for said, (k, a, o, v) in zip(completions, truths, strict=True)
    ]


def settings(folder, **changed):
    """Two prompts of G completions per step; reproducible to the bit."""
    given = {
        "output_dir": str(folder), "max_steps": 2, "per_device_train_batch_size": 2 * G,
        "num_generations": G, "max_completion_length": LONGEST, "num_continuations": 2,
    }  # fmt: skip
    return COPOConfig(**{**ON_CPU, **given, **changed})


def trainer_of(model, folder, kind=COPOTrainer, args=None, rewards=correct, more=None, **changed):
    return kind(
        str(model),
        reward_funcs=rewards,
        args=args or settings(folder, **changed),
        train_dataset=dataset_of(scenes()),
        processing_class=load_processor(model, load_config(model)),
        **(more or {}),
    )


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
