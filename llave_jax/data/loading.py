"""A row becomes token sequences. This runs in worker processes, which send arrays back.

Which rows are loaded when is `order.py`. Packing their sequences is `step_iterators.py`.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from llave_jax.common.content import short_hash
from llave_jax.data.order import HOLE
from llave_jax.data.sources import PairSource
from llave_jax.inputs.content import content_id
from llave_jax.inputs.sequence import SequenceBuilder, TokenSequence
from llave_jax.inputs.taps import Taps


class RowLoader:
    """`loader(row, turn) -> dict`: the pair's sequences as plain arrays, or why there are none.

    A loaded row has the keys "id", "row", "target_ids" (int32 [Z - 1]), "subset" (its number), "scores" (float32
    [Z - 1], nan where the row has none) and "sequences" (Z of `to_arrays`, None for a side that the pair lacks). A
    row that cannot be used has "id" and "skipped", the reason. HOLE has "hole". All have "pid", of the process that
    has loaded them.

    A row of several targets comes with the next one at each turn, from one that is drawn at random.

    Args:
      source: of the rows.
      builder: of their sequences.
      sides: Z: 2, and one for each hard negative that a step takes of a row.
      skip: rows that cannot be used have a reason; otherwise they raise ValueError.
      seed: of the first turn's targets.
    """

    def __init__(
        self, source: PairSource, builder: SequenceBuilder, sides: int, skip: bool, seed: int = 0
    ):
        self._source = source
        self._builder = builder
        self._sides = sides
        self._numbers = {name: number for number, name in enumerate(source.subsets)}
        self._skip = skip
        self._seed = seed

    def __call__(self, index: int | np.int64, turn: int) -> dict[str, Any]:
        """Loads one row.

        Args:
          index: of the row in the source, or HOLE.
          turn: how often the row has come before.

        Returns:
          What the class describes.

        Raises:
          ValueError: the row cannot be used, and `skip` is False.
        """
        # The process, for messages about one that stalls.
        loaded = {"pid": os.getpid()}
        if index == HOLE:
            return {**loaded, "hole": True}
        try:
            return {**loaded, **self._load(int(index), turn)}
        except ValueError as error:
            if not self._skip:
                raise
            return {**loaded, "id": self.name(int(index)), "skipped": str(error)}

    def name(self, index: int) -> str:
        """The name of a row.

        Args:
          index: of the row in the source.

        Returns:
          "SUBSET:ROW".
        """
        return self._source.pair_id(index)

    def _load(self, index: int, turn: int) -> dict[str, Any]:
        start = int.from_bytes(short_hash(f"{self._seed}:{index}".encode()), "little")
        pair = self._source.draw(index, start + turn, self._sides - 2)
        items = pair.sides(self._sides)
        sequences = [None if item is None else self._builder(item) for item in items]
        scores = np.full(self._sides - 1, np.nan, np.float32)
        given = pair.scores[: len(scores)]
        scores[: len(given)] = given
        return {
            "id": pair.id,
            "row": index,
            "target_ids": np.array([content_id(item) for item in items[1:]], np.int32),
            "subset": self._numbers[self._source.subset(index)],
            "scores": scores,
            "sequences": [None if s is None else to_arrays(s) for s in sequences],
        }


def to_arrays(sequence: TokenSequence) -> dict[str, Any]:
    """A sequence as a dictionary of arrays.

    grain pickles objects, but moves the arrays of a dictionary between processes in shared memory.

    Args:
      sequence: to take apart.

    Returns:
      What `to_sequence` reads.
    """
    return {
        "tokens": sequence.tokens,
        "crops": sequence.crops,
        "zero_crops": sequence.zero_crops,
        "num_cut": sequence.num_cut,
        "tap_index": sequence.taps.index,
        "tap_weight": sequence.taps.weight,
        "name": sequence.name,
    }


def to_sequence(arrays: dict[str, Any]) -> TokenSequence:
    """The sequence of a dictionary.

    Args:
      arrays: what `to_arrays` gave.

    Returns:
      The sequence.
    """
    return TokenSequence(
        tokens=arrays["tokens"],
        crops=arrays["crops"],
        taps=Taps(arrays["tap_index"], arrays["tap_weight"]),
        name=arrays["name"],
        zero_crops=tuple(arrays["zero_crops"]),
        num_cut=arrays["num_cut"],
    )
