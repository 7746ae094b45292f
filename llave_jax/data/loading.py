"""A row becomes token sequences: in worker processes, which send arrays back.

Which rows are loaded when is `order.py`; packing their sequences is `step_iterators.py`.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from llave_jax.data.order import HOLE
from llave_jax.data.sources import PairSource
from llave_jax.inputs.content import content_id
from llave_jax.inputs.sequence import SequenceBuilder, TokenSequence
from llave_jax.inputs.taps import Taps


class RowLoader:
    """Row index -> the pair's sequences as plain arrays, or why there are none; runs in workers."""

    def __init__(self, source: PairSource, builder: SequenceBuilder, sides: int, skip: bool):
        self._source = source
        self._builder = builder
        self._sides = sides
        self._skip = skip

    def __call__(self, index: int | np.int64) -> dict[str, Any]:
        if index == HOLE:
            return {"hole": True}
        try:
            return self._load(int(index))
        except ValueError as error:
            if not self._skip:
                raise
            return {"id": self._source.pair_id(int(index)), "skipped": str(error)}

    def _load(self, index: int) -> dict[str, Any]:
        pair = self._source[index]
        items = pair.sides(self._sides)
        sequences = [None if item is None else self._builder(item) for item in items]
        return {
            "id": pair.id,
            "row": index,
            "target_ids": np.array([content_id(item) for item in items[1:]], np.int32),
            "sequences": [None if s is None else to_arrays(s) for s in sequences],
        }


def to_arrays(sequence: TokenSequence) -> dict[str, Any]:
    """grain moves arrays of dictionaries between processes in shared memory, objects it pickles."""
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
    return TokenSequence(
        tokens=arrays["tokens"],
        crops=arrays["crops"],
        taps=Taps(arrays["tap_index"], arrays["tap_weight"]),
        name=arrays["name"],
        zero_crops=tuple(arrays["zero_crops"]),
        num_cut=arrays["num_cut"],
    )
