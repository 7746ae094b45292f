"""Picture files as items: folders with all that lies below them, and single files."""

from __future__ import annotations

import collections
import dataclasses
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from llave_jax.embedding import entries
from llave_jax.embedding.entries import Entry, Piece
from llave_jax.inputs.item import Item

# Of the formats that `inputs.images` decodes.
SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".gif",
        ".bmp",
        ".dib",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
        ".pnm",
        ".webp",
        ".jp2",
        ".avif",
    ]
)
TABLE_SUFFIXES = frozenset((".parquet", ".pq"))

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class PicturesPiece(Piece):
    """Picture files, which are not opened here: one that is broken is found when it is embedded.

    Attributes:
      paths: of the files; they are the ids as well.
    """

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, start: int, stop: int) -> PicturesPiece:
        return PicturesPiece(self.paths[start:stop])

    def weights(self) -> Iterator[tuple[int, int]]:
        yield from [(entries.IMAGE_WEIGHT, 0)] * len(self)

    def entries(self) -> Iterator[Entry]:
        for path in self.paths:
            yield Entry(path, 1, path, Item(images=(path,), name=path))


def is_picture(path: str | os.PathLike) -> bool:
    """Whether a file is taken for a picture.

    Args:
      path: its suffix decides, in upper or lower case.

    Returns:
      True for the suffix of a format that can be decoded.
    """
    return Path(path).suffix.lower() in SUFFIXES


def is_table(path: str | os.PathLike) -> bool:
    """Whether a file is taken for a parquet file.

    Args:
      path: its suffix decides.

    Returns:
      True for `.parquet` and `.pq`.
    """
    return Path(path).suffix.lower() in TABLE_SUFFIXES


def files_below(folder: str | os.PathLike) -> Iterator[str]:
    """The pictures, or else the parquet files, in a folder and the folders in it.

    Sorted by name, folder by folder; only one folder's names are held. Hidden files and folders (`.git`, `._1.jpg`
    of macOS, `.thumbnails`) are left out without a word, other files with a warning that counts them. Links are
    followed, but into each folder once.

    Args:
      folder: where to look.

    Yields:
      Paths that begin with `folder`.

    Raises:
      OSError: a folder cannot be read.
      ValueError: the folder holds both pictures and parquet files.
    """
    others: collections.Counter[str] = collections.Counter()
    kind: tuple[bool, str] | None = None
    for path in _walk(os.fspath(folder), set()):
        table = is_table(path)
        if not table and not is_picture(path):
            others[os.path.splitext(path)[1].lower() or "without suffix"] += 1
            continue
        if kind is None:
            kind = table, path
        elif kind[0] != table:
            raise ValueError(
                f"{folder}: holds both pictures and parquet files ({kind[1]}, {path}); name those that are "
                "meant, for example as 'FOLDER/**/*.parquet'"
            )
        yield path
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        logger.warning("%s: files of other kinds are left out: %s", folder, kinds)


def _walk(folder: str, seen: set[tuple[int, int]]) -> Iterator[str]:
    status = os.stat(folder)
    if (status.st_dev, status.st_ino) in seen:
        return
    seen.add((status.st_dev, status.st_ino))
    with os.scandir(folder) as listing:
        found = sorted(
            (entry.name, entry.is_dir()) for entry in listing if not entry.name.startswith(".")
        )
    for name, is_folder in found:
        path = os.path.join(folder, name)
        if is_folder:
            yield from _walk(path, seen)
        else:
            yield path
