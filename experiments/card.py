"""What a step takes on a card: a decoder of a real size with random weights, stage by stage.

    python -m experiments.card --shape 2b --reasoning-tokens 128 --device cuda --dtype bfloat16
    python -m experiments.card --shape 3b --reasoning-tokens 512 --device cuda --dtype bfloat16 --exact

One prompt and its G completions; the temperature is set so that drawn tokens are as sure as a trained
model's (a mean probability of 0.9). Each stage is timed, and held against the least that the card could
need for the same passes through the decoder: of each pass the larger of its arithmetic at the rate of
a large matrix product, and the reading of the weights at the rate of a large copy, both measured here.
Attention and its keys and values are not in that floor.

    rollout   prefill, and G completions drawn token by token
    score     what train.py asks by default (gpu/long.py); with --exact, the paper's questions, too
    update    log-probabilities with gradients, and those under the reference; no optimiser
"""

import os

# Before torch: its idle threads spin, which on a busy machine takes the cores from what they wait for.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from data import DataError
from experiments.cost import (
    SHAPES,
    Workload,
    command_of,
    keep_rows,
    random_batch,
    random_policy,
    seconds,
    show,
)
from gpu.long import ways_of_asking
from gpu.memory import estimate
from interventions import causal_rewards
from model import Policy
from rollouts import Rollouts
from runs import Settings

PROGRAM = "experiments/card.py"
MEAN_PROBABILITY = 0.9  # of drawn tokens


@dataclass(frozen=True)
class Card:
    """What it can do at most, measured: operations of a matrix product, bytes of a copy, per second."""

    operations: float
    bytes: float


def measure_card(device: str, dtype: torch.dtype, size: int) -> Card:
    """The two rates, each the median of five: a product of (size, size) matrices, a copy of as many bytes as
    sixteen of them."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    many = torch.randn(16, size, size, device=device, dtype=torch.float32).to(dtype)

    def median(work: Callable[[], object]) -> float:
        work()
        return statistics.median(seconds(work, device) for _ in range(5))

    copied = 2 * many.nbytes  # read and written
    return Card(2 * size**3 / median(lambda: a @ b), copied / median(many.clone))


class Passes:
    """The passes through decoder and head while it watches, as (tokens, weights, with gradients)."""

    def __init__(self, policy: Policy):
        self.policy, self.seen = policy, []
        inside = sum(p.numel() for p in policy.decoder.parameters())
        self.weights = {
            policy.decoder: inside
            - policy.embed.weight.numel(),  # a pass looks up a few of its rows
            policy.head: policy.head.weight.numel(),
        }

    @contextmanager
    def watched(self) -> Iterator["Passes"]:
        """Count from here to the end of the block."""

        def note(module, given, named, output) -> None:
            hidden = named.get("inputs_embeds", given[0] if given else None)
            tokens = hidden.numel() // hidden.shape[-1]
            self.seen.append((tokens, self.weights[module], torch.is_grad_enabled()))

        hooks = [m.register_forward_hook(note, with_kwargs=True) for m in self.weights]
        try:
            yield self
        finally:
            for hook in hooks:
                hook.remove()

    def floor(self, card: Card) -> float:
        """Seconds that no version of these passes could beat; a backward pass is two forward ones."""
        size, least = self.policy.head.weight.element_size(), 0.0
        for tokens, weights, gradients in self.seen:
            one = max(2 * tokens * weights / card.operations, weights * size / card.bytes)
            least += one * (3 if gradients else 1)
        return least


def temperature_of(policy: Policy, inputs: dict) -> float:
    """The temperature at which a token drawn after each token of the prompt has MEAN_PROBABILITY."""
    ids = inputs["input_ids"][:, 5:][:, -64:].to(policy.device)  # text, no image
    with torch.no_grad():
        logits = policy.full_logits(inputs, ids, torch.ones_like(ids))[0]
    low, high = 1e-4, 10.0
    for _ in range(40):
        middle = (low * high) ** 0.5
        p = (logits / middle).softmax(-1)
        # A drawn token's expected probability is the sum of squares.
        sure = float(p.square().sum(-1).mean()) > MEAN_PROBABILITY
        low, high = (middle, high) if sure else (low, middle)
    return low


def drawn_again(
    policy: Policy, inputs: dict, rollouts: Rollouts, uniforms: Tensor, temperature: float
) -> dict[str, float]:
    """Of the drawn tokens, all places run in one pass: their mean probability, and the share that flips.

    flipped: the same numbers draw another token now than when they were drawn one by one.
    """
    with torch.no_grad():
        prefix, ids = policy.prefill(inputs), rollouts.completion_ids
        hidden = policy.rows(prefix, rollouts.prompt_index).extend(policy.embed(ids[:, :-1]))
        hidden, ids = hidden.flatten(0, 1), ids[:, 1:].flatten()
        again = policy.draw(hidden, uniforms[:, 1:].reshape(-1, 1), temperature)[:, 0]
        probability = policy.token_logps(hidden, ids, temperature).exp().mean()
    return {
        "mean_probability": float(probability),
        "flipped": float((again != ids).float().mean()),
    }


def stages_of(
    policy: Policy,
    inputs: dict,
    rollouts: Rollouts,
    uniforms: Tensor,
    workload: Workload,
    exact: bool,
) -> dict[str, Callable[[], object]]:
    """Name -> the work of a stage."""
    C = rollouts.completion_ids.shape[1]
    mask, temperature = torch.ones_like(rollouts.completion_ids), workload.temperature
    most = min(workload.max_rows, policy.rows_that_fit(workload.prompt_tokens, C))

    def rollout() -> None:
        random_batch(workload, policy, uniforms)

    def score(unit: str) -> None:
        with torch.no_grad():
            prefix = policy.prefill(inputs)  # in training it is the rollout's
            how = ways_of_asking(rollouts, unit, workload.num_continuations)
            causal_rewards(
                policy,
                prefix,
                rollouts,
                workload.seed,
                **how,
                max_rows=most,
                temperature=temperature,
            )

    def logps() -> Tensor:
        given = rollouts.prompt_index, rollouts.completion_ids, mask, temperature
        return policy.per_token_logps(policy.prefill(inputs), *given)[0]

    def update() -> None:
        policy.model.zero_grad()
        with torch.no_grad():
            reference = logps()
        (logps() - reference).square().mean().backward()
        policy.model.zero_grad()

    stages = {
        "rollout": rollout,
        "score": lambda: score("auto"),
        "update": update,
    }
    return stages | ({"score, the paper's questions": lambda: score("token")} if exact else {})


def measure(workload: Workload, exact: bool) -> dict:
    """Seconds, floors and memory of the stages, as `cost.keep_rows` takes them."""
    on_card = workload.device.startswith("cuda")
    dtype = getattr(torch, workload.dtype)
    card = measure_card(workload.device, dtype, 8192 if on_card else 512)
    # Not tied: a random head that is the embedding, too, is surest that the last token comes again.
    policy = random_policy(workload, tied=False)
    short = replace(workload, reasoning_tokens=2, answer_tokens=1)
    inputs = random_batch(short, policy)[1]
    # The last of the reasoning stands for the closing tag, as in cost.py.
    T = workload.reasoning_tokens + 1
    temperature = temperature_of(policy, inputs)
    workload = replace(workload, reasoning_tokens=T, temperature=temperature)
    C = 1 + T + workload.answer_tokens
    uniforms = torch.rand(workload.num_generations, C, device=workload.device)
    _, inputs, rollouts = random_batch(workload, policy, uniforms)
    rollouts = replace(rollouts, reasoning_end=rollouts.reasoning_end - 1)
    result: dict = drawn_again(policy, inputs, rollouts, uniforms, temperature)
    result |= {"operations_per_second": card.operations, "bytes_per_second": card.bytes}
    for name, work in stages_of(policy, inputs, rollouts, uniforms, workload, exact).items():
        passes = Passes(policy)
        with passes.watched():
            work()  # warms up, and counts
        if on_card:
            torch.cuda.reset_peak_memory_stats()
        repeats = 1 if "paper" in name else workload.repeats
        elapsed = statistics.median(seconds(work, workload.device) for _ in range(repeats))
        result[name] = {
            "step_seconds": elapsed, "floor_seconds": passes.floor(card),
            "tokens": sum(n for n, weights, _ in passes.seen if weights == passes.weights[policy.decoder]),
            "passes": len(passes.seen),
        }  # fmt: skip
        if on_card:
            result[name]["peak_gigabytes"] = torch.cuda.max_memory_allocated() / 1e9
    grpo = sum(result[name]["step_seconds"] for name in ("rollout", "update"))
    for name in result:
        if name.startswith("score"):
            result[name]["in_grpo_steps"] = result[name]["step_seconds"] / grpo
    result["update"]["estimated_gigabytes"] = estimated(policy, workload, C) / 1e9
    return result


def estimated(policy: Policy, workload: Workload, C: int) -> int:
    """What gpu/memory.py says that an update takes without optimiser and reference, in bytes."""
    settings = Settings(
        batch_size=1, num_generations=workload.num_generations, max_completion_length=C,
        dtype=workload.dtype, model="random", train_vision=True,
    )  # fmt: skip
    guess = estimate(policy.model.config, settings, workload.prompt_tokens)
    return guess.weights + guess.gradients + guess.activations


def main(argv: Sequence[str] | None = None) -> int:
    """Measure one shape at one length.  Returns the exit code: 0, or 2 for input that cannot be used."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.card",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--shape", choices=SHAPES, default="2b", help="of the decoder")
    for flag, default, text in (
        ("--prompt-tokens", 1000, "P"), ("--reasoning-tokens", 128, "T"), ("--answer-tokens", 8, "A"),
        ("--num-generations", 8, "G"), ("--num-continuations", 4, "H"), ("--repeats", 3, "timed runs"),
        ("--seed", 0, "of weights and sampling"),
    ):  # fmt: skip
        parser.add_argument(flag, type=int, default=default, help=text)
    parser.add_argument("--exact", action="store_true", help="time the paper's questions, too")
    parser.add_argument("--device", default="cuda", help="cuda, cpu, ...")
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"))
    parser.add_argument("--csv", type=Path, help="add the figures there")
    args = parser.parse_args(argv)
    fields = {field.name for field in dataclasses.fields(Workload)}
    try:
        if args.device.startswith("cuda") and not torch.cuda.is_available():
            raise DataError(
                "--device cuda: no CUDA card is here; --device cpu --shape tiny runs anywhere"
            )
        named = {name: value for name, value in vars(args).items() if name in fields}
        result = measure(Workload(**named), args.exact)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError:
        print("error: out of memory: lower --num-generations", file=sys.stderr)
        return 2
    print(show(result))
    if args.csv:
        machine = torch.cuda.get_device_name() if args.device.startswith("cuda") else None
        keep_rows(args.csv, f"{PROGRAM} {command_of(parser, args)}", result, machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
