"""A model that is to be written as a Hugging Face directory, read tensor by tensor.

A model directory keeps what its Hugging Face checkpoint was made of (`from_hf`). Here it is found
again, for models that came from one and for models that did not.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.common.paths import OutsideRoot, check_links, is_plain_name
from llave_jax.models.parameters import EMBEDDING, LM_HEAD, num_layers
from llave_jax.weights import hf_names, model_dir
from llave_jax.weights.adapted import parts_of
from llave_jax.weights.hf_names import LAYOUTS, HfTensor
from llave_jax.weights.json_files import read_json
from llave_jax.weights.safetensors_io import (
    CheckpointError,
    SafetensorsFile,
    TensorInfo,
    check_finite,
    parse_header,
)


@dataclasses.dataclass(frozen=True)
class Origin:
    """The Hugging Face directory that a model was converted from.

    Attributes:
      layout: "llave" or "onevision"; None for a model made here.
      config: content of its config.json.
      headers: weight file -> header, verbatim.
    """

    layout: str | None
    config: dict[str, Any]
    headers: dict[str, str]


class ExportSource:
    """A model directory, or a training run.

    Attributes:
      directory: the model directory; of a run, the one in it.
      config: the model's configuration.
      origin: the Hugging Face directory it was converted from.
      as_converted: whether the weights are still those of that directory.
      carried: tensor -> name, of the tensors that were carried along.
      adapters: that are added to the weights.
      stored: path -> dtype of the parameter.
      dtypes: path -> dtype in the directory it was converted from; without one, of the parameter.

    Args:
      path: the model directory or training run.
      adapter: what is added to its weights, as of `adapted.parts_of`; None: nothing.

    Raises:
      CheckpointError: it is neither, or has no weights; a link leads out of it, or what it says of the
        checkpoint that it came from does not fit the model.
    """

    def __init__(self, path: str | os.PathLike, adapter: str | os.PathLike | None = None):
        base, self.adapters = parts_of(path, adapter)
        self._params = model_dir.open_base(base)
        self.directory = model_dir.locate(path)
        try:
            check_links(self.directory)
        except OutsideRoot as error:
            raise CheckpointError(str(error)) from error
        self.config = model_dir.load_config(self.directory)
        self.origin = _read_origin(self.directory)
        # Parameters in a file are read, not mapped: mapped pages would stay in memory.
        in_file = model_dir.locate(base) == base
        self._file = SafetensorsFile(base / model_dir.WEIGHTS) if in_file else None
        self.as_converted = (
            self._file is not None and not self.adapters and model_dir.is_as_converted(self._file)
        )
        self._last: tuple[str, np.ndarray] | None = None

        carried = self.directory / model_dir.CARRIED
        self._carried = SafetensorsFile(carried) if carried.is_file() else None
        self.carried = self._known(self._carried.tensors) if self._carried else {}

        self.stored = {path: np.dtype(array.dtype) for path, array in self._params.items()}
        self.dtypes = dict(self.stored)
        for name, info in self._original_tensors().items():
            tensor = hf_names.find_tensor(name, str(self.origin.layout))
            if tensor is not None and tensor.weight.path:
                self.dtypes[tensor.weight.path] = info.dtype

    def read(self, tensor: HfTensor) -> np.ndarray:
        """A tensor in its Hugging Face shape.

        Read all layers of a parameter before the next parameter: a run's parameters are loaded whole, one at
        a time.

        Args:
          tensor: a carried tensor, or one of a parameter. The LM head, if it was not carried along, is the
            token embedding.

        Returns:
          An array of `hf_names.hf_shape`, in the dtype in which it is kept here.
        """
        if self._carried is not None and tensor in self.carried:
            name = self.carried[tensor]
            array = self._carried.read(name)
            check_finite(array, name, self._carried.path)
            return array
        weight = EMBEDDING if tensor.weight == LM_HEAD else tensor.weight
        parameter = self.parameter(weight.path, tensor.layer)
        check_finite(parameter, weight.path, self.directory)
        return hf_names.to_hf(weight, parameter, self.config)

    def _original_tensors(self) -> dict[str, TensorInfo]:
        """The tensors that the original files had. They are checked before a file of their size is made."""
        where = self.directory / model_dir.LAYOUT
        tensors: dict[str, TensorInfo] = {}
        for file, header in self.origin.headers.items():
            for name, info in parse_header(header, f"{where}: {file}").items():
                tensor = hf_names.find_tensor(name, str(self.origin.layout))
                if tensor is None or name in tensors or not self._has(tensor, info.shape):
                    raise CheckpointError(
                        f"{where}: {file} has the tensor {name} {list(info.shape)}, which is not one of this model's"
                    )
                tensors[name] = info
        if self.origin.layout is not None:
            found = {hf_names.find_tensor(name, self.origin.layout) for name in tensors}
            lost = [t for t in hf_names.parameter_tensors(self.config) if t not in found]
            if lost:
                raise CheckpointError(
                    f"{where}: lists no tensor {hf_names.hf_name(lost[0], self.origin.layout)}"
                )
        return tensors

    def _has(self, tensor: HfTensor, shape: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape can be read here."""
        if self._carried is not None and tensor in self.carried:
            return self._carried.tensors[self.carried[tensor]].shape == shape
        weight = EMBEDDING if tensor.weight == LM_HEAD else tensor.weight
        layers = num_layers(weight, self.config) if weight.path else None
        layer_exists = tensor.layer is None if layers is None else (tensor.layer or 0) < layers
        return (
            bool(weight.path) and layer_exists and hf_names.hf_shape(weight, self.config) == shape
        )

    def _known(self, names: Iterable[str]) -> dict[HfTensor, str]:
        """Tensor -> name, of those names that the origin's layout knows."""
        if self.origin.layout is None:
            return {}
        found = {name: hf_names.find_tensor(name, self.origin.layout) for name in names}
        return {tensor: name for name, tensor in found.items() if tensor is not None}

    def parameter(self, path: str, layer: int | None) -> np.ndarray:
        """A parameter, or one layer of it, in our shape; read in the order of `read`.

        Args:
          path: of the parameter.
          layer: of a stacked parameter; None otherwise.

        Returns:
          An array in the dtype in which it is kept here.
        """
        weight = self._base_parameter(path, layer)
        for adapter in self.adapters:
            weight = adapter.add(path, layer, weight)
        return weight

    def _base_parameter(self, path: str, layer: int | None) -> np.ndarray:
        if self._file is not None:
            return self._file.read(path, layer)
        if self._last is None or self._last[0] != path:
            self._last = None  # frees it before the next one is loaded
            self._last = path, np.asarray(self._params[path])
        array = self._last[1]
        return array if layer is None else array[layer]


def _read_origin(source: Path) -> Origin:
    if not (source / model_dir.LAYOUT).is_file():
        return Origin(None, {}, {})
    where = source / model_dir.LAYOUT
    values = read_json(where)
    entries = values.get("weights")
    if values.get("layout") not in tuple(LAYOUTS) or not isinstance(entries, list):
        raise CheckpointError(
            f"{where}: expected a layout of {', '.join(LAYOUTS)} and its weight files"
        )
    headers: dict[str, str] = {}
    for entry in entries:
        file, header = (
            entry.get(key) if isinstance(entry, dict) else None for key in ("file", "header")
        )
        # A file of this name is written: it must not lie anywhere else, or replace another.
        named = is_plain_name(file) and str(file).endswith(".safetensors") and file not in headers
        if not named or not isinstance(header, str):
            raise CheckpointError(
                f"{where}: lists the weight file {file!r:.100}; expected the name of a .safetensors file and its header"
            )
        headers[str(file)] = header
    return Origin(
        layout=values["layout"],
        config=read_json(source / model_dir.SOURCE / "config.json"),
        headers=headers,
    )
