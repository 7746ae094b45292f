"""What every kind of input gives: entries, an item each, or why there is none.

Owns the type and how entries are put into chunks. Reading is `item_lines.py`, `item_tables.py` and
`item_pictures.py`, all of them together `item_sources.py`.
"""

from __future__ import annotations

import abc
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from llave_jax.common.text import shortened
from llave_jax.inputs.images import refuse_data_uri
from llave_jax.inputs.item import Item, as_item

# Items are saved in chunks, so a killed job loses at most one: 8192 texts, 1024 images or 64 videos.
# Small chunks would end in many small batches.
CHUNK_WEIGHT = 8192
IMAGE_WEIGHT, VIDEO_WEIGHT = 8, 128
# A chunk is held in memory: pictures that lie in a table are part of it.
CHUNK_BYTES = 256 << 20
# Consecutive entries that are read together, where a file does not say itself which belong together.
PIECE_ENTRIES = 64

URL_SCHEMES = ("http://", "https://")


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line, row or file of the input.

    Attributes:
      where: file and line or row, for messages.
      number: of the line or row in its file, from 1; 1 for a picture.
      id: what the input gives; for a picture its path, otherwise the number of entries before it.
      item: None if the entry is not an item.
      error: why it is not; "" if it is.
      metadata: what the input says of the item besides, by name; the model does not see it.
    """

    where: str
    number: int
    id: Any
    item: Item | None
    error: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def weight(self) -> int:
        """The entry's share of a chunk: texts count 1."""
        if self.item is None:
            return 1
        if self.item.video is not None:
            return VIDEO_WEIGHT
        return max(1, IMAGE_WEIGHT * len(self.item.images))

    @property
    def num_bytes(self) -> int:
        """Memory of the pictures that the entry holds itself."""
        images = self.item.images if self.item else ()
        return sum(len(image) for image in images if isinstance(image, bytes))

    @property
    def path(self) -> str | None:
        """The one file that the item shows; None for a text, several pictures, or pictures in a table."""
        if self.item is None:
            return None
        files = [self.item.video] if self.item.video is not None else self.item.images
        if len(files) == 1 and isinstance(files[0], str | os.PathLike) and not is_url(files[0]):
            return os.fspath(files[0])
        return None


class Turns:
    """Deals out parts of the input to shards, one after another.

    Args:
      index: of the shard, from 0.
      count: of all shards.
    """

    def __init__(self, index: int, count: int):
        self._index, self._count, self._next = index, count, 0

    def mine(self) -> bool:
        """Take the next part.

        Returns:
          Whether it is this shard's.
        """
        turn = self._next
        self._next = (turn + 1) % self._count
        return turn == self._index


class Piece(abc.ABC):
    """Entries that are read together. Small when pickled: another process can read it where the files are."""

    @abc.abstractmethod
    def __len__(self) -> int:
        """The number of entries."""

    @abc.abstractmethod
    def part(self, start: int, stop: int) -> Piece:
        """Some of the entries.

        Args:
          start, stop: counted from the piece's first entry.

        Returns:
          A piece of these.
        """

    @abc.abstractmethod
    def weights(self) -> Iterator[tuple[int, int]]:
        """What `take_chunk` counts, without reading pictures.

        Yields:
          Weight and bytes of each entry; of tables, what its columns and the average of its row group say.
        """

    @abc.abstractmethod
    def entries(self) -> Iterator[Entry]:
        """Read them.

        Yields:
          Each entry, also those that are not items.

        Raises:
          ValueError, OSError: the file as a whole cannot be read; it is named.
        """


def make_entry(
    where: str,
    number: int,
    entry_id: Any,
    values: Mapping[str, Any],
    metadata: Mapping[str, Any],
) -> Entry:
    """An entry of what a line or a row says.

    Args:
      where, number, metadata: of the entry.
      entry_id: its id.
      values: as for `as_item`; paths are resolved.

    Returns:
      The entry, with an error if its values are no item.
    """
    try:
        item = as_item(values, where)
        item.text.encode("utf-8")  # JSON can hold half a surrogate pair, which no encoding can
    except ValueError as error:
        return failed_entry(where, number, entry_id, error)
    return Entry(where, number, entry_id, item, metadata=metadata)


def failed_entry(where: str, number: int, entry_id: Any, error: ValueError) -> Entry:
    """An entry that is no item.

    Args:
      where, number: of the entry.
      entry_id: its id.
      error: what is wrong.

    Returns:
      The entry.
    """
    message = shortened(str(error))
    named = message if where in message else f"{where}: {message}"
    return Entry(where, number, entry_id, None, named)


def resolve_path(
    key: str, value: str, root: str | os.PathLike, where: str, allow_urls: bool = False
) -> str:
    """The path of a picture or a video that a line or a row names.

    It may lead anywhere: the input is the user's own list of the user's own files.

    Args:
      key: under which it is given.
      value: as it is given.
      root: folder of the file that names it.
      where: file and line or row, for errors.
      allow_urls: a URL is taken as it is.

    Returns:
      The path.

    Raises:
      ValueError: it is empty, a URL or a data URI.
    """
    if not value:
        raise ValueError(f"{where}: {key} has an empty path; leave it out, or say null")
    refuse_data_uri(value, where)
    if is_url(value):
        if allow_urls and key != "video":
            return value
        raise ValueError(
            f"{where}: {key} is a URL ({value[:200]}); expected a path (llave_jax.embed --allow-urls fetches pictures)"
        )
    return os.path.join(root, value)


def is_url(image: object) -> bool:
    """Whether a picture is named by a URL.

    Args:
      image: of an item.

    Returns:
      True for a text that begins with http:// or https://.
    """
    return isinstance(image, str) and image[:8].lower().startswith(URL_SCHEMES)


def take_chunk(entries: Iterator[Entry], size: int) -> list[Entry]:
    """The next entries, to be embedded and kept together.

    Args:
      entries: the chunk is taken off them.
      size: how many; 0: as many as CHUNK_WEIGHT and CHUNK_BYTES allow.

    Returns:
      The entries; none at the end of the input.
    """
    if size:
        return list(itertools.islice(entries, size))
    chunk, weight, num_bytes = [], 0, 0
    for entry in entries:
        chunk.append(entry)
        weight += entry.weight
        num_bytes += entry.num_bytes
        if weight >= CHUNK_WEIGHT or num_bytes >= CHUNK_BYTES:
            break
    return chunk


def plan_chunks(
    pieces: Iterator[Piece], recorded_size: Callable[[int], int]
) -> Iterator[tuple[Piece, ...]]:
    """The chunks of `take_chunk`, without reading pictures and tables.

    Args:
      pieces: of the input.
      recorded_size: items of a chunk by its number; 0 for as many as the limits allow.

    Yields:
      What each chunk consists of.
    """
    chunk: list[Piece] = []
    number = items = weight = num_bytes = 0
    size = recorded_size(0)
    for piece in pieces:
        start = 0
        for i, (more, more_bytes) in enumerate(piece.weights()):
            items, weight, num_bytes = items + 1, weight + more, num_bytes + more_bytes
            full = weight >= CHUNK_WEIGHT or num_bytes >= CHUNK_BYTES
            if items == size or (not size and full):
                yield (*chunk, piece.part(start, i + 1))
                chunk, start, items, weight, num_bytes = [], i + 1, 0, 0, 0
                number += 1
                size = recorded_size(number)
        if start < len(piece):
            chunk.append(piece.part(start, len(piece)))
    if chunk:
        yield tuple(chunk)
