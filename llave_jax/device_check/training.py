"""The training step of a config on the machine as it is: its input, memory and time beside what was planned.

Batches come from the config's own data where it names some, otherwise from pairs of the assumed sizes of MMEB;
parameters are random.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llave_jax.config import Config
from llave_jax.data.batch_plan import BatchPlan
from llave_jax.data.sources import PairSource
from llave_jax.data.step_iterators import TrainBatch
from llave_jax.device_check import attention
from llave_jax.device_check.report import Row
from llave_jax.digits.tokenizer import build_tokenizer
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.models.config import LlaveConfig
from llave_jax.models.llave import Llave, attention_cases
from llave_jax.ops.attention_check import Case
from llave_jax.parallel import processes, sharding
from llave_jax.planning import flops, workload
from llave_jax.planning.assumed_pairs import AssumedPairs
from llave_jax.planning.chips import CHIPS, GIB, Gpu
from llave_jax.planning.compile_ahead import SAMPLE, Compiled
from llave_jax.planning.prediction import predict
from llave_jax.training import memory, setup
from llave_jax.training.batch_search import BatchSearch, with_batch

# A step that would take longer is not run: this is for models that are too large for a machine.
LONGEST_STEP = 60.0
STEPS, INPUT_SECONDS = 3, 15.0
# What jax calls the TPUs of `planning.chips`.
_TPUS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
}


def known_chip(device_kind: str) -> str | None:
    """The key in `planning.chips.CHIPS` of a kind of device.

    Args:
      device_kind: as jax names it.

    Returns:
      The key; None for a chip without published figures there.
    """
    gpus = {chip.name: key for key, chip in CHIPS.items() if isinstance(chip, Gpu)}
    return {**_TPUS, **gpus}.get(device_kind)


def measure(config: Config, mesh: jax.sharding.Mesh, folder: Path) -> Iterator[Row]:
    """Plans, compiles and runs the step.

    Args:
      config: of the run, with a model on the disk.
      mesh: the devices; all processes call this.
      folder: an empty one, for what is built.

    Yields:
      Findings: input, attention at the step's shapes, memory, the step.

    Raises:
      ValueError, OSError: the config does not describe a run.
    """
    model = setup.model_config(config)
    source, builder, measured_sizes = _pairs(config, model, folder)
    subsets = tuple(source.subsets) if config.data.path is not None else None
    search = BatchSearch(config, model, mesh, len(source), measured_sizes, subsets=subsets)
    plan = search.find()
    config = with_batch(config, plan.pairs, plan.micro_batches)
    batch, rate, row = _input(config, source, builder, plan, mesh, folder)
    yield row
    training = search.training(config, plan, config.steps or 1000)
    needed = _necessary_flops(training.model, batch) / jax.local_device_count()
    # All processes take the same way, or one would wait for the others.
    seconds = max(processes.gather(needed / _product_rate(config.dtype)))
    if seconds > LONGEST_STEP:
        text = f"not run: it would take {seconds:.0f} s or more"
        yield Row("training step", str(plan), None, text)
        return
    for case in _cases(model, batch, plan, config.dtype):
        yield from attention.speed(case, jax.local_devices()[0])
    program = setup.lower_step(training, mesh, plan.budget, plan.micro_batches).compile()
    planned = memory.step_bytes(program)
    limit = min(processes.gather(memory.device_limit(jax.local_devices()[0])))
    if planned > limit:
        text = f"the step needs {planned / GIB:.2f} GiB a device, of {limit / GIB:.2f} that it may take"
        yield Row("memory", str(plan), False, text, {"planned": planned, "limit": limit})
        return
    times = _steps(config, training, mesh, batch)
    yield _memory_row(plan, planned, limit)
    kind = known_chip(jax.devices()[0].device_kind)
    predicted = None
    if kind is not None:
        compiled = Compiled(program, mesh, kind, plan.budget, training.model, config)
        predicted = predict(compiled, training=True)
    yield _step_row(plan, times, batch, predicted)
    # Each process feeds its own devices.
    need = int(batch.packed.valid.sum()) / float(np.median(times))
    text = f"{rate:.3g} pairs/s a process; the step takes {need:.3g}"
    if rate < need:
        text = f"TOO SLOW: {text}; raise data.num_workers, or prepare the data (docs/data.md)"
    yield Row("input", "against the step", None, text, {"rate": rate, "needed": need})


def _pairs(
    config: Config, model: LlaveConfig, folder: Path
) -> tuple[PairSource, SequenceBuilder, Any]:
    """Pairs to load, the builder of their sequences, and what measures their sizes."""
    data_path, tokenizer_path = None, None
    if config.data.path is not None:
        data_path, tokenizer_path = setup.locate_data(config, folder)
    elif config.model.tokenizer == setup.DIGITS or config.model.path is None:
        # Words of another vocabulary cost the host and the device the same.
        tokenizer_path = build_tokenizer(folder / "tokenizer")
    elif config.model.tokenizer:
        tokenizer_path = Path(config.model.tokenizer)
    if config.model.path is None and tokenizer_path is None:
        tokenizer_path = build_tokenizer(folder / "tokenizer")
    builder = SequenceBuilder(setup.load_tokenizer(config, tokenizer_path), model.input_spec)
    if data_path is not None:
        source = setup.open_training_source(config, data_path)
        return source, builder, functools.partial(setup.measure_data, config, source, builder)
    source = AssumedPairs(max(2000, 4 * (config.batch.pairs or config.batch.max_pairs)), images=2)
    return source, builder, lambda: workload.sample_pairs(model.input_spec, SAMPLE)


def _input(
    config: Config,
    source: PairSource,
    builder: SequenceBuilder,
    plan: BatchPlan,
    mesh: jax.sharding.Mesh,
    folder: Path,
) -> tuple[TrainBatch, float, Row]:
    """A batch, the pairs that this process can load in a second, and the finding."""
    iterator = setup.make_iterator(config, source, builder, plan, mesh, folder)
    # The first batches also start the workers.
    batch = next(iterator)
    start, pairs = time.monotonic(), 0
    while pairs == 0 or time.monotonic() - start < INPUT_SECONDS:
        pairs += int(next(iterator).packed.valid.sum())
    rate = pairs / (time.monotonic() - start)
    iterator.close()
    of = "the config's data" if config.data.path is not None else "pairs of MMEB's sizes"
    subject = f"{of}, {config.data.num_workers} workers"
    return (
        batch,
        rate,
        Row("input", subject, None, f"{rate:.3g} pairs/s", {"pairs_per_second": rate}),
    )


def _lengths(batch: TrainBatch) -> list[tuple[int, ...]]:
    """Tokens of the segments of each row."""
    ids = batch.packed.segment_ids
    rows = ids.reshape(-1, ids.shape[-1])
    return [tuple(int(n) for n in np.bincount(row)[1:]) for row in rows]


def _necessary_flops(model: Llave, batch: TrainBatch) -> float:
    lengths = np.array([n for row in _lengths(batch) for n in row])
    crops = np.any(batch.packed.patches, axis=(-2, -1)).sum()
    return flops.step(model, lengths, float(crops))


def _product_rate(dtype: str) -> float:
    """Operations a second of a product of matrices."""
    side = 1024 if jax.default_backend() == "cpu" else 8192
    x = jax.device_put(jnp.ones((side, side), jnp.dtype(dtype)), jax.local_devices()[0])
    return 2 * side**3 / attention.measured(jax.jit(jnp.matmul), x, x)


def _cases(model: LlaveConfig, batch: TrainBatch, plan: BatchPlan, dtype: str) -> list[Case]:
    """Attention of one device and micro-batch."""
    packed, crops = attention_cases(model, dtype)
    rows, count = tuple(_lengths(batch)[: plan.budget.rows]), max(1, plan.budget.crops)
    return [
        dataclasses.replace(packed, rows=rows, length=plan.budget.row_length),
        dataclasses.replace(crops, rows=((crops.length,),) * count),
    ]


def _steps(
    config: Config, training: setup.Training, mesh: jax.sharding.Mesh, batch: TrainBatch
) -> list[float]:
    """Seconds of steps, after one that compiles."""
    state = setup.random_state(config, training)
    arrays = sharding.device_put_batch((batch.packed, batch.labels), mesh, leading_axes=1)
    times = []
    for _ in range(STEPS + 1):
        start = time.perf_counter()
        state, metrics = training.step.run(state, *arrays)
        loss = float(metrics["loss"])
        times.append(time.perf_counter() - start)
        if not np.isfinite(loss):
            raise FloatingPointError("the loss of a step with random parameters is not finite")
    return times[1:]


def _memory_row(plan: BatchPlan, planned: int, limit: int) -> Row:
    statistics = jax.local_devices()[0].memory_stats() or {}
    peak = statistics.get("peak_bytes_in_use")
    text = f"planned {planned / GIB:.2f} GiB a device, of {limit / GIB:.2f} that a step may take"
    if peak is not None:
        text += f"; {peak / GIB:.2f} at most in use so far"
    return Row("memory", str(plan), True, text, {"planned": planned, "limit": limit, "peak": peak})


def _step_row(
    plan: BatchPlan, times: list[float], batch: TrainBatch, predicted: dict[str, Any] | None
) -> Row:
    seconds, local = float(np.median(times)), int(batch.packed.valid.sum())
    pairs = local * jax.process_count()
    text = f"{seconds:.3g} s, {pairs / seconds:.3g} pairs/s"
    values: dict[str, Any] = {"seconds": times, "pairs": pairs}
    if predicted is None:
        text += "; no prediction for this kind of device"
    else:
        values["predicted_seconds"] = predicted["step_seconds"]
        word = "at least" if predicted["seconds_are"] == "bounds" else "predicted"
        share = seconds / predicted["step_seconds"]
        text += f"; {word} {predicted['step_seconds']:.3g} s ({share:.2f} times that)"
    return Row("training step", str(plan), None, text, values)
