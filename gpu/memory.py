"""What a training run will take of the GPU's memory, from the model's configuration alone.

    python train.py --model DIR --data q.jsonl --images photos/ --dry-run

The sum of what stays (weights, reference, gradients, optimiser) and of the largest of three stages: the
rollout with its caches, the update with its activations, or the optimiser's step. Scoring is not in it:
it is given half of what is left (--max-rows). Nor is the allocator's own slack.
"""

import os
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig

from runs import Settings

GB, MB = 1e9, 1e6


def in_words(size: float) -> str:
    """Bytes in gigabytes, or in megabytes where these would round to nothing.

    >>> in_words(2.5e9), in_words(4e6)
    ('2.50 GB', '4 MB')
    """
    return f"{size / GB:.2f} GB" if size >= GB / 10 else f"{size / MB:.0f} MB"


def room(device: str) -> int:
    """Bytes that a run on a device may use: what is free of a GPU's memory, or all of the machine's."""
    if device.startswith("cuda"):
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Estimate:
    """Bytes, by what they are for; parameters in all, and those that are trained."""

    parameters: int
    trained: int
    weights: int
    reference: int
    gradients: int
    optimizer: int
    caches: int
    activations: int
    step: int

    @property
    def stays(self) -> int:
        """What is there all the time."""
        return self.weights + self.reference + self.gradients + self.optimizer

    @property
    def peak(self) -> int:
        """What stays, and the largest of the three stages."""
        return self.stays + max(self.caches, self.activations, self.step)

    def table(self) -> str:
        """The estimate as text."""
        heads = {
            "weights": f"{self.parameters / 1e6:,.0f} M parameters",
            "reference": "the policy before training, for the KL",
            "gradients": f"of {self.trained / 1e6:,.1f} M trained parameters",
            "optimizer": "AdamW's moments, and float32 copies of bfloat16 weights",
            "caches": "keys and values of a rollout",
            "activations": "of an update, logits included; at another time than the caches",
            "step": "gradients in float32 while the optimiser steps; at yet another time",
            "peak": "without scoring, which takes half of what is left",
        }
        rows = ((name, getattr(self, name), what) for name, what in heads.items())
        return "\n".join(f"{name:<12}{in_words(size):>12}  {what}" for name, size, what in rows)


def estimate(config: PretrainedConfig, settings: Settings, prompt_tokens: int) -> Estimate:
    """The memory of a run with these settings, for prompts of so many tokens (image included)."""
    dtype = getattr(torch, settings.dtype)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(
            config, dtype=dtype, trust_remote_code=settings.trust_remote_code
        )
    size = dtype.itemsize
    total = sum(p.numel() for p in model.parameters())
    if settings.lora_rank:
        head = model.get_output_embeddings()
        layers = (m for m in model.get_decoder().modules() if isinstance(m, nn.Linear))
        sides = (m.in_features + m.out_features for m in layers if m is not head)
        trained = settings.lora_rank * sum(sides)
        total += trained
    else:
        tower = model.get_encoder(modality="image")
        trained = total - (
            0 if settings.train_vision else sum(p.numel() for p in tower.parameters())
        )
    text = config.get_text_config()
    B, C = settings.batch_size, settings.max_completion_length
    m = min(settings.micro_batch_size or B, B)
    prompts, completions = B * prompt_tokens, B * settings.num_generations * C
    shared = not settings.gradient_checkpointing  # else the prompt runs once per completion
    activations = Activations(text, size, prompt_tokens + C)
    if shared:
        kept = m * prompt_tokens * activations.prompt_token
        kept += m * settings.num_generations * C * activations.completion_token
    else:
        kept = m * settings.num_generations * (prompt_tokens + C) * activations.checkpointed_token
    # The entropy is not kept, but takes two more of the logits' size while it is computed.
    logits = m * settings.num_generations * C * (activations.logits + 8 * text.vocab_size)
    return Estimate(
        parameters=total,
        trained=trained,
        weights=total * size,
        reference=0 if settings.lora_rank or not settings.beta else total * size,
        gradients=trained * size,
        optimizer=trained * (8 if size == 4 else 12),
        caches=(prompts + completions) * cache_bytes(text, size),
        activations=kept + logits,
        step=0 if size == 4 else trained * 4,
    )


def cache_bytes(text: PretrainedConfig, size: int) -> int:
    """Keys and values of one token in all layers."""
    heads = text.num_attention_heads
    head = getattr(text, "head_dim", None) or text.hidden_size // heads
    return 2 * text.num_hidden_layers * text.num_key_value_heads * head * size


class Activations:
    """Bytes kept for the backward pass per token, in all layers of a decoder of the Llama kind.

    A layer keeps: of its two norms the inputs, in float32 where they compute, what they scale and what
    comes out; queries, keys, values and the attention's output; and of the gated MLP the gate, its
    activation, the other half, and their product. Attention over shared prefixes also keeps its
    weights over all keys, in float32 and laid out by prompt, 8 bytes in all, and its queries twice.
    """

    def __init__(self, text: PretrainedConfig, size: int, keys: int):
        h, i, heads = text.hidden_size, text.intermediate_size, text.num_attention_heads
        head = getattr(text, "head_dim", None) or h // heads
        attention = (2 * heads + 2 * text.num_key_value_heads) * head * size
        layer = 2 * (4 + 2 * size) * h + attention + 4 * i * size
        self.prompt_token = text.num_hidden_layers * layer
        scores = 8 * heads * keys + 2 * heads * head * size
        self.completion_token = text.num_hidden_layers * (layer + scores)
        # Only the input of each layer is kept, and one layer at a time is computed again.
        self.checkpointed_token = text.num_hidden_layers * h * size + layer
        # The head's output, the logits in float32, at the temperature, and their log-softmax.
        self.logits = text.vocab_size * (12 + (size if size < 4 else 0))
