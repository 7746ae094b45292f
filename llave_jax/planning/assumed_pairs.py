"""Pairs with the assumed sizes of MMEB (`workload.py`) and real pictures, for when the data is not at hand.

Photographs are cut from the two that scikit-learn ships, so that decoding does realistic work.
"""

from __future__ import annotations

import collections
import io

import numpy as np
import PIL.Image
import sklearn.datasets

from llave_jax.data.sources import PairSource
from llave_jax.inputs.item import Item, Pair
from llave_jax.planning import workload

TEXT = "a red tram stands beside the old harbour wall while two people walk their dog at dawn"
WORDS = TEXT.split()


class AssumedPairs(PairSource):
    """Pairs drawn from the assumed mix, in memory.

    Args:
      count: number of pairs.
      images: different files of each size, which the pairs share.
      shrink: divides the sides of pictures.
      seed: of the draw.
    """

    def __init__(self, count: int, images: int, shrink: int = 1, seed: int = 0):
        rng = np.random.default_rng(seed)
        self._shrink = shrink
        self.subsets = {"Mix": range(count)}
        rows = np.array([subset.rows for subset in workload.SUBSETS.values()], float)
        choices = rng.choice(len(rows), size=count, p=rows / rows.sum())
        photos = [PIL.Image.fromarray(p) for p in sklearn.datasets.load_sample_images().images]
        self._files: dict[tuple[int, int], list[bytes]] = collections.defaultdict(list)
        self._rows = []
        for choice in choices:
            subset = list(workload.SUBSETS.values())[choice]
            sides = [
                self._side(side, photos, images, rng) for side in (subset.query, subset.target)
            ]
            self._rows.append(sides)

    def _side(
        self, side: workload.Side, photos: list, images: int, rng: np.random.Generator
    ) -> tuple:
        mean = np.log(side.text) - workload.TEXT_SPREAD**2 / 2
        text = " ".join(rng.choice(WORDS, max(1, round(rng.lognormal(mean, workload.TEXT_SPREAD)))))
        if side.images is None:
            return text, None, 0
        sizes = [(w // self._shrink, h // self._shrink) for w, h, _ in side.images]
        size = sizes[rng.choice(len(sizes), p=[image[2] for image in side.images])]
        files = self._files[size]
        if len(files) < images:
            files.append(_photograph(photos[rng.integers(2)], size, rng))
        return text, size, int(rng.integers(len(files)))

    def __getitem__(self, index: int) -> Pair:
        query, target = (self._item(index, *side) for side in self._rows[index])
        return Pair(self.pair_id(index), query, target, subset="Mix")

    def _item(self, index: int, text: str, size: tuple[int, int] | None, file: int) -> Item:
        images = (self._files[size][file],) if size else ()
        return Item(text=("<|image_1|>\n" if images else "") + text, images=images, name=f"{index}")

    def pair_id(self, index: int) -> str:
        return f"Mix:{index}"

    def digest(self, index: int) -> int:
        return index

    def queries(self) -> tuple[np.ndarray, np.ndarray]:
        queries = [query for query, _ in self._rows]
        has_image = np.array([size is not None for _, size, _ in queries])
        words = np.array([len(text.split()) for text, _, _ in queries], np.int32)
        return has_image, words + has_image


def _photograph(photo: PIL.Image.Image, size: tuple[int, int], rng: np.random.Generator) -> bytes:
    """A part of a photograph at the wanted size, as JPEG."""
    width, height = size
    scale = max(width / photo.width, height / photo.height) * rng.uniform(1.0, 1.6)
    grown = photo.resize((round(photo.width * scale) + 1, round(photo.height * scale) + 1))
    x = int(rng.integers(grown.width - width + 1))
    y = int(rng.integers(grown.height - height + 1))
    buffer = io.BytesIO()
    grown.crop((x, y, x + width, y + height)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
