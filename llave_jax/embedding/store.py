"""What outputs of `llave_jax.embed` have in common, so that a job may die at any moment and continue.

Owns the log of what is done, its checksums, and the list of items that were left out. The vectors themselves are
`array_store.py` (one .npy file) or `part_store.py` (a file for each chunk).

    progress.jsonl   which model, then a line for each chunk of items that is done, with the checksum of its
                     embeddings; at last the checksums of the lists
    skipped.jsonl    line, id and reason of each item that was left out; absent without any
    .lock            which process is writing

A chunk's embeddings are on disk before its line in the log. If the items of a chunk change, a new line replaces the
old one. Digests of a chunk's items are made in `bulk.py`. Each start compares what is there with the checksums; a
chunk whose embeddings have changed, in whatever way, is embedded again.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from llave_jax.common.content import file_digest
from llave_jax.common.files import naming_full_disk, partial_path, remove_abandoned, write_text
from llave_jax.common.locks import only_writer
from llave_jax.embedding.entries import Entry

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive items of the input that are done.

    Attributes:
      items: how many.
      first_row: of its embeddings, in a growing array.
      rows: of its embeddings: one for each item that was not skipped.
      stamp: digest that is quick to compute (size and time of files); "" if the embeddings are lost.
      content: digest of what the model saw; "" if the embeddings are lost.
      skipped: (index within the chunk, reason) of items without an embedding.
      checksum: SHA-256 of the embeddings' bytes, or of the part's file; "" in work of earlier versions, which is
        believed.
      part: what finds the chunk's own file; "" in an array.
      labels: digest of the ids and metadata in that file; "" in an array.
    """

    items: int
    first_row: int
    rows: int
    stamp: str
    content: str
    skipped: tuple[tuple[int, str], ...] = ()
    checksum: str = ""
    part: str = ""
    labels: str = ""


class Store(abc.ABC):
    """What an output directory holds. Use as a context manager.

    Attributes:
      source: path of the input that the directory's work belongs to; None if there is no work.
      chunks: what is done, by the number of the chunk.
      num_rows: embeddings that were listed so far.
      num_skipped: skipped items that were listed so far.

    Args:
      directory: made if it does not exist.
      model: fingerprint of the model, with all else that decides what a vector is.
      source: path of the input, kept for messages.
      suffix: of the names of this job's own files, "" or as of a shard.
      prefix: of the names of the log and of lists.
      lists: names of the lists, without prefix and suffix.

    Raises:
      ValueError: the directory holds other work, or another job writes to it.
      DiskFull: from every method that writes. What is complete stays.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        model: str,
        source: str,
        lists: Sequence[str],
        prefix: str = "",
        suffix: str = "",
    ):
        self._directory = Path(directory)
        self._progress = self._directory / f"{prefix}progress{suffix}.jsonl"
        self._heading = {"model": model, "input": source}
        # Checksums of the lists as they were written; None: not known.
        self._finished: dict[str, str | None] | None = None
        self._log: IO[str] | None = None
        self._closing = contextlib.ExitStack()
        self.source: str | None = None
        self.chunks: dict[int, Chunk] = {}
        self.num_rows = self.num_skipped = 0
        self._list_names = [f"{prefix}{name}{suffix}.jsonl" for name in lists]
        try:
            self._closing.enter_context(only_writer(self._directory, name=f".lock{suffix}"))
            remove_abandoned(self._directory, f".*{suffix}.*partial" if suffix else ".*.partial")
            # Of this job, if it fails.
            for name in (*self._list_names, *self._own_files(), self._progress.name):
                temporary = partial_path(self._directory / name)
                self._closing.callback(temporary.unlink, missing_ok=True)
            self._load()
            self._lists = [self._list(name) for name in self._list_names]
        except BaseException:
            self._closing.close()
            raise

    @property
    @abc.abstractmethod
    def path(self) -> Path:
        """What the user reads when all is done."""

    @abc.abstractmethod
    def add(
        self,
        index: int,
        entries: Sequence[Entry],
        vectors: np.ndarray,
        *,
        stamp: str,
        content: str,
        skipped: Sequence[tuple[int, str]],
    ) -> None:
        """Keep the embeddings of a chunk.

        Args:
          index: number of the chunk.
          entries: its items.
          vectors: [rows, D], a row for each entry that was not skipped.
          stamp, content: digests of its items.
          skipped: (index within the chunk, reason) of items without an embedding.
        """

    @abc.abstractmethod
    def _own_files(self) -> Sequence[str]:
        """Names of files that the subclass writes under a temporary name first."""

    @abc.abstractmethod
    def _has_work(self) -> str:
        """Name of a result that is there although no log says what it is; "" without."""

    @abc.abstractmethod
    def _find_lost(self) -> list[int]:
        """Chunks whose embeddings are gone or have another checksum."""

    @abc.abstractmethod
    def _finish(self, done: dict[int, Chunk]) -> None:
        """Bring the result into its final form. It writes the log, if it changes what is done."""

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc) -> None:
        self._closing.close()

    def renew(self, index: int, stamp: str) -> None:
        """Replaces the stamp of a chunk whose files have other times, but the same content.

        Args:
          index: number of the chunk.
          stamp: digest of its items' stamps.
        """
        self._put(index, dataclasses.replace(self.chunks[index], stamp=stamp))

    def list_items(self, index: int, entries: Sequence[Entry]) -> None:
        """Enter a chunk that is done into the lists. Call it for all chunks, in order.

        Args:
          index: number of the chunk.
          entries: all its items.
        """
        reasons = dict(self.chunks[index].skipped)
        with naming_full_disk(self._directory / self._list_names[0]):
            for file in self._lists[:-1]:
                file.writelines(json_line(e.id) for i, e in enumerate(entries) if i not in reasons)
        self.list_skipped(index, [(entries[i].number, entries[i].id) for i in reasons])

    def list_skipped(self, index: int, items: Sequence[tuple[int, Any]]) -> None:
        """Enter the items of a chunk that were left out.

        Args:
          index: number of the chunk.
          items: line and id of each of its `skipped`.
        """
        chunk = self.chunks[index]
        with naming_full_disk(self._directory / self._list_names[-1]):
            for (line, item_id), (_, reason) in zip(items, chunk.skipped, strict=True):
                value = {"line": line, "id": item_id, "reason": reason}
                self._lists[-1].write(json_line(value))
        self.num_rows += chunk.rows
        self.num_skipped += len(chunk.skipped)

    def finish(self, count: int) -> None:
        """Bring the directory into its final form.

        Args:
          count: chunks of the whole input; later ones, of a longer input before, are dropped.
        """
        self._finish(dict(enumerate(self.chunks[i] for i in range(count))))

    def _finish_lists(self) -> None:
        written: dict[str, str | None] = {}
        for name, file in zip(self._list_names, self._lists, strict=True):
            sync(file)
            file.close()
            written[name] = file_digest(partial_path(self._directory / name)).hex()
        if not self.num_skipped:
            written[self._list_names[-1]] = None
        if self._finished != written:
            # The log must not say of the files that come now what it said of those before.
            self._write_log()
        for name in self._list_names:
            if written[name] is None:
                (self._directory / name).unlink(missing_ok=True)
            else:
                partial_path(self._directory / name).replace(self._directory / name)
        self._written = written

    def _finish_log(self) -> None:
        if self._finished != self._written:
            log = self._log or self._write_log()
            log.write(json_line({"finished": self._written}))
            sync(log)

    def _list(self, name: str) -> IO[str]:
        """Open a list under a temporary name. `finish` gives it its own."""
        path = partial_path(self._directory / name)
        # An id can hold half a surrogate pair. It is written as an escape, as JSON does.
        return self._opened(open(path, "w", encoding="utf-8", errors="backslashreplace"))

    def _opened(self, file: IO) -> IO:
        """Closes a file at the end. What a full disk has left in its buffer was an error before."""

        def close() -> None:
            with contextlib.suppress(OSError):
                file.close()

        self._closing.callback(close)
        return file

    def _load(self) -> None:
        lines = whole_lines(self._progress)
        heading = lines[0] if lines else {}
        if not isinstance(heading.get("model"), str) or not isinstance(heading.get("input"), str):
            if name := self._has_work():
                raise ValueError(
                    f"{self._directory / name}: has no {self._progress.name} beside it that says what it is; use "
                    "another --output"
                )
            return
        if heading["model"] != self._heading["model"]:
            raise ValueError(
                f"{self._directory} holds embeddings of another model (or of other settings); use "
                "another --output"
            )
        self.source = heading["input"]
        for entry in lines[1:]:
            if isinstance(entry.get("finished"), dict):
                self._finished = entry["finished"]
                continue
            index, chunk = _chunk_of(entry)
            if chunk is None:
                break
            self.chunks[index] = chunk
        for i in self._find_lost():
            # The number of its items stays: it says which items later chunks hold.
            self.chunks[i] = Chunk(self.chunks[i].items, 0, 0, "", "")
        for name, checksum in (self._finished or {}).items():
            path = self._directory / name
            found = file_digest(path).hex() if name in self._list_names and path.is_file() else None
            if found != checksum:
                logger.warning("%s: is not what was written to it; it is written again", path)

    def _put(self, index: int, chunk: Chunk) -> None:
        log = self._log or self._write_log()
        self.chunks[index] = chunk
        with naming_full_disk(self._progress):
            log.write(_log_line(index, chunk))
            sync(log)

    def _write_log(self) -> IO[str]:
        """Write the log with one line for each chunk, and open it for more."""
        self._finished = None
        if self._log is not None:
            self._log.close()
        lines = [json_line(self._heading)]
        lines += (_log_line(index, self.chunks[index]) for index in sorted(self.chunks))
        write_text(self._progress, "".join(lines))
        self._log = self._opened(self._progress.open("a", encoding="utf-8"))
        return self._log


def warn_of_lost(path: Path, lost: Sequence[int], chunks: int) -> None:
    """Says that embeddings have to be computed again.

    Args:
      path: what has changed.
      lost: numbers of the chunks.
      chunks: how many there are.
    """
    if lost:
        logger.warning(
            "%s: is not what was written to it (%s); items of %d of %d chunk(s) are embedded again",
            path,
            "changed or cut off" if path.exists() else "missing",
            len(lost),
            chunks,
        )


def whole_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines, up to the first that is incomplete.

    Args:
      path: of the file; it need not exist.

    Returns:
      The objects.
    """
    entries = []
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                entry = json.loads(line)
            except ValueError:
                break
            if not isinstance(entry, dict):
                break
            entries.append(entry)
    return entries


def _chunk_of(entry: dict[str, Any]) -> tuple[int, Chunk | None]:
    """The number and content of a line of progress.jsonl; no content if it has another form."""
    try:
        values = dict(entry)
        index = values.pop("chunk")
        values["skipped"] = tuple((int(i), str(reason)) for i, reason in values["skipped"])
        chunk = Chunk(**values)
    except (KeyError, TypeError, ValueError):
        return 0, None
    numbers = (index, chunk.items, chunk.first_row, chunk.rows)
    texts = (chunk.stamp, chunk.content, chunk.checksum, chunk.part, chunk.labels)
    fine = all(type(number) is int and number >= 0 for number in numbers)
    fine &= all(isinstance(text, str) for text in texts)
    return (index, chunk) if fine and chunk.items else (0, None)


def _log_line(index: int, chunk: Chunk) -> str:
    values = dataclasses.asdict(chunk)
    return json_line({"chunk": index} | {k: v for k, v in values.items() if v or k not in _PARTS})


# Fields of outputs in parts, which the log of an array does not have.
_PARTS = ("part", "labels")


def json_line(value: Any) -> str:
    """A line of a log or a list.

    Args:
      value: for JSON.

    Returns:
      The line with its end.
    """
    return json.dumps(value, ensure_ascii=False) + "\n"


def sync(file: IO) -> None:
    """Brings what was written to a file onto the disk.

    Args:
      file: open for writing.
    """
    file.flush()
    os.fsync(file.fileno())
