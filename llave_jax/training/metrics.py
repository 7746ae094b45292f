"""Where metrics go: one JSON line a step in `metrics.jsonl`, and TensorBoard."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import tensorboardX

from llave_jax.common.files import write_text


class MetricsWriter:
    """Appends to `directory/metrics.jsonl` and TensorBoard files beside it.

    Lines of steps after `first_step` that an earlier, interrupted run left behind are removed, so that every
    step is there once.

    Args:
      directory: of the run.
      first_step: steps done before this process began.
      enabled: False writes nothing, as on processes other than the first.
    """

    def __init__(self, directory: Path, *, first_step: int = 0, enabled: bool = True):
        self._enabled = enabled
        if not enabled:
            return
        self._path = directory / "metrics.jsonl"
        if self._path.exists():
            _drop_after(self._path, first_step)
        self._board = tensorboardX.SummaryWriter(
            str(directory / "tensorboard"), purge_step=first_step + 1
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line.

        Args:
          step: optimiser steps done.
          values: metric -> value.
        """
        if not self._enabled:
            return
        line = {"step": step, "time": round(time.time(), 3), **values}
        with open(self._path, "a") as file:
            file.write(json.dumps(line) + "\n")
        for name, value in values.items():
            self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what TensorBoard's writer still holds."""
        if self._enabled:
            self._board.close()


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """All lines of a run's metrics file.

    Args:
      directory: of the run.

    Returns:
      metric -> value for each line, in order.
    """
    with open(directory / "metrics.jsonl") as file:
        return [json.loads(line) for line in file]


def _drop_after(path: Path, step: int) -> None:
    """Keep the complete lines up to `step`: an interrupted write leaves a torn one."""
    kept = []
    for line in path.read_text().splitlines(keepends=True):
        if not line.endswith("\n"):
            continue
        if json.loads(line)["step"] <= step:
            kept.append(line)
    write_text(path, "".join(kept))
