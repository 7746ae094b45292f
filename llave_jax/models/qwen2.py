"""Qwen2 language model, from embedded tokens to final hidden states; no LM head."""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llave_jax.models.config import TextConfig
from llave_jax.models.layers import Dtype, Projection, RMSNorm, scan_blocks, scan_but_last
from llave_jax.ops.attention import attention, attention_at
from llave_jax.ops.rope import apply_rotary, rotary_tables
from llave_jax.parallel.sharding import rows_per_device


class SelfAttention(nn.Module):
    config: TextConfig
    dtype: Dtype
    param_dtype: Dtype
    implementation: str
    max_segment_length: int | None

    @nn.compact
    def __call__(self, x, cos, sin, segment_ids, query_indices=None, row_length=None):
        config = self.config
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads = (config.num_heads, config.head_dim)
        kv_heads = (config.num_kv_heads, config.head_dim)
        key = apply_rotary(Projection(kv_heads, name="k_proj", **kinds)(x), cos, sin)
        value = Projection(kv_heads, name="v_proj", **kinds)(x)
        if query_indices is not None:
            x, cos, sin = (take_tokens(values, query_indices) for values in (x, cos, sin))
        query = apply_rotary(Projection(heads, name="q_proj", **kinds)(x), cos, sin)
        if query_indices is not None:
            mixed = attention_at(
                query, key, value, query_indices, segment_ids=segment_ids, row_length=row_length
            )
        else:
            mixed = attention(
                query,
                key,
                value,
                segment_ids=segment_ids,
                causal=True,
                max_segment_length=self.max_segment_length,
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
        # Of a single row XLA does not fuse the gradient of silu with the products around it, but of
        # tokens without rows; where there are several rows, these would be in its way.
        tokens = x.reshape(-1, x.shape[-1]) if rows_per_device(x) == 1 else x
        gate = Projection(features, name="gate_proj", **kinds)(tokens)
        up = Projection(features, name="up_proj", **kinds)(tokens)
        down = Projection((self.config.hidden_size,), name="down_proj", **kinds)
        return down(nn.silu(gate) * up).reshape(x.shape)


class Block(nn.Module):
    config: TextConfig
    dtype: Dtype
    param_dtype: Dtype
    implementation: str
    max_segment_length: int | None

    @nn.compact
    def __call__(self, x, cos, sin, segment_ids, query_indices=None, row_length=None):
        """All tokens [B, T, D], or of several rows' tokens [S, T, D] only what becomes of `query_indices`
        [S, N]: [S, N, D]."""
        config = self.config
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = SelfAttention(
            config,
            implementation=self.implementation,
            max_segment_length=self.max_segment_length,
            name="self_attn",
            **kinds,
        )
        normed = RMSNorm(config.rms_norm_eps, name="input_layernorm", **kinds)(x)
        attended = attend(normed, cos, sin, segment_ids, query_indices, row_length)
        x = (x if query_indices is None else take_tokens(x, query_indices)) + attended
        normed = RMSNorm(config.rms_norm_eps, name="post_attention_layernorm", **kinds)(x)
        return x + Mlp(config, name="mlp", **kinds)(normed)


class Qwen2(nn.Module):
    """Causal transformer over packed rows.

    Attributes:
      max_segment_length: tokens of the longest sequence; None: of a row.
    """

    config: TextConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    max_segment_length: int | None = None

    def setup(self) -> None:
        config = self.config
        kinds: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed_tokens = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nn.initializers.normal(1.0),
            **kinds,
        )
        self.layers = Block(
            config,
            implementation=self.attention,
            max_segment_length=self.max_segment_length,
            **kinds,
        )
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

    def pooled(
        self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array, query_indices: jax.Array
    ) -> jax.Array:
        """What `__call__` would give at the tokens `query_indices`, int32 [S, N] with values in R * T.

        The last layer computes only these, and keys and values for all.

        Args:
          x: embedded tokens [S, R, T, D]: rows belong to S shards.
          positions, segment_ids: int32 [S, R, T].

        Returns:
          [S, N, D].
        """
        config = self.config
        shards, rows, length, width = x.shape

        def last(block, x, cos, sin, segment_ids):
            # Rows of a shard one after the other.
            in_shard = (shards, rows * length)
            segment_ids = segment_ids.reshape(in_shard)
            cos, sin = (table.reshape(*in_shard, -1) for table in (cos, sin))
            return block(x.reshape(*in_shard, width), cos, sin, segment_ids, query_indices, length)

        positions = positions.reshape(shards * rows, length)
        return scan_but_last(
            self.layers,
            config.num_layers,
            x.reshape(shards * rows, length, width),
            *rotary_tables(positions, config.head_dim, config.rope_theta),
            segment_ids.reshape(shards * rows, length),
            last=last,
            remat=self.remat,
        )

    def final_norm(self, x: jax.Array) -> jax.Array:
        """Hidden states [..., D] as the embedding and a language-model head read them."""
        return self.norm(x)


def take_tokens(x: jax.Array, index: jax.Array) -> jax.Array:
    """[B, T, ...] at tokens [B, N] -> [B, N, ...]."""
    return jax.vmap(lambda tokens, at: tokens[at])(x, index)
