"""What a run shows while it trains: a progress bar and metrics; what it does about a loss that is not finite."""

from __future__ import annotations

import collections
import logging
import math
import time

import jax
import numpy as np
import optax

from llave_jax.common.progress import Progress
from llave_jax.config import Config
from llave_jax.data.step_iterators import TrainBatch
from llave_jax.training import goodput
from llave_jax.training.metrics import MetricsWriter

log = logging.getLogger(__name__)

# In the metrics file: how many steps have left the parameters as they were, so far; and that this step did.
SKIPPED, IS_SKIPPED = "skipped_updates", "update_skipped"


class Watch:
    """Checks, writes and shows the metrics of each step.

    It stays one step behind the device, so that the device never waits for the host to read a metric.

    Args:
      config: of the run.
      writer: of the metrics.
      schedule: step -> learning rate.
      total_steps: of the whole run.
      start: steps done before this process began.
      clock: of the run.
      skipped: steps of the whole run, and directly before `start`, that have left the parameters as they were.
    """

    def __init__(
        self,
        config: Config,
        writer: MetricsWriter,
        schedule: optax.Schedule,
        total_steps: int,
        start: int,
        clock: goodput.Clock,
        skipped: tuple[int, int] = (0, 0),
    ):
        self.progress = Progress(
            total_steps,
            "training",
            unit="steps",
            initial=start,
            enabled=jax.process_index() == 0,
        )
        self._log_every, self._writer, self._schedule = config.log_every, writer, schedule
        self._nonfinite, self._clock = config.nonfinite, clock
        self._skipped, self._in_a_row = skipped
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
          FloatingPointError: loss or gradient of the step before are not finite, and the run does not skip
            such steps, or has skipped too many.
        """
        self._pending.append((step, metrics, batch))
        while len(self._pending) > 1:
            self._finish(*self._pending.popleft())

    def drain(self) -> None:
        """Waits for the steps that were added.

        Raises:
          FloatingPointError: as of `add`.
        """
        while self._pending:
            self._finish(*self._pending.popleft())

    def write_last(self) -> None:
        """Writes the metrics of the last step, wherever the logging interval ends. Call after `drain`."""
        if self._unwritten is not None:
            self._write(*self._unwritten)

    def _finish(self, step: int, metrics: dict[str, jax.Array], batch: TrainBatch) -> None:
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        skips = "finite" in values
        finite = values.pop("finite", True)
        if not (finite and math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            self._count(step, values, batch, skips)
            values[IS_SKIPPED] = 1
        else:
            self._in_a_row = 0
            self.last_loss = f"loss {values['loss']:.4f}, InfoNCE {values['infonce_loss']:.4f}"
        if skips:
            values[SKIPPED] = self._skipped
        values["epoch"] = batch.epoch
        self._pairs += int(values["pairs"])
        self._clock.step(step, int(values["pairs"]))
        self.progress.update(1, self.last_loss.partition(",")[0])
        self._unwritten = step, values
        # A skipped step always has its line, so that the next process can count on from there.
        if step % self._log_every == 0 or self._in_a_row:
            self._write(step, values)

    def _count(self, step: int, values: dict[str, float], batch: TrainBatch, skips: bool) -> None:
        """Counts a step that is not finite; ends the run unless it may be skipped."""
        self._skipped += 1
        self._in_a_row += 1
        limits = self._nonfinite
        what = f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}"
        if math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]):
            what += ", but the update is not finite (config.optim.learning_rate)"
        in_row = self._in_a_row > limits.max_in_a_row
        if skips and not in_row and self._skipped <= limits.max_in_all:
            log.warning(
                "%s: the parameters stay as they were (%d such steps so far)", what, self._skipped
            )
            return
        if skips:
            count = f"{self._in_a_row} in a row" if in_row else f"{self._skipped} in all"
            limit = "max_in_a_row" if in_row else "max_in_all"
            what += f"; such steps are {count}, more than config.nonfinite.{limit}={limits[limit]}"
        rows = [row for pack in batch.ids for shard in pack for row in shard if row]
        raise FloatingPointError(
            f"{what}; checkpoints that are there are kept. Rows of this process's batch: {', '.join(rows)}"
        )

    def _write(self, step: int, values: dict[str, float]) -> None:
        now = time.monotonic()
        values["pairs_per_second"] = self._pairs / (now - self._since)
        values["learning_rate"] = np.asarray(self._schedule(step - 1)).item()
        values |= self._clock.since_last_line()
        name, peak = goodput.peak_memory()
        values[f"{name}_gib"] = peak / 2**30
        self._pairs, self._since, self._unwritten = 0, now, None
        self._writer.write(step, values)


def count_skipped(lines: list[dict[str, float]], start: int) -> tuple[int, int]:
    """What `Watch` needs to count on in a run that is continued.

    Args:
      lines: of the metrics file.
      start: steps done.

    Returns:
      Steps that have left the parameters as they were, up to `start`: in all, and directly before it.
    """
    lines = [line for line in lines if SKIPPED in line and line["step"] <= start]
    skipped = {line["step"] for line in lines if IS_SKIPPED in line}
    in_a_row = 0
    while start - in_a_row in skipped:
        in_a_row += 1
    return max((int(line[SKIPPED]) for line in lines), default=0), in_a_row
