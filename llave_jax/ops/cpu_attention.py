"""Attention on CPUs: blocks of queries against the keys that they can see, in plain XLA.

All rows are laid end to end. A block of queries loops over the keys from its first segment's begin to its last
query (or its last segment's end), so a segment costs the same in a long row as in a row of its own. Scores of one
block are in memory at a time: FlashAttention-2 (Dao, arXiv 2307.08691), algorithms 1 and 2.

XLA's products on CPUs decide the form. One head at a time, since a product without batch axes is several times
faster than one with them. Gradients of keys and values as q^T s, [E, keys], since s^T q, [keys, E], is several
times slower.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Float32, Int, Int32

from llave_jax.ops.constants import MASKED, RESIDUALS

# Rows of a block's products: queries of all heads that share keys. Fewer leave the products small, more compute
# more scores that the mask drops.
_PRODUCT_ROWS = 1024
_LEAST_QUERIES = 128
_KEYS = 256
# A row without segments and mask, such as a vision tower's crop, is one block up to this length.
_WHOLE_ROW = 1024


class _Blocks(NamedTuple):
    """Which keys each query sees. Tokens are numbered through all rows.

    Attributes:
      begin, end: int32 [blocks, rows], a query sees no key before `begin`, and none from `end` on.
      segment: int32 [blocks, rows], and only keys of its segment.
      key_segment: int32 [keys].
      first: int32 [blocks], the first key that a block looks at.
      steps: int32 [blocks], how many runs of `num_keys` keys it looks at.
    """

    begin: Int32[Array, "blocks rows"]
    end: Int32[Array, "blocks rows"]
    segment: Int32[Array, "blocks rows"]
    key_segment: Int32[Array, " keys"]
    first: Int32[Array, " blocks"]
    steps: Int32[Array, " blocks"]


def blockwise_attention(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T J E"],
    value: Float[Array, "B T J E"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    causal: bool,
) -> Float[Array, "B T H E"]:
    """Attention in blocks that are sized for CPUs; right on any device.

    Rows whose segments do not ascend cost as much as rows of one segment.

    Args:
      query, key, value, segment_ids, causal: as for `ops.attention.attention`.

    Returns:
      [B, T, H, E] in the query's dtype.

    References: Dao, FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2.
    """
    batch, length, heads, head_dim = query.shape
    groups = key.shape[2]
    repeats = heads // groups
    tokens = batch * length
    if segment_ids is None and not causal and length <= _WHOLE_ROW:
        num_queries = num_keys = length
    else:
        most = max(_LEAST_QUERIES, _PRODUCT_ROWS // repeats // 8 * 8)
        # As even as possible: rarely a multiple of `most`.
        blocks = -(-tokens // most)
        num_queries, num_keys = -(-tokens // blocks // 8) * 8, _KEYS
    padding = -tokens % num_queries
    blocks = (tokens + padding) // num_queries

    def split(x: jax.Array) -> jax.Array:
        """[B, T, H, E] to [J, blocks, rows, E]: queries of all heads that share keys are rows of one product."""
        x = x.reshape(tokens, groups, repeats, head_dim)
        x = jnp.pad(x, ((0, padding), (0, 0), (0, 0), (0, 0)))
        x = x.reshape(blocks, num_queries, groups, repeats, head_dim).transpose(2, 0, 3, 1, 4)
        return x.reshape(groups, blocks, repeats * num_queries, head_dim)

    def by_head(x: jax.Array) -> jax.Array:
        """[B, T, J, E] to [J, keys, E], with room for the last run of keys to end behind the tokens."""
        x = x.reshape(tokens, groups, head_dim)
        return jnp.pad(x, ((0, padding + num_keys), (0, 0), (0, 0))).swapaxes(0, 1)

    seen = _seen(segment_ids, batch, length, num_queries, padding, repeats, num_keys, causal=causal)
    out = _attend(num_keys, split(query), by_head(key), by_head(value), seen)
    out = out.reshape(groups, blocks, repeats, num_queries, head_dim).transpose(1, 3, 0, 2, 4)
    return out.reshape(-1, heads, head_dim)[:tokens].reshape(query.shape).astype(query.dtype)


def _seen(
    segment_ids: Int[Array, "B T"] | None,
    batch: int,
    length: int,
    num_queries: int,
    padding: int,
    repeats: int,
    num_keys: int,
    *,
    causal: bool,
) -> _Blocks:
    position = jnp.arange(length, dtype=jnp.int32)
    if segment_ids is None:
        segment_ids = jnp.ones((batch, length), jnp.int32)
    segments = segment_ids.astype(jnp.int32)
    if length == 1:
        begins, ends = jnp.zeros_like(segments), jnp.ones_like(segments)
    else:
        changes = segments[:, 1:] != segments[:, :-1]
        edge = jnp.ones((batch, 1), bool)
        begins = jnp.where(jnp.concatenate([edge, changes], 1), position, 0)
        begins = lax.cummax(begins, axis=1)
        ends = jnp.where(jnp.concatenate([changes, edge], 1), position + 1, length)
        ends = lax.cummin(ends, axis=1, reverse=True)
        # A segment that stands at several places of its row is looked for in all of it.
        order = jnp.where(segments == 0, jnp.iinfo(jnp.int32).max, segments)
        ascends = (order[:, 1:] >= order[:, :-1]).all(1, keepdims=True)
        begins, ends = jnp.where(ascends, begins, 0), jnp.where(ascends, ends, length)
    if causal:
        ends = jnp.broadcast_to(position + 1, ends.shape)
    # An unused token sees itself, which is least work.
    unused = segments == 0
    begins, ends = jnp.where(unused, position, begins), jnp.where(unused, position + 1, ends)

    row = jnp.arange(batch, dtype=jnp.int32)[:, None] * length
    behind = jnp.arange(padding, dtype=jnp.int32) + batch * length
    begin = jnp.concatenate([(begins + row).reshape(-1), behind]).reshape(-1, num_queries)
    end = jnp.concatenate([(ends + row).reshape(-1), behind + 1]).reshape(-1, num_queries)
    segment = jnp.pad(segments.reshape(-1), (0, padding + num_keys))
    first = begin.min(1)
    return _Blocks(
        begin=jnp.tile(begin, (1, repeats)),
        end=jnp.tile(end, (1, repeats)),
        segment=jnp.tile(segment[: begin.size].reshape(begin.shape), (1, repeats)),
        key_segment=segment,
        first=first,
        steps=-(-(end.max(1) - first) // num_keys),
    )


def _visible(seen: _Blocks, block: jax.Array, at: jax.Array, num_keys: int) -> jax.Array:
    """bool [rows, num_keys]: which of the keys from `at` on each query of a block sees."""
    keys = at + jnp.arange(num_keys, dtype=jnp.int32)
    segments = lax.dynamic_slice(seen.key_segment, (at,), (num_keys,))
    visible = (keys >= seen.begin[block][:, None]) & (keys < seen.end[block][:, None])
    return visible & (segments == seen.segment[block][:, None])


def _take(x: Float[Array, "J keys E"], head: jax.Array, at: jax.Array, num_keys: int) -> jax.Array:
    return lax.dynamic_slice(x, (head, at, 0), (1, num_keys, x.shape[2]))[0]


# Products without batch axes, summed in float32: x y^T and x y.
_xyt = functools.partial(
    lax.dot_general, dimension_numbers=(((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
)
_xy = functools.partial(
    lax.dot_general, dimension_numbers=(((1,), (0,)), ((), ())), preferred_element_type=jnp.float32
)


def _forward(
    num_keys: int,
    query: Float[Array, "J blocks rows E"],
    key: Float[Array, "J keys E"],
    value: Float[Array, "J keys E"],
    seen: _Blocks,
) -> tuple[Float[Array, "J blocks rows E"], Float32[Array, "J blocks rows"]]:
    """Results, and the logarithm of each query's sum of exponentials."""
    groups, blocks, rows, head_dim = query.shape
    scale = 1.0 / math.sqrt(head_dim)

    def attend(index: jax.Array) -> tuple[jax.Array, jax.Array]:
        head, block = index // blocks, index % blocks
        queries = query[head, block]

        def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            largest, total, out = carry
            at = seen.first[block] + i * num_keys
            keys, values = (_take(x, head, at, num_keys) for x in (key, value))
            scores = _xyt(queries, keys) * scale
            scores = jnp.where(_visible(seen, block, at, num_keys), scores, MASKED)
            larger = jnp.maximum(largest, scores.max(1))
            # What a query has summed up before its first visible key is multiplied by 0 here.
            shrink = jnp.exp(largest - larger)
            weights = jnp.exp(scores - larger[:, None])
            out = out * shrink[:, None] + _xy(weights.astype(values.dtype), values)
            return larger, total * shrink + weights.sum(1), out

        nothing = (jnp.full(rows, MASKED), jnp.zeros(rows), jnp.zeros((rows, head_dim)))
        nothing = jax.tree.map(lambda x: x.astype(jnp.float32), nothing)
        largest, total, out = lax.fori_loop(0, seen.steps[block], step, nothing)
        return (out / total[:, None]).astype(value.dtype), largest + jnp.log(total)

    out, log_sum = lax.map(attend, jnp.arange(groups * blocks))
    return out.reshape(query.shape), log_sum.reshape(query.shape[:3])


def _backward(
    num_keys: int,
    query: Float[Array, "J blocks rows E"],
    key: Float[Array, "J keys E"],
    value: Float[Array, "J keys E"],
    seen: _Blocks,
    out: Float[Array, "J blocks rows E"],
    log_sum: Float32[Array, "J blocks rows"],
    cotangent: Float[Array, "J blocks rows E"],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    groups, blocks, rows, head_dim = query.shape
    scale = 1.0 / math.sqrt(head_dim)
    weighted = (cotangent.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1)
    query_t, cotangent_t = query.swapaxes(2, 3), cotangent.swapaxes(2, 3)

    def attend(head: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        def one_block(block: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            query_gradient, *sums = carry
            queries, cotangents = query[head, block], cotangent[head, block]

            def step(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
                gradient, key_sum, value_sum = carry
                at = seen.first[block] + i * num_keys
                keys, values = (_take(x, head, at, num_keys) for x in (key, value))
                weights = jnp.exp(_xyt(queries, keys) * scale - log_sum[head, block][:, None])
                weights = jnp.where(_visible(seen, block, at, num_keys), weights, 0)
                slopes = _xyt(cotangents, values) - weighted[head, block][:, None]
                slopes = (weights * slopes * scale).astype(query.dtype)
                key_part = _xy(query_t[head, block], slopes)
                value_part = _xy(cotangent_t[head, block], weights.astype(query.dtype))
                return (
                    gradient + _xy(slopes, keys),
                    _add_at(key_sum, key_part, at),
                    _add_at(value_sum, value_part, at),
                )

            gradient = jnp.zeros((rows, head_dim), jnp.float32)
            gradient, *sums = lax.fori_loop(0, seen.steps[block], step, (gradient, *sums))
            gradient = gradient.astype(query.dtype)[None]
            return lax.dynamic_update_slice(query_gradient, gradient, (block, 0, 0)), *sums

        sums = jnp.zeros((head_dim, key.shape[1]), jnp.float32)
        gradients = (jnp.zeros((blocks, rows, head_dim), query.dtype), sums, sums)
        of_query, of_key, of_value = lax.fori_loop(0, blocks, one_block, gradients)
        return of_query, of_key.astype(key.dtype), of_value.astype(value.dtype)

    of_query, of_key, of_value = lax.map(attend, jnp.arange(groups))
    return of_query, of_key.swapaxes(1, 2), of_value.swapaxes(1, 2)


def _add_at(total: jax.Array, part: jax.Array, at: jax.Array) -> jax.Array:
    """Adds to the columns from `at` on."""
    part = part + lax.dynamic_slice(total, (0, at), part.shape)
    return lax.dynamic_update_slice(total, part, (0, at))


def _attend_without_rule(num_keys, query, key, value, seen):
    return _forward(num_keys, query, key, value, seen)[0]


_attend = jax.custom_vjp(_attend_without_rule, nondiff_argnums=(0,))


def _attend_forward(num_keys, query, key, value, seen):
    out, log_sum = _forward(num_keys, query, key, value, seen)
    out, log_sum = checkpoint_name(out, RESIDUALS), checkpoint_name(log_sum, RESIDUALS)
    return out, (query, key, value, seen, out, log_sum)


def _attend_backward(num_keys, residuals, cotangent):
    query, key, value, seen, out, log_sum = residuals
    return *_backward(num_keys, query, key, value, seen, out, log_sum, cotangent), None


_attend.defvjp(_attend_forward, _attend_backward)
