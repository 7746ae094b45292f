"""One .npy file as the output of `llave_jax.embed`.

    embeddings.npy          [n, D]; there when all is done
    ids.jsonl               the n ids, one a line
    embeddings.partial.npy  the array while it grows

Log, lock and the list of skipped items are `store.py`. The next start cuts off rows that have no line in the log.
If the items of a chunk change, its new embeddings go to the end of the array; the last step then writes the rows in
order.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import itertools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO

import numpy as np

from llave_jax.common.files import atomic_file, naming_full_disk
from llave_jax.embedding import store
from llave_jax.embedding.entries import Entry
from llave_jax.embedding.store import Chunk, Store, warn_of_lost

_COPY_BYTES = 16 << 20


class ArrayStore(Store):
    """An output directory with one array.

    Args:
      directory, model, source: as of `Store`.
      dimension: D.
      dtype: of the array.
      items: of the whole input, if they are known; says how much room a full disk lacks.

    Raises:
      ValueError, DiskFull: as of `Store`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        model: str,
        dimension: int,
        source: str,
        dtype: np.dtype | str = "<f4",
        items: int | None = None,
    ):
        self._final = Path(directory) / "embeddings.npy"
        self._partial = Path(directory) / "embeddings.partial.npy"
        self._dimension, self._items = dimension, items
        self._dtype = np.dtype(dtype).newbyteorder("<")
        self._data: IO[bytes] | None = None
        super().__init__(directory, model=model, source=source, lists=("ids", "skipped"))

    @property
    def path(self) -> Path:
        return self._final

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
        content_bytes = np.ascontiguousarray(vectors, self._dtype).tobytes()
        first_row = self._end_row()
        missing = None
        if self._items is not None:
            done = sum(chunk.items for chunk in self.chunks.values())
            missing = self._row_bytes * max(self._items - done, len(vectors))
        with naming_full_disk(self._partial, missing):
            data = self._begin()
            data.seek(self._offset(first_row))
            data.write(content_bytes)
            store.sync(data)
        items = len(vectors) + len(skipped)
        checksum = hashlib.sha256(content_bytes).hexdigest()
        self._put(
            index,
            Chunk(items, first_row, len(vectors), stamp, content, tuple(skipped), checksum),
        )

    def _own_files(self) -> Sequence[str]:
        return ("embeddings.npy",)

    def _has_work(self) -> str:
        return "embeddings.npy" if self._final.exists() else ""

    def _finish(self, done: dict[int, Chunk]) -> None:
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

    def _finish_array(self, data: IO[bytes], chunks: dict[int, Chunk], total: int) -> None:
        """Gives the growing array its name, if its rows are in order, or writes them in order."""
        self._data = None
        starts = itertools.accumulate((chunk.rows for chunk in chunks.values()), initial=0)
        if all(c.first_row == start for c, start in zip(chunks.values(), starts, strict=False)):
            data.truncate(self._offset(total))
            data.seek(0)
            data.write(self._header(total))
            store.sync(data)
            data.close()
            self._partial.replace(self._final)
        else:
            self._write_in_order(data, chunks.values(), total)
            data.close()
            self._partial.unlink()
            self._count_rows_anew()
            self._write_log()

    def _write_in_order(self, data: IO[bytes], chunks: Iterable[Chunk], total: int) -> None:
        with atomic_file(self._final) as temporary, temporary.open("wb") as file:
            file.write(self._header(total))
            for chunk in chunks:
                data.seek(self._offset(chunk.first_row))
                left = self._offset(chunk.rows) - self._offset(0)
                while left:
                    part = data.read(min(left, _COPY_BYTES))
                    if not part:
                        raise OSError(f"{self._partial}: was cut off while it was read")
                    file.write(part)
                    left -= len(part)

    def _find_lost(self) -> list[int]:
        growing = self._partial.exists()
        if not growing:
            self._count_rows_anew()
        path = self._partial if growing else self._final
        lost = self._rows_lost(path)
        warn_of_lost(path, lost, len(self.chunks))
        return lost

    def _rows_lost(self, path: Path) -> list[int]:
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
        self._data.write(self._header(0))
        self._data.truncate(self._offset(end))
        self.source = self._heading["input"]
        return self._data

    def _end_row(self) -> int:
        return max((chunk.first_row + chunk.rows for chunk in self.chunks.values()), default=0)

    def _offset(self, row: int) -> int:
        return len(self._header(0)) + self._row_bytes * row

    def _rows_on_disk(self, path: Path) -> int:
        """Whole rows of a file; 0 if its header is not that of our array."""
        rows = self._rows_of_header(path)
        if rows is None:
            return 0
        on_disk = (path.stat().st_size - self._offset(0)) // self._row_bytes
        return on_disk if path == self._partial else min(rows, on_disk)

    def _is_whole(self, total: int) -> bool:
        """Whether the finished array is there with exactly `total` rows."""
        rows = self._rows_of_header(self._final)
        return rows == total and self._final.stat().st_size == self._offset(total)

    @property
    def _row_bytes(self) -> int:
        return self._dtype.itemsize * self._dimension

    def _header(self, rows: int) -> bytes:
        """Header of a .npy file of [rows, D]. Its length does not depend on `rows`."""
        buffer = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self._dtype)
        form = {"descr": descr, "fortran_order": False, "shape": (rows, self._dimension)}
        np.lib.format.write_array_header_1_0(buffer, form)
        return buffer.getvalue()

    def _rows_of_header(self, path: Path) -> int | None:
        """Rows by the header of a file; None if it is not that of this array."""
        try:
            with open(path, "rb") as file:
                head = file.read(len(self._header(0)))
            buffer = io.BytesIO(head)
            np.lib.format.read_magic(buffer)
            shape, _, _ = np.lib.format.read_array_header_1_0(buffer)
        except (OSError, ValueError):
            return None
        return shape[0] if shape and head == self._header(shape[0]) else None
