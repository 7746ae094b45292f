"""The shape of a run's batches, and how many there are, from its config.

Owns what `config.batch` and `data.order` mean together. Numbers that the config leaves open are planned
by `data/batch_plan.py`; how pairs are packed into a batch is `inputs/packing.py`.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable

from llave_jax.config import Config
from llave_jax.data.batch_plan import BatchPlan, BatchSettings, plan_batch
from llave_jax.data.packing_simulation import PairSizes
from llave_jax.inputs.anyres import largest_image
from llave_jax.inputs.batch import Budget
from llave_jax.models.config import LlaveConfig

log = logging.getLogger(__name__)


def settings_of(config: Config) -> BatchSettings:
    """The numbers of a batch that the config sets by hand.

    Args:
      config: of the run.

    Returns:
      The numbers; None for what is to be planned.
    """
    batch = config.batch
    return BatchSettings(
        row_length=batch.row_length,
        tokens_per_pair=batch.tokens_per_pair,
        crops_per_pair=batch.crops_per_pair,
        taps=batch.taps,
        fill=batch.fill,
    )


def _set_by_hand(config: Config) -> bool:
    """Whether the config leaves nothing to plan."""
    settings = settings_of(config)
    return None not in (
        settings.row_length,
        settings.tokens_per_pair,
        settings.crops_per_pair,
        settings.taps,
        settings.fill,
    )


def make_plan(
    config: Config, llave_config: LlaveConfig, shards: int, measure: Callable[[], PairSizes]
) -> BatchPlan:
    """The shape of the run's batches: what the config sets by hand, and a plan of the rest.

    Args:
      config: of the run.
      llave_config: the model that is trained.
      shards: devices that the batch is split over.
      measure: gives the sizes of a sample of the data; it is not called if there is nothing to plan.

    Returns:
      The budget of one shard of one micro-batch, and the expected fill.

    Raises:
      ValueError: the config's numbers do not go together, or leave no room for an item that the model's
        inputs allow.
    """
    pairs_per_group(config, shards)
    if config.data.order == "modality":
        _check_modality(config)
    if _set_by_hand(config):
        plan = plan_by_hand(config, shards)
    else:
        plan = _plan_rest(config, llave_config, shards, measure())
    check_room(config, llave_config, plan.budget, shards)
    return plan


def _plan_rest(
    config: Config, llave_config: LlaveConfig, shards: int, sizes: PairSizes
) -> BatchPlan:
    """A plan of what the config does not set by hand."""
    return plan_batch(
        sizes,
        llave_config.input_spec,
        pairs=config.batch.pairs,
        shards=shards,
        micro_batches=config.batch.micro_batches,
        by_modality=config.data.order == "modality",
        settings=settings_of(config),
        # Where too large an item is skipped, the sample decides what a batch has room for.
        for_any_item=config.data.on_error == "raise",
    )


def plan_by_hand(config: Config, shards: int) -> BatchPlan:
    """The batch of a config that leaves nothing to plan, or only `batch.taps` and `batch.fill`.

    Arguments and errors are those of `batch_budget`.
    """
    batch = config.batch
    fill = 1.0 if batch.fill is None else batch.fill
    budget = batch_budget(config, shards)
    return BatchPlan(
        budget=budget,
        pairs=batch.pairs,
        micro_batches=batch.micro_batches,
        fill=fill,
        order_slots=shards * batch.micro_batches * budget.groups,
    )


def flags_by_hand(
    config: Config,
    llave_config: LlaveConfig,
    shards: int,
    plan: BatchPlan,
    measure: Callable[[], PairSizes],
) -> list[str]:
    """The flags that set a planned batch by hand: the same rows and crops.

    Set by hand, a batch has no slots for more pairs than asked for, so that its expected fill is another.

    Args:
      config: of the run, with its pairs and micro-batches.
      llave_config: the model that is trained.
      shards: devices that the batch is split over.
      plan: of the batch.
      measure: as for `make_plan`.

    Returns:
      `--config.batch.KEY=VALUE`, one for each number.
    """
    budget, group = plan.budget, plan.pairs // (shards * plan.micro_batches)

    def share(room: int) -> float:
        """Room divided by pairs, rounded so that it makes the same room again."""
        return math.floor(10_000 * room / group) / 10_000

    numbers = {
        "pairs": plan.pairs,
        "micro_batches": plan.micro_batches,
        "row_length": budget.row_length,
        "tokens_per_pair": share(budget.rows * budget.row_length),
        "crops_per_pair": share(budget.crops),
        "taps": budget.taps,
    }
    fill = config.batch.fill
    if fill is None:
        by_hand = config.copy_and_resolve_references()
        by_hand.batch.update(numbers)
        fill = _plan_rest(by_hand, llave_config, shards, measure()).fill
    numbers["fill"] = math.floor(1000 * fill) / 1000
    return [f"--config.batch.{key}={value}" for key, value in numbers.items()]


def total_steps(config: Config, rows: int, fill: float | None = None) -> int:
    """Optimiser steps of a run over `rows` pairs.

    By modality, an epoch has one step for each full batch, and at least one. In the uniform order it has one
    step for each batch, and more if batches are not expected to be full. A step holds each row at most once.

    Args:
      config: of the run.
      rows: pairs of the data.
      fill: share of `batch.pairs` that a step has on average, as planned; None: what the config says,
        or 1.

    Returns:
      The number of steps; `config.steps`, if that is set.

    Raises:
      ValueError: the fill is not a share, or `data.order` and `batch` do not go together.
    """
    batch, epochs = config.batch, config.data.epochs
    if fill is None:
        fill = 1.0 if batch.fill is None else float(batch.fill)
    if not 0 < fill <= 1:
        raise ValueError(f"batch.fill is {fill}; expected more than 0 and at most 1")
    if config.data.order == "modality":
        _check_modality(config)
        return config.steps or epochs * max(1, rows // batch.pairs)
    steps = math.ceil(rows * epochs / min(batch.pairs * fill, rows))
    if config.data.sub_batch == 1 and not config.data.weights:
        steps = max(steps, epochs * math.ceil(rows / batch.pairs))
    return config.steps or steps


def _check_modality(config: Config) -> None:
    """Refuses a `batch.fill` below 1 by modality, where a step takes all its pairs.

    Raises:
      ValueError: `batch.fill` says otherwise.
    """
    batch = config.batch
    if batch.fill in (None, 1):
        return
    parts, fill = batch.micro_batches, batch.fill
    room = [
        f"batch.{name} to {value / fill:.{digits}f}"
        for name, value, digits in (
            ("tokens_per_pair", batch.tokens_per_pair, 0),
            ("crops_per_pair", batch.crops_per_pair, 2),
        )
        if value is not None
    ]
    raise ValueError(
        f'batch.fill is {fill}: with data.order "modality" a step takes all of batch.pairs. For the same '
        f"room, set batch.pairs to about {round(batch.pairs * fill / parts) * parts}, "
        f"{', '.join(room)}{' ' if room else ''}and batch.fill to 1"
    )


def batch_budget(config: Config, shards: int) -> Budget:
    """The room of one shard of one micro-batch by the numbers that a config sets by hand.

    Args:
      config: with `batch.row_length`, `tokens_per_pair` and `crops_per_pair`.
      shards: devices that the batch is split over.

    Returns:
      The budget.

    Raises:
      ValueError: the step's pairs do not divide over shards and micro-batches, or `data.order` and
        `batch` do not go together.
    """
    batch, pairs = config.batch, pairs_per_group(config, shards)
    if config.data.order == "modality":
        # Slots to spare: a pair whose group does not fit joins another of its pool, or a later one.
        _check_modality(config)
        slots = pairs + math.ceil(pairs / 4)
    else:
        slots = pairs
    return Budget(
        rows=max(1, math.ceil(pairs * batch.tokens_per_pair / batch.row_length)),
        row_length=batch.row_length,
        crops=math.ceil(pairs * batch.crops_per_pair),
        groups=slots,
        sides=sides(config),
        taps=batch.taps or 1,
    )


def sides(config: Config) -> int:
    """Sequences of a pair.

    Args:
      config: of the run.

    Returns:
      Two, and one for each hard negative that a step takes of a row.
    """
    return 2 + (config.loss.negatives_per_row if config.loss.hard_negatives else 0)


def pairs_per_group(config: Config, shards: int) -> int:
    """Pairs of a step for each shard of each micro-batch.

    Args:
      config: of the run.
      shards: devices that the batch is split over.

    Returns:
      The number of pairs.

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
    """The arguments of `packing_simulation.simulate` that follow from `data.order`.

    Args:
      config: of the run.
      shards: devices that the batch is split over.

    Returns:
      `group_size` and `micro_batches` by modality; nothing in the uniform order.

    Raises:
      ValueError: as for `pairs_per_group`.
    """
    if config.data.order != "modality":
        return {}
    return {
        "group_size": pairs_per_group(config, shards),
        "micro_batches": config.batch.micro_batches,
    }


def check_budget(config: Config, llave_config: LlaveConfig, shards: int) -> None:
    """`check_room` of the budget that a config sets by hand.

    Args:
      config: of the run.
      llave_config: the model that is trained.
      shards: devices that the batch is split over.

    Raises:
      ValueError: as for `check_room` and `batch_budget`.
    """
    check_room(config, llave_config, batch_budget(config, shards), shards)


def check_room(config: Config, llave_config: LlaveConfig, budget: Budget, shards: int) -> None:
    """Checks before the first step that a batch has room for any item that the model's inputs allow.

    With `data.on_error` "skip", rows that are too large are left out and counted. A budget set by hand that
    is too small for the largest possible item is then only warned about; so is one that is too small for a
    pair of such items.

    Args:
      config: of the run.
      llave_config: the model that is trained.
      budget: of one shard of one micro-batch.
      shards: devices that the batch is split over.

    Raises:
      ValueError: with `data.on_error` "raise", no room for the longest sequence, for the image of most
        crops or for its taps; it says which number to change, and to what.
    """
    inputs = llave_config.inputs
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
    by_hand = any(value is not None for value in dataclasses.astuple(settings_of(config)))
    for problem in short if by_hand else ():
        log.warning("%s. Rows that are too large will be left out", problem)
    sides = budget.sides
    together = budget.rows * (budget.row_length // inputs.max_length)
    room_by_hand = (
        config.batch.tokens_per_pair is not None or config.batch.crops_per_pair is not None
    )
    if room_by_hand and not short and (together < sides or sides * crops > budget.crops):
        log.warning(
            "a device and micro-batch has %d row(s) of %d tokens and %d crops: too small for a pair whose "
            "items all have %d tokens and %d crops (batch.tokens_per_pair, batch.crops_per_pair)",
            *(budget.rows, budget.row_length, budget.crops, inputs.max_length, crops),
        )


def _share(crops: int, config: Config, shards: int) -> float:
    """The `batch.crops_per_pair` that gives a device room for so many crops."""
    pairs = config.batch.pairs / (shards * config.batch.micro_batches)
    return math.ceil(100 * crops / pairs) / 100
