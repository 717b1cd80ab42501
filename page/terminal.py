"""A scored completion in the terminal, token by token or word by word."""

from hallucination.said import FALSE
from report import FULL, SCORES, ground, token_kinds


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
