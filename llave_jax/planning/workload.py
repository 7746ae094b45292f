"""The sizes of MMEB's training pairs, assumed for when the data is not at hand.

Owns one table: rows, image sizes and text lengths by subset. Batches that are planned without data, the
predicted speed and the packing figures in docs/scaling.md come from it.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import numpy as np

from llave_jax.data.packing_simulation import PairSizes
from llave_jax.inputs.anyres import image_taps, num_crops
from llave_jax.inputs.config import InputSpec

# (width, height, share) of the images of a source. COCO, VOC and ImageNet are published as files. The sizes
# of the others are those to which their papers or hosts say that images were scaled.
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
      text: mean tokens of its text, with the instruction and without the chat format.
      images: sizes of its image; None if it has none.
    """

    text: float
    images: Sizes | None = None


@dataclasses.dataclass(frozen=True)
class Subset:
    """One subset of the training data.

    Attributes:
      rows: number of its pairs; an epoch trains on each once.
      query, target: the sides of a pair.
    """

    rows: int
    query: Side
    target: Side


# The rows are those of the paper's recipe, at most 50 000 of each subset: 662 thousand together.
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
# Tokens of the chat format around a text, with the line break after an image.
CHAT_TOKENS = 24
# The lengths of a subset's texts are log-normal around their mean, with this deviation of the logarithm.
TEXT_SPREAD = 0.4


def sample_pairs(spec: InputSpec, count: int, seed: int = 0) -> PairSizes:
    """Sizes of pairs that are drawn uniformly from all rows of the table.

    Args:
      spec: how the model lays out its inputs.
      count: number of pairs.
      seed: of the draw.

    Returns:
      Sizes of `count` pairs.
    """
    rng = np.random.default_rng(seed)
    rows = np.array([subset.rows for subset in SUBSETS.values()], float)
    lengths, crops, texts = np.zeros((3, count, 2), np.int64)
    taps = 1
    for i, choice in enumerate(rng.choice(len(rows), size=count, p=rows / rows.sum())):
        subset = list(SUBSETS.values())[choice]
        for side, content in enumerate((subset.query, subset.target)):
            mean = np.log(content.text) - TEXT_SPREAD**2 / 2
            texts[i, side] = round(rng.lognormal(mean, TEXT_SPREAD))
            length = CHAT_TOKENS + texts[i, side]
            if content.images is not None:
                shares = [share for *_, share in content.images]
                width, height, _ = content.images[rng.choice(len(shares), p=shares)]
                cost = image_cost(width, height, spec)
                length, crops[i, side], taps = (
                    length + cost.tokens,
                    cost.crops,
                    max(taps, cost.taps),
                )
            lengths[i, side] = min(length, spec.config.max_length)
    # A word is about a token.
    return PairSizes(lengths, crops, crops[:, 0] > 0, texts[:, 0], taps)


class ImageCost(NamedTuple):
    """What one image needs.

    Attributes:
      tokens: visual tokens.
      crops: crops.
      taps: of one token.
    """

    tokens: int
    crops: int
    taps: int


@functools.lru_cache
def image_cost(width: int, height: int, spec: InputSpec) -> ImageCost:
    """What one image needs.

    Args:
      width, height: pixels of the image.
      spec: how the model lays out its inputs.

    Returns:
      Its tokens, crops and taps.
    """
    taps = image_taps(width, height, spec.config, spec.crop)
    crops = num_crops(width, height, spec.config, spec.crop)
    return ImageCost(taps.shape[0], crops, taps.width)
