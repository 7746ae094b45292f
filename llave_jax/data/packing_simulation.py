"""How well pairs of given sizes fill batches of a given budget: packing, without the pairs' contents.

The sizes come from `measure.py`, or from `planning.workload` where the data is not at hand. What budget
to choose is `batch_plan.py`.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from llave_jax.data.modality_order import IMAGE, MIXED, TEXT, ModalityOrder
from llave_jax.inputs.batch import Budget
from llave_jax.inputs.packing import Placement, Planner, default_lookahead, place_dealt


@dataclasses.dataclass(frozen=True)
class PairSizes:
    """Sizes of n pairs of Z sides (query, target, hard negatives), and what `ModalityOrder` goes by.

    Attributes:
      lengths: int [n, Z], tokens; 0 for a side that a pair lacks.
      crops: int [n, Z].
      image_query: bool [n], the query has an image.
      words: int [n], of the query.
      taps: the most taps of any visual token.
    """

    lengths: np.ndarray
    crops: np.ndarray
    image_query: np.ndarray
    words: np.ndarray
    taps: int = 1

    def __len__(self) -> int:
        return len(self.lengths)

    def take(self, indices: np.ndarray) -> PairSizes:
        """Some of the pairs.

        Args:
          indices: int [m].

        Returns:
          The pairs at these indices, in their order.
        """
        return PairSizes(
            self.lengths[indices],
            self.crops[indices],
            self.image_query[indices],
            self.words[indices],
            self.taps,
        )


@dataclasses.dataclass(frozen=True)
class Packing:
    """How well pairs fill batches of a budget.

    Attributes:
      tokens: filled share of the rows' tokens.
      crops: filled share of the room for crops; 0 where there is none.
      pairs: filled share of the slots for pairs.
      carried: share of the pairs that did not fit into the batch they came for, but into a later one.
      carried_twice: share of the pairs that did not fit into two batches, or more.
      budget: of each shard of each batch.
      shards: S, of one process.
      batches: of each micro-batch that was filled, pair -> where it went.
      lengths: int [n, Z], tokens of the pairs.
    """

    tokens: float
    crops: float
    pairs: float
    carried: float
    carried_twice: float
    budget: Budget
    shards: int
    batches: list[dict[int, Placement]] = dataclasses.field(repr=False)
    lengths: np.ndarray = dataclasses.field(repr=False)

    @functools.cached_property
    def segment_ids(self) -> np.ndarray:
        """int32 [batches * S, rows, row length], segment ids as in `PackedBatch`."""
        rows, row_length = self.budget.rows, self.budget.row_length
        segment_ids = np.zeros((len(self.batches), self.shards, rows, row_length), np.int32)
        for batch, placed in zip(segment_ids, self.batches, strict=True):
            for pair, placement in placed.items():
                for length, span in zip(self.lengths[pair], placement.spans, strict=True):
                    row, start, segment = span
                    batch[placement.shard, row, start : start + length] = segment
        return segment_ids.reshape(-1, rows, row_length)


def simulate(
    sizes: PairSizes,
    budget: Budget,
    shards: int,
    *,
    group_size: int | None = None,
    micro_batches: int = 1,
    lookahead: int | None = None,
    skip_batches: int = 2,
) -> Packing:
    """Packs pairs as training does, in the order of `sizes` or by modality.

    Args:
      sizes: of the pairs; by modality they are one epoch.
      budget: of each shard of each micro-batch.
      shards: of one process, which packs by itself.
      group_size: by modality, pairs dealt to a shard of a micro-batch; None: the uniform order.
      micro_batches: of a step by modality.
      lookahead: as for `data.pipeline.train_iterator`.
      skip_batches: the first batches of the uniform order do not count, since nothing has waited for
        them. The last one does not count either: it is not full.

    Returns:
      How full the batches are.

    Raises:
      ValueError: a pair does not fit in an empty batch either, or there are too few pairs.
    """
    lookahead = lookahead or default_lookahead(budget, shards)
    planner = Planner(budget, shards)
    pairs = list(zip(sizes.lengths.tolist(), sizes.crops.sum(1).tolist(), strict=True))
    for lengths, crops in pairs:
        planner.check(lengths, crops, 0, "a measured pair")
    if group_size is None:
        batches, times_carried = _simulate_uniform(pairs, budget, shards, lookahead)
        batches = batches[skip_batches:]
    else:
        order = ModalityOrder(
            sizes.image_query,
            sizes.words,
            num_groups=micro_batches * shards,
            group_size=group_size,
            seed=0,
        )
        steps = range(order.batches_per_epoch if len(pairs) >= order.batch_size else 0)
        batches, times_carried = _simulate_modality(
            pairs, budget, shards, order, steps, micro_batches, lookahead
        )
    if not batches:
        raise ValueError("too few pairs to fill batches of this budget; give more")
    placed = np.concatenate([list(batch) for batch in batches])
    room = len(batches) * shards
    return Packing(
        tokens=sizes.lengths[placed].sum() / (room * budget.rows * budget.row_length),
        crops=sizes.crops[placed].sum() / (room * max(budget.crops, 1)),
        pairs=len(placed) / (room * budget.groups),
        carried=float(np.mean(times_carried[placed] > 0)),
        carried_twice=float(np.mean(times_carried[placed] > 1)),
        budget=budget,
        shards=shards,
        batches=batches,
        lengths=sizes.lengths,
    )


_Sizes = list[tuple[list[int], int]]  # (lengths, crops) of pairs
_Batches = list[dict[int, Placement]]  # as in Packing


def _simulate_uniform(
    pairs: _Sizes, budget: Budget, shards: int, lookahead: int
) -> tuple[_Batches, np.ndarray]:
    """The batches that were filled, and how often each pair had to wait."""
    stream = iter(range(len(pairs)))
    waiting: list[int] = []
    times_carried = np.zeros(len(pairs), int)
    batches: _Batches = []
    while True:
        planner = Planner(budget, shards)
        placed: dict[int, Placement] = {}
        for i in waiting:
            if placement := planner.place(*pairs[i]):
                placed[i] = placement
        waiting = [i for i in waiting if i not in placed]
        while not planner.full and len(waiting) < lookahead:
            i = next(stream, None)
            if i is None:
                return batches, times_carried
            if placement := planner.place(*pairs[i]):
                placed[i] = placement
            else:
                waiting.append(i)
        times_carried[waiting] += 1
        batches.append(placed)


def _simulate_modality(
    pairs: _Sizes,
    budget: Budget,
    shards: int,
    order: ModalityOrder,
    steps: range,
    micro_batches: int,
    lookahead: int,
) -> tuple[_Batches, np.ndarray]:
    """The batches of these steps, and how often each pair had to wait."""
    waiting: list[int] = []
    homes: dict[int, tuple[int, int]] = {}
    times_carried = np.zeros(len(pairs), int)
    batches: list[dict[int, Placement]] = []
    for number in steps:
        planners = [Planner(budget, shards) for _ in range(micro_batches)]
        step: _Batches = [{} for _ in planners]

        def add(pair: int, micro_batch: int, shard: int | None) -> bool:
            placement = planners[micro_batch].place(*pairs[pair], shard)  # noqa: B023
            if placement:
                step[micro_batch][pair] = placement  # noqa: B023
            return placement is not None

        modality = order.modality(number)
        free = [i for i in waiting if modality in (MIXED, IMAGE if order.has_image(i) else TEXT)]
        later = [i for i in waiting if i not in free]
        dealt = order.rows(number).reshape(micro_batches, shards, order.group_size)
        homes |= {int(pair): (m, s) for (m, s, _), pair in np.ndenumerate(dealt)}
        refused = place_dealt(
            free, dealt.reshape(-1).tolist(), homes.__getitem__, add, micro_batches, lookahead
        )
        times_carried[refused] += 1
        waiting = sorted(later + refused)
        batches += step
    return batches, times_carried
