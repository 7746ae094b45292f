"""Drawings of a page: histograms of similarities, and scores by the size of vectors, as <svg> elements.

Owns their geometry. Colours are of `report_style.py`, so that drawings follow the page into the dark and onto paper.
They are as wide as a phone: scaled to it, their text has its size.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llave_jax.evaluation.report_html import escape
from llave_jax.evaluation.similarity import EDGES, KINDS, NEGATIVES, SimilarityStats

LABELS = {
    "positive": "positive",
    "hard": f"hard negatives (top {NEGATIVES})",
    "easy": f"easy negatives (bottom {NEGATIVES})",
}
_WIDTH, _HEIGHT = 360, 220
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 12, 10, 38


class _Frame:
    """The plot's area: data to pixels."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float]):
        self._x, self._y = x, y

    def x(self, value: float) -> float:
        low, high = self._x
        return round(_LEFT + (value - low) / (high - low) * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        low, high = self._y
        return round(
            _HEIGHT - _BOTTOM - (value - low) / (high - low) * (_HEIGHT - _TOP - _BOTTOM), 1
        )

    def axes(self, x: Mapping[float, str], y: Mapping[float, str], label: str) -> str:
        """Grid, ticks and the horizontal axis' label."""
        bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
        lines = [
            f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{self.y(value)}" y2="{self.y(value)}"/>'
            f'<text class="soft" x="{_LEFT - 6}" y="{self.y(value) + 4}" text-anchor="end">{escape(text)}</text>'
            for value, text in y.items()
        ]
        lines += [
            f'<line class="axis" x1="{self.x(value)}" x2="{self.x(value)}" y1="{bottom}" y2="{bottom + 4}"/>'
            f'<text class="soft" x="{self.x(value)}" y="{bottom + 17}" text-anchor="middle">{escape(text)}</text>'
            for value, text in x.items()
        ]
        lines.append(f'<line class="axis" x1="{_LEFT}" x2="{right}" y1="{bottom}" y2="{bottom}"/>')
        middle = (_LEFT + right) / 2
        lines.append(
            f'<text class="soft" x="{middle}" y="{_HEIGHT - 4}" text-anchor="middle">{escape(label)}</text>'
        )
        return "".join(lines)


def _svg(content: str, description: str) -> str:
    return (
        f'<svg class="chart" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="400" role="img" '
        f'aria-label="{escape(description)}">{content}</svg>\n'
    )


def limits(stats: Iterable[SimilarityStats]) -> tuple[tuple[float, float], float]:
    """Axes that several histograms can have in common.

    Args:
      stats: of each; at least one.

    Returns:
      (range of cosines, highest share).
    """
    shares = np.stack([values.histogram(kind) for values in stats for kind in KINDS])
    bins = np.flatnonzero(shares.any(axis=0))
    return (float(EDGES[bins[0]]), float(EDGES[bins[-1] + 1])), float(shares.max())


def histogram(stats: SimilarityStats, axes: tuple[tuple[float, float], float]) -> str:
    """Shares of cosines by kind, with dashed lines at the means.

    Args:
      stats: what is drawn.
      axes: of `limits`.

    Returns:
      An <svg> element.
    """
    (low, high), top = axes
    frame = _Frame((low, high), (0, top))
    step = _step(top, 4)
    y = {step * n: f"{100 * step * n:.0f}%" for n in range(int(top / step + 1e-9) + 1)}
    step = _step(high - low, 5)
    x = {
        step * n: f"{step * n:.1f}"
        for n in range(math.ceil(low / step - 1e-9), int(high / step + 1e-9) + 1)
    }
    parts = [frame.axes(x, y, "cosine similarity")]
    for kind in reversed(KINDS):
        shares = stats.histogram(kind)
        bins = np.flatnonzero(shares)
        edges = EDGES.tolist()
        path = [f"M{frame.x(edges[bins[0]])} {frame.y(0)}"]
        for index in range(bins[0], bins[-1] + 1):
            path.append(f"V{frame.y(float(shares[index]))}H{frame.x(edges[index + 1])}")
        line = "".join([*path, f"V{frame.y(0)}"])
        mean = frame.x(stats.mean(kind))
        parts.append(
            f'<path class="{kind}-fill" fill-opacity=".3" d="{line}Z"/>'
            f'<path class="{kind}-line" fill="none" stroke-width="1.3" d="{line}"/>'
            f'<line class="{kind}-line" stroke-dasharray="4 3" stroke-width="1.3" x1="{mean}" x2="{mean}" '
            f'y1="{_TOP}" y2="{frame.y(0)}"/>'
        )
    means = ", ".join(f"{LABELS[kind]} {stats.mean(kind):.2f}" for kind in KINDS)
    return _svg("".join(parts), f"Histograms of cosines; means: {means}")


def lines(series: Mapping[str, Sequence[tuple[int, float]]], what: str) -> str:
    """Scores by the numbers of a vector.

    Args:
      series: label -> (numbers, percent); at most 4.
      what: the score's name.

    Returns:
      An <svg> element.
    """
    points = [point for values in series.values() for point in values]
    sizes = sorted({size for size, _ in points})
    values = [value for _, value in points]
    step = _step(max(max(values) - min(values), 1.0), 4)
    low, high = step * math.floor(min(values) / step), step * math.ceil(max(values) / step)
    high = high if high > low else low + step
    ends = math.log2(sizes[0]), math.log2(sizes[-1])
    pad = (ends[1] - ends[0]) * 0.04 or 1
    frame = _Frame((ends[0] - pad, ends[1] + pad), (low, high))
    x = {math.log2(size): str(size) for size in _apart(sizes)}
    y = {low + step * n: f"{low + step * n:g}" for n in range(round((high - low) / step) + 1)}
    parts = [frame.axes(x, y, "numbers of a vector")]
    for number, found in enumerate(series.values()):
        places = [(frame.x(math.log2(size)), frame.y(value)) for size, value in sorted(found)]
        path = " ".join(f"{across},{down}" for across, down in places)
        parts.append(
            f'<polyline class="line{number}" fill="none" stroke-width="1.8" '
            f'stroke-dasharray="{_DASHES[number]}" points="{path}"/>'
        )
        parts += [_mark(number, *place) for place in places]
    return _svg(
        "".join(parts), f"{what} in percent by the numbers of a vector: {', '.join(series)}"
    )


_DASHES = ("none", "6 3", "2 3", "8 3 2 3")


def _mark(number: int, x: float, y: float) -> str:
    """A dot, a square, a diamond or a triangle."""
    if number == 0:
        return f'<circle class="mark0" cx="{x}" cy="{y}" r="3.6"/>'
    corners = {
        1: ((-3.2, -3.2), (3.2, -3.2), (3.2, 3.2), (-3.2, 3.2)),
        2: ((0, -4.6), (4.6, 0), (0, 4.6), (-4.6, 0)),
        3: ((0, -4.4), (4.2, 3.4), (-4.2, 3.4)),
    }[number]
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f'<polygon class="mark{number}" points="{points}"/>'


def line_swatch(number: int) -> str:
    """What a line of `lines` looks like, for a legend."""
    return (
        f'<svg width="30" height="12" aria-hidden="true"><line class="line{number}" x1="0" x2="30" y1="6" y2="6" '
        f'stroke-width="1.8" stroke-dasharray="{_DASHES[number]}"/>{_mark(number, 15, 6)}</svg>'
    )


def kind_swatch(kind: str) -> str:
    """What a kind of `histogram` looks like, for a legend."""
    return (
        f'<svg width="14" height="12" aria-hidden="true"><rect class="{kind}-fill {kind}-line" fill-opacity=".3" '
        'x="1" y="1" width="12" height="10"/></svg>'
    )


def _step(span: float, count: int) -> float:
    """A step of 1, 2 or 5 times a power of ten, so that about `count` of them make the span."""
    power = 10 ** math.floor(math.log10(span / count))
    return next(
        power * factor for factor in (1, 2, 5, 10) if power * factor >= span / count * 0.999
    )


def _apart(sizes: Sequence[int]) -> list[int]:
    """The sizes whose labels do not touch, the largest first."""
    span = math.log2(sizes[-1]) - math.log2(sizes[0])
    shown: list[int] = []
    for size in reversed(sizes):
        if not shown or math.log2(shown[-1] / size) >= span * 0.11:
            shown.append(size)
    return shown
