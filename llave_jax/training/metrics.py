"""Where metrics go: JSON lines in `metrics.jsonl`, TensorBoard, and Weights & Biases if asked.

`metrics.jsonl` is what counts: a step has one line of training and one of evaluation at most, in order. What
TensorBoard shows is made from it anew whenever a process begins.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2
from tensorboardX.summary import scalar

from llave_jax.common.directories import make_directory
from llave_jax.common.files import write_text
from llave_jax.training.weights_and_biases import WandbLog

FILE = "metrics.jsonl"
BOARD = "tensorboard"
# Of the names of scores. Lines with them are evaluations.
BENCHMARK, VALIDATION = "eval/", "validation/"


class MetricsWriter:
    """Appends to `directory/metrics.jsonl` and to a TensorBoard file in `directory/tensorboard`.

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
        path = directory / FILE
        lines = [line for line in read_metrics(directory) if line["step"] <= first_step]
        if path.exists():
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        board = directory / BOARD
        make_directory(board)
        for old in board.glob("events.out.tfevents.*"):
            old.unlink()
        self._board = EventsWriter(str(board / "events"))
        for line in lines:
            self._draw(line)
        self._board.flush()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Writes one line.

        Args:
          step: optimiser steps done.
          values: metric -> value. Those that are not finite are left out: JSON has no number for them.
        """
        if not self._enabled:
            return
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        line = {"step": step, "time": round(time.time(), 3), **values}
        rest = (json.dumps(line) + "\n").encode()
        # Mostly one call. A line that a full disk cuts short is left out when the file is read.
        while rest:
            rest = rest[os.write(self._file, rest) :]
        self._draw(line)
        self._board.flush()
        if self._wandb is not None:
            self._wandb.write(step, values)

    def sync(self) -> None:
        """Brings the lines to the disk, before a checkpoint that comes after them."""
        if self._enabled:
            os.fsync(self._file)

    def close(self) -> None:
        """Ends the files, and waits until Weights & Biases has all."""
        if self._enabled:
            os.close(self._file)
            self._board.close()
            if self._wandb is not None:
                self._wandb.close()

    def _draw(self, line: Mapping[str, float]) -> None:
        """One event of TensorBoard for all metrics of a line."""
        # The classes of the protocol are made when the module is imported; type checkers do not see them.
        events: Any = event_pb2
        summaries: Any = summary_pb2
        summary = summaries.Summary()
        for name, value in line.items():
            if name not in ("step", "time"):
                # "@" is not allowed in a tag; with it, tensorboardX prints a line for each value.
                summary.value.extend(scalar(name.replace("@", "_"), value).value)
        self._board.write_event(
            events.Event(step=int(line["step"]), wall_time=line["time"], summary=summary)
        )


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """All lines of a run's metrics file; none if the run has not written one.

    A line that a killed run did not finish is left out. Of a step with several lines of training, or of
    evaluation with the same metrics, the last one counts.

    Args:
      directory: of the run.

    Returns:
      metric -> value for each line, in the order of steps.
    """
    path = directory / FILE
    if not path.exists():
        return []
    found: dict[tuple, dict[str, float]] = {}
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        line = _parsed(text)
        if line is not None:
            found[_kind(line)] = line
    return sorted(found.values(), key=lambda line: line["step"])


def _parsed(text: str) -> dict[str, float] | None:
    if not text.endswith("\n"):
        return None
    try:
        line = json.loads(text)
    except ValueError:
        return None
    return line if isinstance(line, dict) and "step" in line else None


def _kind(line: Mapping[str, float]) -> tuple:
    """What two lines have in common of which one is too many."""
    scores = tuple(sorted({name for name in line if name.startswith((BENCHMARK, VALIDATION))}))
    return line["step"], scores
