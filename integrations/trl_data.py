"""This project's examples as a data set of TRL, and its outcome reward as one of TRL's reward functions."""

from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

from datasets import Dataset, Image

from data import INSTRUCTION, Example
from rewards import outcome_reward


def dataset_of(examples: Sequence[Example]) -> Dataset:
    """A conversation, a picture (opened when it is needed) if there is one, and what `correct` reads."""
    rows = [
        {
            "prompt": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": example.question},
            ],
            "image": str(example.image) if isinstance(example.image, Path) else example.image,
            "answer": example.answer,
            "kind": example.kind,
            "objects": list(example.objects),
            "vocabulary": list(example.vocabulary),
        }
        for example in examples
    ]
    dataset = Dataset.from_list(rows)
    if all(example.image is None for example in examples):
        return dataset.remove_columns("image")
    return dataset.cast_column("image", Image())


def correct(completions, kind, answer, objects, vocabulary, **_) -> list[float]:
    """`rewards.outcome_reward` of each completion, in [0, 1]."""
    truths = zip(kind, answer, objects, vocabulary, strict=True)
    return [
        outcome_reward(
            said[0]["content"], SimpleNamespace(kind=k, answer=a, objects=o, vocabulary=v)
        )
        for said, (k, a, o, v) in zip(completions, truths, strict=True)
    ]
