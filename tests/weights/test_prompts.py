"""Named prompts: through a model directory, from and to a Hugging Face checkpoint, in a training run's model."""

import json
import shutil

import pytest

from llave_jax.weights import model_dir
from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.prompts import PROMPTS
from llave_jax.weights.safetensors_io import CheckpointError
from llave_jax.weights.sentence_transformers import SETTINGS
from llave_jax.weights.to_hf import convert_to_hf


def test_prompts_go_with_a_model(golden_model, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(golden_model.directory, model)
    assert model_dir.load_prompts(model) == {}
    prompts = {"query": "Find: ", "document": "Represent: ", "none": ""}
    (model / PROMPTS).write_text(json.dumps(prompts))
    convert_to_hf(model, tmp_path / "hf", "onevision", show_progress=False)
    assert json.loads((tmp_path / "hf" / SETTINGS).read_text())["prompts"] == prompts
    convert_from_hf(tmp_path / "hf", tmp_path / "back", show_progress=False)
    del prompts["none"]
    assert model_dir.load_prompts(tmp_path / "back") == prompts
    # A training run writes its model so.
    model_dir.write_model_dir(tmp_path / "run" / "model", golden_model.config, source=model)
    assert model_dir.load_prompts(tmp_path / "run")["query"] == "Find: "


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"query": 3}', "the prompt 'query' is 3; expected a text"),
        ("[]", "expected a JSON object"),
        ("{", "not JSON"),
    ],
)
def test_broken_prompts_are_named(text, message, golden_model, tmp_path):
    shutil.copy(golden_model.directory / "config.json", tmp_path)
    (tmp_path / PROMPTS).write_text(text)
    with pytest.raises(CheckpointError, match=message) as raised:
        model_dir.load_prompts(tmp_path)
    assert str(tmp_path / PROMPTS) in str(raised.value)
