"""JSON from files that need not be trusted: one strict parser, and lines of bounded length.

Python's own parser takes `NaN`, keeps the last of two equal keys, and nests until the stack ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

T = TypeVar("T", list, dict)

# Real files nest to a depth of about 10.
MAX_DEPTH = 100
# A text of 32 768 tokens takes about 200 kB.
MAX_LINE_BYTES = 16 << 20


class RepeatedKey(ValueError):
    """An object that names a key twice. The message goes on from the name of the text: "names KEY twice"."""


def parse_json(text: str | bytes) -> Any:
    """Parses JSON as the standard has it.

    Args:
      text: one JSON value.

    Returns:
      The value.

    Raises:
      ValueError: not JSON; NaN, an infinity or a number that becomes one; a key that is given twice; more than
        MAX_DEPTH levels deep. The message says what, not where: the caller knows the file.
    """
    if isinstance(text, bytes):
        try:
            text = text.decode(json.detect_encoding(text), "surrogatepass")
        except UnicodeDecodeError as error:
            raise ValueError(str(error)) from error
    try:
        value = _STRICT.decode(text)
    except json.JSONDecodeError as error:
        raise ValueError(str(error)) from error
    except RecursionError as error:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep") from error
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    return value


def read_json_file(path: Path, kind: type[T]) -> T:
    """Reads a JSON file.

    Args:
      path: of the file.
      kind: of the value: `list` or `dict`.

    Returns:
      The value.

    Raises:
      ValueError: not JSON, as for `parse_json`, or a value of another kind; it names the file.
    """
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(value, kind):
        expected = "a list of rows" if kind is list else "an object"
        raise ValueError(f"{path}: expected {expected}, found {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise RepeatedKey(f"names {twice[:100]} twice")
    return values


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


_STRICT = json.JSONDecoder(
    object_pairs_hook=_unique, parse_constant=_no_constant, parse_float=_finite
)


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ValueError(f"nested more than {MAX_DEPTH} levels deep")


def json_lines(file: IO[bytes]) -> Iterator[tuple[int, bytes | None]]:
    """The lines of a file that are not blank.

    Args:
      file: open for reading, in binary.

    Yields:
      The number of the line, from 1, and its bytes: None for a line of more than MAX_LINE_BYTES, which is not
      held in memory.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) <= MAX_LINE_BYTES:
            if line.strip():
                yield number, line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE_BYTES)
        yield number, None


LINE_TOO_LONG = f"the line has more than {MAX_LINE_BYTES >> 20} MiB, the limit of a line"
