"""Data files as five kinds of tools write them, broken in 1,000 ways: read right, or refused in lines."""

import json
import random

import pytest
from PIL import Image
from test_fuzz import mutate

from data import DataError, read_examples
from rewards import outcome_reward

TRUTHS = [
    "yes",
    "No.",
    "3",
    "-2.5",
    "1,000",
    "A",
    "B. red",
    "red",
    "A, C",
    "+",
    "caf\u00e9",
    "\u72d7",
]
FORMS = {
    "ours": lambda i, truth: {"image": "a.png", "question": "What is it?", "answer": truth},
    "choice": lambda i, truth: {"image": "a.png", "question": "?", "answer": truth, "kind": "choice"},
    "caption": lambda i, truth: {
        "image": "a.png", "question": "?", "answer": "x", "kind": "caption", "objects": ["dog", "hot dog"],
    },
    "pope": lambda i, truth: {"question_id": i, "image": "a.png", "text": "Is it?", "label": "yes"},
    "llava": lambda i, truth: {
        "id": i,
        "image": "a.png",
        "conversations": [
            {"from": "human", "value": "<image>\nIs it?"},
            {"from": "gpt", "value": truth},
        ],
    },
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_broken_data_file_raises_nothing_but_data_errors_and_what_is_read_can_be_answered(
    form, tmp_path, capsys
):
    Image.new("RGB", (6, 4), "red").save(tmp_path / "a.png")
    rng, path = random.Random(form), tmp_path / "data.jsonl"
    kept = 0
    for case in range(200):
        rows = [FORMS[form](i, rng.choice(TRUTHS)) for i in range(3)]
        text = (
            json.dumps(rows) if case % 4 == 0 else "".join(json.dumps(row) + "\n" for row in rows)
        )
        path.write_bytes(mutate(text.encode(), rng))
        try:
            examples = read_examples(path, tmp_path, skip_bad=case % 2 == 0)
        except DataError as error:
            assert len(str(error).splitlines()) <= 20 and str(path) in str(error)
            continue
        for example in examples:
            said = example.answer if example.kind != "caption" else " and ".join(example.objects)
            assert outcome_reward(f"<think></think><answer>{said}</answer>", example) == 1
            assert outcome_reward("<think></think><answer></answer>", example) == 0
            kept += 1
    assert kept > 50
    capsys.readouterr()
