"""The stream of training batches: shard by process, load in workers, pack, resume exactly.

Built on grain. Which rows there are is `sources.py`, in what order they are read `order.py`; the
layout of a batch is `inputs/packing.py`.

Processes do not talk to each other. At every step each takes its part of one batch of the order, or,
where that does not fit, as much as fits: then the number of steps an epoch takes is not known
beforehand and differs a little between processes. Training on several processes therefore counts
steps over an endless stream (`epochs=None`): after every step all processes have made the same number
of batches.

Two copies of a row, or rows of equal content, never share a step: each would be a negative of the
other. A copy waits for a later step.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import functools
import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from llave_jax.data.order import (
    HOLE,
    IMAGE,
    MIXED,
    UNIFORM,
    Composition,
    Members,
    ModalityOrder,
    ProcessPart,
    UniformOrder,
    UniformPart,
    row_order,
    rows_of_process,
)
from llave_jax.data.skips import SkipLog, TooManySkips
from llave_jax.data.sources import PairSource
from llave_jax.inputs.batch import Budget, PackedBatch, stack_batches
from llave_jax.inputs.content import content_id
from llave_jax.inputs.cuts import CutWarnings
from llave_jax.inputs.packing import Packer, default_lookahead, place_dealt
from llave_jax.inputs.sequence import SequenceBuilder, TokenSequence
from llave_jax.inputs.taps import Taps

log = logging.getLogger(__name__)

POLICIES = ("raise", "skip")

# A smaller array travels between processes quicker in a pipe than in shared memory.
_MIN_SHARED_BYTES = 1 << 16


class TrainBatch(NamedTuple):
    """What one training step reads. M micro-batches, S local shards, G pair slots, Z sides.

    Attributes:
      packed: arrays with leading axes [M, S].
      target_ids: int32 [M, S, Z - 1, G], equal for equal contents (text and image), of the target
        and the negatives of each pair; no meaning in empty slots.
      ids: [M][S][G] pair ids, "" for empty slots.
      epoch: rows read so far by this process as a multiple of its share of the source.
      skipped: pair ids of the rows that this process could not use so far.
    """

    packed: PackedBatch
    target_ids: np.ndarray
    ids: list[list[list[str]]]
    epoch: float
    skipped: tuple[str, ...]


def train_iterator(
    source: PairSource,
    builder: SequenceBuilder,
    budget: Budget,
    *,
    seed: int,
    num_shards: int,
    micro_batches: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    epochs: int | None = None,
    composition: Composition = UNIFORM,
    group_size: int | None = None,
    on_error: str = "raise",
    skip_file: str | os.PathLike | None = None,
    max_skip_share: float = 0.01,
    lookahead: int | None = None,
    prefetch: int = 2,
) -> grain.DatasetIterator[TrainBatch]:
    """An iterator of `TrainBatch`es for one process.

    `get_state()` is a small dictionary for JSON; `set_state()` of it continues with exactly the
    batches that would have come, with any number of workers. orbax saves the iterator itself
    (`grain.checkpoint.CheckpointSave`).

    Args:
      source: pairs, the same in every process.
      builder: of the model's sequences.
      budget: of one shard of one micro-batch; `sides` is 2, or 3 to use the rows' negatives.
      seed: of the shuffle, at least 0.
      num_shards: shards (devices) of this process.
      micro_batches: packs a step.
      process_index: this process, of `process_count`.
      num_workers: worker processes that load rows; 0 loads in threads of this process.
      epochs: stop after so many passes, the last batch padded with empty slots; for a single
        process. None: an endless stream.
      composition: uniform shuffle, sub-batches of one subset, weights, or by modality.
      group_size: pairs that the modality order deals to one shard of one micro-batch; the budget
        should have room for more, since not every group fits. None: as many as the budget has slots.
      on_error: "raise" or "skip" rows that cannot be used.
      skip_file: lists rows that are skipped, and on the first process those that the source leaves
        out: one JSON object a line. Needed with "skip".
      max_skip_share: with "skip", stop when more than this share of all rows is skipped. Several
        processes do not stop by themselves: the caller adds up what they skipped (`skip_limit`,
        `TrainBatch.skipped`), so that all stop at the same step.
      lookahead: pairs that may wait for a later batch while smaller ones fill the current one; None:
        `packing.default_lookahead`. By modality, so many that wait are kept in memory.
      prefetch: batches made ahead in a background thread.

    Raises:
      ValueError: arguments that do not go together. While iterating: `RowError`, `ImageError` or
        another ValueError for a row that cannot be used, `TooManySkips`.
    """
    if on_error not in POLICIES:
        raise ValueError(f"on_error is {on_error!r}; expected one of {POLICIES}")
    if on_error == "skip" and skip_file is None:
        raise ValueError('on_error="skip" needs a skip_file, which lists the rows')
    by_modality = composition.order == "modality"
    if epochs is not None and (process_count > 1 or composition.weights or by_modality):
        raise ValueError(
            "a fixed number of epochs needs one process and the uniform order without weights; count "
            "steps instead"
        )
    contents = source.contents()
    different = len(np.unique(contents))
    if different < process_count:
        raise ValueError(
            f"{len(source)} rows (equal ones counted once: {different}) do not reach for "
            f"{process_count} processes; use fewer"
        )
    process = {"process_index": process_index, "process_count": process_count}
    parts = process_count * num_shards * micro_batches
    batch_size = None
    if by_modality:
        part = ProcessPart(
            ModalityOrder(
                *source.queries(),
                num_groups=parts,
                group_size=group_size or budget.groups,
                seed=seed,
            ),
            micro_batches=micro_batches,
            num_shards=num_shards,
            **process,
        )
        order, batch_size = grain.MapDataset.source(part), part.order.batch_size
        batches = functools.partial(_ModalityIterator, part=part)
    elif composition.is_shuffle:
        starts = np.array([rows.start for rows in source.subsets.values()])
        batch_size = parts * budget.groups
        uniform = UniformOrder(contents, starts, num_slots=batch_size, seed=seed)
        part = UniformPart(uniform, epochs=epochs, **process)
        order = grain.MapDataset.source(part)
        batches = functools.partial(
            _UniformIterator, batch=part.size, epoch=uniform.batches_per_epoch * part.size
        )
    else:
        subsets = rows_of_process(source, contents, seed=seed, **process)
        groups = row_order(subsets, seed=seed, epochs=epochs, composition=composition)
        order = Members(groups, composition.sub_batch)
        batches = functools.partial(_UniformIterator, epoch=sum(map(len, subsets.values())))
    skips = None
    if skip_file is not None:
        left_out = source.left_out if process_index == 0 else None
        limit = skip_limit(source, max_skip_share) if process_count == 1 else len(source)
        skips = SkipLog(skip_file, limit, left_out)
    dataset = _Batches(
        batches,
        order,
        load=_Load(source, builder, budget.sides, skip=on_error == "skip"),
        packers=lambda: [
            Packer(budget, num_shards, builder.spec.crop) for _ in range(micro_batches)
        ],
        lookahead=lookahead or default_lookahead(budget, num_shards),
        num_workers=num_workers,
        contents=contents,
        skips=skips if on_error == "skip" else None,
        num_rows=len(source),
        identity={
            "seed": seed,
            "processes": process_count,
            "order": composition.name(source, batch_size),
        },
    )
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)
    )


def skip_limit(source: PairSource, max_skip_share: float) -> int:
    """Rows of a run that may be skipped."""
    return int(max_skip_share * len(source))


class _Load:
    """Row index -> the pair's sequences as plain arrays, or why there are none; runs in workers."""

    def __init__(self, source: PairSource, builder: SequenceBuilder, sides: int, skip: bool):
        self._source = source
        self._builder = builder
        self._sides = sides
        self._skip = skip

    def __call__(self, index: np.int64) -> dict[str, Any]:
        if index == HOLE:
            return {"hole": True}
        try:
            return self._load(int(index))
        except ValueError as error:
            if not self._skip:
                raise
            return {"id": self._source.pair_id(int(index)), "skipped": str(error)}

    def _load(self, index: int) -> dict[str, Any]:
        pair = self._source[index]
        items = pair.sides(self._sides)
        sequences = [None if item is None else self._builder(item) for item in items]
        return {
            "id": pair.id,
            "row": index,
            "target_ids": np.array([content_id(item) for item in items[1:]], np.int32),
            "sequences": [None if s is None else _to_arrays(s) for s in sequences],
        }


def _to_arrays(sequence: TokenSequence) -> dict[str, Any]:
    """grain moves arrays of dictionaries between processes in shared memory, objects it pickles."""
    return {
        "tokens": sequence.tokens,
        "crops": sequence.crops,
        "zero_crops": sequence.zero_crops,
        "num_cut": sequence.num_cut,
        "tap_index": sequence.taps.index,
        "tap_weight": sequence.taps.weight,
        "name": sequence.name,
    }


def _to_sequence(arrays: dict[str, Any]) -> TokenSequence:
    return TokenSequence(
        tokens=arrays["tokens"],
        crops=arrays["crops"],
        taps=Taps(arrays["tap_index"], arrays["tap_weight"]),
        name=arrays["name"],
        zero_crops=tuple(arrays["zero_crops"]),
        num_cut=arrays["num_cut"],
    )


class _Batches(grain.IterDataset):
    """Rows in order to `TrainBatch`es; `options` are those of the `_StepIterator`."""

    def __init__(self, iterator: Callable[..., _StepIterator], order: grain.MapDataset, **options):
        super().__init__()
        self._iterator = iterator
        self._order = order
        self._options = options

    def __iter__(self) -> grain.DatasetIterator[TrainBatch]:
        return self._iterator(self._order, **self._options)

    def __str__(self) -> str:
        return "Batches"


@dataclasses.dataclass(eq=False)
class _Pair:
    """A pair: its row, where it came in the order, and what was loaded; None: to be loaded again."""

    position: int
    row: int
    element: dict[str, Any] | None


class _Outcome(enum.Enum):
    """What became of a pair that was to join a step; unusable ones are done with as well."""

    DONE = enum.auto()
    NO_ROOM = enum.auto()
    COPY = enum.auto()


class _StepIterator(grain.DatasetIterator):
    """Packs one step after another from rows in order. Subclasses say which rows a step takes.

    Its state: steps made, the next position to read, and the positions of pairs that wait for a later step. Where
    budgets or devices have changed, the same pairs are read on.
    """

    def __init__(
        self,
        order: grain.MapDataset,
        *,
        load: _Load,
        packers: Callable[[], list[Packer]],
        lookahead: int,
        num_workers: int,
        contents: np.ndarray,
        skips: SkipLog | None,
        num_rows: int,
        identity: dict[str, Any],
    ):
        super().__init__()
        self._order = order
        self._load = load
        self._packers = packers()
        self._lookahead = lookahead
        self._num_workers = num_workers
        self._contents = contents
        self._skips = skips
        self._num_rows = num_rows
        self._unusable_in_a_row = 0
        self._identity = identity
        self._cuts = CutWarnings(items_repeat=True)
        self._step = self._next = 0
        self._carry: list[_Pair] = []
        self._stream: Iterator[dict[str, Any]] | None = None
        # Of the step that is being made: contents, and by pair id what `TrainBatch.target_ids` says.
        self._taken: set[int] = set()
        self._target_ids: dict[str, np.ndarray] = {}

    def _fill(self) -> None:
        """Places the pairs of one step in the packers, and keeps in `_carry` those that wait.

        Raises:
          StopIteration: there are none left.
        """
        raise NotImplementedError

    def _epochs_read(self) -> float:
        raise NotImplementedError

    def _row_at(self, position: int) -> int:
        """The row of a pair that waits."""
        return int(self._order[position])

    def __next__(self) -> TrainBatch:
        self._taken, self._target_ids = set(), {}
        self._fill()
        self._step += 1
        batches, ids = zip(*(packer.emit() for packer in self._packers), strict=True)
        packed = stack_batches(batches)
        none = np.zeros(packed.pooled.shape[2] - 1, np.int32)
        by_slot = [
            [[self._target_ids.get(pair_id, none) for pair_id in shard] for shard in pack]
            for pack in ids
        ]
        return TrainBatch(
            packed=packed,
            target_ids=np.array(by_slot, np.int32).swapaxes(2, 3),
            ids=list(ids),
            epoch=self._epochs_read(),
            skipped=() if self._skips is None else self._skips.pair_ids,
        )

    def get_state(self) -> dict[str, Any]:
        carry = [pair.position for pair in self._carry]
        return {"step": self._step, "next": self._next, "carry": carry, **self._identity}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises ValueError if the state belongs to other data, another seed or process count."""
        for key, value in self._identity.items():
            if state.get(key) != value:
                raise ValueError(
                    f"the saved data position is for {key}: {state.get(key)}, this run has {value}; "
                    "resume with the same data, composition, seed and number of processes, or start "
                    "a new run from the saved parameters"
                )
        self._stop_stream()
        self._step, self._next = state["step"], state["next"]
        self._carry = [_Pair(p, self._row_at(p), None) for p in state["carry"]]

    def close(self) -> None:
        self._stop_stream()
        super().close()

    def _place(self, pair: _Pair, micro_batch: int, shard: int | None = None) -> _Outcome:
        """Places a pair in a micro-batch of this step, in one shard or in any."""
        content = int(self._contents[pair.row])
        if content in self._taken:
            return _Outcome.COPY
        if pair.element is None:
            pair.element = self._load(pair.row)
        element = pair.element
        if "skipped" in element:  # a file that could be read before
            self._skips.record(element["id"], element["skipped"])
            return _Outcome.DONE
        sequences = [None if s is None else _to_sequence(s) for s in element["sequences"]]
        try:
            added = self._packers[micro_batch].add(sequences, element["id"], shard)
        except ValueError as error:
            if self._skips is None:
                raise
            self._skips.record(element["id"], str(error))
            return _Outcome.DONE
        if not added:
            return _Outcome.NO_ROOM
        self._taken.add(content)
        self._target_ids[element["id"]] = element["target_ids"]
        return _Outcome.DONE

    def _read(self, stop: float = math.inf) -> Iterator[_Pair]:
        """The usable pairs of the stream from the next position on, up to position `stop`."""
        if self._stream is None:
            self._stream = self._start_stream()
        while self._next < stop:
            element = next(self._stream, None)
            if element is None:
                return
            position, self._next = self._next, self._next + 1
            if "skipped" in element:
                self._skips.record(element["id"], element["skipped"])
                self._unusable_in_a_row += 1
                if self._unusable_in_a_row >= self._num_rows:
                    # An endless stream would be searched for ever.
                    raise TooManySkips(self._skips.pair_ids, self._skips.limit, self._skips.path)
            elif "hole" not in element:
                self._unusable_in_a_row = 0
                for sequence in element["sequences"]:
                    if sequence is not None:
                        self._cuts.note(_to_sequence(sequence))
                yield _Pair(position, element["row"], element)

    def _start_stream(self) -> grain.DatasetIterator:
        threads = os.cpu_count() or 1 if self._num_workers == 0 else 1
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        stream = self._order.map(self._load)[self._next :].to_iter_dataset(options)
        if self._num_workers:
            # grain reads absl flags when it starts workers; a program without absl parses none.
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()
            settings = grain.experimental.DatasetOptions(min_shm_size=_MIN_SHARED_BYTES)
            stream = grain.experimental.WithOptionsIterDataset(stream, settings)
            stream = stream.mp_prefetch(
                grain.MultiprocessingOptions(self._num_workers, per_worker_buffer_size=2)
            )
        return iter(stream)

    def _stop_stream(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None


class _UniformIterator(_StepIterator):
    """Fills one micro-batch after another: first pairs that waited, then the stream."""

    def __init__(self, order: grain.MapDataset, *, epoch: int, batch: float = math.inf, **options):
        """`epoch`: positions of an epoch; `batch`: those that each step may read on to."""
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
        # Copies are read past, as far as a step has slots: without that, they would end it where an
        # epoch ends.
        while (
            not self._packers[micro_batch].full
            and counts[_Outcome.NO_ROOM] < self._lookahead
            and counts[_Outcome.COPY] < self._slots
        ):
            pair = next(stream, None)
            if pair is None:
                break
            offer(pair)


class _ModalityIterator(_StepIterator):
    """Takes the process's part of one batch of a `ModalityOrder` at every step.

    What finds no room waits for the next steps of its kind, so that no pool has both kinds but the
    mixed batch. The position of a pair that waits is its step times all rows, plus its row: it does not
    depend on the devices that the batch was dealt to.
    """

    def __init__(self, order: grain.MapDataset, *, part: ProcessPart, **options):
        super().__init__(order, **options)
        self._part = part
        self._batches = part.order
        _, inverse, counts = np.unique(self._contents, return_inverse=True, return_counts=True)
        self._repeated = counts[inverse] > 1
        self._warn_at = part.size

    def _row_at(self, position: int) -> int:
        return position % len(self._contents)

    def _epochs_read(self) -> float:
        return self._next / (self._part.size * self._batches.batches_per_epoch)

    def _fill(self) -> None:
        number = self._step
        rows = self._batches.rows(number).reshape(-1)
        rows = rows[rows != HOLE]
        # Every process knows the whole batch: of equal contents in it, the first alone takes part.
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
        """Whether a pair that waits may be in the `number`-th step as far as others are concerned.

        Another process may still have the same row of another epoch, or a row of equal content, and
        cannot be asked. Such a row is taken by one process at a time, in turns.
        """
        kind = self._batches.kind(number)
        if kind != MIXED and (kind == IMAGE) != self._batches.has_image(row):
            return False
        processes = self._part.process_count
        if number < self._batches.batches_per_epoch and not self._repeated[row]:
            return True
        return (int(self._contents[row]) + number) % processes == self._part.process_index
