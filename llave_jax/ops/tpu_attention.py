"""Attention on TPUs: sparse flash ("splash") attention for packed rows, forward and backward.

All rows of a device are cut into blocks of queries and of keys. The kernels visit only pairs of blocks
that have a visible score, from a list made of the segments, one pair a step of their grid, so that
what is packed into a row costs what it would cost alone, whatever the row's length. A step serves all
heads that share keys. After FlashAttention (Dao et al. 2022, alg. 1 and 2): scores are never written
to memory.

Arrays are [rows, heads, tokens, head size], an order in which XLA's products deliver them without a
copy.
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

from llave_jax.ops.constants import LOG2_E, MASKED, RESIDUALS

# Width of a vector register; blocks are multiples of it.
LANES = 128
# Queries and keys of a block. With more queries more of what is computed is masked; with fewer keys
# a step is too short for what it costs to begin one.
QUERY_BLOCK = 256
KEY_BLOCK = 512
# Rows up to this long that are whole tiles are one block of keys each.
LONGEST_SINGLE_BLOCK = 768
# Heads that a step serves: each is a copy of the code and needs vector memory for its block.
MOST_HEADS = 8


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    causal: bool,
    max_segment_length: int | None = None,
    interpret: Any = False,
) -> jax.Array:
    """As `ops.attention.attention`; `interpret` runs the kernels on any platform, slowly."""
    rows, length, heads, head_dim = query.shape
    # A group of many heads is worked on as several, and there is more than one wherever possible:
    # chips with two cores give each its own.
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
    """Tokens of a block of queries and of a block of keys, which is a multiple of it, and of a row,
    padded to whole blocks."""

    query: int
    key: int
    length: int

    @classmethod
    def of(cls, length: int) -> Blocks:
        """For rows of this many tokens."""
        padded = -(-length // LANES) * LANES
        key = padded if padded <= LONGEST_SINGLE_BLOCK else KEY_BLOCK
        query = QUERY_BLOCK if key % QUERY_BLOCK == 0 else LANES
        return cls(query, key, -(-length // key) * key)

    @property
    def queries(self) -> int:
        """Blocks of queries in a row."""
        return self.length // self.query

    @property
    def keys(self) -> int:
        return self.length // self.key


def _splits(groups: int, repeats: int) -> int:
    """How many groups to make of each, so that none has more than MOST_HEADS query heads."""
    fits = [n for n in range(1, repeats + 1) if repeats % n == 0 and repeats // n <= MOST_HEADS]
    return next((n for n in fits if groups * n > 1), fits[0])


@dataclasses.dataclass(frozen=True)
class Heads:
    """Which heads a step of the kernels serves.

    Attributes:
      repeats: query heads that share keys, a group.
      at_once: groups of one step.
      chunks: steps that all groups need.
    """

    repeats: int
    at_once: int
    chunks: int

    @classmethod
    def of(cls, repeats: int, groups: int) -> Heads:
        """As many groups at once as leave two chunks, up to half of MOST_HEADS: groups of one head
        bring keys for each."""
        sizes = [n for n in range(1, groups) if groups % n == 0 and n * repeats <= MOST_HEADS // 2]
        at_once = max(sizes, default=1)
        return cls(repeats, at_once, groups // at_once)

    @property
    def queries(self) -> int:
        """Query heads of one step."""
        return self.at_once * self.repeats


class Plan(NamedTuple):
    """The pairs of blocks to visit, query block by query block, with ascending key blocks.

    P pairs at most, in R rows of T tokens.

    Attributes:
      count: int32 scalar: the pairs that are.
      row, query, key: int32 [P], the blocks of a pair: numbers in their row.
      slot: int32 [P], where the gradients of the key block are summed up.
      first, last: int32 [P], 1 where the visits of its query block begin, end; in `last` 2 instead
        where results must not be used (`plan_visits`).
      key_first, key_last: int32 [P], 1 for the first and last visit of its key block.
      done_row, done_key: int32 [P], the key block whose last visit is the next to come.
      ids: int32 [R, T], of the tokens.
    """

    count: jax.Array
    row: jax.Array
    query: jax.Array
    key: jax.Array
    slot: jax.Array
    first: jax.Array
    last: jax.Array
    key_first: jax.Array
    key_last: jax.Array
    done_row: jax.Array
    done_key: jax.Array
    ids: jax.Array


def plan_visits(
    segment_ids: jax.Array, *, causal: bool, max_segment_length: int | None = None
) -> Plan:
    """Which pairs of blocks hold any score that the mask leaves.

    Blocks are compared by their lowest and highest ids, so segments in no order are safe, and
    ascending ones (as packed) lose nothing. Unused tokens see those of their own block of keys.

    Args:
      segment_ids: int32 [R, T], 0 for unused tokens.
      max_segment_length: no segment has more tokens, and they ascend; None: no more than a row. With others all
        results are NaN, as there was no room for them.
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

    # Those needed move to the front, in their order.
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
    """All pairs [P, 2] of blocks of a row (that the causal mask leaves), query by query, and which of
    them [P] segments of at most `max_segment_length` tokens can need."""
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
    """Key blocks whose gradients are unfinished at the same time, at most: from the first to the last
    of them, as a block has the slot of its number modulo this."""
    pairs, within = _candidates(rows, blocks, causal, max_segment_length)
    key = pairs[within, 1]
    highest = np.maximum.accumulate(key)
    last_visit = {int(block): visit for visit, block in enumerate(key)}
    return max(int(highest[visit]) - block + 1 for block, visit in last_visit.items())


def visited_scores(
    segment_ids: np.ndarray, *, causal: bool, max_segment_length: int | None = None
) -> np.ndarray:
    """Scores of one head that the kernels compute for rows [..., R, T] of a device: [...]."""
    blocks = Blocks.of(segment_ids.shape[-1])

    @jax.jit
    def count(rows: jax.Array) -> jax.Array:
        return plan_visits(rows, causal=causal, max_segment_length=max_segment_length).count

    counts = [count(rows) for rows in segment_ids.reshape(-1, *segment_ids.shape[-2:])]
    scores = np.asarray(counts, np.float64) * (blocks.query * blocks.key)
    return scores.reshape(segment_ids.shape[:-2])


@dataclasses.dataclass(frozen=True)
class Settings:
    """What the kernels are compiled for; `slots` as of `_slots`."""

    blocks: Blocks
    heads: Heads
    causal: bool
    scale: float
    slots: int
    interpret: Any

    @property
    def kind(self) -> str:
        return "causal" if self.causal else "full"

    def block_spec(self, table: str, heads: int, head_dim: int) -> pl.BlockSpec:
        """Of an array [R, heads of all chunks, T, D], the block of tokens that this table names."""
        row, block = _table("done_row" if table == "done_key" else "row"), _table(table)
        shape = (None, heads, getattr(self.blocks, table.removeprefix("done_")), head_dim)
        return pl.BlockSpec(shape, lambda c, v, *tables: (tables[row][v], c, tables[block][v], 0))

    def id_specs(self, column: str, row: str) -> tuple[pl.BlockSpec, pl.BlockSpec]:
        """Of ids [R, T, LANES] and [R, 1, T], the blocks that these tables name."""
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
        """Of [R, chunks, heads of one, T], the numbers of the block of queries."""
        rows, block = _table("row"), _table("query")
        return pl.BlockSpec(
            (None, None, self.heads.queries, self.blocks.query),
            lambda c, v, *tables: (tables[rows][v], c, 0, tables[block][v]),
        )


def _table(name: str) -> int:
    """The place of a table among those the kernels get."""
    return Plan._fields.index(name) - 1


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(
    settings: Settings, query: jax.Array, key: jax.Array, value: jax.Array, plan: Plan
) -> jax.Array:
    """Queries [R, H, T, D] and keys and values [R, G, T, D] to results [R, H, T, D]."""
    return _forward(settings, query, key, value, plan)[0]


def _attend_forward(settings, query, key, value, plan):
    out, log_sum = _forward(settings, query, key, value, plan)
    out, log_sum = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum, RESIDUALS)
    return out, (query, key, value, plan, out, log_sum)


def _attend_backward(settings, residuals, cotangent):
    return *_backward(settings, *residuals, cotangent), None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(
    settings: Settings, query: jax.Array, key: jax.Array, value: jax.Array, plan: Plan
) -> tuple[jax.Array, jax.Array]:
    """Results [R, H, T, D] and log2 of the softmax's sums, float32 [R, chunks, heads of one, T]."""
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
    return pl.pallas_call(
        functools.partial(_forward_kernel, settings),
        grid_spec=grid,
        out_shape=[
            jax.ShapeDtypeStruct(query.shape, query.dtype),
            jax.ShapeDtypeStruct(
                (len(query), heads.chunks, heads.queries, blocks.length), jnp.float32
            ),
        ],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name=f"splash_{settings.kind}_fwd",
        interpret=settings.interpret,
    )(*tables, *_columns_and_rows(plan.ids), query, key, value)


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
    """One pair of blocks: scores [queries, keys], with a running maximum and sum for each query."""
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
    # Made once for all heads.
    bias[...] = jnp.where(visible, 0.0, MASKED)

    for head in range(heads.queries):
        group = head // heads.repeats
        scores = _product(query[head], key[group], (1, 1)) + bias[...]
        before = highest[head]
        now = jnp.maximum(before, jnp.max(scores, axis=1, keepdims=True))
        # A query with nothing to see yet has a highest score of MASKED and sums up ones; these are
        # multiplied by 0 once it sees something, at the latest itself.
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
        # Of the 128 lanes of each query only as many as there are heads mean something.
        log_sum[...] = jnp.transpose(tops * to_log2 + jnp.log2(totals))[: heads.queries]
        factors = jnp.where(last[visit] == 1, 1.0, jnp.nan) / totals
        for head in range(heads.queries):
            out[head] = (weighted[head] * factors[:, head : head + 1]).astype(out.dtype)


def _backward(
    settings: Settings,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    plan: Plan,
    out: jax.Array,
    log_sum: jax.Array,
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of queries, keys and values."""
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
    return pl.pallas_call(
        functools.partial(_backward_kernel, settings),
        grid_spec=grid,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (query, key, value)],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary")),
        name=f"splash_{settings.kind}_bwd",
        interpret=settings.interpret,
    )(*tables, *_columns_and_rows(plan.ids), query, key, value, cotangent, out, log_sum)


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
    """One pair of blocks: scores [keys, queries], as most of the products need them.

    Gradients of the query block are summed over its visits, which follow each other; those of key
    blocks in the slots of `key_sums` and `value_sums`, until the last visit of each.
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
    """Matrix product over an axis of each, summed in float32."""
    # float32 must not be rounded to bfloat16 on its way.
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dimensions = (((contracted[0],), (contracted[1],)), ((), ()))
    return lax.dot_general(
        a, b, dimensions, precision=precision, preferred_element_type=jnp.float32
    )


def _widen(x: jax.Array, width: int) -> jax.Array:
    """[rows, LANES] with equal lanes -> [rows, width]."""
    copies = -(-width // LANES)
    x = x if copies == 1 else jnp.concatenate([x] * copies, axis=1)
    return x[:, :width]


def _by_lane(columns: list[jax.Array]) -> jax.Array:
    """Column n of values, [rows, 1] or [rows, LANES] with equal lanes, in lane n: [rows, LANES]. The
    last also fills the lanes that are left."""
    lane = lax.broadcasted_iota(jnp.int32, (columns[0].shape[0], LANES), 1)
    together = jnp.broadcast_to(columns[-1], lane.shape)
    for n, column in enumerate(columns[:-1]):
        together = jnp.where(lane == n, column, together)
    return together


def _columns_and_rows(ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """int32 [R, T] as [R, T, LANES] and as [R, 1, T], to be compared without moving anything."""
    return jnp.broadcast_to(ids[..., None], (*ids.shape, LANES)), ids[:, None]
