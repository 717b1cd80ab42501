"""The claims as one page that stands alone: what was found, its figure, its table."""

import base64
import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from data import DataError
from page.parts import wide
from report import page_of

STYLE = """<style>
body { max-width: 80rem }  /* for the tables */
.claim img { width: 100% }
.claim td, .claim th { padding: .1rem .45rem }
.claim td { white-space: normal } .claim td span { white-space: nowrap }
.claim th[scope=row] { min-width: 8rem }
@media print {
  .claim td span { white-space: normal }
  .claim td, .claim th[scope] { padding: 0 .2rem; min-width: 0 }
  .claim table { font-size: 6.5pt; width: 100% }
  section.claim img { width: auto; max-width: 100%; max-height: 13.5cm }
  .claim h2, .claim .verdict { break-after: avoid }
  .claim { break-inside: avoid } }
</style>"""


class Section(NamedTuple):
    """A claim on the page: its name in files, its figure (for a light ground), its table, their source."""

    name: str
    picture: Path
    table: str
    source: str


class Said(NamedTuple):
    """What the results page says of a claim: its question, its verdict, what its figure shows."""

    question: str
    verdict: str
    alt: str


def said_of(text: str) -> dict[str, Said]:
    """Name of a claim's figure -> what is said of it; text: of experiments/README.md."""
    found = {}
    for section in re.split(r"^###? ", text, flags=re.MULTILINE):
        picture = re.search(r'<img alt="([^"]+)" src="figures/claim-([\w-]+)\.png"', section)
        verdict = re.search(r"\*\*(.+?)\*\*", section, re.DOTALL)
        if picture and verdict:
            question = section.partition("\n")[0]
            found[picture[2]] = Said(question, " ".join(verdict[1].split()), picture[1])
    return found


def page(sections: Sequence[Section], text: str) -> str:
    """All claims as one self-contained page, in the words of experiments/README.md, its text.

    Raises DataError for a claim of which that says nothing.
    """
    said, listed, parts = said_of(text), [], []
    if missing := {section.name for section in sections} - said.keys():
        raise DataError(
            f"experiments/README.md: no verdict in bold beside figures/claim-{min(missing)}.png"
        )
    for section in sections:
        question, verdict, alt = map(html.escape, said[section.name])
        listed.append(
            f"<li><a href='#{section.name}'>{question.partition('. ')[2]}</a> {verdict}</li>"
        )
        parts.append(
            f"<section class=claim><h2 id='{section.name}'>{question}</h2><p class=verdict>{verdict}</p>"
            f"{_picture(section.picture, alt)}{wide(f'table of claim {question}')}{_table(section.table)}"
            f"</div><p class=note>{html.escape(section.source)}</p></section>"
        )
    lead = " ".join(re.search(r"\*\*(.+?)\*\*", text, re.DOTALL)[1].split())
    head = f"{STYLE}<p class=verdict><b>{html.escape(lead)}</b></p>"
    head += f"<nav aria-label='the claims'><ol>{''.join(listed)}</ol></nav>"
    title = "COPO: the paper's claims, tested where the truth is known"
    return page_of(title, head + "".join(parts))


def _picture(path: Path, alt: str) -> str:
    """A figure for the reader's scheme, inside the page."""
    light, dark = (
        f"data:image/png;base64,{base64.b64encode(of.read_bytes()).decode()}"
        for of in (path, path.with_stem(f"{path.stem}-dark"))
    )
    return (
        f"<picture><source media='screen and (prefers-color-scheme: dark)' srcset='{dark}'>"
        f"<img alt='{alt}' src='{light}'></picture>"
    )


def _table(table: str) -> str:
    """A table of Markdown as HTML; the first cell of a line is its heading."""
    head, _, *rows = [line[2:-2].split(" | ") for line in table.splitlines()]
    heads = "".join(f"<th scope=col>{html.escape(cell) or 'what'}</th>" for cell in head)
    lines = [
        f"<tr><th scope=row>{html.escape(first)}</th>"
        + "".join(f"<td>{_cell(cell)}</td>" for cell in cells)
        + "</tr>"
        for first, *cells in rows
    ]
    return f"<table class=figures><tr>{heads}</tr>{''.join(lines)}</table>"


def _cell(cell: str) -> str:
    """A cell as HTML, which may break before a p-value, but not within a mean and its interval."""
    return re.sub(r"\S+ ± \S+", r"<span>\g<0></span>", html.escape(cell))
