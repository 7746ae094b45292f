"""Rotary position embedding, in the half-rotated form of Qwen2."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [..., head_dim / 2], of int positions [...]."""
    # bf16 rounds 257 to 256, so angles are computed in float32.
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle = positions[..., None].astype(jnp.float32) / theta**exponent
    return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotate heads x [B, T, H, D] by tables [B, T, D / 2]; computed in float32, x's dtype returned."""
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)
