"""What the queries and targets of training rows show, as keys that are equal for equal contents.

Text and the bytes of image files count, names do not: one picture under two names is one content. Files are read
once; keys are kept in parts, which the next start believes while the files' sizes and times stay.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path

import numpy as np

from llave_jax.common.content import digest
from llave_jax.common.directories import make_directory
from llave_jax.common.files import remove_abandoned, write_arrays
from llave_jax.common.progress import Progress
from llave_jax.common.text import shortened
from llave_jax.data.sources import MmebSource
from llave_jax.embedding.bulk import FILE_THREADS
from llave_jax.inputs.content import item_key, item_stamp
from llave_jax.inputs.item import Item

_ROWS_PER_PART = 4096
_KEY_BYTES = 8


@dataclasses.dataclass(frozen=True)
class Contents:
    """The contents of all rows of a source.

    Attributes:
      queries: uint64 [n], the keys; 0 for a row that cannot be used.
      targets: uint64, the keys of all rows' targets, one row after another.
      counts: int64 [n], targets of each row; 0 for a row that cannot be used.
      problems: why rows cannot be used, by index.
    """

    queries: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    problems: dict[int, str]


def read_contents(source: MmebSource, directory: Path, on_error: str) -> Contents:
    """Keys of all rows, continuing what an earlier call did.

    Args:
      source: of the rows.
      directory: where parts are kept; made if it does not exist.
      on_error: "raise", or "skip" rows that cannot be used.

    Returns:
      The contents.

    Raises:
      ValueError: a row cannot be used.
      DiskFull: there is no room for a part.
    """
    make_directory(directory)
    remove_abandoned(directory)
    parts: list[_Part] = []
    problems: dict[int, str] = {}
    with (
        Progress(len(source), "reading", unit="rows") as progress,
        ThreadPoolExecutor(FILE_THREADS) as threads,
    ):
        for start in range(0, len(source), _ROWS_PER_PART):
            rows = range(start, min(start + _ROWS_PER_PART, len(source)))
            path = directory / f"{start // _ROWS_PER_PART:06}.npz"
            part = _Part.read(path, source, rows, threads)
            if part.is_new:
                write_arrays(path, compress=False, **part.arrays())
                progress.update(len(rows))
            else:
                progress.skip(len(rows))
            if part.problems and on_error == "raise":
                raise ValueError(next(iter(part.problems.values())))
            parts.append(part)
            problems |= {rows[place]: reason for place, reason in part.problems.items()}
    queries, targets, counts = (
        np.concatenate([getattr(part, name) for part in parts])
        for name in ("queries", "targets", "counts")
    )
    return Contents(queries, targets, counts, problems)


@dataclasses.dataclass(frozen=True)
class _Part:
    """Some rows.

    Attributes:
      stamp: of their texts and files.
      queries, targets, counts: as of `Contents`.
      problems: by the row's place in the part.
      is_new: was computed now.
    """

    stamp: bytes
    queries: np.ndarray
    targets: np.ndarray
    counts: np.ndarray
    problems: dict[int, str]
    is_new: bool = True

    def arrays(self) -> dict[str, np.ndarray]:
        problems = json.dumps(list(self.problems.items())).encode()
        return {
            "stamp": np.frombuffer(self.stamp, np.uint8),
            "queries": self.queries,
            "targets": self.targets,
            "counts": self.counts,
            "problems": np.frombuffer(problems, np.uint8),
        }

    @classmethod
    def read(cls, path: Path, source: MmebSource, rows: range, threads: Executor) -> _Part:
        """The part of a file if that is still right, or else of the rows themselves."""
        sides = [_sides(source, index) for index in rows]
        files = any(isinstance(pair, tuple) and any(i.images for i in pair) for pair in sides)
        run: Callable[..., Iterator] = threads.map if files else map
        stamp = digest(*run(_stamp, sides))
        try:
            with np.load(path, allow_pickle=False) as kept:
                # A row that could not be read is tried again.
                if kept["stamp"].tobytes() == stamp and kept["problems"].tobytes() == b"[]":
                    return cls(
                        stamp, kept["queries"], kept["targets"], kept["counts"], {}, is_new=False
                    )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            pass  # there is none, or it was damaged
        queries, counts = np.zeros(len(rows), np.uint64), np.zeros(len(rows), np.int64)
        targets: list[int] = []
        problems: dict[int, str] = {}
        for place, found in enumerate(run(_keys, sides)):
            if isinstance(found, str):
                problems[place] = found
            else:
                queries[place], counts[place] = found[0], len(found) - 1
                targets += found[1:]
        return cls(stamp, queries, np.array(targets, np.uint64), counts, problems)


def _sides(source: MmebSource, index: int) -> tuple[Item, ...] | str:
    """Query and targets of a row, or what is wrong with it."""
    try:
        return source.query_and_targets(index)
    except ValueError as error:
        return shortened(str(error))


def _stamp(sides: tuple[Item, ...] | str) -> bytes:
    if isinstance(sides, str):
        return digest(sides.encode("utf-8", "backslashreplace"))
    try:
        return digest(*map(item_stamp, sides))
    except OSError as error:
        return digest(f"unreadable: {type(error).__name__}".encode())


def _keys(sides: tuple[Item, ...] | str) -> tuple[int, ...] | str:
    if isinstance(sides, str):
        return sides
    try:
        return tuple(int.from_bytes(item_key(side)[:_KEY_BYTES], "little") for side in sides)
    except OSError as error:
        return shortened(f"{sides[0].name.rpartition(',')[0]}: cannot be read: {error}")
