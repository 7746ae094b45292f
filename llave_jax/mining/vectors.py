"""Embeddings of the distinct queries and targets of training rows, on disk.

They are computed and kept as outputs of `llave_jax.embed` are (`embedding/bulk.py`), so that a job may die at any
moment, and are read through a memory map.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llave_jax.common.content import digest
from llave_jax.data.sources import MmebSource
from llave_jax.embedding.entries import Entry, failed_entry
from llave_jax.embedding.item_sources import ItemSource
from llave_jax.embedding.store import whole_lines


class SideItems(ItemSource):
    """Sides of some rows, as the input of `embed_items`. The id of an item is its number, from 0.

    Args:
      source: of the rows.
      rows: int64 [n], of each side.
      places: int64 [n], of the side in its row: 0 is the query, 1 the first target.
      name: of the data, for messages and to recognise earlier work.
    """

    def __init__(self, source: MmebSource, rows: np.ndarray, places: np.ndarray, name: str):
        self._source, self._rows, self._places = source, rows, places
        self.name, self.shard, self.allow_urls, self.metadata_fields = name, (0, 1), False, []

    def __iter__(self) -> Iterator[Entry]:
        for number, row in enumerate(self._rows.tolist()):
            try:
                item = self._source.query_and_targets(row)[self._places[number]]
            except ValueError as error:  # its files are gone since its contents were read
                yield failed_entry(self._source.pair_id(row), number + 1, number, error)
                continue
            yield Entry(item.name, number + 1, number, item)

    def count(self) -> int:
        return len(self._rows)

    def resolved(self) -> str:
        return self.name


class Vectors:
    """Embeddings by the number of their content.

    Attributes:
      problems: why contents have none, by number.
      digest: of what they were computed from and of their bytes.

    Args:
      directory: an output of `embed_items` over `SideItems`.
      count: contents.
    """

    def __init__(self, directory: Path, count: int):
        self._array = np.load(directory / "embeddings.npy", mmap_mode="r")
        self._rows = np.full(count, -1, np.int64)
        numbers = np.fromfile(directory / "ids.jsonl", np.int64, sep="\n")
        self._rows[numbers] = np.arange(len(self._array))
        skipped = directory / "skipped.jsonl"
        lines = map(json.loads, skipped.open("rb")) if skipped.exists() else ()
        self.problems = {line["id"]: line["reason"] for line in lines}
        heading, *log = whole_lines(directory / "progress.jsonl")
        chunks = {line["chunk"]: line["checksum"] for line in log if "chunk" in line}
        self.digest = digest(json.dumps([heading["model"], sorted(chunks.items())]).encode()).hex()

    def has(self, numbers: np.ndarray) -> np.ndarray:
        """Which contents have an embedding.

        Args:
          numbers: int64 [n].

        Returns:
          bool [n].
        """
        return self._rows[numbers] >= 0

    def of(self, numbers: np.ndarray) -> np.ndarray:
        """Reads embeddings.

        Args:
          numbers: int64 [n], of contents that have one.

        Returns:
          float32 [n, D].
        """
        return self._array[self._rows[numbers]]

    def some(self, numbers: np.ndarray) -> SomeVectors:
        """Embeddings of some contents, read when they are asked for.

        Args:
          numbers: int64 [n], of contents that have one.

        Returns:
          What `embedding.search` takes as a corpus.
        """
        return SomeVectors(self, numbers)

    @property
    def dimension(self) -> int:
        """D."""
        return self._array.shape[1]


class SomeVectors:
    """Rows of a memory map; a slice reads them.

    Attributes:
      shape: [n, D].

    Args:
      vectors: of all contents.
      numbers: int64 [n], of contents.
    """

    def __init__(self, vectors: Vectors, numbers: np.ndarray):
        self._vectors, self._numbers = vectors, numbers
        self.shape = (len(numbers), vectors.dimension)

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        return self._vectors.of(self._numbers[rows])
