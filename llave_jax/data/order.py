"""The order in which training reads rows: a uniform shuffle, sub-batches of one subset, or by weights.

Owns row numbers alone; the order by modality is `modality_order.py`, that of mined neighbours `mined_order.py`. Every order is random access, so that
a position in it is all there is to resume from. Loading the rows is `loading.py`.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import heapq
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, TypeVar

import grain
import numpy as np

from llave_jax.common.content import file_digest, short_hash
from llave_jax.data.sources import PairSource

T = TypeVar("T")

# And `MINED` with the path of a file.
ORDERS = ("uniform", "modality")
MINED = "mined:"

# The index of no row. It fills the last sub-batch of a subset, and the batch of data that is smaller than a
# batch.
HOLE = -1

# Groups among which a weighted mixture is shuffled: without it, its regular interleaving would
# give some processes rows of some subsets only.
_MIXTURE_WINDOW = 4096


def is_order(name: str) -> bool:
    """Whether a name is that of an order.

    Args:
      name: such as "uniform", or "mined:neighbours.parquet".

    Returns:
      False for others.
    """
    return name in ORDERS or (name.startswith(MINED) and len(name) > len(MINED))


@dataclasses.dataclass(frozen=True)
class Composition:
    """Which rows share a batch.

    Attributes:
      sub_batch: in the uniform order, how many rows of one subset follow one another; 1: any rows do. In the
        order of mined neighbours, how many rows a cluster has.
      weights: subset -> share of the uniform order. Every row of a subset comes once before any comes
        again, and subsets that are not named are left out. None: every row comes once an epoch.
      order: "uniform", a shuffle of all rows (`UniformOrder`); or "modality", batches of rows with an image
        in the query and batches of rows without (`ModalityOrder`), as the authors trained; or "mined:FILE",
        clusters of rows that are each other's hard negatives (`MinedOrder`).
    """

    sub_batch: int = 1
    weights: Mapping[str, float] | None = None
    order: str = "uniform"

    def __post_init__(self):
        if not is_order(self.order):
            raise ValueError(
                f"data.order is {self.order!r}; expected one of {ORDERS} or mined:FILE"
            )
        if self.sub_batch < 1:
            raise ValueError(f"sub_batch is {self.sub_batch}; expected at least 1")
        for subset, weight in (self.weights or {}).items():
            if not weight > 0:
                raise ValueError(
                    f"the weight of {subset} is {weight}; leave out what is not wanted"
                )
        if self.order == "modality" and (self.sub_batch > 1 or self.weights):
            raise ValueError(
                'data.order "modality" decides by itself which rows share a batch: use it without '
                'data.sub_batch and data.weights, or use them with data.order "uniform"'
            )
        if self.mined and (self.sub_batch == 1 or self.weights):
            raise ValueError(
                f"data.order is {self.order!r}: it takes the rows of a cluster from data.sub_batch, which must be "
                "more than 1 (32, say), and has no data.weights"
            )

    @property
    def is_shuffle(self) -> bool:
        """Whether this is the uniform order of all rows, which `UniformOrder` gives."""
        return self.order == "uniform" and self.sub_batch == 1 and not self.weights

    @property
    def mined(self) -> str | None:
        """The file of mined neighbours, if they decide the order."""
        return self.order.removeprefix(MINED) if self.order.startswith(MINED) else None

    def name(self, source: PairSource, batch_size: int | None) -> str:
        """A name that differs for orders whose positions mean different rows.

        Args:
          source: of the rows.
          batch_size: rows of the order's batches; None if it has no batches.

        Returns:
          A short text.
        """
        sizes = {subset: len(rows) for subset, rows in source.subsets.items()}
        weights = self.weights and dict(self.weights)
        # The file counts by what it holds, wherever it lies.
        order = MINED + file_digest(self.mined).hex() if self.mined else self.order
        parts = json.dumps([sizes, order, self.sub_batch, weights, batch_size])
        return f"{len(source)} rows, {short_hash(parts.encode(), 4).hex()}"


UNIFORM = Composition()


class Cached(Generic[T]):
    """A function of a number that keeps its last results. Worker processes get it without them.

    Args:
      function: to call.
      size: how many results are kept.
    """

    def __init__(self, function: Callable[[int], T], size: int):
        self._function, self._size = function, size
        self._kept = functools.lru_cache(maxsize=size)(function)

    def __call__(self, number: int) -> T:
        return self._kept(number)

    def __reduce__(self):
        return Cached, (self._function, self._size)


class UniformOrder:
    """Every row once an epoch, in a new order each epoch, in batches that have no content twice.

    A batch has slots. Each slot has rows of its own, and rows of equal content have the same slot. A slot
    gives one of its rows to each batch, in another order in every epoch. So two copies of a row are never
    in one batch, not even across the end of an epoch. A process that lags behind the others keeps copies
    apart by itself, since all of them are its own. Batches do not depend on the number of processes.

    All slots have the same number of rows, give or take one, so that batches are about equally full even
    if the data is small. If a content has more copies than an epoch has batches, the others never come.

    Attributes:
      batch_size: slots.
      batches_per_epoch: at least 1.

    Args:
      contents: uint64 [n], from `PairSource.contents`.
      starts: int [m], the first row of each subset.
      num_slots: slots of a batch.
      seed: of the shuffles.
    """

    def __init__(self, contents: np.ndarray, starts: np.ndarray, *, num_slots: int, seed: int):
        self._seed = seed
        self.batch_size = num_slots
        slots = _slots_of_rows(contents, starts, num_slots, seed)
        rows = np.argsort(slots, kind="stable")
        rows = rows[slots[rows] < num_slots]
        slots = slots[rows]
        numbers = np.arange(len(rows)) - np.searchsorted(slots, slots)
        self.batches_per_epoch = int(numbers.max()) + 1
        self._rows = np.full((self.batches_per_epoch, num_slots), HOLE, np.int64)
        self._rows[numbers, slots] = rows
        # Three, since threads read ahead past the end of an epoch.
        self._epoch = Cached(self._make_epoch, 3)

    def rows(self, number: int) -> np.ndarray:
        """The rows of a batch.

        Args:
          number: of the batch, counted over all epochs.

        Returns:
          int64 [batch_size], HOLE where a slot has no row.
        """
        epoch, index = divmod(number, self.batches_per_epoch)
        return self._epoch(epoch)[index]

    def _make_epoch(self, epoch: int) -> np.ndarray:
        keys = random_keys(self._rows.size, self._seed, 7, epoch).reshape(self._rows.shape)
        return np.take_along_axis(self._rows, np.argsort(keys, axis=0, kind="stable"), axis=0)


def _slots_of_rows(
    contents: np.ndarray, starts: np.ndarray, num_slots: int, seed: int
) -> np.ndarray:
    """int64 [n], the slot of each row; `num_slots` for copies that never come."""
    most = -(-len(contents) // num_slots)
    _, first, content, counts = np.unique(
        contents, return_index=True, return_inverse=True, return_counts=True
    )
    by_content = np.argsort(content, kind="stable")
    copy = np.empty(len(contents), np.int64)
    copy[by_content] = np.arange(len(contents)) - np.repeat(np.cumsum(counts) - counts, counts)
    counts = np.minimum(counts, most)

    # Contents with several copies come first, in descending number of copies. Each goes to the slot that
    # has the fewest rows. Contents without copies then fill the slots.
    slots = np.empty(len(first), np.int64)
    keys = random_keys(len(first), seed, 6)
    used = [(0, slot) for slot in range(num_slots)]
    for index in np.lexsort((keys, -counts))[: np.count_nonzero(counts > 1)]:
        total, slot = used[0]
        slots[index] = slot
        heapq.heapreplace(used, (total + int(counts[index]), slot))
    filled = np.empty(num_slots, np.int64)
    filled[[slot for _, slot in used]] = [total for total, _ in used]
    height = max(most, filled.max())
    free = np.flatnonzero(np.arange(height)[:, None] >= filled) % num_slots
    single = np.flatnonzero(counts == 1)
    # Subset by subset, so that every slot has its share of each.
    subset = np.searchsorted(starts, first[single], side="right")
    slots[single[np.lexsort((keys[single], subset))]] = free[: len(single)]
    return np.where(copy < most, slots[content], num_slots)


class UniformPart:
    """Position -> row, over one process's slots of every batch of a `UniformOrder`.

    Attributes:
      size: positions of the process in a batch.

    Args:
      order: of all processes.
      process_index: this process, of `process_count`.
      process_count: processes, with the same number of slots each.
      epochs: passes over all rows; None: endless.
    """

    def __init__(
        self, order: UniformOrder, *, process_index: int, process_count: int, epochs: int | None
    ):
        self.order = order
        self.size = order.batch_size // process_count
        self._process = (process_index, process_count)
        self._length = (
            sys.maxsize if epochs is None else epochs * order.batches_per_epoch * self.size
        )

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.int64:
        number, slot = divmod(index, self.size)
        process, count = self._process
        return self.order.rows(number)[process + slot * count]


def rows_of_process(
    source: PairSource, contents: np.ndarray, *, seed: int, process_index: int, process_count: int
) -> dict[str, np.ndarray]:
    """The rows that one process reads in sub-batches or by weights, the same in every epoch.

    Processes read at their own pace. Rows of equal content belong to one process, which keeps them apart.
    Every process has the same number of contents of every subset, give or take one.

    Args:
      source: of the rows.
      contents: uint64 [n], from `PairSource.contents`.
      seed: of the division.
      process_index: this process, of `process_count`.
      process_count: processes that share the rows.

    Returns:
      Subset -> int64 rows, in order.
    """
    starts = np.array([rows.start for rows in source.subsets.values()])
    _, first, inverse = np.unique(contents, return_index=True, return_inverse=True)
    subset = np.searchsorted(starts, first, side="right")
    dealt = np.lexsort((random_keys(len(first), seed, 6), subset))
    owner = np.empty(len(first), np.int64)
    owner[dealt] = np.arange(len(first)) % process_count
    rows = np.flatnonzero(owner[inverse] == process_index)
    return {
        name: rows[np.searchsorted(rows, indices.start) : np.searchsorted(rows, indices.stop)]
        for name, indices in source.subsets.items()
    }


def row_order(
    subsets: Mapping[str, np.ndarray], *, seed: int, epochs: int | None, composition: Composition
) -> grain.MapDataset[np.ndarray]:
    """An order of sub-batches: position -> int64 [sub_batch] rows of one subset, HOLE where rows run out.

    Args:
      subsets: name -> int64 rows to read.
      seed: of the shuffles, which differ in every epoch.
      epochs: passes over the rows, if there are no weights; None: endless.
      composition: its sub_batch and weights.

    Returns:
      A dataset of sub-batches.

    Raises:
      ValueError: the weights name no subset with rows, or one that there is not.
    """
    size = composition.sub_batch
    if composition.weights is None:
        locate = _Locate(list(subsets.values()), size, seed)
        groups = grain.MapDataset.range(locate.num_groups).shuffle(seed=_derive(seed, 0))
        return groups.repeat(epochs).map_with_index(locate)
    unknown = sorted(set(composition.weights) - set(subsets))
    if unknown:
        raise ValueError(f"weights name subsets {unknown}; the source has {list(subsets)}")
    parts, weights = [], []
    for number, (subset, weight) in enumerate(composition.weights.items()):
        if not len(subsets[subset]):  # a subset of fewer rows than there are processes
            continue
        locate = _Locate([subsets[subset]], size, _derive(seed, 1, number))
        groups = grain.MapDataset.range(locate.num_groups)
        groups = groups.shuffle(seed=_derive(seed, 2, number)).repeat()
        parts.append(groups.map_with_index(locate))
        weights.append(weight)
    if not parts:
        raise ValueError(
            f"the subsets that weights name, {list(composition.weights)}, have no rows"
        )
    return grain.experimental.WindowShuffleMapDataset(
        grain.MapDataset.mix(parts, weights), window_size=_MIXTURE_WINDOW, seed=_derive(seed, 3)
    )


class _Locate:
    """(position, sub-batch number) -> the rows of a sub-batch, of one subset and shuffled in each epoch."""

    def __init__(self, subsets: Sequence[np.ndarray], size: int, seed: int):
        self._subsets = [rows for rows in subsets if len(rows)]
        self._size = size
        self._seed = seed
        counts = [-(-len(rows) // size) for rows in self._subsets]
        self._ends = np.cumsum(counts)
        self.num_groups = int(sum(counts))

    def __call__(self, position: int, group: int) -> np.ndarray:
        number = int(np.searchsorted(self._ends, group, side="right"))
        rows = self._subsets[number]
        first = (group - (int(self._ends[number - 1]) if number else 0)) * self._size
        members = range(first, min(first + self._size, len(rows)))
        if self._size > 1:
            seed = _derive(self._seed, number, position // self.num_groups)
            members = [
                grain.experimental.index_shuffle(m, max_index=len(rows) - 1, seed=seed, rounds=4)
                for m in members
            ]
        indices = np.full(self._size, HOLE, np.int64)
        indices[: len(members)] = [rows[m] for m in members]
        return indices


class Turns:
    """(position, row) -> how often the row has come before this position, about, if every subset is read evenly.

    In an order that has every row once an epoch it is the epoch.

    Args:
      subsets: ranges of rows, one after another.
      positions: of each subset, how many positions of the order have each of its rows once.
    """

    def __init__(self, subsets: Sequence[range], positions: Sequence[float]):
        self._starts = [rows.start for rows in subsets]
        self._positions = list(positions)

    def __call__(self, position: int, row: int) -> int:
        """How often a row has come.

        Args:
          position: of the order.
          row: of the source.

        Returns:
          At least 0.
        """
        return int(position // self._positions[bisect.bisect_right(self._starts, row) - 1])


def positions_of_subsets(
    subsets: Mapping[str, np.ndarray], composition: Composition
) -> list[float]:
    """How many positions of `row_order` have each row of a subset once, about.

    Args:
      subsets: as for `row_order`.
      composition: as for `row_order`.

    Returns:
      A number for each subset, at least 1; HOLEs have positions, too.
    """
    size = composition.sub_batch
    filled = {name: size * -(-len(rows) // size) for name, rows in subsets.items()}
    if composition.weights is None:
        return [max(1, sum(filled.values()))] * len(subsets)
    weights = {name: weight for name, weight in composition.weights.items() if filled[name]}
    total = sum(weights.values())
    return [
        max(1, filled[name] * total / weights[name]) if name in weights else 1 for name in subsets
    ]


class Members(grain.MapDataset):
    """The elements of a dataset's arrays, one after another.

    Args:
      parent: a dataset of arrays [size].
      size: of each array.
    """

    def __init__(self, parent: grain.MapDataset, size: int):
        super().__init__(parent)
        self._size = size

    def __len__(self) -> int:
        return min(len(self._parent) * self._size, sys.maxsize)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        return self._parent[index // self._size][index % self._size]

    def __str__(self) -> str:
        return f"Members(size={self._size})"


def random_keys(count: int, seed: int, *path: int) -> np.ndarray:
    """Random numbers that are the same in every version of NumPy, as a bit generator's raw numbers are.

    Args:
      count: n.
      seed: at least 0.
      path: says which of the seed's streams of numbers to take.

    Returns:
      uint64 [n].
    """
    return np.random.Philox(np.random.SeedSequence([seed, *path])).random_raw(count)


def _derive(seed: int, *path: int) -> int:
    """A seed of 32 bits for one part of the order, unrelated to those of other parts."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])
