"""What checkpoints cost: the step time with and without saving, and the time from a restart to its first step.

    python benchmarks/checkpoint_cost.py [--megabytes 200] [--step-seconds 1] [--steps 24] [--every 8]

The first part runs a step of the given length, on parameters and two moments of the given size together, and saves
as training does (`Checkpoints`). Blocks of steps with saving and without take turns, so that what else the machine
does falls on both. On CPUs the step shares its cores with what saving does in the background; beside an
accelerator only the call of save delays it. The second part restarts a run of configs/quickstart.py, with the compilation cache and without.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import grain
import jax
import jax.numpy as jnp

from llave_jax.training.checkpoint import Checkpoints
from llave_jax.training.state import TrainState

WIDTH = 1024


def make_state(megabytes: int) -> TrainState:
    """Parameters and two moments of so many megabytes together, of random numbers."""
    rows = max(1, megabytes * 1_000_000 // (3 * 4 * WIDTH))
    params, *moments = (jax.random.normal(jax.random.key(i), (rows, WIDTH)) for i in range(3))
    return TrainState(
        jnp.int32(0), {"w": params}, {"adam": {"mu": {"w": moments[0]}, "nu": {"w": moments[1]}}}
    )


@jax.jit
def compute(matrix: jax.Array, times: jax.Array) -> jax.Array:
    """Products of matrices: work for all cores, as a step is."""
    return jax.lax.fori_loop(0, times, lambda _, x: jnp.tanh(x @ matrix), matrix)


def products_of(seconds: float, matrix: jax.Array) -> int:
    """How many products take so long."""
    compute(matrix, jnp.int32(1)).block_until_ready()
    start = time.perf_counter()
    compute(matrix, jnp.int32(20)).block_until_ready()
    return max(1, round(20 * seconds / (time.perf_counter() - start)))


def measure_steps(args: argparse.Namespace) -> None:
    state, iterator = make_state(args.megabytes), iter(grain.MapDataset.range(10).to_iter_dataset())
    matrix = jax.random.normal(jax.random.key(9), (1536, 1536)) / 40
    products = jnp.int32(products_of(args.step_seconds, matrix))
    blocks: dict[bool, list[float]] = {False: [], True: []}
    calls = []
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        checkpoints = Checkpoints(Path(folder), keep=2)
        with contextlib.closing(checkpoints):
            step = 0
            for block in range(2 * (args.steps // args.every)):
                saves = block % 2 == 1
                start = time.perf_counter()
                for in_block in range(args.every):
                    compute(matrix, products).block_until_ready()
                    step += 1
                    if saves and in_block == 0:
                        began = time.perf_counter()
                        checkpoints.save(state._replace(step=jnp.int32(step)), iterator)
                        calls.append(time.perf_counter() - began)
                blocks[saves].append((time.perf_counter() - start) / args.every)
                checkpoints.wait()
            began = time.process_time()
            checkpoints.save(state._replace(step=jnp.int32(step + 1)), iterator)
            checkpoints.wait()
            background = time.process_time() - began
    without, with_saving = (statistics.median(blocks[saves]) for saves in (False, True))
    print(
        f"{args.megabytes} MB every {args.every} steps: {without:.3f} s a step without saving, "
        f"{with_saving:.3f} s with: {100 * (with_saving / without - 1):.1f}% (medians of {len(calls)} blocks); "
        f"a call of save takes {1000 * statistics.median(calls):.0f} ms, "
        f"{100 * statistics.median(calls) / (args.every * without):.1f}% of the steps; all of saving "
        f"{background:.2f} s of processor time"
    )


def restart(workdir: Path, steps: int, cache: Path | None) -> float:
    """Seconds from the start of the command to the metrics of its first step."""
    environment = {
        key: value for key, value in os.environ.items() if "COMPILATION_CACHE" not in key
    }
    if cache is not None:
        environment["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    command = [sys.executable, "-m", "llave_jax.train", "--config", "quickstart"]
    command += [f"--workdir={workdir}", f"--config.steps={steps}", "--config.log_every=1"]
    command += ["--config.eval.benchmark=None", "--config.data.held_out=0.0"]
    command += ["--config.checkpoint.best_metric=None"]
    metrics = workdir / "metrics.jsonl"
    start = time.perf_counter()
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    seconds = None
    while process.poll() is None:
        lines = metrics.read_text().splitlines() if metrics.exists() else []
        if seconds is None and any(json.loads(line)["step"] == steps for line in lines if line):
            seconds = time.perf_counter() - start
        time.sleep(0.05)
    if process.returncode or seconds is None:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return seconds


def measure_restarts(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        workdir, cache = Path(folder, "run"), Path(folder, "cache")
        restart(workdir, 1, cache)
        without = restart(workdir, 2, None)
        with_cache = restart(workdir, 3, cache)
    print(
        f"from a restart to its first step: {without:.1f} s without the compilation cache, "
        f"{with_cache:.1f} s with it"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--step-seconds", type=float, default=1.0)
    parser.add_argument("--steps", type=int, default=24, help="of each kind")
    parser.add_argument("--every", type=int, default=8)
    parser.add_argument("--dir", help="where to write; default: the system's temporary folder")
    args = parser.parse_args()
    measure_steps(args)
    measure_restarts(args)


if __name__ == "__main__":
    main()
