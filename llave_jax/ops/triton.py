"""Attention on GPUs: jax's flash attention kernel in Pallas Triton, given what a packed row needs.

Owns padding to the kernel's blocks and the choice of these. Runs on one device's rows.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.gpu import attention as pallas_attention

BLOCK = 128
# Segment of the tokens that fill the last block; real segments are not negative.
PADDING = -1


def triton_attention(
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
    padding = -length % BLOCK
    segment_ids = jnp.pad(segment_ids, ((0, 0), (0, padding)), constant_values=PADDING)
    # The kernel knows one key head for each query head.
    repeats = heads // key.shape[2]
    key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
    # Its head sizes are powers of two; zeros change neither scores nor the columns kept.
    head_padding = (1 << (head_dim - 1).bit_length()) - head_dim
    widths = ((0, 0), (0, padding), (0, 0), (0, head_padding))
    query, key, value = (jnp.pad(x, widths) for x in (query, key, value))
    out = pallas_attention.mha(
        query,
        key,
        value,
        segment_ids,
        sm_scale=1.0 / math.sqrt(head_dim),
        causal=causal,
        block_sizes=_block_sizes(head_dim + head_padding),
        interpret=interpret,
    )
    return out[:, :length, :, :head_dim]


def _block_sizes(head_dim: int) -> pallas_attention.BlockSizes:
    """What fits into the 164 KiB of shared memory of an A100 with head sizes up to 128."""
    keys = BLOCK if head_dim <= 64 else BLOCK // 2
    return pallas_attention.BlockSizes(
        block_q=BLOCK,
        block_k=keys,
        block_q_dkv=64,
        block_kv_dkv=64,
        block_q_dq=64,
        block_kv_dq=64,
    )
