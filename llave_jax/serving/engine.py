"""What the batcher runs: a model that takes items as clients wrote them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llave_jax.embedding.embedder import Embedder
from llave_jax.inputs.batch import PackedBatch
from llave_jax.inputs.sequence import TokenSequence
from llave_jax.serving.items import ClientItem, ItemError, load_item
from llave_jax.serving.settings import Limits


class ModelEngine:
    """An `Embedder` behind the batcher (`batcher.Engine`).

    Args:
      embedder: the model.
      limits: of items.
      fetch: reads URLs; None: they are refused.
    """

    def __init__(
        self,
        embedder: Embedder,
        limits: Limits,
        fetch: Callable[[str, int], bytes] | None = None,
    ):
        self.tokens_per_batch = embedder.tokens_per_batch
        self._embedder = embedder
        self._limits = limits
        self._fetch = fetch

    def prepare(self, item: ClientItem) -> TokenSequence:
        """An item's sequence.

        Args:
          item: as a client wrote it.

        Returns:
          The sequence; with `truncate` the part of it that the model reads.

        Raises:
          ItemError: the item cannot be read, or is longer than the model reads.
        """
        loaded = load_item(item, self._embedder.config.inputs, self._limits, self._fetch)
        try:
            sequence = self._embedder.prepare(
                loaded, prompt_name=item.prompt_name, allow_paths=False
            )
        except ValueError as error:
            raise ItemError.of(item, error) from error
        if sequence.num_cut and not item.truncate:
            raise ItemError(
                item.where,
                f"has {len(sequence) + sequence.num_cut} tokens, of which the model reads {len(sequence)}; "
                "shorten it, or send truncate: true to have its end cut off",
                "too_long",
            )
        return sequence

    def pack(self, sequences: Sequence[TokenSequence]) -> tuple[PackedBatch, np.ndarray]:
        """As of `Embedder`."""
        return self._embedder.pack(sequences)

    def forward(self, batch: PackedBatch) -> Any:
        """As of `Embedder`."""
        return self._embedder.forward(batch)
