"""All that a command reads items from: JSON lines, parquet files, folders and globs of pictures.

Owns which kind an input is, the order of inputs, and the flags that name them.
"""

from __future__ import annotations

import argparse
import glob
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Union

from llave_jax.embedding import entries
from llave_jax.embedding.entries import Entry, Piece, Turns
from llave_jax.embedding.item_lines import line_pieces
from llave_jax.embedding.item_pictures import PicturesPiece, files_below, is_picture, is_table
from llave_jax.embedding.item_tables import Columns, Table

PathLike = Union[str, os.PathLike]
_LINE_SUFFIXES = (".jsonl", ".ndjson")


class ItemSource:
    """Items of several inputs, one after another. Iterating reads them; each time from the start.

    Attributes:
      name: of the inputs, for messages.
      shard: (i, n): only each n-th piece, from the i-th on.
      allow_urls: pictures may be URLs, which are not fetched here.
      metadata_fields: Arrow fields of the columns that entries of parquet files have as metadata.

    Args:
      inputs: as for `open_items`.
      columns: of parquet files.
      shard, allow_urls: as above.
    """

    def __init__(
        self,
        inputs: Sequence[PathLike],
        columns: Columns | None = None,
        shard: tuple[int, int] = (0, 1),
        allow_urls: bool = False,
    ):
        if not inputs:
            raise ValueError("no input; expected files or folders")
        self._inputs = [os.fspath(value) for value in inputs]
        self._columns, self.shard = columns or Columns(), shard
        self.allow_urls = allow_urls
        self.name = self._inputs[0] if len(inputs) == 1 else f"{self._inputs[0]} and others"
        self.metadata_fields: list[Any] = []
        for path in self._files():
            if is_table(path):
                self._check_fields(path, Table(path, self._columns).metadata_fields)

    def __iter__(self) -> Iterator[Entry]:
        for piece in self.pieces():
            yield from piece.entries()

    def pieces(self) -> Iterator[Piece]:
        """What the inputs, or the shard of them, consist of. Files are opened one at a time.

        Yields:
          Pieces, in order.

        Raises:
          ValueError, OSError: as `open_items`, if a file has changed since.
        """
        position, turns = 0, Turns(*self.shard)
        for pictures, paths in itertools.groupby(self._files(), is_picture):
            if pictures:
                while some := tuple(itertools.islice(paths, entries.PIECE_ENTRIES)):
                    if turns.mine():
                        yield PicturesPiece(some)
                    position += len(some)
                continue
            for path in paths:
                if is_table(path):
                    table = Table(path, self._columns, self.allow_urls)
                    yield from table.pieces(position, turns)
                    position += table.rows
                    continue
                for piece in line_pieces(Path(path), position, self.allow_urls):
                    if turns.mine():
                        yield piece
                    position += len(piece)

    def count(self) -> int | None:
        """Count the entries, of parquet files by their footers.

        Returns:
          Their number; None if an input is a pipe, which can be read only once.

        Raises:
          ValueError, OSError: as `open_items`.
        """
        if any(_is_pipe(path) for path in self._inputs):
            return None
        return sum(len(piece) for piece in self.pieces())

    def resolved(self) -> str:
        """The absolute paths of the inputs.

        Returns:
          One line each.
        """
        return "\n".join(os.path.realpath(path) for path in self._inputs)

    def _check_fields(self, path: str, fields: list[Any]) -> None:
        if not self.metadata_fields:
            self.metadata_fields = fields
        for field, first in zip(fields, self.metadata_fields, strict=True):
            if field.type != first.type:
                raise ValueError(
                    f"{path}: column {field.name} is {field.type}; it is {first.type} in the files before it"
                )

    def _files(self) -> Iterator[str]:
        """Files of all inputs, in order."""
        for path in self._inputs:
            if os.path.isdir(path):
                found = files_below(path)
            elif glob.has_magic(path) and not os.path.exists(path):
                found = _matches(path)
            else:
                os.stat(path)  # raises if there is nothing at all
                yield path
                continue
            first = next(found, None)
            if first is None:
                raise ValueError(f"{path}: holds no pictures and no parquet files")
            yield first
            yield from found


def open_items(
    inputs: PathLike | Sequence[PathLike],
    *,
    columns: Columns | None = None,
    shard: tuple[int, int] = (0, 1),
    allow_urls: bool = False,
) -> ItemSource:
    """Items of files and folders.

    Args:
      inputs: one or several of: a parquet file (`.parquet`, `.pq`); a picture; a folder, of whose files at any depth
        the pictures or the parquet files are taken, sorted by name; a pattern such as `photos/**/*.jpg`; any other
        file or pipe is read as JSON lines.
      columns: which columns of parquet files hold what; None: those of the usual names.
      shard: (i, n), i from 0: the i-th of n parts. Items are dealt out by 64, the rows of parquet files by row groups
        and at most 1024; items that are added behind the others do not move these.
      allow_urls: pictures of lines and tables may be http(s) URLs: `Item.images` has these as they are, and
        `Entry.path` is None. Otherwise such an entry is an error.

    Returns:
      The items; iterating gives an `Entry` each, in the order of the inputs.

    Raises:
      ValueError: a folder or pattern has nothing that can be read, a parquet file is broken or lacks a column.
      OSError: an input does not exist or cannot be read.
    """
    several = [inputs] if isinstance(inputs, str | os.PathLike) else list(inputs)
    return ItemSource(several, columns, shard, allow_urls)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--input` and the flags that say what parquet files hold.

    Args:
      parser: of the command.
    """
    parser.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PATH",
        help="JSON-lines files, parquet files, pictures, folders of either, or patterns ('photos/**/*.jpg')",
    )
    group = parser.add_argument_group("columns of parquet files")
    for role in ("id", "text", "image", "video"):
        also = " or images" if role == "image" else ""
        group.add_argument(
            f"--{role}-column", metavar="NAME", help=f"default: {role}{also}, if there is one"
        )
    group.add_argument(
        "--metadata-columns",
        metavar="NAMES",
        help="kept beside the vectors; comma-separated, default: none",
    )


def from_arguments(
    args: argparse.Namespace, shard: tuple[int, int] = (0, 1), allow_urls: bool = False
) -> ItemSource:
    """The items that a command's flags name.

    Args:
      args: what a parser with `add_arguments` returned.
      shard, allow_urls: as for `open_items`.

    Returns:
      As `open_items`.

    Raises:
      ValueError, OSError: as `open_items`.
    """
    names = [name for name in (args.metadata_columns or "").split(",") if name]
    columns = Columns(
        id=args.id_column,
        text=args.text_column,
        image=args.image_column,
        video=args.video_column,
        metadata=tuple(dict.fromkeys(names)),
    )
    return open_items(args.input, columns=columns, shard=shard, allow_urls=allow_urls)


def _matches(pattern: str) -> Iterator[str]:
    """Files of known kinds that a pattern matches, sorted. Hidden ones have to be named as such."""
    for path in sorted(glob.iglob(pattern, recursive=True)):
        if os.path.isdir(path):
            continue
        if is_picture(path) or is_table(path) or path.lower().endswith(_LINE_SUFFIXES):
            yield path


def _is_pipe(path: str) -> bool:
    return os.path.exists(path) and not os.path.isdir(path) and not os.path.isfile(path)
