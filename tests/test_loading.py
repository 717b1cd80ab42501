"""Models as other people save them: read right, or refused in one line before anything is written."""

import json
import math
import shutil

import pytest
import torch
from folders import FAMILIES
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import train
from data import DataError, Example, collate, prompt_text
from model import check_example, load_policy
from rollouts import rollout

SMALL = [
    "--batch-size",
    "2",
    "--num-generations",
    "3",
    "--num-continuations",
    "1",
    "--eval-scenes",
    "0",
]


@pytest.fixture(scope="module")
def llava(folder_of):
    return folder_of("llava_clip")


@pytest.fixture
def edited(llava, tmp_path):
    """A copy that a test may edit."""
    return shutil.copytree(llava, tmp_path / "edited")


def change(path, edit):
    values = json.loads(path.read_text())
    edit(values)
    path.write_text(json.dumps(values))


def tags_become_special(folder):
    def edit(values):
        for token in values["added_tokens"]:
            token["special"] |= token["content"].strip("</>") in ("think", "answer")

    change(folder / "tokenizer.json", edit)


def template_opens_the_reasoning(folder):
    path = folder / "chat_template.jinja"
    if path.exists():
        path.write_text(path.read_text().rstrip() + "<think>")


@pytest.mark.parametrize("family", FAMILIES)
def test_tags_that_are_special_and_a_template_that_opens_one_leave_reasoning_to_score(
    family, folder_of, tmp_path, monkeypatch
):
    folder = shutil.copytree(folder_of(family), tmp_path / "folder")
    tags_become_special(folder)
    template_opens_the_reasoning(folder)

    def load_with_few_words(
        *arguments,
    ):  # a random model seldom writes a tag: it has little else to say
        policy = load_policy(*arguments)
        tags = policy.tokenizer.convert_tokens_to_ids(["<think>", "</think>"])
        words = (~policy.forbidden).nonzero()[-6:, 0].tolist()
        policy.forbidden[:] = True
        policy.forbidden[tags + words] = False
        return policy

    monkeypatch.setattr(train, "load_policy", load_with_few_words)
    flags = ["--model", str(folder), "--output", str(tmp_path / "run"), *SMALL, "--steps", "1"]
    flags += ["--num-generations", "4", "--max-completion-length", "24", "--temperature", "9"]
    assert train.main(flags) == 0
    head, row = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert float(row.split(",")[head.split(",").index("rows_scored")]) > 0


def test_reasoning_that_the_prompt_opens_begins_with_the_first_token(edited):
    template_opens_the_reasoning(edited)
    policy = load_policy(edited)
    example = Example(Image.new("RGB", (40, 30), "red"), "Is it red?", "yes", "yesno")
    assert prompt_text(example, policy.processor).endswith("<think>")
    with torch.no_grad():
        prefix = policy.prefill(collate([example], policy.processor))
        close = policy.tokenizer.convert_tokens_to_ids("</think>")
        prefix.logits[:, close] = -math.inf
        policy.head.weight[close] = policy.head.weight.mean(0) * 0
    made = rollout(policy, prefix, [example], 16, 40, torch.Generator().manual_seed(0), 5.0)
    found = [n for n in range(16) if int(made.reasoning_end[n])]
    assert found
    for n in found:
        start, end = int(made.reasoning_start[n]), int(made.reasoning_end[n])
        assert start == 0 and int(made.completion_ids[n, end]) == close
        assert made.texts[n].startswith("<think>")


@pytest.mark.parametrize(
    ("harm", "says"),
    [
        ({"rename": True}, "weights are not in its files"),
        ({"drop": "mlp.up_proj"}, "1 weights are not in its files, model.language_model"),
        ({"nan": "mlp.down_proj"}, "not finite"),
        ({"nan": "lm_head"}, "not finite"),
    ],
)
def test_weights_that_are_missing_or_no_numbers_are_refused_by_name(
    edited, tmp_path, capsys, harm, says
):
    path = edited / "model.safetensors"
    tensors = load_file(path)
    if "rename" in harm:
        tensors = {f"old.{name}": tensor for name, tensor in tensors.items()}
    else:
        name = next(n for n in tensors if harm.get("drop", harm.get("nan")) in n)
        if "drop" in harm:
            tensors.pop(name)
        else:
            tensors[name] = tensors[name].clone()
            tensors[name].view(-1)[5] = math.nan
    save_file(tensors, path, metadata={"format": "pt"})
    for main, argv in (
        (train.main, ["--model", str(edited), "--output", str(tmp_path / "run"), *SMALL]),
        (evaluate.main, ["scenes", "--model", str(edited), "--scenes", "1"]),
    ):
        assert main(argv) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] }}{% endfor %}assistant:",
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
        "{% for p in m['content'] %}{{ '<image>' if p['type'] == 'image' else p['text'] }}{% endfor %}"
        "{% endfor %}",
    ],
)
def test_a_template_that_wants_text_or_no_system_message_gets_it(edited, template):
    (edited / "chat_template.jinja").write_text(template)
    policy = load_policy(edited)
    text = prompt_text(Example(Image.new("RGB", (9, 9)), "Is it red?", "yes"), policy.processor)
    assert text.count("<image>") == 1 and "Is it red?" in text and "<think>" in text


def test_a_broken_template_is_told_in_one_line(edited, tmp_path, capsys):
    (edited / "chat_template.jinja").write_text("{% for m in %}")
    assert train.main(["--model", str(edited), "--output", str(tmp_path / "run"), *SMALL]) == 2
    assert "chat template cannot be used" in capsys.readouterr().err


def test_a_tokenizer_without_padding_pads_all_the_same(edited):
    change(edited / "tokenizer_config.json", lambda values: values.pop("pad_token", None))
    policy = load_policy(edited)
    picture = Image.new("RGB", (40, 30), "red")
    batch = [Example(picture, "Is it?", "yes"), Example(picture, "Is this a longer one?", "yes")]
    assert policy.answer(batch, 4) == policy.answer(batch[:1], 4) + policy.answer(batch[1:], 4)


@pytest.mark.parametrize(
    ("family", "question", "size", "says"),
    [
        ("llava_clip", "<image> and <image>?", (40, 30), "<image>"),
        ("idefics3", "<image>\n<image>Is it red?", (40, 30), "<image>"),
        (
            "qwen2_5_vl",
            "<|vision_start|><|image_pad|><|vision_end|>Is it?",
            (40, 30),
            r"<\|image_pad\|>",
        ),
        ("qwen2_vl", "Is it red?", (1, 300), "refuses it"),
        ("instructblip", "Is there a dog? " * 70, (40, 30), "Q-Former takes at most 512"),
        ("llava_clip", "Is there a dog? " * 400, (40, 30), "model takes at most 1024"),
    ],
)
def test_an_example_that_the_model_cannot_run_is_found_before_training(
    family, question, size, says, folder_of
):
    policy = load_policy(folder_of(family))
    asked = Example(Image.new("RGB", size, "red"), question, "yes", "yesno")
    with pytest.raises(DataError, match=says):
        check_example(asked, policy.model.config, policy.processor, 8)


def test_skip_bad_drops_what_the_processor_refuses_and_resume_does_not_look_again(
    folder_of, tmp_path, capsys, monkeypatch
):
    folder = folder_of("qwen2_5_vl")
    for name, size in (("red.png", (40, 30)), ("thin.png", (1, 300))):
        Image.new("RGB", size, "red").save(tmp_path / name)
    rows = [
        {"image": name, "question": "Is it red?", "answer": "yes"}
        for name in ("red.png", "thin.png")
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--model", folder, "--output", str(tmp_path / "run"), *SMALL, "--data", str(data)]
    flags += ["--batch-size", "1", "--max-completion-length", "8", "--save-steps", "1"]
    assert train.main([*flags, "--steps", "1"]) == 2
    assert "data.jsonl:2: the model's processor refuses it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert train.main([*flags, "--steps", "1", "--skip-bad"]) == 0
    assert "skipped 1 of 2 examples" in capsys.readouterr().err
    monkeypatch.setattr(train, "check_example", None)
    assert train.main([*flags, "--steps", "2", "--skip-bad", "--resume"]) == 0


def test_little_reasoning_is_said_in_the_first_step_with_the_reason(llava, tmp_path, capsys):
    flags = ["--model", llava, "--output", str(tmp_path / "run"), *SMALL, "--steps", "1"]
    assert train.main([*flags, "--max-completion-length", "8", "--temperature", "3"]) == 0
    said = capsys.readouterr().err
    assert (
        "step 1: 6 of 6 completions have no reasoning" in said and "--max-completion-length" in said
    )


def test_any_error_is_one_line_and_debug_shows_where(llava, tmp_path, capsys, monkeypatch):
    def fail(*_):
        raise IndexError("index out of range")

    monkeypatch.setattr(train, "rollout", fail)
    flags = ["--model", llava, "--output", str(tmp_path / "run"), *SMALL, "--steps", "1"]
    assert train.main(flags) == 2
    said = capsys.readouterr().err
    assert "error: IndexError: index out of range (--debug shows where)" in said
    assert "Traceback" not in said
    assert train.main([*flags, "--resume", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err
