"""Parity with transformers' LlavaOnevision: a random model of a given size, converted, must give the
same hidden states, stage by stage.

    python benchmarks/parity_onevision.py --size 0.5b

Needs PyTorch. The real image is laid out by our inputs; transformers gets the same pixels.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from llave_jax.inputs.batch import Budget
from llave_jax.inputs.config import grid_pinpoints
from llave_jax.inputs.item import Item
from llave_jax.inputs.packing import Packer
from llave_jax.inputs.sequence import VISUAL_SLOT, SequenceBuilder, TokenSequence
from llave_jax.models.config import LlaveConfig
from llave_jax.models.llave import Llave
from llave_jax.weights import model_dir
from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.tokenizer_files import copy_tokenizer_files

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
SIZES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tiny": (
        {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4}
        | {"num_key_value_heads": 2, "intermediate_size": 128, "vocab_size": 640},
        # 58 = 7 * 8 + 2: as in the real tower, the last pixels belong to no patch.
        {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        | {"intermediate_size": 96, "image_size": 58, "patch_size": 8},
    ),
    "0.5b": (
        {"hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14}
        | {"num_key_value_heads": 2, "intermediate_size": 4864, "vocab_size": 151_936},
        {"hidden_size": 1152, "num_hidden_layers": 26, "num_attention_heads": 16}
        | {"intermediate_size": 4304, "image_size": 384, "patch_size": 14},
    ),
}


def random_model(size: str, seed: int = 0):
    """A LlavaOnevisionForConditionalGeneration in which every parameter matters."""
    import torch
    from transformers import (
        LlavaOnevisionConfig,
        LlavaOnevisionForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    text, vision = SIZES[size]
    text = {**text, "rope_theta": 1_000_000.0}
    text_config = Qwen2Config(**text, tie_word_embeddings=True)
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**vision, vision_use_head=False),
        text_config=text_config,
        image_grid_pinpoints=[list(p) for p in grid_pinpoints(vision["image_size"], 2, 2)],
        image_token_index=text["vocab_size"] - 2,
        video_token_index=text["vocab_size"] - 1,
        # With more than two tiles an image's map is scaled down.
        vision_aspect_ratio="anyres_max_2",
    )
    torch.manual_seed(seed)
    model = LlavaOnevisionForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:  # biases are made as zeros, norms as ones
                parameter += 0.1 * torch.randn_like(parameter)
    return model


def save(model, directory: Path, **options) -> Path:
    """`model.save_pretrained` and a tokenizer."""
    model.save_pretrained(directory, **options)
    copy_tokenizer_files(GOLDEN / "checkpoint", directory)
    return directory


def torch_stages(model, sequence: TokenSequence, item: Item) -> dict[str, np.ndarray]:
    """transformers' results for a sequence of ours with one image or video, or none."""
    import torch

    placeholder = model.config.video_token_id if item.video else model.config.image_token_id
    tokens = np.where(sequence.tokens == VISUAL_SLOT, placeholder, sequence.tokens)
    inputs = {"input_ids": torch.tensor(tokens[None].astype(np.int64))}
    stages = {}
    if len(sequence.crops):
        pixels = (sequence.crops.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5
        pixels = torch.tensor(pixels)
        with torch.no_grad():
            tower = model.model.vision_tower(pixels, output_hidden_states=True)
            stages["vision"] = tower.hidden_states[-1].numpy()
            projected = model.model.multi_modal_projector(tower.hidden_states[-1])
            stages["projector"] = projected.numpy()
        if item.video:
            inputs["pixel_values_videos"] = pixels[None]
        else:
            (image,) = item.images
            assert isinstance(image, PIL.Image.Image)
            width, height = image.size
            inputs |= {"pixel_values": pixels[None], "image_sizes": torch.tensor([[height, width]])}
    with torch.no_grad():
        stages["hidden"] = model.model(**inputs, use_cache=False).last_hidden_state[0].numpy()
    return stages


def our_stages(config: LlaveConfig, params: dict, sequence: TokenSequence) -> dict[str, np.ndarray]:
    """The same results from the converted model."""
    budget = Budget(
        rows=1,
        row_length=len(sequence),
        crops=len(sequence.crops),
        groups=1,
        sides=1,
        taps=sequence.taps.width,
    )
    packer = Packer(budget, 1, config.vision.crop)
    if not packer.add([sequence]):
        raise ValueError(f"a batch for {len(sequence)} tokens does not take them")
    batch, _ = packer.emit()
    model = Llave(config)

    def run(params, batch):
        variables, stages = {"params": params}, {}
        if batch.patches.shape[1]:
            stages["vision"] = model.apply(
                variables, batch.patches, batch.zero_crops, method=Llave.vision_features
            )
            stages["projector"] = model.apply(
                variables, stages["vision"], method=lambda module, x: module.projector(x)
            )
        hidden = model.apply(variables, batch, method=Llave.hidden_states)
        stages["hidden"] = jnp.asarray(hidden)[:, 0]
        return jax.tree.map(lambda x: x[0], stages)

    return jax.tree.map(np.asarray, jax.jit(run)(params, batch))


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Largest difference, relative to the largest value."""
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def items(image_size: int) -> dict[str, Item]:
    """A text, a photograph whose map is scaled down, one whose is not, and a short video."""
    photo = PIL.Image.open(GOLDEN / "images" / "square.png").convert("RGB")
    scaled = photo.resize((image_size * 5 // 3, image_size * 5 // 4), PIL.Image.Resampling.BICUBIC)
    wide = photo.resize((image_size * 2, image_size * 3 // 4), PIL.Image.Resampling.BICUBIC)
    return {
        "text": Item("A cat and a dog"),
        "scaled": Item("<image>\nRepresent the given image.", images=(scaled,)),
        "wide": Item("<image>\nRepresent the given image.", images=(wide,)),
        "video": Item(
            "<image>\nRepresent the given video.", video=[photo.rotate(10 * n) for n in range(3)]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=tuple(SIZES), default="0.5b")
    parser.add_argument("--workdir", help="where the weights are kept meanwhile (several GB)")
    values = parser.parse_args()
    work = Path(tempfile.mkdtemp(dir=values.workdir))
    try:
        model = random_model(values.size)
        config = convert_from_hf(save(model, work / "hf"), work / "converted")
        builder = SequenceBuilder(model_dir.load_tokenizer(work / "converted"), config.input_spec)
        sequences = {name: builder(item) for name, item in items(config.vision.image_size).items()}
        theirs = {
            name: torch_stages(model, sequences[name], item)
            for name, item in items(config.vision.image_size).items()
        }
        del model
        gc.collect()
        params = model_dir.load_params(work / "converted", dtype=np.float32)
        for name, sequence in sequences.items():
            ours = our_stages(config, params, sequence)
            for stage, expected in theirs[name].items():
                print(
                    f"{name:6} {len(sequence):5} tokens  {stage:10} largest relative difference "
                    f"{difference(ours[stage], expected):.2e}",
                    flush=True,
                )
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
