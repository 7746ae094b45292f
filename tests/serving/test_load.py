"""The short form of benchmarks/serve_load.py: many clients, texts and pictures, and vectors that are right."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.embed_file import make_model

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_under_load(tmp_path):
    model = make_model(tmp_path / "model")
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/serve_load.py", "--model", str(model), "--size", "64"),
            *("--clients", "24", "--seconds", "6", "--offline-seconds", "2"),
            # Half of the clients find the queue full now and then.
            *("--serve-flags", "--max-queue 96"),
        ],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
    )  # fmt: skip
    # The benchmark itself compares vectors with offline ones, and the server's exit status with 0.
    assert done.returncode == 0, done.stderr[-3000:]
    _, names, values, offline = done.stdout.splitlines()
    columns = names.replace("p50 ms", "p50").replace("p99 ms", "p99").replace("/CPU s", "cpu")
    columns = columns.replace("MiB at start", "start").replace("MiB at end", "end").split()[:-2]
    row = dict(zip(columns, map(float, values.split()[:-1]), strict=True))
    assert row["clients"] == 24
    assert row["requests"] > 24
    assert row["other"] == 0
    assert row["end"] < 1.3 * row["start"]
    assert offline.startswith("offline: ")
