"""Tests run on the CPU with 8 simulated devices, whatever the machine has."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

from pathlib import Path

import hypothesis
import pytest

# Compilation makes the first example slow, and the machines are shared: no deadlines.
hypothesis.settings.register_profile("llave", deadline=None, derandomize=True)
hypothesis.settings.load_profile("llave")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference numbers recorded from the authors' code; see golden/README.md."""
    return GOLDEN
