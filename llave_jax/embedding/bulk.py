"""Embedding of many items into a directory. A job may die at any moment and continue.

Owns which chunks are embedded: new ones, and those whose items have changed. Items come from
`item_sources.py`, the output directory is `store.py` with `array_store.py` and `part_store.py`, the model is `embedder.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llave_jax.common.content import digest
from llave_jax.common.fetch import Fetcher
from llave_jax.common.progress import Progress
from llave_jax.common.text import shortened
from llave_jax.embedding.array_store import ArrayStore
from llave_jax.embedding.checks import check_embeddings
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.entries import Entry, is_url, take_chunk
from llave_jax.embedding.item_sources import ItemSource, open_items
from llave_jax.embedding.part_store import PartStore, shard_suffix
from llave_jax.embedding.parts import WRITERS, PartWriter
from llave_jax.embedding.precision import quantise, truncate
from llave_jax.embedding.store import Chunk, Store
from llave_jax.inputs.content import item_key, item_stamp
from llave_jax.inputs.item import Item, with_prompt
from llave_jax.inputs.item_forms import MOST_FETCHED_BYTES
from llave_jax.parallel.processes import on_first_process

# Threads that look at files: they wait for the disk or the network.
FILE_THREADS = 32

logger = logging.getLogger(__name__)


class Result(NamedTuple):
    """What a call of `embed_file` made.

    Attributes:
      path: of the array, or of the directory of parts.
      embedded: vectors of this job; 0 on processes other than the first.
      skipped: items that were left out; 0 on processes other than the first.
      dimension: numbers of a vector.
      skipped_list: the file that lists them, if there are any.
    """

    path: Path
    embedded: int
    skipped: int
    dimension: int
    skipped_list: Path


@dataclasses.dataclass(frozen=True)
class Job:
    """What is embedded, how, and where it goes.

    Attributes:
      source: the items.
      output: directory of the results.
      fingerprint: of the model; work of another model is not continued.
      format: "npy", or one of `parts.FORMATS`.
      on_error: "raise", or "skip" items that cannot be read.
      model: as its user calls it, for messages.
      batch_size: as for `Embedder.encode`.
      prompt: goes in front of each item's text.
      truncate_dim, precision: as of `precision.truncate` and `precision.quantise`.
    """

    source: ItemSource
    output: Path
    fingerprint: str
    format: str = "npy"
    on_error: str = "raise"
    model: str = ""
    batch_size: int | None = None
    prompt: str = ""
    truncate_dim: int | None = None
    precision: str = "float32"

    @property
    def key(self) -> str:
        """All that decides what a vector is, besides its item."""
        settings = {
            "truncate_dim": self.truncate_dim,
            "precision": self.precision if self.precision != "float32" else None,
            "prompt": self.prompt or None,
        }
        given = {name: value for name, value in settings.items() if value is not None}
        # The fingerprint alone is what outputs of earlier versions have.
        return f"{self.fingerprint} {json.dumps(given)}" if given else self.fingerprint

    def finished(self, vectors: np.ndarray) -> np.ndarray:
        """Vectors as they are kept.

        Args:
          vectors: float32 [n, D] of the model.

        Returns:
          [n, numbers that are kept], of the precision's dtype.
        """
        return quantise(truncate(vectors, self.truncate_dim), self.precision)

    def writer(self, dimension: int) -> PartWriter:
        """What writes the parts of an output in parts.

        Args:
          dimension: D of the model.

        Returns:
          The writer.
        """
        kept = self.finished(np.zeros((1, dimension), np.float32))
        return WRITERS[self.format](
            self.output,
            dimension=kept.shape[1],
            dtype=kept.dtype.name,
            fields=self.source.metadata_fields,
            suffix=shard_suffix(self.source.shard),
        )

    def open_store(self, dimension: int, items: int | None) -> Store:
        """The output, kept to this process until it is closed.

        Args:
          dimension: D of the model.
          items: of the whole input, if they are known.

        Returns:
          The store.

        Raises:
          ValueError: `output` holds other work, or another job writes to it.
        """
        source = self.source.resolved()
        if self.format != "npy":
            return PartStore(self.writer(dimension), model=self.key, source=source)
        if self.source.shard[1] > 1:
            raise ValueError("embeddings.npy is one array; shards need --format parquet or lance")
        kept = self.finished(np.zeros((1, dimension), np.float32))
        return ArrayStore(
            self.output,
            model=self.key,
            dimension=kept.shape[1],
            dtype=kept.dtype,
            source=source,
            items=items,
        )


def embed_file(
    embedder: Embedder,
    source: str | os.PathLike | ItemSource,
    output: str | os.PathLike,
    fingerprint: str,
    **options: Any,
) -> Result:
    """`embed_items` of one input.

    Args:
      embedder: the model.
      source: what `open_items` returned, or the path of one input.
      output, fingerprint, options: as of `Job`.

    Returns:
      As `embed_items`.

    Raises:
      ValueError, OSError: as `embed_items`.
    """
    items = source if isinstance(source, ItemSource) else open_items(source)
    return embed_items(embedder, Job(items, Path(output), fingerprint, **options))


def embed_items(embedder: Embedder, job: Job) -> Result:
    """Embed items into a directory, continuing what an earlier call did.

    The input is read once, a chunk at a time; memory grows only by a short entry for each chunk. With
    several processes all call this alike, and the first writes.

    Args:
      embedder: the model.
      job: what is embedded, and where it goes.

    Returns:
      Where the vectors are, and the numbers of them and of the items that were skipped.

    Raises:
      ValueError: an item cannot be read (it is named; the chunks before it are kept), an embedding is
        not finite, or `output` holds work on other items or of another model.
      OSError: the input cannot be read or the output cannot be written.
    """
    with _Output(job, embedder.config.text.hidden_size) as out:
        entries, index = iter(job.source), 0
        while chunk := take_chunk(entries, out.recorded_size(index)):
            if job.on_error == "raise":
                refuse_errors(chunk)
            if not out.keep(index, chunk):
                out.add(index, chunk, *encode_chunk(embedder, chunk, job))
            index += 1
        return out.finish(index)


def refuse_errors(chunk: Sequence[Entry]) -> None:
    """Raises if an entry is no item.

    Args:
      chunk: entries.

    Raises:
      ValueError: the first one's error.
    """
    for entry in chunk:
        if entry.error:
            raise ValueError(entry.error)


def encode_chunk(
    embedder: Embedder, chunk: Sequence[Entry], job: Job
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Embeddings of a chunk.

    Args:
      embedder: the model.
      chunk: its entries.
      job: how they are embedded.

    Returns:
      vectors: of the items that can be read, as they are kept.
      skipped: (index, reason) of the others.

    Raises:
      ValueError: an embedding is not finite; an item cannot be read, unless these are skipped.
    """
    reading = _Reading(chunk, job)
    failures: dict[int, str] = {}
    if job.on_error == "skip":
        vectors, failures = embedder.encode(reading, job.batch_size, on_error="skip")
    else:
        vectors = embedder.encode(reading, job.batch_size)
    places, names = reading.places, reading.names
    fine = [i for i in range(len(places)) if i not in failures]
    vectors = vectors[fine]
    check_embeddings(vectors, [Item(name=names[i]) for i in fine], job.model)
    skipped = reading.failures | {places[i]: reason for i, reason in failures.items()}
    return job.finished(vectors), sorted(skipped.items())


class _Reading:
    """The items of a chunk that can be read, with pictures of URLs fetched. Iterate once.

    Attributes:
      places: index of each item that was given out.
      names: of these items.
      failures: why other entries have none, by their index.
    """

    def __init__(self, chunk: Sequence[Entry], job: Job):
        self._chunk, self._job = chunk, job
        self.places: list[int] = []
        self.names: list[str] = []
        self.failures: dict[int, str] = {}

    def __iter__(self) -> Iterator[Item]:
        fetch = Fetcher(None) if self._job.source.allow_urls else None
        with ThreadPoolExecutor(FILE_THREADS) as threads:
            # A few pictures ahead of the model, however large the chunk is.
            for start in range(0, len(self._chunk), 2 * FILE_THREADS):
                some = self._chunk[start : start + 2 * FILE_THREADS]
                items = (_fetched(entry, fetch) for entry in some)
                if any(entry.item and any(map(is_url, entry.item.images)) for entry in some):
                    items = threads.map(_fetched, some, itertools.repeat(fetch))
                for i, item in enumerate(items, start):
                    if isinstance(item, str):
                        if self._job.on_error == "raise":
                            raise ValueError(item)
                        self.failures[i] = item
                        continue
                    self.places.append(i)
                    self.names.append(item.name)
                    yield with_prompt(item, self._job.prompt)


def _fetched(entry: Entry, fetch: Fetcher | None) -> Item | str:
    """An entry's item, or what is wrong."""
    item = entry.item
    if item is None:
        return entry.error
    images = []
    for image in item.images:
        if isinstance(image, str) and fetch is not None and is_url(image):
            try:
                image = fetch(image, MOST_FETCHED_BYTES)
            except ValueError as error:
                return shortened(f"{item.name}: {image}: {error}")
        images.append(image)
    return dataclasses.replace(item, images=tuple(images)) if fetch is not None else item


class State(NamedTuple):
    """How a chunk compares with what was embedded.

    Attributes:
      kept: its vectors are there already.
      stamp, content: digests of its items now; `content` is "" if `stamp` says enough.
    """

    kept: bool
    stamp: str
    content: str


def compare(chunk: Sequence[Entry], old: Chunk | None, threads: Executor) -> State:
    """Whether the vectors of a chunk's items are there already.

    Digests are taken before the model sees the files. If a file is replaced in between, the next start finds a
    difference.

    Args:
      chunk: its entries.
      old: what was embedded under its number.
      threads: look at files.

    Returns:
      The answer.
    """
    stamp = _digest(chunk, item_stamp, threads)
    same_items = old is not None and old.items == len(chunk)
    if old is not None and same_items and old.stamp == stamp:
        return State(True, stamp, "")
    content = _digest(chunk, item_key, threads)
    return State(old is not None and same_items and old.content == content, stamp, content)


def _digest(chunk: Sequence[Entry], digest_of: Callable[[Item], bytes], threads: Executor) -> str:
    """Digest of a chunk's items, in order. Items that cannot be read have digests too."""

    def entry_digest(entry: Entry) -> bytes:
        if entry.item is None:
            return digest(entry.error.encode("utf-8", "backslashreplace"))
        item = entry.item
        if any(map(is_url, item.images)):
            # A URL stands for what it leads to: nothing is fetched to see whether that has changed.
            images = tuple(
                i.encode() if isinstance(i, str) and is_url(i) else i for i in item.images
            )
            item = dataclasses.replace(item, images=images)
        try:
            return digest_of(item)
        except (OSError, ValueError) as error:  # ValueError: a null byte in a path
            return digest(f"unreadable: {type(error).__name__}".encode())

    has_files = any(entry.weight > 1 for entry in chunk)
    digests = threads.map(entry_digest, chunk) if has_files else map(entry_digest, chunk)
    return digest(*digests).hex()


class _Output:
    """The output of the job. Only the first process has a store; the others follow its decisions."""

    # On the first process only.
    _store: Store
    _threads: ThreadPoolExecutor
    _progress: Progress

    def __init__(self, job: Job, dimension: int):
        self._job, self._dimension, self._state = job, dimension, State(False, "", "")
        self._closing = contextlib.ExitStack()

        def start() -> None:
            # Raises before anything is written if there is no input.
            total = job.source.count()
            self._store = self._closing.enter_context(job.open_store(dimension, total))
            self._threads = self._closing.enter_context(ThreadPoolExecutor(FILE_THREADS))
            self._progress = self._closing.enter_context(Progress(total, "embedding"))

        on_first_process(start)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *exc) -> None:
        self._closing.close()

    def recorded_size(self, index: int) -> int:
        """Items that a chunk had when it was embedded; 0 for a new chunk."""

        def size() -> int:
            chunk = self._store.chunks.get(index)
            return chunk.items if chunk else 0

        return on_first_process(size)

    def keep(self, index: int, chunk: list[Entry]) -> bool:
        """Whether the vectors of these items are there already."""

        def check() -> bool:
            old = self._store.chunks.get(index)
            self._state = compare(chunk, old, self._threads)
            if self._state.kept:
                keep_chunk(self._store, index, chunk, self._state, self._job.on_error)
                self._progress.skip(len(chunk))
            elif old is not None and old.content:
                note_change(self._store, chunk, self._job)
            return self._state.kept

        return bool(on_first_process(check))

    def add(
        self,
        index: int,
        chunk: list[Entry],
        vectors: np.ndarray,
        skipped: list[tuple[int, str]],
    ) -> None:
        """Store the vectors of the chunk that `keep` was last asked about."""

        def write() -> None:
            _, stamp, content = self._state
            self._store.add(index, chunk, vectors, stamp=stamp, content=content, skipped=skipped)
            self._store.list_items(index, chunk)
            note = f"{self._store.num_skipped} skipped" if self._store.num_skipped else ""
            self._progress.update(len(chunk), note)

        on_first_process(write)

    def finish(self, count: int) -> Result:
        """End the output, after all chunks of the input have been kept or added."""

        def end() -> None:
            if not count and self._job.source.shard[1] == 1:
                raise ValueError(f"{self._job.source.name}: has no items")
            self._store.finish(count)

        on_first_process(end)
        first = jax.process_index() == 0
        return result_of(self._job, self._store if first else None, self._dimension)


def result_of(job: Job, store: Store | None, dimension: int) -> Result:
    """What a job made.

    Args:
      job: that has ended.
      store: its output; None on processes other than the first.
      dimension: D of the model.

    Returns:
      The result.
    """
    numbers = (store.num_rows, store.num_skipped) if store else (0, 0)
    path, skipped = job.output / "embeddings.npy", "skipped.jsonl"
    if job.format != "npy":
        path, skipped = job.output, f"_skipped{shard_suffix(job.source.shard)}.jsonl"
    kept = job.finished(np.zeros((1, dimension), np.float32)).shape[1]
    return Result(path, *numbers, kept, job.output / skipped)


def keep_chunk(
    store: Store, index: int, chunk: Sequence[Entry], state: State, on_error: str
) -> None:
    """Enter a chunk that an earlier call has embedded.

    Args:
      store: the output.
      index: number of the chunk.
      chunk: its entries.
      state: what `compare` found.
      on_error: of the job.

    Raises:
      ValueError: an item was skipped then, and items that cannot be read end the job now.
    """
    old = store.chunks[index]
    if old.skipped and on_error == "raise":
        raise ValueError(old.skipped[0][1])
    store.list_items(index, chunk)
    if state.content:
        store.renew(index, state.stamp)


def note_change(store: Store, chunk: Sequence[Entry], job: Job) -> None:
    """Says that a chunk's items have changed.

    Args:
      store: the output.
      chunk: the entries as they are now.
      job: their job.

    Raises:
      ValueError: the output is of another input.
    """
    if store.source != job.source.resolved():
        raise ValueError(
            f"{job.output} holds embeddings of other items, from {store.source}; use "
            "another --output"
        )
    logger.info(
        "items from %s to %s have changed; they are embedded again",
        chunk[0].where,
        chunk[-1].where,
    )
