"""Runs that train adapters: on any mesh, to be continued exactly, on their own base only, and models afterwards."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llave_jax import train
from llave_jax.common.content import file_digest
from llave_jax.models import lora
from llave_jax.models.llave import Llave, example_batch
from llave_jax.models.lora import AdaptedLlave, Lora
from llave_jax.parallel import sharding
from llave_jax.training import adapters, optim, run_files, setup, train_step
from llave_jax.training.step_loss import LossConfig, make_loss
from llave_jax.weights import adapted, model_dir, run_params
from llave_jax.weights.fingerprint import model_fingerprint, weights_fingerprint
from llave_jax.weights.safetensors_io import CheckpointError
from tests.training.test_train_step import (  # noqa: F401, a fixture
    LEARNING_RATE,
    SUMMATION_TOLERANCE,
    make_batch,
    mesh_of,
    pairs,
    record_gradient,
    relative_error,
)
from tests.training.text_runs import MODEL, make_config, train_until

# Each trains runs. What adapters are is tested in models/test_lora.py, their files in weights/.
pytestmark = pytest.mark.slow

LORA = {"lora.rank": 2, "lora.alpha": 4.0, "lora.dropout": 0.25}
# Adapters beside what else a run may learn.
LORA |= {"loss.learn_temperature": True, "loss.dims": (4, 16)}


# The step.


def step_once(golden_model, pairs, mesh_name, remat="none"):  # noqa: F811
    """The gradient, and parameters before and after a step, flat by path."""
    mesh = mesh_of(mesh_name)
    own = Lora(lora.find_modules(".*"), rank=2, alpha=4.0)
    model = AdaptedLlave(golden_model.config, lora=own, remat=remat)
    drawn = lora.init_adapters(own, model.config)
    keys = jax.random.split(jax.random.key(5), len(drawn))
    drawn = {
        path: x + 0.02 * jax.random.normal(key, x.shape)
        for key, (path, x) in zip(keys, sorted(drawn.items()), strict=True)
    }
    before = sharding.flatten(golden_model.params) | drawn
    rates = {path: 1.0 if path in drawn else None for path in before}
    optimizer = optax.chain(
        record_gradient(), optim.make_optimizer(LEARNING_RATE, rates, weight_decay=0.01)
    )
    step = train_step.build_step(model, mesh, optimizer, rates, LossConfig())
    places = jax.tree.map(lambda x: x.sharding, step.state)
    state = step.init(jax.device_put(sharding.unflatten(before), places.params))
    batch = make_batch(pairs, golden_model.config, sharding.num_shards(mesh))
    state, metrics = step.run(state, sharding.device_put_batch(batch, mesh, leading_axes=1), None)
    return SimpleNamespace(
        loss=float(metrics["loss"]),
        gradient=jax.tree.map(np.asarray, state.opt_state[0]),
        before=jax.tree.map(np.asarray, before),
        after=jax.tree.map(np.asarray, sharding.flatten(state.params)),
    )


@pytest.fixture(scope="module")
def single(golden_model, pairs):  # noqa: F811
    return step_once(golden_model, pairs, "single")


def test_a_step_trains_adapters_alone(single):
    for path, array in single.before.items():
        assert np.array_equal(array, single.after[path]) == (path not in single.gradient), path


@pytest.mark.parametrize(
    ("mesh", "remat"),
    [
        ("data", "none"),
        ("fsdp", "block"),
        ("tensor", "both"),
    ],
)
def test_meshes_and_recomputation_change_nothing(golden_model, pairs, single, mesh, remat):  # noqa: F811
    found = step_once(golden_model, pairs, mesh, remat)
    assert found.loss == pytest.approx(single.loss, rel=SUMMATION_TOLERANCE)
    for path, array in single.gradient.items():
        assert relative_error(found.gradient[path], array) < 10 * SUMMATION_TOLERANCE, path


def test_each_micro_batch_draws_its_own_dropout(golden_model, pairs):  # noqa: F811
    """Two micro-batches of the same pair: without dropout, the other's target is as similar as its own."""
    own = Lora(lora.find_modules("language_model/.*"), rank=2, alpha=4.0, dropout=0.4)
    model = AdaptedLlave(golden_model.config, lora=own)
    drawn = {path: x + 0.1 for path, x in lora.init_adapters(own, model.config).items()}
    params = sharding.unflatten(sharding.flatten(golden_model.params) | drawn)
    batch = make_batch([pairs[0], pairs[0]], golden_model.config, 1, micro_batches=2)
    loss = make_loss(model, mesh_of("single"), LossConfig())
    _, kept = loss(params, batch)
    _, dropped = loss(params, batch, None, jax.random.key(0))
    gaps = [
        float(jnp.abs(found["positive_similarity"] - found["hard_negative_similarity"]))
        for found in (kept, dropped)
    ]
    assert gaps[0] < 1e-5
    assert gaps[1] > 1e-3


# Runs.


@pytest.fixture(scope="module")
def finished(place, tmp_path_factory):
    """A run of four steps on 8 devices that is not interrupted."""
    workdir = tmp_path_factory.mktemp("lora") / "run"
    config = make_config(place, {**LORA, "mesh.data": 2, "mesh.fsdp": 4})
    config.checkpoint.best_metric = "classification/SUN397"
    train.train(config, workdir)
    return workdir


def arrays(run):
    opened = run_params.open_params(run_params.latest_params(run))
    return {path: np.asarray(array) for path, array in opened.items()}


@pytest.mark.parametrize("stop", [1, 3])
def test_a_stopped_run_goes_on_to_the_same_bits(place, finished, tmp_path, stop):
    config = make_config(place, {**LORA, "mesh.data": 2, "mesh.fsdp": 4})
    config.checkpoint.best_metric = "classification/SUN397"
    train_until(stop, config, tmp_path)
    shutil.copytree(place / "model", tmp_path / "base")
    config.model.path = str(tmp_path / "base")
    train.train(config, tmp_path)
    found, expected = arrays(tmp_path), arrays(finished)
    assert found.keys() == expected.keys()
    for path, array in expected.items():
        assert np.array_equal(found[path], array), path
    assert adapted.read_record(tmp_path).path == str(tmp_path / "base")
    assert adapted.read_record(tmp_path / "best").path == str(tmp_path / "base")


def test_dropout_takes_part_in_training(place, finished, tmp_path):
    config = make_config(place, {**LORA, "lora.dropout": 0.0, "mesh.data": 2, "mesh.fsdp": 4})
    train.train(config, tmp_path)
    assert any(
        not np.array_equal(x, arrays(finished)[path]) for path, x in arrays(tmp_path).items()
    )


def test_a_run_keeps_its_adapters_alone_and_is_a_model(place, finished):
    kept = arrays(finished)
    modules = lora.find_modules("(language_model|projector)/.*")
    assert kept.keys() == {f"{m}/{name}" for m in modules for name in ("lora_a", "lora_b")}
    base, merged = (
        sharding.flatten(model_dir.load_params(path)) for path in (place / "model", finished)
    )
    assert base.keys() == merged.keys()
    for path, array in base.items():
        module = path.removesuffix("/kernel")
        expected = np.asarray(array, np.float64)
        if module in modules:
            a, b = (kept[f"{module}/{name}"].astype(np.float64) for name in ("lora_a", "lora_b"))
            layers = len(a) if "/layers/" in path else 1
            low, high = a.reshape(layers, -1, 2), b.reshape(layers, 2, -1)
            expected = expected + 2.0 * (low @ high).reshape(expected.shape)
            # The pairs are texts: nothing has told the projector's adapters where to go.
            trained = np.abs(expected - array).max() > 1e-4
            assert trained == path.startswith("language_model/"), path
        np.testing.assert_allclose(merged[path], expected, atol=1e-6, err_msg=path)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    in_shards = sharding.flatten(model_dir.load_params(finished, mesh=mesh))
    best = sharding.flatten(model_dir.load_params(finished / "best"))
    for path, array in merged.items():
        assert np.array_equal(in_shards[path], array), path
        assert best[path].shape == array.shape


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora.rank": None}, r"lora.rank: 2 -> None"),
        ({"lora.alpha": 8.0}, r"lora.alpha: 4.0 -> 8.0"),
        ({"lora.targets": "language_model/.*"}, r"lora.targets: "),
    ],
)
def test_other_adapters_are_refused(place, finished, changes, message):
    config = make_config(place, {**LORA, "mesh.data": 2, "mesh.fsdp": 4})
    config.checkpoint.best_metric = "classification/SUN397"
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=message):
        train.train(config, finished)


@pytest.fixture(scope="module")
def other_base(place, golden, tmp_path_factory):
    """A model of the same sizes with other weights."""
    directory = tmp_path_factory.mktemp("other") / "model"
    params = Llave(MODEL).init(jax.random.key(1), example_batch(MODEL))["params"]
    model_dir.write_model_dir(directory, MODEL, params, tokenizer=golden / "checkpoint")
    return directory


def test_another_base_is_refused(place, finished, other_base):
    config = make_config(place, {**LORA, "mesh.data": 2, "mesh.fsdp": 4})
    config.checkpoint.best_metric = "classification/SUN397"
    config.model.path = str(other_base)
    with pytest.raises(ValueError, match=r"has adapters of .*; the weights of .* are others"):
        train.train(config, finished)


def test_a_run_whose_base_is_lost_or_replaced_is_no_model(finished, other_base, tmp_path):
    run = shutil.copytree(finished, tmp_path / "run")
    record = run / "model" / "adapter.json"
    values = json.loads(record.read_text())
    fingerprint = model_fingerprint(run, jnp.float32, MODEL)
    moved = shutil.copytree(values["base"]["path"], tmp_path / "moved")
    values["base"] |= {"path": str(moved), "model": str(moved)}
    record.write_text(json.dumps(values))
    assert model_fingerprint(run, jnp.float32, MODEL) == fingerprint
    model_dir.open_params(run)
    values["base"] |= {"path": str(other_base)}
    record.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"the weights of .* are others than those"):
        model_dir.open_params(run)
    values["base"] |= {"path": str(tmp_path / "gone"), "model": str(tmp_path / "gone")}
    record.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"no longer there .*base.path of .*adapter.json"):
        model_dir.open_params(run)


def test_adapters_on_a_run_with_adapters(place, finished, tmp_path):
    config = make_config(place, {**LORA, "lora.targets": "projector/.*", "steps": 1})
    config.model.path = str(finished)
    before = file_digest(place / "model" / "model.safetensors")
    train.train(config, tmp_path)
    assert file_digest(place / "model" / "model.safetensors") == before
    base, merged = (sharding.flatten(model_dir.load_params(p)) for p in (finished, tmp_path))
    for path, array in base.items():
        # Only kernels that have adapters may differ; the last run's texts give the projector no gradient.
        assert np.array_equal(merged[path], array) or path.startswith("projector/"), path
    assert weights_fingerprint(tmp_path) != weights_fingerprint(finished)


def test_the_base_stays_in_its_dtype(place, golden, tmp_path):
    base = sharding.flatten(model_dir.load_params(place / "model"))
    stored = {p: x if "norm" in p else x.astype(jnp.bfloat16) for p, x in base.items()}
    model_dir.write_model_dir(tmp_path / "base", MODEL, stored, tokenizer=golden / "checkpoint")
    config = make_config(place, {**LORA, "steps": 1})
    config.model.path = str(tmp_path / "base")
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    step = setup.build_training(config, MODEL, mesh, 1).step
    dtypes = {path: x.dtype for path, x in sharding.flatten(step.state.params).items()}
    params = sharding.flatten(adapters.begin(config, MODEL, mesh))
    assert dtypes == {path: x.dtype for path, x in params.items()}
    assert {dtypes[p] for p in dtypes if "lora" in p or "norm" in p} == {jnp.dtype("float32")}
    assert {dtypes[p] for p in dtypes if p.endswith("kernel")} == {jnp.dtype("bfloat16")}
    moments = {x.dtype for x in jax.tree.leaves(step.state.opt_state) if x.ndim}
    assert moments == {jnp.dtype("float32")}
    train.train(config, tmp_path / "run")
    merged = model_dir.open_params(tmp_path / "run")
    assert {p: x.dtype for p, x in merged.items()} == {p: x.dtype for p, x in stored.items()}
    config.lora.base_dtype = "bfloat16"
    assert set(adapters.base_dtypes(config, MODEL).values()) == {jnp.dtype("bfloat16")}


def test_a_program_with_adapters_is_tried_out_on_random_parameters(place):
    config = make_config(place, {**LORA, "model.path": None, "lora.base_dtype": "bfloat16"})
    mesh = sharding.make_mesh({"data": 8, "fsdp": 1, "tensor": 1})
    training = setup.build_training(config, MODEL, mesh, 1)
    state = setup.random_state(config, training)
    forms = jax.tree.map(lambda x: (x.shape, x.dtype), (state, training.step.state))
    assert forms[0] == forms[1]


def test_what_cannot_be_trained_is_refused(place, tmp_path):
    config = make_config(place, {**LORA, "lora.targets": "vision_tower/.*fc1"})
    with pytest.raises(ValueError, match=r"rates freezes the adapter vision_tower/layers/mlp/fc1"):
        train.train(config, tmp_path / "frozen")
    config = make_config(place, {**LORA, "lora.targets": "q_proj"})
    with pytest.raises(ValueError, match=r"lora.targets 'q_proj' matches no module"):
        train.train(config, tmp_path / "none")
    config = make_config(place, {**LORA, "model.path": None})
    with pytest.raises(ValueError, match=r"adapters, which need a trained model: .*model.path"):
        run_files.record_model(config, MODEL, place / "model" / "tokenizer", tmp_path / "scratch")
