"""The table of weights: one row says all that is known of a parameter.

A row has the parameter's path here and its name in checkpoints, its shape, the mesh axes that it is
split over, and whether weight decay applies. Shapes, shardings, the decay mask and the conversion of
checkpoints (`llave_jax.weights`) come from this table. A test compares it with what the Linen modules
make. A new parameter is a new row.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any

from llave_jax.models.config import LlaveConfig


@dataclasses.dataclass(frozen=True)
class Weight:
    """One row of the table.

    Attributes:
      path: in our parameter tree, joined by "/". Empty for a weight that checkpoints have and the
        embedding model does not use: conversion carries it along.
      hf_name: in Hugging Face checkpoints. `{text}` and the like stand for a layout's prefixes
        (`weights.hf_names.LAYOUTS`), `{n}` for the layer.
      shape: our shape without the layer axis, in the words of `sizes`. `a*b` is one axis in the
        checkpoint and two here.
      axes: mesh axis of each of our dimensions without the layer axis; None leaves one whole.
      transform: what turns the checkpoint's array into ours.
        "copy": the same elements in the same order.
        "transpose": the two axes change places, as a torch Linear is [out, in].
        "patches": a convolution [out, channel, row, column] becomes a matrix
          [row * column * channel, out].
      decay: weight decay applies.
    """

    path: str
    hf_name: str
    shape: str
    axes: tuple[str | None, ...] = ()
    transform: str = "copy"
    decay: bool = False

    @property
    def stacked(self) -> bool:
        """Whether each layer has such a weight. Our parameter stacks them: its first axis counts layers."""
        return "{n}" in self.hf_name

    @property
    def tower(self) -> str:
        """The tower that a stacked weight belongs to: "vision" or "text"."""
        return "vision" if "{vision}" in self.hf_name else "text"


def _vector(path: str, hf_name: str, shape: str) -> Weight:
    """A vector of a tower's width. It is small, so every device has it whole; it does not decay."""
    return Weight(path, hf_name, shape, (None,))


def _layer_norm(path: str, hf_name: str) -> list[Weight]:
    return [
        _vector(path and f"{path}/scale", f"{hf_name}.weight", "v_width"),
        _vector(path and f"{path}/bias", f"{hf_name}.bias", "v_width"),
    ]


def _linear(
    path: str,
    hf_name: str,
    shape: str,
    inputs: tuple[str | None, ...] = (),
    outputs: tuple[str | None, ...] = (),
    *,
    bias: bool = True,
) -> list[Weight]:
    """A torch Linear.

    Args:
      shape: of our kernel, "in out".
      inputs: mesh axes of the kernel's input dimensions.
      outputs: mesh axes of its output dimensions.
      bias: whether it has one.
    """
    kernel = Weight(
        path and f"{path}/kernel",
        f"{hf_name}.weight",
        shape,
        (*inputs, *outputs),
        transform="transpose",
        decay=True,
    )
    if not bias:
        return [kernel]
    # A device needs the biases of the outputs that it computes. Splitting them over fsdp as well would
    # save little memory and cost a gather.
    axes = tuple(axis if axis == "tensor" else None for axis in outputs)
    return [
        kernel,
        Weight(path and f"{path}/bias", f"{hf_name}.bias", shape.split()[1], axes),
    ]


def _qwen2_layer(path: str, hf_name: str) -> list[Weight]:
    attention, hf_attention = f"{path}/self_attn", f"{hf_name}.self_attn"
    mlp, hf_mlp = f"{path}/mlp", f"{hf_name}.mlp"
    width, heads, features = ("fsdp",), ("tensor", None), ("tensor",)
    return [
        _vector(f"{path}/input_layernorm/scale", f"{hf_name}.input_layernorm.weight", "width"),
        *_linear(f"{attention}/q_proj", f"{hf_attention}.q_proj", "width heads*head", width, heads),
        *_linear(f"{attention}/k_proj", f"{hf_attention}.k_proj", "width kv*head", width, heads),
        *_linear(f"{attention}/v_proj", f"{hf_attention}.v_proj", "width kv*head", width, heads),
        *_linear(
            f"{attention}/o_proj",
            f"{hf_attention}.o_proj",
            "heads*head width",
            heads,
            width,
            bias=False,
        ),
        _vector(
            f"{path}/post_attention_layernorm/scale",
            f"{hf_name}.post_attention_layernorm.weight",
            "width",
        ),
        *_linear(
            f"{mlp}/gate_proj", f"{hf_mlp}.gate_proj", "width mlp", width, features, bias=False
        ),
        *_linear(f"{mlp}/up_proj", f"{hf_mlp}.up_proj", "width mlp", width, features, bias=False),
        *_linear(
            f"{mlp}/down_proj", f"{hf_mlp}.down_proj", "mlp width", features, width, bias=False
        ),
    ]


def _siglip_layer(path: str, hf_name: str) -> list[Weight]:
    attention, hf_attention = f"{path}/self_attn", f"{hf_name}.self_attn"
    width, heads, features = ("fsdp",), ("tensor", None), ("tensor",)
    projections = [
        weight
        for name in ("q_proj", "k_proj", "v_proj")
        for weight in _linear(
            f"{attention}/{name}",
            f"{hf_attention}.{name}",
            "v_width v_heads*v_head",
            width,
            heads,
        )
    ]
    return [
        *_layer_norm(f"{path}/layer_norm1", f"{hf_name}.layer_norm1"),
        *projections,
        *_linear(
            f"{attention}/out_proj",
            f"{hf_attention}.out_proj",
            "v_heads*v_head v_width",
            heads,
            width,
        ),
        *_layer_norm(f"{path}/layer_norm2", f"{hf_name}.layer_norm2"),
        *_linear(f"{path}/mlp/fc1", f"{hf_name}.mlp.fc1", "v_width v_mlp", width, features),
        *_linear(f"{path}/mlp/fc2", f"{hf_name}.mlp.fc2", "v_mlp v_width", features, width),
    ]


def _carried(hf_name: str) -> list[Weight]:
    """What follows the layers of a SigLIP tower. LLaVE does not run it."""
    head = f"{hf_name}.head"
    return [
        *_layer_norm("", f"{hf_name}.post_layernorm"),
        Weight("", f"{head}.probe", "1 1 v_width"),
        Weight("", f"{head}.attention.in_proj_weight", "3*v_width v_width"),
        Weight("", f"{head}.attention.in_proj_bias", "3*v_width"),
        *_linear("", f"{head}.attention.out_proj", "v_width v_width"),
        *_layer_norm("", f"{head}.layernorm"),
        *_linear("", f"{head}.mlp.fc1", "v_width v_mlp"),
        *_linear("", f"{head}.mlp.fc2", "v_mlp v_width"),
    ]


EMBEDDING = Weight(
    "language_model/embed_tokens/embedding",
    "{text}.embed_tokens.weight",
    "vocab width",
    ("tensor", "fsdp"),
    decay=True,
)
PATCH_EMBEDDING = Weight(
    "vision_tower/patch_embedding/kernel",
    "{vision}.embeddings.patch_embedding.weight",
    "patch*patch*channels v_width",
    (None, "fsdp"),
    transform="patches",
    decay=True,
)
POSITION_EMBEDDING = Weight(
    "vision_tower/position_embedding",
    "{vision}.embeddings.position_embedding.weight",
    "positions v_width",
    (None, None),
    decay=True,
)
LM_HEAD = Weight("", "{lm_head}.weight", "vocab width")
# The two factors of an adapter, parameters of the linear map that it is added to: [*in, rank] and
# [rank, *out].
LORA_A, LORA_B = "lora_a", "lora_b"

WEIGHTS: tuple[Weight, ...] = (
    EMBEDDING,
    *_qwen2_layer("language_model/layers", "{text}.layers.{n}"),
    _vector("language_model/norm/scale", "{text}.norm.weight", "width"),
    *_linear("projector/linear_1", "{linear_1}", "v_width width", ("fsdp",), ("tensor",)),
    *_linear("projector/linear_2", "{linear_2}", "width width", ("tensor",), ("fsdp",)),
    _vector("image_newline", "{newline}", "width"),
    PATCH_EMBEDDING,
    _vector(
        "vision_tower/patch_embedding/bias", "{vision}.embeddings.patch_embedding.bias", "v_width"
    ),
    POSITION_EMBEDDING,
    *_siglip_layer("vision_tower/layers", "{vision}.encoder.layers.{n}"),
    LM_HEAD,
    *_carried("{vision}"),
)


@functools.cache
def _by_path() -> dict[str, Weight]:
    return {weight.path: weight for weight in WEIGHTS if weight.path}


def weight_at(path: str) -> Weight:
    """The row of a parameter.

    Args:
      path: in the parameter tree, joined by "/".

    Returns:
      The row. That of an adapter follows from the kernel that it is added to.

    Raises:
      ValueError: the table has no such parameter.
    """
    weight = _by_path().get(path) or _adapter_at(path)
    if weight is None:
        raise ValueError(
            f"parameter {path!r} has no row in the table of weights, "
            "llave_jax.models.parameters.WEIGHTS; add one"
        )
    return weight


@functools.cache
def _adapter_at(path: str) -> Weight | None:
    """The row of an adapter's factor: `rank` in its shape is the adapter's own size."""
    module, _, name = path.rpartition("/")
    kernel = _by_path().get(f"{module}/kernel")
    if name not in (LORA_A, LORA_B) or kernel is None or kernel.transform != "transpose":
        return None
    inputs, outputs = kernel.shape.split()
    count = input_axes(kernel)
    if name == LORA_A:
        shape, axes, hf_name = f"{inputs} rank", (*kernel.axes[:count], None), "lora_A.weight"
    else:
        shape, axes, hf_name = f"rank {outputs}", (None, *kernel.axes[count:]), "lora_B.weight"
    return dataclasses.replace(
        kernel,
        path=path,
        hf_name=kernel.hf_name.removesuffix("weight") + hf_name,
        shape=shape,
        axes=axes,
    )


def input_axes(kernel: Weight) -> int:
    """How many of the first axes of a linear map's kernel its input has.

    Args:
      kernel: its row.

    Returns:
      The number; the other axes are those of the output.
    """
    return len(kernel.shape.split()[0].split("*"))


def linear_maps() -> tuple[str, ...]:
    """The modules that an adapter can be added to.

    Returns:
      Their paths, in the table's order.
    """
    kernels = (path for path, weight in _by_path().items() if weight.transform == "transpose")
    return tuple(path.removesuffix("/kernel") for path in kernels)


def sizes(config: LlaveConfig) -> dict[str, int]:
    """What the words of `Weight.shape` stand for in one model.

    Args:
      config: of the model.

    Returns:
      word -> number.
    """
    text, vision = config.text, config.vision
    return {
        "vocab": text.vocab_size,
        "width": text.hidden_size,
        "heads": text.num_heads,
        "kv": text.num_kv_heads,
        "head": text.head_dim,
        "mlp": text.intermediate_size,
        "v_width": vision.hidden_size,
        "v_heads": vision.num_heads,
        "v_head": vision.hidden_size // vision.num_heads,
        "v_mlp": vision.intermediate_size,
        "patch": vision.patch_size,
        "channels": 3,
        "positions": vision.num_patches,
        "1": 1,
        "3": 3,
    }


def axis_sizes(weight: Weight, config: LlaveConfig) -> list[tuple[int, ...]]:
    """`Weight.shape` in numbers.

    Args:
      weight: the row.
      config: of the model.

    Returns:
      A tuple for each axis of the checkpoint's array: `a*b` gives (a, b).
    """
    known = sizes(config)
    return [tuple(known[word] for word in axis.split("*")) for axis in weight.shape.split()]


def layer_shape(weight: Weight, config: LlaveConfig) -> tuple[int, ...]:
    """The shape of a parameter here, without the layer axis.

    Args:
      weight: its row.
      config: of the model.

    Returns:
      The shape.
    """
    axes = axis_sizes(weight, config)
    if weight.transform == "patches":
        return tuple(math.prod(axis) for axis in axes)
    return tuple(size for axis in axes for size in axis)


def num_layers(weight: Weight, config: LlaveConfig) -> int | None:
    """The length of a parameter's layer axis.

    Args:
      weight: its row.
      config: of the model.

    Returns:
      The number of layers; None if the parameter has no layer axis.
    """
    if not weight.stacked:
        return None
    return config.vision.num_layers if weight.tower == "vision" else config.text.num_layers


def parameter_shapes(config: LlaveConfig) -> dict[str, tuple[int, ...]]:
    """The shapes of all parameters of a model.

    Args:
      config: of the model.

    Returns:
      path -> shape, with the layer axis.
    """
    shapes = {}
    for path, weight in _by_path().items():
        layers = num_layers(weight, config)
        shape = layer_shape(weight, config)
        shapes[path] = shape if layers is None else (layers, *shape)
    return shapes


def adapter_shapes(
    modules: Iterable[str], rank: int, config: LlaveConfig
) -> dict[str, tuple[int, ...]]:
    """The shapes of the adapters on some modules of a model.

    Args:
      modules: paths, of `linear_maps`.
      rank: of the adapters.
      config: of the model.

    Returns:
      path -> shape, with the layer axis.
    """
    shapes = {}
    for module in modules:
        kernel = weight_at(f"{module}/kernel")
        layers, shape = num_layers(kernel, config), layer_shape(kernel, config)
        stack, count = () if layers is None else (layers,), input_axes(kernel)
        shapes[f"{module}/{LORA_A}"] = (*stack, *shape[:count], rank)
        shapes[f"{module}/{LORA_B}"] = (*stack, rank, *shape[count:])
    return shapes


def decay_mask(params: Mapping[str, Any]) -> dict[str, bool]:
    """Which parameters weight decay applies to: matrices and embeddings.

    Biases, norms and the newline do not decay.

    Args:
      params: flat dict by path; its values do not matter.

    Returns:
      path -> whether weight decay applies.

    Raises:
      ValueError: a parameter has no row in the table.
    """
    return {path: weight_at(path).decay for path in params}
