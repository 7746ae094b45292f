"""Attention on TPUs: jax's splash attention kernel, given what a packed row needs.

Owns padding to the kernel's tiles, the choice of its blocks, and which of them a packed row needs at
all. Runs on one device's rows.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
    splash_attention_mask_info,
)

# The kernel works on tiles of this many tokens.
TILE = 128
# Larger blocks load keys less often, but compute more of what the mask hides.
LARGEST_BLOCK = 512
# Segment of the tokens that fill the last tile; real segments are not negative.
PADDING = -1
# Name of the kernel's results that its backward pass needs, for rematerialisation policies.
RESIDUALS = "attention_residuals"


def splash_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segment_ids: jax.Array,
    *,
    causal: bool,
    interpret: bool = False,
) -> jax.Array:
    """As `ops.attention.attention`; `interpret` runs the kernel on any platform, slowly."""
    _, length, heads, head_dim = query.shape
    block, padded = tiling(length)
    # The kernel does not scale the scores.
    query = (query.astype(jnp.float32) * (1.0 / math.sqrt(head_dim))).astype(query.dtype)

    def pad(x: jax.Array, fill: int = 0) -> jax.Array:
        widths = [(0, 0)] * x.ndim
        widths[1] = (0, padded - length)
        return jnp.pad(x, widths, constant_values=fill)

    query, key, value = (pad(x).swapaxes(1, 2) for x in (query, key, value))
    segment_ids = pad(segment_ids, PADDING)

    def one_row(query, key, value, segment_ids, kernel=None):
        kernel = kernel or _packed_kernel(segment_ids, block, interpret)
        segments = splash_attention_kernel.SegmentIds(q=segment_ids, kv=segment_ids)
        return kernel(query, key, value, segments)

    rows = (query, key, value, segment_ids)
    if causal:
        # A row after the other: which blocks the kernel visits differs from row to row.
        out = jax.lax.map(lambda row: one_row(*row), rows)
    else:
        kernel = _full_kernel(padded, block, heads, interpret)
        out = jax.vmap(functools.partial(one_row, kernel=kernel))(*rows)
    return out.swapaxes(1, 2)[:, :length]


def _full_kernel(length: int, block: int, heads: int, interpret: bool):
    """All tokens see all of their segment."""
    mask = splash_attention_mask.FullMask((length, length))
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_block_sizes(length, block),
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )


def _packed_kernel(segment_ids: jax.Array, block: int, interpret: bool):
    """Tokens of one row [T] see those before them in their segment.

    jax's own masks are static, so that every block up to the diagonal would be computed, and most
    of those between different segments masked afterwards.
    """
    sizes = _block_sizes(len(segment_ids), block)
    return splash_attention_kernel.SplashAttentionKernel(
        _mask_info(needed_blocks(segment_ids, sizes.block_q, sizes.block_kv), len(segment_ids)),
        None,
        _backward_mask_info(
            needed_blocks(segment_ids, sizes.block_q_dkv, sizes.block_kv_dkv), len(segment_ids)
        ),
        block_sizes=sizes,
        is_mqa=False,
        save_residuals=False,
        mask_value=splash_attention_kernel.DEFAULT_MASK_VALUE,
        attn_logits_soft_cap=None,
        residual_checkpoint_name=RESIDUALS,
        mask_function=_not_after,
        interpret=interpret,
    )


def _not_after(query_position, key_position):
    return query_position >= key_position


def needed_blocks(segment_ids: jax.Array, query_block: int, key_block: int) -> jax.Array:
    """Which blocks of a row's scores hold any that a causal mask within segments leaves.

    Blocks are compared by their lowest and highest ids, so segments in no order are safe, and
    ascending ones (as packed) lose nothing. Unused tokens, with ids below 1, count as one segment
    behind all others: their blocks on the diagonal are computed, as softmax needs something to see.

    Args:
      segment_ids: int32 [T], T a multiple of both blocks.

    Returns:
      bool [T / query_block, T / key_block].
    """
    length = len(segment_ids)
    ids = jnp.where(segment_ids > 0, segment_ids, jnp.iinfo(jnp.int32).max)
    queries, keys = ids.reshape(-1, query_block), ids.reshape(-1, key_block)
    overlap = (queries.min(1)[:, None] <= keys.max(1)) & (queries.max(1)[:, None] >= keys.min(1))
    last_query = jnp.arange(query_block - 1, length, query_block)
    first_key = jnp.arange(0, length, key_block)
    return overlap & (last_query[:, None] >= first_key)


@jax.jit
def visited_shares(segment_ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Shares of all scores of these rows [N, T] that the forward and the backward kernel compute."""
    _, length = segment_ids.shape
    block, padded = tiling(length)
    sizes = _block_sizes(padded, block)
    rows = jnp.pad(segment_ids, ((0, 0), (0, padded - length)), constant_values=PADDING)

    def share(query_block: int, key_block: int) -> jax.Array:
        return jnp.mean(jax.vmap(lambda row: needed_blocks(row, query_block, key_block))(rows))

    return share(sizes.block_q, sizes.block_kv), share(sizes.block_q_dkv, sizes.block_kv_dkv)


def _mask_info(needed: jax.Array, length: int) -> splash_attention_mask_info.MaskInfo:
    """For the forward kernel, which visits blocks [query, key] query by query.

    At a block it does not need it is told the next one it does, so that keys are fetched ahead.
    """
    index = jnp.arange(needed.size)
    following = jnp.where(needed.reshape(-1), index, needed.size - 1)
    following = jax.lax.cummin(following, reverse=True).reshape(needed.shape)
    return _make_mask_info(needed, following % needed.shape[1], length)


def _backward_mask_info(needed: jax.Array, length: int) -> splash_attention_mask_info.MaskInfo:
    """For the backward kernel, which visits blocks [query, key] key by key, all heads each time.

    At a block it does not need it is told the next query block it does, behind the last that one.
    """
    count = needed.shape[0]
    index = jnp.arange(count)[:, None]
    following = jax.lax.cummin(jnp.where(needed, index, count), reverse=True)
    last = jnp.max(jnp.where(needed, index, 0), axis=0)
    return _make_mask_info(needed, jnp.where(following < count, following, last), length)


def _make_mask_info(needed, data_next, length) -> splash_attention_mask_info.MaskInfo:
    return splash_attention_mask_info.MaskInfo(
        data_next=data_next.astype(jnp.int32)[None],
        mask_next=None,
        # 1: partly masked, by the causal function and the segments.
        block_mask=needed.astype(jnp.int32)[None],
        partial_mask_blocks=None,
        q_sequence=jnp.arange(length, dtype=jnp.int32),
        is_dynamic_mask=True,
    )


def _block_sizes(length: int, block: int) -> splash_attention_kernel.BlockSizes:
    # The backward kernel writes a query gradient for each block of keys, to be added up afterwards:
    # blocks twice as long halve that traffic, and compute little more of what the mask hides.
    backward_block = 2 * block if length % (2 * block) == 0 else block
    return splash_attention_kernel.BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=backward_block,
        block_kv_dkv_compute=block,
        # One backward kernel for all three gradients computes the scores once, not twice.
        use_fused_bwd_kernel=True,
    )


def tiling(length: int) -> tuple[int, int]:
    """(block, padded length): the fewest blocks of at most LARGEST_BLOCK, each of whole tiles."""
    count = -(-length // LARGEST_BLOCK)
    block = -(-length // (count * TILE)) * TILE
    return block, count * block
