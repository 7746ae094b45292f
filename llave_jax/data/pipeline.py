"""The stream of training batches: shuffle, shard by process, load in workers, pack, resume exactly.

Built on grain: the order of rows is a random-access dataset, so a position in it says everything
about the stream's past. Which rows there are is `sources.py`; the layout of a batch is
`inputs/packing.py`.

Every process packs its own share of the stream and there is no communication, so the number of
batches an epoch takes is not known beforehand and differs a little between processes. Training on
several processes therefore counts steps over an endless stream (`epochs=None`): after every step
all processes have made the same number of batches, and each row comes once an epoch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import grain
import numpy as np
from absl import flags

from llave_jax.data.skips import SkipLog
from llave_jax.data.sources import PairSource
from llave_jax.inputs.cuts import CutWarnings
from llave_jax.inputs.images import read_image_file
from llave_jax.inputs.item import Item, Pair
from llave_jax.inputs.packing import (
    Budget,
    PackedBatch,
    Packer,
    default_lookahead,
    stack_batches,
)
from llave_jax.inputs.sequence import Sequence, SequenceBuilder
from llave_jax.inputs.taps import Taps

POLICIES = ("raise", "skip")

# Groups among which a weighted mixture is shuffled: without it, its regular interleaving would
# give some processes rows of some subsets only.
_MIXTURE_WINDOW = 4096
# A smaller array travels between processes quicker in a pipe than in shared memory.
_MIN_SHARED_BYTES = 1 << 16
# Stands in the order of rows for the members that the last sub-batch of a subset lacks.
_HOLE = -1


class TrainBatch(NamedTuple):
    """What one training step reads. M micro-batches, S local shards, G pair slots, Z sides.

    Attributes:
      packed: arrays with leading axes [M, S].
      target_ids: int32 [M, S, Z - 1, G], equal for equal contents (text and image), of the target
        and the negatives of each pair; no meaning in empty slots.
      ids: [M][S][G] pair ids, "" for empty slots.
      epoch: rows read so far by this process as a multiple of its share of the source.
    """

    packed: PackedBatch
    target_ids: np.ndarray
    ids: list[list[list[str]]]
    epoch: float


@dataclasses.dataclass(frozen=True)
class Composition:
    """Which rows stand beside each other in the stream.

    Attributes:
      sub_batch: rows of one subset that follow one another; 1 is a uniform shuffle, as in the paper.
      weights: subset -> share of the stream, every row of a subset coming once before any comes
        again; subsets that are not named are left out. None: every row once an epoch.
    """

    sub_batch: int = 1
    weights: Mapping[str, float] | None = None

    def __post_init__(self):
        if self.sub_batch < 1:
            raise ValueError(f"sub_batch is {self.sub_batch}; expected at least 1")
        for subset, weight in (self.weights or {}).items():
            if not weight > 0:
                raise ValueError(
                    f"the weight of {subset} is {weight}; leave out what is not wanted"
                )


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
    composition: Composition = Composition(),
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
      composition: uniform shuffle, sub-batches of one subset, weights.
      on_error: "raise" or "skip" rows that cannot be used.
      skip_file: with "skip", the file that lists them: one JSON object a line.
      max_skip_share: with "skip", stop when more than this share of the process's rows is skipped.
      lookahead: pairs that may wait for a later batch while smaller ones fill the current one; None:
        `packing.default_lookahead`.
      prefetch: batches made ahead in a background thread.

    Raises:
      ValueError: arguments that do not go together. While iterating: `RowError`, `ImageError` or
        another ValueError for a row that cannot be used, `TooManySkips`.
    """
    if on_error not in POLICIES:
        raise ValueError(f"on_error is {on_error!r}; expected one of {POLICIES}")
    if (on_error == "skip") != (skip_file is not None):
        raise ValueError('on_error="skip" and skip_file go together')
    if epochs is not None and (process_count > 1 or composition.weights):
        raise ValueError(
            "a fixed number of epochs needs one process and no weights; count steps instead"
        )
    order = row_order(source, seed=seed, epochs=epochs, composition=composition)
    share = _Members(order[process_index::process_count], composition.sub_batch)
    loaded = share.map(_Load(source, builder, budget.sides, skip=on_error == "skip"))
    rows = len(source) / process_count
    batches = _PackedDataset(
        loaded,
        packer=lambda: Packer(budget, num_shards, builder.config),
        micro_batches=micro_batches,
        lookahead=lookahead or default_lookahead(budget, num_shards),
        num_workers=num_workers,
        rows=rows,
        skips=SkipLog(skip_file, int(max_skip_share * rows)) if skip_file else None,
        identity={
            "seed": seed,
            "order": _order_name(source, composition),
            "processes": process_count,
        },
    )
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=prefetch)
    )


def row_order(
    source: PairSource, *, seed: int, epochs: int | None, composition: Composition
) -> grain.MapDataset[np.ndarray]:
    """Position -> int64 [sub_batch] indices of rows, shuffled anew each epoch; _HOLE for none."""
    size = composition.sub_batch
    if composition.weights is None:
        locate = _Locate(list(source.subsets.values()), size, seed)
        groups = grain.MapDataset.range(locate.num_groups).shuffle(seed=_derive(seed, 0))
        return groups.repeat(epochs).map_with_index(locate)
    unknown = sorted(set(composition.weights) - set(source.subsets))
    if unknown:
        raise ValueError(f"weights name subsets {unknown}; the source has {list(source.subsets)}")
    parts = []
    for number, subset in enumerate(composition.weights):
        locate = _Locate([source.subsets[subset]], size, _derive(seed, 1, number))
        groups = grain.MapDataset.range(locate.num_groups)
        groups = groups.shuffle(seed=_derive(seed, 2, number)).repeat()
        parts.append(groups.map_with_index(locate))
    mixed = grain.MapDataset.mix(parts, list(composition.weights.values()))
    return grain.experimental.WindowShuffleMapDataset(
        mixed, window_size=_MIXTURE_WINDOW, seed=_derive(seed, 3)
    )


class _Locate:
    """(position, group number) -> row indices of a group: rows of one subset, mixed each epoch."""

    def __init__(self, subsets: list[range], size: int, seed: int):
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
        indices = np.full(self._size, _HOLE, np.int64)
        indices[: len(members)] = [rows[m] for m in members]
        return indices


class _Members(grain.MapDataset):
    """The members of the groups of a dataset, one after another."""

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


class _Load:
    """Row index -> the pair's sequences as plain arrays, or why there are none; runs in workers."""

    def __init__(self, source: PairSource, builder: SequenceBuilder, sides: int, skip: bool):
        self._source = source
        self._builder = builder
        self._sides = sides
        self._skip = skip

    def __call__(self, index: np.int64) -> dict[str, Any]:
        if index == _HOLE:
            return {"hole": True}
        try:
            return self._load(int(index))
        except ValueError as error:
            if not self._skip:
                raise
            return {"id": self._source.pair_id(int(index)), "skipped": str(error)}

    def _load(self, index: int) -> dict[str, Any]:
        pair = self._source[index]
        items = sides_of(pair, self._sides)
        sequences = [None if item is None else self._builder(item) for item in items]
        return {
            "id": pair.id,
            "target_ids": np.array([content_id(item) for item in items[1:]], np.int32),
            "sequences": [None if s is None else _to_arrays(s) for s in sequences],
        }


def sides_of(pair: Pair, sides: int) -> list[Item | None]:
    """Query, target, and as many negatives as there are further sides; None where it has fewer."""
    negatives = [*pair.negatives[: sides - 2]]
    return [pair.query, pair.target, *negatives] + [None] * (sides - 2 - len(negatives))


def content_id(item: Item | None) -> int:
    """int32 hash of an item's text and images: equal for equal contents, in any source.

    A zero picture is not the same as no picture.
    """
    if item is None:
        return 0
    digest = hashlib.blake2b(item.text.encode(), digest_size=4)
    for image in item.images:
        digest.update(b"\x1f")
        if image is None:
            continue
        if isinstance(image, (str, os.PathLike)):
            image = read_image_file(image, item.name)
        data = image if isinstance(image, bytes) else image.tobytes()
        digest.update(hashlib.blake2b(data).digest())
    return int.from_bytes(digest.digest(), "little", signed=True)


def _to_arrays(sequence: Sequence) -> dict[str, Any]:
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


def _to_sequence(arrays: dict[str, Any]) -> Sequence:
    return Sequence(
        tokens=arrays["tokens"],
        crops=arrays["crops"],
        taps=Taps(arrays["tap_index"], arrays["tap_weight"]),
        name=arrays["name"],
        zero_crops=tuple(arrays["zero_crops"]),
        num_cut=arrays["num_cut"],
    )


class _PackedDataset(grain.IterDataset):
    """Loaded rows to `TrainBatch`es; `options` are those of `_PackedIterator`."""

    def __init__(self, loaded: grain.MapDataset, **options):
        super().__init__()
        self._loaded = loaded
        self._options = options

    def __iter__(self) -> grain.DatasetIterator[TrainBatch]:
        return _PackedIterator(self._loaded, **self._options)

    def __str__(self) -> str:
        return "Packed"


class _Waiting(NamedTuple):
    """A pair in memory and its position in the stream, by which it can be loaded again."""

    position: int
    element: dict[str, Any]


class _PackedIterator(grain.DatasetIterator):
    """Packs the stream. Its state: the next position to read, and those waiting for a later batch."""

    def __init__(
        self,
        loaded: grain.MapDataset,
        *,
        packer: Callable[[], Packer],
        micro_batches: int,
        lookahead: int,
        num_workers: int,
        rows: float,
        skips: SkipLog | None,
        identity: dict[str, Any],
    ):
        super().__init__()
        self._loaded = loaded
        self._packer = packer()
        self._micro_batches = micro_batches
        self._lookahead = lookahead
        self._num_workers = num_workers
        self._rows = rows
        self._skips = skips
        self._identity = identity
        self._cuts = CutWarnings(items_repeat=True)
        self._next = 0
        self._carry: list[_Waiting] = []
        self._stream: Iterator[dict[str, Any]] | None = None

    def __next__(self) -> TrainBatch:
        packs = [self._pack() for _ in range(self._micro_batches)]
        if not any(pack.packed.valid.any() for pack in packs):
            raise StopIteration
        return TrainBatch(
            packed=stack_batches([pack.packed for pack in packs]),
            target_ids=np.stack([pack.target_ids for pack in packs]),
            ids=[pack.ids for pack in packs],
            epoch=self._next / self._rows,
        )

    def get_state(self) -> dict[str, Any]:
        return {
            "next": self._next,
            "carry": [waiting.position for waiting in self._carry],
            **self._identity,
        }

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
        self._next = state["next"]
        self._carry = [_Waiting(p, self._loaded[p]) for p in state["carry"]]

    def close(self) -> None:
        self._stop_stream()
        super().close()

    def _pack(self) -> TrainBatch:
        """One micro-batch: first the pairs that waited, then the stream."""
        target_ids: dict[str, np.ndarray] = {}
        self._carry = [waiting for waiting in self._carry if not self._add(waiting, target_ids)]
        while not self._packer.full and len(self._carry) < self._lookahead:
            waiting = self._read()
            if waiting is None:
                break
            if not self._add(waiting, target_ids):
                self._carry.append(waiting)
        packed, ids = self._packer.emit()
        none = np.zeros(packed.pooled.shape[1] - 1, np.int32)
        by_slot = [[target_ids.get(pair_id, none) for pair_id in shard] for shard in ids]
        return TrainBatch(packed, np.array(by_slot, np.int32).swapaxes(1, 2), ids, 0.0)

    def _add(self, waiting: _Waiting, target_ids: dict[str, np.ndarray]) -> bool:
        """Place a pair in the current batch; True also if it is skipped because no batch has room."""
        element = waiting.element
        sequences = [None if s is None else _to_sequence(s) for s in element["sequences"]]
        try:
            added = self._packer.add(sequences, element["id"])
        except ValueError as error:
            if self._skips is None:
                raise
            self._skips.record(element["id"], str(error))
            return True
        if added:
            target_ids[element["id"]] = element["target_ids"]
        return added

    def _read(self) -> _Waiting | None:
        """The next usable pair of the stream; None at its end."""
        if self._stream is None:
            self._stream = self._start_stream()
        for element in self._stream:
            position, self._next = self._next, self._next + 1
            if "skipped" in element:
                self._skips.record(element["id"], element["skipped"])
            elif "hole" not in element:
                for sequence in element["sequences"]:
                    if sequence is not None:
                        self._cuts.note(_to_sequence(sequence))
                return _Waiting(position, element)
        return None

    def _start_stream(self) -> grain.DatasetIterator:
        threads = os.cpu_count() or 1 if self._num_workers == 0 else 1
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        stream = self._loaded[self._next :].to_iter_dataset(options)
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


def _order_name(source: PairSource, composition: Composition) -> str:
    """Says which rows the order is over, and how: positions of another order mean nothing."""
    sizes = {subset: len(rows) for subset, rows in source.subsets.items()}
    weights = composition.weights and dict(composition.weights)
    parts = json.dumps([sizes, composition.sub_batch, weights])
    return f"{len(source)} rows, {hashlib.blake2b(parts.encode(), digest_size=4).hexdigest()}"


def _derive(seed: int, *path: int) -> int:
    """A seed of 32 bits for one part of the order, unrelated to those of other parts."""
    return int(np.random.SeedSequence([seed, *path]).generate_state(1)[0])
