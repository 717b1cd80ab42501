"""What a run changed: a sentence, figures with intervals, captions cured and captions newly wrong.

Read from evaluation.json and, where the run has kept its answers, from answers-before.jsonl and
answers-after.jsonl: only these tell which scenes changed, so without them no interval is shown.
"""

import html
import random
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from hallucination.files import Bad
from hallucination.paired import (
    CASES,
    DRAWS,
    FIGURES,
    SEED,
    Caption,
    Difference,
    captions,
    differences,
    sign_test,
)
from hallucination.said import kinds_of
from hallucination.scenes import (
    HELD_OUT,
    compare_rows,
    held_out_probes,
    read_completions,
    rows_as_text,
    scene_questions,
)
from page.parts import inline, wide
from scm import World, describe

MOST = 6  # captions shown of a case
UNLIKE = (
    "<p class=note>The two did not begin alike: their figures before training differ. So what sets them "
    "apart is not the method alone.</p>"
)
Cured = dict[str, tuple[dict[str, Difference], list[Caption]]]  # by setting


def read_cured(before: Path, after: Path, figures: dict, world: World) -> Cured:
    """The changes between two files of answers, on each kind of held-out scenes; {} where one was not kept.

    figures: evaluation.json of the run that answered.
    """
    paths = before, after
    if set(figures) != {"before", "after"} or not all(path.exists() for path in paths):
        return {}
    count = figures["before"]["independent"]["n"]
    questions = scene_questions(count, world)
    left = [read_completions(path, questions, Bad()) for path in paths]
    found = {}
    for setting in HELD_OUT:
        probes = held_out_probes(setting, count, world)
        pair = [completions[: len(probes)] for completions in left]
        left = [completions[len(probes) :] for completions in left]
        found[setting] = differences(probes, *pair), captions(probes, *pair)
    return found


# ---------------------------------------------------------------------------------------------
# The sentence
# ---------------------------------------------------------------------------------------------
def method_of(settings: dict) -> str:
    """COPO, or GRPO where nothing is added to the advantage."""
    return "COPO" if settings.get("lambda_s") or settings.get("lambda_n") else "GRPO"


def verdict(
    rows: list[dict],
    settings: dict,
    about: dict,
    figures: dict[str, dict],
    cured: Cured,
    alone: bool,
) -> str:
    """One sentence of what was run and what came of it; if alone, what it does not say."""
    method = {"GRPO": "plain GRPO"}.get(method_of(settings), "COPO")
    stages = ("rollout_seconds", "score_seconds", "update_seconds")
    minutes = sum(float(row[stage]) for row in rows for stage in stages) / 60
    size = f"{about['parameters'] / 1e6:,.1f} M parameters, " if about else ""
    size += f"{about['trained'] / about['parameters']:.0%} of them trained, " if about else ""
    commit = f", commit {about['commit']}" if about.get("commit") else ""
    date = f", {about['begun']}" if about else ""
    model = settings.get("model") or "the tiny LLaVA"
    told = (
        f"{len(rows)} steps of {method} ({minutes:.1f} minutes) on {model} ({size}"
        f"seed {settings.get('seed')}{commit}{date})"
    )
    came = _of_captions(cured) if cured else _of_rewards(rows, figures)
    text = f"<p class=verdict>{html.escape(told)} {came}.</p>"
    if cured and alone and method == "COPO":
        text += (
            "<p class=note>It does not say that COPO did it: plain GRPO may cure as many. The same run "
            "with <code>--lambda-s 0 --lambda-n 0</code>, given to <code>report.py --beside</code>, tells. "
            "One run is one seed: the intervals below are over scenes, not over seeds.</p>"
        )
    return text


def _of_captions(cured: Cured) -> str:
    """What became of captions on the scenes whose background gives nothing away."""
    figures, pairs = cured["independent"]
    change, cases = figures["CHAIR_S"], Counter(pair.case for pair in pairs)
    was, now = (cases[case] + cases["wrong both times"] for case in ("cured", "newly wrong"))
    verb = {"better": "cut", "worse": "raised"}.get(
        direction("CHAIR_S", change), "did not clearly change"
    )
    moved = f"from {was} to {now}" if verb in ("cut", "raised") else f"({was} before, {now} after)"
    return (
        f"<b>{verb} the captions that name something absent {moved} of {len(pairs)}</b>, on held-out "
        f"scenes whose background does not give the things away (independent ones): "
        f"{cases['cured']} cured, {cases['newly wrong']} newly wrong"
    )


def _of_rewards(rows: list[dict], figures: dict[str, dict]) -> str:
    """What is known without answers: CHAIR_S on held-out scenes, or else the outcome rewards."""
    if set(figures) == {"before", "after"}:
        was, now = (figures[what]["independent"]["chair_s"] for what in ("before", "after"))
        return f"had a CHAIR_S of <b>{was:.3f} before and {now:.3f} after</b> on independent scenes"
    part = max(len(rows) // 4, 1)
    first, last = (
        sum(float(row["reward"]) for row in some) / part for some in (rows[:part], rows[-part:])
    )
    return (
        f"had a mean outcome reward of <b>{first:.3f} in the first {part} steps and {last:.3f} in the "
        f"last</b>; no held-out scenes were asked before and after"
    )


# ---------------------------------------------------------------------------------------------
# The figures
# ---------------------------------------------------------------------------------------------
def direction(figure: str, change: Difference) -> str:
    """better, worse, or unclear where the interval holds 0; "" for what is neither."""
    if change.interval is None or not FIGURES[figure]:
        return ""
    low, high = change.interval
    if low <= 0 <= high:
        return "no change" if low == high == 0 else "unclear"
    return "better" if (change.difference > 0) == (FIGURES[figure] > 0) else "worse"


def compared(name: str, other: str, cured: Cured, alike: bool) -> str:
    """One sentence: whether the first of two runs names fewer absent things than the second.

    cured: from the second's answers to the first's.  alike: whether both began with the same figures.
    """
    if not cured:
        return (
            "<p class=verdict>Answers of both runs were not kept: the two cannot be compared.</p>"
        )
    change = cured["independent"][0]["CHAIR_S"]
    found = {"better": "below", "worse": "above"}.get(
        direction("CHAIR_S", change), "not clearly apart from"
    )
    _, between, *_ = _cells("CHAIR_S", change)
    return (
        f"<p class=verdict><b>{html.escape(name)} ends {found} {html.escape(other)}</b> in CHAIR_S on "
        f"independent scenes: {change.after:.3f} against {change.before:.3f} (95 % interval of the "
        f"difference {between}, over scenes). Each is one run of one seed.</p>"
    ) + ("" if alike else UNLIKE)


def tables(figures: dict[str, dict], cured: Cured, headline: str = "Before and after") -> str:
    """Columns of figures for each kind of scenes, with what is known of the last less the one before it."""
    parts = []
    for setting, (title, rows) in zip(HELD_OUT, compare_rows(figures).items(), strict=True):
        known = cured.get(setting, ({}, []))[0]
        heads = [
            title,
            *figures,
            *(["difference", "95 % interval", "result", "n"] if known else []),
        ]
        lines = []
        for heading, values in rows:
            name = heading.partition("  (")[0]
            cells = [*values, *(_cells(name, known[name]) if known else [])]
            row = "".join(f"<td>{cell}</td>" for cell in cells)
            lines.append(f"<tr><th scope=row>{html.escape(heading)}</th>{row}</tr>")
        row = "".join(f"<th scope=col>{html.escape(head)}</th>" for head in heads)
        parts.append(
            f"{wide(f'{headline}: {title}')}<table class=figures><tr>{row}</tr>{''.join(lines)}</table></div>"
        )
    note = (
        f"n: questions, captions, or pairs of answers, on scenes that training never showed. Difference: of "
        f"the two columns before it, right less left. Interval: paired over the same scenes by bootstrap "
        f"({DRAWS:,} draws of scenes with their answers, seed {SEED}); unclear: it holds 0. Where no scene "
        f"differs it is 0 to 0, which says less than it seems: of n scenes without a change, the true share "
        f"may still be 3 / n. Nothing is corrected for {len(FIGURES)} figures in each table."
    )
    note = note if cured else "Answers were not kept: no interval can be told."
    return f"<h2>{headline}</h2>{''.join(parts)}<p class=note>{note}</p>"


def table_in_text(figures: dict[str, dict], cured: Cured) -> str:
    """The same columns as text, with the interval of the last less the one before it."""
    *_, left, right = figures
    found = compare_rows(figures)
    for setting, rows in zip(HELD_OUT, found.values(), strict=True):
        known = cured[setting][0]
        for heading, values in rows:
            name = heading.partition("  (")[0]
            values.append(_cells(name, known[name])[1].rjust(26))
    return rows_as_text([*figures, f"{right} less {left}, 95 %".rjust(26)], found)


def _cells(figure: str, change: Difference) -> list[str]:
    """Difference, interval, direction, n."""
    if change.difference is None:
        return ["-", "-", "-", str(change.n)]
    digits = ".1f" if figure == "caption length, words" else ".3f"
    low, high = change.interval
    between = f"{low:+{digits}} to {high:+{digits}}"
    cells = [f"{change.difference:+{digits}}", between, direction(figure, change), str(change.n)]
    return [cell.replace("-", "−") for cell in cells]


# ---------------------------------------------------------------------------------------------
# The captions
# ---------------------------------------------------------------------------------------------
def cases(runs: dict[str, Cured], seed: int = 0) -> str:
    """How many captions each run cured and how many are newly wrong, with examples of the first's."""
    heads = "".join(f"<th scope=col>{case}</th>" for case in CASES.values())
    rows, of_case, unanswered = [], {case: [] for case in CASES.values()}, 0
    for i, (name, cured) in enumerate(runs.items()):
        for setting, (_, pairs) in cured.items():
            counts = Counter(pair.case for pair in pairs)
            cells = "".join(f"<td>{counts[case]}</td>" for case in CASES.values())
            p = sign_test(counts["cured"], counts["newly wrong"])
            whose = f"{html.escape(name)}, " if len(runs) > 1 else ""
            rows.append(
                f"<tr><th scope=row>{whose}{setting} scenes (n = {len(pairs)})</th>{cells}"
                f"<td>{'&lt; 0.001' if p < 0.001 else f'{p:.3f}'}</td></tr>"
            )
            unanswered += sum(not (pair.before and pair.after) for pair in pairs)
            for pair in pairs if i == 0 else ():
                of_case[pair.case].append((setting, pair))
    parts = [
        f"<h2>Captions cured, captions newly wrong</h2><p class=note>A caption is wrong here if it names "
        f"something absent (<span class=copo-false>waved</span>); colours are not judged. p: sign test of "
        f"cured against newly wrong, two-sided. {unanswered} captions had no answer before or after; "
        f"they name nothing, so they count as right.</p>{wide('captions by case')}<table class=figures>"
        f"<tr><th scope=col>captions</th>{heads}<th scope=col>p</th></tr>{''.join(rows)}</table></div>"
    ]
    columns = []
    for case in ("cured", "newly wrong"):
        found = of_case[case]
        shown = random.Random(f"{case} {seed}").sample(found, min(MOST, len(found)))
        how = f"{len(shown)} of {len(found)}, drawn by chance (seed {seed})" if found else "none"
        cards = "".join(_card(setting, pair) for setting, pair in shown)
        whose = f" by {html.escape(next(iter(runs)))}" if len(runs) > 1 else ""
        columns.append(f"<div><h3>{case.capitalize()}{whose}: {how}</h3>{cards}</div>")
    return f"{''.join(parts)}<div class=two>{''.join(columns)}</div>"


def _card(setting: str, pair: Caption) -> str:
    """One scene with its caption before and after."""
    scene = pair.example.scene
    shows = f"{describe(scene.things)}, background: {scene.background}"
    lines = "".join(
        f"<p><b>{when}</b> {_marked(caption, pair)}{_named(pair.absent(caption))}</p>"
        for when, caption in (("before:", pair.before), ("after:", pair.after))
    )
    return (
        f"<div class=caption>{inline(scene.render(128), shows)}<div>{lines}"
        f"<p class=note>{setting}; background: {scene.background}</p></div></div>"
    )


def _marked(caption: str, pair: Caption) -> str:
    """A caption with a wave below what is absent."""
    tokens = re.findall(r"\w+|\W+", caption)
    kinds = kinds_of(tokens, dict.fromkeys(pair.example.objects), pair.example.vocabulary)
    return "".join(
        f"<span class=copo-false>{html.escape(token)}</span>"
        if kind == "absent"
        else html.escape(token)
        for token, kind in zip(tokens, kinds, strict=True)
    )


def _named(absent: Sequence[str]) -> str:
    """The same in words, for those who do not see the wave."""
    return f" <small>(not there: {html.escape(', '.join(absent))})</small>" if absent else ""
