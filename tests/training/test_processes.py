"""Jobs of several processes: the same results on meshes of any shape; the failure of one ends all, by name.

Each job is started as a user would start it; processes find each other over the loopback network.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llave_jax.parallel import sharding
from llave_jax.training.metrics import read_metrics
from llave_jax.weights import model_dir
from tests.xla_flags import xla_flags

STEPS = 8
# Rounding in another order of summation, carried through the steps of Adam.
LOSS_TOLERANCE = 1e-4
PARAMETER_TOLERANCE = 1e-3

CONFIG = """
from configs.quickstart import get_config as quickstart
from llave_jax.digits import dataset
from tests.few_digits import FEW

dataset.Sizes = FEW


def get_config():
    config = quickstart()
    config.log_every = 1
    config.eval.benchmark = None
    config.checkpoint.every = 1000
    config.batch.pairs = 16
    config.data.held_out = 0.02
    return config
"""
ENCODE = """
import sys
import jax, numpy as np
coordinator, count, index, workdir, out = sys.argv[1:]
if int(count) > 1:
    jax.distributed.initialize(coordinator, int(count), int(index))
from llave_jax.embedding.embedder import Embedder
model = Embedder.from_pretrained(workdir)
texts = [f"how many threes and {i} fours " * (1 + i % 5) for i in range(23)]
pixels = np.random.default_rng(0).integers(0, 255, (7, 60, 90, 3), np.uint8)
items = [*texts, *({"text": "a scene", "image": p} for p in map(PIL_image, pixels))]
np.save(f"{out}.{index}.npy", model.encode(items))
""".replace("import jax,", "from PIL.Image import fromarray as PIL_image\nimport jax,")

pytestmark = pytest.mark.slow


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run_job(commands, devices):
    """All processes of a job, each with `devices` simulated devices; the job fails if one does."""
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(devices),
        "PYTHONPATH": str(root),
    }
    options = {"env": environment, "cwd": root, "stderr": subprocess.PIPE, "text": True}
    jobs = [subprocess.Popen(command, **options) for command in commands]
    try:
        for job in jobs:
            _, errors = job.communicate(timeout=900)
            assert job.returncode == 0, errors[-4000:]
    finally:
        for job in jobs:
            job.kill()


def train(tmp, name, mesh, devices, processes=1):
    """(losses, final parameters) of a run in tmp/name; the data are built once, by the first run."""
    workdir = tmp / name
    workdir.mkdir()
    if (tmp / "single" / "digits").exists() and name != "single":
        (workdir / "digits").symlink_to(tmp / "single" / "digits")
    (tmp / "config.py").write_text(CONFIG)
    command = [sys.executable, "-m", "llave_jax.train", f"--config={tmp / 'config.py'}"]
    command += [f"--config.steps={STEPS}", f"--workdir={workdir}"]
    command += [f"--config.mesh.{axis}={size}" for axis, size in mesh.items()]
    if processes > 1:
        command += [f"--coordinator=127.0.0.1:{free_port()}", f"--num_processes={processes}"]
        commands = [[*command, f"--process_id={i}"] for i in range(processes)]
    else:
        commands = [command]
    run_job(commands, devices)
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == STEPS
    for name in ("loss", "infonce_loss"):
        losses += [line[f"validation/{name}"] for line in lines if f"validation/{name}" in line]
    assert len(losses) == STEPS + 4
    params = model_dir.load_params(
        workdir, mesh=sharding.make_mesh({"data": -1, "fsdp": 1, "tensor": 1})
    )
    return losses, {path: np.asarray(x) for path, x in sharding.flatten(params).items()}


@pytest.fixture(scope="module")
def tmp(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def single(tmp):
    return train(tmp, "single", {"data": 1}, devices=1)


@pytest.mark.parametrize(
    ("name", "mesh", "devices", "processes"),
    [
        ("fsdp", {"data": 2, "fsdp": 4}, 8, 1),
        ("tensor", {"data": 2, "fsdp": 2, "tensor": 2}, 8, 1),
        ("two_processes", {"data": 2, "fsdp": 2}, 2, 2),
        ("four_processes", {"data": 4, "fsdp": 2}, 2, 4),
    ],
)
def test_trajectory_is_that_of_one_device(tmp, single, name, mesh, devices, processes):
    losses, params = train(tmp, name, mesh, devices, processes)
    expected_losses, expected_params = single
    np.testing.assert_allclose(losses, expected_losses, rtol=LOSS_TOLERANCE)
    for path, expected in expected_params.items():
        if path == "vision_tower/layers/self_attn/k_proj/bias":
            # Softmax does not see it: its gradient is rounding, which Adam scales to full steps.
            continue
        error = np.linalg.norm(params[path] - expected)
        assert error < PARAMETER_TOLERANCE * np.linalg.norm(expected), path


def test_encoding_is_that_of_one_process(tmp, single):
    def encode(count):
        port, out = free_port(), tmp / f"vectors_{count}"
        arguments = [f"127.0.0.1:{port}", str(count)]
        run_job(
            [
                [sys.executable, "-c", ENCODE, *arguments, str(i), str(tmp / "single"), str(out)]
                for i in range(count)
            ],
            devices=2,
        )
        return [np.load(f"{out}.{i}.npy") for i in range(count)]

    (expected,) = encode(1)
    assert expected.shape[0] == 30
    for vectors in encode(3):
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


# Failures. Each ends all processes within seconds, where jax alone waits for five minutes.

TINY = """
from pathlib import Path
from tests.training.text_runs import make_config


def get_config():
    return make_config(Path({place!r}), {{"eval.benchmark": None, "steps": 100_000, "data.path": "data"}})
"""


def start_tiny(tmp_path, place, flags=((), ()), folders=None):
    """Two processes that train in WORKDIR tmp_path/run, each in its own current folder."""
    (tmp_path / "tiny.py").write_text(TINY.format(place=str(place)))
    command = [sys.executable, "-m", "llave_jax.train", f"--config={tmp_path / 'tiny.py'}"]
    command += [f"--workdir={tmp_path / 'run'}", f"--coordinator=127.0.0.1:{free_port()}"]
    environment = {
        **os.environ,
        "XLA_FLAGS": xla_flags(1),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    return [
        subprocess.Popen(
            [*command, "--num-processes=2", f"--process-id={i}", *flags[i]],
            env=environment,
            cwd=(folders or (place, place))[i],
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]


def ends(jobs, timeout=120):
    """[(exit status, what was said)] of processes that end by themselves."""
    try:
        said = [job.communicate(timeout=timeout)[1] for job in jobs]
        return [(job.returncode, text) for job, text in zip(jobs, said, strict=True)]
    finally:
        for job in jobs:
            job.kill()


def wait_for_lines(workdir, jobs, more_than=0):
    """Until a run has written so many lines of metrics."""
    while len(read_metrics(workdir)) <= more_than:
        assert all(job.poll() is None for job in jobs), ends(jobs)
        time.sleep(0.1)


def test_processes_with_different_configs_are_refused_by_key(tmp_path, place):
    flags = ((), ("--config.loss.alpha=5.0", "--config.seed=3"))
    for status, said in ends(start_tiny(tmp_path, place, flags)):
        assert status == 2
        assert "config.loss.alpha: 9.0 in process 0, 5.0 in process 1; config.seed: 0 in" in said
    assert not (tmp_path / "run/config.json").exists()


def test_an_error_of_one_process_is_said_by_all(tmp_path, place):
    """The data are missing on one of the hosts."""
    jobs = start_tiny(tmp_path, place, folders=(place, tmp_path))
    (first, said), (second, cause) = ends(jobs)
    assert (first, second) == (2, 2)
    assert "error: data: no training data" in cause
    assert f"pid {jobs[1].pid}) has ended: data: no training data" in said
    assert "error: process 1 (" in said


@pytest.mark.parametrize("killed", [0, 1])
def test_the_death_of_a_process_ends_the_other_with_its_name(killed, tmp_path, place):
    jobs = start_tiny(tmp_path, place)
    wait_for_lines(tmp_path / "run", jobs)
    jobs[killed].kill()
    status, said = ends(jobs, timeout=60)[1 - killed]
    assert status not in (0, 2)
    assert f"error: process {killed} (" in said
    assert f"pid {jobs[killed].pid}) has ended without a word" in said


def test_one_process_that_is_told_to_stop_stops_both_after_the_same_step(tmp_path, place):
    """SIGTERM to the second process, then Ctrl-C to both; each time the run goes on where it was saved."""
    workdir, last = tmp_path / "run", 0
    for number, told in ((signal.SIGTERM, (1,)), (signal.SIGINT, (0, 1))):
        jobs = start_tiny(tmp_path, place)
        wait_for_lines(workdir, jobs, more_than=last + 2)
        for process in told:
            jobs[process].send_signal(number)
        ended = ends(jobs)
        saved = max(int(path.name) for path in (workdir / "checkpoints").iterdir())
        for status, said in ended:
            assert status == 128 + number, said
            assert f"told to stop: step {saved} is saved" in said
        assert [line["step"] for line in read_metrics(workdir)] == list(range(1, saved + 1))
        assert saved > last
        last = saved
