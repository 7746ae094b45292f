"""Qwen2 language model, from embedded tokens to final hidden states; no LM head."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llave_jax.models.config import TextConfig
from llave_jax.models.layers import Dtype, Projection, RMSNorm, scan_blocks
from llave_jax.ops.attention import attention
from llave_jax.ops.rope import apply_rotary, rotary_tables


class SelfAttention(nn.Module):
    config: TextConfig
    dtype: Dtype
    param_dtype: Dtype
    implementation: str
    longest: int | None

    @nn.compact
    def __call__(self, x, cos, sin, segment_ids):
        config = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads = (config.num_heads, config.head_dim)
        kv_heads = (config.num_kv_heads, config.head_dim)
        query = apply_rotary(Projection(heads, name="q_proj", **kinds)(x), cos, sin)
        key = apply_rotary(Projection(kv_heads, name="k_proj", **kinds)(x), cos, sin)
        value = Projection(kv_heads, name="v_proj", **kinds)(x)
        mixed = attention(
            query,
            key,
            value,
            segment_ids=segment_ids,
            causal=True,
            longest=self.longest,
            implementation=self.implementation,
        )
        output = Projection(
            (config.hidden_size,),
            in_axes=2,
            use_bias=False,
            name="o_proj",
            **kinds,
        )
        return output(mixed)


class Mlp(nn.Module):
    config: TextConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x):
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype, "use_bias": False}
        features = (self.config.intermediate_size,)
        gate = Projection(features, name="gate_proj", **kinds)(x)
        up = Projection(features, name="up_proj", **kinds)(x)
        down = Projection((self.config.hidden_size,), name="down_proj", **kinds)
        return down(nn.silu(gate) * up)


class Block(nn.Module):
    config: TextConfig
    dtype: Dtype
    param_dtype: Dtype
    implementation: str
    longest: int | None

    @nn.compact
    def __call__(self, x, cos, sin, segment_ids):
        config = self.config
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = SelfAttention(
            config,
            implementation=self.implementation,
            longest=self.longest,
            name="self_attn",
            **kinds,
        )
        normed = RMSNorm(config.rms_norm_eps, name="input_layernorm", **kinds)(x)
        x += attend(normed, cos, sin, segment_ids)
        normed = RMSNorm(config.rms_norm_eps, name="post_attention_layernorm", **kinds)(x)
        return x + Mlp(config, name="mlp", **kinds)(normed)


class Qwen2(nn.Module):
    """Causal transformer over packed rows, of sequences of at most `longest` tokens (None: a row)."""

    config: TextConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "xla"
    remat: str | None = None
    longest: int | None = None

    def setup(self) -> None:
        config = self.config
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed_tokens = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nn.initializers.normal(1.0),
            **kinds,
        )
        self.layers = Block(config, implementation=self.attention, longest=self.longest, **kinds)
        self.norm = RMSNorm(config.rms_norm_eps, **kinds)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32 [...] -> [..., D]."""
        return self.embed_tokens(tokens)

    def __call__(self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array) -> jax.Array:
        """Embedded tokens [B, T, D], int32 positions and segment ids [B, T] -> hidden states
        [B, T, D] before the final norm; tokens see earlier ones of their own segment."""
        config = self.config
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta)
        return scan_blocks(
            self.layers, config.num_layers, x, cos, sin, segment_ids, remat=self.remat
        )

    def final_norm(self, x: jax.Array) -> jax.Array:
        """Hidden states [..., D] as the embedding and a language-model head read them."""
        return self.norm(x)
