"""Measure how much a model hallucinates.

    python evaluate.py scenes --model runs/first/checkpoint      the scene world, where truth is known

Answers are greedy. Saved answers are scored without loading a model.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from data import DataError, Example
from hallucination import scenes

SETTINGS = {"confounded": 0.9, "independent": 1 / 8}  # -> chance of a background's home category
HELD_OUT_SEED = 2508_04182


def answer_all(policy, examples: Sequence[Example], what: str, batch_size: int) -> list[str]:
    """Greedy completions of many examples, in batches, with a progress bar."""
    completions = []
    with tqdm(total=len(examples), desc=what, unit="answer", leave=False) as bar:
        for start in range(0, len(examples), batch_size):
            batch = examples[start : start + batch_size]
            completions += policy.answer(batch)
            bar.update(len(batch))
    return completions


def evaluate_scenes(
    policy, count: int, what: str = "evaluation", batch_size: int = 128
) -> tuple[dict, list[str]]:
    """Figures on confounded and on independent held-out scenes, and the completions behind them."""
    figures, completions = {}, []
    for setting, confounding in SETTINGS.items():
        probes = scenes.make_probes(count, confounding, HELD_OUT_SEED)
        examples = [probe.example for probe in probes]
        answers = answer_all(policy, examples, f"{what}: {setting} scenes", batch_size)
        figures[setting] = scenes.score(probes, answers)
        completions += answers
    return figures, completions


# what the table shows: heading -> key into the figures of a setting, and whether less is better
_ROWS = {
    "accuracy": ("accuracy",),
    "POPE F1, random": ("pope", "random", "f1"),
    "POPE F1, popular": ("pope", "popular", "f1"),
    "POPE F1, adversarial": ("pope", "adversarial", "f1"),
    "POPE yes-ratio, adversarial": ("pope", "adversarial", "yes_ratio"),
    "CHAIR_S  (lower is better)": ("chair_s",),
    "CHAIR_I  (lower is better)": ("chair_i",),
    "caption recall": ("recall",),
    "caption length, words": ("length",),
    "flip rate under do(L_s)  (lower is better)": ("flip_rate",),
}


def compare_table(columns: dict[str, dict]) -> str:
    """Runs side by side: {heading: figures of evaluate_scenes} -> a table in text."""
    lines = []
    for setting in SETTINGS:
        n = next(iter(columns.values()))[setting]["n"]
        title = f"{setting} scenes (n = {n})"
        lines.append(f"{title:<44}" + "".join(f"{heading:>10}" for heading in columns))
        for heading, keys in _ROWS.items():
            values = []
            for figures in columns.values():
                value = figures[setting]
                for key in keys:
                    value = value[key]
                values.append(f"{value:>10.1f}" if keys == ("length",) else f"{value:>10.3f}")
            lines.append(f"  {heading:<42}" + "".join(values))
        lines.append("")
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help lists every flag with its default."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser(
        "scenes",
        help="the scene world: CHAIR, POPE, accuracy, flip rate",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    source = command.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", help="model folder or hub name")
    source.add_argument(
        "--answers", type=Path, help="completions saved by --save; no model is loaded"
    )
    command.add_argument("--scenes", type=int, default=300, help="held-out scenes of each setting")
    command.add_argument("--batch-size", type=int, default=128, help="answers at once")
    command.add_argument(
        "--save", type=Path, help="write the completions there, a JSON object a line"
    )
    command.add_argument("--json", type=Path, help="write the figures there")
    command.add_argument("--device", default="cpu", help="cpu, cuda, ...")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.  Returns the exit code: 0, or 2 for input that cannot be used."""
    args = parse_arguments(argv)
    try:
        if args.answers:
            figures = _score_saved(args.answers, args.scenes)
        else:
            from transformers.utils.logging import disable_progress_bar

            from model import load_policy  # torch is loaded only where a model is

            disable_progress_bar()

            policy = load_policy(args.model, args.device)
            figures, completions = evaluate_scenes(policy, args.scenes, batch_size=args.batch_size)
            if args.save:
                lines = (json.dumps({"completion": text}) + "\n" for text in completions)
                args.save.write_text("".join(lines), encoding="utf-8")
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(compare_table({"model": figures}))
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def _score_saved(path: Path, count: int) -> dict:
    completions = scenes.read_answers(path)
    figures = {}
    for setting, confounding in SETTINGS.items():
        probes = scenes.make_probes(count, confounding, HELD_OUT_SEED)
        if len(completions) < len(probes):
            raise DataError(
                f"{path}: {len(completions)} answers left for {len(probes)} questions on {setting} "
                f"scenes: give --scenes the number they were made with"
            )
        figures[setting] = scenes.score(probes, completions[: len(probes)])
        completions = completions[len(probes) :]
    return figures


if __name__ == "__main__":
    sys.exit(main())
