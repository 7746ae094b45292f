"""Tables as plain text: what commands print and keep beside their results.

A table is a list of rows of cells, the heading first. Owns the layout alone; the cells are made by
whoever has the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence


def align(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Lay out a table in columns, with a line below the heading.

    Args:
      rows: the heading, then the rows; all of one length.
      left: columns that are aligned to the left; the others are aligned to the right.

    Returns:
      The lines, without a newline at the end.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:left], widths, strict=False)]
        cells += [cell.rjust(width) for cell, width in zip(row[left:], widths[left:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def percent(value: float | None, scale: float = 100) -> str:
    """A number with one decimal.

    Args:
      value: None for what is not known.
      scale: 100 for a fraction, 1 for what is in percent already.

    Returns:
      Such as "65.3", or "-".
    """
    return "-" if value is None else f"{scale * value:.1f}"
