"""One colour, one meaning: in every figure and on every page, on a light ground and on a dark one.

No grey is read at 4.5 : 1 on both white and #0d1117 (4.35 at most), so each ground has colours of its own.
A test holds all of a scheme apart, for readers with and without red-green colour blindness.
"""

from typing import NamedTuple


class Scheme(NamedTuple):
    """The colours for one ground, as #rrggbb."""

    ground: str
    ink: str  # text, and what stands for no method
    soft: str  # axes, notes, and whatever has no colour of its own
    hues: dict[str, str]  # meaning -> colour


LIGHT = Scheme("#ffffff", "#1f2328", "#66666f", {
    "GRPO": "#3988d4", "COPO": "#be8026", "truth": "#095a21", "vote": "#2599ac",
    "coupled": "#53408a", "independent": "#ed3b53",
})  # fmt: skip
DARK = Scheme("#0d1117", "#e6e6ec", "#a0a0ac", {
    "GRPO": "#5382ab", "COPO": "#d89454", "truth": "#85e3b7", "vote": "#7ecfe8",
    "coupled": "#a07cf1", "independent": "#ea5477",
})  # fmt: skip
