"""What a run keeps and says whatever stops it: lock, metrics, best parameters, signals, bad steps, times."""

import dataclasses
import json
import math
import os
import signal
import socket
import struct
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto import event_pb2

from llave_jax import train
from llave_jax.common.files import scratch_directory
from llave_jax.parallel import sharding
from llave_jax.training import goodput, optim, train_step
from llave_jax.training.best import BestCheckpoint
from llave_jax.training.checkpoint import Checkpoints
from llave_jax.training.evaluation import TrainingEvaluation
from llave_jax.training.goodput import Session
from llave_jax.training.metrics import MetricsWriter, read_metrics
from llave_jax.training.watch import Watch, count_skipped
from llave_jax.training.workdir_lock import WorkdirInUse, locked, remove_leftovers
from llave_jax.weights import model_dir
from llave_jax.weights.run_params import load_params
from tests.training.text_runs import make_config

EVALUATED = {
    "eval.benchmark": None,
    "data.held_out": 0.4,
    "eval.every": 2,
    "checkpoint.best_metric": "validation/recall@1",
    "checkpoint.every": 3,
}


class Killed(BaseException):
    """As if the process ended here: nothing of ours catches it."""


def checkpoints(workdir):
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


# The lock.

HOLD = """
import sys, time
from llave_jax.common.locks import only_writer
with only_writer(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_run_is_refused_until_the_first_is_gone(tmp_path, capsys):
    arguments = [sys.executable, "-c", HOLD, str(tmp_path)]
    root = Path(__file__).parents[2]
    holder = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, cwd=root)
    try:
        assert holder.stdout.readline() == "held\n"
        status = train.main(["--config", "quickstart", "--workdir", str(tmp_path)])
        (line,) = capsys.readouterr().err.splitlines()
        who = f"another job is writing to it: process {holder.pid} on {socket.gethostname()}, since 20"
        assert (status, who in line) == (1, True), line
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        holder.kill()
        holder.wait()
    with locked(tmp_path), pytest.raises(WorkdirInUse), locked(tmp_path):
        pass


def test_what_killed_runs_left_is_removed_and_what_lives_stays(tmp_path):
    (tmp_path / ".config.json.partial").touch()
    for name in (".digits.1a.partial", "eval/step_0/.scores.partial"):
        (tmp_path / name / "part").mkdir(parents=True)
    (tmp_path / "checkpoints/3").mkdir(parents=True)
    with scratch_directory(tmp_path / "eval/other") as living:
        remove_leftovers(tmp_path)
        assert living.is_dir()
    left = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")}
    assert left == {"checkpoints", "checkpoints/3", "eval", "eval/step_0"}


# Metrics.


def drawn(directory):
    """(step, names) of every event in TensorBoard's files."""
    found = []
    for path in (directory / "tensorboard").glob("events.out.tfevents.*"):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]
            if event.HasField("summary"):
                found.append((event.step, {value.tag for value in event.summary.value}))
    return found


def test_the_board_shows_what_the_file_has_after_any_kill(tmp_path):
    def lines(first_step):
        writer = MetricsWriter(tmp_path, first_step=first_step)
        for step in range(first_step + 1, first_step + 4):
            if step:
                writer.write(step, {"loss": float(step)})
            if step % 2 == 0:
                writer.write(step, {"validation/loss": 1.0})

    lines(-1)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        # A step that comes twice, and one torn by the kill.
        file.write('{"step": 2, "time": 1.0, "validation/loss": 1.0}\n{"step": 3, "lo')
    # The files of a killed process were never closed; the next one has done steps up to 2.
    lines(2)
    steps = [(int(line["step"]), "loss" in line) for line in read_metrics(tmp_path)]
    assert steps == [
        *((0, False), (1, True), (2, True), (2, False)),
        *((3, True), (4, True), (4, False), (5, True)),
    ]
    assert [(step, "loss" in names) for step, names in drawn(tmp_path)] == steps
    raw = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert len(raw) == len(steps)


# The best parameters.


@pytest.mark.parametrize("killed", ["before", "after"])
def test_a_kill_around_the_best_checkpoint_leaves_the_best(tmp_path, killed, monkeypatch):
    params = {"x": jnp.arange(4.0)}

    def kill(*args, **options):
        raise Killed

    best = BestCheckpoint(tmp_path, "score")
    best.offer(1, params, 0.5)
    with monkeypatch.context() as patch:
        if killed == "before":
            patch.setattr(best._writer, "save", kill)
        else:
            patch.setattr(best, "_write_record", kill)
        with pytest.raises(Killed):
            best.offer(2, {"x": params["x"] + 1}, 0.7)
    again = BestCheckpoint(tmp_path, "score")
    if killed == "before":
        again.offer(2, {"x": params["x"] + 1}, 0.7)
    again.offer(2, params, 0.7)
    again.offer(3, params, 0.6)
    again.close()
    record = json.loads((tmp_path / "best/best.json").read_text())
    assert record == {"metric": "score", "value": 0.7, "step": 2}
    kept = load_params(tmp_path / "best/checkpoints/2/params", jax.eval_shape(lambda: params))
    np.testing.assert_array_equal(kept["x"], params["x"] + 1)
    assert checkpoints(tmp_path / "best") == [2]


@pytest.fixture(scope="module")
def evaluated(place, tmp_path_factory):
    """A run that was never stopped, with evaluations at 0, 2 and 4."""
    workdir = tmp_path_factory.mktemp("evaluated")
    assert train.train(make_config(place, EVALUATED), workdir)
    return workdir


def told(workdir):
    """What the metrics say, without times."""
    kept = ("step", "loss", "grad_norm", "pairs", "epoch", "learning_rate")
    return [
        {name: value for name, value in line.items() if name in kept or "validation" in name}
        for line in read_metrics(workdir)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("window", ["best is saved, scores are not", "scores are saved"])
def test_a_kill_around_an_evaluation_changes_nothing(
    window, evaluated, place, tmp_path, monkeypatch
):
    write = MetricsWriter.write

    def kill(self, step, values):
        if step == 2 and "validation/loss" in values:
            if window == "scores are saved":
                write(self, step, values)
            raise Killed
        write(self, step, values)

    with monkeypatch.context() as patch:
        patch.setattr(MetricsWriter, "write", kill)
        with pytest.raises(Killed):
            train.train(make_config(place, EVALUATED), tmp_path)
    # What has a line has its checkpoint.
    assert checkpoints(tmp_path) == [2]
    assert train.train(make_config(place, EVALUATED), tmp_path)
    assert told(tmp_path) == told(evaluated)
    best = [json.loads((path / "best/best.json").read_text()) for path in (tmp_path, evaluated)]
    assert best[0] == best[1]
    assert drawn(tmp_path) == drawn(evaluated)


# Signals.


@pytest.mark.slow
def test_ctrl_c_in_an_evaluation_keeps_the_step_and_scores_it_later(
    evaluated, place, tmp_path, monkeypatch
):
    run = TrainingEvaluation.run

    def interrupt(self, params, step, *args, **options):
        if step == 4:
            os.kill(os.getpid(), signal.SIGINT)
        run(self, params, step, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingEvaluation, "run", interrupt)
        # The last step is done, and yet the run is not complete.
        assert not train.train(make_config(place, EVALUATED), tmp_path)
    assert checkpoints(tmp_path)[-1] == 4
    assert not (tmp_path / "results.txt").exists()
    assert train.train(make_config(place, EVALUATED), tmp_path)
    assert told(tmp_path) == told(evaluated)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_status_says_which_signal_came_before_the_first_step(
    number, status, tmp_path, monkeypatch, capsys
):
    def read(*args):
        os.kill(os.getpid(), number)
        raise AssertionError("went on")

    monkeypatch.setattr(train.setup, "locate_data", read)
    monkeypatch.setattr(train.command_line, "set_up_logging", lambda *args, **options: None)
    before = signal.getsignal(number)
    assert train.main(["--config", "quickstart", "--workdir", str(tmp_path)]) == status
    assert signal.getsignal(number) == before
    with locked(tmp_path):
        pass


# Steps that are not finite.


def test_parameters_that_are_not_finite_are_not_saved(place, tmp_path):
    config = make_config(place, {"eval.benchmark": None, "optim.learning_rate": 1e39, "steps": 1})
    with pytest.raises(FloatingPointError, match=r"step 1: \d+ of \d+ arrays .*learning_rate\)"):
        train.train(config, tmp_path)
    assert checkpoints(tmp_path) == []


@pytest.fixture
def bad_rates(monkeypatch):
    """Makes the learning rate of some steps NaN: loss and gradient are finite, the update is not."""

    def use(*steps):
        bad = jnp.array(steps)
        monkeypatch.setattr(
            optim,
            "learning_rate_schedule",
            lambda *args: lambda count: jnp.where(jnp.isin(count + 1, bad), jnp.nan, 1e-2),
        )

    return use


SKIP = {
    "eval.benchmark": None,
    "nonfinite.action": "skip",
    "checkpoint.every": 1,
    "checkpoint.keep": 9,
    "log_every": 3,
}


def saved(workdir, step):
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        model_dir.load_params(workdir),
    )
    params = load_params(workdir / f"checkpoints/{step}/params", target)
    return sharding.flatten(jax.tree.map(np.asarray, params))


@pytest.mark.slow
def test_a_bad_step_is_skipped_counted_and_counted_on(place, tmp_path, bad_rates, monkeypatch):
    bad_rates(2, 4)
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoints, "must_stop", lambda self, at: at == 2)
        assert not train.train(make_config(place, SKIP), tmp_path)
    assert train.train(make_config(place, SKIP), tmp_path)
    moved = [
        any(
            np.any(value != saved(tmp_path, step)[path])
            for path, value in saved(tmp_path, step - 1).items()
        )
        for step in (2, 3, 4)
    ]
    assert moved == [False, True, False]
    lines = [(line["step"], line["skipped_updates"]) for line in read_metrics(tmp_path)]
    # Skipped steps have a line wherever the logging interval ends.
    assert lines == [(2, 1), (3, 1), (4, 2)]
    assert count_skipped(read_metrics(tmp_path), 4) == (2, 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "message"),
    [("max_in_a_row", "2 in a row"), ("max_in_all", "2 in all")],
)
def test_too_many_bad_steps_end_the_run(limit, message, place, tmp_path, bad_rates):
    bad_rates(2, 3)
    config = make_config(place, {**SKIP, f"nonfinite.{limit}": 1})
    with pytest.raises(FloatingPointError, match=rf"step 3: .*{message}, more than .*{limit}=1;"):
        train.train(config, tmp_path)
    assert checkpoints(tmp_path) == [1, 2]


# Times.


@pytest.fixture(scope="module")
def observed(place, tmp_path_factory):
    """A run, stopped and continued, that traces a step and lets no step move arrays behind our back."""
    workdir = tmp_path_factory.mktemp("observed")
    build = train_step.build_step

    def guarded(*args, **options):
        step = build(*args, **options)

        def run(*arguments):
            with jax.transfer_guard("disallow"):
                return step.run(*arguments)

        return dataclasses.replace(step, run=run)

    config = {"eval.benchmark": None, "profile.start": 2, "profile.steps": 1, "checkpoint.every": 2}
    finish = Watch._finish

    def kill(self, step, metrics, batch):
        finish(self, step, metrics, batch)
        if step == 3:
            self._clock._write()
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_step, "build_step", guarded)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Watch, "_finish", kill)
            with pytest.raises(Killed):
                train.train(make_config(place, config), workdir)
        umask = os.umask(0)
        try:
            assert train.train(make_config(place, config), workdir)
            assert os.umask(0) == 0
        finally:
            os.umask(umask)
    return workdir


def test_others_cannot_write_into_a_run_whatever_the_umask(observed):
    made = list(observed.rglob("*"))
    assert any(path.parent.name == "checkpoints" for path in made)
    assert not [path for path in made if path.stat().st_mode & 0o022]


def test_each_line_says_where_its_seconds_went(observed):
    for line in read_metrics(observed):
        names = {name for name in line if name.startswith("seconds/")}
        assert names == {f"seconds/{p}" for p in ("data_wait", "steps", "checkpoint", "evaluation")}
        assert all(line[name] >= 0 for name in names)
        # CPUs do not say what their devices have used.
        assert line["memory/host_rss_peak_gib"] > 0.05


def test_a_trace_is_kept_for_the_board(observed):
    assert list((observed / "tensorboard").rglob("*.xplane.pb"))


def test_the_sessions_of_a_run_are_kept_and_summed_up(observed):
    first, second = json.loads((observed / "sessions.json").read_text())
    assert (first["start"], first["step"], first["ended"]) == (0, 3, "Killed")
    assert (second["start"], second["step"], second["ended"]) == (2, 4, "complete")
    summary = (observed / "summary.txt").read_text()
    rows = {line.split()[0]: line.split()[-1] for line in summary.splitlines()}
    # Four steps of 16 pairs, whatever was done twice.
    assert (rows["steps"], rows["pairs"], rows["restarts"]) == ("4", "64", "1")
    assert 0 < goodput.goodput(observed) < 1


def test_goodput_counts_repeated_steps_and_the_time_between():
    def session(began, seen, start, step, pairs, seconds):
        times = dict.fromkeys(goodput.PARTS, 0.0) | seconds
        return Session("host", 1, began, seen, start, step, pairs, times)

    sessions = [
        # Ten steps, of which the last five come again; then ten seconds without a process.
        session(0, 50, 0, 10, 100, {goodput.SET_UP: 10, goodput.STEPS: 40}),
        session(60, 100, 5, 15, 100, {goodput.STEPS: 35, goodput.CHECKPOINT: 5}),
    ]
    share, seconds, pairs = goodput._account(sessions)
    assert share == pytest.approx(0.55)
    assert pairs == 150
    expected = {
        "steps": 55,
        "repeated steps": 20,
        "between sessions": 10,
        "set-up": 10,
        "checkpoint": 5,
    }
    assert {name: value for name, value in seconds.items() if value} == expected
    assert math.isclose(sum(seconds.values()), 100)
