"""The input settings of Hugging Face checkpoints: how items become sequences, read and written.

They lie in config.json, in a form of its own in each layout, and in tokenizer_config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llave_jax.common.ranges import ConfigError, check_whole
from llave_jax.inputs.config import MAX_PINPOINTS, MAX_TOKENS, InputConfig, grid_pinpoints
from llave_jax.weights.json_files import read_json, section, write_json
from llave_jax.weights.safetensors_io import CheckpointError

TOKENIZER_CONFIG = "tokenizer_config.json"

# Key in a OneVision config.json below which the authors' settings stand that transformers does not have.
LLAVE_KEY = "llave_config"

# `max_position_embeddings` of Qwen2 models whose config.json does not give it.
DEFAULT_POSITIONS = 32_768


def read_inputs(
    values: Mapping[str, Any], layout: str, image_size: int, where: str, text_limit: int | None
) -> InputConfig:
    """Read the input settings of a config.json.

    Args:
      values: content of the config.json.
      layout: "llave" or "onevision".
      image_size: pixels of the side of the vision tower's image.
      where: the file, for messages.
      text_limit: tokens of the tokenizer's own limit; None if it has none.

    Returns:
      The settings. Keys that are missing mean the authors' defaults.

    Raises:
      CheckpointError: a setting that is not supported.
    """
    settings = values if layout == "llave" else section(values, LLAVE_KEY, where)
    text = values if layout == "llave" else section(values, "text_config", where)
    if layout == "llave":
        pinpoints = _llave_pinpoints(values.get("image_grid_pinpoints"), image_size, where)
        aspect_ratio = values.get("image_aspect_ratio")
    else:
        listed = values.get("image_grid_pinpoints")
        pinpoints = grid_pinpoints(384, 6, 6) if listed is None else _pairs(listed, where)
        aspect_ratio = values.get("vision_aspect_ratio", "anyres_max_9")

    def setting(key: str, default: Any) -> Any:
        return default if settings.get(key) is None else settings[key]

    max_length = setting(
        "tokenizer_model_max_length", text.get("max_position_embeddings", DEFAULT_POSITIONS)
    )
    anyres_max = _anyres_max(aspect_ratio, where)
    try:
        check_whole("tokenizer_model_max_length", max_length, 1, MAX_TOKENS)
        return InputConfig(
            pinpoints=pinpoints,
            anyres_max=anyres_max,
            newline_position=setting("mm_newline_position", "one_token"),
            pool_mode=setting("mm_spatial_pool_mode", "bilinear"),
            pool_stride=setting("mm_spatial_pool_stride", 2),
            max_length=max_length,
            max_text_length=_text_limit(text_limit, max_length),
        )
    except ConfigError as error:
        key = "image_grid_pinpoints" if error.key == "pinpoints" else error.key
        raise CheckpointError(f"{where}: {key} {error.reason}") from error


def tokenizer_limit(directory: Path) -> int | None:
    """The `model_max_length` of a directory's tokenizer.

    Args:
      directory: holds tokenizer_config.json.

    Returns:
      The limit in tokens; None if there is none.

    Raises:
      CheckpointError: the file is missing or not JSON.
    """
    path = directory / TOKENIZER_CONFIG
    limit = read_json(path).get("model_max_length")
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit != int(limit):
        raise CheckpointError(f"{path}: model_max_length is {limit!r:.60}; expected a whole number")
    # transformers writes 1e30 for "no limit".
    if limit > 1e9:
        return None
    try:
        check_whole("model_max_length", int(limit), 1, MAX_TOKENS)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return int(limit)


def _text_limit(of_tokenizer: int | None, max_length: int) -> int:
    """`InputConfig.max_text_length` by the tokenizer's limit and `InputConfig.max_length`."""
    return max(max_length, DEFAULT_POSITIONS) if of_tokenizer is None else of_tokenizer


def _llave_pinpoints(listed: Any, image_size: int, where: str) -> tuple[tuple[int, int], ...]:
    """The authors' (width, height) pairs, or a text of them, as (height, width) pairs in pixels.

    The text "(1x1),...,(2x3)" counts tiles. It means every canvas from the first to the last; the
    first number changes slowest.
    """
    original = listed
    if isinstance(listed, str):
        ranged = [(int(w), int(h)) for w, h in re.findall(r"\((\d{1,4})x(\d{1,4})\)", listed)]
        if ranged:
            (first_w, first_h), (last_w, last_h) = ranged[0], ranged[-1]
            if (last_w - first_w + 1) * (last_h - first_h + 1) > MAX_PINPOINTS:
                raise CheckpointError(
                    f"{where}: image_grid_pinpoints is {original!r:.60}; expected at most {MAX_PINPOINTS} canvases"
                )
            listed = [
                (w * image_size, h * image_size)
                for w in range(first_w, last_w + 1)
                for h in range(first_h, last_h + 1)
            ]
        else:
            found = re.findall(r"[\[(]\s*(\d{1,9})\s*,\s*(\d{1,9})\s*[\])]", listed)
            listed = [(int(width), int(height)) for width, height in found]
    if not listed:
        raise CheckpointError(
            f"{where}: image_grid_pinpoints is {json.dumps(original):.80}; expected a list of "
            '[width, height] or a range such as "(1x1),...,(2x2)"'
        )
    return tuple((height, width) for width, height in _pairs(listed, where))


def _pairs(listed: Any, where: str) -> tuple[tuple[int, int], ...]:
    """A list of pairs of numbers; what numbers they may be is `InputConfig`'s."""
    if (
        not isinstance(listed, list)
        or not listed
        or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in listed)
    ):
        raise CheckpointError(
            f"{where}: image_grid_pinpoints is {listed!r:.80}; expected a list of pairs of pixels"
        )
    return tuple((first, second) for first, second in listed)


def _anyres_max(aspect_ratio: Any, where: str) -> int | None:
    """The 9 of "anyres_max_9"; None for "anyres"."""
    if aspect_ratio == "anyres":
        return None
    text = aspect_ratio if isinstance(aspect_ratio, str) else ""
    if found := re.fullmatch(r"anyres_max_(\d{1,9})", text):
        return int(found.group(1))
    raise CheckpointError(
        f"{where}: images are laid out by {aspect_ratio!r:.60}; expected anyres or anyres_max_N"
    )


def with_inputs(
    values: dict[str, Any], layout: str, inputs: InputConfig, image_size: int
) -> dict[str, Any]:
    """Make a config.json's content say what `inputs` says.

    Args:
      values: content of the config.json.
      layout: "llave" or "onevision".
      inputs: the settings.
      image_size: pixels of the side of the vision tower's image.

    Returns:
      `values` itself if it says so already, otherwise a changed copy.
    """
    before = read_inputs(values, layout, image_size, "config.json", inputs.max_text_length)
    # A config.json has no place for the rest of InputConfig.
    here = ("pinpoints", "anyres_max", "newline_position", "pool_mode", "pool_stride", "max_length")
    if all(getattr(before, key) == getattr(inputs, key) for key in here):
        return values
    if layout == "llave":
        return {**values, **llave_inputs(inputs)}
    settings = {**section(values, LLAVE_KEY, "config.json"), **llave_inputs(inputs)}
    return {**values, **onevision_inputs(inputs, image_size), LLAVE_KEY: settings}


def llave_inputs(inputs: InputConfig) -> dict[str, Any]:
    """The settings of the authors' config.json for `inputs`.

    Args:
      inputs: how the model lays out its inputs.

    Returns:
      key -> value, pinpoints as [width, height].
    """
    limit = inputs.anyres_max
    return {
        "image_aspect_ratio": "anyres" if limit is None else f"anyres_max_{limit}",
        "image_grid_pinpoints": [[width, height] for height, width in inputs.pinpoints],
        "mm_newline_position": inputs.newline_position,
        "mm_spatial_pool_mode": inputs.pool_mode,
        "mm_spatial_pool_stride": inputs.pool_stride,
        "tokenizer_model_max_length": inputs.max_length,
    }


def onevision_inputs(inputs: InputConfig, image_size: int) -> dict[str, Any]:
    """The settings of a OneVision config.json for `inputs`.

    transformers has no anyres without a limit. A limit at the largest canvas has no effect.

    Args:
      inputs: how the model lays out its inputs.
      image_size: pixels of a crop's side.

    Returns:
      key -> value, pinpoints as [height, width].
    """
    tiles = max(height * width for height, width in inputs.pinpoints) // image_size**2
    limit = tiles if inputs.anyres_max is None else inputs.anyres_max
    return {
        "image_grid_pinpoints": [list(pinpoint) for pinpoint in inputs.pinpoints],
        "vision_aspect_ratio": f"anyres_max_{limit}",
    }


def write_text_limit(directory: Path, inputs: InputConfig) -> bool:
    """Write `max_text_length` into tokenizer_config.json: config.json has no place for it.

    Args:
      directory: holds tokenizer_config.json.
      inputs: how the model lays out its inputs.

    Returns:
      Whether the file had another value before.
    """
    path = directory / TOKENIZER_CONFIG
    if _text_limit(tokenizer_limit(directory), inputs.max_length) == inputs.max_text_length:
        return False
    write_json(
        path, {**read_json(path), "model_max_length": inputs.max_text_length}, sort_keys=False
    )
    return True
