"""A model's answers to many questions: in batches, saved as they come, resumed where they stopped.

    answers.jsonl    {"question_id": "1", ..., "prompt": "Is there a dog?", "text": "<think> ...",
                      "model_id": "runs/first/checkpoint", "max_new_tokens": 64, ...}

A file of answers belongs to one model, one decoding and one list of questions. Asked again for the same
it goes on; asked for others it refuses. An answer depends on its own question alone, not on its batch.
Draws depend on the question, the model and the seed, not on the rule: rules meet the same numbers.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm

from baselines import generate
from baselines.settings import Rule
from data import DataError, Example, read_image
from hallucination.files import Bad, repair_lines
from model import Policy


@dataclass(frozen=True)
class Decoding:
    """How answers are made."""

    model_id: str
    max_new_tokens: int = 64
    temperature: float = 0.0  # 0: greedy
    seed: int = 0  # of the draws, where the temperature is above 0
    think: bool = True  # ask for reasoning and answer in tags
    rule: Rule | None = None  # of baselines/; None: the model's own distribution

    def facts(self) -> dict:
        """What every row of a file says of it; without a rule, no word of one."""
        facts = {name: value for name, value in vars(self).items() if name != "rule"}
        return facts if self.rule is None else facts | {"decoding": self.rule.facts()}


def fingerprint(model: str) -> str:
    """A model's name, and of a folder a hash of what lies in it, so that a retrained one has another."""
    folder = Path(model)
    if not folder.is_dir():
        return model
    files = sorted(path for path in folder.iterdir() if path.is_file())
    facts = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return f"{model}@{hashlib.sha256(repr(facts).encode()).hexdigest()[:8]}"


def answer_all(
    load: Callable[[], Policy],
    questions: Sequence[tuple[dict, Example]],
    decoding: Decoding,
    save: Path | None = None,
    batch_size: int = 16,
    bad: Bad | None = None,
    what: str = "answers",
) -> list[str | None]:
    """The completions of many questions, in their order; None where `bad` dropped an image.

    load: gives the model; not called where the file holds every answer already.
    questions: what identifies each (its keys go into the file), and what is asked.
    """
    bad = bad or Bad()
    heads = [
        json.dumps(key | {"prompt": example.question} | decoding.facts())
        for key, example in questions
    ]
    done = _read(save, heads) if save else {}
    left = [i for i, head in enumerate(heads) if head not in done]
    policy = load() if left else None
    known = len(heads) - len(left)
    with tqdm(total=len(heads), initial=known, desc=what, unit="answer", leave=False) as bar:
        for start in range(0, len(left), batch_size):
            batch = left[start : start + batch_size]
            opened = [(i, _opened(questions[i][1], bad)) for i in batch]
            opened = [(i, example) for i, example in opened if example]
            if opened:
                texts = _answer(policy, opened, [questions[i][0] for i, _ in opened], decoding)
                for (i, _), text in zip(opened, texts, strict=True):
                    done[heads[i]] = text
                if save:
                    _append(save, [(heads[i], done[heads[i]]) for i, _ in opened])
            bar.update(len(batch))
    return [done.get(head) for head in heads]


def answers_file(what: str, questions: Sequence[tuple[dict, Example]], decoding: Decoding) -> Path:
    """Where answers are kept if the user names no file: one per model, decoding and list of questions."""
    facts = repr((decoding, [(key, example.question) for key, example in questions]))
    return Path("runs/answers") / f"{what}-{hashlib.sha256(facts.encode()).hexdigest()[:12]}.jsonl"


def _answer(
    policy: Policy, opened: list[tuple[int, Example]], keys: list[dict], decoding: Decoding
) -> list[str]:
    examples, uniforms = [example for _, example in opened], None
    if decoding.temperature:  # numbers of the question's own, whatever batch it is in
        plain = replace(decoding, rule=None).facts()
        heads = [
            json.dumps(key | {"prompt": example.question} | plain)
            for key, example in zip(keys, examples, strict=True)
        ]
        rngs = [random.Random(f"{decoding.seed} {head}") for head in heads]
        uniforms = torch.tensor(
            [[r.random() for _ in range(decoding.max_new_tokens)] for r in rngs]
        )
    settings = decoding.max_new_tokens, decoding.think, uniforms, decoding.temperature or 1.0
    if decoding.rule is None:
        return policy.answer(examples, *settings)
    return generate.answer(policy, examples, decoding.rule, *settings, decoding.seed)


def _opened(example: Example, bad: Bad) -> Example | None:
    """The example with its image read; None, and reported, where it cannot be."""
    if not isinstance(example.image, Path):
        return example
    try:
        return replace(example, image=read_image(example.image))
    except ValueError as error:
        bad(example.question, str(error))
        return None


def _read(save: Path, heads: Sequence[str]) -> dict[str, str]:
    """Answers that the file holds.  Raises DataError if it holds any that were not asked for."""
    done, asked = {}, set(heads)
    for number, line in enumerate(repair_lines(save), 1):
        row = json.loads(line)
        text = row.pop("text", None)
        head = json.dumps(row)
        if head not in asked or not isinstance(text, str):
            expected = json.loads(heads[0])
            known = [*Decoding("").facts(), "decoding"]
            other = [k for k in known if row.get(k) != expected.get(k)] or ["question"]
            raise DataError(
                f"{save}:{number}: holds answers of another {other[0]} ({row.get(other[0])!r}): give "
                f"--save another file"
            )
        done[head] = text
    return done


def _append(save: Path, rows: Sequence[tuple[str, str]]) -> None:
    """Add answers, on disk before the next are asked for."""
    save.parent.mkdir(parents=True, exist_ok=True)
    with save.open("a", encoding="utf-8") as file:
        for head, text in rows:
            file.write(json.dumps(json.loads(head) | {"text": text}) + "\n")
        file.flush()
        os.fsync(file.fileno())
