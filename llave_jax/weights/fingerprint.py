"""Identity of a model: whether embeddings made before are those of the model at hand."""

from __future__ import annotations

import os
from pathlib import Path

from llave_jax.common.content import digest, sampled_digest
from llave_jax.models.config import LlaveConfig
from llave_jax.weights import model_dir
from llave_jax.weights.run_params import latest_params


def model_fingerprint(path: str | os.PathLike, dtype: object, config: LlaveConfig) -> str:
    """Digest of what a model's embeddings depend on.

    Files enter by their size and `sampled_digest`: any training step changes every block, and a 7B
    model need not be read to start an evaluation.

    Args:
      path: the model directory or training run that was loaded.
      dtype: of the computation.
      config: of the model as it is used: how inputs are laid out may differ from what is stored.

    Returns:
      32 hexadecimal digits.

    Raises:
      CheckpointError: `path` is neither a model directory nor a training run with a checkpoint.
    """
    parts = [repr((dtype, config)).encode()]
    for part in _model_files(Path(path)):
        files = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
        for file in files:
            name = file.relative_to(part).as_posix() if part.is_dir() else file.name
            parts += [f"{name} {file.stat().st_size} ".encode(), sampled_digest(file)]
    return digest(*parts).hex()[:32]


def _model_files(path: Path) -> list[Path]:
    directory = model_dir.locate(path)
    if directory != path:
        return [directory, latest_params(path).parent]
    return [directory / name for name in (model_dir.CONFIG, model_dir.WEIGHTS, model_dir.TOKENIZER)]
