"""A run as one page: curves, before against after, and completions coloured by causal reward.

    python report.py runs/first                          writes runs/first/report.html

The page stands alone: no network, no script, figures drawn in SVG and images held inside. It follows
the reader's light or dark mode.
"""

import argparse
import base64
import csv
import html
import io
import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from data import DataError
from hallucination.overlays import overlay
from hallucination.scenes import compare_rows
from scm import see_again

CURVES = (  # column of metrics.csv, heading, what it says
    ("reward", "reward", "mean outcome of the completions"),
    ("sufficiency", "sufficiency", "mean over reasoning tokens (equation 2)"),
    ("necessity", "necessity", "mean over reasoning tokens (equation 3)"),
    ("causal_share", "causal share", "causal reward / (causal reward + |advantage|)"),
    ("kl", "KL", "to the policy before training"),
    ("entropy", "entropy", "nats per token"),
)
FULL = 0.7  # a causal reward drawn in full colour: lambda_s + lambda_n at their defaults

_STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1e; --paper: #fff; --soft: #6b6b76; --line: #d9d9e0;
        --mark: 230 140 0; --curve: #0067a8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececf1; --paper: #17171b; --soft: #a0a0ac; --line: #3a3a44; --mark: 235 150 20;
          --curve: #5ab4e8; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 62rem; margin: 0 auto; padding: 1rem; }
h1 { font-size: 1.5rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
p.note, figcaption, summary { color: var(--soft); font-size: .9rem }
pre { overflow-x: auto; font-size: .8rem; line-height: 1.35 }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); gap: 1rem }
figure { margin: 0 } svg { width: 100%; height: auto; display: block }
svg text { fill: var(--soft); font-size: 10px } svg .frame { stroke: var(--line) }
svg .line { fill: none; stroke: var(--curve); stroke-width: 1.6 }
.sample { display: grid; grid-template-columns: 9rem 1fr; gap: 1rem; padding: 1rem 0;
          border-top: 1px solid var(--line) }
.sample img { width: 100%; border-radius: 4px }
.completion { font-size: 1.05rem; line-height: 2 }
.token { background: rgb(var(--mark) / calc(var(--c) * 1)); border-radius: 3px; padding: .1em 0;
         white-space: pre-wrap }
.outside { color: var(--soft) }
table { border-collapse: collapse; font-size: .8rem; font-variant-numeric: tabular-nums }
td, th { padding: .1rem .6rem; text-align: right } td:first-child, th:first-child { text-align: left }
.wide { overflow-x: auto } .figures { margin-bottom: 1.2rem; font-size: .85rem }
.maps img { width: min(9rem, 26vw); image-rendering: pixelated }
.maps td, .maps th { text-align: left; vertical-align: top; padding: .3rem .8rem .6rem 0;
  max-width: 12rem }
.in-print { display: none }
@media print {  /* nothing to hover or to open: the numbers stand below each token */
  body { max-width: none; font-size: 10pt } details { display: none } .in-print { display: block }
  .sample, .maps tr, figure { break-inside: avoid }
  .token { display: inline-block; print-color-adjust: exact; -webkit-print-color-adjust: exact;
           line-height: 1.3; margin-bottom: .4em; text-align: center; vertical-align: top }
  .token::after { content: attr(data-print); display: block; font-size: 6pt; color: #555;
                  padding: 0 .3em } }
@media (max-width: 34rem) { body { padding: .7rem } .sample { grid-template-columns: 1fr }
                             .sample img { max-width: 12rem } }
"""


def write_report(folder: Path) -> Path:
    """Write report.html of a run's folder from its logs.  Returns its path."""
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    samples = read_samples(folder)
    settings = json.loads((folder / "args.json").read_text())
    evaluation = folder / "evaluation.json"
    figures = json.loads(evaluation.read_text()) if evaluation.exists() else {}
    parts = []
    if figures:
        parts.append(f"<h2>Before and after</h2>{_comparison(figures)}")
    if figures and all(of.get("saliency") for of in figures.values()):
        parts.append(_saliency({name: of["saliency"] for name, of in figures.items()}))
    parts.append("<h2>Training</h2><div class=curves>")
    parts += [_curve(rows, *curve) for curve in CURVES]
    parts.append("</div><h2>Where the credit went</h2>")
    parts.append(
        "<p class=note>The deeper the colour, the larger the causal reward of the token; grey tokens are "
        "not reasoning and earn the outcome alone. Hover for the numbers, or open the table.</p>"
        "<p class='note in-print'>Below each token: sufficiency, necessity, advantage.</p>"
    )
    parts += [_sample(sample) for sample in choose_samples(samples)]
    parts.append(f"<h2>Cost</h2>{_cost(rows)}")
    parts.append(f"<h2>Settings</h2><pre>{html.escape(json.dumps(settings, indent=2))}</pre>")
    path = folder / "report.html"
    path.write_text(page_of(f"COPO: {folder.name}", "".join(parts)), encoding="utf-8")
    return path


def page_of(title: str, body: str) -> str:
    """A self-contained page, headed by its title."""
    title = html.escape(title)
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8>"
        f"<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{title}</h1>{body}</body></html>\n"
    )


def read_samples(folder: Path) -> list[dict]:
    """The rows of samples.jsonl."""
    with open(folder / "samples.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def choose_samples(samples: list[dict], count: int = 12) -> list[dict]:
    """Of different prompts, the completions whose credit falls most clearly on few tokens."""

    def contrast(sample: dict) -> float:
        scores = [
            c
            for c, inside in zip(sample["causal_reward"], sample["reasoning"], strict=True)
            if inside
        ]
        return max(scores) - sorted(scores)[len(scores) * 3 // 4] if scores else -1.0

    chosen: dict[str, dict] = {}
    openings = Counter()  # of the questions: no kind of question takes more than a third
    for sample in sorted(samples, key=contrast, reverse=True):
        key, opening = json.dumps([sample["prompt"], sample["image"]]), sample["prompt"][:8]
        if key not in chosen and openings[opening] <= count // 3:
            chosen[key] = sample
            openings[opening] += 1
        if len(chosen) == count:
            break
    return sorted(chosen.values(), key=lambda s: s["step"])


def _curve(rows: list[dict], column: str, heading: str, note: str) -> str:
    """One metric over the steps, as SVG."""
    values = [float(row[column]) for row in rows]
    low, high = min(0.0, *values), max(*values, 1e-9) if len(values) > 1 else max(values[0], 1e-9)
    width, height, left, top = 300, 130, 46, 8
    points = " ".join(
        f"{left + (width - left) * i / max(len(values) - 1, 1):.1f},"
        f"{top + (height - top - 18) * (1 - (value - low) / (high - low)):.1f}"
        for i, value in enumerate(values)
    )
    base = height - 18
    return (
        f"<figure><figcaption><b>{heading}</b> {html.escape(note)}</figcaption>"
        f"<svg viewBox='0 0 {width} {height}' role=img aria-label='{heading} over {len(values)} steps'>"
        f"<path class=frame d='M{left} {top}V{base}H{width}' fill=none />"
        f"<text x={left - 4} y={top + 8} text-anchor=end>{high:.3g}</text>"
        f"<text x={left - 4} y={base} text-anchor=end>{low:.3g}</text>"
        f"<text x={left} y={height - 4}>step {rows[0]['step']}</text>"
        f"<text x={width} y={height - 4} text-anchor=end>{rows[-1]['step']}</text>"
        f"<polyline class=line points='{points}' /></svg></figure>"
    )


def _sample(sample: dict) -> str:
    """One completion: its image, its tokens in colour, and a table of their scores."""
    keys = ("sufficiency", "necessity", "causal_reward", "advantage")
    spans, table = [], []
    for token, inside, *scores in zip(
        sample["tokens"], sample["reasoning"], *(sample[key] for key in keys), strict=True
    ):
        text = html.escape(token)
        numbers = ", ".join(
            f"{key.replace('_', ' ')} {x:.2f}" for key, x in zip(keys, scores, strict=True)
        )
        if inside:
            color = min(scores[2] / FULL, 1)
            printed = " ".join(f"{x:.2f}" for x in (scores[0], scores[1], scores[3]))
            spans.append(
                f"<span class=token style='--c:{color:.2f}' title='{numbers}' "
                f"data-print='{printed}'>{text}</span>"
            )
            table.append(f"<tr><td>{text}" + "".join(f"<td>{x:.2f}" for x in scores))
        else:
            spans.append(f"<span class=outside title='{numbers}'>{text}</span>")
    heads = "".join(f"<th>{key.replace('_', ' ')}" for key in keys)
    return (
        f"<div class=sample><img alt='the image' src='{_inline(see_again(sample['image'], 192))}'><div>"
        f"<p class=note>step {sample['step']}: {html.escape(sample['prompt'])} "
        f"Right answer: {html.escape(sample['answer'])}. Outcome reward {sample['reward']:.2f}.</p>"
        f"<div class=completion>{''.join(spans)}</div>"
        f"<details><summary>scores of the reasoning tokens</summary>"
        f"<table><tr><th>token{heads}{''.join(table)}</table></details></div></div>"
    )


def _comparison(figures: dict[str, dict]) -> str:
    """Before against after, as a table."""
    parts = []
    for title, rows in compare_rows(figures).items():
        heads = "".join(f"<th>{html.escape(name)}" for name in (title, *figures))
        lines = (
            f"<tr><td>{html.escape(heading)}" + "".join(f"<td>{value}" for value in values)
            for heading, values in rows
        )
        parts.append(f"<table class=figures><tr>{heads}{''.join(lines)}</table>")
    return "".join(parts)


def _saliency(sheets: dict[str, dict]) -> str:
    """The first answers of each sheet side by side: which pixels move them."""
    first = next(iter(sheets.values()))
    shares = "; ".join(
        f"{name} {sheet['background_share']:.3f} (95 % interval {sheet['background_share_interval'][0]:.3f} "
        f"to {sheet['background_share_interval'][1]:.3f})"
        for name, sheet in sheets.items()
    )
    figures = []
    for row, *of_each in zip(first["rows"], *(s["rows"] for s in sheets.values()), strict=False):
        image = see_again(row["image"], 144)
        cells = [
            f"<td><img alt='the image' src='{_inline(image)}'><br>{html.escape(row['question'])}"
        ]
        for name, other in zip(sheets, of_each, strict=True):
            if (other["question"], other["image"]) != (row["question"], row["image"]):
                cells.append("<td>")  # its answer there is empty
                continue
            drawn = overlay(image, np.array(other["mass"], float))
            cells.append(
                f"<td><img alt='where the answer comes from, {name}' src='{_inline(drawn)}'>"
                f"<br>{html.escape(other['answer'])}: {other['share']:.0%}"
            )
        figures.append("<tr>" + "".join(cells))
    heads = "".join(f"<th>{html.escape(name)}" for name in ("", *sheets))
    return (
        f"<h2>Where the answers come from</h2><p class=note>Orange: the gradient of the answer's "
        f"log-probability with respect to the pixels. Its share on the background (which is "
        f"{first['background_area']:.0%} of the pixels), mean over {first['n']} held-out scenes: "
        f"{shares}.</p>"
        f"<div class=wide><table class=maps><tr>{heads}{''.join(figures)}</table></div>"
    )


def _inline(image: Image.Image) -> str:
    """An image as a data URL."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _cost(rows: list[dict]) -> str:
    """Mean seconds of a step by stage, and what scoring ran."""

    def mean(column: str) -> float:
        return sum(float(row[column]) for row in rows) / len(rows)

    stages = {name: mean(f"{name}_seconds") for name in ("rollout", "score", "update")}
    listed = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in stages.items())
    ratio = sum(stages.values()) / (stages["rollout"] + stages["update"])
    return (
        f"<p>A step took {listed}: {ratio:.2f} times a step without scoring. Scoring decoded "
        f"{mean('rows_scored'):.0f} rows and ran {mean('scoring_token_forwards'):.0f} token positions.</p>"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page.  Returns the exit code: 0, or 2 where there is no run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of train.py")
    args = parser.parse_args(argv)
    try:
        print(write_report(args.run))
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (
        LookupError,
        TypeError,
        ValueError,
        ArithmeticError,
        AttributeError,
        RecursionError,
    ) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        print(f"error: {args.run}: its logs are broken: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
