"""What a run keeps of its batches: planned once, and the same when the run goes on."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from llave_jax.config import default_config
from llave_jax.data.batch_plan import BatchPlan
from llave_jax.data.packing_simulation import PairSizes
from llave_jax.models.config import PRESETS
from llave_jax.training import batch_shape, run_files

MODEL = PRESETS["tiny"]
SHARDS = 2
PARTS = """
import importlib, pkgutil, sys
import llave_jax.training, llave_jax.train
for module in pkgutil.iter_modules(llave_jax.training.__path__):
    importlib.import_module(f"llave_jax.training.{module.name}")
print([name for name in ("matplotlib", "sklearn") if name in sys.modules])
"""


@pytest.fixture
def config():
    config = default_config()
    config.batch.pairs = 16
    return config


def sizes(scale):
    """Pairs of an image and a short text."""
    rng = np.random.default_rng(0)
    lengths = np.stack([rng.integers(40, 60, 500) * scale, rng.integers(10, 20, 500)], 1)
    crops = np.tile([3, 0], (500, 1))
    return PairSizes(lengths, crops, np.full(500, True), np.full(500, 9))


def unread():
    raise AssertionError("the data is measured again")


def plan(config, workdir, measure=lambda: sizes(1), shards=SHARDS):
    run_files.record_config(config, workdir)

    def find(pairs):
        assert pairs in (None, 16)
        return batch_shape.make_plan(config, MODEL, shards, measure)

    return run_files.record_batch_plan(config, shards, find, workdir)


def save_checkpoint(workdir):
    (workdir / "checkpoints/2/params").mkdir(parents=True)


def test_a_run_goes_on_with_the_batches_it_began_with(config, tmp_path):
    first = plan(config, tmp_path)
    record = json.loads((tmp_path / "batch_plan.json").read_text())
    assert BatchPlan.from_dict(record["plan"]) == first
    assert record["asked"]["shards"] == SHARDS
    assert 0 < first.fill <= 1
    save_checkpoint(tmp_path)
    assert plan(config, tmp_path, unread) == first


def test_before_the_first_checkpoint_batches_are_planned_anew(config, tmp_path):
    first = plan(config, tmp_path)
    larger = plan(config, tmp_path, lambda: sizes(2)).budget
    assert larger.rows * larger.row_length > first.budget.rows * first.budget.row_length


def test_on_other_devices_the_expected_fill_stays(config, tmp_path):
    """It decides how many steps the run has."""
    first = plan(config, tmp_path)
    record = json.loads((tmp_path / "batch_plan.json").read_text())
    record["plan"]["fill"] = 0.75
    (tmp_path / "batch_plan.json").write_text(json.dumps(record))
    save_checkpoint(tmp_path)
    assert plan(config, tmp_path, unread) == dataclasses.replace(first, fill=0.75)
    moved = plan(config, tmp_path, shards=4)
    assert moved.budget.groups < first.budget.groups
    assert moved.fill == 0.75
    assert moved.order_slots == first.order_slots
    assert plan(config, tmp_path, unread, shards=4) == moved


@pytest.mark.parametrize("name", ["config.json", "batch_plan.json"])
def test_a_damaged_file_of_the_run_is_named(config, name, tmp_path):
    save_checkpoint(tmp_path)
    (tmp_path / name).write_text('{"batch": ')
    with pytest.raises(ValueError, match=f"{name}: not JSON"):
        plan(config, tmp_path, unread)


def test_what_is_set_by_hand_wins_and_is_not_planned(config, tmp_path):
    config.batch.update(row_length=512, tokens_per_pair=128.0, crops_per_pair=7.0, taps=4, fill=0.9)
    found = plan(config, tmp_path, unread)
    budget = found.budget
    assert (budget.rows, budget.row_length, budget.crops, budget.taps) == (2, 512, 56, 4)
    assert found.fill == 0.9
    assert str(found).endswith("set by hand")


def test_a_run_from_before_planning_keeps_its_numbers(config, tmp_path):
    """Its config has all numbers, and no plan lies beside it; configs have since left them open."""
    config.batch.update(row_length=512, tokens_per_pair=128.0, crops_per_pair=7.0, taps=1, fill=1.0)
    run_files.record_config(config, tmp_path)
    save_checkpoint(tmp_path)
    assert not (tmp_path / "batch_plan.json").exists()
    opened = default_config()
    opened.batch.pairs = 16
    for _ in range(2):
        found = plan(opened.copy_and_resolve_references(), tmp_path, unread)
        assert (found.budget.row_length, found.budget.groups, found.fill) == (512, 8, 1.0)
    # What would change the run is refused all the same.
    opened.batch.fill = 0.5
    with pytest.raises(ValueError, match=r"batch\.fill: 1\.0 -> 0\.5"):
        run_files.record_config(opened, tmp_path)


def test_a_run_from_before_pairs_per_device_keeps_its_pairs(config, tmp_path):
    first = plan(config, tmp_path)
    save_checkpoint(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    del written["batch"]["pairs_per_device"]
    (tmp_path / "config.json").write_text(json.dumps(written))
    config.batch.pairs, config.batch.pairs_per_device = None, 144
    assert plan(config, tmp_path, unread) == first
    assert config.batch.pairs == 16


def test_training_needs_no_libraries_for_pictures():
    """Matplotlib and scikit-learn take seconds to import, on every host of a job."""
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", PARTS], cwd=root, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
