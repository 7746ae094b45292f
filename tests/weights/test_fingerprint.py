"""The identity of a model: what changes it, and what does not."""

import dataclasses
import shutil

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llave_jax.common import content
from llave_jax.parallel import sharding
from llave_jax.weights import model_dir
from llave_jax.weights.fingerprint import model_fingerprint
from llave_jax.weights.safetensors_io import CheckpointError

F32, BF16 = jnp.dtype(jnp.float32), jnp.dtype(jnp.bfloat16)


@pytest.fixture
def model(golden_model, tmp_path):
    shutil.copytree(golden_model.directory, tmp_path / "model")
    return tmp_path / "model"


def change_byte(path, offset):
    with path.open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


@pytest.mark.parametrize("whole_file_bytes", [content._WHOLE_FILE_BYTES, 1 << 10])
def test_weights_and_their_use_decide(model, golden_model, monkeypatch, whole_file_bytes):
    """Of files in one piece and of files by blocks."""
    monkeypatch.setattr(content, "_WHOLE_FILE_BYTES", whole_file_bytes)
    monkeypatch.setattr(content, "_BLOCK_BYTES", 1 << 10)
    config = golden_model.config
    inputs = dataclasses.replace(config.inputs, max_length=17)
    first = model_fingerprint(model, F32, config)
    assert len(first) == 32
    assert first == model_fingerprint(golden_model.directory, F32, config)
    found = [
        first,
        model_fingerprint(model, BF16, config),
        model_fingerprint(model, F32, dataclasses.replace(config, inputs=inputs)),
    ]
    weights = model / model_dir.WEIGHTS
    change_byte(weights, weights.stat().st_size - 1)
    found.append(model_fingerprint(model, F32, config))
    change_byte(model / model_dir.TOKENIZER / "vocab.json", 5)
    found.append(model_fingerprint(model, F32, config))
    assert len(set(found)) == len(found)
    # What is only kept for converting back does not matter.
    shutil.rmtree(model / model_dir.SOURCE)
    assert model_fingerprint(model, F32, config) == found[-1]


def test_latest_checkpoint_of_a_run_decides(model, golden_model, tmp_path):
    run = tmp_path / "run"
    model_dir.write_model_dir(run / "model", golden_model.config, source=model)
    with pytest.raises(CheckpointError, match="this training run has no checkpoint yet"):
        model_fingerprint(run, F32, golden_model.config)
    params = sharding.unflatten({"image_newline": np.ones(64, np.float32)})
    found = []
    for step in (1, 2):
        with ocp.CheckpointManager(run / "checkpoints") as manager:
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
        found.append(model_fingerprint(run, F32, golden_model.config))
    assert found[0] != found[1]
    assert found[1] == model_fingerprint(run, F32, golden_model.config)


def test_what_is_not_a_model(tmp_path, golden_model):
    with pytest.raises(CheckpointError, match="neither a model directory nor a training run"):
        model_fingerprint(tmp_path, F32, golden_model.config)
