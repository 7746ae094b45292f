"""Floating-point operations the model's mathematics needs for given sequences: the M of MFU.

Counts a multiply-add as two. Recomputation, padding and masked-out scores are not needed work;
norms, rotations, activations and the loss are left out as small.
"""

from __future__ import annotations

import numpy as np

from llave_jax.models.config import LlaveConfig


def text_layer_weights(config: LlaveConfig) -> int:
    """Weights of one layer of the language model that a token is multiplied with."""
    text = config.text
    attention = 2 * text.hidden_size * (text.num_heads + text.num_kv_heads) * text.head_dim
    return attention + 3 * text.hidden_size * text.intermediate_size


def text_forward(config: LlaveConfig, lengths: np.ndarray) -> float:
    """Language model over sequences of these lengths, each causal within itself, to their last
    tokens: the last layer needs only keys and values of the others."""
    text = config.text
    lengths = np.asarray(lengths, np.float64)
    tokens, weights = np.sum(lengths), text_layer_weights(config)
    scores = np.sum(lengths * (lengths + 1) / 2)
    a_score = 4 * text.num_heads * text.head_dim
    layer = 2 * tokens * weights + scores * a_score
    keys = 2 * text.hidden_size * text.num_kv_heads * text.head_dim
    last = 2 * (tokens * keys + len(lengths) * (weights - keys)) + tokens * a_score
    return (text.num_layers - 1) * layer + last


def vision_forward(config: LlaveConfig, crops: float) -> float:
    """SigLIP tower over this many crops."""
    vision = config.vision
    width, patches = vision.hidden_size, vision.num_patches
    linear = 4 * width**2 + 2 * width * vision.intermediate_size
    layer = 2 * patches * linear + 4 * patches**2 * width
    return crops * (vision.num_layers * layer + 2 * patches * vision.crop.patch_dim * width)


def projector_forward(config: LlaveConfig, crops: float) -> float:
    width = config.text.hidden_size
    return crops * config.vision.num_patches * 2 * (config.vision.hidden_size + width) * width


def embedding(config: LlaveConfig, lengths: np.ndarray, crops: float) -> float:
    """Forward pass over sequences of these lengths with this many crops in all."""
    return (
        text_forward(config, lengths)
        + vision_forward(config, crops)
        + projector_forward(config, crops)
    )


def training(
    config: LlaveConfig, lengths: np.ndarray, crops: float, *, freeze_vision: bool
) -> float:
    """Forward and backward pass: each product has two gradients, a frozen tower none."""
    towers = 1 if freeze_vision else 3
    # Below a frozen tower nothing needs the gradient of the projector's input.
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
