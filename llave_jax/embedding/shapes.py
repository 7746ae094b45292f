"""The few shapes that embedding compiles (the ladder), and how sequences go into batches of them.

A shape is a `Budget`. The ladder follows from the model's input settings and the tokens of a batch alone, so that
all of it can be compiled before the first item comes. Reading items is `reading.py`, running the batches
is `embedder.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from llave_jax.inputs import anyres, video
from llave_jax.inputs.batch import Budget, PackedBatch
from llave_jax.inputs.config import InputSpec
from llave_jax.inputs.packing import Packer, Planner
from llave_jax.inputs.sequence import TokenSequence

# Many texts share rows of these lengths, and of the model's. Attention costs as much as a row is long.
TEXT_ROWS = (128, 512)
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
_TOKENS_OF_A_CALL = 128
# A batch is closed after so many sequences that have no room in it.
_REFUSALS = 32
# In bulk, so many of the largest batches may wait, from which the next batch is chosen.
_WAITING_BATCHES = 4


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
    for length in {*(n for n in TEXT_ROWS if n < longest), longest}:
        yield _texts(max(1, tokens_per_batch // length), length)


def _texts(rows: int, length: int) -> Budget:
    shortest = _SHORTEST_SEQUENCE if length <= 256 else 64
    return Budget(rows, length, 0, rows * max(1, length // shortest), sides=1)


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
        if rows >= 32:  # short rows, of which a server's clients seldom fill all
            yield images(rows // 8, length)
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


class Costs(NamedTuple):
    """What a model's work costs, in tokens of the language model's layers.

    Attributes:
      crop: a crop in the vision tower.
      key: what a token costs more for each token of its row.
    """

    crop: float
    key: float


class BatchShapes:
    """Puts sequences into batches of the ladder's shapes.

    Args:
      spec: the model's input settings.
      num_shards: S of this process's batches.
      tokens_per_batch: tokens of a shard.
      costs: of the model.
    """

    def __init__(
        self, spec: InputSpec, num_shards: int, tokens_per_batch: int, costs: Costs
    ) -> None:
        self.ladder = ladder(spec, tokens_per_batch)
        self._spec = spec
        self._num_shards = num_shards
        self._costs = costs
        self.tokens = num_shards * max(b.rows * b.row_length for b in self.ladder)

    def pack(self, sequences: Sequence[TokenSequence]) -> IndexedBatch:
        """One batch, of the shape that is used best: the work of what it holds for the work that it takes.

        The first sequence is in it, and of the others, in order, those that have room. A batch whose first
        sequence is a text has texts only, so that these need not wait for images; one that begins with an
        image may hold texts as well.

        Args:
          sequences: at least one, of which as many as fit are taken.

        Returns:
          The batch, whose indices are those of `sequences`.

        Raises:
          ValueError: there are no sequences, or the first one fits into no shape.
        """
        if not sequences:
            raise ValueError("a batch needs at least one sequence")
        waiting = [_Waiting.of(number, sequence) for number, sequence in enumerate(sequences)]
        return self._pack(waiting, len(waiting))[0]

    def batches(
        self, sequences: Iterable[tuple[int, TokenSequence]], batch_size: int | None = None
    ) -> Iterator[IndexedBatch]:
        """Batches of any number of sequences. A bounded number of them waits at a time.

        Args:
          sequences: (index of the item, its sequence), read as they are needed.
          batch_size: at most so many items for each shard of a batch; None: as many as fit.

        Yields:
          Batches that hold each sequence once.
        """
        limit = None if batch_size is None else batch_size * self._num_shards
        waiting: list[_Waiting] = []
        tokens = 0
        for index, sequence in sequences:
            waiting.append(_Waiting.of(index, sequence))
            tokens += len(sequence)
            if tokens >= _WAITING_BATCHES * self.tokens or len(waiting) == limit:
                batch, waiting = self._pack(waiting, limit or len(waiting))
                yield batch
                tokens = sum(entry.size.length for entry in waiting)
        while waiting:
            batch, waiting = self._pack(waiting, limit or len(waiting))
            yield batch

    def _pack(self, waiting: list[_Waiting], limit: int) -> tuple[IndexedBatch, list[_Waiting]]:
        """One batch with the first of those that wait, and those that it does not hold."""
        first = waiting[0].size
        all_work = sum(self._work(*entry.size[:2]) for entry in waiting)
        best: tuple[float, Budget, list[int]] | None = None
        for budget in reversed(self.ladder):
            if bool(budget.crops) != bool(first.crops) or not first.fits(budget):
                continue
            room = self._num_shards * self._work(budget.rows * budget.row_length, budget.crops)
            cost = self._num_shards * self._cost(budget)
            if best is not None and min(all_work, room) / cost <= best[0]:
                continue
            taken = self._choose(budget, waiting, limit)
            value = sum(self._work(*waiting[place].size[:2]) for place in taken) / cost
            if best is None or value > best[0]:
                best = value, budget, taken
        if best is None:
            name = waiting[0].sequence.name or "item"
            raise ValueError(f"{name}: {first} fits into no shape of {self.ladder}")
        _, budget, taken = best
        packer = Packer(budget, self._num_shards, self._spec.crop)
        for place in taken:
            packer.add([waiting[place].sequence], str(waiting[place].index))
        packed, ids = packer.emit()
        indices = [[int(index) if index else -1 for index in shard] for shard in ids]
        held = set(taken)
        left = [entry for place, entry in enumerate(waiting) if place not in held]
        return IndexedBatch(packed, np.array(indices, np.int32)), left

    def _work(self, tokens: int, crops: int) -> float:
        return tokens + self._costs.crop * crops

    def _cost(self, budget: Budget) -> float:
        attention = self._costs.key * budget.row_length
        tokens = budget.rows * budget.row_length
        return tokens * (1 + attention) + self._costs.crop * budget.crops + _TOKENS_OF_A_CALL

    def _choose(self, budget: Budget, waiting: Sequence[_Waiting], limit: int) -> list[int]:
        """The places of those that have room in a shape."""
        planner = Planner(budget, self._num_shards)
        taken, refused = [], 0
        for place, (_, _, size) in enumerate(waiting):
            if len(taken) == limit or refused == _REFUSALS or planner.full:
                break
            if size.fits(budget) and planner.place([size.length], size.crops) is not None:
                taken.append(place)
            else:
                refused += 1
        return taken


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


class _Waiting(NamedTuple):
    """A sequence that has no batch yet."""

    index: int
    sequence: TokenSequence
    size: _Size

    @staticmethod
    def of(index: int, sequence: TokenSequence) -> _Waiting:
        return _Waiting(index, sequence, _Size.of(sequence))


def _power_of_two(n: int) -> int:
    """The next power of two from n on."""
    return 1 << max(0, n - 1).bit_length()
