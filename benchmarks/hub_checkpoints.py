"""Checkpoints of true size with random weights, in the form of those on the hub.

Written with the safetensors package from shapes that are said here, so that conversion is tried on
something it did not make itself. Tensors, configuration and files are those of

  llava-onevision-0.5b  lmms-lab/llava-onevision-qwen2-0.5b-ov, a base model of LLaVE
  llave-0.5b            the base fine-tuned as LLaVE and saved by transformers 4.39.3
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

GOLDEN = Path(__file__).parents[1] / "tests" / "golden" / "checkpoint"
FORMS = ("llava-onevision-0.5b", "llave-0.5b")

WIDTH, LAYERS, KEYS, MLP = 896, 24, 2 * 64, 4864
TOWER_WIDTH, TOWER_LAYERS, TOWER_MLP = 1152, 26, 4304
TOWER = "model.vision_tower.vision_tower.vision_model"

FIRST_SPECIAL = 151_643
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# The base has the rows of Qwen2; the other as many as its tokenizer has tokens.
ROWS = {"llava-onevision-0.5b": 151_936, "llave-0.5b": 151_647}

_TEXT = {
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": MLP,
    "max_position_embeddings": 32768,
    "max_window_layers": 24,
    "num_attention_heads": 14,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "use_cache": True,
    "use_sliding_window": False,
}
_VISION = {
    "image_aspect_ratio": "anyres_max_9",
    "image_crop_resolution": None,
    "image_split_resolution": None,
    "mm_hidden_size": TOWER_WIDTH,
    "mm_patch_merge_type": "spatial_unpad",
    "mm_projector_lr": None,
    "mm_projector_type": "mlp2x_gelu",
    "mm_resampler_type": None,
    "mm_spatial_pool_mode": "bilinear",
    "mm_use_im_patch_token": False,
    "mm_use_im_start_end": False,
    "mm_vision_select_feature": "patch",
    "mm_vision_select_layer": -2,
    "mm_vision_tower": "google/siglip-so400m-patch14-384",
    "mm_vision_tower_lr": 2e-06,
    "pos_skipping_range": 4096,
    "tokenizer_padding_side": "right",
    "use_mm_proj": True,
    "use_pos_skipping": False,
    "vision_tower_pretrained": None,
}
_COMMON = {"architectures": ["LlavaQwenForCausalLM"], "torch_dtype": "bfloat16"}


def _pinpoints(side: int) -> list[list[int]]:
    return [[384 * w, 384 * h] for w in range(1, side + 1) for h in range(1, side + 1)]


CONFIGS = {
    "llava-onevision-0.5b": {
        "_name_or_path": "lmms-lab/llava-onevision-qwen2-0.5b-si",
        **_COMMON,
        **_TEXT,
        **_VISION,
        "image_grid_pinpoints": _pinpoints(6),
        "image_token_index": 151646,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "model_type": "llava",
        "tie_word_embeddings": True,
        "tokenizer_model_max_length": 32768,
        "transformers_version": "4.40.0.dev0",
        "vocab_size": 151936,
    },
    "llave-0.5b": {
        "_name_or_path": "lmms-lab/llava-onevision-qwen2-0.5b-ov",
        **_COMMON,
        **_TEXT,
        **_VISION,
        "add_faster_video": False,
        "add_time_instruction": False,
        "alpha": 9.0,
        "faster_token_stride": 10,
        "force_sample": False,
        "ignore_index": -100,
        "image_grid_pinpoints": _pinpoints(2),
        "image_token_index": 151646,
        "mm_newline_position": "grid",
        "mm_spatial_pool_stride": None,
        "mm_tunable_parts": "mm_mlp_adapter,mm_language_model",
        "model_type": "llava",
        "projector_hidden_act": "gelu",
        "text_config": {"model_type": "llama"},
        "tokenizer_model_max_length": 4096,
        "transformers_version": "4.39.3",
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
    },
}


def write_checkpoint(directory: Path, form: str, seed: int = 0) -> Path:
    """Write the checkpoint `form` into a new directory: 1.8 GB."""
    directory.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    tensors = {name: _random(rng, name, shape) for name, shape in shapes(ROWS[form])}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(
        json.dumps(CONFIGS[form], indent=2, sort_keys=True) + "\n"
    )
    (directory / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 151643, "eos_token_id": [151645, 151643]}, indent=2) + "\n"
    )
    (directory / "README.md").write_text("---\nlicense: apache-2.0\n---\n\nRandom weights.\n")
    # Left by the trainer; pickled, and never opened.
    (directory / "training_args.bin").write_bytes(b"\x80\x02pickled")
    write_tokenizer(directory, image_token=form == "llave-0.5b")
    return directory


def shapes(rows: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor: the embedding has `rows` rows, and there is no LM head."""

    def linear(name: str, inputs: int, outputs: int, *, bias: bool = True):
        yield f"{name}.weight", (outputs, inputs)
        if bias:
            yield f"{name}.bias", (outputs,)

    def layer_norm(name: str):
        yield f"{name}.weight", (TOWER_WIDTH,)
        yield f"{name}.bias", (TOWER_WIDTH,)

    yield "model.embed_tokens.weight", (rows, WIDTH)
    yield "model.image_newline", (WIDTH,)
    yield "model.norm.weight", (WIDTH,)
    yield from linear("model.mm_projector.0", TOWER_WIDTH, WIDTH)
    yield from linear("model.mm_projector.2", WIDTH, WIDTH)
    for n in range(LAYERS):
        layer = f"model.layers.{n}"
        yield f"{layer}.input_layernorm.weight", (WIDTH,)
        yield f"{layer}.post_attention_layernorm.weight", (WIDTH,)
        yield from linear(f"{layer}.self_attn.q_proj", WIDTH, WIDTH)
        yield from linear(f"{layer}.self_attn.k_proj", WIDTH, KEYS)
        yield from linear(f"{layer}.self_attn.v_proj", WIDTH, KEYS)
        yield from linear(f"{layer}.self_attn.o_proj", WIDTH, WIDTH, bias=False)
        yield from linear(f"{layer}.mlp.gate_proj", WIDTH, MLP, bias=False)
        yield from linear(f"{layer}.mlp.up_proj", WIDTH, MLP, bias=False)
        yield from linear(f"{layer}.mlp.down_proj", MLP, WIDTH, bias=False)
    yield f"{TOWER}.embeddings.patch_embedding.weight", (TOWER_WIDTH, 3, 14, 14)
    yield f"{TOWER}.embeddings.patch_embedding.bias", (TOWER_WIDTH,)
    yield f"{TOWER}.embeddings.position_embedding.weight", (729, TOWER_WIDTH)
    for n in range(TOWER_LAYERS):
        layer = f"{TOWER}.encoder.layers.{n}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            yield from linear(f"{layer}.self_attn.{name}", TOWER_WIDTH, TOWER_WIDTH)
        yield from layer_norm(f"{layer}.layer_norm1")
        yield from layer_norm(f"{layer}.layer_norm2")
        yield from linear(f"{layer}.mlp.fc1", TOWER_WIDTH, TOWER_MLP)
        yield from linear(f"{layer}.mlp.fc2", TOWER_MLP, TOWER_WIDTH)
    # The authors' code replaces the tower's head, but keeps the norm in front of it.
    yield from layer_norm(f"{TOWER}.post_layernorm")


def _random(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.standard_normal(shape, np.float32)
    values *= 0.02
    if "norm" in name and name.endswith("weight"):
        values += 1
    return values.astype(ml_dtypes.bfloat16)


def write_tokenizer(directory: Path, *, image_token: bool) -> None:
    """A Qwen2 tokenizer's files with Qwen2's number of tokens: the real first and last ids, and
    between them words that never occur."""
    fast = json.loads((GOLDEN / "tokenizer.json").read_text())
    vocabulary = fast["model"]["vocab"]
    vocabulary |= {f"Ġunused{n}": n for n in range(len(vocabulary), FIRST_SPECIAL)}
    ids = {token: FIRST_SPECIAL + n for n, token in enumerate(SPECIAL)}
    if image_token:
        # The authors' training adds it and saves the tokenizer with it.
        ids["<image>"] = FIRST_SPECIAL + len(SPECIAL)
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    fast["added_tokens"] = [
        {"id": number, "content": token, **flags, "special": True} for token, number in ids.items()
    ]
    settings = json.loads((GOLDEN / "tokenizer_config.json").read_text()) | {
        "added_tokens_decoder": {
            str(number): {"content": token, **flags, "special": True}
            for token, number in ids.items()
        },
        "model_max_length": 4096 if image_token else 32768,
    }
    files = {
        "tokenizer.json": fast,
        "tokenizer_config.json": settings,
        "vocab.json": vocabulary,
        "added_tokens.json": ids,
        "special_tokens_map.json": json.loads((GOLDEN / "special_tokens_map.json").read_text()),
    }
    for name, values in files.items():
        (directory / name).write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    (directory / "merges.txt").write_bytes((GOLDEN / "merges.txt").read_bytes())
