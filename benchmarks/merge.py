"""Time and peak memory of merging two models of true size.

    python benchmarks/merge.py --directory SCRATCH [--preset llave-2b] [--method slerp]

The models have random weights in bfloat16. Needs room for three of them in SCRATCH (14 GB for 2B), which is left as it
was. Slices of the merged weights are compared with NumPy.
"""

from __future__ import annotations

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks.hub_checkpoints import GOLDEN  # noqa: E402
from llave_jax.models.config import PRESETS, LlaveConfig  # noqa: E402
from llave_jax.models.parameters import parameter_shapes  # noqa: E402
from llave_jax.weights import model_dir  # noqa: E402
from llave_jax.weights.safetensors_io import (  # noqa: E402
    SafetensorsFile,
    SafetensorsWriter,
    encode_header,
)

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_SLICE = 1 << 22


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="llave-2b")
    parser.add_argument("--method", choices=("linear", "slerp"), default="slerp")
    args = parser.parse_args()
    config = PRESETS[args.preset]
    parameters = sum(map(math.prod, parameter_shapes(config).values()))
    print(f"{args.preset}: {parameters / 1e9:.2f}e9 parameters, {2 * parameters / 1e9:.1f} GB each")
    with tempfile.TemporaryDirectory(dir=args.directory) as folder:
        first, second, out = (Path(folder) / name for name in ("first", "second", "out"))
        for seed, path in enumerate((first, second)):
            write_model(path, config, seed)
        idle = measure("-c", "import llave_jax.weights.merge")
        tool = str(ROOT / "tools" / "merge_models.py")
        flags = ("--models", first, second, "--weights", "0.25", "0.75", "--method", args.method)
        merge = measure(tool, *map(str, flags), "--output", str(out))
        print(f"start of the tool: {idle[0]:.1f} s, {idle[1]:.0f} MB peak")
        print(f"{args.method}: {merge[0]:.0f} s, {merge[1]:.0f} MB peak")
        compare(*(SafetensorsFile(path / model_dir.WEIGHTS) for path in (first, second, out)))


def write_model(path: Path, config: LlaveConfig, seed: int) -> None:
    """Random weights; what is repeated does not matter here."""
    model_dir.write_model_dir(path, config, tokenizer=GOLDEN)
    layout = {name: (BFLOAT16, shape) for name, shape in parameter_shapes(config).items()}
    values = np.random.default_rng(seed).standard_normal(_SLICE, np.float32).astype(BFLOAT16)
    header = encode_header(layout, model_dir.METADATA)
    with SafetensorsWriter(path / model_dir.WEIGHTS, header) as writer:
        for name, (_, shape) in layout.items():
            size = math.prod(shape)
            for start in range(0, size, _SLICE):
                writer.write_slice(name, start, values[: size - start])


def measure(*command: str) -> tuple[float, float]:
    """Seconds and peak resident MB of a Python command."""
    start = time.monotonic()
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    job = subprocess.Popen([sys.executable, *command], cwd=ROOT, env=environment)
    _, status, usage = os.wait4(job.pid, 0)
    if status:
        raise SystemExit(f"{command[0]} failed")
    return time.monotonic() - start, usage.ru_maxrss * 1024 / 1e6


def compare(first: SafetensorsFile, second: SafetensorsFile, out: SafetensorsFile) -> None:
    """The first million values of each tensor lie in the plane of the parents', and are a mean of both."""
    worst = 0.0
    for name in out.tensors:
        a, b, c = (
            np.array(file.view(name).reshape(-1)[: 1 << 20]).astype(np.float64)
            for file in (first, second, out)
        )
        factors, *_ = np.linalg.lstsq(np.stack([a, b], axis=1), c, rcond=None)
        # bfloat16 has 8 bits: a value is rounded by at most 2**-9 of its size.
        error = np.abs(c - factors[0] * a - factors[1] * b) / (
            abs(factors[0] * a) + abs(factors[1] * b)
        )
        worst = max(worst, float(error.max()))
    print(
        f"largest relative difference from a combination of the parents: {worst:.2e} (bfloat16: 2.0e-03)"
    )


if __name__ == "__main__":
    main()
