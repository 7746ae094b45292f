"""The trainer as its users run it: continues exactly, stops on bad losses, says what is wrong."""

import dataclasses
import json
import os
import re
import runpy
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from llave_jax import Embedder, train
from llave_jax.config import default_config
from llave_jax.data.measure import measure_subset, mixed_sizes
from llave_jax.inputs.packing import Planner
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.parallel import sharding
from llave_jax.planning import compile_ahead
from llave_jax.training import optim, setup, train_step
from llave_jax.training.batch_shape import batch_budget, total_steps
from llave_jax.training.metrics import MetricsWriter, read_metrics
from llave_jax.training.run_files import record_config
from llave_jax.training.setup import model_config
from llave_jax.training.watch import Watch
from llave_jax.weights import model_dir

CONFIGS = Path(__file__).parents[2] / "configs"


def quickstart(**changes) -> ConfigDict:
    """The quickstart in small; changes are by dotted name, with `__` for the dot."""
    config = runpy.run_path(str(CONFIGS / "quickstart.py"))["get_config"]()
    config.steps = 4
    config.batch.pairs = 16
    config.log_every = 1
    config.checkpoint.every = 2
    config.eval.benchmark = None
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return config


@pytest.fixture(scope="module")
def digits_data(few_digits, tmp_path_factory):
    """The benchmark's files, built once."""
    workdir = tmp_path_factory.mktemp("data")
    setup.locate_data(quickstart(), workdir)
    return workdir / "digits"


@pytest.mark.parametrize("shards", [1, 2, 4, 8])
def test_a_step_of_the_quickstart_has_room_for_its_pairs_on_any_devices(digits_data, shards):
    """A pair that had to wait would make the steps differ between numbers of devices."""
    config = runpy.run_path(str(CONFIGS / "quickstart.py"))["get_config"]()
    data, tokenizer = setup.locate_data(config, digits_data.parent)
    source = setup.open_training_source(config, data)
    spec = model_config(config).input_spec
    builder = SequenceBuilder(setup.load_tokenizer(config, tokenizer), spec)
    measured = {name: measure_subset(source, name, builder, 100) for name in source.subsets}
    sizes = mixed_sizes(measured, 300 * 32)
    pairs = list(zip(sizes.lengths, sizes.crops.sum(1), strict=True))
    for start in range(0, len(pairs), 32):
        planner = Planner(batch_budget(config, shards), shards)
        assert all(planner.place(*pair) is not None for pair in pairs[start : start + 32])


@pytest.fixture
def make_workdir(tmp_path, digits_data):
    def make(name: str) -> Path:
        (tmp_path / name).mkdir()
        (tmp_path / name / "digits").symlink_to(digits_data)
        return tmp_path / name

    return make


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir) if "loss" in line]


def params(workdir):
    return sharding.flatten(jax.tree.map(np.asarray, model_dir.load_params(workdir)))


@pytest.fixture(scope="module")
def finished(tmp_path_factory, digits_data):
    """A run on all 8 devices that was never interrupted."""
    workdir = tmp_path_factory.mktemp("finished")
    (workdir / "digits").symlink_to(digits_data)
    train.train(quickstart(), workdir)
    return workdir


@pytest.mark.slow
def test_one_device_trains_to_the_same_losses(finished, make_workdir, monkeypatch):
    """Eight shards and one: the same pairs a step, so the same run within float32 summation."""
    workdir = make_workdir("one")
    make_mesh = sharding.make_mesh
    monkeypatch.setattr(sharding, "make_mesh", lambda axes: make_mesh(axes, jax.devices()[:1]))
    train.train(quickstart(), workdir)
    assert [line["pairs"] for line in read_metrics(workdir)] == [16] * 4
    np.testing.assert_allclose(losses(workdir), losses(finished), rtol=1e-4)


def test_continues_to_the_same_result(finished, make_workdir, monkeypatch):
    """Stopped after step 3, of which only step 2 was saved: the same command ends as if nothing was."""
    workdir = make_workdir("stopped")
    finish = Watch._finish

    def stop(self, step, metrics, batch):
        if step == 3:
            raise KeyboardInterrupt
        finish(self, step, metrics, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Watch, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            train.train(quickstart(), workdir)
    train.train(quickstart(), workdir)
    assert [line["step"] for line in read_metrics(workdir)] == [1, 2, 3, 4]
    np.testing.assert_array_equal(losses(workdir), losses(finished))
    expected = params(finished)
    for path, value in params(workdir).items():
        np.testing.assert_array_equal(value, expected[path], err_msg=path)


def test_sigterm_saves_the_step_under_way(make_workdir, monkeypatch):
    """SIGTERM comes while step 2 is under way: it is saved, and the run is told from a complete one."""
    workdir = make_workdir("told")
    finish, before = Watch._finish, signal.getsignal(signal.SIGTERM)

    def tell(self, step, metrics, batch):
        finish(self, step, metrics, batch)
        if step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Watch, "_finish", tell)
    assert not train.train(quickstart(checkpoint__every=100), workdir)
    assert len(losses(workdir)) == 2
    assert [path.name for path in (workdir / "checkpoints").iterdir()] == ["2"]
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize(("complete", "status"), [(True, 0), (False, 143)])
def test_exit_status_says_whether_a_run_is_complete(tmp_path, monkeypatch, complete, status):
    monkeypatch.setattr(train, "train", lambda config, workdir: complete)
    monkeypatch.setattr(train.command_line, "set_up_logging", lambda *args, **options: None)
    arguments = ["--config", "quickstart", "--workdir", str(tmp_path)]
    assert train.main(arguments) == status


class Stopped(Exception):
    pass


@pytest.mark.slow
def test_what_is_compiled_ahead_is_what_trains(make_workdir, monkeypatch):
    """The same text, with its shardings and the donation of the state."""
    config = quickstart(mesh__data=2, mesh__fsdp=-1, batch__micro_batches=2)
    build_step = train_step.build_step

    def stop_at_first_step(*args):
        step = build_step(*args)

        def run(*arguments):
            raise Stopped(step.run.lower(*arguments).as_text())

        return dataclasses.replace(step, run=run)

    with monkeypatch.context() as patch:
        patch.setattr(train_step, "build_step", stop_at_first_step)
        with pytest.raises(Stopped) as stopped:
            train.train(config, make_workdir("program"))
    lowered, _, _ = compile_ahead.lower_train_step(config, sharding.make_mesh(dict(config.mesh)))
    assert lowered.as_text() == str(stopped.value)
    for mark in ("fsdp", "jax.buffer_donor|tf.aliasing_output"):
        assert re.search(mark, lowered.as_text())


def test_another_number_of_processes_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run", symlinks=True)
    shutil.rmtree(tmp_path / "run/checkpoints/2")
    (tmp_path / "run/checkpoints/4/checkpoint.json").unlink()
    data = tmp_path / "run/checkpoints/4/data"
    positions = (data / "process_0-of-1.json").rename(data / "process_0-of-2.json")
    shutil.copy(positions, data / "process_1-of-2.json")
    with pytest.raises(ValueError, match=r"4/data has the data positions of 2 processes.*has 1;"):
        train.train(quickstart(), tmp_path / "run")


def test_tokens_without_embeddings_are_refused(make_workdir, golden):
    config = quickstart(model__tokenizer=str(golden / "checkpoint"))
    with pytest.raises(ValueError, match=r"checkpoint has tokens up to id 589 .* for 512"):
        train.train(config, make_workdir("tokens"))


def test_a_finished_run_is_left_alone(finished):
    before = read_metrics(finished)
    train.train(quickstart(), finished)
    assert read_metrics(finished) == before


def test_a_run_is_a_model(finished):
    embedder = Embedder.from_pretrained(finished)
    vectors = embedder.encode(["the digit nine", "the digit two"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_a_run_that_did_not_begin_may_be_put_right(make_workdir):
    workdir = make_workdir("mistyped")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        train.train(quickstart(data__path="/nowhere"), workdir)
    record_config(quickstart(), workdir)
    assert json.loads((workdir / "config.json").read_text())["data"]["path"] == "digits"


def test_other_config_is_refused(finished):
    rate = quickstart().optim.learning_rate
    expected = f"another config (optim.learning_rate: {rate} -> 0.5)"
    with pytest.raises(ValueError, match=re.escape(expected)):
        train.train(quickstart(optim__learning_rate=0.5), finished)


def test_bad_loss_stops_with_its_rows(make_workdir, monkeypatch):
    workdir = make_workdir("bad")
    finish = Watch._finish

    def poison(self, step, metrics, batch):
        finish(self, step, {**metrics, "loss": np.float32("nan")} if step == 3 else metrics, batch)

    monkeypatch.setattr(Watch, "_finish", poison)
    with pytest.raises(FloatingPointError, match=r"step 3: loss nan.*Digits-\w+"):
        train.train(quickstart(), workdir)
    assert sorted(p.name for p in (workdir / "checkpoints").iterdir()) == ["2"]


@pytest.mark.slow
def test_frozen_parameters_stay(make_workdir, finished):
    """The paper's freezing: the vision tower stays as it was, with no optimiser state; the rest moves."""
    rates = (("vision_tower/.*", None), (".*", 1.0))
    workdir = make_workdir("frozen")
    config = quickstart(steps=1, optim__rates=rates, optim__warmup_fraction=0.0)
    train.train(config, workdir)
    start = make_workdir("start")
    # One step with a learning rate of nothing: the initial parameters.
    still = quickstart(steps=1, optim__rates=rates, optim__learning_rate=0.0)
    train.train(still, start)
    initial, after = params(start), params(workdir)
    for path, value in after.items():
        same = np.array_equal(value, initial[path])
        assert same == path.startswith("vision_tower/"), path


@pytest.mark.slow
def test_quickstart_scores_and_draws(make_workdir, capsys):
    workdir = make_workdir("scored")
    config = quickstart(eval__benchmark="digits", eval__every=2)
    config.checkpoint.best_metric = "average/overall"
    train.train(config, workdir)
    table = (workdir / "results.txt").read_text()
    assert table.strip() in capsys.readouterr().out
    for name in ("Digits-Classification", "Digits-VQA", "Digits-Retrieval_i2t", "Digits-Grounding"):
        assert name in table
    assert (workdir / "similarity.png").stat().st_size > 1000
    evaluated = [line["step"] for line in read_metrics(workdir) if "eval/average/overall" in line]
    assert evaluated == [0, 2, 4]
    scores = {
        line["step"]: line["eval/average/overall"]
        for line in read_metrics(workdir)
        if line["step"] in evaluated and "eval/average/overall" in line
    }
    best = json.loads((workdir / "best" / "best.json").read_text())
    assert best["value"] == max(scores.values()) == scores[best["step"]]
    assert Embedder.from_pretrained(workdir / "best").encode(["nine"]).shape == (1, 96)


def test_budget_follows_from_pairs():
    config = quickstart()
    one, eight = batch_budget(config, 1), batch_budget(config, 8)
    assert (one.groups, eight.groups) == (16, 2)
    assert (one.rows, eight.rows) == (16 * 112 / 224, 1)
    assert (one.crops, eight.crops) == (16 * 7, 2 * 7)
    config.batch.pairs = 20
    with pytest.raises(ValueError, match="multiple of 8"):
        batch_budget(config, 8)


def test_steps_follow_from_epochs_and_fill():
    config = default_config()
    config.batch.pairs = 100
    assert total_steps(config, 1001) == 11
    config.data.epochs = 3
    config.batch.fill = 0.9
    assert total_steps(config, 1001) == 34  # 3003 pairs, 90 a step
    config.steps = 7
    assert total_steps(config, 1001) == 7
    for fill in (0.0, 1.1):
        config.batch.fill = fill
        with pytest.raises(ValueError, match=f"batch.fill is {fill}"):
            total_steps(config, 1001)


def test_model_needs_path_or_preset():
    config = default_config()
    with pytest.raises(ValueError, match=r"set config\.model\.path"):
        model_config(config)
    config.model.preset = "huge"
    with pytest.raises(ValueError, match="no preset 'huge'"):
        model_config(config)


def test_misspelt_config_key_is_an_error():
    with pytest.raises((AttributeError, KeyError), match="learning_rat"):
        default_config().optim.learning_rat = 1.0


def test_rates_by_path():
    paths = ["vision_tower/x", "language_model/y", "image_newline"]
    rules = (("vision_tower/.*", None), ("language_model/.*", 0.1), (".*", 1.0))
    multipliers = optim.lr_multipliers(paths, rules)
    assert multipliers == {"vision_tower/x": None, "language_model/y": 0.1, "image_newline": 1.0}
    with pytest.raises(ValueError, match="'image_newline'; add one"):
        optim.lr_multipliers(paths, rules[:2])
    with pytest.raises(ValueError, match="decides no parameter"):
        optim.lr_multipliers(paths, (*rules, ("projector/.*", 1.0)))


def test_schedule():
    schedule = optim.learning_rate_schedule(1.0, 100, 0.03)
    assert schedule(0) == 0
    assert schedule(3) == 1.0
    assert schedule(100) == pytest.approx(0, abs=1e-6)
    assert optim.learning_rate_schedule(1.0, 100, 0.0)(0) == 1.0


def test_rates_scale_updates():
    multipliers = {"a/kernel": 1.0, "b/kernel": 0.1}
    weights = {path: np.ones((2, 2), np.float32) for path in multipliers}
    optimizer = optim.make_optimizer(0.5, multipliers, clip_norm=None)
    updates, _ = optimizer.update(weights, optimizer.init(weights), weights)
    np.testing.assert_allclose(updates["a/kernel"], -0.5, rtol=1e-5)
    np.testing.assert_allclose(updates["b/kernel"], -0.05, rtol=1e-5)


def test_torn_and_later_metrics_are_dropped(tmp_path):
    writer = MetricsWriter(tmp_path)
    for step in (1, 2, 3):
        writer.write(step, {"loss": float(step)})
    writer.close()
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    writer = MetricsWriter(tmp_path, first_step=2)
    writer.write(3, {"loss": 30.0})
    writer.close()
    assert [(line["step"], line["loss"]) for line in read_metrics(tmp_path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 30.0),
    ]


def test_config_is_kept_with_the_run(finished):
    values = json.loads((finished / "config.json").read_text())
    assert values["optim"]["learning_rate"] == quickstart().optim.learning_rate
    assert (finished / "model" / "config.json").exists()
