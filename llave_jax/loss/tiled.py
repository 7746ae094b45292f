"""Sums over the negatives of a pool too large for its matrix of similarities to be held.

Owns the traversal in tiles and its gradient rule. A tile is computed once in the forward and once
in the backward pass, and serves both directions of the loss. The formulas are `loss.py` and `focal_loss.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from llave_jax.loss.hardness import Formula, no_logit, similarity_matrix


class PoolMask(NamedTuple):
    """Which of n rows and M columns are real, and who is a negative of whom."""

    row_valid: jax.Array  # bool [n]
    column_valid: jax.Array  # bool [M]
    first_positive: jax.Array  # int32 scalar: row i's positive is column first_positive + i
    row_ids: jax.Array | None = None  # int32 [n]; a column of equal id is not a negative
    column_ids: jax.Array | None = None  # int32 [M]


class Negatives(NamedTuple):
    """The negatives of each of k rows among the columns, or of k columns among the rows."""

    logsumexp: jax.Array  # [k] of their weighted logits; `no_logit` if there are none
    hardest: jax.Array  # [k] their largest similarity; -inf if there are none
    hardest_index: jax.Array  # int32 [k] where that is found first; a row counts as its positive
    easiest: jax.Array  # [k] their smallest similarity; inf if there are none


class PoolSums(NamedTuple):
    positive: jax.Array  # [n] similarity of each row's positive; 0 for an empty slot
    rows: Negatives  # of the n rows
    columns: Negatives  # of the M columns


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def pool_sums(
    rows: jax.Array, columns: jax.Array, pool: PoolMask, formula: Formula, block_size: int
) -> PoolSums:
    """What the loss needs of the similarities `rows @ columns.T`, in O((n + M) D) memory.

    Args:
      rows: float32 [n, D] embeddings; empty slots have no influence, whatever they hold.
      columns: float32 [M, D].
      pool: what the rows and columns are to each other.
      formula: its numbers float32 arrays; inside `shard_map` they vary over the axes that `rows` do.
      block_size: side of the square tiles; it need not divide n or M.

    Returns:
      `PoolSums`, differentiable in `rows`, `columns` and `formula` through `positive` and both
      `logsumexp`; the other fields are diagnostics without a gradient.
    """
    grid = _Grid(rows.shape[0], columns.shape[0], block_size)

    def visit(step, carry):
        positive, of_rows, of_columns = carry
        tile = _tile(rows, columns, pool, grid, step)
        logits = jnp.where(
            tile.is_negative,
            _negative_logits(tile.similarity, formula),
            no_logit(tile.similarity.dtype),
        )
        row_numbers = pool.first_positive + tile.row_start + _arange(grid.height)
        column_numbers = tile.column_start + _arange(grid.width)
        found = jnp.sum(jnp.where(tile.is_positive, tile.similarity, 0), axis=1)
        extend_rows = functools.partial(
            _extend, tile.similarity, logits, tile.is_negative, column_numbers
        )
        extend_columns = functools.partial(
            _extend, tile.similarity.T, logits.T, tile.is_negative.T, row_numbers
        )
        return (
            _update(positive, tile.row_start, grid.height, lambda old: old + found),
            _update(of_rows, tile.row_start, grid.height, extend_rows),
            _update(of_columns, tile.column_start, grid.width, extend_columns),
        )

    start = (
        jnp.full_like(rows, 0, shape=rows.shape[:1]),
        _nothing_seen(rows),
        _nothing_seen(columns),
    )
    positive, of_rows, of_columns = jax.lax.fori_loop(0, grid.steps, visit, start)
    return PoolSums(positive, _finish(of_rows), _finish(of_columns))


def _negative_logits(similarity: jax.Array, formula: Formula) -> jax.Array:
    return formula.negative(similarity) / formula.temperature + formula.log_weight(similarity)


def _forward(rows, columns, pool, formula, block_size):
    sums = pool_sums(rows, columns, pool, formula, block_size)
    return sums, (rows, columns, pool, formula, sums.rows.logsumexp, sums.columns.logsumexp)


def _backward(block_size, residuals, cotangent: PoolSums):
    """d logsumexp / d logit is the softmax; from there on it is the formula's own derivative."""
    rows, columns, pool, formula, row_logsumexp, column_logsumexp = residuals
    grid = _Grid(rows.shape[0], columns.shape[0], block_size)

    def visit(step, carry):
        d_rows, d_columns, d_formula = carry
        tile = _tile(rows, columns, pool, grid, step)
        logits, derivative = jax.vjp(_negative_logits, tile.similarity, formula)

        def part(values, start, size):
            return jax.lax.dynamic_slice_in_dim(values, start, size)

        def softmax(logsumexp):
            # A logit is never above its logsumexp, except by rounding, which is coarse where
            # the weights are huge.
            return jnp.exp(jnp.minimum(logits - logsumexp, 0))

        in_rows = softmax(part(row_logsumexp, tile.row_start, grid.height)[:, None])
        in_rows *= part(cotangent.rows.logsumexp, tile.row_start, grid.height)[:, None]
        in_columns = softmax(part(column_logsumexp, tile.column_start, grid.width))
        in_columns *= part(cotangent.columns.logsumexp, tile.column_start, grid.width)
        d_positive = part(cotangent.positive, tile.row_start, grid.height)[:, None]
        d_similarity, d_numbers = derivative(jnp.where(tile.is_negative, in_rows + in_columns, 0))
        d_similarity += jnp.where(tile.is_positive, d_positive, 0)

        def add_rows(old):
            return old + _matmul("HW,WD->HD", d_similarity, tile.columns)

        def add_columns(old):
            return old + _matmul("HW,HD->WD", d_similarity, tile.rows)

        return (
            _update(d_rows, tile.row_start, grid.height, add_rows),
            _update(d_columns, tile.column_start, grid.width, add_columns),
            jax.tree.map(jnp.add, d_formula, d_numbers),
        )

    start = jax.tree.map(jnp.zeros_like, (rows, columns, formula))
    d_rows, d_columns, d_formula = jax.lax.fori_loop(0, grid.steps, visit, start)
    return d_rows, d_columns, None, d_formula


pool_sums.defvjp(_forward, _backward)


class _Grid:
    """Tiles of one size over an [n, M] matrix, row after row.

    The last tile of a row or column is moved back to end at the edge: it overlaps its neighbour
    instead of being padded, and what it sees a second time is masked.
    """

    def __init__(self, n: int, m: int, block_size: int):
        self.n, self.m = n, m
        self.height, self.width = min(block_size, n), min(block_size, m)
        self.across = -(-m // self.width)
        self.steps = -(-n // self.height) * self.across


class _Tile(NamedTuple):
    row_start: jax.Array
    column_start: jax.Array
    rows: jax.Array  # [height, D], zeros in empty slots
    columns: jax.Array  # [width, D], zeros in empty slots
    similarity: jax.Array  # [height, width]
    is_positive: jax.Array  # bool [height, width]
    is_negative: jax.Array  # bool [height, width]


def _tile(
    rows: jax.Array, columns: jax.Array, pool: PoolMask, grid: _Grid, step: jax.Array
) -> _Tile:
    first_row = step // grid.across * grid.height
    first_column = step % grid.across * grid.width
    row_start = jnp.minimum(first_row, grid.n - grid.height)
    column_start = jnp.minimum(first_column, grid.m - grid.width)

    def row_part(values):
        return jax.lax.dynamic_slice_in_dim(values, row_start, grid.height)

    def column_part(values):
        return jax.lax.dynamic_slice_in_dim(values, column_start, grid.width)

    row_index = row_start + _arange(grid.height)
    column_index = column_start + _arange(grid.width)
    row_valid, column_valid = row_part(pool.row_valid), column_part(pool.column_valid)
    # In an empty slot even 0 * nan must not come up.
    row_block = jnp.where(row_valid[:, None], row_part(rows), 0)
    column_block = jnp.where(column_valid[:, None], column_part(columns), 0)

    counted = (row_valid & (row_index >= first_row))[:, None]
    counted &= column_valid & (column_index >= first_column)
    is_positive = (pool.first_positive + row_index)[:, None] == column_index
    is_negative = counted & ~is_positive
    if pool.row_ids is not None:
        is_negative &= row_part(pool.row_ids)[:, None] != column_part(pool.column_ids)
    return _Tile(
        row_start,
        column_start,
        row_block,
        column_block,
        similarity_matrix(row_block, column_block),
        counted & is_positive,
        is_negative,
    )


class _Running(NamedTuple):
    """`Negatives` in the making: their logsumexp is maximum + log(total)."""

    maximum: jax.Array
    total: jax.Array
    hardest: jax.Array
    hardest_index: jax.Array
    easiest: jax.Array


def _nothing_seen(embeddings: jax.Array) -> _Running:
    # full_like also takes over how the embeddings vary between devices inside shard_map.
    full = functools.partial(jnp.full_like, embeddings, shape=embeddings.shape[:1])
    return _Running(
        maximum=full(no_logit(embeddings.dtype)),
        total=full(0),
        hardest=full(-jnp.inf),
        hardest_index=full(_NO_INDEX, dtype=jnp.int32),
        easiest=full(jnp.inf),
    )


def _extend(
    similarity: jax.Array,
    logits: jax.Array,
    is_negative: jax.Array,
    numbers: jax.Array,
    old: _Running,
) -> _Running:
    """`old` [k] with the negatives of a tile [k, c], whose columns are called `numbers` [c]."""
    maximum = jnp.maximum(old.maximum, jnp.max(logits, axis=1))
    terms = jnp.where(is_negative, jnp.exp(logits - maximum[:, None]), 0)
    hardest = jnp.max(jnp.where(is_negative, similarity, -jnp.inf), axis=1)
    is_hardest = is_negative & (similarity == hardest[:, None])
    index = jnp.min(jnp.where(is_hardest, numbers, _NO_INDEX), axis=1)
    return _Running(
        maximum=maximum,
        total=old.total * jnp.exp(old.maximum - maximum) + jnp.sum(terms, axis=1),
        hardest=jnp.maximum(old.hardest, hardest),
        # Tiles come in order: of equals the first was there before.
        hardest_index=jnp.where(hardest > old.hardest, index, old.hardest_index),
        easiest=jnp.minimum(
            old.easiest, jnp.min(jnp.where(is_negative, similarity, jnp.inf), axis=1)
        ),
    )


def _finish(seen: _Running) -> Negatives:
    empty = seen.total == 0
    logsumexp = seen.maximum + jnp.log(jnp.where(empty, 1, seen.total))
    return Negatives(
        logsumexp=logsumexp,
        hardest=seen.hardest,
        hardest_index=seen.hardest_index,
        easiest=seen.easiest,
    )


def _update(arrays, start: jax.Array, size: int, function: Callable):
    """`arrays` with `function` applied to their entries start..start+size, in place if compiled."""
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
