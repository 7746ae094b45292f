"""Model directories: the self-contained form of a model that all commands read.

    config.json           LlaveConfig, with the key "llave_jax_format"
    model.safetensors     the parameter tree; names joined by "/", layers stacked on the first axis
    carried.safetensors   tensors the embedding model does not use, kept for converting back
    source/               the other files of the Hugging Face checkpoint, and layout.json
    tokenizer/            for transformers.AutoTokenizer
    prompts.json          named prompts, if the model has any (`prompts.py`)

A training run is a model too: RUN/model is a model directory without model.safetensors, and the weights
are the latest of RUN/checkpoints. Of a run that trains adapters, RUN/model/adapter.json names their base, and the
weights are those of both together (`adapted.py`). The functions that load accept all of these.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llave_jax.common.files import staged_directory
from llave_jax.common.paths import OutsideRoot, check_links
from llave_jax.common.ranges import ConfigError
from llave_jax.models.config import LlaveConfig
from llave_jax.models.parameters import parameter_shapes
from llave_jax.weights import tokenizer_files
from llave_jax.weights.json_files import read_json, write_json
from llave_jax.weights.prompts import PROMPTS, read_prompts
from llave_jax.weights.safetensors_io import (
    CheckpointError,
    SafetensorsFile,
    SafetensorsWriter,
    check_finite,
    encode_header,
)
from llave_jax.weights.tokenizer_files import check_tokenizer_files, copy_tokenizer_files

if TYPE_CHECKING:
    import jax

    from llave_jax.weights.adapter import MergedParam
    from llave_jax.weights.run_params import RunParam

FORMAT_KEY, FORMAT = "llave_jax_format", 1
RUN_MODEL = Path("model")

CONFIG = Path("config.json")
WEIGHTS = Path("model.safetensors")
CARRIED = Path("carried.safetensors")
SOURCE = Path("source")
LAYOUT = SOURCE / "layout.json"
TOKENIZER = Path("tokenizer")
# Of a run that trains adapters: what they are, and the base that they belong to (`adapted.py`).
ADAPTER = Path("adapter.json")

# The metadata in the header of the weights. AS_CONVERTED says that they are still those of the Hugging
# Face checkpoint.
METADATA = {"format": "llave_jax"}
AS_CONVERTED = {**METADATA, "weights": "as converted"}


def is_model_dir(path: str | os.PathLike) -> bool:
    """Whether a path is a model directory, with or without weights.

    Args:
      path: may be missing.

    Returns:
      True if its config.json is in our format.
    """
    config = Path(path) / CONFIG
    if not config.is_file():
        return False
    try:
        return FORMAT_KEY in read_json(config)
    except CheckpointError:
        return False


def is_as_converted(weights: SafetensorsFile) -> bool:
    """Whether a model directory's weights are still those of the checkpoint it was converted from.

    Args:
      weights: the directory's file of weights.

    Returns:
      True if its header says so.
    """
    return json.loads(weights.header).get("__metadata__") == AS_CONVERTED


def locate(path: str | os.PathLike) -> Path:
    """Finds the model directory at a path.

    Args:
      path: a model directory or a training run.

    Returns:
      The path itself, or the model directory in the run.

    Raises:
      CheckpointError: `path` is neither.
    """
    path = Path(path)
    for candidate in (path, path / RUN_MODEL):
        if is_model_dir(candidate):
            return candidate
    hint = "no config.json in it"
    if not path.is_dir():
        hint = "no such directory"
    elif (path / CONFIG).is_file():
        hint = (
            f"its config.json lacks {FORMAT_KEY}. Is it a Hugging Face checkpoint? Convert it: "
            f"python tools/convert_hf.py --input {path} --output DIR"
        )
    raise CheckpointError(f"{path}: neither a model directory nor a training run: {hint}")


def load_config(path: str | os.PathLike) -> LlaveConfig:
    """The configuration of a model.

    Args:
      path: a model directory or a training run.

    Returns:
      The configuration.

    Raises:
      CheckpointError: `path` is neither, or the configuration is of another version or broken.
    """
    file = locate(path) / CONFIG
    values = read_json(file)
    version = values.pop(FORMAT_KEY)
    if version != FORMAT:
        raise CheckpointError(
            f"{file}: {FORMAT_KEY} is {version!r:.60}; this version reads {FORMAT}. "
            "Convert the original checkpoint again."
        )
    try:
        return LlaveConfig.from_dict(values)
    except (ConfigError, TypeError) as error:
        raise CheckpointError(f"{file}: not a model configuration: {error}") from error


def write_config(path: Path, config: LlaveConfig) -> None:
    """Write the config.json of a model directory that is being staged.

    Args:
      path: the directory.
      config: the model's configuration.
    """
    values = {FORMAT_KEY: FORMAT, **config.to_dict()}
    write_json(path / CONFIG, values, sort_keys=False)


def load_prompts(path: str | os.PathLike) -> dict[str, str]:
    """The named prompts of a model.

    Args:
      path: a model directory or a training run.

    Returns:
      name -> text; empty if the model has none.

    Raises:
      CheckpointError: `path` is neither, or its prompts.json is broken.
    """
    return read_prompts(locate(path))


def load_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer of a model.

    Args:
      path: a model directory or a training run.

    Returns:
      A `transformers` tokenizer.

    Raises:
      CheckpointError: `path` is neither, or has no tokenizer.
    """
    directory = locate(path) / TOKENIZER
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; expected the model's tokenizer")
    return tokenizer_files.load_tokenizer(directory)


def open_params(
    path: str | os.PathLike, adapter: str | os.PathLike | None = None
) -> Mapping[str, np.ndarray | RunParam | MergedParam]:
    """The parameters of a model by path, read only when used.

    Args:
      path: a model directory or a training run.
      adapter: what is added to them, as of `adapted.parts_of`; None: nothing.

    Returns:
      path -> parameter. A model directory's are mapped from the file; a run's are read by
      `np.asarray`, each as a whole. With adapters, the sum is in the dtype of the base.

    Raises:
      CheckpointError: no weights; missing, surplus or mis-shaped parameters.
    """
    from llave_jax.weights.adapted import parts_of
    from llave_jax.weights.adapter import MergedParam

    parts = parts_of(path, adapter)
    params = open_base(parts.base)
    if not parts.adapters:
        return params
    return {name: MergedParam(name, array, parts.adapters) for name, array in params.items()}


def open_base(path: Path) -> Mapping[str, np.ndarray | RunParam]:
    """`open_params` of a model that has no adapters.

    Args:
      path: a model directory or a training run.

    Returns:
      path -> parameter.

    Raises:
      CheckpointError: no weights; missing, surplus or mis-shaped parameters.
    """
    directory = locate(path)
    if directory != Path(path):
        from llave_jax.weights import run_params

        params: Mapping[str, Any] = run_params.open_params(run_params.latest_params(Path(path)))
        where = f"{path}: latest checkpoint"
    elif (directory / WEIGHTS).is_file():
        file = SafetensorsFile(directory / WEIGHTS)
        params = {name: file.view(name) for name in sorted(file.tensors)}
        where = str(file.path)
    else:
        raise CheckpointError(f"{directory / WEIGHTS}: no such file; this model has no weights")
    shapes = {name: array.shape for name, array in params.items()}
    check_shapes(shapes, load_config(directory), where)
    return params


def load_params(
    path: str | os.PathLike,
    *,
    mesh: jax.sharding.Mesh | None = None,
    dtype: Any = None,
    adapter: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """The parameter tree of a model as JAX arrays, split over a mesh by the table of weights.

    Every process reads only the slices that its own devices hold.

    Args:
      path: a model directory or a training run.
      mesh: where the arrays go. None: to the first local device.
      dtype: of the arrays. None: as stored.
      adapter: as for `open_params`.

    Returns:
      Nested dict of `jax.Array`.

    Raises:
      CheckpointError: no weights; missing, surplus or mis-shaped parameters.
    """
    import jax

    from llave_jax.models.llave import param_shardings
    from llave_jax.parallel import sharding
    from llave_jax.weights import run_params
    from llave_jax.weights.adapter import MergedParam
    from llave_jax.weights.run_params import RunParam

    arrays = open_params(path, adapter)
    if mesh is not None:
        places = sharding.flatten(param_shardings(sharding.unflatten(arrays), mesh))
    else:
        places = dict.fromkeys(arrays, jax.sharding.SingleDeviceSharding(jax.local_devices()[0]))
    targets = {
        name: jax.ShapeDtypeStruct(array.shape, dtype or array.dtype, sharding=places[name])
        for name, array in arrays.items()
    }
    if any(isinstance(array, RunParam) for array in arrays.values()):
        folder = run_params.latest_params(Path(path))
        return run_params.load_params(folder, sharding.unflatten(targets))
    loaded = {}
    for name, array in arrays.items():
        if isinstance(array, MergedParam) and isinstance(array.base, RunParam):
            # Once, not for every device.
            array = np.asarray(array)
        loaded[name] = _place(_Finite(array, name, locate(path)), targets[name])
    return sharding.unflatten(loaded)


@dataclasses.dataclass(frozen=True)
class _Finite:
    """A tensor of a file. Slices of it are checked when they are read."""

    array: Any
    name: str
    where: Path

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def __getitem__(self, index: Any) -> np.ndarray:
        part = np.ascontiguousarray(self.array[index])
        check_finite(part, self.name, self.where)
        return part


def _place(array: Any, target: jax.ShapeDtypeStruct) -> jax.Array:
    """An array of which each process reads the slices that its own devices hold."""
    import jax

    return jax.make_array_from_callback(
        target.shape,
        target.sharding,
        lambda index: np.asarray(array[index]).astype(target.dtype),
    )


def write_model_dir(
    path: str | os.PathLike,
    config: LlaveConfig,
    params: Mapping[str, Any] | None = None,
    *,
    source: str | os.PathLike | None = None,
    tokenizer: Any = None,
    adapter: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model directory, whole or not at all.

    Args:
      path: the directory to make.
      config: the model's configuration.
      params: parameter tree of arrays, nested or flat; None: a directory without weights.
      source: the model that this one comes from, if any. Its tokenizer, its carried tensors and the
        files of its Hugging Face checkpoint are copied.
      tokenizer: needed without `source`: a transformers tokenizer, or a directory with its files.
      adapter: of a run that trains adapters, the content of adapter.json; None: it has none.
      overwrite: replace a model directory that exists.

    Raises:
      CheckpointError: `params` do not fit `config`, or no tokenizer.
      FileExistsError: `path` exists.
    """
    if source is None and tokenizer is None:
        raise ValueError("give a tokenizer, or the source model to take it from")
    check_output(Path(path), overwrite=overwrite)
    with staged_directory(path) as staged:
        write_config(staged, config)
        if params is not None:
            _write_params(staged / WEIGHTS, config, params)
        if adapter is not None:
            write_json(staged / ADAPTER, dict(adapter))
        if source is not None:
            take_over(locate(source), staged)
        elif isinstance(tokenizer, str | os.PathLike):
            check_tokenizer_files(Path(tokenizer))
            copy_tokenizer_files(Path(tokenizer), staged / TOKENIZER)
        else:
            tokenizer.save_pretrained(str(staged / TOKENIZER))


def take_over(base: Path, target: Path) -> None:
    """Copy all files but config and weights from one model directory to another.

    Args:
      base: a model directory.
      target: one that is being staged.

    Raises:
      CheckpointError: a link leads out of `base`.
    """
    try:
        check_links(base)
    except OutsideRoot as error:
        raise CheckpointError(str(error)) from error
    shutil.copytree(base / TOKENIZER, target / TOKENIZER)
    if (base / SOURCE).is_dir():
        shutil.copytree(base / SOURCE, target / SOURCE)
    for name in (CARRIED, PROMPTS):
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)


def _write_params(path: Path, config: LlaveConfig, params: Mapping[str, Any]) -> None:
    from llave_jax.parallel import sharding

    flat = sharding.flatten(params)
    check_shapes({name: tuple(array.shape) for name, array in flat.items()}, config, "params")
    tensors = {name: (np.dtype(array.dtype), array.shape) for name, array in flat.items()}
    with SafetensorsWriter(path, encode_header(tensors, METADATA)) as writer:
        for name, array in flat.items():
            writer.write(name, np.asarray(array))


def check_shapes(found: Mapping[str, tuple[int, ...]], config: LlaveConfig, where: str) -> None:
    """Refuse parameters that do not fit a configuration.

    Args:
      found: path -> shape of the parameters.
      config: of the model.
      where: the file or argument that they are from, for the message.

    Raises:
      CheckpointError: naming the first that is missing, surplus or of another shape.
    """
    expected = parameter_shapes(config)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{where}: parameter {name}: expected shape {expected.get(name, 'none')}, "
                f"found {found.get(name, 'none')}"
            )


def check_output(path: Path, *, overwrite: bool = False, keep: Path | None = None) -> None:
    """Check that a model may be written to a directory.

    Args:
      path: the directory.
      overwrite: whether a directory that holds a model (a config.json) may be replaced.
      keep: the source, a directory that must neither be replaced nor contain `path`.

    Raises:
      FileExistsError: `path` exists, is not empty, and may not be replaced.
      ValueError: one of `path` and `keep` contains the other.
    """
    path = path.absolute()
    if keep is not None:
        here, there = path.resolve(), keep.resolve()
        if here == there or here in there.parents or there in here.parents:
            raise ValueError(f"the output {path} and the input {keep} lie within one another")
    taken = path.exists() and not (path.is_dir() and not any(path.iterdir()))
    if taken and not overwrite:
        raise FileExistsError(f"{path} exists; choose another output, or give --overwrite")
    if taken and not (path / CONFIG).is_file():
        raise FileExistsError(f"{path} holds no model (no config.json) and is not overwritten")
