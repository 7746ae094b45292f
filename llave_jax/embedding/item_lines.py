"""Items in a JSON-lines file.

A line is an object with any of `text`, `image`, `images`, `video`, an optional `id` and an optional object
`metadata`; paths are relative to the file. They may lead anywhere: the file is the user's own list of the
user's own files.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llave_jax.common.json_text import LINE_TOO_LONG, json_lines, parse_json
from llave_jax.embedding import entries
from llave_jax.embedding.entries import Entry, Piece, failed_entry, make_entry, resolve_path

# Of the lines of a piece, unless one line alone is longer.
_PIECE_BYTES = 1 << 20


@dataclasses.dataclass(frozen=True)
class LinesPiece(Piece):
    """Consecutive lines, which are not parsed before they are asked for. Pickled, it says only where they are.

    Attributes:
      source: path of the file.
      places: bytes and lines of the file in front of each line.
      position: entries of the whole input before them.
      lines: number and bytes of each, None for a line that is too long; None: read them from the file.
      allow_urls: pictures may be URLs.
    """

    source: Path
    places: tuple[tuple[int, int], ...]
    position: int
    lines: tuple[tuple[int, bytes | None], ...] | None
    allow_urls: bool = False

    def __len__(self) -> int:
        return len(self.places)

    def __reduce__(self):
        return LinesPiece, (self.source, self.places, self.position, None, self.allow_urls)

    def part(self, start: int, stop: int) -> LinesPiece:
        lines = None if self.lines is None else self.lines[start:stop]
        return dataclasses.replace(
            self, places=self.places[start:stop], position=self.position + start, lines=lines
        )

    def weights(self) -> Iterator[tuple[int, int]]:
        for entry in self.entries():
            yield entry.weight, entry.num_bytes

    def entries(self) -> Iterator[Entry]:
        lines = self._read() if self.lines is None else self.lines
        for i, (number, text) in enumerate(lines):
            yield _parse(text, self.source, number, self.position + i, self.allow_urls)

    def _read(self) -> Iterator[tuple[int, bytes | None]]:
        offset, before = self.places[0]
        with open(self.source, "rb") as file:
            file.seek(offset)
            for number, text in itertools.islice(json_lines(file), len(self)):
                yield before + number, text


def line_pieces(source: Path, position: int = 0, allow_urls: bool = False) -> Iterator[LinesPiece]:
    """Read a file of items, a few lines at a time; empty lines do not count.

    Args:
      source: the file, or a pipe.
      position: entries of the whole input before it.
      allow_urls: pictures may be URLs.

    Yields:
      Its lines, in order.

    Raises:
      OSError: the file cannot be read.
    """
    lines: list[tuple[int, bytes | None]] = []
    places: list[tuple[int, int]] = []
    size = offset = before = 0
    with open(source, "rb") as file:
        seekable = file.seekable()
        for number, text in json_lines(file):
            lines.append((number, text))
            places.append((offset, before))
            offset, before = file.tell() if seekable else 0, number
            size += len(text or b"")
            if len(lines) >= entries.PIECE_ENTRIES or size >= _PIECE_BYTES:
                yield LinesPiece(source, tuple(places), position, tuple(lines), allow_urls)
                position += len(lines)
                lines, places, size = [], [], 0
    if lines:
        yield LinesPiece(source, tuple(places), position, tuple(lines), allow_urls)


def _parse(text: bytes | None, source: Path, number: int, position: int, allow_urls: bool) -> Entry:
    where, entry_id = f"{source}:{number}", position
    try:
        if text is None:
            raise ValueError(f"{where}: {LINE_TOO_LONG}")
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{where}: is not JSON ({error}); expected one object") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where}: is {type(values).__name__}; expected an object")
        entry_id = values.pop("id", position)
        metadata = values.pop("metadata", None)
        if metadata is not None and not isinstance(metadata, dict):
            raise ValueError(f"{where}: metadata is {type(metadata).__name__}; expected an object")
        values = _resolve(values, source.parent, where, allow_urls)
    except ValueError as error:
        return failed_entry(where, number, entry_id, error)
    return make_entry(where, number, entry_id, values, metadata or {})


def _resolve(values: dict[str, Any], root: Path, where: str, allow_urls: bool) -> dict[str, Any]:
    """The values of a line, with paths below the folder of the file that names them."""

    def resolve(key: str, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str):
            return resolve_path(key, value, root, where, allow_urls)
        raise ValueError(f"{where}: {key} holds {type(value).__name__}; expected a path")

    resolved = {}
    for key, value in values.items():
        if key not in ("image", "images", "video"):
            resolved[key] = value
        elif isinstance(value, list):
            resolved[key] = [resolve(key, entry) for entry in value]
        else:
            resolved[key] = resolve(key, value)
    return resolved
