"""Tensor names and arrays of Hugging Face checkpoints to ours, and back.

The table of weights (`llave_jax.models.parameters`) has a row for each weight, with its Hugging Face
name. The two layouts differ only in the prefixes of the names, which are here.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable

import numpy as np

from llave_jax.models.config import LlaveConfig
from llave_jax.models.parameters import (
    WEIGHTS,
    Weight,
    axis_sizes,
    layer_shape,
    num_layers,
    weight_at,
)

# The prefixes of each layout. Checkpoints use any of them; we write the first. The last is what modules are
# called while a model runs (adapters name modules).
#   llave: the authors' code (LlavaQwenForCausalLM).
#   onevision: transformers' LlavaOnevisionForConditionalGeneration. Checkpoints on the hub and
#     those saved by transformers 4 have the first form; transformers 5 drops the inner
#     `vision_model`; a bare state dict has everything below `model`.
LAYOUTS: dict[str, dict[str, tuple[str, ...]]] = {
    "llave": {
        "text": ("model",),
        "vision": ("model.vision_tower.vision_tower.vision_model",),
        "linear_1": ("model.mm_projector.0",),
        "linear_2": ("model.mm_projector.2",),
        "newline": ("model.image_newline",),
        "lm_head": ("lm_head",),
    },
    "onevision": {
        "text": ("language_model.model", "model.language_model"),
        "vision": (
            "vision_tower.vision_model",
            "vision_tower",
            "model.vision_tower.vision_model",
            "model.vision_tower",
        ),
        "linear_1": ("multi_modal_projector.linear_1", "model.multi_modal_projector.linear_1"),
        "linear_2": ("multi_modal_projector.linear_2", "model.multi_modal_projector.linear_2"),
        "newline": ("image_newline", "model.image_newline"),
        "lm_head": ("language_model.lm_head", "lm_head"),
    },
}

# Weights that the conversion singles out.
POST_LAYERNORM = tuple(w for w in WEIGHTS if "{vision}.post_layernorm" in w.hf_name)
VISION_FC1 = weight_at("vision_tower/layers/mlp/fc1/kernel")


@dataclasses.dataclass(frozen=True)
class HfTensor:
    """One tensor of a checkpoint.

    Attributes:
      weight: its row of the table.
      layer: of a stacked weight; otherwise None.
    """

    weight: Weight
    layer: int | None = None


@functools.cache
def _patterns(layout: str) -> tuple[tuple[re.Pattern[str], Weight], ...]:
    """For each row of the table, the pattern of its tensors' names in a layout."""

    def pattern(weight: Weight) -> re.Pattern[str]:
        text = re.escape(weight.hf_name).replace(r"\{n\}", r"(?P<layer>0|[1-9]\d*)")
        for key, prefixes in LAYOUTS[layout].items():
            options = "|".join(re.escape(prefix) for prefix in prefixes)
            text = text.replace(rf"\{{{key}\}}", f"(?:{options})")
        return re.compile(text)

    return tuple((pattern(weight), weight) for weight in WEIGHTS)


def find_tensor(name: str, layout: str) -> HfTensor | None:
    """Finds the tensor that a name means.

    Args:
      name: in a checkpoint.
      layout: a key of LAYOUTS.

    Returns:
      The tensor; None if the layout has no such name.

    Raises:
      ValueError: several rows of the table have this name.
    """
    found = []
    for pattern, weight in _patterns(layout):
        if matched := pattern.fullmatch(name):
            layer = matched.groupdict().get("layer")
            found.append(HfTensor(weight, None if layer is None else int(layer)))
    if len(found) > 1:
        rows = ", ".join(tensor.weight.hf_name for tensor in found)
        raise ValueError(f"tensor name {name} matches several rows of the table of weights: {rows}")
    return found[0] if found else None


def layout_of(tensor_names: Iterable[str]) -> str | None:
    """Finds the layout that tensors are named in.

    Args:
      tensor_names: of a checkpoint.

    Returns:
      The key of LAYOUTS that knows most of the names; None if neither knows any.
    """
    known = dict.fromkeys(LAYOUTS, 0)
    for name in tensor_names:
        for layout in LAYOUTS:
            known[layout] += find_tensor(name, layout) is not None
    best = max(known, key=known.__getitem__)
    return best if known[best] else None


def hf_name(tensor: HfTensor, layout: str) -> str:
    """The name under which we write a tensor.

    Args:
      tensor: to write.
      layout: a key of LAYOUTS.

    Returns:
      The name with the layout's first prefix.
    """
    prefixes = {key: options[0] for key, options in LAYOUTS[layout].items()}
    return tensor.weight.hf_name.format(n=tensor.layer, **prefixes)


def parameter_tensors(config: LlaveConfig) -> list[HfTensor]:
    """The tensors that the parameters of a model are made of, without those that are only carried along.

    Args:
      config: of the model.

    Returns:
      The tensors in the table's order, each layer's by itself.
    """
    tensors = []
    for weight in WEIGHTS:
        if weight.path:
            layers = num_layers(weight, config)
            numbers = [None] if layers is None else range(layers)
            tensors += [HfTensor(weight, number) for number in numbers]
    return tensors


def hf_shape(weight: Weight, config: LlaveConfig) -> tuple[int, ...]:
    """The shape of a weight's tensor in a checkpoint.

    Args:
      weight: the row of the table.
      config: of the model.

    Returns:
      The shape; of a stacked weight, the shape of one layer.
    """
    axes = axis_sizes(weight, config)
    if weight.transform == "patches":
        (rows, columns, channels), (width,) = axes
        return (width, channels, rows, columns)
    merged = [math.prod(axis) for axis in axes]
    return tuple(reversed(merged)) if weight.transform == "transpose" else tuple(merged)


def from_hf(weight: Weight, array: np.ndarray, config: LlaveConfig) -> np.ndarray:
    """A checkpoint's tensor as our parameter.

    Args:
      weight: the row of the table.
      array: of `hf_shape`.
      config: of the model.

    Returns:
      The same numbers in `parameters.layer_shape`, without the layer axis.
    """
    if weight.transform == "patches":
        array = array.transpose(2, 3, 1, 0)
    elif weight.transform == "transpose":
        array = array.T
    return array.reshape(layer_shape(weight, config))


def to_hf(weight: Weight, array: np.ndarray, config: LlaveConfig) -> np.ndarray:
    """A parameter as a checkpoint's tensor: the inverse of `from_hf`.

    Args:
      weight: the row of the table.
      array: of `parameters.layer_shape`.
      config: of the model.

    Returns:
      The same numbers in `hf_shape`.
    """
    shape = hf_shape(weight, config)
    if weight.transform == "patches":
        width, channels, rows, columns = shape
        return array.reshape(rows, columns, channels, width).transpose(3, 2, 0, 1)
    if weight.transform == "transpose":
        return array.reshape(shape[::-1]).T
    return array.reshape(shape)
