"""`LlaveConfig` to the config.json of a Hugging Face checkpoint, in either layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from llave_jax.models.config import LlaveConfig, VisionConfig
from llave_jax.weights.hf_inputs import (
    DEFAULT_POSITIONS,
    LLAVE_KEY,
    llave_inputs,
    onevision_inputs,
    with_inputs,
)
from llave_jax.weights.json_files import section

# Settings that do not change embeddings. A change of layout keeps them.
_TEXT_KEPT = (
    "attention_dropout",
    "bos_token_id",
    "eos_token_id",
    "initializer_range",
    "max_position_embeddings",
    "max_window_layers",
    "pad_token_id",
    "sliding_window",
    "use_cache",
)


def to_llave(config: LlaveConfig, source: dict[str, Any], dtype: str, tower: str) -> dict[str, Any]:
    """config.json of a LlavaQwenForCausalLM.

    Args:
      config: the model.
      source: content of the config.json that the model comes from, in the onevision layout; or empty.
      dtype: torch's name of the weights' dtype.
      tower: value of `mm_vision_tower`.

    Returns:
      The file's content.
    """
    fresh = {
        "mm_hidden_size": config.vision.hidden_size,
        "mm_patch_merge_type": "spatial_unpad",
        "mm_projector_type": "mlp2x_gelu",
        "mm_resampler_type": None,
        "mm_use_im_patch_token": False,
        "mm_use_im_start_end": False,
        "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2,
        "rope_scaling": None,
        "tokenizer_padding_side": "right",
        "use_mm_proj": True,
    }
    values = {
        **fresh,
        **llave_inputs(config.inputs),
        **section(source, LLAVE_KEY, "config.json"),
        **_text_values(config, section(source, "text_config", "config.json")),
        "architectures": ["LlavaQwenForCausalLM"],
        "mm_vision_tower": tower,
        "model_type": "llava_qwen",
        "torch_dtype": dtype,
    }
    return with_inputs(values, "llave", config.inputs, config.vision.image_size)


def to_onevision(
    config: LlaveConfig, source: dict[str, Any], dtype: str, image_token: int, video_token: int
) -> dict[str, Any]:
    """config.json of a LlavaOnevisionForConditionalGeneration.

    Args:
      config: the model.
      source: content of the config.json that the model comes from, in the llave layout; or empty.
      dtype: torch's name of the weights' dtype.
      image_token, video_token: the placeholders' ids in the tokenizer.

    Returns:
      The file's content.
    """
    inputs, image_size = config.inputs, config.vision.image_size
    settings = with_inputs(source, "llave", inputs, image_size) if source else llave_inputs(inputs)
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_token_index": image_token,
        LLAVE_KEY: settings,
        "model_type": "llava_onevision",
        "multimodal_projector_bias": True,
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "qwen2", **_text_values(config, source)},
        "tie_word_embeddings": config.text.tie_word_embeddings,
        "torch_dtype": dtype,
        "video_token_index": video_token,
        "vision_config": _vision_values(config.vision),
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        **onevision_inputs(inputs, image_size),
    }


def tower_values(vision: VisionConfig) -> dict[str, Any]:
    """config.json of the vision tower alone; it counts the last layer, which LLaVE drops.

    Args:
      vision: the tower.

    Returns:
      The file's content.
    """
    return _vision_values(dataclasses.replace(vision, num_layers=vision.num_layers + 1))


def _text_values(config: LlaveConfig, source_text: Mapping[str, Any]) -> dict[str, Any]:
    text = config.text
    return {
        "max_position_embeddings": max(DEFAULT_POSITIONS, config.inputs.max_length),
        **{key: source_text[key] for key in _TEXT_KEPT if key in source_text},
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "rms_norm_eps": text.rms_norm_eps,
        # transformers 4 and 5 both read this key. Only 5 knows rope_parameters.
        "rope_theta": text.rope_theta,
        "tie_word_embeddings": text.tie_word_embeddings,
        "use_sliding_window": False,
        "vocab_size": text.vocab_size,
    }


def _vision_values(vision: VisionConfig) -> dict[str, Any]:
    return {
        "hidden_act": "gelu_pytorch_tanh",
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "intermediate_size": vision.intermediate_size,
        "layer_norm_eps": vision.layer_norm_eps,
        "model_type": "siglip_vision_model",
        "num_attention_heads": vision.num_heads,
        "num_channels": 3,
        "num_hidden_layers": vision.num_layers,
        "patch_size": vision.patch_size,
        "vision_use_head": False,
    }
