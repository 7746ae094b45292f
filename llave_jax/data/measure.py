"""What training pairs take, without decoding their images: tokens, crops, image sizes.

Owns measuring rows of a source; `mix.py` holds assumed sizes for when there is no data at hand, and
the simulation of packing that both feed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from llave_jax.data.pipeline import sides_of
from llave_jax.data.sources import PairSource
from llave_jax.inputs.anyres import image_taps, num_crops
from llave_jax.inputs.images import image_size
from llave_jax.inputs.item import ImageLike, Item, VideoLike
from llave_jax.inputs.sequence import VISUAL_SLOT, SequenceBuilder, TokenSequence, Visual
from llave_jax.planning.workload import PairSizes


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
class Measured:
    """n pairs of one subset; Z sides each: query, target, negatives (0 where there is none).

    Attributes:
      rows: rows the subset has in all.
      text: int [n, Z], tokens that are not visual.
      lengths: int [n, Z], all tokens, cut to the model's length.
      crops: int [n, Z].
      image_query: bool [n], the query has an image.
      words: int [n], of the query.
      taps: the most taps any visual token has.
      images: (width, height) of every image.
      with_negative: pairs that name a hard negative.
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
    with_negative: int
    unusable: dict[str, str]


def measure_subset(
    source: PairSource, subset: str, builder: SequenceBuilder, count: int, sides: int = 2
) -> Measured:
    """Measures at most `count` rows of a subset, evenly spread over it, with `sides` of each."""
    layout = LayoutBuilder(builder.tokenizer, builder.spec)
    indices = source.subsets[subset]
    chosen = indices[:: -(-len(indices) // count)]
    sequences: list[list[TokenSequence | None]] = []
    queries: list[Item] = []
    images: list[tuple[int, int]] = []
    unusable: dict[str, str] = {}
    with_negative = 0
    for index in chosen:
        try:
            pair = source[index]
            items = sides_of(pair, sides)
            sequences.append([None if item is None else layout(item) for item in items])
        except ValueError as error:
            unusable[source.pair_id(index)] = str(error)
            continue
        shown = [(i, item.name) for item in items if item for i in item.images if i is not None]
        images += [image_size(image, name) for image, name in shown]
        queries.append(pair.query)
        with_negative += bool(pair.negatives)

    def table(value: Callable[[TokenSequence], int]) -> np.ndarray:
        values = [[0 if s is None else value(s) for s in pair] for pair in sequences]
        return np.array(values, int).reshape(len(sequences), sides)

    return Measured(
        rows=len(indices),
        text=table(lambda s: np.count_nonzero(s.tokens != VISUAL_SLOT)),
        lengths=table(len),
        crops=table(lambda s: len(s.crops)),
        image_query=np.array([any(query.images) for query in queries], bool),
        words=np.array([len(query.text.split()) for query in queries], int),
        taps=max((s.taps.width for pair in sequences for s in pair if s), default=1),
        images=images,
        with_negative=with_negative,
        unusable=unusable,
    )


def mixed_sizes(measured: dict[str, Measured], count: int, seed: int = 0) -> PairSizes:
    """Sizes of `count` pairs drawn from all rows, each subset standing for its measured ones."""
    usable = {name: part for name, part in measured.items() if len(part.lengths)}
    rows = np.array([part.rows for part in usable.values()], float)
    rng = np.random.default_rng(seed)
    lengths, crops, images, words = [], [], [], []
    for choice in rng.choice(len(rows), size=count, p=rows / rows.sum()):
        part = list(usable.values())[choice]
        index = rng.integers(len(part.lengths))
        lengths.append(part.lengths[index])
        crops.append(part.crops[index])
        images.append(part.image_query[index])
        words.append(part.words[index])
    return PairSizes(np.array(lengths), np.array(crops), np.array(images), np.array(words))
