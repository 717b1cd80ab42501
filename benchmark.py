"""What it costs to ask: the ways to run the same interventions, side by side in one process.

    python benchmark.py interventions                     the trained tiny policy, a default batch
    python benchmark.py interventions --shape mid         random weights, P = 256, T = 32, H = 4, A = 6
    python benchmark.py step                              a COPO step against a GRPO step, by stage
    python benchmark.py update --shape mid                the update on the shared prompt
    python benchmark.py growth --temperature 0.12         how scoring grows with T, H and G

    (a) generate a continuation     the model's own generate, once for every continuation
    (b) generate a set              generate, once for the H continuations of a prefix
    (c) copied cache                all rows at once, each with its own copy of prompt and prefix
    (d) shared, independent         one copy of keys and values, every continuation decoded
    (e) shared, coupled             only the draws that leave the trajectory are decoded

Ways are interleaved, times are medians of repeated runs, and what counts are the ratios: they were
taken in one run on one machine. (a) and (b) are timed on evenly spaced places of the trajectories and
scaled up to all of them. Beside the token positions that a way runs stands the least that its completions
need: each distinct beginning once, as a tree of prefixes would run them.
"""

import argparse
import dataclasses
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
import transformers
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

import train
from data import DataError, collate, sample_example
from interventions import Interventions
from model import Policy, Prefix, build_tiny_policy, load_policy, sample_tokens
from records import commit, read_csv, write_csv
from rollouts import Rollouts, rollout
from shared import Reading, Rows, Texts
from warm_start import warm_start

SHAPES = {  # decoders with random weights: hidden, layers, heads, kv heads, MLP, vocabulary
    "tiny": (128, 4, 4, 4, 344, 512),
    "mid": (512, 8, 8, 2, 1376, 512),
    "2b": (1536, 28, 12, 2, 8960, 151_936),
    "3b": (2048, 36, 16, 2, 11_008, 151_936),
}


# ---------------------------------------------------------------------------------------------
# What is asked about: a batch of the trained tiny policy, or random weights of a given shape
# ---------------------------------------------------------------------------------------------
def trained_batch(args: argparse.Namespace) -> tuple[Policy, dict, Rollouts]:
    """The policy, its prompts' inputs, and the rollouts of one default training step."""
    policy = load_policy(args.model or warm_start(Path("runs")), args.device)
    flags = ["--seed", str(args.seed), "--num-generations", str(args.num_generations)]
    defaults = train.parse_arguments(flags)
    examples = next(train.batches(defaults, None))
    inputs = collate(examples, policy.processor)
    with torch.no_grad():
        prefix = policy.prefill(inputs)
    generator = train.generator_for(args.seed, 0, "rollout")
    length = defaults.max_completion_length
    rollouts = rollout(policy, prefix, examples, args.num_generations, length, generator)
    return policy, inputs, rollouts


def random_batch(args: argparse.Namespace) -> tuple[Policy, dict, Rollouts]:
    """A LLaVA with a random decoder of a shape; one prompt of P tokens, T reasoning, A answer tokens.

    No token ends a row: every row runs to its budget, so that all ways do the same work.
    """
    hidden, layers, heads, kv_heads, mlp, vocabulary = SHAPES[args.shape]
    tokenizer = build_tiny_policy().tokenizer
    image = tokenizer.image_token_id
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            image_size=28, patch_size=14, projection_dim=64,
        ),
        text_config=transformers.Qwen2Config(
            vocab_size=vocabulary, hidden_size=hidden, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=mlp,
            tie_word_embeddings=True, eos_token_id=None, bos_token_id=None, pad_token_id=0,
        ),
        image_token_index=image, image_seq_length=4, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    model = transformers.LlavaForConditionalGeneration(config).to(args.device, dtype)
    policy = Policy(model, SimpleNamespace(tokenizer=tokenizer))
    policy.eos_ids = torch.tensor([vocabulary], device=args.device)
    P, T, A, G = args.prompt_tokens, args.reasoning_tokens, args.answer_tokens, args.num_generations
    prompt = torch.randint(400, vocabulary, (1, P))
    prompt[0, 1:5] = image
    inputs = {
        "input_ids": prompt,
        "attention_mask": torch.ones_like(prompt),
        "pixel_values": torch.rand(1, 3, 28, 28, dtype=dtype),
    }
    C = 1 + T + A
    place = torch.full((G,), 1, device=args.device)
    which, uniforms = torch.zeros_like(place), torch.rand(G, C).to(args.device)
    with torch.no_grad():
        prefix = policy.prefill(inputs)
        first = sample_tokens(prefix.logits[which], uniforms[:, :1], args.temperature)[:, 0]
        rows = policy.rows(prefix, which)
        ids, lengths = policy.decode(rows, first, place * C, uniforms, args.temperature)
    rollouts = Rollouts(
        examples=[sample_example(random.Random(0))],
        which=which,
        completion_ids=ids,
        lengths=lengths,
        start=place,
        end=place + T,
        answer=place + T,
        uniforms=uniforms,
        truncated=place > 0,
        rewards=(ids.sum(1) % 2).float(),
        texts=[""] * G,
        reward=lambda n, tokens: float(int(tokens.sum()) % 2),
    )
    return policy, inputs, rollouts


# ---------------------------------------------------------------------------------------------
# The ways
# ---------------------------------------------------------------------------------------------
class CopiedRows(Rows):
    """(c): rows that each hold a copy of all they read, run by the library's own attention."""

    def __init__(self, decoder, readings: list[Reading], position: Tensor):
        super().__init__(decoder, [], position)
        self.attended = True
        for layer in range(len(readings[0].texts.keys)):
            keys = torch.cat([r.texts.keys[layer][r.source] for r in readings], 2)
            values = torch.cat([r.texts.values[layer][r.source] for r in readings], 2)
            self.own.update(keys, values, layer)
        self.mask = torch.cat([r.visible for r in readings], 1)
        self.copied = self.mask.shape[1]

    def extend(self, embeddings: Tensor) -> Tensor:
        """As `Rows.extend`, the copies growing by n tokens."""
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
    def texts(self) -> Texts:
        """As `Rows.texts`: what the rows added, without what they copied."""
        added = super().texts
        return Texts(*([x[:, :, self.copied :] for x in kv] for kv in (added.keys, added.values)))


class CopiedCache(Interventions):
    """The interventions, way (c)."""

    def _rows(self, which: Tensor, kept: list, place: Tensor) -> Rows:
        shared = super()._rows(which, kept, place)
        return CopiedRows(shared.decoder, shared.readings, shared.position)


def ask(
    way, policy: Policy, prefix: Prefix, rollouts: Rollouts, args, pairing: str
) -> Interventions:
    """The interventions of one way, not yet run but for the pass over the trajectories."""
    generator = torch.Generator().manual_seed(args.seed)
    return way(
        policy,
        prefix,
        rollouts,
        generator,
        num_continuations=args.num_continuations,
        pairing=pairing,
        temperature=args.temperature,
        max_rows=args.max_rows,
    )


class Naive:
    """(a) and (b): the model's own generate, from the pixels on, at some of the places."""

    def __init__(self, policy: Policy, inputs: dict, rollouts: Rollouts, args: argparse.Namespace):
        self.policy, self.rollouts, self.args = policy, rollouts, args
        self.prompts = [
            {name: value[i : i + 1].to(policy.device) for name, value in inputs.items()}
            for i in range(len(rollouts.examples))
        ]
        # T + 1 sets a trajectory with reasoning; one masked answer a reasoning token.
        scored = (rollouts.end > rollouts.start).nonzero()[:, 0].tolist()
        spans = [(n, int(rollouts.start[n]), int(rollouts.end[n])) for n in scored]
        self.sets = [(n, j) for n, start, end in spans for j in range(start, end + 1)]
        self.masks = [(n, t) for n, start, end in spans for t in range(start, end)]

    def some(self, places: list) -> list:
        """Evenly spaced places to time; all of them cost len(places) / len(some) times as much."""
        count = min(self.args.naive_places, len(places))
        return [places[(2 * i + 1) * len(places) // (2 * count)] for i in range(count)]

    def generate(
        self, n: int, length: int, rows: int, sample: bool = True, masked: int | None = None
    ):
        """`rows` continuations of the first `length` tokens of completion n."""
        policy, inputs = self.policy, dict(self.prompts[int(self.rollouts.which[n])])
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
            **({"top_k": 0, "temperature": self.args.temperature} if sample else {}),
            num_return_sequences=rows,
            max_new_tokens=self.rollouts.uniforms.shape[1] - length,
            eos_token_id=ends or None,
            pad_token_id=policy.pad_id,
            suppress_tokens=policy.forbidden.nonzero()[:, 0].tolist() or None,
        )
        if hook:
            hook.remove()
        return out[:, prompt:]


@torch.no_grad()
def check_agreement(policy, prefix, rollouts, naive: Naive, args) -> None:
    """All ways give the same tokens before any is timed.  Raises AssertionError where they do not."""
    for n, j in naive.some(naive.sets)[:4]:
        plain = naive.generate(n, j, 1, sample=False)[0]
        told = policy.rows(prefix, rollouts.which[n : n + 1])
        hidden = told.extend(policy.embed(rollouts.completion_ids[n : n + 1, :j]))
        budget = torch.tensor([rollouts.uniforms.shape[1] - j], device=policy.device)
        ids, lengths = policy.decode(
            told, sample_tokens(policy.logits(hidden[:, -1]), None), budget
        )
        ours = ids[0, : lengths[0]]
        assert torch.equal(plain[j : j + len(ours)], ours), f"generate differs at {n}, {j}"
    ways = [
        ask(way, policy, prefix, rollouts, args, "coupled") for way in (Interventions, CopiedCache)
    ]
    for a, b in zip(*(way.continuation_rewards() for way in ways), strict=True):
        assert torch.equal(a, b), "copied and shared caches give different continuations"
    masked = [way.masked_rewards() for way in ways]
    assert torch.equal(*masked), "copied and shared caches give different masked answers"


def peak_bytes(work: Callable[[], object]) -> int:
    """The most bytes of keys and values that rows held at once: their own, copied, and shared ones."""
    peak, extend = 0, {way: way.extend for way in (Rows, CopiedRows)}

    def watched(way):
        def watch(self, embeddings):
            nonlocal peak
            hidden = extend[way](self, embeddings)
            held = sum(x.keys.nbytes + x.values.nbytes for x in self.own.layers)
            shared = [r.texts for r in self.readings]
            held += sum(x.nbytes for texts in shared for x in (*texts.keys, *texts.values))
            peak = max(peak, held)
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


def interleaved(ways: dict[str, Callable], args: argparse.Namespace) -> dict[str, float]:
    """Median seconds of each way over `--repeats` rounds, after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    rounds = [(r, name) for r in range(args.repeats + 1) for name in ways]
    for r, name in tqdm(rounds, desc="timing", unit="run", leave=False):
        elapsed = seconds(ways[name], args.device)
        if r:
            times[name].append(elapsed)
    return {name: statistics.median(values) for name, values in times.items()}


class NotedCompletions:
    """Rollouts that note every completion they are asked to pay: what must be run at the least."""

    def __init__(self, rollouts: Rollouts):
        which, ids, lengths = (
            x.tolist() for x in (rollouts.which, rollouts.completion_ids, rollouts.lengths)
        )
        self.trajectories = {
            (prompt, *row[:length]) for prompt, row, length in zip(which, ids, lengths, strict=True)
        }
        self.completions = set(self.trajectories)

        def noted(n: int, tokens: Tensor) -> float:
            self.completions.add((which[n], *tokens.tolist()))
            return rollouts.reward(n, tokens)

        self.rollouts = dataclasses.replace(rollouts, reward=noted)

    def least(self) -> int:
        """Each distinct beginning of a completion once, those of the trajectories not counted again.

        The last token of a completion need not be run, and the pass over the trajectories is not in it.
        """
        beginnings, told = (
            {text[:k] for text in texts for k in range(2, len(text))}
            for texts in (self.completions, self.trajectories)
        )
        return len(beginnings - told)

    def least_masked(self, asked: Interventions) -> int:
        """Of every masked text the masked token and what follows it to the last but one, once.

        As if every answer were its trajectory's own: those that differ are a little more or less.
        """
        u, t = asked.scored[asked.original].nonzero(as_tuple=True)
        return int((asked.rollouts.lengths[asked.original[u]] - 1 - t).sum())


def benchmark_interventions(args: argparse.Namespace) -> dict:
    """Sufficiency five ways, necessity three."""
    policy, inputs, rollouts = (random_batch if args.shape else trained_batch)(args)
    with torch.no_grad():
        prefix = policy.prefill(inputs)
    naive = Naive(policy, inputs, rollouts, args)
    check_agreement(policy, prefix, rollouts, naive, args)
    H = args.num_continuations
    some_sets, some_masks = naive.some(naive.sets), naive.some(naive.masks)

    shared = {  # name -> how, how paired, what is asked
        "(c) copied cache": (CopiedCache, "independent", "continuation_rewards"),
        "(d) shared, independent": (Interventions, "independent", "continuation_rewards"),
        "(e) shared, coupled": (Interventions, "coupled", "continuation_rewards"),
        "necessity: copied cache": (CopiedCache, "coupled", "masked_rewards"),
        "necessity: shared": (Interventions, "coupled", "masked_rewards"),
    }
    if args.skip_copied:
        shared = {name: how for name, how in shared.items() if how[0] is not CopiedCache}

    def whole(way, pairing: str, question: str) -> Callable[[], object]:
        return lambda: getattr(ask(way, policy, prefix, rollouts, args, pairing), question)()

    answers = rollouts.answer.tolist()
    ways = {
        "(a) generate a continuation": lambda: [naive.generate(n, j, 1) for n, j in some_sets],
        "(b) generate a set": lambda: [naive.generate(n, j, H) for n, j in some_sets],
        "necessity: generate a token": lambda: [
            naive.generate(n, answers[n], 1, masked=t) for n, t in some_masks
        ],
        **{name: whole(*how) for name, how in shared.items()},
    }
    times = interleaved(ways, args)
    times["(a) generate a continuation"] *= H * len(naive.sets) / len(some_sets)
    times["(b) generate a set"] *= len(naive.sets) / len(some_sets)
    times["necessity: generate a token"] *= len(naive.masks) / len(some_masks)

    table = {}
    prompt = sum(x.nbytes for x in [*prefix.texts.keys, *prefix.texts.values])
    for name, elapsed in sorted(times.items()):
        base = (
            "necessity: generate a token" if "necessity" in name else "(a) generate a continuation"
        )
        row = {"seconds": elapsed, "times_faster": times[base] / elapsed}
        if name in shared:
            way, pairing, question = shared[name]
            noted = NotedCompletions(rollouts)
            asked = ask(way, policy, prefix, noted.rollouts, args, pairing)
            told = sum(x.nbytes for x in [*asked.told.keys, *asked.told.values])
            before = asked.cost.token_forwards
            peak = peak_bytes(getattr(asked, question))
            row["rows"] = asked.cost.rows
            row["told_forwards"], row["row_forwards"] = before, asked.cost.token_forwards - before
            row["least_forwards"] = (
                noted.least_masked(asked) if "necessity" in name else noted.least()
            )
            row["kv_megabytes"] = (peak + (0 if way is CopiedCache else prompt + told)) / 1e6
        table[name] = row
    return {
        "sets": len(naive.sets),
        "masked": len(naive.masks),
        "continuations": H,
        "trajectories": len(rollouts.which),
        "ways": table,
    }


def benchmark_step(args: argparse.Namespace) -> dict:
    """A whole training step of COPO and of GRPO on the same prompts, by stage."""
    start = args.model or warm_start(Path("runs"))
    settings = {"COPO": [], "GRPO": ["--lambda-s", "0", "--lambda-n", "0"]}
    rows: dict[str, list[dict]] = {name: [] for name in settings}
    worlds = {}
    for name, flags in settings.items():
        defaults = train.parse_arguments(
            ["--seed", str(args.seed), "--device", args.device, *flags]
        )
        policy, reference = load_policy(start, args.device), load_policy(start, args.device)
        policy.model.get_encoder(modality="image").requires_grad_(False)
        trainable = [p for p in policy.model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-4, weight_decay=0.0)
        worlds[name] = policy, reference, optimizer, train.batches(defaults, None), defaults
    rounds = [(step, name) for step in range(5 * args.repeats + 1) for name in settings]
    for step, name in tqdm(rounds, desc="timing", unit="step", leave=False):
        policy, reference, optimizer, batches, defaults = worlds[name]
        examples = next(batches)
        row, _ = train.train_step(policy, reference, optimizer, examples, defaults, step)
        if step:
            rows[name].append(row)
    stages = ("rollout_seconds", "score_seconds", "update_seconds")
    result = {
        name: {stage: statistics.median(r[stage] for r in taken) for stage in stages}
        | {"step_seconds": statistics.median(sum(r[s] for s in stages) for r in taken)}
        for name, taken in rows.items()
    }
    pairs = zip(rows["COPO"], rows["GRPO"], strict=True)
    ratios = [sum(a[s] for s in stages) / sum(b[s] for s in stages) for a, b in pairs]
    return {**result, "copo_over_grpo": statistics.median(ratios), "steps": 5 * args.repeats}


def benchmark_update(args: argparse.Namespace) -> dict:
    """Log-probabilities and gradients with the prompt run once, against once a completion."""
    args.reasoning_tokens, args.answer_tokens = args.prompt_tokens // 10 - 7, 6
    policy, inputs, rollouts = random_batch(args)
    which, ids = rollouts.which, rollouts.completion_ids
    mask, G, C = torch.ones_like(ids), *ids.shape
    parameters = [p for p in policy.decoder.parameters() if p.requires_grad]
    gradients = {}

    def run(name: str, logps: Tensor) -> None:
        policy.model.zero_grad()
        logps.mean().backward()
        gradients[name] = [p.grad.clone() for p in parameters]

    def shared() -> None:
        run("shared", policy.per_token_logps(policy.prefill(inputs), which, ids, mask)[0])

    def plain() -> None:
        whole = torch.cat([inputs["input_ids"].expand(G, -1).to(ids.device), ids], 1)
        logits = policy.model(
            input_ids=whole,
            attention_mask=torch.ones_like(whole),
            pixel_values=inputs["pixel_values"].expand(G, -1, -1, -1).to(ids.device),
            logits_to_keep=C + 1,
        ).logits[:, :-1]
        logps = policy._allowed(logits).log_softmax(-1)
        run("plain", logps.gather(-1, ids[..., None])[..., 0])

    times = interleaved({"plain": plain, "shared": shared}, args)
    difference = max(
        float((a - b).abs().max() / b.abs().max().clamp(min=1e-12))
        for a, b in zip(gradients["shared"], gradients["plain"], strict=True)
    )
    return {
        "prompt": args.prompt_tokens,
        "completion": C,
        "generations": G,
        **{f"{name}_seconds": value for name, value in times.items()},
        "times_faster": times["plain"] / times["shared"],
        "largest_relative_difference_of_gradients": difference,
    }


def benchmark_growth(args: argparse.Namespace) -> dict:
    """Seconds and token-forwards of scoring as T, H and G grow, one at a time."""
    args.shape = args.shape or "tiny"
    grid = {
        "reasoning_tokens": (16, 32, 64, 128),
        "num_continuations": (1, 2, 4, 8),
        "num_generations": (4, 8, 16),
    }
    result: dict[str, dict] = {}
    for name, values in grid.items():
        for value in tqdm(values, desc=f"growth: {name}", leave=False):
            changed = argparse.Namespace(**{**vars(args), name: value})
            policy, inputs, rollouts = random_batch(changed)
            with torch.no_grad():
                prefix = policy.prefill(inputs)
            ways = {
                "(d) shared, independent": ("independent", "continuation_rewards"),
                "(e) shared, coupled": ("coupled", "continuation_rewards"),
                "necessity, shared": ("coupled", "masked_rewards"),
            }
            for way, (pairing, question) in ways.items():
                asked = ask(Interventions, policy, prefix, rollouts, changed, pairing)
                getattr(asked, question)()  # warms up, and counts
                again = ask(Interventions, policy, prefix, rollouts, changed, pairing)
                elapsed = seconds(getattr(again, question), args.device)
                point = {"seconds": elapsed, "token_forwards": asked.cost.token_forwards}
                result.setdefault(name, {}).setdefault(way, {})[value] = point
            P, T, A = changed.prompt_tokens, changed.reasoning_tokens, changed.answer_tokens
            R = changed.num_generations * changed.num_continuations * (T + 1)
            naive = {"seconds": None, "token_forwards": R * (P + T + A - 1)}
            result[name].setdefault("(a) generate, by its formula", {})[value] = naive
    policy, inputs, rollouts = random_batch(args)
    with torch.no_grad():
        prefix, which = policy.prefill(inputs), rollouts.which
        logps, _ = policy.per_token_logps(
            prefix, which, rollouts.completion_ids, rollouts.completion_mask, args.temperature
        )
    return {"growth": result, "mean_probability": logps.exp().mean().item()}


def draw_growth(growth: dict, path: Path) -> None:
    """Token-forwards against T, H and G, on logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    titles = {
        "reasoning_tokens": "T, reasoning tokens",
        "num_continuations": "H, continuations a set",
        "num_generations": "G, completions a prompt",
    }
    styles = dict(zip(sorted(growth["reasoning_tokens"]), ("o-", "s-", "^-", "d--"), strict=True))
    colors = dict(zip(styles, ("#8c8c8c", "#0067a8", "#e08a00", "#7a3b8f"), strict=True))
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.2), dpi=150, sharey=True, layout="constrained")
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for way, points in sorted(growth[name].items()):
            values = [point["token_forwards"] for point in points.values()]
            axis.plot(list(points), values, styles[way], color=colors[way], label=way, markersize=4)
        axis.set(xscale="log", yscale="log", xlabel=title, xticks=list(points))
        axis.set_xticklabels([str(x) for x in points])
        axis.minorticks_off()
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("token positions run")
    figure.legend(
        *axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, fontsize=8
    )
    figure.savefig(path)
    plt.close(figure)


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


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark, print its table.  Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    benchmarks = {
        "interventions": benchmark_interventions,
        "step": benchmark_step,
        "update": benchmark_update,
        "growth": benchmark_growth,
    }
    parser.add_argument("what", choices=benchmarks, help="what to measure")
    parser.add_argument("--shape", choices=SHAPES, help="a decoder with random weights")
    parser.add_argument("--model", help="trained model folder; without it, the tiny warm start")
    parser.add_argument("--prompt-tokens", type=int, default=256, help="P, for --shape")
    parser.add_argument("--reasoning-tokens", type=int, default=32, help="T, for --shape")
    parser.add_argument("--answer-tokens", type=int, default=6, help="A, for --shape")
    parser.add_argument("--num-continuations", type=int, default=4, help="H")
    parser.add_argument("--num-generations", type=int, default=8, help="G")
    parser.add_argument("--max-rows", type=int, default=4096, help="rows in one batch")
    parser.add_argument("--repeats", type=int, default=3, help="timed rounds")
    parser.add_argument(
        "--naive-places", type=int, default=5, help="places at which (a), (b) are timed"
    )
    parser.add_argument(
        "--skip-copied", action="store_true", help="leave out (c), which needs the memory"
    )
    parser.add_argument("--seed", type=int, default=0, help="of weights, batch and sampling")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    parser.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="for --shape"
    )
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling")
    parser.add_argument("--figure", type=Path, help="growth: draw it there")
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument(
        "--csv",
        type=Path,
        help="add the figures there, in the place of this command's earlier ones",
    )
    args = parser.parse_args(argv)
    command = f"benchmark.py {command_of(parser, args)}"
    disable_progress_bar()
    try:
        if args.what == "update" and not args.shape:
            raise DataError("update: choose a --shape")
        result = benchmarks[args.what](args)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(show(result))
    if args.figure and "growth" in result:
        draw_growth(result["growth"], args.figure)
    if args.json:
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        args.json.write_text(json.dumps({"arguments": settings, **result}, indent=2) + "\n")
    if args.csv:
        keep_rows(args.csv, command, result)
    return 0


def command_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> str:
    """What was measured: the command with the flags that are not as by default, files left out."""
    words = [args.what]
    for name, value in vars(args).items():
        if name not in ("what", "csv", "json", "figure") and value != parser.get_default(name):
            flag = "--" + name.replace("_", "-")
            words += [flag] if value is True else [flag, str(value)]
    return " ".join(words)


def keep_rows(path: Path, command: str, result: dict) -> None:
    """A row a figure, (way, figure, value), in the place of those that the command left before."""
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
    rows = [row for row in read_csv(path) if row["command"] != command]
    facts = {"command": command, "commit": commit(), "machine": f"{os.cpu_count()} cores"}
    rows += [{"way": w, "figure": f, "value": v, **facts} for w, f, v in flat]
    write_csv(path, rows, ("command", "way", "figure", "value", "commit", "machine"))


if __name__ == "__main__":
    sys.exit(main())
