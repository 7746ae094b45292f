"""What a compiled program takes, and the speed to expect of it.

Owns what the program's costs mean in seconds, and the report's text. Compiling is `compile_ahead.py`,
counting what a program executes is `hlo.py`, what collectives are for is `collectives.py`, the work that the
model needs is `flops.py`, the figures of chips are `chips.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import textwrap
from typing import Any

import jax
import numpy as np

from llave_jax.common.tables import align
from llave_jax.data import packing_simulation
from llave_jax.models.config import LlaveConfig
from llave_jax.models.llave import Llave, abstract_params
from llave_jax.ops import gpu_attention, tpu_attention
from llave_jax.parallel import sharding
from llave_jax.planning import flops, hlo, workload
from llave_jax.planning.chips import GIB, KERNEL_RATES, LINKS_SHARE, Gpu
from llave_jax.planning.collectives import layer_shapes, purpose
from llave_jax.planning.compile_ahead import SAMPLE, Compiled
from llave_jax.training import batch_shape
from llave_jax.training.memory import step_bytes

# Shards for which one process packs: the chips of a TPU host, or half the GPUs of one.
SHARDS_PER_PROCESS = 4


def predict(compiled: Compiled, *, training: bool) -> dict[str, Any]:
    """What a run of the program takes, and the speed to expect.

    For TPUs the times are predictions. Fusions take XLA's own estimate of their cycles. Attention kernels run
    at KERNEL_RATES. A collective moves its bytes over LINKS_SHARE of the links; it costs nothing if XLA made
    it asynchronous. All these times are added up, and nothing waits for the host.

    For GPUs, for which XLA estimates nothing, the times are lower bounds. An operation takes as long as its
    products or its memory traffic at the published rates, whichever is longer; attention kernels take as
    long as their products.

    Args:
      compiled: of `compile_ahead`.
      training: whether it is a training step, not an embedding step.

    Returns:
      Plain numbers by name: memory in GiB, times in seconds, operations as FLOPs of a whole step, speed in
      pairs a second and chip. `table` prints them.
    """
    config, chip, mesh, model = compiled.config, compiled.chip, compiled.mesh, compiled.model
    devices = mesh.devices.size
    cost = hlo.cost(compiled.text, devices)
    micro_batches = config.batch.micro_batches if training else 1
    packing = packing_simulation.simulate(
        workload.sample_pairs(model.config.input_spec, SAMPLE),
        compiled.budget,
        SHARDS_PER_PROCESS,
        **(batch_shape.dealing(config, sharding.num_shards(mesh)) if training else {}),
    )
    pairs = packing.pairs * compiled.budget.groups * sharding.num_shards(mesh) * micro_batches
    necessary = pairs * _flops_per_pair(model, training=training)
    scores = _kernel_scores(compiled, packing.segment_ids)
    kernels = _kernel_costs(cost, compiled, scores)
    executed = devices * (cost.product_flops + kernels["flops"])
    collectives = _collective_table(cost, compiled)
    if isinstance(chip, Gpu):
        others = {"operations": cost.roofline_seconds(chip.flops, chip.bandwidth)}
    else:
        others = {"fusions": cost.cycles / chip.clock}
    seconds = {
        **others,
        "attention_kernels": kernels["seconds"],
        "collectives_waited_for": sum(c["seconds"] for c in collectives if not c["hidden"]),
    }
    step = sum(seconds.values())
    peak = step_bytes(compiled.program)
    memory = compiled.program.memory_analysis()
    assert memory is not None  # or `step_bytes` would have raised
    parameters = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(abstract_params(model)))
    return {
        "program": "training step" if training else "embedding step",
        "devices": devices,
        "mesh": dict(mesh.shape),
        "parameters": parameters,
        "budget": dataclasses.asdict(compiled.budget),
        "micro_batches": micro_batches,
        "memory_gib": {
            "arguments": memory.argument_size_in_bytes / GIB,
            "temporaries": memory.temp_size_in_bytes / GIB,
            "program": memory.generated_code_size_in_bytes / GIB,
            "peak": peak / GIB,
            "hbm": chip.hbm / GIB,
            "margin": 1 - peak / chip.hbm,
        },
        "packing": {
            "tokens": packing.tokens,
            "crops": packing.crops,
            "pairs": packing.pairs,
            "carried_twice": packing.carried_twice,
            "scores_visited": scores["causal"]
            / (compiled.budget.rows * compiled.budget.row_length) ** 2,
        },
        "pairs": pairs,
        "necessary_flops": necessary,
        "executed_flops": executed,
        "executed_over_necessary": executed / necessary,
        "kernels": {name: sum(n for _, n in calls) for name, calls in cost.kernels.items()},
        "collectives": collectives,
        "seconds": seconds,
        "seconds_are": "bounds" if isinstance(chip, Gpu) else "predictions",
        "step_seconds": step,
        "pairs_per_second_per_chip": pairs / step / devices,
        "mfu": necessary / step / devices / chip.flops,
    }


def _flops_per_pair(model: Llave, *, training: bool) -> float:
    """FLOPs that the model needs for an average pair of the assumed data."""
    sizes = workload.sample_pairs(model.config.input_spec, SAMPLE)
    lengths, crops = sizes.lengths.ravel(), float(sizes.crops.sum())
    if training:
        total = flops.step(model, lengths, crops)
    else:
        total = flops.embedding(model.config, lengths, crops)
    return total / SAMPLE


# Matrix products of the size of the scores in an attention kernel, by the end of its name.
_KERNEL_PRODUCTS = {"fwd": 2, "bwd": 5, "bwd_queries": 3, "bwd_keys": 4}


def _kernel_scores(compiled: Compiled, segment_ids: np.ndarray) -> dict[str, float]:
    """Scores of one head that the attention kernels compute in one micro-batch on one device, by mask.

    "causal" is the language model's mean over the rows packed as `segment_ids` [..., R, T]; "full" is that of
    the vision tower's crops.
    """
    config = compiled.model.config
    patches, crops = config.vision.num_patches, compiled.budget.crops
    if isinstance(compiled.chip, Gpu):
        heads = {"causal": config.text.head_dim, "full": _vision_head_dim(config)}
        causal = gpu_attention.visited_scores(
            segment_ids, causal=True, head_dim=heads["causal"]
        ).sum(-1)
        crop = np.ones((1, patches), np.int32)
        full = gpu_attention.visited_scores(crop, causal=False, head_dim=heads["full"]).sum()
    else:
        causal = tpu_attention.visited_scores(
            segment_ids, causal=True, max_segment_length=config.inputs.max_length
        )
        full = tpu_attention.Blocks.of(patches).length ** 2
    return {"causal": float(np.mean(causal)), "full": float(crops * full)}


def _vision_head_dim(config: LlaveConfig) -> int:
    return config.vision.hidden_size // config.vision.num_heads


def _kernel_costs(cost: hlo.Cost, compiled: Compiled, scores: dict[str, float]) -> dict[str, float]:
    """FLOPs and seconds of all attention kernels on one device, given the scores of `_kernel_scores`."""
    config = compiled.model.config
    text, vision = config.text, config.vision
    # The tensor axis splits heads only if it divides both query heads and key heads.
    heads = {
        "causal": (text.num_heads, text.num_kv_heads, text.head_dim),
        "full": (vision.num_heads, vision.num_heads, _vision_head_dim(config)),
    }
    total = {"flops": 0.0, "seconds": 0.0}
    for name, calls in cost.kernels.items():
        kernel = re.fullmatch(r"(splash|triton)_(causal|full)_(\w+)", name)
        if kernel is None:
            raise ValueError(f"kernel {name!r} of the compiled program is not an attention kernel")
        platform, mask, phase = kernel.groups()
        count, groups, head_dim = heads[mask]
        divisor = compiled.mesh.shape["tensor"]
        if count % divisor == 0 and groups % divisor == 0:
            count //= divisor
        times = sum(executions for _, executions in calls)
        flops = 2 * _KERNEL_PRODUCTS[phase] * times * count * scores[mask]
        total["flops"] += flops * head_dim
        if platform == "splash":
            padded = -(-head_dim // tpu_attention.LANES) * tpu_attention.LANES
            rate = KERNEL_RATES[compiled.kind][f"{mask}_{phase}"]
        else:
            padded, rate = gpu_attention.padded_head_dim(head_dim), 1.0
        total["seconds"] += flops * padded / (compiled.chip.flops * rate)
    return total


def _collective_table(cost: hlo.Cost, compiled: Compiled) -> list[dict[str, Any]]:
    """Collectives by kind and purpose, those with most bytes first."""
    pool = compiled.config.batch.pairs * compiled.model.config.text.hidden_size
    parameters = layer_shapes(compiled.model)
    groups: dict[tuple, list[hlo.Collective]] = collections.defaultdict(list)
    for collective in cost.collectives:
        why = purpose(collective, pool, parameters)
        groups[collective.kind, why, collective.group, collective.hidden].append(collective)
    table = [
        {
            "kind": kind,
            "purpose": why,
            "group": group,
            "hidden": hidden,
            "count": sum(c.count for c in members),
            "gib": sum(c.wire_bytes for c in members) / GIB,
            "seconds": sum(c.wire_bytes for c in members) / (compiled.chip.links * LINKS_SHARE),
        }
        for (kind, why, group, hidden), members in groups.items()
    ]
    return sorted(table, key=lambda row: -row["gib"])


def table(values: dict[str, Any]) -> str:
    """A prediction as text, for people.

    Args:
      values: of `predict`.

    Returns:
      Lines with aligned numbers, without a final line break.
    """
    memory, packing, seconds = values["memory_gib"], values["packing"], values["seconds"]
    mesh = " x ".join(f"{axis} {size}" for axis, size in values["mesh"].items())
    budget = values["budget"]
    lines = [
        f"{values['program']} on {values['devices']} chips ({mesh})",
        f"  parameters            {values['parameters'] / 1e9:.3f} billion",
        f"  a chip and micro-batch {budget['rows']} rows of {budget['row_length']} tokens, "
        f"{budget['crops']} crops, {budget['groups']} pair slots; "
        f"{values['micro_batches']} micro-batches",
        f"  memory a chip         arguments {memory['arguments']:.2f}, temporaries "
        f"{memory['temporaries']:.2f}, program {memory['program']:.2f}, peak {memory['peak']:.2f} "
        f"of {memory['hbm']:.0f} GiB ({memory['margin']:.0%} free)",
        f"  packing (simulated)   {packing['tokens']:.1%} of row tokens, {packing['crops']:.1%} of "
        f"crops, {packing['pairs']:.1%} of pair slots filled: {values['pairs']:.0f} pairs a step",
        f"  operations            {values['executed_flops'] / 1e15:.2f} executed, "
        f"{values['necessary_flops'] / 1e15:.2f} necessary (10^15): "
        f"ratio {values['executed_over_necessary']:.2f}",
        "  attention kernels     "
        + ", ".join(f"{name} x {count}" for name, count in sorted(values["kernels"].items())),
    ]
    collectives = [["collective", "purpose", "group", "count", "GiB", "s"]]
    for row in values["collectives"]:
        kind = row["kind"] + (" (async)" if row["hidden"] else "")
        numbers = [f"{row['gib']:.3f}", f"{row['seconds']:.3f}"]
        counts = [f"{row['group']}", f"{row['count']}"]
        collectives.append([kind, row["purpose"], *counts, *numbers])
    lines.append(textwrap.indent(align(collectives, left=2), "  "))
    step, speed = "predicted step", "predicted speed"
    if values["seconds_are"] == "bounds":
        step, speed = "step at least", "speed at most"
    lines += [
        f"  {step:<22}{values['step_seconds']:.2f} s: "
        + ", ".join(f"{name.replace('_', ' ')} {value:.2f}" for name, value in seconds.items()),
        f"  {speed:<22}{values['pairs_per_second_per_chip']:.2f} pairs/s a chip, "
        f"MFU {values['mfu']:.1%}",
    ]
    return "\n".join(lines)
