"""What every embedding has to satisfy before it is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llave_jax.inputs.item import Item

# How far the length of an embedding may be from 1. A model whose activations overflow gives zeros or NaN.
_TOLERANCE = 1e-2


def check_embeddings(embeddings: np.ndarray, items: Sequence[Item], model: str = "") -> None:
    """Check that there is a finite embedding of length 1 for each item.

    Args:
      embeddings: float32 [n, D].
      items: the n items, for the message.
      model: as its user calls it, for the message.

    Raises:
      ValueError: another number of rows, or a value that is not finite or a vector that is not normalised; it
        names the item and the model.
    """
    if embeddings.ndim != 2 or len(embeddings) != len(items):
        raise ValueError(
            f"encode returned shape {embeddings.shape} for {len(items)} items; expected [n, D]"
        )
    lengths = np.linalg.norm(embeddings.astype(np.float64), axis=1)
    broken = np.flatnonzero(~(np.abs(lengths - 1) <= _TOLERANCE))
    if len(broken):
        first = broken[0]
        name = items[first].name or f"item {first}"
        finite = np.isfinite(embeddings[first]).all()
        problem = f"has length {lengths[first]:.3g}, not 1" if finite else "is not finite"
        raise ValueError(
            f"{name}: the embedding {problem} (and {len(broken) - 1} more of {len(items)}); "
            f"check the weights of {model or 'the model'}, or use float32"
        )
