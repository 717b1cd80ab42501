"""Examples, and where they come from: one prompt with its verifiable answer.

    {"image": "a.jpg", "question": "Is there a dog?", "answer": "no"}

`read_examples` reads such lines from a user's file, checks every line and every image, and makes each an
`Example`; scm.py makes them of its scenes. `collate` turns B examples into a model's inputs.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError
from PIL import Image, ImageOps

from hallucination.files import DataError, read_rows
from rewards import KINDS, extract_answer, guess_kind, truth_problem

if TYPE_CHECKING:
    from torch import Tensor


def explain(error: Exception, debug: bool = False) -> str:
    """The lines that end a program: ours as they are, anybody else's errors with their kind.

    debug: with the traceback before them.
    """
    told = str(error).strip()
    if not isinstance(error, DataError | FloatingPointError | OSError):
        first = told.splitlines()[0] if told else "no reason given"
        told = f"{type(error).__name__}: {first} (--debug shows where)"
    lines = [f"error: {line}" for line in told.splitlines()]
    trace = traceback.format_exception(error) if debug else []
    return "".join(trace) + "\n".join(lines)


@dataclass(frozen=True)
class Example:
    """One prompt with its verifiable answer; `rewards.outcome_reward` reads kind, answer and objects.

    image: a PIL image, or the path of one (opened when it is needed), or None for a question on text alone.
    kind: "yesno", "number", "choice", "text" (compared with `answer`) or "caption" (F1 of `objects`).
    objects: what a caption should name; vocabulary: all it could name (other words are not objects).
    scene, topic: the latent causes (a scm.Scene) and the category asked about, where they are known.
    source: "file:line" that it was read from, for messages.
    """

    image: Image.Image | Path | None
    question: str
    answer: str
    kind: str = "text"
    objects: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    scene: Any = None
    topic: str = ""
    source: str = ""

    def open_image(self) -> Image.Image:
        """The picture as upright RGB.  Raises DataError for a file that is gone or broken."""
        if not isinstance(self.image, Path):
            return self.image
        try:
            return read_image(self.image)
        except ValueError as error:
            raise DataError(str(error)) from None


# ---------------------------------------------------------------------------------------------
# Users' own examples: JSON lines and image files
# ---------------------------------------------------------------------------------------------
KEYS = {"image", "question", "answer", "kind", "objects", "id", "question_id"}
MOST_LINES = 20  # of bad lines that a message names


def read_examples(path: Path, images: Path | None, skip_bad: bool = False) -> list[Example]:
    """Read `{"image": "a.jpg", "question": "...", "answer": "..."}` lines, or a JSON array of them.

    Optional: "kind", one of `rewards.KINDS` (without it `rewards.guess_kind` tells), and "objects", what a
    caption should name; a caption can name whatever is an object anywhere in the file.  A question of POPE
    (text, label) and a conversation of LLaVA's with one question and one answer are read, too.
    images: the folder that image names are relative to.

    Every line and every image is checked here, before anything is trained.  Raises DataError with a
    line for each bad one; with skip_bad they are reported on stderr, counted and dropped.
    """
    images = path.parent if images is None else images
    examples, problems = [], []
    try:
        for where, row in read_rows(path, lambda *bad: problems.append("{}: {}".format(*bad))):
            try:
                examples.append(dataclasses.replace(_example_of(row, images), source=where))
            except ValueError as error:
                problems.append(f"{where}: {error}")
    except DataError:  # where not one row could be read, what is wrong with each says more
        if not problems:
            raise
    report_bad(problems, len(problems) + len(examples), skip_bad)
    if not examples:
        raise DataError(f"{path}: no usable example in it")
    vocabulary = tuple(sorted({word for example in examples for word in example.objects}))
    return [dataclasses.replace(example, vocabulary=vocabulary) for example in examples]


def report_bad(problems: Sequence[str], total: int, skip_bad: bool) -> None:
    """Raise DataError for bad examples among `total`; with skip_bad, say on stderr that they are dropped."""
    if not problems:
        return
    lines = list(problems[:MOST_LINES])
    if len(problems) > MOST_LINES:
        lines[-1] = f"and {len(problems) - MOST_LINES + 1} more of {total} examples"
    if not skip_bad:
        raise DataError("\n".join(lines))
    for line in lines:
        print(f"skipped: {line}", file=sys.stderr)
    print(f"skipped {len(problems)} of {total} examples", file=sys.stderr)


def _example_of(row: dict, images: Path) -> Example:
    """The example of one row of a data file; a ValueError says what is wrong with it."""
    if {"question_id", "text", "label"} <= set(row):  # a question of POPE
        row = {"image": row.get("image"), "question": row["text"], "answer": row["label"]}
    if "conversations" in row:
        row = row | _turns_of(row["conversations"])
        del row["conversations"]
    if unknown := sorted(set(row) - KEYS):
        raise ValueError(
            f"unknown key {short(unknown[0])}, must be among {', '.join(sorted(KEYS))}"
        )
    if isinstance(row.get("image"), list):
        if len(row["image"]) != 1:
            raise ValueError(f"{len(row['image'])} images: a question must have one")
        row = row | {"image": row["image"][0]}
    if type(row.get("answer")) in (int, float):
        row = row | {"answer": str(row["answer"])}
    for key in ("image", "question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            what = "is missing" if row.get(key) is None else f"is {short(row[key])}"
            raise ValueError(f"{key!r} {what}, must be one text that is not empty")
        if not is_unicode(row[key]):
            raise ValueError(f"{key!r} holds half a character (a lone surrogate): {row[key]!a}")
    objects = row.get("objects", [])
    if not isinstance(objects, list) or not all(isinstance(word, str) for word in objects):
        raise ValueError("'objects' must be a list of words")
    tagged = extract_answer(row["answer"])  # the truth still in its tags, as some data sets have it
    answer = row["answer"].strip() if tagged is None else tagged
    kind = row.get("kind") or guess_kind(answer)
    if kind not in KINDS:
        raise ValueError(f"'kind' is {kind!r}, must be one of {', '.join(KINDS)}")
    objects = tuple(word.strip().lower() for word in objects)
    if reason := truth_problem(kind, answer, objects):
        raise ValueError(reason)
    image = image_in(images, row["image"])
    read_image(image)
    # LLaVA's files mark where the image stands; here the model's own template places it.
    question = row["question"].replace("<image>", "", 1).strip()
    if not question:
        raise ValueError("'question' is empty")
    return Example(image, question, answer, kind, objects)


def _turns_of(turns: object) -> dict[str, object]:
    """Question and answer of LLaVA's form: [{"from": "human", "value": ...}, {"from": "gpt", ...}]."""
    if not isinstance(turns, list) or not all(isinstance(turn, dict) for turn in turns):
        raise ValueError("'conversations' must be a list of turns")
    if [turn.get("from") for turn in turns] != ["human", "gpt"]:
        raise ValueError(
            f"'conversations' has {len(turns)} turns, must be one question and one answer"
        )
    return {"question": turns[0].get("value"), "answer": turns[1].get("value")}


def short(value: object, most: int = 60) -> str:
    """A value as a message shows it, on one line."""
    text = repr(value)
    return text if len(text) <= most else text[: most - 3] + "..."


def is_unicode(text: str) -> bool:
    """Whether a text can be encoded: half a surrogate pair, which JSON can spell, cannot."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def image_in(folder: Path, name: str) -> Path:
    """The image of this name in a folder.  Raises ValueError where it is not there, or not inside."""
    # The name must stay inside; where a link inside leads to is the user's own affair: the pictures of
    # hub snapshots are links.
    image = Path(os.path.normpath(folder.absolute() / name))
    if not image.is_relative_to(os.path.normpath(folder.absolute())):
        raise ValueError(f"image {short(name)} lies outside {folder}")
    try:
        if image.is_file():
            return image
    except (OSError, ValueError) as error:  # a name longer than a name can be
        raise ValueError(f"image {short(name)}: {error.args[-1]}") from None
    raise ValueError(f"image {short(str(image), 200)} does not exist")


def read_image(path: Path) -> Image.Image:
    """Any picture Pillow reads, as upright RGB: EXIF rotation applied, transparency laid on white."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode[0] in "IF":
                    image = eight_bits(image)
                if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                    image = image.convert("RGBA")
                    image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
                return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = Image.MAX_IMAGE_PIXELS
        raise ValueError(f"image {path} has more than {most:,} pixels: refused") from None
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them trip over
        raise ValueError(f"image {path} cannot be read: {error}") from None


def eight_bits(image: Image.Image) -> Image.Image:
    """A grey picture of 16 or 32 bits or of floats as "LA": Pillow's own convert() clips, not scales.

    White is 65,535, or 255 where no value is above that, or 1 for floats where none is above that.
    Raises ValueError where no white is known: for values below 0, above 65,535, or not finite.
    """
    values = np.asarray(image).astype(np.float64)
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 65535):
        raise ValueError("its grey values are not between 0 and 65,535")
    white = 65535 if image.mode.startswith("I;16") or values.max() > 255 else 255
    if image.mode == "F" and values.max() <= 1:
        white = 1
    clear = image.info.get("transparency")
    alpha = np.full_like(values, 255) if clear is None else np.where(values == clear, 0, 255)
    grey = np.stack([values * 255 / white, alpha], -1).round().astype(np.uint8)
    return Image.fromarray(grey, "LA")


def describe_image(example: Example) -> dict | str:
    """What is needed to see the image again: a scene's latent factors, or a file's path."""
    return dataclasses.asdict(example.scene) if example.scene else str(example.image)


# ---------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------
INSTRUCTION = (
    "Think about what the image shows inside <think> </think>, "
    "then give the final answer inside <answer> </answer>."
)


def prompt_text(example: Example, processor, think: bool = True) -> str:
    """The prompt of one example in the model's own form, the image as its placeholder.

    think: ask for reasoning and answer in tags, as in training; else the bare question.  A template that
    knows no system message gets the instruction before the question, one that wants text both as text,
    and so does a processor without a template.  Raises DataError for a template that takes none of them.
    """
    both = f"{INSTRUCTION}\n{example.question}" if think else example.question
    with_image = example.image is not None
    # A Q-Former's processor places the image itself.
    placed = with_image and not hasattr(processor, "qformer_tokenizer")
    plain = (str(processor.image_token) if placed else "") + both
    if not processor.chat_template:
        return plain

    def message(role: str, text: str, image: bool = False) -> dict:
        content = [{"type": "image"}] if image else []
        return {"role": role, "content": [*content, {"type": "text", "text": text}]}

    user = message("user", example.question, with_image)
    forms = (
        [message("system", INSTRUCTION), user] if think else [user],
        [message("user", both, with_image)],
        [{"role": "user", "content": plain}],
    )
    for messages in forms:
        try:
            return processor.apply_chat_template(messages, add_generation_prompt=True)
        except (TemplateError, TypeError) as error:
            reason = error
    raise DataError(f"the model's chat template cannot be used: {reason}")


def opening(example: Example, processor, think: bool = True) -> str:
    """ "<think>" where the prompt has opened the reasoning, so that a completion begins inside it."""
    prompt = prompt_text(example, processor, think)
    return "<think>" if prompt.rfind("<think>") > prompt.rfind("</think>") else ""


def with_opening(opening: str, completion: str) -> str:
    """A completion with the tag that its prompt has opened, unless it opens one again."""
    return completion if completion.lstrip().startswith("<think>") else opening + completion


def collate(examples: Sequence[Example], processor, think: bool = True) -> dict[str, Tensor]:
    """Images and prompts of B examples as the model's inputs, padded on the left, never truncated.

    All of them have an image, or none has.
    """
    images = [[example.open_image()] for example in examples if example.image is not None]
    # What a template has written already is not added again.
    special = {"add_special_tokens": False} if processor.chat_template else {}
    inputs = processor(
        text=[prompt_text(example, processor, think) for example in examples],
        images=images or None,
        padding=True,
        return_tensors="pt",
        **special,
    )
    # InstructBLIP puts the image before the padding; where the prompt moves with it, none is counted.
    order = inputs["attention_mask"].argsort(dim=1, stable=True)
    moved = {key: inputs[key].gather(1, order) for key in ("input_ids", "attention_mask")}
    return {name: moved.get(name, value) for name, value in inputs.items() if name != "labels"}
