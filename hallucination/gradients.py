"""Gradients of an answer's log-probability: over the pixels of the image, or over words in its place.

Processors cut and lay out pixels each in its own way; `tiles` puts them back where they came from.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from data import DataError, Example, collate, prompt_text
from model import Policy
from rewards import answer_span
from scm import put_in_words

Box = tuple[float, float, float, float]  # left, top, right, bottom, in units of the image's size


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
    """The words of a scene's description, each with its gradient's norm; `example` is of `scm.in_words`.

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
