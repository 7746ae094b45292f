"""Pieces of a self-contained HTML page: tables, bars, galleries of answers.

Owns their markup; `report.py` decides what is shown, `report_style.py` how it looks. A page loads nothing: style,
drawings and pictures are in it, and its policy forbids anything else. Every text goes through `escape`.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from llave_jax.evaluation.report_pictures import Picture
from llave_jax.evaluation.report_style import STYLE

_TEXT_LIMIT = 320
# Names of more characters take more than one line of a table's first column.
_LONG = 32
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
# What no HTML document may hold: control characters, halves of surrogate pairs, non-characters.
_FORBIDDEN = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufdd0-\ufdef\ufffe\uffff]"
)


def escape(text: str) -> str:
    """Text as text, in elements and in quoted attributes, whatever is in it.

    Args:
      text: from anywhere.

    Returns:
      HTML; characters that HTML does not allow are replaced.
    """
    return html.escape(_FORBIDDEN.sub("\ufffd", text))


class Section(NamedTuple):
    """A part of a chapter: its heading, plain text, and HTML below it."""

    heading: str
    content: str


class Chapter(NamedTuple):
    """Sections with a common heading, plain text; "" for a page that has no chapters."""

    heading: str
    sections: Sequence[Section]


def page(title: str, subtitle: str, chapters: Sequence[Chapter], lead: str = "") -> str:
    """A whole document.

    Args:
      title, subtitle: plain text.
      chapters: what is on it.
      lead: HTML in front of the chapters.

    Returns:
      The document as text.
    """
    body, links = [], []
    for number, (heading, sections) in enumerate(chapters, 1):
        level = 3 if heading else 2
        entries = [f'<b><a href="#c{number}">{_isolated(heading)}</a></b>'] if heading else []
        parts = []
        for place, (name, content) in enumerate(sections, 1):
            anchor = f"c{number}s{place}"
            entries.append(f'<a href="#{anchor}">{escape(name)}</a>')
            parts.append(
                f'<section id="{anchor}"><h{level}>{escape(name)}</h{level}>\n{content}</section>'
            )
        links.append(f"<li>{' '.join(entries)}</li>")
        head = f"<h2>{_isolated(heading)}</h2>\n" if heading else ""
        content = "\n".join(parts)
        body.append(f'<div class="chapter" id="c{number}">{head}{content}</div>')
    content = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="referrer" content="no-referrer"><meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>"
        f'<h1>{_isolated(title)}</h1><p class="soft">{_isolated(subtitle)}</p>\n'
        f'<nav aria-label="Contents"><ul>{"".join(links)}</ul></nav>\n{lead}{content}\n'
        "</main></body></html>\n"
    )


def _isolated(text: str) -> str:
    """Text whose direction of writing does not reach beyond it."""
    return f"<bdi>{escape(text)}</bdi>"


def paragraph(text: str) -> str:
    """A note in small grey type.

    Args:
      text: plain text.

    Returns:
      HTML.
    """
    return f'<p class="soft small">{escape(text)}</p>\n'


def print_note(text: str) -> str:
    """A note that is on paper only.

    Args:
      text: plain text.

    Returns:
      HTML.
    """
    return f'<p class="soft small print-only">{escape(text)}</p>\n'


class Cell(NamedTuple):
    """A cell of a table with a style: "good", "bad" or ""."""

    text: str
    style: str = ""


def table(
    rows: Sequence[Sequence[str | Cell]], own: Sequence[str] = (), *, name: str, left: int = 1
) -> str:
    """A table of plain text. A wide one scrolls within its box, the first column staying in sight.

    Args:
      rows: of cells, the heading first.
      own: first cells of the rows that are highlighted.
      name: what the table is of, for those who do not see it.
      left: columns that are aligned to the left; the others to the right.

    Returns:
      HTML.
    """
    head, *body = ([cell if isinstance(cell, Cell) else Cell(cell) for cell in row] for row in rows)
    lines = []
    for row in body:
        mark = ' class="own"' if row[0].text in own else ""
        first, *rest = (
            _table_cell(cell, index < left, scope="row" if not index else "")
            for index, cell in enumerate(row)
        )
        lines.append(f"<tr{mark}>{first}{''.join(rest)}</tr>")
    heading = "".join(
        _table_cell(cell, index < left, scope="col") for index, cell in enumerate(head)
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{escape(name)}"><table>'
        f"<thead><tr>{heading}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>\n"
    )


def _table_cell(cell: Cell, left: bool, scope: str) -> str:
    long = "long" if scope and len(cell.text) > _LONG else ""
    style = " ".join(filter(None, (cell.style, "left" if left else "", long)))
    mark = f' class="{style}"' if style else ""
    text = _isolated(cell.text) if left or scope else escape(cell.text)
    return f'<th scope="{scope}"{mark}>{text}</th>' if scope else f"<td{mark}>{text}</td>"


def folded(summary: str, content: str) -> str:
    """Content that is folded away until the reader opens it.

    Args:
      summary: plain text, always shown.
      content: HTML.

    Returns:
      HTML.
    """
    return f"<details><summary>{escape(summary)}</summary>{content}</details>\n"


def tiles(values: Sequence[tuple[str, str, Sequence[tuple[str, str]]]]) -> str:
    """Headline numbers.

    Args:
      values: (label, value, what it compares with as names and values), plain text.

    Returns:
      HTML.
    """
    parts = []
    for label, value, notes in values:
        lines = "".join(
            f'<span class="soft small">{_isolated(name)} <span class="whole">{escape(text)}</span></span>'
            for name, text in notes
        )
        parts.append(
            f'<div class="tile"><span class="soft">{_isolated(label)}</span> <b>{escape(value)}</b> {lines}</div>'
        )
    return f'<div class="tiles">{"".join(parts)}</div>\n'


def legend(entries: Sequence[tuple[str, str]]) -> str:
    """What marks mean.

    Args:
      entries: (the mark, HTML; its meaning, plain text).

    Returns:
      HTML.
    """
    items = "".join(f"<li>{mark}{_isolated(text)}</li>" for mark, text in entries)
    return f'<ul class="legend">{items}</ul>\n'


def figures(drawings: Mapping[str, str]) -> str:
    """Drawings beside one another, below one another on a phone.

    Args:
      drawings: caption, plain text -> HTML.

    Returns:
      HTML.
    """
    parts = (
        f"<figure><figcaption>{_isolated(caption)}</figcaption>{drawing}</figure>"
        for caption, drawing in drawings.items()
    )
    return f'<div class="charts">{"".join(parts)}</div>\n'


class Mark(NamedTuple):
    """What bars are compared with: its name, a style of `MARKS`, and whether its values are written too."""

    name: str
    style: str
    written: bool = True


# Ticks for chance and two published models, a dot and a diamond for two baselines.
MARKS = ("chance", "first", "second", "base0", "base1")


class Bar(NamedTuple):
    """A bar of `bars`.

    Attributes:
      label: in front of it.
      value: in percent; None: there is none.
      marks: in percent, for each of the marks; None: there is none.
      mean: whether it is a mean of the others.
    """

    label: str
    value: float | None
    marks: Sequence[float | None] = ()
    mean: bool = False


def bars(
    groups: Mapping[str, Sequence[Bar]], marks: Sequence[Mark] = (), own: str = "this run"
) -> str:
    """Horizontal bars from 0 to 100 percent. On a narrow screen a bar lies below its label and its numbers.

    Args:
      groups: heading -> bars below it.
      marks: what the bars are compared with.
      own: whose bars these are.

    Returns:
      HTML.
    """
    columns = [own, *(mark.name for mark in marks if mark.written)]
    heading = "".join(f'<span class="value soft">{_isolated(column)}</span>' for column in columns)
    parts = []
    for group, entries in groups.items():
        parts.append(f'<div class="bar head"><h4>{_isolated(group)}</h4>{heading}</div>')
        for bar in entries:
            pairs = list(zip(marks, bar.marks, strict=True))
            numbers = [value for mark, value in pairs if mark.written]
            cells = f'<span class="value own">{_number(bar.value)}</span>' + "".join(
                f'<span class="value">{_number(value)}</span>' for value in numbers
            )
            ticks = "".join(
                f'<b class="{mark.style}" style="left:{_share(value)}%"></b>'
                for mark, value in pairs
                if value is not None
            )
            filled = "" if bar.value is None else f'<i style="width:{_share(bar.value)}%"></i>'
            parts.append(
                f'<div class="bar"><span class="label{" mean" if bar.mean else ""}">{_isolated(bar.label)}</span> '
                f'<span class="track">{filled}{ticks}</span> {cells}</div>'
            )
    axis = "".join(f'<span style="left:{share}%">{share}</span>' for share in range(0, 101, 20))
    parts.append(
        f'<div class="bar" aria-hidden="true"><span class="label"></span><span class="axis">{axis}</span></div>'
    )
    many = " many" if len(columns) > 3 else ""
    meaning = [(_SWATCHES[mark.style], mark.name) for mark in marks]
    content = "\n".join(parts)
    return (legend(meaning) if meaning else "") + (
        f'<div class="bars{many}" style="--values:{len(columns)}">{content}</div>\n'
    )


_SWATCHES = {
    style: f'<span class="track" style="width:1rem;border:0" aria-hidden="true"><b class="{style}" style="left:50%"></b></span>'
    for style in MARKS
}


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _share(value: float) -> str:
    return f"{min(max(value, 0.0), 100.0):.1f}"


@dataclasses.dataclass(frozen=True)
class Card:
    """A query or a candidate as the page shows it.

    Attributes:
      text: plain text; long texts are cut.
      pictures: of the item, or frames of its video.
      alt: what the pictures are, for those who do not see them.
      note: why there are none.
    """

    text: str
    pictures: Sequence[Picture] = ()
    alt: str = ""
    note: str = ""


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A candidate of a query.

    Attributes:
      card: what it shows.
      score: its cosine with the query.
      rank: from 1.
      positive: whether it is a right answer.
    """

    card: Card
    score: float
    rank: int
    positive: bool


@dataclasses.dataclass(frozen=True)
class Example:
    """A query with its best candidates.

    Attributes:
      query: what it shows.
      candidates: in the order of their ranks; the best-ranked positive is among them, if it is known.
    """

    query: Card
    candidates: Sequence[Candidate]

    @property
    def positive_rank(self) -> int | None:
        """Rank of the best-ranked positive; None if it is not known."""
        return min((c.rank for c in self.candidates if c.positive), default=None)


def gallery(name: str, note: str, groups: Mapping[str, Sequence[Example]], *, shown: bool) -> str:
    """Examples of answers for one dataset.

    Args:
      name, note: of the dataset.
      groups: heading -> examples.
      shown: whether they are open from the start.

    Returns:
      HTML.
    """
    content = "\n".join(
        f"<h4>{escape(group)}</h4>" + "\n".join(_example(example) for example in examples)
        for group, examples in groups.items()
        if examples
    )
    return (
        f"<details{' open' if shown else ''}><summary>{_isolated(name)} "
        f'<span class="soft">{escape(note)}</span></summary>{content}</details>\n'
    )


def _example(example: Example) -> str:
    rank = example.positive_rank
    place = "not ranked" if rank is None else f"at rank {rank}"
    verdict = (
        '<span class="score good">right</span>'
        if rank == 1
        else f'<span class="score bad">right answer {place}</span>'
    )
    candidates = []
    for candidate in example.candidates:
        line = f"#{candidate.rank} &middot; {candidate.score:.3f}"
        style = ""
        if candidate.positive:
            style, line = " positive", f'{line} &middot; <span class="good">right</span>'
        elif candidate.rank == 1:
            style, line = " chosen", f'{line} &middot; <span class="bad">chosen</span>'
        candidates.append(
            f'<li class="card{style}">{_content(candidate.card)}<span class="score">{line}</span></li>'
        )
    return (
        f'<div class="example"><div class="query"><div class="card">{_content(example.query)}{verdict}</div></div>'
        f'<ol class="cards">{"".join(candidates)}</ol></div>'
    )


def _content(card: Card) -> str:
    text = card.text if len(card.text) <= _TEXT_LIMIT else card.text[:_TEXT_LIMIT] + " ..."
    alt = card.alt if len(card.alt) <= _TEXT_LIMIT else card.alt[:_TEXT_LIMIT]
    pictures = "".join(
        f'<img src="{picture.source}" width="{picture.width}" height="{picture.height}"'
        f'{" class=tiny" if picture.tiny else ""} alt="{escape(alt if not number else "")}">'
        for number, picture in enumerate(card.pictures)
    )
    if len(card.pictures) > 1:
        pictures = f'<div class="frames">{pictures}</div>'
    note = f'<span class="soft">{escape(card.note)}</span> ' if card.note else ""
    return f'{pictures}{note}<span dir="auto">{escape(text)}</span>{" " if text else ""}'
