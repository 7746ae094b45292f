"""Model directories: the self-contained form of a model that everything else here reads.

    config.json           LlaveConfig, with the key "llave_jax_format"
    model.safetensors     the parameter tree; names joined by "/", layers stacked on the first axis
    carried.safetensors   tensors the embedding model does not use, kept for converting back
    source/               the other files of the Hugging Face checkpoint, and layout.json
    tokenizer/            for transformers.AutoTokenizer

Training runs keep one without model.safetensors; their weights are in orbax checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.convert import names
from llave_jax.convert.safetensors_io import (
    CheckpointError,
    SafetensorsFile,
    SafetensorsWriter,
    encode_header,
)
from llave_jax.models.config import LlaveConfig

FORMAT_KEY, FORMAT = "llave_jax_format", 1

CONFIG = Path("config.json")
WEIGHTS = Path("model.safetensors")
CARRIED = Path("carried.safetensors")
SOURCE = Path("source")
LAYOUT = SOURCE / "layout.json"
TOKENIZER = Path("tokenizer")

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.jinja",
)


def is_model_dir(path: str | os.PathLike) -> bool:
    """Whether `path` is a model directory (with or without weights)."""
    config = Path(path) / CONFIG
    if not config.is_file():
        return False
    try:
        values = json.loads(config.read_text(encoding="utf-8"))
    except ValueError:
        return False
    return isinstance(values, dict) and FORMAT_KEY in values


def load_config(path: str | os.PathLike) -> LlaveConfig:
    """The configuration of a model directory.

    Raises:
      CheckpointError: not a model directory, or one of another version.
    """
    path = Path(path)
    if not is_model_dir(path):
        hint = "no config.json in it"
        if (path / CONFIG).is_file():
            hint = (
                f"its config.json lacks {FORMAT_KEY}. Is it a Hugging Face checkpoint? Convert it: "
                f"python tools/convert_hf.py --input {path} --output DIR"
            )
        raise CheckpointError(f"{path}: not a model directory: {hint}")
    values = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    version = values.pop(FORMAT_KEY)
    if version != FORMAT:
        raise CheckpointError(
            f"{path / CONFIG}: {FORMAT_KEY} is {version}; this version reads {FORMAT}. "
            "Convert the original checkpoint again."
        )
    try:
        return LlaveConfig.from_dict(values)
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path / CONFIG}: not a model configuration: {error!r}") from error


def write_config(path: Path, config: LlaveConfig) -> None:
    """Write the config.json of a model directory."""
    values = {FORMAT_KEY: FORMAT, **config.to_dict()}
    (path / CONFIG).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(path: str | os.PathLike) -> Any:
    """The tokenizer of a model directory, a `transformers` tokenizer."""
    directory = Path(path) / TOKENIZER
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory; expected the model's tokenizer")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)


def open_params(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """path -> array of all parameters, mapped from the file: nothing is read before it is indexed.

    Raises:
      CheckpointError: missing, surplus or mis-shaped parameters.
    """
    path = Path(path)
    config = load_config(path)
    if not (path / WEIGHTS).is_file():
        raise CheckpointError(
            f"{path / WEIGHTS}: no such file; this model directory has no weights"
        )
    file = SafetensorsFile(path / WEIGHTS)
    shapes = {name: info.shape for name, info in file.tensors.items()}
    check_shapes(shapes, config, str(file.path))
    return {name: file.view(name) for name in sorted(shapes)}


def load_params(path: str | os.PathLike, shardings: Any = None, dtype: Any = None) -> dict:
    """The parameter tree of a model directory as JAX arrays.

    Every process reads the slices its own devices hold, nothing else.

    Args:
      path: the model directory.
      shardings: a tree like the parameters of `jax.sharding.Sharding`; None puts everything on the
        first local device.
      dtype: of the arrays; None keeps the one in the file.

    Returns:
      Nested dict of `jax.Array`.
    """
    import jax
    from flax import traverse_util

    arrays = open_params(path)
    if shardings is None:
        device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        flat = dict.fromkeys(arrays, device)
    else:
        flat = traverse_util.flatten_dict(shardings, sep="/")
        if flat.keys() != arrays.keys():
            differing = ", ".join(sorted(flat.keys() ^ arrays.keys()))
            raise ValueError(f"shardings and parameters have different names: {differing}")

    def place(name: str) -> jax.Array:
        array = arrays[name]
        kind = array.dtype if dtype is None else dtype
        return jax.make_array_from_callback(
            array.shape, flat[name], lambda index: np.asarray(array[index]).astype(kind)
        )

    return traverse_util.unflatten_dict({name: place(name) for name in arrays}, sep="/")


def write_model_dir(
    path: str | os.PathLike,
    config: LlaveConfig,
    params: Mapping[str, Any] | None = None,
    *,
    tokenizer: Any = None,
    base: str | os.PathLike | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model directory; it appears when it is complete.

    Args:
      path: the directory to make.
      config: the model's configuration.
      params: parameter tree of arrays, nested or flat; None for a directory without weights.
      tokenizer: a transformers tokenizer or a directory with its files.
      base: instead of `tokenizer`, the model directory this one descends from: its tokenizer, its
        carried tensors and its source are taken over.
      overwrite: replace a model directory that exists.

    Raises:
      CheckpointError: `params` do not fit `config`.
      FileExistsError: `path` exists.
    """
    if (tokenizer is None) == (base is None):
        raise ValueError("give either a tokenizer or a base model directory")
    keep = None if base is None else Path(base)
    with staged_directory(Path(path), overwrite=overwrite, keep=keep) as staged:
        write_config(staged, config)
        if params is not None:
            _write_params(staged / WEIGHTS, config, params)
        if base is not None:
            _take_over(Path(base), staged)
        elif isinstance(tokenizer, str | os.PathLike):
            check_tokenizer_files(Path(tokenizer))
            copy_tokenizer(Path(tokenizer), staged / TOKENIZER)
        else:
            tokenizer.save_pretrained(str(staged / TOKENIZER))


def _take_over(base: Path, target: Path) -> None:
    load_config(base)
    shutil.copytree(base / TOKENIZER, target / TOKENIZER)
    if (base / SOURCE).is_dir():
        shutil.copytree(base / SOURCE, target / SOURCE)
    if (base / CARRIED).is_file():
        shutil.copyfile(base / CARRIED, target / CARRIED)


def _write_params(path: Path, config: LlaveConfig, params: Mapping[str, Any]) -> None:
    from flax import traverse_util

    flat = traverse_util.flatten_dict(dict(params), sep="/")
    check_shapes({name: tuple(array.shape) for name, array in flat.items()}, config, "params")
    tensors = {name: (np.dtype(array.dtype), array.shape) for name, array in flat.items()}
    with SafetensorsWriter(path, encode_header(tensors, {"format": "llave_jax"})) as writer:
        for name, array in flat.items():
            writer.write(name, np.asarray(array))


def check_shapes(found: Mapping[str, tuple[int, ...]], config: LlaveConfig, where: str) -> None:
    expected = names.parameter_shapes(config)
    for name in sorted(expected.keys() | found.keys()):
        if expected.get(name) != found.get(name):
            raise CheckpointError(
                f"{where}: parameter {name}: expected shape {expected.get(name, 'none')}, "
                f"found {found.get(name, 'none')}"
            )


def check_tokenizer_files(directory: Path) -> None:
    """A directory holds what `AutoTokenizer` needs, or a CheckpointError says what is missing."""
    has = {name for name in _TOKENIZER_FILES if (directory / name).is_file()}
    if "tokenizer_config.json" not in has or not (
        "tokenizer.json" in has or {"vocab.json", "merges.txt"} <= has
    ):
        raise CheckpointError(
            f"{directory}: no tokenizer; expected tokenizer_config.json and tokenizer.json (or "
            "vocab.json with merges.txt). Put the tokenizer's files there."
        )


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer's files of one directory into another."""
    target.mkdir(exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


@contextlib.contextmanager
def staged_directory(
    path: Path, *, overwrite: bool = False, keep: Path | None = None
) -> Iterator[Path]:
    """A new directory beside `path` to write into, renamed to `path` at the end; removed instead
    if anything goes wrong.

    Args:
      overwrite: an existing `path` may be replaced, if it holds a model (a config.json).
      keep: a directory that must neither be replaced nor contain `path`, the source.

    Raises:
      FileExistsError: `path` exists, is not empty, and may not be replaced.
      ValueError: `path` and `keep` are one within the other.
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
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    try:
        mask = os.umask(0)
        os.umask(mask)
        staged.chmod(0o777 & ~mask)
        yield staged
        if taken:
            _replace(path, staged)
        else:
            staged.rename(path)
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise


def _replace(path: Path, new: Path) -> None:
    """Put directory `new` in the place of `path`, which stays if that fails."""
    old = new.with_suffix(".replaced")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)
