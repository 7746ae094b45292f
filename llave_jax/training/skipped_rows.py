"""Rows that a run skips: if the processes together skip too many, all stop at the same step."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from llave_jax.data.skips import TooManySkips, by_subset
from llave_jax.training.run_files import skip_file

log = logging.getLogger(__name__)


def check_skipped_rows(
    skipped: Sequence[str], subsets: Sequence[str], limit: int, workdir: Path
) -> None:
    """Stops all processes at the same step if together they have skipped too many rows.

    All processes of a job call this at the same step. In a job of one process the data pipeline stops by
    itself.

    Args:
      skipped: pair ids of this process; two processes may have skipped the same row.
      subsets: names, the same in every process.
      limit: rows that all processes together may skip.
      workdir: the run's, where the skipped rows are listed.

    Raises:
      TooManySkips: in every process.
    """
    counts = multihost_utils.process_allgather(np.int32(len(skipped)))
    if counts.sum() <= limit:
        return
    rows = np.full((counts.max(), 2), -1, np.int32)
    for index, pair_id in enumerate(skipped):
        subset, _, row = pair_id.rpartition(":")
        rows[index] = subsets.index(subset), int(row)
    everyone = np.unique(multihost_utils.process_allgather(rows).reshape(-1, 2), axis=0)
    together = [f"{subsets[subset]}:{row}" for subset, row in everyone if subset >= 0]
    if len(together) > limit:
        raise TooManySkips(together, limit, skip_file(workdir, "*"))


def report_skipped_rows(skipped: Sequence[str], workdir: Path) -> None:
    """Says at the end of a run how many rows this process skipped, and where they are listed.

    Args:
      skipped: pair ids of the rows.
      workdir: the run's directory.
    """
    if skipped:
        log.info(
            "this process skipped %d rows that cannot be used (%s), listed in %s",
            len(skipped),
            by_subset(skipped),
            skip_file(workdir, jax.process_index()),
        )
