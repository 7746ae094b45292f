"""How well batches of fixed budgets are filled by MMEB's mix of images and texts.

    python benchmarks/pack_efficiency.py                      # the budgets of the configs
    python benchmarks/pack_efficiency.py --shards 1           # with one device to a process, not 4
    python benchmarks/pack_efficiency.py --row-lengths        # why rows have the length they have

The mix is the table of assumptions in llave_jax/planning/workload.py; batches are filled as training fills
them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np

from configs import gpu_h100, llave_0_5b, llave_7b, tpu_v4
from llave_jax.data import packing_simulation
from llave_jax.inputs.batch import Budget
from llave_jax.models.config import PRESETS
from llave_jax.ops import gpu_attention, tpu_attention
from llave_jax.planning import workload
from llave_jax.training import batch_shape, setup
from llave_jax.training.batch_search import with_batch_by_hand

# (name, config, devices it is for)
CONFIGS = [
    ("llave_0_5b, llave_2b", llave_0_5b.get_config(), 8),
    ("llave_7b", llave_7b.get_config(), 16),
    ("tpu_v4:0.5b", tpu_v4.get_config("0.5b"), 16),
    ("tpu_v4:2b", tpu_v4.get_config("2b"), 16),
    ("tpu_v4:7b", tpu_v4.get_config("7b"), 64),
    ("gpu_h100:0.5b", gpu_h100.get_config("0.5b"), 8),
    ("gpu_h100:2b", gpu_h100.get_config("2b"), 8),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=6000, help="pairs drawn from the mix")
    parser.add_argument("--shards", type=int, default=4, help="devices of a process")
    parser.add_argument("--row-lengths", action="store_true", help="compare lengths of rows")
    args = parser.parse_args()
    sizes = workload.sample_pairs(PRESETS["llave-0.5b"].input_spec, args.pairs)
    print(
        f"{args.pairs} pairs: mean {sizes.lengths.sum(1).mean():.0f} tokens and "
        f"{sizes.crops.sum(1).mean():.2f} crops a pair, longest {sizes.lengths.max()}"
    )
    print(
        f"{'':24}{'rows':>5}{'length':>8}{'crops':>6}{'slots':>6}{'tokens':>9}{'crops':>8}"
        f"{'slots':>8}{'carried':>9}{'twice':>7}{'splash':>8}{'triton':>8}"
    )
    if not args.row_lengths:
        for name, config, devices in CONFIGS:
            config = with_batch_by_hand(config, devices) or config
            dealing = batch_shape.dealing(config, devices)
            plan = batch_shape.make_plan(config, setup.model_config(config), devices, lambda: sizes)
            show(name, sizes, plan.budget, args.shards, **dealing)
        return
    groups = 8
    for length in (4096, 6144, 8192, 12288, 16384, 24576):
        rows = max(1, math.floor(groups * 2976 / length))
        show("", sizes, Budget(rows, length, math.ceil(groups * 5.1), groups), args.shards)


def show(
    name: str, sizes: packing_simulation.PairSizes, budget: Budget, shards: int, **dealing: int
) -> None:
    packing = packing_simulation.simulate(sizes, budget, shards, **dealing)
    # Scores the kernels compute, over those that sequences need.
    ids = packing.segment_ids
    visited = {
        "splash": tpu_attention.visited_scores(
            ids, causal=True, max_segment_length=sizes.lengths.max()
        ),
        "triton": gpu_attention.visited_scores(ids, causal=True, head_dim=128),
    }
    rows = packing.segment_ids.reshape(-1, budget.row_length)
    lengths = np.concatenate([np.bincount(row)[1:] for row in rows])
    needed = np.sum(lengths * (lengths + 1) / 2)
    print(
        f"{name:24}{budget.rows:5}{budget.row_length:8}{budget.crops:6}{budget.groups:6}"
        f"{packing.tokens:9.1%}{packing.crops:8.1%}{packing.pairs:8.1%}"
        f"{packing.carried:9.1%}{packing.carried_twice:7.2%}"
        + "".join(f"{scores.sum() / needed:8.2f}" for scores in visited.values()),
        flush=True,
    )


if __name__ == "__main__":
    main()
