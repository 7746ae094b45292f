"""Embedding of many items into a directory. A job may die at any moment and continue.

Owns which chunks are embedded: new ones, and those whose items have changed. Items come from
`item_sources.py`, the output directory is `store.py`, the model is `embedder.py`.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from llave_jax.common.content import digest
from llave_jax.common.progress import Progress
from llave_jax.embedding.checks import check_embeddings
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.entries import Entry, take_chunk
from llave_jax.embedding.item_sources import ItemSource, open_items
from llave_jax.embedding.store import Chunk, Store
from llave_jax.inputs.content import item_key, item_stamp
from llave_jax.inputs.item import Item
from llave_jax.parallel.processes import on_first_process

# Threads that look at files: they wait for the disk or the network.
FILE_THREADS = 32


class Result(NamedTuple):
    """What a call of `embed_file` made.

    Attributes:
      path: of the array.
      embedded: rows of the array; 0 on processes other than the first.
      skipped: items that were left out; 0 on processes other than the first.
    """

    path: Path
    embedded: int
    skipped: int


def embed_file(
    embedder: Embedder,
    source: str | os.PathLike | ItemSource,
    output: str | os.PathLike,
    fingerprint: str,
    *,
    model: str = "",
    batch_size: int | None = None,
    on_error: str = "raise",
) -> Result:
    """Embed items into a directory, continuing what an earlier call did.

    The input is read once, a chunk at a time; memory grows only by a short entry for each chunk. With
    several processes all call this alike, and the first writes.

    Args:
      embedder: the model.
      source: what `open_items` returned, or the path of one input.
      output: directory of the results.
      fingerprint: of the model; work of another model is not continued.
      model: as its user calls it, for messages.
      batch_size: as for `Embedder.encode`.
      on_error: "raise", or "skip" items that cannot be read.

    Returns:
      Where the array is, and the numbers of its rows and of the items that were skipped.

    Raises:
      ValueError: an item cannot be read (it is named; the chunks before it are kept), an embedding is
        not finite, or `output` holds work on other items or of another model.
      OSError: the input cannot be read or the output cannot be written.
    """
    items = source if isinstance(source, ItemSource) else open_items(source)
    dimension = embedder.config.text.hidden_size
    with _Output(items, Path(output), fingerprint, dimension, on_error) as out:
        entries, index = iter(items), 0
        while chunk := take_chunk(entries, out.recorded_size(index)):
            if on_error == "raise":
                for entry in chunk:
                    if entry.error:
                        raise ValueError(entry.error)
            if not out.keep(index, chunk):
                out.add(index, chunk, *_encode(embedder, chunk, model, batch_size, on_error))
            index += 1
        return out.finish(index)


def _encode(
    embedder: Embedder, chunk: list[Entry], model: str, batch_size: int | None, on_error: str
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Embeddings of a chunk's readable items, and (index, reason) of the others."""
    readable = {i: entry.item for i, entry in enumerate(chunk) if entry.item is not None}
    places, items = list(readable), list(readable.values())
    failures: dict[int, str] = {}
    if on_error == "skip":
        vectors, failures = embedder.encode_skipping(items, batch_size)
    else:
        vectors = embedder.encode(items, batch_size)
    fine = [i for i in range(len(items)) if i not in failures]
    vectors = vectors[fine]
    check_embeddings(vectors, [items[i] for i in fine], model)
    skipped = {i: entry.error for i, entry in enumerate(chunk) if entry.item is None}
    skipped |= {places[i]: reason for i, reason in failures.items()}
    return vectors, sorted(skipped.items())


class _Output:
    """The output of the job. Only the first process has a store; the others follow its decisions."""

    # On the first process only.
    _store: Store
    _threads: ThreadPoolExecutor
    _progress: Progress

    def __init__(self, source: ItemSource, output: Path, model: str, dimension: int, on_error: str):
        self._source, self._path, self._on_error = source, output, on_error
        self._stamp = self._content = ""
        self._closing = contextlib.ExitStack()

        def start() -> None:
            # Raises before anything is written if there is no input.
            total = source.count()
            self._store = self._closing.enter_context(
                Store(
                    output,
                    model=model,
                    dimension=dimension,
                    source=source.resolved(),
                    items=total,
                )
            )
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
            # Digests are taken before the model sees the files. If a file is replaced in between, the
            # next start finds a difference.
            self._stamp, self._content = self._digest(chunk, item_stamp), ""
            if old is not None and old.items == len(chunk) and old.stamp == self._stamp:
                self._skip(index, chunk, old)
                return True
            self._content = self._digest(chunk, item_key)
            if old is not None and old.items == len(chunk) and old.content == self._content:
                self._skip(index, chunk, old)
                self._store.renew(index, self._stamp)
                return True
            if old is not None and old.content:
                self._note_change(chunk)
            return False

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
            self._store.add(
                index, vectors, stamp=self._stamp, content=self._content, skipped=skipped
            )
            self._list(index, chunk)
            note = f"{self._store.num_skipped} skipped" if self._store.num_skipped else ""
            self._progress.update(len(chunk), note)

        on_first_process(write)

    def finish(self, count: int) -> Result:
        """End the output, after all chunks of the input have been kept or added."""

        def end() -> None:
            if not count:
                raise ValueError(f"{self._source.name}: has no items")
            self._store.finish(count)

        on_first_process(end)
        numbers = (0, 0)
        if jax.process_index() == 0:
            numbers = (self._store.num_rows, self._store.num_skipped)
        return Result(self._path / "embeddings.npy", *numbers)

    def _skip(self, index: int, chunk: list[Entry], old: Chunk) -> None:
        """Enter a chunk that an earlier call has embedded."""
        if old.skipped and self._on_error == "raise":
            raise ValueError(old.skipped[0][1])
        self._list(index, chunk)
        self._progress.skip(len(chunk))

    def _list(self, index: int, chunk: list[Entry]) -> None:
        self._store.list_items(
            index, [entry.number for entry in chunk], [entry.id for entry in chunk]
        )

    def _note_change(self, chunk: list[Entry]) -> None:
        if self._store.source != self._source.resolved():
            raise ValueError(
                f"{self._path} holds embeddings of other items, from {self._store.source}; use "
                "another --output"
            )
        logging.getLogger(__name__).info(
            "items from %s to %s have changed; they are embedded again",
            chunk[0].where,
            chunk[-1].where,
        )

    def _digest(self, chunk: list[Entry], digest_of: Callable[[Item], bytes]) -> str:
        """Digest of a chunk's items, in order. Items that cannot be read have digests too."""

        def entry_digest(entry: Entry) -> bytes:
            if entry.item is None:
                return digest(entry.error.encode("utf-8", "backslashreplace"))
            try:
                return digest_of(entry.item)
            except (OSError, ValueError) as error:  # ValueError: a null byte in a path
                return digest(f"unreadable: {type(error).__name__}".encode())

        has_files = any(entry.weight > 1 for entry in chunk)
        digests = self._threads.map(entry_digest, chunk) if has_files else map(entry_digest, chunk)
        return digest(*digests).hex()
