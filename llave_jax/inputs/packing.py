"""Packing: many sequences into rows of fixed shape, so that no padding is computed.

A batch has one shard for each device; every index in it is local to its shard, and all sides of a
pair share a shard. What does not fit is left to the caller, to put into the next batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np

from llave_jax.inputs import taps as T
from llave_jax.inputs.sequence import VISUAL_SLOT, Sequence
from llave_jax.models.config import LlaveConfig


@dataclasses.dataclass(frozen=True)
class Budget:
    """What one shard of one batch has room for; fixed by config, so one program is compiled.

    Attributes:
      rows: rows of tokens.
      row_length: tokens a row.
      crops: crops, over all sequences.
      groups: groups of sequences: pairs in training, single items in embedding.
      sides: sequences in a group (2 in training: query and target).
      taps: taps a visual token may have (1 for plain tiles, 4 where maps are resized).
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
    """Arrays of one batch. S shards, R rows of L tokens, C crops, G groups of Z sequences, K taps.

    Attributes:
      patches: uint8 [S, C, P, patch * patch * 3], pixels of each patch by row, column, channel.
      tokens: int32 [S, R, L], VISUAL_SLOT where a visual token goes.
      segment_ids: int32 [S, R, L], 1, 2, ... for the sequences of a row, 0 for unused tokens.
      positions: int32 [S, R, L], from 0 for each sequence.
      tap_index: int32 [S, R, L, K] into the shard's C * P patch features, or C * P for the newline.
      tap_weight: float32 [S, R, L, K]; None with one tap, whose weight is 1.
      pooled: int32 [S, Z, G], index in R * L of each sequence's last token.
      valid: bool [S, G], False for slots left empty.
    """

    patches: np.ndarray
    tokens: np.ndarray
    segment_ids: np.ndarray
    positions: np.ndarray
    tap_index: np.ndarray
    tap_weight: np.ndarray | None
    pooled: np.ndarray
    valid: np.ndarray


@dataclasses.dataclass
class _Shard:
    """Room left in one shard, and what has been put where."""

    row_used: list[int]
    row_segments: list[int]
    crops_used: int = 0
    groups_used: int = 0

    @property
    def tokens_used(self) -> int:
        return sum(self.row_used)


class Packer:
    """Fills one batch after another: `add` groups until `full` or refused, then `emit`.

    Groups go to the least filled shard with room, sequences to the tightest row: deterministic,
    in the order of the calls.
    """

    def __init__(self, budget: Budget, num_shards: int, config: LlaveConfig):
        self.budget = budget
        self.num_shards = num_shards
        self._vision = config.vision
        self._start()

    def _start(self) -> None:
        rows = self.budget.rows
        self._shards = [_Shard([0] * rows, [0] * rows) for _ in range(self.num_shards)]
        self._batch = empty_batch(
            self.budget, self.num_shards, self._vision.num_patches, self._vision.patch_dim
        )
        self._ids: list[list[str]] = [[""] * self.budget.groups for _ in range(self.num_shards)]

    @property
    def full(self) -> bool:
        """Every group slot is taken."""
        return all(shard.groups_used == self.budget.groups for shard in self._shards)

    @property
    def num_groups(self) -> int:
        """Groups in the batch so far."""
        return sum(shard.groups_used for shard in self._shards)

    def add(self, group: Seq[Sequence], group_id: str = "") -> bool:
        """Place a group of `budget.sides` sequences; False if it has no room in this batch.

        Raises:
          ValueError: the group would not fit in an empty batch either.
        """
        self._check(group, group_id)
        crops = sum(len(sequence.crops) for sequence in group)
        order = sorted(range(self.num_shards), key=lambda s: (self._fill(s), s))
        for index in order:
            shard = self._shards[index]
            if shard.groups_used == self.budget.groups:
                continue
            if shard.crops_used + crops > self.budget.crops:
                continue
            rows = self._choose_rows(shard, [len(sequence) for sequence in group])
            if rows is None:
                continue
            self._ids[index][shard.groups_used] = group_id
            for side, (sequence, row) in enumerate(zip(group, rows, strict=True)):
                self._write(index, side, sequence, row)
            self._batch.valid[index, shard.groups_used] = True
            shard.groups_used += 1
            return True
        return False

    def emit(self) -> tuple[PackedBatch, list[list[str]]]:
        """The batch, and the ids of its groups by shard and slot ("" for an empty one); starts anew."""
        batch, ids = self._batch, self._ids
        self._start()
        return batch, ids

    def _fill(self, index: int) -> float:
        """Share of the scarcest resource used."""
        shard, budget = self._shards[index], self.budget
        return max(
            shard.tokens_used / (budget.rows * budget.row_length),
            shard.crops_used / max(budget.crops, 1),
            shard.groups_used / budget.groups,
        )

    def _choose_rows(self, shard: _Shard, lengths: list[int]) -> list[int] | None:
        """A row for each sequence, the longest first into the row where it leaves least room."""
        used = list(shard.row_used)
        rows = [0] * len(lengths)
        for side in sorted(range(len(lengths)), key=lambda side: -lengths[side]):
            room = [self.budget.row_length - n - lengths[side] for n in used]
            fitting = [row for row, left in enumerate(room) if left >= 0]
            if not fitting:
                return None
            rows[side] = min(fitting, key=lambda row: (room[row], row))
            used[rows[side]] += lengths[side]
        return rows

    def _write(self, index: int, side: int, sequence: Sequence, row: int) -> None:
        shard, batch, budget = self._shards[index], self._batch, self.budget
        start, length = shard.row_used[row], len(sequence)
        span = slice(start, start + length)
        first_crop, num_patches = shard.crops_used, self._vision.num_patches
        shard.row_used[row] += length
        shard.row_segments[row] += 1
        shard.crops_used += len(sequence.crops)

        batch.tokens[index, row, span] = sequence.tokens
        batch.segment_ids[index, row, span] = shard.row_segments[row]
        batch.positions[index, row, span] = np.arange(length)
        batch.pooled[index, side, shard.groups_used] = row * budget.row_length + start + length - 1
        if not len(sequence.crops):
            return
        batch.patches[index, first_crop : shard.crops_used] = patchify(
            sequence.crops, self._vision.patch_size
        )
        taps = T.widen(sequence.taps, budget.taps)
        newline = budget.crops * num_patches
        slots = start + np.flatnonzero(sequence.tokens == VISUAL_SLOT)
        batch.tap_index[index, row, slots] = np.where(
            taps.index == T.NEWLINE, newline, taps.index + first_crop * num_patches
        )
        if batch.tap_weight is not None:
            batch.tap_weight[index, row, slots] = taps.weight

    def _check(self, group: Seq[Sequence], group_id: str) -> None:
        budget = self.budget
        where = group_id or next((s.name for s in group if s.name), "group")
        if len(group) != budget.sides:
            raise ValueError(
                f"{where}: {len(group)} sequences; the budget has {budget.sides} sides"
            )
        needs = {
            "row_length": max(len(sequence) for sequence in group),
            "crops": sum(len(sequence.crops) for sequence in group),
            "taps": max(sequence.taps.width for sequence in group),
        }
        for field, need in needs.items():
            if need > getattr(budget, field):
                raise ValueError(
                    f"{where}: needs {field} {need}, the batch budget has {getattr(budget, field)}; "
                    f"raise {field} or lower the model's max_length"
                )
        empty = _Shard([0] * budget.rows, [0] * budget.rows)
        if self._choose_rows(empty, [len(sequence) for sequence in group]) is None:
            raise ValueError(
                f"{where}: sequences of {[len(s) for s in group]} tokens do not fit together into "
                f"{budget.rows} rows of {budget.row_length}; raise rows"
            )


def empty_batch(budget: Budget, num_shards: int, num_patches: int, patch_dim: int) -> PackedBatch:
    """A batch with nothing in it: all slots invalid, all tokens unused."""
    tokens = (num_shards, budget.rows, budget.row_length)
    newline = budget.crops * num_patches
    return PackedBatch(
        patches=np.zeros((num_shards, budget.crops, num_patches, patch_dim), np.uint8),
        tokens=np.zeros(tokens, np.int32),
        segment_ids=np.zeros(tokens, np.int32),
        positions=np.zeros(tokens, np.int32),
        tap_index=np.full((*tokens, budget.taps), newline, np.int32),
        tap_weight=None if budget.taps == 1 else np.zeros((*tokens, budget.taps), np.float32),
        pooled=np.zeros((num_shards, budget.sides, budget.groups), np.int32),
        valid=np.zeros((num_shards, budget.groups), bool),
    )


def stack_batches(batches: Seq[PackedBatch]) -> PackedBatch:
    """Micro-batches as one batch with a leading axis."""
    return PackedBatch(*(None if x[0] is None else np.stack(x) for x in zip(*batches, strict=True)))


def patchify(crops: np.ndarray, patch: int) -> np.ndarray:
    """uint8 [C, S, S, 3] -> [C, P, patch * patch * 3]; pixels beyond the last whole patch are dropped.

    Done on the host: on a TPU an array with a last axis of 3 would take 40 times its size.
    """
    count, size = crops.shape[:2]
    side = size // patch
    grid = crops[:, : side * patch, : side * patch].reshape(count, side, patch, side, patch, 3)
    return grid.swapaxes(2, 3).reshape(count, side * side, patch * patch * 3)
