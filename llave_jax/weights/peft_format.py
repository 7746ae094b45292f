"""Adapters in the format of the peft library: adapter_config.json and adapter_model.safetensors.

    base_model.model.MODULE.lora_A.weight    [rank, inputs]
    base_model.model.MODULE.lora_B.weight    [outputs, rank]

MODULE is what the authors' code or transformers calls the module (`hf_names.LAYOUTS`). Nothing is unpickled. Variants
of LoRA that change more than the sum of a weight and a product are refused by name.
"""

from __future__ import annotations

import logging
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.common.files import staged_directory
from llave_jax.common.ranges import ConfigError, check_real, check_whole
from llave_jax.models.config import LlaveConfig
from llave_jax.models.lora import Lora
from llave_jax.models.parameters import (
    LORA_A,
    LORA_B,
    input_axes,
    layer_shape,
    num_layers,
    weight_at,
)
from llave_jax.weights.adapter import Adapter, Delta
from llave_jax.weights.hf_names import LAYOUTS, HfTensor, find_tensor
from llave_jax.weights.json_files import read_json, section, write_json
from llave_jax.weights.safetensors_io import (
    CheckpointError,
    SafetensorsFile,
    SafetensorsWriter,
    check_finite,
    encode_header,
)

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What peft puts in front of a module's name.
_WRAPPER = "base_model.model."
_FACTOR = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# Patterns that could take for ever to match: a repeated group, or many repetitions.
_INTRICATE = re.compile(r"\)[*+?{]|([*+{].*){4}", re.DOTALL)
# Settings with which an adapter is more than a product that is added, and what to do instead.
_PLAIN = (
    "train a plain LoRA, or merge the adapter with peft (merge_and_unload) and convert the result"
)
_REFUSED: dict[str, tuple[Any, ...]] = {
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    # Other ways to begin change the base's weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}

logger = logging.getLogger(__name__)


def is_peft(path: str | os.PathLike) -> bool:
    """Whether a directory holds an adapter in this format, whole or not.

    Args:
      path: may be missing.

    Returns:
      True if it has an adapter_config.json.
    """
    return (Path(path) / CONFIG).is_file()


def read_peft(path: str | os.PathLike, config: LlaveConfig) -> Adapter:
    """Reads an adapter.

    Modules that embeddings do not pass through (the LM head, the head of the vision tower) are left out, with a
    warning.

    Args:
      path: the directory, of modules that are named in either layout.
      config: of the model that it is for.

    Returns:
      The adapter.

    Raises:
      CheckpointError: a file is missing or broken, the adapter is of another kind, or it does not fit the model.
    """
    path = Path(path)
    settings = read_json(path / CONFIG)
    _refuse_others(settings, path / CONFIG)
    weights = path / WEIGHTS
    if not weights.is_file():
        pickled = sorted(path.glob("*.bin"))
        hint = "pickled weights can run code when read, and are not" if pickled else "no such file"
        raise CheckpointError(f"{weights}: {hint}; expected the adapter as peft saves it")
    file = SafetensorsFile(weights)
    deltas, unused = {}, []
    for module, names in _pairs(file).items():
        tensor = _find(module)
        if tensor is None:
            raise CheckpointError(
                f"{weights}: {module} is no module of the model; expected the names of the authors' code or of "
                "transformers' LlavaOnevision"
            )
        row = tensor.weight
        layers = num_layers(row, config) if row.path else 0
        if not row.path or (layers is not None and (tensor.layer or 0) >= layers):
            if row.path and row.tower == "text":
                raise CheckpointError(f"{weights}: {module}: the model has {layers} layers")
            unused.append(module)
            continue
        if row.transform != "transpose":
            raise CheckpointError(f"{weights}: {module} is not a linear map; {_PLAIN}")
        shape = layer_shape(row, config)
        count = input_axes(row)
        inputs, outputs = shape[:count], shape[count:]
        a, b = (_read(file, names[side], weights) for side in "AB")
        rank = a.shape[0]
        if a.shape != (rank, math.prod(inputs)) or b.shape != (math.prod(outputs), rank):
            raise CheckpointError(
                f"{weights}: {module} has factors {list(a.shape)} and {list(b.shape)}; expected "
                f"[rank, {math.prod(inputs)}] and [{math.prod(outputs)}, rank]"
            )
        key = row.path, tensor.layer
        if key in deltas:
            raise CheckpointError(f"{weights}: {module} is there twice")
        scale = _scale(settings, module, rank, path / CONFIG)
        deltas[key] = Delta(a.T.reshape(*inputs, rank), b.T.reshape(rank, *outputs), scale)
    if unused:
        logger.warning(
            "%s: left out, as embeddings do not pass through them: %s%s",
            *(path, ", ".join(unused[:3]), f" and {len(unused) - 3} more" if unused[3:] else ""),
        )
    if not deltas:
        raise CheckpointError(f"{weights}: has no adapter of this model")
    return Adapter(deltas)


def write_peft(
    output: str | os.PathLike,
    arrays: Mapping[str, np.ndarray],
    lora: Lora,
    layout: str,
    *,
    base_model: str | None = None,
) -> None:
    """Writes an adapter, whole or not at all.

    Args:
      output: the directory to make.
      arrays: path -> float32 array in the shapes of `parameters.adapter_shapes`.
      lora: what was trained.
      layout: a key of `hf_names.LAYOUTS`: what modules are called.
      base_model: what the adapter says of the base, such as its name on the hub.

    Raises:
      FileExistsError: `output` exists and is not empty.
      ValueError: there is no such layout.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    output = Path(output)
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise FileExistsError(f"{output} exists; choose another output")
    # The last of a layout's prefixes is what modules are called while a model runs.
    prefixes = {key: options[-1] for key, options in LAYOUTS[layout].items()}
    tensors: dict[str, np.ndarray] = {}
    modules = []
    for module in lora.modules:
        for name in (LORA_A, LORA_B):
            row, array = weight_at(f"{module}/{name}"), np.asarray(arrays[f"{module}/{name}"])
            for layer in range(len(array)) if row.stacked else (None,):
                factor = (array if layer is None else array[layer]).astype(np.float32)
                flat = factor.reshape((-1, lora.rank) if name == LORA_A else (lora.rank, -1))
                hf_name = row.hf_name.format(n=layer, **prefixes)
                tensors[_WRAPPER + hf_name] = np.ascontiguousarray(flat.T)
                if name == LORA_A:
                    modules.append(hf_name.removesuffix(".lora_A.weight"))
    settings = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "use_rslora": lora.rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        # One by one: the vision tower of other software has a layer more, which LLaVE does not run.
        "target_modules": modules,
    }
    with staged_directory(output) as staged:
        write_json(staged / CONFIG, settings)
        infos = {name: (array.dtype, array.shape) for name, array in sorted(tensors.items())}
        with SafetensorsWriter(staged / WEIGHTS, encode_header(infos, {"format": "pt"})) as writer:
            for name, array in tensors.items():
                writer.write(name, array)


def _refuse_others(settings: Mapping[str, Any], where: Path) -> None:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{where}: peft_type is {kind!r:.60}; expected 'LORA'. {_PLAIN}")
    for key, allowed in _REFUSED.items():
        value = settings.get(key)
        if not any(value is each or value == each for each in allowed):
            raise CheckpointError(f"{where}: {key} is {value!r:.60}, which is not read; {_PLAIN}")


def _pairs(file: SafetensorsFile) -> dict[str, dict[str, str]]:
    """Module -> {"A": tensor's name, "B": tensor's name}."""
    found: dict[str, dict[str, str]] = {}
    for name in file.tensors:
        matched = _FACTOR.fullmatch(name.removeprefix(_WRAPPER))
        if matched is None or not name.startswith(_WRAPPER):
            raise CheckpointError(
                f"{file.path}: {name:.100} is not a factor of a LoRA ({_WRAPPER}MODULE.lora_A.weight); {_PLAIN}"
            )
        found.setdefault(matched["module"], {})[matched["side"]] = name
    for module, sides in found.items():
        if len(sides) < 2:
            raise CheckpointError(f"{file.path}: {module} has lora_{next(iter(sides))} alone")
    return found


def _find(module: str) -> HfTensor | None:
    """The weight of a module in either layout; a model without its outer class has no `model.` in front."""
    for name in (f"{module}.weight", f"model.{module}.weight"):
        for layout in LAYOUTS:
            tensor = find_tensor(name, layout)
            if tensor is not None:
                return tensor
    return None


def _read(file: SafetensorsFile, name: str, where: Path) -> np.ndarray:
    array = file.read(name)
    check_finite(array, name, where)
    if array.ndim != 2:
        raise CheckpointError(f"{where}: {name} has {array.ndim} axes; expected 2")
    return array.astype(np.float32)


def _scale(settings: Mapping[str, Any], module: str, rank: int, where: Path) -> float:
    """What the product of a module's factors is multiplied with: alpha / rank, or alpha / sqrt(rank)."""
    alpha = settings.get("lora_alpha", 8)
    for pattern, own in section(settings, "alpha_pattern", where).items():
        if _INTRICATE.search(pattern):
            raise CheckpointError(
                f"{where}: alpha_pattern {pattern!r:.60} is too intricate; expected names of modules, or patterns "
                "with up to three repetitions and none of a group"
            )
        try:
            matches = re.match(rf"(.*\.)?({pattern})$", module)
        except re.error as error:
            raise CheckpointError(f"{where}: alpha_pattern {pattern!r:.60}: {error}") from error
        if matches:
            alpha = own
            break
    try:
        check_real("lora_alpha", alpha, -1e9, 1e9)
        check_whole("r", rank, 1, 1 << 20)
    except ConfigError as error:
        raise CheckpointError(f"{where}: {module}: {error}") from error
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
