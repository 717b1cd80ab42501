"""A run: its settings, its folder, and what is kept there so that it can be stopped and resumed.

    args.json          the settings                    metrics.csv     one row per step
    evaluation.json    figures before and after        samples.jsonl   one row per completion
    answers-*.jsonl    what these figures are of       about.json      size, commit and date
    checkpoint/        an ordinary Hugging Face folder, and what resuming needs

A checkpoint is atomic: it is written beside the last one and then takes its name, so that at any moment
one of the two is whole. state.json says the step and the hash of every other file; the checkpoints
before it are kept as checkpoint-STEP. Tensors are in safetensors, all else is text: nothing is pickled.
"""

import argparse
import contextlib
import dataclasses
import difflib
import hashlib
import importlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from copo import LOSS_TYPES, SCALES
from data import DataError, Example, describe_image
from hallucination.answers import fingerprint
from hallucination.files import write_whole
from interventions import PAIRINGS, UNITS
from model import Policy
from rewards import RewardFunction, well_formed
from rollouts import Rollouts, Scores

Result = TypeVar("Result")
LOWER = "lower --max-completion-length, --num-generations or --batch-size"
ABOUT = "about.json"
STALL = 10  # steps in a row that make a warning, or non-finite losses in a row that end the run


# ---------------------------------------------------------------------------------------------
# Settings: the command line and its checks are made of these fields
# ---------------------------------------------------------------------------------------------
def _set(default, help_: str, low=None, high=math.inf, choices=None, may_change=False):
    """One field.  low, high: its range.  may_change: a run can be resumed with another value."""
    facts = {"help": help_, "low": low, "high": high, "choices": choices, "may_change": may_change}
    return dataclasses.field(default=default, metadata=facts)


SCHEDULES = ("constant", "linear", "cosine")
CUDA = torch.cuda.is_available()


@dataclass(frozen=True)
class Settings:
    """Everything that can be set about a run; `python train.py --help` prints the same list."""

    # fmt: off
    model: str | None = _set(None, "model folder or hub name; without it, the tiny model, warm-started")
    output: Path | None = _set(None, "folder of the run; without it runs/first, or the next free run-2")
    resume: bool = _set(False, "go on from the run's last checkpoint; without --output, the newest run's")
    steps: int = _set(40, "optimiser steps in all", low=1, may_change=True)
    save_steps: int = _set(10, "steps from one checkpoint to the next", low=1, may_change=True)
    keep_checkpoints: int = _set(2, "how many checkpoints to keep", low=1, may_change=True)
    seed: int = _set(0, "of the data, the sampling and the scoring")
    device: str = _set("cuda" if CUDA else "cpu", "cpu, cuda, ...", may_change=True)
    dtype: str | None = _set(None, "that the model computes in, trained weights being kept in float32 "
                             "either way; without it, bfloat16 on cuda, float32 elsewhere",
                             choices=("float32", "bfloat16"))
    dry_run: bool = _set(False, "print what the run would take of the memory, and of time, measured on one "
                         "step where it can be, and stop")
    log_to: str | None = _set(None, "draw the columns of metrics.csv there, too; a package of that name "
                              "must be installed", choices=("tensorboard", "wandb"), may_change=True)
    trust_remote_code: bool = _set(False, "run code that comes with the model: only for sources you trust")
    debug: bool = _set(False, "show where in the program an error came from")

    eval_scenes: int = _set(300, "scenes: held-out ones, before and after; 0: none", low=0)
    eval_data: Path | None = _set(None, "held-out examples, a file like --data: their mean outcome reward, "
                                  "answered greedily, before, every --eval-steps steps and after")
    eval_steps: int = _set(10, "steps from one look at --eval-data to the next", low=1, may_change=True)

    data: Path | None = _set(None, "JSON lines: image, question, answer; without it, scenes")
    images: Path | None = _set(None, "folder that image names in --data and --eval-data are relative to; "
                               "without it, that of the file")
    skip_bad: bool = _set(False, "drop bad lines of --data and --eval-data")
    confounding: float = _set(0.9, "scenes: chance of a background's home category", 0, 1)
    fog: float = _set(0.0, "scenes: the thickest fog, from 0 (clear) to 1 (things cannot be seen)", 0, 1)
    crowds: bool = _set(False, "scenes: crowded ones, asked for the count alone: an outcome reward breeds "
                        "hallucination there")

    reward: list[str] | None = _set(None, "your own outcome reward, module:function of (completion, example)."
                                    " Further ones enter equation 1, but no causal question asks about them")
    reward_weights: list[float] | None = _set(None, "of several rewards, in their order; without it, 1 each")

    batch_size: int = _set(16, "prompts per step (B)", low=1)
    num_generations: int = _set(8, "completions per prompt (G)", low=2)
    max_completion_length: int = _set(64, "most tokens of a completion (C)", low=8)
    temperature: float = _set(1.0, "of sampling, and of the log-probabilities", low=0.01)
    scale_rewards: str = _set("group", "whose standard deviation divides the advantages (equation 1)",
                              choices=SCALES)
    loss_type: str = _set("grpo", "what a completion's sum over tokens is divided by (equation 6): its own "
                          "length (grpo), the mean length (bnpo and dapo), the most tokens (dr_grpo)",
                          choices=LOSS_TYPES)
    epsilon: float = _set(0.2, "clipping range of the ratio (equation 6)", 0, 1)
    epsilon_high: float | None = _set(None, "its upper end alone, above 1; without it, --epsilon", low=0)
    beta: float = _set(0.04, "weight of the KL to the reference (equation 6)", low=0)
    num_iterations: int = _set(1, "updates on each batch of completions", low=1)

    learning_rate: float | None = _set(None, "at its highest; without it, 1e-4 for the tiny model and for "
                                       "adapters, 1e-6 for --model", low=0)
    lr_scheduler_type: str = _set("constant", "how it goes on after the warmup: linear and cosine reach 0 "
                                  "at --steps", choices=SCHEDULES)
    warmup_steps: int = _set(0, "steps in which it rises from 0, as in transformers", low=0)
    max_grad_norm: float = _set(1.0, "gradients are clipped to this norm; 0: they are not", low=0)
    train_vision: bool = _set(False, "train the vision tower, too; by default it is frozen")

    lora_rank: int | None = _set(None, "train adapters of this rank in place of the decoder's weights "
                                 "(needs peft)", low=1)
    micro_batch_size: int | None = _set(None, "prompts in one backward pass; without it, all at once",
                                        low=1, may_change=True)
    gradient_checkpointing: bool = _set(False, "recompute activations in the backward pass; the prompt "
                                        "then runs once per completion")

    lambda_s: float = _set(0.35, "weight of sufficiency (equation 4)", 0, 1)
    lambda_n: float = _set(0.35, "weight of necessity (equation 4)", 0, 1)
    num_continuations: int = _set(4, "continuations per set (H, equation 2)", low=1)
    pairing: str = _set("coupled", "of the continuations compared", choices=PAIRINGS)
    zero_variance: str = _set("keep", "causal rewards in groups whose outcomes are all equal: all, none, "
                              "or none if all are wrong", choices=("keep", "drop", "gate"))
    max_rows: int | None = _set(None, "rows scored at once; without it, what half of the free memory holds",
                                low=1, may_change=True)
    max_scored_tokens: int | None = _set(None, "reasoning tokens of a completion to score, those it was "
                                         "least sure of; without it, all", low=1)
    unit: str = _set("auto", "what is scored at a time: token, word, or so many tokens; auto: tokens, "
                     "but runs of them, by cheaper questions, where reasoning is long")
    # fmt: on


# The first field of each group of flags -> what --help calls the group.
GROUPS = {
    "model": "run",
    "eval_scenes": "evaluation",
    "data": "data",
    "reward": "reward",
    "batch_size": "GRPO",
    "learning_rate": "optimiser",
    "lora_rank": "memory",
    "lambda_s": "causal reward",
}


def flag_of(name: str) -> str:
    """The flag of a field: --save-steps of save_steps."""
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """A parser that takes no flag for another, and names the one that was meant."""

    def error(self, message: str) -> typing.NoReturn:
        """Exit with code 2 and one line."""
        unknown = re.search(r"unrecognized arguments:.*?(--[\w-]+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions) if unknown else ()
        hint = f": did you mean {near[0]}?" if near else ""
        self.exit(2, f"{self.prog}: error: {message}{hint} (--help lists every flag)\n")


def parser_of(description: str) -> argparse.ArgumentParser:
    """A parser with a flag for each field of Settings."""
    parser = Parser(
        allow_abbrev=False,
        usage="%(prog)s [--flag value ...]",  # a list of all of them would fill a screen
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    group = parser
    for field in dataclasses.fields(Settings):
        if field.name in GROUPS:
            group = parser.add_argument_group(GROUPS[field.name])
        add_flag(group, field.name)
    return parser


def add_flag(group, name: str, *others: str) -> None:
    """Add the flag of a field of Settings, under other names, too, to a parser or a group of its flags."""
    field, kind = Settings.__dataclass_fields__[name], typing.get_type_hints(Settings)[name]
    if isinstance(kind, types.UnionType):  # X | None
        (kind,) = set(typing.get_args(kind)) - {types.NoneType}
    if kind is bool:
        how = {"action": argparse.BooleanOptionalAction}
    elif typing.get_origin(kind) is list:
        how = {"type": typing.get_args(kind)[0], "nargs": "+"}
    else:
        how = {"type": kind, "choices": field.metadata["choices"]}
    help_ = field.metadata["help"]
    group.add_argument(flag_of(name), *others, dest=name, default=field.default, help=help_, **how)


def check(settings: Settings) -> None:
    """Refuse values that would only fail later.  Raises DataError."""
    for field in dataclasses.fields(Settings):
        value, low, high = getattr(settings, field.name), *map(field.metadata.get, ("low", "high"))
        if value is not None and low is not None and not low <= value <= high:
            allowed = f"between {low} and {high}" if high < math.inf else f"at least {low}"
            raise DataError(f"{flag_of(field.name)} is {value}, must be {allowed}")
    if settings.device.startswith("cuda") and not torch.cuda.is_available():
        raise DataError(
            f"--device {settings.device}: this machine has no CUDA GPU: use --device cpu"
        )
    if settings.crowds and (settings.fog or settings.data):
        raise DataError(
            "--crowds is a world of its own: it goes neither with --fog nor with --data"
        )
    if settings.lora_rank and settings.train_vision:
        raise DataError("--lora-rank trains the decoder: it does not go with --train-vision")
    if settings.lora_rank and not importlib.util.find_spec("peft"):
        raise DataError("--lora-rank needs peft: pip install peft")
    if settings.log_to:
        found = importlib.util.find_spec(settings.log_to)
        if not (found and found.origin):  # a folder that has the name is no package
            raise DataError(f"--log-to {settings.log_to} needs it: pip install {settings.log_to}")
    if not re.fullmatch(UNITS, settings.unit):
        raise DataError(
            f"--unit is {settings.unit!r}, must be auto, token, word, or how many tokens, as in --unit 8"
        )
    if settings.warmup_steps >= settings.steps:
        raise DataError(
            f"--warmup-steps is {settings.warmup_steps}, must be below --steps, {settings.steps}"
        )
    names, weights = settings.reward or [], settings.reward_weights
    if len(set(names)) < len(names):
        raise DataError("--reward names the same function twice")
    if weights and (len(names) < 2 or len(weights) != len(names)):
        raise DataError(
            f"--reward-weights has {len(weights)} numbers, must have one for each of several rewards: "
            f"--reward has {len(names)}"
        )
    if weights and not all(map(math.isfinite, weights)):
        raise DataError(f"--reward-weights is {weights}, must be numbers that are finite")
    load_rewards(settings)


def rate_at(settings: Settings, step: int) -> float:
    """The share of --learning-rate in a step, counted from 0: a schedule of transformers, under its name.

    It depends on the step alone, so a resumed run goes on as if it had never stopped; with another --steps,
    it follows the new end from there on.
    """
    steps, warmup = settings.steps, settings.warmup_steps
    if step < warmup:
        return step / warmup
    done = (step - warmup) / max(steps - warmup, 1)
    falling = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return falling[settings.lr_scheduler_type]


def load_rewards(settings: Settings) -> list[RewardFunction]:
    """The rewards that --reward names: the outcome's, and further ones; [] without the flag."""
    return [load_reward(name, further=i > 0) for i, name in enumerate(settings.reward or [])]


def load_reward(name: str, further: bool = False) -> Callable[[str, Example], float | None]:
    """A user's own reward, "my_module:my_function", from the working directory or wherever Python looks.

    It gets the text of a completion and its Example, or the text alone where it takes one argument, and
    must return a number in [0, 1], of Python, numpy or torch.  A further reward, one beside the outcome,
    may return None where it does not apply.  Raises DataError where it cannot be loaded, and later where
    it returns anything else.
    """
    module, _, function = name.partition(":")
    try:
        reward = getattr(_module_of_user(module), function)
        places = inspect.signature(reward)
    except Exception as error:  # whatever a user's module raises while it is imported
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"--reward {name}: must be module:function: {reason}") from None
    count = next((n for n in (2, 1) if _takes(places, n)), 0)
    if not count:
        raise DataError(f"--reward {name}: must take a completion and its example")

    def checked(completion: str, example: Example) -> float | None:
        given = reward(*(completion, example)[:count])
        if further and given is None:
            return None
        try:
            value = math.nan if isinstance(given, str | bytes) else float(given)
        except (TypeError, ValueError, RuntimeError):  # torch's, for a tensor of several values
            value = math.nan
        if not 0 <= value <= 1:
            raise DataError(f"--reward {name}: returned {given!r}, must be a number in [0, 1]")
        return value

    return checked


def _takes(places: inspect.Signature, count: int) -> bool:
    """Whether a function can be called with this many arguments."""
    try:
        places.bind(*range(count))
    except TypeError:
        return False
    return True


def _module_of_user(name: str) -> types.ModuleType:
    """A module by its name; the user's own file or package in the working directory before one of ours."""
    path = Path(name.replace(".", "/"))
    found = [file for file in (path / "__init__.py", path.with_suffix(".py")) if file.exists()]
    sys.path.insert(0, "")  # what it imports may lie beside it
    try:
        if not (name and found):
            return importlib.import_module(name)
        private = f"_user_{name.replace('.', '_')}"
        spec = importlib.util.spec_from_file_location(private, found[0].absolute())
        module = importlib.util.module_from_spec(spec)
        sys.modules[private] = module  # dataclasses look there
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove("")


# ---------------------------------------------------------------------------------------------
# The folder: begun once, resumed with the same settings
# ---------------------------------------------------------------------------------------------
def run_folder(settings: Settings) -> Path:
    """--output; without it, the newest run to be resumed, or else the first free of first, run-2, ...

    Free is a folder that holds no run, and that no other process is about to begin one in.
    """
    if settings.output:
        return settings.output
    begun = sorted(Path("runs").glob("*/args.json"), key=lambda path: path.stat().st_mtime)
    if settings.resume and begun:
        return begun[-1].parent
    names = itertools.chain(["first"], (f"run-{i}" for i in itertools.count(2)))
    folders = (Path("runs") / name for name in names)
    return next(f for f in folders if not (f / "args.json").exists() and not _is_held(f))


@contextlib.contextmanager
def own_folder(settings: Settings) -> Iterator[Path]:
    """`run_folder`, kept from other processes; left as it was where nothing was written into it.

    Raises DataError where another process keeps it.  The system frees it whatever ends this one.
    """
    folder = run_folder(settings)
    if settings.dry_run or fcntl is None:
        yield folder
        return
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    held = os.open(folder, os.O_RDONLY)
    try:
        if not _hold(held):
            raise DataError(
                f"{folder}: another process is training there: wait for it, or choose another --output"
            )
        yield folder
    finally:
        os.close(held)
        with contextlib.suppress(OSError):  # of a folder that is not empty
            for path in made:
                path.rmdir()


def _hold(folder: int) -> bool:
    """Take an open folder for this process; False where another one has it."""
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system that keeps nothing apart
        return True
    return True


def _is_held(folder: Path) -> bool:
    """Whether a process has taken a folder."""
    if fcntl is None or not folder.is_dir():
        return False
    opened = os.open(folder, os.O_RDONLY)
    try:
        return not _hold(opened)
    finally:
        os.close(opened)


def open_run(settings: Settings, folder: Path) -> tuple[Path | None, str]:
    """The checkpoint to go on from, or None, and what args.json should hold; a new run writes nothing yet.

    Raises DataError rather than overwrite a run, or go on from checkpoints that are not a run's. Logs whose
    checkpoints are gone are put aside.
    """
    facts = {k: str(v) if isinstance(v, Path) else v for k, v in vars(settings).items()}
    facts = {k: v for k, v in facts.items() if k not in ("output", "resume", "dry_run", "debug")}
    for name in ("data", "eval_data"):
        if file := getattr(settings, name):
            facts[f"{name}_sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    if settings.model:
        facts["model_files"] = fingerprint(settings.model)
    begun = (folder / "args.json").exists()
    if begun:
        if not settings.resume:
            raise DataError(
                f"{folder} holds a run already: add --resume, or choose another --output"
            )
        _refuse_changes(folder, facts)
    newest = folder / "checkpoint"
    if not begun and (found := [path for path in (newest, *_older(newest)) if path.exists()]):
        raise DataError(
            f"{folder} holds {found[0].name}, but no args.json of a run: choose another --output"
        )
    checkpoint = find_checkpoint(newest)
    if begun and not checkpoint:
        print(f"{folder} has no checkpoint to go on from: beginning at step 0", file=sys.stderr)
        for log in (folder / "metrics.csv", folder / "samples.jsonl"):
            old = log.with_name(f"old-{log.name}")
            if log.exists() and (not old.exists() or old.stat().st_size < log.stat().st_size):
                log.replace(old)
                print(f"its {log.name} is kept as {old.name}", file=sys.stderr)
    return checkpoint, json.dumps(facts, indent=2) + "\n"


def about(policy: Policy) -> dict:
    """What a page tells of a run beside its settings: the model's size, the program's commit, the date."""
    parameters = list(policy.model.parameters())
    commit, root = None, Path(__file__).parent
    if (root / ".git").exists():  # of this program, not of a repository that it lies in
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            command = ("git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*")
            commit = subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
    return {
        "parameters": sum(p.numel() for p in parameters),
        "trained": sum(p.numel() for p in parameters if p.requires_grad),
        "commit": commit,
        "begun": time.strftime("%Y-%m-%d"),
    }


def default_dtype(settings: Settings) -> str:
    """What the model computes in where --dtype does not say: as before, or else by the device."""
    before = read_or_empty(run_folder(settings) / "args.json") if settings.resume else {}
    if "dtype" in before:
        return before["dtype"]
    return "bfloat16" if settings.device.startswith("cuda") else "float32"


def read_or_empty(path: Path) -> dict:
    """The object in a JSON file of a run; {} where there is none, or a torn one."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _refuse_changes(folder: Path, facts: dict) -> None:
    """Raise DataError if a run that is to be resumed was begun with other settings, data or model."""
    before = read_or_empty(folder / "args.json")
    if not before:
        print(f"{folder / 'args.json'} is broken: written anew, not compared", file=sys.stderr)
        return
    fields = {field.name: field for field in dataclasses.fields(Settings)}
    for name, value in facts.items():
        field = fields.get(name)
        if field and field.metadata["may_change"]:
            continue
        # A run from before a setting was there has its default.
        if value == before.get(name, field and field.default):
            continue
        if not field:
            what = facts[name.rpartition("_")[0]]
            raise DataError(f"{folder}: cannot resume: {what} has changed since the run began")
        raise DataError(
            f"{folder}: cannot resume with another {flag_of(name)}: "
            f"the run has {before.get(name)}, this call {value}"
        )


# ---------------------------------------------------------------------------------------------
# Logs: what is kept of a step, and what is said of it
# ---------------------------------------------------------------------------------------------
def describe_step(rollouts: Rollouts, scores: Scores) -> dict[str, float | None]:
    """What the rollouts earned and the scores found; docs/metrics.md defines every column."""
    groups = rollouts.totals.view(len(rollouts.examples), -1)  # (B, G)
    reasoning = rollouts.reasoning_mask

    def over_reasoning(values: Tensor) -> float:
        return (values[reasoning].sum() / reasoning.sum().clamp(min=1)).item()

    causal = over_reasoning(scores.causal_rewards)
    paid = over_reasoning(scores.causal_rewards.abs())  # an experiment may charge tokens, too
    outcome = over_reasoning(scores.advantages.abs()[:, None].expand_as(reasoning))
    of_each = {}
    for name, rewards in rollouts.components.items():
        given = rewards[~rewards.isnan()]
        of_each[f"rewards/{name}/mean"] = given.mean().item() if len(given) else None
        of_each[f"rewards/{name}/std"] = given.std().item() if len(given) > 1 else None
    return {
        "reward": groups.mean().item(),
        "reward_std": groups.std(1).mean().item() if groups.shape[1] > 1 else 0.0,
        "frac_reward_zero_std": (groups == groups[:, :1]).all(1).float().mean().item(),
        **of_each,
        "sufficiency": over_reasoning(scores.sufficiency),
        "necessity": over_reasoning(scores.necessity.clamp(0, 1)),
        "causal_reward": causal,
        "causal_share": paid / max(paid + outcome, 1e-12),
        "completion_length": rollouts.lengths.float().mean().item(),
        "truncated": rollouts.truncated.float().mean().item(),
        "malformed": sum(not well_formed(text) for text in rollouts.texts) / len(rollouts.texts),
        "rows_scored": scores.evidence.cost.rows,
        "scoring_token_forwards": scores.evidence.cost.token_forwards,
        "approximate": float(not scores.evidence.exact),
    }


def sample_rows(policy: Policy, rollouts: Rollouts, scores: Scores, step: int) -> list[dict]:
    """The rows of samples.jsonl: one per completion, with one score per token."""
    rows = []
    for n, length in enumerate(rollouts.lengths.tolist()):
        example = rollouts.examples[int(rollouts.prompt_index[n])]

        def per_token(values: Tensor, n: int = n, length: int = length) -> list[float]:
            return [round(value, 4) for value in values[n, :length].tolist()]

        rows.append(
            {
                "step": step + 1,
                "prompt": example.question,
                "kind": example.kind,
                "answer": example.answer,
                "image": describe_image(example),
                "reward": round(rollouts.rewards[n].item(), 4),
                "tokens": token_texts(policy, rollouts.completion_ids[n, :length].tolist()),
                "reasoning": rollouts.reasoning_mask[n, :length].tolist(),
                "sufficiency": per_token(scores.sufficiency),
                "necessity": per_token(scores.necessity.clamp(0, 1)),
                "causal_reward": per_token(scores.causal_rewards),
                "advantage": per_token(scores.token_advantages),
                "approximate": not scores.evidence.exact,
            }
        )
    return rows


def token_texts(policy: Policy, ids: list[int]) -> list[str]:
    """What each token adds to the text, so that joined they are the text.

    Decoded alone, a token of some models loses the space before its word. Of a character whose bytes are
    several tokens, the last one has it.
    """
    found, start, done = [], 0, 0  # ids[start:done] stand before the next token in its window
    for end in range(1, len(ids) + 1):
        before, text = policy.text(ids[start:done]), policy.text(ids[start:end])
        if text.endswith("\ufffd") and end < len(ids):  # half a character
            found.append("")
            continue
        found.append(text[len(before) :])
        start, done = done, end
    return found


class Log:
    """metrics.csv and samples.jsonl of a run: one row per step, on disk as soon as it is known."""

    def __init__(self, folder: Path, done: int, curves: "Curves | None" = None):
        """Open the logs of a run that has `done` steps; later rows, and torn ones, are dropped.

        curves: where the rows of metrics.csv are drawn, too.
        """
        self.curves = curves
        self.metrics, self.samples = folder / "metrics.csv", folder / "samples.jsonl"

        rows, samples = (
            _whole_lines(path) if done else [] for path in (self.metrics, self.samples)
        )
        head, commas = rows[:1], rows[0].count(",") if rows else 0
        rows = [row for row in rows[1:] if row.count(",") == commas]
        # A run that an older version began keeps the columns it has.
        self.columns = head[0].split(",") if head else []
        kept = [row for row in rows if (step := row.split(",")[0]).isdigit() and int(step) <= done]
        write_whole(self.metrics, "".join(f"{line}\n" for line in head + kept))
        kept = [line for line in samples if 0 < _step_of(line) <= done]
        write_whole(self.samples, "".join(f"{line}\n" for line in kept))

    def write(self, row: dict[str, float | None], samples: Sequence[dict] = ()) -> None:
        """Append one step; None is an empty cell."""
        with self.metrics.open("a") as file:
            if not self.columns:
                self.columns = list(row)
                file.write(",".join(row) + "\n")
            cells = ("" if row.get(name) is None else f"{row[name]:.6g}" for name in self.columns)
            file.write(",".join(cells) + "\n")
        with self.samples.open("a") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in samples)
        if self.curves:
            self.curves.write(row)


class Curves:
    """The columns of metrics.csv as curves of tensorboard or wandb, by their own writers: --log-to."""

    def __init__(self, settings: Settings, folder: Path, done: int, arguments: str = "{}"):
        """Begin the curves of a run, or go on with those of one that has `done` steps.

        arguments: what args.json holds.
        """
        self.board = self.run = None
        if settings.log_to == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            # Later steps were drawn by a run that was killed before it saved them: they are hidden.
            self.board = SummaryWriter(folder / "tensorboard", purge_step=done + 1 if done else 0)
        elif settings.log_to == "wandb":
            import wandb

            name = folder / "wandb-id"
            if not done or not name.exists():
                write_whole(name, secrets.token_hex(4))
            self.run = wandb.init(
                project="copo", id=name.read_text(), name=folder.name, dir=folder, resume="allow",
                config=json.loads(arguments),
            )  # fmt: skip

    def write(self, row: dict[str, float | None]) -> None:
        """Draw one step; what was not measured is left out."""
        step = int(row["step"])
        figures = {k: v for k, v in row.items() if v is not None and k != "step"}
        if self.board:
            for name, value in figures.items():
                self.board.add_scalar(name, value, step)
            self.board.flush()  # to be looked at while the run goes on
        if self.run:
            self.run.log(figures, step=step)

    def close(self) -> None:
        """Write what is left to write."""
        if self.board:
            self.board.close()
        if self.run:
            self.run.finish()


def _whole_lines(path: Path) -> list[str]:
    """The lines of a log; one that was cut short, by a kill or a full disk, is none."""
    return path.read_text(errors="replace").split("\n")[:-1] if path.exists() else []


def _step_of(sample: str) -> int:
    """The step of a line of samples.jsonl, or 0 where it is broken."""
    try:
        return json.loads(sample)["step"]
    except (ValueError, KeyError, TypeError):
        return 0


class Watch:
    """Says in one line, once, what a reader of the curves should not have to find out alone."""

    TROUBLE = (  # column of metrics.csv, its limit, what is said
        ("frac_reward_zero_std", 0.95,
         "all completions of nearly every prompt earn the same: nothing to learn from"),
        ("truncated", 0.5, "most completions are cut off: raise --max-completion-length"),
        ("malformed", 0.5, "most completions lack <think>...</think> <answer>...</answer>: reward 0"),
    )  # fmt: skip
    LONG = (
        "reasoning is long: runs of tokens are scored, by cheaper questions than the paper's (column "
        "approximate); --unit token asks the paper's own, of every token"
    )

    def __init__(self):
        self.rows: list[dict[str, float]] = []
        self.said: set[str] = set()

    def see(self, row: dict[str, float], samples: Sequence[dict] = ()) -> None:
        """Look at the last STALL steps.  Raises FloatingPointError if none of them could be taken."""
        if not self.rows:
            self._see_reasoning(row, samples)
        if row["approximate"] and "approximate" not in self.said:
            self.said.add("approximate")
            tqdm.write(f"step {row['step']}: {self.LONG}", sys.stderr)
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
        for name, limit, what in self.TROUBLE:
            mean = sum(r[name] for r in self.rows) / STALL
            if mean > limit and name not in self.said:
                self.said.add(name)
                tqdm.write(f"warning: {what} ({mean:.0%} over {STALL} steps)", sys.stderr)

    def _see_reasoning(self, row: dict[str, float], samples: Sequence[dict]) -> None:
        """Say in the first step, and why, if there is little reasoning that a causal reward could pay."""
        without = [sample for sample in samples if not any(sample["reasoning"])]
        if len(without) * 2 <= len(samples):
            return
        why = f"the first of them begins {''.join(without[0]['tokens'])[:60]!r}"
        if row["truncated"] > 0.5:
            why = "most completions are cut off: raise --max-completion-length"
        tqdm.write(
            f"warning: step {row['step']}: {len(without)} of {len(samples)} completions have no reasoning "
            f"between <think> and </think>, so they get no causal reward, as in GRPO: {why}",
            sys.stderr,
        )


class Limit:
    """How much at once: a flag's value, or all; halved for good where the memory runs out."""

    def __init__(self, flag: str, value: int | None):
        self.flag, self.value = flag, value

    def fit(self, most: int, what: str, work: Callable[[int], Result]) -> Result:
        """What `work` returns for as much at once as fits; the result is the same for any size.

        Raises DataError where not even one fits.
        """
        while True:
            size = self.value or most
            try:
                return work(size)
            except torch.OutOfMemoryError:
                if size == 1:
                    raise DataError(f"out of memory: {what} one at a time; {LOWER}") from None
            self.value = size // 2  # out of the handler, which holds on to what did not fit
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            tqdm.write(f"out of memory: {what} again with {self.flag} {self.value}", sys.stderr)


class Limits:
    """The two sizes that the memory may force down in the course of a run."""

    def __init__(self, settings: Settings):
        self.rows = Limit("--max-rows", settings.max_rows)
        self.prompts = Limit("--micro-batch-size", settings.micro_batch_size)


# ---------------------------------------------------------------------------------------------
# Checkpoints: whole or not there
# ---------------------------------------------------------------------------------------------
_NEW = ".new"


def save_checkpoint(
    folder: Path, policy: Policy, optimizer: torch.optim.Optimizer, step: int, keep: int = 1
) -> None:
    """Write the checkpoint of a finished step as `folder`, and keep the `keep` newest of ours in all.

    Raises OSError where it cannot be written (a full disk); what was there before is then as it was.
    """
    new = folder.with_name(folder.name + _NEW)
    shutil.rmtree(new, ignore_errors=True)
    try:
        policy.save(new)
        tensors = {
            f"{index}.{name}": value
            for index, values in optimizer.state_dict()["state"].items()
            for name, value in values.items()
        }
        save_file(tensors, new / "optimizer.safetensors")
        state = {"step": step, "sha256": _hashes(new)}
        (new / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        for path in _files(
            new
        ):  # on disk before the name changes: a power cut leaves one of the two
            with open(path, "rb") as file:
                os.fsync(file.fileno())
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if folder.exists():
        before = _state(folder)
        aside = folder.with_name(f"{folder.name}-{before['step'] if before else 'broken'}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
    new.rename(folder)
    for old in [path for path in _older(folder) if _state(path)][max(keep - 1, 0) :]:
        shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint, or None; each that is not whole is named on stderr."""
    for candidate in (folder, *_older(folder)):
        if not candidate.exists():
            continue
        fault = _fault(candidate)
        if fault is None:
            return candidate
        print(f"{candidate}: {fault}: looking for the one before it", file=sys.stderr)
    return None


def restore_optimizer(checkpoint: Path, optimizer: torch.optim.Optimizer) -> int:
    """Put the optimiser back as it was; returns the steps done.  The weights are `load_policy`'s."""
    state: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in load_file(checkpoint / "optimizer.safetensors").items():
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return json.loads((checkpoint / "state.json").read_text())["step"]


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _hashes(folder: Path) -> dict[str, str]:
    """The hash of every file but state.json, by its path in the folder."""
    hashes = {}
    for path in _files(folder):
        if path.name != "state.json":
            with open(path, "rb") as file:
                name = path.relative_to(folder).as_posix()
                hashes[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _state(folder: Path) -> dict | None:
    """What state.json says, or None where it is missing or broken."""
    try:
        state = json.loads((folder / "state.json").read_text())
        return (
            state if isinstance(state["step"], int) and isinstance(state["sha256"], dict) else None
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _fault(folder: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    state = _state(folder)
    if state is None:
        return "its state.json is missing or broken"
    hashes = _hashes(folder)
    for name, expected in state["sha256"].items():
        if hashes.get(name) != expected:
            return f"{name} is {'changed' if name in hashes else 'missing'} since it was written"
    return None


def _older(folder: Path) -> list[Path]:
    """The checkpoints kept beside `folder`, newest first."""
    found = [
        (int(number), path)
        for path in folder.parent.glob(f"{folder.name}-*")
        if (number := path.name.removeprefix(f"{folder.name}-")).isdigit()
    ]
    return [path for _, path in sorted(found, reverse=True)]
