"""A trace of a few steps, as `config.profile` asks for it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import jax

from llave_jax.config import Config
from llave_jax.training.metrics import BOARD

log = logging.getLogger(__name__)


class Profile:
    """Traces steps `profile.start` to `profile.start + profile.steps - 1`.

    Args:
      config: of the run.
      workdir: the run's directory; traces go to its folder for TensorBoard.
    """

    def __init__(self, config: Config, workdir: Path):
        self._first = config.profile.start
        self._last = (self._first or 0) + config.profile.steps - 1
        self._directory = workdir / BOARD
        self._running = False

    def before(self, step: int) -> None:
        """Begins the trace where its first step begins; a process that starts later traces what is left.

        Args:
          step: that is about to run.
        """
        if self._first is not None and not self._running and self._first <= step <= self._last:
            jax.profiler.start_trace(str(self._directory))
            self._running = True

    def after(self, step: int, results: Any) -> None:
        """Ends the trace behind its last step.

        Args:
          step: that was started.
          results: of the step; they are waited for.
        """
        if self._running and step >= self._last:
            jax.block_until_ready(results)
            self.close()
            log.info("steps up to %d are traced: tensorboard --logdir %s", step, self._directory)

    def close(self) -> None:
        """Ends a trace that is running."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()
