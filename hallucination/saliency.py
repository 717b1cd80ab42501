"""Where an answer comes from: gradient saliency over the image, and over words in the image's place.

The gradient of the answer's log-probability, its prompt and its own reasoning given, says how much each
pixel moves the answer. A model that looks at what it is asked about has its gradient there; one that
reads the answer off the background has it on the background.

    background share    gradient mass on background pixels / gradient mass
    background area     background pixels / pixels: the share of a model that looks nowhere in particular

Mass is the absolute gradient, summed over the colours. As a control the same questions are asked with a
description in the place of the image; there the mass of a word is the norm of the gradient with respect
to its embeddings, and the share is that of the words that do not bear on the question. The gradients are
taken in gradients.py.
"""

import argparse
import math
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

import numpy as np
from tqdm import tqdm

from data import DataError, Example, describe_image
from hallucination import pope
from hallucination.command import (
    Result,
    add_model,
    ask_model,
    at_least_1,
    load_model,
    new_command,
    with_dropped,
    with_images,
)
from hallucination.files import Bad
from hallucination.scenes import held_out_probes
from rewards import final_answer
from scm import CLEAR, World, in_words


@dataclass(frozen=True)
class SaliencyQuestion:
    """One question about one image, and where on it the objects are."""

    key: dict  # what identifies it
    example: Example
    objects: np.ndarray  # (h, w) bool, at the image's proportions; the rest is background


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------
def score(
    policy,
    questions: Sequence[SaliencyQuestion],
    texts: Sequence[str | None],
    think: bool,
    bad: Bad,
) -> tuple[dict, list[np.ndarray | None]]:
    """n (images), background_share with its 95 % interval, background_area; and the mass of each question.

    A share is the mean of its image's questions, and the interval is over images. An answer that is
    empty, or moved by no pixel, is bad.
    """
    from hallucination.gradients import pixel_mass  # which imports torch

    shares, areas, masses = defaultdict(list), {}, []
    pairs = zip(questions, texts, strict=True)
    for question, text in tqdm(list(pairs), desc="gradients", unit="answer", leave=False):
        masses.append(None)
        if text is None:
            continue
        background = ~question.objects
        try:
            mass = pixel_mass(policy, question.example, text, background.shape[::-1], think)
        except ValueError as error:
            bad(f"question {question.key['question_id']}", str(error))
            continue
        if not mass.sum() > 0:
            bad(f"question {question.key['question_id']}", "no pixel moves its answer")
            continue
        image = question.key.get("image", question.key["question_id"])
        shares[image].append(float(mass[background].sum() / mass.sum()))
        areas[image] = float(background.mean())
        masses[-1] = mass
    if not shares:
        raise DataError("no answer to take a gradient of")
    mean, between = normal_interval([fmean(values) for values in shares.values()])
    return {
        "n": len(shares),
        "background_share": mean,
        "background_share_interval": between,
        "background_area": fmean(areas.values()),
    }, masses


def score_words(
    policy, examples: Sequence[Example], texts: Sequence[str], think: bool, bad: Bad
) -> dict:
    """The control: share of the mass on words that do not bear on the question, with its interval.

    examples: questions about scenes, `in_words`, with the texts that answer them.  idle_words_part is the
    part of the words that do not bear on it: the share of a model that weighs all words alike.
    """
    from hallucination.gradients import word_mass

    shares, parts = [], []
    pairs = zip(examples, texts, strict=True)
    for i, (example, text) in enumerate(
        tqdm(list(pairs), desc="words", unit="answer", leave=False)
    ):
        bearing = bearing_words(example)
        try:
            words = word_mass(policy, example, text, think)
        except ValueError as error:
            bad(f"question {i} in words", str(error))
            continue
        shares.append(sum(mass for word, mass in words if word not in bearing))
        shares[-1] /= sum(mass for _, mass in words)
        parts.append(sum(word not in bearing for word, _ in words) / len(words))
    if not shares:
        raise DataError("no answer in words to take a gradient of")
    mean, between = normal_interval(shares)
    return {
        "idle_words_share": mean,
        "idle_words_share_interval": between,
        "idle_words_part": fmean(parts),
    }


def bearing_words(example: Example) -> set[str]:
    """The words of a scene's description that its question asks about: its topic's, or all things'."""
    things = example.scene.things
    if example.kind in ("yesno", "choice"):
        things = [thing for thing in things if thing.category == example.topic]
    categories = {thing.category for thing in things}
    return categories | ({thing.color for thing in things} if example.kind != "yesno" else set())


def normal_interval(values: Sequence[float]) -> tuple[float, list[float] | None]:
    """Mean and its 95 % interval, 1.96 standard errors to either side; None for a single value."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, None
    half = 1.96 * stdev(values) / math.sqrt(len(values))
    return mean, [mean - half, mean + half]


def table(figures: dict[str, dict]) -> str:
    """The figures as text, one line per model."""
    lines = [f"{'':<40}{'images':>7}{'background share':>26}{'area':>8}"]
    for model, of_model in figures.items():
        share = _with_interval(of_model, "background_share")
        lines.append(f"{model:<40}{of_model['n']:>7}{share:>26}{of_model['background_area']:>8.3f}")
    if any("idle_words_share" in of_model for of_model in figures.values()):
        lines.append(f"{'':<47}{'words that do not bear':>26}{'part':>8}")
        for model, of_model in figures.items():
            share = _with_interval(of_model, "idle_words_share")
            lines.append(f"{model:<47}{share:>26}{of_model['idle_words_part']:>8.3f}")
    return "\n".join(lines)


def _with_interval(figures: dict, key: str) -> str:
    between = figures[f"{key}_interval"]
    return f"{figures[key]:.3f}" + (f" [{between[0]:.3f}, {between[1]:.3f}]" if between else "")


# ---------------------------------------------------------------------------------------------
# On scenes and on COCO
# ---------------------------------------------------------------------------------------------
def saliency_sheet(
    policy,
    what: str,
    world: World = CLEAR,
    setting: str = "confounded",
    count: int = 30,
    shown: int = 6,
) -> dict:
    """A model's saliency on held-out scenes for a run's page: its figures, and `shown` answers in full.

    rows: question, image (the scene's latent factors), answer, share on the background, and mass, (h, w)
    numbers from 0 to 255.  Nothing at all where there is no saliency to be had.
    """
    from hallucination.answers import Decoding, answer_all

    asked = _on_scenes(count, setting, world)
    rows = [(question.key, question.example) for question in asked]
    texts = answer_all(lambda: policy, rows, Decoding(what), None, 128, what=f"{what}: saliency")
    texts = [text if final_answer(text).strip() else None for text in texts]
    try:
        figures, masses = score(policy, asked, texts, True, Bad(skip=True))
    except DataError as error:
        print(f"{what}: no saliency: {error}", file=sys.stderr)
        return {}
    by_scene = defaultdict(list)
    for question, text, mass in zip(asked, texts, masses, strict=True):
        if mass is not None:
            by_scene[question.key["image"]].append((question, text, mass))
    chosen = [of[n % len(of)] for n, of in enumerate(by_scene.values())][:shown]
    figures["rows"] = [
        {
            "question": question.example.question,
            "image": describe_image(question.example),
            "answer": final_answer(text),
            "share": float(mass[~question.objects].sum() / mass.sum()),
            "mass": (mass * (255 / mass.max())).round().astype(int).tolist(),
        }
        for question, text, mass in chosen
    ]
    return figures


def words_sheet(policy, setting: str = "confounded", count: int = 20) -> dict:
    """A model's saliency over the words of scenes' descriptions: `score_words`."""
    from hallucination.answers import Decoding, answer_all

    asked = _on_scenes(count, setting)
    described = [in_words(question.example) for question in asked]
    rows = [(q.key, example) for q, example in zip(asked, described, strict=True)]
    texts = answer_all(lambda: policy, rows, Decoding("words"), None, 128, what="words")
    return score_words(policy, described, texts, True, Bad(skip=True))


def _on_scenes(count: int, setting: str = "confounded", world: World = CLEAR) -> list:
    """Questions about what is there on held-out scenes of a setting."""
    asked, numbers = [], {}
    for probe in held_out_probes(setting, count, world):
        example = probe.example
        if not probe.redrawn and example.answer != "no":
            image = f"scene {numbers.setdefault(example.scene, len(numbers))}"
            key = {"question_id": len(asked), "image": image}
            asked.append(SaliencyQuestion(key, example, example.scene.mask()))
    return asked


def _on_coco(args: argparse.Namespace, bad: Bad) -> list:
    """Questions of a POPE file about COCO's images; the objects are all that are annotated."""
    from hallucination.coco import image_id_of, object_mask, read_instances

    instances = read_instances(args.coco, bad)
    questions = pope.read_questions([args.questions], bad)[: args.limit]
    asked = []
    for q, path in with_images(questions, args.images, lambda question: question.image, bad):
        image = image_id_of(q.image)
        if image not in instances.images:
            bad(q.image, f"is not among the images of {args.coco}")
            continue
        _, w, h = instances.images[image]
        size = (round(w * min(1, 384 / w)), max(1, round(h * min(1, 384 / w))))
        objects = object_mask(instances.objects[image], w, h, size)
        key = {"question_id": q.id, "image": q.image}
        asked.append(SaliencyQuestion(key, Example(path, q.text, q.label, "yesno"), objects))
    return asked


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------
def add_command(commands) -> None:
    """Add `evaluate.py saliency`."""
    command = new_command(
        commands, "saliency", run, "share of the answers' gradient on the background", check
    )
    command.add_argument(
        "--compare", nargs="+", default=[], metavar="MODEL", help="further models, side by side"
    )
    command.add_argument(
        "--scenes", type=at_least_1, default=50, help="held-out scenes, unless --questions is given"
    )
    command.add_argument("--questions", type=Path, help="a POPE file, with --images and --coco")
    command.add_argument("--images", type=Path, help="folder of its images")
    command.add_argument("--coco", type=Path, help="instances_*.json that outlines their objects")
    command.add_argument(
        "--words",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="ask again with a description in the place of the scene: saliency over words",
    )
    command.add_argument("--figure", type=Path, help="draw overlays of the first images there")
    add_model(command, max_new_tokens=64)


def check(args: argparse.Namespace) -> str | None:
    """Why the flags do not fit together, or None."""
    if not args.model:
        return "--model is needed"
    if args.save and (args.compare or args.words):
        return "--save names one file of answers; there are several here"
    if len({args.questions is None, args.images is None, args.coco is None}) > 1:
        return "--questions, --images and --coco go together"
    if args.words and args.questions:
        return "--words describes scenes; it does not go with --questions"
    return None


def run(args: argparse.Namespace) -> Result:
    """Share of the gradient of the answers that lies on the background, for one model or several."""
    bad, figures, masses = Bad(args.skip_bad), {}, {}
    asked = _on_coco(args, bad) if args.questions else _on_scenes(args.scenes)[: args.limit]
    described = [in_words(q.example) for q in asked] if args.words else []
    for model in (args.model, *args.compare):
        policy = load_model(model, args)
        policy.model.requires_grad_(False)  # the pixels' gradient is all that is wanted

        def answers(examples, model=model, policy=policy):
            rows = [(q.key, example) for q, example in zip(asked, examples, strict=True)]
            return ask_model(args, rows, bad, model, policy)

        texts = answers([q.example for q in asked])
        figures[model], masses[model] = score(policy, asked, texts, args.think, bad)
        if described:
            texts = answers(described)
            figures[model] |= score_words(policy, described, texts, args.think, bad)
    if args.figure:
        from hallucination.overlays import draw_overlays

        draw_overlays(asked, masses, args.figure)
    text = table(figures)
    return with_dropped(figures if args.compare else figures[args.model], lambda _: text, bad)
