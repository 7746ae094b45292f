"""Rotary position embedding, in the half-rotated form of Qwen2."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np


def rotary_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [..., head_dim / 2], of int positions [...]."""
    # bf16 rounds 257 to 256, so angles are computed in float32.
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle = positions[..., None].astype(jnp.float32) / theta**exponent
    return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate heads x [B, T, H, D] by tables [B, T, D / 2]; computed in float32, x's dtype returned.

    The halves of a head change places by a product with a constant matrix. It is exact, and a TPU,
    whose vectors are 128 wide, moves half a head of 64 much more slowly than it multiplies.
    """
    half = x.shape[-1] // 2
    swap = np.zeros((2 * half, 2 * half), np.float32)
    swap[np.arange(half) + half, np.arange(half)] = -1
    swap[np.arange(half), np.arange(half) + half] = 1
    # In one pass of the matrix units for bf16; float32 must not be rounded to it.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    swapped = jnp.einsum("BTHD,DE->BTHE", x, jnp.asarray(swap, x.dtype), precision=precision)
    cos, sin = (jnp.concatenate([table, table], axis=-1)[:, :, None, :] for table in (cos, sin))
    return (x * cos + swapped * sin).astype(x.dtype)
