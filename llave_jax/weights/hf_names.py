"""Tensor names and arrays of Hugging Face checkpoints to ours, and back.

Which weights there are says the table, `llave_jax.models.parameters`. What differs between the two
Hugging Face layouts are only the prefixes of the names: they are here.
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

# The prefixes of each layout. Where several are in use, the first is the one we write.
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

# Weights that a conversion treats by themselves.
POST_LAYERNORM = tuple(w for w in WEIGHTS if "{vision}.post_layernorm" in w.hf_name)
VISION_FC1 = weight_at("vision_tower/layers/mlp/fc1/kernel")


@dataclasses.dataclass(frozen=True)
class Match:
    """What a Hugging Face name stands for: a weight, and the layer if the weight has one."""

    weight: Weight
    layer: int | None = None


@functools.cache
def _patterns(layout: str) -> tuple[tuple[re.Pattern[str], Weight], ...]:
    def pattern(weight: Weight) -> re.Pattern[str]:
        text = re.escape(weight.hf_name).replace(r"\{n\}", r"(?P<layer>0|[1-9]\d*)")
        for key, prefixes in LAYOUTS[layout].items():
            options = "|".join(re.escape(prefix) for prefix in prefixes)
            text = text.replace(rf"\{{{key}\}}", f"(?:{options})")
        return re.compile(text)

    return tuple((pattern(weight), weight) for weight in WEIGHTS)


def match(name: str, layout: str) -> Match | None:
    """Which row of the table a Hugging Face tensor name is; None if it is none."""
    found = []
    for pattern, weight in _patterns(layout):
        if hit := pattern.fullmatch(name):
            layer = hit.groupdict().get("layer")
            found.append(Match(weight, None if layer is None else int(layer)))
    if len(found) > 1:
        rows = ", ".join(hit.weight.hf_name for hit in found)
        raise ValueError(f"tensor name {name} matches several rows of the table of weights: {rows}")
    return found[0] if found else None


def layout_of(tensor_names: Iterable[str]) -> str | None:
    """The layout that knows most of these tensor names; None if neither knows any."""
    known = dict.fromkeys(LAYOUTS, 0)
    for name in tensor_names:
        for layout in LAYOUTS:
            known[layout] += match(name, layout) is not None
    best = max(known, key=known.__getitem__)
    return best if known[best] else None


def hf_name(hit: Match, layout: str) -> str:
    """The name we write for a row of the table in a layout."""
    prefixes = {key: options[0] for key, options in LAYOUTS[layout].items()}
    return hit.weight.hf_name.format(n=hit.layer, **prefixes)


def hf_shape(weight: Weight, config: LlaveConfig) -> tuple[int, ...]:
    """Their shape of a weight's tensor."""
    axes = axis_sizes(weight, config)
    if weight.transform == "patches":
        (rows, columns, channels), (width,) = axes
        return (width, channels, rows, columns)
    merged = [math.prod(axis) for axis in axes]
    return tuple(reversed(merged)) if weight.transform == "transpose" else tuple(merged)


def parameter_matches(config: LlaveConfig) -> list[Match]:
    """All tensors a Hugging Face checkpoint needs for the parameter tree, in the table's order."""
    hits = []
    for weight in WEIGHTS:
        if weight.path is not None:
            layers = num_layers(weight, config)
            hits += [Match(weight)] if layers is None else [Match(weight, n) for n in range(layers)]
    return hits


def to_ours(weight: Weight, array: np.ndarray, config: LlaveConfig) -> np.ndarray:
    """Their array of one tensor -> ours, without the layer axis."""
    if weight.transform == "patches":
        array = array.transpose(2, 3, 1, 0)
    elif weight.transform == "transpose":
        array = array.T
    return array.reshape(layer_shape(weight, config))


def to_hf(weight: Weight, array: np.ndarray, config: LlaveConfig) -> np.ndarray:
    """Our array of one tensor, without the layer axis -> theirs."""
    shape = hf_shape(weight, config)
    if weight.transform == "patches":
        width, channels, rows, columns = shape
        return array.reshape(rows, columns, channels, width).transpose(3, 2, 0, 1)
    if weight.transform == "transpose":
        return array.reshape(shape[::-1]).T
    return array.reshape(shape)
