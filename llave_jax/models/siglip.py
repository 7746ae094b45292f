"""SigLIP's vision tower: pixels of crops to patch features.

LLaVE reads the second-to-last layer. The tower therefore ends there, without final norm and pooling
head.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from llave_jax.models.config import VisionConfig
from llave_jax.models.layers import Dtype, Projection, scan_blocks
from llave_jax.ops.attention import attention, padded_length


class SelfAttention(nn.Module):
    """Attention of a crop's patches to one another.

    Attributes:
      config: sizes of the tower.
      dtype: of activations and products.
      param_dtype: of the parameters.
      implementation: of `llave_jax.ops.attention`.
    """

    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype
    implementation: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T O"], segment_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B T O"]:
        """Attention among the patches of each crop.

        Args:
          x, segment_ids: as for `Block`; x is normalised.

        Returns:
          [B, T, O] in `dtype`.
        """
        config = self.config
        heads = (config.num_heads, config.hidden_size // config.num_heads)
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        query, key, value = (
            Projection(heads, name=name, **dtypes)(x) for name in ("q_proj", "k_proj", "v_proj")
        )
        attended = attention(
            query,
            key,
            value,
            segment_ids=segment_ids,
            causal=False,
            implementation=self.implementation,
        )
        output = Projection(
            (config.hidden_size,),
            in_axes=2,
            name="out_proj",
            **dtypes,
        )
        return output(attended)


class Mlp(nn.Module):
    """Two linear layers with GELU, in its tanh approximation, between them.

    Attributes:
      config: sizes of the tower.
      dtype: of activations and products.
      param_dtype: of the parameters.
    """

    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T O"]) -> Float[Array, "B T O"]:
        """Applies the MLP to each patch.

        Args:
          x: [B, T, O], normalised.

        Returns:
          [B, T, O] in `dtype`.
        """
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Projection((self.config.intermediate_size,), name="fc1", **dtypes)(x)
        x = nn.gelu(x, approximate=True)
        return Projection((self.config.hidden_size,), name="fc2", **dtypes)(x)


class Block(nn.Module):
    """One transformer layer, with the norms before attention and MLP.

    Attributes:
      config: sizes of the tower.
      dtype: of activations and products.
      param_dtype: of the parameters.
      implementation: of `llave_jax.ops.attention`.
    """

    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype
    implementation: str

    @nn.compact
    def __call__(
        self, x: Float[Array, "B T O"], segment_ids: Int[Array, "B T"] | None
    ) -> Float[Array, "B T O"]:
        """One layer.

        Args:
          x: [B, T, O], of B crops; T is the number of patches, padded for the attention kernel.
          segment_ids: int32 [B, T], 1 for patches and 0 for padding; None: there is no padding.

        Returns:
          [B, T, O].
        """
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name: str) -> nn.Module:
            # The fast variance, E[x^2] - E[x]^2, loses digits in float32.
            return nn.LayerNorm(
                self.config.layer_norm_eps, use_fast_variance=False, name=name, **dtypes
            )

        attend = SelfAttention(
            self.config, implementation=self.implementation, name="self_attn", **dtypes
        )
        x += attend(norm("layer_norm1")(x), segment_ids)
        return x + Mlp(self.config, name="mlp", **dtypes)(norm("layer_norm2")(x))


class SiglipTower(nn.Module):
    """The vision tower.

    Attributes:
      config: sizes of the tower.
      dtype: of activations and products.
      param_dtype: of the parameters.
      attention: implementation of `llave_jax.ops.attention`.
      remat: what the backward pass computes again, a key of `remat.REMATS`.

    References: Zhai et al., Sigmoid Loss for Language Image Pre-Training (arXiv 2303.15343).
    """

    config: VisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "xla"
    remat: str = "none"

    @nn.compact
    def __call__(
        self, patches: UInt8[Array, "B P X"], zero_crops: Bool[Array, " B"]
    ) -> Float[Array, "B P O"]:
        """Patch features of crops.

        Args:
          patches: uint8 [B, P, X], pixels of each patch by row, column, channel.
          zero_crops: bool [B], True for a crop that is 0 after normalisation, whatever its pixels.

        Returns:
          [B, P, O] in `dtype`.
        """
        config = self.config
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        pixels = jnp.where(zero_crops[:, None, None], 0.0, normalise(patches))
        x = Projection((config.hidden_size,), name="patch_embedding", **dtypes)(pixels)
        position = self.param(
            "position_embedding",
            nn.initializers.normal(1.0),
            (config.num_patches, config.hidden_size),
            self.param_dtype,
        )
        x += position.astype(self.dtype)

        # Rows are padded here to what the attention kernel needs. Otherwise every layer would.
        segment_ids = None
        padding = padded_length(config.num_patches, self.attention) - config.num_patches
        if padding:
            x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
            is_patch = jnp.arange(x.shape[1]) < config.num_patches
            segment_ids = jnp.broadcast_to(is_patch.astype(jnp.int32), x.shape[:2])
        block = Block(config, implementation=self.attention, name="layers", **dtypes)
        x = scan_blocks(block, config.num_layers, x, segment_ids, remat=self.remat)
        return x[:, : config.num_patches]


def normalise(pixels: UInt8[Array, "*pixels"]) -> Float[Array, "*pixels"]:
    """Pixels to floats: rescaled by 1/255, mean 0.5, standard deviation 0.5.

    Args:
      pixels: uint8 [...].

    Returns:
      float32 [...] in [-1, 1].
    """
    return (pixels.astype(jnp.float32) * (1 / 255) - 0.5) / 0.5
