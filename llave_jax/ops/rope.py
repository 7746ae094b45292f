"""Rotary position embedding, in Qwen2's form: the halves of a head are the pairs that rotate.

Owns the tables of angles and the rotation. Which position a token has is decided where rows are packed.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def rotary_tables(
    positions: Int[Array, "*rows"], head_dim: int, theta: float
) -> tuple[Float[Array, "*rows {head_dim//2}"], Float[Array, "*rows {head_dim//2}"]]:
    """Cosines and sines of the angles at some positions.

    Args:
      positions: int [...], each token's position in its own sequence.
      head_dim: size of a head, even.
      theta: base of the wavelengths.

    Returns:
      (cosines, sines), float32 [..., head_dim / 2].

    References: Su et al., RoFormer (arXiv 2104.09864), section 3.2.
    """
    # bf16 rounds 257 to 256, so angles are computed in float32.
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    angle = positions[..., None].astype(jnp.float32) / theta**exponent
    return jnp.cos(angle), jnp.sin(angle)


def apply_rotary(
    x: Float[Array, "B T H E"], cos: Float[Array, "B T E//2"], sin: Float[Array, "B T E//2"]
) -> Float[Array, "B T H E"]:
    """Rotates heads by the angles of their tokens, in float32.

    Args:
      x: [B, T, H, E], queries or keys.
      cos, sin: float32 [B, T, E / 2], of `rotary_tables`.

    Returns:
      [B, T, H, E] in the dtype of `x`.
    """
    # The halves of a head swap places through a product with a constant matrix. The product is exact.
    # On a TPU it is much faster than moving half a head of 64, because vectors are 128 wide there.
    half = x.shape[-1] // 2
    swap = np.zeros((2 * half, 2 * half), np.float32)
    swap[np.arange(half) + half, np.arange(half)] = -1
    swap[np.arange(half), np.arange(half) + half] = 1
    # bf16 takes one pass of the matrix units. float32 must not be rounded to bf16.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    swapped = jnp.matmul(x, jnp.asarray(swap, x.dtype), precision=precision)
    cos, sin = (jnp.concatenate([table, table], axis=-1)[:, :, None, :] for table in (cos, sin))
    return (x * cos + swapped * sin).astype(x.dtype)
