"""Warnings about items that are longer than the model reads.

The first items are named, the others counted. Cutting itself is `sequence.py`. Whoever collects sequences
holds one `CutWarnings`, in one thread.
"""

from __future__ import annotations

import logging

from llave_jax.inputs.sequence import TokenSequence

NAMED_ITEMS = 10


class CutWarnings:
    """Names the first items that are cut, and counts those that follow.

    Args:
      items_repeat: a name that comes again is the same item, as in training's next epoch.
    """

    def __init__(self, *, items_repeat: bool = False):
        self._items_repeat = items_repeat
        self._named: list[str] = []
        self._unnamed = self._reported = 0

    def note(self, sequence: TokenSequence) -> None:
        """Warns about a sequence, or counts it, if the model's limits cut it.

        Args:
          sequence: any sequence, cut or not.
        """
        if not sequence.num_cut or (self._items_repeat and sequence.name in self._named):
            return
        if len(self._named) == NAMED_ITEMS:
            self._unnamed += 1
            if self._unnamed >= 10 * max(self._reported, 1):
                self.report()
            return
        self._named.append(sequence.name)
        logging.getLogger(__name__).warning(
            "%s: %d of %d tokens are cut off at the end, since the model reads no more; the embedding "
            "is read at the last one that remains",
            sequence.name or "item",
            sequence.num_cut,
            len(sequence) + sequence.num_cut,
        )

    def report(self) -> None:
        """Says how many sequences were cut beside the named ones, if there are more than last time."""
        if self._unnamed > self._reported:
            self._reported = self._unnamed
            logging.getLogger(__name__).warning(
                "%d more sequences were cut off at the end, since the model reads no more tokens",
                self._unnamed,
            )
