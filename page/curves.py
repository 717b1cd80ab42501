"""The curves of one run or two, as SVG: each step thin, a running mean bold, values on hover, no script."""

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

CURVES = (  # column of metrics.csv, heading, what it says
    ("reward", "reward", "mean outcome of the completions"),
    ("sufficiency", "sufficiency", "mean over reasoning tokens (equation 2)"),
    ("necessity", "necessity", "mean over reasoning tokens (equation 3)"),
    ("causal_share", "causal share", "causal reward / (causal reward + |advantage|)"),
    ("kl", "KL", "to the policy before training"),
    ("entropy", "entropy", "nats per token"),
)
SMOOTH = 5  # steps of the running mean
HOVERS = 200  # places that tell their values, at most
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BASE = 300, 150, 38, 292, 6, 130  # of a drawing and of its axes


class Line(NamedTuple):
    """A run in the curves: its name, its colour in style.css, its rows of metrics.csv, its checkpoints."""

    name: str
    hue: str
    rows: list[dict]
    checkpoints: list[int]  # steps


def curves(lines: Sequence[Line]) -> str:
    """Every metric of CURVES over the steps, all runs in each."""
    drawn = "".join(_curve(lines, *curve) for curve in CURVES)
    names = ", ".join(
        f"<span class=swatch style='border-top:3px {'dashed' if i else 'solid'} var(--{line.hue})'></span> "
        f"{html.escape(line.name)}"
        for i, line in enumerate(lines)
    )
    marks = (
        " Triangles: checkpoints that were kept." if any(line.checkpoints for line in lines) else ""
    )
    return (
        f"<p class=note>{names}. Thin: each step; bold: the mean of {SMOOTH} steps around it.{marks} "
        f"Hover for values.</p><div class=curves>{drawn}</div>"
    )


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers from at or below `low` to at or above `high`, about `count` steps of 1, 2 or 5 apart.

    >>> ticks(0.67, 0.98), ticks(0, 40)
    ([0.6, 0.7, 0.8, 0.9, 1.0], [0, 10, 20, 30, 40])
    """
    apart = (high - low) / count
    power = 10 ** math.floor(math.log10(apart))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= apart * 0.999)
    first, last = math.floor(low / step + 1e-6), math.ceil(high / step - 1e-6)
    return [round(k * step, 12) for k in range(first, last + 1)]


def running_mean(values: Sequence[float]) -> list[float]:
    """The mean of SMOOTH values around each, of fewer near the ends."""
    half = SMOOTH // 2
    around = [values[max(i - half, 0) : i + half + 1] for i in range(len(values))]
    return [sum(few) / len(few) for few in around]


def _curve(lines: Sequence[Line], column: str, heading: str, note: str) -> str:
    """One metric of all runs."""
    found = []  # of each run: step -> value
    for line in lines:
        pairs = ((int(row["step"]), float(row[column])) for row in line.rows)
        known = {step: value for step, value in pairs if math.isfinite(value)}
        found.append(known if any(known.values()) or len(lines) == 1 else {})  # GRPO scores nothing
    values = [value for of_run in found for value in of_run.values()] or [0.0]
    low, high = min(values), max(values)
    low = 0.0 if 0 <= low < high / 2 or low == high else low  # near the top, what moves is shown
    levels = ticks(low, high if high > low else low + 1)
    first, last = (f(int(row["step"]) for line in lines for row in line.rows) for f in (min, max))
    steps = [
        step
        for step in ticks(first, max(last, first + 4))
        if first <= step <= last and step % 1 == 0
    ]

    def x(step: float) -> float:
        return round(LEFT + (RIGHT - LEFT) * (step - first) / max(last - first, 1), 1)

    def y(value: float) -> float:
        return round(BASE - (BASE - TOP) * (value - levels[0]) / (levels[-1] - levels[0]), 1)

    parts = [
        f"<path class=frame d='M{LEFT} {y(level)}H{RIGHT}' />"
        f"<text x={LEFT - 4} y={y(level) + 3} text-anchor=end>{level:g}</text>"
        for level in levels
    ]
    parts += [f"<text x={x(s)} y={HEIGHT - 6} text-anchor=middle>{s:g}</text>" for s in steps]
    for i, (line, of_run) in enumerate(zip(lines, found, strict=True)):
        parts += _drawn(line, of_run, i, x, y)
    parts += _hovers(lines, found, x)
    return (
        f"<figure><figcaption><b>{heading}</b> {html.escape(note)}</figcaption><svg viewBox='0 0 {WIDTH} "
        f"{HEIGHT}' role=img aria-label='{heading} over {last} steps'>{''.join(parts)}</svg></figure>"
    )


def _drawn(line: Line, values: dict[int, float], i: int, x: Callable, y: Callable) -> list[str]:
    """Run i of a drawing: its two lines, and a triangle for each checkpoint."""
    color, parts = f"var(--{line.hue})", []
    bold = running_mean(list(values.values()))
    for look, shown in (("thin", values.values()), ("bold dashed" if i else "bold", bold)):
        points = " ".join(f"{x(s)},{y(v)}" for s, v in zip(values, shown, strict=True))
        parts.append(f"<polyline class='{look}' style='stroke:{color}' points='{points}' />")
    return parts + [
        f"<path style='fill:{color}' d='M{x(step)} {BASE - 6 - 7 * i}l-3.5 6h7z'>"
        f"<title>{html.escape(line.name)}: checkpoint of step {step}</title></path>"
        for step in line.checkpoints
        if int(line.rows[0]["step"]) <= step <= int(line.rows[-1]["step"])
    ]


def _hovers(lines: Sequence[Line], found: Sequence[dict[int, float]], x: Callable) -> list[str]:
    """Unseen strips over the drawing that tell the values of a step."""
    steps = sorted(set().union(*found))
    steps = steps[:: math.ceil(len(steps) / HOVERS)] if steps else []
    width = round((RIGHT - LEFT) / max(len(steps), 1), 1)
    strips = []
    for step in steps:
        told = "; ".join(
            f"{html.escape(line.name)} {of_run[step]:.3g}"
            for line, of_run in zip(lines, found, strict=True)
            if step in of_run
        )
        strips.append(
            f"<rect class=strip x={round(x(step) - width / 2, 1)} y={TOP} width={width} "
            f"height={BASE - TOP - 6}><title>step {step}: {told}</title></rect>"
        )
    return strips
