"""Attention on TPUs: jax's splash attention kernel, given what a packed row needs.

Owns padding to the kernel's tiles and the choice of its blocks. Runs on one device's rows.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

# The kernel works on tiles of this many tokens.
TILE = 128
# Larger blocks load keys less often, but compute more of what a causal mask hides.
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
    kernel = _kernel(padded, block, heads, causal, interpret)

    def one_row(query, key, value, segment_ids):
        segments = splash_attention_kernel.SegmentIds(q=segment_ids, kv=segment_ids)
        return kernel(query, key, value, segments)

    out = jax.vmap(one_row)(query, key, value, segment_ids)
    return out.swapaxes(1, 2)[:, :length]


def _kernel(length: int, block: int, heads: int, causal: bool, interpret: bool):
    mask = splash_attention_mask.CausalMask if causal else splash_attention_mask.FullMask
    # The backward kernel writes a query gradient for each block of keys, to be added up afterwards:
    # blocks twice as long halve that traffic, and compute little more of what the mask hides.
    backward_block = 2 * block if length % (2 * block) == 0 else block
    return splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask((length, length))] * heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=backward_block,
            block_kv_dkv_compute=block,
            # One backward kernel for all three gradients computes the scores once, not twice.
            use_fused_bwd_kernel=True,
        ),
        residual_checkpoint_name=RESIDUALS,
        interpret=interpret,
    )


def tiling(length: int) -> tuple[int, int]:
    """(block, padded length): the fewest blocks of at most LARGEST_BLOCK, each of whole tiles."""
    count = -(-length // LARGEST_BLOCK)
    block = -(-length // (count * TILE)) * TILE
    return block, count * block
