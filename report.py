"""A run as one page: what it cured, where the credit went, its curves.

    python report.py runs/first                          writes runs/first/report.html
    python report.py runs/first --beside runs/grpo       the same, with another run beside it in its curves,
                                                         its tables and its counts of captions, and in the
                                                         terminal

The page stands alone: no network, no script, figures drawn in SVG and images held inside. It follows
the reader's light or dark mode. In a notebook, tokens in colour are a line:

    from IPython.display import HTML
    HTML(colored_tokens([" a", " boat"], [0.0, 0.5]))
"""

import argparse
import csv
import html
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data import DataError
from hallucination.said import FALSE, KINDS, kinds_of
from hallucination.scenes import HELD_OUT
from page.cure import (
    Cured,
    cases,
    compared,
    method_of,
    read_cured,
    table_in_text,
    tables,
    verdict,
)
from page.curves import Line, curves
from page.palette import DARK, LIGHT
from page.parts import cost, held_out, picture, saliency, wide
from scm import World, world_of

FULL = 0.7  # a causal reward drawn in full colour: lambda_s + lambda_n at their defaults
MORE, LESS = (245, 170, 60), (130, 185, 245)  # grounds of values above and below 0, in full
SCORES = ("sufficiency", "necessity", "causal_reward", "advantage")
PARTS = Path(__file__).with_name("page")
ABOUT = "about.json"


class Run(NamedTuple):
    """What the logs of a run's folder say."""

    folder: Path
    logged: list[dict]  # metrics.csv
    rows: list[dict]  # of it, those of steps
    settings: dict
    about: dict
    figures: dict[str, dict]  # of evaluation.json
    world: World
    cured: Cured

    def line(self, name: str) -> Line:
        """It as a line in the curves, with the checkpoints that its folder holds."""
        kept = [path.name.partition("-")[2] for path in self.folder.glob("checkpoint-*")]
        steps = [int(step) for step in kept if step.isdecimal()]
        state = self.folder / "checkpoint" / "state.json"
        steps += [json.loads(state.read_text())["step"]] if state.exists() else []
        return Line(name, method_of(self.settings).lower(), self.rows, sorted(steps))


def read_run(folder: Path) -> Run:
    """The logs of a run's folder; a last row that is torn, or still being written, is none."""
    with open(folder / "metrics.csv", newline="") as file:
        logged = list(csv.DictReader(line for line in file if line.endswith("\n")))
    rows = [row for row in logged if row["step"] != "0"]  # 0: measured before the first step
    settings = json.loads((folder / "args.json").read_text())
    about, figures = (
        json.loads(path.read_text()) if path.exists() else {}
        for path in (folder / ABOUT, folder / "evaluation.json")
    )
    world = world_of(settings.get("fog", 0.0), settings.get("crowds", False))
    answers = (folder / f"answers-{what}.jsonl" for what in ("before", "after"))
    return Run(
        folder, logged, rows, settings, about, figures, world, read_cured(*answers, figures, world)
    )


def write_report(folder: Path, beside: Path | None = None) -> Path:
    """Write report.html of a run's folder from its logs, with another run beside it.  Returns its path."""
    run, other = read_run(folder), read_run(beside) if beside else None
    samples, apart = read_samples(folder), _between(run, other) if other else {}
    runs = called([run, other]) if other else {folder.name: run}
    name, *others = runs
    parts = [
        verdict(of.rows, of.settings, of.about, of.figures, of.cured, other is None)
        for of in runs.values()
    ]
    parts += [compared(name, others[0], apart, _began(run) == _began(other))] if other else []
    parts += [tables(run.figures, run.cured)] if run.figures else []
    if apart:
        columns = {
            f"{others[0]}, before": other.figures["before"],
            others[0]: other.figures["after"],
        }
        parts.append(tables(columns | {name: run.figures["after"]}, apart, "One beside the other"))
    parts += [cases({n: of.cured for n, of in runs.items() if of.cured})] if run.cured else []
    parts += [held_out(run.logged)]
    parts += [credit(samples), "<h2>Training</h2>", curves([of.line(n) for n, of in runs.items()])]
    parts.append(f"<h2>Cost</h2>{cost(run.rows)}")
    if run.figures and all(of.get("saliency") for of in run.figures.values()):
        parts.append(
            saliency({name: of["saliency"] for name, of in run.figures.items()}, run.world)
        )
    listed = html.escape(json.dumps(run.settings, indent=2))
    parts.append(f"<details><summary>settings</summary><pre>{listed}</pre></details>")
    path = folder / "report.html"
    path.write_text(page_of(f"COPO: {folder.name}", "".join(parts)), encoding="utf-8")
    return path


def side_by_side(folder: Path, beside: Path) -> str:
    """Two runs as a table in text, with the interval of what sets them apart; nothing if it is not known."""
    run, other = read_run(folder), read_run(beside)
    apart = _between(run, other)
    if not apart:
        return ""
    name, second = called([run, other])
    columns = {"before": other.figures["before"], second: other.figures["after"]}
    return table_in_text(columns | {name: run.figures["after"]}, apart)


def called(runs: Sequence[Run]) -> dict[str, Run]:
    """Runs by what they are called: their methods, with their folders where that says too little."""
    methods = [method_of(run.settings) for run in runs]
    clear = len(set(methods)) == len(runs)
    names = [m if clear else f"{m}, {run.folder}" for m, run in zip(methods, runs, strict=True)]
    return dict(zip(names, runs, strict=True))


def _began(run: Run) -> list[dict | None]:
    """The figures of a run before training, of both kinds of scenes."""
    return [run.figures.get("before", {}).get(setting) for setting in HELD_OUT]


def _between(run: Run, other: Run) -> Cured:
    """From the other's last answers to the run's.  Raises DataError for runs of different scenes."""
    if run.folder.resolve() == other.folder.resolve():
        raise DataError(f"{run.folder}: beside itself; name another run")
    seen = [
        (
            of.settings.get("fog", 0.0),
            of.settings.get("crowds", False),
            of.figures["before"]["independent"]["n"],
        )
        for of in (run, other)
        if of.figures
    ]
    if len(set(seen)) > 1:
        raise DataError(
            f"{run.folder} and {other.folder} were measured on different scenes (fog, crowds, how many: "
            f"{seen[0]} and {seen[1]}): only runs measured on the same ones stand beside each other"
        )
    if "after" not in other.figures:  # it has not ended
        return {}
    answers = (of.folder / "answers-after.jsonl" for of in (other, run))
    return read_cured(*answers, run.figures, run.world)


def page_of(title: str, body: str) -> str:
    """A self-contained page, headed by its title."""
    title = html.escape(title)
    light, dark = (
        f":root {{ --grpo: {of.hues['GRPO']}; --copo: {of.hues['COPO']} }}" for of in (LIGHT, DARK)
    )
    style = f"{light} @media (prefers-color-scheme: dark) {{ {dark} }}\n"
    style += (PARTS / "style.css").read_text() + (PARTS / "tokens.css").read_text()
    return (
        f"<!doctype html><html lang=en><head><meta charset=utf-8>"
        f"<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>{title}</title><style>{style}</style></head>"
        f"<body><main><h1>{title}</h1>{body}</main></body></html>\n"
    )


def read_samples(folder: Path) -> list[dict]:
    """The rows of samples.jsonl; a last one that is torn, or still being written, is none."""
    with open(folder / "samples.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.endswith("\n")]


# ---------------------------------------------------------------------------------------------
# Tokens in colour
# ---------------------------------------------------------------------------------------------
def colored_tokens(
    tokens: Sequence[str],
    values: Sequence[float | None],
    above: Sequence[float] = (),
    below: Sequence[float] = (),
    false: Sequence[bool] = (),
    tips: Sequence[str] = (),
    full: float | None = None,
    style: bool = True,
) -> str:
    """Tokens as HTML, each on a ground as deep as its value: orange above 0, blue below.

    values: one per token, None for a token without one, which is drawn grey.  above, below: two bars
    per token, in [0, 1].  false: which tokens get a wavy line.  tips: what hover, focus and touch show;
    without them, the values.  full: the value in full colour; without it, the largest.  style: with the
    stylesheet, as a notebook needs it.  Raises ValueError where there is not one value per token.
    """
    count = len(tokens)
    tips = tips or ["" if value is None else f"{value:.2f}" for value in values]
    columns = [values, above or [0] * count, below or [0] * count, false or [False] * count, tips]
    full = full or max((abs(value) for value in values if value is not None), default=0) or 1.0
    spans = []
    for token, value, top, bottom, wrong, tip in zip(tokens, *columns, strict=True):
        text = html.escape(_visible(token, value is not None))
        marked = " copo-false" if wrong else ""
        if value is None:
            spans.append(f"<span class='copo-outside{marked}'>{text}</span>" if token else "")
            continue
        bars = f"--above:{_bar(top)};--below:{_bar(bottom)};" if above or below else ""
        printed = f"{value:.2f}" if abs(value) >= 0.005 else ""
        spans.append(
            f"<span class='copo-token{marked}{' copo-less' * (value < 0)}' tabindex=0 style='{bars}"
            f"{_depth(value, full)}' data-tip='{html.escape(tip)}' data-print='{printed}'>{text}</span>"
        )
    sheet = f"<style>{(PARTS / 'tokens.css').read_text()}</style>" if style else ""
    return f"{sheet}<div class=copo-tokens>{''.join(spans)}</div>"


def _depth(value: float, full: float) -> str:
    """How deep a token's ground is, for tokens.css: 0 at 0, and at `full` or more 1."""
    return f"--of:{min(abs(value) / full, 1):.3f}"


def ground(value: float, full: float) -> str:
    """The same ground as one colour, for a terminal: white at 0."""
    hue, share = MORE if value > 0 else LESS, min(abs(value) / full, 1)
    return "#" + "".join(f"{round(255 - share * (255 - channel)):02x}" for channel in hue)


def _bar(share: float) -> str:
    return f"{min(max(share, 0), 1):.2f}"


def _visible(token: str, scored: bool) -> str:
    """A token as it is shown: white space that has a score is made visible."""
    if scored and not token.strip():
        return token.replace("\n", "↵").replace(" ", "␣") or "∅"
    return token


# ---------------------------------------------------------------------------------------------
# Where the credit went
# ---------------------------------------------------------------------------------------------
def credit(samples: list[dict], seed: int = 0) -> str:
    """Completions drawn by chance, their tokens in colour, and where the top credit of the run fell."""
    head = "<h2 id=credit>Where the credit went</h2>"
    if not any(map(any, (sample["causal_reward"] for sample in samples))):
        return f"{head}<p>No token earned a causal reward.</p>"
    groups, parts = choose_samples(samples, seed), []
    number = 0
    for name, chosen in groups.items():
        parts.append(f"<h3>{name}</h3>" if chosen else "")
        for sample in chosen:
            number += 1
            parts.append(credit_card(sample, number))
    signed = any(value < 0 for sample in samples for value in sample["causal_reward"])
    return (
        f"{head}{_where_top_credit_fell(samples)}{key(signed)}"
        f"<p>Below, up to 4 right answers, 4 wrong ones and 4 captions, each drawn by chance (seed {seed}) "
        f"from all of the run that have reasoning; none was chosen for its scores. "
        f"<a href='#after-credit'>Skip them.</a></p>"
        f"{''.join(parts)}<span id=after-credit></span>"
    )


def choose_samples(samples: list[dict], seed: int = 0, each: int = 4) -> dict[str, list[dict]]:
    """`each` right answers, wrong answers and captions with reasoning, drawn by chance; by step."""
    groups: dict[str, list[dict]] = {"Right answers": [], "Wrong answers": [], "Captions": []}
    for sample in samples:
        if any(sample["reasoning"]):
            answered = "Right answers" if sample["reward"] == 1 else "Wrong answers"
            groups["Captions" if sample.get("kind") == "caption" else answered].append(sample)
    return {
        name: sorted(
            random.Random(f"{name} {seed}").sample(of, min(each, len(of))), key=lambda s: s["step"]
        )
        for name, of in groups.items()
    }


def credit_card(sample: dict, number: int = 1) -> str:
    """One completion: its image, its tokens in colour, and a table of their scores."""
    false = [kind in FALSE for kind in token_kinds(sample)]
    names = [name.replace("_", " ") for name in SCORES]
    values, tips, table = [], [], []
    for token, inside, wrong, *scores in zip(
        sample["tokens"],
        sample["reasoning"],
        false,
        *(sample[name] for name in SCORES),
        strict=True,
    ):
        values.append(scores[2] if inside else None)
        told = ", ".join(f"{name} {x:.2f}" for name, x in zip(names, scores, strict=True))
        tips.append(told + (" (false)" if wrong else ""))
        if inside:
            cells = "".join(f"<td>{x:.2f}</td>" for x in scores)
            shown = html.escape(_visible(token, True)) + (" (false)" if wrong else "")
            table.append(f"<tr><th scope=row>{shown}</th>{cells}</tr>")
    heads = "".join(f"<th scope=col>{name}</th>" for name in ("token", *names))
    tokens = colored_tokens(
        sample["tokens"], values, *(sample[name] for name in SCORES[:2]), false, tips, FULL, False
    )
    return (
        f"<div class=sample>{picture(sample['image'], 192)}<div><p class=note>{_about(sample)}</p>"
        f"<div class=completion>{tokens}</div><details><summary>scores of the {len(table)} reasoning "
        f"tokens of completion {number}</summary><table><tr>{heads}</tr>{''.join(table)}</table>"
        f"</details></div></div>"
    )


def _about(sample: dict) -> str:
    """What was asked, and what the completion earned."""
    asked, answer = html.escape(sample["prompt"]), html.escape(sample["answer"])
    if sample.get("agreement"):
        return (
            f"{asked} The model's own answer: {answer or 'none'}. Whether it is right is not known."
        )
    verdict = {1: "right", 0: "wrong"}.get(sample["reward"], "partly right")
    step = f"Step {sample['step']}: " if sample["step"] else ""
    return (
        f"{step}{asked} Right answer: {answer}. Outcome reward {sample['reward']:.2f}: {verdict}."
    )


def key(signed: bool = False) -> str:
    """What the colours and bars mean, drawn as the tokens are."""
    shown = [(" 0.00 ", 0.0), (" 0.35 ", 0.35), (" 0.70 or more ", FULL)]
    shown = [(" −0.70 ", -FULL), *shown] if signed else shown
    grounds = "".join(
        f"<span class='copo-token{' copo-less' * (value < 0)}' style='{_depth(value, FULL)}'>{text}</span>"
        for text, value in shown
    )
    bars = "<span class=copo-token style='--above:1;--below:.4;--of:0'> token </span>"
    return (
        f"<p class='note copo-tokens key'>Ground: causal reward {grounds} Bars: sufficiency above, necessity "
        f"below, each from 0 to 1 {bars} <span class='copo-outside copo-false'>wavy</span>: false of this "
        f"image, where its truth is known (a thing that is not there, or another colour than it has). "
        f"Grey: not reasoning; earns the outcome alone. Hover, focus or touch a token for its "
        f"numbers.</p><p class='note in-print'>Below each token that has one: its causal reward.</p>"
    )


def token_kinds(sample: dict) -> list[str]:
    """The kind of each token; where no truth is known, punctuation or another word.

    sample: a row of samples.jsonl; ask.py adds objects and vocabulary where a user has named them.
    """
    image = sample["image"]
    if isinstance(image, dict):
        return kinds_of(sample["tokens"], {t["category"]: t["color"] for t in image["things"]})
    there, vocabulary = dict.fromkeys(sample.get("objects", ())), sample.get("vocabulary", ())
    return kinds_of(sample["tokens"], there, vocabulary)


def _where_top_credit_fell(samples: list[dict]) -> str:
    """A table with bars: what the best paid token of a completion is, beside what tokens are at all."""
    counts = top_credit(samples)
    heads = "".join(
        f"<th scope=col>{name}<br>(n = {sum(of.values()):.0f})</th>" for name, of in counts.items()
    )
    rows = []
    for kind, told in KINDS.items():
        cells = []
        for of in counts.values():
            share = of[kind] / max(sum(of.values()), 1)
            cells.append(f"<td class=share style='--of:{share:.3f}'>{share:.1%}</td>")
        rows.append(f"<tr><th scope=row>{told}</th>{''.join(cells)}</tr>")
    return (
        f"<p class=note>What the best paid token of a completion is, over the whole run, beside all "
        f"reasoning tokens: what chance would pick. Tokens that tie share their completion. Deep scores are "
        f"rare, and of few draws: luck is among them. The words of a repeated question count as other "
        f"words.</p>{wide('where the top credit fell')}<table class=figures>"
        f"<tr><th scope=col>is</th>{heads}</tr>{''.join(rows)}</table></div>"
    )


def top_credit(samples: list[dict], cuts: Sequence[float] = (0.2, 0.4)) -> dict[str, Counter]:
    """Of which kind the best paid reasoning tokens are: column -> kind -> completions (shared by ties).

    The first column counts all reasoning tokens; then completions whose best causal reward is above 0,
    and those where it is at least each of `cuts`.
    """
    columns = {"all reasoning tokens": Counter(), "best, above 0": Counter()}
    columns |= {f"best, {cut} or more": Counter() for cut in cuts}
    every, *tops = columns.values()
    for sample in samples:
        scored = [
            (value, kind)
            for value, kind, inside in zip(
                sample["causal_reward"], token_kinds(sample), sample["reasoning"], strict=True
            )
            if inside
        ]
        every.update(kind for _, kind in scored)
        best = max((value for value, _ in scored), default=0.0)
        tied = [kind for value, kind in scored if value == best]
        for cut, top in zip((0.0, *cuts), tops, strict=True):
            if best > 0 and best >= cut:
                for kind in tied:
                    top[kind] += 1 / len(tied)
    return columns


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page.  Returns the exit code: 0, or 2 where there is no run."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("run", type=Path, help="folder of a run of train.py")
    parser.add_argument("--beside", type=Path, help="another run, such as plain GRPO's")
    args = parser.parse_args(argv)
    try:
        page = write_report(args.run, args.beside)
        print(*([side_by_side(args.run, args.beside)] if args.beside else []), page, sep="\n")
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
        which = f"{args.run} or {args.beside}" if args.beside else args.run
        print(f"error: {which}: its logs are broken: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
