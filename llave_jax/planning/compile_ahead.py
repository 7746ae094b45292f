"""Proof before a pod is rented: compile a config for a TPU slice or a host of GPUs and say what it
will take.

Owns compiling without the hardware, and what the compiled program's costs mean for speed. Chips and
their figures are `chips.py`, counting what the program executes is `hlo.py`, the work the model needs
is `flops.py`, the sizes of the data are `planning/workload.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
import textwrap
from collections.abc import Collection
from typing import Any

import jax
import numpy as np

from llave_jax.common.tables import align
from llave_jax.config import Config
from llave_jax.data import packing_simulation
from llave_jax.embedding.embedding_step import build_embedding_step
from llave_jax.inputs.batch import Budget
from llave_jax.models.config import LlaveConfig
from llave_jax.models.llave import Llave, abstract_params, param_shardings
from llave_jax.ops import gpu_attention, tpu_attention
from llave_jax.parallel import sharding
from llave_jax.planning import flops, hlo, workload
from llave_jax.planning.chips import (
    CHIPS,
    GIB,
    KERNEL_RATES,
    LINKS_SHARE,
    Chip,
    Gpu,
    topology_devices,
)
from llave_jax.training import batch_shape, setup, train_step

# Pairs whose sizes stand for the data, and those of which packing is simulated.
SAMPLE = 4000
# A process packs for so many shards: the chips of a TPU host, half the GPUs of one.
SHARDS_PER_PROCESS = 4


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for a topology, before anything is read off it."""

    program: Any
    mesh: jax.sharding.Mesh
    kind: str
    budget: Budget
    model: Llave
    config: Config

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]


class DoesNotFit(Exception):
    """The program needs more memory than a device has; says what XLA says, largest buffers too."""


def compile_train_step(config: Config, topology: str) -> Compiled:
    """The whole training step of a config, compiled for a slice.

    Raises:
      DoesNotFit: it needs more memory than the chips have.
      ValueError: as of `batch_shape.check_budget`.
    """
    devices, kind = topology_devices(topology)
    mesh = sharding.make_mesh(dict(config.mesh), devices)
    lowered, training, budget = lower_train_step(config, mesh)
    return Compiled(_compile(lowered), mesh, kind, budget, training.model, config)


def lower_train_step(
    config: Config, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Lowered, setup.Training, Budget]:
    """The program that training runs on a mesh, before XLA compiles it."""
    llave_config = setup.model_config(config)
    batch_shape.check_budget(config, llave_config, sharding.num_shards(mesh))
    # The number of steps is a constant of the schedule and changes nothing else.
    training = setup.build_training(config, llave_config, mesh, config.steps or 1000)
    budget = batch_shape.batch_budget(config, sharding.num_shards(mesh))
    leading = (config.batch.micro_batches,)
    batch = train_step.abstract_batch(training.model, mesh, budget, leading)
    return training.step.run.lower(training.step.state, *batch), training, budget


def compile_embedding_step(config: Config, topology: str) -> Compiled:
    """The forward pass alone, with bfloat16 parameters, on one micro-batch of the config's budget."""
    devices, kind = topology_devices(topology)
    mesh = sharding.make_mesh(dict(config.mesh), devices)
    model = setup.build_training(config, setup.model_config(config), mesh, 1000).model
    model = model.clone(param_dtype=model.dtype)
    params = abstract_params(model)
    budget = batch_shape.batch_budget(config, sharding.num_shards(mesh))
    batch, _ = train_step.abstract_batch(model, mesh, budget, ())
    places = param_shardings(params, mesh)
    lowered = build_embedding_step(model, mesh).lower(
        sharding.with_shardings(params, places), batch
    )
    return Compiled(_compile(lowered), mesh, kind, budget, model, config)


def _is_gpu(kind: str) -> bool:
    return isinstance(CHIPS[kind], Gpu)


def _compile(lowered: jax.stages.Lowered) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_out_of_memory_message(str(error))) from None


def _out_of_memory_message(text: str) -> str:
    """XLA's account of an overflow: totals, then the largest buffers."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    wanted = re.compile(
        r"RESOURCE_EXHAUSTED|Used|Program hbm|Exceeded|Size:|Shape:|Operator:|\d+\."
    )
    return "\n".join(line for line in lines if wanted.search(line))[:4000]


def report(compiled: Compiled, *, training: bool) -> dict[str, Any]:
    """What a run of the program takes, and the speed to expect, as plain numbers.

    Of TPUs times are predictions. Fusions take XLA's own cycle estimates; attention kernels run at
    KERNEL_RATES; a collective moves its bytes over LINKS_SHARE of the links; those XLA made
    asynchronous cost nothing, the others add up. Nothing waits for the host. Of GPUs, for which XLA
    estimates nothing, times are bounds: each operation at the published rate of matrix products or of
    the memory, whichever takes longer, and attention kernels at the former.
    """
    config, chip, mesh, model = compiled.config, compiled.chip, compiled.mesh, compiled.model
    devices = mesh.devices.size
    cost = hlo.cost(compiled.program.as_text(), devices)
    micro_batches = config.batch.micro_batches if training else 1
    packing = packing_simulation.simulate(
        workload.sample_pairs(model.config.input_spec, SAMPLE),
        compiled.budget,
        SHARDS_PER_PROCESS,
        **(batch_shape.dealing(config, sharding.num_shards(mesh)) if training else {}),
    )
    pairs = packing.pairs * compiled.budget.groups * sharding.num_shards(mesh) * micro_batches
    necessary = pairs * flops_per_pair(model, training=training)
    scores = _kernel_scores(compiled, packing.segment_ids)
    kernels = _kernel_costs(cost, compiled, scores)
    executed = devices * (cost.product_flops + kernels["flops"])
    collectives = _collective_table(cost, chip, compiled)
    if _is_gpu(compiled.kind):
        others = {"operations": cost.roofline_seconds(chip.flops, chip.bandwidth)}
    else:
        others = {"fusions": cost.cycles / chip.clock}
    seconds = {
        **others,
        "attention_kernels": kernels["seconds"],
        "collectives_waited_for": sum(c["seconds"] for c in collectives if not c["hidden"]),
    }
    step = sum(seconds.values())
    memory = compiled.program.memory_analysis()
    peak = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
        + memory.generated_code_size_in_bytes
    )
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
        "seconds_are": "bounds" if _is_gpu(compiled.kind) else "predictions",
        "step_seconds": step,
        "pairs_per_second_per_chip": pairs / step / devices,
        "mfu": necessary / step / devices / chip.flops,
    }


def flops_per_pair(model: Llave, *, training: bool) -> float:
    """Necessary operations of an average pair of the mix."""
    sizes = workload.sample_pairs(model.config.input_spec, SAMPLE)
    lengths, crops = sizes.lengths.ravel(), float(sizes.crops.sum())
    if training:
        total = flops.training(model.config, lengths, crops, freeze_vision=model.freeze_vision)
    else:
        total = flops.embedding(model.config, lengths, crops)
    return total / SAMPLE


# Matrix products over the scores in each of the attention kernels, by the end of their names.
_KERNEL_PRODUCTS = {"fwd": 2, "bwd": 5, "bwd_queries": 3, "bwd_keys": 4}


def _kernel_scores(compiled: Compiled, segment_ids: np.ndarray) -> dict[str, float]:
    """Scores of one head that attention kernels compute for a micro-batch of a device, by their mask:
    of rows packed as `segment_ids` [..., R, T] are on average, and of the vision tower's crops."""
    config = compiled.model.config
    patches, crops = config.vision.num_patches, compiled.budget.crops
    if _is_gpu(compiled.kind):
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
    """Operations and seconds of all attention kernels on one device, `scores` as of `_kernel_scores`."""
    config = compiled.model.config
    text, vision = config.text, config.vision
    # The tensor axis divides heads if it divides all; crops are whole on their device.
    heads = {
        "causal": (text.num_heads, text.num_kv_heads, text.head_dim),
        "full": (vision.num_heads, vision.num_heads, _vision_head_dim(config)),
    }
    total = {"flops": 0.0, "seconds": 0.0}
    for name, calls in cost.kernels.items():
        kernels, mask, phase = re.fullmatch(r"(splash|triton)_(causal|full)_(\w+)", name).groups()
        count, groups, head_dim = heads[mask]
        divisor = compiled.mesh.shape["tensor"]
        if count % divisor == 0 and groups % divisor == 0:
            count //= divisor
        times = sum(executions for _, executions in calls)
        flops = 2 * _KERNEL_PRODUCTS[phase] * times * count * scores[mask]
        total["flops"] += flops * head_dim
        if kernels == "splash":
            padded = -(-head_dim // tpu_attention.LANES) * tpu_attention.LANES
            rate = KERNEL_RATES[compiled.kind][f"{mask}_{phase}"]
        else:
            padded, rate = gpu_attention.padded_head_dim(head_dim), 1.0
        total["seconds"] += flops * padded / (compiled.chip.flops * rate)
    return total


def _collective_table(cost: hlo.Cost, chip: Chip, compiled: Compiled) -> list[dict[str, Any]]:
    """Collectives by kind and purpose, most bytes first."""
    pool = compiled.config.batch.pairs * compiled.model.config.text.hidden_size
    whole = layer_shapes(compiled.model)
    groups: dict[tuple, list[hlo.Collective]] = collections.defaultdict(list)
    for collective in cost.collectives:
        why = purpose(collective, pool, whole)
        groups[collective.kind, why, collective.group, collective.hidden].append(collective)
    table = [
        {
            "kind": kind,
            "purpose": why,
            "group": group,
            "hidden": hidden,
            "count": sum(c.count for c in members),
            "gib": sum(c.wire_bytes for c in members) / GIB,
            "seconds": sum(c.wire_bytes for c in members) / (chip.links * LINKS_SHARE),
        }
        for (kind, why, group, hidden), members in groups.items()
    ]
    return sorted(table, key=lambda row: -row["gib"])


# What an exchange is for, by where it comes from in the program; the first match counts.
_PURPOSES = (
    (r"embed_tokens/", "token embedding lookup"),
    (r"transpose\(.*rematted_computation.*/sharding_constraint", "parameter gather"),
    (r"transpose\(", "gradient scatter"),
    (r"/sharding_constraint", "parameter gather"),
    (r"\)/shard_map/|/shard_map/all_gather", "embedding gather and loss"),
)
# An exchange of a few norms, biases and metrics: nothing to plan for.
SMALL_BYTES = 64 * 1024
UNACCOUNTED = "UNACCOUNTED"


def layer_shapes(model: Llave) -> set[tuple[int, ...]]:
    """Shapes of all parameters, of stacked layers one layer's."""
    flat = sharding.flatten(abstract_params(model))
    return {x.shape[1:] if "/layers/" in path else x.shape for path, x in flat.items()}


def purpose(collective: hlo.Collective, pool: int, whole: Collection[tuple[int, ...]]) -> str:
    """What an exchange is for.

    Some XLA makes without saying where they come from; these are known by their sizes. On slices
    whose links form rings in three dimensions XLA gathers by all-reduces of arrays that are zero
    but for a device's own part.

    Args:
      pool: number of values in the gathered embeddings of one side.
      whole: shapes of parameters, as of `layer_shapes`.
    """
    for pattern, name in _PURPOSES:
        if re.search(pattern, collective.op_name):
            return name
    if collective.result_bytes / collective.count <= SMALL_BYTES:
        return "scalars and vectors"
    dtypes, shapes = (set(values) for values in zip(*hlo.arrays(collective.shape), strict=True))
    if dtypes == {"s32"}:
        # Token ids: every device looks up its columns of everybody's tokens.
        return "token embedding lookup"
    if dtypes == {"f32"} and all(_is_pool(collective, dims, pool) for dims in shapes):
        return "embedding gather and loss"
    if collective.op_name:
        return UNACCOUNTED
    if collective.kind in ("all-reduce", "all-gather") and shapes <= set(whole):
        return "parameter gather"
    if collective.kind == "reduce-scatter" and all(
        any(_is_part(dims, full, collective.group) for full in whole) for dims in shapes
    ):
        return "gradient scatter"
    # Shards that are no whole tiles are shifted to their places.
    if collective.kind == "collective-permute" and all(
        any(_is_part(dims, full) for full in whole) for dims in shapes
    ):
        return "parameter gather"
    return UNACCOUNTED


def _is_pool(collective: hlo.Collective, dims: tuple[int, ...], pool: int) -> bool:
    """The embeddings of one side, or gradients of them; shares may be padded to tiles of 8 rows."""
    if not dims:
        return False
    parts = collective.group if collective.kind == "reduce-scatter" else 1
    rows, needed = parts * math.prod(dims[:-1]), pool / dims[-1]
    share = math.ceil(needed / collective.group / 8) * 8
    return needed <= rows <= share * collective.group


def _is_part(dims: tuple[int, ...], full: tuple[int, ...], parts: int | None = None) -> bool:
    """`full` cut along one dimension (into so many equal parts)."""
    if len(dims) != len(full):
        return False
    cut = [(part, size) for part, size in zip(dims, full, strict=True) if part != size]
    return len(cut) == 1 and parts in (None, cut[0][1] / cut[0][0])


def table(values: dict[str, Any]) -> str:
    """A report for people."""
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
