"""The Qwen2 language model, from embedded tokens to final hidden states; no LM head."""

from __future__ import annotations

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from llave_jax.models.config import TextConfig
from llave_jax.models.layers import Dtype, Projection, RMSNorm, scan_blocks, scan_but_last
from llave_jax.ops.attention import attention, attention_at
from llave_jax.ops.rope import apply_rotary, rotary_tables
from llave_jax.parallel.sharding import rows_per_device


class Queries(NamedTuple):
    """The tokens that the last layer computes, where it does not compute all.

    Attributes:
      indices: int32 [S, I] into the L tokens of a shard, its rows one after another.
      row_length: tokens of a row.
    """

    indices: Int[Array, "S I"]
    row_length: int


class SelfAttention(nn.Module):
    """Grouped-query attention with rotary positions.

    Attributes:
      config: sizes of the model.
      dtype: of activations and products.
      param_dtype: of the parameters.
      implementation: of `llave_jax.ops.attention`.
      max_segment_length: see `ops.attention.attention`.
    """

    config: TextConfig
    dtype: Dtype
    param_dtype: Dtype
    implementation: str
    max_segment_length: int | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Float[Array, "B T half"],
        sin: Float[Array, "B T half"],
        segment_ids: Int[Array, "B T"],
        queries: Queries | None = None,
    ) -> Float[Array, "B _ D"]:
        """Attention among the tokens of each segment.

        Args:
          x, cos, sin, segment_ids, queries: as for `Block`; x is normalised.

        Returns:
          [B, T, D]; with `queries`, [S, I, D].
        """
        config = self.config
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        heads = (config.num_heads, config.head_dim)
        kv_heads = (config.num_kv_heads, config.head_dim)
        key = apply_rotary(Projection(kv_heads, name="k_proj", **dtypes)(x), cos, sin)
        value = Projection(kv_heads, name="v_proj", **dtypes)(x)
        if queries is not None:
            x, cos, sin = (take_tokens(values, queries.indices) for values in (x, cos, sin))
        query = apply_rotary(Projection(heads, name="q_proj", **dtypes)(x), cos, sin)
        if queries is not None:
            attended = attention_at(
                query,
                key,
                value,
                queries.indices,
                segment_ids=segment_ids,
                row_length=queries.row_length,
            )
        else:
            attended = attention(
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
            **dtypes,
        )
        return output(attended)


class Mlp(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)).

    Attributes:
      config: sizes of the model.
      dtype: of activations and products.
      param_dtype: of the parameters.

    References: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202).
    """

    config: TextConfig
    dtype: Dtype
    param_dtype: Dtype

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Applies the MLP to each token.

        Args:
          x: [B, T, D], normalised.

        Returns:
          [B, T, D] in `dtype`.
        """
        dtypes: dict[str, Any] = {
            "dtype": self.dtype,
            "param_dtype": self.param_dtype,
            "use_bias": False,
        }
        features = (self.config.intermediate_size,)
        # With one row per device, flatten [1, T, D] to [T, D]: XLA then fuses silu's gradient into the
        # neighbouring matmuls. With several rows the reshape prevents the fusion.
        tokens = x.reshape(-1, x.shape[-1]) if rows_per_device(x) == 1 else x
        gate = Projection(features, name="gate_proj", **dtypes)(tokens)
        up = Projection(features, name="up_proj", **dtypes)(tokens)
        down = Projection((self.config.hidden_size,), name="down_proj", **dtypes)
        return down(nn.silu(gate) * up).reshape(x.shape)


class Block(nn.Module):
    """One transformer layer, with the norms before attention and MLP.

    Attributes:
      config: sizes of the model.
      dtype: of activations and products.
      param_dtype: of the parameters.
      implementation: of `llave_jax.ops.attention`.
      max_segment_length: see `ops.attention.attention`.
    """

    config: TextConfig
    dtype: Dtype
    param_dtype: Dtype
    implementation: str
    max_segment_length: int | None

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        cos: Float[Array, "B T half"],
        sin: Float[Array, "B T half"],
        segment_ids: Int[Array, "B T"],
        queries: Queries | None = None,
    ) -> Float[Array, "B _ D"]:
        """One layer, at all tokens or at some.

        Args:
          x: [B, T, D], of B rows. With `queries`, [S, L, D]: the rows of each shard one after another.
          cos, sin: float32 [B, T, E / 2], of `ops.rope.rotary_tables`.
          segment_ids: int32 [B, T]; tokens see earlier tokens of their own segment.
          queries: the tokens to compute; None: all.

        Returns:
          [B, T, D]; with `queries`, [S, I, D].
        """
        config = self.config
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        attend = SelfAttention(
            config,
            implementation=self.implementation,
            max_segment_length=self.max_segment_length,
            name="self_attn",
            **dtypes,
        )
        normed = RMSNorm(config.rms_norm_eps, name="input_layernorm", **dtypes)(x)
        attended = attend(normed, cos, sin, segment_ids, queries)
        x = (x if queries is None else take_tokens(x, queries.indices)) + attended
        normed = RMSNorm(config.rms_norm_eps, name="post_attention_layernorm", **dtypes)(x)
        return x + Mlp(config, name="mlp", **dtypes)(normed)


class Qwen2(nn.Module):
    """A causal transformer over packed rows.

    Attributes:
      config: sizes of the model.
      dtype: of activations and products.
      param_dtype: of the parameters.
      attention: implementation of `llave_jax.ops.attention`.
      remat: what the backward pass computes again, a key of `remat.REMATS`.
      max_segment_length: tokens of the longest sequence; None: of a row.

    References: Yang et al., Qwen2 Technical Report (arXiv 2407.10671).
    """

    config: TextConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "xla"
    remat: str = "none"
    max_segment_length: int | None = None

    def setup(self) -> None:
        config = self.config
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.embed_tokens = nn.Embed(
            config.vocab_size,
            config.hidden_size,
            embedding_init=nn.initializers.normal(1.0),
            **dtypes,
        )
        self.layers = Block(
            config,
            implementation=self.attention,
            max_segment_length=self.max_segment_length,
            **dtypes,
        )
        self.norm = RMSNorm(config.rms_norm_eps, **dtypes)

    def embed(self, tokens: Int[Array, "*tokens"]) -> Float[Array, "*tokens D"]:
        """Looks up token embeddings.

        Args:
          tokens: int32 [...], ids in range(vocab_size).

        Returns:
          [..., D] in `dtype`.
        """
        return self.embed_tokens(tokens)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
    ) -> Float[Array, "B T D"]:
        """Hidden states of all tokens.

        Args:
          x: embedded tokens [B, T, D].
          positions: int32 [B, T], each token's position in its own sequence.
          segment_ids: int32 [B, T]; tokens see earlier tokens of their own segment.

        Returns:
          [B, T, D] before the final norm.
        """
        config = self.config
        cos, sin = rotary_tables(positions, config.head_dim, config.rope_theta)
        return scan_blocks(
            self.layers, config.num_layers, x, cos, sin, segment_ids, remat=self.remat
        )

    def pooled(
        self,
        x: Float[Array, "S R T D"],
        positions: Int[Array, "S R T"],
        segment_ids: Int[Array, "S R T"],
        query_indices: Int[Array, "S I"],
    ) -> Float[Array, "S I D"]:
        """Hidden states of some tokens, as `__call__` gives them.

        The last layer computes queries for these tokens only, and keys and values for all.

        Args:
          x: embedded tokens [S, R, T, D].
          positions: int32 [S, R, T], each token's position in its own sequence.
          segment_ids: int32 [S, R, T].
          query_indices: int32 [S, I], in range(R * T): the tokens.

        Returns:
          [S, I, D] before the final norm.
        """
        config = self.config
        shards, rows, length, width = x.shape

        def last(block: nn.Module, x: Any, cos: Any, sin: Any, segment_ids: Any) -> jax.Array:
            # The rows of a shard one after another.
            in_shard = (shards, rows * length)
            segment_ids = segment_ids.reshape(in_shard)
            cos, sin = (table.reshape(*in_shard, -1) for table in (cos, sin))
            queries = Queries(query_indices, length)
            return block(x.reshape(*in_shard, width), cos, sin, segment_ids, queries)

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

    def final_norm(self, x: Float[Array, "*tokens D"]) -> Float[Array, "*tokens D"]:
        """Hidden states as the embedding and a language-model head read them.

        Args:
          x: [..., D], of `__call__` or `pooled`.

        Returns:
          [..., D] in `dtype`.
        """
        return self.norm(x)


def take_tokens(
    x: Shaped[Array, "S L *rest"], indices: Int[Array, "S I"]
) -> Shaped[Array, "S I *rest"]:
    """The values of some tokens of each shard.

    Args:
      x: [S, L, ...], of all tokens.
      indices: int32 [S, I], in range(L).

    Returns:
      [S, I, ...].
    """
    return jax.vmap(lambda tokens, at: tokens[at])(x, indices)
