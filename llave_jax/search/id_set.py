"""A set of ids in eight bytes each, for questions that are nearly always answered with no."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from llave_jax.common.content import short_hash


class IdSet:
    """Ids by their hashes. It holds all ids that were added, and may claim one that was not."""

    def __init__(self):
        self._sorted = np.zeros(0, np.uint64)

    def add(self, ids: Iterable[str]) -> None:
        """Put ids into the set.

        Args:
          ids: any number of them.
        """
        # Timsort: the long part is in order already.
        self._sorted = np.sort(np.append(self._sorted, np.sort(_hashes(ids))), kind="stable")

    def among(self, ids: Sequence[str]) -> list[str]:
        """Those of some ids that may be in the set; all that are, and hardly any other.

        Args:
          ids: any number of them.

        Returns:
          Some of them, in their order.
        """
        if not len(ids) or not len(self._sorted):
            return []
        hashes = _hashes(ids)
        places = np.searchsorted(self._sorted, hashes).clip(max=len(self._sorted) - 1)
        return [id for id, there in zip(ids, self._sorted[places] == hashes, strict=True) if there]


def _hashes(ids: Iterable[str]) -> np.ndarray:
    return np.array(
        [int.from_bytes(short_hash(id.encode("utf-8", "surrogatepass")), "little") for id in ids],
        np.uint64,
    )
