"""COPO in TRL, the minutes of it: sameness with GRPOTrainer, processes, adapters, precision, splitting.

    make integrations

As a program it is one process of two: `torchrun --nproc_per_node 2 FILE MODEL FOLDER`.
"""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl", reason="needs integrations/requirements.txt")
sys.path.insert(0, str(Path(__file__).parent))  # as a program, it finds nothing of this by itself
sys.path.insert(0, str(Path(__file__).parents[2]))

from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer
from trl_scenes import (
    ON_CPU,
    G,
    Recited,
    Watched,
    moved_tokens,
    scenes,
    settings,
    trainer_of,
)

import integrations.trl
import tiny
from data import DataError
from integrations.trl import COPOTrainer
from integrations.trl_config import COPOConfig
from integrations.trl_data import correct, dataset_of
from model import load_config, load_processor
from scm import in_words

pytestmark = pytest.mark.filterwarnings("ignore")  # of TRL and the libraries below it

CLOCKS = ("time", "runtime", "per_second")


def history(trainer):
    """All that TRL logged but times, and but what COPO adds."""
    return [
        {k: v for k, v in row.items() if not k.startswith("copo/") and not k.endswith(CLOCKS)}
        for row in trainer.state.log_history
    ]


def weights(trainer):
    return {name: w.detach().clone() for name, w in trainer.model.named_parameters()}


def same(a, b):
    return all(torch.equal(w, b[name]) for name, w in a.items())


@pytest.fixture(scope="module")
def plain(speaker, tmp_path_factory):
    """GRPOTrainer after five steps, with the settings of equation 6."""
    folder = tmp_path_factory.mktemp("plain")
    ours, trl = settings(folder), GRPOConfig(output_dir=str(folder), **ON_CPU)
    args = GRPOConfig(
        output_dir=str(folder), max_steps=5, loss_type="grpo", beta=0.04,
        use_bias_correction_kl=False, num_generations=G,
        per_device_train_batch_size=ours.per_device_train_batch_size,
        max_completion_length=ours.max_completion_length, **ON_CPU,
    )  # fmt: skip
    assert trl.loss_type != "grpo" and trl.beta == 0 and trl.use_bias_correction_kl
    trainer = trainer_of(speaker, folder, GRPOTrainer, {"args": args})
    trainer.train()
    return trainer


def test_weights_of_zero_are_grpotrainer_bit_for_bit(plain, speaker, tmp_path):
    trainer = trainer_of(speaker, tmp_path, max_steps=5, lambda_s=0, lambda_n=0)
    trainer.train()
    assert history(trainer) == history(plain)
    assert same(weights(trainer), weights(plain))


def test_scored_and_put_back_is_grpotrainer_bit_for_bit(plain, speaker, tmp_path, monkeypatch):
    paid = []
    monkeypatch.setattr(integrations.trl, "inject", lambda a, *causal: paid.append(causal) or a)
    trainer = trainer_of(speaker, tmp_path, max_steps=5)
    trainer.train()
    assert len(paid) == 5 and all(causal.any() for causal, _ in paid)
    assert history(trainer) == history(plain)
    assert same(weights(trainer), weights(plain))


def test_causal_rewards_change_what_is_learned(plain, speaker, tmp_path):
    trainer = trainer_of(speaker, tmp_path, max_steps=5)
    trainer.train()
    assert not same(weights(trainer), weights(plain))


def test_accumulation_and_iterations_move_reasoning_tokens_alone_and_lose_no_row(speaker, tmp_path):
    trainer = trainer_of(
        speaker, tmp_path, Watched, max_steps=4, learning_rate=1e-5, num_iterations=2,
        per_device_train_batch_size=2, gradient_accumulation_steps=4, pad_to_multiple_of=8,
    )  # fmt: skip
    trainer.train()
    tokenizer = trainer.processing_class.tokenizer
    counts = [moved_tokens(batch, tokenizer) for batch in trainer.learned]
    moved, inside = map(sum, zip(*counts, strict=True))
    assert moved == inside > 50
    rows = Counter(
        tuple(row[row != tokenizer.pad_token_id].tolist())
        for batch in trainer.learned
        for row in batch["completion_ids"]
    )
    scored = Counter(
        tuple(ids[:n].tolist())
        for step in trainer.scored
        for ids, n in zip(step.rollouts.completion_ids, step.rollouts.lengths, strict=True)
    )
    assert len(trainer.scored) == 2 and rows.total() == 32
    assert rows == Counter({text: 2 * n for text, n in scored.items()})


# -- several processes --------------------------------------------------------------------------
RUNS = [  # groups whole on each process, and a group split over two
    {"max_steps": 3, "num_generations": G},
    {"max_steps": 3, "num_generations": 2 * G},
]


def found_by(model, folder, processes):
    """What the runs found; in each, this is one of so many processes."""
    found = []
    for run in RUNS:
        rows = 2 * G // processes
        trainer = trainer_of(model, folder, Recited, per_device_train_batch_size=rows, **run)
        assert trainer.accelerator.num_processes == processes
        trainer.train()
        sums = [w.double().sum().item() for w in trainer.model.parameters()]
        found.append({"log": trainer.state.log_history, "weights": sums})
    return found


def main(model, folder):
    """One process of two."""
    found = found_by(model, folder, 2)
    if os.environ["RANK"] == "0":
        Path(folder, "found.json").write_text(json.dumps(found))


def test_two_processes_equal_one_with_groups_whole_and_with_a_group_split(speaker, tmp_path):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", __file__]
    # Without the first, accelerate starts two runs of one process each, and says nothing.
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, str(speaker), str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    twos = json.loads((tmp_path / "found.json").read_text())
    for one, two in zip(found_by(speaker, tmp_path, 1), twos, strict=True):
        for a, b in zip(one["log"][:3], two["log"][:3], strict=True):
            assert a["copo/causal_reward"] > 0
            for name in (
                "loss",
                "reward",
                "copo/causal_reward",
                "copo/necessity",
                "copo/sufficiency",
            ):
                assert a[name] == pytest.approx(b[name], abs=1e-5), name
        assert one["weights"] == pytest.approx(two["weights"], abs=1e-4)


# -- kinds of models, data and precision --------------------------------------------------------
def causal_of_first_step(trainer):
    trainer.train()
    return trainer.scored[0].causal.rewards


def test_an_adapter_is_trained_alone_and_its_first_scores_are_those_of_the_model(speaker, tmp_path):
    from peft import LoraConfig

    adapter = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    whole = causal_of_first_step(trainer_of(speaker, tmp_path, Recited, max_steps=1))
    trainer = trainer_of(speaker, tmp_path, Recited, {"peft_config": adapter}, max_steps=2)
    before = weights(trainer)
    rewards = causal_of_first_step(trainer)
    after = weights(trainer)
    assert torch.allclose(rewards, whole, atol=1e-5) and whole.any()
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed and all("lora" in name for name in changed)


def test_a_step_under_bfloat16_autocast_pays_and_learns(speaker, tmp_path):
    trainer = trainer_of(speaker, tmp_path, Recited, max_steps=2, bf16=True)
    assert trainer.accelerator.mixed_precision == "bf16"
    before, rewards = weights(trainer), causal_of_first_step(trainer)
    assert rewards.any() and rewards.isfinite().all()
    assert not same(before, weights(trainer))
    assert all(w.dtype == torch.float32 for w in trainer.model.parameters())


def test_checkpointed_activations_change_no_score(speaker, tmp_path):
    runs = [
        causal_of_first_step(
            trainer_of(speaker, tmp_path, Recited, max_steps=1, gradient_checkpointing=on)
        )
        for on in (True, False)
    ]
    assert torch.equal(*runs) and runs[0].any()


def test_questions_without_pictures_are_scored_too(speaker, tmp_path):
    told = dataset_of([in_words(example) for example in scenes()])
    trainer = trainer_of(speaker, tmp_path, Recited, {"train_dataset": told}, max_steps=1)
    assert causal_of_first_step(trainer).any()


def test_a_model_of_text_alone_is_scored_on_plain_prompts(speaker, tmp_path):
    tokenizer = load_processor(speaker, load_config(speaker)).tokenizer
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path / "model"
    LlamaForCausalLM(text).save_pretrained(folder)

    def right(completions, **columns):
        return correct([[{"content": said}] for said in completions], **columns)

    def in_a_line(row):
        return row | {"prompt": f"{row['prompt'][-1]['content']}\n"}

    rows = [in_a_line(row) for row in dataset_of([in_words(e) for e in scenes()])]
    more = {"reward_funcs": right, "train_dataset": Dataset.from_list(rows)}
    more["processing_class"] = tokenizer
    trainer = trainer_of(folder, tmp_path, Recited, more, max_steps=1)
    causal = causal_of_first_step(trainer)  # of a random model, which hits on no right answer
    assert causal.isfinite().all() and trainer.scored[0].causal.evidence.cost.rows > 0


def test_completions_that_end_at_once_earn_nothing_and_stop_nothing(speaker, tmp_path):
    class Silent(Watched):
        def _generate_single_turn(self, prompt_ids, *_):
            return [[self._tokenizer.eos_token_id] for _ in prompt_ids], None

    trainer = trainer_of(speaker, tmp_path, Silent, max_steps=1)
    trainer.train()
    assert not trainer.scored[0].advantages.any() and trainer.scored[0].advantages.shape[1] == 1


def test_evaluation_scores_nothing(speaker, tmp_path):
    more = {"eval_dataset": dataset_of(scenes(2))}
    trainer = trainer_of(
        speaker, tmp_path, Watched, more, max_steps=2, eval_strategy="steps", eval_steps=1,
        per_device_eval_batch_size=2 * G,
    )  # fmt: skip
    trainer.train()
    assert len(trainer.scored) == 2
    assert sum("eval_reward" in row for row in trainer.state.log_history) == 2


# -- rewards ------------------------------------------------------------------------------------
def brevity(completions, **_):
    return [None if len(said[0]["content"]) > 60 else 0.5 for said in completions]


def test_one_of_several_rewards_is_asked_about_by_its_name(speaker, tmp_path):
    alone = causal_of_first_step(trainer_of(speaker, tmp_path, Recited, max_steps=1))
    more = {"reward_funcs": [brevity, correct]}
    named = trainer_of(speaker, tmp_path, Recited, more, max_steps=1, outcome_reward="correct")
    assert torch.equal(causal_of_first_step(named), alone)
    total = trainer_of(speaker, tmp_path, Recited, more, max_steps=1, reward_weights=[0.0, 1.0])
    assert torch.equal(causal_of_first_step(total), alone)


def test_a_question_asked_while_scoring_reads_the_columns_of_its_row_and_logs_nothing(
    speaker, tmp_path
):
    def nosy(completions, answer, log_extra, log_metric, trainer_state, **columns):
        log_extra("answer", answer)
        log_metric("asked", 1.0)
        assert trainer_state is not None
        return correct(completions, answer=answer, **columns)

    alone = causal_of_first_step(trainer_of(speaker, tmp_path, Recited, max_steps=1))
    trainer = trainer_of(speaker, tmp_path, Recited, {"reward_funcs": nosy}, max_steps=1)
    assert torch.equal(causal_of_first_step(trainer), alone)
    assert len(trainer._logs["extra"]["answer"]) == 2 * G
    assert trainer.state.log_history[0]["asked"] == 1.0


# -- the guide ---------------------------------------------------------------------------------
def test_the_lines_of_the_guide_run(speaker, tmp_path, monkeypatch):
    guide = Path(integrations.trl.__file__).with_name("README.md").read_text()
    code = guide.split("```python\n")[1].split("```")[0]
    for before, here in (
        ('"runs/trl"', repr(str(tmp_path))),
        ("max_steps=100", "max_steps=1, save_strategy='no', bf16=False"),
        ("batch_size=64", "batch_size=8"),
        ("range(800)", "range(4)"),
    ):
        assert before in code
        code = code.replace(before, here)
    monkeypatch.setattr(tiny, "warm_start", lambda _: speaker)
    found = {}
    exec(code, found)
    assert "copo/causal_reward" in found["trainer"].state.log_history[0]


# -- refused ------------------------------------------------------------------------------------
def test_what_the_model_rules_out_is_refused_in_a_line(speaker, tmp_path):
    from peft import PromptTuningConfig

    with pytest.raises(DataError, match=r"\Aoutcome_reward = 'wit': .* correct\Z"):
        trainer_of(speaker, tmp_path, outcome_reward="wit")
    with pytest.raises(DataError, match=r"\Atools: .*\Z"):
        trainer_of(speaker, tmp_path, more={"tools": [len]})
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(DataError, match=r"\Apeft_config: .*\Z"):
        trainer_of(speaker, tmp_path, more={"peft_config": prompts})
    with pytest.raises(DataError, match=r"\Aargs must be a COPOConfig.*\Z"):
        trainer_of(speaker, tmp_path, more={"args": GRPOConfig(output_dir=str(tmp_path), **ON_CPU)})
    kept = COPOConfig(output_dir=str(tmp_path), lambda_s=0, lambda_n=0, top_p=0.9, **ON_CPU)
    assert COPOTrainer and trainer_of(speaker, tmp_path, more={"args": kept})  # nothing is scored


if __name__ == "__main__":
    main(*sys.argv[1:])
