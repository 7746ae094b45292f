"""Model directory -> Hugging Face directory.

Into the layout the model came from: the same files, byte for byte if the weights are still the
same. Into the other layout, or from a model made here: a complete directory of its own. All but the
same files have a model card.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.common.files import staged_directory
from llave_jax.common.progress import Progress
from llave_jax.models.config import SIGLIP_SO400M, LlaveConfig
from llave_jax.models.parameters import EMBEDDING, LM_HEAD, WEIGHTS
from llave_jax.weights import hf_config, hf_names, model_card, model_dir
from llave_jax.weights.from_hf import INDEX_FILE, SINGLE_FILE
from llave_jax.weights.hf_names import LAYOUTS, Match
from llave_jax.weights.safetensors_io import (
    CheckpointError,
    SafetensorsFile,
    SafetensorsWriter,
    encode_header,
    parse_header,
)
from llave_jax.weights.special_tokens import add_special_tokens

logger = logging.getLogger(__name__)

SHARD_BYTES = 5_000_000_000
_ROWS_MULTIPLE = 64

# A conversation in the form the model was trained with, images in front of the text of their turn.
_CHAT_TEMPLATE = """\
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


@dataclasses.dataclass(frozen=True)
class Origin:
    """The Hugging Face directory a model was converted from.

    Attributes:
      layout: "llave" or "onevision"; None for a model made here.
      config: content of its config.json.
      headers: weight file -> header, verbatim.
      tied: names of tensors that repeat the token embedding.
    """

    layout: str | None
    config: dict[str, Any]
    headers: dict[str, str]
    tied: frozenset[str]


class _Model:
    """A model directory or a training run to write: all it consists of.

    Attributes:
      directory: the model directory, of a run its part.
      as_converted: whether the weights are still those of the checkpoint the model came from.
      carried: row of the table -> name of a carried tensor.
      dtypes: path -> dtype in the checkpoint the model came from; without one, of the parameter.
    """

    def __init__(self, path: str | os.PathLike):
        self._params = model_dir.open_params(path)
        self.directory = model_dir.locate(path)
        self.config = model_dir.load_config(self.directory)
        self.origin = _read_origin(self.directory)
        # Parameters in a file are read from it, not through its mapping: mapped pages would stay.
        in_file = self.directory == Path(path)
        self._file = SafetensorsFile(self.directory / model_dir.WEIGHTS) if in_file else None
        self.as_converted = self._file is not None and model_dir.is_as_converted(self._file)
        self._last: tuple[str, np.ndarray] | None = None

        carried = self.directory / model_dir.CARRIED
        self._carried = SafetensorsFile(carried) if carried.is_file() else None
        self.carried: dict[Match, str] = {}
        for name in self._carried.tensors if self._carried else ():
            if hit := hf_names.match(name, self.origin.layout):
                self.carried[hit] = name

        self.dtypes = {name: np.dtype(array.dtype) for name, array in self._params.items()}
        for file, header in self.origin.headers.items():
            for name, info in parse_header(header, file).items():
                hit = hf_names.match(name, self.origin.layout)
                if hit is not None and hit.weight.path is not None:
                    self.dtypes[hit.weight.path] = info.dtype

    def read(self, hit: Match) -> np.ndarray:
        """A tensor in the Hugging Face shape; read all layers of one parameter before the next."""
        if hit in self.carried:
            return self._carried.read(self.carried[hit])
        rule = EMBEDDING if hit.weight == LM_HEAD else hit.weight
        return hf_names.to_hf(rule, self._parameter(rule.path, hit.layer), self.config)

    def _parameter(self, path: str, layer: int | None) -> np.ndarray:
        if self._file is not None:
            return self._file.read(path, layer)
        if self._last is None or self._last[0] != path:
            self._last = None  # before the next one is loaded
            self._last = path, np.asarray(self._params[path])
        array = self._last[1]
        return array if layer is None else array[layer]


def convert_to_hf(
    source: str | os.PathLike,
    output: str | os.PathLike,
    layout: str,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> None:
    """Write a model as a Hugging Face directory.

    Args:
      source: a model directory, or a training run, whose latest weights are cast to the dtypes of
        the checkpoint it began from.
      output: the directory to make; appears when it is complete.
      layout: "llave" (the authors' code) or "onevision" (transformers).
      base_model: for the model card: id on the hub of the model this one was trained from; by
        default what the source says of itself.
      overwrite: replace a directory with a model that exists.

    Raises:
      CheckpointError: the weights and the directory's configuration differ.
      FileExistsError: `output` exists.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    model = _Model(source)
    model_dir.check_output(Path(output), overwrite=overwrite, keep=model.directory)
    with staged_directory(output) as staged:
        if layout == model.origin.layout:
            same = _write_original(staged, model, show_progress)
        else:
            same = False
            _write_translated(staged, model, layout, show_progress)
        if not same:
            _write_card(staged, Path(output).absolute().name, model, layout, base_model)


def _read_origin(source: Path) -> Origin:
    if not (source / model_dir.LAYOUT).is_file():
        return Origin(None, {}, {}, frozenset())
    values = hf_config.read_json(source / model_dir.LAYOUT)
    return Origin(
        layout=values["layout"],
        config=hf_config.read_json(source / model_dir.SOURCE / "config.json"),
        headers={entry["file"]: entry["header"] for entry in values["weights"]},
        tied=frozenset(values["tied"]),
    )


def _write_original(target: Path, model: _Model, show_progress: bool) -> bool:
    """The directory the model came from, with the weights of now; whether nothing has changed."""
    origin, config = model.origin, model.config
    shutil.copytree(model.directory / model_dir.SOURCE, target, dirs_exist_ok=True)
    (target / model_dir.LAYOUT.name).unlink()
    values = hf_config.with_inputs(
        origin.config, origin.layout, config.inputs, config.vision.image_size
    )
    same = values == origin.config
    if not same:
        _write_json(target / "config.json", values)
    same &= not hf_config.write_text_limit(target, config.inputs)
    hits = {}
    for file, header in origin.headers.items():
        for name in parse_header(header, file):
            hits[name] = hf_names.match(name, origin.layout)
            if hits[name] is None:
                raise CheckpointError(
                    f"{model.directory / model_dir.LAYOUT}: {name} is not in the table of weights"
                )
    _write_weights(target, origin.headers, hits, model, show_progress)
    return model.as_converted and same


def _write_card(
    target: Path, title: str, model: _Model, layout: str, base_model: str | None
) -> None:
    card = model_card.write_card(
        target,
        title,
        model.config,
        layout,
        source_card=model.directory / model_dir.SOURCE / model_card.README,
        source_config=model.origin.config,
        base_model=base_model,
    )
    if card.name != model_card.README:
        logger.warning(
            "%s is that of the checkpoint the model comes from; the card of this model is %s: "
            "put it in its place before you publish",
            model_card.README,
            card.name,
        )


def _write_translated(target: Path, model: _Model, layout: str, show_progress: bool) -> None:
    """A directory in a layout the model did not come from."""
    # Without an LM head there is none to write; tying makes the directory complete.
    tied = Match(LM_HEAD) not in model.carried
    text = dataclasses.replace(model.config.text, tie_word_embeddings=tied)
    model_dir.copy_tokenizer(model.directory / model_dir.TOKENIZER, target)
    hf_config.write_text_limit(target, model.config.inputs)
    placeholders: list[int] = []
    if layout == "onevision":
        placeholders = add_special_tokens(target, ["<image>", "<video>"])
        if max(placeholders) >= text.vocab_size:
            rows = -(-(max(placeholders) + 1) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
            text = dataclasses.replace(text, vocab_size=rows)
    written = dataclasses.replace(model.config, text=text)

    hits = hf_names.parameter_matches(written) + [Match(rule) for rule in hf_names.POST_LAYERNORM]
    if not tied:
        hits.append(Match(LM_HEAD))
    tensors = {}
    for hit in hits:
        like = EMBEDDING.path if hit.weight == LM_HEAD else hit.weight.path
        dtype = model.dtypes[like or "vision_tower/position_embedding"]
        tensors[hf_names.hf_name(hit, layout)] = (
            hit,
            dtype,
            hf_names.hf_shape(hit.weight, written),
        )
    _write_shards(target, tensors, model, show_progress)
    _write_settings(target, model, layout, written, placeholders)


def _write_shards(
    target: Path,
    tensors: dict[str, tuple[Match, np.dtype, tuple[int, ...]]],
    model: _Model,
    show_progress: bool,
) -> None:
    """One file, or shards of at most SHARD_BYTES with an index, in the order of the names."""
    shards: list[dict[str, int]] = [{}]
    for name in sorted(tensors):
        _, dtype, shape = tensors[name]
        size = int(np.prod(shape)) * dtype.itemsize
        if shards[-1] and sum(shards[-1].values()) + size > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = size
    files = [SINGLE_FILE]
    if len(shards) > 1:
        files = [
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            for number in range(1, len(shards) + 1)
        ]
        weight_map = {
            name: file for file, shard in zip(files, shards, strict=True) for name in shard
        }
        total = sum(sum(shard.values()) for shard in shards)
        _write_json(
            target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    headers = {
        file: encode_header({name: tensors[name][1:] for name in shard}, {"format": "pt"})
        for file, shard in zip(files, shards, strict=True)
    }
    hits = {name: hit for name, (hit, _, _) in tensors.items()}
    _write_weights(target, headers, hits, model, show_progress)


def _write_weights(
    target: Path,
    headers: dict[str, str],
    hits: dict[str, Match],
    model: _Model,
    show_progress: bool,
) -> None:
    """Fill files of given headers. Parameter after parameter, not file after file: each of ours is
    spread over all layers, and so over all files."""
    rows = {rule: row for row, rule in enumerate(WEIGHTS)}
    with (
        contextlib.ExitStack() as stack,
        Progress(len(hits), "converting", unit="tensors", enabled=show_progress) as progress,
    ):
        owner = {}
        for file, header in headers.items():
            writer = stack.enter_context(SafetensorsWriter(target / file, header))
            owner |= dict.fromkeys(writer.tensors, writer)
        for name in sorted(hits, key=lambda name: (rows[hits[name].weight], hits[name].layer or 0)):
            info = owner[name].tensors[name]
            array = _read_or_make(hits[name], info.shape, model)
            owner[name].write(name, _cast(array, info.dtype, name))
            progress.update(1)


def _read_or_make(hit: Match, shape: tuple[int, ...], model: _Model) -> np.ndarray:
    """A tensor in the shape to write: rows for placeholder tokens are added as zeros, a tower's
    final norm that the model never had is the identity. Neither is ever used in an embedding."""
    if hit.weight in hf_names.POST_LAYERNORM and hit not in model.carried:
        fill = np.ones if hit.weight.hf_name.endswith("weight") else np.zeros
        return fill(shape, np.float32)
    array = model.read(hit)
    if array.shape == shape:
        return array
    padded = np.zeros(shape, array.dtype)
    padded[: len(array)] = array
    return padded


def _cast(array: np.ndarray, dtype: np.dtype, name: str) -> np.ndarray:
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if dtype == np.float16 and not np.isfinite(cast).all():
        raise CheckpointError(
            f"tensor {name} has values up to {np.abs(array).max():.3g}, beyond float16, the dtype "
            "of the checkpoint the model came from"
        )
    return cast


def _write_settings(
    target: Path, model: _Model, layout: str, config: LlaveConfig, placeholders: list[int]
) -> None:
    """All files but weights and tokenizer."""
    origin, dtype = model.origin, model.dtypes[EMBEDDING.path].name
    if layout == "onevision":
        values = hf_config.to_onevision(config, origin.config, dtype, *placeholders)
        text_values = values["text_config"]
        _write_json(target / "processor_config.json", hf_config.processor_values(config))
        _write_json(
            target / "video_preprocessor_config.json", hf_config.video_processor_values(config)
        )
        (target / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
    else:
        values = text_values = hf_config.to_llave(
            config, origin.config, dtype, _tower_name(target, config, origin)
        )
    _write_json(target / "config.json", values)
    _write_json(
        target / "preprocessor_config.json", hf_config.image_processor_values(config, layout)
    )
    generation = model.directory / model_dir.SOURCE / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, target / generation.name)
    else:
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        kept = {key: text_values[key] for key in special if key in text_values}
        _write_json(target / generation.name, {"_from_model_config": True, **kept})


def _tower_name(target: Path, config: LlaveConfig, origin: Origin) -> str:
    """`mm_vision_tower`: the usual tower by its name on the hub, any other one by a directory
    within the checkpoint that holds its configuration."""
    if config.vision == SIGLIP_SO400M:
        usual = "google/siglip-so400m-patch14-384"
        return origin.config.get(hf_config.LLAVE_KEY, {}).get("mm_vision_tower", usual)
    name = "siglip_tower"
    (target / name).mkdir()
    _write_json(target / name / "config.json", hf_config.tower_values(config.vision))
    return name


def _write_json(path: Path, values: dict[str, Any]) -> None:
    text = json.dumps(values, indent=2, sort_keys=True, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
