"""What a run shows while it trains: a progress bar and metrics. A loss that is not finite ends the run."""

from __future__ import annotations

import collections
import time

import jax
import numpy as np
import optax

from llave_jax.common.progress import Progress
from llave_jax.config import Config
from llave_jax.data.step_iterators import TrainBatch
from llave_jax.training.metrics import MetricsWriter


class Watch:
    """Checks, writes and shows the metrics of each step.

    It stays one step behind the device, so that the device never waits for the host to read a metric.

    Args:
      config: of the run.
      writer: of the metrics.
      schedule: step -> learning rate.
      total_steps: of the whole run.
      start: steps done before this process began.
    """

    def __init__(
        self,
        config: Config,
        writer: MetricsWriter,
        schedule: optax.Schedule,
        total_steps: int,
        start: int,
    ):
        self.progress = Progress(
            total_steps,
            "training",
            unit="steps",
            initial=start,
            enabled=jax.process_index() == 0,
        )
        self._log_every, self._writer, self._schedule = config.log_every, writer, schedule
        self._pending: collections.deque = collections.deque()
        # Of the last step, if they are not written.
        self._unwritten: tuple[int, dict[str, float]] | None = None
        self.last_loss = ""
        self.restart_clock()

    def restart_clock(self) -> None:
        """Counts pairs per second from now on: what came before was not training."""
        self._pairs, self._since = 0, time.monotonic()

    def add(self, step: int, metrics: dict[str, jax.Array], batch: TrainBatch) -> None:
        """Takes the metrics of a step that the device may still be computing.

        Args:
          step: optimiser steps done.
          metrics: scalars on the device, as the step returned them.
          batch: what the step read.

        Raises:
          FloatingPointError: loss or gradient of the step before are not finite.
        """
        self._pending.append((step, metrics, batch))
        while len(self._pending) > 1:
            self._finish(*self._pending.popleft())

    def drain(self) -> None:
        """Waits for the steps that were added.

        Raises:
          FloatingPointError: the loss or the gradient of one is not finite.
        """
        while self._pending:
            self._finish(*self._pending.popleft())

    def close(self) -> None:
        """Writes the metrics of the last step, wherever the logging interval ends. Call after `drain`."""
        if self._unwritten is not None:
            self._write(*self._unwritten)

    def _finish(self, step: int, metrics: dict[str, jax.Array], batch: TrainBatch) -> None:
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        if not (np.isfinite(values["loss"]) and np.isfinite(values["grad_norm"])):
            rows = [row for pack in batch.ids for shard in pack for row in shard if row]
            raise FloatingPointError(
                f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}; the "
                f"last checkpoint is kept. Rows of this process's batch: {', '.join(rows)}"
            )
        values["epoch"] = batch.epoch
        self._pairs += int(values["pairs"])
        self.last_loss = f"loss {values['loss']:.4f}, InfoNCE {values['infonce_loss']:.4f}"
        self.progress.update(1, f"loss {values['loss']:.4f}")
        self._unwritten = step, values
        if step % self._log_every == 0:
            self._write(step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        values["pairs_per_second"] = self._pairs / (now - self._since)
        values["learning_rate"] = np.asarray(self._schedule(step - 1)).item()
        self._pairs, self._since, self._unwritten = 0, now, None
        self._writer.write(step, values)
