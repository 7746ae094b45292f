"""Floating-point operations that the model's mathematics needs for given sequences: the numerator of MFU.

Owns these counts. A multiply-add is two operations. Recomputation, padding and masked scores do not count.
Norms, rotary embeddings, activations and the loss are small and left out.
"""

from __future__ import annotations

import math

import numpy as np

from llave_jax.models.config import LlaveConfig
from llave_jax.models.llave import Llave
from llave_jax.models.lora import AdaptedLlave, Lora
from llave_jax.models.parameters import input_axes, layer_shape, num_layers, weight_at


def text_layer_weights(config: LlaveConfig) -> int:
    """The weights of one layer of the language model that multiply each token.

    Args:
      config: of the model.

    Returns:
      The number of weights of all projections.
    """
    text = config.text
    attention = 2 * text.hidden_size * (text.num_heads + text.num_kv_heads) * text.head_dim
    return attention + 3 * text.hidden_size * text.intermediate_size


def text_forward(config: LlaveConfig, lengths: np.ndarray) -> float:
    """FLOPs of the language model, from the tokens of sequences to the hidden state of their last tokens.

    In the last layer, all tokens but the last one need keys and values only.

    Args:
      config: of the model.
      lengths: int [n], tokens of each sequence; attention is causal within a sequence.

    Returns:
      FLOPs of all sequences.
    """
    return sum(_text_products(config, lengths))


def _text_products(config: LlaveConfig, lengths: np.ndarray) -> tuple[float, float]:
    """`text_forward` in two parts: products with weights, and those of attention."""
    text = config.text
    lengths = np.asarray(lengths, np.float64)
    tokens, weights = float(np.sum(lengths)), text_layer_weights(config)
    scores = float(np.sum(lengths * (lengths + 1) / 2))
    per_score = 4 * text.num_heads * text.head_dim
    keys = 2 * text.hidden_size * text.num_kv_heads * text.head_dim
    layers = text.num_layers - 1
    last = 2 * (tokens * keys + len(lengths) * (weights - keys))
    return layers * 2 * tokens * weights + last, (layers * scores + tokens) * per_score


def vision_forward(config: LlaveConfig, crops: float) -> float:
    """FLOPs of the SigLIP tower.

    Args:
      config: of the model.
      crops: how many crops go through it.

    Returns:
      FLOPs of all crops.
    """
    vision = config.vision
    width, patches = vision.hidden_size, vision.num_patches
    linear = 4 * width**2 + 2 * width * vision.intermediate_size
    layer = 2 * patches * linear + 4 * patches**2 * width
    return crops * (vision.num_layers * layer + 2 * patches * vision.crop.patch_dim * width)


def projector_forward(config: LlaveConfig, crops: float) -> float:
    """FLOPs of the projector.

    Args:
      config: of the model.
      crops: how many crops' features go through it.

    Returns:
      FLOPs of all crops.
    """
    width = config.text.hidden_size
    return crops * config.vision.num_patches * 2 * (config.vision.hidden_size + width) * width


def embedding(config: LlaveConfig, lengths: np.ndarray, crops: float) -> float:
    """FLOPs of the forward pass.

    Args:
      config: of the model.
      lengths: int [n], tokens of each sequence.
      crops: of all sequences together.

    Returns:
      FLOPs of all sequences and crops.
    """
    return (
        text_forward(config, lengths)
        + vision_forward(config, crops)
        + projector_forward(config, crops)
    )


def training(
    config: LlaveConfig, lengths: np.ndarray, crops: float, *, freeze_vision: bool
) -> float:
    """FLOPs of forward and backward pass.

    Each product of the forward pass has two gradients, one for each factor. A frozen tower has none.

    Args:
      config, lengths, crops: as for `embedding`.
      freeze_vision: whether the vision tower is frozen.

    Returns:
      FLOPs of all sequences and crops.
    """
    towers = 1 if freeze_vision else 3
    # With a frozen tower, nothing needs the gradient of the projector's input.
    unneeded = 0.0
    if freeze_vision:
        patches, vision = config.vision.num_patches, config.vision
        unneeded = crops * patches * 2 * vision.hidden_size * config.text.hidden_size
    return (
        3 * text_forward(config, lengths)
        + towers * vision_forward(config, crops)
        + 3 * projector_forward(config, crops)
        - unneeded
    )


def step(model: Llave, lengths: np.ndarray, crops: float) -> float:
    """FLOPs of forward and backward pass of a model as a run trains it.

    Args:
      model: of `training.setup`: it says whether the vision tower is frozen and which adapters there are.
      lengths, crops: as for `embedding`.

    Returns:
      FLOPs of all sequences and crops.
    """
    if isinstance(model, AdaptedLlave):
        return training_adapters(model.config, lengths, crops, model.lora)
    return training(model.config, lengths, crops, freeze_vision=model.freeze_vision)


def training_adapters(config: LlaveConfig, lengths: np.ndarray, crops: float, lora: Lora) -> float:
    """FLOPs of forward and backward pass where adapters are trained, and nothing else.

    A product with a weight of the base has one gradient, that of its input, if an adapter has a part in this input.
    Products of attention have both, under the same condition. The two products of an adapter have both.

    Args:
      config, lengths, crops: as for `embedding`.
      lora: the adapters.

    Returns:
      FLOPs of all sequences and crops.
    """
    tower = any(module.startswith("vision_tower/") for module in lora.modules)
    projector = any(module.startswith("projector/") for module in lora.modules)
    text, vision = config.text, config.vision
    lengths = np.asarray(lengths, np.float64)
    tokens, patches = float(np.sum(lengths)), crops * vision.num_patches

    linear, scores = _text_products(config, lengths)
    # Nothing needs the gradient of the first layer's input where all that is trained comes later.
    first = 2 * tokens * text.hidden_size * (text.num_heads + 2 * text.num_kv_heads) * text.head_dim
    total = 2 * linear + 3 * scores - (0 if tower or projector else first)

    total += projector_forward(config, crops)
    if tower:
        total += 2 * patches * vision.hidden_size * text.hidden_size
    if tower or "projector/linear_1" in lora.modules:
        total += 2 * patches * text.hidden_size**2

    total += vision_forward(config, crops)
    if tower:
        width = vision.hidden_size
        layer = 2 * patches * (4 * width**2 + 2 * width * vision.intermediate_size)
        attention = 4 * patches * vision.num_patches * width
        total += vision.num_layers * (layer + 2 * attention) - 2 * patches * 3 * width**2
    return total + 3 * _adapters_forward(config, lengths, patches, lora)


def _adapters_forward(
    config: LlaveConfig, lengths: np.ndarray, patches: float, lora: Lora
) -> float:
    """FLOPs of the adapters' own products."""
    total, tokens = 0.0, float(np.sum(lengths))
    for module in lora.modules:
        kernel = weight_at(f"{module}/kernel")
        shape, count = layer_shape(kernel, config), input_axes(kernel)
        each = 2 * lora.rank * (math.prod(shape[:count]) + math.prod(shape[count:]))
        rows = patches * (num_layers(kernel, config) or 1)
        if module.startswith("language_model/"):
            # The last layer computes keys and values of all tokens, and the rest of the last ones.
            of_last = tokens if module.endswith(("k_proj", "v_proj")) else len(lengths)
            rows = (config.text.num_layers - 1) * tokens + of_last
        total += each * rows
    return total
