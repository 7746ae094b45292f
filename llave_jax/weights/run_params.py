"""The parameters of a training run, read from its checkpoints by orbax.

    RUN/checkpoints/STEP/params

`llave_jax.training.checkpoint` writes them, together with what only training needs.
"""

from __future__ import annotations

import dataclasses
import functools
import logging
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llave_jax.parallel import sharding
from llave_jax.weights.checkpoint_seal import CONTENTS, find_damage, is_sealed
from llave_jax.weights.safetensors_io import CheckpointError

log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
PARAMS = "params"
# Warnings that this process has given.
_said: set[str] = set()


def latest_params(run: Path) -> Path:
    """Finds the parameters of a run's newest checkpoint that is whole.

    Their files are compared with their checksums, once in a process; a damaged checkpoint is passed over with
    a warning.

    Args:
      run: the run's directory.

    Returns:
      The folder that holds them.

    Raises:
      CheckpointError: the run has no checkpoint, or none that can be used.
    """
    folder = run / CHECKPOINTS
    steps = by_preference(folder)
    if not steps:
        raise CheckpointError(f"{run}: this training run has no checkpoint yet")
    damaged = {step: f"{folder / str(step) / CONTENTS} is missing" for step in steps}
    for step in steps:
        params = folder / str(step) / PARAMS
        damage = _damage(params, _signature(params.parent))
        if damage is None:
            newer = "; ".join(why for bad, why in damaged.items() if bad > step)
            if newer and newer not in _said:
                _said.add(newer)
                log.warning("%s; the checkpoint of step %d is used", newer, step)
            return params
        damaged[step] = damage
    if set(checkpoint_steps(folder)) != set(steps):
        # A run that is going on has removed them meanwhile, and has newer ones.
        return latest_params(run)
    raise CheckpointError(f"{run}: no checkpoint can be used: {'; '.join(damaged.values())}")


def by_preference(folder: Path) -> list[int]:
    """The checkpoints of a folder in the order in which they are tried.

    Args:
      folder: of the checkpoints.

    Returns:
      Their steps, the newest first. Those that do not list their files come last: earlier versions wrote such
      checkpoints, but half of a checkpoint looks the same.
    """
    steps = sorted(checkpoint_steps(folder), reverse=True)
    return sorted(steps, key=lambda step: not is_sealed(folder / str(step)))


def has_checkpoint(run: Path) -> bool:
    """Whether a run has checkpoints, be they whole or damaged.

    Args:
      run: the run's directory.

    Returns:
      True if it has one.
    """
    return bool(checkpoint_steps(run / CHECKPOINTS))


def checkpoint_steps(folder: Path) -> list[int]:
    """The steps of the checkpoints in a folder, whole or damaged, but not those being written.

    Args:
      folder: of the checkpoints; need not be there.

    Returns:
      Numbers of optimiser steps, in any order.
    """
    # orbax writes under other names and renames.
    return [int(path.name) for path in folder.glob("*") if path.name.isdigit() and path.is_dir()]


@functools.lru_cache(maxsize=8)
def _damage(params: Path, signature: object) -> str | None:
    """What is wrong with the parameters of a checkpoint, read anew when a file's size or time differs."""
    if is_sealed(params.parent):
        return find_damage(params.parent, params.name)
    try:
        saved_tree(params)
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{params} cannot be read: {(str(error) or repr(error)).splitlines()[0]}"
    return None


def _signature(folder: Path) -> object:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return tuple((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files)


@dataclasses.dataclass(frozen=True)
class RunParam:
    """One parameter of a checkpoint, not yet read. `np.asarray` reads it whole.

    Attributes:
      folder: the checkpoint's parameters.
      path: in the parameter tree, joined by "/".
    """

    folder: Path
    path: str
    shape: tuple[int, ...]
    dtype: np.dtype

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        host = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
        target = jax.ShapeDtypeStruct(self.shape, self.dtype, sharding=host)
        array = np.asarray(_load_one(self.folder, self.path, target))
        return array if dtype is None else array.astype(dtype)


def open_params(folder: Path) -> dict[str, RunParam]:
    """Lists the parameters of a checkpoint, without reading any.

    Args:
      folder: of `latest_params`.

    Returns:
      path -> parameter, which is read when NumPy asks for it.
    """
    return {
        path: RunParam(folder, path, tuple(info.shape), np.dtype(info.dtype))
        for path, info in sharding.flatten(saved_tree(folder)).items()
    }


def load_params(folder: Path, targets: Any) -> Any:
    """Reads the parameters of a checkpoint; each process reads what its own devices hold.

    Args:
      folder: of `latest_params`.
      targets: the parameter tree as `jax.ShapeDtypeStruct`: shape, dtype and sharding of each.

    Returns:
      The tree of `jax.Array`.
    """
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.resolve(), targets)


def saved_tree(folder: Path) -> dict[str, Any]:
    """The shapes and dtypes of the parameters of a checkpoint.

    Args:
      folder: of `latest_params`.

    Returns:
      Nested dict; leaves have `shape` and `dtype`.
    """
    # A StandardCheckpointer would warn: the folder is only part of a checkpoint.
    return ocp.StandardCheckpointHandler().metadata(epath.Path(folder.resolve())).tree


def _load_one(folder: Path, path: str, target: jax.ShapeDtypeStruct) -> jax.Array:
    item = sharding.unflatten({path: target})
    restore = ocp.args.PyTreeRestore(
        item=item,
        restore_args=ocp.checkpoint_utils.construct_restore_args(item),
        partial_restore=True,
    )
    with ocp.PyTreeCheckpointer() as checkpointer:
        return sharding.flatten(checkpointer.restore(folder.resolve(), args=restore))[path]
