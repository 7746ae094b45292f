"""The sizes of MMEB's training pairs, as assumed where the data itself is not at hand.

Owns one table: rows, image sizes and text lengths by subset. Budgets of batches, predicted speed
and the packing figures in docs/scaling.md all come from it.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np

from llave_jax.data.order import IMAGE, MIXED, TEXT, ModalityOrder
from llave_jax.inputs.anyres import num_crops, num_visual_tokens
from llave_jax.inputs.batch import Budget
from llave_jax.inputs.config import InputSpec
from llave_jax.inputs.packing import Placement, Planner, default_lookahead, place_dealt

# (width, height, share) of the image sizes of a source. COCO, VOC and ImageNet are published as
# files; the others are what their papers or hosts say they scaled images to.
Sizes = tuple[tuple[int, int, float], ...]
COCO: Sizes = (
    (640, 480, 0.45),
    (480, 640, 0.2),
    (640, 427, 0.2),
    (427, 640, 0.08),
    (640, 360, 0.04),
    (500, 375, 0.03),
)
IMAGENET: Sizes = (
    (500, 375, 0.5),
    (375, 500, 0.17),
    (500, 333, 0.13),
    (333, 500, 0.05),
    (500, 500, 0.05),
    (250, 200, 0.1),
)
VOC: Sizes = ((500, 375, 0.6), (375, 500, 0.25), (500, 333, 0.15))
NEWS: Sizes = ((768, 512, 0.7), (512, 768, 0.2), (768, 768, 0.1))
N24: Sizes = ((600, 400, 0.8), (400, 600, 0.2))
SCENES: Sizes = ((1024, 768, 0.5), (500, 375, 0.3), (300, 225, 0.2))
MEMES: Sizes = ((550, 400, 0.4), (400, 550, 0.3), (825, 550, 0.3))
SCANS: Sizes = ((1700, 2200, 0.85), (2200, 1700, 0.15))
POSTERS: Sizes = ((1000, 3000, 0.5), (800, 5000, 0.25), (1200, 900, 0.25))
CHARTS: Sizes = ((800, 557, 0.6), (850, 600, 0.3), (430, 600, 0.1))
NATURAL_PAIRS: Sizes = ((1024, 683, 0.5), (640, 480, 0.3), (600, 800, 0.2))
NIGHTS: Sizes = ((512, 512, 1.0),)
WIKI: Sizes = ((1024, 768, 0.6), (768, 1024, 0.3), (600, 600, 0.1))
# Boxes around objects, cut out of COCO images.
BOXES: Sizes = ((60, 80, 0.3), (150, 200, 0.3), (240, 180, 0.2), (400, 300, 0.15), (500, 420, 0.05))


@dataclasses.dataclass(frozen=True)
class Side:
    """One side of the pairs of a subset.

    Attributes:
      text: mean tokens of its text, instruction included, chat format not.
      images: sizes of its image; None: it has none.
    """

    text: float
    images: Sizes | None = None


@dataclasses.dataclass(frozen=True)
class Subset:
    rows: int
    query: Side
    target: Side


# The rows are those of the paper's recipe (at most 50 000 of each): 662 thousand together.
SUBSETS: dict[str, Subset] = {
    "ImageNet_1K": Subset(50_000, Side(8, IMAGENET), Side(5)),
    "N24News": Subset(48_988, Side(45, N24), Side(3)),
    "HatefulMemes": Subset(8_500, Side(18, MEMES), Side(2)),
    "VOC2007": Subset(7_844, Side(8, VOC), Side(3)),
    "SUN397": Subset(19_850, Side(8, SCENES), Side(4)),
    "OK-VQA": Subset(9_009, Side(22, COCO), Side(4)),
    "A-OKVQA": Subset(17_056, Side(24, COCO), Side(4)),
    "DocVQA": Subset(39_463, Side(22, SCANS), Side(8)),
    "InfographicsVQA": Subset(23_946, Side(26, POSTERS), Side(6)),
    "ChartQA": Subset(28_299, Side(24, CHARTS), Side(5)),
    "Visual7W": Subset(50_000, Side(20, COCO), Side(6)),
    "VisDial": Subset(50_000, Side(140), Side(9, COCO)),
    "CIRR": Subset(26_116, Side(28, NATURAL_PAIRS), Side(9, NATURAL_PAIRS)),
    "VisualNews_t2i": Subset(50_000, Side(36), Side(9, NEWS)),
    "VisualNews_i2t": Subset(50_000, Side(13, NEWS), Side(26)),
    "MSCOCO_t2i": Subset(50_000, Side(24), Side(9, COCO)),
    "MSCOCO_i2t": Subset(50_000, Side(12, COCO), Side(14)),
    "NIGHTS": Subset(15_941, Side(12, NIGHTS), Side(9, NIGHTS)),
    "WebQA": Subset(17_166, Side(34), Side(24, WIKI)),
    "MSCOCO": Subset(50_000, Side(18, COCO), Side(12, BOXES)),
}
# Tokens of the chat format around a text, and the line break after an image.
CHAT_TOKENS = 24
# Texts of a subset spread around their mean like a log-normal of this deviation.
TEXT_SPREAD = 0.4


@dataclasses.dataclass(frozen=True)
class PairSizes:
    """Sizes of n pairs, query and target, and what `ModalityOrder` goes by.

    Attributes:
      lengths: int [n, 2], tokens.
      crops: int [n, 2].
      image_query: bool [n], the query has an image.
      words: int [n], of the query.
    """

    lengths: np.ndarray
    crops: np.ndarray
    image_query: np.ndarray
    words: np.ndarray


def sample_pairs(spec: InputSpec, count: int, seed: int = 0) -> PairSizes:
    """Sizes of pairs drawn uniformly from all rows of the mix, as the model's inputs lay them out."""
    rng = np.random.default_rng(seed)
    rows = np.array([subset.rows for subset in SUBSETS.values()], float)
    lengths, crops, texts = np.zeros((3, count, 2), np.int64)
    for i, choice in enumerate(rng.choice(len(rows), size=count, p=rows / rows.sum())):
        subset = list(SUBSETS.values())[choice]
        for side, content in enumerate((subset.query, subset.target)):
            mean = np.log(content.text) - TEXT_SPREAD**2 / 2
            texts[i, side] = round(rng.lognormal(mean, TEXT_SPREAD))
            length = CHAT_TOKENS + texts[i, side]
            if content.images is not None:
                shares = [share for *_, share in content.images]
                width, height, _ = content.images[rng.choice(len(shares), p=shares)]
                visual, crops[i, side] = image_cost(width, height, spec)
                length += visual
            lengths[i, side] = min(length, spec.config.max_length)
    # A word is about a token.
    return PairSizes(lengths, crops, crops[:, 0] > 0, texts[:, 0])


@functools.lru_cache
def image_cost(width: int, height: int, spec: InputSpec) -> tuple[int, int]:
    """(tokens, crops) of an image."""
    layout = width, height, spec.config, spec.crop
    return num_visual_tokens(*layout), num_crops(*layout)


@dataclasses.dataclass(frozen=True)
class Packing:
    """How well pairs fill batches of a budget: shares of what the batches have room for.

    Attributes:
      tokens, crops, pairs: filled share of row tokens, crop slots, pair slots.
      carried, carried_twice: share of pairs that did not fit into one batch, or two, or more.
      segment_ids: int32 [all batches' shards, rows, row length], 0 for unused tokens.
    """

    tokens: float
    crops: float
    pairs: float
    carried: float
    carried_twice: float
    segment_ids: np.ndarray = dataclasses.field(repr=False, compare=False)


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
    """Packs pairs as training does.

    Args:
      shards: of one process, which packs by itself.
      group_size: by modality, pairs dealt to a shard of a micro-batch; None: the uniform order.
      micro_batches: of a step by modality.
      lookahead: as of `data.pipeline.train_iterator`.
      skip_batches: the first few batches of the uniform order, in which nothing has waited yet, do not
        count. The last one does not count either.

    Raises:
      ValueError: a pair does not fit in an empty batch either, or there are too few pairs.
    """
    lookahead = lookahead or default_lookahead(budget, shards)
    planner = Planner(budget, shards)
    pairs = [
        (lengths, sum(crops)) for lengths, crops in zip(sizes.lengths, sizes.crops, strict=True)
    ]
    for lengths, crops in pairs:
        planner.check(lengths, crops, 0, "a pair of the mix")
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
    return _shares(sizes, budget, shards, batches, times_carried)


_Sizes = list[tuple[np.ndarray, int]]  # (lengths, crops) of pairs
_Batches = list[dict[int, Placement]]  # pair -> place, of each micro-batch


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
    """As `_simulate_uniform`."""
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

        kind = order.kind(number)
        free = [i for i in waiting if kind in (MIXED, IMAGE if order.has_image(i) else TEXT)]
        later = [i for i in waiting if i not in free]
        dealt = order.rows(number).reshape(micro_batches, shards, order.group_size)
        homes |= {int(pair): (m, s) for (m, s, _), pair in np.ndenumerate(dealt)}
        refused = place_dealt(
            free, dealt.reshape(-1).tolist(), homes.get, add, micro_batches, lookahead
        )
        times_carried[refused] += 1
        waiting = sorted(later + refused)
        batches += step
    return batches, times_carried


def _shares(
    sizes: PairSizes,
    budget: Budget,
    shards: int,
    batches: list[dict[int, Placement]],
    times_carried: np.ndarray,
) -> Packing:
    if not batches:
        raise ValueError("too few pairs to fill batches of this budget; give more")
    segment_ids = np.zeros((len(batches), shards, budget.rows, budget.row_length), np.int32)
    for batch, placed in zip(segment_ids, batches, strict=True):
        for pair, placement in placed.items():
            for length, span in zip(sizes.lengths[pair], placement.spans, strict=True):
                row, start, segment = span
                batch[placement.shard, row, start : start + length] = segment
    placed = np.concatenate([list(batch) for batch in batches])
    room = len(batches) * shards
    return Packing(
        tokens=float(np.mean(segment_ids > 0)),
        crops=sizes.crops[placed].sum() / (room * budget.crops),
        pairs=len(placed) / (room * budget.groups),
        carried=float(np.mean(times_carried[placed] > 0)),
        carried_twice=float(np.mean(times_carried[placed] > 1)),
        segment_ids=segment_ids.reshape(-1, budget.rows, budget.row_length),
    )
