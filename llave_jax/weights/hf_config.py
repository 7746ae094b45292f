"""The settings of a Hugging Face checkpoint, read as a `LlaveConfig`.

config.json says most of it; where it is silent or wrong, the tensors' names and shapes do. A setting
that changes embeddings and that the model does not implement is an error. All other settings are
ignored: training and other model classes leave many of them in a checkpoint. `hf_config_export` writes
settings.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llave_jax.common.paths import OutsideRoot, check_relative
from llave_jax.common.ranges import ConfigError, check_real
from llave_jax.models.config import SIGLIP_SO400M, LlaveConfig, TextConfig, VisionConfig
from llave_jax.models.parameters import EMBEDDING, LM_HEAD, PATCH_EMBEDDING, POSITION_EMBEDDING
from llave_jax.weights import hf_names
from llave_jax.weights.hf_inputs import read_inputs, tokenizer_limit
from llave_jax.weights.hf_names import HfTensor
from llave_jax.weights.json_files import read_json, section
from llave_jax.weights.safetensors_io import CheckpointError

logger = logging.getLogger(__name__)

# Tensor of a checkpoint -> its shape there.
Shapes = Mapping[HfTensor, tuple[int, ...]]

_TEXT_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
)
_VISION_SIZES = (
    "hidden_size",
    "image_size",
    "intermediate_size",
    "layer_norm_eps",
    "num_attention_heads",
    "num_hidden_layers",
    "patch_size",
)


@dataclasses.dataclass(frozen=True)
class HfModel:
    """What a Hugging Face directory's configuration says.

    Attributes:
      layout: "llave" or "onevision".
      config: the model.
      tower_layers: layers of the whole vision tower; `config.vision.num_layers` of them run.
    """

    layout: str
    config: LlaveConfig
    tower_layers: int


def read_hf_model(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    vision_config: Path | None = None,
) -> HfModel:
    """Read the configuration of a Hugging Face directory.

    config.json is often silent or wrong: one layout is called llava_qwen, qwen2 or llava by its
    `model_type`. So the tensors' names decide the layout. Their shapes decide the size of the
    vocabulary, whether there is an LM head, and whether the vision tower is the usual one.

    Args:
      directory: holds config.json and tokenizer_config.json.
      shapes: tensor name -> shape.
      vision_config: config.json of the vision tower. Only the llave layout needs it, whose own
        config.json has none of the tower's sizes. None: look where `mm_vision_tower` points to.

    Returns:
      The model.

    Raises:
      CheckpointError: an unknown layout, a missing or an unsupported setting.
    """
    path = directory / "config.json"
    values = read_json(path)
    layout = _layout(values, shapes, path)
    found = {
        tensor: shape
        for name, shape in shapes.items()
        if (tensor := hf_names.find_tensor(name, layout))
    }
    if layout == "llave":
        vision, tower_layers = _llave_vision(directory, values, found, vision_config)
        text = _text_config(values, found, str(path))
    else:
        if vision_config is not None:
            raise CheckpointError(
                f"{path} has a vision_config of its own; leave --vision-config away"
            )
        vision, tower_layers = _onevision_vision(values, str(path))
        text = _text_config(section(values, "text_config", path), found, f"{path}: text_config")
    inputs = read_inputs(values, layout, vision.image_size, str(path), tokenizer_limit(directory))
    config = LlaveConfig(vision, text, inputs)
    with _named_as_theirs(str(path)):
        config.check()
    return HfModel(layout, config, tower_layers)


# Our name of a field -> theirs.
_THEIR_NAMES = {
    "num_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
}


@contextlib.contextmanager
def _named_as_theirs(where: str) -> Iterator[None]:
    """Errors of our configuration name the file and its own fields."""
    try:
        yield
    except ConfigError as error:
        key = _THEIR_NAMES.get(error.key, error.key)
        raise CheckpointError(f"{where}: {key} {error.reason}") from error


def _layout(values: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]], path: Path) -> str:
    """The layout that the tensors are named by; an error if the model's class is not that layout's."""
    layout = hf_names.layout_of(shapes)
    classes = values.get("architectures") or []
    if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
        raise CheckpointError(f"{path}: architectures is {classes!r:.60}; expected a list of names")
    model_type = values.get("model_type")
    described = f"architectures {json.dumps(classes)}, model_type {json.dumps(model_type)}"
    if layout is None:
        some = ", ".join(sorted(shapes)[:3]) or "none"
        raise CheckpointError(
            f"{path}: neither a LLaVE checkpoint nor a LlavaOnevision one: no tensor has a name of "
            f"theirs, such as model.embed_tokens.weight or language_model.model.embed_tokens.weight "
            f"(tensors: {some}; {described})"
        )
    # Other classes of these families share the tensor names, but compute something else.
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


def expect(values: Mapping[str, Any], where: str, key: str, *allowed: Any) -> None:
    """Refuse a setting that the model does not implement.

    Args:
      values: the settings.
      where: the file and part that they are from, for the message.
      key: the setting.
      allowed: the values it may have. A missing key means the first of them.

    Raises:
      CheckpointError: it has another value.
    """
    found = values.get(key, allowed[0])
    if found not in allowed:
        options = " or ".join(json.dumps(value) for value in allowed)
        raise CheckpointError(f"{where}: {key} is {json.dumps(found)}; only {options} is supported")


def _text_config(values: Mapping[str, Any], found: Shapes, where: str) -> TextConfig:
    """Qwen2's settings, as transformers 4 or 5 writes them. The tensors decide vocabulary and tying."""
    expect(values, where, "hidden_act", "silu")
    expect(values, where, "use_sliding_window", False, None)
    key = "rope_parameters" if values.get("rope_parameters") else "rope_scaling"
    rope = section(values, key, where)
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise CheckpointError(
            f'{where}: the rotary embedding is of type {rope_type!r}; only "default" (no rope_scaling) '
            "is supported"
        )
    full = _sizes(values, "Qwen2Config", _TEXT_SIZES, where)
    theta = rope.get("rope_theta", values.get("rope_theta"))
    if theta is None:
        defaults = _class_defaults("Qwen2Config")
        theta = (defaults.get("rope_parameters") or defaults)["rope_theta"]
    embedding = found.get(HfTensor(EMBEDDING), ())
    with _named_as_theirs(where):
        check_real("rope_theta", theta, 1, 1e12)
        text = TextConfig(
            hidden_size=full["hidden_size"],
            num_layers=full["num_hidden_layers"],
            num_heads=full["num_attention_heads"],
            num_kv_heads=full["num_key_value_heads"],
            intermediate_size=full["intermediate_size"],
            vocab_size=embedding[0] if len(embedding) == 2 else full["vocab_size"],
            rope_theta=float(theta),
            rms_norm_eps=full["rms_norm_eps"],
            tie_word_embeddings=HfTensor(LM_HEAD) not in found,
        )
    expect(values, where, "head_dim", text.head_dim, None)
    return text


def _sizes(
    values: Mapping[str, Any], class_name: str, keys: Sequence[str], where: str
) -> dict[str, Any]:
    """The settings of these keys, all of them numbers: transformers writes none that has its class's default."""
    if all(key in values for key in keys):
        full = {key: values[key] for key in keys}
    else:
        defaults = _class_defaults(class_name)
        full = {key: values.get(key, defaults.get(key)) for key in keys}
    if full.get("num_key_value_heads", 1) is None:
        full["num_key_value_heads"] = full["num_attention_heads"]
    for key, value in full.items():
        if isinstance(value, bool) or not isinstance(value, float if key.endswith("_eps") else int):
            kind = "number" if key.endswith("_eps") else "whole number"
            raise CheckpointError(f"{where}: {key} is {value!r:.60}; expected a {kind}")
    return full


@functools.cache
def _class_defaults(class_name: str) -> Mapping[str, Any]:
    # Imported here: where torch is installed, transformers' configurations take seconds to import.
    import transformers

    return getattr(transformers, class_name)().to_dict()


def _vision_config(values: Mapping[str, Any], where: str) -> VisionConfig:
    """SigLIP's settings. `num_layers` counts all layers of the tower."""
    expect(values, where, "model_type", "siglip_vision_model")
    expect(values, where, "hidden_act", "gelu_pytorch_tanh")
    expect(values, where, "num_channels", 3)
    full = _sizes(values, "SiglipVisionConfig", _VISION_SIZES, where)
    with _named_as_theirs(where):
        return VisionConfig(
            hidden_size=full["hidden_size"],
            num_layers=full["num_hidden_layers"],
            num_heads=full["num_attention_heads"],
            intermediate_size=full["intermediate_size"],
            image_size=full["image_size"],
            patch_size=full["patch_size"],
            layer_norm_eps=full["layer_norm_eps"],
        )


def _onevision_vision(values: Mapping[str, Any], where: str) -> tuple[VisionConfig, int]:
    """The vision tower of a OneVision config.json, and the number of layers of the whole tower."""
    expect(values, where, "projector_hidden_act", "gelu")
    expect(values, where, "multimodal_projector_bias", True)
    expect(values, where, "vision_feature_select_strategy", "full")
    tower = _vision_config(section(values, "vision_config", where), f"{where}: vision_config")
    # An index into the hidden states: 0 is the embeddings, -1 the last layer's output.
    layer = values.get("vision_feature_layer", -1)
    if type(layer) is not int or not -tower.num_layers <= layer <= tower.num_layers:
        raise CheckpointError(
            f"{where}: vision_feature_layer is {layer}; expected one layer of a tower "
            f"of {tower.num_layers}"
        )
    running = layer if layer >= 0 else tower.num_layers + 1 + layer
    if running == 0:
        raise CheckpointError(
            f"{where}: vision_feature_layer is {layer}; expected a layer that runs"
        )
    return dataclasses.replace(tower, num_layers=running), tower.num_layers


def _llave_vision(
    directory: Path,
    values: Mapping[str, Any],
    found: Shapes,
    vision_config: Path | None,
) -> tuple[VisionConfig, int]:
    """The vision tower of the authors' config.json, and the number of layers of the whole tower.

    Their code takes the tower's sizes from the tower's own configuration. Then it deletes the last
    layer and ignores `mm_vision_select_layer`.
    """
    where = str(directory / "config.json")
    expect(values, where, "mm_resampler_type", None)
    expect(values, where, "mm_vision_select_feature", "patch")
    expect(values, where, "mm_use_im_start_end", False, None)
    expect(values, where, "add_faster_video", False, None)
    for key, only in (
        ("mm_projector_type", "mlp2x_gelu"),
        ("mm_patch_merge_type", "spatial_unpad"),
    ):
        if values.get(key) != only:
            raise CheckpointError(
                f"{where}: {key} is {json.dumps(values.get(key))}; only {json.dumps(only)} is "
                "supported"
            )
    path = vision_config or find_tower_config(directory, values.get("mm_vision_tower"))
    if path is None and _is_so400m(found):
        return _so400m(found, where)
    if path is None:
        raise CheckpointError(
            f"{where}: the vision tower {values.get('mm_vision_tower')!r} has other sizes than "
            "SigLIP so400m-patch14-384, and its configuration is not beside the checkpoint. Convert "
            "it with tools/convert_hf.py and name the tower's own config.json: --vision-config FILE"
        )
    tower = read_json(path)
    tower = _vision_config(section(tower, "vision_config", path) or tower, str(path))
    if tower.num_layers < 2:
        raise CheckpointError(
            f"{path}: num_hidden_layers is {tower.num_layers}; expected 2 or more, since the last "
            "one is dropped"
        )
    return dataclasses.replace(tower, num_layers=tower.num_layers - 1), tower.num_layers


def find_tower_config(directory: Path, tower: object) -> Path | None:
    """config.json of the vision tower that a checkpoint of the llave layout names.

    Args:
      directory: of the checkpoint.
      tower: its `mm_vision_tower`, a directory relative to the checkpoint or to its parent.

    Returns:
      The file; None if it is in neither place.
    """
    if not isinstance(tower, str):
        return None
    try:
        # A checkpoint does not choose which other files of this machine are read.
        check_relative(tower)
    except OutsideRoot:
        return None
    for base in (directory, directory.parent):
        path = base / tower / "config.json"
        if path.is_file():
            return path
    return None


def _is_so400m(found: Shapes) -> bool:
    """Whether the tensors' shapes are those of SigLIP so400m-patch14-384."""
    so400m = SIGLIP_SO400M
    width, patch = so400m.hidden_size, so400m.patch_size
    expected = {
        HfTensor(PATCH_EMBEDDING): (width, 3, patch, patch),
        HfTensor(POSITION_EMBEDDING): (so400m.num_patches, width),
        HfTensor(hf_names.VISION_FC1, 0): (so400m.intermediate_size, width),
    }
    return all(found.get(tensor) == shape for tensor, shape in expected.items())


def _so400m(found: Shapes, where: str) -> tuple[VisionConfig, int]:
    """SigLIP so400m with the layers that are stored. Its last layer does not run, if it is stored."""
    running = SIGLIP_SO400M.num_layers
    stored = 1 + max(tensor.layer or 0 for tensor in found if tensor.weight == hf_names.VISION_FC1)
    if stored < running:
        logger.warning(
            "%s: the vision tower has %d layers, SigLIP so400m runs %d of its %d; all %d run",
            *(where, stored, running, running + 1, stored),
        )
    return dataclasses.replace(SIGLIP_SO400M, num_layers=min(stored, running)), running + 1
