"""What decides a batch's shape: rows, row length, crops and taps, from the sizes of measured pairs.

The user says how many pairs a step has and in how many micro-batches it goes through the model.
`measure.py` measures pairs, `packing_simulation.py` packs them on trial, and the plan is the smallest
budget with which the step has its pairs.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from llave_jax.data.packing_simulation import Packing, PairSizes, simulate
from llave_jax.inputs.anyres import largest_image
from llave_jax.inputs.batch import Budget
from llave_jax.inputs.config import InputSpec
from llave_jax.inputs.packing import Planner

# A row is about as long as four of the longest sequences: longer rows hardly pack better, and shorter
# ones leave gaps.
_SEQUENCES_A_ROW = 4
# Row lengths are multiples of the attention kernels' block, or of a smaller number where sequences are short.
_BLOCK, _SMALL_BLOCK = 128, 16
# Devices that a process packs for, in the simulation: a plan must not depend on the number of hosts.
_SIMULATED_SHARDS = 4
# Two budgets that are tried one after the other differ by this factor.
_STEP = 1.02
# What a budget must reach in the simulation. By modality, a pair that waits joins another pool, so only a
# small share of a step's pairs may wait. In the uniform order waiting changes nothing as long as it ends,
# so only pairs that wait twice are limited.
_REACHED, _MODALITY_CARRIED, _CARRIED_TWICE = 0.99, 0.05, 0.01


@dataclasses.dataclass(frozen=True)
class BatchSettings:
    """Numbers of a batch that are set by hand; None: planned.

    Attributes:
      row_length: tokens of a row.
      tokens_per_pair: room for tokens, in all rows, divided by the pairs asked for.
      crops_per_pair: room for crops, likewise.
      taps: taps that a visual token may have.
      fill: pairs that a step has, as expected, as a share of those asked for.
    """

    row_length: int | None = None
    tokens_per_pair: float | None = None
    crops_per_pair: float | None = None
    taps: int | None = None
    fill: float | None = None


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """The shape of a batch, and how full it is expected to be.

    Attributes:
      budget: of one shard of one micro-batch.
      pairs: of a step, over all devices and micro-batches, as they were asked for.
      micro_batches: parts in which a step goes through the model.
      fill: pairs that a step has on average, as a share of those asked for.
      order_slots: slots of a batch of the uniform order, which decide what row comes when.
      tokens: filled share of the rows' tokens, by simulation; None: all numbers were set by hand.
      crops: filled share of the room for crops, likewise.
      carried: share of the pairs that wait for a later batch, likewise.
    """

    budget: Budget
    pairs: int
    micro_batches: int
    fill: float
    order_slots: int
    tokens: float | None = None
    crops: float | None = None
    carried: float | None = None

    def __str__(self) -> str:
        budget = self.budget
        room = (
            f"{budget.rows} row(s) of {budget.row_length} tokens, {budget.crops} crops, "
            f"{budget.groups} pair slots and {budget.taps} tap(s)"
        )
        if self.tokens is None:
            return f"{room}; set by hand"
        return (
            f"{room}; expected: {self.fill:.1%} of the pairs, {self.tokens:.1%} of the tokens and "
            f"{self.crops:.1%} of the crops filled, {self.carried:.1%} of the pairs carried over"
        )

    def to_dict(self) -> dict[str, Any]:
        """The plan as a dictionary for JSON.

        Returns:
          Field -> value; the budget is a dictionary, too.
        """
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> BatchPlan:
        """The plan that a dictionary holds.

        Args:
          values: what `to_dict` gave.

        Returns:
          The plan.
        """
        return cls(**{**values, "budget": Budget(**values["budget"])})


def plan_batch(
    sizes: PairSizes,
    spec: InputSpec,
    *,
    pairs: int,
    shards: int,
    micro_batches: int,
    by_modality: bool = False,
    settings: BatchSettings | None = None,
    for_any_item: bool = True,
) -> BatchPlan:
    """The smallest budget with which a step has its pairs on average. Deterministic.

    Every pair of `sizes` fits. In the uniform order a batch has a quarter more slots than pairs asked
    for: pairs are taken as long as there is room, and where small ones come together there are more of
    them. By modality the order deals each device its pairs; there the budget is the smallest with which
    few of them are carried over.

    Args:
      sizes: of a sample of the data, as training draws it (`measure.measure_source`).
      spec: of the model, whose limits say what else may come.
      pairs: of a step, over all devices and micro-batches.
      shards: devices that the batch is split over.
      micro_batches: parts in which a step goes through the model.
      by_modality: pairs are dealt by `ModalityOrder`.
      settings: numbers that are set by hand.
      for_any_item: make room for the longest sequence, and where the sample has images for the largest
        image, that the model's inputs allow, whether the sample has one or not.

    Returns:
      The plan.

    Raises:
      ValueError: the pairs do not divide, or by the numbers set by hand a pair of `sizes` does not fit.
    """
    settings = settings or BatchSettings()
    parts = shards * micro_batches
    if pairs % parts:
        raise ValueError(
            f"{pairs} pairs a step do not divide over {shards} shards x {micro_batches} "
            f"micro-batches; make it a multiple of {parts}"
        )
    search = _Search(
        sizes, spec, pairs // parts, shards, micro_batches, by_modality, settings, for_any_item
    )
    return search.plan()


class _Search:
    """Looks for the smallest budget; its arguments are those of `plan_batch`."""

    def __init__(
        self,
        sizes: PairSizes,
        spec: InputSpec,
        pairs: int,
        shards: int,
        micro_batches: int,
        by_modality: bool,
        settings: BatchSettings,
        for_any_item: bool,
    ):
        """`pairs`: of one shard of one micro-batch."""
        self._settings = settings
        self._pairs, self._micro_batches = pairs, micro_batches
        self._step = pairs * shards * micro_batches
        self._sides = sizes.lengths.shape[1]
        self._all_shards, self._shards = shards, min(shards, _SIMULATED_SHARDS)
        self._dealing = {}
        if by_modality:
            self._dealing = {"group_size": pairs, "micro_batches": micro_batches}
        by_hand = settings.tokens_per_pair is not None and settings.crops_per_pair is not None
        # A user may set room for fewer tokens than the pairs take: batches are then always full.
        self._slots = pairs if by_hand and not by_modality else pairs + math.ceil(pairs / 4)

        self._longest = int(sizes.lengths.max())
        self._least_tokens = int(sizes.lengths.sum(1).max())
        self._least_crops = int(sizes.crops.sum(1).max())
        taps = sizes.taps
        if for_any_item:
            self._longest = max(self._longest, spec.config.max_length)
            limit = self._sides * spec.config.max_length
            self._least_tokens = _with_margin(self._least_tokens, self._longest, limit)
            if self._least_crops:
                crops, most_taps = largest_image(spec.config, spec.crop)
                limit = self._sides * crops
                self._least_crops = _with_margin(self._least_crops, crops, limit)
                taps = max(taps, most_taps)
        self._taps = settings.taps or taps

        self._mean_tokens = sizes.lengths.sum(1).mean()
        self._mean_crops = sizes.crops.sum(1).mean()
        self._different = np.unique(
            np.concatenate([sizes.lengths, sizes.crops.sum(1, keepdims=True)], axis=1), axis=0
        )
        # Enough pairs for a few dozen micro-batches of a process, or several steps by modality.
        batch = self._shards * pairs
        count = int(np.clip(48 * batch, 1024, max(6144, 8 * batch)))
        if by_modality:
            count = max(count, 8 * batch * micro_batches)
        self._sizes = sizes.take(np.random.default_rng(0).integers(len(sizes), size=count))
        self._simulate = functools.lru_cache(
            lambda budget: simulate(self._sizes, budget, self._shards, **self._dealing)
        )

    def plan(self) -> BatchPlan:
        """The plan of the smallest budget."""
        plan, per_shard = self._find()
        if per_shard > 1.02 * self._pairs and self._slots > self._pairs:
            # Room for the largest pair is also room for several others. It is not added to theirs.
            self._slots = self._pairs
            plan, _ = self._find()
        return plan

    def _find(self) -> tuple[BatchPlan, float]:
        """The plan of the smallest budget with the slots there are, and the pairs of a shard."""
        most = self._most()
        if not self._holds_all(self._budget(most, most)):
            for *lengths, crops in self._different.tolist():
                Planner(self._budget(most, most), 1).check(lengths, crops, 0, "a measured pair")
        ideal = self._simulate(self._budget(most, most))
        # What a user sets may leave too little room for all pairs.
        goal = _REACHED * min(self._pairs, self._per_shard(ideal))
        twice = max(_CARRIED_TWICE, ideal.carried_twice)
        carried = max(_MODALITY_CARRIED if self._dealing else 1.0, ideal.carried)

        def enough(tokens: int, crops: int) -> bool:
            budget = self._budget(tokens, crops)
            if not self._holds_all(budget):
                return False
            packing = self._simulate(budget)
            return (
                self._per_shard(packing) >= goal
                and packing.carried <= carried
                and packing.carried_twice <= twice
            )

        both = _smallest(lambda step: enough(step, step), most)
        tokens = _smallest(lambda step: enough(step, both), both)
        crops = _smallest(lambda step: enough(tokens, step), both)
        budget = self._budget(tokens, crops)
        packing = self._simulate(budget)
        per_shard = self._per_shard(packing)
        # By modality, pairs that are carried over join a later step: none is lost.
        fill = 1.0 if self._dealing else min(1.0, per_shard / self._pairs)
        plan = BatchPlan(
            budget=budget,
            pairs=self._step,
            micro_batches=self._micro_batches,
            fill=fill if self._settings.fill is None else self._settings.fill,
            order_slots=self._order_slots(),
            tokens=float(packing.tokens),
            crops=float(packing.crops),
            carried=packing.carried,
        )
        return plan, per_shard if not self._dealing else self._pairs

    def _order_slots(self) -> int:
        """As many as the step has, but for the rounding of each micro-batch's share."""
        spare = 0 if self._slots == self._pairs else math.ceil(self._step / 4)
        return -(-(self._step + spare) // self._all_shards) * self._all_shards

    def _budget(self, tokens: int, crops: int) -> Budget:
        """The budget whose room is `_STEP` to the power of these, times what pairs take on average."""
        settings, pairs = self._settings, self._pairs
        room = settings.tokens_per_pair or self._mean_tokens * _STEP**tokens
        rows, row_length = self._rows(math.ceil(pairs * room))
        num_crops = math.ceil(pairs * self._mean_crops * _STEP**crops)
        num_crops = max(num_crops, self._least_crops)
        if settings.crops_per_pair is not None:
            num_crops = math.ceil(pairs * settings.crops_per_pair)
        return Budget(rows, row_length, num_crops, self._slots, self._sides, self._taps)

    def _rows(self, tokens: int) -> tuple[int, int]:
        """Rows, and their length, that together have room for so many tokens."""
        length = self._settings.row_length
        if length is None:
            tokens = max(tokens, self._least_tokens)
            rows = max(1, round(tokens / (_SEQUENCES_A_ROW * self._longest)))
            block = _BLOCK if self._longest >= 4 * _BLOCK else _SMALL_BLOCK
            return rows, -(-tokens // (rows * block)) * block
        return max(1, math.ceil(tokens / length)), length

    def _most(self) -> int:
        """A step at which even pairs that are all as large as the largest fit."""
        *lengths, crops = self._different.max(0).tolist()
        ratios = [sum(lengths) / self._mean_tokens, crops / max(self._mean_crops, 1e-9)]
        return math.ceil(math.log(2 * max(ratios), _STEP))

    def _holds_all(self, budget: Budget) -> bool:
        """Whether every pair fits into an empty batch."""
        planner = Planner(budget, 1)
        try:
            for *lengths, crops in self._different.tolist():
                planner.check(lengths, crops, 0, "")
        except ValueError:
            return False
        return True

    def _per_shard(self, packing: Packing) -> float:
        """Pairs of a shard and micro-batch, on average."""
        return packing.pairs * self._slots


def _with_margin(sampled: int, item: int, limit: int) -> int:
    """Room for a pair that is a quarter larger than any of the sample, as far as one can be.

    Args:
      sampled: what the largest pair of the sample takes.
      item: what one item may take.
      limit: what a pair may take.
    """
    return max(sampled, item, min(limit, math.ceil(1.25 * sampled)))


def _smallest(enough: Callable[[int], bool], most: int) -> int:
    """The smallest of 0..most that is enough, by bisection; `most` is taken to be enough."""
    low, high = 0, most
    while low < high:
        middle = (low + high) // 2
        if enough(middle):
            high = middle
        else:
            low = middle + 1
    return high
