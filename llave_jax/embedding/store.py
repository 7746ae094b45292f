"""The output directory of `llave_jax.embed`, so that a job may die at any moment and continue.

    embeddings.npy          float32 [n, D]; there when all is done
    ids.jsonl               the n ids, one a line
    skipped.jsonl           line, id and reason of each item that was left out; absent without any
    progress.jsonl          which model, then a line for each chunk of items that is done, with the checksum
                            of its embeddings; at last the checksums of the two lists
    embeddings.partial.npy  the array while it grows
    .lock                   which process is writing

A chunk's embeddings are on disk before its line in progress.jsonl; the next start cuts off rows that have
no line. If the items of a chunk change, its new embeddings go to the end of the array, and a new line
replaces the old one. The last step then writes the rows in order. The digests of a chunk's items are made
in `bulk.py`. Each start compares what is there with the checksums; a chunk whose rows have changed, in whatever
way, is embedded again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import itertools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from llave_jax.common.content import file_digest
from llave_jax.common.files import (
    atomic_file,
    naming_full_disk,
    partial_path,
    remove_abandoned,
    write_text,
)
from llave_jax.common.locks import only_writer

_COPY_BYTES = 16 << 20
_LISTS = ("ids.jsonl", "skipped.jsonl")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Chunk:
    """Consecutive items of the input that are done.

    Attributes:
      items: how many.
      first_row: of its embeddings, in the growing array.
      rows: of its embeddings: one for each item that was not skipped.
      stamp: digest that is quick to compute (size and time of files); "" if the embeddings are lost.
      content: digest of what the model saw; "" if the embeddings are lost.
      skipped: (index within the chunk, reason) of items without an embedding.
      checksum: SHA-256 of the embeddings' bytes; "" in work of earlier versions, which is believed.
    """

    items: int
    first_row: int
    rows: int
    stamp: str
    content: str
    skipped: tuple[tuple[int, str], ...] = ()
    checksum: str = ""


class Store:
    """What an output directory holds. Use as a context manager.

    Attributes:
      source: path of the input that the directory's work belongs to; None if there is no work.
      chunks: what is done, by the number of the chunk.
      num_rows: embeddings that were listed so far.
      num_skipped: skipped items that were listed so far.

    Args:
      directory: made if it does not exist.
      model: fingerprint of the model.
      dimension: D.
      source: path of the input, kept for messages.
      items: of the whole input, if they are known; says how much room a full disk lacks.

    Raises:
      ValueError: the directory holds other work, or another job writes to it.
      DiskFull: from every method that writes. What is complete stays.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        model: str,
        dimension: int,
        source: str,
        items: int | None = None,
    ):
        self._directory = Path(directory)
        self._final = self._directory / "embeddings.npy"
        self._partial = self._directory / "embeddings.partial.npy"
        self._progress = self._directory / "progress.jsonl"
        self._heading = {"model": model, "input": source}
        self._dimension, self._items = dimension, items
        # Checksums of the lists as they were written; None: not known.
        self._finished: dict[str, str | None] | None = None
        self._data: IO[bytes] | None = None
        self._log: IO[str] | None = None
        self._closing = contextlib.ExitStack()
        self.source: str | None = None
        self.chunks: dict[int, Chunk] = {}
        self.num_rows = self.num_skipped = 0
        try:
            self._closing.enter_context(only_writer(self._directory))
            remove_abandoned(self._directory)
            # Of this job, if it fails.
            for name in ("embeddings.npy", "ids.jsonl", "skipped.jsonl", "progress.jsonl"):
                temporary = partial_path(self._directory / name)
                self._closing.callback(temporary.unlink, missing_ok=True)
            self._load()
            self._ids, self._skipped = map(self._list, _LISTS)
        except BaseException:
            self._closing.close()
            raise

    @property
    def path(self) -> Path:
        """The file of the finished array."""
        return self._final

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *exc) -> None:
        self._closing.close()

    def add(
        self,
        index: int,
        vectors: np.ndarray,
        *,
        stamp: str,
        content: str,
        skipped: Sequence[tuple[int, str]],
    ) -> None:
        """Keep the embeddings of a chunk.

        Args:
          index: number of the chunk.
          vectors: float32 [rows, D].
          stamp, content: digests of its items.
          skipped: (index within the chunk, reason) of items without an embedding.
        """
        content_bytes = np.ascontiguousarray(vectors, "<f4").tobytes()
        first_row = self._end_row()
        missing = None
        if self._items is not None:
            done = sum(chunk.items for chunk in self.chunks.values())
            missing = 4 * self._dimension * max(self._items - done, len(vectors))
        with naming_full_disk(self._partial, missing):
            data = self._begin()
            data.seek(self._offset(first_row))
            data.write(content_bytes)
            _sync(data)
        items = len(vectors) + len(skipped)
        checksum = hashlib.sha256(content_bytes).hexdigest()
        self._put(
            index,
            Chunk(items, first_row, len(vectors), stamp, content, tuple(skipped), checksum),
        )

    def renew(self, index: int, stamp: str) -> None:
        """Replaces the stamp of a chunk whose files have other times, but the same content.

        Args:
          index: number of the chunk.
          stamp: digest of its items' stamps.
        """
        self._put(index, dataclasses.replace(self.chunks[index], stamp=stamp))

    def list_items(self, index: int, lines: Sequence[int], ids: Sequence[Any]) -> None:
        """Enter a chunk that is done into ids.jsonl and skipped.jsonl. Call it for all chunks, in order.

        Args:
          index: number of the chunk.
          lines: line numbers of all its items.
          ids: of all its items.
        """
        chunk = self.chunks[index]
        reasons = dict(chunk.skipped)
        with naming_full_disk(self._directory / _LISTS[0]):
            for i, (line, item_id) in enumerate(zip(lines, ids, strict=True)):
                if i in reasons:
                    entry = {"line": line, "id": item_id, "reason": reasons[i]}
                    self._skipped.write(_json_line(entry))
                else:
                    self._ids.write(_json_line(item_id))
        self.num_rows += chunk.rows
        self.num_skipped += len(reasons)

    def finish(self, count: int) -> None:
        """Bring the directory into its final form.

        Args:
          count: chunks of the whole input; later ones, of a longer input before, are dropped.
        """
        done = dict(enumerate(self.chunks[i] for i in range(count)))
        total = sum(chunk.rows for chunk in done.values())
        with naming_full_disk(self._final, self._offset(total)):
            if self._partial.exists() or not self._is_whole(total):
                self._begin()
                self.chunks = done
                self._write_log()
            self._finish_lists()
            if self._data is not None:
                self._finish_array(self._data, done, total)
            self._finish_log()

    def _finish_lists(self) -> None:
        written = {}
        for name, file in zip(_LISTS, (self._ids, self._skipped), strict=True):
            _sync(file)
            file.close()
            written[name] = file_digest(partial_path(self._directory / name)).hex()
        if not self.num_skipped:
            written["skipped.jsonl"] = None
        if self._finished != written:
            # The log must not say of the files that come now what it said of those before.
            self._write_log()
        for name in _LISTS:
            if written[name] is None:
                (self._directory / name).unlink(missing_ok=True)
            else:
                partial_path(self._directory / name).replace(self._directory / name)
        self._written = written

    def _finish_array(self, data: IO[bytes], chunks: dict[int, Chunk], total: int) -> None:
        """Gives the growing array its name, if its rows are in order, or writes them in order."""
        self._data = None
        starts = itertools.accumulate((chunk.rows for chunk in chunks.values()), initial=0)
        if all(c.first_row == start for c, start in zip(chunks.values(), starts, strict=False)):
            data.truncate(self._offset(total))
            data.seek(0)
            data.write(_header(total, self._dimension))
            _sync(data)
            data.close()
            self._partial.replace(self._final)
        else:
            self._write_in_order(data, chunks.values(), total)
            data.close()
            self._partial.unlink()
            self._count_rows_anew()
            self._write_log()

    def _finish_log(self) -> None:
        if self._finished != self._written:
            log = self._log or self._write_log()
            log.write(_json_line({"finished": self._written}))
            _sync(log)

    def _write_in_order(self, data: IO[bytes], chunks: Iterable[Chunk], total: int) -> None:
        with atomic_file(self._final) as temporary, temporary.open("wb") as file:
            file.write(_header(total, self._dimension))
            for chunk in chunks:
                data.seek(self._offset(chunk.first_row))
                left = self._offset(chunk.rows) - self._offset(0)
                while left:
                    part = data.read(min(left, _COPY_BYTES))
                    if not part:
                        raise OSError(f"{self._partial}: was cut off while it was read")
                    file.write(part)
                    left -= len(part)

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
        lines = _whole_lines(self._progress)
        heading = lines[0] if lines else {}
        if not isinstance(heading.get("model"), str) or not isinstance(heading.get("input"), str):
            if self._final.exists():
                raise ValueError(
                    f"{self._final}: has no progress.jsonl beside it that says what it is; use "
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
        growing = self._partial.exists()
        if not growing:
            self._count_rows_anew()
        path = self._partial if growing else self._final
        lost = self._find_lost(path)
        for i in lost:
            # The number of its items stays: it says which items later chunks hold.
            self.chunks[i] = Chunk(self.chunks[i].items, 0, 0, "", "")
        if lost:
            logger.warning(
                "%s: is not what was written to it (%s); items of %d of %d chunk(s) are embedded again",
                path,
                "changed or cut off" if path.exists() else "missing",
                len(lost),
                len(self.chunks),
            )
        for name, checksum in (self._finished or {}).items():
            path = self._directory / name
            found = file_digest(path).hex() if name in _LISTS and path.is_file() else None
            if found != checksum:
                logger.warning("%s: is not what was written to it; it is written again", path)

    def _find_lost(self, path: Path) -> list[int]:
        """Chunks whose rows are not in the array, or have another checksum."""
        available = self._rows_on_disk(path)
        lost = [i for i, c in self.chunks.items() if c.first_row + c.rows > available]
        if not available:
            return lost
        with open(path, "rb") as file:
            for i in sorted(self.chunks.keys() - set(lost), key=lambda i: self.chunks[i].first_row):
                chunk = self.chunks[i]
                file.seek(self._offset(chunk.first_row))
                left = self._offset(chunk.rows) - self._offset(0)
                sha256 = hashlib.sha256()
                while left > 0 and (part := file.read(min(left, _COPY_BYTES))):
                    sha256.update(part)
                    left -= len(part)
                if chunk.checksum and sha256.hexdigest() != chunk.checksum:
                    lost.append(i)
        return lost

    def _count_rows_anew(self) -> None:
        """Set `first_row` of all chunks as in the finished array, which has them in order."""
        row = 0
        for index in sorted(self.chunks):
            self.chunks[index] = dataclasses.replace(self.chunks[index], first_row=row)
            row += self.chunks[index].rows

    def _begin(self) -> IO[bytes]:
        """The growing array, cut off after the last row that counts; the finished one becomes it."""
        if self._data is not None:
            return self._data
        # Before the finished array is renamed: its rows are found by the order of the chunks, those of a
        # growing array by the log.
        self._write_log()
        end = self._end_row()
        if self._partial.exists() or not end:
            self._final.unlink(missing_ok=True)
        else:
            self._final.replace(self._partial)
        file = open(self._partial, "r+b" if self._partial.exists() else "w+b")  # noqa: SIM115
        self._data = self._opened(file)
        self._data.write(_header(0, self._dimension))
        self._data.truncate(self._offset(end))
        self.source = self._heading["input"]
        return self._data

    def _end_row(self) -> int:
        return max((chunk.first_row + chunk.rows for chunk in self.chunks.values()), default=0)

    def _put(self, index: int, chunk: Chunk) -> None:
        log = self._log or self._write_log()
        self.chunks[index] = chunk
        with naming_full_disk(self._progress):
            log.write(_json_line({"chunk": index, **dataclasses.asdict(chunk)}))
            _sync(log)

    def _write_log(self) -> IO[str]:
        """Write progress.jsonl with one line for each chunk, and open it for more."""
        self._finished = None
        if self._log is not None:
            self._log.close()
        lines = [_json_line(self._heading)]
        for index in sorted(self.chunks):
            lines.append(_json_line({"chunk": index, **dataclasses.asdict(self.chunks[index])}))
        write_text(self._progress, "".join(lines))
        self._log = self._opened(self._progress.open("a", encoding="utf-8"))
        return self._log

    def _offset(self, row: int) -> int:
        return len(_header(0, self._dimension)) + 4 * self._dimension * row

    def _rows_on_disk(self, path: Path) -> int:
        """Whole rows of a file; 0 if its header is not that of our array."""
        rows = _rows_of_header(path, self._dimension)
        if rows is None:
            return 0
        on_disk = (path.stat().st_size - self._offset(0)) // (4 * self._dimension)
        return on_disk if path == self._partial else min(rows, on_disk)

    def _is_whole(self, total: int) -> bool:
        """Whether the finished array is there with exactly `total` rows."""
        rows = _rows_of_header(self._final, self._dimension)
        return rows == total and self._final.stat().st_size == self._offset(total)


def _header(rows: int, dimension: int) -> bytes:
    """Header of a .npy file of float32 [rows, dimension]. Its length does not depend on `rows`."""
    buffer = io.BytesIO()
    form = {"descr": "<f4", "fortran_order": False, "shape": (rows, dimension)}
    np.lib.format.write_array_header_1_0(buffer, form)
    return buffer.getvalue()


def _rows_of_header(path: Path, dimension: int) -> int | None:
    """Rows by the header of a file; None if it is not that of float32 [rows, dimension]."""
    try:
        with open(path, "rb") as file:
            head = file.read(len(_header(0, dimension)))
        buffer = io.BytesIO(head)
        np.lib.format.read_magic(buffer)
        shape, _, _ = np.lib.format.read_array_header_1_0(buffer)
    except (OSError, ValueError):
        return None
    return shape[0] if shape and head == _header(shape[0], dimension) else None


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    """Objects of a file of JSON lines, up to the first that is incomplete."""
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
    texts = (chunk.stamp, chunk.content, chunk.checksum)
    fine = all(type(number) is int and number >= 0 for number in numbers)
    fine &= all(isinstance(text, str) for text in texts)
    return (index, chunk) if fine and chunk.items else (0, None)


def _json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())
