"""Tests run on the CPU with 8 simulated devices, whatever the machine has."""

import os
from pathlib import Path

from tests.xla_flags import xla_flags

os.environ["JAX_PLATFORMS"] = "cpu"

# What one test compiles is there for all others: other processes, commands that tests start, later runs.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", str(Path(__file__).parents[1] / ".pytest_cache" / "jax")
)
os.environ["LLAVE_JAX_CACHE"] = str(Path(__file__).parents[1] / ".pytest_cache" / "llave_jax")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Tests compile more than they compute. .ci/run repeats some with all optimisations.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"

import dataclasses
from typing import Any

import hypothesis
import jaxtyping
import pytest

# Checks every annotated argument, result and dataclass field of these rooms while tests run, shapes
# and dtypes of arrays included (the letters are in docs/architecture.md). It must be installed before
# the first import of a module that it checks.
jaxtyping.install_import_hook(
    ["llave_jax.loss", "llave_jax.models", "llave_jax.ops"], "beartype.beartype"
)

from llave_jax.digits import dataset
from llave_jax.models.config import LlaveConfig
from llave_jax.weights import model_dir
from llave_jax.weights.from_hf import convert_from_hf
from tests.few_digits import FEW

# Compilation makes the first example slow, and the machines are shared: no deadlines.
hypothesis.settings.register_profile("llave", deadline=None, derandomize=True)
hypothesis.settings.load_profile("llave")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    """Reference numbers recorded from the authors' code; see golden/README.md."""
    return GOLDEN


@dataclasses.dataclass(frozen=True)
class GoldenModel:
    """The reference's tiny random checkpoint, converted."""

    directory: Path
    config: LlaveConfig
    params: dict
    tokenizer: Any


@pytest.fixture(scope="session")
def golden_model(golden, tmp_path_factory) -> GoldenModel:
    directory = tmp_path_factory.mktemp("golden") / "model"
    convert_from_hf(golden / "checkpoint", directory, show_progress=False)
    return GoldenModel(
        directory=directory,
        config=model_dir.load_config(directory),
        params=model_dir.load_params(directory),
        tokenizer=model_dir.load_tokenizer(directory),
    )


@pytest.fixture(scope="module")
def few_digits():
    """The bundled benchmark is built with few rows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "Sizes", FEW)
        yield


def pytest_collection_modifyitems(items):
    """Starts with the files that take longest, so that at the end no process works on one alone."""
    items.sort(key=lambda item: "training" not in item.path.parts)
