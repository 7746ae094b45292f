"""Checkpoints of a run: parameters, optimiser state and the data iterator, by orbax.

    WORKDIR/checkpoints/STEP/{params,optimizer,data}

Of a run that trains adapters, params are the adapters. A checkpoint appears under its name only when all of it is written. When a run is continued, the newest one
whose files are as they were written is used (`weights/checkpoint_seal.py`); one that is damaged is kept as
STEP.damaged. Optimiser state is kept under names
(optimizer/opt_state/adam/mu/PATH), so that no field is mistaken for another if a library reorders them.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp

from llave_jax.models.lora import adapters_of
from llave_jax.parallel import processes, sharding
from llave_jax.training.checkpoint_writer import DAMAGED, CheckpointWriter, set_aside
from llave_jax.training.state import TrainState
from llave_jax.weights.checkpoint_seal import CONTENTS, find_damage, is_sealed
from llave_jax.weights.run_params import CHECKPOINTS, by_preference, checkpoint_steps, saved_tree
from llave_jax.weights.safetensors_io import CheckpointError

log = logging.getLogger(__name__)

T = TypeVar("T")

ITEMS = ("params", "optimizer", "data")


class Checkpoints:
    """The checkpoints of one run, newest kept.

    Args:
      workdir: the run's directory.
      keep: how many checkpoints are kept.
      about: what each checkpoint says of itself, for JSON: the run's config.

    Raises:
      OSError: checkpoints cannot be written there.
    """

    def __init__(self, workdir: Path, *, keep: int, about: Mapping[str, Any] | None = None):
        self._folder = workdir / CHECKPOINTS
        self._open = functools.partial(CheckpointWriter, self._folder, keep=keep, about=about or {})
        self._writer = self._open()

    @property
    def latest_step(self) -> int | None:
        """Step of the newest complete checkpoint; None if there is none."""
        return max(checkpoint_steps(self._folder), default=None)

    def must_stop(self, step: int) -> bool:
        """Whether the machines are about to be taken away.

        Args:
          step: optimiser steps done.

        Returns:
          True if so, in all processes alike.

        Raises:
          OSError: the last checkpoint could not be written.
        """
        self._writer.check()
        return self._writer.reached_preemption(step)

    def save(self, state: TrainState, iterator: grain.DatasetIterator) -> None:
        """Writes a checkpoint. Returns when the arrays are copied; files are written in the background.

        Args:
          state: of the run.
          iterator: its next batch is the one after `state`.

        Raises:
          OSError: this checkpoint or the one before could not be written.
        """
        self._writer.save(
            int(state.step),
            ocp.args.Composite(
                params=ocp.args.StandardSave(adapters_of(state.params)),
                optimizer=ocp.args.StandardSave(_optimizer_item(state)),
                data=grain.checkpoint.CheckpointSave(iterator),
            ),
        )

    def restore(self, target: TrainState, iterator: grain.DatasetIterator) -> TrainState:
        """Reads the newest checkpoint that is whole, every array directly into its shards.

        Newer ones that are not whole are set aside under another name, with a warning. All processes agree.

        Args:
          target: shapes, dtypes and shardings of the state.
          iterator: is set to continue where it was.

        Returns:
          The state.

        Raises:
          CheckpointError: no checkpoint can be used; it says why of each.
          ValueError: the run had another number of processes or other data.
        """
        steps = by_preference(self._folder)
        refused = {step: f"{self._folder / str(step) / CONTENTS} is missing" for step in steps}
        for step in steps:
            try:
                state = self._restore(step, target, iterator)
            except CheckpointError as error:
                refused[step] = str(error)
                continue
            self._set_aside({bad: why for bad, why in refused.items() if bad > step}, step)
            return state
        if len(refused) == 1:
            raise CheckpointError(*refused.values())
        raise CheckpointError(
            f"{self._folder}: none of the checkpoints can be used: {'; '.join(refused.values())}. Put back a "
            "copy of one, or start anew with another --workdir"
        )

    def _restore(
        self, step: int, target: TrainState, iterator: grain.DatasetIterator
    ) -> TrainState:
        folder = self._folder / str(step)
        _agree(lambda: _check_files(folder))
        _agree(lambda: _check_structure(folder, target))
        _check_processes(folder / "data")
        args = ocp.args.Composite(
            params=ocp.args.StandardRestore(target.params),
            optimizer=ocp.args.StandardRestore(_optimizer_item(target)),
            data=grain.checkpoint.CheckpointRestore(iterator),
        )
        if is_sealed(folder):
            restored = self._writer.restore(step, args)
        else:
            # Nothing but reading it tells whether it is whole.
            arrays = {name: args[name] for name in ("params", "optimizer")}
            restored = _agree(lambda: self._read(folder, ocp.args.Composite(**arrays)))
            self._writer.restore(step, ocp.args.Composite(data=args["data"]))
        optimizer = restored["optimizer"]
        by_name = sharding.flatten(optimizer["opt_state"])
        return TrainState(
            step=optimizer["step"],
            params=restored["params"],
            opt_state=jax.tree_util.tree_map_with_path(
                lambda path, _: by_name[sharding.path_string(path)], target.opt_state
            ),
            loss=optimizer.get("loss"),
        )

    def _read(self, folder: Path, args: ocp.args.Composite) -> Any:
        try:
            return self._writer.restore(int(folder.name), args)
        except (ValueError, OSError, KeyError) as error:
            raise CheckpointError(
                f"{folder} cannot be read: {str(error).splitlines()[0]}"
            ) from error

    def _set_aside(self, damaged: Mapping[int, str], used: int) -> None:
        if not damaged:
            return
        first = jax.process_index() == 0
        self._writer.close()
        for step in damaged if first else ():
            set_aside(self._folder / str(step))
        processes.gather(None)
        self._writer = self._open()
        if first:
            log.warning(
                "%s; the checkpoint of step %d is used instead, and the run goes on from there. What is "
                "damaged is kept as %s",
                "; ".join(damaged.values()),
                used,
                ", ".join(f"{step}{DAMAGED}" for step in damaged),
            )

    def wait(self) -> None:
        """Waits for files still being written.

        Raises:
          OSError: the last checkpoint could not be written.
        """
        self._writer.wait()

    def close(self) -> None:
        """Waits for files still being written, and ends the writer.

        Raises:
          OSError: the last checkpoint could not be written.
        """
        self._writer.close()


def _check_processes(folder: Path) -> None:
    """Positions in the data are kept by process, and mean nothing to another number of them."""
    saved = {int(path.stem.rpartition("-")[2]) for path in folder.glob("process_*-of-*.json")}
    if saved != {jax.process_count()}:
        raise ValueError(
            f"{folder} has the data positions of {' or '.join(map(str, saved)) or 'no'} processes, "
            f"this run has {jax.process_count()}; resume with as many, or start a new run from the "
            "saved parameters (config.model.path, another --workdir)"
        )


def _agree(action: Callable[[], T]) -> T:
    """Calls `action` in every process; where one cannot use a checkpoint, none does.

    Raises:
      CheckpointError: `action` raised it in this process, or in another.
    """
    result, failure = None, None
    try:
        result = action()
    except CheckpointError as error:
        failure = str(error)
    failures = [found for found in processes.gather(failure) if found is not None]
    if failures:
        raise CheckpointError(failures[0])
    return cast(T, result)


def _check_files(folder: Path) -> None:
    """Every file is as it was written. Processes share the reading."""
    if is_sealed(folder):
        damage = find_damage(folder, process=jax.process_index(), count=jax.process_count())
    else:
        missing = [item for item in ITEMS if not (folder / item).is_dir()]
        damage = f"{folder} has no {' and no '.join(missing)}" if missing else None
    if damage:
        raise CheckpointError(damage)


def _check_structure(folder: Path, target: TrainState) -> None:
    """The arrays are those of this run's model and optimiser: names, shapes and dtypes."""
    try:
        params = saved_tree(folder / "params")
        optimizer = saved_tree(folder / "optimizer")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder} cannot be read: {str(error).splitlines()[0]}") from error
    _check_optimizer(folder / "optimizer", optimizer, _by_name(target.opt_state))
    expected = {"params": target.params, "optimizer": _optimizer_item(target)}
    found = {"params": params, "optimizer": optimizer}
    for item, tree in expected.items():
        saved = {path: _form(array) for path, array in sharding.flatten(found[item]).items()}
        wanted = {path: _form(array) for path, array in sharding.flatten(tree).items()}
        for path in sorted(saved.keys() | wanted.keys()):
            if saved.get(path) != wanted.get(path):
                raise CheckpointError(
                    f"{folder / item}: {path} is {saved.get(path, 'not there')}; the run's config makes it "
                    f"{wanted.get(path, 'not there')}"
                )


def _form(array: Any) -> str:
    return f"{np.dtype(array.dtype).name}{list(array.shape)}"


def _check_optimizer(
    folder: Path, saved_state: Mapping[str, Any], opt_state: Mapping[str, Any]
) -> None:
    """What an optimiser keeps has names, and a checkpoint must have the same."""
    saved = sharding.flatten(saved_state["opt_state"]).keys()
    expected = sharding.flatten(opt_state).keys()
    if saved == expected:
        return
    advice = "start a new run from the saved parameters (config.model.path, another --workdir)"
    if all(name.isdigit() for name in saved):
        raise CheckpointError(
            f"{folder} has the optimiser's state by position, as earlier versions wrote it; this version "
            f"reads it by name. Continue with the version that began the run, or {advice}"
        )
    raise CheckpointError(
        f"{folder} has the state of another optimiser: it lacks "
        f"{sorted(expected - saved)[:3] or 'nothing'} and has {sorted(saved - expected)[:3] or 'nothing'} "
        f"besides; {advice}"
    )


def _optimizer_item(state: TrainState) -> dict[str, Any]:
    """What a checkpoint keeps beside the parameters, as a nested dict."""
    learned = {} if state.loss is None else {"loss": state.loss}
    return {"step": state.step, "opt_state": _by_name(state.opt_state), **learned}


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
