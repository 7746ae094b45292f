"""How fast the TPU attention kernels are, by the instructions that libtpu schedules for them.

    python benchmarks/tpu_kernels.py                       # all chips, 2B
    python benchmarks/tpu_kernels.py --chip v5e --model llave-0.5b

No TPU is needed: the kernels of `llave_jax/ops/tpu_attention.py` are compiled for a chip, and libtpu writes
down the schedule. A core issues its bundles of instructions in that order, one a cycle; what this
does not show is waiting for memory, from which the kernels load ahead. The table has the cycles of
one visit of a pair of blocks, all heads of a step, what a block of queries and one of keys cost
once, and "rate": the share of the matrix units' rate, over the scores of the pairs that rows packed as
in training have visited (llave_jax/planning/workload.py), with heads padded to 128 lanes. A schedule cannot
be faster than the matrix units: where it looks so, the rate is 1. `chips.KERNEL_RATES` is this column.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))
# libtpu reads its flags once, when it is loaded.
DUMP = Path(tempfile.mkdtemp(prefix="tpu_kernels_"))
os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={DUMP} --xla_jf_dump_llo_text=true"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from llave_jax.data import packing_simulation  # noqa: E402
from llave_jax.inputs.batch import Budget  # noqa: E402
from llave_jax.models.config import PRESETS, LlaveConfig  # noqa: E402
from llave_jax.ops import tpu_attention  # noqa: E402
from llave_jax.planning import chips, prediction, workload  # noqa: E402

TOPOLOGIES = {"v4": "v4:2x2x1", "v5e": "v5e:2x2", "v5p": "v5p:2x2x1", "v6e": "v6e:2x2"}
# Cores of a chip, each with its share of the chip's matrix units.
CORES = {"v4": 2, "v5e": 1, "v5p": 2, "v6e": 1}
# What a kernel does besides a visit, in the order of the code.
ONCE = {"fwd": ("first", "last"), "bwd": ("first", "key_first", "last", "key_last")}
PRODUCTS = {"fwd": 2, "bwd": 5}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--chip", choices=TOPOLOGIES, help="default: all")
    parser.add_argument("--model", choices=PRESETS, default="llave-2b")
    parser.add_argument("--row_length", type=int, default=6144)
    args = parser.parse_args()
    config = PRESETS[args.model]
    budget = Budget(4, args.row_length, crops=40, groups=8)
    packing = packing_simulation.simulate(
        workload.sample_pairs(config.input_spec, 2000), budget, prediction.SHARDS_PER_PROCESS
    )
    rows = {
        "causal": packing.segment_ids.reshape(-1, args.row_length)[:64],
        "full": np.ones((8, config.vision.num_patches), np.int32),
    }
    print(
        f"{'chip':6}{'kernel':20}{'heads':>6}{'a visit':>9}{'a query block':>15}"
        f"{'a key block':>13}{'visits':>8}{'rate':>7}"
    )
    try:
        for chip in [args.chip] if args.chip else TOPOLOGIES:
            for name, program in compile_kernels(chip, config, args.row_length).items():
                show(chip, name, program, config, rows[name.split("_")[1]])
    finally:
        shutil.rmtree(DUMP)


def compile_kernels(chip: str, config: LlaveConfig, row_length: int) -> dict[str, list[str]]:
    """Kernel name -> lines of its schedule, of the language model's and of the vision tower's."""
    text, vision = config.text, config.vision
    device = chips.topology_devices(TOPOLOGIES[chip])[0][0]
    place = jax.sharding.SingleDeviceSharding(device)

    def array(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=place)

    def compile_gradient(query, key, ids, **mask):
        def total(query, key, value, ids):
            out = tpu_attention.splash_attention(query, key, value, ids, **mask)
            return jnp.sum(out.astype(jnp.float32))

        jax.jit(jax.grad(total, argnums=(0, 1, 2))).lower(query, key, key, ids).compile()

    compile_gradient(
        array(2, row_length, text.num_heads, text.head_dim),
        array(2, row_length, text.num_kv_heads, text.head_dim),
        array(2, row_length, dtype=jnp.int32),
        causal=True,
        max_segment_length=config.inputs.max_length,
    )
    patches = tpu_attention.Blocks.of(vision.num_patches).length
    crops = array(8, patches, vision.num_heads, vision.hidden_size // vision.num_heads)
    compile_gradient(crops, crops, array(8, patches, dtype=jnp.int32), causal=False)

    schedules = {}
    for path in DUMP.glob("*splash*-final_bundles.txt"):
        if "schedule-analysis" not in path.name:
            name = re.findall(r"splash_(?:causal|full)_(?:fwd|bwd)", path.name)[0]
            schedules[name] = path.read_text().splitlines()
    for path in DUMP.iterdir():
        path.unlink()
    return dict(sorted(schedules.items()))


def show(chip: str, name: str, schedule: list[str], config: LlaveConfig, rows: np.ndarray) -> None:
    _, mask, phase = name.split("_")
    text, vision = config.text, config.vision
    count, groups = text.num_heads, text.num_kv_heads
    if mask == "full":
        count = groups = vision.num_heads
    splits = tpu_attention._splits(groups, count // groups)
    heads = tpu_attention.Heads.of(count // (groups * splits), groups * splits).queries
    blocks = tpu_attention.Blocks.of(rows.shape[1])
    visits = tpu_attention.visited_scores(rows[:, None], causal=mask == "causal").sum()
    visits /= blocks.query * blocks.key
    visits_of_query = visits / (len(rows) * blocks.queries)
    visits_of_key = visits / (len(rows) * blocks.keys)

    cycles = parts(schedule, ONCE[phase])
    a_query = cycles["first"] + cycles["last"]
    a_key = cycles.get("key_first", 0) + cycles.get("key_last", 0)
    all_cycles = cycles["visit"] + a_query / visits_of_query + a_key / visits_of_key
    figures = chips.CHIPS[chip]
    assert isinstance(figures, chips.Tpu)
    units = figures.flops / figures.clock / CORES[chip]
    needed = 2 * PRODUCTS[phase] * heads * blocks.query * blocks.key * tpu_attention.LANES / units
    print(
        f"{chip:6}{name:20}{heads:6}{cycles['visit']:9}{a_query:15}{a_key:13}"
        f"{visits_of_query:8.2f}{min(1, needed / all_cycles):7.2f}",
        flush=True,
    )


def parts(schedule: list[str], once: tuple[str, ...]) -> dict[str, int]:
    """Bundles of one step of the loop over visits ("visit") and of its conditional parts.

    A branch names the region where it leads; that region's (empty) start is marked where the code
    that it jumps over ends. The loop's body is jumped over as a whole where there is only loading
    to do; the parts are the conditional ones in it, those that hold arithmetic.

    Raises:
      ValueError: the schedule is not of this form.
    """
    branches, ends = [], {}
    start = end = 0
    for line in schedule:
        found = re.match(r"\s*(0x[0-9a-f]+)\s*(LB:)?", line)
        if found is None:
            continue
        end = int(found.group(1), 16)
        if found.group(2) and not start:
            start = end
        if branch := re.search(r"sbr\.rel \([^)]*\) target = \$region(\d+)", line):
            branches.append((end, int(branch.group(1))))
        for region in re.findall(r"empty region (\d+)", line):
            ends[int(region)] = end
    skipped = [(begin, ends[region]) for begin, region in branches if region in ends]
    inside = [span for span in skipped if span[0] > start]
    body = max(inside, key=lambda span: span[1] - span[0])
    nested = [span for span in inside if body[0] < span[0] and span[1] < body[1]]
    # The rest start or await a transfer, and are shorter.
    longest = sorted(nested, key=lambda span: span[0] - span[1])[: len(once)]
    if len(longest) != len(once):
        raise ValueError(f"found conditional parts {nested}; expected {once}")
    sizes = [stop - begin - 1 for begin, stop in sorted(longest)]
    return {"visit": end - start - sum(sizes), **dict(zip(once, sizes, strict=True))}


if __name__ == "__main__":
    main()
