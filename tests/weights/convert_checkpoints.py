"""Small Hugging Face directories for the conversion tests, made without the code under test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import load_file, save_file

from tests.conftest import GOLDEN

TOKENIZER_FILES = (
    "added_tokens.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
)
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

# From the names of the released LLaVE checkpoints to the forms in which transformers has saved
# LlavaOnevisionForConditionalGeneration over time.
ONEVISION_NAMES = {
    "hub": [
        ("model.vision_tower.vision_tower.", "vision_tower."),
        ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
        ("model.image_newline", "image_newline"),
        ("lm_head.", "language_model.lm_head."),
        ("model.", "language_model.model."),
    ],
    "transformers5": [
        ("model.vision_tower.vision_tower.vision_model.", "vision_tower."),
        ("model.mm_projector.0.", "multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "multi_modal_projector.linear_2."),
        ("model.image_newline", "image_newline"),
        ("lm_head.", "language_model.lm_head."),
        ("model.", "language_model.model."),
    ],
    "state_dict": [
        ("model.vision_tower.vision_tower.", "model.vision_tower."),
        ("model.mm_projector.0.", "model.multi_modal_projector.linear_1."),
        ("model.mm_projector.2.", "model.multi_modal_projector.linear_2."),
        ("model.image_newline", "model.image_newline"),
        ("lm_head.", "lm_head."),
        ("model.", "model.language_model."),
    ],
}
LAYOUTS = ("llave", *ONEVISION_NAMES)


def golden_tensors() -> dict[str, np.ndarray]:
    return load_file(GOLDEN / "checkpoint" / "model.safetensors")


def renamed(tensors: dict[str, np.ndarray], layout: str) -> dict[str, np.ndarray]:
    if layout == "llave":
        return tensors

    def rename(name: str) -> str:
        for old, new in ONEVISION_NAMES[layout]:
            if name.startswith(old):
                return new + name.removeprefix(old)
        raise KeyError(name)

    return {rename(name): array for name, array in tensors.items()}


def golden_config(layout: str) -> dict:
    """The golden checkpoint's config.json in a layout."""
    values = json.loads((GOLDEN / "checkpoint" / "config.json").read_text())
    if layout == "llave":
        return values
    vision = json.loads((GOLDEN / "siglip-tiny-open-patch30-224" / "config.json").read_text())
    return {
        "architectures": ["LlavaOnevisionForConditionalGeneration"],
        "image_grid_pinpoints": [[h, w] for w, h in values["image_grid_pinpoints"]],
        "image_token_index": 598,
        "model_type": "llava_onevision",
        "text_config": {
            "hidden_size": 64,
            "intermediate_size": 128,
            "max_position_embeddings": 2048,
            "model_type": "qwen2",
            "num_attention_heads": 4,
            "num_hidden_layers": 3,
            "num_key_value_heads": 2,
            "rope_theta": 1000000.0,
            "tie_word_embeddings": True,
            "vocab_size": 600,
        },
        "torch_dtype": "float32",
        "video_token_index": 599,
        "vision_aspect_ratio": "anyres_max_9",
        "vision_config": vision | {"num_hidden_layers": 2},
        "vision_feature_layer": -1,
    }


def saved_by_transformers(values: dict, model_type: str) -> dict:
    """The config.json that transformers 4.39.3 makes of `values` when it reads and saves them under
    another `model_type` (compared with that version)."""
    saved = {"_name_or_path": "somewhere/it-was", **values, "model_type": model_type}
    if model_type != "llava":
        return saved
    # Its LlavaConfig belongs to another model. It brings that model's settings, drops the
    # vocabulary's size and does not write what is the default of all configurations.
    saved.pop("vocab_size", None)
    if saved.get("tie_word_embeddings"):
        del saved["tie_word_embeddings"]
    return saved | {
        "ignore_index": -100,
        "image_token_index": 32000,
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "llama"},
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


def add_token(directory: Path, token: str, number: int) -> None:
    """Give a tokenizer one more token, as `add_tokens` does."""
    kinds = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    path = directory / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"].append({"id": number, "content": token, **kinds, "special": True})
    path.write_text(json.dumps(values))
    path = directory / "added_tokens.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {token: number}))
    path = directory / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["added_tokens_decoder"][str(number)] = {"content": token, **kinds, "special": True}
    path.write_text(json.dumps(values))


def write_hf(
    directory: Path,
    layout: str = "llave",
    *,
    tensors: dict[str, np.ndarray] | None = None,
    config: dict | None = None,
    changes: dict | None = None,
    shards: int = 1,
    dtype: str = "float32",
) -> Path:
    """Write a checkpoint directory.

    Args:
      tensors: in the names of `layout`; by default the golden checkpoint's.
      config: content of config.json; by default the golden one's, with `changes`.
    """
    directory.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copyfile(GOLDEN / "checkpoint" / name, directory / name)
    tower = directory.parent / "siglip-tiny-open-patch30-224"
    if layout == "llave" and not tower.exists():
        shutil.copytree(GOLDEN / tower.name, tower)
    config = (config or golden_config(layout)) | (changes or {})
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    if tensors is None:
        tensors = renamed(golden_tensors(), layout)
    tensors = {name: array.astype(DTYPES[dtype]) for name, array in tensors.items()}
    save_weights(directory, tensors, shards)
    return directory


def save_weights(directory: Path, tensors: dict[str, np.ndarray], shards: int = 1) -> None:
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for number in range(shards):
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        part = {name: tensors[name] for name in sorted(tensors)[number::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(array.nbytes for array in tensors.values())
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    )


def assert_same_files(first: Path, second: Path) -> None:
    """Two directories hold the same files, byte for byte."""

    def contents(directory: Path) -> dict[str, bytes]:
        files = sorted(path for path in directory.rglob("*") if path.is_file())
        return {str(path.relative_to(directory)): path.read_bytes() for path in files}

    ours, theirs = contents(first), contents(second)
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
