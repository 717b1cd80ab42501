"""What training small published models takes of the memory, from their configurations alone.

python -m experiments.models        the table of docs/models.md        -> experiments/results/memory.csv
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers
from transformers import PretrainedConfig

from experiments.records import commit, write_csv
from gpu.memory import GB, estimate
from runs import Settings


def known_models() -> dict[str, tuple[PretrainedConfig, int]]:
    """Small models with the shapes of their published configurations; tokens of a prompt with one image.

    SmolVLM cuts a picture into up to 17 tiles of 64 tokens; Qwen makes 391 tokens of 640 x 480 pixels.
    """
    smol = transformers.SmolVLMConfig(
        text_config={
            "model_type": "llama", "hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49_280,
            "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536,
        },
        vision_config={
            "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
            "intermediate_size": 3072, "image_size": 512, "patch_size": 16,
        },
        scale_factor=4, tie_word_embeddings=False,
    )  # fmt: skip
    text = {"vocab_size": 151_936, "num_key_value_heads": 2, "tie_word_embeddings": True}
    qwen2 = transformers.Qwen2VLConfig(
        text_config={
            **text, "hidden_size": 1536, "num_hidden_layers": 28, "num_attention_heads": 12,
            "intermediate_size": 8960,
        },
        vision_config={"depth": 32, "embed_dim": 1280, "hidden_size": 1536, "num_heads": 16},
        tie_word_embeddings=True,
    )  # fmt: skip
    qwen25 = transformers.Qwen2_5_VLConfig(
        text_config={
            **text, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
            "intermediate_size": 11_008,
        },
        vision_config={"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 2048},
        tie_word_embeddings=True,
    )  # fmt: skip
    return {
        "SmolVLM-256M": (smol, 1200),
        "Qwen2-VL-2B": (qwen2, 450),
        "Qwen2.5-VL-3B": (qwen25, 450),
    }


def known_rows() -> list[dict]:
    """GB by model, G, completion length, and what is trained; 4 prompts per step, 1 per backward pass."""
    rows = []
    for name, (config, prompt) in known_models().items():
        for G, C in ((8, 256), (8, 512), (16, 256)):
            for what, rank in (("all", None), ("LoRA, rank 16", 16)):
                settings = Settings(
                    dtype="bfloat16", lora_rank=rank, batch_size=4, micro_batch_size=1,
                    num_generations=G, max_completion_length=C, gradient_checkpointing=True,
                )  # fmt: skip
                found = estimate(config, settings, prompt)
                gigabytes = {
                    f"{key}_gb": f"{getattr(found, key) / GB:.1f}" for key in ("stays", "peak")
                }
                rows.append(
                    {"model": name, "generations": G, "tokens": C, "trained": what, **gigabytes}
                )
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Write the CSV.  Returns the exit code."""
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args(argv)
    path = Path(__file__).with_name("results") / "memory.csv"
    facts = {"command": "python -m experiments.models", "commit": commit()}
    rows = [row | facts for row in known_rows()]
    write_csv(path, rows, tuple(rows[0]))
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
