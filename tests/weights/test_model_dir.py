"""Model directories: written, read into shards, and refused when damaged."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llave_jax.models.config import PRESETS
from llave_jax.models.llave import param_shardings
from llave_jax.models.parameters import parameter_shapes
from llave_jax.parallel import sharding
from llave_jax.weights import model_dir
from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.safetensors_io import CheckpointError

TINY = PRESETS["tiny"]


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(0)
    shapes = parameter_shapes(TINY)
    return {path: rng.normal(size=shape).astype(np.float32) for path, shape in shapes.items()}


@pytest.fixture
def made(golden, tmp_path, params):
    path = tmp_path / "made"
    model_dir.write_model_dir(path, TINY, params, tokenizer=golden / "checkpoint")
    return path


def assert_same_params(found, expected):
    found = sharding.flatten(found)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array)


def test_what_is_written_is_read(made, params):
    assert model_dir.is_model_dir(made)
    assert model_dir.load_config(made) == TINY
    assert_same_params(model_dir.open_params(made), params)
    assert_same_params(model_dir.load_params(made), params)
    assert model_dir.load_tokenizer(made)("A cat and a dog").input_ids == [
        32,
        272,
        274,
        339,
        256,
        573,
    ]


def test_nested_jax_parameters_are_written(golden, tmp_path, params):
    tree = sharding.unflatten({path: jnp.bfloat16(array) for path, array in params.items()})
    model_dir.write_model_dir(tmp_path / "a", TINY, tree, tokenizer=golden / "checkpoint")
    loaded = model_dir.load_params(tmp_path / "a")
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded)} == {jnp.dtype(jnp.bfloat16)}
    assert_same_params(loaded, sharding.flatten(tree))


@pytest.mark.parametrize("axes", [(8, 1, 1), (1, 8, 1), (2, 2, 2)])
def test_parameters_go_into_their_shards(made, params, axes, monkeypatch):
    """No slice is read that is not some device's part."""
    mesh = sharding.make_mesh(dict(zip(sharding.MESH_AXES, axes, strict=True)))
    sizes: dict[tuple, set] = {}
    place = model_dir._place

    class Recorder:
        def __init__(self, array):
            self.array = array

        def __getitem__(self, index):
            part = self.array[index]
            sizes.setdefault(self.array.shape, set()).add(part.size)
            return part

    monkeypatch.setattr(model_dir, "_place", lambda array, target: place(Recorder(array), target))
    loaded = model_dir.load_params(made, mesh=mesh, dtype=jnp.float32)
    expected = param_shardings(loaded, mesh)
    for leaf, wanted in zip(jax.tree.leaves(loaded), jax.tree.leaves(expected), strict=True):
        assert leaf.sharding == wanted
    assert_same_params(loaded, params)
    if axes == (1, 8, 1):
        kernel = params["language_model/layers/mlp/gate_proj/kernel"]
        assert sizes[kernel.shape] == {kernel.size // 8}


def test_dtype_of_loaded_parameters(made, params):
    loaded = model_dir.load_params(made, dtype=jnp.bfloat16)
    assert_same_params(loaded, {path: jnp.bfloat16(array) for path, array in params.items()})


def test_template_of_a_training_run(golden, tmp_path):
    convert_from_hf(golden / "checkpoint", tmp_path / "start", show_progress=False)
    config = model_dir.load_config(tmp_path / "start")
    template = tmp_path / "run" / "model"
    model_dir.write_model_dir(template, config, source=tmp_path / "start")
    assert model_dir.load_config(tmp_path / "run") == config
    assert {path.name for path in template.iterdir()} == {
        "carried.safetensors", "config.json", "source", "tokenizer",
    }  # fmt: skip
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors: no such file; this model has no"
    ):
        model_dir.open_params(template)
    with pytest.raises(CheckpointError, match="this training run has no checkpoint yet"):
        model_dir.load_params(tmp_path / "run")


@pytest.mark.parametrize("axes", [None, (2, 2, 2)])
def test_latest_checkpoint_of_a_training_run(golden, tmp_path, params, axes):
    import orbax.checkpoint as ocp

    run = tmp_path / "run"
    model_dir.write_model_dir(run / "model", TINY, tokenizer=golden / "checkpoint")
    for step, factor in ((9, 1), (10, 2)):
        tree = sharding.unflatten({path: factor * array for path, array in params.items()})
        with ocp.CheckpointManager(run / "checkpoints") as manager:
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(tree)))
    expected = {path: 2 * array for path, array in params.items()}
    mesh = axes and sharding.make_mesh(dict(zip(sharding.MESH_AXES, axes, strict=True)))
    loaded = model_dir.load_params(run, mesh=mesh)
    assert_same_params(loaded, expected)
    if mesh:
        kernel = loaded["language_model"]["layers"]["mlp"]["gate_proj"]["kernel"]
        assert kernel.sharding == param_shardings(loaded, mesh)["language_model"][
            "layers"]["mlp"]["gate_proj"]["kernel"]  # fmt: skip
    rounded = model_dir.load_params(run, mesh=mesh, dtype=jnp.bfloat16)
    assert_same_params(rounded, {path: jnp.bfloat16(array) for path, array in expected.items()})


def test_what_is_not_a_model(golden, tmp_path):
    for path, message in (
        (tmp_path / "nowhere", "no such directory"),
        (tmp_path, r"no config\.json in it"),
        (golden / "checkpoint", "Is it a Hugging Face checkpoint.*convert_hf"),
    ):
        assert not model_dir.is_model_dir(path)
        for function in (model_dir.load_config, model_dir.load_params, model_dir.load_tokenizer):
            with pytest.raises(CheckpointError, match=message):
                function(path)


def test_damaged_configuration(made):
    path = made / "config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps(values | {"llave_jax_format": 2}))
    with pytest.raises(CheckpointError, match="llave_jax_format is 2; this version reads 1"):
        model_dir.load_config(made)
    del values["text"]["num_heads"]
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"not a model configuration: .*num_heads"):
        model_dir.load_config(made)


def test_parameters_of_another_size(golden, tmp_path, params):
    name = "language_model/layers/mlp/up_proj/kernel"
    wrong = params | {name: params[name][:1]}
    with pytest.raises(CheckpointError, match=rf"{name}: expected shape \(3, .*found \(1, "):
        model_dir.write_model_dir(tmp_path / "a", TINY, wrong, tokenizer=golden / "checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_tokenizer_is_needed(tmp_path, params):
    with pytest.raises(ValueError, match="give a tokenizer, or the source model"):
        model_dir.write_model_dir(tmp_path / "a", TINY, params)
    with pytest.raises(CheckpointError, match="no tokenizer; expected"):
        model_dir.write_model_dir(tmp_path / "a", TINY, params, tokenizer=tmp_path)
    assert list(tmp_path.iterdir()) == []
