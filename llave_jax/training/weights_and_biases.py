"""Metrics to Weights & Biases, if it is installed and `config.log.wandb` asks for it.

It is imported only then. A run that is continued goes on in the same curves.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llave_jax.common import extras
from llave_jax.common.files import write_text

_ID = "wandb_id.txt"


class WandbLog:
    """A run of Weights & Biases.

    Args:
      project: its name there.
      directory: the training run's directory, which gives the run its name.
      config: of the training run.

    Raises:
      MissingPackage: the package is not installed.
      ValueError: it cannot begin a run; the message says why and what to do.
    """

    def __init__(self, project: str, directory: Path, config: Mapping[str, Any]):
        extras.require("wandb", "metrics in Weights & Biases (config.log.wandb)")
        import wandb  # pyright: ignore[reportMissingImports]

        path = directory / _ID
        run_id = path.read_text().strip() if path.exists() else uuid.uuid4().hex[:16]
        try:
            self._run: Any = wandb.init(
                project=project,
                name=directory.resolve().name,
                dir=str(directory),
                id=run_id,
                resume="allow",
                config=dict(config),
                # A run may go on with another config, such as more steps.
                allow_val_change=True,
            )
        except wandb.Error as error:
            raise ValueError(
                f"config.log.wandb={project}: {' '.join(str(error).split())}. Log in (wandb login), set "
                "WANDB_MODE=offline, or leave config.log.wandb unset"
            ) from error
        write_text(path, f"{run_id}\n")
        # The service refuses steps that go back, as those of a run that was killed after its checkpoint
        # do. Values are therefore drawn over a metric "step" of ours.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Sends the metrics of a step.

        Args:
          step: optimiser steps done.
          values: by name.
        """
        self._run.log({"step": step, **values})

    def close(self) -> None:
        """Waits until all has been sent."""
        self._run.finish()
