"""TRL's GRPOTrainer and train.py on the same work, taking turns in one process: what counts are the ratios.

    python -m integrations.side_by_side update          log-probabilities and gradients of G completions
    python -m integrations.side_by_side step            a whole step, of GRPO and of COPO

update: random decoders (512 wide, 8 layers), one and four prompts of P tokens, G = 8 completions each of
        C = 40, without a KL. Ours runs a prompt once, TRL once per completion, so the ratio of token
        positions is G (P + C) / (P + G C): 2.1 at P = 60, 4.9 at P = 400.
step:   the tiny LLaVA, 16 prompts, G = 8, at most 64 tokens, vision frozen, beta 0.04. Our step is taken
        in a callback at the end of each of TRL's.

A time is the median of the rounds after the first. TRL runs without activation checkpointing, its faster way.
"""

import argparse
import itertools
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer

import train
from copo import copo_loss
from integrations.trl import COPOTrainer
from integrations.trl_config import COPOConfig
from integrations.trl_data import correct, dataset_of
from model import Policy, load_policy
from runs import Limits, Settings
from scm import sample_example
from tiny import build_tiny_policy, warm_start

G, C = 8, 40
PLAIN = {
    "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1000,
    "bf16": False, "disable_tqdm": True, "gradient_checkpointing": False, "num_generations": G,
    "lr_scheduler_type": "constant", "learning_rate": 1e-4, "loss_type": "grpo",
    "use_bias_correction_kl": False,
}  # fmt: skip


def told(what: str, times: dict[str, list[float]]) -> None:
    """One line: medians, the median ratio of the rounds, and its range."""
    ours, trl = times["ours"][1:], times["trl"][1:]
    ratios = sorted(b / a for a, b in zip(ours, trl, strict=True))
    print(
        f"{what}: TRL / ours {statistics.median(ratios):.2f} [{ratios[0]:.2f}, {ratios[-1]:.2f}], "
        f"{len(ratios)} rounds; ours {statistics.median(ours):.3f} s, TRL {statistics.median(trl):.3f} s"
    )


def timed(work: Callable[[], object]) -> float:
    """Seconds that it takes."""
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# ---------------------------------------------------------------------------------------------
# The update
# ---------------------------------------------------------------------------------------------
def random_policy() -> Policy:
    """A LLaVA whose decoder has 8 layers of width 512, with the tiny policy's words."""
    processor = build_tiny_policy().processor
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
            image_size=28, patch_size=14, projection_dim=64,
        ),
        text_config=transformers.LlamaConfig(
            vocab_size=len(processor.tokenizer), hidden_size=512, num_hidden_layers=8,
            num_attention_heads=8, num_key_value_heads=2, intermediate_size=1376,
            tie_word_embeddings=True,
        ),
        image_token_index=processor.tokenizer.image_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    policy = Policy(transformers.LlavaForConditionalGeneration(config).eval(), processor)
    policy.forbidden[:] = False  # TRL's law, so that the gradients are the same
    return policy


def compare_updates(prompts: int, length: int, rounds: int) -> None:
    """Loss and gradient of a batch, by `copo_loss` on shared prompts and by TRL's `_compute_loss`.

    length: P, of each of the prompts.
    """
    policy = random_policy()
    words = (
        ~torch.isin(torch.arange(len(policy.forbidden)), policy.tokenizer.image_token_id)
    ).nonzero()
    words, generator = words[:, 0], torch.Generator().manual_seed(1)
    ids = words[torch.randint(len(words), (prompts, length + G * C), generator=generator)]
    prompt_ids, completion_ids = ids[:, :length], ids[:, length:].reshape(-1, C)
    prompt_index = torch.arange(prompts).repeat_interleave(G)
    mask, N = torch.ones_like(completion_ids), len(completion_ids)
    advantages = torch.randn(N, C, generator=generator)
    with tempfile.TemporaryDirectory() as folder:
        args = GRPOConfig(folder, per_device_train_batch_size=N, beta=0.0, **PLAIN)
        trainer = GRPOTrainer(
            policy.model, correct, args, dataset_of([sample_example(random.Random(0))]),
            processing_class=policy.processor,
        )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    batch = {
        "prompt_ids": prompt_ids[prompt_index], "prompt_mask": torch.ones(N, length).long(),
        "completion_ids": completion_ids, "completion_mask": mask, "advantages": advantages,
    }  # fmt: skip

    def ours() -> Tensor:
        prefix = policy.prefill(
            {"input_ids": prompt_ids, "attention_mask": torch.ones_like(prompt_ids)}
        )
        logps, _ = policy.per_token_logps(prefix, prompt_index, completion_ids, mask)
        return copo_loss(logps, logps.detach(), None, advantages, mask, beta=0.0)[0]

    def gradient(loss: Callable[[], Tensor]) -> None:
        policy.model.zero_grad()
        loss().backward()

    ways = {"ours": ours, "trl": lambda: trainer._compute_loss(trainer.model, batch)}
    times: dict[str, list[float]] = {name: [] for name in ways}
    found = {}
    for _ in range(rounds + 1):
        for name, loss in ways.items():
            times[name].append(timed(lambda loss=loss: gradient(loss)))
            found[name] = torch.cat(
                [p.grad.flatten() for p in policy.decoder.parameters() if p.grad is not None]
            )
    told(f"update, P = {length}, prompts {prompts}", times)
    apart = (found["ours"] - found["trl"]).norm() / found["trl"].norm()
    positions = G * (length + C) / (length + G * C)
    print(f"    token positions {positions:.1f}; gradients differ by {apart:.1e} of their norm")


# ---------------------------------------------------------------------------------------------
# The step
# ---------------------------------------------------------------------------------------------
class OurTurn(transformers.TrainerCallback):
    """Times TRL's steps, and takes one of ours after each."""

    def __init__(self, step: Callable[[int], object]):
        self.step, self.times, self.begun = step, {"ours": [], "trl": []}, 0.0

    def on_train_begin(self, *_, **__):
        """TRL's first step begins."""
        self.begun = time.perf_counter()

    def on_step_end(self, args, state, control, **_):
        """TRL's step has ended: our turn, and its next one begins."""
        self.times["trl"].append(time.perf_counter() - self.begun)
        self.times["ours"].append(timed(lambda: self.step(state.global_step)))
        self.begun = time.perf_counter()


def compare_steps(model: Path, rounds: int, weight: float) -> None:
    """A whole step of 16 prompts; weight: of both scores, 0 for GRPO."""
    settings = Settings(lambda_s=weight, lambda_n=weight, device="cpu", dtype="float32")
    loaded, limits = train.load(settings, model, None), Limits(settings)
    batches = train.batches(settings, None)
    policy = load_policy(model)
    policy.model.get_encoder(modality="image").requires_grad_(False)
    rng = random.Random(0)
    turns = OurTurn(lambda step: train.train_step(*loaded, next(batches), settings, limits, step))
    kind, config = (COPOTrainer, COPOConfig) if weight else (GRPOTrainer, GRPOConfig)
    scores = {"lambda_s": weight, "lambda_n": weight} if weight else {}
    with tempfile.TemporaryDirectory() as folder:
        args = config(
            folder, max_steps=rounds + 1, beta=settings.beta,
            per_device_train_batch_size=settings.batch_size * G,
            max_completion_length=settings.max_completion_length, **PLAIN, **scores,
        )  # fmt: skip
        examples = [sample_example(rng) for _ in range(settings.batch_size * (rounds + 1))]
        kind(
            policy.model, correct, args, dataset_of(examples),
            processing_class=policy.processor, callbacks=[turns],
        ).train()  # fmt: skip
    told(f"step of {'COPO' if weight else 'GRPO'}", turns.times)


def main(argv: list[str] | None = None) -> int:
    """Print the ratios.  Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("update", "step"))
    parser.add_argument("--model", type=Path, help="for step: a folder; without it the warm start")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (7)")
    given = parser.parse_args(argv)
    if given.what == "update":
        for prompts, length in itertools.product((1, 4), (60, 400)):
            compare_updates(prompts, length, given.rounds)
        return 0
    model = given.model or warm_start(Path("runs"))
    for weight in (0.0, Settings().lambda_s):
        compare_steps(model, given.rounds, weight)
    return 0


if __name__ == "__main__":
    sys.exit(main())
