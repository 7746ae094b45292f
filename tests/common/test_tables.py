"""Text tables."""

import hypothesis.strategies as st
from hypothesis import given

from llave_jax.common.tables import align, percent

CELLS = st.text(st.characters(codec="ascii", exclude_categories=["C"]), max_size=8).map(str.strip)


TABLES = st.integers(1, 4).flatmap(
    lambda n: st.lists(st.lists(CELLS, min_size=n, max_size=n), min_size=1)
)


@given(TABLES, st.integers(1, 3))
def test_columns_keep_their_cells_in_place(rows, left):
    heading, line, *others = align(rows, left=left).split("\n")
    assert set(line) <= {"-"}
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row, text in zip(rows, [heading, *others], strict=True):
        text, start = text.ljust(sum(widths) + 2 * len(widths)), 0
        for column, (cell, width) in enumerate(zip(row, widths, strict=True)):
            found = text[start : start + width]
            assert found == (cell.ljust(width) if column < left else cell.rjust(width))
            start += width + 2
    assert len(line) == max(len(text) for text in [heading, *others])


def test_percent():
    assert [percent(0.6534), percent(65.34, 1), percent(None)] == ["65.3", "65.3", "-"]
