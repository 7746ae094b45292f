"""What training pairs take, without decoding their images: tokens, crops, image sizes.

Owns measuring rows of a source. `inspection.py` shows the figures, `batch_plan.py` chooses the batch's
budget by them.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from llave_jax.common.progress import Progress
from llave_jax.data.packing_simulation import PairSizes
from llave_jax.data.sources import PairSource
from llave_jax.inputs.anyres import image_taps, num_crops
from llave_jax.inputs.images import image_size
from llave_jax.inputs.item import ImageLike, Pair, VideoLike
from llave_jax.inputs.sequence import VISUAL_SLOT, SequenceBuilder, TokenSequence, Visual

# Pairs that a sample of a whole source is made of.
_SAMPLE = 8192
# Rows that are read at the same time: reading waits for the disk or the network.
_THREADS = 16


class LayoutBuilder(SequenceBuilder):
    """Builds sequences whose crops have no pixels: [C, 0, 0, 3]; images are read to their header."""

    def _image(self, source: ImageLike, name: str) -> Visual:
        layout = (*image_size(source, name), self.spec.config, self.spec.crop)
        return Visual(_no_pixels(num_crops(*layout)), image_taps(*layout))

    def _zero_picture(self) -> Visual:
        return super()._zero_picture()._replace(crops=_no_pixels(1))

    def _video(self, source: VideoLike, name: str) -> Visual:
        visual = super()._video(source, name)
        return visual._replace(crops=_no_pixels(len(visual.crops)))


def _no_pixels(count: int) -> np.ndarray:
    return np.zeros((count, 0, 0, 3), np.uint8)


@dataclasses.dataclass(frozen=True)
class MeasuredSubset:
    """n pairs of one subset; Z sides each: query, target, negatives (0 where there is none).

    Attributes:
      rows: number of all rows of the subset.
      text: int [n, Z], tokens that are not visual.
      lengths: int [n, Z], all tokens, cut to the model's length.
      crops: int [n, Z].
      image_query: bool [n], the query has an image.
      words: int [n], of the query.
      taps: the most taps any visual token has.
      images: (width, height) of every image.
      targets: int [n], how many targets the row names.
      negatives: int [n], how many hard negatives it names.
      scored: pairs with a teacher's scores.
      unusable: pair id -> reason.
    """

    rows: int
    text: np.ndarray
    lengths: np.ndarray
    crops: np.ndarray
    image_query: np.ndarray
    words: np.ndarray
    taps: int
    images: list[tuple[int, int]]
    targets: np.ndarray
    negatives: np.ndarray
    scored: int
    unusable: dict[str, str]


class _MeasuredPair(NamedTuple):
    """Of one pair: by side tokens that are not visual, all tokens and crops; the rest as of
    `MeasuredSubset`."""

    text: list[int]
    lengths: list[int]
    crops: list[int]
    image_query: bool
    words: int
    taps: int
    images: list[tuple[int, int]]
    targets: int
    negatives: int
    scored: bool


def _measure_pair(pair: Pair, builder: LayoutBuilder, sides: int) -> _MeasuredPair:
    items = pair.sides(sides)
    sequences = [None if item is None else builder(item) for item in items]

    def by_side(size: Callable[[TokenSequence], Any]) -> list[int]:
        return [0 if sequence is None else int(size(sequence)) for sequence in sequences]

    return _MeasuredPair(
        text=by_side(lambda sequence: np.count_nonzero(sequence.tokens != VISUAL_SLOT)),
        lengths=by_side(len),
        crops=by_side(lambda sequence: len(sequence.crops)),
        image_query=any(image is not None for image in pair.query.images),
        words=len(pair.query.text.split()),
        taps=max((sequence.taps.width for sequence in sequences if sequence), default=1),
        images=[
            image_size(image, item.name)
            for item in items
            if item is not None
            for image in item.images
            if image is not None
        ],
        targets=pair.num_targets,
        negatives=len(pair.negatives),
        scored=bool(pair.scores),
    )


def measure_subset(
    source: PairSource, subset: str, builder: SequenceBuilder, count: int, sides: int = 2
) -> MeasuredSubset:
    """Measures at most `count` rows of a subset, evenly spread over it.

    Args:
      source: of the pairs.
      subset: one of `source.subsets`.
      builder: of the model's sequences.
      count: the most rows that are measured.
      sides: Z: 2, and one for each hard negative that a step takes of a row.

    Returns:
      What the rows take, and which of them cannot be used.
    """
    layout = LayoutBuilder(builder.tokenizer, builder.spec)
    indices = source.subsets[subset]
    chosen = indices[:: max(1, -(-len(indices) // count))]

    def measure(number: int, index: int) -> _MeasuredPair | str:
        try:  # over the rows, each of their targets has its turn
            return _measure_pair(source.draw(index, number), layout, sides)
        except ValueError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor(_THREADS) as threads:
        results = list(threads.map(measure, range(len(chosen)), chosen))
    pairs = [result for result in results if not isinstance(result, str)]

    def table(field: str) -> np.ndarray:
        return np.array([getattr(pair, field) for pair in pairs], int).reshape(len(pairs), sides)

    return MeasuredSubset(
        rows=len(indices),
        text=table("text"),
        lengths=table("lengths"),
        crops=table("crops"),
        image_query=np.array([pair.image_query for pair in pairs], bool),
        words=np.array([pair.words for pair in pairs], int),
        taps=max((pair.taps for pair in pairs), default=1),
        images=[size for pair in pairs for size in pair.images],
        targets=np.array([pair.targets for pair in pairs], int),
        negatives=np.array([pair.negatives for pair in pairs], int),
        scored=sum(pair.scored for pair in pairs),
        unusable={
            source.pair_id(index): result
            for index, result in zip(chosen, results, strict=True)
            if isinstance(result, str)
        },
    )


def measure_subsets(
    source: PairSource, builder: SequenceBuilder, rows_per_subset: int, sides: int = 2
) -> dict[str, MeasuredSubset]:
    """Measures rows of every subset that has rows.

    Args:
      source: of the pairs.
      builder: of the model's sequences.
      rows_per_subset: the most rows of each subset that are measured.
      sides: Z: 2, and one for each hard negative that a step takes of a row.

    Returns:
      Subset -> what its rows take.
    """
    measured = {}
    with Progress(len(source.subsets), "measuring", unit="subsets") as progress:
        for subset, indices in source.subsets.items():
            if len(indices):
                measured[subset] = measure_subset(source, subset, builder, rows_per_subset, sides)
            progress.update()
    return measured


def measure_source(
    source: PairSource,
    builder: SequenceBuilder,
    rows_per_subset: int = 100,
    *,
    sides: int = 2,
    weights: Mapping[str, float] | None = None,
) -> PairSizes:
    """Sizes of a sample of a source's pairs, drawn as training draws them.

    It depends on nothing but the data and the arguments.

    Args:
      source: of the pairs.
      builder: of the model's sequences.
      rows_per_subset: rows of each subset that are measured.
      sides: Z: 2, and one for each hard negative that a step takes of a row.
      weights: as in `Composition`.

    Returns:
      Sizes of 8192 pairs, drawn from the measured ones.

    Raises:
      ValueError: no measured row can be used.
    """
    measured = measure_subsets(source, builder, rows_per_subset, sides)
    return mixed_sizes(measured, _SAMPLE, weights=weights)


def mixed_sizes(
    measured: Mapping[str, MeasuredSubset],
    count: int,
    seed: int = 0,
    weights: Mapping[str, float] | None = None,
) -> PairSizes:
    """Sizes of pairs drawn from all rows, each subset standing for its measured ones.

    Args:
      measured: by subset.
      count: n, pairs to draw.
      seed: of the draw.
      weights: subset -> share of the pairs; None: as many as it has rows.

    Returns:
      Sizes of `count` pairs.

    Raises:
      ValueError: no measured row can be used.
    """
    parts = [
        (part, part.rows if weights is None else weights[name])
        for name, part in measured.items()
        if len(part.lengths) and (weights is None or name in weights)
    ]
    if not parts:
        reasons = [
            f"{name}: {why}" for part in measured.values() for name, why in part.unusable.items()
        ]
        raise ValueError(
            "none of the measured rows can be used"
            + "".join(f"; {reason}" for reason in reasons[:3])
        )
    rng = np.random.default_rng(seed)
    shares = np.array([share for _, share in parts], float)
    chosen = rng.choice(len(parts), size=count, p=shares / shares.sum())
    first = np.cumsum([0, *(len(part.lengths) for part, _ in parts)])
    sizes = np.diff(first)[chosen]
    indices = first[chosen] + (rng.random(count) * sizes).astype(np.int64)

    def joined(field: str) -> np.ndarray:
        return np.concatenate([getattr(part, field) for part, _ in parts])[indices]

    return PairSizes(
        joined("lengths"),
        joined("crops"),
        joined("image_query"),
        joined("words"),
        taps=max(part.taps for part, _ in parts),
    )
