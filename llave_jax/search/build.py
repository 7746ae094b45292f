"""From items of any source to an index: what is new or has changed is embedded, the rest stays.

A job may die at any moment; the same job then goes on behind the last chunk that is in the index. Owns which
items are embedded. The index itself is `index.py`.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from llave_jax.common.content import digest
from llave_jax.common.progress import Progress
from llave_jax.embedding.checks import check_embeddings
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.entries import Entry, take_chunk
from llave_jax.inputs.content import item_key, item_stamp
from llave_jax.inputs.item import Item, with_prompt
from llave_jax.search.columns import Row
from llave_jax.search.id_set import IdSet
from llave_jax.search.index import Index
from llave_jax.search.thumbnails import make_thumbnail

# Threads that look at files and make thumbnails, while the device works.
_THREADS = 8


@dataclasses.dataclass
class Counts:
    """What became of the items of a job.

    Attributes:
      added: new in the index.
      changed: embedded again, as what the model sees has changed.
      renewed: kept their vectors; other metadata, another path or time of their file.
      unchanged: nothing was to be done.
      skipped: reasons why items were left out.
    """

    added: int = 0
    changed: int = 0
    renewed: int = 0
    unchanged: int = 0
    skipped: list[str] = dataclasses.field(default_factory=list)


def add_items(
    index: Index,
    embedder: Embedder,
    entries: Iterable[Entry],
    *,
    total: int | None = None,
    model: str = "",
    on_error: str = "raise",
    show_progress: bool = True,
) -> Counts:
    """Bring items into an index.

    Memory grows by eight bytes an item: all else is done in chunks.

    Args:
      index: open for writing.
      embedder: with the model that made the index.
      entries: the items, from `embedding.item_sources`.
      total: how many there are; None if that is not known.
      model: as its user calls it, for messages.
      on_error: "raise", or "skip" items that cannot be used.
      show_progress: show how many are done.

    Returns:
      What became of them.

    Raises:
      ValueError: an item cannot be used (it is named; the chunks before it are kept), or an embedding is not
        finite.
      DiskFull: there is no room. What is in the index stays.
    """
    counts, seen, waiting = Counts(), IdSet(), iter(entries)
    with (
        ThreadPoolExecutor(_THREADS) as threads,
        Progress(total, "indexing", enabled=show_progress) as progress,
    ):
        job = _Job(index, embedder, threads, counts, model, on_error)
        while chunk := take_chunk(waiting, 0):
            before = counts.unchanged + counts.renewed
            job.add(chunk, seen)
            kept = counts.unchanged + counts.renewed - before
            if kept:
                progress.skip(kept)
            note = f"{len(counts.skipped)} skipped" if counts.skipped else ""
            progress.update(len(chunk) - kept, note)
    return counts


class _Failed(ValueError):
    """Why one entry is not indexed."""


class _Job:
    def __init__(
        self,
        index: Index,
        embedder: Embedder,
        threads: ThreadPoolExecutor,
        counts: Counts,
        model: str,
        on_error: str,
    ):
        self._index, self._embedder, self._threads = index, embedder, threads
        self._counts, self._model, self._on_error = counts, model, on_error
        self._thumbnails = index.settings.thumbnails
        self._prompt = index.settings.model.get("prompt") or ""

    def add(self, chunk: list[Entry], seen: IdSet) -> None:
        rows = self._usable(chunk, seen)
        present = self._index.present([row.id for row, _ in rows])
        stale = [(row, item) for row, item in rows if present.get(row.id, ("", ""))[1] != row.stamp]
        self._counts.unchanged += len(rows) - len(stale)
        keys = list(self._threads.map(self._key, stale))
        renewed, new = [], []
        for (row, item), key in zip(stale, keys, strict=True):
            if isinstance(key, _Failed):
                self._skip(str(key))
                continue
            row = dataclasses.replace(row, digest=key)
            if present.get(row.id, (None, None))[0] == key:
                renewed.append(row)
            else:
                new.append((row, item))
        self._index.renew(renewed)
        self._counts.renewed += len(renewed)
        if new:
            self._embed(new)

    def _embed(self, new: list[tuple[Row, Item]]) -> None:
        rows, items = [row for row, _ in new], [item for _, item in new]
        pictures: Iterable[bytes | None] = [None] * len(items)
        if self._thumbnails:
            pictures = self._threads.map(make_thumbnail, items)
        vectors, failures = self._encode([with_prompt(item, self._prompt) for item in items])
        for reason in failures.values():
            self._skip(reason)
        fine = [i for i in range(len(items)) if i not in failures]
        check_embeddings(vectors[fine], [items[i] for i in fine], self._model)
        shown = list(pictures)
        done = [dataclasses.replace(rows[i], thumbnail=shown[i]) for i in fine]
        changed = self._index.add(done, vectors[fine])
        self._counts.changed += changed
        self._counts.added += len(done) - changed

    def _encode(self, items: Sequence[Item]) -> tuple[np.ndarray, dict[int, str]]:
        if self._on_error == "skip":
            return self._embedder.encode(items, on_error="skip")
        return self._embedder.encode(items), {}

    def _usable(self, chunk: list[Entry], seen: IdSet) -> list[tuple[Row, Item]]:
        """Rows with stamps, of the entries that are items with ids and metadata that the index can keep."""
        ids = [_id_text(entry.id) for entry in chunk]
        twice = set(seen.among(ids))
        seen.add(ids)
        unfit = self._index.metadata_failures([entry.metadata for entry in chunk])
        stamps = list(self._threads.map(_stamp, chunk))
        usable = []
        for place, (entry, id, stamp) in enumerate(zip(chunk, ids, stamps, strict=True)):
            if entry.item is None or isinstance(stamp, _Failed):
                self._skip(entry.error or str(stamp))
            elif id in twice:
                self._skip(f"{entry.where}: the id {id!r:.80} was given before; ids are unique")
            elif place in unfit:
                self._skip(f"{entry.where}: {unfit[place]}")
            else:
                twice.add(id)
                row = Row(
                    id,
                    _kind(entry.item),
                    text=entry.item.text,
                    path=entry.path or "",
                    metadata=entry.metadata,
                    stamp=stamp,
                )
                usable.append((row, entry.item))
        return usable

    def _skip(self, reason: str) -> None:
        if self._on_error == "raise":
            raise ValueError(reason)
        self._counts.skipped.append(reason)

    @staticmethod
    def _key(pair: tuple[Row, Item]) -> bytes | _Failed:
        try:
            return item_key(pair[1])
        except (OSError, ValueError) as error:
            return _Failed(_unreadable(pair[1].name, error))


def _stamp(entry: Entry) -> bytes | _Failed:
    """Digest of all that the index keeps of an item, of files without their content."""
    if entry.item is None:
        return b""
    try:
        stamp = item_stamp(entry.item)
    except (OSError, ValueError) as error:  # ValueError: a null byte in a path
        return _Failed(_unreadable(entry.where, error))
    metadata = json.dumps(dict(entry.metadata), sort_keys=True, default=str)
    return digest(stamp, metadata.encode("utf-8", "surrogatepass"))


def _unreadable(where: str, error: Exception) -> str:
    return str(error) if where in str(error) else f"{where}: {error}"


def _id_text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)


def _kind(item: Item) -> str:
    pictures = [kind for kind in ("image", "video") if _has(item, kind)]
    if not pictures:
        return "text"
    return "mixed" if item.text.strip() else pictures[0]


def _has(item: Item, kind: str) -> bool:
    if kind == "video":
        return item.video is not None
    return any(image is not None for image in item.images)
