"""The training step as `check_device` measures it: every figure beside what it is compared with."""

import functools

import jax
import numpy as np
import pytest

from llave_jax.config import default_config
from llave_jax.device_check import attention, training
from llave_jax.parallel import sharding
from llave_jax.planning import chips
from llave_jax.planning.assumed_pairs import AssumedPairs

SOURCE = functools.cache(lambda: AssumedPairs(100, images=1, shrink=8))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(training, "AssumedPairs", lambda count, images: SOURCE())
    monkeypatch.setattr(training, "INPUT_SECONDS", 0.1)
    monkeypatch.setattr(training, "STEPS", 1)
    monkeypatch.setattr(attention, "REPEATS", 1)


@pytest.fixture
def config():
    """The tiny model on pairs of the assumed sizes, in one micro-batch of 16."""
    config = default_config()
    config.model.preset = "tiny"
    config.data.num_workers = 0
    config.dtype = "float32"
    config.batch.pairs = 16
    config.batch.row_length = 256
    config.batch.tokens_per_pair = 256.0
    config.batch.crops_per_pair = 10.0
    config.batch.taps = 4
    config.batch.fill = 1.0
    return config


def one_device():
    return sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


@pytest.mark.slow
def test_a_step_is_measured_beside_its_plan(quick, config, tmp_path):
    rows = list(training.measure(config, one_device(), tmp_path))
    checks = [row.check for row in rows]
    assert checks == ["input", *["speed of attention"] * 6, "memory", "training step", "input"]
    by_check = {row.check: row for row in rows}
    assert by_check["memory"].passed
    assert 0 < by_check["memory"].values["planned"] < by_check["memory"].values["limit"]
    step = by_check["training step"]
    # Pairs that find no room wait, so that a step may have fewer than its slots.
    assert 0 < step.values["pairs"] <= config.batch.pairs
    assert "no prediction for this kind of device" in step.text
    assert by_check["input"].values["needed"] == pytest.approx(
        step.values["pairs"] / np.median(step.values["seconds"])
    )


@pytest.mark.slow
def test_a_step_that_does_not_fit_fails(quick, config, tmp_path, monkeypatch):
    monkeypatch.setattr(training.memory, "device_limit", lambda device: 1000)
    monkeypatch.setattr(training.attention, "speed", lambda case, device: iter(()))
    (row,) = (r for r in training.measure(config, one_device(), tmp_path) if r.passed is False)
    assert row.check == "memory"
    assert "of 0.00 that it may take" in row.text


def test_a_step_that_would_take_too_long_is_not_run(quick, config, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_product_rate", lambda dtype: 1.0)
    *_, row = training.measure(config, one_device(), tmp_path)
    assert row.text.startswith("not run: it would take")


def test_assumed_pairs_are_what_they_say(tmp_path):
    source = SOURCE()
    has_image, words = source.queries()
    assert has_image.any()
    assert not has_image.all()
    for index in range(20):
        query = source[index].query
        assert bool(query.images) == has_image[index]
        assert len(query.text.split()) == words[index]


def test_chips_are_known_by_what_jax_calls_them():
    assert training.known_chip("NVIDIA H100 80GB HBM3") == "h100"
    assert training.known_chip("TPU v5 lite") == "v5e"
    assert set(training._TPUS.values()) <= set(chips.CHIPS)
    assert training.known_chip(jax.devices()[0].device_kind) is None
