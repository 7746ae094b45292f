"""The short form of `python -m tests.fuzz`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fuzz.harness import classify

ROOT = Path(__file__).parents[2]


def test_broken_inputs_are_read_or_refused_clearly():
    for package in ("av", "starlette", "uvicorn", "prometheus_client"):
        pytest.importorskip(package)
    from tests.fuzz.targets import TARGETS

    command = [sys.executable, "-m", "tests.fuzz", "--cases", "4", "--workers", "2"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert done.stdout.count(": 4 cases in") == len(TARGETS)


def test_errors_that_a_user_cannot_act_on_are_noticed():
    from llave_jax.common.json_text import parse_json

    actions = {
        "clear": (lambda: parse_json("{"), lambda: Path("/nowhere/file").read_text()),
        "raw": (lambda: int("x"), lambda: {}["x"]),
    }
    for kind, several in actions.items():
        for action in several:
            with pytest.raises((ValueError, OSError, KeyError)) as caught:
                action()
            assert classify(caught.value)[0] == kind
