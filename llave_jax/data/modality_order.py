"""The order by modality: batches of rows with an image in the query, and batches of rows without.

Owns row numbers alone, like `order.py`, which holds the uniform orders.
"""

from __future__ import annotations

import heapq
import sys
from typing import Any, NamedTuple

import numpy as np

from llave_jax.data.order import HOLE, Cached, random_keys

# What the queries of a batch are.
IMAGE, TEXT, MIXED = "image", "text", "mixed"


class _Epoch(NamedTuple):
    """int64 [batches, batch size], and the batch of both modalities that comes last, if there is one."""

    batches: np.ndarray
    modalities: list[str]
    mixed: np.ndarray | None


class ModalityOrder:
    """The authors' order (`group_by_modality_length`): batches of one modality, dealt by length.

    In each epoch, rows with an image in the query and rows without are shuffled apart and cut into
    batches. The batches of both are shuffled together. The rows left over from both make one mixed batch
    at the end; rows that are left over from that one are dropped until the next epoch. A batch is divided
    into groups: a group is what one device gets in one micro-batch. Rows go to groups by their number of
    words, the longest first, each to the group that has the fewest words and is not full.

    Three things go beyond the authors' code. The mixed batch is drawn at random and divided like the
    others (theirs has the order of the data). A modality with fewer rows than a batch is in the mixed batch
    whole (theirs may never see it). Rows that do not fill one batch make one all the same (theirs make
    none).

    Attributes:
      group_size: rows of a group.
      batch_size: rows of a batch.
      batches_per_epoch: at least 1.

    Args:
      image_query: bool [n], whether the query has an image, from `PairSource.queries`.
      words: int [n], words of the query, from `PairSource.queries`.
      num_groups: groups of a batch.
      group_size: rows of a group.
      seed: of the shuffles.
    """

    def __init__(
        self,
        image_query: np.ndarray,
        words: np.ndarray,
        *,
        num_groups: int,
        group_size: int,
        seed: int,
    ):
        self._image_query = image_query
        self._words = words
        self._num_groups = num_groups
        self._seed = seed
        self.group_size = group_size
        self.batch_size = num_groups * group_size
        self.batches_per_epoch = max(1, len(words) // self.batch_size)
        # Threads read ahead, over the end of an epoch too.
        self._epoch, self._dealt = Cached(self._make_epoch, 3), Cached(self._deal, 16)

    def rows(self, number: int) -> np.ndarray:
        """The rows of a batch, by group.

        Args:
          number: of the batch, counted over all epochs.

        Returns:
          int64 [groups, group_size], HOLE for none.
        """
        return self._dealt(number)

    def modality(self, number: int) -> str:
        """What the queries of a batch are.

        Args:
          number: of the batch, counted over all epochs.

        Returns:
          IMAGE, TEXT or MIXED.
        """
        epoch, index = divmod(number, self.batches_per_epoch)
        return self._epoch(epoch).modalities[index]

    def has_image(self, row: int) -> bool:
        """Whether a row's query has an image.

        Args:
          row: of the source.

        Returns:
          True if it has one.
        """
        return bool(self._image_query[row])

    def _deal(self, number: int) -> np.ndarray:
        epoch, index = divmod(number, self.batches_per_epoch)
        content = self._epoch(epoch)
        last = index == len(content.batches)
        rows = content.mixed if content.mixed is not None and last else content.batches[index]
        return deal_evenly(rows, self._words[rows], self._num_groups, self.group_size)

    def _make_epoch(self, epoch: int) -> _Epoch:
        size = self.batch_size
        keys = random_keys(len(self._words), self._seed, 4, epoch)
        shuffled = np.argsort(keys, kind="stable")
        has_image = self._image_query[shuffled]
        rows = {IMAGE: shuffled[has_image], TEXT: shuffled[~has_image]}
        full = {modality: len(rows[modality]) // size for modality in rows}
        scarce = [modality for modality in rows if full[modality] == 0 and len(rows[modality])]
        left = len(shuffled) - size * sum(full.values())
        if len(scarce) == 1 and left < size:
            # The scarce rows would be dropped in every epoch: a batch of the other modality joins them.
            full = {modality: max(0, count - 1) for modality, count in full.items()}

        batches = np.concatenate([part[: full[modality] * size] for modality, part in rows.items()])
        modalities = [modality for modality in rows for _ in range(full[modality])]
        shuffle = np.argsort(random_keys(len(modalities), self._seed, 5, epoch), kind="stable")
        batches = batches.reshape(-1, size)[shuffle]
        modalities = [modalities[index] for index in shuffle]

        rest = np.concatenate([part[full[modality] * size :] for modality, part in rows.items()])
        later = np.zeros(len(rest), bool)
        if len(scarce) == 1:
            later = self._image_query[rest] != (scarce[0] == IMAGE)
        mixed = rest[np.lexsort((keys[rest], later))][:size]
        if len(mixed) < size and modalities:
            return _Epoch(batches, modalities, None)
        images = self._image_query[mixed]
        modality = MIXED if images.any() and not images.all() else IMAGE if images.all() else TEXT
        return _Epoch(batches, [*modalities, modality], mixed)


def deal_evenly(
    rows: np.ndarray, words: np.ndarray, num_groups: int, group_size: int
) -> np.ndarray:
    """Divides a batch into groups of about equally many words.

    Args:
      rows: int64 [n], n at most num_groups * group_size.
      words: int [n], of each row's query.
      num_groups: groups to make.
      group_size: rows of a full group.

    Returns:
      int64 [num_groups, group_size], HOLE where a batch is not full.
    """
    longest_first = np.argsort(-words.astype(np.int64), kind="stable")
    groups: list[list[Any]] = [[] for _ in range(num_groups)]
    if len(rows) < num_groups * group_size:
        for turn, index in enumerate(longest_first):
            groups[turn % num_groups].append(rows[index])
    else:
        open_groups = [(0, group) for group in range(num_groups)]
        for index in longest_first:
            total, group = open_groups[0]
            groups[group].append(rows[index])
            if len(groups[group]) == group_size:
                heapq.heappop(open_groups)
            else:
                heapq.heapreplace(open_groups, (total + int(words[index]), group))
    dealt = np.full((num_groups, group_size), HOLE, np.int64)
    for group, members in enumerate(groups):
        dealt[group, : len(members)] = members
    return dealt


class ModalityPart:
    """Position -> row, over one process's groups of every batch of a `ModalityOrder`.

    Positions run through the batches, within a batch through its micro-batches, and within a micro-batch
    through the process's shards. A micro-batch is a run of groups, like the authors' accumulation steps.

    Attributes:
      size: positions of the process in a batch.

    Args:
      order: of all processes.
      micro_batches: of a step.
      num_shards: of the process.
      process_index: this process, of `process_count`.
      process_count: processes, with `num_shards` shards each.
    """

    def __init__(
        self,
        order: ModalityOrder,
        *,
        micro_batches: int,
        num_shards: int,
        process_index: int,
        process_count: int,
    ):
        self.order = order
        self.process_index = process_index
        self.process_count = process_count
        self._batch = (micro_batches, process_count, num_shards * order.group_size)
        self._part = (micro_batches, num_shards, order.group_size)
        self.size = micro_batches * num_shards * order.group_size

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> np.int64:
        number, offset = divmod(index, self.size)
        return self.order.rows(number).reshape(self._batch)[:, self.process_index].flat[offset]

    def home(self, position: int) -> tuple[int, int]:
        """The group that a position belongs to.

        Args:
          position: of the process.

        Returns:
          (micro-batch, shard) of the group.
        """
        micro_batch, shard, _ = np.unravel_index(position % self.size, self._part)
        return int(micro_batch), int(shard)
