"""Examples, and where they come from: one prompt with its verifiable answer.

    {"image": "a.jpg", "question": "Is there a dog?", "answer": "no"}

`read_examples` reads such lines from a user's file, checks every line and every image, and makes each an
`Example`; scm.py makes them of its scenes. `collate` turns B examples into a model's inputs.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from PIL import Image, ImageOps

if TYPE_CHECKING:
    from torch import Tensor


class DataError(ValueError):
    """Input that cannot be used: one line or more, each saying what, where and why."""


@dataclass(frozen=True)
class Example:
    """One prompt with its verifiable answer; `rewards.outcome_reward` reads kind, answer and objects.

    image: a PIL image, or the path of one (opened when it is needed), or None for a question on text alone.
    kind: "yesno", "number", "choice", "text" (compared with `answer`) or "caption" (F1 of `objects`).
    objects: what a caption should name; vocabulary: all it could name (other words are not objects).
    scene, topic: the latent causes (a scm.Scene) and the category asked about, where they are known.
    """

    image: Image.Image | Path | None
    question: str
    answer: str
    kind: str = "text"
    objects: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()
    scene: Any = None
    topic: str = ""

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
FILE_KINDS = ("yesno", "number", "choice", "text", "caption")


def read_examples(path: Path, images: Path | None, skip_bad: bool = False) -> list[Example]:
    """Read `{"image": "a.jpg", "question": "...", "answer": "..."}` lines; a POPE file is one, too.

    Optional: "kind", one of FILE_KINDS (without it: "yesno" for a yes or no, "number" for a number,
    else "text"), and "objects", the words a caption should name; a caption can name any word that
    is an object anywhere in the file.  images: the folder that image names are relative to.
    Every line and every image is checked here, before anything is trained.  Raises DataError with a
    line for each bad one; with skip_bad they are reported on stderr, counted and dropped.
    """
    images = path.parent if images is None else images
    examples, problems = [], []
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            examples.append(_parse_line(line, images))
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems and not skip_bad:
        raise DataError("\n".join(problems))
    for problem in problems:
        print(f"skipped: {problem}", file=sys.stderr)
    if problems:
        print(
            f"skipped {len(problems)} of {len(problems) + len(examples)} examples", file=sys.stderr
        )
    if not examples:
        raise DataError(f"{path}: no usable example in it")
    vocabulary = tuple(sorted({word for example in examples for word in example.objects}))
    return [dataclasses.replace(example, vocabulary=vocabulary) for example in examples]


def _parse_line(line: str, images: Path) -> Example:
    """One line of a data file; a ValueError says what is wrong with it."""
    try:
        row = json.loads(line)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}") from None
    if not isinstance(row, dict):
        raise ValueError('not an object like {"image": ..., "question": ..., "answer": ...}')
    if {"question_id", "text", "label"} <= set(row):  # a question of POPE
        row = {"image": row.get("image"), "question": row["text"], "answer": row["label"]}
    unknown = set(row) - {"image", "question", "answer", "kind", "objects"}
    if unknown:
        raise ValueError(f"unknown key {sorted(unknown)[0]!r}")
    for key in ("image", "question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{key!r} must be a text that is not empty")
    objects = row.get("objects", [])
    if not isinstance(objects, list) or not all(isinstance(word, str) for word in objects):
        raise ValueError("'objects' must be a list of words")
    kind = row.get("kind") or _guess_kind(row["answer"])
    if kind not in FILE_KINDS:
        raise ValueError(f"'kind' is {kind!r}, must be one of {', '.join(FILE_KINDS)}")
    if kind == "caption" and not objects:
        raise ValueError("a caption needs 'objects', the words that it should name")
    image = image_in(images, row["image"])
    read_image(image)
    objects = tuple(word.lower() for word in objects)
    return Example(image, row["question"].strip(), row["answer"].strip(), kind, objects)


def _guess_kind(answer: str) -> str:
    word = answer.strip().lower().rstrip(".")
    if word in ("yes", "no"):
        return "yesno"
    return "number" if word.isdigit() else "text"


def image_in(folder: Path, name: str) -> Path:
    """The image of this name in a folder.  Raises ValueError where it is not there, or not inside."""
    image = (folder / name).resolve()
    if not image.is_relative_to(folder.resolve()):
        raise ValueError(f"image {name!r} lies outside {folder}")
    if not image.is_file():
        raise ValueError(f"image {image} does not exist")
    return image


def read_image(path: Path) -> Image.Image:
    """Any picture Pillow reads, as upright RGB: EXIF rotation applied, transparency laid on white."""
    try:
        with warnings.catch_warnings(), Image.open(path) as image:
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(image)
            if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            elif image.mode.startswith("I"):  # 16-bit grey: convert() would clip it, not scale it
                image = image.point(lambda value: value / 256).convert("L")
            return image.convert("RGB")
    except FileNotFoundError:
        raise ValueError(f"image {path} does not exist") from None
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = Image.MAX_IMAGE_PIXELS
        raise ValueError(f"image {path} has more than {most:,} pixels: refused") from None
    except Exception as error:  # Pillow's readers raise whatever a broken file makes them trip over
        raise ValueError(f"image {path} cannot be read: {error}") from None


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
    knows no system message gets the instruction before the question, and a processor without a template
    both as plain text.
    """
    question = {"type": "text", "text": example.question}
    both = {
        "type": "text",
        "text": f"{INSTRUCTION}\n{example.question}" if think else example.question,
    }
    image = [{"type": "image"}] if example.image is not None else []
    if not processor.chat_template:
        places_itself = hasattr(processor, "qformer_tokenizer") or not image
        return ("" if places_itself else processor.image_token) + both["text"]
    user = {"role": "user", "content": [*image, question]}
    system = {"role": "system", "content": [{"type": "text", "text": INSTRUCTION}]}
    messages = [system, user] if think else [user]
    try:
        return processor.apply_chat_template(messages, add_generation_prompt=True)
    except TemplateError:
        messages = [{"role": "user", "content": [*image, both]}]
        return processor.apply_chat_template(messages, add_generation_prompt=True)


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
