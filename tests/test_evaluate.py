"""The evaluation's command line, with a stand-in for the model."""

import json
import types

import numpy as np
import pytest

from llave_jax import evaluate
from llave_jax.benchmarks import digits
from tests.fake_encoder import HashEncoder


@pytest.fixture
def model(tmp_path, monkeypatch):
    """A model directory whose "embedder" is a HashEncoder; returns (directory, encoder)."""
    directory = tmp_path / "model"
    (directory / "tokenizer").mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    (directory / "model.safetensors").write_bytes(b"weights")
    encoder = HashEncoder()
    embedder = types.SimpleNamespace(
        model=types.SimpleNamespace(dtype=np.dtype("float32")),
        encode=lambda items, batch_size, show_progress: encoder(items),
    )
    monkeypatch.setattr(evaluate.Embedder, "from_pretrained", lambda path: embedder)
    return str(directory), encoder


def test_mmeb_writes_scores_and_a_table(model, golden, tmp_path, capsys):
    directory, _ = model
    output = tmp_path / "out"
    command = ["--model", directory, "--benchmark", "mmeb", "--data", str(golden / "eval")]
    evaluate.main([*command, "--subsets", "TinyT2I", "--output", str(output)])
    score = json.loads((output / "TinyT2I_score.json").read_text())
    assert score["num_pred"] == 12
    assert not (output / "TinyCls_score.json").exists()
    assert (output / "table.txt").read_text() in capsys.readouterr().out


def test_another_model_does_not_use_the_same_embeddings(model, golden, tmp_path):
    directory, encoder = model
    command = ["--model", directory, "--benchmark", "mmeb", "--data", str(golden / "eval")]
    command += ["--output", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    evaluate.main(command)
    count = len(encoder.keys)
    evaluate.main(command)
    assert len(encoder.keys) == count
    (tmp_path / "model/model.safetensors").write_bytes(b"trained")
    evaluate.main(command)
    assert len(encoder.keys) == 2 * count


def test_digits_are_built_on_first_use(model, tmp_path, monkeypatch):
    monkeypatch.setattr(digits.Sizes, "__init__", _small_sizes(digits.Sizes.__init__))
    directory, _ = model
    output = tmp_path / "out"
    evaluate.main(["--model", directory, "--benchmark", "digits", "--output", str(output)])
    for name in digits.SUBSETS:
        assert (output / f"{name}_score.json").exists()
    assert "Not scored" not in (output / "table.txt").read_text()


def _small_sizes(init):
    return lambda self, train=20, eval=40: init(self, train, eval)


def test_data_is_needed(model, tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main(["--model", model[0], "--benchmark", "mmeb", "--output", str(tmp_path)])
    assert "needs --data" in capsys.readouterr().err
