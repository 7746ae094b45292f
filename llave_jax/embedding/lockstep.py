"""Processes of a job run the same programs in the same order, though each reads its own items."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from llave_jax.embedding.shapes import IndexedBatch
from llave_jax.inputs.batch import Budget, budget_of, empty_batch
from llave_jax.inputs.crops import CropGeometry


def in_lockstep(
    batches: Iterator[IndexedBatch], num_shards: int, crop: CropGeometry
) -> Iterator[IndexedBatch]:
    """Batches of the same shapes, and the same number of them, in every process.

    In each round the first process that has a batch left decides the shape. The others join with a
    batch of that shape if that is their next one, and with an empty batch if not.

    Args:
      batches: of this process.
      num_shards: S of this process's batches.
      crop: the geometry of the crops.

    Yields:
      This process's batch of each round, with the indices of all processes' shards.
    """
    waiting = next(batches, None)
    while True:
        offers = multihost_utils.process_allgather(_shape(waiting))
        offers = offers[offers.any(axis=1)]
        if not len(offers):
            return
        shape = offers[0]
        if waiting is not None and np.array_equal(_shape(waiting), shape):
            packed, indices = waiting
            waiting = next(batches, None)
        else:
            budget = Budget(*map(int, shape))
            packed = empty_batch(budget, num_shards, crop)
            indices = np.full((num_shards, budget.groups), -1, np.int32)
        everyone = multihost_utils.process_allgather(indices)
        yield IndexedBatch(packed, everyone.reshape(-1, everyone.shape[-1]))


def _shape(batch: IndexedBatch | None) -> np.ndarray:
    """The fields of the batch's `Budget`, int32 [6]; zeros for None."""
    if batch is None:
        return np.zeros(6, np.int32)
    return np.array(dataclasses.astuple(budget_of(batch.packed)), np.int32)


def merge_failures(failures: dict[int, str]) -> dict[int, str]:
    """Collects the failures of all processes in every process, in the order of the items.

    Args:
      failures: this process's: why an item cannot be read, by the item's index.

    Returns:
      Index of an item -> why it cannot be read.
    """
    if jax.process_count() > 1:
        encoded = np.frombuffer(json.dumps(failures).encode(), np.uint8)
        sizes = multihost_utils.process_allgather(np.int32(len(encoded)))
        padded = np.full(sizes.max(), ord(" "), np.uint8)
        padded[: len(encoded)] = encoded
        everyone = multihost_utils.process_allgather(padded)
        failures = {int(i): m for row in everyone for i, m in json.loads(row.tobytes()).items()}
    return dict(sorted(failures.items()))
