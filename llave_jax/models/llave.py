"""LLaVE: packed batches to L2-normalised embeddings.

Puts SigLIP, the projector and Qwen2 together. The host has decided which patch goes where
(`llave_jax.inputs`); the device only gathers and multiplies.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, UInt8

from llave_jax.inputs.batch import Budget, PackedBatch, empty_batch
from llave_jax.models.config import LlaveConfig
from llave_jax.models.layers import Dtype
from llave_jax.models.parameters import parameter_shapes, weight_at
from llave_jax.models.projector import Projector
from llave_jax.models.qwen2 import Qwen2
from llave_jax.models.remat import find_remat
from llave_jax.models.siglip import SiglipTower
from llave_jax.ops.attention_check import Case
from llave_jax.parallel import sharding

# Name by which a policy of `jax.checkpoint` can keep the vision tower's features.
VISION_FEATURES = "vision_features"


class Llave(nn.Module):
    """The embedding model.

    Attributes:
      config: sizes of the towers, and how inputs are laid out.
      dtype: of activations and products. Norms, softmax and the embedding are computed in float32.
      param_dtype: of the parameters.
      attention: implementation of the language model's attention (`llave_jax.ops.attention`).
      vision_attention: implementation of the vision tower's attention.
      remat: what the backward pass computes again, a key of `remat.REMATS`.
      freeze_vision: whether gradients stop at the vision tower.

    References: Lan et al., LLaVE (arXiv 2503.04812), section 3.1.
    """

    config: LlaveConfig
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32
    attention: str = "xla"
    vision_attention: str = "xla"
    remat: str = "none"
    freeze_vision: bool = False

    def setup(self) -> None:
        config = self.config
        dtypes: dict[str, Any] = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        self.vision_tower = SiglipTower(
            config.vision,
            attention=self.vision_attention,
            remat="none" if self.freeze_vision else self.remat,
            **dtypes,
        )
        self.projector = Projector(config.text.hidden_size, **dtypes)
        self.image_newline = self.param(
            "image_newline",
            nn.initializers.normal(config.text.hidden_size**-0.5),
            (config.text.hidden_size,),
            self.param_dtype,
        )
        self.language_model = Qwen2(
            config.text,
            attention=self.attention,
            remat=self.remat,
            max_segment_length=config.inputs.max_length,
            **dtypes,
        )

    def __call__(self, batch: PackedBatch) -> Float[Array, "S Z G D"]:
        """Embeddings of all sequences of a batch.

        Args:
          batch: S shards of Z x G sequences each.

        Returns:
          float32 [S, Z, G, D], L2-normalised. In slots that are not valid they have no meaning.
        """
        if self.is_initializing():
            # This scans over all layers, the last one included, and so makes stacked parameters.
            self.hidden_states(batch)
        pooled = jnp.asarray(batch.pooled)
        # An empty slot, -1, may read any token.
        query_indices = jnp.maximum(pooled, 0).reshape(len(pooled), -1)
        x = self.language_model.pooled(
            self.inputs_embeds(batch),
            jnp.asarray(batch.positions),
            jnp.asarray(batch.segment_ids),
            query_indices,
        )
        x = self.language_model.final_norm(x).astype(jnp.float32)
        norm = jnp.sqrt(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
        # The lower bound is that of torch.nn.functional.normalize.
        return (x / jnp.maximum(norm, 1e-12)).reshape(*pooled.shape, -1)

    @nn.nowrap
    def abstract_parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What the model reads: path -> shape and dtype of each parameter."""
        shapes = parameter_shapes(self.config)
        return {p: jax.ShapeDtypeStruct(shape, self.param_dtype) for p, shape in shapes.items()}

    def hidden_states(self, batch: PackedBatch) -> Float[Array, "S R T D"]:
        """Final hidden states of all tokens.

        Args:
          batch: S shards of R rows each.

        Returns:
          [S, R, T, D] in `dtype`, after the final norm.
        """
        x = self.inputs_embeds(batch)
        shards, rows, length, width = x.shape
        x = self.language_model(
            x.reshape(shards * rows, length, width),
            jnp.asarray(batch.positions).reshape(shards * rows, length),
            jnp.asarray(batch.segment_ids).reshape(shards * rows, length),
        )
        return self.language_model.final_norm(x).reshape(shards, rows, length, width)

    def inputs_embeds(self, batch: PackedBatch) -> Float[Array, "S R T D"]:
        """What the language model reads: embedded text tokens, and visual tokens in their places.

        Args:
          batch: S shards of R rows each.

        Returns:
          [S, R, T, D] in `dtype`.
        """
        tokens = jnp.asarray(batch.tokens)
        text = self.language_model.embed(jnp.maximum(tokens, 0))
        if batch.patches.shape[1] == 0 and not self.is_initializing():
            return text
        features = self.vision_features(jnp.asarray(batch.patches), jnp.asarray(batch.zero_crops))
        visual_tokens = Llave.visual_tokens
        if find_remat(self.remat).block_policy is not None:
            # Its intermediate results are large and cheap to compute again.
            visual_tokens = nn.remat(visual_tokens)
        return jnp.where(tokens[..., None] < 0, visual_tokens(self, features, batch), text)

    def visual_tokens(
        self, features: Float[Array, "S C P O"], batch: PackedBatch
    ) -> Float[Array, "S R T D"]:
        """Visual tokens, put together from the projected features of their taps.

        Args:
          features: patch features [S, C, P, O].
          batch: says which taps each token has.

        Returns:
          [S, R, T, D]. At text tokens they have no meaning.
        """
        features = self.projector(features)
        shards, crops, patches, width = features.shape
        newline = jnp.broadcast_to(self.image_newline.astype(self.dtype), (shards, 1, width))
        table = jnp.concatenate([features.reshape(shards, crops * patches, width), newline], axis=1)
        tapped = jax.vmap(lambda rows, index: rows[index])(table, jnp.asarray(batch.tap_index))
        if batch.tap_weight is None:
            return tapped[..., 0, :]
        weight = jnp.asarray(batch.tap_weight)[..., None]
        combined = jnp.sum(tapped * weight, axis=-2)
        if self.config.inputs.pool_mode == "max":
            takes_max = jnp.all(weight == 1, axis=-2)
            combined = jnp.where(takes_max, jnp.max(tapped, axis=-2), combined)
        return combined.astype(self.dtype)

    def vision_features(
        self, patches: UInt8[Array, "S C P X"], zero_crops: Bool[Array, "S C"]
    ) -> Float[Array, "S C P O"]:
        """The vision tower's features of each patch.

        Args:
          patches: uint8 [S, C, P, X], pixels of each patch by row, column, channel.
          zero_crops: bool [S, C], True for a crop that is 0 after normalisation, whatever its pixels.

        Returns:
          [S, C, P, O] in `dtype`.
        """
        shards, crops = patches.shape[:2]
        features = self.vision_tower(
            patches.reshape(shards * crops, *patches.shape[2:]), zero_crops.reshape(-1)
        )
        if self.freeze_vision:
            features = jax.lax.stop_gradient(features)
        features = checkpoint_name(features, VISION_FEATURES)
        return features.reshape(shards, crops, *features.shape[1:])


def example_batch(config: LlaveConfig) -> PackedBatch:
    """The smallest batch that touches every parameter: for initialising and for shapes.

    Args:
      config: of the model.

    Returns:
      A batch of one shard, one row and one crop, without sequences.
    """
    budget = Budget(rows=1, row_length=8, crops=1, groups=1, sides=1)
    return empty_batch(budget, 1, config.vision.crop)


def attention_cases(config: LlaveConfig, dtype: str) -> tuple[Case, Case]:
    """Attention as a model calls it, for checking implementations.

    Args:
      config: of the model.
      dtype: of its activations.

    Returns:
      Cases of the language model and of the vision tower.
    """
    text, vision = config.text, config.vision
    return (
        Case.packed(text.num_heads, text.num_kv_heads, text.head_dim, dtype),
        Case.crops(
            vision.num_heads, vision.hidden_size // vision.num_heads, vision.num_patches, dtype
        ),
    )


def abstract_params(model: Llave) -> dict[str, Any]:
    """The parameter tree of a model as shapes and dtypes.

    Args:
      model: the module.

    Returns:
      Nested dict of `jax.ShapeDtypeStruct`.
    """
    return sharding.unflatten(model.abstract_parameters())


def param_shardings(params: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Where parameters lie on a mesh, by the table of weights.

    Args:
      params: parameter tree of arrays or shapes.
      mesh: the mesh.

    Returns:
      The tree with a `NamedSharding` for each parameter.

    Raises:
      ValueError: a parameter has no row in the table.
    """

    def place(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, sharding.param_spec(weight_at(path).axes, shape, mesh))

    flat = sharding.flatten(params)
    return sharding.unflatten({path: place(path, x.shape) for path, x in flat.items()})
