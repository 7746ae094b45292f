"""A temperature that is learned, one for all pairs or one for each subset: pure functions of its parameter.

Owns the form in which it is trained, the logarithm of the scale 1 / temperature. It needs jax alone.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def initial_log_scale(temperature: float, subsets: int | None = None) -> Float[Array, "..."]:
    """The parameter before the first step.

    Args:
      temperature: positive.
      subsets: how many subsets have one of their own; None: one for all.

    Returns:
      float32 scalar, or [subsets].
    """
    return jnp.full(() if subsets is None else (subsets,), -np.log(temperature), jnp.float32)


def temperature_of(log_scale: Float[Array, "..."]) -> Float[Array, "..."]:
    """The temperature that a parameter stands for.

    Args:
      log_scale: float32.

    Returns:
      float32 of the same shape, positive.
    """
    return jnp.exp(-log_scale)


def clamp(log_scale: Float[Array, "..."], bounds: tuple[float, float]) -> Float[Array, "..."]:
    """The parameter after an update, back in its range.

    It is moved there, and not clipped where it is used: there it would have no gradient outside, and could not
    come back.

    Args:
      log_scale: float32.
      bounds: the least and the largest temperature.

    Returns:
      float32 of the same shape.

    References: CLIP (arXiv 2103.00020), section 2.5: logits are scaled by 100 at most, a temperature of 0.01 at
      least. Its public trainers keep the scale from 1 to 100.
    """
    least, largest = bounds
    return jnp.clip(log_scale, -np.log(largest), -np.log(least)).astype(log_scale.dtype)
