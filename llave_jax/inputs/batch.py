"""The arrays that one forward pass reads, and the budget that fixes their shapes.

Which sequence goes where in them is `packing.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from llave_jax.inputs.crops import CropGeometry


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one shard of one batch has room for. It is fixed for a run, so that one program is compiled.

    Attributes:
      rows: rows of tokens.
      row_length: tokens a row.
      crops: crops, over all sequences.
      groups: groups of sequences: pairs in training, single items in embedding.
      sides: sequences in a group (2 in training: query and target).
      taps: taps a visual token may have (1 for plain tiles, 4 where maps are resized).

    Raises:
      ValueError: a number is not positive; `crops` may be 0.
    """

    rows: int
    row_length: int
    crops: int
    groups: int
    sides: int = 2
    taps: int = 1

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value < (0 if field.name == "crops" else 1):
                raise ValueError(f"budget: {field.name} is {value}; expected a positive number")


class PackedBatch(NamedTuple):
    """Arrays of one batch. S shards, R rows of T tokens, C crops of P patches, G groups of Z sequences,
    K taps. All indices are local to their shard.

    Attributes:
      patches: uint8 [S, C, P, patch * patch * 3], pixels of each patch by row, column, channel.
      zero_crops: bool [S, C], True for crops that are 0 after normalisation, where `patches` is ignored:
        the zero pictures of markers without an image.
      tokens: int32 [S, R, T], VISUAL_SLOT where a visual token goes.
      segment_ids: int32 [S, R, T], 1, 2, ... for the sequences of a row, 0 for unused tokens.
      positions: int32 [S, R, T], from 0 for each sequence.
      tap_index: int32 [S, R, T, K] into the shard's C * P patch features, or C * P for the newline.
      tap_weight: float32 [S, R, T, K]; None with one tap, whose weight is 1.
      pooled: int32 [S, Z, G], index in R * T of each sequence's last token; -1 for a side that a
        group lacks.
      valid: bool [S, G], False for slots left empty.
    """

    patches: np.ndarray
    zero_crops: np.ndarray
    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    tap_index: np.ndarray
    tap_weight: np.ndarray | None
    pooled: np.ndarray
    valid: np.ndarray


class PairLabels(NamedTuple):
    """What the loss knows of a step's pairs besides their embeddings. M micro-batches, S shards, Z sides, G slots.

    The values of empty slots mean nothing.

    Attributes:
      target_ids: int32 [M, S, Z - 1, G], equal for equal contents (text and image), of the target and the
        negatives of each pair.
      subsets: int32 [M, S, G], the number of each pair's subset in its source.
      scores: float32 [M, S, Z - 1, G], a teacher's score of the target and of each negative; nan where the row
        has none.
    """

    target_ids: np.ndarray
    subsets: np.ndarray
    scores: np.ndarray


def empty_batch(budget: Budget, num_shards: int, crop: CropGeometry) -> PackedBatch:
    """A batch with nothing in it: all slots invalid, all tokens unused.

    Args:
      budget: of each shard.
      num_shards: S.
      crop: the geometry of the crops.

    Returns:
      Arrays of the shapes that `PackedBatch` gives.
    """
    tokens = (num_shards, budget.rows, budget.row_length)
    newline = budget.crops * crop.num_patches
    return PackedBatch(
        patches=np.zeros((num_shards, budget.crops, crop.num_patches, crop.patch_dim), np.uint8),
        zero_crops=np.zeros((num_shards, budget.crops), bool),
        tokens=np.zeros(tokens, np.int32),
        segment_ids=np.zeros(tokens, np.int32),
        positions=np.zeros(tokens, np.int32),
        tap_index=np.full((*tokens, budget.taps), newline, np.int32),
        tap_weight=None if budget.taps == 1 else np.zeros((*tokens, budget.taps), np.float32),
        pooled=np.zeros((num_shards, budget.sides, budget.groups), np.int32),
        valid=np.zeros((num_shards, budget.groups), bool),
    )


def budget_of(batch: PackedBatch) -> Budget:
    """The budget that fixed a batch's shapes.

    Args:
      batch: of any number of shards.

    Returns:
      What one shard has room for.
    """
    rows, row_length, taps = batch.tap_index.shape[1:]
    sides, groups = batch.pooled.shape[1:]
    return Budget(rows, row_length, batch.patches.shape[1], groups, sides, taps)


def stack_batches(batches: Sequence[PackedBatch]) -> PackedBatch:
    """Micro-batches as one batch.

    Args:
      batches: M of them, of equal shapes.

    Returns:
      Arrays with a leading axis [M].
    """
    arrays: list[Any] = [
        None if parts[0] is None else np.stack(parts) for parts in zip(*batches, strict=True)
    ]
    return PackedBatch(*arrays)
