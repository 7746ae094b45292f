"""The compiled forward pass: what embedding, compiling ahead and benchmarks run alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax

from llave_jax.inputs.batch import PackedBatch
from llave_jax.models.llave import Llave
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
