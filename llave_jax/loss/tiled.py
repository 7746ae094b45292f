"""What the loss needs of a pool's similarities, tile by tile: the matrix is never held.

Owns the traversal of the tiles and its gradient rule. A tile is computed once in the forward and once in
the backward pass, and serves both directions of the loss. The formulas are `hardness.py` and `focal.py`, which
candidates are negatives is `masks.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from llave_jax.loss.hardness import Formula, infonce, masked_logit, similarity_matrix
from llave_jax.loss.masks import Slots, allowed, differs, is_own


class PoolMask(NamedTuple):
    """Which of n rows and A columns are valid, and which entries are positives and negatives.

    Attributes:
      row_valid: bool [n], False for empty slots.
      column_valid: bool [A].
      first_positive: int32 scalar; the positive of row i is column first_positive + i.
      rows: what the rules on negatives know of the n rows.
      columns: the same of the A columns.
    """

    row_valid: Bool[Array, " n"]
    column_valid: Bool[Array, " A"]
    first_positive: Int32[Array, ""]
    rows: Slots = Slots()
    columns: Slots = Slots()


class Temperatures(NamedTuple):
    """A temperature for each row of the loss.

    Attributes:
      rows: [n], of the rows of the matrix.
      columns: [A], of its columns, the rows of the other direction.
    """

    rows: Float[Array, " n"]
    columns: Float[Array, " A"]


class Negatives(NamedTuple):
    """The negatives of rows among the columns, or of columns among the rows: one slot for each.

    Attributes:
      logsumexp: [slots], of their weighted logits; `masked_logit` if there are none.
      plain_logsumexp: [slots], of their logits in plain InfoNCE; `masked_logit` if there are none.
      hardest: [slots], their largest similarity; -inf if there are none.
      hardest_index: int32 [slots], the column where `hardest` occurs first; for a column, the row,
        as the column of its positive.
      easiest: [slots], their smallest similarity; inf if there are none.
    """

    logsumexp: Float[Array, " slots"]
    plain_logsumexp: Float[Array, " slots"]
    hardest: Float[Array, " slots"]
    hardest_index: Int32[Array, " slots"]
    easiest: Float[Array, " slots"]


class PoolSums(NamedTuple):
    """What the loss needs of the similarities of a pool.

    Attributes:
      positive: [n], similarity of each row's positive; 0 for an empty slot.
      rows: the negatives of the n rows.
      columns: the negatives of the A columns.
    """

    positive: Float[Array, " n"]
    rows: Negatives
    columns: Negatives


def _pool_sums_without_rule(
    rows: Float[Array, "n D"],
    columns: Float[Array, "A D"],
    mask: PoolMask,
    formula: Formula,
    temperatures: Temperatures | None,
    tile_size: int,
) -> PoolSums:
    """What the loss needs of the similarities `rows @ columns.T`, in O((n + A) D) memory.

    Args:
      rows: float32 [n, D] embeddings; empty slots may hold anything.
      columns: float32 [A, D].
      mask: which rows and columns are valid, and which entries are positives and negatives.
      formula: its numbers are float32 arrays; inside `shard_map` they vary over the axes that `rows` do.
      temperatures: in the place of the formula's own; None: the formula's own everywhere.
      tile_size: side of the square tiles; it need not divide n or A.

    Returns:
      `PoolSums`, differentiable in `rows`, `columns`, `formula` and `temperatures` through `positive` and
      through the `logsumexp` of rows and columns. The other fields are diagnostics and have no gradient.
    """
    grid = _Grid(rows.shape[0], columns.shape[0], tile_size)

    def visit(step, carry):
        positive, of_rows, of_columns = carry
        tile = _tile(rows, columns, mask, grid, step)
        at = _of_tile(temperatures, tile, grid)
        in_rows, in_columns = _logits(tile, tile.similarity, formula, at)
        plain = functools.partial(_logits, tile, tile.similarity)
        plain_in_rows, plain_in_columns = plain(infonce(formula), jax.lax.stop_gradient(at))
        row_index = mask.first_positive + tile.row_start + _arange(grid.height)
        column_index = tile.column_start + _arange(grid.width)
        positives = jnp.sum(jnp.where(tile.is_positive, tile.similarity, 0), axis=1)
        extend_rows = functools.partial(
            *(_extend, tile.similarity, in_rows, plain_in_rows),
            *(tile.is_negative_of_row, column_index),
        )
        extend_columns = functools.partial(
            *(_extend, tile.similarity.T, in_columns.T, plain_in_columns.T),
            *(tile.is_negative_of_column.T, row_index),
        )
        return (
            _update(positive, tile.row_start, grid.height, lambda old: old + positives),
            _update(of_rows, tile.row_start, grid.height, extend_rows),
            _update(of_columns, tile.column_start, grid.width, extend_columns),
        )

    start = (
        jnp.full_like(rows, 0, shape=rows.shape[:1]),
        _no_negatives(rows),
        _no_negatives(columns),
    )
    positive, of_rows, of_columns = jax.lax.fori_loop(0, grid.steps, visit, start)
    return PoolSums(positive, _finish(of_rows), _finish(of_columns))


pool_sums = jax.custom_vjp(_pool_sums_without_rule, nondiff_argnums=(5,))


def _logits(
    tile: _Tile,
    similarity: Float[Array, "n a"],
    formula: Formula,
    temperatures: Temperatures | None,
) -> tuple[Float[Array, "n a"], Float[Array, "n a"]]:
    """Logits of a tile's entries as negatives of their rows, and of their columns.

    Args:
      tile: of the masks.
      similarity: of the tile.
      formula: of the loss.
      temperatures: of the tile's rows and columns.
    """

    def logits(formula: Formula, is_explicit: jax.Array | None = None) -> Float[Array, "n a"]:
        weight = formula.log_weight(similarity, is_explicit)
        return formula.negative(similarity) / formula.temperature + weight

    if temperatures is not None:
        in_rows = logits(formula.at(temperatures.rows[:, None]), tile.is_explicit)
        return in_rows, logits(formula.at(temperatures.columns))
    in_rows = logits(formula, tile.is_explicit)
    return in_rows, in_rows if tile.is_explicit is None else logits(formula)


def _of_tile(temperatures: Temperatures | None, tile: _Tile, grid: _Grid) -> Temperatures | None:
    if temperatures is None:
        return None
    return Temperatures(
        jax.lax.dynamic_slice_in_dim(temperatures.rows, tile.row_start, grid.height),
        jax.lax.dynamic_slice_in_dim(temperatures.columns, tile.column_start, grid.width),
    )


def _forward(rows, columns, mask, formula, temperatures, tile_size):
    sums = pool_sums(rows, columns, mask, formula, temperatures, tile_size)
    found = sums.rows.logsumexp, sums.columns.logsumexp
    return sums, (rows, columns, mask, formula, temperatures, *found)


def _backward(tile_size, residuals, cotangent: PoolSums):
    """d logsumexp / d logit is the softmax; d logit / d similarity is the formula's derivative."""
    rows, columns, mask, formula, temperatures, row_logsumexp, column_logsumexp = residuals
    grid = _Grid(rows.shape[0], columns.shape[0], tile_size)

    def visit(step, carry):
        d_rows, d_columns, d_formula, d_temperatures = carry
        tile = _tile(rows, columns, mask, grid, step)
        at = _of_tile(temperatures, tile, grid)
        (row_logits, column_logits), derivative = jax.vjp(
            functools.partial(_logits, tile), tile.similarity, formula, at
        )

        def part(values, start, size):
            return jax.lax.dynamic_slice_in_dim(values, start, size)

        def softmax(logits, logsumexp):
            # Only rounding puts a logit above its logsumexp. It is coarse where weights are huge.
            return jnp.exp(jnp.minimum(logits - logsumexp, 0))

        in_rows = softmax(row_logits, part(row_logsumexp, tile.row_start, grid.height)[:, None])
        in_rows *= part(cotangent.rows.logsumexp, tile.row_start, grid.height)[:, None]
        in_columns = softmax(column_logits, part(column_logsumexp, tile.column_start, grid.width))
        in_columns *= part(cotangent.columns.logsumexp, tile.column_start, grid.width)
        d_positive = part(cotangent.positive, tile.row_start, grid.height)[:, None]
        d_similarity, d_numbers, d_at = derivative(
            (
                jnp.where(tile.is_negative_of_row, in_rows, 0),
                jnp.where(tile.is_negative_of_column, in_columns, 0),
            )
        )
        d_similarity += jnp.where(tile.is_positive, d_positive, 0)

        def add_rows(old):
            return old + _matmul("na,aD->nD", d_similarity, tile.columns)

        def add_columns(old):
            return old + _matmul("na,nD->aD", d_similarity, tile.rows)

        def add_temperatures(old, new):
            if old is None:
                return None
            return Temperatures(
                _update(old.rows, tile.row_start, grid.height, lambda x: x + new.rows),
                _update(old.columns, tile.column_start, grid.width, lambda x: x + new.columns),
            )

        return (
            _update(d_rows, tile.row_start, grid.height, add_rows),
            _update(d_columns, tile.column_start, grid.width, add_columns),
            jax.tree.map(jnp.add, d_formula, d_numbers),
            add_temperatures(d_temperatures, d_at),
        )

    start = jax.tree.map(jnp.zeros_like, (rows, columns, formula, temperatures))
    found = jax.lax.fori_loop(0, grid.steps, visit, start)
    d_rows, d_columns, d_formula, d_temperatures = found
    return d_rows, d_columns, None, d_formula, d_temperatures


pool_sums.defvjp(_forward, _backward)


class _Grid:
    """Tiles of one size over an [n, A] matrix, one row of tiles after another.

    The last tile of each row and column of tiles is moved back to end at the matrix's edge. It overlaps
    its neighbour, and the entries that the neighbour has already are masked. So nothing is padded.
    """

    def __init__(self, num_rows: int, num_columns: int, tile_size: int):
        self.num_rows, self.num_columns = num_rows, num_columns
        self.height, self.width = min(tile_size, num_rows), min(tile_size, num_columns)
        self.across = -(-num_columns // self.width)
        self.steps = -(-num_rows // self.height) * self.across


class _Tile(NamedTuple):
    """One tile: where it begins, its embeddings (0 in empty slots), similarities and masks.

    `is_explicit` says which columns the row itself has named; None where the loss does not ask.
    """

    row_start: Int32[Array, ""]
    column_start: Int32[Array, ""]
    rows: Float[Array, "n D"]
    columns: Float[Array, "a D"]
    similarity: Float[Array, "n a"]
    is_positive: Bool[Array, "n a"]
    is_negative_of_row: Bool[Array, "n a"]
    is_negative_of_column: Bool[Array, "n a"]
    is_explicit: Bool[Array, "n a"] | None


def _tile(
    rows: jax.Array, columns: jax.Array, mask: PoolMask, grid: _Grid, step: jax.Array
) -> _Tile:
    first_row = step // grid.across * grid.height
    first_column = step % grid.across * grid.width
    row_start = jnp.minimum(first_row, grid.num_rows - grid.height)
    column_start = jnp.minimum(first_column, grid.num_columns - grid.width)

    def row_part(values):
        return jax.lax.dynamic_slice_in_dim(values, row_start, grid.height)

    def column_part(values):
        return jax.lax.dynamic_slice_in_dim(values, column_start, grid.width)

    row_index = row_start + _arange(grid.height)
    column_index = column_start + _arange(grid.width)
    row_valid, column_valid = row_part(mask.row_valid), column_part(mask.column_valid)
    # An empty slot may hold nan, and 0 * nan in a product would be nan.
    tile_rows = jnp.where(row_valid[:, None], row_part(rows), 0)
    tile_columns = jnp.where(column_valid[:, None], column_part(columns), 0)

    # Entries of valid slots that no earlier tile had.
    is_new = (row_valid & (row_index >= first_row))[:, None]
    is_new &= column_valid & (column_index >= first_column)
    is_positive = (mask.first_positive + row_index)[:, None] == column_index
    is_negative = is_new & ~is_positive
    of_rows, of_columns = jax.tree.map(row_part, mask.rows), jax.tree.map(column_part, mask.columns)
    by_ids = differs(of_rows, of_columns)
    if by_ids is not None:
        is_negative &= by_ids
    similarity = similarity_matrix(tile_rows, tile_columns)
    of_row, of_column = is_negative, is_negative
    by_row = allowed(similarity, of_rows, of_columns)
    by_column = allowed(similarity.T, of_columns, of_rows)
    if by_row is not None and by_column is not None:
        of_row, of_column = is_negative & by_row, is_negative & by_column.T
    return _Tile(
        row_start=row_start,
        column_start=column_start,
        rows=tile_rows,
        columns=tile_columns,
        similarity=similarity,
        is_positive=is_new & is_positive,
        is_negative_of_row=of_row,
        is_negative_of_column=of_column,
        is_explicit=is_own(of_rows, of_columns),
    )


class _Sum(NamedTuple):
    """A sum of exponentials so far: exp(maximum) * total."""

    maximum: Float[Array, " slots"]
    total: Float[Array, " slots"]


class _Running(NamedTuple):
    """`Negatives` of the tiles so far."""

    weighted: _Sum
    plain: _Sum
    hardest: Float[Array, " slots"]
    hardest_index: Int32[Array, " slots"]
    easiest: Float[Array, " slots"]


def _no_negatives(embeddings: Float[Array, "slots D"]) -> _Running:
    # Inside shard_map, full_like also copies over which mesh axes the embeddings vary.
    full = functools.partial(jnp.full_like, embeddings, shape=embeddings.shape[:1])
    nothing = _Sum(full(masked_logit(embeddings.dtype)), full(0))
    return _Running(
        weighted=nothing,
        plain=nothing,
        hardest=full(-jnp.inf),
        hardest_index=full(_NO_INDEX, dtype=jnp.int32),
        easiest=full(jnp.inf),
    )


def _extend(
    similarity: Float[Array, "slots a"],
    logits: Float[Array, "slots a"],
    plain_logits: Float[Array, "slots a"],
    is_negative: Bool[Array, "slots a"],
    index: Int32[Array, " a"],
    old: _Running,
) -> _Running:
    """Adds the negatives of a tile, whose columns have the numbers `index`."""
    hardest = jnp.max(jnp.where(is_negative, similarity, -jnp.inf), axis=1)
    is_hardest = is_negative & (similarity == hardest[:, None])
    hardest_index = jnp.min(jnp.where(is_hardest, index, _NO_INDEX), axis=1)
    return _Running(
        weighted=_add_exponentials(old.weighted, logits, is_negative),
        plain=_add_exponentials(old.plain, plain_logits, is_negative),
        hardest=jnp.maximum(old.hardest, hardest),
        # Tiles come in ascending order, so the earlier of two equal negatives is kept.
        hardest_index=jnp.where(hardest > old.hardest, hardest_index, old.hardest_index),
        easiest=jnp.minimum(
            old.easiest, jnp.min(jnp.where(is_negative, similarity, jnp.inf), axis=1)
        ),
    )


def _add_exponentials(
    old: _Sum, logits: Float[Array, "slots a"], is_negative: Bool[Array, "slots a"]
) -> _Sum:
    logits = jnp.where(is_negative, logits, masked_logit(logits.dtype))
    maximum = jnp.maximum(old.maximum, jnp.max(logits, axis=1))
    terms = jnp.where(is_negative, jnp.exp(logits - maximum[:, None]), 0)
    return _Sum(maximum, old.total * jnp.exp(old.maximum - maximum) + jnp.sum(terms, axis=1))


def _finish(found: _Running) -> Negatives:
    def logsumexp(values: _Sum) -> Float[Array, " slots"]:
        return values.maximum + jnp.log(jnp.where(values.total == 0, 1, values.total))

    return Negatives(
        logsumexp(found.weighted),
        logsumexp(found.plain),
        found.hardest,
        found.hardest_index,
        found.easiest,
    )


def _update(arrays, start: jax.Array, size: int, function: Callable):
    """Replaces the entries [start, start + size) of all arrays by a function of them."""
    part = jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, start, size), arrays)
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_slice_in_dim(x, new, start, 0),
        arrays,
        function(part),
    )


def _arange(size: int) -> jax.Array:
    return jnp.arange(size, dtype=jnp.int32)


def _matmul(equation: str, left: jax.Array, right: jax.Array) -> jax.Array:
    return jnp.einsum(equation, left, right, precision=jax.lax.Precision.HIGHEST)


_NO_INDEX = jnp.iinfo(jnp.int32).max
