"""Where metrics go: one JSON line a step in `metrics.jsonl`, TensorBoard, and Weights & Biases if asked."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import tensorboardX

from llave_jax.common.files import write_text
from llave_jax.training.weights_and_biases import WandbLog

FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends to `directory/metrics.jsonl` and TensorBoard files beside it.

    Lines of steps after `first_step` that an earlier, interrupted run left behind are removed, so that every
    step is there once.

    Args:
      directory: of the run.
      first_step: steps done before this process began.
        -1: it begins anew, and no line is kept.
      enabled: False writes nothing, as on processes other than the first.
      wandb: takes the metrics too.
    """

    def __init__(
        self,
        directory: Path,
        *,
        first_step: int = 0,
        enabled: bool = True,
        wandb: WandbLog | None = None,
    ):
        self._enabled = enabled
        if not enabled:
            return
        self._wandb = wandb
        self._path = directory / FILE
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
            # "@" is not allowed in a tag; with it, tensorboardX prints a line for each value.
            self._board.add_scalar(name.replace("@", "_"), value, step)
        if self._wandb is not None:
            self._wandb.write(step, values)

    def close(self) -> None:
        """Writes what TensorBoard and Weights & Biases still hold."""
        if self._enabled:
            self._board.close()
            if self._wandb is not None:
                self._wandb.close()


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """All lines of a run's metrics file; none if the run has not written one.

    A line that a killed run did not finish is left out.

    Args:
      directory: of the run.

    Returns:
      metric -> value for each line, in order.
    """
    path = directory / FILE
    if not path.exists():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _drop_after(path: Path, step: int) -> None:
    """Keep the complete lines up to `step`: an interrupted write leaves a torn one."""
    lines = [line for line in read_metrics(path.parent) if line["step"] <= step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
