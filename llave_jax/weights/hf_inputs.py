"""The input settings of Hugging Face checkpoints: how items become sequences, read and written.

They lie in config.json, in a form of its own in each layout, and in tokenizer_config.json.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llave_jax.inputs.config import InputConfig, grid_pinpoints
from llave_jax.weights.json_files import read_json, write_json
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
        "max_position_embeddings", DEFAULT_POSITIONS
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


def tokenizer_limit(directory: Path) -> int | None:
    """The `model_max_length` of a directory's tokenizer.

    Args:
      directory: holds tokenizer_config.json.

    Returns:
      The limit in tokens; None if there is none.

    Raises:
      CheckpointError: the file is missing or not JSON.
    """
    limit = read_json(directory / TOKENIZER_CONFIG).get("model_max_length")
    # transformers writes 1e30 for "no limit".
    return None if limit is None or limit > 1e9 else int(limit)


def _text_limit(of_tokenizer: int | None, max_length: int) -> int:
    """`InputConfig.max_text_length` by the tokenizer's limit and `InputConfig.max_length`."""
    return of_tokenizer or max(max_length, DEFAULT_POSITIONS)


def _llave_pinpoints(listed: Any, image_size: int, where: str) -> tuple[tuple[int, int], ...]:
    """The authors' (width, height) pairs, or a text of them, as (height, width) pairs in pixels.

    The text "(1x1),...,(2x3)" counts tiles. It means every canvas from the first to the last; the
    first number changes slowest.
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
    """The 9 of "anyres_max_9"; None for "anyres"."""
    if aspect_ratio == "anyres":
        return None
    if found := re.fullmatch(r"anyres_max_(\d+)", aspect_ratio or ""):
        return int(found.group(1))
    raise CheckpointError(
        f"{where}: images are laid out by {aspect_ratio!r}; expected anyres or anyres_max_N"
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
    settings = {**values.get(LLAVE_KEY, {}), **llave_inputs(inputs)}
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
