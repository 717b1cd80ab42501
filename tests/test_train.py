"""Training does what it says: GRPO at lambda 0, the same again from a seed, from a kill, from a file."""

import csv
import dataclasses
import inspect
import io
import json
import random
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

import evaluate
import runs
import train
from data import collate, read_examples
from hallucination.files import Bad
from hallucination.scenes import HELD_OUT, read_completions, scene_questions, score_scenes
from model import load_policy
from rollouts import Rollouts, rollout, with_further
from runs import STALL, Limits, Settings, Watch, parser_of
from scm import sample_example

SMALL = ["--batch-size", "3", "--num-generations", "4", "--max-completion-length", "32",
         "--learning-rate", "1e-3", "--eval-scenes", "0", "--device", "cpu"]  # fmt: skip
# Smaller still, yet each of its first steps moves the weights: some completions are rewarded.
LESS = ["--batch-size", 2, "--num-generations", 3, "--max-completion-length", 20]
# Where only the files of a run matter, not what its weights learn: nothing is scored, little is said.
FEW = ["--batch-size", 1, "--num-generations", 2, "--max-completion-length", 8,
       "--lambda-s", 0, "--lambda-n", 0]  # fmt: skip
STEP = inspect.signature(train.train_step)
SHAPES = ("completion_ids", "lengths", "reasoning_start", "reasoning_end", "answer_start",
          "truncated")  # fmt: skip
TIMES = ("rollout_seconds", "score_seconds", "update_seconds")


def run(output, *flags, model=None):
    flags = [*SMALL, "--output", str(output), *map(str, flags)]
    return train.main([*flags, "--model", str(model)] if model else flags)


def step_of(arguments):
    """The step that `train.train_step` is called for."""
    return STEP.bind(*arguments).arguments["step"]


def metrics(folder):
    return list(csv.DictReader(io.StringIO((folder / "metrics.csv").read_text())))


def without_times(folder):
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics(folder)]


def weights(folder):
    return load_policy(folder / "checkpoint").model.state_dict()


def assert_equal_and_moved(a, b, start):
    """Two runs from one start have the same weights, which are not those of the start."""
    a, b, start = weights(a), weights(b), load_policy(start).model.state_dict()
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert any(not torch.equal(a[k], start[k]) for k in a)


# -- GRPO --------------------------------------------------------------------------------------
def grpo(model, steps, seed):
    """GRPO written out on its own: rows of its metrics."""
    policy, reference = load_policy(model), load_policy(model)
    policy.model.get_encoder(modality="image").requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1e-3, weight_decay=0.0)
    settings = train.parse_arguments([*SMALL, "--seed", str(seed)])
    rows = []
    for step, examples in zip(range(steps), train.batches(settings, None), strict=False):
        inputs = collate(examples, policy.processor)
        generator = train.generator_for(seed, step, "rollout")
        with torch.no_grad():
            r = rollout(policy, policy.prefill(inputs), examples, 4, 32, generator)
        groups = r.rewards.view(3, 4)
        advantages = torch.zeros(3, 4)
        for i, group in enumerate(groups):
            if group.max() > group.min():
                advantages[i] = (group - group.mean()) / (group.std() + 1e-4)
        batch = r.prompt_index, r.completion_ids, r.completion_mask
        with torch.no_grad():
            ref, _ = reference.per_token_logps(reference.prefill(inputs), *batch)
        logps, entropy = policy.per_token_logps(policy.prefill(inputs), *batch)
        per_token = -torch.exp(logps - logps.detach()) * advantages.view(12, 1)
        kl = torch.exp(ref - logps) - (ref - logps) - 1
        per_token = (per_token + 0.04 * kl) * r.completion_mask
        loss = (per_token.sum(1) / r.lengths).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
        optimizer.step()
        rows.append({
            "reward": groups.mean().item(),
            "reward_std": groups.std(1).mean().item(),
            "completion_length": r.lengths.float().mean().item(),
            "kl": ((kl * r.completion_mask).sum() / r.completion_mask.sum()).item(),
            "loss": loss.item(),
            "entropy": (entropy.sum() / r.completion_mask.sum()).item(),
            "grad_norm": norm.item(),
        })  # fmt: skip
    return rows


def test_lambda_zero_gives_the_metrics_of_a_grpo_written_independently(speaker, tmp_path):
    assert (
        run(tmp_path, "--steps", 3, "--lambda-s", 0, "--lambda-n", 0, "--seed", 7, model=speaker)
        == 0
    )
    rows = metrics(tmp_path)
    for row, expected in zip(rows, grpo(speaker, 3, seed=7), strict=True):
        assert {k: row[k] for k in expected} == {k: f"{v:.6g}" for k, v in expected.items()}
    assert {row["rows_scored"] for row in rows} == {"0"} == {row["causal_reward"] for row in rows}
    assert len({row["reward"] for row in rows}) > 1 and float(rows[0]["reward_std"]) > 0


def test_lambda_zero_asks_the_policy_nothing(speaker, tmp_path, monkeypatch):
    def never(*_):
        raise AssertionError("scored")

    monkeypatch.setattr(train, "Interventions", never)
    assert run(tmp_path, "--steps", 1, "--lambda-s", 0, "--lambda-n", 0, model=speaker) == 0


def test_copo_changes_the_advantages_of_reasoning_tokens_only(speaker, tmp_path):
    assert run(tmp_path, "--steps", 1, "--pairing", "independent", model=speaker) == 0
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 12 and any(sum(s["causal_reward"]) > 0 for s in samples)
    for s in samples:
        own = s["advantage"][-1]  # the end token is never reasoning
        for inside, causal, suff, nec, advantage in zip(
            s["reasoning"],
            s["causal_reward"],
            s["sufficiency"],
            s["necessity"],
            s["advantage"],
            strict=True,
        ):
            assert causal == pytest.approx(0.35 * (suff + nec), abs=2e-4)
            assert advantage == pytest.approx(own + (causal if inside else 0), abs=2e-4)
            assert inside or causal == 0


def test_loss_type_scale_and_upper_bound_reach_the_equations(speaker, tmp_path, monkeypatch):
    seen, loss = [], train.copo_loss

    def noted(*arguments):
        seen.append(inspect.signature(loss).bind(*arguments).arguments)
        return loss(*arguments)

    monkeypatch.setattr(train, "copo_loss", noted)
    flags = ["--loss-type", "dr_grpo", "--scale-rewards", "none", "--epsilon-high", 0.28]
    assert run(tmp_path, "--steps", 1, *flags, "--lambda-s", 0, "--lambda-n", 0, model=speaker) == 0
    (found,) = seen
    assert found["epsilon_high"] == 0.28
    assert found["num_completions"] == 12 and found["lengths"].tolist() == [32] * 12
    samples = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    rewards = torch.tensor([sample["reward"] for sample in samples]).view(3, 4)
    advantages = torch.tensor([sample["advantage"][0] for sample in samples]).view(3, 4)
    assert torch.allclose(advantages, rewards - rewards.mean(1, keepdim=True), atol=2e-4)


def test_the_learning_rate_follows_the_schedules_of_transformers():
    for steps, warmup in (10, 0), (10, 3), (7, 6):
        made = {
            "constant": transformers.get_constant_schedule_with_warmup,
            "linear": transformers.get_linear_schedule_with_warmup,
            "cosine": transformers.get_cosine_schedule_with_warmup,
        }
        for name, make in made.items():
            optimizer = torch.optim.SGD([torch.zeros(1)], lr=2.0)
            theirs = make(
                optimizer, warmup, **({} if name == "constant" else {"num_training_steps": steps})
            )
            settings = Settings(steps=steps, warmup_steps=warmup, lr_scheduler_type=name)
            for step in range(steps):
                assert 2.0 * runs.rate_at(settings, step) == pytest.approx(
                    optimizer.param_groups[0]["lr"]
                )
                optimizer.step()
                theirs.step()


def test_the_rate_that_is_logged_is_the_one_that_moves_the_weights(speaker, tmp_path):
    flags = ["--steps", 3, "--save-steps", 1, "--keep-checkpoints", 3]
    flags += ["--lr-scheduler-type", "linear", "--warmup-steps", 1]
    assert run(tmp_path, *flags, model=speaker) == 0
    assert [float(row["learning_rate"]) for row in metrics(tmp_path)] == [0, 1e-3, 5e-4]
    start, first, second = (
        load_policy(model).model.state_dict()
        for model in (speaker, tmp_path / "checkpoint-1", tmp_path / "checkpoint-2")
    )
    assert all(torch.equal(start[k], first[k]) for k in start)
    moved = max((second[k] - first[k]).abs().max().item() for k in start)
    assert moved == pytest.approx(1e-3, rel=0.1)  # AdamW's first step is as long as its rate


def test_further_rewards_enter_equation_1_alone(speaker, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "def length(completion, example):\n"
        "    return None if example.kind == 'choice' else min(len(completion) / 200, 1)\n"
    )
    outcome = ["--steps", 1, "--reward", "rewards:outcome_reward"]
    both = [*outcome, "mine:length", "--reward-weights", 1, -0.5]
    assert run("one", *outcome, model=speaker) == run("two", *both, model=speaker) == 0
    one, two = (
        [json.loads(line) for line in Path(name, "samples.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    asked = ("reward", "tokens", "sufficiency", "necessity", "causal_reward")
    assert all(a[name] == b[name] for a, b in zip(one, two, strict=True) for name in asked)
    assert any(map(any, (sample["causal_reward"] for sample in two)))

    choices = torch.tensor([sample["kind"] == "choice" for sample in two])
    assert choices.any() and not choices.all()
    outcomes = torch.tensor([sample["reward"] for sample in two])
    lengths = [len("".join(sample["tokens"]).removesuffix("<eos>")) for sample in two]
    lengths = (torch.tensor(lengths) / 200).clamp(max=1)
    totals = outcomes - 0.5 * torch.where(choices, 0.0, lengths)
    advantages = torch.tensor([s["advantage"][-1] for s in two])  # the end token is never reasoning
    assert torch.allclose(
        advantages, train.group_advantages(totals.view(3, 4)).flatten(), atol=2e-3
    )
    (row,) = metrics(tmp_path / "two")
    for name, expected in {
        "reward": totals.mean(),
        "rewards/rewards:outcome_reward/mean": outcomes.mean(),
        "rewards/rewards:outcome_reward/std": outcomes.std(),
        "rewards/mine:length/mean": lengths[~choices].mean(),
        "rewards/mine:length/std": lengths[~choices].std(),
    }.items():
        assert float(row[name]) == pytest.approx(expected.item(), abs=1e-4), name
    assert not any(name.startswith("rewards/") for name in metrics(tmp_path / "one")[0])


def test_without_weights_rewards_count_the_same_and_one_that_never_applies_is_empty():
    def never(completion, example):
        return None

    examples = next(train.batches(Settings(batch_size=1), None))
    made = Rollouts(
        examples=examples, prompt_index=torch.zeros(2, dtype=torch.long), texts=["a", "b"],
        rewards=torch.tensor([0.0, 0.5]), reward=None, longest=8, **dict.fromkeys(SHAPES, None),
    )  # fmt: skip
    assert made.totals is made.rewards
    paid = with_further(made, ["o", "n", "l"], [never, lambda c, e: 0.25], None)
    assert paid.totals.tolist() == [0.25, 0.75]
    assert paid.components["n"].isnan().all() and torch.equal(paid.rewards, made.rewards)
    assert with_further(made, ["o", "n"], [never], [2.0, 1.0]).totals.tolist() == [0.0, 1.0]


# -- the same again ----------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_metrics_and_weights(speaker, tmp_path):
    for name in ("a", "b"):
        assert run(tmp_path / name, *LESS, "--steps", 2, model=speaker) == 0
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")
    assert_equal_and_moved(tmp_path / "a", tmp_path / "b", speaker)


def test_five_steps_equal_two_a_kill_and_the_rest_resumed(speaker, tmp_path, monkeypatch):
    flags = [*LESS, "--steps", 5, "--lr-scheduler-type", "cosine", "--warmup-steps", 2]
    flags += [
        "--eval-steps",
        2,
        "--eval-data",
        held_out_questions(photos(tmp_path / "photos").parent),
    ]
    assert run(tmp_path / "whole", *flags, model=speaker) == 0
    step = train.train_step

    def killed_in_the_fourth(*arguments):
        if step_of(arguments) == 3:
            raise SystemExit("killed")
        return step(*arguments)

    flags += ["--save-steps", 2]
    monkeypatch.setattr(train, "train_step", killed_in_the_fourth)
    with pytest.raises(SystemExit):
        run(tmp_path / "cut", *flags, model=speaker)
    # Step 0 is before training; the third is logged but not in the checkpoint.
    assert len(metrics(tmp_path / "cut")) == 1 + 3
    monkeypatch.setattr(train, "train_step", step)
    assert run(tmp_path / "cut", *flags, "--resume", model=speaker) == 0
    assert without_times(tmp_path / "whole") == without_times(tmp_path / "cut")
    samples = [(tmp_path / name / "samples.jsonl").read_text() for name in ("whole", "cut")]
    assert samples[0] == samples[1]
    assert_equal_and_moved(tmp_path / "whole", tmp_path / "cut", speaker)


def test_a_save_cut_short_leaves_the_checkpoint_before(speaker, tmp_path, monkeypatch, capsys):
    assert run(tmp_path, *LESS, "--steps", 1, model=speaker) == 0
    before = weights(tmp_path)
    monkeypatch.setattr(runs, "save_file", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    assert run(tmp_path, *LESS, "--steps", 2, "--resume", model=speaker) == 2
    assert "error: disk full" in capsys.readouterr().err
    after = weights(tmp_path)
    assert all(torch.equal(before[k], after[k]) for k in before)
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 1
    assert not list(tmp_path.glob("*.new"))


def numbers(folder):
    """Metrics as numbers, but for what rounding may tip over."""
    rows = without_times(folder)
    return torch.tensor(
        [[float(row[k]) for k in ("reward", "loss", "kl", "entropy")] for row in rows]
    )


@pytest.fixture(scope="module")
def whole(speaker, tmp_path_factory):
    """Runs of one step, of two updates, whose every backward pass takes the whole batch, by loss type."""
    made = {}
    for loss_type in ("grpo", "dapo"):
        made[loss_type] = tmp_path_factory.mktemp("whole")
        flags = ["--steps", 1, "--num-iterations", 2, "--loss-type", loss_type]
        assert run(made[loss_type], *flags, model=speaker) == 0
    return made


@pytest.mark.parametrize(
    ("flags", "loss_type"),
    [
        (["--micro-batch-size", "1"], "grpo"),
        (["--micro-batch-size", "1"], "dapo"),
        (["--gradient-checkpointing"], "grpo"),
    ],
)
def test_less_memory_gives_the_same_step(speaker, whole, tmp_path, flags, loss_type):
    both = ["--steps", 1, "--num-iterations", 2, "--loss-type", loss_type]
    assert run(tmp_path, *both, *flags, model=speaker) == 0
    assert torch.allclose(numbers(whole[loss_type]), numbers(tmp_path), rtol=1e-3, atol=1e-5)
    a, b = weights(whole[loss_type]), weights(tmp_path)
    start = load_policy(speaker).model.state_dict()
    moved = torch.cat([(a[k] - start[k]).flatten() for k in a])
    apart = torch.cat([(a[k] - b[k]).flatten() for k in a])
    assert apart.norm() < 0.02 * moved.norm()


def test_two_steps_move_every_trainable_parameter(speaker, tmp_path):
    assert run(tmp_path, *LESS, "--steps", 2, "--train-vision", model=speaker) == 0
    start, end = load_policy(speaker), load_policy(tmp_path / "checkpoint")
    still = [
        name
        for (name, a), b in zip(start.model.named_parameters(), end.model.parameters(), strict=True)
        if torch.equal(a, b)
    ]
    assert still == [name for name in still if "post_layernorm" in name]  # LLaVA does not use it


def test_an_interrupt_finishes_the_step_saves_and_says_how_to_go_on(
    speaker, tmp_path, monkeypatch, capsys
):
    step = train.train_step

    def interrupted(*arguments):
        if step_of(arguments) == 1:
            train.signal.raise_signal(train.signal.SIGINT)
        return step(*arguments)

    monkeypatch.setattr(train, "train_step", interrupted)
    assert run(tmp_path, *FEW, "--steps", 5, model=speaker) == 0
    assert len(metrics(tmp_path)) == 2
    assert json.loads((tmp_path / "checkpoint" / "state.json").read_text())["step"] == 2
    assert "--resume" in capsys.readouterr().out


def test_scenes_come_in_the_same_order_for_the_same_seed_whatever_makes_the_questions():
    settings = Settings(batch_size=6)
    again = train.batches(settings, None, lambda rng: sample_example(rng, 0.9))
    assert next(train.batches(settings, None)) == next(again)
    assert next(train.batches(Settings(batch_size=6, seed=1), None)) != next(again)


def test_crowds_ask_for_the_count_of_three_to_six_things():
    settings = Settings(batch_size=6, crowds=True)
    for example in next(train.batches(settings, None)):
        assert example.kind == "number" and 3 <= int(example.answer) <= 6
        assert len(example.scene.things) == int(example.answer)


def test_the_answers_before_and_after_are_kept_and_score_as_they_did(
    speaker, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, "saliency_sheet", lambda *_: {})  # takes long, and is not of them
    flags = ["--eval-scenes", 2, "--learning-rate", 0.01]
    assert run(tmp_path, "--steps", 1, *flags, model=speaker) == 0
    questions, figures = scene_questions(2), json.loads((tmp_path / "evaluation.json").read_text())
    for what, of in figures.items():
        texts = read_completions(tmp_path / f"answers-{what}.jsonl", questions, Bad())
        assert score_scenes(2, texts) == {setting: of[setting] for setting in HELD_OUT}
    said = (tmp_path / "answers-after.jsonl").read_text()
    about = json.loads((tmp_path / "about.json").read_text())
    assert 0 < about["trained"] < about["parameters"] and len(about["begun"]) == 10
    assert run(tmp_path, "--steps", 2, "--resume", *flags, model=speaker) == 0
    assert (tmp_path / "answers-after.jsonl").read_text() != said
    again = json.loads((tmp_path / "evaluation.json").read_text())
    assert again["before"] == figures["before"]


def test_logged_tokens_joined_are_the_text_also_of_a_tokenizer_that_drops_leading_spaces(policy):
    text = "<think> a café, a ☃ boat </think>\n"
    ids = policy.tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = runs.token_texts(policy, ids)
    assert len(tokens) == len(ids) and "".join(tokens) == text and " boat" in tokens

    class Pieces:  # decodes as a SentencePiece tokenizer does
        def text(self, ids):
            return "".join(ids).removeprefix(" ")

    assert runs.token_texts(Pieces(), [" I", " see", " a", " do", "g"]) == [
        "I", " see", " a", " do", "g",
    ]  # fmt: skip


# -- users' data -------------------------------------------------------------------------------
def photos(folder):
    folder.mkdir()
    rng = random.Random(0)
    rows = []
    for i, (name, mode) in enumerate(
        [("a.jpg", "RGB"), ("b.png", "RGBA"), ("c.png", "P"), ("d.jpg", "L")]
    ):
        image = Image.effect_noise((60 + 20 * i, 45), 80 + rng.randrange(40)).convert(mode)
        image.save(folder / name)
        rows.append(
            {"image": name, "question": "Is there a boat?", "answer": "yes" if i % 2 else "no"}
        )
    path = folder / "my.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_jpeg_and_png_files_of_a_user_are_trained_on(speaker, tmp_path):
    path = photos(tmp_path / "photos")
    flags = [*LESS, "--steps", 2, "--data", path, "--images", path.parent]
    assert run(tmp_path / "run", *flags, model=speaker) == 0
    samples = [
        json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    ]
    assert len(metrics(tmp_path / "run")) == 2
    assert {s["image"].rpartition("/")[2] for s in samples} == {"a.jpg", "b.png", "c.png", "d.jpg"}


HELD = ("eval_reward", "eval_reward_number", "eval_reward_yesno")


def held_out_questions(folder):
    """Four questions about two pictures of photos(), of two kinds."""
    rows = [("a.jpg", "Is there a cat?", "no"), ("b.png", "Is there a cat?", "yes"),
            ("a.jpg", "How many cats?", 0), ("b.png", "How many cats?", "two")]  # fmt: skip
    path = folder / "held.jsonl"
    keys = ("image", "question", "answer")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    return path


def test_held_out_questions_are_answered_before_now_and_then_and_after(
    speaker, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text(
        "def f(completion, example): return 0.5 if example.kind == 'number' else len(completion) / 999"
    )
    path = photos(tmp_path / "photos")
    held = held_out_questions(path.parent)
    usual = ["--steps", 3, "--data", path, "--reward", "mine:f"]
    look = ["--eval-data", held, "--eval-steps", 2]
    assert run("without", *usual, model=speaker) == run("with", *usual, *look, model=speaker) == 0
    logged = metrics(tmp_path / "with")
    assert [row["step"] for row in logged] == ["0", "1", "2", "3"]
    assert [bool(row[name]) for row in logged for name in HELD] == [True] * 3 + [False] * 3 + [
        True
    ] * 6
    assert [row["eval_reward_number"] for row in logged] == ["0.5", "", "0.5", "0.5"]
    assert {value for name, value in logged[0].items() if name not in ("step", *HELD)} == {""}
    # greedy answers of the model as it was before and is after
    for row, model in (logged[0], speaker), (logged[-1], tmp_path / "with" / "checkpoint"):
        texts = load_policy(model).answer(read_examples(held, None)[:2], 32)
        told = sum(map(len, texts)) / 2 / 999
        assert float(row["eval_reward_yesno"]) == pytest.approx(told, rel=1e-5)
        assert float(row["eval_reward"]) == pytest.approx((told + 0.5) / 2, rel=1e-5)
    # and nothing else has changed
    assert [{k: v for k, v in row.items() if k not in (*TIMES, *HELD)} for row in logged[1:]] == (
        without_times(tmp_path / "without")
    )
    a, b = weights(tmp_path / "with"), weights(tmp_path / "without")
    assert all(torch.equal(a[k], b[k]) for k in a)
    page = (tmp_path / "with" / "report.html").read_text()
    assert "Held-out questions" in page and "<title>step 0:" not in page
    assert "Held-out" not in (tmp_path / "without" / "report.html").read_text()
    assert "step 0: eval_reward " in capsys.readouterr().err


def test_bad_held_out_questions_are_refused_before_training_and_known_ones_named(
    speaker, tmp_path, capsys
):
    path = photos(tmp_path / "photos")
    flags = ["--steps", 1, "--data", path, "--eval-data", path, "--dry-run"]
    assert run(tmp_path / "run", *flags, model=speaker) == 0
    assert "warning: 4 of 4 examples of --eval-data are in --data, too" in capsys.readouterr().err
    held = held_out_questions(path.parent)
    held.write_text(
        held.read_text() + '{"image": "a.jpg", "question": "?", "answer": "?", "k": 1}\n'
    )
    assert run(tmp_path / "run", *flags[:-2], held, model=speaker) == 2
    error = capsys.readouterr().err.strip()
    assert "held.jsonl:5: unknown key 'k'" in error and "\n" not in error
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_resumed_with_other_held_out_questions(speaker, tmp_path, capsys):
    held = held_out_questions(photos(tmp_path / "photos").parent)
    flags = ["--eval-data", held, "--eval-steps", 5]
    assert run(tmp_path / "run", *flags, "--steps", 1, model=speaker) == 0
    held.write_text(held.read_text().replace("cat", "dog"))
    assert run(tmp_path / "run", *flags, "--steps", 2, "--resume", model=speaker) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "cannot resume" in error and "held.jsonl has changed since the run began" in error


def test_a_log_that_an_older_version_began_keeps_its_columns(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,reward\n1,0.5\n")
    log = runs.Log(tmp_path, 1)
    log.write({"step": 2, "reward": 0.25, "new": 7.0})
    assert (tmp_path / "metrics.csv").read_text() == "step,reward\n1,0.5\n2,0.25\n"


def test_bad_data_ends_with_code_2_one_line_each_and_nothing_written(speaker, tmp_path, capsys):
    path = photos(tmp_path / "photos")
    path.write_text(path.read_text() + '{"image": "e.jpg", "question": "?", "answer": "no"}\n')
    flags = ["--steps", 3, "--data", path, "--images", path.parent]
    assert run(tmp_path / "run", *flags, model=speaker) == 2
    error = capsys.readouterr().err.strip()
    assert "my.jsonl:5: image" in error and "does not exist" in error and "\n" not in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--confounding", "1.5"], "--confounding is 1.5, must be between 0 and 1"),
        (["--num-generations", "1"], "--num-generations is 1, must be at least 2"),
        (["--lambda-s", "-1"], "--lambda-s"),
        (["--model", "no/such/folder"], "no/such/folder"),
        (["--data", "no.jsonl"], "no.jsonl"),
        (["--warmup-steps", "40"], "--warmup-steps is 40, must be below --steps, 40"),
        (["--epsilon-high", "-1"], "--epsilon-high is -1.0, must be at least 0"),
        (["--reward", "rewards:yes_no", "rewards:yes_no"], "the same function twice"),
        (
            ["--reward", "rewards:yes_no", "rewards:no"],
            "--reward rewards:no: must be module:function",
        ),
        (["--reward-weights", "1"], "--reward has 0"),
        (["--reward", "rewards:yes_no", "--reward-weights", "2"], "--reward has 1"),
        (
            ["--reward", "rewards:yes_no", "rewards:number", "--reward-weights", "1", "nan"],
            "must be numbers that are finite",
        ),
        (["--eval-data", "no.jsonl"], "no.jsonl"),
        (["--crowds", "--fog", "0.5"], "--crowds is a world of its own"),
    ],
)
def test_bad_arguments_end_with_code_2_and_one_line(tmp_path, capsys, flags, reason):
    assert run(tmp_path / "run", *flags) == 2
    error = capsys.readouterr().err.strip()
    assert reason in error and "\n" not in error


def test_a_run_is_never_overwritten_nor_resumed_with_other_settings(speaker, tmp_path, capsys):
    assert run(tmp_path, *FEW, "--steps", 1, model=speaker) == 0
    before = (tmp_path / "metrics.csv").read_text()
    assert run(tmp_path, *FEW, "--steps", 1, model=speaker) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert run(tmp_path, *FEW, "--steps", 2, "--resume", "--beta", "0.5", model=speaker) == 2
    assert "--beta" in capsys.readouterr().err
    assert (tmp_path / "metrics.csv").read_text() == before


# -- warnings, help ----------------------------------------------------------------------------
def row(**changes):
    return {
        "step": 1,
        "skipped": 0.0,
        "approximate": 0.0,
        "frac_reward_zero_std": 0.0,
        "truncated": 0.0,
        "malformed": 0.0,
    } | changes


def test_trouble_is_said_once(capsys):
    watch = Watch()
    for _ in range(2 * STALL):
        watch.see(row(truncated=0.9))
    assert capsys.readouterr().err.count("cut off") == 1


def test_losses_that_stay_non_finite_end_the_run():
    watch = Watch()
    for _ in range(STALL - 1):
        watch.see(row(skipped=1.0))
    with pytest.raises(FloatingPointError, match="last checkpoint"):
        watch.see(row(skipped=1.0))


def test_a_step_that_is_not_finite_leaves_the_weights_alone(speaker):
    policy = load_policy(speaker)
    settings = train.parse_arguments(SMALL)
    examples = next(train.batches(settings, None))
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=1.0)
    with torch.no_grad():
        prefix = policy.prefill(collate(examples, policy.processor))
    r = rollout(policy, prefix, examples, 4, 32, torch.Generator().manual_seed(0))
    before = [p.clone() for p in policy.model.parameters()]
    nothing = torch.full(r.completion_ids.shape, torch.nan)
    result = train.update(policy, None, optimizer, r, nothing, settings, Limits(settings))
    assert result["skipped"] == 1.0
    assert all(torch.equal(a, b) for a, b in zip(before, policy.model.parameters(), strict=True))


@pytest.mark.parametrize("main", [train.main, evaluate.main])
def test_help_exits_with_0(main, capsys):
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and "usage" in capsys.readouterr().out


def test_every_setting_is_a_flag_with_a_help_text_and_its_default():
    actions = {action.dest: action for action in parser_of("")._actions if action.dest != "help"}
    assert set(actions) == set(vars(Settings()))
    assert all(action.help for action in actions.values())
    assert train.parse_arguments([]) == Settings()


def test_flags_arrive_in_the_type_of_their_field():
    flags = ["--steps", "3", "--beta", "0", "--data", "q.jsonl", "--lora-rank", "4", "--resume"]
    found = train.parse_arguments([*flags, "--no-skip-bad", "--model", "x"])
    assert (found.steps, found.beta, found.lora_rank, found.model) == (3, 0.0, 4, "x")
    assert found.data == Path("q.jsonl") and found.resume is True and found.skip_bad is False
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.steps = 4


@pytest.mark.parametrize(
    ("flag", "meant"),
    [("--modle=x", "--model"), ("--lambda_s=1", "--lambda-s"), ("--step=3", "--steps")],
)
def test_a_flag_that_is_none_is_one_line_that_names_the_one_that_was_meant(flag, meant, capsys):
    with pytest.raises(SystemExit) as end:
        train.main([flag])
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and f"did you mean {meant}?" in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_device_that_is_not_there_is_refused_before_anything_is_made(tmp_path, capsys):
    assert train.main(["--device", "cuda", "--output", str(tmp_path / "run")]) == 2
    assert "no CUDA GPU: use --device cpu" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("unit", ["0", "-1", "tokens", "2.5", ""])
def test_a_unit_that_is_none_is_refused_in_one_line(unit, capsys):
    assert train.main([f"--unit={unit}", "--steps", "1"]) == 2
    assert "must be auto, token, word" in capsys.readouterr().err


def test_cheaper_questions_are_said_once_and_are_in_log_and_samples(
    tmp_path, capfd, monkeypatch, speaker
):
    monkeypatch.setattr("gpu.long.MOST_UNITS", 1)
    assert run(tmp_path / "run", "--steps", 2, model=speaker) == 0
    rows = metrics(tmp_path / "run")
    asked = {row["approximate"] for row in rows}
    assert "1" in asked
    assert capfd.readouterr().err.count("by cheaper questions than the paper's") == 1
    samples = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    told = {(s["step"], s["approximate"]) for s in map(json.loads, samples)}
    assert told == {(int(row["step"]), row["approximate"] == "1") for row in rows}


def test_grpo_asks_no_question_and_so_none_that_is_cheaper(tmp_path, capfd, monkeypatch, speaker):
    monkeypatch.setattr("gpu.long.MOST_UNITS", 1)
    plain = ("--steps", 1, "--lambda-s", 0, "--lambda-n", 0)
    assert run(tmp_path / "run", *plain, model=speaker) == 0
    assert [row["approximate"] for row in metrics(tmp_path / "run")] == ["0"]
    assert "cheaper questions" not in capfd.readouterr().err


def test_equation_4_can_be_another_function_and_is_what_reasoning_tokens_are_paid(speaker):
    policy, settings = load_policy(speaker), train.parse_arguments(SMALL)
    examples = next(train.batches(settings, None))
    with torch.no_grad():
        prefix = policy.prefill(collate(examples, policy.processor))
    r = rollout(policy, prefix, examples, 4, 32, torch.Generator().manual_seed(0))

    def scores(**named):
        generator = torch.Generator().manual_seed(1)
        return train.score(policy, prefix, r, settings, generator, Limits(settings), **named)

    def without_sufficiency(sufficiency, necessity, lambda_s, lambda_n):
        return 0.5 + 2 * necessity

    usual, other = scores(), scores(causal_reward=without_sufficiency)
    assert torch.equal(other.causal_rewards, 0.5 + 2 * usual.necessity)
    paid = other.token_advantages - other.advantages[:, None]
    expected = torch.where(r.reasoning_mask, 0.5 + 2 * usual.necessity, 0.0)
    assert torch.allclose(paid, expected, atol=1e-6) and paid.any()
