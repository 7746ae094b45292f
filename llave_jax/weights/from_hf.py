"""Hugging Face directory -> model directory, tensor by tensor.

Reads safetensors only; nothing is ever unpickled. Every name, shape and dtype is checked against the
table of weights before anything is written. The model directory keeps what is needed to write the
same files again (`to_hf`).
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from llave_jax.common.directories import make_directory
from llave_jax.common.files import staged_directory
from llave_jax.common.paths import OutsideRoot, check_links, is_plain_name
from llave_jax.common.progress import Progress
from llave_jax.inputs.chat import IMAGE_MARKER
from llave_jax.models.config import LlaveConfig
from llave_jax.models.parameters import EMBEDDING, LM_HEAD, parameter_shapes
from llave_jax.weights import hf_config, hf_names, model_dir
from llave_jax.weights.hf_names import HfTensor
from llave_jax.weights.hf_processor import check_image_processor
from llave_jax.weights.json_files import read_json, section
from llave_jax.weights.prompts import read_hf_prompts, write_prompts
from llave_jax.weights.safetensors_io import (
    DTYPE_NAMES,
    CheckpointError,
    SafetensorsFile,
    SafetensorsWriter,
    check_finite,
    encode_header,
)
from llave_jax.weights.tokenizer_files import (
    check_tokenizer_files,
    copy_tokenizer_files,
    load_tokenizer,
    token_ids,
)

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"

# Files that are large and never read: the weights in other formats, optimiser states and the like.
_OTHER_WEIGHTS = re.compile(
    r"pytorch_model.*|.*\.(safetensors|pt|pth|ckpt|h5|msgpack|gguf|onnx|onnx_data)"
)
_NOT_OF_THE_MODEL = (".git", ".cache")
_MAX_LISTED = 20

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class HfWeights:
    """The safetensors files of a Hugging Face directory.

    Attributes:
      files: in the order of their names.
      owner: tensor name -> the file that holds it.
    """

    files: tuple[SafetensorsFile, ...]
    owner: dict[str, SafetensorsFile]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        return {name: file.tensors[name].shape for name, file in self.owner.items()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Which tensor goes where.

    Attributes:
      parameters: path of our parameter -> names of its tensors: one of each layer if it is stacked.
      tensors: Hugging Face name -> the tensor.
      carried: names of tensors to keep as they are.
      tied: names of tensors with the same bytes as the token embedding.
    """

    parameters: dict[str, list[str]]
    tensors: dict[str, HfTensor]
    carried: list[str]
    tied: list[str]


def convert_from_hf(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    vision_config: str | os.PathLike | None = None,
    prompts: Mapping[str, str] | None = None,
    overwrite: bool = False,
    show_progress: bool = True,
) -> LlaveConfig:
    """Convert a Hugging Face directory of either layout to a model directory.

    Args:
      source: directory with config.json, tokenizer and safetensors weights.
      output: the model directory to make; appears when it is complete.
      vision_config: the vision tower's config.json, if the checkpoint does not have its sizes.
      prompts: named ones to give the model; None: those of the checkpoint.
      overwrite: replace a model directory that exists.
      show_progress: show a progress bar.

    Returns:
      The model's configuration.

    Raises:
      CheckpointError: naming all tensors that are missing, surplus, doubled or of a wrong shape,
        or the setting that is not supported.
      FileExistsError: `output` exists.
    """
    source, output = Path(source), Path(output)
    check_source_links(source)
    weights = open_weights(source)
    model = hf_config.read_hf_model(
        source, weights.shapes(), Path(vision_config) if vision_config else None
    )
    if model.layout == "onevision":
        check_image_processor(source)
    check_tokenizer_files(source)
    plan = _make_plan(weights, model)
    _warn_of_tokens_without_embedding(source, model.config)
    model_dir.check_output(output, overwrite=overwrite, keep=source)
    with staged_directory(output) as staged:
        copy_tokenizer_files(source, staged / model_dir.TOKENIZER)
        load_tokenizer(staged / model_dir.TOKENIZER)
        _write_parameters(staged / model_dir.WEIGHTS, weights, plan, model.config, show_progress)
        if plan.carried:
            _write_carried(staged / model_dir.CARRIED, weights, plan.carried)
        _copy_source_files(source, staged / model_dir.SOURCE, weights)
        _write_layout(staged / model_dir.LAYOUT, weights, model.layout, plan.tied)
        model_dir.write_config(staged, model.config)
        write_prompts(staged, read_hf_prompts(source) if prompts is None else prompts)
    return model.config


def check_source_links(directory: Path) -> None:
    """Refuses a checkpoint in which a link leads out of it: what a conversion copies may be published later.

    In the hub's cache all files are links to `blobs` of the same repository.

    Args:
      directory: the checkpoint.

    Raises:
      CheckpointError: there is no such directory, or a link leads out of it; it names the link.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    real = directory.resolve()
    in_hub_cache = real.parent.name == "snapshots" and real.parents[1].name.startswith("models--")
    try:
        check_links(directory, real.parents[1] if in_hub_cache else real)
    except OutsideRoot as error:
        raise CheckpointError(str(error)) from error


def open_weights(directory: Path) -> HfWeights:
    """Read the headers of all weight files of a Hugging Face directory.

    Args:
      directory: with safetensors files, and their index if there are several.

    Returns:
      The files, open for reading.

    Raises:
      CheckpointError: there are none, or only pickled ones, or the index does not fit the files.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: no such directory")
    index, single = directory / INDEX_FILE, directory / SINGLE_FILE
    present = {path.name for path in directory.glob("*.safetensors")}
    if index.is_file():
        weight_map = section(read_json(index), "weight_map", index)
        odd = [name for name in weight_map.values() if not is_plain_name(name)]
        if odd:
            raise CheckpointError(
                f"{index}: names {odd[0]!r:.100}; expected the name of a file in {directory}"
            )
        expected = set(weight_map.values())
    elif single.is_file():
        weight_map, expected = None, {SINGLE_FILE}
    else:
        _refuse_without_safetensors(directory)
    if missing := sorted(expected - present):
        raise CheckpointError(f"{index}: names {', '.join(missing)}, which {directory} lacks")
    if surplus := sorted(present - expected):
        raise CheckpointError(
            f"{directory}: {', '.join(surplus)} beside the weights that "
            f"{INDEX_FILE if weight_map is not None else SINGLE_FILE} names; move what is not "
            "part of the model elsewhere"
        )
    files = tuple(SafetensorsFile(directory / name) for name in sorted(expected))
    owner: dict[str, SafetensorsFile] = {}
    for file in files:
        for name in file.tensors:
            if name in owner:
                raise CheckpointError(
                    f"tensor {name} is in both {owner[name].path} and {file.path}"
                )
            owner[name] = file
    if weight_map is not None:
        found = {name: file.path.name for name, file in owner.items()}
        for name in sorted(weight_map.keys() | found.keys()):
            if weight_map.get(name) != found.get(name):
                raise CheckpointError(
                    f"{index}: tensor {name} is listed in {weight_map.get(name)}, but is in "
                    f"{found.get(name)}"
                )
    return HfWeights(files, owner)


def _refuse_without_safetensors(directory: Path) -> NoReturn:
    pickled = sorted(p.name for p in directory.iterdir() if p.suffix in (".bin", ".pt", ".pth"))
    if not pickled:
        raise CheckpointError(
            f"{directory}: no weights; expected {SINGLE_FILE}, or shards with {INDEX_FILE}"
        )
    raise CheckpointError(
        f"{directory}: only pickled weights ({', '.join(pickled[:3])}), which can run code when "
        "read and are refused. If you trust them, save them as safetensors with the code that wrote "
        "them: model = ModelClass.from_pretrained(DIR); "
        "model.save_pretrained(NEW_DIR, safe_serialization=True)"
    )


def _make_plan(weights: HfWeights, model: hf_config.HfModel) -> Plan:
    """Decide for each tensor of a checkpoint where it goes.

    Args:
      weights: the checkpoint's files.
      model: what its configuration says.

    Raises:
      CheckpointError: naming all tensors that are surplus, doubled, missing or of a wrong shape, and
        parameters whose layers differ in dtype.
    """
    problems: list[str] = []
    tensors: dict[str, HfTensor] = {}
    names: dict[HfTensor, str] = {}
    for name, shape in weights.shapes().items():
        tensor = hf_names.find_tensor(name, model.layout)
        if tensor is None or not _within(tensor, model):
            problems.append(f"surplus: {name} {list(shape)} is not part of the model")
            continue
        if tensor in names:
            problems.append(f"double: {names[tensor]} and {name} are the same tensor of the model")
            continue
        expected = hf_names.hf_shape(tensor.weight, model.config)
        if shape != expected:
            problems.append(f"shape: {name} is {list(shape)}; expected {list(expected)}")
        names[tensor] = name
        tensors[name] = tensor
    problems += [
        f"missing: {hf_names.hf_name(tensor, model.layout)} {list(hf_names.hf_shape(tensor.weight, model.config))}"
        for tensor in hf_names.parameter_tensors(model.config)
        if tensor not in names
    ]
    parameters: dict[str, list[str]] = defaultdict(list)
    for tensor in hf_names.parameter_tensors(model.config):
        if tensor in names:
            parameters[tensor.weight.path].append(names[tensor])
    problems += _mixed_dtypes(weights, parameters)
    if problems:
        listed = problems[:_MAX_LISTED]
        if len(problems) > len(listed):
            listed.append(f"and {len(problems) - len(listed)} more")
        raise CheckpointError("the weights do not fit the configuration:\n  " + "\n  ".join(listed))
    used = {name for group in parameters.values() for name in group}
    carried = [name for name in tensors if name not in used]
    tied = _tied_heads(weights, names)
    return Plan(dict(parameters), tensors, [name for name in carried if name not in tied], tied)


def _warn_of_tokens_without_embedding(source: Path, config: LlaveConfig) -> None:
    """A resized checkpoint can have fewer embedding rows than its tokenizer has tokens.

    That is harmless until such a token occurs in a text. `<image>` never reaches the embedding: visual
    tokens take its place.
    """
    ids, rows = token_ids(source), config.text.vocab_size
    beyond = sorted((number, token) for token, number in ids.items() if number >= rows)
    beyond = [(number, token) for number, token in beyond if token != IMAGE_MARKER]
    if beyond:
        listed = ", ".join(f"{token!r} ({number})" for number, token in beyond[:3])
        logger.warning(
            "%s: the embedding has %d rows, none for %d token(s) of the tokenizer: %s%s. Texts with "
            "such a token have no embedding; training refuses the tokenizer",
            *(source, rows, len(beyond), listed, ", ..." if len(beyond) > 3 else ""),
        )


def _within(tensor: HfTensor, model: hf_config.HfModel) -> bool:
    """Whether a tensor's layer exists. The tower's last layers exist, although they do not run."""
    if tensor.layer is None:
        return True
    if tensor.weight.tower == "vision":
        return tensor.layer < model.tower_layers
    return tensor.layer < model.config.text.num_layers


def _mixed_dtypes(weights: HfWeights, parameters: dict[str, list[str]]) -> list[str]:
    """A line for each parameter whose layers differ in dtype: the stacked parameter has one dtype."""
    problems = []
    for path, group in parameters.items():
        by_dtype: dict[str, str] = {}
        for name in group:
            by_dtype.setdefault(DTYPE_NAMES[weights.owner[name].tensors[name].dtype], name)
        if len(by_dtype) > 1:
            listed = ", ".join(f"{name} is {dtype}" for dtype, name in by_dtype.items())
            problems.append(f"dtype: the layers of {path} must share one dtype, but {listed}")
    return problems


def _tied_heads(weights: HfWeights, names: dict[HfTensor, str]) -> list[str]:
    """The LM head's name if it has the bytes of the embedding: then it need not be carried along."""
    head = names.get(HfTensor(LM_HEAD))
    if head is None:
        return []
    embedding = names[HfTensor(EMBEDDING)]
    head_file, embedding_file = weights.owner[head], weights.owner[embedding]
    if head_file.tensors[head].dtype != embedding_file.tensors[embedding].dtype:
        return []
    pairs = zip(head_file.chunks(head), embedding_file.chunks(embedding), strict=True)
    return [head] if all(a == b for a, b in pairs) else []


def _write_parameters(
    path: Path, weights: HfWeights, plan: Plan, config: LlaveConfig, show_progress: bool
) -> None:
    shapes = parameter_shapes(config)
    tensors = {}
    for ours, group in plan.parameters.items():
        tensors[ours] = (weights.owner[group[0]].tensors[group[0]].dtype, shapes[ours])
    header = encode_header(tensors, model_dir.AS_CONVERTED)
    total = sum(len(group) for group in plan.parameters.values())
    with (
        SafetensorsWriter(path, header) as writer,
        Progress(total, "converting", unit="tensors", enabled=show_progress) as progress,
    ):
        for name, tensor in plan.tensors.items():
            if name not in plan.parameters.get(tensor.weight.path, ()):
                continue
            array = weights.owner[name].read(name)
            check_finite(array, name, weights.owner[name].path)
            writer.write(
                tensor.weight.path, hf_names.from_hf(tensor.weight, array, config), tensor.layer
            )
            progress.update(1)


def _write_carried(path: Path, weights: HfWeights, carried: list[str]) -> None:
    infos = {name: weights.owner[name].tensors[name] for name in carried}
    header = encode_header(
        {name: (info.dtype, info.shape) for name, info in infos.items()}, {"format": "pt"}
    )
    with SafetensorsWriter(path, header) as writer:
        for name in carried:
            array = weights.owner[name].read(name)
            check_finite(array, name, weights.owner[name].path)
            writer.write(name, array)


def _copy_source_files(source: Path, target: Path, weights: HfWeights) -> None:
    """Copy all files that are not weights, as they are."""
    make_directory(target)
    weight_files = {file.path for file in weights.files}
    for path in model_files(source):
        if path not in weight_files:
            copy = target / path.relative_to(source)
            make_directory(copy.parent)
            shutil.copyfile(path, copy)
    left_out = [str(p.relative_to(source)) for p in _files(source) if _is_other_weights(p, source)]
    if left_out:
        logger.warning("left out, other weights or training state: %s", ", ".join(left_out))
    if (target / model_dir.LAYOUT.name).exists():
        raise CheckpointError(
            f"{source / model_dir.LAYOUT.name}: this name is taken by the conversion; rename it"
        )


def model_files(source: Path) -> list[Path]:
    """The files of a Hugging Face directory that a conversion reads or copies.

    Args:
      source: the directory.

    Returns:
      Their paths, sorted.
    """
    return [path for path in _files(source) if not _is_other_weights(path, source)]


def _files(source: Path) -> list[Path]:
    found = sorted(path for path in source.rglob("*") if path.is_file())
    return [p for p in found if p.relative_to(source).parts[0] not in _NOT_OF_THE_MODEL]


def _is_other_weights(path: Path, source: Path) -> bool:
    of_the_model = path.parent == source and path.suffix == ".safetensors"
    return not of_the_model and bool(_OTHER_WEIGHTS.fullmatch(path.name))


def _write_layout(path: Path, weights: HfWeights, layout: str, tied: list[str]) -> None:
    """Write what `to_hf` needs besides the parameters to write the same weight files, byte for byte."""
    values = {
        "layout": layout,
        "tied": tied,
        "weights": [{"file": file.path.name, "header": file.header} for file in weights.files],
    }
    path.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
