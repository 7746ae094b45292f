"""A directory of parts as the output of `llave_jax.embed`: a data set of parquet files, or a Lance data set.

    part-00000-of-00001-000000.parquet   ids, vectors and metadata of a chunk; or data/*.lance and _versions/
    _progress-00000-of-00001.jsonl       what is done
    _skipped-00000-of-00001.jsonl        items that were left out

Readers of parquet directories pass over names that begin with `_` or `.`. The log and the list of skipped items are
`store.py`, the files `parts.py`. The shards of a job share the directory: each has parts, a log and a lock of its
own, and looks at the others' logs only, to refuse what does not belong together.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llave_jax.common.content import file_digest
from llave_jax.embedding.entries import Entry
from llave_jax.embedding.parts import Part, PartWriter
from llave_jax.embedding.store import Chunk, Store, warn_of_lost, whole_lines


def shard_suffix(shard: tuple[int, int]) -> str:
    """What the names of a shard's files have in common.

    Args:
      shard: (i, n).

    Returns:
      "-IIIII-of-NNNNN".
    """
    return f"-{shard[0]:05}-of-{shard[1]:05}"


class PartStore(Store):
    """An output directory with a file for each chunk.

    Args:
      writer: of the parts; it knows the directory.
      model, source: as of `Store`.

    Raises:
      ValueError: as of `Store`; also if the directory holds shards of another number.
      DiskFull: as of `Store`.
    """

    def __init__(self, writer: PartWriter, *, model: str, source: str):
        self.writer = writer
        super().__init__(
            writer.directory,
            model=model,
            source=source,
            lists=("skipped",),
            prefix="_",
            suffix=writer.suffix,
        )

    @property
    def path(self) -> Path:
        return self._directory

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
        self.begin()
        part = self.writer.write(index, with_vectors(entries, skipped), vectors)
        self.enter(index, part, len(vectors), stamp=stamp, content=content, skipped=skipped)

    def begin(self) -> None:
        """Says in the log what the parts are that come now."""
        if self._log is None:
            self._write_log()

    def enter(
        self,
        index: int,
        part: Part,
        rows: int,
        *,
        stamp: str,
        content: str,
        skipped: Sequence[tuple[int, str]],
    ) -> None:
        """Keep a part that has been written, by this process or another.

        Args:
          index: number of the chunk.
          part: what `PartWriter.write` returned.
          rows: of its vectors.
          stamp, content, skipped: as of `add`.
        """
        items, left_out = rows + len(skipped), tuple(skipped)
        self._put(
            index,
            Chunk(
                *(items, 0, rows, stamp, content, left_out), part.checksum, part.name, part.labels
            ),
        )

    def list_items(self, index: int, entries: Sequence[Entry]) -> None:
        chunk = self.chunks[index]
        if chunk.labels != self.writer.labels(with_vectors(entries, chunk.skipped)):
            self.begin()
            part = relabelled(self.writer, index, entries, chunk)
            self._put(
                index,
                dataclasses.replace(
                    chunk, part=part.name, checksum=part.checksum, labels=part.labels
                ),
            )
        super().list_items(index, entries)

    def _own_files(self) -> Sequence[str]:
        return ()

    def _has_work(self) -> str:
        paths = self._directory.glob(f"part{self.writer.suffix}-*")
        return next((path.name for path in sorted(paths)), "")

    def _load(self) -> None:
        self._check_others()
        super()._load()

    def _check_others(self) -> None:
        count = self.writer.suffix.rpartition("-")[2]
        for path in self._directory.glob("_progress-*.jsonl"):
            if path == self._progress:
                continue
            found = re.fullmatch(r"_progress-\d+-of-(\d+)\.jsonl", path.name)
            if found and found[1] != count:
                raise ValueError(
                    f"{self._directory}: holds a job of {int(found[1])} shard(s), not {int(count)}; their "
                    "items would be there twice: use another --output, or remove it"
                )
            heading = next(iter(whole_lines(path)), None)
            if heading is not None and heading.get("model") != self._heading["model"]:
                raise ValueError(
                    f"{self._directory} holds embeddings of another model (or of other settings) by another "
                    f"shard ({path.name}); use another --output"
                )

    def _find_lost(self) -> list[int]:
        lost = []
        for index, chunk in self.chunks.items():
            if not chunk.part:
                if chunk.rows:
                    lost.append(index)
                continue
            try:
                fine = file_digest(self.writer.path(chunk.part)).hex() == chunk.checksum
            except (OSError, ValueError, LookupError, TypeError):
                fine = False
            if not fine:
                lost.append(index)
        first = self.chunks[lost[0]].part if lost else ""
        warn_of_lost(self.writer.path(first) if first else self._directory, lost, len(self.chunks))
        return lost

    def _finish(self, done: dict[int, Chunk]) -> None:
        if done.keys() != self.chunks.keys():
            self.chunks = done
            self._write_log()
        self._finish_lists()
        others = []
        for path in self._directory.glob("_progress-*.jsonl"):
            if path != self._progress:
                others += [str(entry.get("part", "")) for entry in whole_lines(path)[1:]]
        self.writer.publish(
            [chunk.part for chunk in done.values() if chunk.part], [part for part in others if part]
        )
        self._finish_log()


def with_vectors(entries: Sequence[Entry], skipped: Sequence[tuple[int, str]]) -> list[Entry]:
    """The entries of a chunk that were not left out.

    Args:
      entries: all of them.
      skipped: (index, reason) of those that were.

    Returns:
      The others, in order.
    """
    left_out = {index for index, _ in skipped}
    return [entry for index, entry in enumerate(entries) if index not in left_out]


def relabelled(writer: PartWriter, index: int, entries: Sequence[Entry], chunk: Chunk) -> Part:
    """Writes a chunk's part anew, with the vectors that it has and the ids and metadata that its items have now.

    Args:
      writer: of the parts.
      index: number of the chunk.
      entries: all its items.
      chunk: as it was embedded.

    Returns:
      The part.
    """
    kept = with_vectors(entries, chunk.skipped)
    vectors = writer.vectors(chunk.part) if chunk.part else np.zeros((0, 0))
    return writer.write(index, kept, vectors)
