"""Model directory or training run -> Hugging Face directory.

In the layout that the model was converted from, its files are written again, byte for byte if nothing
has changed. In the other layout, or for a model made here, a new directory is written. Unless nothing has
changed, it has a model card, and in the OneVision layout what sentence-transformers and vLLM read.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llave_jax.common.directories import make_directory
from llave_jax.common.files import staged_directory
from llave_jax.common.progress import Progress
from llave_jax.models.config import SIGLIP_SO400M, LlaveConfig
from llave_jax.models.parameters import EMBEDDING, LM_HEAD, WEIGHTS
from llave_jax.weights import (
    hf_config_export,
    hf_names,
    hf_processor,
    model_card,
    model_dir,
    sentence_transformers,
)
from llave_jax.weights.export_source import ExportSource, Origin
from llave_jax.weights.from_hf import INDEX_FILE, SINGLE_FILE
from llave_jax.weights.hf_inputs import LLAVE_KEY, with_inputs, write_text_limit
from llave_jax.weights.hf_names import LAYOUTS, HfTensor
from llave_jax.weights.json_files import read_json, section, write_json
from llave_jax.weights.prompts import read_hf_prompts, read_prompts
from llave_jax.weights.safetensors_io import (
    CheckpointError,
    SafetensorsWriter,
    encode_header,
    parse_header,
)
from llave_jax.weights.tokenizer_files import add_special_tokens, copy_tokenizer_files

logger = logging.getLogger(__name__)

# A few items with their vectors, for a comparison with other software (`embedding.check_vectors`).
CHECK_VECTORS = "check_vectors.json"

SHARD_BYTES = 5_000_000_000
# The token embedding grows to a multiple of this.
_ROWS_MULTIPLE = 64


def convert_to_hf(
    source: str | os.PathLike,
    output: str | os.PathLike,
    layout: str,
    *,
    base_model: str | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> bool:
    """Write a model as a Hugging Face directory.

    Args:
      source: a model directory or a training run. A run's latest weights, merged with its base where it trained
        adapters, are cast to the dtypes of the checkpoint that it began from.
      output: the directory to make; appears when it is complete.
      layout: "llave" (the authors' code) or "onevision" (transformers).
      base_model: for the model card, the hub's id of the model that this one was trained from. None:
        what the source says of itself.
      overwrite: replace a directory that holds a model.
      show_progress: show a progress bar.

    Returns:
      Whether the files are those of the checkpoint that the model was converted from, byte for byte.

    Raises:
      CheckpointError: the weights and the directory's configuration differ.
      FileExistsError: `output` exists.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}; expected one of {', '.join(LAYOUTS)}")
    model = ExportSource(source)
    model_dir.check_output(Path(output), overwrite=overwrite, keep=model.directory)
    with staged_directory(output) as staged:
        if layout == model.origin.layout:
            same = _write_original(staged, model, show_progress)
        else:
            same = False
            _write_translated(staged, model, layout, show_progress)
        if same:
            return True
        # Those of the checkpoint that the model comes from.
        (staged / CHECK_VECTORS).unlink(missing_ok=True)
        if layout == "onevision":
            _write_embedding_files(staged, model)
        _write_card(staged, Path(output).absolute().name, model, layout, base_model)
    return False


def _write_original(target: Path, model: ExportSource, show_progress: bool) -> bool:
    """Write the directory that the model was converted from, with the model's present weights.

    Returns:
      Whether nothing has changed.
    """
    origin, config = model.origin, model.config
    if origin.layout is None:
        raise ValueError(f"{model.directory} was not converted from a Hugging Face directory")
    shutil.copytree(model.directory / model_dir.SOURCE, target, dirs_exist_ok=True)
    (target / model_dir.LAYOUT.name).unlink()
    for file in origin.headers:
        if (target / file).exists():
            raise CheckpointError(
                f"{model.directory / model_dir.SOURCE / file}: this name is taken by the weights; remove it"
            )
    values = with_inputs(origin.config, origin.layout, config.inputs, config.vision.image_size)
    same = values == origin.config
    if not same:
        write_json(target / "config.json", values)
    same &= not write_text_limit(target, config.inputs)
    if origin.layout == "onevision":
        same &= read_prompts(model.directory) == read_hf_prompts(target)
    tensors = {}
    for file, header in origin.headers.items():
        for name in parse_header(header, file):
            tensor = hf_names.find_tensor(name, origin.layout)
            assert tensor is not None, f"ExportSource takes only known tensors, not {name}"
            tensors[name] = tensor
    _write_weights(target, origin.headers, tensors, model, show_progress)
    return model.as_converted and same


def _write_card(
    target: Path, title: str, model: ExportSource, layout: str, base_model: str | None
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
            "%s describes the checkpoint that the model comes from; the card of this model is %s: "
            "rename it before you publish",
            model_card.README,
            card.name,
        )


class _Planned(NamedTuple):
    """A tensor that is to be written, and in which dtype and shape."""

    tensor: HfTensor
    dtype: np.dtype
    shape: tuple[int, ...]


def _write_translated(target: Path, model: ExportSource, layout: str, show_progress: bool) -> None:
    """Write a directory in a layout that the model was not converted from."""
    # If the model has no LM head, the directory is complete with a tied one.
    tied = HfTensor(LM_HEAD) not in model.carried
    text = dataclasses.replace(model.config.text, tie_word_embeddings=tied)
    copy_tokenizer_files(model.directory / model_dir.TOKENIZER, target)
    write_text_limit(target, model.config.inputs)
    placeholders: list[int] = []
    if layout == "onevision":
        placeholders = add_special_tokens(target, ["<image>", "<video>"])
        if max(placeholders) >= text.vocab_size:
            rows = -(-(max(placeholders) + 1) // _ROWS_MULTIPLE) * _ROWS_MULTIPLE
            text = dataclasses.replace(text, vocab_size=rows)
    written = dataclasses.replace(model.config, text=text)

    needed = hf_names.parameter_tensors(written)
    needed += [HfTensor(weight) for weight in hf_names.POST_LAYERNORM]
    if not tied:
        needed.append(HfTensor(LM_HEAD))
    planned = {}
    for tensor in needed:
        # A carried tensor has no dtype of its own here: it takes that of a parameter of the same tower.
        like = EMBEDDING.path if tensor.weight == LM_HEAD else tensor.weight.path
        dtype = model.dtypes[like or "vision_tower/position_embedding"]
        shape = hf_names.hf_shape(tensor.weight, written)
        planned[hf_names.hf_name(tensor, layout)] = _Planned(tensor, dtype, shape)
    _write_shards(target, planned, model, show_progress)
    _write_settings(target, model, layout, written, placeholders)


def _write_shards(
    target: Path,
    planned: dict[str, _Planned],
    model: ExportSource,
    show_progress: bool,
) -> None:
    """Write one file, or shards of at most SHARD_BYTES and an index, in the order of the names."""
    shards: list[dict[str, int]] = [{}]
    for name in sorted(planned):
        size = math.prod(planned[name].shape) * planned[name].dtype.itemsize
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
        write_json(
            target / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )
    headers = {
        file: encode_header(
            {name: (planned[name].dtype, planned[name].shape) for name in shard}, {"format": "pt"}
        )
        for file, shard in zip(files, shards, strict=True)
    }
    tensors = {name: each.tensor for name, each in planned.items()}
    _write_weights(target, headers, tensors, model, show_progress)


def _write_weights(
    target: Path,
    headers: dict[str, str],
    tensors: dict[str, HfTensor],
    model: ExportSource,
    show_progress: bool,
) -> None:
    """Write the files of given headers, parameter after parameter.

    A parameter's layers are spread over all files, so all files are open at once.
    """
    rows = {weight: row for row, weight in enumerate(WEIGHTS)}
    with (
        contextlib.ExitStack() as stack,
        Progress(len(tensors), "converting", unit="tensors", enabled=show_progress) as progress,
    ):
        owner = {}
        for file, header in headers.items():
            writer = stack.enter_context(SafetensorsWriter(target / file, header))
            owner |= dict.fromkeys(writer.tensors, writer)
        for name, tensor in sorted(
            tensors.items(), key=lambda item: (rows[item[1].weight], item[1].layer or 0)
        ):
            info = owner[name].tensors[name]
            array = _read_or_make(tensor, info.shape, model)
            owner[name].write(name, _cast(array, info.dtype, name))
            progress.update(1)


def _read_or_make(tensor: HfTensor, shape: tuple[int, ...], model: ExportSource) -> np.ndarray:
    """A tensor in the shape to write.

    Rows for placeholder tokens are zeros. If the model has no final norm of the vision tower, the identity
    is written. Neither changes an embedding.
    """
    if tensor.weight in hf_names.POST_LAYERNORM and tensor not in model.carried:
        fill = np.ones if tensor.weight.hf_name.endswith("weight") else np.zeros
        return fill(shape, np.float32)
    array = model.read(tensor)
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
    target: Path, model: ExportSource, layout: str, config: LlaveConfig, placeholders: list[int]
) -> None:
    """Write all files but weights and tokenizer."""
    origin, dtype = model.origin, model.dtypes[EMBEDDING.path].name
    if layout == "onevision":
        values = hf_config_export.to_onevision(config, origin.config, dtype, *placeholders)
        text_values = values["text_config"]
        write_json(target / "processor_config.json", hf_processor.processor_values(config))
        write_json(
            target / "video_preprocessor_config.json", hf_processor.video_processor_values(config)
        )
    else:
        values = text_values = hf_config_export.to_llave(
            config, origin.config, dtype, _tower_name(target, config, origin)
        )
    write_json(target / "config.json", values)
    write_json(
        target / "preprocessor_config.json", hf_processor.image_processor_values(config, layout)
    )
    generation = model.directory / model_dir.SOURCE / "generation_config.json"
    if generation.is_file():
        shutil.copyfile(generation, target / generation.name)
    else:
        special = ("bos_token_id", "eos_token_id", "pad_token_id")
        kept = {key: text_values[key] for key in special if key in text_values}
        write_json(target / generation.name, {"_from_model_config": True, **kept})


def _write_embedding_files(target: Path, model: ExportSource) -> None:
    """Write what makes an embedding model of a checkpoint: the chat template and sentence-transformers' files.

    The chat template of the source is one for chats: it ends before the token that is pooled. It may stand in several
    files, and which of them counts differs between versions of transformers, so all are replaced by one.
    """
    (target / hf_processor.CHAT_TEMPLATE_FILE).write_text(
        hf_processor.CHAT_TEMPLATE, encoding="utf-8"
    )
    (target / "chat_template.json").unlink(missing_ok=True)
    for name in ("tokenizer_config.json", "processor_config.json", "preprocessor_config.json"):
        path = target / name
        if path.is_file() and "chat_template" in (values := read_json(path)):
            del values["chat_template"]
            write_json(path, values, sort_keys=False)
    sentence_transformers.write_files(target, model.config, read_prompts(model.directory))


def _tower_name(target: Path, config: LlaveConfig, origin: Origin) -> str:
    """The value of `mm_vision_tower`.

    The usual tower has a name on the hub. For any other one a directory with its configuration is
    written within the checkpoint.
    """
    if config.vision == SIGLIP_SO400M:
        usual = "google/siglip-so400m-patch14-384"
        named = section(origin.config, LLAVE_KEY, "config.json").get("mm_vision_tower")
        return named if isinstance(named, str) else usual
    name = "siglip_tower"
    make_directory(target / name)
    write_json(target / name / "config.json", hf_config_export.tower_values(config.vision))
    return name
