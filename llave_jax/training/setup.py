"""From a run's config to its objects: data, model, optimiser, step, state, evaluation.

Training and compiling ahead build the model and its step here, so that they run the same program. What
the config's fields mean is `config.py`; the shape of batches is `batch_shape.py`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grain
import jax
import jax.numpy as jnp
import optax
from jax.experimental import multihost_utils

from llave_jax.config import Config
from llave_jax.data.batch_plan import BatchPlan
from llave_jax.data.measure import measure_source
from llave_jax.data.order import Composition
from llave_jax.data.packing_simulation import PairSizes
from llave_jax.data.pipeline import train_iterator
from llave_jax.data.rows import EMPTY_SIDE
from llave_jax.data.skips import by_subset, listed
from llave_jax.data.sources import (
    MMEB_TRAIN_SUBSETS,
    PairSource,
    open_source,
    split_held_out,
)
from llave_jax.digits import dataset as digits
from llave_jax.digits import tokenizer as digits_tokenizer
from llave_jax.embedding.embedder import Embedder
from llave_jax.inputs.batch import Budget
from llave_jax.inputs.config import grid_pinpoints
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.loss.cross_device import make_formula
from llave_jax.models.config import PRESETS, LlaveConfig
from llave_jax.models.llave import Llave, attention_cases, example_batch
from llave_jax.models.lora import AdaptedLlave, adapters_of
from llave_jax.ops.attention_choice import choose
from llave_jax.parallel import sharding
from llave_jax.parallel.processes import json_from_first_process
from llave_jax.training import adapters, batch_shape, optim, train_step
from llave_jax.training.benchmark import open_run_benchmark
from llave_jax.training.best import BestCheckpoint
from llave_jax.training.checkpoint import Checkpoints
from llave_jax.training.evaluation import TrainingEvaluation
from llave_jax.training.goodput import Clock
from llave_jax.training.metrics import MetricsWriter, read_metrics
from llave_jax.training.run_files import skip_file
from llave_jax.training.state import TrainState
from llave_jax.training.step_loss import LossConfig
from llave_jax.training.validation import Validation
from llave_jax.training.watch import Watch, count_skipped
from llave_jax.training.weights_and_biases import WandbLog
from llave_jax.weights import model_dir, tokenizer_files
from llave_jax.weights.resolve import resolve_model

log = logging.getLogger(__name__)

DIGITS = "digits"


def make_mesh(config: Config) -> jax.sharding.Mesh:
    """The mesh of all the job's devices, as `config.mesh` divides them.

    Args:
      config: of the run.

    Returns:
      The mesh.

    Raises:
      ValueError: the sizes do not use all devices.
    """
    mesh = sharding.make_mesh(dict(config.mesh))
    log.info("mesh %s, %s", dict(mesh.shape), jax.devices()[0].device_kind)
    return mesh


def with_local_model(config: Config) -> Config:
    """The config with `model.path` as a model directory or a run, for the functions below.

    Args:
      config: of the run; `model.path` may also be a Hugging Face checkpoint or its name on the hub.

    Returns:
      A copy of the config, or `config` itself without `model.path`.

    Raises:
      CheckpointError: `model.path` is not a model (`resolve_model`).
    """
    if config.model.path is None:
        return config
    config = config.copy_and_resolve_references()
    config.model.path = str(resolve_model(config.model.path))
    return config


# Data and tokenizer.


def locate_data(config: Config, workdir: Path) -> tuple[Path, Path | None]:
    """Where training data and tokenizer are; builds the digits benchmark if the config names it.

    Args:
      config: of the run.
      workdir: the run's directory; digits are built in it.

    Returns:
      The data's directory or file, and the tokenizer's directory if the config names one.

    Raises:
      ValueError: the config names no data.
    """
    if config.data.path is None:
        raise ValueError('set config.data.path: a directory of training data, or "digits"')
    data_path, tokenizer_path = config.data.path, config.model.tokenizer
    root = workdir / DIGITS
    if DIGITS in (data_path, tokenizer_path, config.eval.benchmark):
        if jax.process_count() > 1:
            # Processes connect now: a connection is waited for half a minute only, and building may take longer.
            multihost_utils.sync_global_devices("digits will be built")
        if jax.process_index() == 0:
            digits.build(root)
            digits_tokenizer.build_tokenizer(root / "tokenizer")
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("digits are built")
    data_path = root if data_path == DIGITS else Path(data_path)
    if tokenizer_path == DIGITS:
        return data_path, root / "tokenizer"
    return data_path, Path(tokenizer_path) if tokenizer_path else None


def load_tokenizer(config: Config, tokenizer_path: Path | None) -> Any:
    """The tokenizer of the model directory, or of a model trained from scratch.

    Args:
      config: of the run.
      tokenizer_path: as `locate_data` returned it.

    Returns:
      A `transformers` tokenizer.

    Raises:
      ValueError: a model trained from scratch has none.
    """
    if config.model.path is not None:
        return model_dir.load_tokenizer(config.model.path)
    if tokenizer_path is None:
        raise ValueError(
            "no model is given: expected --config.model.path=MODEL or, to train config.model.preset from "
            "scratch, --config.model.tokenizer=DIR with a Qwen2 tokenizer"
        )
    return tokenizer_files.load_tokenizer(Path(tokenizer_path))


def open_training_source(config: Config, data_path: Path) -> PairSource:
    """The pairs that the run trains on.

    Args:
      config: of the run.
      data_path: as `locate_data` returned it.

    Returns:
      The pairs, without those held out.

    Raises:
      ValueError, OSError: as of `open_sources`.
    """
    return open_sources(config, data_path)[0]


def open_sources(config: Config, data_path: Path) -> tuple[PairSource, PairSource | None]:
    """The pairs that the run trains on, and those that are held out, if any are.

    Args:
      config: of the run.
      data_path: as `locate_data` returned it.

    Returns:
      The pairs of training, and those held out; None if `data.held_out` is 0.

    Raises:
      ValueError, OSError: the data is not there, or not in a form that is read.
    """
    data = config.data
    is_digits = data.path == DIGITS
    source = open_source(
        data_path / "train" if is_digits else data_path,
        subsets=data.subsets or None,
        split=data.split,
        max_rows=data.max_rows,
        image_root=data_path / "train_images" if is_digits else data.image_root,
    )
    for name, rows in source.subsets.items():
        read = len(rows) + len(source.left_out.get(name, ()))
        if data.max_rows and read >= data.max_rows and name not in MMEB_TRAIN_SUBSETS:
            log.warning(
                "%s: the first %d rows and no more, as data.max_rows says (configs/finetune.py takes all)",
                name,
                data.max_rows,
            )
    if source.left_out:
        left_out = listed(source.left_out)
        log.info("skipped %d rows: %s (%s)", len(left_out), EMPTY_SIDE, by_subset(left_out))
    if not data.held_out:
        return source, None
    training, held_out = split_held_out(source, data.held_out)
    if len(held_out) and not len(training):
        raise ValueError(
            f"{data.path}: all {len(held_out)} rows are held out, none is left to train on: by the hash of its content, "
            f"with copies on one side, a row is held out with a chance of {data.held_out}; add rows, or give "
            "--config.data.held_out=0"
        )
    return training, held_out


def measure_data(config: Config, source: PairSource, builder: SequenceBuilder) -> PairSizes:
    """Sizes of a sample of the data's pairs, by which batches are planned.

    Args:
      config: of the run.
      source: the pairs.
      builder: of the model's sequences.

    Returns:
      The sizes.
    """
    weights = dict(config.data.weights) or None
    return measure_source(source, builder, sides=batch_shape.sides(config), weights=weights)


def make_iterator(
    config: Config,
    source: PairSource,
    builder: SequenceBuilder,
    plan: BatchPlan,
    mesh: jax.sharding.Mesh,
    workdir: Path,
) -> grain.DatasetIterator:
    """An endless iterator of the `TrainBatch`es of this process's shards.

    Args:
      config: of the run, with the plan's pairs and micro-batches.
      source: the pairs.
      builder: of the model's sequences.
      plan: of the run's batches.
      mesh: the devices.
      workdir: the run's directory.

    Returns:
      The iterator, at its beginning.
    """
    data, process = config.data, jax.process_index()
    return train_iterator(
        source,
        builder,
        plan.budget,
        seed=config.seed,
        num_shards=len(sharding.local_shards(mesh)),
        micro_batches=config.batch.micro_batches,
        process_index=process,
        process_count=jax.process_count(),
        num_workers=data.num_workers,
        composition=Composition(data.sub_batch, dict(data.weights) or None, data.order),
        group_size=batch_shape.pairs_per_group(config, sharding.num_shards(mesh)),
        order_slots=plan.order_slots,
        on_error=data.on_error,
        skip_file=skip_file(workdir, process),
        max_skip_share=data.max_skip_share,
        stall_warning=data.stall_warning,
    )


# Model and step.


def model_config(config: Config) -> LlaveConfig:
    """Sizes and input settings of the model that the run trains.

    Args:
      config: of the run.

    Returns:
      Those of `model.path` or `model.preset`, with the changes of `model.inputs`.

    Raises:
      ValueError: neither `model.path` nor `model.preset` is set, or there is no such preset.
    """
    path, preset = config.model.path, config.model.preset
    if path is None and preset is None:
        raise ValueError(
            "set config.model.path (a model directory, a run, or a model of the hub) or "
            f"config.model.preset ({', '.join(PRESETS)})"
        )
    if path is not None:
        llave = model_dir.load_config(path)
    elif preset in PRESETS:
        llave = PRESETS[preset]
    else:
        raise ValueError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    overrides = {key: value for key, value in config.model.inputs.items() if value is not None}
    if "pinpoints" in overrides:
        overrides["pinpoints"] = canvases(overrides["pinpoints"], llave.vision.image_size)
    return dataclasses.replace(llave, inputs=dataclasses.replace(llave.inputs, **overrides))


def canvases(pinpoints: Sequence[Any], tile: int) -> tuple[tuple[int, int], ...]:
    """`model.inputs.pinpoints` as canvases (height, width) in pixels.

    Args:
      pinpoints: (rows, columns) in tiles, or a sequence of canvases in pixels.
      tile: pixels of a side of the vision tower's crops.

    Returns:
      (height, width) of each canvas, in pixels.

    Raises:
      ValueError: it is neither, or a canvas is not made of whole tiles.
    """
    if len(pinpoints) == 2 and all(isinstance(n, int) and 0 < n < tile for n in pinpoints):
        return grid_pinpoints(tile, *pinpoints)
    found = []
    for canvas in pinpoints:
        sizes = tuple(canvas) if isinstance(canvas, Sequence) else ()
        if len(sizes) != 2 or any(size < tile or size % tile for size in sizes):
            raise ValueError(
                f"model.inputs.pinpoints is {pinpoints!r}; expected (rows, columns) in tiles, or "
                "canvases ((height, width), ...) in pixels that are multiples of the vision tower's "
                f"{tile}"
            )
        found.append(sizes)
    return tuple(found)


@dataclasses.dataclass(frozen=True)
class Training:
    """The program of a training run.

    Attributes:
      model: the module, on the attention kernels of the mesh's devices.
      schedule: step -> learning rate.
      step: the compiled step and the state it works on.
    """

    model: Llave
    schedule: optax.Schedule
    step: train_step.TrainStep


def build_training(
    config: Config,
    llave_config: LlaveConfig,
    mesh: jax.sharding.Mesh,
    total_steps: int,
    subsets: Sequence[str] | None = None,
) -> Training:
    """The model, schedule and step that a config describes.

    Args:
      config: of the run.
      llave_config: what `model_config` returned.
      mesh: of real devices, or of a topology's to compile for.
      total_steps: optimiser steps of the whole run, over which the learning rate decays.
      subsets: names of the data's subsets, in the source's order; None: the data is not known, MMEB's are
        assumed.

    Returns:
      What the run consists of.

    Raises:
      ValueError: a name that the config gives for a loss, a pool, an implementation of attention or
        what is recomputed is none; `loss.dims` do not suit the model; `loss.in_batch_off` names no subset; or
        rules for learning rates miss a parameter.
    """
    multipliers = adapters.learning_rates(config, llave_config)
    model = make_model(config, llave_config, mesh, multipliers)
    schedule = optim.learning_rate_schedule(
        config.optim.learning_rate, total_steps, config.optim.warmup_fraction
    )
    loss = loss_config(config, subsets)
    multipliers |= dict.fromkeys(optim.with_prefix(loss.initial()), config.loss.temperature_rate)
    optimizer = optim.make_optimizer(
        schedule, multipliers, **_without(config.optim, "learning_rate", "warmup_fraction", "rates")
    )
    skips = config.nonfinite.action == "skip"
    step = train_step.build_step(model, mesh, optimizer, multipliers, loss, skips)
    return Training(model, schedule, step)


def loss_config(config: Config, subsets: Sequence[str] | None = None) -> LossConfig:
    """The settings of the run's loss.

    Args:
      config: of the run.
      subsets: as for `build_training`.

    Returns:
      The settings.

    Raises:
      ValueError: they do not go together.
    """
    if subsets is None:
        subsets = tuple(dict.fromkeys((*MMEB_TRAIN_SUBSETS, *config.loss.in_batch_off)))
    settings = _without(config.loss, "hard_negatives", "negatives_per_row", "temperature_rate")
    return LossConfig(**settings, subsets=tuple(subsets))


def lower_step(
    training: Training, mesh: jax.sharding.Mesh, budget: Budget, micro_batches: int
) -> jax.stages.Lowered:
    """The program of a training step, before XLA compiles it.

    Once it is compiled, the first call of `training.step.run` with such a batch does not compile again.

    Args:
      budget: of one shard of one micro-batch.
      micro_batches: of a step.
    """
    batch = train_step.abstract_batch(training.model, mesh, budget, (micro_batches,))
    return training.step.run.lower(training.step.state, *batch)


def make_model(
    config: Config,
    llave_config: LlaveConfig,
    mesh: jax.sharding.Mesh,
    lr_multipliers: Mapping[str, float | None],
) -> Llave:
    """The module, with attention kernels that suit the mesh's devices and have been checked on them.

    Args:
      config: of the run.
      llave_config: the model that is trained.
      mesh: the devices.
      lr_multipliers: what `optim.lr_multipliers` returned. If the vision tower is frozen as a whole,
        gradients stop at it.

    Returns:
      The module.
    """
    tower = [rate for path, rate in lr_multipliers.items() if path.startswith("vision_tower/")]
    packed, crops = attention_cases(llave_config, config.dtype)
    options: dict[str, Any] = {
        "dtype": jnp.dtype(config.dtype),
        "attention": choose(config.attention, mesh, packed),
        "vision_attention": choose(config.vision_attention, mesh, crops),
        "remat": config.remat,
        "freeze_vision": all(rate is None for rate in tower),
    }
    lora = adapters.lora_of(config)
    if lora is None:
        return Llave(llave_config, **options)
    base_dtypes = adapters.base_dtypes(config, llave_config)
    return AdaptedLlave(llave_config, lora=lora, base_dtypes=base_dtypes, **options)


def _without(values: Config, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}


def make_state(
    config: Config,
    training: Training,
    mesh: jax.sharding.Mesh,
    checkpoints: Checkpoints,
    iterator: grain.DatasetIterator,
) -> TrainState:
    """The state to go on from: the latest checkpoint, else the model directory, else random parameters.

    Every array is made or read directly in its shards.

    Args:
      config: of the run.
      training: what the run consists of.
      mesh: the devices.
      checkpoints: the run's checkpoints.
      iterator: is set to the checkpoint's position in the data.

    Returns:
      The state, in its shards.

    Raises:
      ValueError: the checkpoint does not suit this run (`Checkpoints.restore`).
    """
    step, has_adapters = training.step, config.lora.rank is not None
    if checkpoints.latest_step is not None:
        kept = step.state._replace(params=adapters_of(step.state.params))
        state = checkpoints.restore(kept, iterator)
        log.info("continuing from step %d", int(state.step))
        return adapters.with_base(config, state, mesh) if has_adapters else state
    if has_adapters:
        params = adapters.begin(config, training.model.config, mesh)
        # The base's arrays become those of the state: there is no second copy of them.
        return jax.jit(step.init, donate_argnums=0)(params)
    if config.model.path is not None:
        return step.init(model_dir.load_params(config.model.path, mesh=mesh, dtype=jnp.float32))
    return random_state(config, training)


def random_state(config: Config, training: Training) -> TrainState:
    """The state before the first step of a model that is trained from scratch.

    Args:
      config: of the run.
      training: what the run consists of.

    Returns:
      The state, made in its shards.
    """
    model, step = training.model, training.step

    def from_seed(key: jax.Array) -> TrainState:
        params = model.init(key, example_batch(model.config))["params"]
        if isinstance(model, AdaptedLlave):
            params = adapters.with_new(model, params)
        return step.init(params)

    shardings = jax.tree.map(lambda x: x.sharding, step.state)
    return jax.jit(from_seed, out_shardings=shardings)(jax.random.key(config.seed))


# Metrics, and evaluation on the way.


def make_writer(config: Config, workdir: Path, first_step: int) -> MetricsWriter:
    """Where the run's metrics go; on processes other than the first, nowhere.

    Args:
      config: of the run.
      workdir: the run's directory.
      first_step: as of `MetricsWriter`.

    Returns:
      The writer.

    Raises:
      ValueError: Weights & Biases is asked for and is not there, or cannot begin a run.
    """
    if jax.process_index() != 0:
        return MetricsWriter(workdir, enabled=False)
    project, wandb = config.log.wandb, None
    if project:
        wandb = WandbLog(project, workdir, json.loads(config.to_json()))
    return MetricsWriter(workdir, first_step=first_step, wandb=wandb)


def make_watch(
    config: Config,
    writer: MetricsWriter,
    schedule: optax.Schedule,
    total_steps: int,
    start: int,
    clock: Clock,
    workdir: Path,
) -> Watch:
    """What checks and writes the metrics of each step. All processes of a job call this.

    Args:
      config: of the run.
      writer: of the metrics.
      schedule: step -> learning rate.
      total_steps: of the whole run.
      start: steps done before this process began; the metrics file has no later ones.
      clock: of the run.
      workdir: the run's directory.

    Returns:
      The watch, which counts on from skipped steps of earlier processes.
    """
    skipped = (0, 0)
    if config.nonfinite.action == "skip":
        lines = read_metrics(workdir) if jax.process_index() == 0 else []
        skipped = tuple(json_from_first_process(count_skipped(lines, start)))
    return Watch(config, writer, schedule, total_steps, start, clock, skipped)


def make_evaluation(
    config: Config,
    model: Llave,
    tokenizer: Any,
    mesh: jax.sharding.Mesh,
    workdir: Path,
    held_out: PairSource | None,
    start: int,
) -> TrainingEvaluation:
    """What scores the run's parameters: on a benchmark, and on held-out pairs.

    Args:
      config: of the run.
      model: the module that is trained.
      tokenizer: the model's.
      mesh: the devices.
      workdir: the run's directory.
      held_out: as of `open_sources`.
      start: steps done before this process began.

    Returns:
      The evaluation; with neither benchmark nor held-out pairs it scores nothing.

    Raises:
      ValueError, OSError: the benchmark is not what it should be or needs a package that is not installed,
        or the config asks for a score that there is not.
    """
    name, loss = config.eval.benchmark, config.loss
    benchmark, validation = None, None
    # The last is the whole width.
    dims = loss.dims[:-1]
    if name == DIGITS:
        directory = str(workdir / DIGITS / "eval")
        benchmark = open_run_benchmark(directory, config.eval.datasets, digits.INFOS, dims)
    elif name:
        path = config.model.path
        prompts = {} if path is None else model_dir.load_prompts(path)
        benchmark = open_run_benchmark(name, config.eval.datasets, None, dims, prompts)
    if held_out is not None and len(held_out) < 2:
        log.warning("%d pairs are held out: too few to validate (data.held_out)", len(held_out))
    elif held_out is not None:
        validation = Validation(
            held_out,
            make_formula(loss.kind, loss.alpha, loss.temperature, loss.margin, loss.hardness_on),
            max_pairs=config.eval.max_pairs,
            skip_unusable=config.data.on_error == "skip",
        )
    metric = config.checkpoint.best_metric
    return TrainingEvaluation(
        config,
        Embedder(model, None, tokenizer, mesh),
        workdir,
        start,
        benchmark,
        validation,
        BestCheckpoint(workdir, metric) if metric is not None else None,
    )
