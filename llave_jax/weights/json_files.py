"""JSON files of model directories and Hugging Face checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llave_jax.weights.safetensors_io import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON file that holds an object.

    Args:
      path: of the file.

    Returns:
      key -> value.

    Raises:
      CheckpointError: the file is missing, is not JSON, or holds something else.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def write_json(path: Path, values: dict[str, Any], *, sort_keys: bool = True) -> None:
    """Writes a file of a directory that is being staged: the write itself is not atomic.

    Args:
      path: of the file.
      values: key -> value.
      sort_keys: write keys in alphabetical order; otherwise in the order of `values`.
    """
    text = json.dumps(values, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
