"""Attention on GPUs: flash attention for packed rows in Pallas Triton, forward and backward.

Each block of queries reads only the run of key blocks in which its segments lie (and each block of
keys that of queries), so that what is packed into a row costs what it would cost alone. After
FlashAttention-2 (Dao 2023, alg. 1 and 2): scores are never written to memory.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from llave_jax.ops.constants import LOG2_E, MASKED, RESIDUALS

# Segment of what a block holds beyond the end of a row; real ones are not negative.
OUTSIDE = -1
# Triton's products want at least this many in each dimension.
SMALLEST = 16


def triton_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    causal: bool,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> jax.Array:
    """As `ops.attention.attention`; `tiles` are chosen by head size and dtype unless given, and
    `interpret` runs the kernels on any platform, slowly."""
    _, length, heads, head_dim = query.shape
    settings = Settings(
        length=length,
        head_dim=head_dim,
        repeats=heads // key.shape[2],
        causal=causal,
        scale=1.0 / math.sqrt(head_dim),
        tiles=tiles or Tiles.of(head_dim, query.dtype.itemsize),
        interpret=interpret,
    )
    return _attend(settings, query, key, value, _distinct(segment_ids))


class Tile(NamedTuple):
    """Queries and keys of a step of a kernel's loop, and how Triton runs it."""

    query: int
    key: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Of the forward kernel, and of those for the gradients of queries and of keys and values."""

    forward: Tile
    queries: Tile
    keys: Tile

    @classmethod
    def of(cls, head_dim: int, item_bytes: int) -> Tiles:
        """What fits into the 99 KiB of shared memory that GPUs since the A10 have, and into their
        registers: accumulators are as large as the block that stays."""
        stays, passes = (64, 32) if item_bytes > 2 else (128, 64)
        warps = 4 if head_dim <= 64 else 8
        return cls(
            Tile(stays, passes, warps, 3 if head_dim <= 96 else 2),
            Tile(stays, passes // 2, warps, 2),
            Tile(passes // 2, stays, warps, 2),
        )


def _parts(head_dim: int) -> tuple[tuple[int, int], ...]:
    """Starts and widths of the pieces a head is worked on in, as Triton's arrays have powers of two:
    72 is 64 and 16 (half of it empty), not 128."""
    parts, start = [], 0
    while start < head_dim:
        width = max(SMALLEST, 1 << (head_dim - start).bit_length() - 1)
        parts.append((start, width))
        start += width
    return tuple(parts)


def padded_head_dim(head_dim: int) -> int:
    """The size that a head has for the kernels' products."""
    return sum(_parts(head_dim)[-1])


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the kernels are compiled for: tokens of a row, size of a head, query heads that share keys."""

    length: int
    head_dim: int
    repeats: int
    causal: bool
    scale: float
    tiles: Tiles
    interpret: bool

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        return _parts(self.head_dim)

    def call(
        self,
        kernel: Callable[..., None],
        tile: Tile,
        name: str,
        ids: jax.Array,
        inputs: Sequence[tuple[str, jax.Array]],
        outputs: Sequence[tuple[str, jax.ShapeDtypeStruct]],
        *,
        of_keys: bool = False,
    ) -> tuple[jax.Array, ...]:
        """Runs a kernel: a program for each block of queries (or of keys), head and row.

        Args:
          inputs, outputs: arrays with their names in `specs`; the kernel also gets runs and ids.
        """
        needed = _needed(ids, tile, causal=self.causal)
        runs = _runs(needed.swapaxes(1, 2) if of_keys else needed)
        specs = self.specs(tile, self.repeats if of_keys else None)
        inputs = [("runs", runs), ("ids", ids), *inputs]
        heads = dict(inputs)["key" if of_keys else "query"].shape[2]
        outputs_of = pl.pallas_call(
            functools.partial(kernel, self),
            grid=(runs.shape[1], heads, len(ids)),
            in_specs=[specs[spec] for spec, _ in inputs],
            out_specs=[specs[spec] for spec, _ in outputs],
            out_shape=[shape for _, shape in outputs],
            compiler_params=plgpu.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
            name=f"triton_{'causal' if self.causal else 'full'}_{name}",
            interpret=self.interpret,
        )
        return tuple(outputs_of(*(array for _, array in inputs)))

    def specs(self, tile: Tile, repeats: int | None = None) -> dict[str, pl.BlockSpec]:
        """What a program sees of arrays: whole rows of its head, or of its `repeats` query heads. Which
        tokens it reads the kernels say; the refs are longer and wider than arrays where blocks are."""
        tokens = math.lcm(tile.query, tile.key)
        tokens *= -(-self.length // tokens)
        width = padded_head_dim(self.head_dim)
        groups = self.repeats if repeats is None else 1
        return {
            "runs": pl.BlockSpec((None, None, 2), lambda b, h, r: (r, b, 0)),
            "ids": pl.BlockSpec((None, tokens), lambda b, h, r: (r, 0)),
            "query": pl.BlockSpec((None, tokens, repeats, width), lambda b, h, r: (r, 0, h, 0)),
            "key": pl.BlockSpec(
                (None, tokens, None, width), lambda b, h, r: (r, 0, lax.div(h, groups), 0)
            ),
            "statistic": pl.BlockSpec((None, repeats, tokens), lambda b, h, r: (r, h, 0)),
        }


def _distinct(segment_ids: jax.Array) -> jax.Array:
    """Segments in which unused tokens are apart, SMALLEST by SMALLEST: one of all of them would make
    every block that has some read every other."""
    unused = jnp.arange(segment_ids.shape[1], dtype=jnp.int32) // SMALLEST
    return jnp.where(segment_ids > 0, segment_ids, jnp.max(segment_ids) + 1 + unused)


def _needed(ids: jax.Array, tile: Tile, *, causal: bool) -> jax.Array:
    """Which pairs of blocks may hold a score that the mask leaves: bool [R, query blocks, key blocks].

    Blocks are compared by their lowest and highest ids, so segments in no order are safe.
    """

    def extremes(block: int) -> tuple[jax.Array, jax.Array]:
        padded = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % block)), mode="edge")
        padded = padded.reshape(len(ids), -1, block)
        return padded.min(2), padded.max(2)

    lowest_query, highest_query = extremes(tile.query)
    lowest_key, highest_key = extremes(tile.key)
    needed = lowest_query[:, :, None] <= highest_key[:, None]
    needed &= highest_query[:, :, None] >= lowest_key[:, None]
    if causal:
        last_query = (jnp.arange(needed.shape[1]) + 1) * tile.query - 1
        needed &= last_query[:, None] >= jnp.arange(needed.shape[2]) * tile.key
    return needed


def _runs(needed: jax.Array) -> jax.Array:
    """From [..., B] the first of B that is needed and the one after the last: int32 [..., 2]. There is
    always one, as all tokens see themselves."""
    first = jnp.argmax(needed, axis=-1)
    end = needed.shape[-1] - jnp.argmax(needed[..., ::-1], axis=-1)
    return jnp.stack((first, end), axis=-1).astype(jnp.int32)


def visited_scores(segment_ids: np.ndarray, *, causal: bool, head_dim: int) -> np.ndarray:
    """Scores of one head that the forward kernel computes in bfloat16 for rows [..., T]: [...]."""
    tile = Tiles.of(head_dim, 2).forward
    rows = jnp.asarray(segment_ids.reshape(-1, segment_ids.shape[-1]))
    # A row at a time: the ids of unused tokens come after a row's own.
    runs = jax.vmap(lambda row: _runs(_needed(_distinct(row[None]), tile, causal=causal))[0])(rows)
    steps = np.asarray(runs[..., 1] - runs[..., 0]).sum(1, dtype=np.int64)
    return (steps * (tile.query * tile.key)).reshape(segment_ids.shape[:-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings, query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array
) -> jax.Array:
    """Queries [R, T, H, D] and keys and values [R, T, G, D] to results [R, T, H, D]."""
    return _forward(settings, query, key, value, ids)[0]


def _attend_forward(settings, query, key, value, ids):
    out, log_sum = _forward(settings, query, key, value, ids)
    out, log_sum = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum, RESIDUALS)
    return out, (query, key, value, ids, out, log_sum)


def _attend_backward(settings, residuals, cotangent):
    return *_backward(settings, *residuals, cotangent), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    settings: Settings, query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array
) -> tuple[jax.Array, ...]:
    """Results [R, T, H, D] and log2 of the softmax's sums, float32 [R, H, T]."""
    rows, length, heads, _ = query.shape
    return settings.call(
        _forward_kernel,
        settings.tiles.forward,
        "fwd",
        ids,
        [("query", query), ("key", key), ("key", value)],
        [
            ("query", jax.ShapeDtypeStruct(query.shape, query.dtype)),
            ("statistic", jax.ShapeDtypeStruct((rows, heads, length), jnp.float32)),
        ],
    )


def _backward(settings, query, key, value, ids, out, log_sum, cotangent) -> tuple[jax.Array, ...]:
    """Gradients of queries, keys and values."""
    delta = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    inputs = [
        *(("query", query), ("key", key), ("key", value), ("query", cotangent)),
        *(("statistic", log_sum), ("statistic", delta.swapaxes(1, 2))),
    ]
    of_query = ("query", jax.ShapeDtypeStruct(query.shape, query.dtype))
    of_key = ("key", jax.ShapeDtypeStruct(key.shape, key.dtype))
    tiles = settings.tiles
    query_gradient = settings.call(
        _query_gradient_kernel, tiles.queries, "bwd_queries", ids, inputs, [of_query]
    )
    key_gradients = settings.call(
        _key_gradients_kernel, tiles.keys, "bwd_keys", ids, inputs, [of_key] * 2, of_keys=True
    )
    return *query_gradient, *key_gradients


class _Block:
    """The tokens of one block of a row, and how to read and write arrays at them. What is beyond the
    end of the row is read as zeros of no segment, and not written."""

    def __init__(self, settings: Settings, ids: Any, number: jax.Array, size: int):
        self.tokens = pl.ds(number * size, size)
        self.positions = number * size + jnp.arange(size, dtype=jnp.int32)
        # None where all are inside: loads without a mask are faster.
        self.inside = None if settings.length % size == 0 else self.positions < settings.length
        self.ids = self._load(ids.at[self.tokens], self.inside, OUTSIDE)
        self.parts = []
        for start, width in settings.parts:
            mask = None if self.inside is None else self.inside[:, None]
            if start + width > settings.head_dim:
                columns = (start + jnp.arange(width) < settings.head_dim)[None]
                mask = columns if mask is None else mask & columns
            self.parts.append((pl.ds(start, width), mask))

    def _load(self, ref: Any, mask: jax.Array | None, other: int | float) -> jax.Array:
        return plgpu.load(ref, mask=mask, other=None if mask is None else other)

    def load(self, ref: Any, *head: Any) -> list[jax.Array]:
        """Parts of an array [T, (heads,) D]."""
        return [
            self._load(ref.at[(self.tokens, *head, columns)], mask, 0.0)
            for columns, mask in self.parts
        ]

    def store(self, ref: Any, values: Sequence[jax.Array]) -> None:
        for (columns, mask), value in zip(self.parts, values, strict=True):
            plgpu.store(ref.at[self.tokens, columns], value.astype(ref.dtype), mask=mask)

    def load_statistic(self, ref: Any, *head: Any) -> jax.Array:
        return self._load(ref.at[(*head, self.tokens)], self.inside, 0.0)

    def store_statistic(self, ref: Any, value: jax.Array) -> None:
        plgpu.store(ref.at[self.tokens], value, mask=self.inside)


def _forward_kernel(settings, runs, ids, query, key, value, out, log_sum):
    tile = settings.tiles.forward
    queries = _Block(settings, ids, pl.program_id(0), tile.query)
    q = queries.load(query)

    def visit(number, carry):
        weighted, highest, total = carry
        keys = _Block(settings, ids, number, tile.key)
        scores = _scores(settings, queries, keys, _products(q, keys.load(key)))
        new_highest = jnp.maximum(highest, jnp.max(scores, axis=1))
        weights = jnp.exp2(scores - new_highest[:, None])
        shrink = jnp.exp2(highest - new_highest)
        total = total * shrink + jnp.sum(weights, axis=1)
        weighted = tuple(
            sums * shrink[:, None] + _product(weights.astype(v.dtype), v)
            for sums, v in zip(weighted, keys.load(value), strict=True)
        )
        return weighted, new_highest, total

    highest = jnp.full((tile.query,), MASKED, jnp.float32)
    start = (_zeros(settings, tile.query), highest, jnp.zeros_like(highest))
    weighted, highest, total = lax.fori_loop(runs[0], runs[1], visit, start)
    queries.store(out, [sums / total[:, None] for sums in weighted])
    queries.store_statistic(log_sum, highest + jnp.log2(total))


def _query_gradient_kernel(
    settings, runs, ids, query, key, value, cotangent, log_sum, delta, query_gradient
):
    tile = settings.tiles.queries
    queries = _Block(settings, ids, pl.program_id(0), tile.query)
    q, g = queries.load(query), queries.load(cotangent)
    log_sums = queries.load_statistic(log_sum)[:, None]
    deltas = queries.load_statistic(delta)[:, None]

    def visit(number, sums):
        keys = _Block(settings, ids, number, tile.key)
        k = keys.load(key)
        weights = jnp.exp2(_scores(settings, queries, keys, _products(q, k)) - log_sums)
        change = weights * (_products(g, keys.load(value)) - deltas)
        return _add_products(sums, change, k)

    sums = lax.fori_loop(runs[0], runs[1], visit, _zeros(settings, tile.query))
    queries.store(query_gradient, [x * settings.scale for x in sums])


def _key_gradients_kernel(
    settings, runs, ids, query, key, value, cotangent, log_sum, delta, key_gradient, value_gradient
):
    """Scores are [keys, queries] here, as both products need them."""
    tile = settings.tiles.keys
    keys = _Block(settings, ids, pl.program_id(0), tile.key)
    k, v = keys.load(key), keys.load(value)
    first, blocks = runs[0], runs[1] - runs[0]

    def visit(number, sums):
        head = lax.div(number, blocks)
        queries = _Block(settings, ids, first + lax.rem(number, blocks), tile.query)
        q, g = queries.load(query, head), queries.load(cotangent, head)
        scores = _scores(settings, queries, keys, _products(k, q), keys_first=True)
        weights = jnp.exp2(scores - queries.load_statistic(log_sum, head)[None])
        value_sums = _add_products(sums[1], weights, g)
        change = weights * (_products(v, g) - queries.load_statistic(delta, head)[None])
        return _add_products(sums[0], change, q), value_sums

    # The heads of the group one after the other.
    start = (_zeros(settings, tile.key),) * 2
    key_sums, value_sums = lax.fori_loop(0, settings.repeats * blocks, visit, start)
    keys.store(key_gradient, [x * settings.scale for x in key_sums])
    keys.store(value_gradient, value_sums)


def _scores(
    settings: Settings,
    queries: _Block,
    keys: _Block,
    products: jax.Array,
    *,
    keys_first: bool = False,
) -> jax.Array:
    """[queries, keys], or [keys, queries]: scores for powers of two, MASKED where none is seen."""

    def compare(of_query: jax.Array, of_key: jax.Array, how: Callable) -> jax.Array:
        if keys_first:
            return how(of_query[None], of_key[:, None])
        return how(of_query[:, None], of_key[None])

    visible = compare(queries.ids, keys.ids, jnp.equal)
    if settings.causal:
        visible &= compare(queries.positions, keys.positions, jnp.greater_equal)
    return jnp.where(visible, products * (settings.scale * LOG2_E), MASKED)


def _product(a: jax.Array, b: jax.Array, *, trans_b: bool = False) -> jax.Array:
    """Matrix product, summed in float32."""
    # float32 must not be rounded to TF32 on its way.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, trans_b=trans_b, precision=precision)


def _products(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    """a b^T over all parts of a head."""
    return sum(_product(x, y, trans_b=True) for x, y in zip(a, b, strict=True))


def _add_products(
    sums: Sequence[jax.Array], weights: jax.Array, values: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """sums + weights values, part by part."""
    return tuple(
        x + _product(weights.astype(y.dtype), y) for x, y in zip(sums, values, strict=True)
    )


def _zeros(settings: Settings, tokens: int) -> tuple[jax.Array, ...]:
    return tuple(jnp.zeros((tokens, width), jnp.float32) for _, width in settings.parts)
