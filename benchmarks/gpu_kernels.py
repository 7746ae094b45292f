"""The GPU attention kernels: what they compile to without a GPU, and how fast they are on one.

    python benchmarks/gpu_kernels.py --compile             # needs no GPU, but pip install triton
    python benchmarks/gpu_kernels.py                       # on a GPU, beside cuDNN's flash attention

Compiled are the kernels of `llave_jax/ops/gpu_attention.py` as training calls them (bfloat16, rows of 24 576
tokens), by the Triton that is installed, for A100 and H100: shared memory, registers, bytes of
registers spilled, and the instruction that multiplies matrices.

Timed are rows packed as in training (llave_jax/planning/workload.py), forward and with gradients, with the kernels'
own tiles and with others. cuDNN's kernel knows no segments: it gets the same sequences one to a row,
padded to the longest. TFLOP/s count the products that the sequences need, once forward and 2.5 times
backward, of all alike.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import numpy as np

from llave_jax.data import packing_simulation
from llave_jax.inputs.batch import Budget
from llave_jax.models.config import PRESETS
from llave_jax.ops import gpu_attention
from llave_jax.planning import workload

ROW_LENGTH = 24_576
CAPABILITIES = {"A100": 80, "H100": 90}
# Others than `gpu_attention.Tiles.of`: queries and keys of a step, warps, stages.
FORWARD_TILES = [
    gpu_attention.Tile(128, 64, 4, 2),
    gpu_attention.Tile(128, 64, 4, 3),
    gpu_attention.Tile(128, 64, 8, 2),
    gpu_attention.Tile(128, 64, 8, 3),
    gpu_attention.Tile(128, 128, 8, 2),
    gpu_attention.Tile(64, 64, 4, 3),
]
BACKWARD_TILES = [
    (gpu_attention.Tile(128, 32, 4, 2), gpu_attention.Tile(32, 128, 4, 2)),
    (gpu_attention.Tile(128, 32, 8, 2), gpu_attention.Tile(32, 128, 8, 2)),
    (gpu_attention.Tile(128, 64, 8, 2), gpu_attention.Tile(64, 128, 8, 2)),
    (gpu_attention.Tile(64, 64, 4, 2), gpu_attention.Tile(64, 64, 4, 2)),
]


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention of one part of a model: what is packed into rows [R, T] of which sequences."""

    name: str
    heads: int
    groups: int
    head_dim: int
    causal: bool
    segment_ids: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return np.concatenate([np.bincount(row)[1:] for row in self.segment_ids])

    @property
    def needed_flops(self) -> float:
        """Of the two products of a forward pass."""
        lengths = self.lengths.astype(np.float64)
        scores = lengths * (lengths + 1) / 2 if self.causal else lengths**2
        return 4 * self.heads * self.head_dim * scores.sum()

    def arrays(self, rows: int, length: int) -> list[jax.ShapeDtypeStruct]:
        return [
            jax.ShapeDtypeStruct((rows, length, heads, self.head_dim), jnp.bfloat16)
            for heads in (self.heads, self.groups, self.groups)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compile", action="store_true", help="compile for GPUs that are not there"
    )
    parser.add_argument("--crops", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=10)
    args = parser.parse_args()
    if args.compile:
        compile_all()
    elif jax.default_backend() == "gpu":
        time_all(args.crops, args.repeats)
    else:
        raise SystemExit("no GPU here: --compile shows what can be known without one")


def cases(crops: int) -> list[Case]:
    sizes = workload.sample_pairs(PRESETS["llave-0.5b"].input_spec, 200)
    packed = packing_simulation.simulate(sizes, Budget(1, ROW_LENGTH, crops=42, groups=9), shards=1)
    rows = packed.segment_ids.reshape(-1, ROW_LENGTH)[:1]
    found = []
    for name in ("llave-0.5b", "llave-2b", "llave-7b"):
        text = PRESETS[name].text
        heads = (text.num_heads, text.num_kv_heads, text.head_dim)
        found.append(Case(name, *heads, causal=True, segment_ids=rows))
    vision = PRESETS["llave-2b"].vision
    heads = (vision.num_heads, vision.num_heads, vision.hidden_size // vision.num_heads)
    patches = np.ones((crops, vision.num_patches), np.int32)
    return [*found, Case("vision tower", *heads, causal=False, segment_ids=patches)]


def loss(attend: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    return lambda *inputs: jnp.sum(attend(*inputs).astype(jnp.float32))


def compile_all() -> None:
    from triton.backends import nvidia  # pyright: ignore[reportMissingImports]

    tools = Path(nvidia.__file__).parent / "bin"
    print(
        f"{'GPU':6}{'case':14}{'kernel':24}{'warps':>6}{'stages':>7}{'shared memory':>15}"
        f"{'registers':>11}{'spilled':>9}  products"
    )
    for case in cases(1):
        rows, length = case.segment_ids.shape
        ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)

        def attend(query, key, value, ids, causal=case.causal):
            return gpu_attention.triton_attention(query, key, value, ids, causal=causal)

        programs = triton_programs(
            jax.grad(loss(attend), argnums=(0, 1, 2)), *case.arrays(rows, length), ids
        )
        for gpu, capability in CAPABILITIES.items():
            for name, (tile, text) in programs.items():
                figures = compile_program(text, tile, capability, tools)
                print(
                    f"{gpu:6}{case.name:14}{name:24}{tile.warps:6}{tile.stages:7}"
                    f"{figures['shared']:15}{figures['registers']:11}{figures['spilled']:9}"
                    f"  {figures['products']}",
                    flush=True,
                )


def triton_programs(function: Callable, *inputs: jax.ShapeDtypeStruct) -> dict[str, tuple]:
    """Kernels of a function: name -> (tile, text of its Triton program).

    jax has no public way to the text, so its lowering is recorded as it runs.
    """
    from jax._src.pallas.triton import lowering

    tiles, programs = {}, {}
    lower, call = lowering.lower_jaxpr_to_triton_module, gpu_attention.Settings.call

    def note_program(*args, **options):
        result = lower(*args, **options)
        text = result.module.operation.get_asm()
        (name,) = set(re.findall(r"triton_(?:causal|full)_\w+", str(text)))
        programs[name] = text
        return result

    def note_tile(settings, kernel, tile, name, *arrays, **options):
        tiles[f"triton_{'causal' if settings.causal else 'full'}_{name}"] = tile
        return call(settings, kernel, tile, name, *arrays, **options)

    lowering.lower_jaxpr_to_triton_module = note_program
    setattr(gpu_attention.Settings, "call", note_tile)  # noqa: B010 (its signature is wider)
    try:
        jax.jit(function).trace(*inputs).lower(lowering_platforms=("cuda",))
    finally:
        lowering.lower_jaxpr_to_triton_module = lower
        gpu_attention.Settings.call = call
    return {name: (tiles[name], text) for name, text in sorted(programs.items())}


def compile_program(text: str, tile: gpu_attention.Tile, capability: int, tools: Path) -> dict:
    import triton as compiler  # pyright: ignore[reportMissingImports]
    from triton.backends.compiler import GPUTarget  # pyright: ignore[reportMissingImports]

    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder, "kernel.ttir"), Path(folder, "kernel.cubin")
        source.write_text(text)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        target = GPUTarget("cuda", capability, 32)
        kernel = compiler.compile(str(source), target=target, options=options)
        binary.write_bytes(kernel.asm["cubin"])
        usage = subprocess.run(
            [str(tools / "cuobjdump"), "--dump-resource-usage", str(binary)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    ptx = kernel.asm["ptx"]
    return {
        "shared": kernel.metadata.shared,
        "registers": int(re.findall(r"REG:(\d+)", usage)[0]),
        "spilled": int(re.findall(r"STACK:(\d+)", usage)[0]),
        "products": next(
            (name for name in ("tcgen05.mma", "wgmma", "mma.sync") if name in ptx), "none"
        ),
    }


def time_all(crops: int, repeats: int) -> None:
    print(jax.devices()[0].device_kind)
    print(f"{'case':14}{'kernel':62}{'forward':>18}{'with gradients':>18}")
    for case in cases(crops):
        rows, length = case.segment_ids.shape
        inputs = random_arrays(case.arrays(rows, length))
        ids = jnp.asarray(case.segment_ids)
        own = gpu_attention.Tiles.of(case.head_dim, 2)
        for tiles in [
            own,
            *(dataclasses.replace(own, forward=tile) for tile in FORWARD_TILES),
            *(dataclasses.replace(own, queries=q, keys=k) for q, k in BACKWARD_TILES),
        ]:

            def attend(query, key, value, tiles=tiles, ids=ids, causal=case.causal):
                return gpu_attention.triton_attention(
                    query, key, value, ids, causal=causal, tiles=tiles
                )

            name = ", ".join("x".join(map(str, tile)) for tile in dataclasses.astuple(tiles))
            show(case, f"ours {name}", attend, inputs, repeats)

        lengths = jnp.asarray(case.lengths, jnp.int32)
        longest = -(-int(case.lengths.max()) // 64) * 64
        padded = random_arrays(case.arrays(len(lengths), longest))

        def attend_padded(query, key, value, lengths=lengths, causal=case.causal):
            return jax.nn.dot_product_attention(
                query,
                key,
                value,
                query_seq_lengths=lengths,
                key_value_seq_lengths=lengths,
                is_causal=causal,
                implementation="cudnn",
            )

        show(case, f"cuDNN, padded to {longest}", attend_padded, padded, repeats)


def random_arrays(shapes: list[jax.ShapeDtypeStruct]) -> list[jax.Array]:
    keys = jax.random.split(jax.random.key(0), len(shapes))
    return [jax.random.normal(k, x.shape, x.dtype) for k, x in zip(keys, shapes, strict=True)]


def show(case: Case, name: str, attend: Callable, inputs: list[jax.Array], repeats: int) -> None:
    line = f"{case.name:14}{name:62}"
    gradients = jax.grad(loss(attend), argnums=(0, 1, 2))
    for function, products in ((attend, 1.0), (gradients, 3.5)):
        try:
            seconds = measure(jax.jit(function), inputs, repeats)
        except jax.errors.JaxRuntimeError as error:
            # Tiles that are too large for this GPU, or what its cuDNN does not do.
            line += f"{str(error).splitlines()[0][:17]:>18}"
            continue
        rate = products * case.needed_flops / seconds / 1e12
        line += f"{1e3 * seconds:8.2f} ms {rate:5.0f} T"
    print(line, flush=True)


def measure(function: Callable, inputs: list[jax.Array], repeats: int) -> float:
    """Median seconds of a call."""
    jax.block_until_ready(function(*inputs))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(function(*inputs))
        times.append(time.perf_counter() - start)
    return float(np.median(times))


if __name__ == "__main__":
    main()
