"""Loaded rows become the batches of one training step after another; an iterator resumes at any step.

Packs what `loading.py` loads, in the order of `order.py` or `modality_order.py`. A step takes as many of its
rows as fit. Rows that do not fit wait for a later step, and so do copies of a row that the step has.
"""

from __future__ import annotations

import abc
import collections
import dataclasses
import enum
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from llave_jax.data.loading import RowLoader, to_sequence
from llave_jax.data.modality_order import IMAGE, MIXED, ModalityPart
from llave_jax.data.order import HOLE
from llave_jax.data.skips import SkipLog, TooManySkips
from llave_jax.data.workers import Waiting, prepare_worker
from llave_jax.inputs.batch import PackedBatch, PairLabels, stack_batches
from llave_jax.inputs.cuts import CutWarnings
from llave_jax.inputs.packing import Packer, place_dealt

log = logging.getLogger(__name__)

# A smaller array travels between processes quicker in a pipe than in shared memory.
_MIN_SHARED_BYTES = 1 << 16


class TrainBatch(NamedTuple):
    """What one training step reads: M micro-batches of S local shards with G pair slots of Z sides.

    Attributes:
      packed: arrays with leading axes [M, S].
      labels: what the loss knows of the pairs besides their embeddings.
      ids: [M][S][G] pair ids, "" for empty slots.
      epoch: rows read so far by this process as a multiple of its share of the source.
      skipped: pair ids of the rows that this process could not use so far.
    """

    packed: PackedBatch
    labels: PairLabels
    ids: list[list[list[str]]]
    epoch: float
    skipped: tuple[str, ...]


class StepDataset(grain.IterDataset):
    """grain's dataset of `TrainBatch`es over rows in order.

    Args:
      iterator: class of the iterators; each iteration is `iterator(order, **options)`.
      order: the rows' indices, in order.
      options: further arguments of the iterators.
    """

    def __init__(self, iterator: Callable[..., StepIterator], order: grain.MapDataset, **options):
        super().__init__()
        self._iterator = iterator
        self._order = order
        self._options = options

    def __iter__(self) -> grain.DatasetIterator[TrainBatch]:
        return self._iterator(self._order, **self._options)

    def __str__(self) -> str:
        return "StepDataset"


@dataclasses.dataclass(eq=False)
class _Pair:
    """A pair on its way into a step.

    Attributes:
      position: in the order.
      row: of the source.
      turn: how often the row has come before.
      element: what `RowLoader` returned; None: it has to be loaded again.
    """

    position: int
    row: int
    turn: int
    element: dict[str, Any] | None


class _Outcome(enum.Enum):
    """What became of a pair that was offered to a step. A pair that cannot be used is DONE, too."""

    DONE = enum.auto()
    NO_ROOM = enum.auto()
    COPY = enum.auto()


class StepIterator(grain.DatasetIterator):
    """Packs one step after another from rows in order. Subclasses say which rows a step takes.

    The state is small: how many steps were made, the next position to read, and the positions of the pairs
    that wait. If budgets or devices change between runs, the same pairs are read on.

    Args:
      order: the rows' indices, in order.
      load: reads a row and makes its sequences.
      turns: (position, row) -> how often the row has come before; picklable.
      packers: makes the step's packers, one for each of its micro-batches.
      lookahead: pairs that may wait for a later step while smaller ones fill the current one.
      num_workers: processes that load rows; 0: this one.
      contents: uint64 [n] of all rows, as in `PairSource.contents`.
      skips: where rows that cannot be used are listed; None: such a row is an error.
      num_rows: rows of the source. After so many unusable rows in a row, the stream ends with TooManySkips.
      identity: what must be the same when the state is restored.
      stall_warning: seconds without a row until a warning names it; 0: never.
    """

    def __init__(
        self,
        order: grain.MapDataset,
        *,
        load: RowLoader,
        turns: Callable[[int, int], int],
        packers: Callable[[], list[Packer]],
        lookahead: int,
        num_workers: int,
        contents: np.ndarray,
        skips: SkipLog | None,
        num_rows: int,
        identity: dict[str, Any],
        stall_warning: float = 0.0,
    ):
        super().__init__()
        self._order = order
        self._load = load
        self._turns = turns
        self._packers = packers()
        self._lookahead = lookahead
        self._num_workers = num_workers
        self._contents = contents
        self._skips = skips
        self._num_rows = num_rows
        self._unusable_in_a_row = 0
        self._identity = identity
        self._stall_warning = stall_warning
        self._cuts = CutWarnings(items_repeat=True)
        self._step = self._next = 0
        self._carry: list[_Pair] = []
        self._stream: grain.DatasetIterator[dict[str, Any]] | None = None
        # Of the step that is being made: its pairs' contents, and their loaded rows by pair id.
        self._taken: set[int] = set()
        self._placed: dict[str, dict[str, Any]] = {}

    @abc.abstractmethod
    def _fill(self) -> None:
        """Places the pairs of one step in the packers, and keeps in `_carry` those that wait.

        Raises:
          StopIteration: there are none left.
        """

    @abc.abstractmethod
    def _epochs_read(self) -> float:
        """Passes over the data that the stream has made."""

    def _row_at(self, position: int) -> int:
        """The row of a pair that waits."""
        row: Any = self._order[position]
        return int(row)

    def _waiting_turn(self, position: int, row: int) -> int:
        """The turn of a pair that waits."""
        return self._turns(position, row)

    def __next__(self) -> TrainBatch:
        self._taken, self._placed = set(), {}
        self._fill()
        self._step += 1
        batches, ids = zip(*(packer.emit() for packer in self._packers), strict=True)
        packed = stack_batches(batches)
        return TrainBatch(
            packed=packed,
            labels=self._labels(ids, packed.pooled.shape[2] - 1),
            ids=list(ids),
            epoch=self._epochs_read(),
            skipped=() if self._skips is None else self._skips.pair_ids,
        )

    def _labels(self, ids: Sequence[list[list[str]]], targets: int) -> PairLabels:
        """The labels of the pairs in each slot, of which each has so many targets and negatives."""
        nothing = {
            "target_ids": np.zeros(targets, np.int32),
            "subset": 0,
            "scores": np.full(targets, np.nan, np.float32),
        }

        def by_slot(key: str) -> np.ndarray:
            return np.array(
                [
                    [[self._placed.get(i, nothing)[key] for i in shard] for shard in pack]
                    for pack in ids
                ]
            )

        return PairLabels(
            target_ids=by_slot("target_ids").astype(np.int32).swapaxes(2, 3),
            subsets=by_slot("subset").astype(np.int32),
            scores=by_slot("scores").astype(np.float32).swapaxes(2, 3),
        )

    def get_state(self) -> dict[str, Any]:
        """Where the iterator is, for `set_state`.

        Returns:
          A dictionary for JSON.
        """
        carry = [pair.position for pair in self._carry]
        return {"step": self._step, "next": self._next, "carry": carry, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on from where another iterator was.

        Args:
          state: what its `get_state` gave.

        Raises:
          ValueError: the state belongs to other data, another seed or another number of processes.
        """
        for key, value in self._identity.items():
            if key == "rows" and state.get(key, value) != value:
                raise ValueError(
                    "the rows of config.data.path are as many as when the run began, and not the same: they "
                    "were rewritten or put in another order. Put the old ones back, or start a new run from "
                    "the saved parameters (config.model.path, another --workdir)"
                )
            # States of earlier versions do not know the rows.
            if state.get(key, value if key == "rows" else None) != value:
                raise ValueError(
                    f"the saved data position is for {key}: {state.get(key)}, this run has {value}; "
                    "resume with the same data, composition, seed and number of processes, or start "
                    "a new run from the saved parameters"
                )
        self._stop_stream()
        self._step, self._next = state["step"], state["next"]
        rows = [(position, self._row_at(position)) for position in state["carry"]]
        self._carry = [_Pair(p, row, self._waiting_turn(p, row), None) for p, row in rows]

    def close(self) -> None:
        """Stops the worker processes."""
        self._stop_stream()
        super().close()

    def _place(self, pair: _Pair, micro_batch: int, shard: int | None = None) -> _Outcome:
        """Places a pair in a micro-batch of this step, in one shard or in any."""
        content = int(self._contents[pair.row])
        if content in self._taken:
            return _Outcome.COPY
        if pair.element is None:
            pair.element = self._load(pair.row, pair.turn)
        element = pair.element
        if "skipped" in element:  # a file that could be read before
            self._skip(element["id"], element["skipped"])
            return _Outcome.DONE
        sequences = [None if s is None else to_sequence(s) for s in element["sequences"]]
        try:
            added = self._packers[micro_batch].add(sequences, element["id"], shard)
        except ValueError as error:
            if self._skips is None:
                raise
            self._skip(element["id"], str(error))
            return _Outcome.DONE
        if not added:
            return _Outcome.NO_ROOM
        self._taken.add(content)
        self._placed[element["id"]] = {
            key: element[key] for key in ("target_ids", "subset", "scores")
        }
        return _Outcome.DONE

    def _skip(self, pair_id: str, reason: str) -> SkipLog:
        """Lists a row that cannot be used. Without a list, loading it has raised."""
        assert self._skips is not None
        self._skips.record(pair_id, reason)
        return self._skips

    def _read(self, stop: float = math.inf) -> Iterator[_Pair]:
        """The usable pairs of the stream from the next position on, up to position `stop`."""
        if self._stream is None:
            self._waiting = Waiting(
                self._num_workers, self._next, self._stall_warning, self._name_at
            )
            self._stream = self._start_stream()
        while self._next < stop:
            with self._waiting.row(self._next):
                element = next(self._stream, None)
            if element is None:
                return
            self._waiting.came(self._next, element["pid"])
            position, self._next = self._next, self._next + 1
            if "skipped" in element:
                skips = self._skip(element["id"], element["skipped"])
                self._unusable_in_a_row += 1
                if self._unusable_in_a_row >= self._num_rows:
                    # Without this, an endless stream of unusable rows would never end.
                    raise TooManySkips(skips.pair_ids, skips.limit, skips.path)
            elif "hole" not in element:
                self._unusable_in_a_row = 0
                for sequence in element["sequences"]:
                    if sequence is not None:
                        self._cuts.note(to_sequence(sequence))
                row = element["row"]
                yield _Pair(position, row, self._turns(position, row), element)

    def _name_at(self, position: int) -> str:
        row: Any = self._order[position]
        return f"a hole at {position}" if int(row) == HOLE else self._load.name(int(row))

    def _start_stream(self) -> grain.DatasetIterator:
        threads = os.cpu_count() or 1 if self._num_workers == 0 else 1
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        load = functools.partial(_load_at, self._load, self._turns)
        stream = self._order.map_with_index(load)[self._next :].to_iter_dataset(options)
        if self._num_workers:
            # grain reads absl flags when it starts workers; a program without absl parses none.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            settings = grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED_BYTES)
            stream = grain.experimental.WithOptionsIterDataset(stream, settings)
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=2),
                worker_init_fn=prepare_worker,
            )
        return iter(stream)

    def _stop_stream(self) -> None:
        if self._stream is not None:
            self._waiting.close()
            self._stream.close()
            self._stream = None


def _load_at(
    load: RowLoader, turns: Callable[[int, int], int], position: int, row: int | np.int64
) -> dict[str, Any]:
    """Loads the row at a position of the order."""
    return load(row, 0 if row == HOLE else turns(position, int(row)))


class UniformIterator(StepIterator):
    """Fills one micro-batch after another: with pairs that waited, then with the next ones of the order.

    Args:
      order: of the process's rows.
      epoch: positions of an epoch.
      batch: positions of a batch of the order: step n reads no further than n of them.
      options: of `StepIterator`.
    """

    def __init__(self, order: grain.MapDataset, *, epoch: int, batch: float = math.inf, **options):
        super().__init__(order, **options)
        self._epoch = epoch
        self._batch = batch
        budget = self._packers[0].budget
        self._slots = len(self._packers) * self._packers[0].num_shards * budget.groups

    def _epochs_read(self) -> float:
        return self._next / self._epoch

    def _fill(self) -> None:
        for micro_batch in range(len(self._packers)):
            self._fill_micro_batch(micro_batch)
        if not self._taken and self._next == len(self._order):
            raise StopIteration

    def _fill_micro_batch(self, micro_batch: int) -> None:
        waiting, self._carry = self._carry, []
        counts: collections.Counter[_Outcome] = collections.Counter()

        def offer(pair: _Pair) -> None:
            outcome = self._place(pair, micro_batch)
            counts[outcome] += 1
            if outcome is not _Outcome.DONE:
                self._carry.append(pair)

        for pair in waiting:
            offer(pair)
        stream = self._read(stop=self._batch * (self._step + 1))
        # Copies do not count as pairs without room. At the end of an epoch there can be many of them, and
        # the step would end half empty. The limit is the number of the step's slots.
        while (
            not self._packers[micro_batch].full
            and counts[_Outcome.NO_ROOM] < self._lookahead
            and counts[_Outcome.COPY] < self._slots
        ):
            pair = next(stream, None)
            if pair is None:
                break
            offer(pair)


class ModalityIterator(StepIterator):
    """Takes the process's part of one batch of a `ModalityOrder` at every step.

    A pair without room waits for a later step of its modality, so that only the mixed batch has pools of
    both. The position of a pair that waits is (its step) * (number of rows) + (its row). That number does
    not depend on the devices that the batch was divided among.

    Args:
      order: `part`, as a dataset.
      part: of the process.
      options: of `StepIterator`.
    """

    def __init__(self, order: grain.MapDataset, *, part: ModalityPart, **options):
        super().__init__(order, **options)
        self._part = part
        self._batches = part.order
        _, inverse, counts = np.unique(self._contents, return_inverse=True, return_counts=True)
        self._repeated = counts[inverse] > 1
        self._warn_at = part.size

    def _row_at(self, position: int) -> int:
        return position % len(self._contents)

    def _waiting_turn(self, position: int, row: int) -> int:
        number = position // len(self._contents)
        return self._turns(number * self._part.size, row)

    def _epochs_read(self) -> float:
        return self._next / (self._part.size * self._batches.batches_per_epoch)

    def _fill(self) -> None:
        number = self._step
        rows = self._batches.rows(number).reshape(-1)
        rows = rows[rows != HOLE]
        # Every process knows the whole batch. Of several rows of equal content in it, the first takes part.
        contents, first = np.unique(self._contents[rows], return_index=True)
        in_batch, leaders = set(contents.tolist()), set(rows[first].tolist())
        candidates, later = [], []
        for pair in self._carry:
            free = int(self._contents[pair.row]) not in in_batch
            joins = free and self._may_join(pair.row, number)
            (candidates if joins else later).append(pair)

        homes: dict[int, tuple[int, int]] = {}

        def dealt() -> Iterator[_Pair]:
            for pair in self._read(stop=(number + 1) * self._part.size):
                homes[pair.row] = self._part.home(pair.position)
                pair.position = number * len(self._contents) + pair.row
                if pair.row in leaders:
                    yield pair
                else:
                    later.append(pair)

        refused = place_dealt(
            candidates,
            dealt(),
            # Those that waited are spread over the micro-batches.
            home=lambda pair: homes.get(pair.row, (pair.row % len(self._packers), 0)),
            add=lambda pair, *place: self._place(pair, *place) is _Outcome.DONE,
            micro_batches=len(self._packers),
            lookahead=self._lookahead,
        )
        self._carry = sorted(later + refused, key=lambda pair: pair.position)
        for pair in self._carry[self._lookahead :]:
            pair.element = None
        if len(self._carry) >= self._warn_at:
            self._warn_at = 2 * len(self._carry)
            log.warning(
                "%d pairs wait for a later step, and each step brings %d: batches have too little "
                "room; raise config.batch.tokens_per_pair or crops_per_pair, or lower batch.pairs",
                len(self._carry),
                self._part.size,
            )

    def _may_join(self, row: int, number: int) -> bool:
        """Whether a pair that waits may join the `number`-th step.

        Its modality must be that of the step. And no other process may put an equal row into the same step:
        another process may still hold this row from another epoch, or a row of equal content, and cannot be
        asked. The processes therefore take turns with such rows.
        """
        modality = self._batches.modality(number)
        if modality != MIXED and (modality == IMAGE) != self._batches.has_image(row):
            return False
        processes = self._part.process_count
        if number < self._batches.batches_per_epoch and not self._repeated[row]:
            return True
        return (int(self._contents[row]) + number) % processes == self._part.process_index
