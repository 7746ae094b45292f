"""Memory and time of the contrastive loss, plain and in tiles, on one device.

    python benchmarks/loss_memory.py                       # 65 536 pairs: many minutes on a CPU
    python benchmarks/loss_memory.py --compile-only        # the same memory figures, no time
    python benchmarks/loss_memory.py --pairs 4096 8192 --dims 896 --forms plain tiles

Each case is one value and gradient with respect to queries and targets, in a process of its own.
"compiled" is what XLA allocates for the program: arguments, results and temporaries. "measured" is
what the device reports as its peak, on a CPU the growth of the process's resident memory. "cpu s" is
the processor time of all cores: on a busy machine it says more than the seconds that passed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
from jax.sharding import AxisType

from llave_jax.loss import hardness_weighted_contrastive_loss
from llave_jax.loss.cross_device import TILE_SIZE, contrastive_loss
from llave_jax.loss.hardness import similarity_matrix

MIB = 2**20


def main() -> None:
    args = _parse_arguments()
    if args.case:
        print(json.dumps(measure(*json.loads(args.case))))
        return
    print(f"machine: {_machine()}")
    print(f"jax {jax.__version__}, float32, tiles of {args.tile_size}, best of {args.repeats}")
    header = f"{'form':8}{'pairs':>8}{'dim':>6}{'N x N':>10}{'arguments':>11}{'results':>9}"
    print(
        header
        + f"{'temporary':>11}{'compiled':>10}{'measured':>10}{'seconds':>9}{'cpu s':>8}   (MiB)"
    )
    for pairs in args.pairs:
        for dim in args.dims:
            for form in args.forms:
                repeats = 0 if args.compile_only else args.repeats
                case = json.dumps([form, pairs, dim, args.tile_size, repeats])
                command = [sys.executable, __file__, "--case", case]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
                row = json.loads(output)
                print(
                    f"{form:8}{pairs:8}{dim:6}{pairs * pairs * 4 / MIB:10.0f}"
                    f"{row['arguments']:11.1f}{row['results']:9.1f}{row['temporary']:11.1f}"
                    f"{row['arguments'] + row['results'] + row['temporary']:10.1f}"
                    + (
                        f"{row['measured']:10.0f}{row['seconds']:9.2f}{row['cpu_seconds']:8.2f}"
                        if repeats
                        else ""
                    ),
                    flush=True,
                )


def measure(form: str, pairs: int, dim: int, tile_size: int, repeats: int) -> dict[str, float]:
    """Compiles one case and, if `repeats` is not 0, runs it: memory in MiB, time of the fastest."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])

    def plain(query, target):
        return hardness_weighted_contrastive_loss(similarity_matrix(query, target))

    def tiles(query, target):
        valid = jnp.ones(pairs, bool)
        options = {"mesh": mesh, "axes": ("data",), "tile_size": tile_size}
        return contrastive_loss(query, target, valid, **options)[0]

    loss = {"plain": plain, "tiles": tiles}[form]
    shape = jax.ShapeDtypeStruct((pairs, dim), jnp.float32)
    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(shape, shape).compile()
    memory = step.memory_analysis()
    assert memory is not None, "this version of jax does not say how much memory a program needs"
    result = {
        "arguments": memory.argument_size_in_bytes / MIB,
        "results": memory.output_size_in_bytes / MIB,
        "temporary": memory.temp_size_in_bytes / MIB,
    }
    if repeats:
        result |= _run(step, pairs, dim, repeats)
    return result


def _run(step, pairs: int, dim: int, repeats: int) -> dict[str, float]:
    # Before the inputs exist, so that they count as in "compiled".
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    query, target = _embeddings(pairs, dim)
    times = []
    for _ in range(repeats):
        start, cpu_start = time.perf_counter(), time.process_time()
        value, gradients = jax.block_until_ready(step(query, target))
        times.append((time.perf_counter() - start, time.process_time() - cpu_start))
        assert bool(jnp.isfinite(value)), value
        del gradients
    device = jax.devices()[0]
    if device.platform == "cpu":
        peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident) * 1024
    else:
        peak = device.memory_stats()["peak_bytes_in_use"]
    seconds, cpu_seconds = min(times)
    return {"measured": peak / MIB, "seconds": seconds, "cpu_seconds": cpu_seconds}


def _embeddings(pairs: int, dim: int) -> tuple[jax.Array, jax.Array]:
    """Normalised queries and targets of a cosine around 0.7; row by row, without a second copy."""

    def row(index):
        key = jax.random.fold_in(jax.random.key(0), index)
        query, noise = jax.random.normal(key, (2, dim))
        target = query + noise
        return query / jnp.linalg.norm(query), target / jnp.linalg.norm(target)

    return jax.block_until_ready(jax.jit(lambda: jax.lax.map(row, jnp.arange(pairs)))())


def _machine() -> str:
    device = jax.devices()[0]
    if device.platform != "cpu":
        return device.device_kind
    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return f"{name}, {len(os.sched_getaffinity(0))} cores"


def _parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, nargs="+", default=[65_536])
    parser.add_argument("--dims", type=int, nargs="+", default=[896, 3584])
    parser.add_argument("--forms", nargs="+", default=["tiles"], choices=["plain", "tiles"])
    parser.add_argument("--tile-size", type=int, default=TILE_SIZE)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--compile-only", action="store_true")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
