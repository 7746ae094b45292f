"""The list of rows a run could not use, kept in a file, and the limit at which a run stops.

Owns counting and writing; what makes a row unusable is said by whoever reads it.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path


class TooManySkips(RuntimeError):
    """More rows were skipped than the run allows; the message names the file that lists them."""


class SkipLog:
    """Counts distinct skipped rows and writes each once: `{"subset", "row", "reason"}` a line.

    A file that exists is continued, so a resumed run neither repeats nor forgets a row.
    """

    def __init__(self, path: str | os.PathLike, limit: int):
        """`limit`: skipped rows that are still accepted."""
        self.path = Path(path)
        self.limit = limit
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._seen = self._read()

    def __len__(self) -> int:
        return len(self._seen)

    def record(self, pair_id: str, reason: str) -> None:
        """Raises TooManySkips when this row is one too many."""
        if pair_id in self._seen:
            return
        self._seen.add(pair_id)
        subset, _, row = pair_id.rpartition(":")
        entry = {"subset": subset, "row": int(row) if row.isdigit() else row, "reason": reason}
        line = json.dumps(entry) + "\n"
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        logging.getLogger(__name__).warning("skipped %s: %s", pair_id, reason)
        if len(self._seen) > self.limit:
            raise TooManySkips(
                f"{len(self._seen)} rows could not be used, more than the {self.limit} allowed; "
                f"they are listed in {self.path}. Repair the data, or raise max_skip_share"
            )

    def _read(self) -> set[str]:
        if not self.path.exists():
            return set()
        text = self.path.read_text(encoding="utf-8")
        complete = text[: text.rfind("\n") + 1]
        if complete != text:  # a run was killed while it wrote the last line
            self.path.write_text(complete, encoding="utf-8")
        rows = [json.loads(line) for line in complete.splitlines()]
        return {f"{row['subset']}:{row['row']}" for row in rows}
