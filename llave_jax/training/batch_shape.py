"""The shape of a run's batches, and how many there are, from its config.

Owns what `config.batch` and `data.order` mean together. How pairs are packed into a batch is
`inputs/packing.py`.
"""

from __future__ import annotations

import logging
import math

from llave_jax.config import Config
from llave_jax.inputs.anyres import largest_image
from llave_jax.inputs.batch import Budget
from llave_jax.models.config import LlaveConfig

log = logging.getLogger(__name__)


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
    """What `data.packing_simulation.simulate` is told of `data.order`."""
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
