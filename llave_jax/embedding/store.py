"""The output directory of `llave_jax.embed`, so that a job may die at any moment and continue.

    embeddings.npy          float32 [n, D]; there when all is done
    ids.jsonl               the n ids, one a line
    skipped.jsonl           line, id and reason of each item that was left out; absent without any
    progress.jsonl          which model, then a line for each chunk of items that is done
    embeddings.partial.npy  the array while it grows

A chunk's embeddings are on disk before its line in progress.jsonl; the next start cuts off rows that have
no line. If the items of a chunk change, its new embeddings go to the end of the array, and a new line
replaces the old one. The last step then writes the rows in order. The digests of a chunk are made
in `bulk.py`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import logging
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from llave_jax.common.files import atomic_file, partial_path, write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_COPY_BYTES = 16 << 20


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
    """

    items: int
    first_row: int
    rows: int
    stamp: str
    content: str
    skipped: tuple[tuple[int, str], ...] = ()


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

    Raises:
      ValueError: the directory holds other work, or another job writes to it.
    """

    def __init__(self, directory: str | os.PathLike, *, model: str, dimension: int, source: str):
        self._directory = Path(directory)
        self._final = self._directory / "embeddings.npy"
        self._partial = self._directory / "embeddings.partial.npy"
        self._progress = self._directory / "progress.jsonl"
        self._heading = {"model": model, "input": source}
        self._dimension = dimension
        self._data: IO[bytes] | None = None
        self._log: IO[str] | None = None
        self._closing = contextlib.ExitStack()
        self.source: str | None = None
        self.chunks: dict[int, Chunk] = {}
        self.num_rows = self.num_skipped = 0
        self._directory.mkdir(parents=True, exist_ok=True)
        try:
            self._lock()
            # Left by a job that was killed, or by this one if it fails.
            for name in ("embeddings.npy", "ids.jsonl", "skipped.jsonl", "progress.jsonl"):
                temporary = partial_path(self._directory / name)
                self._closing.callback(temporary.unlink, missing_ok=True)
            self._load()
            self._ids = self._list("ids.jsonl")
            self._skipped = self._list("skipped.jsonl")
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
        data = self._begin()
        first_row = self._end_row()
        data.seek(self._offset(first_row))
        data.write(np.ascontiguousarray(vectors, "<f4").tobytes())
        _sync(data)
        items = len(vectors) + len(skipped)
        self._put(index, Chunk(items, first_row, len(vectors), stamp, content, tuple(skipped)))

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
        starts = [0, *itertools.accumulate(chunk.rows for chunk in done.values())]
        total = starts.pop()
        in_order = all(c.first_row == start for c, start in zip(done.values(), starts, strict=True))
        if self._partial.exists() or not self._is_whole(total):
            self._begin()
            self.chunks = done
            self._write_log()
        self._ids.close()
        self._skipped.close()
        partial_path(self._directory / "ids.jsonl").replace(self._directory / "ids.jsonl")
        if self.num_skipped:
            partial_path(self._directory / "skipped.jsonl").replace(
                self._directory / "skipped.jsonl"
            )
        else:
            (self._directory / "skipped.jsonl").unlink(missing_ok=True)
        data, self._data = self._data, None
        if data is None:
            return
        if in_order:
            data.truncate(self._offset(total))
            data.seek(0)
            data.write(_header(total, self._dimension))
            _sync(data)
            data.close()
            self._partial.replace(self._final)
        else:
            self._write_in_order(data, done.values(), total)
            data.close()
            self._partial.unlink()
            self._count_rows_anew()
            self._write_log()

    def _write_in_order(self, data: IO[bytes], chunks: Iterable[Chunk], total: int) -> None:
        with atomic_file(self._final) as temporary, temporary.open("wb") as file:
            file.write(_header(total, self._dimension))
            for chunk in chunks:
                data.seek(self._offset(chunk.first_row))
                left = self._offset(chunk.rows) - self._offset(0)
                while left:
                    part = data.read(min(left, _COPY_BYTES))
                    file.write(part)
                    left -= len(part)

    def _lock(self) -> None:
        """Lock the directory: two jobs that write to it would mix their rows."""
        if fcntl is None:
            return
        descriptor = os.open(self._directory, os.O_RDONLY)
        self._closing.callback(os.close, descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(
                f"{self._directory}: another job is writing to it; wait for it, or use another "
                "--output"
            ) from error
        except OSError:  # a file system without locks
            pass

    def _list(self, name: str) -> IO[str]:
        """Open a list under a temporary name. `finish` gives it its own."""
        path = partial_path(self._directory / name)
        # An id can hold half a surrogate pair. It is written as an escape, as JSON does.
        return self._closing.enter_context(
            open(path, "w", encoding="utf-8", errors="backslashreplace")
        )

    def _load(self) -> None:
        lines = _whole_lines(self._progress)
        if not lines:
            if self._final.exists():
                raise ValueError(
                    f"{self._final}: has no progress.jsonl beside it that says what it is; use "
                    "another --output"
                )
            return
        heading, *entries = lines
        if heading["model"] != self._heading["model"]:
            raise ValueError(
                f"{self._directory} holds embeddings of another model (or of other settings); use "
                "another --output"
            )
        self.source = heading["input"]
        for entry in entries:
            index = entry.pop("chunk")
            entry["skipped"] = tuple((i, reason) for i, reason in entry["skipped"])
            self.chunks[index] = Chunk(**entry)
        growing = self._partial.exists()
        if not growing:
            self._count_rows_anew()
        available = self._rows_on_disk(self._partial if growing else self._final)
        lost = [i for i, c in self.chunks.items() if c.first_row + c.rows > available]
        for i in lost:
            # The number of its items stays: it says which items later chunks hold.
            self.chunks[i] = Chunk(self.chunks[i].items, 0, 0, "", "")
        if lost:
            logging.getLogger(__name__).warning(
                "%s: the array holds %d whole rows, fewer than it should; items of %d chunk(s) are "
                "embedded again",
                self._directory,
                available,
                len(lost),
            )

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
        self._data = self._closing.enter_context(file)
        self._data.write(_header(0, self._dimension))
        self._data.truncate(self._offset(end))
        self.source = self._heading["input"]
        return self._data

    def _end_row(self) -> int:
        return max((chunk.first_row + chunk.rows for chunk in self.chunks.values()), default=0)

    def _put(self, index: int, chunk: Chunk) -> None:
        log = self._log or self._write_log()
        self.chunks[index] = chunk
        log.write(_json_line({"chunk": index, **dataclasses.asdict(chunk)}))
        _sync(log)

    def _write_log(self) -> IO[str]:
        """Write progress.jsonl with one line for each chunk, and open it for more."""
        if self._log is not None:
            self._log.close()
        lines = [_json_line(self._heading)]
        for index in sorted(self.chunks):
            lines.append(_json_line({"chunk": index, **dataclasses.asdict(self.chunks[index])}))
        write_text(self._progress, "".join(lines))
        self._log = self._closing.enter_context(self._progress.open("a", encoding="utf-8"))
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
    """JSON lines of a file, up to the first incomplete one."""
    entries = []
    if path.exists():
        for line in path.read_bytes().split(b"\n")[:-1]:
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries


def _json_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _sync(file: IO) -> None:
    file.flush()
    os.fsync(file.fileno())
