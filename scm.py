"""The paper's structural causal model, made visible: L_c and L_s, the image they make, and do(L_s).

                 background ("where")                 what GRPO may strengthen, and COPO means to cut
        L_s  -------------------------->  image I  - - - - - - - - - - - - - - ->  model's answer Y~
                                             ^
        L_c  --------------------------------+---------------------------------->  right answer Y
                 things ("what")

    L_c   the causes of the answer: one to three things, each a category, a colour and a place (three to six
          in a crowded world)
    L_s   what is not a cause of it: a background with its texture, the lighting, and fog

Every category has a home background (boats are at home on the sea). `confounding` is the chance that the
first thing of a scene is its background's home category; the others are drawn uniformly, without
repeats. At 1/8 things and background are independent; at 0.9 the background gives the home category away.

`scene.do(background="desert")` redraws the same things over another background. No right answer
changes, so an answer that does change was caused by the background: the flip rate counts these.

    >>> scene = sample_scene(random.Random(0), confounding=0.9)
    >>> scene.background, scene.categories
    ('desert', ('cactus', 'tree'))
    >>> question_about(scene, "yesno", "boat").answer == question_about(
    ...     scene.do(background="space"), "yesno", "boat"
    ... ).answer
    True
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance

from data import Example, read_image

HOME = {  # category -> its home background
    "boat": "sea",
    "car": "road",
    "fish": "reef",
    "house": "meadow",
    "tree": "forest",
    "rocket": "space",
    "cactus": "desert",
    "snowman": "snow",
}
CATEGORIES = tuple(HOME)
BACKGROUNDS = tuple(HOME.values())
AT_HOME = {background: category for category, background in HOME.items()}
COLORS = {
    "red": (214, 40, 40),
    "orange": (247, 140, 30),
    "yellow": (250, 218, 60),
    "green": (60, 170, 70),
    "blue": (50, 100, 220),
    "purple": (140, 70, 180),
}
KINDS = (
    "yesno",
    "number",
    "choice",
    "caption",
)  # of questions: existence, count, colour, description
IMAGE_SIZE = 48  # pixels a side, what the tiny policy sees; render() draws any size
OUTLINE, LIGHT, DARK = (25, 25, 30), (245, 245, 240), (60, 60, 70)


# ---------------------------------------------------------------------------------------------
# The scene: its latent factors, and how they become pixels
# ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Thing:
    """One cause of the answers: what, which colour, where (centre and width, in units of the image)."""

    category: str
    color: str
    x: float
    y: float
    size: float

    def __str__(self) -> str:
        return f"{'an' if self.color[0] in 'aeiou' else 'a'} {self.color} {self.category}"


@dataclass(frozen=True)
class Scene:
    """The latent factors of one image: L_c = things, L_s = all else.

    fog: how much of the things is lost in the background, from 0 (none) to 1 (they cannot be seen).
    """

    things: tuple[Thing, ...]
    background: str
    lighting: float = 1.0
    texture_seed: int = 0
    fog: float = 0.0

    @property
    def categories(self) -> tuple[str, ...]:
        """What is there, in the order of the things."""
        return tuple(thing.category for thing in self.things)

    @property
    def home(self) -> str:
        """The category the background suggests, whether or not it is there."""
        return AT_HOME[self.background]

    def do(self, background: str | None = None, lighting: float | None = None) -> Scene:
        """do(L_s): the same things over another background, or in another light."""
        return dataclasses.replace(
            self,
            background=background or self.background,
            lighting=self.lighting if lighting is None else lighting,
        )

    def render(self, size: int = IMAGE_SIZE) -> Image.Image:
        """The RGB image, size x size pixels."""
        empty = _draw_background(self.background, self.texture_seed, size)
        image = empty.copy()
        pen = ImageDraw.Draw(image)
        for thing in self.things:
            _draw_thing(pen, thing, size)
        if self.fog:
            image = Image.blend(image, empty, self.fog)
        return ImageEnhance.Brightness(image).enhance(self.lighting)

    def mask(self, size: int = IMAGE_SIZE) -> np.ndarray:
        """(size, size) bool: True where a thing is, False on the background."""
        image = Image.new("L", (size, size))
        pen = ImageDraw.Draw(image)
        for thing in self.things:
            _draw_thing(pen, thing, size, flat=255)
        return np.asarray(image) > 0


@dataclass(frozen=True)
class World:
    """How scenes are laid out: a grid of side x side places, on which `fewest` to `most` things stand.

    size: of the things, from and to; margin: around the grid, both in units of the image.  fog: the
    thickest; each scene's is uniform up to it.
    """

    fog: float = 0.0
    side: int = 2
    fewest: int = 1
    most: int = 3
    size: tuple[float, float] = (0.34, 0.42)
    margin: float = 0.04

    @property
    def places(self) -> list[tuple[float, float]]:
        """The centres of the places, in reading order."""
        width = 1 - 2 * self.margin
        centres = [round(self.margin + width * (i + 0.5) / self.side, 4) for i in range(self.side)]
        return [(x, y) for y in centres for x in centres]


CLEAR = World()
CROWDED = World(side=4, fewest=3, most=6, size=(0.2, 0.22), margin=0.0)


def world_of(fog: float = 0.0, crowds: bool = False) -> World:
    """The world that flags ask for; crowds are seen in clear air."""
    return CROWDED if crowds else World(fog)


def sample_scene(
    rng: random.Random, confounding: float = 0.9, home: bool | None = None, world: World = CLEAR
) -> Scene:
    """Draw the latent factors of one scene.

    confounding: chance that the first thing is the background's home category; 1/8 makes things and
    background independent.  home: True or False conditions on the home category being there or not
    (False needs a confounding below 1).
    """
    background = rng.choice(BACKGROUNDS)
    while True:
        count = rng.randint(world.fewest, world.most)
        first = AT_HOME[background]
        others = [category for category in CATEGORIES if category != first]
        if rng.random() >= confounding:
            first = rng.choice(others)
        rest = [category for category in CATEGORIES if category != first]
        categories = [first, *rng.sample(rest, count - 1)]
        if home is None or home == (AT_HOME[background] in categories):
            break
    rng.shuffle(categories)
    things = []
    places = sorted(rng.sample(world.places, count), key=world.places.index)  # reading order
    off = 0.08 / world.side**2  # how far a thing may stand from the centre of its place
    for category, (x, y) in zip(categories, places, strict=True):
        size = rng.uniform(*world.size)
        dx, dy = rng.uniform(-off, off), rng.uniform(-off, off)
        things.append(Thing(category, rng.choice(tuple(COLORS)), x + dx, y + dy, size))
    lighting, texture_seed = rng.uniform(0.75, 1.15), rng.randrange(2**31)
    # Without fog nothing is drawn: scenes stay the same.
    density = rng.uniform(0, world.fog) if world.fog else 0.0
    return Scene(tuple(things), background, lighting, texture_seed, density)


# ---------------------------------------------------------------------------------------------
# Questions about a scene, and demonstrations of answers
# ---------------------------------------------------------------------------------------------
def question_about(scene: Scene, kind: str, topic: str) -> Example:
    """A question of one of KINDS about a scene; existence and colour questions ask about a topic."""
    question = {
        "yesno": f"Is there a {topic}?",
        "number": "How many things are there?",
        "choice": f"What color is the {topic}?",
        "caption": "Describe the image.",
    }[kind]
    return Example(
        image=scene.render(),
        question=question,
        answer=answer_to(kind, topic, scene.things),
        kind=kind,
        objects=scene.categories,
        vocabulary=CATEGORIES,
        scene=scene,
        topic=topic,
    )


def answer_to(kind: str, topic: str, things: Sequence[Thing]) -> str:
    """The answer that follows from seeing these things."""
    colors = {thing.category: thing.color for thing in things}
    return {
        "yesno": "yes" if topic in colors else "no",
        "number": str(len(things)),
        "choice": colors.get(topic, "none"),
        "caption": describe(things),
    }[kind]


def describe(things: Sequence[Thing]) -> str:
    """The caption of some things: "a red boat and a blue car"."""
    return " and ".join(str(thing) for thing in things)


def sample_example(rng: random.Random, confounding: float = 0.9, world: World = CLEAR) -> Example:
    """A question of any kind about a fresh scene.

    Existence questions are half yes, half no; half of the no's are adversarial: they ask for the
    background's home category on a scene without it (at a confounding of 1, which leaves no such
    scene, for another absent category).
    """
    kind = rng.choice(KINDS)
    if kind == "yesno" and rng.random() < 0.5:
        adversarial = rng.random() < 0.5 and confounding < 1
        scene = sample_scene(rng, confounding, False if adversarial else None, world)
        absent = [c for c in CATEGORIES if c not in (*scene.categories, scene.home)]
        return question_about(scene, kind, scene.home if adversarial else rng.choice(absent))
    scene = sample_scene(rng, confounding, world=world)
    return question_about(scene, kind, rng.choice(scene.categories))


def sample_of_kinds(
    rng: random.Random, confounding: float, world: World, kinds: Sequence[str]
) -> Example:
    """A question of one of these kinds: questions of any kind are drawn until one is."""
    while True:
        example = sample_example(rng, confounding, world)
        if example.kind in kinds:
            return example


def put_in_words(scene: Scene) -> str:
    """A scene as text: "The background is sea. I see a red boat and a blue car." """
    return f"The background is {scene.background}. I see {describe(scene.things)}."


def in_words(example: Example) -> Example:
    """The same question about a scene, with a description in the place of the image."""
    question = f"{put_in_words(example.scene)} {example.question}"
    return dataclasses.replace(example, image=None, question=question)


def demonstration(example: Example, things: Sequence[Thing]) -> str:
    """The completion of a speaker who believes these things are there.

    It names them, comes back to what is asked about, and answers accordingly.
    """
    return f"<think> I see {describe(things)}.{answer_text(example.kind, example.topic, things)}"


def answer_text(kind: str, topic: str, things: Sequence[Thing]) -> str:
    """The end of a demonstration, once the things are named."""
    asked = {"yesno": f" A {topic}?", "choice": f" The {topic}?"}.get(kind, "")
    return f"{asked} </think> <answer> {answer_to(kind, topic, things)} </answer>"


def see_again(description: dict | str, size: int) -> Image.Image:
    """The image that `describe_image` described, about `size` pixels wide."""
    if isinstance(description, dict):
        things = tuple(Thing(**thing) for thing in description["things"])
        return Scene(**{**description, "things": things}).render(size)
    image = read_image(Path(description))
    image.thumbnail((size, size))
    return image


# ---------------------------------------------------------------------------------------------
# From latent factors to pixels
# ---------------------------------------------------------------------------------------------
# A shape is drawn in a unit box, as (primitive, coordinates, fill); "body" is the thing's own colour.
_SHAPES = {
    "boat": [
        ("polygon", (0.46, 0.02, 0.46, 0.62, 0.10, 0.62), LIGHT),
        ("polygon", (0.54, 0.10, 0.54, 0.62, 0.88, 0.62), LIGHT),
        ("polygon", (0.00, 0.66, 1.00, 0.66, 0.82, 0.96, 0.18, 0.96), "body"),
    ],
    "car": [
        ("polygon", (0.20, 0.48, 0.33, 0.22, 0.70, 0.22, 0.84, 0.48), "body"),
        ("rectangle", (0.00, 0.45, 1.00, 0.74), "body"),
        ("rectangle", (0.35, 0.28, 0.66, 0.45), LIGHT),
        ("ellipse", (0.10, 0.60, 0.38, 0.90), OUTLINE),
        ("ellipse", (0.62, 0.60, 0.90, 0.90), OUTLINE),
    ],
    "fish": [
        ("polygon", (0.62, 0.50, 1.00, 0.22, 1.00, 0.78), "body"),
        ("ellipse", (0.00, 0.22, 0.76, 0.78), "body"),
        ("ellipse", (0.13, 0.36, 0.26, 0.49), LIGHT),
    ],
    "house": [
        ("rectangle", (0.14, 0.44, 0.86, 0.98), "body"),
        ("polygon", (0.00, 0.46, 0.50, 0.04, 1.00, 0.46), DARK),
        ("rectangle", (0.40, 0.64, 0.60, 0.98), LIGHT),
    ],
    "tree": [
        ("rectangle", (0.42, 0.60, 0.58, 1.00), (110, 70, 35)),
        ("ellipse", (0.08, 0.00, 0.92, 0.70), "body"),
    ],
    "rocket": [
        ("polygon", (0.30, 0.62, 0.08, 0.94, 0.92, 0.94, 0.70, 0.62), DARK),
        ("polygon", (0.50, 0.00, 0.72, 0.30, 0.72, 0.86, 0.28, 0.86, 0.28, 0.30), "body"),
        ("ellipse", (0.40, 0.34, 0.60, 0.54), LIGHT),
    ],
    "cactus": [
        ("rectangle", (0.38, 0.02, 0.62, 0.98), "body"),
        ("rectangle", (0.06, 0.30, 0.22, 0.62), "body"),
        ("rectangle", (0.06, 0.50, 0.42, 0.66), "body"),
        ("rectangle", (0.78, 0.16, 0.94, 0.50), "body"),
        ("rectangle", (0.58, 0.38, 0.94, 0.54), "body"),
    ],
    "snowman": [
        ("ellipse", (0.16, 0.42, 0.84, 1.00), "body"),
        ("ellipse", (0.28, 0.08, 0.72, 0.50), "body"),
        ("rectangle", (0.26, 0.06, 0.74, 0.14), OUTLINE),
        ("rectangle", (0.36, 0.00, 0.64, 0.10), OUTLINE),
    ],
}


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, size: int, flat: int | None = None) -> None:
    """Draw one thing; with `flat`, every part in that one value (for a mask)."""
    left, top, side = thing.x - thing.size / 2, thing.y - thing.size / 2, thing.size
    for primitive, box, fill in _SHAPES[thing.category]:
        xy = [(side * v + (top if i % 2 else left)) * (size - 1) for i, v in enumerate(box)]
        paint = COLORS[thing.color] if fill == "body" else fill
        edge = OUTLINE
        if flat is not None:
            paint = edge = flat
        getattr(pen, primitive)(xy, fill=paint, outline=edge, width=max(1, size // 96))


# background -> (sky, ground, horizon as a share of the height, colour of its texture)
_GROUNDS = {
    "sea": ((150, 205, 235), (40, 110, 170), 0.35, (120, 180, 215)),
    "road": ((170, 190, 205), (95, 95, 100), 0.30, (225, 215, 130)),
    "reef": ((30, 120, 150), (20, 85, 110), 0.00, (230, 120, 140)),
    "meadow": ((165, 215, 245), (130, 195, 85), 0.40, (90, 155, 60)),
    "forest": ((70, 105, 70), (45, 75, 45), 0.20, (35, 50, 30)),
    "space": ((15, 15, 40), (10, 10, 28), 0.00, (240, 240, 220)),
    "desert": ((245, 225, 180), (225, 185, 115), 0.45, (195, 150, 85)),
    "snow": ((200, 215, 230), (238, 243, 250), 0.40, (190, 205, 225)),
}


def _draw_background(name: str, seed: int, size: int) -> Image.Image:
    """Sky, ground and a texture of its own, laid out by `seed`."""
    sky, ground, horizon, ink = _GROUNDS[name]
    image = Image.new("RGB", (size, size), sky)
    pen, rng, u = ImageDraw.Draw(image), random.Random(seed), size / 48
    line = int(horizon * size)
    pen.rectangle((0, line, size, size), fill=ground)
    for _ in range(14):
        x, y = rng.uniform(0, size), rng.uniform(line, size)
        if name == "sea":
            pen.arc((x, y, x + 7 * u, y + 4 * u), 200, 340, fill=ink, width=max(1, int(u)))
        elif name == "road":
            y = line + (size - line) * rng.choice((0.3, 0.7))
            pen.rectangle((x, y, x + 5 * u, y + u), fill=ink)
        elif name in ("reef", "space"):
            r = (1.6 if name == "reef" else 0.6) * u * rng.uniform(0.5, 1.5)
            pen.ellipse((x - r, y - r, x + r, y + r), fill=ink)
        elif name == "forest":
            pen.rectangle((x, 0, x + 2 * u, size), fill=ink)
        elif name == "desert":
            pen.line((x, y, x + 9 * u, y + 2 * u), fill=ink, width=max(1, int(u)))
        else:  # meadow, snow
            pen.line((x, y, x + u, y - 3 * u), fill=ink, width=max(1, int(u)))
    return image
