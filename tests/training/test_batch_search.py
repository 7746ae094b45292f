"""The batch that fits: found with few compilations, and not compiled again."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llave_jax.common.command_line import load_config
from llave_jax.config import default_config
from llave_jax.data.packing_simulation import PairSizes
from llave_jax.inputs.batch import PairLabels, empty_batch, stack_batches
from llave_jax.inputs.config import InputConfig
from llave_jax.models.config import LlaveConfig, TextConfig, VisionConfig
from llave_jax.models.llave import Llave, example_batch
from llave_jax.parallel import sharding
from llave_jax.training import batch_shape, setup
from llave_jax.training.batch_search import BatchSearch, pairs_candidates, with_batch

MODEL = LlaveConfig(
    VisionConfig(16, 1, 2, 32, image_size=8, patch_size=4),
    TextConfig(16, 1, 2, 1, 32, vocab_size=600),
    InputConfig(pinpoints=((8, 8),), max_text_length=128, max_length=128),
)
# jax's event for each program that XLA compiles, or that is read from the compilation cache.
COMPILED = "/jax/core/compile/backend_compile_duration"


def open_config(**changes):
    config = default_config()
    config.batch.pairs = config.batch.micro_batches = None
    config.dtype = "float32"
    config.data.on_error = "skip"
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return config


def sizes():
    """Texts of 20 to 60 tokens."""
    lengths = np.random.default_rng(0).integers(20, 60, (300, 2))
    return PairSizes(lengths, np.zeros((300, 2), int), np.full(300, False), np.full(300, 9))


def mesh_of(devices):
    return sharding.make_mesh({"data": devices, "fsdp": 1, "tensor": 1}, jax.devices()[:devices])


def search(config, rows, limit, devices=1):
    return BatchSearch(config, MODEL, mesh_of(devices), rows, sizes, lambda: limit)


@given(
    st.integers(1, 100_000), st.integers(1, 12), st.sampled_from([4, 8, 96, 256, 1152]),
    st.sampled_from([None, 1, 3]),
)  # fmt: skip
def test_pairs_leave_an_epoch_of_some_steps(rows, shards, most, micro_batches):
    config = open_config(batch__max_pairs=most, batch__micro_batches=micro_batches)
    found = pairs_candidates(config, rows, shards)
    assert found == sorted(set(found), reverse=True)
    assert all(pairs % (shards * (micro_batches or 1)) == 0 for pairs in found)
    unit = shards * (micro_batches or 1)
    assert found[0] < most + unit
    assert found[0] < max(rows / 8, min(8, most)) + unit
    # No fewer than necessary.
    assert found[0] >= min(most, rows / 16, max(8, rows / 16))
    assert found[-1] < 16 + unit


def test_the_same_pairs_on_one_device_and_on_eight():
    for rows in (20, 200, 5000, 10**6):
        found = [pairs_candidates(open_config(), rows, shards) for shards in (1, 2, 4, 8)]
        assert found.count(found[0]) == 4
    assert pairs_candidates(open_config(), 180, 8)[0] == 16


@given(
    st.integers(1, 400), st.sampled_from([1, 3, 8]), st.sampled_from([64, 256, 1152]),
    st.sampled_from([None, 48, 96]),
)  # fmt: skip
def test_the_most_pairs_in_the_fewest_micro_batches_that_fit(limit, shards, most, pairs):
    """Of a program that takes a unit for each pair of a step, and 10 more for each of a micro-batch."""

    def needed(pairs, parts):
        return pairs // shards + 10 * (pairs // parts // shards)

    config = open_config(batch__max_pairs=most, batch__pairs=pairs)
    found = BatchSearch(config, MODEL, mesh_of(1), 100_000, sizes, lambda: limit)
    found._shards = shards
    found._plan = lambda sizes: sizes
    found._found = lambda sizes: sizes
    found._compile = lambda sizes: found.tried.update({sizes: needed(*sizes)})
    candidates = [pairs] if pairs else pairs_candidates(config, 100_000, shards)
    fitting = [
        (count, parts)
        for count in candidates
        for parts in range(1, count + 1)
        if count // shards % parts == 0 and needed(count, parts) <= limit
    ]
    if not fitting:
        with pytest.raises(ValueError, match=r"the model does not fit: .* Use more devices"):
            found.find()
        return
    most_pairs = max(count for count, _ in fitting)
    assert found.find() == (most_pairs, min(m for count, m in fitting if count == most_pairs))
    divisors = max(len(found._micro_batches(count)) for count in candidates)
    bound = 3 + math.ceil(math.log2(len(candidates))) + math.ceil(math.log2(divisors))
    assert len(found.tried) <= bound


@pytest.fixture(scope="module")
def measured():
    """Bytes that steps of 16 pairs take, by the number of micro-batches."""
    found = search(open_config(batch__pairs=16), 200, 0)
    for parts in (1, 2, 16):
        found._compile((16, parts))
    return {parts: needed for (_, parts), needed in found.tried.items()}


@pytest.mark.slow
def test_memory_decides_how_many_micro_batches_there_are(measured, caplog):
    assert measured[1] > measured[2] > measured[16] > 0
    caplog.set_level("INFO")
    for limit, expected in ((2**40, 1), (measured[1], 1), (measured[1] - 1, 2)):
        caplog.clear()
        found = search(open_config(batch__pairs=16), 200, limit)
        plan = found.find()
        assert (plan.pairs, plan.micro_batches) == (16, expected)
        assert found.tried[16, expected] == measured[expected]
        assert f"planned: 16 pairs a step in {expected} micro-batch(es)" in caplog.messages[-1]
    with pytest.raises(ValueError, match="16 pairs a step in 16 micro-batch") as refused:
        search(open_config(batch__pairs=16), 200, measured[16] - 1).find()
    assert "remat=both" in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize("devices", [1, 8])
def test_the_step_that_was_found_is_not_compiled_again(devices):
    config, mesh = open_config(), mesh_of(devices)
    found = search(config, 200, 2**40, devices)
    plan = found.find()
    assert len(found.tried) == 1
    config = with_batch(config, plan.pairs, plan.micro_batches)
    steps = batch_shape.total_steps(config, 200, plan.fill)
    training = found.training(config, plan, steps)
    assert found.training(config, plan, steps + 1) is not training
    state = training.step.init(
        jax.jit(lambda: Llave(MODEL).init(jax.random.key(0), example_batch(MODEL))["params"])()
    )
    batch = stack_batches([empty_batch(plan.budget, devices, MODEL.vision.crop)])
    by_target = (1, devices, plan.budget.sides - 1, plan.budget.groups)
    labels = PairLabels(
        np.zeros(by_target, np.int32),
        np.zeros((1, devices, plan.budget.groups), np.int32),
        np.zeros(by_target, np.float32),
    )
    arrays = (batch, labels)
    arrays = sharding.device_put_batch(arrays, mesh, leading_axes=1)
    compiled = []

    def note(event, seconds, **_):
        if event == COMPILED:
            compiled.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        jax.block_until_ready(training.step.run(state, *arrays))
    finally:
        jax.monitoring.clear_event_listeners()
    assert compiled == []


def test_pairs_that_do_not_divide_are_named():
    with pytest.raises(ValueError, match=r"batch\.pairs is 9: .* over 2 devices; .* multiple of 2"):
        search(open_config(batch__pairs=9), 200, 2**40, 2).find()


def test_nothing_is_compiled_where_the_config_sets_both():
    config = open_config(batch__pairs=16, batch__micro_batches=2)
    found = search(config, 200, 0)
    assert (found.find().pairs, found.find().micro_batches) == (16, 2)
    assert found.tried == {}


@pytest.mark.parametrize("devices", [1, 2, 8])
@pytest.mark.parametrize("size", ["0.5b", "7b"])
def test_mesh_and_pairs_of_gpu_h100_follow_from_the_gpus_that_are_there(size, devices):
    config = load_config(f"gpu_h100:{size}")
    mesh = sharding.make_mesh(dict(config.mesh), jax.devices()[:devices])
    assert dict(mesh.shape) == {"data": 1, "fsdp": devices, "tensor": 1}
    found = BatchSearch(config, setup.model_config(config), mesh, 662_000, sizes, lambda: 0)
    plan = found.find()
    slots = {"0.5b": 144, "7b": 72}[size]
    assert (plan.pairs, plan.micro_batches) == (slots * devices, 8)
    # A device's part of a step is the same on any number of them.
    assert plan.budget.groups == slots // 8
    assert found.tried == {}
    # What the command line sets goes before, and a run that goes on keeps its pairs.
    assert found.find(1152).pairs == 1152
    config.batch.pairs = 16 * devices
    assert BatchSearch(config, MODEL, mesh, 662_000, sizes).find().pairs == 16 * devices
