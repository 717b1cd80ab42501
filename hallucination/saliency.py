"""Where an answer comes from: gradient saliency over the image, and over words in the image's place.

The gradient of the answer's log-probability, its prompt and its own reasoning given, says how much each
pixel moves the answer. A model that looks at what it is asked about has its gradient there; one that
reads the answer off the background has it on the background.

    background share    gradient mass on background pixels / gradient mass
    background area     background pixels / pixels: the share of a model that looks nowhere in particular

Mass is the absolute gradient, summed over the colours. As a control the same questions are asked with a
description in the place of the image; there the mass of a word is the norm of the gradient with respect
to its embeddings, and the share is that of the words that do not bear on the question.

Processors cut and lay out pixels each in its own way; `tiles` puts them back where they came from.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import DataError, Example, collate, prompt_text, put_in_words
from hallucination.files import Bad
from model import Policy
from rewards import answer_span

Box = tuple[
    float, float, float, float
]  # left, top, right, bottom, in units of the image's width, height


@dataclass(frozen=True)
class Question:
    """One question about one image, and where on it the objects are."""

    key: dict  # what identifies it
    example: Example
    objects: np.ndarray  # (h, w) bool, at the image's proportions; the rest is background


# ---------------------------------------------------------------------------------------------
# The gradient
# ---------------------------------------------------------------------------------------------
def pixel_mass(
    policy: Policy, example: Example, completion: str, size: tuple[int, int], think: bool = True
) -> np.ndarray:
    """|d log p(answer) / d pixel| at each place of the image, (h, w) for `size` = (w, h).

    The answer is what stands in the last answer tags of the completion, or all of it where it has none;
    what precedes it is given. The completion is tokenised from its text.
    """
    image = example.open_image()
    inputs = collate([replace(example, image=image)], policy.processor, think)
    pixels = inputs["pixel_values"] = inputs["pixel_values"].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(_answer_logp(policy, inputs, completion), pixels)
    return paint(tiles(policy, inputs, gradient, image.size), size)


def _answer_logp(policy: Policy, inputs: dict[str, Tensor], completion: str) -> Tensor:
    """log p(answer | prompt, what precedes it in the completion)."""
    spelt = policy.tokenizer(
        completion, add_special_tokens=False, return_offsets_mapping=True, return_tensors="pt"
    )
    start, end = answer_span(completion) or (0, len(completion))
    span = completion[start:end]
    start += len(span) - len(span.lstrip())
    end -= len(span) - len(span.rstrip())
    offsets = spelt["offset_mapping"][0]
    inside = ((offsets[:, 1] > start) & (offsets[:, 0] < end)).to(policy.device)  # (C,)
    if not inside.any():
        raise ValueError("the answer is empty")
    ids = spelt["input_ids"].to(policy.device)
    logits = policy.full_logits(inputs, ids, torch.ones_like(ids))
    logps = logits.log_softmax(-1).gather(-1, ids[..., None])[0, :, 0]
    return logps[inside].sum()


# ---------------------------------------------------------------------------------------------
# From the processor's layout back to the image
# ---------------------------------------------------------------------------------------------
def tiles(
    policy: Policy, inputs: dict[str, Tensor], gradient: Tensor, size: tuple[int, int]
) -> list[tuple[np.ndarray, Box]]:
    """The pieces that a processor made of one image of `size` = (w, h): mass (h, w), and where each lies.

    gradient: as inputs["pixel_values"]. Known layouts: whole images, centre crops, Qwen's flattened
    patches, grids of tiles with an overview (Idefics3, SmolVLM, InternVL), and LLaVA's grids on padding.
    """
    processor = policy.processor.image_processor
    gradient = gradient.detach().float().cpu()
    if gradient.dim() == 2:
        (grid,) = inputs["image_grid_thw"].tolist()
        gradient = _unflatten(gradient, grid, processor)[None]
    std = (
        getattr(processor, "image_std", None) if getattr(processor, "do_normalize", False) else None
    )
    mass = gradient.reshape(-1, *gradient.shape[-3:]).abs()  # (tiles, 3, h, w)
    mass = (mass / torch.tensor(std or [1.0] * 3).view(-1, 1, 1)).sum(1).numpy()
    whole = (0.0, 0.0, 1.0, 1.0)
    if len(mass) == 1:
        return [(mass[0], _crop(size) if getattr(processor, "do_center_crop", False) else whole)]
    if "image_sizes" in inputs:  # LLaVA: the overview, then tiles of the padded image
        boxes = [
            whole,
            *_padded_grid(policy.model.config.image_grid_pinpoints, mass.shape[1:], size),
        ]
    else:  # tiles of the stretched image, then the overview
        boxes = [*_grid(len(mass) - 1, size), whole]
    if len(boxes) != len(mass):
        name = type(policy.processor).__name__
        raise DataError(f"{name}: {len(mass)} image tiles in a layout that saliency does not know")
    return list(zip(mass, boxes, strict=True))


def _unflatten(flat: Tensor, grid: Sequence[int], processor) -> Tensor:
    """Qwen's (patches, 3 * T * p * p) of a grid (t, h, w) -> (3, h p, w p).

    Patches stand in blocks of m x m, which the model merges; each holds T copies of a still image.
    """
    (t, h, w), p = grid, processor.patch_size
    m, T = processor.merge_size, processor.temporal_patch_size
    x = flat.view(t, h // m, w // m, m, m, -1, T, p, p).sum((0, 6))  # (h/m, w/m, m, m, 3, p, p)
    return x.permute(4, 0, 2, 5, 1, 3, 6).reshape(-1, h * p, w * p)


def _crop(size: tuple[int, int]) -> Box:
    """The centre square that is left when the shorter edge is resized and the rest cut off."""
    w, h = size
    side = min(w, h)
    return (w - side) / 2 / w, (h - side) / 2 / h, (w + side) / 2 / w, (h + side) / 2 / h


def _grid(count: int, size: tuple[int, int]) -> list[Box]:
    """`count` equal tiles in rows: of the shapes with as many, the one nearest to the image's."""
    wanted = math.log(size[0] / size[1])
    shapes = [(count // rows, rows) for rows in range(1, count + 1) if count % rows == 0]
    columns, rows = min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1]) - wanted))
    return _cells(columns, rows, (0.0, 0.0, 1.0, 1.0))


def _padded_grid(
    pinpoints: Sequence[Sequence[int]], tile: tuple[int, int], size: tuple[int, int]
) -> list[Box]:
    """Tiles (h, w) of the image laid in the middle of the canvas that suits it best."""
    from transformers.image_processing_utils import select_best_resolution

    (w, h), (H, W) = size, select_best_resolution((size[1], size[0]), [tuple(p) for p in pinpoints])
    scale = min(W / w, H / h)
    across, down = W / (w * scale), H / (h * scale)  # the canvas in units of the image
    box = ((1 - across) / 2, (1 - down) / 2, (1 + across) / 2, (1 + down) / 2)
    return _cells(W // tile[1], H // tile[0], box)


def _cells(columns: int, rows: int, box: Box) -> list[Box]:
    left, top, right, bottom = box
    w, h = (right - left) / columns, (bottom - top) / rows
    return [
        (left + c * w, top + r * h, left + (c + 1) * w, top + (r + 1) * h)
        for r in range(rows)
        for c in range(columns)
    ]


def paint(pieces: Sequence[tuple[np.ndarray, Box]], size: tuple[int, int]) -> np.ndarray:
    """Lay pieces of mass over an image of `size` = (w, h) and add them up; each keeps its mass.

    Mass that lies beyond the image, on a processor's padding, is left out.
    """
    w, h = size
    total = np.zeros((h, w))
    for mass, (left, top, right, bottom) in pieces:
        # Pixel (x, y) of the image looks up the piece at a x + b, c y + d.
        a, c = mass.shape[1] / (w * (right - left)), mass.shape[0] / (h * (bottom - top))
        into = (a, 0, -left * w * a, 0, c, -top * h * c)
        picture = Image.fromarray(mass.astype(np.float32))
        drawn = picture.transform((w, h), Image.Transform.AFFINE, into, Image.Resampling.BILINEAR)
        total += np.asarray(drawn) * a * c
    return total


# ---------------------------------------------------------------------------------------------
# The control: a description in the image's place
# ---------------------------------------------------------------------------------------------
def word_mass(
    policy: Policy, example: Example, completion: str, think: bool = True
) -> list[tuple[str, float]]:
    """The words of a scene's description, each with its gradient's norm; `example` is of `data.in_words`.

    Raises DataError for a model that cannot read without an image.
    """
    if hasattr(policy.model, "qformer"):
        raise DataError(f"{policy.model.config.model_type} cannot be asked without an image")
    inputs = collate([example], policy.processor, think)
    seen: list[Tensor] = []

    def watch(module, arguments, output: Tensor) -> Tensor:
        seen.append(output.detach().requires_grad_())
        return seen[-1]

    hook = policy.embed.register_forward_hook(watch)
    try:
        logp = _answer_logp(policy, inputs, completion)
    finally:
        hook.remove()
    (gradient,) = torch.autograd.grad(logp, seen[0])
    norms = gradient[0].float().norm(dim=-1).tolist()
    prompt, description = prompt_text(example, policy.processor, think), put_in_words(example.scene)
    offsets = policy.tokenizer(prompt, add_special_tokens=False, return_offsets_mapping=True)[
        "offset_mapping"
    ]
    words, place = [], prompt.index(description)
    for word in description.split(" "):
        start, end = place, place + len(word)
        mass = sum(norms[i] for i, (a, b) in enumerate(offsets) if a < end and b > start)
        words.append((word.strip(".,").lower(), mass))
        place = end + 1
    return words


# ---------------------------------------------------------------------------------------------
# Figures
# ---------------------------------------------------------------------------------------------
def score(
    policy: Policy,
    questions: Sequence[Question],
    texts: Sequence[str | None],
    think: bool,
    bad: Bad,
) -> tuple[dict, list[np.ndarray | None]]:
    """n (images), background_share with its 95 % interval, background_area; and the mass of each question.

    A share is the mean of its image's questions, and the interval is over images. An answer that is
    empty, or moved by no pixel, is bad.
    """
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
    mean, between = interval([fmean(values) for values in shares.values()])
    return {
        "n": len(shares),
        "background_share": mean,
        "background_share_interval": between,
        "background_area": fmean(areas.values()),
    }, masses


def score_words(
    policy: Policy, examples: Sequence[Example], texts: Sequence[str], think: bool, bad: Bad
) -> dict:
    """The control: share of the mass on words that do not bear on the question, with its interval.

    examples: questions about scenes, `in_words`, with the texts that answer them.  idle_words_part is the
    part of the words that do not bear on it: the share of a model that weighs all words alike.
    """
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
    mean, between = interval(shares)
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


def interval(values: Sequence[float]) -> tuple[float, list[float] | None]:
    """Mean and its 95 % interval, 1.96 standard errors to either side; None for a single value."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, None
    half = 1.96 * stdev(values) / math.sqrt(len(values))
    return mean, [mean - half, mean + half]


def table(figures: dict[str, dict]) -> str:
    """The figures as text, a line a model."""
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
