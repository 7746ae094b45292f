"""Histograms of similarities, as in the paper's Fig. 1, as a PNG.

Owns how they look. The numbers are `similarity.py`. Matplotlib is imported when something is drawn.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from llave_jax.common.files import atomic_file
from llave_jax.evaluation.similarity import EDGES, KINDS, NEGATIVES, SimilarityStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_LABELS = {
    "positive": "positive",
    "hard": f"hard negatives (top {NEGATIVES})",
    "easy": f"easy negatives (bottom {NEGATIVES})",
}
# Distinguishable in grey and for colour-blind readers.
_COLOURS = {"positive": "#1b6ca8", "hard": "#d95f02", "easy": "#8a8f98"}


def write_histograms(stats: Mapping[str, SimilarityStats], path: str | os.PathLike) -> None:
    """Write a PNG with one panel for each label and a common axis. Equal numbers give equal files.

    Args:
      stats: for example {"InfoNCE": ..., "hardness-weighted": ...}.
      path: the file.

    Raises:
      ValueError: `stats` is empty.

    Reference: LLaVE (arXiv 2503.04812), Fig. 1.
    """
    write_png(_draw(stats), path)


def write_png(figure: Figure, path: str | os.PathLike) -> None:
    """Writes a figure as a PNG. Equal figures give equal files.

    Args:
      figure: of matplotlib.
      path: the file.
    """
    with atomic_file(path) as temporary:
        # The entry "Software" is matplotlib's version. With it, equal numbers would not give equal files.
        figure.savefig(temporary, format="png", dpi=150, metadata={"Software": None})


def figure_svg(figure: Figure) -> str:
    """A figure as an <svg> element. Equal figures give equal text.

    Args:
      figure: of matplotlib.

    Returns:
      The element, with its texts as text; it loads nothing.
    """
    import matplotlib

    buffer = io.StringIO()
    # Without a fixed salt the ids in the file are random.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "llave_jax"}):
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=metadata)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _draw(stats: Mapping[str, SimilarityStats]) -> Figure:
    from matplotlib.figure import Figure

    if not stats:
        raise ValueError("nothing to draw: give at least one label with its statistics")
    columns = 2 if len(stats) == 4 else min(len(stats), 3)
    rows = -(-len(stats) // columns)
    figure = Figure(
        figsize=(4.6 * columns, 3.5 * rows + (0.9 if columns == 1 else 0.5)), layout="constrained"
    )
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for axes, (label, values) in zip(grid, stats.items(), strict=False):
        _draw_panel(axes, label, values)
    for axes in grid[len(stats) :]:
        axes.set_visible(False)
    grid[0].set_xlim(_limits(stats.values()))
    for axes in grid[::columns]:
        axes.set_ylabel("share of pairs")
    # Only the lowest panel of a column has a label and numbers on its axis.
    for number, axes in enumerate(grid[: len(stats)]):
        if number + columns >= len(stats):
            axes.set_xlabel("cosine similarity")
            axes.tick_params(labelbottom=True)
    handles, labels = grid[0].get_legend_handles_labels()
    # One panel is too narrow for a legend of one line.
    ncols = 1 if columns == 1 else 3
    place = "outside lower center"
    figure.legend(handles[::-1], labels[::-1], loc=place, ncols=ncols, frameon=False)
    return figure


def _draw_panel(axes: Axes, label: str, stats: SimilarityStats) -> None:
    from matplotlib import ticker

    for kind in reversed(KINDS):
        colour = _COLOURS[kind]
        shares = stats.histogram(kind)
        axes.stairs(shares, EDGES, fill=True, color=colour, alpha=0.35, label=_LABELS[kind])
        axes.stairs(shares, EDGES, color=colour, linewidth=1.2)
        axes.axvline(stats.mean(kind), color=colour, linewidth=1.2, linestyle="--")
    means = ", ".join(f"{kind} {stats.mean(kind):.2f}" for kind in KINDS)
    overlap = f"overlap positive/hard {stats.overlap('positive', 'hard'):.2f}"
    # The label is a text of the user's, not a formula.
    axes.set_title(label, fontsize=11, fontweight="bold", pad=30, parse_math=False)
    axes.text(
        0.5,
        1.02,
        f"mean: {means}\n{overlap}",
        transform=axes.transAxes,
        ha="center",
        va="bottom",
        fontsize=9,
        color="#444444",
    )
    axes.yaxis.set_major_locator(ticker.MaxNLocator(steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(ticker.PercentFormatter(1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_ylim(bottom=0)


def _limits(stats: Iterable[SimilarityStats]) -> tuple[float, float]:
    """The range of the bins that any panel uses, and one bin more on either side."""
    used = np.any([values.histogram(kind) > 0 for values in stats for kind in KINDS], axis=0)
    bins = np.flatnonzero(used)
    width = EDGES[1] - EDGES[0]
    return EDGES[bins[0]] - width, EDGES[bins[-1] + 1] + width
