"""Named prompts: through a model directory, from and to a Hugging Face checkpoint, in a training run's model."""

import json
import shutil

import pytest

from llave_jax import Embedder, convert
from llave_jax.evaluation.benchmarks.mmeb import MMEB_DATASETS
from llave_jax.weights import model_dir
from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.prompts import PROMPTS, read_prompts, side_prompts
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


def test_a_set_is_put_into_a_model_directory(golden, golden_model, tmp_path):
    command = ["--input", str(golden / "checkpoint"), "--output"]
    assert convert.main([*command, str(tmp_path / "mmeb"), "--prompts", "mmeb"]) == 0
    prompts = Embedder.from_pretrained(tmp_path / "mmeb").prompts
    assert prompts["MSCOCO_t2i-query"].startswith("Find me an everyday image that matches")
    assert {f"{info.name}-query" for info in MMEB_DATASETS} <= prompts.keys()
    (tmp_path / "own.json").write_text('{"query": "Find: "}')
    convert.main([*command, str(tmp_path / "own"), "--prompts", str(tmp_path / "own.json")])
    assert read_prompts(tmp_path / "own") == {"query": "Find: "}


def test_sets_that_there_are_not(golden, tmp_path, capsys):
    command = ["--input", str(golden / "checkpoint"), "--output", str(tmp_path / "out")]
    assert convert.main([*command, "--prompts", "nothing"]) == 2
    assert "prompts 'nothing': neither a file nor one of the sets mmeb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_sides():
    assert side_prompts({}) == ("", "")
    assert side_prompts({"query": "q", "corpus": "c", "passage": "p"}) == ("q", "p")
