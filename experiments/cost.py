"""What it costs to ask: the ways to run the same interventions, side by side in one process.

    python -m experiments.cost interventions              the trained tiny policy, a default batch
    python -m experiments.cost interventions --shape mid  random weights, P = 256, T = 32, H = 4, A = 6
    python -m experiments.cost step                       a COPO step against a GRPO step, by stage
    python -m experiments.cost update --shape mid         the update on the shared prompt
    python -m experiments.cost growth --temperature 0.12  how scoring grows with T, H and G
    python -m experiments.cost long --temperature 0.11    what the default asks of long reasoning

    (a) generate a continuation     the model's own generate, once per continuation
    (b) generate a set              generate, once for the H continuations of a prefix
    (c) copied cache                all rows at once, each with its own copy of prompt and prefix
    (d) shared, independent         one copy of keys and values, every continuation decoded
    (e) shared, coupled             only the draws that leave the trajectory are decoded

The ways take turns, a time is the median of several runs, and what counts are the ratios: they were
taken in one run on one machine. (a) and (b) are timed at evenly spaced places of the trajectories and
scaled up to all of them. Beside the token positions that a way runs stands the least that its completions
need: each distinct beginning once, as a tree of prefixes would run them.
"""

import os

# Before torch: its idle threads spin, which on a busy machine takes the cores from what they wait for.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import argparse
import dataclasses
import json
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import train
from data import DataError, collate
from experiments.records import commit, read_csv, write_csv
from gpu.long import ways_of_asking
from interventions import Interventions, causal_rewards
from kv_cache import KeyValues, PrefixView, Rows
from model import Policy, Prefix, load_policy, sample_tokens
from rollouts import Rollouts, rollout
from runs import Limits, Settings
from scm import sample_example
from tiny import build_tiny_policy, warm_start

PROGRAM, PROGRAM_BEFORE = "experiments/cost.py", "benchmark.py"  # in the CSV's column `command`
SHAPES = {  # decoders with random weights: hidden, layers, heads, kv heads, MLP, vocabulary
    "tiny": (128, 4, 4, 4, 344, 512),
    "mid": (512, 8, 8, 2, 1376, 512),
    "2b": (1536, 28, 12, 2, 8960, 151_936),
    "3b": (2048, 36, 16, 2, 11_008, 151_936),
}


# ---------------------------------------------------------------------------------------------
# What is asked about: a batch of the trained tiny policy, or random weights of a given shape
# ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Workload:
    """What is run and how often; each field is a flag of the command line."""

    shape: str | None = None  # of SHAPES, with random weights; None for a trained model
    model: str | None = None  # its folder; None for the tiny warm start
    prompt_tokens: int = 256  # P, for a shape
    reasoning_tokens: int = 32  # T, for a shape
    answer_tokens: int = 6  # A, for a shape
    num_continuations: int = 4  # H
    num_generations: int = 8  # G
    max_rows: int = 4096  # rows in one batch
    repeats: int = 3  # timed rounds
    naive_places: int = 5  # places at which (a) and (b) are timed
    skip_copied: bool = False  # leave out (c)
    seed: int = 0  # of weights, batch and sampling
    device: str = "cpu"
    dtype: str = "float32"  # for a shape
    temperature: float = 1.0  # of sampling


def trained_batch(workload: Workload) -> tuple[Policy, dict, Rollouts]:
    """The policy, its prompts' inputs, and the rollouts of one default training step."""
    policy = load_policy(workload.model or warm_start(Path("runs")), workload.device)
    settings = Settings(seed=workload.seed, num_generations=workload.num_generations)
    examples = next(train.batches(settings, None))
    inputs = collate(examples, policy.processor)
    with torch.no_grad():
        prefix = policy.prefill(inputs)
    generator = train.generator_for(workload.seed, 0, "rollout")
    G, C = settings.num_generations, settings.max_completion_length
    return policy, inputs, rollout(policy, prefix, examples, G, C, generator)


def random_policy(workload: Workload, tied: bool = True) -> Policy:
    """A LLaVA with a random decoder of a shape; tied: its head is its embedding, as in most small models.

    No token ends a row: every row runs to its budget, so that all ways do the same work.
    """
    hidden, layers, heads, kv_heads, mlp, vocabulary = SHAPES[workload.shape]
    tokenizer = build_tiny_policy().tokenizer
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            image_size=28, patch_size=14, projection_dim=64,
        ),
        text_config=transformers.Qwen2Config(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=mlp,
            tie_word_embeddings=tied, eos_token_id=None, bos_token_id=None, pad_token_id=0,
        ),
        image_token_index=tokenizer.image_token_id, image_seq_length=4, tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(workload.seed)
    with torch.device(workload.device):  # billions of weights are drawn there
        model = transformers.LlavaForConditionalGeneration(config)
    model.to(getattr(torch, workload.dtype))
    policy = Policy(model.eval(), SimpleNamespace(tokenizer=tokenizer))
    policy.eos_ids = torch.tensor([vocabulary], device=workload.device)
    return policy


def random_batch(
    workload: Workload, policy: Policy | None = None, uniforms: Tensor | None = None
) -> tuple[Policy, dict, Rollouts]:
    """A random policy; one prompt of P tokens, and G completions of T reasoning and A answer tokens.

    policy: one made before.  uniforms: (G, 1 + T + A) the numbers that draw the completions.
    """
    policy, device = policy or random_policy(workload), workload.device
    T, A, G = workload.reasoning_tokens, workload.answer_tokens, workload.num_generations
    prompt = torch.randint(400, len(policy.forbidden), (1, workload.prompt_tokens))
    prompt[0, 1:5] = policy.tokenizer.image_token_id
    inputs = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "pixel_values": torch.rand(1, 3, 28, 28, dtype=getattr(torch, workload.dtype)),
    }
    C = 1 + T + A
    place = torch.full((G,), 1, device=device)
    prompt_index = torch.zeros_like(place)
    uniforms = torch.rand(G, C).to(device) if uniforms is None else uniforms
    with torch.no_grad():
        prefix = policy.prefill(inputs)
        logits = prefix.logits[prompt_index]
        first = sample_tokens(logits, uniforms[:, :1], workload.temperature)[:, 0]
        rows = policy.rows(prefix, prompt_index)
        ids, lengths = policy.decode(rows, first, place * C, uniforms, workload.temperature)
    rollouts = Rollouts(
        examples=[sample_example(random.Random(0))],
        prompt_index=prompt_index,
        completion_ids=ids,
        lengths=lengths,
        reasoning_start=place,
        reasoning_end=place + T,
        answer_start=place + T,
        longest=C,
        truncated=place > 0,
        rewards=(ids.sum(1) % 2).float(),
        texts=[""] * G,
        reward=lambda n, completions: [float(int(ids.sum()) % 2) for ids in completions],
    )
    return policy, inputs, rollouts


# ---------------------------------------------------------------------------------------------
# The ways
# ---------------------------------------------------------------------------------------------
class CopiedRows(Rows):
    """(c): rows that each hold a copy of all they read, run by the library's own attention."""

    def __init__(self, decoder, views: list[PrefixView], position: Tensor):
        super().__init__(decoder, [], position)
        self.attended = True
        for layer in range(len(views[0].prefixes.keys)):
            keys = torch.cat([view.prefixes.keys[layer][view.source] for view in views], 2)
            values = torch.cat([view.prefixes.values[layer][view.source] for view in views], 2)
            self.own.update(keys, values, layer)
        self.mask = torch.cat([view.visible for view in views], 1)
        self.copied = self.mask.shape[1]

    def extend(self, embeddings: Tensor, text: Tensor | None = None) -> Tensor:
        """As `Rows.extend`, the copies growing by n tokens; what is alike runs as often as it is there."""
        n = embeddings.shape[1]
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), n)], 1)
        hidden = self.decoder(
            inputs_embeds=embeddings,
            attention_mask=self.mask.long(),
            position_ids=self.position[:, None] + torch.arange(n, device=embeddings.device),
            past_key_values=self.own,
            use_cache=True,
        ).last_hidden_state
        self.position = self.position + n
        self.forwarded += len(embeddings) * n
        return hidden

    def keep(self, index: Tensor) -> None:
        """As `Rows.keep`."""
        super().keep(index)
        self.mask = self.mask[index]

    @property
    def key_values(self) -> KeyValues:
        """As `Rows.key_values`: what the rows added, without what they copied."""
        added = super().key_values
        return KeyValues(
            *([x[:, :, self.copied :] for x in kv] for kv in (added.keys, added.values))
        )


class CopiedCache(Interventions):
    """The interventions, way (c)."""

    def _rows(self, n: Tensor, place: Tensor, seen: Tensor, *others) -> Rows:
        shared = super()._rows(n, place, seen, *others)
        return CopiedRows(shared.decoder, shared.views, shared.position)


CACHED = {  # name -> the class that asks, the pairing, the question
    "(c) copied cache": (CopiedCache, "independent", "continuation_rewards"),
    "(d) shared, independent": (Interventions, "independent", "continuation_rewards"),
    "(e) shared, coupled": (Interventions, "coupled", "continuation_rewards"),
    "necessity: copied cache": (CopiedCache, "coupled", "masked_rewards"),
    "necessity: shared": (Interventions, "coupled", "masked_rewards"),
}


def ask(
    way: type[Interventions],
    policy: Policy,
    prefix: Prefix,
    rollouts: Rollouts,
    workload: Workload,
    pairing: str,
) -> Interventions:
    """The interventions of one way, not yet run but for the pass over the trajectories."""
    asked = way(
        policy,
        prefix,
        rollouts,
        workload.seed,
        num_continuations=workload.num_continuations,
        pairing=pairing,
        temperature=workload.temperature,
        max_rows=workload.max_rows,
    )
    _ = asked.trajectories
    return asked


class Naive:
    """(a) and (b): the model's own generate, from the pixels on, at some of the places."""

    def __init__(self, policy: Policy, inputs: dict, rollouts: Rollouts, workload: Workload):
        self.policy, self.rollouts, self.workload = policy, rollouts, workload
        self.prompts = [
            {name: value[i : i + 1].to(policy.device) for name, value in inputs.items()}
            for i in range(len(rollouts.examples))
        ]
        # T + 1 sets per trajectory with reasoning; one masked answer per reasoning token.
        starts, ends = rollouts.reasoning_start.tolist(), rollouts.reasoning_end.tolist()
        spans = [(n, *span) for n, span in enumerate(zip(starts, ends, strict=True))]
        spans = [(n, start, end) for n, start, end in spans if end > start]
        self.sets = [(n, j) for n, start, end in spans for j in range(start, end + 1)]
        self.masks = [(n, t) for n, start, end in spans for t in range(start, end)]

    def some(self, places: list) -> list:
        """Evenly spaced places to time; all of them cost len(places) / len(some) times as much."""
        count = min(self.workload.naive_places, len(places))
        return [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]

    def generate(
        self, n: int, length: int, rows: int, sample: bool = True, masked: int | None = None
    ) -> Tensor:
        """`rows` continuations of the first `length` tokens of completion n, these included."""
        policy, inputs = self.policy, dict(self.prompts[int(self.rollouts.prompt_index[n])])
        kept = self.rollouts.completion_ids[n : n + 1, :length]
        prompt = int(inputs["attention_mask"].sum())
        real = inputs["attention_mask"].bool()
        inputs["input_ids"] = torch.cat([inputs["input_ids"][real][None], kept], 1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])

        def zero(module, arguments, output):
            if output.shape[1] > 1:
                output[:, prompt + masked] = 0

        hook = policy.embed.register_forward_hook(zero) if masked is not None else None
        ends = [i for i in policy.eos_ids.tolist() if i < len(policy.forbidden)]
        out = policy.model.generate(
            **inputs,
            do_sample=sample,
            **({"top_k": 0, "temperature": self.workload.temperature} if sample else {}),
            num_return_sequences=rows,
            max_new_tokens=self.rollouts.longest - length,
            eos_token_id=ends or None,
            pad_token_id=policy.pad_id,
            suppress_tokens=policy.forbidden.nonzero()[:, 0].tolist() or None,
        )
        if hook:
            hook.remove()
        return out[:, prompt:]

    def ways(self) -> dict[str, tuple[Callable[[], object], float]]:
        """Name -> work at some places, and how many times as much all places would cost."""
        H, answers = self.workload.num_continuations, self.rollouts.answer_start.tolist()
        sets, masks = self.some(self.sets), self.some(self.masks)
        all_sets, all_masks = len(self.sets) / len(sets), len(self.masks) / len(masks)
        return {
            "(a) generate a continuation": (
                lambda: [self.generate(n, j, 1) for n, j in sets],
                H * all_sets,
            ),
            "(b) generate a set": (lambda: [self.generate(n, j, H) for n, j in sets], all_sets),
            "necessity: generate a token": (
                lambda: [self.generate(n, answers[n], 1, masked=t) for n, t in masks],
                all_masks,
            ),
        }


@torch.no_grad()
def check_agreement(
    policy: Policy, prefix: Prefix, rollouts: Rollouts, naive: Naive, workload: Workload
) -> None:
    """All ways give the same tokens before any is timed.  Raises AssertionError where they do not."""
    for n, j in naive.some(naive.sets)[:4]:
        plain = naive.generate(n, j, 1, sample=False)[0]
        rows = policy.rows(prefix, rollouts.prompt_index[n : n + 1])
        hidden = rows.extend(policy.embed(rollouts.completion_ids[n : n + 1, :j]))
        budget = torch.tensor([rollouts.longest - j], device=policy.device)
        first = sample_tokens(policy.logits(hidden[:, -1]), None)
        ids, lengths = policy.decode(rows, first, budget)
        ours = ids[0, : lengths[0]]
        assert torch.equal(plain[j : j + len(ours)], ours), f"generate differs at {n}, {j}"
    ways = [
        ask(way, policy, prefix, rollouts, workload, "coupled")
        for way in (Interventions, CopiedCache)
    ]
    for a, b in zip(*(way.continuation_rewards() for way in ways), strict=True):
        assert torch.equal(a, b), "copied and shared caches give different continuations"
    masked = [way.masked_rewards() for way in ways]
    assert torch.equal(*masked), "copied and shared caches give different masked answers"


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of keys and values that rows held at once: their own, copied, and shared ones."""
    peak, extend = 0, {way: way.extend for way in (Rows, CopiedRows)}

    def watched(way):
        def watch(self, *tokens):
            nonlocal peak
            hidden = extend[way](self, *tokens)
            held = sum(x.keys.nbytes + x.values.nbytes for x in self.own.layers)
            peak = max(peak, held + sum(bytes_of(view.prefixes) for view in self.views))
            return hidden

        return watch

    for way in extend:
        way.extend = watched(way)
    try:
        work()
    finally:
        for way, original in extend.items():
            way.extend = original
    return peak


def bytes_of(key_values: KeyValues) -> int:
    """Bytes of keys and values, all layers together."""
    return sum(x.nbytes for x in (*key_values.keys, *key_values.values))


# ---------------------------------------------------------------------------------------------
# Timing
# ---------------------------------------------------------------------------------------------
def seconds(work: Callable[[], object], device: str) -> float:
    """Wall time of one call, the device's work included."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(ways: dict[str, Callable], workload: Workload) -> dict[str, float]:
    """Median seconds of each way over the timed rounds, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    rounds = [(r, name) for r in range(workload.repeats + 1) for name in ways]
    for r, name in tqdm(rounds, desc="timing", unit="run", leave=False):
        elapsed = seconds(ways[name], workload.device)
        if r:
            times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


class NotedCompletions:
    """Rollouts that note every completion they are asked to pay: what must be run at the least."""

    def __init__(self, rollouts: Rollouts):
        prompts, ids, lengths = (
            x.tolist() for x in (rollouts.prompt_index, rollouts.completion_ids, rollouts.lengths)
        )
        self.trajectories = {
            (prompt, *row[:length])
            for prompt, row, length in zip(prompts, ids, lengths, strict=True)
        }
        self.completions = set(self.trajectories)

        def noted(which: Sequence[int], completions: Sequence[Tensor]) -> list[float]:
            texts = zip(which, completions, strict=True)
            self.completions |= {(prompts[n], *ids.tolist()) for n, ids in texts}
            return rollouts.reward(which, completions)

        self.rollouts = replace(rollouts, reward=noted)

    def least(self) -> int:
        """Each distinct beginning of a completion once, those of the trajectories not counted again.

        The last token of a completion need not be run, and the pass over the trajectories is not in it.
        """
        beginnings, known = (
            {text[:k] for text in texts for k in range(2, len(text))}
            for texts in (self.completions, self.trajectories)
        )
        return len(beginnings - known)

    def least_masked(self, asked: Interventions) -> int:
        """Of every masked text the masked token and what follows it to the last but one, once.

        As if every answer were its trajectory's own: those that differ are a little more or less.
        """
        n, t = asked.scored.nonzero(as_tuple=True)
        after = (asked.places >= t[:, None]) & (asked.places < asked.rollouts.lengths[n, None] - 1)
        run, place = after.nonzero(as_tuple=True)
        return len(torch.stack([t[run], asked.keys[n[run], place + 1]], 1).unique(dim=0))


# ---------------------------------------------------------------------------------------------
# The five benchmarks
# ---------------------------------------------------------------------------------------------
def benchmark_interventions(workload: Workload) -> dict:
    """Sufficiency five ways, necessity three."""
    policy, inputs, rollouts = (random_batch if workload.shape else trained_batch)(workload)
    with torch.no_grad():
        prefix = policy.prefill(inputs)
    naive = Naive(policy, inputs, rollouts, workload)
    check_agreement(policy, prefix, rollouts, naive, workload)
    cached = CACHED
    if workload.skip_copied:
        cached = {name: how for name, how in CACHED.items() if how[0] is not CopiedCache}

    def whole(way: type[Interventions], pairing: str, question: str) -> Callable[[], object]:
        return lambda: getattr(ask(way, policy, prefix, rollouts, workload, pairing), question)()

    works = naive.ways() | {name: (whole(*how), 1.0) for name, how in cached.items()}
    times = interleaved({name: work for name, (work, _) in works.items()}, workload)
    times = {name: elapsed * works[name][1] for name, elapsed in times.items()}
    table = {}
    for name, elapsed in sorted(times.items()):
        necessity = "necessity" in name
        base = "necessity: generate a token" if necessity else "(a) generate a continuation"
        table[name] = {"seconds": elapsed, "times_faster": times[base] / elapsed}
        if name in cached:
            table[name] |= count_work(policy, prefix, rollouts, workload, *cached[name])
    return {
        "sets": len(naive.sets),
        "masked": len(naive.masks),
        "continuations": workload.num_continuations,
        "trajectories": len(rollouts.prompt_index),
        "ways": table,
    }


def count_work(
    policy: Policy,
    prefix: Prefix,
    rollouts: Rollouts,
    workload: Workload,
    way: type[Interventions],
    pairing: str,
    question: str,
) -> dict[str, float]:
    """Rows, token positions and megabytes of keys and values that one way takes.

    told_forwards are the token positions of the pass over the trajectories.
    """
    noted = NotedCompletions(rollouts)
    asked = ask(way, policy, prefix, noted.rollouts, workload, pairing)
    shared = bytes_of(prefix.key_values) + bytes_of(asked.trajectories.key_values)
    before = asked.cost.token_forwards
    peak = peak_bytes(getattr(asked, question))
    masked = question == "masked_rewards"
    return {
        "rows": asked.cost.rows,
        "told_forwards": before,
        "row_forwards": asked.cost.token_forwards - before,
        "least_forwards": noted.least_masked(asked) if masked else noted.least(),
        "kv_megabytes": (peak + (0 if way is CopiedCache else shared)) / 1e6,
    }


def benchmark_step(workload: Workload) -> dict:
    """A whole training step of COPO and of GRPO on the same prompts, by stage."""
    start = workload.model or warm_start(Path("runs"))
    methods = {"COPO": {}, "GRPO": {"lambda_s": 0.0, "lambda_n": 0.0}}
    taken: dict[str, list[dict]] = {name: [] for name in methods}
    runs = {}
    for name, changes in methods.items():
        facts = {"seed": workload.seed, "device": workload.device, "dtype": "float32"}
        settings = Settings(**facts, **changes)
        loaded = train.load(settings, start, None)
        runs[name] = loaded, train.batches(settings, None), settings, Limits(settings)
    count = 5 * workload.repeats
    rounds = [(step, name) for step in range(count + 1) for name in methods]
    for step, name in tqdm(rounds, desc="timing", unit="step", leave=False):
        loaded, batches, settings, limits = runs[name]
        row, _ = train.train_step(*loaded, next(batches), settings, limits, step)
        if step:
            taken[name].append(row)
    stages = ("rollout_seconds", "score_seconds", "update_seconds")
    result = {
        name: {stage: statistics.median(row[stage] for row in rows) for stage in stages}
        | {"step_seconds": statistics.median(sum(row[s] for s in stages) for row in rows)}
        for name, rows in taken.items()
    }
    pairs = zip(taken["COPO"], taken["GRPO"], strict=True)
    ratios = [sum(a[s] for s in stages) / sum(b[s] for s in stages) for a, b in pairs]
    return {**result, "copo_over_grpo": statistics.median(ratios), "steps": count}


def benchmark_update(workload: Workload) -> dict:
    """Log-probabilities and gradients with the prompt run once, against once per completion.

    Raises DataError without a shape.
    """
    if not workload.shape:
        raise DataError("update: choose a --shape")
    T = workload.prompt_tokens // 10 - 7
    policy, inputs, rollouts = random_batch(replace(workload, reasoning_tokens=T, answer_tokens=6))
    prompt_index, ids = rollouts.prompt_index, rollouts.completion_ids
    mask, G, C = torch.ones_like(ids), *ids.shape
    parameters = [p for p in policy.decoder.parameters() if p.requires_grad]
    gradients = {}

    def run(name: str, logps: Tensor) -> None:
        policy.model.zero_grad()
        logps.mean().backward()
        gradients[name] = [p.grad.clone() for p in parameters]

    def shared() -> None:
        prefix = policy.prefill(inputs)
        run("shared", policy.per_token_logps(prefix, prompt_index, ids, mask)[0])

    def plain() -> None:
        copies = {name: torch.cat([value] * G) for name, value in inputs.items()}
        logps = policy.full_logits(copies, ids, mask).log_softmax(-1)
        run("plain", logps.gather(-1, ids[..., None])[..., 0])

    times = interleaved({"plain": plain, "shared": shared}, workload)
    difference = max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
        for a, b in zip(gradients["shared"], gradients["plain"], strict=True)
    )
    return {
        "prompt": workload.prompt_tokens,
        "completion": C,
        "generations": G,
        **{f"{name}_seconds": value for name, value in times.items()},
        "times_faster": times["plain"] / times["shared"],
        "largest_relative_difference_of_gradients": difference,
    }


def benchmark_growth(workload: Workload) -> dict:
    """Seconds and token-forwards of scoring as T, H and G grow, one at a time."""
    workload = replace(workload, shape=workload.shape or "tiny")
    grid = {
        "reasoning_tokens": (16, 32, 64, 128),
        "num_continuations": (1, 2, 4, 8),
        "num_generations": (4, 8, 16),
    }
    result: dict[str, dict] = {}
    for name, values in grid.items():
        for value in tqdm(values, desc=f"growth: {name}", leave=False):
            for way, point in measure_growth(replace(workload, **{name: value})).items():
                result.setdefault(name, {}).setdefault(way, {})[value] = point
    policy, inputs, rollouts = random_batch(workload)
    with torch.no_grad():
        logps, _ = policy.per_token_logps(
            policy.prefill(inputs), rollouts.prompt_index, rollouts.completion_ids,
            rollouts.completion_mask, workload.temperature,
        )  # fmt: skip
    return {"growth": result, "mean_probability": logps.exp().mean().item()}


def measure_growth(workload: Workload) -> dict[str, dict]:
    """Seconds and token-forwards of each way on one workload; of (a), by its formula."""
    policy, inputs, rollouts = random_batch(workload)
    with torch.no_grad():
        prefix = policy.prefill(inputs)
    points = {}
    for way, (pairing, question) in {
        "(d) shared, independent": ("independent", "continuation_rewards"),
        "(e) shared, coupled": ("coupled", "continuation_rewards"),
        "necessity, shared": ("coupled", "masked_rewards"),
    }.items():
        asked = ask(Interventions, policy, prefix, rollouts, workload, pairing)
        getattr(asked, question)()  # warms up, and counts
        again = ask(Interventions, policy, prefix, rollouts, workload, pairing)
        elapsed = seconds(getattr(again, question), workload.device)
        points[way] = {"seconds": elapsed, "token_forwards": asked.cost.token_forwards}
    P, T, A = workload.prompt_tokens, workload.reasoning_tokens, workload.answer_tokens
    R = workload.num_generations * workload.num_continuations * (T + 1)
    points["(a) generate, by its formula"] = {
        "seconds": None,
        "token_forwards": R * (P + T + A - 1),
    }
    return points


def benchmark_long(workload: Workload) -> dict:
    """Token positions and memory of scoring beside those of a GRPO step, up to 1,024 reasoning tokens."""
    workload = replace(workload, shape=workload.shape or "tiny")
    lengths = tqdm((16, 32, 64, 128, 256, 512, 1024), desc="long", leave=False)
    return {f"T = {T}": measure_long(replace(workload, reasoning_tokens=T)) for T in lengths}


def measure_long(workload: Workload) -> dict[str, float]:
    """The default way of asking beside the paper's, of which the expectation is counted, not run."""
    policy, inputs, rollouts = random_batch(
        replace(workload, reasoning_tokens=workload.reasoning_tokens + 1)
    )
    # The last of these stands for the closing tag.
    rollouts = replace(rollouts, reasoning_end=rollouts.reasoning_end - 1)
    with torch.no_grad():
        prefix = policy.prefill(inputs)
        given = rollouts.prompt_index, rollouts.completion_ids, rollouts.completion_mask
        logps, _ = policy.per_token_logps(prefix, *given, workload.temperature)
    found = []

    def default() -> None:
        how = ways_of_asking(rollouts, "auto", workload.num_continuations)
        how["max_rows"] = workload.max_rows
        temperature = {"temperature": workload.temperature}
        found.append(causal_rewards(policy, prefix, rollouts, workload.seed, **how, **temperature))

    peak = peak_bytes(default)
    grpo = 3 * int(rollouts.lengths.sum())  # drawn, updated, under the reference
    exact = exact_forwards(rollouts, logps.exp(), workload.num_continuations)
    cost = found[0].evidence.cost
    return {
        "mean_probability": logps.exp().mean().item(), "grpo_forwards": grpo,
        "default_forwards": cost.token_forwards, "default_over_grpo": cost.token_forwards / grpo,
        "exact_forwards": exact, "exact_over_grpo": exact / grpo,
        "rollout_kv_megabytes": kv_of_rollout(policy, prefix, rollouts) / 1e6,
        "default_kv_megabytes": peak / 1e6,
    }  # fmt: skip


def kv_of_rollout(policy: Policy, prefix: Prefix, rollouts: Rollouts) -> int:
    """Bytes of the prompts' and the completions' keys and values, one copy each."""
    tokens = len(rollouts.prompt_index) * (rollouts.longest - 1)
    per_token = bytes_of(prefix.key_values) / prefix.mask.numel()
    return bytes_of(prefix.key_values) + int(tokens * per_token)


def exact_forwards(rollouts: Rollouts, p: Tensor, H: int) -> float:
    """The expectation of what equations 2 and 3 run, if no two completions begin alike.

    Of place j the H completions of the sets that reach it leave with probability 1 - p_j, and run to L.
    """
    total = float((rollouts.lengths - 1).sum())  # the trajectories, once
    for n, length in enumerate(rollouts.lengths.tolist()):
        start, end = int(rollouts.reasoning_start[n]), int(rollouts.reasoning_end[n])
        arrives = 1.0
        for j in range(start, length):
            total += H * arrives * float(1 - p[n, j]) * (rollouts.longest - j - 1)
            if j >= end:  # no set begins after it
                arrives *= float(p[n, j])
        total += sum(length - 1 - t for t in range(start, end))
    return total


BENCHMARKS = {
    "interventions": benchmark_interventions,
    "step": benchmark_step,
    "update": benchmark_update,
    "growth": benchmark_growth,
    "long": benchmark_long,
}


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------
def show(result: dict) -> str:
    """A result as a table in text."""
    if "growth" in result:
        head = f"mean probability of the trajectories' tokens: {result['mean_probability']:.2f}\n"
        return head + "\n".join(
            f"{name} {value:>4}  {way:<30}{point['token_forwards']:>12} token positions"
            + (f"{point['seconds']:>9.2f} s" if point["seconds"] is not None else "")
            for name, ways in result["growth"].items()
            for way, points in sorted(ways.items())
            for value, point in points.items()
        )
    if "T = 16" in result:
        names = ("grpo_forwards", "default_over_grpo", "exact_over_grpo", "default_kv_megabytes")
        lines = [f"{'':<10}" + "".join(f"{name:>22}" for name in names)]
        for name, row in result.items():
            lines.append(f"{name:<10}" + "".join(f"{row[key]:>22.1f}" for key in names))
        return "\n".join(lines)
    if "ways" not in result:
        return "\n".join(f"{name:<44}{_short(value)}" for name, value in result.items())
    head = "{trajectories} trajectories: {sets} sets of {continuations}, {masked} masked answers"
    lines = [
        head.format(**result),
        f"{'way':<32}{'seconds':>10}{'faster':>9}{'rows':>8}{'forwards':>10}{'least':>9}{'KV MB':>9}",
    ]
    for name, row in result["ways"].items():
        line = f"{name:<32}{row['seconds']:>10.2f}{row['times_faster']:>8.1f}x"
        if "rows" in row:
            line += f"{row['rows']:>8}{row['row_forwards']:>10}{row['least_forwards']:>9}"
            line += f"{row['kv_megabytes']:>9.1f}"
        lines.append(line)
    return "\n".join(lines)


def _short(value) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k.removesuffix('_seconds')} {v:.3f} s" for k, v in value.items())
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def parser_of_flags() -> argparse.ArgumentParser:
    """A flag for each field of Workload, and where the result goes."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.cost",
        description=__doc__.split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("what", choices=BENCHMARKS, help="what to measure")
    parser.add_argument("--shape", choices=SHAPES, help="a decoder with random weights")
    parser.add_argument("--model", help="trained model folder; without it, the tiny warm start")
    for flag, text in {
        "--prompt-tokens": "P, for --shape",
        "--reasoning-tokens": "T, for --shape",
        "--answer-tokens": "A, for --shape",
        "--num-continuations": "H",
        "--num-generations": "G",
        "--max-rows": "rows in one batch",
        "--repeats": "timed rounds",
        "--naive-places": "places at which (a), (b) are timed",
    }.items():
        default = getattr(Workload, flag[2:].replace("-", "_"))
        parser.add_argument(flag, type=int, default=default, help=text)
    parser.add_argument(
        "--skip-copied", action="store_true", help="leave out (c), which needs the memory"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batch and sampling")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="for --shape"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument(
        "--csv", type=Path, help="add the figures there, in place of this command's earlier ones"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark, print its table.  Returns the exit code: 0, or 2 for unusable input."""
    parser = parser_of_flags()
    args = parser.parse_args(argv)
    fields = [field.name for field in dataclasses.fields(Workload)]
    disable_progress_bar()
    try:
        result = BENCHMARKS[args.what](Workload(**{name: getattr(args, name) for name in fields}))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(show(result))
    if args.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.json.write_text(json.dumps({"arguments": settings, **result}, indent=2) + "\n")
    if args.csv:
        keep_rows(args.csv, f"{PROGRAM} {command_of(parser, args)}", result)
    return 0


def command_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """What was measured: the command with the flags that are not as by default, files left out."""
    words = [args.what] if "what" in args else []
    for name, value in vars(args).items():
        if name not in ("what", "csv", "json") and value != parser.get_default(name):
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    return " ".join(words)


def keep_rows(path: Path, command: str, result: dict, machine: str = "") -> None:
    """One row per figure, (way, figure, value), in place of those that the command left before."""
    result = dict(result)
    growth = result.pop("growth", {})
    ways = result.get("ways", {name: v for name, v in result.items() if isinstance(v, dict)})
    flat = [("", name, value) for name, value in result.items() if not isinstance(value, dict)]
    flat += [(way, name, value) for way, row in ways.items() for name, value in row.items()]
    flat += [
        (way, f"{figure}, {name} {value}", figures[figure])
        for name, of_name in growth.items()
        for way, points in of_name.items()
        for value, figures in points.items()
        for figure in figures
    ]
    same = {command, command.replace(PROGRAM, PROGRAM_BEFORE, 1)}
    rows = [row for row in read_csv(path) if row["command"] not in same]
    facts = {
        "command": command,
        "commit": commit(),
        "machine": machine or f"{os.cpu_count()} cores",
    }
    rows += [{"way": w, "figure": f, "value": v, **facts} for w, f, v in flat]
    write_csv(path, rows, ("command", "way", "figure", "value", "commit", "machine"))


if __name__ == "__main__":
    sys.exit(main())
