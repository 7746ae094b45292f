"""Parity with transformers' LlavaOnevisionForConditionalGeneration, weights and hidden states."""

from __future__ import annotations

import json

import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from benchmarks import parity_onevision as parity  # noqa: E402
from llave_jax.inputs.sequence import SequenceBuilder  # noqa: E402
from llave_jax.weights import model_dir  # noqa: E402
from llave_jax.weights.from_hf import convert_from_hf  # noqa: E402
from llave_jax.weights.to_hf import convert_to_hf  # noqa: E402
from tests.weights.convert_checkpoints import assert_same_files  # noqa: E402

TOLERANCE = 1e-4  # relative to the largest value


@pytest.fixture(scope="module")
def model():
    return parity.random_model("tiny")


@pytest.fixture(scope="module")
def converted(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("onevision")
    config = convert_from_hf(
        parity.save(model, path / "hf"), path / "converted", show_progress=False
    )
    return path / "converted", config


@pytest.fixture(scope="module")
def exported(golden, tmp_path_factory):
    """The golden checkpoint as a model directory and for transformers."""
    path = tmp_path_factory.mktemp("llave")
    convert_from_hf(golden / "checkpoint", path / "ours", show_progress=False)
    convert_to_hf(path / "ours", path / "onevision", "onevision", show_progress=False)
    return path


def load(directory):
    model, report = transformers.LlavaOnevisionForConditionalGeneration.from_pretrained(
        directory, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return model.eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("shard", ["5GB", "100KB"])
def test_what_transformers_saves_comes_back(tmp_path, dtype, shard):
    model = parity.random_model("tiny").to(getattr(torch, dtype))
    parity.save(model, tmp_path / "hf", max_shard_size=shard)
    assert (tmp_path / "hf" / "model.safetensors").exists() == (shard == "5GB")
    convert_from_hf(tmp_path / "hf", tmp_path / "ours", show_progress=False)
    convert_to_hf(tmp_path / "ours", tmp_path / "back", "onevision", show_progress=False)
    assert_same_files(tmp_path / "back", tmp_path / "hf")


def test_values(model, converted):
    ours = model_dir.open_params(converted[0])
    text = model.model.language_model.layers
    stack = np.stack([layer.mlp.gate_proj.weight.detach().numpy().T for layer in text])
    np.testing.assert_array_equal(ours["language_model/layers/mlp/gate_proj/kernel"], stack)
    tower = model.model.vision_tower.encoder.layers
    stack = np.stack([layer.self_attn.v_proj.bias.detach().numpy() for layer in tower])
    np.testing.assert_array_equal(
        ours["vision_tower/layers/self_attn/v_proj/bias"].reshape(stack.shape), stack
    )


@pytest.mark.parametrize("name", ["text", "scaled", "wide", "video"])
def test_hidden_states(model, converted, name):
    path, config = converted
    item = parity.items(config.vision.image_size)[name]
    sequence = SequenceBuilder(model_dir.load_tokenizer(path), config.input_spec)(item)
    theirs = parity.torch_stages(model, sequence, item)
    ours = parity.our_stages(config, model_dir.load_params(path), sequence)
    assert ours.keys() == theirs.keys()
    for stage, expected in theirs.items():
        assert ours[stage].shape == expected.shape
        assert parity.difference(ours[stage], expected) < TOLERANCE, stage


def test_a_llave_checkpoint_works_in_transformers(golden, exported):
    """The exported directory loads completely and gives the hidden states of the authors' code."""
    model = load(exported / "onevision")
    config = model_dir.load_config(exported / "ours")
    item = parity.items(config.vision.image_size)["wide"]
    sequence = SequenceBuilder(model_dir.load_tokenizer(exported / "ours"), config.input_spec)(item)
    theirs = parity.torch_stages(model, sequence, item)
    ours = parity.our_stages(config, model_dir.load_params(exported / "ours"), sequence)
    for stage, expected in theirs.items():
        assert parity.difference(ours[stage], expected) < TOLERANCE, stage
    embeddings = np.load(golden / "embeddings.npz")
    tokens = torch.tensor(embeddings["text_demo/input_ids"][None].astype(np.int64))
    with torch.no_grad():
        hidden = model.model(input_ids=tokens).last_hidden_state[0, -1]
    normalised = torch.nn.functional.normalize(hidden, dim=-1).numpy()
    np.testing.assert_allclose(normalised, embeddings["text_demo/embedding"], rtol=0, atol=1e-5)


def test_a_model_without_origin_works_in_transformers(golden, tmp_path):
    from llave_jax.models.config import PRESETS
    from llave_jax.models.parameters import parameter_shapes

    rng = np.random.default_rng(0)
    params = {
        path: 0.1 * rng.normal(size=shape).astype(np.float32)
        for path, shape in parameter_shapes(PRESETS["tiny"]).items()
    }
    model_dir.write_model_dir(
        tmp_path / "ours", PRESETS["tiny"], params, tokenizer=golden / "checkpoint"
    )
    convert_to_hf(tmp_path / "ours", tmp_path / "hf", "onevision", show_progress=False)
    model = load(tmp_path / "hf")
    image_token = json.loads((tmp_path / "hf" / "config.json").read_text())["image_token_index"]
    assert model.get_input_embeddings().weight.shape[0] > image_token


def test_image_processor_of_the_exported_directory(exported):
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import (
        LlavaOnevisionImageProcessorPil,
    )

    from llave_jax.inputs import anyres

    config = model_dir.load_config(exported / "ours")
    processor = LlavaOnevisionImageProcessorPil.from_pretrained(exported / "onevision")
    item = parity.items(config.vision.image_size)["scaled"]
    theirs = processor(item.images[0], return_tensors="np")["pixel_values"][0]
    ours = anyres.image_crops(item.images[0], config.inputs, config.vision.crop)
    ours = (ours.transpose(0, 3, 1, 2).astype(np.float32) / 255 - 0.5) / 0.5
    assert theirs.shape == ours.shape
    # Base crop and tiles: transformers resizes with the same filter, but rounds on its own.
    assert np.abs(theirs - ours).max() <= 2 * 2 / 255 + 1e-6
