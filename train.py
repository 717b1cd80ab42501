"""Train a multimodal LLM with COPO.

    python train.py                                     the tiny model on the scene world, from nothing
    python train.py --lambda-s 0 --lambda-n 0           the same with plain GRPO: nothing is scored
    python train.py --model DIR --data q.jsonl --images photos/        your model, your questions

A step is three verbs over one prefill of the prompts:

    rollout   G completions per prompt, and their outcome rewards                    rollouts.py
    score     sufficiency and necessity of every reasoning token -> advantages       equations 1 to 5
    update    the clipped objective on the completions' log-probabilities            equation 6

Everything random in step s is drawn from generators seeded by (seed, s): a resumed run continues as
if it had never stopped.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

# Before torch: its idle threads spin, which on a busy machine takes the cores from what they wait for.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")
# Before tqdm: in a file a bar would be a thousand carriage returns.
if not sys.stderr.isatty():
    os.environ.setdefault("TQDM_DISABLE", "1")

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from copo import causal_completeness, copo_loss, group_advantages, inject, loss_lengths
from data import DataError, Example, collate, explain, read_examples, report_bad
from gpu.long import ways_of_asking
from hallucination.files import write_whole
from hallucination.saliency import saliency_sheet
from hallucination.scenes import compare_table, evaluate_scenes
from interventions import Interventions, causal_rewards
from model import Policy, Prefix, check_example, load_config, load_policy, load_processor
from page.terminal import example_of, in_time, opening
from report import write_report
from rewards import RewardFunction, outcome_reward
from rollouts import Causal, Rollouts, Scores, rollout, with_further
from runs import (
    ABOUT,
    LOWER,
    Curves,
    Limits,
    Log,
    Settings,
    Watch,
    about,
    check,
    default_dtype,
    describe_step,
    load_rewards,
    open_run,
    own_folder,
    parser_of,
    rate_at,
    read_or_empty,
    restore_optimizer,
    sample_rows,
    save_checkpoint,
)
from scm import KINDS, World, sample_of_kinds, world_of
from tiny import IN_CROWDS, WarmStart, build_tiny_policy, warm_start

# ---------------------------------------------------------------------------------------------
# One step: rollout (rollouts.py), score, update
# ---------------------------------------------------------------------------------------------
STAGES = ("rollout", "score", "update")


def train_step(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    examples: list[Example],
    settings: Settings,
    limits: Limits,
    step: int,
    scoring: Callable[..., Scores] | None = None,
    rewards: Sequence[RewardFunction] = (),
) -> tuple[dict[str, float | None], list[dict]]:
    """Rollout, score, update.  Returns a row of metrics.csv and rows of samples.jsonl.

    scoring: another way to pay tokens, for experiments; without it, `score`.
    rewards: the outcome's and further ones; without them, those of `settings` are loaded anew.
    """
    outcome, *further = rewards or load_rewards(settings) or [outcome_reward]
    clock = [time.perf_counter()]
    with torch.no_grad():
        prefix = policy.prefill(collate(examples, policy.processor))
    rollouts = rollout(
        policy,
        prefix,
        examples,
        settings.num_generations,
        settings.max_completion_length,
        generator_for(settings.seed, step, "rollout"),
        settings.temperature,
        outcome,
    )
    if further:
        rollouts = with_further(rollouts, settings.reward, further, settings.reward_weights)
    clock.append(time.perf_counter())
    generator = generator_for(settings.seed, step, "score")
    scores = (scoring or score)(policy, prefix, rollouts, settings, generator, limits)
    clock.append(time.perf_counter())
    rate = optimizer.defaults["lr"] * rate_at(settings, step)
    for group in optimizer.param_groups:
        group["lr"] = rate
    metrics = update(
        policy, reference, optimizer, rollouts, scores.token_advantages, settings, limits
    )
    clock.append(time.perf_counter())
    seconds = {f"{name}_seconds": clock[i + 1] - clock[i] for i, name in enumerate(STAGES)}
    row = {"step": step + 1} | describe_step(rollouts, scores) | metrics
    row |= {"learning_rate": rate} | seconds
    return row, sample_rows(policy, rollouts, scores, step)


def generator_for(seed: int, step: int, purpose: str) -> torch.Generator:
    """Random numbers of one purpose in one step: what is scored never shifts what is sampled."""
    return torch.Generator().manual_seed(random.Random(f"{purpose} {seed} {step}").getrandbits(63))


def score(
    policy: Policy,
    prefix: Prefix,
    rollouts: Rollouts,
    settings: Settings,
    generator: torch.Generator,
    limits: Limits,
    causal_reward: Callable[..., Tensor] = causal_completeness,
    interventions: type[Interventions] | None = None,
) -> Scores:
    """Equations 1 to 5.  A weight of 0 asks nothing of the policy: both at 0 is GRPO, bit for bit."""
    groups = rollouts.totals.view(len(rollouts.examples), -1)  # (B, G)
    advantages = group_advantages(groups, settings.scale_rewards).flatten()  # equation 1, (N,)
    outcomes = rollouts.rewards.view(groups.shape)
    seed = int(torch.randint(2**62, (), generator=generator))
    ways = ways_of_asking(rollouts, settings.unit, settings.num_continuations)
    if interventions:
        ways["interventions"] = interventions

    def questions(max_rows: int) -> Causal:
        return causal_rewards(
            policy,
            prefix,
            rollouts,
            seed,  # asked again with fewer rows, the same is drawn
            settings.lambda_s,
            settings.lambda_n,
            causal_reward,
            pairing=settings.pairing,
            temperature=settings.temperature,
            max_rows=max_rows,
            max_scored_tokens=settings.max_scored_tokens,
            **ways,
            asked=earns_causal_reward(outcomes, settings.zero_variance).flatten(),
        )

    N, C = rollouts.completion_ids.shape
    fit = policy.rows_that_fit(prefix.mask.shape[1], settings.max_completion_length)
    most = min(fit, N * C * (settings.num_continuations + 1))
    causal = limits.rows.fit(most, "scoring", questions)  # equations 2 to 4
    token_advantages = inject(advantages, causal.rewards, rollouts.reasoning_mask)  # equation 5
    return Scores(
        causal.sufficiency, causal.necessity, causal.rewards, advantages, token_advantages,
        causal.evidence,
    )  # fmt: skip


def earns_causal_reward(groups: Tensor, zero_variance: str) -> Tensor:
    """Which completions may earn one, (B, G) bool, where `zero_variance` decides for groups of equal rewards.

    Their advantage is 0, but a causal reward is never negative, so it moves them all the same: keep (as
    in the paper); drop, for all of them; gate, for those that are all wrong, where it would reinforce
    whatever was sampled.
    """
    equal = (groups == groups[:, :1]).all(1, keepdim=True)
    silent = {"keep": equal & False, "drop": equal, "gate": equal & (groups[:, :1] == 0)}
    return ~silent[zero_variance].expand_as(groups)


def update(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    token_advantages: Tensor,
    settings: Settings,
    limits: Limits,
) -> dict[str, float]:
    """Equation 6: `--num-iterations` optimiser steps on the rollouts.  Returns the last one's metrics.

    A step whose loss or gradient is not finite leaves the weights alone and reports `skipped`.
    """
    B, what = len(rollouts.examples), "updating"
    old_per_token_logps = ref_per_token_logps = None
    if reference is not None:

        @torch.no_grad()
        def of_reference(size: int) -> Tensor:
            parts = slices_of_prompts(rollouts, size)
            return torch.cat([logps_of(reference, rollouts, p, settings)[0] for p in parts])

        ref_per_token_logps = limits.prompts.fit(B, what, of_reference)
    for _ in range(settings.num_iterations):
        old, ref = old_per_token_logps, ref_per_token_logps
        metrics, logps = limits.prompts.fit(
            B,
            what,
            lambda size, old=old, ref=ref: gradients(
                policy, optimizer, rollouts, token_advantages, old, ref, settings, size
            ),
        )
        if old_per_token_logps is None:  # the policy that sampled: the one before the first update
            old_per_token_logps = logps
        norm = clip_gradients(policy, settings)
        skipped = not (math.isfinite(metrics["loss"]) and math.isfinite(norm))
        if not skipped:
            optimizer.step()
        metrics |= {"grad_norm": norm, "skipped": float(skipped)}
    return metrics


def clip_gradients(policy: Policy, settings: Settings) -> float:
    """Clip the gradients to --max-grad-norm, unless that is 0.  Returns their norm before."""
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    return torch.nn.utils.clip_grad_norm_(trained, settings.max_grad_norm or math.inf).item()


def gradients(
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    rollouts: Rollouts,
    token_advantages: Tensor,
    old_per_token_logps: Tensor | None,
    ref_per_token_logps: Tensor | None,
    settings: Settings,
    size: int,
) -> tuple[dict[str, float], Tensor]:
    """Gradients of equation 6 over the whole batch, `size` prompts in one backward pass.

    old_per_token_logps: (N, C), or None on the first pass, where the policy is the one that sampled.
    Returns the metrics, and the log-probabilities (N, C).
    """
    optimizer.zero_grad()
    tokens = rollouts.completion_mask.sum()
    lengths = loss_lengths(
        rollouts.completion_mask, settings.loss_type, settings.max_completion_length
    )
    metrics = dict.fromkeys(("kl", "clip_ratio", "loss", "entropy"), 0.0)
    logps = []
    for part in slices_of_prompts(rollouts, size):
        per_token_logps, entropy = logps_of(policy, rollouts, part, settings)
        logps.append(per_token_logps.detach())
        mask = rollouts.completion_mask[part]
        loss, of_part = copo_loss(
            per_token_logps,
            logps[-1] if old_per_token_logps is None else old_per_token_logps[part],
            None if ref_per_token_logps is None else ref_per_token_logps[part],
            token_advantages[part],
            mask,
            settings.epsilon,
            settings.beta,
            len(rollouts.prompt_index),
            settings.epsilon_high,
            lengths[part],
        )
        loss.backward()
        share = (mask.sum() / tokens).item()  # of the tokens that these means are over
        metrics["loss"] += loss.item()
        metrics["entropy"] += (entropy.sum() / tokens).item()
        metrics["kl"] += of_part["kl"] * share
        metrics["clip_ratio"] += of_part["clip_ratio"] * share
    return metrics, torch.cat(logps)


def slices_of_prompts(rollouts: Rollouts, size: int) -> list[slice]:
    """The completions of `size` prompts at a time: whole groups, so that a prompt runs once."""
    B = len(rollouts.examples)
    G = len(rollouts.prompt_index) // B
    return [slice(i * G, (i + size) * G) for i in range(0, B, size)]


def logps_of(
    policy: Policy, rollouts: Rollouts, part: slice, settings: Settings
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of some of the completions, (n, C) each."""
    prompts, ids, mask = (
        x[part] for x in (rollouts.prompt_index, rollouts.completion_ids, rollouts.completion_mask)
    )
    if settings.gradient_checkpointing:  # the reference, too: then what is equal gives a KL of 0
        return policy.full_per_token_logps(
            rollouts.examples, prompts, ids, mask, settings.temperature
        )
    examples = rollouts.examples[int(prompts[0]) : int(prompts[-1]) + 1]
    prefix = policy.prefill(collate(examples, policy.processor))
    return policy.per_token_logps(prefix, prompts - prompts[0], ids, mask, settings.temperature)


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------
MADE = {  # in the folder of the run: what to look at
    "report.html": "curves, and completions coloured by causal reward: open it in a browser",
    "metrics.csv": "one row per step",
    "samples.jsonl": "one row per completion, with scores per token",
    "checkpoint": "an ordinary Hugging Face folder: --model takes it",
}
CHECKED = "checked.json"  # in the folder of the run: the examples that the model's processor takes


def batches(
    settings: Settings,
    examples: Sequence[Example] | None,
    sample: Callable[[random.Random], Example] | None = None,
) -> Iterator[list[Example]]:
    """Endless batches of B prompts, the same for the same seed: fresh scenes, or shuffled epochs.

    sample: makes an example about a fresh scene; without it, a question of any kind.
    """
    B, seed = settings.batch_size, settings.seed
    if examples is None:
        if sample is None:
            sample = functools.partial(
                sample_of_kinds,
                confounding=settings.confounding,
                world=world_of(settings.fog, settings.crowds),
                kinds=("number",) if settings.crowds else KINDS,
            )
        for step in itertools.count():
            rng = random.Random(f"scenes {seed} {step}")
            yield [sample(rng) for _ in range(B)]
    queue: list[Example] = []
    for epoch in itertools.count():
        queue += random.Random(f"epoch {seed} {epoch}").sample(examples, len(examples))
        while len(queue) >= B:
            yield queue[:B]
            queue = queue[B:]


def train(
    settings: Settings,
    start: Path | None = None,
    sample: Callable[[random.Random], Example] | None = None,
    scoring: Callable[..., Scores] | None = None,
) -> None:
    """A whole run: warm start or load, train, evaluate before and after, report.

    For experiments: start, a warm start that is not that of `settings`; sample, other questions about
    scenes; scoring, another way to pay tokens.  Raises DataError for what cannot be used.
    """
    check(settings)
    with own_folder(settings) as folder:
        _train(settings, folder, start, sample, scoring)


def _train(
    settings: Settings,
    folder: Path,
    start: Path | None,
    sample: Callable[[random.Random], Example] | None,
    scoring: Callable[..., Scores] | None,
) -> None:
    """A whole run in a folder that no other process writes to."""
    settings = dataclasses.replace(settings, dtype=settings.dtype or default_dtype(settings))
    # Before anything is written: what cannot be used leaves no run behind.
    examples = usable_examples(settings, settings.data, folder) if settings.data else None
    held_out = usable_examples(settings, settings.eval_data, folder) if settings.eval_data else []
    warn_of_overlap(examples or [], held_out)
    if settings.dry_run:
        dry_run(settings, examples, folder)
        return
    checkpoint, arguments = open_run(settings, folder)
    start = start or settings.model or warm_start_of(settings, folder.parent)
    policy, reference, optimizer = load(settings, start, checkpoint)
    facts = about(policy)
    counts = facts["parameters"], facts["trained"]
    print(opening(settings, folder, *counts, examples), file=sys.stderr)
    if settings.model and not policy.processor.chat_template:
        print("the model has no chat template: its prompts are plain text", file=sys.stderr)
    done = restore_optimizer(checkpoint, optimizer) if checkpoint else 0
    measured, measure = folder / "evaluation.json", settings.eval_scenes if not settings.data else 0
    # Before args.json: what its package refuses, such as a missing login, has begun no run.
    with contextlib.closing(Curves(settings, folder, done, arguments)) as curves:
        write_whole(folder / "args.json", arguments)
        if checked := [example.source for example in [*(examples or []), *held_out]]:
            write_whole(folder / CHECKED, json.dumps(checked) + "\n")
        if checkpoint:
            print(f"going on from {checkpoint}, step {done}", file=sys.stderr)
        else:
            write_whole(folder / ABOUT, json.dumps(facts, indent=2) + "\n")
        figures = read_or_empty(measured) if done else {}
        if not figures:  # torn, or of a run that has begun again
            measured.unlink(missing_ok=True)
        elif done < settings.steps and figures.pop("after", None):  # of fewer steps
            write_whole(measured, json.dumps(figures) + "\n")
        if measure and "before" not in figures:
            before = load_from(start, settings) if done else policy
            figures["before"] = evaluate_run(before, settings, "before", folder)
            write_whole(measured, json.dumps(figures) + "\n")
        prompts = itertools.islice(batches(settings, examples, sample), done, settings.steps)
        models, log = (policy, reference, optimizer), Log(folder, done, curves)
        done = take_steps(*models, prompts, held_out, settings, folder, log, done, scoring)
    if done < settings.steps:
        print(f"stopped after step {done}; go on with --output {folder} --resume")
        return
    if measure:
        figures["after"] = evaluate_run(policy, settings, "after", folder)
        write_whole(measured, json.dumps(figures) + "\n")
        print("\n" + compare_table(figures))
    write_report(folder)
    for name, what in MADE.items():
        print(f"{folder / name}  {what}")


def warm_start_of(settings: Settings, cache: Path) -> Path:
    """The tiny model's warm start for the world of `settings`, made where the cache has none."""
    told = "made there once, in about two minutes on two quiet cores"
    print(f"warm start: taken from {cache}, or {told}", file=sys.stderr)
    return warm_start(cache, IN_CROWDS if settings.crowds else WarmStart(World(settings.fog)))


def usable_examples(settings: Settings, path: Path, folder: Path) -> list[Example]:
    """The examples of a file, each after one run of the model's processor: nothing fails later.

    Those of a run that is resumed have passed already.  Raises DataError, or with --skip-bad drops them.
    """
    examples = read_examples(path, settings.images, settings.skip_bad)
    with contextlib.suppress(OSError, ValueError):
        passed = set(json.loads((folder / CHECKED).read_text())) if settings.resume else set()
        if kept := [example for example in examples if example.source in passed]:
            return kept
    config, processor = config_and_processor(settings)
    problems, passed = [], []
    for example in tqdm(
        examples, desc="checking examples", unit="example", leave=False, disable=None
    ):
        try:
            check_example(example, config, processor, settings.max_completion_length)
            passed.append(example)
        except DataError as error:
            problems.append(f"{example.source}: {error}")
    report_bad(problems, len(examples), settings.skip_bad)
    if not passed:
        raise DataError(f"{path}: the model's processor takes none of its examples")
    return passed


def warn_of_overlap(examples: Sequence[Example], held_out: Sequence[Example]) -> None:
    """Say on stderr how many held-out examples are trained on: their figures would say nothing."""
    trained = {(example.image, example.question) for example in examples}
    if both := sum((example.image, example.question) in trained for example in held_out):
        print(
            f"warning: {both} of {len(held_out)} examples of --eval-data are in --data, too",
            file=sys.stderr,
        )


def take_steps(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    prompts: Iterator[list[Example]],
    held_out: Sequence[Example],
    settings: Settings,
    folder: Path,
    log: Log,
    done: int,
    scoring: Callable[..., Scores] | None,
) -> int:
    """Take a step on each batch of prompts, log it, measure and save now and then.  Returns the steps done.

    Ctrl-C lets the step end, saves and returns; pressed again, it stops at once.
    """
    stop = False

    def interrupted(*_) -> None:
        nonlocal stop
        stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)
        tqdm.write("stopping after this step; press Ctrl-C again to stop at once", sys.stderr)

    watch, limits = Watch(), Limits(settings)
    # Loaded once: a user's own may take long.
    rewards = load_rewards(settings) or [outcome_reward]
    bar = tqdm(
        prompts,
        desc="COPO" if settings.lambda_s or settings.lambda_n else "GRPO",
        initial=done,
        total=settings.steps,
        unit="step",
        disable=None,
    )
    first = done + 1
    signal_before = signal.signal(signal.SIGINT, interrupted)
    try:
        before = {} if done else eval_rewards(policy, held_out, rewards[0], settings, 0)
        for examples in bar:
            row, samples = train_step(
                policy, reference, optimizer, examples, settings, limits, done, scoring, rewards
            )
            if before and not done:
                log.write(dict.fromkeys(row) | {"step": 0} | before)
            done += 1
            row |= eval_rewards(policy, held_out, rewards[0], settings, done)
            log.write(row, samples)
            tell(bar, row, is_second=done == first + 1)
            watch.see(row, samples)
            if stop or done % settings.save_steps == 0 or done == settings.steps:
                save_checkpoint(
                    folder / "checkpoint", policy, optimizer, done, settings.keep_checkpoints
                )
                tqdm.write(example_of(samples[0]), sys.stderr)
            if stop:
                break
    finally:
        signal.signal(signal.SIGINT, signal_before)
    return done


def tell(bar: tqdm, row: dict[str, float | None], is_second: bool) -> None:
    """Show a step: on the bar, or without a terminal as a line.  The second says how long the rest takes.

    The first would not do: what is loaded or compiled once is in its time.
    """
    reward, causal = f"{row['reward']:.3f}", f"{row['causal_reward']:.3f}"
    seconds = sum(row[f"{stage}_seconds"] for stage in STAGES)
    bar.set_postfix(reward=reward, causal=causal)
    if bar.disable:
        of = f"step {row['step']}/{bar.total}"
        print(f"{of}: reward {reward}, causal {causal}, {in_time(seconds)}", file=sys.stderr)
    left = bar.total - row["step"]
    if is_second and left:
        rest = f"about {in_time(left * seconds)} to step {bar.total}"
        tqdm.write(f"step {row['step']} took {in_time(seconds)}: {rest}", sys.stderr)


def load(
    settings: Settings, start: str | Path, checkpoint: Path | None
) -> tuple[Policy, Policy | None, torch.optim.Optimizer]:
    """The policy as it is now, the frozen reference that it began as, and an optimiser."""
    if settings.lora_rank:
        from gpu.lora import AdaptedPolicy

        policy = AdaptedPolicy(load_from(start, settings), settings.lora_rank)
        if checkpoint:
            policy.restore(checkpoint)
        reference = policy.before_training() if settings.beta else None
    else:
        policy = load_from(checkpoint or start, settings)
        reference = load_from(start, settings) if settings.beta else None
        if not settings.train_vision:
            policy.model.get_encoder(modality="image").requires_grad_(False)
    if settings.gradient_checkpointing:
        policy.checkpoint_activations()
    trainable = [p for p in policy.model.parameters() if p.requires_grad]
    whole_model = settings.model and not settings.lora_rank
    kind = torch.optim.AdamW
    if settings.dtype != "float32":
        from gpu.master import MasterAdamW as kind
    rate = settings.learning_rate
    if rate is None:
        rate = 1e-6 if whole_model else 1e-4
    return policy, reference, kind(trainable, lr=rate, weight_decay=0.0)


def load_from(path: str | Path, settings: Settings) -> Policy:
    """The policy of a folder or hub name, on the run's device and in its type."""
    dtype = getattr(torch, settings.dtype)
    return load_policy(path, settings.device, dtype, settings.trust_remote_code)


def evaluate_run(policy: Policy, settings: Settings, what: str, folder: Path) -> dict:
    """Figures on held-out scenes, and where in the image the answers come from; the answers are kept."""
    world, save = world_of(settings.fog, settings.crowds), folder / f"answers-{what}.jsonl"
    save.unlink(missing_ok=True)  # of an evaluation that was cut short, or of fewer steps
    print(f"answering held-out scenes, {what} training", file=sys.stderr)
    figures = evaluate_scenes(policy, settings.eval_scenes, what, world, save=save)
    return figures | {"saliency": saliency_sheet(policy, what, world)}


def eval_rewards(
    policy: Policy,
    held_out: Sequence[Example],
    outcome: RewardFunction,
    settings: Settings,
    step: int,
) -> dict[str, float | None]:
    """Mean outcome rewards of greedy answers to held-out examples: of all, and of each kind.

    Due at step 0, every --eval-steps steps and after the last; None in between.
    """
    if not held_out:
        return {}
    kinds = sorted({example.kind for example in held_out})
    columns = {"eval_reward": kinds} | {f"eval_reward_{kind}": [kind] for kind in kinds}
    if step % settings.eval_steps and step != settings.steps:
        return dict.fromkeys(columns)
    earned: list[float] = []
    for start in tqdm(range(0, len(held_out), settings.batch_size), "held-out", leave=False):
        some = held_out[start : start + settings.batch_size]
        earned += map(outcome, policy.answer(some, settings.max_completion_length), some)
    found = {}
    for name, of in columns.items():
        some = [r for r, example in zip(earned, held_out, strict=True) if example.kind in of]
        found[name] = sum(some) / len(some)
    told = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    tqdm.write(f"step {step}: {told}", sys.stderr)
    return found


def estimate_memory(settings: Settings, examples: Sequence[Example] | None):
    """What a run would take of the memory; its prompts are as long as those of its first batch."""
    from gpu.memory import estimate

    config, processor = config_and_processor(settings)
    inputs = collate(next(batches(settings, examples)), processor)
    return estimate(config, settings, inputs["input_ids"].shape[1])


def dry_run(settings: Settings, examples: Sequence[Example] | None, folder: Path) -> None:
    """Print what a run would take of the memory and of the clock; nothing is written.

    A step that takes too long can be left out: Ctrl-C ends it, and the rest has been printed.
    """
    needs = estimate_memory(settings, examples)
    print(opening(settings, folder, needs.parameters, needs.trained, examples))
    print(needs.table(), flush=True)
    try:
        print(f"minutes per step: {minutes_of_step(settings, examples, folder, needs.peak)}")
    except KeyboardInterrupt:
        print("minutes per step: not measured: stopped")


def minutes_of_step(
    settings: Settings, examples: Sequence[Example] | None, folder: Path, peak: int
) -> str:
    """How long the first step takes on this machine, or why that was not measured.

    It is taken on weights that are then dropped.  The tiny model needs a warm start of an earlier run:
    before it speaks, its completions are of another length, and have no reasoning to score.
    """
    from gpu.memory import in_words, room

    made = folder.parent.glob(f"warm-start-{'?' * 12}/config.json")
    newest = max(made, key=lambda path: path.stat().st_mtime, default=None)
    start = settings.model or (newest and newest.parent)
    if not start:
        return (
            f"not measured: {folder.parent} has no warm start yet; the run makes one, and says after "
            f"its second step how long the rest takes"
        )
    if not Path(start).is_dir():
        return f"not measured: {start} is not a folder here; --steps 2 instead of --dry-run tells"
    if peak > (there := room(settings.device)):
        return f"not measured: the run needs {in_words(peak)}, this machine has {in_words(there)}"
    print("taking one step, to time it; Ctrl-C leaves it out", file=sys.stderr)
    models = load(settings, start, None)
    batch = next(batches(settings, examples))
    row, _ = train_step(*models, batch, settings, Limits(settings), 0)
    minutes = sum(row[f"{stage}_seconds"] for stage in STAGES) / 60
    told = (
        f"{minutes:.2g}, measured on one step of {start}; {settings.steps} steps: "
        f"{in_time(60 * minutes * settings.steps)}, without evaluations and checkpoints"
    )
    if (settings.lambda_s or settings.lambda_n) and not row["rows_scored"]:
        told += "; nothing of it was scored: steps whose completions have reasoning take longer"
    return told


def config_and_processor(settings: Settings):
    """Of the model that is to be trained, without its weights."""
    if settings.model:
        config = load_config(settings.model, settings.trust_remote_code)
        return config, load_processor(settings.model, config, settings.trust_remote_code)
    tiny = build_tiny_policy(world=world_of(crowds=settings.crowds))
    return tiny.model.config, tiny.processor


def parse_arguments(argv: Sequence[str] | None = None) -> Settings:
    """The command line; --help lists every flag with its default."""
    return Settings(**vars(parser_of(__doc__.split("\n")[0]).parse_args(argv)))


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C outside the steps."""
    settings = parse_arguments(argv)
    disable_progress_bar()  # the library's, for loading; ours stay
    try:
        train(settings)
    except torch.OutOfMemoryError:
        print(f"error: out of memory: {LOWER}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; what was saved is there: go on with --resume", file=sys.stderr)
        return 130
    except Exception as error:
        print(explain(error, settings.debug), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
