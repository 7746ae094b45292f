"""What a run keeps of itself in WORKDIR, besides checkpoints, metrics and scores.

config.json             the config, which decides whether the run may be continued (`resume.py`)
model/                  model config and tokenizer, which make the run's checkpoints a model
best/model/             the same for the best parameters
skipped_PROCESS.jsonl   the rows that each process skipped
"""

from __future__ import annotations

import json
from pathlib import Path

from llave_jax.common.files import write_text
from llave_jax.config import Config
from llave_jax.models.config import LlaveConfig
from llave_jax.training import resume
from llave_jax.training.checkpoint import BEST
from llave_jax.weights import model_dir
from llave_jax.weights.run_params import has_checkpoint
from llave_jax.weights.tokenizer_files import same_tokenizer_files

CONFIG = "config.json"
MODEL = "model"


def skip_file(workdir: Path, process: int | str) -> Path:
    """The file in which a process lists the rows that it skips."""
    return workdir / f"skipped_{process}.jsonl"


def record_config(config: Config, workdir: Path) -> None:
    """Keeps the config with the run; makes WORKDIR.

    A run that ended before its first checkpoint, as with a mistyped path, has nothing to continue, and
    any config may follow.

    Raises:
      ValueError: the run in `workdir` cannot go on with this config; it names the keys.
    """
    path = workdir / CONFIG
    text = config.to_json(indent=2, sort_keys=True) + "\n"
    if path.exists() and has_checkpoint(workdir):
        refused = resume.refused_changes(json.loads(path.read_text()), json.loads(text))
        if refused:
            raise ValueError(
                f"{workdir} holds a run with another config ({'; '.join(refused)}); "
                "use another --workdir, or the config it began with. What may change is listed in "
                "docs/launch.md"
            )
    write_text(path, text)


def record_model(
    config: Config, llave_config: LlaveConfig, tokenizer_path: Path | None, workdir: Path
) -> None:
    """Keeps with the run what makes its checkpoints a model: config, tokenizer, source files.

    Args:
      llave_config: the model that the run trains.
      tokenizer_path: its tokenizer, where `config.model.path` has none.

    Raises:
      ValueError: the run that is continued has another model or tokenizer.
    """
    kept = workdir / MODEL
    if not has_checkpoint(workdir) or not model_dir.is_model_dir(kept):
        model_dir.write_model_dir(
            kept, llave_config, source=config.model.path, tokenizer=tokenizer_path, overwrite=True
        )
    else:
        _check_same_model(config, llave_config, tokenizer_path, kept)
    if config.checkpoint.best_metric is not None:
        best = workdir / BEST / MODEL
        if not has_checkpoint(workdir) or not model_dir.is_model_dir(best):
            model_dir.write_model_dir(best, llave_config, source=kept, overwrite=True)


def _check_same_model(
    config: Config, llave_config: LlaveConfig, tokenizer_path: Path | None, kept: Path
) -> None:
    now = dict(resume.leaves(llave_config.to_dict()))
    before = dict(resume.leaves(model_dir.load_config(kept).to_dict()))
    changed = [f"{key}: {before[key]!r} -> {now[key]!r}" for key in now if now[key] != before[key]]
    if changed:
        raise ValueError(
            f"{kept} is the model of the run; config.model describes another "
            f"({'; '.join(changed)}). Use another --workdir, or the model the run began with"
        )
    tokenizer = tokenizer_path
    if config.model.path is not None:
        tokenizer = model_dir.locate(config.model.path) / model_dir.TOKENIZER
    if tokenizer is None or not same_tokenizer_files(tokenizer, kept / model_dir.TOKENIZER):
        raise ValueError(
            f"{kept} has the tokenizer of the run; {tokenizer} is another. Use another --workdir, or "
            "the tokenizer the run began with"
        )
