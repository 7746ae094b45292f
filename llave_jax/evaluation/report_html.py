"""Pieces of a self-contained HTML page: tables, bars, galleries of answers.

Owns how things look; `report.py` decides what is shown. A page loads nothing: style, drawings (SVG) and
thumbnails (data URIs) are in it.
"""

from __future__ import annotations

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from html import escape

from llave_jax.inputs.images import load_image
from llave_jax.inputs.item import ImageLike

THUMBNAIL_PIXELS = 144
_TEXT_LIMIT = 320

_STYLE = """
:root { --ink: #1c2430; --soft: #5b6675; --line: #dfe4ea; --fill: #f5f7f9; --good: #1b7f5c;
        --bad: #b3392f; --bar: #3b6fb5; }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: #fff;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; margin: 1.25rem 0 .5rem; } p { margin: .4rem 0; }
.soft { color: var(--soft); } .small { font-size: .86rem; }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .6rem 1rem; min-width: 8rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; } th { color: var(--soft); font-weight: 600; }
tr.own td { font-weight: 700; background: #eef4fb; }
.scroll { overflow-x: auto; }
svg { display: block; max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
details { border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0; padding: .55rem 1rem; }
summary { cursor: pointer; font-weight: 600; } summary span { font-weight: 400; }
.example { display: grid; grid-template-columns: 215px 1fr; gap: 1rem; padding: .9rem 0;
           border-top: 1px solid var(--line); }
.cards { display: flex; flex-wrap: wrap; gap: .6rem; align-items: flex-start; align-content: flex-start; }
.card { border: 2px solid var(--line); border-radius: 8px; padding: .4rem; width: 147px;
        font-size: .82rem; line-height: 1.35; overflow-wrap: anywhere; background: #fff; }
.card img { display: block; max-width: 100%; margin: 0 auto .3rem; image-rendering: auto; }
.query .card { width: 100%; background: var(--fill); }
.positive { border-color: var(--good); } .chosen-wrong { border-color: var(--bad); }
.score { display: block; margin-top: .15rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.score.good { color: var(--good); font-weight: 600; } .score.bad { color: var(--bad); font-weight: 600; }
.bars { --values: 2; max-width: 66rem; }
.bar { display: grid; grid-template-columns: 11.5rem 1fr repeat(var(--values), 4.6rem);
       column-gap: .5rem; align-items: center; margin: .3rem 0; }
.label, .value { text-align: right; font-size: .86rem; font-variant-numeric: tabular-nums; }
.label { overflow-wrap: anywhere; }
.track { position: relative; height: 1.05rem; background: repeating-linear-gradient(
         to right, var(--line) 0 1px, var(--fill) 1px 20%); border-right: 1px solid var(--line); }
.track i { position: absolute; left: 0; top: .1rem; bottom: .1rem; border-radius: 2px; background: var(--bar); }
.track b { position: absolute; top: -.15rem; bottom: -.15rem; width: 2px; margin-left: -1px; background: var(--ink); }
.track b.published { width: 3px; background: #d95f02; }
.track.none { height: 0; background: none; border: 0; }
.axis { position: relative; height: 1.2rem; font-size: .8rem; color: var(--soft); }
.axis span { position: absolute; transform: translateX(-50%); }
@media (max-width: 700px) {
  .example { grid-template-columns: 1fr; }
  .bar { grid-template-columns: 1fr repeat(var(--values), 4.6rem); }
  .bar .label { text-align: left; }
  .track, .axis { grid-row: 2; grid-column: 1 / -1; }
}
"""


@dataclasses.dataclass(frozen=True)
class Card:
    """A query or a candidate as the page shows it.

    Attributes:
      text: plain text; long texts are cut.
      thumbnail: a data URI; None for a text without image.
    """

    text: str
    thumbnail: str | None = None


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


def thumbnail(image: ImageLike, name: str) -> str:
    """A small JPEG as a data URI. Tiny images are enlarged by a whole factor, without smoothing.

    Args:
      image: a path, the bytes of a file or a decoded image.
      name: where it comes from, for errors.

    Returns:
      The data URI.

    Raises:
      ImageError: it cannot be read.
    """
    picture = load_image(image, name).copy()
    factor = THUMBNAIL_PIXELS // max(picture.size)
    if factor > 1:
        picture = picture.resize((picture.width * factor, picture.height * factor), 0)
    picture.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def page(title: str, subtitle: str, sections: Sequence[tuple[str, str]]) -> str:
    """A whole document.

    Args:
      title, subtitle: plain text.
      sections: (heading, HTML).

    Returns:
      The document as text.
    """
    body = "\n".join(
        f"<section><h2>{escape(heading)}</h2>\n{content}</section>" for heading, content in sections
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><main>"
        f'<h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>\n{body}\n'
        "</main></body></html>\n"
    )


def paragraph(text: str) -> str:
    """A note in small grey type.

    Args:
      text: plain text.

    Returns:
      HTML.
    """
    return f'<p class="soft small">{escape(text)}</p>'


def table(rows: Sequence[Sequence[str]], own: Sequence[str] = ()) -> str:
    """A table of plain text.

    Args:
      rows: of cells, the heading first.
      own: first cells of the rows that are highlighted.

    Returns:
      HTML.
    """
    head = "".join(f"<th>{escape(cell)}</th>" for cell in rows[0])
    lines = []
    for row in rows[1:]:
        mark = ' class="own"' if row[0] in own else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>\n'


def folded(summary: str, content: str) -> str:
    """Content that is folded away until the reader opens it.

    Args:
      summary: plain text, always shown.
      content: HTML.

    Returns:
      HTML.
    """
    return f"<details><summary>{escape(summary)}</summary>{content}</details>\n"


def tiles(values: Sequence[tuple[str, str, str]]) -> str:
    """Headline numbers.

    Args:
      values: (label, value, note), plain text.

    Returns:
      HTML.
    """
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile"><span class="soft">{escape(label)}</span><b>{escape(value)}</b>'
            f'<span class="soft small">{escape(note)}</span></div>'
            for label, value, note in values
        )
        + "</div>\n"
    )


@dataclasses.dataclass(frozen=True)
class Bar:
    """A bar of `bars`.

    Attributes:
      label: in front of it.
      value: in percent.
      chance: value of random scores, in percent; None if it has no simple form.
      published: value of another model, in percent; None if there is none.
    """

    label: str
    value: float
    chance: float | None = None
    published: float | None = None


def bars(groups: Mapping[str, Sequence[Bar]]) -> str:
    """Horizontal bars from 0 to 100 percent. A dark tick marks chance, an orange one the published value.

    On a narrow screen a bar lies below its label, so that the text keeps its size.

    Args:
      groups: heading -> bars below it.
    """
    columns = ["this run", "published"]
    if all(bar.published is None for entries in groups.values() for bar in entries):
        columns.remove("published")
    heading = "".join(f'<span class="value soft">{column}</span>' for column in columns)
    parts = [
        f'<div class="bar"><span class="label"></span><span class="track none"></span>{heading}</div>'
    ]
    for group, entries in groups.items():
        parts.append(f"<h3>{escape(group)}</h3>")
        for bar in entries:
            values = {"this run": bar.value, "published": bar.published}
            cells = "".join(
                f'<span class="value">{_number(values[column])}</span>' for column in columns
            )
            ticks = "" if bar.chance is None else _tick("chance", bar.chance)
            if bar.published is not None:
                ticks += _tick("published", bar.published)
            parts.append(
                f'<div class="bar"><span class="label">{escape(bar.label)}</span>'
                f'<span class="track"><i style="width:{bar.value:.1f}%"></i>{ticks}</span>{cells}</div>'
            )
    axis = "".join(f'<span style="left:{share}%">{share}</span>' for share in range(0, 101, 20))
    parts.append(
        f'<div class="bar"><span class="label"></span><span class="axis">{axis}</span></div>'
    )
    style = "" if len(columns) > 1 else ' style="--values:1"'
    return f'<div class="bars"{style}>{"".join(parts)}</div>\n'


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _tick(kind: str, value: float) -> str:
    return f'<b class="{kind}" style="left:{value:.1f}%"></b>'


def gallery(name: str, note: str, groups: Mapping[str, Sequence[Example]], *, shown: bool) -> str:
    """Examples of answers for one dataset.

    Args:
      name, note: of the dataset.
      groups: heading ("Right", "Wrong") -> examples.
      shown: whether they are open from the start.

    Returns:
      HTML.
    """
    content = "".join(
        f"<h3>{escape(group)}</h3>" + "".join(_example(example) for example in examples)
        for group, examples in groups.items()
        if examples
    )
    return (
        f"<details{' open' if shown else ''}><summary>{escape(name)} "
        f'<span class="soft">{escape(note)}</span></summary>{content}</details>\n'
    )


def _example(example: Example) -> str:
    rank = example.positive_rank
    place = "not found" if rank is None else f"at rank {rank}"
    verdict = (
        '<span class="score good">right</span>'
        if rank == 1
        else f'<span class="score bad">right answer {place}</span>'
    )
    candidates = []
    for candidate in example.candidates:
        style = ""
        if candidate.positive:
            style = " positive"
        elif candidate.rank == 1:
            style = " chosen-wrong"
        line = f'<span class="score">#{candidate.rank} &middot; {candidate.score:.3f}</span>'
        candidates.append(_card(candidate.card, line, style))
    return (
        f'<div class="example"><div class="query">{_card(example.query, verdict, "")}</div>'
        f'<div class="cards">{"".join(candidates)}</div></div>'
    )


def _card(card: Card, line: str, style: str) -> str:
    text = card.text if len(card.text) <= _TEXT_LIMIT else card.text[:_TEXT_LIMIT] + " ..."
    picture = f'<img src="{card.thumbnail}" alt="">' if card.thumbnail else ""
    return f'<div class="card{style}">{picture}{escape(text)}{" " if text else ""}{line}</div>'
