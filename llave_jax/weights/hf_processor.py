"""The processor files of a Hugging Face checkpoint: how transformers prepares images and videos."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llave_jax.models.config import LlaveConfig
from llave_jax.weights.hf_config import expect
from llave_jax.weights.hf_inputs import onevision_inputs
from llave_jax.weights.json_files import read_json, section
from llave_jax.weights.safetensors_io import CheckpointError

CHAT_TEMPLATE_FILE = "chat_template.jinja"

# `inputs.chat` in Jinja, for transformers, sentence-transformers and vLLM: one user message becomes the prompt that the
# model was trained with. The assistant's turn, whose last newline is the token that is pooled, is always there, with or
# without `add_generation_prompt`. Parts are joined by newlines. A system message is a prompt, in front of the user's
# text and behind the images that this begins with; the usual system message and an empty assistant turn, which other guides tell people to add, change nothing.
# Whatever else would become a vector of another prompt is refused.
CHAT_TEMPLATE = """\
{%- set turn = namespace(prompt='', text='', placed='', images=0, leading=0, users=0) -%}
{%- for message in messages -%}
{%- if message['role'] not in ['system', 'user', 'assistant'] -%}
{{- raise_exception("the role is " ~ message['role'] ~ "; expected one message of the role user, and for a prompt one of the role system") -}}
{%- endif -%}
{%- set said = namespace(text='', placed='', texts=0) -%}
{%- if message['content'] is string -%}
{%- set said.text = message['content'] -%}
{%- set said.placed = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- if not loop.first -%}{%- set said.placed = said.placed ~ '\\n' -%}{%- endif -%}
{%- if part['type'] == 'text' -%}
{%- set said.text = said.text ~ ('\\n' if said.texts else '') ~ part['text'] -%}
{%- set said.texts = said.texts + 1 -%}
{%- set said.placed = said.placed ~ part['text'] -%}
{%- elif part['type'] in ['image', 'image_url'] and message['role'] == 'user' -%}
{%- set turn.images = turn.images + 1 -%}
{%- if not said.texts -%}{%- set turn.leading = turn.leading + 1 -%}{%- endif -%}
{%- set said.placed = said.placed ~ '<image>' -%}
{%- else -%}
{{- raise_exception("a message of the role " ~ message['role'] ~ " has a part of type " ~ part['type'] ~ "; expected texts, and images in the user's message. Videos are embedded by llave_jax alone: transformers lays them out in another way") -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{%- set turn.users = turn.users + 1 -%}
{%- set turn.text = said.text -%}
{%- set turn.placed = said.placed -%}
{%- elif message['role'] == 'system' and said.text | trim != 'You are a helpful assistant.' -%}
{%- if '<image>' in said.text or '<|image_' in said.text -%}
{{- raise_exception("the system message, which is the prompt, has an image marker") -}}
{%- endif -%}
{%- set turn.prompt = turn.prompt ~ said.text -%}
{%- elif message['role'] == 'assistant' and said.text | trim -%}
{{- raise_exception("the assistant's message holds text; an embedding is made of one user message") -}}
{%- endif -%}
{%- endfor -%}
{%- if turn.users != 1 -%}
{{- raise_exception("there are " ~ turn.users ~ " messages of the role user; an embedding is made of one") -}}
{%- endif -%}
{%- for number in range(1, 10) -%}
{%- set turn.text = turn.text | replace('<|image_' ~ number ~ '|>', '<image>') -%}
{%- endfor -%}
{%- set markers = turn.text.split('<image>') | length - 1 -%}
{%- if markers and markers != turn.images -%}
{{- raise_exception("the text has " ~ markers ~ " image marker(s) for " ~ turn.images ~ " image(s)") -}}
{%- endif -%}
{%- if turn.images and turn.images == turn.leading and not markers -%}
{%- set content = ('<image>\\n' * turn.images ~ turn.prompt ~ turn.text) | trim -%}
{%- else -%}
{%- set written = turn.text if markers else turn.placed -%}
{%- set behind = namespace(markers=written) -%}
{%- for _ in range(turn.images) -%}
{%- if behind.markers.lstrip().startswith('<image>') -%}
{%- set behind.markers = behind.markers.lstrip()[7:].lstrip() -%}
{%- endif -%}
{%- endfor -%}
{%- set content = written[:written | length - behind.markers | length] ~ turn.prompt ~ behind.markers -%}
{%- if turn.images == 1 and not content.startswith('<image>') -%}
{%- set content = ('<image>\\n' ~ (content | replace('<image>', '') | trim)) | trim -%}
{%- endif -%}
{%- endif -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n<|im_start|>user\\n' ~ content ~ '<|im_end|>\\n<|im_start|>assistant\\n\\n<|im_end|>\\n' -}}
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
