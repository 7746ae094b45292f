"""The assumed mix of MMEB and how well the configs' budgets fit it."""

import importlib

import numpy as np
import pytest

from llave_jax.data import packing_simulation
from llave_jax.data.sources import MMEB_TRAIN_SUBSETS
from llave_jax.inputs.batch import Budget
from llave_jax.models.config import PRESETS
from llave_jax.planning import workload
from llave_jax.training import batch_shape, setup
from llave_jax.training.batch_search import with_batch_by_hand

CONFIG = PRESETS["llave-0.5b"]


@pytest.fixture(scope="module")
def sizes():
    return workload.sample_pairs(CONFIG.input_spec, 3000)


def test_the_mix_is_the_papers():
    assert sorted(workload.SUBSETS) == sorted(MMEB_TRAIN_SUBSETS)
    assert sum(subset.rows for subset in workload.SUBSETS.values()) == pytest.approx(
        662_000, abs=500
    )
    for subset in workload.SUBSETS.values():
        for side in (subset.query, subset.target):
            assert side.images is None or sum(s for *_, s in side.images) == pytest.approx(1)


def test_sizes_are_those_of_the_models_inputs(sizes):
    assert workload.image_cost(640, 480, CONFIG.input_spec) == (2929, 5, 1)
    assert workload.image_cost(500, 375, CONFIG.input_spec) == (1728, 3, 1)
    assert sizes.lengths.min() > workload.CHAT_TOKENS
    assert sizes.lengths.max() <= CONFIG.inputs.max_length
    np.testing.assert_array_equal(
        workload.sample_pairs(CONFIG.input_spec, 50).lengths,
        workload.sample_pairs(CONFIG.input_spec, 50).lengths,
    )


def planned(config, sizes, devices):
    return batch_shape.make_plan(config, setup.model_config(config), devices, lambda: sizes)


@pytest.mark.parametrize(("size", "chips"), [("0.5b", 16), ("2b", 16), ("7b", 64)])
def test_budgets_of_the_configs_are_well_filled(sizes, size, chips):
    config = importlib.import_module("configs.tpu_v4").get_config(size)
    packing = packing_simulation.simulate(sizes, batch_shape.batch_budget(config, chips), shards=4)
    assert packing.tokens > 0.95
    assert packing.crops > 0.90
    assert packing.carried_twice <= 0.01


@pytest.mark.parametrize(
    ("name", "arguments", "devices"),
    [
        ("tpu_v4", ["0.5b"], 16),
        ("tpu_v4", ["7b"], 64),
        ("gpu_h100", ["0.5b"], 8),
        ("gpu_h100", ["2b"], 8),
        ("llave_0_5b", [], 8),
        ("llave_2b", [], 8),
        ("llave_7b", [], 16),
        ("lora_7b_h100x1", [], 1),
        ("lora_2b_v5e", [], 4),
    ],
)
def test_steps_of_the_configs_make_one_epoch(sizes, name, arguments, devices):
    config = importlib.import_module(f"configs.{name}").get_config(*arguments)
    config = with_batch_by_hand(config, devices)
    assert config is not None
    plan = planned(config, sizes, devices)
    budget = plan.budget
    packing = packing_simulation.simulate(
        sizes, budget, shards=4, **batch_shape.dealing(config, devices)
    )
    slots = budget.groups * devices * config.batch.micro_batches
    read = batch_shape.total_steps(config, 662_000, plan.fill) * slots * packing.pairs
    assert read / 662_000 == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(("name", "devices"), [("0_5b", 8), ("2b", 8), ("7b", 16)])
def test_the_papers_pools_are_kept_but_for_a_few_pairs(sizes, name, devices):
    config = importlib.import_module(f"configs.llave_{name}").get_config()
    dealing = batch_shape.dealing(config, devices)
    assert dealing == {"group_size": 256 // 8 // devices, "micro_batches": 8}
    budget = planned(config, sizes, devices).budget
    packing = packing_simulation.simulate(sizes, budget, shards=8, **dealing)
    assert packing.carried < 0.05
    assert packing.carried_twice == 0


def test_simulation_counts_what_it_packs():
    """Pairs of one size that fill a row exactly: nothing is wasted, nothing waits."""
    lengths = np.tile([60, 40], (100, 1))
    sizes = packing_simulation.PairSizes(
        lengths, np.tile([1, 0], (100, 1)), np.arange(100) % 4 > 0, np.full(100, 5)
    )
    budget = Budget(rows=2, row_length=100, crops=2, groups=2)
    by_modality = packing_simulation.simulate(
        sizes, budget, shards=2, group_size=2, micro_batches=5
    )
    assert by_modality.tokens == by_modality.pairs == 1
    packing = packing_simulation.simulate(sizes, budget, shards=2)
    assert packing.tokens == packing.crops == packing.pairs == 1
    assert packing.carried == packing.carried_twice == 0
    assert packing.segment_ids.shape[1:] == (2, 100)
    rows = packing.segment_ids.reshape(-1, 100)
    assert {tuple(np.unique(row, return_counts=True)[1]) for row in rows} == {(60, 40)}


def test_budgets_too_small_for_a_pair_are_refused(sizes):
    with pytest.raises(ValueError, match=r"a measured pair: .* do not fit together into 1 rows"):
        packing_simulation.simulate(
            sizes, Budget(rows=1, row_length=6144, crops=24, groups=4), shards=2
        )


def test_too_few_pairs_are_refused(sizes):
    few = sizes.take(np.arange(10))
    budget = Budget(rows=40, row_length=4096, crops=400, groups=64)
    for dealing in ({}, {"group_size": 8}):
        with pytest.raises(ValueError, match="too few pairs"):
            packing_simulation.simulate(few, budget, shards=2, **dealing)
