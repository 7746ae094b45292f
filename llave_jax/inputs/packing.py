"""Packing: many sequences share a row of fixed length, so that little padding is computed.

A batch has one shard for each device. Every index in a batch is local to its shard, and all sides of a
pair lie in the same shard. A group that does not fit is refused; the caller offers it to the next batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import numpy as np

from llave_jax.inputs import taps as T
from llave_jax.inputs.batch import Budget, PackedBatch, empty_batch
from llave_jax.inputs.crops import CropGeometry, patchify
from llave_jax.inputs.sequence import VISUAL_SLOT, TokenSequence

Group = TypeVar("Group")


@dataclasses.dataclass
class _Shard:
    """How much of a shard is used: tokens and segments of each row, crops, group slots."""

    row_used: list[int]
    row_segments: list[int]
    crops_used: int = 0
    groups_used: int = 0


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a group lies in a batch.

    Attributes:
      shard: of all its sequences.
      slot: in the shard's G groups.
      first_crop: in the shard's C crops.
      spans: (row, first token, segment id) of each sequence.
    """

    shard: int
    slot: int
    first_crop: int
    spans: tuple[tuple[int, int, int], ...]


def default_lookahead(budget: Budget, num_shards: int) -> int:
    """How many pairs may wait for a later batch while smaller ones fill the current one.

    A longer lookahead fills batches better but delays pairs. With half as many as a batch has slots,
    almost no pair is delayed twice.

    Args:
      budget: of each shard.
      num_shards: of the process, which packs by itself.

    Returns:
      A number of pairs, at least 1.
    """
    return max(1, budget.groups * num_shards // 2)


class Planner:
    """Decides where groups go, from their sizes alone.

    A group goes to the shard where its longest sequence leaves the least of a row unused. Of several
    such shards it goes to the one that is filled least. Its other sequences go to the rows there in which
    they leave the least unused. The result depends on the order of the calls and on nothing else.

    Args:
      budget: of each shard.
      num_shards: S.
    """

    def __init__(self, budget: Budget, num_shards: int):
        self.budget = budget
        rows = budget.rows
        self.shards = [_Shard([0] * rows, [0] * rows) for _ in range(num_shards)]

    @property
    def full(self) -> bool:
        """Whether every group slot is taken."""
        return all(shard.groups_used == self.budget.groups for shard in self.shards)

    @property
    def num_groups(self) -> int:
        """Groups that have a place so far."""
        return sum(shard.groups_used for shard in self.shards)

    def place(
        self, lengths: Sequence[int], crops: int, shard: int | None = None
    ) -> Placement | None:
        """Takes room for a group.

        Args:
          lengths: int [Z], tokens of its sequences; 0 for a side that it lacks.
          crops: of all its sequences.
          shard: the only shard to look in; None: all of them.

        Returns:
          Where the group goes, or None if no shard has room for it.
        """
        best: tuple[tuple[int, float, int], list[int]] | None = None
        for index in range(len(self.shards)) if shard is None else (shard,):
            used = self.shards[index]
            if used.groups_used == self.budget.groups:
                continue
            if used.crops_used + crops > self.budget.crops:
                continue
            rows = self._choose_rows(used.row_used, lengths)
            if rows is None:
                continue
            row = rows[max(range(len(lengths)), key=lambda side: lengths[side])]
            room = self.budget.row_length - used.row_used[row] - max(lengths)
            choice = (room, self._fill(index), index), rows
            best = choice if best is None else min(best, choice)
        if best is None:
            return None
        (_, _, index), rows = best
        return self._take(index, rows, lengths, crops)

    def _take(
        self, index: int, rows: Sequence[int], lengths: Sequence[int], crops: int
    ) -> Placement:
        shard = self.shards[index]
        spans = []
        for row, length in zip(rows, lengths, strict=True):
            shard.row_segments[row] += 1
            spans.append((row, shard.row_used[row], shard.row_segments[row]))
            shard.row_used[row] += length
        placement = Placement(index, shard.groups_used, shard.crops_used, tuple(spans))
        shard.crops_used += crops
        shard.groups_used += 1
        return placement

    def _fill(self, index: int) -> float:
        """Used share of the resource that is scarcest in a shard."""
        shard, budget = self.shards[index], self.budget
        return max(
            sum(shard.row_used) / (budget.rows * budget.row_length),
            shard.crops_used / max(budget.crops, 1),
            shard.groups_used / budget.groups,
        )

    def _choose_rows(self, row_used: Sequence[int], lengths: Sequence[int]) -> list[int] | None:
        """A row for each sequence: the longest one first, into the row that it fills best; None if a
        sequence fits into no row."""
        used = list(row_used)
        rows = [0] * len(lengths)
        for side in sorted(range(len(lengths)), key=lambda side: -lengths[side]):
            most = self.budget.row_length - lengths[side]
            fullest = max([n for n in used if n <= most], default=None)
            if fullest is None:
                return None
            rows[side] = used.index(fullest)
            used[rows[side]] += lengths[side]
        return rows

    def check(self, lengths: Sequence[int], crops: int, taps: int, name: str) -> None:
        """Refuses a group that would not fit into an empty batch either.

        Args:
          lengths: int [Z], as for `place`.
          crops: of all its sequences.
          taps: the most of any of its visual tokens.
          name: of the group, for the error.

        Raises:
          ValueError: it would not fit; the message names what is too small.
        """
        budget = self.budget
        if len(lengths) != budget.sides:
            raise ValueError(
                f"{name}: {len(lengths)} sequences; the budget has {budget.sides} sides"
            )
        for field, need in {"row_length": max(lengths), "crops": crops, "taps": taps}.items():
            if need > getattr(budget, field):
                raise ValueError(
                    f"{name}: needs {field} {need}, the batch budget has {getattr(budget, field)}; "
                    f"raise {field} or lower the model's max_length"
                )
        if len(lengths) > 1 and self._choose_rows([0] * budget.rows, lengths) is None:
            raise ValueError(
                f"{name}: sequences of {list(lengths)} tokens do not fit together into "
                f"{budget.rows} rows of {budget.row_length}; raise rows"
            )


def place_dealt(
    waiting: Iterable[Group],
    dealt: Iterable[Group],
    home: Callable[[Group], tuple[int, int]],
    add: Callable[[Group, int, int | None], bool],
    micro_batches: int,
    lookahead: int,
) -> list[Group]:
    """Places the groups of one step: those that waited, and those that the order assigns to it.

    Groups that waited come first, so that none is starved. Every other group goes to the shard that it is
    assigned to. If that shard is full, the group goes to another shard of the same micro-batch,
    where its pool of negatives is the same, and only then to another micro-batch.

    Args:
      waiting: groups that had no room in earlier steps, the oldest first.
      dealt: the groups that the order assigns to this step.
      home: group -> the (micro-batch, shard) that it is assigned to.
      add: (group, micro-batch, shard or None for any) -> whether it was placed there.
      micro_batches: of a step.
      lookahead: once so many of `waiting` have found no room again, the others are not tried.

    Returns:
      The groups that have to wait: those of `waiting` first.
    """

    def anywhere(group: Group) -> bool:
        first = home(group)[0]
        others = (number for number in range(micro_batches) if number != first)
        return any(add(group, number, None) for number in (first, *others))

    refused: list[Group] = []
    for group in waiting:
        if len(refused) >= lookahead or not anywhere(group):
            refused.append(group)
    moved = [group for group in dealt if not add(group, *home(group))]
    return refused + [group for group in moved if not anywhere(group)]


class Packer:
    """Fills one batch after another: `add` groups until one is refused or the batch is `full`, then `emit`.

    Args:
      budget: of each shard.
      num_shards: S.
      crop: the geometry of the model's crops.
    """

    def __init__(self, budget: Budget, num_shards: int, crop: CropGeometry):
        self.budget = budget
        self.num_shards = num_shards
        self._crop = crop
        self._start()

    def _start(self) -> None:
        self.planner = Planner(self.budget, self.num_shards)
        self._batch = empty_batch(self.budget, self.num_shards, self._crop)
        self._ids = [[""] * self.budget.groups for _ in range(self.num_shards)]

    @property
    def full(self) -> bool:
        """Whether every group slot is taken."""
        return self.planner.full

    @property
    def num_groups(self) -> int:
        """Groups in the batch so far."""
        return self.planner.num_groups

    def add(
        self, group: Sequence[TokenSequence | None], group_id: str = "", shard: int | None = None
    ) -> bool:
        """Writes a group into the batch, if it has room.

        Args:
          group: Z sequences; None for a side that the group lacks (a pair without a hard negative).
          group_id: comes back from `emit`, and names the group in errors.
          shard: the only shard that is tried; None: all of them.

        Returns:
          Whether there was room.

        Raises:
          ValueError: the group would not fit into an empty batch either; it names the group.
        """
        present = [sequence for sequence in group if sequence is not None]
        lengths = [0 if sequence is None else len(sequence) for sequence in group]
        crops = sum(len(sequence.crops) for sequence in present)
        taps = max((sequence.taps.width for sequence in present), default=1)
        name = group_id or next((s.name for s in present if s.name), "group")
        self.planner.check(lengths, crops, taps, name)
        placement = self.planner.place(lengths, crops, shard)
        if placement is None:
            return False
        first_crop = placement.first_crop
        for side, (sequence, span) in enumerate(zip(group, placement.spans, strict=True)):
            if sequence is None:
                self._batch.pooled[placement.shard, side, placement.slot] = -1
                continue
            self._write(sequence, placement, side, span, first_crop)
            first_crop += len(sequence.crops)
        self._batch.valid[placement.shard, placement.slot] = True
        self._ids[placement.shard][placement.slot] = group_id
        return True

    def emit(self) -> tuple[PackedBatch, list[list[str]]]:
        """Hands out the batch and starts the next one.

        Returns:
          The batch, and its groups' ids [S][G], "" for empty slots.
        """
        batch, ids = self._batch, self._ids
        self._start()
        return batch, ids

    def _write(
        self,
        sequence: TokenSequence,
        placement: Placement,
        side: int,
        span: tuple[int, int, int],
        first_crop: int,
    ) -> None:
        batch, budget, shard = self._batch, self.budget, placement.shard
        num_patches = self._crop.num_patches
        row, start, segment = span
        end = start + len(sequence)
        batch.tokens[shard, row, start:end] = sequence.tokens
        batch.segment_ids[shard, row, start:end] = segment
        batch.positions[shard, row, start:end] = np.arange(len(sequence))
        batch.pooled[shard, side, placement.slot] = row * budget.row_length + end - 1
        if not len(sequence.crops):
            return
        batch.patches[shard, first_crop : first_crop + len(sequence.crops)] = patchify(
            sequence.crops, self._crop.patch_size
        )
        for crop in sequence.zero_crops:
            batch.zero_crops[shard, first_crop + crop] = True
        taps = T.widen(sequence.taps, budget.taps)
        slots = start + np.flatnonzero(sequence.tokens == VISUAL_SLOT)
        batch.tap_index[shard, row, slots] = np.where(
            taps.index == T.NEWLINE,
            budget.crops * num_patches,
            taps.index + first_crop * num_patches,
        )
        if batch.tap_weight is not None:
            batch.tap_weight[shard, row, slots] = taps.weight
