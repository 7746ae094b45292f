"""Which base and which adapters a model's path stands for.

    RUN/model/adapter.json      of a run that trained adapters: the base that they belong to, and what they are

Owns that file. The sum of both is `adapter.py`.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llave_jax.common.ranges import ConfigError, check_real, check_whole
from llave_jax.models.lora import Lora
from llave_jax.models.parameters import linear_maps
from llave_jax.weights import model_dir, peft_format, run_params
from llave_jax.weights.adapter import Adapter, adapter_of
from llave_jax.weights.fingerprint import weights_fingerprint
from llave_jax.weights.json_files import read_json, section
from llave_jax.weights.resolve import resolve_model
from llave_jax.weights.safetensors_io import CheckpointError

# Adapters on a model whose base has adapters, and so on: more than this is a mistake, or a circle.
_MAX_DEPTH = 8


@dataclasses.dataclass(frozen=True)
class Record:
    """What a run says of the adapters that it trains.

    Attributes:
      model: the base as the user named it.
      path: the base on this machine: a model directory or a run.
      fingerprint: of its weights, `fingerprint.weights_fingerprint`.
      lora: the adapters.
    """

    model: str
    path: str
    fingerprint: str
    lora: Lora

    def values(self) -> dict[str, Any]:
        """The record for JSON."""
        lora = self.lora
        return {
            "base": {"model": self.model, "path": self.path, "fingerprint": self.fingerprint},
            "lora": {
                "modules": list(lora.modules),
                "rank": lora.rank,
                "alpha": lora.alpha,
                "rslora": lora.rslora,
            },
        }


class Parts(NamedTuple):
    """What a model consists of.

    Attributes:
      base: a model directory, or a run with whole parameters.
      adapters: to be added to it, in this order.
    """

    base: Path
    adapters: tuple[Adapter, ...]


def read_record(path: str | os.PathLike) -> Record | None:
    """What a run says of its adapters.

    Args:
      path: a run, or its model directory.

    Returns:
      The record; None if the model has whole parameters of its own.

    Raises:
      CheckpointError: `path` is no model, or the file is not what was written.
    """
    file = model_dir.locate(path) / model_dir.ADAPTER
    if not file.is_file():
        return None
    values = read_json(file)
    base, lora = section(values, "base", file), section(values, "lora", file)
    for key in ("model", "path", "fingerprint"):
        if not isinstance(base.get(key), str):
            raise CheckpointError(f"{file}: base.{key} is {base.get(key)!r:.60}; expected a text")
    modules, rslora = lora.get("modules"), lora.get("rslora")
    try:
        check_whole("lora.rank", lora.get("rank"), 1, 1 << 20)
        check_real("lora.alpha", lora.get("alpha"), 0, 1e9)
        if not isinstance(modules, list) or not set(modules) <= set(linear_maps()):
            raise ConfigError("lora.modules", "names a module that the model has not")
        if not isinstance(rslora, bool):
            raise ConfigError("lora.rslora", f"is {rslora!r:.60}; expected true or false")
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file}: {error}") from error
    return Record(
        *(base["model"], base["path"], base["fingerprint"]),
        Lora(tuple(modules), int(lora["rank"]), float(lora["alpha"]), rslora),
    )


def parts_of(path: str | os.PathLike, adapter: str | os.PathLike | None = None) -> Parts:
    """The base and the adapters that a model consists of.

    Args:
      path: a model directory or a run.
      adapter: one more adapter for it: a directory in PEFT's format, or a run that trained adapters on it.

    Returns:
      The parts; for most models, `path` alone.

    Raises:
      CheckpointError: a base is not there or has other weights, or an adapter cannot be read or is of another
        model.
    """
    path, found = Path(path), []
    if adapter is not None:
        found.append(open_adapter(adapter, path))
    for _ in range(_MAX_DEPTH):
        record = read_record(path)
        if record is None:
            return Parts(path, tuple(reversed(found)))
        found.append(_adapters(path, record))
        path = _base(path, record)
    raise CheckpointError(f"{path}: its base has adapters whose base has adapters, without end")


def check_base(record: Record, base: Path, run: Path) -> None:
    """Refuses a base that is not the one that a run's adapters belong to.

    Args:
      record: of the run.
      base: a model.
      run: for the message.

    Raises:
      CheckpointError: its weights are others.
    """
    if weights_fingerprint(base) != record.fingerprint:
        raise CheckpointError(
            f"{run} has adapters of {record.model}; the weights of {base} are others than those they were trained "
            "on. Give that model, or train adapters on this one with another --workdir"
        )


def open_adapter(path: str | os.PathLike, base: str | os.PathLike) -> Adapter:
    """Reads an adapter for a model.

    Args:
      path: a directory in PEFT's format, or a run that trained adapters.
      base: the model that it is for. A run's must be the one that it was trained on; PEFT's format does not say
        which that is.

    Returns:
      The adapter.

    Raises:
      CheckpointError: it is neither, is broken, or is of another model.
    """
    path, base = Path(path), Path(base)
    if peft_format.is_peft(path):
        return peft_format.read_peft(path, model_dir.load_config(base))
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such directory; expected an adapter")
    try:
        record = read_record(path)
    except CheckpointError:
        record = None
    if record is None:
        raise CheckpointError(
            f"{path}: neither an adapter ({peft_format.CONFIG}) nor a run that trained adapters"
        )
    check_base(record, base, path)
    return _adapters(path, record)


def trained_adapter(run: str | os.PathLike) -> tuple[Lora, dict[str, np.ndarray]]:
    """What a run has trained, without its base: for writing it in another format.

    Args:
      run: a run that trained adapters.

    Returns:
      The adapters, and path -> array as of `parameters.adapter_shapes`.

    Raises:
      CheckpointError: it is no such run, or has no checkpoint that can be used.
    """
    run, record = Path(run), read_record(run)
    if record is None:
        raise CheckpointError(f"{run}: has no adapters, but parameters of its own; export it whole")
    folder = run_params.latest_params(run)
    arrays = {path: np.asarray(array) for path, array in run_params.open_params(folder).items()}
    adapter_of(arrays, record.lora, model_dir.load_config(run), folder)
    return record.lora, arrays


def _adapters(run: Path, record: Record) -> Adapter:
    folder = run_params.latest_params(run)
    arrays = run_params.open_params(folder)
    return adapter_of(arrays, record.lora, model_dir.load_config(run), folder)


def _base(run: Path, record: Record) -> Path:
    """The base of a run, where it is now."""
    path = Path(record.path)
    if not path.exists():
        try:
            path = resolve_model(record.model)
        except CheckpointError as error:
            raise CheckpointError(
                f"{run} has adapters of a model that is no longer there ({error}). Put it back, or write where it "
                f"is into base.path of {model_dir.locate(run) / model_dir.ADAPTER}"
            ) from error
    check_base(record, path, run)
    return path
