"""The processor files of a Hugging Face checkpoint: how transformers prepares images and videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llave_jax.models.config import LlaveConfig
from llave_jax.weights.hf_config import expect
from llave_jax.weights.hf_inputs import onevision_inputs
from llave_jax.weights.json_files import read_json, section
from llave_jax.weights.safetensors_io import CheckpointError

# A conversation in the form that the model was trained with. Images come before the text of their turn.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if loop.first and message['role'] != 'system' -%}
{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif -%}
{{ '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] if part['type'] in ('image', 'video') -%}
{{ '<' + part['type'] + '>\\n' }}
{%- endfor -%}
{%- for part in message['content'] if part['type'] == 'text' -%}
{{ part['text'] }}
{%- endfor -%}
{%- endif -%}
{{ '<|im_end|>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ '<|im_start|>assistant\\n' }}
{%- endif -%}
"""


def check_image_processor(directory: Path) -> None:
    """Refuses a OneVision directory whose images would be prepared in another way than ours.

    The authors' code does not read these files, so the llave layout needs no check.

    Args:
      directory: with preprocessor_config.json or processor_config.json, if it has one.

    Raises:
      CheckpointError: naming the file and the setting.
    """
    for name in ("preprocessor_config.json", "processor_config.json"):
        path = directory / name
        if not path.is_file():
            continue
        values = read_json(path)
        values = section(values, "image_processor", path) or values
        for key, only in (
            ("image_mean", [0.5, 0.5, 0.5]),
            ("image_std", [0.5, 0.5, 0.5]),
            ("resample", 3),
        ):
            expect(values, str(path), key, only)
        factor = values.get("rescale_factor", 1 / 255)
        if not isinstance(factor, int | float) or not abs(factor - 1 / 255) <= 1e-9:
            raise CheckpointError(
                f"{path}: rescale_factor is {factor!r:.60}; only 1/255 is supported"
            )


def image_processor_values(config: LlaveConfig, layout: str) -> dict[str, Any]:
    """The content of preprocessor_config.json: the normalisation, and in OneVision the canvases.

    Args:
      config: of the model.
      layout: "llave" or "onevision".

    Returns:
      key -> value.
    """
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


def video_processor_values(config: LlaveConfig) -> dict[str, Any]:
    """The content of video_preprocessor_config.json, for a LlavaOnevisionProcessor.

    Args:
      config: of the model.

    Returns:
      key -> value.
    """
    values = image_processor_values(config, "llave")
    del values["image_processor_type"]
    return {
        **values,
        "processor_class": "LlavaOnevisionProcessor",
        "video_processor_type": "LlavaOnevisionVideoProcessor",
    }


def processor_values(config: LlaveConfig) -> dict[str, Any]:
    """The content of processor_config.json, for a LlavaOnevisionProcessor.

    Args:
      config: of the model.

    Returns:
      key -> value.
    """
    aspect = onevision_inputs(config.inputs, config.vision.image_size)["vision_aspect_ratio"]
    return {
        "image_token": "<image>",
        "num_image_tokens": config.vision.num_patches,
        "processor_class": "LlavaOnevisionProcessor",
        "video_token": "<video>",
        "vision_aspect_ratio": aspect,
        "vision_feature_select_strategy": "full",
    }
