"""Hugging Face `config.json` to `LlaveConfig` and back, for both layouts.

Only settings: which tensors there are and how they are called is in `names`. A setting that changes
embeddings and that the model does not implement is an error; all others are ignored, since
checkpoints are full of what training and other model classes left in them.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llave_jax.inputs.config import InputConfig, grid_pinpoints
from llave_jax.models.config import SIGLIP_SO400M, LlaveConfig, TextConfig, VisionConfig
from llave_jax.models.parameters import EMBEDDING, LM_HEAD, PATCH_EMBEDDING, POSITION_EMBEDDING
from llave_jax.weights import hf_names
from llave_jax.weights.hf_names import Match
from llave_jax.weights.safetensors_io import CheckpointError

logger = logging.getLogger(__name__)

TOKENIZER_CONFIG = "tokenizer_config.json"

# In a OneVision configuration: the settings of the authors' code that transformers has no place for.
LLAVE_KEY = "llave_config"

# What transformers' Qwen2Config and SiglipVisionConfig assume where a nested config is silent.
_TEXT_DEFAULTS = {
    "vocab_size": 151_936,
    "hidden_size": 4096,
    "intermediate_size": 22_016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 32_768,
}
_VISION_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
    "layer_norm_eps": 1e-6,
}
_ROPE_THETA_DEFAULT = 10_000.0

# Settings that do not change what the embedding model computes, kept when changing the layout.
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


@dataclasses.dataclass(frozen=True)
class HfModel:
    """What a Hugging Face directory's configuration says.

    Attributes:
      layout: "llave" or "onevision".
      tower_layers: layers of the whole vision tower; `config.vision.num_layers` of them run.
    """

    layout: str
    config: LlaveConfig
    tower_layers: int


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a CheckpointError naming the file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: no such file") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(values).__name__}")
    return values


def read_hf_model(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    vision_config: Path | None = None,
) -> HfModel:
    """Read the configuration of a Hugging Face directory.

    The tensors' names say which layout it is, and their shapes the size of the vocabulary, whether
    there is an LM head, and the usual vision tower: config.json is often silent or wrong on these
    (`model_type` is llava_qwen, qwen2 or llava for one and the same layout).

    Args:
      directory: holds config.json and tokenizer_config.json.
      shapes: tensor name -> shape.
      vision_config: config.json of the vision tower, for the llave layout, whose config.json has
        none of its sizes; by default looked for where `mm_vision_tower` points to.

    Raises:
      CheckpointError: an unknown layout, a missing or an unsupported setting.
    """
    path = directory / "config.json"
    values = read_json(path)
    layout = _layout(values, shapes, path)
    known = {hit: name for name in shapes if (hit := hf_names.match(name, layout))}
    found = {hit: shapes[name] for hit, name in known.items()}
    if layout == "llave":
        vision, tower_layers = _llave_vision(directory, values, found, vision_config)
        text = _text_config(values, found, str(path))
    else:
        if vision_config is not None:
            raise CheckpointError(
                f"{path} has a vision_config of its own; leave --vision-config away"
            )
        vision, tower_layers = _onevision_vision(values, str(path))
        text = _text_config(values.get("text_config", {}), found, f"{path}: text_config")
    inputs = read_inputs(values, layout, vision.image_size, str(path), _tokenizer_limit(directory))
    return HfModel(layout, LlaveConfig(vision, text, inputs), tower_layers)


def _layout(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> str:
    """The layout whose tensors these are, if the model is of the class that the layout is for."""
    layout = hf_names.layout_of(shapes)
    classes = values.get("architectures") or []
    model_type = values.get("model_type")
    described = f"architectures {json.dumps(classes)}, model_type {json.dumps(model_type)}"
    if layout is None:
        some = ", ".join(sorted(shapes)[:3]) or "none"
        raise CheckpointError(
            f"{path}: neither a LLaVE checkpoint nor a LlavaOnevision one: no tensor has a name of "
            f"theirs, such as model.embed_tokens.weight or language_model.model.embed_tokens.weight "
            f"(tensors: {some}; {described})"
        )
    # Other classes of these families share the tensor names, but not what is computed with them.
    if layout == "llave":
        fits = not classes or any(name.startswith("LlavaQwen") for name in classes)
        only = "LlavaQwenForCausalLM"
    else:
        only = "LlavaOnevisionForConditionalGeneration"
        fits = only in classes or model_type == "llava_onevision"
    if not fits:
        raise CheckpointError(
            f"{path}: {described}; with tensors named like these, only {only} is supported"
        )
    return layout


def _expect(values: Mapping[str, Any], where: str, key: str, *allowed: Any) -> None:
    """`values[key]` is one of `allowed`, of which the first stands for a missing key."""
    found = values.get(key, allowed[0])
    if found not in allowed:
        options = " or ".join(json.dumps(value) for value in allowed)
        raise CheckpointError(f"{where}: {key} is {json.dumps(found)}; only {options} is supported")


def _text_config(
    values: Mapping[str, Any], found: Mapping[Match, tuple[int, ...]], where: str
) -> TextConfig:
    """Qwen2 settings of a configuration of transformers 4 or 5, with vocabulary and tying as the
    tensors have them."""
    _expect(values, where, "hidden_act", "silu")
    _expect(values, where, "use_sliding_window", False, None)
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f'{where}: the rotary embedding is of type {kind!r}; only "default" (no rope_scaling) '
            "is supported"
        )
    full = {**_TEXT_DEFAULTS, **values}
    theta = rope.get("rope_theta", values.get("rope_theta", _ROPE_THETA_DEFAULT))
    embedding = found.get(Match(EMBEDDING), ())
    text = TextConfig(
        hidden_size=full["hidden_size"],
        num_layers=full["num_hidden_layers"],
        num_heads=full["num_attention_heads"],
        num_kv_heads=full["num_key_value_heads"] or full["num_attention_heads"],
        intermediate_size=full["intermediate_size"],
        vocab_size=embedding[0] if len(embedding) == 2 else full["vocab_size"],
        rope_theta=float(theta),
        rms_norm_eps=full["rms_norm_eps"],
        tie_word_embeddings=Match(LM_HEAD) not in found,
    )
    if text.hidden_size % text.num_heads or text.num_heads % text.num_kv_heads:
        raise CheckpointError(
            f"{where}: hidden_size {text.hidden_size}, num_attention_heads {text.num_heads} and "
            f"num_key_value_heads {text.num_kv_heads} do not divide one another"
        )
    _expect(values, where, "head_dim", text.head_dim, None)
    return text


def _vision_config(values: Mapping[str, Any], where: str) -> VisionConfig:
    """SigLIP settings, `num_layers` counting all layers of the tower."""
    _expect(values, where, "model_type", "siglip_vision_model")
    _expect(values, where, "hidden_act", "gelu_pytorch_tanh")
    _expect(values, where, "num_channels", 3)
    full = {**_VISION_DEFAULTS, **values}
    vision = VisionConfig(
        hidden_size=full["hidden_size"],
        num_layers=full["num_hidden_layers"],
        num_heads=full["num_attention_heads"],
        intermediate_size=full["intermediate_size"],
        image_size=full["image_size"],
        patch_size=full["patch_size"],
        layer_norm_eps=full["layer_norm_eps"],
    )
    if vision.hidden_size % vision.num_heads:
        raise CheckpointError(
            f"{where}: hidden_size {vision.hidden_size} is no multiple of "
            f"num_attention_heads {vision.num_heads}"
        )
    return vision


def _onevision_vision(values: Mapping[str, Any], where: str) -> tuple[VisionConfig, int]:
    _expect(values, where, "projector_hidden_act", "gelu")
    _expect(values, where, "multimodal_projector_bias", True)
    _expect(values, where, "vision_feature_select_strategy", "full")
    tower = _vision_config(values.get("vision_config", {}), f"{where}: vision_config")
    # Index into the hidden states, which begin with the embeddings: -1 is the last layer's output.
    layer = values.get("vision_feature_layer", -1)
    if not isinstance(layer, int) or not -tower.num_layers <= layer <= tower.num_layers:
        raise CheckpointError(
            f"{where}: vision_feature_layer is {layer}; expected one layer of a tower "
            f"of {tower.num_layers}"
        )
    running = layer if layer >= 0 else tower.num_layers + 1 + layer
    return dataclasses.replace(tower, num_layers=running), tower.num_layers


def _llave_vision(
    directory: Path,
    values: Mapping[str, Any],
    found: Mapping[Match, tuple[int, ...]],
    vision_config: Path | None,
) -> tuple[VisionConfig, int]:
    """The authors' code takes the tower's sizes from the tower's own configuration, then deletes
    the last layer, whatever `mm_vision_select_layer` says."""
    where = str(directory / "config.json")
    _expect(values, where, "mm_resampler_type", None)
    _expect(values, where, "mm_vision_select_feature", "patch")
    _expect(values, where, "mm_use_im_start_end", False, None)
    _expect(values, where, "add_faster_video", False, None)
    for key, only in (
        ("mm_projector_type", "mlp2x_gelu"),
        ("mm_patch_merge_type", "spatial_unpad"),
    ):
        if values.get(key) != only:
            raise CheckpointError(
                f"{where}: {key} is {json.dumps(values.get(key))}; only {json.dumps(only)} is "
                "supported"
            )
    path = vision_config or _find_tower_config(directory, values.get("mm_vision_tower"))
    if path is None and _is_so400m(found):
        return _so400m(found, where)
    if path is None:
        raise CheckpointError(
            f"{where}: the vision tower {values.get('mm_vision_tower')!r} is not of the size of "
            "SigLIP so400m-patch14-384, and its configuration is not beside the checkpoint. Name "
            "the tower's own config.json with --vision-config FILE."
        )
    tower = read_json(path)
    tower = _vision_config(tower.get("vision_config", tower), str(path))
    if tower.num_layers < 2:
        raise CheckpointError(
            f"{path}: num_hidden_layers is {tower.num_layers}; expected 2 or more, since the last "
            "one is dropped"
        )
    return dataclasses.replace(tower, num_layers=tower.num_layers - 1), tower.num_layers


def _find_tower_config(directory: Path, tower: str | None) -> Path | None:
    """config.json of a tower directory named relative to the checkpoint or to its parent."""
    for base in (directory, directory.parent):
        path = base / (tower or "") / "config.json"
        if tower and path.is_file():
            return path
    return None


def _is_so400m(found: Mapping[Match, tuple[int, ...]]) -> bool:
    """Whether all sizes that shapes can tell are those of SigLIP so400m-patch14-384."""
    so400m = SIGLIP_SO400M
    width, patch = so400m.hidden_size, so400m.patch_size
    expected = {
        Match(PATCH_EMBEDDING): (width, 3, patch, patch),
        Match(POSITION_EMBEDDING): (so400m.num_patches, width),
        Match(hf_names.VISION_FC1, 0): (so400m.intermediate_size, width),
    }
    return all(found.get(hit) == shape for hit, shape in expected.items())


def _so400m(found: Mapping[Match, tuple[int, ...]], where: str) -> tuple[VisionConfig, int]:
    """The usual tower, with as many layers as are stored: its last one, if all are, does not run."""
    running = SIGLIP_SO400M.num_layers
    stored = 1 + max(hit.layer for hit in found if hit.weight == hf_names.VISION_FC1)
    if stored < running:
        logger.warning(
            "%s: the vision tower has %d layers, SigLIP so400m runs %d of its %d; all %d run",
            *(where, stored, running, running + 1, stored),
        )
    return dataclasses.replace(SIGLIP_SO400M, num_layers=min(stored, running)), running + 1


def _tokenizer_limit(directory: Path) -> int | None:
    """The tokenizer's `model_max_length`, None if it has none."""
    limit = read_json(directory / TOKENIZER_CONFIG).get("model_max_length")
    # transformers writes 1e30 for "no limit".
    return None if limit is None or limit > 1e9 else int(limit)


def _text_limit(of_tokenizer: int | None, max_length: int) -> int:
    return of_tokenizer or max(max_length, _TEXT_DEFAULTS["max_position_embeddings"])


def write_text_limit(directory: Path, inputs: InputConfig) -> bool:
    """Put `max_text_length` into a directory's tokenizer settings, where a config.json has no place for
    it; whether they said something else."""
    path = directory / TOKENIZER_CONFIG
    if _text_limit(_tokenizer_limit(directory), inputs.max_length) == inputs.max_text_length:
        return False
    values = {**read_json(path), "model_max_length": inputs.max_text_length}
    text = json.dumps(values, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    return True


def read_inputs(
    values: Mapping[str, Any], layout: str, image_size: int, where: str, text_limit: int | None
) -> InputConfig:
    """How items become sequences, of a config.json's content.

    Args:
      text_limit: the tokenizer's own limit, if it has one.
    """
    settings = values if layout == "llave" else values.get(LLAVE_KEY, {})
    text = values if layout == "llave" else values.get("text_config", {})
    if layout == "llave":
        pinpoints = _llave_pinpoints(values.get("image_grid_pinpoints"), image_size, where)
        aspect_ratio = values.get("image_aspect_ratio")
    else:
        pinpoints = tuple(
            (int(height), int(width))
            for height, width in values.get("image_grid_pinpoints") or grid_pinpoints(384, 6, 6)
        )
        aspect_ratio = values.get("vision_aspect_ratio", "anyres_max_9")
    for height, width in pinpoints:
        if height % image_size or width % image_size:
            raise CheckpointError(
                f"{where}: image_grid_pinpoints has {height} x {width}; expected multiples of the "
                f"tower's image size, {image_size}"
            )
    max_length = settings.get("tokenizer_model_max_length") or text.get(
        "max_position_embeddings", _TEXT_DEFAULTS["max_position_embeddings"]
    )
    anyres_max = _anyres_max(aspect_ratio, where)
    try:
        return InputConfig(
            pinpoints=pinpoints,
            anyres_max=anyres_max,
            newline_position=settings.get("mm_newline_position") or "one_token",
            pool_mode=settings.get("mm_spatial_pool_mode") or "bilinear",
            pool_stride=settings.get("mm_spatial_pool_stride") or 2,
            max_length=max_length,
            max_text_length=_text_limit(text_limit, max_length),
        )
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error


def _llave_pinpoints(listed: Any, image_size: int, where: str) -> tuple[tuple[int, int], ...]:
    """The authors' (width, height) pairs, or their text forms, as (height, width) pairs.

    "(1x1),...,(2x3)" means every canvas from the first to the last, in tiles; the first number runs
    slowest.
    """
    original = listed
    if isinstance(listed, str):
        ranged = [(int(w), int(h)) for w, h in re.findall(r"\((\d+)x(\d+)\)", listed)]
        if ranged:
            (first_w, first_h), (last_w, last_h) = ranged[0], ranged[-1]
            listed = [
                (w * image_size, h * image_size)
                for w in range(first_w, last_w + 1)
                for h in range(first_h, last_h + 1)
            ]
        else:
            listed = re.findall(r"[\[(]\s*(\d+)\s*,\s*(\d+)\s*[\])]", listed)
    if not listed:
        raise CheckpointError(
            f"{where}: image_grid_pinpoints is {json.dumps(original)}; expected a list of "
            '[width, height] or a range such as "(1x1),...,(2x2)"'
        )
    return tuple((int(height), int(width)) for width, height in listed)


def _anyres_max(aspect_ratio: str | None, where: str) -> int | None:
    if aspect_ratio == "anyres":
        return None
    if found := re.fullmatch(r"anyres_max_(\d+)", aspect_ratio or ""):
        return int(found.group(1))
    raise CheckpointError(
        f"{where}: images are laid out by {aspect_ratio!r}; expected anyres or anyres_max_N"
    )


def _llave_inputs(inputs: InputConfig) -> dict[str, Any]:
    """The authors' settings for `inputs`."""
    limit = inputs.anyres_max
    return {
        "image_aspect_ratio": "anyres" if limit is None else f"anyres_max_{limit}",
        "image_grid_pinpoints": [[width, height] for height, width in inputs.pinpoints],
        "mm_newline_position": inputs.newline_position,
        "mm_spatial_pool_mode": inputs.pool_mode,
        "mm_spatial_pool_stride": inputs.pool_stride,
        "tokenizer_model_max_length": inputs.max_length,
    }


def _onevision_inputs(inputs: InputConfig, image_size: int) -> dict[str, Any]:
    """transformers' settings for `inputs`; it has no unlimited anyres, but a limit at the largest
    canvas never acts."""
    tiles = max(height * width for height, width in inputs.pinpoints) // image_size**2
    limit = tiles if inputs.anyres_max is None else inputs.anyres_max
    return {
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in inputs.pinpoints],
        "vision_aspect_ratio": f"anyres_max_{limit}",
    }


def with_inputs(
    values: dict[str, Any], layout: str, inputs: InputConfig, image_size: int
) -> dict[str, Any]:
    """A config.json's content, changed where it says something else than `inputs`.

    Comparable with what was given: equal if there was nothing to change.
    """
    before = read_inputs(values, layout, image_size, "config.json", inputs.max_text_length)
    # The rest of InputConfig has no place in a config.json.
    here = ("pinpoints", "anyres_max", "newline_position", "pool_mode", "pool_stride", "max_length")
    if all(getattr(before, key) == getattr(inputs, key) for key in here):
        return values
    if layout == "llave":
        return {**values, **_llave_inputs(inputs)}
    settings = {**values.get(LLAVE_KEY, {}), **_llave_inputs(inputs)}
    return {**values, **_onevision_inputs(inputs, image_size), LLAVE_KEY: settings}


def _text_values(config: LlaveConfig, source_text: Mapping[str, Any]) -> dict[str, Any]:
    text = config.text
    return {
        "max_position_embeddings": max(32_768, config.inputs.max_length),
        **{key: source_text[key] for key in _TEXT_KEPT if key in source_text},
        "hidden_act": "silu",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "num_key_value_heads": text.num_kv_heads,
        "rms_norm_eps": text.rms_norm_eps,
        # Both transformers 4 and 5 read this key; only 5 knows rope_parameters.
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


def to_onevision(
    config: LlaveConfig, source: dict[str, Any], dtype: str, image_token: int, video_token: int
) -> dict[str, Any]:
    """config.json of a LlavaOnevisionForConditionalGeneration.

    Args:
      source: the config.json the model was converted from, in the llave layout, or empty.
      dtype: torch's name of the weights' dtype.
      image_token, video_token: ids of the placeholders in the tokenizer.
    """
    inputs, image_size = config.inputs, config.vision.image_size
    settings = with_inputs(source, "llave", inputs, image_size) if source else _llave_inputs(inputs)
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
        **_onevision_inputs(inputs, image_size),
    }


def to_llave(config: LlaveConfig, source: dict[str, Any], dtype: str, tower: str) -> dict[str, Any]:
    """config.json of a LlavaQwenForCausalLM.

    Args:
      source: the config.json the model was converted from, in the onevision layout, or empty.
      dtype: torch's name of the weights' dtype.
      tower: `mm_vision_tower`.
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
        **_llave_inputs(config.inputs),
        **source.get(LLAVE_KEY, {}),
        **_text_values(config, source.get("text_config", {})),
        "architectures": ["LlavaQwenForCausalLM"],
        "mm_vision_tower": tower,
        "model_type": "llava_qwen",
        "torch_dtype": dtype,
    }
    return with_inputs(values, "llave", config.inputs, config.vision.image_size)


def tower_values(vision: VisionConfig) -> dict[str, Any]:
    """config.json of the vision tower by itself, with the last layer that LLaVE drops."""
    return _vision_values(dataclasses.replace(vision, num_layers=vision.num_layers + 1))


def image_processor_values(config: LlaveConfig, layout: str) -> dict[str, Any]:
    """preprocessor_config.json: the normalisation, and for OneVision the tiling."""
    values = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.5, 0.5, 0.5],
        "image_processor_type": "SiglipImageProcessor",
        "image_std": [0.5, 0.5, 0.5],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"height": config.vision.image_size, "width": config.vision.image_size},
    }
    if layout == "onevision":
        values |= {
            "do_pad": True,
            "image_grid_pinpoints": [list(pinpoint) for pinpoint in config.inputs.pinpoints],
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "processor_class": "LlavaOnevisionProcessor",
        }
    return values


def check_image_processor(directory: Path) -> None:
    """The preprocessing a OneVision directory asks for is the one we implement.

    (The authors' code does not read these settings; in their layout they mean nothing.)
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        values = read_json(path)
        values = values.get("image_processor", values)
        for key, only in (
            ("image_mean", [0.5, 0.5, 0.5]),
            ("image_std", [0.5, 0.5, 0.5]),
            ("resample", 3),
        ):
            _expect(values, str(path), key, only)
        if abs(values.get("rescale_factor", 1 / 255) - 1 / 255) > 1e-9:
            raise CheckpointError(
                f"{path}: rescale_factor is {values['rescale_factor']}; only 1/255 is supported"
            )


def processor_values(config: LlaveConfig) -> dict[str, Any]:
    """processor_config.json of a LlavaOnevisionProcessor."""
    aspect = _onevision_inputs(config.inputs, config.vision.image_size)["vision_aspect_ratio"]
    return {
        "image_token": "<image>",
        "num_image_tokens": config.vision.num_patches,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_aspect_ratio": aspect,
        "vision_feature_select_strategy": "full",
    }


def video_processor_values(config: LlaveConfig) -> dict[str, Any]:
    """video_preprocessor_config.json of a LlavaOnevisionProcessor."""
    values = image_processor_values(config, "llave")
    del values["image_processor_type"]
    return {
        **values,
        "processor_class": "LlavaOnevisionProcessor",
        "video_processor_type": "LlavaOnevisionVideoProcessor",
    }
