"""`run.json` beside results: which model, and in which precision, computed each of them.

The score files that a leaderboard takes have a fixed form with no room for it.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llave_jax.common.files import write_text
from llave_jax.embedding.embedder import Embedder

FILE = "run.json"


def settings_of(
    model: str | os.PathLike,
    embedder: Embedder,
    fingerprint: str,
    adapter: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """What a result depends on besides its data.

    Args:
      model: the directory that `embedder` was loaded from.
      embedder: the model as it was loaded.
      fingerprint: of the model, from `weights.fingerprint`.
      adapter: that was added to it; None: none.

    Returns:
      Plain values, for JSON.
    """
    return {
        "model": str(model),
        **({} if adapter is None else {"adapter": str(adapter)}),
        "fingerprint": fingerprint,
        "dtype": str(embedder.model.dtype),
        "max_length": embedder.config.inputs.max_length,
    }


def record_run(
    directory: str | os.PathLike, name: str, settings: Mapping[str, Any] | None, file: str = FILE
) -> None:
    """Note in `directory/run.json` that the result `name` was computed with `settings`.

    Args:
      directory: of the results.
      name: of the result.
      settings: what `settings_of` returned. None: unknown; the entry of an earlier run is removed, since it
        does not hold for the new result.
      file: in place of run.json.
    """
    path = Path(directory) / file
    runs = read_runs(directory, file)
    if settings is None and name not in runs:
        return
    runs.pop(name, None)
    if settings is not None:
        runs[name] = dict(settings)
    write_text(path, json.dumps(runs, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_runs(directory: str | os.PathLike, file: str = FILE) -> dict[str, Any]:
    """What `record_run` noted.

    Args:
      directory: of the results.
      file: in place of run.json.

    Returns:
      Name of a result -> settings; {} where nothing was noted, or the file is damaged, with a warning.
    """
    path = Path(directory) / file
    if not path.exists():
        return {}
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(runs, dict):
            return runs
    except ValueError:
        pass
    logging.getLogger(__name__).warning(
        "%s: is not what was written to it; it begins anew, without the results of earlier runs",
        path,
    )
    return {}
