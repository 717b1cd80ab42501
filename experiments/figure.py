"""The picture of the README: two completions of one run, coloured by causal reward.

    python -m experiments.figure runs/first --figure experiments/figures/credit.png \\
                                            --csv experiments/results/completion.csv

Above, the credit falls on a true word: of all completions with outcome reward 1 whose most paid reasoning
token names a category that is in the scene, the one that is paid most. Below, it falls on a false word:
the same, with a category that is not there. What follows the first full stop repeats the question, so it
claims nothing and is not looked at. It is drawn for a light ground and, as NAME-dark.png, for a dark one.
"""

import argparse
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure

from data import DataError
from experiments.plots import plt, save
from experiments.records import commit, write_csv
from page.palette import LIGHT, Scheme
from report import FULL, read_samples
from scm import CATEGORIES, see_again

ORANGE = to_rgb("#f0a020")
SMALL = 11.8  # points: on a phone 358 px wide, 9 px
COLUMNS = ("tokens", "reasoning", "sufficiency", "necessity", "causal_reward")


def claims_of(sample: dict) -> list[int]:
    """Places of the reasoning tokens before the first full stop."""
    places = []
    for i, (token, inside) in enumerate(zip(sample["tokens"], sample["reasoning"], strict=True)):
        if inside and "." in token:
            break
        places += [i] * inside
    return places


def most_paid(sample: dict) -> tuple[float, str]:
    """The largest causal reward of the reasoning before the first full stop, and the word that has it."""
    paid = sample["causal_reward"]
    best = max(claims_of(sample), key=lambda i: paid[i], default=None)
    return (0.0, "") if best is None else (paid[best], sample["tokens"][best].strip())


def choose(samples: Sequence[dict], there: bool) -> dict:
    """The completion whose credit falls most on a thing that is there, or that is not.

    Raises DataError where no completion has such a credit, or where the images are not scenes.
    """
    found = []
    for sample in samples:
        if not isinstance(sample["image"], dict):
            raise DataError("the run is not about scenes: what its images show is not known")
        paid, word = most_paid(sample)
        things = {thing["category"] for thing in sample["image"]["things"]}
        if sample["reward"] == 1 and paid > 0 and word in CATEGORIES and (word in things) == there:
            found.append((paid, sample))
    if not found:
        raise DataError(f"no credit falls on a {'true' if there else 'false'} word in this run")
    return max(found, key=lambda pair: pair[0])[1]


def draw(good: dict, bad: dict, scheme: Scheme) -> Figure:
    """Both completions, each beside its image."""
    figure = plt.figure(figsize=(6.5, 4.9), dpi=200, facecolor="none")
    for bottom, title, sample in (
        (0.51, "Credit on a true word", good),
        (0.01, "Credit on a false word", bad),
    ):
        _card(figure, bottom, title, sample, scheme)
    return figure


def _card(figure: Figure, bottom: float, title: str, sample: dict, scheme: Scheme) -> None:
    """One completion: its image, its question, its tokens with their scores."""
    card = figure.add_axes((0.005, bottom, 0.99, 0.48), facecolor=scheme.ground)
    card.set(xticks=[], yticks=[])
    for side in card.spines.values():
        side.set(color=scheme.soft, alpha=0.4)
    picture = figure.add_axes((0.015, bottom + 0.03, 0.26, 0.42))
    picture.imshow(see_again(sample["image"], 384))
    picture.axis("off")
    text = figure.add_axes((0.29, bottom, 0.69, 0.48), xlim=(0, 1), ylim=(0, 1))
    text.axis("off")
    text.text(0, 0.93, title, fontsize=12.5, color=scheme.ink, weight="bold", va="top")
    text.text(0, 0.79, sample["prompt"], fontsize=12, color=scheme.soft, va="top")
    below = "below a word: sufficiency, necessity"
    text.text(1, 0.05, below, fontsize=SMALL, color=scheme.soft, ha="right")
    _tokens(figure, text, sample, scheme)


def _tokens(figure: Figure, axis, sample: dict, scheme: Scheme) -> None:
    """The tokens in lines, the paid ones on orange with their two scores below."""
    renderer, inverse = figure.canvas.get_renderer(), axis.transData.inverted()
    x, y = 0.0, 0.62
    for token, inside, s, n, causal in zip(*(sample[k] for k in COLUMNS), strict=True):
        if not token.strip():
            continue
        share = min(causal / FULL, 1) if inside else 0
        mixed = zip(to_rgb(scheme.ground), ORANGE, strict=True)
        color = tuple((1 - share) * ground + share * orange for ground, orange in mixed)
        box = {"facecolor": color, "edgecolor": "none", "pad": 1.5} if inside else None
        ink = scheme.ink if inside else scheme.soft
        if share > 0.5:  # orange is light on either ground
            ink = LIGHT.ink
        drawn = axis.text(x, y, token.strip(), fontsize=12, color=ink, va="center", bbox=box)
        extent = drawn.get_window_extent(renderer)
        width = inverse.transform((extent.x1, 0))[0] - inverse.transform((extent.x0, 0))[0]
        if x + width > 0.99:
            x, y = 0.0, y - 0.175
            drawn.set_position((x, y))
        if inside and causal > 0.05:
            middle = min(max(x + width / 2, 0.09), 0.91)  # not beyond the ends of the line
            scores = f"{s:.2f}, {n:.2f}"
            axis.text(
                middle,
                y - 0.085,
                scores,
                fontsize=SMALL,
                color=scheme.ink,
                ha="center",
                va="center",
            )
        x += width + 0.025


def rows_of(sample: dict, credit: str, facts: dict) -> list[dict]:
    """What one card shows: one row per token."""
    facts = {"credit": credit, "prompt": sample["prompt"], "step": sample["step"], **facts}
    values = zip(*(sample[column] for column in COLUMNS), strict=True)
    return [dict(zip(COLUMNS, row, strict=True)) | facts for row in values]


def main(argv: Sequence[str] | None = None) -> int:
    """Draw the picture.  Returns the exit code: 0, or 2 where the run has no such completions."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of train.py on scenes")
    parser.add_argument("--figure", type=Path, required=True, help="the picture to write")
    parser.add_argument("--csv", type=Path, help="write its scores there")
    args = parser.parse_args(argv)
    try:
        samples = read_samples(args.run)
        good, bad = choose(samples, there=True), choose(samples, there=False)
        save(partial(draw, good, bad), args.figure)
        if args.csv:
            flags = [str(args.run), "--figure", str(args.figure), "--csv", str(args.csv)]
            command = f"python -m experiments.figure {shlex.join(flags)}"
            facts = {"command": command, "commit": commit()}
            rows = rows_of(good, "true", facts) + rows_of(bad, "false", facts)
            write_csv(args.csv, rows, tuple(rows[0]))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
