"""The `mlp2x_gelu` projector: patch features to the language model's width."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from llave_jax.models.layers import Dtype, Projection


class Projector(nn.Module):
    """[..., vision hidden] -> [..., features], patch by patch."""

    features: int
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Projection((self.features,), name="linear_1", **kinds)(x)
        x = nn.gelu(x, approximate=False)
        return Projection((self.features,), name="linear_2", **kinds)(x)
