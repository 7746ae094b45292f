"""The compiled forward pass: what embedding, compiling ahead and benchmarks run alike."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax

from llave_jax.embedding.shapes import Costs
from llave_jax.inputs.batch import PackedBatch
from llave_jax.models.config import LlaveConfig
from llave_jax.models.llave import Llave
from llave_jax.models.parameters import parameter_shapes
from llave_jax.parallel import sharding


def build_embedding_step(
    model: Llave, mesh: jax.sharding.Mesh
) -> Callable[[Any, PackedBatch], jax.Array]:
    """The forward pass on a mesh, jitted.

    Args:
      model: the module.
      mesh: of real devices, or of a topology that is compiled for. Parameters are used where they lie;
        batches are split over the batch axes.

    Returns:
      `(params, batch) -> embeddings`: float32 [S, Z, G, D], the whole array on every device.
    """

    def embed(params: Any, batch: PackedBatch) -> Any:
        with sharding.use_mesh(mesh):
            return model.apply({"params": params}, batch)

    return jax.jit(
        embed,
        in_shardings=(None, sharding.batch_sharding(mesh)),
        out_shardings=sharding.replicated(mesh),
    )


def model_costs(config: LlaveConfig) -> Costs:
    """What a model's work costs, by its products.

    Args:
      config: of the model.

    Returns:
      Costs in tokens of the language model's layers.
    """
    text = config.text
    sizes = {path: math.prod(shape) for path, shape in parameter_shapes(config).items()}
    per_patch = sum(
        n for path, n in sizes.items() if path.startswith(("vision_tower", "projector"))
    )
    per_token = sum(n for path, n in sizes.items() if path.startswith("language_model/layers"))
    # Scores and weighted values; a token sees half of its row.
    per_key = text.num_layers * text.num_heads * text.head_dim
    return Costs(config.vision.num_patches * per_patch / per_token, per_key / per_token)
