"""The few shapes that embedding compiles (the ladder), and how sequences go into batches of them.

A shape is a `Budget`. The ladder follows from the model's input settings and the tokens of a batch alone, so that
all of it can be compiled before the first item comes. Reading items is `reading.py`, running the batches
is `embedder.py`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llave_jax.inputs import anyres, video
from llave_jax.inputs.batch import Budget, PackedBatch
from llave_jax.inputs.config import InputSpec
from llave_jax.inputs.packing import Packer, Planner
from llave_jax.inputs.sequence import TokenSequence

# Texts in bulk: (longest text, row length). Attention costs as much as a row is long, and texts of at
# most half a row fill it well.
TEXT_ROWS = ((64, 128), (512, 512))
# A single text has a row of its own: these lengths, and the model's.
SINGLE_TEXT_ROWS = (64, 256, 1024, 4096)
# Few texts share batches of these: (rows, row length).
FEW_TEXTS = ((4, 128), (32, 128), (4, 512))
# Images share rows of at least this length, if the model and the batch have room for them: of the
# usual images 1 to 2 fill one.
IMAGE_ROW = 4096
# The chat format alone has more tokens than this.
_SHORTEST_SEQUENCE = 16
# What a batch costs beside its tokens, in tokens: the parameters are read once.
_TOKENS_OF_A_CALL = 64
# A batch is closed after so many sequences that have no room in it.
_REFUSALS = 32


class IndexedBatch(NamedTuple):
    """A batch, and which items it holds.

    Attributes:
      packed: the arrays.
      indices: int32 [S, G], index of the item in each slot; -1 where a slot is empty.
    """

    packed: PackedBatch
    indices: np.ndarray


def ladder(spec: InputSpec, tokens_per_batch: int) -> tuple[Budget, ...]:
    """The shapes of all batches of a model, the smallest first. Each sequence fits into one of them.

    Args:
      spec: the model's input settings.
      tokens_per_batch: tokens of a shard; a sequence that is longer has a batch of its own.

    Returns:
      What one shard has room for, in each shape.
    """
    longest = _power_of_two(spec.config.max_length)
    found = {*_text_shapes(longest, tokens_per_batch), *_image_shapes(spec, tokens_per_batch)}
    return tuple(sorted(found, key=lambda b: (b.rows * b.row_length, b.crops, b.groups, b.taps)))


def _text_shapes(longest: int, tokens_per_batch: int) -> Iterator[Budget]:
    for length in {*(n for n in SINGLE_TEXT_ROWS if n < longest), longest}:
        yield _texts(1, length)
    for rows, length in FEW_TEXTS:
        if length <= longest and rows * length <= tokens_per_batch:
            yield _texts(rows, length)
    for budget in _full_texts(longest, tokens_per_batch):
        yield budget[1]


def _texts(rows: int, length: int) -> Budget:
    shortest = _SHORTEST_SEQUENCE if length <= 256 else 64
    return Budget(rows, length, 0, rows * max(1, length // shortest), sides=1)


def _full_texts(longest: int, tokens_per_batch: int) -> list[tuple[int, Budget]]:
    """(longest text, full batch) of each kind of rows."""
    kinds = [(text, row) for text, row in TEXT_ROWS if row < longest] + [(longest, longest)]
    return [(text, _texts(max(1, tokens_per_batch // row), row)) for text, row in kinds]


def _image_shapes(spec: InputSpec, tokens_per_batch: int) -> Iterator[Budget]:
    config, crop = spec.config, spec.crop
    longest = _power_of_two(config.max_length)
    most_crops, image_taps = anyres.largest_image(config, crop)

    def images(rows: int, length: int) -> Budget:
        # A crop mostly has all its patches as tokens; what is cut off as padding is left to rounding.
        crops = rows * max(1, round(length / crop.num_patches))
        slots = rows * max(1, math.ceil(2 * length / crop.num_patches))
        return Budget(rows, length, crops, slots, sides=1, taps=image_taps)

    # One row: for an image of one crop with a short text, for twice and four times that, and the longest.
    first = _power_of_two(crop.num_patches + 65)
    for length in {*(n for n in (first, 2 * first, 4 * first) if n < longest), longest}:
        yield images(1, length)
    length = min(IMAGE_ROW, longest)
    while length <= longest:
        if (rows := tokens_per_batch // length) > 1:
            yield images(rows, length)
        length *= 2
    # Videos, whose frames have few tokens each.
    frame = video.video_taps(1, config, crop)
    frames = math.ceil(config.max_length / max(1, frame.shape[0] - 1))
    file_frames = min(frames, config.max_frames or frames)
    # The most crops that `max_length` tokens can look at: each image has at least its base crop's tokens.
    most = max(frames, math.ceil(config.max_length / crop.num_patches) * most_crops)
    for crops in (file_frames, most):
        slots = max(1, math.ceil(2 * longest / crop.num_patches))
        taps = max(image_taps, frame.width)
        yield Budget(1, longest, crops, slots, sides=1, taps=taps)


class BatchShapes:
    """Puts sequences into batches of the ladder's shapes.

    Args:
      spec: the model's input settings.
      num_shards: S of this process's batches.
      tokens_per_batch: tokens of a shard.
      crop_cost: what a crop costs in the vision tower, in tokens of the language model.
    """

    def __init__(
        self, spec: InputSpec, num_shards: int, tokens_per_batch: int, crop_cost: float
    ) -> None:
        self.ladder = ladder(spec, tokens_per_batch)
        self._spec = spec
        self._num_shards = num_shards
        self._crop_cost = crop_cost
        longest = _power_of_two(spec.config.max_length)
        self._full_texts = _full_texts(longest, tokens_per_batch)
        # Images in bulk: full batches first, then what holds those that do not fit there.
        images = [budget for budget in self.ladder if budget.crops]
        full = sorted((b for b in images if b.rows > 1), key=lambda b: b.row_length)
        self._full_images = full + [b for b in images if b.rows == 1 and b.row_length == longest]

    def pack(self, sequences: Sequence[TokenSequence], most: int | None = None) -> IndexedBatch:
        """One batch, of the shape that is used best: the work of what it holds for the work that it takes.

        The first sequence is in it, and of the others, in order, those that have room. A batch whose first
        sequence is a text has texts only, so that these need not wait for images; one that begins with an
        image may hold texts as well.

        Args:
          sequences: at least one, of which as many as fit are taken.
          most: at most so many are taken for each shard; None: no limit.

        Returns:
          The batch, whose indices are those of `sequences`.

        Raises:
          ValueError: there are no sequences, or the first one fits into no shape.
        """
        if not sequences:
            raise ValueError("a batch needs at least one sequence")
        has_crops = len(sequences[0].crops) > 0
        limit = len(sequences) if most is None else min(len(sequences), most * self._num_shards)
        sizes = [_Size.of(sequence) for sequence in sequences]
        works = [size.length + self._crop_cost * size.crops for size in sizes]
        all_work = sum(sorted(works, reverse=True)[:limit])
        best: tuple[float, Budget, list[int]] | None = None
        for budget in reversed(self.ladder):
            if bool(budget.crops) != has_crops or not sizes[0].fits(budget):
                continue
            room = self._num_shards * self._work(budget)
            cost = room + self._num_shards * _TOKENS_OF_A_CALL
            if best is not None and min(all_work, room) / cost <= best[0]:
                continue
            taken = self._choose(budget, sizes, limit)
            value = sum(works[index] for index in taken) / cost
            if best is None or value > best[0]:
                best = value, budget, taken
        if best is None:
            raise ValueError(
                f"{sequences[0].name or 'item'}: {sizes[0]} fits into no shape of {self.ladder}"
            )
        _, budget, taken = best
        packer = self._packer(budget)
        for index in taken:
            packer.add([sequences[index]], str(index))
        return _emit(packer)

    def batches(
        self, sequences: Iterable[tuple[int, TokenSequence]], batch_size: int | None = None
    ) -> Iterator[IndexedBatch]:
        """Batches of many sequences, in bulk: full ones as they fill up, and in the end the rest.

        Args:
          sequences: (index of the item, its sequence), read as they are needed.
          batch_size: at most so many items a shard; None: as many as fit.

        Yields:
          Batches that hold each sequence once.
        """
        packers: dict[Budget, Packer] = {}
        waiting: dict[Budget, list[tuple[int, TokenSequence]]] = {}
        limit = None if batch_size is None else batch_size * self._num_shards
        for index, sequence in sequences:
            budget = self._full(sequence)
            rest = waiting.setdefault(budget, [])
            if limit is not None:
                rest.append((index, sequence))
                if len(rest) == limit:
                    yield from self._all(rest, batch_size)
                    rest.clear()
                continue
            if budget not in packers:
                packers[budget] = self._packer(budget)
            if not packers[budget].add([sequence], str(index)):
                yield _emit(packers[budget])
                rest.clear()
                packers[budget].add([sequence], str(index))
            rest.append((index, sequence))
        # Their arrays are not needed for what is left.
        packers.clear()
        for images in (False, True):
            kinds = (rest for budget, rest in waiting.items() if bool(budget.crops) == images)
            yield from self._all(list(itertools.chain.from_iterable(kinds)), batch_size)

    def _all(
        self, sequences: list[tuple[int, TokenSequence]], batch_size: int | None
    ) -> Iterator[IndexedBatch]:
        """Batches of all of these."""
        while sequences:
            packed, indices = self.pack([sequence for _, sequence in sequences], batch_size)
            items = np.array([index for index, _ in sequences], np.int32)
            yield IndexedBatch(packed, np.where(indices >= 0, items[indices], -1).astype(np.int32))
            taken = set(indices[indices >= 0].tolist())
            sequences = [pair for place, pair in enumerate(sequences) if place not in taken]

    def _work(self, budget: Budget) -> float:
        return budget.rows * budget.row_length + self._crop_cost * budget.crops

    def _choose(self, budget: Budget, sizes: Sequence[_Size], limit: int) -> list[int]:
        """The sequences that have room in a shape."""
        planner = Planner(budget, self._num_shards)
        taken, refused = [], 0
        for index, size in enumerate(sizes):
            if len(taken) == limit or refused == _REFUSALS or planner.full:
                break
            if size.fits(budget) and planner.place([size.length], size.crops) is not None:
                taken.append(index)
            else:
                refused += 1
        return taken

    def _packer(self, budget: Budget) -> Packer:
        return Packer(budget, self._num_shards, self._spec.crop)

    def _full(self, sequence: TokenSequence) -> Budget:
        """The batch that sequences like this one fill."""
        size = _Size.of(sequence)
        if not size.crops:
            return next(budget for text, budget in self._full_texts if size.length <= text)
        return next(budget for budget in self._full_images if size.fits(budget))


class _Size(NamedTuple):
    """What a sequence needs."""

    length: int
    crops: int
    taps: int

    @staticmethod
    def of(sequence: TokenSequence) -> _Size:
        return _Size(len(sequence), len(sequence.crops), sequence.taps.width)

    def fits(self, budget: Budget) -> bool:
        return (
            self.length <= budget.row_length
            and self.crops <= budget.crops
            and (self.taps <= budget.taps or not self.crops)
        )


def _emit(packer: Packer) -> IndexedBatch:
    packed, ids = packer.emit()
    indices = [[int(index) if index else -1 for index in shard] for shard in ids]
    return IndexedBatch(packed, np.array(indices, np.int32))


def _power_of_two(n: int) -> int:
    """The next power of two from n on."""
    return 1 << max(0, n - 1).bit_length()
