"""The list of rows a run could not use, kept in a file, and the limit at which a run stops.

Owns counting and writing. Why a row cannot be used is said by whoever reads it.
"""

from __future__ import annotations

import collections
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from llave_jax.common.directories import make_directory
from llave_jax.common.files import naming_full_disk, write_text
from llave_jax.data.rows import EMPTY_SIDE


class TooManySkips(RuntimeError):
    """More rows were skipped than the run allows. The message names subsets, and the file that lists the rows.

    Args:
      pair_ids: "SUBSET:ROW" of each skipped row.
      limit: how many are allowed.
      listed_in: the file.
    """

    def __init__(self, pair_ids: Iterable[str], limit: int, listed_in: str | os.PathLike):
        pair_ids = list(pair_ids)
        super().__init__(
            f"{len(pair_ids)} rows could not be used, more than the {limit} allowed: "
            f"{by_subset(pair_ids)}. They are listed in {listed_in}. Repair the data, or raise "
            "max_skip_share"
        )


def by_subset(pair_ids: Iterable[str]) -> str:
    """How many pairs each subset has.

    Args:
      pair_ids: "SUBSET:ROW" each.

    Returns:
      Such as "WebQA 12, CIRR 3", the largest number first.
    """
    counts = collections.Counter(pair_id.rpartition(":")[0] for pair_id in pair_ids)
    return ", ".join(f"{subset} {count}" for subset, count in counts.most_common())


def listed(rows: Mapping[str, Sequence[int]]) -> list[str]:
    """Pair ids of rows.

    Args:
      rows: subset -> row numbers.

    Returns:
      "SUBSET:ROW" each.
    """
    return [f"{subset}:{row}" for subset, numbers in rows.items() for row in numbers]


class SkipLog:
    """Counts skipped rows and writes each of them once: one `{"subset", "row", "reason"}` a line.

    A file that exists is continued, so that a resumed run neither repeats nor forgets a row.

    Args:
      path: of the file, which is made with its first line.
      limit: how many rows may be skipped.
      left_out: subset -> rows that a source leaves out by itself (`PairSource.left_out`). They are
        listed, but do not count.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        limit: int,
        left_out: Mapping[str, Sequence[int]] | None = None,
    ):
        self.path = Path(path)
        self.limit = limit
        make_directory(self.path.parent)
        before, expected = dict.fromkeys(self._read()), dict.fromkeys(listed(left_out or {}))
        self._skipped = {pair_id: None for pair_id in before if pair_id not in expected}
        self._write({pair_id: EMPTY_SIDE for pair_id in expected if pair_id not in before})

    def __len__(self) -> int:
        return len(self._skipped)

    @property
    def pair_ids(self) -> tuple[str, ...]:
        """The skipped rows. Those that the source left out are not among them."""
        return tuple(self._skipped)

    def record(self, pair_id: str, reason: str) -> None:
        """Counts and writes a row, unless it was skipped before.

        Args:
          pair_id: "SUBSET:ROW".
          reason: why it cannot be used.

        Raises:
          TooManySkips: this row is one too many.
        """
        if pair_id in self._skipped:
            return
        self._skipped[pair_id] = None
        self._write({pair_id: reason})
        logging.getLogger(__name__).warning("skipped %s: %s", pair_id, reason)
        if len(self._skipped) > self.limit:
            raise TooManySkips(self._skipped, self.limit, self.path)

    def _write(self, reasons: Mapping[str, str]) -> None:
        if not reasons:
            return
        lines = []
        for pair_id, reason in reasons.items():
            subset, _, row = pair_id.rpartition(":")
            entry = {"subset": subset, "row": int(row) if row.isdigit() else row, "reason": reason}
            lines.append(json.dumps(entry) + "\n")
        with naming_full_disk(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write("".join(lines))

    def _read(self) -> list[str]:
        if not self.path.exists():
            return []
        text = self.path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:  # a run was killed while it wrote the last line
            write_text(self.path, complete)
        rows = [json.loads(line) for line in complete.splitlines()]
        return [f"{row['subset']}:{row['row']}" for row in rows]
