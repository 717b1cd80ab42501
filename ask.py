"""Ask a model one question about one image, and see which tokens its answer hangs on.

    python ask.py --model runs/first/checkpoint --scene 3 "Is there a boat?"     no photo needed
    python ask.py --model DIR --image a.jpg "Is there a dog?" --answer no
    python ask.py --model DIR --image a.jpg "Describe the image." --objects dog,ball --absent cat

One completion is drawn and scored as in training: equations 2, 3 and 4, by the functions of train.py.
Flags that train.py has, too, have its defaults.
"""

import argparse
import dataclasses
import html
import os
import random
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers.utils.logging import disable_progress_bar

from data import DataError, Example, collate, explain, read_image
from hallucination.files import write_whole
from model import Policy, check_example
from page.terminal import by_word, printed
from report import credit_card, key, page_of
from rewards import KINDS, extract_answer, guess_kind, normalize, truth_problem
from rollouts import rollout
from runs import Limits, Parser, Settings, add_flag, check, default_dtype, sample_rows
from scm import CATEGORIES, question_about, sample_scene
from train import generator_for, load_from, score

FLAGS = (  # of the trainer
    "seed", "temperature", "num_continuations", "pairing", "lambda_s", "lambda_n", "device", "dtype",
    "trust_remote_code", "debug",
)  # fmt: skip
REWARD = {  # what the scores are about: by what is known of the truth
    "truth": "Reward: 1 if an answer is right, else 0. A token scores where it makes the right answer "
    "likelier (sufficiency), or where the answer is wrong without it (necessity).",
    "caption": "Reward: F1 of the things that a caption names against those that are there, as in "
    "training. A token scores where captions that keep it are better than those from just before it "
    "(sufficiency), or where the caption gets worse without it (necessity). Words that are in neither "
    "list of names count for nothing.",
    "agreement": "Reward: 1 if an answer is the one that the model gave here, else 0; nobody told whether "
    "that one is right. So the scores say what made the model answer so, not what made it right: the "
    "tokens of a wrong answer score as high. --answer, or --objects for a caption, gives the truth.",
}


@torch.no_grad()
def ask(policy: Policy, example: Example, settings: Settings) -> dict:
    """One completion of a question with its scores: a row of samples.jsonl, as train.py would write it.

    An example without an answer is paid for agreement with the completion's own one.
    """
    prefix = policy.prefill(collate([example], policy.processor))

    def complete(example: Example):
        generator = generator_for(settings.seed, 0, "rollout")
        length, temperature = settings.max_completion_length, settings.temperature
        return rollout(policy, prefix, [example], 1, length, generator, temperature)

    if not example.answer:  # the same numbers are drawn twice: it is one completion
        own = extract_answer(complete(example).texts[0]) or ""
        example = dataclasses.replace(example, answer=own, kind=guess_kind(own))
    rollouts = complete(example)
    generator = generator_for(settings.seed, 0, "score")
    scores = score(policy, prefix, rollouts, settings, generator, Limits(settings))
    (row,) = sample_rows(policy, rollouts, scores, 0)
    return row


def example_of(args: argparse.Namespace) -> Example:
    """What is asked, with its truth as far as it is known.  Raises DataError for what cannot be."""
    if not args.question.strip():
        raise DataError('the question is empty: python ask.py ... "Is there a dog?"')
    if (args.image is None) == (args.scene is None):
        raise DataError("give one of --image FILE and --scene N")
    if (args.absent and not args.objects) or (args.kind and args.answer is None):
        raise DataError("--absent goes with --objects, and --kind with --answer")
    if args.scene is None:
        try:
            read_image(args.image)
        except ValueError as error:
            raise DataError(str(error)) from None
        example = Example(args.image, args.question, "")
    else:
        example = about_scene(args.scene, args.question)
    there, absent = names_in(args.objects), names_in(args.absent)
    if there:
        vocabulary = tuple(sorted({*there, *absent}))
        truth = {"answer": ", ".join(there), "kind": "caption", "objects": there}
        example = dataclasses.replace(example, vocabulary=vocabulary, **truth)
    elif args.answer is not None:
        answer = args.answer.strip()
        kind = args.kind or guess_kind(answer)
        example = dataclasses.replace(example, answer=answer, kind=kind)
    if example.answer and (problem := truth_problem(example.kind, example.answer, example.objects)):
        raise DataError(problem)
    if args.answer is not None and not example.answer:
        raise DataError("--answer is empty")
    return example


def names_in(text: str) -> tuple[str, ...]:
    """The names of a list with commas."""
    return tuple(name.strip() for name in text.lower().split(",") if name.strip())


def about_scene(number: int, question: str) -> Example:
    """A question about scene `number`, whose things and background are independent, with its truth.

    A question that the scene world does not know is one without a truth.
    """
    scene = sample_scene(random.Random(f"scene {number}"), confounding=1 / len(CATEGORIES))
    for kind in ("caption", "number", "yesno", "choice"):
        for topic in CATEGORIES:
            example = question_about(scene, kind, topic)
            if normalize(example.question) == normalize(question):
                return example
    return Example(scene.render(), question, "", scene=scene)


def show(row: dict, example: Example, args: argparse.Namespace) -> None:
    """Print a row, and write its page."""
    known = "agreement" if not example.answer else example.kind
    meaning = REWARD.get(known, REWARD["truth"])
    facts = {"objects": example.objects, "vocabulary": example.vocabulary}
    row = row | facts | {"agreement": known == "agreement", "step": 0}
    row = by_word(row) if args.words else row
    if not row["answer"]:
        meaning += " Here it gave none in its tags: nothing can agree, and every score is 0."
    color = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    print(f"{row['prompt']}\n\n{printed(row, color)}\n")
    truth = "the model's own" if row["agreement"] else "the right one"
    print(f"{truth}: {row['answer'] or 'none'}; reward {row['reward']:.2f}\n{meaning}")
    body = f"<p>{html.escape(f'{args.model}. {meaning}')}</p>{key()}{credit_card(row)}"
    write_whole(args.html, page_of(row["prompt"], body))
    print(args.html)


def parser_of_ask() -> argparse.ArgumentParser:
    """The command line; what the trainer has, too, is called and defaults as there."""
    parser = Parser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="\n\n".join(textwrap.fill(text, 98) for text in REWARD.values()),
    )
    parser.add_argument("question", nargs="?", default="", help='such as "Is there a dog?"')
    parser.add_argument("--model", required=True, help="model folder or hub name")
    parser.add_argument("--image", type=Path, help="a picture")
    parser.add_argument("--scene", type=int, help="or a scene of the scene world, by its number")
    parser.add_argument("--answer", help="the right answer; without it, agreement is paid")
    parser.add_argument("--kind", choices=KINDS, help="of --answer, if it does not tell")
    parser.add_argument("--objects", default="", help="of a caption: what is there, as dog,ball")
    parser.add_argument("--absent", default="", help="and names that are false where it has them")
    parser.add_argument("--words", action="store_true", help="add scores up by word")
    parser.add_argument("--html", type=Path, default=Path("runs/ask.html"), help="page to write")
    add_flag(parser, "max_completion_length", "--max-new-tokens")
    for name in FLAGS:
        add_flag(parser, name)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Ask, print, write the page.  Returns the exit code: 0, or 2 for what cannot be used."""
    args = parser_of_ask().parse_args(argv)
    disable_progress_bar()
    try:
        names = ("model", "max_completion_length", *FLAGS)
        settings = Settings(**{name: getattr(args, name) for name in names})
        check(settings)
        settings = dataclasses.replace(settings, dtype=settings.dtype or default_dtype(settings))
        example = example_of(args)
        if not Path(args.model).exists() and (args.model[:1] in "./~" or args.model.count("/") > 1):
            raise DataError(f"model {args.model}: there is no such folder")
        policy = load_from(args.model, settings)
        longest = settings.max_completion_length
        check_example(example, policy.model.config, policy.processor, longest)
        show(ask(policy, example, settings), example, args)
    except Exception as error:
        print(explain(error, args.debug), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
