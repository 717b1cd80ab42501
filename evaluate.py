"""Measure how much a model hallucinates, on the official files of the benchmarks.

    python evaluate.py scenes   --model runs/first/checkpoint         the scene world, truth is known
    python evaluate.py pope     --questions coco_pope_*.json --images val2014/ --model DIR
    python evaluate.py chair    --coco COCO/ --images val2014/ --model DIR
    python evaluate.py mme      --root MME_Benchmark_release_version/ --model DIR
    python evaluate.py judge    export | run | import                 two models compared by a third
    python evaluate.py saliency --model DIR --compare DIR2            where an answer comes from

Answers saved by any tool are scored without loading a model (--answers, --captions, result files).
Answers of a model are saved as they come, and resumed. They are greedy unless --temperature or
--decoding (greedy, sample, beam, vcd, dola, deco, opera: see baselines/README.md) say otherwise.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence

os.environ.setdefault("GOMP_SPINCOUNT", "3000")  # before torch: see train.py

from data import explain
from hallucination import chair, judge, mme, pope, saliency, scenes
from hallucination.files import write_whole

SCORERS = (scenes, pope, chair, mme, judge, saliency)  # in the order of --help


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; --help lists every flag with its default.

    Each scorer's `add_command` declares its flags, its `run`, and its `check` of flags that do not fit
    together. Ends the program with code 2 and the usage where they do not.
    """
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0],
        epilog="\n".join(__doc__.split("\n")[1:]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for scorer in SCORERS:
        scorer.add_command(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show where an error came from")
    args = parser.parse_args(argv)
    if reason := args.check(args):
        parser.error(f"{args.command}: {reason}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand.  Returns the exit code: 0, 2 for input that cannot be used, 130 after Ctrl-C."""
    args = parse_arguments(argv)
    try:
        figures, text = args.run(args)
        if args.json:
            write_whole(args.json, json.dumps(figures, indent=2) + "\n")
    except KeyboardInterrupt:
        print("stopped; with --save the same command goes on from what was saved", file=sys.stderr)
        return 130
    except Exception as error:
        print(explain(error, args.debug), file=sys.stderr)
        return 2
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
