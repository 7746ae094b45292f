"""JSON files of model directories and Hugging Face checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llave_jax.weights.safetensors_io import CheckpointError


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a CheckpointError naming the file."""
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
    """Write a file of a directory that is being staged: the write itself is not atomic."""
    text = json.dumps(values, indent=2, sort_keys=sort_keys, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
