"""What the terminal shows: a scored completion; how a run opens, how far it is, what it has sampled."""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from data import Example
from hallucination.said import FALSE
from report import FULL, SCORES, ground, token_kinds
from runs import Settings


def printed(row: dict, color: bool) -> str:
    """A completion for the terminal: its tokens on their grounds, and the scores that are not 0."""
    false = [kind in FALSE for kind in token_kinds(row)]
    tokens, lines = [], [f"{'':<20}" + "".join(f"{name:>15}" for name in SCORES[:3])]
    for token, inside, wrong, *scores in zip(
        row["tokens"], row["reasoning"], false, *(row[name] for name in SCORES[:3]), strict=True
    ):
        red, green, blue = bytes.fromhex(ground(scores[2], FULL)[1:])
        dressed = f"\x1b[38;2;26;26;30;48;2;{red};{green};{blue}m{token}\x1b[0m"
        tokens.append(dressed if color and inside else token)
        if inside and (any(scores) or wrong):
            cells = "".join(f"{value:>15.2f}" for value in scores)
            lines.append(f"{token!r:<20}{cells}" + ("   false" if wrong else ""))
    zeros = sum(row["reasoning"]) - len(lines) + 1
    lines.append(f"{zeros} other reasoning tokens score 0")
    return "".join(tokens) + "\n\n" + "\n".join(lines)


def by_word(row: dict) -> dict:
    """The row with the scores of each word's tokens added up; punctuation stands alone."""
    merged, columns = [], ("tokens", "reasoning", *SCORES)
    for cells in zip(*(row[name] for name in columns), strict=True):
        token, inside = cells[:2]
        goes_on = merged and merged[-1][1] == inside and token[:1].isalnum()
        if goes_on and merged[-1][0][-1:].isalnum():
            last = merged[-1]
            sums = [round(a + b, 4) for a, b in zip(last[2:], cells[2:], strict=True)]
            merged[-1] = [last[0] + token, inside, *sums]
        else:
            merged.append(list(cells))
    return row | dict(zip(columns, map(list, zip(*merged, strict=True)), strict=True))


# ---------------------------------------------------------------------------------------------
# While a run goes on
# ---------------------------------------------------------------------------------------------
def opening(
    settings: Settings,
    folder: Path,
    parameters: int,
    trained: int,
    examples: Sequence[Example] | None,
) -> str:
    """The first lines of a run: what is trained, on what, and where it is kept."""
    method = "COPO" if settings.lambda_s or settings.lambda_n else "GRPO"
    model = settings.model or "the tiny LLaVA"
    data = f"{settings.data}, {len(examples)} examples" if settings.data else "fresh scenes"
    return (
        f"{method} on {model}: {_millions(trained)} of {_millions(parameters)} parameters are trained, "
        f"{settings.dtype} on {settings.device}\n"
        f"data: {data}; {settings.steps} steps of {settings.batch_size} prompts x "
        f"{settings.num_generations} completions\n"
        f"writes to {folder}"
    )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.{0 if count >= 1e8 else 2}f} M"


def stage(steps: int, name: str) -> Iterator[int]:
    """The steps of a stage of the warm start, on a bar; without a terminal, one line when it is done."""
    bar, begun = tqdm(range(steps), f"warm start: {name}", unit="step", disable=None), time.time()
    plain = bar.disable  # at its end a bar is, too
    yield from bar
    if plain:
        took = in_time(time.time() - begun)
        print(f"warm start: {name} took {took}, {steps} steps", file=sys.stderr, flush=True)


def in_time(seconds: float) -> str:
    """A time in the unit that suits it: 4.2 seconds, 2.5 minutes, 2.5 hours."""
    if seconds < 60:
        return f"{seconds:.1f} seconds"
    return f"{seconds / 60:.1f} minutes" if seconds < 3600 else f"{seconds / 3600:.1f} hours"


def example_of(row: dict) -> str:
    """A row of samples.jsonl in four lines: question, completion, what it earned, and its best paid words."""
    words = by_word(row)
    false = [kind in FALSE for kind in token_kinds(words)]
    scored = zip(words["causal_reward"], words["tokens"], false, strict=True)
    best = sorted((word for word in scored if word[0] > 0), key=lambda word: -word[0])[:4]
    paid = ", ".join(
        f"{_plain(token, 40) or 'white space'} {value:.2f}" + (" (false)" if wrong else "")
        for value, token, wrong in best
    )
    right = f"; right answer: {_plain(row['answer'])}" if row["answer"] else ""
    return (
        f"step {row['step']}, its first completion\n"
        f"  question    {_plain(row['prompt'])}\n"
        f"  completion  {_plain(''.join(row['tokens']))}\n"
        f"  outcome     {row['reward']:.2f}{right}\n"
        f"  causal      {paid or 'no word earned a causal reward'}"
    )


def _plain(text: str, most: int = 300) -> str:
    """A text on one line, not too long, and without what would move a terminal's cursor."""
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    return text if len(text) <= most else text[:most] + " ..."
