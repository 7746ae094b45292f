"""Matryoshka representation learning: the same loss on the first numbers of each embedding.

Owns the prefixes and their weights. It needs jax alone; the losses are `hardness.py` and the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def prefix(embeddings: Float[Array, "... D"], dim: int) -> Float[Array, "... dim"]:
    """The first numbers of embeddings, L2-normalised again.

    Args:
      embeddings: [..., D], L2-normalised. Empty slots may hold anything finite, zeros included.
      dim: from 1 to D.

    Returns:
      [..., dim]; the embeddings themselves for dim = D.

    References: Kusupati et al., Matryoshka Representation Learning (arXiv 2205.13147), section 3.
    """
    if dim == embeddings.shape[-1]:
        return embeddings
    first = embeddings[..., :dim]
    square = jnp.sum(jnp.square(first), axis=-1, keepdims=True)
    # The bound is under the root, whose gradient at 0 would be nan.
    return first * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def shares(dims: Sequence[int], weights: Sequence[float] = ()) -> tuple[float, ...]:
    """What each dimension counts in the loss.

    Args:
      dims: of the prefixes.
      weights: one for each of them; none: all count the same.

    Returns:
      Shares, which add up to 1.

    Raises:
      ValueError: there are not as many weights as dims, or they are not positive.
    """
    weights = tuple(weights) or (1.0,) * len(dims)
    if len(weights) != len(dims) or not all(weight > 0 for weight in weights):
        raise ValueError(
            f"loss.dim_weights is {weights}; expected a positive number for each of loss.dims, {tuple(dims)}"
        )
    return tuple(weight / sum(weights) for weight in weights)


def check_dims(dims: Sequence[int], width: int) -> None:
    """Refuses dims that a model of this width cannot be trained with.

    Args:
      dims: of the prefixes.
      width: numbers of an embedding.

    Raises:
      ValueError: they do not ascend to the whole width.
    """
    ascending = all(isinstance(d, int) for d in dims) and list(dims) == sorted(set(dims))
    if not dims or not ascending or dims[0] < 1 or dims[-1] != width:
        raise ValueError(
            f"loss.dims is {tuple(dims)}; expected ascending numbers of at least 1, of which the last is the "
            f"model's width: {width}"
        )
