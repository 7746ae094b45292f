"""SigLIP vision tower: patches of normalised pixels to patch features.

Neither the final layer norm nor the pooling head: LLaVE reads the second-to-last layer.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llave_jax.models.config import VisionConfig
from llave_jax.models.layers import Dtype, Projection, scan_blocks
from llave_jax.ops.attention import attention, padded_length


class SelfAttention(nn.Module):
    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        config = self.config
        heads = (config.num_heads, config.hidden_size // config.num_heads)
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        query, key, value = (
            Projection(heads, name=name, **kinds)(x) for name in ("q_proj", "k_proj", "v_proj")
        )
        mixed = attention(
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
            **kinds,
        )
        return output(mixed)


class Mlp(nn.Module):
    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        x = Projection((self.config.intermediate_size,), name="fc1", **kinds)(x)
        x = nn.gelu(x, approximate=True)
        return Projection((self.config.hidden_size,), name="fc2", **kinds)(x)


class Block(nn.Module):
    config: VisionConfig
    dtype: Dtype
    param_dtype: Dtype
    implementation: str

    @nn.compact
    def __call__(self, x: jax.Array, segment_ids: jax.Array | None) -> jax.Array:
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}

        def norm(name: str) -> nn.Module:
            # Two-pass variance: E[x^2] - E[x]^2 loses digits in float32.
            return nn.LayerNorm(
                self.config.layer_norm_eps, use_fast_variance=False, name=name, **kinds
            )

        attend = SelfAttention(
            self.config, implementation=self.implementation, name="self_attn", **kinds
        )
        x += attend(norm("layer_norm1")(x), segment_ids)
        return x + Mlp(self.config, name="mlp", **kinds)(norm("layer_norm2")(x))


class SiglipTower(nn.Module):
    """Patch features of crops: uint8 patches [N, P, patch * patch * 3] -> [N, P, hidden].

    Crops where `zero_crops` (bool [N]) is True are 0 after normalisation, whatever their pixels.
    """

    config: VisionConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "xla"
    remat: str = "none"

    @nn.compact
    def __call__(self, patches: jax.Array, zero_crops: jax.Array) -> jax.Array:
        config = self.config
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        pixels = jnp.where(zero_crops[:, None, None], 0.0, normalise(patches))
        x = Projection((config.hidden_size,), name="patch_embedding", **kinds)(pixels)
        position = self.param(
            "position_embedding",
            nn.initializers.normal(1.0),
            (config.num_patches, config.hidden_size),
            self.param_dtype,
        )
        x += position.astype(self.dtype)

        # Padded once here to what the attention kernel needs, not in every layer.
        segment_ids, padding = None, padded_length(config.num_patches, self.attention)
        padding -= config.num_patches
        if padding:
            x = jnp.pad(x, ((0, 0), (0, padding), (0, 0)))
            is_patch = jnp.arange(x.shape[1]) < config.num_patches
            segment_ids = jnp.broadcast_to(is_patch.astype(jnp.int32), x.shape[:2])
        block = Block(config, implementation=self.attention, name="layers", **kinds)
        x = scan_blocks(block, config.num_layers, x, segment_ids, remat=self.remat)
        return x[:, : config.num_patches]


def normalise(pixels: jax.Array) -> jax.Array:
    """uint8 pixels to float32 in [-1, 1]: rescale by 1/255, mean 0.5, standard deviation 0.5."""
    return (pixels.astype(jnp.float32) * (1 / 255) - 0.5) / 0.5
