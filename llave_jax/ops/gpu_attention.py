"""Attention on GPUs: flash attention for packed rows in Pallas Triton, forward and backward.

Each block of queries reads only the run of key blocks in which its segments lie, and in the gradients of
keys and values each block of keys reads only the run of query blocks. So a segment costs the same in a
long row as in a row of its own. Scores are never written to memory: FlashAttention-2 (Dao, arXiv
2307.08691), algorithms 1 and 2.
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
from jaxtyping import Array, Bool, Float, Float32, Int, Int32

from llave_jax.ops.constants import LOG2_E, MASKED, RESIDUALS

# The segment id of the positions after the end of a row that a block covers. Segment ids are not negative.
OUTSIDE = -1
# The least size of each dimension in Triton's matrix products.
MIN_DOT_SIZE = 16


def triton_attention(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T J E"],
    value: Float[Array, "B T J E"],
    segment_ids: Int[Array, "B T"],
    *,
    causal: bool,
    tiles: Tiles | None = None,
    interpret: bool = False,
) -> Float[Array, "B T H E"]:
    """Flash attention in Triton.

    Args:
      query, key, value, segment_ids, causal: as for `ops.attention.attention`.
      tiles: sizes of the kernels' blocks; None: chosen by head size and dtype.
      interpret: run the kernels in Pallas's interpreter, slowly, on any platform.

    Returns:
      [B, T, H, E] in the query's dtype.

    References: Dao, FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
    """
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
    """The blocks of one step of a kernel's loop, and how Triton runs it.

    Attributes:
      query, key: tokens of a block of queries, of keys.
      warps: warps of a program.
      stages: steps of the loop whose loads are in flight at once.
    """

    query: int
    key: int
    warps: int
    stages: int


@dataclasses.dataclass(frozen=True)
class Tiles:
    """The tiles of the three kernels.

    Attributes:
      forward: of the forward kernel.
      queries: of the kernel for the gradient of queries.
      keys: of the kernel for the gradients of keys and values.
    """

    forward: Tile
    queries: Tile
    keys: Tile

    @classmethod
    def of(cls, head_dim: int, item_bytes: int) -> Tiles:
        """Tiles that fit into 99 KiB of shared memory, which all GPUs since the A10 have, and into registers.

        A program keeps one block and loops over the blocks of the other side. Its accumulators, in
        registers, are as large as the block that it keeps.

        Args:
          head_dim: size of a head.
          item_bytes: bytes of a number of queries, keys and values.

        Returns:
          The tiles.
        """
        kept, looped = (64, 32) if item_bytes > 2 else (128, 64)
        warps = 4 if head_dim <= 64 else 8
        return cls(
            Tile(kept, looped, warps, 3 if head_dim <= 96 else 2),
            Tile(kept, looped // 2, warps, 2),
            Tile(looped // 2, kept, warps, 2),
        )


def _parts(head_dim: int) -> tuple[tuple[int, int], ...]:
    """(start, width) of the parts into which a head is cut, because Triton's arrays have powers of two.

    A head of 72 is a part of 64 and one of 16, half empty; padded to 128 it would cost more.
    """
    parts, start = [], 0
    while start < head_dim:
        width = max(MIN_DOT_SIZE, 1 << (head_dim - start).bit_length() - 1)
        parts.append((start, width))
        start += width
    return tuple(parts)


def padded_head_dim(head_dim: int) -> int:
    """The size of a head in the kernels' products.

    Args:
      head_dim: size of a head.

    Returns:
      The size with padding: 72 becomes 64 + 16.
    """
    return sum(_parts(head_dim)[-1])


@dataclasses.dataclass(frozen=True)
class Settings:
    """The constants that a kernel is compiled with.

    Attributes:
      length: tokens of a row.
      head_dim: size of a head.
      repeats: query heads that share keys.
      causal: whether a token sees none of the tokens after it.
      scale: factor of the scores.
      tiles: sizes of the kernels' blocks.
      interpret: whether kernels run in Pallas's interpreter.
    """

    length: int
    head_dim: int
    repeats: int
    causal: bool
    scale: float
    tiles: Tiles
    interpret: bool

    @property
    def parts(self) -> tuple[tuple[int, int], ...]:
        """(start, width) of the parts of a head."""
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
        """Runs a kernel, with one program for each block of queries (or of keys), head and row.

        Args:
          kernel: called with these settings, then the refs of runs, ids, `inputs` and `outputs`.
          tile: its blocks.
          name: the end of its name in profiles and in the compiled program.
          ids: int32 [R, T], of `_distinct`.
          inputs, outputs: (key in `specs`, array or its shape).
          of_keys: programs are for blocks of keys instead of queries.

        Returns:
          The outputs.
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
        """The part of each array that a program can read: one row of its head, or of `repeats` query heads.

        Kernels choose the tokens themselves. The refs are padded to whole blocks of tokens and to whole
        parts of a head, so they can extend beyond the arrays: loads and stores there need a mask.

        Args:
          tile: the kernel's blocks.
          repeats: query heads of a program; None: one.

        Returns:
          Block specs by kind of array: "runs", "ids", "query" (also for results), "key" (also for values)
          and "statistic".
        """
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


def _distinct(segment_ids: Int[Array, "R T"]) -> Int32[Array, "R T"]:
    """Gives each run of MIN_DOT_SIZE unused tokens a segment of its own.

    As one segment, all blocks that hold unused tokens would read each other.
    """
    unused = jnp.arange(segment_ids.shape[1], dtype=jnp.int32) // MIN_DOT_SIZE
    distinct = jnp.where(segment_ids > 0, segment_ids, jnp.max(segment_ids) + 1 + unused)
    return distinct.astype(jnp.int32)


def _needed(
    ids: Int[Array, "R T"], tile: Tile, *, causal: bool
) -> Bool[Array, "R query_blocks key_blocks"]:
    """Whether a pair of blocks may hold a visible score.

    Two blocks are compared by their lowest and highest ids, so segments in any order are safe.
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


def _runs(needed: Bool[Array, "*blocks others"]) -> Int32[Array, "*blocks 2"]:
    """The first needed block of the other side, and the one after the last.

    At least one is needed, because every token sees itself.
    """
    first = jnp.argmax(needed, axis=-1)
    end = needed.shape[-1] - jnp.argmax(needed[..., ::-1], axis=-1)
    return jnp.stack((first, end), axis=-1).astype(jnp.int32)


def visited_scores(segment_ids: np.ndarray, *, causal: bool, head_dim: int) -> np.ndarray:
    """Counts the scores of one head that the forward kernel computes in bfloat16.

    Args:
      segment_ids: int32 [..., T].
      causal: whether a token sees none of the tokens after it.
      head_dim: size of a head.

    Returns:
      int64 [...], scores of each row, masked ones of visited blocks included.
    """
    tile = Tiles.of(head_dim, 2).forward
    rows = jnp.asarray(segment_ids.reshape(-1, segment_ids.shape[-1]))
    # Rows one at a time, because `_distinct` numbers unused tokens after the highest id of all its rows.
    runs = jax.vmap(lambda row: _runs(_needed(_distinct(row[None]), tile, causal=causal))[0])(rows)
    steps = np.asarray(runs[..., 1] - runs[..., 0]).sum(1, dtype=np.int64)
    return (steps * (tile.query * tile.key)).reshape(segment_ids.shape[:-1])


def _attend_without_rule(
    settings: Settings,
    query: Float[Array, "R T H E"],
    key: Float[Array, "R T J E"],
    value: Float[Array, "R T J E"],
    ids: Int32[Array, "R T"],
) -> Float[Array, "R T H E"]:
    return _forward(settings, query, key, value, ids)[0]


_attend = jax.custom_vjp(_attend_without_rule, nondiff_argnums=(0,))


def _attend_forward(settings, query, key, value, ids):
    out, log_sum = _forward(settings, query, key, value, ids)
    out, log_sum = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum, RESIDUALS)
    return out, (query, key, value, ids, out, log_sum)


def _attend_backward(settings, residuals, cotangent):
    query, key, value, ids, out, log_sum = residuals
    return *_backward(settings, query, key, value, ids, out, log_sum, cotangent), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    settings: Settings,
    query: Float[Array, "R T H E"],
    key: Float[Array, "R T J E"],
    value: Float[Array, "R T J E"],
    ids: Int32[Array, "R T"],
) -> tuple[Float[Array, "R T H E"], Float32[Array, "R H T"]]:
    """The results, and log2 of the softmax's denominators."""
    rows, length, heads, _ = query.shape
    out, log_sum = settings.call(
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
    return out, log_sum


def _backward(
    settings: Settings,
    query: Float[Array, "R T H E"],
    key: Float[Array, "R T J E"],
    value: Float[Array, "R T J E"],
    ids: Int32[Array, "R T"],
    out: Float[Array, "R T H E"],
    log_sum: Float32[Array, "R H T"],
    cotangent: Float[Array, "R T H E"],
) -> tuple[Float[Array, "R T H E"], Float[Array, "R T J E"], Float[Array, "R T J E"]]:
    """The gradients of queries, keys and values."""
    delta = jnp.sum(out.astype(jnp.float32) * cotangent.astype(jnp.float32), axis=-1)
    inputs = [
        *(("query", query), ("key", key), ("key", value), ("query", cotangent)),
        *(("statistic", log_sum), ("statistic", delta.swapaxes(1, 2))),
    ]
    of_query = ("query", jax.ShapeDtypeStruct(query.shape, query.dtype))
    of_key = ("key", jax.ShapeDtypeStruct(key.shape, key.dtype))
    tiles = settings.tiles
    (query_gradient,) = settings.call(
        _query_gradient_kernel, tiles.queries, "bwd_queries", ids, inputs, [of_query]
    )
    key_gradient, value_gradient = settings.call(
        _key_gradients_kernel, tiles.keys, "bwd_keys", ids, inputs, [of_key] * 2, of_keys=True
    )
    return query_gradient, key_gradient, value_gradient


class _Block:
    """One block of a row's tokens: reads and writes arrays there, part by part of a head.

    Tokens after the end of the row read as zeros with the segment OUTSIDE, and are not written.
    """

    def __init__(self, settings: Settings, ids: Any, number: jax.Array, size: int):
        self.tokens = pl.ds(number * size, size)
        self.positions = number * size + jnp.arange(size, dtype=jnp.int32)
        # None if all tokens lie inside the row: a load without a mask is faster.
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
        """The parts of an array [T, E], or of head `head` of an array [T, heads, E]."""
        return [
            self._load(ref.at[(self.tokens, *head, columns)], mask, 0.0)
            for columns, mask in self.parts
        ]

    def store(self, ref: Any, values: Sequence[jax.Array]) -> None:
        """Writes the parts of an array [T, E]."""
        for (columns, mask), value in zip(self.parts, values, strict=True):
            plgpu.store(ref.at[self.tokens, columns], value.astype(ref.dtype), mask=mask)

    def load_statistic(self, ref: Any, *head: Any) -> jax.Array:
        """The block's numbers of an array [T], or of head `head` of an array [heads, T]."""
        return self._load(ref.at[(*head, self.tokens)], self.inside, 0.0)

    def store_statistic(self, ref: Any, value: jax.Array) -> None:
        """Writes the block's numbers of an array [T]."""
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
    """Scores are [keys, queries] here, the order that both products need."""
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

    # All query heads that share these keys, one after another.
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
    """Scores [queries, keys], or [keys, queries], times log2(e); MASKED where the key is not visible."""

    def compare(of_query: jax.Array, of_key: jax.Array, how: Callable) -> jax.Array:
        if keys_first:
            return how(of_query[None], of_key[:, None])
        return how(of_query[:, None], of_key[None])

    visible = compare(queries.ids, keys.ids, jnp.equal)
    if settings.causal:
        visible &= compare(queries.positions, keys.positions, jnp.greater_equal)
    return jnp.where(visible, products * (settings.scale * LOG2_E), MASKED)


def _product(a: jax.Array, b: jax.Array, *, trans_b: bool = False) -> jax.Array:
    """The matrix product, summed in float32."""
    # By default the tensor cores would round float32 factors to TF32.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return plgpu.dot(a, b, trans_b=trans_b, precision=precision)


def _products(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> jax.Array:
    """a b^T, summed over the parts of a head."""
    products = [_product(x, y, trans_b=True) for x, y in zip(a, b, strict=True)]
    return functools.reduce(jnp.add, products)


def _add_products(
    sums: Sequence[jax.Array], weights: jax.Array, values: Sequence[jax.Array]
) -> tuple[jax.Array, ...]:
    """sums + weights @ values, part by part."""
    return tuple(
        x + _product(weights.astype(y.dtype), y) for x, y in zip(sums, values, strict=True)
    )


def _zeros(settings: Settings, tokens: int) -> tuple[jax.Array, ...]:
    """Accumulators [tokens, width] for the parts of a head."""
    return tuple(jnp.zeros((tokens, width), jnp.float32) for _, width in settings.parts)
