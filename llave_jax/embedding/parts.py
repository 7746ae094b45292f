"""Files of ids, vectors and metadata: a parquet file, or a fragment of a Lance data set, for each chunk.

Owns their columns, and how one is written so that it is complete or absent. Which of them count is `part_store.py`.
"""

from __future__ import annotations

import abc
import dataclasses
import importlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from llave_jax.common import extras
from llave_jax.common.content import digest, file_digest
from llave_jax.common.directories import make_directory
from llave_jax.common.files import atomic_file, naming_full_disk
from llave_jax.embedding.entries import Entry

FORMATS = ("parquet", "lance")


@dataclasses.dataclass(frozen=True)
class Part:
    """A file that has been written.

    Attributes:
      name: what finds it again.
      checksum: SHA-256 of the file.
      labels: digest of its ids and metadata.
    """

    name: str
    checksum: str
    labels: str


class PartWriter(abc.ABC):
    """Writes the parts of one job. Picklable, for other processes.

    Args:
      directory: of the output, which exists.
      dimension: numbers of a vector.
      dtype: of a vector.
      fields: Arrow fields of the metadata columns of tables; the metadata of JSON lines is one column `metadata` of
        JSON text.
      suffix: of this job's names: "-IIIII-of-NNNNN".
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        *,
        dimension: int,
        dtype: np.dtype | str,
        fields: Sequence[Any] = (),
        suffix: str = "",
    ):
        self.directory = Path(directory)
        self.suffix = suffix
        self._dimension, self._dtype = dimension, np.dtype(dtype)
        self._fields = list(fields)
        kind = pyarrow.from_numpy_dtype(self._dtype)
        names = [field.name for field in self._fields]
        for name in ("id", "vector", "metadata"):
            if name in names:
                raise ValueError(
                    f"the metadata column {name} has the name of a column of the output; rename it in the input"
                )
        self.schema = pyarrow.schema(
            [
                pyarrow.field("id", pyarrow.string(), nullable=False),
                pyarrow.field("vector", pyarrow.list_(kind, dimension), nullable=False),
                *(field.with_nullable(True) for field in self._fields),
                pyarrow.field("metadata", pyarrow.string()),
            ]
        )

    def write(self, index: int, entries: Sequence[Entry], vectors: np.ndarray) -> Part:
        """Writes a part, or writes it anew.

        Args:
          index: number of the chunk.
          entries: the n items that have a vector.
          vectors: [n, D].

        Returns:
          What finds it; without a name if there are no items.

        Raises:
          DiskFull: there is no room; nothing has changed.
        """
        if not entries:
            return Part("", "", self.labels(entries))
        table = self._table(entries, vectors)
        name, path = self._write(index, table)
        return Part(name, file_digest(path).hex(), self.labels(entries))

    def vectors(self, name: str) -> np.ndarray:
        """Reads the vectors of a part.

        Args:
          name: of the part.

        Returns:
          [n, D].
        """
        column = self._read_vectors(name).combine_chunks()
        values = column.flatten() if len(column) else pyarrow.array([], column.type.value_type)
        array = values.to_numpy(zero_copy_only=False).astype(self._dtype, copy=False)
        return array.reshape(-1, self._dimension)

    def labels(self, entries: Sequence[Entry]) -> str:
        """A digest of what a part says of its items besides their vectors.

        Args:
          entries: the items that have a vector.

        Returns:
          The digest in hexadecimal.
        """
        values = ((id_text(entry.id), self._metadata(entry)) for entry in entries)
        return digest(json.dumps(list(values), default=str).encode()).hex()

    @abc.abstractmethod
    def path(self, name: str) -> Path:
        """The file of a part."""

    @abc.abstractmethod
    def publish(self, names: Sequence[str], others: Sequence[str]) -> None:
        """Makes parts the data set's content.

        Args:
          names: of all parts of this job, in order.
          others: of the parts of other shards. All that is neither goes.
        """

    @abc.abstractmethod
    def _write(self, index: int, table: pyarrow.Table) -> tuple[str, Path]:
        """The name and the file of a part."""

    @abc.abstractmethod
    def _read_vectors(self, name: str) -> pyarrow.ChunkedArray: ...

    def _metadata(self, entry: Entry) -> dict[str, Any]:
        """Values of the metadata columns, by their names."""
        names = {field.name for field in self._fields}
        own = {name: entry.metadata.get(name) for name in names}
        rest = {name: value for name, value in entry.metadata.items() if name not in names}
        # Half a surrogate pair, which JSON can hold, is an escape here, too.
        own["metadata"] = json.dumps(rest) if rest else None
        return own

    def _table(self, entries: Sequence[Entry], vectors: np.ndarray) -> pyarrow.Table:
        values = np.ascontiguousarray(vectors, self._dtype).reshape(-1)
        rows = [self._metadata(entry) for entry in entries]
        columns = [
            pyarrow.array([id_text(entry.id) for entry in entries], pyarrow.string()),
            pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(values), self._dimension),
        ]
        for field in list(self.schema)[2:]:
            columns.append(pyarrow.array([row[field.name] for row in rows], field.type))
        return pyarrow.Table.from_arrays(columns, schema=self.schema)


def id_text(value: Any) -> str:
    """An id as text: any JSON value can be one.

    Args:
      value: of the input.

    Returns:
      A text as it is, anything else as JSON.
    """
    if isinstance(value, str):
        return value.encode("utf-8", "backslashreplace").decode()
    return json.dumps(value)


class ParquetParts(PartWriter):
    """`part-IIIII-of-NNNNN-CCCCCC.parquet`: shard I of N, chunk C."""

    def path(self, name: str) -> Path:
        return self.directory / name

    def publish(self, names: Sequence[str], others: Sequence[str]) -> None:
        kept = {*names, *others}
        for path in self.directory.glob(f"part{self.suffix}-*.parquet"):
            if path.name not in kept:
                path.unlink()

    def _write(self, index: int, table: pyarrow.Table) -> tuple[str, Path]:
        path = self.directory / f"part{self.suffix}-{index:06}.parquet"
        # Vectors do not become smaller; columns without an entry are not compressed.
        compression: Any = {name: "zstd" for name in table.column_names if name != "vector"}
        with atomic_file(path) as temporary:
            pyarrow.parquet.write_table(
                table, temporary, compression=compression, use_dictionary=False
            )
        return path.name, path

    def _read_vectors(self, name: str) -> pyarrow.ChunkedArray:
        return pyarrow.parquet.read_table(self.path(name), columns=["vector"]).column("vector")


class LanceParts(PartWriter):
    """Fragments of a Lance data set. They are seen by readers when all of a job is done.

    The name of a part is its fragment's description, in JSON.
    """

    def path(self, name: str) -> Path:
        return self.directory / "data" / _lance_file(name)

    def publish(self, names: Sequence[str], others: Sequence[str]) -> None:
        lance = _lance()
        kept = {_lance_file(name) for name in (*names, *others)}
        for attempt in range(10):
            dataset = self._dataset(lance)
            there = {
                fragment.metadata.files[0].path: fragment.fragment_id
                for fragment in dataset.get_fragments()
            }
            new = [
                lance.FragmentMetadata.from_json(name)
                for name in names
                if _lance_file(name) not in there
            ]
            gone = [number for file, number in there.items() if file not in kept]
            if not new and not gone:
                return
            if gone:
                change = lance.LanceOperation.Update(removed_fragment_ids=gone, new_fragments=new)
            else:
                change = lance.LanceOperation.Append(new)
            try:
                lance.LanceDataset.commit(self.directory, change, read_version=dataset.version)
                return
            except OSError:  # another shard was first
                if attempt == 9:
                    raise

    def _dataset(self, lance: Any) -> Any:
        """The data set; the first job makes it, without rows."""
        if not (self.directory / "_versions").exists():
            try:
                lance.write_dataset(self.schema.empty_table(), self.directory, mode="create")
            except OSError:
                if not (self.directory / "_versions").exists():
                    raise
        return lance.dataset(str(self.directory))

    def _write(self, index: int, table: pyarrow.Table) -> tuple[str, Path]:
        lance = _lance()
        with naming_full_disk(self.directory):
            make_directory(self.directory)
            self._dataset(lance)
            (fragment,) = lance.fragment.write_fragments(
                table, str(self.directory), max_rows_per_file=max(1, len(table))
            )
        name = json.dumps(fragment.to_json())
        path = self.path(name)
        with open(path, "rb") as file:
            os.fsync(file.fileno())
        return name, path

    def _read_vectors(self, name: str) -> pyarrow.ChunkedArray:
        _lance()
        reader = importlib.import_module("lance.file").LanceFileReader(
            str(self.path(name)), columns=["vector"]
        )
        return reader.read_all().to_table().column("vector")


def _lance() -> Any:
    extras.require("lance", "Lance data sets")
    return importlib.import_module("lance")


def _lance_file(name: str) -> str:
    return json.loads(name)["files"][0]["path"]


WRITERS: dict[str, type[PartWriter]] = {"parquet": ParquetParts, "lance": LanceParts}
