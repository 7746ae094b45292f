"""What may change when a run is continued: every key is classified, and every key is tried."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from llave_jax import train
from llave_jax.config import default_config
from llave_jax.inputs.config import InputConfig
from llave_jax.models.config import LlaveConfig
from llave_jax.parallel import sharding
from llave_jax.training import resume
from llave_jax.training.metrics import read_metrics
from llave_jax.training.run_files import record_config
from llave_jax.training.watch import Watch
from llave_jax.weights import model_dir
from tests.training.text_runs import MODEL, make_config, train_until

ROOT = Path(__file__).parents[2]
MAY_CHANGE = {key for keys in resume.MAY_CHANGE.values() for key in keys}
FIXED = {key for keys in resume.FIXED.values() for key in keys}
KEYS = dict(resume.leaves(json.loads(default_config().to_json())))


def test_every_key_is_in_one_of_the_tables():
    listed = [
        key
        for table in (resume.MAY_CHANGE, resume.FIXED)
        for keys in table.values()
        for key in keys
    ]
    assert sorted(listed) == sorted(KEYS)


def test_the_docs_show_the_tables():
    assert resume.table() in (ROOT / "docs/operations.md").read_text()


@pytest.fixture
def recorded(tmp_path):
    """A run's folder as far as its config goes."""
    (tmp_path / "checkpoints/2").mkdir(parents=True)
    record_config(default_config(), tmp_path)
    return tmp_path


def other(value):
    """A value that differs, of a kind the field takes."""
    if value is None or isinstance(value, list):
        return None
    return (
        "other" if isinstance(value, str) else not value if isinstance(value, bool) else value + 1
    )


# Fields without a value, or with a tuple, take these.
VALUES = {
    "model.inputs.pinpoints": (2, 2),
    "data.subsets": ("A",),
    "data.weights": (("A", 1.0),),
    "optim.rates": ((".*", 1.0),),
    "eval.datasets": ("A",),
    "loss.temperature_range": (0.02, 0.5),
    "loss.in_batch_off": ("A",),
    "loss.dims": (8, 16),
    "loss.dim_weights": (1.0, 2.0),
}
STRINGS = ("path", "preset", "tokenizer", "newline_position", "pool_mode", "image_root")
STRINGS += ("best_metric", "benchmark", "wandb", "base_dtype")


@pytest.mark.parametrize("key", sorted(KEYS))
def test_a_key_is_refused_by_its_name_or_goes_through(key, recorded):
    config = default_config()
    value = VALUES.get(key, other(KEYS[key]))
    if value is None:
        value = "other" if key.rpartition(".")[2] in STRINGS else 7
    config.update_from_flattened_dict({key: value})
    before = (recorded / "config.json").read_text()
    if key in MAY_CHANGE:
        record_config(config, recorded)
        assert (recorded / "config.json").read_text() != before
        return
    with pytest.raises(ValueError, match=rf"another config \({re.escape(key)}: [^;]*\)"):
        record_config(config, recorded)
    assert (recorded / "config.json").read_text() == before


def test_pools_of_a_device_fix_the_number_of_devices(recorded):
    config = default_config()
    config.loss.pool = "device"
    shutil.rmtree(recorded / "checkpoints")
    record_config(config, recorded)
    (recorded / "checkpoints/2").mkdir(parents=True)
    config.mesh.fsdp = 2
    with pytest.raises(ValueError, match=r"\(mesh\.fsdp: 1 -> 2\)"):
        record_config(config, recorded)


def test_a_key_that_no_table_knows_is_refused():
    refused = resume.refused_changes({"loss": {"old": 1}}, {"loss": {"new": {"key": 2}}})
    assert refused == ["loss.new.key: None -> 2", "loss.old: 1 -> None"]


def test_a_run_from_before_there_was_a_key_has_its_default():
    now = {"loss": {"negatives_per_row": 1, "alpha": 9.0}}
    assert resume.refused_changes({"loss": {"alpha": 9.0}}, now) == []
    now["loss"]["negatives_per_row"] = 4
    refused = resume.refused_changes({"loss": {"alpha": 9.0}}, now)
    assert refused == ["loss.negatives_per_row: 1 -> 4"]


# Real runs: a tiny model with weights, text only.


@pytest.fixture(scope="module")
def runs(place, tmp_path_factory):
    """(a run that was never stopped, the same stopped after its second step)."""
    root = tmp_path_factory.mktemp("runs")
    train.train(make_config(place), root / "whole")
    train_until(2, make_config(place), root / "stopped")
    return root / "whole", root / "stopped"


def continued(runs, place, tmp_path, **changes):
    workdir = tmp_path / "run"
    shutil.copytree(runs[1], workdir)
    train.train(make_config(place, changes), workdir)
    return workdir


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir) if "loss" in line]


# Keys that are changed together, and how far losses may then differ from those of the run that was
# never stopped; None: batches differ. Keys share a run where none of them can hide what another does.
EXACT, ROUNDING = 0.0, 1e-5
CHANGES = {
    "what is kept and shown": (
        {
            "attention": "xla",
            "vision_attention": "xla",
            "data.num_workers": 1,
            "data.stall_warning": 30.0,
            "data.on_error": "skip",
            "data.max_skip_share": 0.5,
            "checkpoint.every": 1,
            "checkpoint.keep": 1,
            "checkpoint.best_metric": "classification/VOC2007",
            "eval.every": 1,
            "eval.patience": 7,
            "log.wandb": "",
            "profile.start": 3,
            "profile.steps": 1,
            "nonfinite.action": "skip",
            "nonfinite.max_in_a_row": 7,
            "nonfinite.max_in_all": 7,
        },
        EXACT,
    ),
    "where things lie": (
        {
            "data.path": "moved_data",
            "data.image_root": "moved_data",
            "model.path": "moved",
            "model.tokenizer": "model/tokenizer",
            "eval.benchmark": "moved_eval",
            "eval.datasets": ("VOC2007",),
        },
        EXACT,
    ),
    "what is computed again, spare taps": ({"remat": "both", "batch.taps": 4}, ROUNDING),
    "log_every": ({"log_every": 2}, None),
    "batch.row_length": ({"batch.row_length": 256}, None),
    "batch.tokens_per_pair": ({"batch.tokens_per_pair": 256.0}, None),
    "batch.crops_per_pair": ({"batch.crops_per_pair": 2.0}, None),
    "mesh.data": ({"mesh.data": 8}, EXACT),
    "mesh.fsdp": ({"mesh.fsdp": 2}, ROUNDING),
    "mesh.tensor": ({"mesh.tensor": 2}, None),
}


# What makes a run of 4 steps, an epoch, one of 8.
LONGER = {"steps": {"steps": 8}, "data.epochs": {"steps": None, "data.epochs": 2}}


@pytest.mark.slow
@pytest.mark.parametrize("key", LONGER)
def test_a_finished_run_goes_on_longer_on_the_schedule_of_its_new_length(
    key, runs, place, tmp_path
):
    workdir = tmp_path / "run"
    shutil.copytree(runs[0], workdir)
    config = make_config(place, {**LONGER[key], "eval.benchmark": None})
    train.train(config, workdir)
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 9))
    np.testing.assert_array_equal([line["loss"] for line in lines[:4]], losses(runs[0]))
    # Cosines over all steps, without warm-up: of 4 steps up to the 4th, then of 8.
    passed = [*np.arange(4) / 4, *np.arange(4, 8) / 8]
    expected = config.optim.learning_rate * 0.5 * (1 + np.cos(np.pi * np.array(passed)))
    np.testing.assert_allclose([line["learning_rate"] for line in lines], expected, rtol=1e-5)


def test_fewer_steps_than_were_made_are_refused(runs, place, tmp_path):
    with pytest.raises(
        ValueError, match=r"holds a run of 2 steps, and the config asks for 1; raise"
    ):
        continued(runs, place, tmp_path, steps=1)


def test_every_key_that_may_change_is_tried_once():
    tried = [key for changes, _ in CHANGES.values() for key in changes]
    assert sorted([*tried, *LONGER]) == sorted(MAY_CHANGE)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_a_run_goes_on_with_keys_changed(name, runs, place, tmp_path):
    changes, tolerance = CHANGES[name]
    changes = {
        key: str(place / value)
        if isinstance(value, str) and value and (place / value).exists()
        else value
        for key, value in changes.items()
    }
    workdir = continued(runs, place, tmp_path, **changes)
    whole = {line["step"]: line for line in read_metrics(runs[0]) if "loss" in line}
    found = {line["step"]: line for line in read_metrics(workdir) if "loss" in line}
    assert max(found) == 4
    for step, line in found.items():
        assert line["pairs"] == 16
        # As many rows were read: none is left out, none comes twice.
        assert line["epoch"] == whole[step]["epoch"]
        if tolerance is not None:
            assert line["loss"] == pytest.approx(whole[step]["loss"], rel=tolerance)
    assert (workdir / "results.txt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("order", ["uniform", "modality"])
@pytest.mark.parametrize(("key", "value"), [("mesh.fsdp", 2), ("batch.row_length", 256)])
def test_no_row_comes_twice_when_batches_change(key, value, order, place, tmp_path, monkeypatch):
    """48 of 64 rows in three of the four steps of the first epoch, each once, though the last step differs."""
    seen = []
    add = Watch.add

    def note(self, step, metrics, batch):
        seen.extend(row for pack in batch.ids for shard in pack for row in shard if row)
        add(self, step, metrics, batch)

    monkeypatch.setattr(Watch, "add", note)
    same = {"data.order": order, "eval.benchmark": None}
    train_until(2, make_config(place, same), tmp_path / "run")
    train_until(3, make_config(place, {**same, key: value}), tmp_path / "run")
    assert len(seen) == len(set(seen)) == 48


def test_a_run_goes_on_where_data_and_model_were_moved_to(runs, place, tmp_path):
    moved = {"data.path": str(place / "moved_data"), "model.path": str(place / "moved")}
    workdir = continued(runs, place, tmp_path, **moved, **{"data.on_error": "skip"})
    np.testing.assert_array_equal(losses(workdir), losses(runs[0]))


def test_another_run_begins_with_the_weights_of_this_one(runs, place, tmp_path):
    """With another learning rate and batch, in a workdir of its own; without learning they stay as they are."""
    changes = {
        "model.path": str(runs[0]), "eval.benchmark": None, "steps": 1, "batch.pairs": 8,
        "batch.crops_per_pair": 2.0, "optim.learning_rate": 0.0,
    }  # fmt: skip
    train.train(make_config(place, changes), tmp_path)
    begun, source, base = (
        sharding.flatten(model_dir.load_params(path))
        for path in (tmp_path, runs[0], place / "model")
    )
    for path, value in source.items():
        np.testing.assert_array_equal(begun[path], value, path)
    assert any(not np.array_equal(base[path], value) for path, value in source.items())


def test_other_data_is_refused(runs, place, tmp_path):
    with pytest.raises(ValueError, match=r"data position is for .*; resume with the same data"):
        continued(runs, place, tmp_path, **{"data.path": str(place / "other_data")})


def test_another_model_in_its_place_is_refused(runs, place, golden, tmp_path):
    longer = LlaveConfig(MODEL.vision, MODEL.text, InputConfig(pinpoints=((8, 8),), max_length=64))
    model_dir.write_model_dir(tmp_path / "longer", longer, tokenizer=golden / "checkpoint")
    with pytest.raises(ValueError, match=r"describes another \(inputs\.max_text_length: 128 -> "):
        continued(runs, place, tmp_path, **{"model.path": str(tmp_path / "longer")})


def test_another_tokenizer_in_its_place_is_refused(runs, place, golden, tmp_path):
    shutil.copytree(place / "model", tmp_path / "retokenized")
    (tmp_path / "retokenized/tokenizer/added_tokens.json").write_text("{}")
    with pytest.raises(
        ValueError, match=r"tokenizer of the run; .*retokenized/tokenizer is another"
    ):
        continued(runs, place, tmp_path, **{"model.path": str(tmp_path / "retokenized")})


def test_a_benchmark_may_join_later(place, tmp_path):
    """It has not scored the untrained model, and the table says so."""
    workdir = tmp_path / "run"
    train_until(2, make_config(place, {"eval.benchmark": None}), workdir)
    train.train(make_config(place), workdir)
    rows = [line.split() for line in (workdir / "results.txt").read_text().splitlines()]
    (row,) = [row for row in rows if row[0] == "VOC2007"]
    assert row[3] == "-"
    assert float(row[4]) >= 0
