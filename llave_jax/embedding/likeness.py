"""How alike models embed the same items. One model is in memory at a time."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence

import numpy as np

from llave_jax.embedding.embedder import Embedder
from llave_jax.inputs.item import Item


def mean_cosines(
    models: Sequence[str | os.PathLike],
    other: str | os.PathLike,
    items: Sequence[Item],
    dtype: str | None = None,
) -> list[float]:
    """Mean cosine between the embeddings of each model and of another one.

    Args:
      models: as for `Embedder.from_pretrained`.
      other: the model that they are compared with.
      items: that are embedded, at least one.
      dtype: of parameters and activations; None: as for `Embedder.from_pretrained`.

    Returns:
      Of each model, the mean over the items.

    Raises:
      ValueError: an item cannot be read; there are none; or a model cannot be loaded, or has vectors of another length.
    """
    if not items:
        raise ValueError("no items to compare models by")
    reference = _embed(other, items, dtype)
    cosines = []
    for model in models:
        vectors = _embed(model, items, dtype)
        if vectors.shape != reference.shape:
            raise ValueError(
                f"{model} and {other} have vectors of {vectors.shape[1]} and {reference.shape[1]} numbers"
            )
        cosines.append(float(np.einsum("nd,nd->n", vectors, reference, dtype=np.float64).mean()))
    return cosines


def _embed(model: str | os.PathLike, items: Sequence[Item], dtype: str | None) -> np.ndarray:
    vectors = Embedder.from_pretrained(model, dtype=dtype).encode(items, show_progress=True)
    # The embedder and its compiled programs refer to each other.
    gc.collect()
    return vectors
