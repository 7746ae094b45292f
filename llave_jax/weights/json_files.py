"""JSON files of model directories and Hugging Face checkpoints."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llave_jax.common.json_text import parse_json
from llave_jax.weights.safetensors_io import CheckpointError

# The largest of these files is a tokenizer.json of about 10 MB.
MAX_BYTES = 64 << 20


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
      path: of the file.

    Returns:
      key -> value.

    Raises:
      CheckpointError: the file is missing, too large, is not JSON, or holds something else.
    """
    # A pipe in its place would block without end.
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise CheckpointError(f"{path}: {size} bytes; expected at most {MAX_BYTES}")
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise CheckpointError(
            f"{path}: is not Unicode text (it has half a surrogate pair)"
        ) from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def section(values: Mapping[str, Any], key: str, where: str | os.PathLike) -> dict[str, Any]:
    """An object within an object.

    Args:
      values: the outer object.
      key: of the inner one.
      where: the file, for the message.

    Returns:
      The inner object; an empty one if it is missing or null.

    Raises:
      CheckpointError: the value is something else.
    """
    inner = values.get(key)
    if inner is None:
        return {}
    if not isinstance(inner, dict):
        raise CheckpointError(f"{where}: {key} is {inner!r:.60}; expected an object")
    return inner


def write_json(
    path: Path, values: dict[str, Any] | list[dict[str, Any]], *, sort_keys: bool = True
) -> None:
    """Writes a file of a directory that is being staged: the write itself is not atomic.

    Args:
      path: of the file.
      values: key -> value, or a list of such.
      sort_keys: write keys in alphabetical order; otherwise in the order of `values`.
    """
    text = json.dumps(values, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
