"""Checkpoints of a run: parameters, optimiser state and the data iterator, by orbax.

    WORKDIR/checkpoints/STEP/{params,optimizer,data}
    WORKDIR/best/checkpoints/STEP/params                the best by a metric, a model of its own

A checkpoint appears under its name only when all of it is written. Optimiser state is kept under names
(optimizer/opt_state/adam/mu/PATH), so that no field is mistaken for another if a library reorders them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import jax
import orbax.checkpoint as ocp

from llave_jax.common.files import write_text
from llave_jax.parallel import sharding
from llave_jax.training.state import TrainState
from llave_jax.weights.run_params import CHECKPOINTS, saved_tree

BEST = "best"


class Checkpoints:
    """The checkpoints of one run, newest kept.

    Args:
      workdir: the run's directory.
      keep: how many checkpoints are kept.
    """

    def __init__(self, workdir: Path, *, keep: int):
        self._manager = ocp.CheckpointManager(
            (workdir / CHECKPOINTS).resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=keep),
        )

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return self._manager.latest_step()

    def must_stop(self, step: int) -> bool:
        """Whether the machines are about to be taken away.

        Args:
          step: optimiser steps done.

        Returns:
          True if so, in all processes alike.
        """
        return self._manager.reached_preemption(step)

    def save(self, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Writes a checkpoint. Returns when the arrays are copied; files are written in the background.

        Args:
          state: of the run.
          iterator: its next batch is the one after `state`.
        """
        self._manager.save(
            int(state.step),
            args=ocp.args.Composite(
                params=ocp.args.StandardSave(state.params),
                optimizer=ocp.args.StandardSave(
                    {"step": state.step, "opt_state": _by_name(state.opt_state)}
                ),
                data=grain.checkpoint.CheckpointSave(iterator),
            ),
        )

    def restore(self, target: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """Reads the latest checkpoint, every array directly into its shards.

        Args:
          target: shapes, dtypes and shardings of the state.
          iterator: is set to continue where it was.

        Returns:
          The state.

        Raises:
          ValueError: the run had another number of processes or another optimiser.
        """
        step = self._manager.latest_step()
        folder = Path(self._manager.directory) / str(step)
        _check_processes(folder / "data")
        opt_state = _by_name(target.opt_state)
        _check_optimizer(folder / "optimizer", opt_state)
        restored = self._manager.restore(
            step,
            args=ocp.args.Composite(
                params=ocp.args.StandardRestore(target.params),
                optimizer=ocp.args.StandardRestore({"step": target.step, "opt_state": opt_state}),
                data=grain.checkpoint.CheckpointRestore(iterator),
            ),
        )
        optimizer = restored["optimizer"]
        by_name = sharding.flatten(optimizer["opt_state"])
        return TrainState(
            step=optimizer["step"],
            params=restored["params"],
            opt_state=jax.tree_util.tree_map_with_path(
                lambda path, _: by_name[sharding.path_string(path)], target.opt_state
            ),
        )

    def close(self) -> None:
        """Wait for files still being written."""
        self._manager.wait_until_finished()
        self._manager.close()


class BestCheckpoint:
    """The parameters that scored best by one metric, kept in `WORKDIR/best`.

    Args:
      workdir: the run's directory.
      metric: name of the score; higher is better.
    """

    def __init__(self, workdir: Path, metric: str):
        self._metric = metric
        self._record = workdir / BEST / "best.json"
        self._manager = ocp.CheckpointManager(
            (workdir / BEST / CHECKPOINTS).resolve(),
            options=ocp.CheckpointManagerOptions(max_to_keep=1),
        )
        self._value: float | None = None
        if self._record.exists():
            record = json.loads(self._record.read_text())
            # Another metric's value says nothing about this one's.
            if record["metric"] == metric:
                self._value = record["value"]

    def offer(self, step: int, params: Any, value: float) -> None:
        """Keeps the parameters of a step if their score is better than any before.

        Args:
          step: optimiser steps done.
          params: the parameter tree.
          value: of the metric.
        """
        if self._value is not None and not is_better(self._metric, value, self._value):
            return
        self._value = value
        self._manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            record = {"metric": self._metric, "value": self._value, "step": step}
            write_text(self._record, json.dumps(record, indent=2) + "\n")

    def close(self) -> None:
        """Closes the checkpoint's writer."""
        self._manager.close()


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


def _check_processes(folder: Path) -> None:
    """Positions in the data are kept by process, and mean nothing to another number of them."""
    saved = {int(path.stem.rpartition("-")[2]) for path in folder.glob("process_*-of-*.json")}
    if saved != {jax.process_count()}:
        raise ValueError(
            f"{folder} has the data positions of {' or '.join(map(str, saved)) or 'no'} processes, "
            f"this run has {jax.process_count()}; resume with as many, or start a new run from the "
            "saved parameters (config.model.path, another --workdir)"
        )


def _check_optimizer(folder: Path, opt_state: Mapping[str, Any]) -> None:
    """What an optimiser keeps has names, and a checkpoint must have the same."""
    saved = sharding.flatten(saved_tree(folder)["opt_state"]).keys()
    expected = sharding.flatten(opt_state).keys()
    if saved == expected:
        return
    advice = "start a new run from the saved parameters (config.model.path, another --workdir)"
    if all(name.isdigit() for name in saved):
        raise ValueError(
            f"{folder} has the optimiser's state by position, as earlier versions wrote it; this version "
            f"reads it by name. Continue with the version that began the run, or {advice}"
        )
    raise ValueError(
        f"{folder} has the state of another optimiser: it lacks "
        f"{sorted(expected - saved)[:3] or 'nothing'} and has {sorted(saved - expected)[:3] or 'nothing'} "
        f"besides; {advice}"
    )


def _by_name(opt_state: Any) -> dict[str, Any]:
    """Leaves as a nested dict by the names of the optimiser's parts, their fields and parameters.

    Raises:
      TypeError: a part of the optimiser has no name, only a position.
    """
    named = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state):
        if any(isinstance(key, jax.tree_util.SequenceKey) for key in path):
            raise TypeError(
                f"optimiser state {jax.tree_util.keystr(path)} has a position for a name; put optimisers "
                "together by optax.named_chain"
            )
        named[sharding.path_string(path)] = leaf
    return sharding.unflatten(named)
