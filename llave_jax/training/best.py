"""The best parameters of a run by one score, a model of its own in WORKDIR/best.

    WORKDIR/best/checkpoints/STEP/{params,score}      the parameters (or adapters), and what they scored
    WORKDIR/best/best.json                            the score once more, to be read

A checkpoint and its score appear together. What was best before is removed afterwards, so that there is no
moment without a best, or with one whose score is not known.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from llave_jax.common.files import write_text
from llave_jax.models.lora import adapters_of
from llave_jax.parallel.processes import json_from_first_process
from llave_jax.training.checkpoint_writer import CheckpointWriter
from llave_jax.weights.run_params import CHECKPOINTS, latest_params
from llave_jax.weights.safetensors_io import CheckpointError

BEST = "best"
_RECORD = "best.json"
_SCORE = "score"


class BestCheckpoint:
    """The parameters that scored best by one metric.

    Args:
      workdir: the run's directory.
      metric: name of the score.
    """

    def __init__(self, workdir: Path, metric: str):
        self._metric = metric
        self._folder = workdir / BEST
        self._writer = CheckpointWriter(self._folder / CHECKPOINTS, keep=1, about={})
        self.step: int | None = None
        self._value: float | None = None
        first = jax.process_index() == 0
        record = json_from_first_process(self._saved() if first else None)
        # Another metric's value says nothing about this one's.
        if record is not None and record["metric"] == metric:
            self.step, self._value = record["step"], record["value"]
            self._write_record()

    def _saved(self) -> dict[str, Any] | None:
        try:
            checkpoint = latest_params(self._folder).parent
        except CheckpointError:
            return None
        score, record = checkpoint / _SCORE / "metadata", self._folder / _RECORD
        if score.exists():
            return json.loads(score.read_text())
        # Earlier versions kept the score in the file alone.
        found = json.loads(record.read_text()) if record.exists() else None
        return found if found is not None and str(found["step"]) == checkpoint.name else None

    def offer(self, step: int, params: Any, value: float) -> None:
        """Keeps the parameters of a step if their score is better than any before.

        Args:
          step: optimiser steps done.
          params: the parameter tree.
          value: of the metric.
        """
        if step == self.step:
            return  # Scored again, after a stop between this checkpoint and the line in the metrics.
        if self._value is not None and not is_better(self._metric, value, self._value):
            return
        self.step, self._value = step, value
        record = {"metric": self._metric, "value": value, "step": step}
        self._writer.save(
            step,
            ocp.args.Composite(
                params=ocp.args.StandardSave(adapters_of(params)),
                **{_SCORE: ocp.args.JsonSave(record)},
            ),
        )
        self._writer.wait()
        self._write_record()

    def _write_record(self) -> None:
        if jax.process_index() == 0:
            record = {"metric": self._metric, "value": self._value, "step": self.step}
            write_text(self._folder / _RECORD, json.dumps(record, indent=2) + "\n")

    def close(self) -> None:
        """Closes the checkpoint's writer."""
        self._writer.close()


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether a score is better than another.

    Args:
      metric: its name; one that ends in "loss" is better the smaller it is.
      value: the score.
      than: the other.

    Returns:
      True if it is better. NaN is worst.
    """
    if math.isnan(than):
        return not math.isnan(value)
    return value < than if metric.endswith("loss") else value > than
