"""Identity of a model: whether embeddings made before are those of the model at hand."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

from llave_jax.common.content import digest, sampled_digest
from llave_jax.models.config import LlaveConfig
from llave_jax.weights import model_dir
from llave_jax.weights.json_files import read_json, section
from llave_jax.weights.peft_format import CONFIG, WEIGHTS, is_peft
from llave_jax.weights.run_params import latest_params
from llave_jax.weights.safetensors_io import CheckpointError


def model_fingerprint(
    path: str | os.PathLike,
    dtype: object,
    config: LlaveConfig,
    adapter: str | os.PathLike | None = None,
) -> str:
    """Digest of what a model's embeddings depend on.

    Files enter by their size and `sampled_digest`: any training step changes every block, and a 7B
    model need not be read to start an evaluation.

    Args:
      path: the model directory or training run that was loaded.
      dtype: of the computation.
      config: of the model as it is used: how inputs are laid out may differ from what is stored.
      adapter: what was added to it, as of `adapted.open_adapter`; None: nothing.

    Returns:
      32 hexadecimal digits.

    Raises:
      CheckpointError: `path` is neither a model directory nor a training run with a checkpoint.
    """
    files = _model_files(Path(path))
    if adapter is not None:
        files += _adapter_files(Path(adapter))
    return _digest(repr((dtype, config)), files)


def weights_fingerprint(path: str | os.PathLike) -> str:
    """Digest of a model's weights alone, by which adapters know the base that they belong to.

    Files enter as for `model_fingerprint`.

    Args:
      path: a model directory or a training run.

    Returns:
      32 hexadecimal digits.

    Raises:
      CheckpointError: it is neither, or has no weights.
    """
    path = Path(path)
    directory = model_dir.locate(path)
    if directory == path:
        if not (path / model_dir.WEIGHTS).is_file():
            raise CheckpointError(
                f"{path / model_dir.WEIGHTS}: no such file; this model has no weights"
            )
        return _digest("", [path / model_dir.WEIGHTS])
    record = directory / model_dir.ADAPTER
    base = _without_place(record) if record.is_file() else ""
    return _digest(base, [latest_params(path)])


def _digest(beside: str, parts: Iterable[Path]) -> str:
    """Of a text and of files: a folder stands for all its files."""
    found = [beside.encode()]
    for part in parts:
        files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
        for file in files:
            name = file.relative_to(part).as_posix() if part.is_dir() else file.name
            if file.name == model_dir.ADAPTER.name:
                found.append(f"{name} {_without_place(file)}".encode())
            else:
                found += [f"{name} {file.stat().st_size} ".encode(), sampled_digest(file)]
    return digest(*found).hex()[:32]


def _without_place(record: Path) -> str:
    """What a run says of its adapters and their base, but not where the base lies."""
    values = read_json(record)
    base = {"fingerprint": section(values, "base", record).get("fingerprint")}
    return json.dumps({**values, "base": base}, sort_keys=True)


def _model_files(path: Path) -> list[Path]:
    directory = model_dir.locate(path)
    if directory != path:
        return [directory, latest_params(path).parent]
    return [directory / name for name in (model_dir.CONFIG, model_dir.WEIGHTS, model_dir.TOKENIZER)]


def _adapter_files(path: Path) -> list[Path]:
    if is_peft(path):
        return [path / CONFIG, path / WEIGHTS]
    return [model_dir.locate(path) / model_dir.ADAPTER, latest_params(path)]
