"""The configuration of a training run: every field with its default, and what it means.

A config file (`configs/NAME.py`) calls `default_config()` and sets what differs; the command line
overrides single fields (`--config.optim.learning_rate=2e-5`). A misspelt field is an error.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Sequence
from typing import Any, TypeAlias

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from llave_jax.inputs.anyres import largest_image
from llave_jax.inputs.batch import Budget
from llave_jax.inputs.config import grid_pinpoints
from llave_jax.models.config import PRESETS, LlaveConfig

log = logging.getLogger(__name__)

# A run's configuration, an `ml_collections.ConfigDict` with the fields of `default_config`. Type checkers
# cannot know these fields, as they are set when the program runs, so that they see `Any`. A field that
# does not exist is an error when it is read: the ConfigDict is locked.
Config: TypeAlias = Any


def default_config() -> Config:
    """Every field, with the paper's optimiser and loss (section 4.1, appendix A.1) and no data of its own.

    What the paper's data and inputs add is `paper_config`.
    """
    config: Config = ConfigDict()
    config.seed = 0
    # Optimiser steps of the run. None: as many as `data.epochs` passes over the data take if batches
    # are as full as `batch.fill` says.
    config.steps = placeholder(int)

    # A converted model directory; without one, the name of a preset to be trained from scratch with
    # the tokenizer found in `tokenizer` (a directory). `inputs` overrides fields of InputConfig (None: as
    # the model has it); the run's model keeps what was overridden. `pinpoints` are (rows, columns), for
    # all canvases from 1 x 1 to rows x columns of the vision tower's crops, or a tuple of canvases
    # (height, width) in pixels.
    config.model = ConfigDict()
    config.model.path = placeholder(str)
    config.model.preset = placeholder(str)
    config.model.tokenizer = placeholder(str)
    config.model.inputs = ConfigDict(
        {
            "pinpoints": placeholder(tuple),
            "anyres_max": placeholder(int),
            "newline_position": placeholder(str),
            "pool_mode": placeholder(str),
            "pool_stride": placeholder(int),
            "max_text_length": placeholder(int),
            "max_length": placeholder(int),
            "max_frames": placeholder(int),
            "frames_per_second": placeholder(int),
        }
    )

    # Where the pairs come from: see `llave_jax.data.sources.open_source`. `path` "digits" is the
    # bundled benchmark, built on first use under the workdir.
    config.data = ConfigDict()
    config.data.path = placeholder(str)
    config.data.image_root = placeholder(str)
    config.data.subsets = ()
    config.data.split = "original"
    # The first rows of each subset; None: all.
    config.data.max_rows = placeholder(int)
    config.data.epochs = 1
    config.data.num_workers = 4
    # "uniform": all rows shuffled. "modality": each step takes rows with an image in the query, or rows
    # without, as the authors trained (`llave_jax.data.order.ModalityOrder`).
    config.data.order = "uniform"
    # Of the uniform order: rows of one subset that follow one another (1: a shuffle of all), and the
    # share of each subset in the stream, as (subset, weight) pairs (empty: every row once an epoch).
    config.data.sub_batch = 1
    config.data.weights = ()
    # Rows that cannot be used: "raise", or "skip" and list them in WORKDIR/skipped_PROCESS.jsonl, until
    # they are more than `max_skip_share` of the run's rows.
    config.data.on_error = "raise"
    config.data.max_skip_share = 0.01
    # Share of the rows kept from training, by the hash of their content.
    config.data.held_out = 0.0

    # A step's pairs, over all devices, go through the model in `micro_batches` parts. Rows and
    # crops of each part follow from what a pair takes on average, with room to spare
    # (`llave_jax.inspect_data` measures it); pairs that do not fit wait for the next step. `fill`:
    # the share of its pairs that a step then has, as expected (`inspect` predicts it).
    config.batch = ConfigDict()
    config.batch.pairs = 256
    config.batch.fill = 1.0
    config.batch.micro_batches = 1
    config.batch.row_length = 4096
    config.batch.tokens_per_pair = 3000.0
    config.batch.crops_per_pair = 4.0
    config.batch.taps = 1

    # kind "hardness": the paper's, with hardness `alpha` (0: InfoNCE). "focal": Focal-InfoNCE, with
    # `margin`.
    config.loss = ConfigDict()
    config.loss.kind = "hardness"
    config.loss.alpha = 9.0
    config.loss.margin = 0.3
    config.loss.temperature = 0.02
    # pool "global": every pair of the step is a negative of every other, with exact gradients.
    # "micro": those of its own micro-batch only, as the authors' gradient accumulation does.
    # "device": those of its micro-batch on its own device only, batch.pairs / (shards *
    # batch.micro_batches) of them, as without the paper's cross-device gathering. Shards are the
    # devices along data and fsdp, so this pool depends on the mesh. In all three every pair of the
    # step counts the same. Hard negatives and `mask_false_negatives` apply within the pool.
    config.loss.pool = "global"
    # Equal targets (same text and image; class names, yes and no) are not each other's negatives.
    # The authors' code does not mask them.
    config.loss.mask_false_negatives = False
    # Use the hard negatives that rows name (`neg_text`, `neg_image_path`) as further candidates.
    config.loss.hard_negatives = False

    # `rates`: (path regex, factor on the learning rate); None freezes. The first match wins.
    config.optim = ConfigDict()
    config.optim.learning_rate = 1e-5
    config.optim.warmup_fraction = 0.03
    config.optim.beta1 = 0.9
    config.optim.beta2 = 0.999
    config.optim.epsilon = 1e-8
    config.optim.weight_decay = 0.0
    config.optim.clip_norm = 1.0
    config.optim.rates = (("vision_tower/.*", None), (".*", 1.0))

    # Devices along each mesh axis; -1: the rest. Batches are split over data and fsdp.
    config.mesh = ConfigDict({"data": -1, "fsdp": 1, "tensor": 1})

    # Activations and products; parameters are float32 masters. Norms, softmax and loss are float32.
    config.dtype = "bfloat16"
    # Implementations of `llave_jax.ops.attention`; "auto": what suits the devices.
    config.attention = "auto"
    config.vision_attention = "auto"
    # What the backward pass recomputes: see `llave_jax.models.remat.REMATS`.
    config.remat = "block"

    config.checkpoint = ConfigDict()
    config.checkpoint.every = 1000
    config.checkpoint.keep = 2
    # Score by which the best parameters are kept in WORKDIR/best ("average/overall"); None: not kept.
    config.checkpoint.best_metric = placeholder(str)
    config.log_every = 10

    # Evaluation at the start and the end of the run, and every `every` steps (0: no). `benchmark`
    # "digits", or a directory in MMEB's form; None: no evaluation.
    config.eval = ConfigDict()
    config.eval.benchmark = placeholder(str)
    config.eval.datasets = ()
    config.eval.every = 0
    # From here on a field that is not there is an error, not a new field.
    return config.lock()


def paper_config() -> Config:
    """`default_config` with the data and inputs of the paper's models, whatever the base model says.

    The base models have 36 canvases up to 6 x 6, sequences of 32 768 tokens and other newlines or none
    said. The authors' training overrides all of these.
    """
    config = default_config()
    # Up to 768 x 768 pixels, as in the authors' code. The paper says 672 x 672.
    config.model.inputs.pinpoints = (2, 2)
    config.model.inputs.anyres_max = 9
    config.model.inputs.newline_position = "grid"
    config.model.inputs.max_length = 4096
    config.model.inputs.max_text_length = 4096
    # 662 thousand pairs of MMEB's 20 training subsets.
    config.data.max_rows = 50_000
    return config


def total_steps(config: Config, rows: int) -> int:
    """Optimiser steps of a run over `rows` pairs.

    By modality an epoch has as many steps as full batches, or one; of a shuffle as many as batches, and
    more if they are not expected to be full. A step holds each row at most once.

    Raises:
      ValueError: `batch.fill` is not a share, or `data.order` and `batch` do not go together.
    """
    batch, epochs = config.batch, config.data.epochs
    if not 0 < batch.fill <= 1:
        raise ValueError(f"batch.fill is {batch.fill}; expected more than 0 and at most 1")
    if config.data.order == "modality":
        check_modality(config)
        return config.steps or epochs * max(1, rows // batch.pairs)
    steps = math.ceil(rows * epochs / min(batch.pairs * batch.fill, rows))
    if config.data.sub_batch == 1 and not config.data.weights:
        steps = max(steps, epochs * math.ceil(rows / batch.pairs))
    return config.steps or steps


def check_modality(config: Config) -> None:
    """Raises ValueError unless the budget is for batches that are full."""
    batch = config.batch
    if batch.fill != 1:
        parts, fill = batch.micro_batches, batch.fill
        raise ValueError(
            f'batch.fill is {fill}: with data.order "modality" a step takes all of batch.pairs. For the '
            f"same room, set batch.pairs to about {round(batch.pairs * fill / parts) * parts}, "
            f"batch.tokens_per_pair to {batch.tokens_per_pair / fill:.0f}, batch.crops_per_pair to "
            f"{batch.crops_per_pair / fill:.2f} and batch.fill to 1"
        )


def batch_budget(config: Config, shards: int) -> Budget:
    """Room of one shard in one micro-batch.

    Raises:
      ValueError: the step's pairs do not divide over shards and micro-batches, or `data.order` and
        `batch` do not go together.
    """
    batch, pairs = config.batch, pairs_per_group(config, shards)
    if config.data.order == "modality":
        # Slots to spare: a pair whose group does not fit joins another of its pool, or a later one.
        check_modality(config)
        slots = pairs + math.ceil(pairs / 4)
    else:
        slots = pairs
    return Budget(
        rows=max(1, math.ceil(pairs * batch.tokens_per_pair / batch.row_length)),
        row_length=batch.row_length,
        crops=math.ceil(pairs * batch.crops_per_pair),
        groups=slots,
        sides=3 if config.loss.hard_negatives else 2,
        taps=batch.taps,
    )


def pairs_per_group(config: Config, shards: int) -> int:
    """Pairs of a step for each shard of each micro-batch.

    Raises:
      ValueError: the step's pairs do not divide over shards and micro-batches, or into pools of more
        than one pair.
    """
    batch, loss = config.batch, config.loss
    parts = shards * batch.micro_batches
    if batch.pairs % parts:
        raise ValueError(
            f"batch.pairs is {batch.pairs}: it does not divide over {shards} shards x "
            f"{batch.micro_batches} micro-batches; make it a multiple of {parts}"
        )
    pairs = batch.pairs // parts
    pool = {"device": pairs, "micro": pairs * shards}.get(loss.pool, batch.pairs)
    if pool == 1 and not loss.hard_negatives:
        raise ValueError(
            f"loss.pool is {loss.pool!r}: {batch.pairs} pairs on {shards} shards in "
            f"{batch.micro_batches} micro-batches make pools of 1 pair, which has nothing to stand off "
            "from; use fewer batch.micro_batches or another pool"
        )
    return pairs


def dealing(config: Config, shards: int) -> dict[str, int]:
    """What `data.mix.simulate` is told of `data.order`."""
    if config.data.order != "modality":
        return {}
    return {
        "group_size": pairs_per_group(config, shards),
        "micro_batches": config.batch.micro_batches,
    }


def check_budget(config: Config, llave_config: LlaveConfig, shards: int) -> None:
    """See before the first step that a batch has room for any item the model's inputs allow.

    With `data.on_error` "skip", rows that are too large are left out and counted, and a budget too small
    for the largest possible one is only warned about; so is one too small for a pair of such items.

    Raises:
      ValueError: with `data.on_error` "raise", no room for the longest sequence, for the image of most
        crops or for its taps; it says which number to change, and to what.
    """
    inputs = llave_config.inputs
    budget = batch_budget(config, shards)
    crops, taps = largest_image(inputs, llave_config.vision.crop)
    short = []
    if inputs.max_length > budget.row_length:
        short.append(
            f"rows have {budget.row_length} tokens, a sequence up to {inputs.max_length}: raise "
            f"batch.row_length to {inputs.max_length}, or lower model.inputs.max_length to "
            f"{budget.row_length}"
        )
    if crops > budget.crops:
        short.append(
            f"a device has room for {budget.crops} crops, an image has up to {crops}: raise "
            f"batch.crops_per_pair to {_share(crops, config, shards)}, or lower model.inputs.pinpoints "
            "(now up to {0} x {1} pixels)".format(
                *max(inputs.pinpoints, key=math.prod, default=(0, 0))
            )
        )
    if taps > budget.taps:
        short.append(
            f"visual tokens have up to {budget.taps} taps, large images are shrunk and need {taps}: raise "
            f"batch.taps to {taps}, or lower model.inputs.pinpoints to at most "
            f"{inputs.anyres_max} tiles"
        )
    if short and config.data.on_error == "raise":
        raise ValueError(
            f"batches are too small for items of this model: {'; '.join(short)}. If your data has no such "
            "items, --config.data.on_error=skip leaves out and counts what is too large, should it come"
        )
    for problem in short:
        log.warning("%s. Rows that are too large will be left out", problem)
    sides = budget.sides
    together = budget.rows * (budget.row_length // inputs.max_length)
    if not short and (together < sides or sides * crops > budget.crops):
        log.warning(
            "a device and micro-batch has %d row(s) of %d tokens and %d crops: too small for a pair whose "
            "items all have %d tokens and %d crops (batch.tokens_per_pair, batch.crops_per_pair)",
            *(budget.rows, budget.row_length, budget.crops, inputs.max_length, crops),
        )


def _share(crops: int, config: Config, shards: int) -> float:
    """The `batch.crops_per_pair` that gives a device room for so many crops."""
    pairs = config.batch.pairs / (shards * config.batch.micro_batches)
    return math.ceil(100 * crops / pairs) / 100


def model_config(config: Config) -> LlaveConfig:
    """Sizes and input settings of the model the run trains.

    Raises:
      ValueError: neither `model.path` nor `model.preset` is set, or there is no such preset.
    """
    path, preset = config.model.path, config.model.preset
    if path is None and preset is None:
        raise ValueError(
            "set config.model.path (a converted model directory, see tools/convert_hf.py) or "
            f"config.model.preset ({', '.join(PRESETS)})"
        )
    if path is not None:
        from llave_jax.weights import model_dir

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

    Raises:
      ValueError: it is neither, or a canvas is not made of whole tiles.
    """
    if len(pinpoints) == 2 and all(isinstance(n, int) and 0 < n < tile for n in pinpoints):
        return grid_pinpoints(tile, *pinpoints)
    found = tuple(tuple(canvas) if isinstance(canvas, Sequence) else () for canvas in pinpoints)
    for canvas in found:
        if len(canvas) != 2 or any(size < tile or size % tile for size in canvas):
            raise ValueError(
                f"model.inputs.pinpoints is {pinpoints!r}; expected (rows, columns) in tiles, or "
                "canvases ((height, width), ...) in pixels that are multiples of the vision tower's "
                f"{tile}"
            )
    return found
