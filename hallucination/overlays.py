"""Pictures of where an answer comes from: the image in grey, and over it the gradient's mass in orange."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE, TITLE, GAP = 220, 34, 12  # pixels of a picture, of the text above it, and between pictures


def overlay(image: Image.Image, mass: np.ndarray) -> Image.Image:
    """The image in grey, and over it the gradient's mass (h, w) in orange: full at its 99th percentile."""
    grey = image.convert("L").convert("RGB")
    strength = np.clip(mass / max(np.percentile(mass, 99), 1e-30), 0, 1)
    heat = Image.fromarray((strength * 230).astype(np.uint8)).resize(image.size)
    return Image.composite(Image.new("RGB", image.size, (240, 130, 0)), grey, heat)


def draw_overlays(questions: Sequence, masses: dict[str, list], path: Path, count: int = 6) -> None:
    """A row for each of the first images: the picture, then where each model's answer comes from.

    questions: of hallucination.saliency.  masses: model -> one mass per question, None where it has none.
    """
    by_image = defaultdict(list)  # the questions that all models answered
    for i, question in enumerate(questions):
        if all(of_model[i] is not None for of_model in masses.values()):
            by_image[question.key.get("image", i)].append(i)
    # Of the n-th image its n-th question: one of each kind, where an image has several.
    shown = [of[n % len(of)] for n, of in enumerate(by_image.values())][:count]
    columns, rows = 1 + len(masses), len(shown)
    width, height = SIDE + GAP, SIDE + TITLE + GAP
    sheet = Image.new("RGB", (columns * width + GAP, rows * height + GAP), "white")
    for row, i in enumerate(shown):
        example, objects = questions[i].example, questions[i].objects
        image = example.open_image()
        cells = [(example.question, image)]
        for model, of_model in masses.items():
            share = of_model[i][~objects].sum() / of_model[i].sum()
            cells.append(
                (f"{_name(model)}: {share:.0%} on background", overlay(image, of_model[i]))
            )
        for column, (title, picture) in enumerate(cells):
            _paste(sheet, GAP + column * width, GAP + row * height, title, picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _name(model: str) -> str:
    """What a model is called in a title: its folder, or its run where that is just "checkpoint"."""
    path = Path(model)
    return path.parent.name if path.name == "checkpoint" else path.name


def _paste(sheet: Image.Image, x: int, y: int, title: str, picture: Image.Image) -> None:
    """Put a picture, fitted into a square, and its title onto the sheet."""
    font = ImageFont.load_default(13)
    while font.getlength(title) > SIDE:
        title = title[:-2] + "…"
    ImageDraw.Draw(sheet).text((x, y + TITLE - 20), title, fill=(40, 40, 45), font=font)
    scale = SIDE / max(picture.size)
    size = tuple(max(1, round(side * scale)) for side in picture.size)
    sheet.paste(picture.convert("RGB").resize(size), (x, y + TITLE))
