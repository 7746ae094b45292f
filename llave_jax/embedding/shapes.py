"""Batches of few shapes for sequences of any length, so that few programs are compiled.

Sequences are grouped by what they need: row length, room for crops, width of taps. A group has one
full-size batch; only its last, partly filled batches have other shapes. Reading items is `reading.py`,
running the batches is `embedder.py`.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llave_jax.inputs.batch import Budget, PackedBatch
from llave_jax.inputs.config import InputSpec
from llave_jax.inputs.packing import Packer, Planner
from llave_jax.inputs.sequence import TokenSequence

# Rows for texts: (longest text, row length). Plain attention costs as much as a row is long, and
# texts of at most half a row fill it well.
TEXT_ROWS = ((64, 128), (512, 512))
# After so many full batches of a group, its last sequences take a full batch as well. That costs less
# than compiling a program for them.
FULL_BATCHES_BEFORE_REST = 4
# Slots are planned for texts of this length or more: the chat format alone has more than 16 tokens.
_SHORTEST_SEQUENCE = 16


class IndexedBatch(NamedTuple):
    """A batch, and which items it holds.

    Attributes:
      packed: the arrays.
      indices: int32 [S, G], index of the item in each slot; -1 where a slot is empty.
    """

    packed: PackedBatch
    indices: np.ndarray


class _Group(NamedTuple):
    """What sequences of one batch have in common.

    Attributes:
      row_length: tokens a row.
      crops: crops of the largest sequence, rounded up to a power of two; 0 for texts.
      taps: taps a visual token has.
    """

    row_length: int
    crops: int
    taps: int


class BatchShapes:
    """Sorts sequences into batches.

    Args:
      spec: the model's input settings.
      num_shards: S of this process's batches.
      tokens_per_batch: tokens of a shard.
      batch_size: at most so many items in a shard; None: as many as fit.
    """

    def __init__(
        self, spec: InputSpec, num_shards: int, tokens_per_batch: int, batch_size: int | None
    ):
        self._spec = spec
        self._num_shards = num_shards
        self._tokens_per_batch = tokens_per_batch
        self._batch_size = batch_size

    def batches(self, sequences: Iterable[tuple[int, TokenSequence]]) -> Iterator[IndexedBatch]:
        """Batches as they fill up, and in the end what is left of each group.

        Args:
          sequences: (index of the item, its sequence), read as they are needed.

        Yields:
          Batches that hold each sequence once.
        """
        packers: dict[Budget, Packer] = {}
        members: dict[Budget, list[tuple[int, TokenSequence]]] = collections.defaultdict(list)
        emitted: collections.Counter[Budget] = collections.Counter()
        budgets: dict[_Group, Budget] = {}
        for index, sequence in sequences:
            group = self._group(sequence)
            if group not in budgets:
                budgets[group] = self._full(group)
            budget = budgets[group]
            if budget not in packers:
                packers[budget] = self._packer(budget)
            if not packers[budget].add([sequence], str(index)):
                yield _emit(packers[budget])
                emitted[budget] += 1
                members[budget].clear()
                packers[budget].add([sequence], str(index))
            members[budget].append((index, sequence))
        for budget, rest in members.items():
            packer = packers[budget]
            if emitted[budget] < FULL_BATCHES_BEFORE_REST:
                packer = self._packer(self._smallest([s for _, s in rest], budget))
                for index, sequence in rest:
                    packer.add([sequence], str(index))
            yield _emit(packer)

    def _packer(self, budget: Budget) -> Packer:
        return Packer(budget, self._num_shards, self._spec.crop)

    def _group(self, sequence: TokenSequence) -> _Group:
        longest_row = _power_of_two(self._spec.config.max_length)
        if crops := len(sequence.crops):
            return _Group(longest_row, _power_of_two(crops), sequence.taps.width)
        length = len(sequence)
        row_length = next((row for longest, row in TEXT_ROWS if length <= longest), longest_row)
        return _Group(min(row_length, longest_row), 0, sequence.taps.width)

    def _full(self, group: _Group) -> Budget:
        """The full-size batch of a group."""
        rows = max(1, self._tokens_per_batch // group.row_length)
        crops = group.crops
        if crops:
            # A crop has at most `num_patches` tokens. Pooled crops have fewer: twice the room.
            crops = max(2 * rows * group.row_length // self._spec.crop.num_patches, crops)
        slots = self._batch_size or rows * max(1, group.row_length // _SHORTEST_SEQUENCE)
        return Budget(rows, group.row_length, crops, slots, sides=1, taps=group.taps)

    def _smallest(self, sequences: Sequence[TokenSequence], full: Budget) -> Budget:
        """The smallest budget that holds all of these, out of few, so that each is compiled once."""
        lengths = [len(sequence) for sequence in sequences]
        crops = [len(sequence.crops) for sequence in sequences]
        # Crops cost most, so their number is exact up to 8, and a multiple of 8 above.
        all_crops = sum(crops) if sum(crops) <= 8 else -(-sum(crops) // 8) * 8
        row_length = min(full.row_length, _power_of_two(max(lengths), least=64))
        num_crops = max(-(-all_crops // self._num_shards), max(crops))
        rows = 1
        while True:
            # Slots in proportion to rows, rather than one an item: fewer different shapes.
            slots = max(1, min(full.groups, full.groups * rows // full.rows))
            budget = Budget(rows, row_length, num_crops, slots, sides=1, taps=full.taps)
            planner = Planner(budget, self._num_shards)
            sizes = zip(lengths, crops, strict=True)
            if all(planner.place([length], c) is not None for length, c in sizes):
                return budget
            rows, num_crops = 2 * rows, min(all_crops, 2 * num_crops)


def _emit(packer: Packer) -> IndexedBatch:
    packed, ids = packer.emit()
    indices = [[int(index) if index else -1 for index in shard] for shard in ids]
    return IndexedBatch(packed, np.array(indices, np.int32))


def _power_of_two(n: int, least: int = 1) -> int:
    """The next power of two from n on, at least `least`."""
    return max(least, 1 << (n - 1).bit_length()) if n else least
