"""The parameters of a training run, read from its checkpoints by orbax.

    RUN/checkpoints/STEP/params

`llave_jax.training.checkpoint` writes them, together with what only training needs.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from llave_jax.parallel import sharding
from llave_jax.weights.safetensors_io import CheckpointError

CHECKPOINTS = "checkpoints"


def latest_params(run: Path) -> Path:
    """Finds the parameters of a run's newest complete checkpoint.

    Args:
      run: the run's directory.

    Returns:
      The folder that holds them.

    Raises:
      CheckpointError: the run has no checkpoint.
    """
    steps = _steps(run)
    if not steps:
        raise CheckpointError(f"{run}: this training run has no checkpoint yet")
    return run / CHECKPOINTS / str(max(steps)) / "params"


def has_checkpoint(run: Path) -> bool:
    """Whether a run has a complete checkpoint.

    Args:
      run: the run's directory.

    Returns:
      True if it has one.
    """
    return bool(_steps(run))


def _steps(run: Path) -> list[int]:
    # orbax writes under other names and renames.
    return [int(path.name) for path in run.glob(f"{CHECKPOINTS}/*") if path.name.isdigit()]


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
