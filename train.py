"""Train a multimodal LLM with COPO.

    python train.py                                     the tiny model on the scene world, from nothing
    python train.py --lambda-s 0 --lambda-n 0           the same with plain GRPO: nothing is scored
    python train.py --model DIR --data q.jsonl --images photos/        your model, your questions

A step is three verbs over one prefill of the prompts:

    rollout   G completions a prompt, and their outcome rewards                      rollouts.py
    score     sufficiency and necessity of every reasoning token -> advantages       interventions.py, copo.py
    update    the clipped objective on the completions' log-probabilities            copo.py

Everything random in step s is drawn from generators seeded by (seed, s): a resumed run continues as
if it had never stopped.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import itertools
import json
import math
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import checkpoints
from answers import fingerprint
from copo import copo_loss, group_advantages, inject, necessity, sufficiency
from data import (
    KINDS,
    DataError,
    Example,
    collate,
    describe_image,
    in_words,
    read_examples,
    sample_example,
)
from evaluate import compare_table, evaluate_scenes, saliency_sheet
from interventions import MASKS, PAIRINGS, Cost, Interventions
from lora import AdaptedPolicy
from master import MasterAdamW
from memory import Estimate, estimate
from model import Policy, Prefix, build_tiny_policy, load_config, load_policy, load_processor
from report import write_report
from rewards import load_reward, outcome_reward, well_formed
from rollouts import Rollouts, rollout
from variants import FORMS, causal_rewards, truth_rewards
from warm_start import WarmStart, warm_start

MAY_CHANGE = (  # when resuming
    "steps", "save_steps", "keep_checkpoints", "device", "max_rows", "micro_batch_size",
)  # fmt: skip
LOWER = "lower --max-completion-length, --num-generations or --batch-size"
Result = TypeVar("Result")
STALL = 10  # steps in a row that make a warning, or non-finite losses in a row that end the run


def _parser() -> argparse.ArgumentParser:
    """Every flag, grouped, with its default."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run = parser.add_argument_group("run")
    run.add_argument(
        "--model", help="model folder or hub name; without it, the tiny model is warm-started"
    )
    run.add_argument(
        "--output",
        type=Path,
        help="folder of the run; without it runs/first, or the next free runs/run-2, ...",
    )
    run.add_argument("--resume", action="store_true", help="go on from the run's last checkpoint")
    run.add_argument("--steps", type=int, default=40, help="optimiser steps in all")
    run.add_argument(
        "--save-steps", type=int, default=10, help="steps from one checkpoint to the next"
    )
    run.add_argument("--keep-checkpoints", type=int, default=2, help="the newest so many are kept")
    run.add_argument(
        "--seed", type=int, default=0, help="of the data, the sampling and the scoring"
    )
    run.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ..."
    )
    run.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="that the model computes in, trained weights being kept in float32 either way; "
        "without it, bfloat16 on cuda, float32 elsewhere",
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="print what the run would take of the memory, and stop",
    )
    run.add_argument(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run code that comes with the model: only for sources you trust",
    )
    run.add_argument(
        "--eval-scenes", type=int, default=300, help="held-out scenes, before and after; 0: none"
    )

    data = parser.add_argument_group("data")
    data.add_argument(
        "--data", type=Path, help="JSON lines: image, question, answer; without it, scenes"
    )
    data.add_argument(
        "--images", type=Path, help="folder that the image names in --data are relative to"
    )
    data.add_argument(
        "--reward", help="your own outcome reward, module:function of (completion, example)"
    )
    data.add_argument(
        "--skip-bad",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="drop bad lines of --data",
    )
    data.add_argument(
        "--confounding",
        type=float,
        default=0.9,
        help="scenes: chance of a background's home category",
    )
    data.add_argument(
        "--fog",
        type=float,
        default=0.0,
        help="scenes: the thickest fog, from 0 (clear) to 1 (things cannot be seen)",
    )
    data.add_argument(
        "--kinds",
        nargs="+",
        choices=KINDS,
        default=list(KINDS),
        help="scenes: kinds of questions; without caption, no outcome speaks of all that is named",
    )
    data.add_argument(
        "--in-words",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="scenes: a description in the place of the image (the paper's language-model control)",
    )

    grpo = parser.add_argument_group("GRPO")
    grpo.add_argument("--batch-size", type=int, default=16, help="prompts a step (B)")
    grpo.add_argument("--num-generations", type=int, default=8, help="completions a prompt (G)")
    grpo.add_argument(
        "--max-completion-length", type=int, default=64, help="tokens a completion (C)"
    )
    grpo.add_argument(
        "--temperature", type=float, default=1.0, help="of sampling, and of the log-probabilities"
    )
    grpo.add_argument(
        "--learning-rate",
        type=float,
        help="constant; without it, 1e-4 for the tiny model and for adapters, 1e-6 for --model",
    )
    grpo.add_argument(
        "--epsilon", type=float, default=0.2, help="clipping range of the ratio (equation 6)"
    )
    grpo.add_argument(
        "--beta", type=float, default=0.04, help="weight of the KL to the reference (equation 6)"
    )
    grpo.add_argument(
        "--num-iterations", type=int, default=1, help="updates on each batch of completions"
    )
    grpo.add_argument(
        "--max-grad-norm", type=float, default=1.0, help="gradients are clipped to this norm"
    )

    grpo.add_argument(
        "--train-vision",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="train the vision tower, too; the tiny model keeps the eyes that its warm start gave it",
    )

    memory = parser.add_argument_group("memory")
    memory.add_argument(
        "--lora-rank",
        type=int,
        help="train adapters of this rank in the place of the decoder's weights (needs peft)",
    )
    memory.add_argument(
        "--micro-batch-size", type=int, help="prompts in one backward pass; without it, all at once"
    )
    memory.add_argument(
        "--gradient-checkpointing",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="recompute activations in the backward pass; the prompt then runs once a completion",
    )

    causal = parser.add_argument_group("causal reward")
    causal.add_argument(
        "--lambda-s", type=float, default=0.35, help="weight of sufficiency (equation 4)"
    )
    causal.add_argument(
        "--lambda-n", type=float, default=0.35, help="weight of necessity (equation 4)"
    )
    causal.add_argument(
        "--num-continuations", type=int, default=4, help="continuations a set (H, equation 2)"
    )
    causal.add_argument(
        "--pairing", choices=PAIRINGS, default="coupled", help="of the continuations compared"
    )
    causal.add_argument(
        "--mask",
        choices=MASKS,
        default="zero",
        help="of necessity: a zeroed embedding (equation 3), or the policy's next choice in its place",
    )
    causal.add_argument(
        "--causal-form",
        choices=(*FORMS, "truth"),
        default="paper",
        help="of the causal reward: equation 4, or what variants.py puts in its place; truth: scenes only",
    )
    causal.add_argument(
        "--zero-variance",
        choices=("keep", "drop", "gate"),
        default="keep",
        help="causal rewards in groups whose outcomes are all equal: all, none, or none if all are wrong",
    )
    causal.add_argument(
        "--max-rows",
        type=int,
        help="rows scored at once; without it, what half of the free memory holds",
    )
    causal.add_argument(
        "--max-scored-tokens",
        type=int,
        help="reasoning tokens of a completion to score, those it was least sure of; without it, all",
    )
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help lists every flag with its default."""
    return _parser().parse_args(argv)


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse values that would only fail later.  Raises DataError."""
    for name, low, high in (
        ("steps", 1, math.inf),
        ("save_steps", 1, math.inf),
        ("keep_checkpoints", 1, math.inf),
        ("eval_scenes", 0, math.inf),
        ("batch_size", 1, math.inf),
        ("num_generations", 2, math.inf),
        ("max_completion_length", 8, math.inf),
        ("num_continuations", 1, math.inf),
        ("num_iterations", 1, math.inf),
        ("max_rows", 1, math.inf),
        ("max_scored_tokens", 1, math.inf),
        ("micro_batch_size", 1, math.inf),
        ("lora_rank", 1, math.inf),
        ("confounding", 0, 1),
        ("fog", 0, 1),
        ("lambda_s", 0, 1),
        ("lambda_n", 0, 1),
        ("epsilon", 0, 1),
        ("beta", 0, math.inf),
        ("temperature", 0.01, math.inf),
    ):
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            flag = "--" + name.replace("_", "-")
            allowed = f"between {low} and {high}" if high < math.inf else f"at least {low}"
            raise DataError(f"{flag} is {getattr(args, name)}, must be {allowed}")
    if args.in_words and args.data:
        raise DataError("--in-words describes scenes: it does not go with --data")
    if args.causal_form == "truth" and (args.data or args.model or not args.lambda_s):
        raise DataError(
            "--causal-form truth reads the tiny model's words about scenes, and pays by --lambda-s: "
            "it goes neither with --data nor with --model nor with --lambda-s 0"
        )
    if args.lora_rank and args.train_vision:
        raise DataError("--lora-rank trains the decoder: it does not go with --train-vision")
    if args.lora_rank and not importlib.util.find_spec("peft"):
        raise DataError("--lora-rank needs peft: pip install peft")
    if args.reward:
        load_reward(args.reward)


# ---------------------------------------------------------------------------------------------
# The three verbs: rollout (rollouts.py), score, update
# ---------------------------------------------------------------------------------------------
@dataclass
class Scores:
    """What a step's tokens earn, and why.  (N, C) each, but for advantages (N,)."""

    sufficiency: Tensor
    necessity: Tensor  # clamped, as it enters equation 4
    causal_rewards: Tensor
    advantages: Tensor
    token_advantages: Tensor
    cost: Cost


def score(
    policy: Policy,
    prefix: Prefix,
    rollouts: Rollouts,
    args: argparse.Namespace,
    generator: torch.Generator,
) -> Scores:
    """Equations 1 to 5.  A weight of 0 asks nothing of the policy: both at 0 is GRPO, bit for bit."""
    groups = rollouts.rewards.view(len(rollouts.examples), -1)  # (B, G)
    N, C = rollouts.completion_ids.shape
    advantages = group_advantages(groups).flatten()
    suff = nec = causal = torch.zeros(N, C, device=policy.device)
    cost = Cost()
    if args.causal_form == "truth":
        causal = truth_rewards(policy, rollouts, args.lambda_s)
    elif args.lambda_s or args.lambda_n:
        numbers = generator.get_state()

        def ask(max_rows: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Cost]:
            generator.set_state(numbers)
            interventions = Interventions(
                policy,
                prefix,
                rollouts,
                generator,
                num_continuations=args.num_continuations,
                pairing=args.pairing,
                mask=args.mask,
                temperature=args.temperature,
                max_rows=max_rows,
                max_scored_tokens=args.max_scored_tokens,
                asked=earns_causal_reward(groups, args.zero_variance).flatten(),
            )
            rewards = interventions.rewards(args.lambda_s > 0, args.lambda_n > 0)
            return *rewards, interventions.scored, interventions.cost

        fit = policy.rows_that_fit(prefix.mask.shape[1], args.max_completion_length)
        most = min(fit, N * C * (args.num_continuations + 1))
        with_, without, masked, scored, cost = with_less(args, "max_rows", most, "scoring", ask)
        suff = sufficiency(with_, without)
        nec = necessity(rollouts.rewards[:, None], masked).clamp(0, 1)
        causal = causal_rewards(
            args.causal_form,
            (with_, without),
            rollouts.rewards,
            masked,
            advantages,
            scored,
            args.lambda_s,
            args.lambda_n,
        )
    token_advantages = inject(advantages, causal, rollouts.reasoning_mask)
    return Scores(suff, nec, causal, advantages, token_advantages, cost)


def with_less(
    args: argparse.Namespace, budget: str, most: int, what: str, work: Callable[[int], Result]
) -> Result:
    """What `work` returns for as much at once as fits: the flag's value, or else `most`.

    Where memory runs out it is halved, for this step and those to come; the result is the same.
    Raises DataError where not even one fits.
    """
    while True:
        size = getattr(args, budget) or most
        try:
            return work(size)
        except torch.OutOfMemoryError:
            if size == 1:
                raise DataError(f"out of memory: {what} one at a time; {LOWER}") from None
        setattr(args, budget, size // 2)  # out of the handler, which holds on to what did not fit
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        flag = budget.replace("_", "-")
        tqdm.write(f"out of memory: {what} again with --{flag} {size // 2}", sys.stderr)


def earns_causal_reward(groups: Tensor, zero_variance: str) -> Tensor:
    """Which completions may earn one, (B, G) bool, by what becomes of groups whose rewards are all equal.

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
    args: argparse.Namespace,
) -> dict[str, float]:
    """Equation 6: `--num-iterations` optimiser steps on the rollouts.  Returns the last one's metrics.

    A step whose loss or gradient is not finite leaves the weights alone and reports `skipped`.
    """
    N, B = len(rollouts.which), len(rollouts.examples)

    def parts(size: int) -> list[slice]:
        """The completions of `size` prompts at a time: whole groups, so that a prompt runs once."""
        G = args.num_generations
        return [slice(i * G, (i + size) * G) for i in range(0, B, size)]

    def logps_of(network: Policy, part: slice) -> tuple[Tensor, Tensor]:
        which, ids, mask = (
            x[part] for x in (rollouts.which, rollouts.completion_ids, rollouts.completion_mask)
        )
        if args.gradient_checkpointing and torch.is_grad_enabled():
            return network.full_per_token_logps(
                rollouts.examples, which, ids, mask, args.temperature
            )
        examples = rollouts.examples[int(which[0]) : int(which[-1]) + 1]
        prefix = network.prefill(collate(examples, network.processor))
        return network.per_token_logps(prefix, which - which[0], ids, mask, args.temperature)

    @torch.no_grad()
    def logps_of_reference(size: int) -> Tensor:
        return torch.cat([logps_of(reference, part)[0] for part in parts(size)])

    def gradients(size: int) -> tuple[dict[str, float], Tensor]:
        """Of the whole batch, summed over its parts; the metrics, and the log-probabilities (N, C)."""
        optimizer.zero_grad()
        metrics = dict.fromkeys(("kl", "clip_ratio", "loss", "entropy"), 0.0)
        logps = []
        for part in parts(size):
            per_token_logps, entropy = logps_of(policy, part)
            logps.append(per_token_logps.detach())
            mask = rollouts.completion_mask[part]
            loss, of_part = copo_loss(
                per_token_logps,
                logps[-1] if old_per_token_logps is None else old_per_token_logps[part],
                None if ref_per_token_logps is None else ref_per_token_logps[part],
                token_advantages[part],
                mask,
                args.epsilon,
                args.beta,
                num_completions=N,
            )
            loss.backward()
            share = (mask.sum() / tokens).item()  # of the tokens that these means are over
            metrics["loss"] += loss.item()
            metrics["entropy"] += (entropy.sum() / tokens).item()
            metrics["kl"] += of_part["kl"] * share
            metrics["clip_ratio"] += of_part["clip_ratio"] * share
        return metrics, torch.cat(logps)

    what, tokens = "updating", rollouts.completion_mask.sum()
    old_per_token_logps = ref_per_token_logps = None
    if reference is not None:
        ref_per_token_logps = with_less(args, "micro_batch_size", B, what, logps_of_reference)
    for _ in range(args.num_iterations):
        metrics, logps = with_less(args, "micro_batch_size", B, what, gradients)
        if (
            old_per_token_logps is None
        ):  # the policy that sampled is the one before the first update
            old_per_token_logps = logps
        parameters = [p for p in policy.model.parameters() if p.requires_grad]
        grad_norm = torch.nn.utils.clip_grad_norm_(parameters, args.max_grad_norm).item()
        skipped = not (math.isfinite(metrics["loss"]) and math.isfinite(grad_norm))
        if not skipped:
            optimizer.step()
        metrics |= {"grad_norm": grad_norm, "skipped": float(skipped)}
    return metrics


# ---------------------------------------------------------------------------------------------
# One step, and what is logged of it
# ---------------------------------------------------------------------------------------------
def train_step(
    policy: Policy,
    reference: Policy | None,
    optimizer: torch.optim.Optimizer,
    examples: list[Example],
    args: argparse.Namespace,
    step: int,
) -> tuple[dict[str, float], list[dict]]:
    """Rollout, score, update.  Returns a row of metrics.csv and rows of samples.jsonl."""
    clock = [time.perf_counter()]
    with torch.no_grad():
        prefix = policy.prefill(collate(examples, policy.processor))
    rollouts = rollout(
        policy,
        prefix,
        examples,
        args.num_generations,
        args.max_completion_length,
        generator_for(args.seed, step, "rollout"),
        args.temperature,
        load_reward(args.reward) if args.reward else outcome_reward,
    )
    clock.append(time.perf_counter())
    scores = score(policy, prefix, rollouts, args, generator_for(args.seed, step, "score"))
    clock.append(time.perf_counter())
    metrics = update(policy, reference, optimizer, rollouts, scores.token_advantages, args)
    clock.append(time.perf_counter())
    stages = ("rollout_seconds", "score_seconds", "update_seconds")
    seconds = {name: clock[i + 1] - clock[i] for i, name in enumerate(stages)}
    row = {"step": step + 1} | describe_step(rollouts, scores) | metrics | seconds
    return row, sample_rows(policy, rollouts, scores, step)


def generator_for(seed: int, step: int, purpose: str) -> torch.Generator:
    """Random numbers of one purpose in one step: what is scored never shifts what is sampled."""
    return torch.Generator().manual_seed(random.Random(f"{purpose} {seed} {step}").getrandbits(63))


def describe_step(rollouts: Rollouts, scores: Scores) -> dict[str, float]:
    """What the rollouts earned and the scores found; README.md defines every column."""
    groups = rollouts.rewards.view(len(rollouts.examples), -1)  # (B, G)
    reasoning = rollouts.reasoning_mask

    def over_reasoning(values: Tensor) -> float:
        return (values[reasoning].sum() / reasoning.sum().clamp(min=1)).item()

    causal = over_reasoning(scores.causal_rewards)
    paid = over_reasoning(scores.causal_rewards.abs())  # a form of variants.py may charge, too
    outcome = over_reasoning(scores.advantages.abs()[:, None].expand_as(reasoning))
    return {
        "reward": groups.mean().item(),
        "reward_std": groups.std(1).mean().item() if groups.shape[1] > 1 else 0.0,
        "frac_reward_zero_std": (groups == groups[:, :1]).all(1).float().mean().item(),
        "sufficiency": over_reasoning(scores.sufficiency),
        "necessity": over_reasoning(scores.necessity),
        "causal_reward": causal,
        "causal_share": paid / max(paid + outcome, 1e-12),
        "completion_length": rollouts.lengths.float().mean().item(),
        "truncated": rollouts.truncated.float().mean().item(),
        "malformed": sum(not well_formed(text) for text in rollouts.texts) / len(rollouts.texts),
        "rows_scored": scores.cost.rows,
        "scoring_token_forwards": scores.cost.token_forwards,
    }


def sample_rows(policy: Policy, rollouts: Rollouts, scores: Scores, step: int) -> list[dict]:
    """The rows of samples.jsonl: a trajectory each, its scores a token."""
    rows = []
    for n, length in enumerate(rollouts.lengths.tolist()):
        example = rollouts.examples[int(rollouts.which[n])]

        def per_token(values: Tensor, n: int = n, length: int = length) -> list[float]:
            return [round(value, 4) for value in values[n, :length].tolist()]

        rows.append(
            {
                "step": step + 1,
                "prompt": example.question,
                "answer": example.answer,
                "image": describe_image(example),
                "reward": round(rollouts.rewards[n].item(), 4),
                "tokens": [policy.text([i]) for i in rollouts.completion_ids[n, :length].tolist()],
                "reasoning": rollouts.reasoning_mask[n, :length].tolist(),
                "sufficiency": per_token(scores.sufficiency),
                "necessity": per_token(scores.necessity),
                "causal_reward": per_token(scores.causal_rewards),
                "advantage": per_token(scores.token_advantages),
            }
        )
    return rows


# ---------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------
def batches(
    args: argparse.Namespace, examples: Sequence[Example] | None
) -> Iterator[list[Example]]:
    """Endless batches of B prompts, the same for the same seed: fresh scenes, or shuffled epochs."""
    if examples is None:
        for step in itertools.count():
            rng = random.Random(f"scenes {args.seed} {step}")
            scenes = itertools.islice(scene_examples(rng, args), args.batch_size)
            yield [in_words(example) for example in scenes] if args.in_words else list(scenes)
    queue: list[Example] = []
    for epoch in itertools.count():
        queue += random.Random(f"epoch {args.seed} {epoch}").sample(examples, len(examples))
        while len(queue) >= args.batch_size:
            yield queue[: args.batch_size]
            queue = queue[args.batch_size :]


def scene_examples(rng: random.Random, args: argparse.Namespace) -> Iterator[Example]:
    """Endless questions of the kinds asked for about fresh scenes."""
    while True:
        example = sample_example(rng, args.confounding, args.fog)
        if example.kind in args.kinds:
            yield example


class Log:
    """metrics.csv and samples.jsonl of a run: a row a step, on disk as soon as it is known."""

    def __init__(self, folder: Path, done: int):
        """Open the logs of a run that has `done` steps; rows of later steps are dropped."""
        self.metrics, self.samples = folder / "metrics.csv", folder / "samples.jsonl"
        rows = list(csv.reader(self.metrics.read_text().splitlines())) if done else []
        kept = [row for i, row in enumerate(rows) if i == 0 or int(row[0]) <= done]
        self.metrics.write_text("".join(",".join(row) + "\n" for row in kept))
        lines = self.samples.read_text().splitlines(keepends=True) if done else []
        self.samples.write_text("".join(line for line in lines if json.loads(line)["step"] <= done))

    def write(self, row: dict[str, float], samples: list[dict]) -> None:
        """Append one step."""
        with self.metrics.open("a") as file:
            if not file.tell():
                file.write(",".join(row) + "\n")
            file.write(",".join(f"{value:.6g}" for value in row.values()) + "\n")
        with self.samples.open("a") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)


class Watch:
    """Says in one line, once, what a reader of the curves should not have to find out alone."""

    def __init__(self):
        self.rows: list[dict[str, float]] = []
        self.said: set[str] = set()

    def see(self, row: dict[str, float]) -> None:
        """Look at the last STALL steps.  Raises FloatingPointError if none of them could be taken."""
        self.rows = [*self.rows, row][-STALL:]
        if row["skipped"]:
            tqdm.write(
                f"warning: step {row['step']}: loss or gradient not finite, step skipped",
                sys.stderr,
            )
        if len(self.rows) < STALL:
            return
        if all(r["skipped"] for r in self.rows):
            raise FloatingPointError(
                f"{STALL} steps in a row had a loss or gradient that is not finite; the last checkpoint "
                f"is whole: resume it with a lower --learning-rate or --dtype float32"
            )
        for name, what in (
            (
                "frac_reward_zero_std",
                "all completions of nearly every prompt earn the same: nothing to learn from",
            ),
            ("truncated", "most completions are cut off: raise --max-completion-length"),
            (
                "malformed",
                "most completions lack <think>...</think> <answer>...</answer>: reward 0",
            ),
        ):
            mean = sum(r[name] for r in self.rows) / STALL
            if mean > (0.95 if name == "frac_reward_zero_std" else 0.5) and name not in self.said:
                self.said.add(name)
                tqdm.write(f"warning: {what} ({mean:.0%} over {STALL} steps)", sys.stderr)


def open_run(args: argparse.Namespace) -> tuple[Path, Path | None]:
    """The run's folder and the checkpoint to go on from.  Raises DataError rather than overwrite a run."""
    folder = args.output
    if folder is None:
        taken = itertools.chain(["first"], (f"run-{i}" for i in itertools.count(2)))
        folder = next(
            f for f in (Path("runs") / name for name in taken) if not (f / "args.json").exists()
        )
    settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
    settings = {k: v for k, v in settings.items() if k not in ("output", "resume", "dry_run")}
    if args.data:
        settings["data_sha256"] = hashlib.sha256(args.data.read_bytes()).hexdigest()
    if args.model:
        settings["model_files"] = fingerprint(args.model)
    if (folder / "args.json").exists():
        if not args.resume:
            raise DataError(
                f"{folder} holds a run already: add --resume, or choose another --output"
            )
        _refuse_changes(folder, settings)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "args.json").write_text(json.dumps(settings, indent=2) + "\n")
    return folder, checkpoints.find(folder / "checkpoint")


def default_dtype(args: argparse.Namespace) -> str:
    """What the model computes in where --dtype does not say: as before, or else by the device."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        if args.resume:
            return json.loads((args.output / "args.json").read_text())["dtype"]
    return "bfloat16" if args.device.startswith("cuda") else "float32"


def _refuse_changes(folder: Path, settings: dict) -> None:
    """Raise DataError if a run that is to be resumed was begun with other settings, data or model."""
    try:
        before = json.loads((folder / "args.json").read_text())
    except ValueError as error:
        raise DataError(f"{folder / 'args.json'}: broken: {error}") from None
    for name in settings:  # a run from before a flag was there has its default
        if name in MAY_CHANGE or settings[name] == before.get(name, _parser().get_default(name)):
            continue
        if name in ("data_sha256", "model_files"):
            what = settings[name.split("_")[0]]
            raise DataError(f"{folder}: cannot resume: {what} has changed since the run began")
        raise DataError(
            f"{folder}: cannot resume with another --{name.replace('_', '-')}: "
            f"the run has {before.get(name)}, this call {settings[name]}"
        )


def estimate_memory(args: argparse.Namespace, examples: Sequence[Example] | None) -> Estimate:
    """What a run would take of the memory; its prompts are as long as those of its first batch."""
    if args.model:
        config = load_config(args.model, args.trust_remote_code)
        processor = load_processor(args.model, config, args.trust_remote_code)
    else:
        tiny = build_tiny_policy()
        config, processor = tiny.model.config, tiny.processor
    inputs = collate(next(batches(args, examples)), processor)
    return estimate(config, args, inputs["input_ids"].shape[1])


def evaluate_run(policy: Policy, args: argparse.Namespace, what: str) -> dict:
    """Figures on held-out scenes, and where in the image the answers come from."""
    figures = evaluate_scenes(policy, args.eval_scenes, what, args.fog, args.in_words)
    return (
        figures if args.in_words else figures | {"saliency": saliency_sheet(policy, what, args.fog)}
    )


def train(args: argparse.Namespace) -> None:
    """A whole run: warm start or load, train, evaluate before and after, report."""
    examples = read_examples(args.data, args.images, args.skip_bad) if args.data else None
    args.dtype = args.dtype or default_dtype(args)
    dtype = getattr(torch, args.dtype)
    if args.model:  # before anything is written: a name that cannot be loaded leaves no run behind
        load_config(args.model, args.trust_remote_code)
    if args.dry_run:
        print(estimate_memory(args, examples).table())
        return
    folder, checkpoint = open_run(args)
    start = args.model or warm_start(folder.parent, WarmStart(fog=args.fog, in_words=args.in_words))

    def load(path: str | Path) -> Policy:
        return load_policy(path, args.device, dtype, args.trust_remote_code)

    if args.lora_rank:
        policy = AdaptedPolicy(load(start), args.lora_rank)
        if checkpoint:
            policy.restore(checkpoint)
        reference = policy.before_training() if args.beta else None
    else:
        policy = load(checkpoint or start)
        reference = load(start) if args.beta else None
        if not args.train_vision:
            policy.model.get_encoder(modality="image").requires_grad_(False)
    if args.gradient_checkpointing:
        policy.checkpoint_activations()
    trainable = [p for p in policy.model.parameters() if p.requires_grad]
    rate = args.learning_rate or (1e-6 if args.model and not args.lora_rank else 1e-4)
    kind = torch.optim.AdamW if dtype == torch.float32 else MasterAdamW
    optimizer = kind(trainable, lr=rate, weight_decay=0.0)
    done = checkpoints.restore(checkpoint, optimizer) if checkpoint else 0
    if checkpoint:
        print(f"going on from {checkpoint}, step {done}", file=sys.stderr)

    measured = folder / "evaluation.json"
    figures = json.loads(measured.read_text()) if done and measured.exists() else {}
    measure = args.eval_scenes if examples is None else 0
    if measure and "before" not in figures:
        before = load(start) if done else policy
        figures["before"] = evaluate_run(before, args, "before")
        measured.write_text(json.dumps(figures) + "\n")

    stop = False

    def interrupted(*_) -> None:
        nonlocal stop
        stop = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C ends at once
        tqdm.write("stopping after this step; press Ctrl-C again to stop at once", sys.stderr)

    log, watch = Log(folder, done), Watch()
    signal_before = signal.signal(signal.SIGINT, interrupted)
    try:
        steps = tqdm(
            itertools.islice(batches(args, examples), done, args.steps),
            desc="GRPO" if args.lambda_s == args.lambda_n == 0 else "COPO",
            initial=done,
            total=args.steps,
            unit="step",
        )
        for batch in steps:
            row, samples = train_step(policy, reference, optimizer, batch, args, done)
            done += 1
            log.write(row, samples)
            steps.set_postfix(reward=f"{row['reward']:.3f}", causal=f"{row['causal_reward']:.3f}")
            watch.see(row)
            if stop or done % args.save_steps == 0 or done == args.steps:
                checkpoints.save(
                    folder / "checkpoint", policy, optimizer, done, args.keep_checkpoints
                )
            if stop:
                print(f"stopped after step {done}; go on with --output {folder} --resume")
                return
    finally:
        signal.signal(signal.SIGINT, signal_before)

    if measure:
        figures["after"] = evaluate_run(policy, args, "after")
        measured.write_text(json.dumps(figures) + "\n")
        print("\n" + compare_table(figures))
    write_report(folder)
    for name, what in (
        ("report.html", "curves, and completions coloured by causal reward: open it in a browser"),
        ("metrics.csv", "a row a step"),
        ("samples.jsonl", "a row a trajectory, its scores a token"),
        ("checkpoint", "an ordinary Hugging Face folder: --model takes it"),
    ):
        print(f"{folder / name}  {what}")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, or 2 for input that cannot be used."""
    args = parse_arguments(argv)
    disable_progress_bar()  # the library's, for loading; ours stay
    try:
        check_arguments(args)
        train(args)
    except torch.OutOfMemoryError:
        print(f"error: out of memory: {LOWER}", file=sys.stderr)
        return 2
    except (DataError, FloatingPointError, OSError) as error:
        print("\n".join(f"error: {line}" for line in str(error).splitlines()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
