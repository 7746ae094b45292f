"""Attention over packed rows: one function, several implementations.

The XLA form is the reference. An implementation that cannot honour what it is asked raises; none
falls back silently.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

IMPLEMENTATIONS = ("xla",)


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    causal: bool,
    implementation: str = "xla",
) -> jax.Array:
    """Softmax attention with scale 1 / sqrt(head size), softmax in float32.

    Args:
      query: [B, T, H, D].
      key, value: [B, T, G, D]; H is a multiple of G (grouped-query attention).
      segment_ids: int32 [B, T]; tokens see only tokens of their own segment. None: one segment.
      causal: tokens see none after them.
      implementation: one of IMPLEMENTATIONS.

    Returns:
      [B, T, H, D] in the query's dtype.
    """
    if query.shape[2] % key.shape[2]:
        raise ValueError(f"{query.shape[2]} query heads do not divide by {key.shape[2]} key heads")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {implementation!r}; expected one of {IMPLEMENTATIONS}")
    return _xla(query, key, value, segment_ids, causal)


def _xla(query, key, value, segment_ids, causal):
    batch, length, heads, head_dim = query.shape
    groups = key.shape[2]
    query = query.reshape(batch, length, groups, heads // groups, head_dim)
    scores = jnp.einsum("BTGHD,BSGD->BGHTS", query, key, preferred_element_type=jnp.float32)
    scores *= 1.0 / math.sqrt(head_dim)
    mask = None
    if causal:
        mask = jnp.tril(jnp.ones((length, length), bool))[None]
    if segment_ids is not None:
        same = segment_ids[:, :, None] == segment_ids[:, None, :]
        mask = same if mask is None else mask & same
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum("BGHTS,BSGD->BTGHD", weights, value)
    return out.reshape(batch, length, heads, head_dim)
