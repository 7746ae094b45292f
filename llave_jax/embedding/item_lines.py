"""Items in a JSON-lines file, as `llave_jax.embed` reads them: one at a time, in chunks.

A line is an object with any of `text`, `image`, `images`, `video` and an optional `id`; paths are
relative to the file. They may lead anywhere: the file is the user's own list of the user's own files.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llave_jax.common.json_text import LINE_TOO_LONG, json_lines, parse_json
from llave_jax.common.text import shortened
from llave_jax.inputs.images import refuse_data_uri
from llave_jax.inputs.item import Item, as_item

# Items are saved in chunks, so a killed job loses at most one: 8192 texts, 1024 images or 64 videos.
# Small chunks would end in many small batches.
CHUNK_WEIGHT = 8192
IMAGE_WEIGHT, VIDEO_WEIGHT = 8, 128


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of the input.

    Attributes:
      number: of the line, from 1.
      id: what the line gives, or the number of items before it.
      item: None if the line is not an item.
      error: why it is not; "" if it is.
    """

    number: int
    id: Any
    item: Item | None
    error: str = ""

    @property
    def weight(self) -> int:
        """The line's share of a chunk: texts count 1."""
        if self.item is None:
            return 1
        if self.item.video is not None:
            return VIDEO_WEIGHT
        return max(1, IMAGE_WEIGHT * len(self.item.images))


def read_lines(source: Path) -> Iterator[Line]:
    """Read a file of items, one at a time; empty lines do not count.

    Args:
      source: the file, or a pipe.

    Yields:
      Each line, also those that are not items.

    Raises:
      OSError: the file cannot be read.
    """
    position = 0
    with open(source, "rb") as file:
        for number, text in json_lines(file):
            yield _parse(text, f"{source}:{number}", number, position, source.parent)
            position += 1


def _parse(text: bytes | None, where: str, number: int, position: int, root: Path) -> Line:
    item_id = position
    try:
        if text is None:
            raise ValueError(f"{where}: {LINE_TOO_LONG}")
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"{where}: is not JSON ({error}); expected one object") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where}: is {type(values).__name__}; expected an object")
        item_id = values.pop("id", position)
        item = as_item(_resolve(values, root, where), where)
        item.text.encode("utf-8")  # JSON can hold half a surrogate pair, which no encoding can
    except ValueError as error:
        message = shortened(str(error))
        return Line(number, item_id, None, message if where in message else f"{where}: {message}")
    return Line(number, item_id, item)


def _resolve(values: dict[str, Any], root: Path, where: str) -> dict[str, Any]:
    """The values of a line, with paths below the folder of the file that names them."""

    def resolve(key: str, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str) and value:
            refuse_data_uri(value, where)
            return str(root / value)
        if value == "":
            raise ValueError(f"{where}: {key} has an empty path; leave it out, or say null")
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


def take_chunk(lines: Iterator[Line], size: int) -> list[Line]:
    """The next lines, to be embedded and kept together.

    Args:
      lines: what `read_lines` returned; the chunk is taken off it.
      size: how many; 0: as many as CHUNK_WEIGHT allows.

    Returns:
      The lines; none at the end of the input.
    """
    if size:
        return list(itertools.islice(lines, size))
    chunk, weight = [], 0
    for line in lines:
        chunk.append(line)
        weight += line.weight
        if weight >= CHUNK_WEIGHT:
            break
    return chunk


def count_items(source: Path) -> int | None:
    """Count the lines that are not empty.

    Args:
      source: the file, or a pipe.

    Returns:
      The number of items; None for a pipe, which can be read only once.

    Raises:
      OSError: there is no such file.
    """
    if not source.is_file():
        source.stat()  # raises if there is nothing at all
        return None
    with open(source, "rb") as file:
        return sum(1 for _ in json_lines(file))
