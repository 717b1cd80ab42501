"""What the commands of evaluate.py share: flags, a model that is asked, bad entries that are counted.

Each scorer adds its own command with `new_command` and hands back a `Result`. Torch is imported only
where a model is asked.
"""

import argparse
import dataclasses
import functools
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from baselines.settings import RULES, Plain, Rule
from data import DataError, Example, image_in
from hallucination.files import Bad, write_whole

Result = tuple[dict, str]  # figures, and the table that shows them


# ---------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------
def new_command(
    commands,
    name: str,
    run: Callable[[argparse.Namespace], Result],
    help_: str,
    check: Callable[[argparse.Namespace], str | None] = lambda args: None,
) -> argparse.ArgumentParser:
    """Add a command to argparse's `commands`; its page of --help opens with the docstring of `run`.

    check: says why flags do not fit together, or None where they do.
    """
    parser = commands.add_parser(
        name,
        help=help_,
        description=run.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.set_defaults(run=run, check=check)
    parser.add_argument("--json", type=Path, help="write the figures there")
    parser.add_argument(
        "--skip-bad",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="drop bad entries and count them, instead of stopping at the first",
    )
    return parser


def add_model(parser: argparse.ArgumentParser, max_new_tokens: int, batch_size: int = 16) -> None:
    """Flags of a command that can ask a model."""
    group = parser.add_argument_group("the model, if it is to be asked")
    group.add_argument("--model", help="model folder or hub name")
    group.add_argument(
        "--save", type=Path, help="file of its answers; without it, one in runs/answers/"
    )
    group.add_argument("--limit", type=at_least_1, help="ask only this many questions")
    group.add_argument("--batch-size", type=at_least_1, default=batch_size, help="answers at once")
    group.add_argument(
        "--max-new-tokens", type=at_least_1, default=max_new_tokens, help="tokens per answer"
    )
    group.add_argument("--seed", type=int, default=0, help="of sampling, and of VCD's noise")
    group.add_argument(
        "--think",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for reasoning and answer in tags, as in training",
    )
    add_device(group)
    add_decoding(parser.add_argument_group("how it answers; baselines/README.md has the rules"))


def add_decoding(group) -> None:
    """--decoding, and every setting of every rule as a flag; what is not given is not in the namespace."""
    group.add_argument(
        "--decoding",
        metavar="{" + ",".join(RULES) + "}",
        help="without it greedy, or sample where a --temperature is given",
    )
    group.add_argument(
        "--temperature",
        type=at_least_0,
        help="of draws, 0 for the largest score; without it 1 for sample, 0 for the others",
    )
    fields = {field.metadata["flag"]: field for field in _settings(*RULES.values())}
    for flag, field in fields.items():
        facts = field.metadata
        shared = field.name in ("num_beams", "repetition_penalty")
        value = "" if facts["choices"] or shared else f" (default: {field.default})"
        group.add_argument(
            flag,
            type=type(field.default),
            choices=facts["choices"] or None,
            default=argparse.SUPPRESS,
            help=facts["help"] + value,
        )


def _settings(*rules: type[Rule]) -> list[dataclasses.Field]:
    return [field for rule in rules for field in dataclasses.fields(rule)]


def rule_of(args: argparse.Namespace) -> tuple[Rule | None, float]:
    """The rule that the flags ask for, None for the model's own distribution, and the temperature.

    Raises DataError for settings of another rule, out of range, or at odds with one another.
    """
    name = args.decoding or ("sample" if args.temperature else "greedy")
    if name not in RULES:
        raise DataError(f"--decoding must be one of {', '.join(RULES)}, got {name!r}")
    temperature = args.temperature
    if temperature is None:
        temperature = 1.0 if name == "sample" else 0.0
    given = {}
    for field in _settings(*RULES.values()):
        flag = field.metadata["flag"]
        if hasattr(args, flag[2:].replace("-", "_")):
            given[flag] = getattr(args, flag[2:].replace("-", "_"))
    own = {field.metadata["flag"]: field.name for field in _settings(RULES[name])}
    if foreign := sorted(given.keys() - own):
        raise DataError(f"{foreign[0]} is no setting of --decoding {name}: leave it out")
    rule = RULES[name](**{own[flag]: value for flag, value in given.items()})
    if name == "sample" and not temperature:
        raise DataError("--decoding sample needs a --temperature above 0; at 0 it is greedy")
    if temperature and (name == "greedy" or not rule.draws):
        raise DataError(f"--decoding {name} draws nothing: leave out --temperature")
    return None if rule == Plain() else rule, temperature


def decoding_in_words(rule: object, temperature: float) -> str:
    """How answers were decoded, from what their rows say: "greedy", "vcd (alpha 1, ...), temperature 1"."""
    words = [f"temperature {temperature:g}"] if temperature else []
    if isinstance(rule, dict):
        facts = [f"{k.replace('_', ' ')} {v}" for k, v in rule.items() if k != "name"]
        words.insert(0, f"{rule.get('name')} ({', '.join(facts)})")
    elif rule is not None:
        words.insert(0, str(rule))
    return ", ".join(words) or "greedy"


def add_device(group) -> None:
    """Flags that say where a model runs, for a parser or a group of its flags."""
    group.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    group.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights"
    )
    group.add_argument(
        "--trust-remote-code",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="run code that comes with the model: only for sources you trust",
    )


def at_least_1(text: str) -> int:
    """The whole number that a flag takes."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def at_least_0(text: str) -> float:
    """The number that a flag takes."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of at least 0")
    return value


def one_source(args: argparse.Namespace, saved: str) -> str | None:
    """Why --model and the flag of saved answers do not fit together: one of the two must be given."""
    if bool(args.model) == bool(getattr(args, saved)):
        return f"give either --model or --{saved}"
    return None


def images_of_model(args: argparse.Namespace) -> str | None:
    """Why --model and --images do not fit together, or None."""
    return "--model needs --images" if args.model and not args.images else None


def refuse_limit(args: argparse.Namespace) -> None:
    """Raises DataError where --limit is given and no model is asked."""
    if args.limit is not None:
        raise DataError("--limit says how many questions a model is asked: it needs --model")


# ---------------------------------------------------------------------------------------------
# Asking a model
# ---------------------------------------------------------------------------------------------
def ask_model(
    args: argparse.Namespace,
    questions: Sequence[tuple[dict, Example]],
    bad: Bad,
    model: str | None = None,
    policy=None,
) -> list[str | None]:
    """A model's completions, from its file of answers as far as that goes; None for a dropped image.

    model: its folder or name, args.model if left out.  policy: the same model, where it is loaded already.
    """
    from hallucination.answers import Decoding, answer_all, answers_file, fingerprint

    if not questions:
        raise DataError("no question is left to ask")
    model = model or args.model
    rule, temperature = rule_of(args)
    decoding = Decoding(
        fingerprint(model), args.max_new_tokens, temperature, args.seed, args.think, rule
    )
    save = args.save or answers_file(args.command, questions, decoding)
    print(f"answers: {save}", file=sys.stderr)
    load = functools.partial(load_model, model, args) if policy is None else lambda: policy
    return answer_all(load, questions, decoding, save, args.batch_size, bad, args.command)


def load_model(model: str, args: argparse.Namespace):
    """The policy in a folder or on the hub, by the flags of `add_device`."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from model import load_policy

    disable_progress_bar()
    return load_policy(model, args.device, getattr(torch, args.dtype), args.trust_remote_code)


def answered(questions: list, texts: list[str | None]) -> tuple[list, list[str]]:
    """Without the questions whose image was dropped.  Raises DataError if none is left."""
    kept = [(q, text) for q, text in zip(questions, texts, strict=True) if text is not None]
    if not kept:
        raise DataError("no question could be asked")
    return [q for q, _ in kept], [text for _, text in kept]


def with_images(items: list, images: Path, name: Callable, bad: Bad) -> list[tuple[object, Path]]:
    """(item, path of its image); items whose image is missing, or outside the folder, are bad."""
    found = []
    for item in items:
        try:
            found.append((item, image_in(images, name(item))))
        except ValueError as error:
            bad(item if isinstance(item, str) else name(item), str(error))
    return found


# ---------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------
def share(part: float, whole: float) -> float | None:
    """part / whole; None where there is nothing to have a share of."""
    return part / whole if whole else None


def cell(value: float | None, spec: str) -> str:
    """A figure as a table shows it: "-" for None, whatever its width in `spec`, as ">9.4f"."""
    return format(
        "-" if value is None else value, spec.partition(".")[0] if value is None else spec
    )


def with_dropped(figures: dict, table: Callable[[dict], str], bad: Bad) -> Result:
    """Figures, with the number of bad entries beside them where there were any."""
    text = table(figures)
    if bad.dropped:
        text += f"\n{bad.dropped} bad entries dropped"
        figures = {**figures, "dropped": bad.dropped}
    return figures, text


def write_lines(path: Path, rows: Sequence[dict]) -> None:
    """Write rows as JSON lines: the whole file or nothing."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))
