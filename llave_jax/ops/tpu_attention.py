"""Attention on TPUs: sparse flash ("splash") attention for packed rows, forward and backward.

The rows of a device are cut into blocks of queries and blocks of keys. A list made from the segment ids
(`plan_visits`) names the pairs of blocks that hold a visible score. Each step of a kernel's grid visits
one pair, for all heads that share the keys. So a segment costs the same in a long row as in a row of its
own. Scores are never written to memory: FlashAttention (Dao et al., arXiv 2205.14135), algorithms 1
and 4.

Inside, arrays are [R, H, T, E]: rows, heads, tokens, size of a head. XLA's matrix products deliver this
order without a copy.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Float32, Int, Int32

from llave_jax.ops.constants import LOG2_E, MASKED, RESIDUALS

# Width of a vector register. The sizes of blocks are multiples of it.
LANES = 128
# Tokens of a block. Larger query blocks waste work on masked scores. Smaller key blocks make the steps of
# the grid too short for their fixed cost.
QUERY_BLOCK = 256
KEY_BLOCK = 512
# A row whose padded length is at most this is a single block of keys.
MAX_SINGLE_BLOCK = 768
# Query heads of one step. The kernel's code is unrolled over them, and each needs vector memory.
MAX_HEADS = 8


def splash_attention(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T J E"],
    value: Float[Array, "B T J E"],
    segment_ids: Int[Array, "B T"],
    *,
    causal: bool,
    max_segment_length: int | None = None,
    interpret: Any = False,
) -> Float[Array, "B T H E"]:
    """Splash attention: sparse flash attention in Pallas for TPUs.

    Args:
      query, key, value, segment_ids, causal, max_segment_length: as for `ops.attention.attention`.
      interpret: run the kernels in Pallas's interpreter, slowly, on any platform: True, or
        `pltpu.InterpretParams`.

    Returns:
      [B, T, H, E] in the query's dtype.

    References: Dao et al., FlashAttention (arXiv 2205.14135), algorithms 1 and 4.
    """
    rows, length, heads, head_dim = query.shape
    # A group of more query heads than one step serves is split, with a copy of its keys for each part.
    # There should be at least two parts: a chip with two cores gives each core its own.
    groups = key.shape[2]
    splits = _splits(groups, heads // groups)
    key, value = (jnp.repeat(x, splits, axis=2) for x in (key, value))
    blocks = Blocks.of(length)
    settings = Settings(
        blocks=blocks,
        heads=Heads.of(heads // (groups * splits), groups * splits),
        causal=causal,
        scale=1.0 / math.sqrt(head_dim),
        slots=_slots(rows, blocks, causal, max_segment_length),
        interpret=interpret,
    )

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, blocks.length - length), (0, 0)))

    plan = plan_visits(segment_ids, causal=causal, max_segment_length=max_segment_length)
    out = _attend(settings, pad(query), pad(key), pad(value), plan)
    return out[:, :, :length].swapaxes(1, 2)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How rows are cut into blocks.

    Attributes:
      query: tokens of a block of queries.
      key: tokens of a block of keys, a multiple of `query`.
      length: tokens of a row, padded to whole blocks.
    """

    query: int
    key: int
    length: int

    @classmethod
    def of(cls, length: int) -> Blocks:
        """The blocks for rows of one length.

        Args:
          length: tokens of a row, before padding.

        Returns:
          One block of keys for a short row; otherwise blocks of KEY_BLOCK keys.
        """
        padded = -(-length // LANES) * LANES
        key = padded if padded <= MAX_SINGLE_BLOCK else KEY_BLOCK
        query = QUERY_BLOCK if key % QUERY_BLOCK == 0 else LANES
        return cls(query, key, -(-length // key) * key)

    @property
    def queries(self) -> int:
        """Blocks of queries in a row."""
        return self.length // self.query

    @property
    def keys(self) -> int:
        """Blocks of keys in a row."""
        return self.length // self.key


def _splits(groups: int, repeats: int) -> int:
    """Into how many parts to split each group, so that a part has at most MAX_HEADS query heads."""
    fits = [n for n in range(1, repeats + 1) if repeats % n == 0 and repeats // n <= MAX_HEADS]
    return next((n for n in fits if groups * n > 1), fits[0])


@dataclasses.dataclass(frozen=True)
class Heads:
    """How heads are distributed over the steps of a kernel.

    Attributes:
      repeats: query heads of a group, which share its keys.
      at_once: groups that one step serves.
      chunks: steps that serve all groups once.
    """

    repeats: int
    at_once: int
    chunks: int

    @classmethod
    def of(cls, repeats: int, groups: int) -> Heads:
        """The largest `at_once` that leaves two chunks and serves at most half of MAX_HEADS query heads.

        The other half is room for keys: with one head to a group, each head brings its own.

        Args:
          repeats: query heads of a group.
          groups: groups, which each share keys.

        Returns:
          The distribution; with one group, or groups of too many query heads, a chunk is one group.
        """
        sizes = [n for n in range(1, groups) if groups % n == 0 and n * repeats <= MAX_HEADS // 2]
        at_once = max(sizes, default=1)
        return cls(repeats, at_once, groups // at_once)

    @property
    def queries(self) -> int:
        """Query heads that one step serves."""
        return self.at_once * self.repeats


class Plan(NamedTuple):
    """The pairs of blocks to visit: query block by query block, each with ascending key blocks.

    The tables have room for all pairs that `max_segment_length` allows. Entries from `count` on hold no
    meaning.

    Attributes:
      count: int32 scalar, pairs to visit.
      row, query, key: int32 [visits], the row of a pair and the numbers of its blocks in that row.
      slot: int32 [visits], the slot of scratch memory that sums the gradients of the key block.
      first: int32 [visits], 1 where the visits of a query block begin.
      last: int32 [visits], 1 where the visits of a query block end; 2 there if its results are to be
        NaN, because a segment is longer than `max_segment_length`.
      key_first, key_last: int32 [visits], 1 for the first and the last visit of a key block.
      done_row, done_key: int32 [visits], the row and number of the key block that is the next to be
        visited for the last time.
      ids: int32 [R, T], the segments of tokens, with segments of their own for unused tokens.
    """

    count: Int32[Array, ""]
    row: Int32[Array, " visits"]
    query: Int32[Array, " visits"]
    key: Int32[Array, " visits"]
    slot: Int32[Array, " visits"]
    first: Int32[Array, " visits"]
    last: Int32[Array, " visits"]
    key_first: Int32[Array, " visits"]
    key_last: Int32[Array, " visits"]
    done_row: Int32[Array, " visits"]
    done_key: Int32[Array, " visits"]
    ids: Int32[Array, "R T"]


def plan_visits(
    segment_ids: Int[Array, "R T"], *, causal: bool, max_segment_length: int | None = None
) -> Plan:
    """Lists the pairs of blocks that hold a visible score.

    Two blocks are compared by their lowest and highest segment ids. So segments in any order are safe.
    If segments ascend along a row (as packing leaves them), every listed pair holds a visible score.
    Unused tokens see only the unused tokens of their own block of keys.

    Args:
      segment_ids: int32 [R, T], 0 for unused tokens.
      causal: whether a token sees none of the tokens after it.
      max_segment_length: tokens of the longest segment; segments must then ascend. None: of a row. If a
        longer segment occurs, the output is NaN: scratch memory is sized for `max_segment_length`.

    Returns:
      The plan of the visits.
    """
    rows, length = segment_ids.shape
    blocks = Blocks.of(length)
    ids = jnp.pad(segment_ids, ((0, 0), (0, blocks.length - length)))
    unused = jnp.max(ids) + 1 + jnp.arange(blocks.length, dtype=jnp.int32) // blocks.key
    ids = jnp.where(ids > 0, ids, unused)

    pairs, within = _candidates(rows, blocks, causal, max_segment_length)
    queries, keys = ids.reshape(-1, blocks.query), ids.reshape(-1, blocks.key)
    needed = (queries.min(1)[pairs[:, 0]] <= keys.max(1)[pairs[:, 1]]) & (
        queries.max(1)[pairs[:, 0]] >= keys.min(1)[pairs[:, 1]]
    )
    too_long = jnp.any(needed & ~within)

    # The needed pairs move to the front and keep their order.
    pairs, needed = pairs[within], needed[np.flatnonzero(within)]
    order = jnp.nonzero(needed, size=len(pairs), fill_value=0)[0]
    count = jnp.sum(needed, dtype=jnp.int32)
    query, key = (jnp.asarray(numbers)[order] for numbers in pairs.T)
    row = query // blocks.queries
    index = jnp.arange(len(pairs), dtype=jnp.int32)
    is_real = index < count
    first = (index == 0) | (query != jnp.roll(query, 1))
    last = (index == count - 1) | (query != jnp.roll(query, -1))
    num_keys = rows * blocks.keys
    first_visit = jnp.full(num_keys, len(pairs)).at[key].min(jnp.where(is_real, index, len(pairs)))
    last_visit = jnp.full(num_keys, -1).at[key].max(jnp.where(is_real, index, -1))
    key_last = last_visit[key] == index
    done = lax.cummin(jnp.where(key_last, index, len(pairs) - 1), reverse=True)
    return Plan(
        count,
        row,
        query % blocks.queries,
        key % blocks.keys,
        key % _slots(rows, blocks, causal, max_segment_length),
        first.astype(jnp.int32),
        jnp.where(last & too_long, 2, last.astype(jnp.int32)),
        (first_visit[key] == index).astype(jnp.int32),
        key_last.astype(jnp.int32),
        row[done],
        key[done] % blocks.keys,
        ids,
    )


@functools.lru_cache(maxsize=64)
def _candidates(
    rows: int, blocks: Blocks, causal: bool, max_segment_length: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Pairs of blocks [pairs, 2] in which a query can see a key, by their numbers in the device's rows.

    Also returns bool [pairs]: whether two tokens of a segment of `max_segment_length` tokens can lie in
    the two blocks.
    """
    query = np.arange(blocks.queries)[:, None] * blocks.query
    key = np.arange(blocks.keys) * blocks.key
    last_query, last_key = query + blocks.query - 1, key + blocks.key - 1
    visible = np.broadcast_to((key <= last_query) | (not causal), (blocks.queries, blocks.keys))
    pairs = np.argwhere(visible)
    distance = np.maximum(query - last_key, key - last_query)
    within = (distance < (max_segment_length or blocks.length))[visible]
    row = np.arange(rows)[:, None, None] * [blocks.queries, blocks.keys]
    return (row + pairs).reshape(-1, 2).astype(np.int32), np.tile(within, rows)


@functools.lru_cache(maxsize=64)
def _slots(rows: int, blocks: Blocks, causal: bool, max_segment_length: int | None) -> int:
    """Slots for the gradients of key blocks: the most that are needed at the same time.

    The slot of a key block is its number modulo the number of slots. So at any visit, the unfinished key
    blocks must lie within a run of this many.
    """
    pairs, within = _candidates(rows, blocks, causal, max_segment_length)
    key = pairs[within, 1]
    highest = np.maximum.accumulate(key)
    last_visit = {int(block): visit for visit, block in enumerate(key)}
    return max(int(highest[visit]) - block + 1 for block, visit in last_visit.items())


def visited_scores(
    segment_ids: np.ndarray, *, causal: bool, max_segment_length: int | None = None
) -> np.ndarray:
    """Counts the scores of one head that the kernels compute.

    Args:
      segment_ids: int32 [..., R, T], the rows of one device in the last two axes.
      causal, max_segment_length: as for `plan_visits`.

    Returns:
      float64 [...], scores of a device's rows, those of visited blocks that are masked included.
    """
    blocks = Blocks.of(segment_ids.shape[-1])

    @jax.jit
    def count(rows: jax.Array) -> jax.Array:
        return plan_visits(rows, causal=causal, max_segment_length=max_segment_length).count

    counts = [count(rows) for rows in segment_ids.reshape(-1, *segment_ids.shape[-2:])]
    scores = np.asarray(counts, np.float64) * (blocks.query * blocks.key)
    return scores.reshape(segment_ids.shape[:-2])


@dataclasses.dataclass(frozen=True)
class Settings:
    """The constants that a kernel is compiled with.

    Attributes:
      blocks: how rows are cut into blocks.
      heads: how heads are distributed over the steps.
      causal: whether a token sees none of the tokens after it.
      scale: factor of the scores.
      slots: of scratch memory for the gradients of key blocks, of `_slots`.
      interpret: as for `splash_attention`.
    """

    blocks: Blocks
    heads: Heads
    causal: bool
    scale: float
    slots: int
    interpret: Any

    @property
    def mask(self) -> str:
        """The part of the kernels' names that says the mask."""
        return "causal" if self.causal else "full"

    def block_spec(self, table: str, heads: int, head_dim: int) -> pl.BlockSpec:
        """The block of tokens that each step of a kernel reads or writes.

        Args:
          table: field of `Plan` that names the block: "query", "key" or "done_key".
          heads: heads of one chunk.
          head_dim: size of a head.

        Returns:
          Spec for an array [R, heads of all chunks, T, E].
        """
        row, block = _table("done_row" if table == "done_key" else "row"), _table(table)
        shape = (None, heads, getattr(self.blocks, table.removeprefix("done_")), head_dim)
        return pl.BlockSpec(shape, lambda c, v, *tables: (tables[row][v], c, tables[block][v], 0))

    def id_specs(self, column: str, row: str) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """The blocks of segment ids that each step of a kernel compares.

        Args:
          column: field of `Plan` that names the block whose ids lie down the rows of registers: "query" or
            "key".
          row: the other one, whose ids lie along their lanes.

        Returns:
          Specs for ids [R, T, LANES] and [R, 1, T].
        """
        rows, of_column, of_row = _table("row"), _table(column), _table(row)
        return (
            pl.BlockSpec(
                (None, getattr(self.blocks, column), LANES),
                lambda c, v, *tables: (tables[rows][v], tables[of_column][v], 0),
            ),
            pl.BlockSpec(
                (None, 1, getattr(self.blocks, row)),
                lambda c, v, *tables: (tables[rows][v], 0, tables[of_row][v]),
            ),
        )

    def statistics_spec(self) -> pl.BlockSpec:
        """For statistics [R, chunks, heads of one chunk, T]: those of the visited block of queries."""
        rows, block = _table("row"), _table("query")
        return pl.BlockSpec(
            (None, None, self.heads.queries, self.blocks.query),
            lambda c, v, *tables: (tables[rows][v], c, 0, tables[block][v]),
        )


def _table(name: str) -> int:
    """The index of a table among the scalar arguments of the kernels."""
    return Plan._fields.index(name) - 1


def _attend_without_rule(
    settings: Settings,
    query: Float[Array, "R H T E"],
    key: Float[Array, "R J T E"],
    value: Float[Array, "R J T E"],
    plan: Plan,
) -> Float[Array, "R H T E"]:
    return _forward(settings, query, key, value, plan)[0]


_attend = jax.custom_vjp(_attend_without_rule, nondiff_argnums=(0,))


def _attend_forward(settings, query, key, value, plan):
    out, log_sum = _forward(settings, query, key, value, plan)
    out, log_sum = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum, RESIDUALS)
    return out, (query, key, value, plan, out, log_sum)


def _attend_backward(settings, residuals, cotangent):
    query, key, value, plan, out, log_sum = residuals
    return *_backward(settings, query, key, value, plan, out, log_sum, cotangent), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    settings: Settings,
    query: Float[Array, "R H T E"],
    key: Float[Array, "R J T E"],
    value: Float[Array, "R J T E"],
    plan: Plan,
) -> tuple[Float[Array, "R H T E"], Float32[Array, "R chunks heads T"]]:
    """The results, and log2 of the softmax's denominators."""
    blocks, heads = settings.blocks, settings.heads
    head_dim = query.shape[-1]
    tables = plan[1:-1]

    queries = settings.block_spec("query", heads.queries, head_dim)
    keys = settings.block_spec("key", heads.at_once, head_dim)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=(heads.chunks, plan.count),
        in_specs=[*settings.id_specs("query", "key"), queries, keys, keys],
        out_specs=[queries, settings.statistics_spec()],
        scratch_shapes=[
            pltpu.VMEM((heads.queries, blocks.query, LANES), jnp.float32),
            pltpu.VMEM((heads.queries, blocks.query, LANES), jnp.float32),
            pltpu.VMEM((heads.queries, blocks.query, head_dim), jnp.float32),
            pltpu.VMEM((blocks.query, blocks.key), jnp.float32),
        ],
    )
    out, log_sum = pl.pallas_call(
        functools.partial(_forward_kernel, settings),
        grid_spec=grid,
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(
                (len(query), heads.chunks, heads.queries, blocks.length), jnp.float32
            ),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name=f"splash_{settings.mask}_fwd",
        interpret=settings.interpret,
    )(*tables, *_columns_and_rows(plan.ids), query, key, value)
    return out, log_sum


def _forward_kernel(
    settings: Settings,
    row,
    query_block,
    key_block,
    slots,
    first,
    last,
    key_first,
    key_last,
    done_row,
    done_key,
    query_ids,
    key_ids,
    query,
    key,
    value,
    out,
    log_sum,
    highest,
    total,
    weighted,
    bias,
):
    """Visits one pair of blocks: scores [queries, keys], a running maximum and sum for each query.

    A query that has seen no key yet has the maximum MASKED, and each masked key adds a weight of 1 to its
    sums. These sums are multiplied by 0 at its first visible key. Every query has one: itself.
    """
    visit = pl.program_id(1)
    blocks, heads = settings.blocks, settings.heads
    head_dim = query.shape[-1]
    to_log2 = settings.scale * LOG2_E

    @pl.when(first[visit] == 1)
    def _():
        highest[...] = jnp.full_like(highest, MASKED)
        total[...] = jnp.zeros_like(total)
        weighted[...] = jnp.zeros_like(weighted)

    visible = _widen(query_ids[...], blocks.key) == key_ids[...]
    if settings.causal:
        ahead = query_block[visit] * blocks.query - key_block[visit] * blocks.key
        shape = (blocks.query, blocks.key)
        position = lax.broadcasted_iota(jnp.int32, shape, 0) + ahead
        visible &= position >= lax.broadcasted_iota(jnp.int32, shape, 1)
    # One mask serves all heads.
    bias[...] = jnp.where(visible, 0.0, MASKED)

    for head in range(heads.queries):
        group = head // heads.repeats
        scores = _product(query[head], key[group], (1, 1)) + bias[...]
        before = highest[head]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        weights = jnp.exp2((scores - _widen(now, blocks.key)) * to_log2)
        decay = jnp.exp2((before - now) * to_log2)
        total[head] = decay * total[head] + jnp.sum(weights, axis=1, keepdims=True)
        highest[head] = now
        added = _product(weights.astype(value.dtype), value[group], (1, 0))
        weighted[head] = weighted[head] * _widen(decay, head_dim) + added

    @pl.when(last[visit] > 0)
    def _():
        tops = _by_lane([highest[head] for head in range(heads.queries)])
        totals = _by_lane([total[head] for head in range(heads.queries)])
        # Lane h of a query is head h. The lanes after the last head are dropped.
        log_sum[...] = jnp.transpose(tops * to_log2 + jnp.log2(totals))[: heads.queries]
        inverse = jnp.where(last[visit] == 1, 1.0, jnp.nan) / totals
        for head in range(heads.queries):
            out[head] = (weighted[head] * inverse[:, head : head + 1]).astype(out.dtype)


def _backward(
    settings: Settings,
    query: Float[Array, "R H T E"],
    key: Float[Array, "R J T E"],
    value: Float[Array, "R J T E"],
    plan: Plan,
    out: Float[Array, "R H T E"],
    log_sum: Float32[Array, "R chunks heads T"],
    cotangent: Float[Array, "R H T E"],
) -> tuple[Float[Array, "R H T E"], Float[Array, "R J T E"], Float[Array, "R J T E"]]:
    """The gradients of queries, keys and values."""
    blocks, heads = settings.blocks, settings.heads
    head_dim = query.shape[-1]
    tables = plan[1:-1]
    queries = settings.block_spec("query", heads.queries, head_dim)
    keys = settings.block_spec("key", heads.at_once, head_dim)
    done = settings.block_spec("done_key", heads.at_once, head_dim)
    key_sums = pltpu.VMEM((settings.slots, heads.at_once, blocks.key, head_dim), jnp.float32)
    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=len(tables),
        grid=(heads.chunks, plan.count),
        in_specs=[
            *settings.id_specs("key", "query"),
            queries,
            keys,
            keys,
            queries,
            queries,
            settings.statistics_spec(),
        ],
        out_specs=[queries, done, done],
        scratch_shapes=[
            pltpu.VMEM((heads.queries, blocks.query), jnp.float32),
            pltpu.VMEM((heads.queries, blocks.query, head_dim), jnp.float32),
            key_sums,
            key_sums,
            pltpu.VMEM((blocks.key, blocks.query), jnp.float32),
        ],
    )
    gradients = pl.pallas_call(
        functools.partial(_backward_kernel, settings),
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name=f"splash_{settings.mask}_bwd",
        interpret=settings.interpret,
    )(*tables, *_columns_and_rows(plan.ids), query, key, value, cotangent, out, log_sum)
    return tuple(gradients)


def _backward_kernel(
    settings: Settings,
    row,
    query_block,
    key_block,
    slots,
    first,
    last,
    key_first,
    key_last,
    done_row,
    done_key,
    key_ids,
    query_ids,
    query,
    key,
    value,
    cotangent,
    out,
    log_sum,
    query_gradient,
    key_gradient,
    value_gradient,
    delta,
    query_sum,
    key_sums,
    value_sums,
    bias,
):
    """Visits one pair of blocks: scores [keys, queries], the order that most of the products need.

    The visits of a query block follow each other, so one buffer sums its gradient. The visits of a key
    block do not: its gradients are summed in a slot of `key_sums` and `value_sums` until its last visit.
    """
    visit = pl.program_id(1)
    blocks, heads = settings.blocks, settings.heads
    slot = slots[visit]

    @pl.when(first[visit] == 1)
    def _():
        query_sum[...] = jnp.zeros_like(query_sum)
        products = [
            cotangent[head].astype(jnp.float32) * out[head].astype(jnp.float32)
            for head in range(heads.queries)
        ]
        sums = _by_lane([jnp.sum(x, axis=1, keepdims=True) for x in products])
        delta[...] = jnp.transpose(sums)[: heads.queries]

    @pl.when(key_first[visit] == 1)
    def _():
        key_sums[slot] = jnp.zeros(key_sums.shape[1:], jnp.float32)
        value_sums[slot] = jnp.zeros(value_sums.shape[1:], jnp.float32)

    visible = _widen(key_ids[...], blocks.query) == query_ids[...]
    if settings.causal:
        ahead = query_block[visit] * blocks.query - key_block[visit] * blocks.key
        shape = (blocks.key, blocks.query)
        position = lax.broadcasted_iota(jnp.int32, shape, 1) + ahead
        visible &= position >= lax.broadcasted_iota(jnp.int32, shape, 0)
    bias[...] = jnp.where(visible, 0.0, MASKED)

    for head in range(heads.queries):
        group = head // heads.repeats
        q, k, v, g = query[head], key[group], value[group], cotangent[head]
        scores = _product(k, q, (1, 1)) * (settings.scale * LOG2_E)
        weights = jnp.exp2(scores + (bias[...] - log_sum[head : head + 1]))
        value_sums[slot, group] += _product(weights.astype(g.dtype), g, (1, 0))
        change = _product(v, g, (1, 1)) - delta[head : head + 1]
        change = (weights * change).astype(q.dtype)
        key_sums[slot, group] += _product(change, q, (1, 0))
        query_sum[head] += _product(change, k, (0, 0))

    @pl.when(last[visit] > 0)
    def _():
        query_gradient[...] = (query_sum[...] * settings.scale).astype(query_gradient.dtype)

    @pl.when(key_last[visit] == 1)
    def _():
        key_gradient[...] = (key_sums[slot] * settings.scale).astype(key_gradient.dtype)
        value_gradient[...] = value_sums[slot].astype(value_gradient.dtype)


def _product(a: jax.Array, b: jax.Array, contracted: tuple[int, int]) -> jax.Array:
    """The matrix product over one axis of `a` and one of `b`, summed in float32."""
    # By default the matrix units would round float32 factors to bfloat16.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _widen(x: jax.Array, width: int) -> jax.Array:
    """Widens [rows, LANES], equal in all lanes, to [rows, width]."""
    copies = -(-width // LANES)
    x = x if copies == 1 else jnp.concatenate([x] * copies, axis=1)
    return x[:, :width]


def _by_lane(columns: list[jax.Array]) -> jax.Array:
    """Puts column n into lane n: [rows, LANES]. The last column also fills the lanes after it.

    A column is [rows, 1], or [rows, LANES] with the same value in all lanes.
    """
    lane = lax.broadcasted_iota(jnp.int32, (columns[0].shape[0], LANES), 1)
    together = jnp.broadcast_to(columns[-1], lane.shape)
    for n, column in enumerate(columns[:-1]):
        together = jnp.where(lane == n, column, together)
    return together


def _columns_and_rows(
    ids: Int32[Array, "R T"],
) -> tuple[Int32[Array, "R T lanes"], Int32[Array, "R 1 T"]]:
    """Ids down the rows of registers, and ids along their lanes: a comparison then moves no data."""
    return jnp.broadcast_to(ids[..., None], (*ids.shape, LANES)), ids[:, None]
