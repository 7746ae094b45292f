"""A temperature that is learned: its form and range, and a run that is stopped and continued."""

import json

import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from llave_jax import train
from llave_jax.data.sources import open_source, split_held_out
from llave_jax.embedding.embedder import Embedder
from llave_jax.loss.hardness import Hardness
from llave_jax.loss.temperature import clamp, initial_log_scale, temperature_of
from llave_jax.training.metrics import read_metrics
from llave_jax.training.validation import Validation
from llave_jax.weights.run_params import latest_params, saved_tree
from tests.training.test_validation import expected_scores
from tests.training.text_runs import make_config, train_until

SUBSETS = ("left", "right")
CHANGES = {
    "eval.benchmark": None,
    "data.held_out": 0.3,
    "loss.temperature": 0.1,
    "loss.learn_temperature": True,
    "loss.temperature_per_subset": True,
    "loss.temperature_range": (0.095, 0.2),
    "loss.temperature_rate": 30.0,
    "optim.learning_rate": 1e-3,
    "optim.weight_decay": 0.1,
}


def test_the_parameter_is_the_logarithm_of_the_scale():
    np.testing.assert_allclose(temperature_of(initial_log_scale(0.07)), 0.07, rtol=1e-6)
    np.testing.assert_allclose(temperature_of(initial_log_scale(0.07, 3)), [0.07] * 3, rtol=1e-6)
    moved = clamp(jnp.array([-9.0, 2.0, 9.0], jnp.float32), (0.01, 1.0))
    np.testing.assert_allclose(temperature_of(moved), [1.0, np.exp(-2), 0.01], rtol=1e-6)


@pytest.fixture(scope="module")
def config(place, tmp_path_factory):
    """Two subsets: in one, targets are told apart by words; in the other, hardly."""
    data = tmp_path_factory.mktemp("subsets")
    for name in SUBSETS:
        rows = [
            {
                "qry": f"which is {i}?",
                "qry_image_path": "",
                "pos_text": f"{'it is' if name == 'left' else 'x' * i} {i}",
                "pos_image_path": "",
            }
            for i in range(32)
        ]
        (data / f"{name}.json").write_text(json.dumps(rows))
    return make_config(place, {**CHANGES, "data.path": str(data)})


@pytest.fixture(scope="module")
def run(config, tmp_path_factory):
    """The folder of a run that was stopped after step 2 and continued."""
    workdir = tmp_path_factory.mktemp("run")
    train_until(2, config, workdir)
    train.train(config, workdir)
    return workdir


def steps_of(workdir):
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    names = ("step", "loss", "grad_norm", *(n for n in lines[0] if n.startswith("temperature")))
    return [{name: line[name] for name in names} for line in lines]


@pytest.mark.slow
def test_each_subset_learns_its_own_in_its_range(run):
    lines = steps_of(run)
    names = [f"temperature/{name}" for name in SUBSETS]
    values = np.array([[line[name] for name in names] for line in lines])
    np.testing.assert_allclose(values[0], 0.1, rtol=1e-6)
    assert len(lines) == 4
    assert (np.abs(np.diff(values, axis=0)).max(axis=0) > 1e-3).all()
    assert values.min() >= 0.095 * (1 - 1e-6)
    assert values.max() <= 0.2 * (1 + 1e-6)
    for line, both in zip(lines, values, strict=True):
        assert line["temperature"] == pytest.approx(both.mean())


@pytest.mark.slow
def test_checkpoints_keep_it_beside_the_model(run):
    params = latest_params(run)
    optimizer = saved_tree(params.parent / "optimizer")
    assert optimizer["loss"]["log_scale"].shape == (2,)
    assert optimizer["opt_state"]["adam"]["mu"]["loss"]["log_scale"].shape == (2,)
    assert "loss" not in saved_tree(params)


@pytest.mark.slow
def test_validation_takes_the_learned_temperatures(run, config):
    source = split_held_out(open_source(config.data.path), config.data.held_out)[1]
    pool = Validation(source, Hardness(9.0, 0.1), max_pairs=None, skip_unusable=False)
    embedder = Embedder.from_pretrained(run)
    optimizer = ocp.PyTreeCheckpointer().restore(latest_params(run).parent / "optimizer")
    last = [line for line in read_metrics(run) if "validation/loss" in line][-1]
    found = pool.score(embedder, optimizer["loss"])
    assert found["loss"] == pytest.approx(last["validation/loss"], rel=1e-5)
    # Cosines of this model are all near 1. Temperatures that make the most of them:
    temperatures = np.array([0.002, 0.5], np.float32)
    pool = Validation(source, Hardness(0.0, 0.1), max_pairs=None, skip_unusable=False)
    found = pool.score(embedder, {"log_scale": -np.log(temperatures)})
    order = np.argsort([source.digest(i) for i in range(len(source))])
    pairs = [source[int(i)] for i in order]
    texts = [[pair.query.text for pair in pairs], [pair.target.text for pair in pairs]]
    query, target = (embedder.encode(side) for side in texts)
    ids = [np.unique(side, return_inverse=True)[1] for side in texts]
    by_pair = temperatures[[SUBSETS.index(source.subset(int(i))) for i in order]]
    expected = expected_scores(query, target, *ids, alpha=0.0, temperature=by_pair)
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    swapped = expected_scores(query, target, *ids, alpha=0.0, temperature=0.502 - by_pair)
    assert abs(swapped["loss"] / expected["loss"] - 1) > 1e-2


@pytest.mark.slow
def test_a_run_that_is_continued_is_the_run_that_was_not_stopped(run, config, tmp_path):
    train.train(config, tmp_path / "run")
    assert steps_of(tmp_path / "run") == steps_of(run)
