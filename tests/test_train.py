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
from PIL import Image

import evaluate
import runs
import train
from data import collate
from hallucination.files import Bad
from hallucination.scenes import HELD_OUT, read_completions, scene_questions, score_scenes
from model import load_policy
from rollouts import rollout
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


# -- the same again ----------------------------------------------------------------------------
def test_the_same_seed_gives_the_same_metrics_and_weights(speaker, tmp_path):
    for name in ("a", "b"):
        assert run(tmp_path / name, *LESS, "--steps", 2, model=speaker) == 0
    assert without_times(tmp_path / "a") == without_times(tmp_path / "b")
    assert_equal_and_moved(tmp_path / "a", tmp_path / "b", speaker)


def test_five_steps_equal_two_a_kill_and_the_rest_resumed(speaker, tmp_path, monkeypatch):
    flags = [*LESS, "--steps", 5]
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
    assert len(metrics(tmp_path / "cut")) == 3  # the third is logged but not in the checkpoint
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
    """A run of one step, of two updates, whose every backward pass takes the whole batch."""
    folder = tmp_path_factory.mktemp("whole")
    assert run(folder, "--steps", 1, "--num-iterations", 2, model=speaker) == 0
    return folder


@pytest.mark.parametrize("flags", [["--micro-batch-size", "1"], ["--gradient-checkpointing"]])
def test_less_memory_gives_the_same_step(speaker, whole, tmp_path, flags):
    assert run(tmp_path, "--steps", 1, "--num-iterations", 2, *flags, model=speaker) == 0
    assert torch.allclose(numbers(whole), numbers(tmp_path), rtol=1e-3, atol=1e-5)
    a, b = weights(whole), weights(tmp_path)
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


def test_equation_4_can_be_another_function_and_is_what_reasoning_tokens_are_paid(speaker):
    policy, settings = load_policy(speaker), train.parse_arguments(SMALL)
    examples = next(train.batches(settings, None))
    with torch.no_grad():
        prefix = policy.prefill(collate(examples, policy.processor))
    r = rollout(policy, prefix, examples, 4, 32, torch.Generator().manual_seed(0))

    def scores(**named):
        generator = torch.Generator().manual_seed(1)
        return train.score(policy, prefix, r, settings, generator, Limits(settings), **named)

    def only_necessity(sufficiency, necessity, lambda_s, lambda_n):
        return 2 * necessity

    usual, other = scores(), scores(causal_reward=only_necessity)
    assert torch.equal(other.causal_rewards, 2 * usual.necessity)
    paid = other.token_advantages - other.advantages[:, None]
    expected = torch.where(r.reasoning_mask, 2 * usual.necessity, 0.0)
    assert torch.allclose(paid, expected, atol=1e-6) and paid.any()
