"""Floating-point operations that the model's mathematics needs for given sequences: the numerator of MFU.

Owns these counts. A multiply-add is two operations. Recomputation, padding and masked scores do not count.
Norms, rotary embeddings, activations and the loss are small and left out.
"""

from __future__ import annotations

import numpy as np

from llave_jax.models.config import LlaveConfig


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
    text = config.text
    lengths = np.asarray(lengths, np.float64)
    tokens, weights = np.sum(lengths), text_layer_weights(config)
    scores = np.sum(lengths * (lengths + 1) / 2)
    per_score = 4 * text.num_heads * text.head_dim
    layer = 2 * tokens * weights + scores * per_score
    keys = 2 * text.hidden_size * text.num_kv_heads * text.head_dim
    last = 2 * (tokens * keys + len(lengths) * (weights - keys)) + tokens * per_score
    return (text.num_layers - 1) * layer + last


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
