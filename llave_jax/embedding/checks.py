"""What every embedding has to satisfy before it is kept."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from llave_jax.inputs.item import Item


def check_embeddings(embeddings: np.ndarray, items: Sequence[Item]) -> None:
    """Check that there is a finite embedding for each item.

    Args:
      embeddings: float32 [n, D].
      items: the n items, for the message.

    Raises:
      ValueError: another number of rows, or a value that is not finite; it names the item.
    """
    if embeddings.ndim != 2 or len(embeddings) != len(items):
        raise ValueError(
            f"encode returned shape {embeddings.shape} for {len(items)} items; expected [n, D]"
        )
    broken = np.flatnonzero(~np.isfinite(embeddings).all(axis=1))
    if len(broken):
        name = items[broken[0]].name or f"item {broken[0]}"
        raise ValueError(
            f"{name}: the embedding is not finite (and {len(broken) - 1} more of {len(items)}); "
            "check the model's weights, or use float32"
        )
