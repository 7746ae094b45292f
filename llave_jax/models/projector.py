"""The projector, `mlp2x_gelu`: patch features to the language model's width."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from llave_jax.models.layers import Dtype, Projection


class Projector(nn.Module):
    """Two linear layers with an exact GELU between them, applied to each patch.

    Attributes:
      features: width of the language model.
      dtype: of activations and products.
      param_dtype: of the parameters.
    """

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*patches O"]) -> Float[Array, "*patches D"]:
        """Projects features.

        Args:
          x: patch features [..., O].

        Returns:
          [..., D] in `dtype`.
        """
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Projection((self.features,), name="linear_1", **dtypes)(x)
        x = nn.gelu(x, approximate=False)
        return Projection((self.features,), name="linear_2", **dtypes)(x)
