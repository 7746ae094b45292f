"""LSMDC 2016's 1000 test clips as they are downloaded: a table without a heading, and a folder of clips for each film."""

from __future__ import annotations

import os
from pathlib import Path

from llave_jax.evaluation.benchmarks.video_files import (
    VideoDataset,
    match_videos,
    named,
    only,
    warn_of_size,
)

CLIPS = 1000
_COLUMNS = "clip, start and end as aligned, start and end as extracted, sentence"


def read(data_dir: str | os.PathLike) -> VideoDataset:
    """LSMDC's test clips: `LSMDC16_challenge_1000_publictect.csv`, which has tabs, and videos `<clip>.avi` below.

    Args:
      data_dir: with the files in it or in folders below it.

    Returns:
      One caption for each clip.

    Raises:
      FileNotFoundError, ValueError: files are missing, malformed or ambiguous; it names them.
    """
    data_dir = Path(data_dir)
    pattern = "LSMDC16_challenge_1000_publict*.csv"
    tables = {path: _rows(path) for path in named(data_dir, pattern)}
    source, rows = only(tables, data_dir, pattern)
    warn_of_size(source, len({clip for clip, _ in rows}), CLIPS, "the public test split")
    return match_videos("lsmdc", data_dir, source, rows)


def _rows(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from error
    rows = []
    for number, line in enumerate(lines, 1):
        cells = line.strip().split("\t")
        if not line.strip():
            continue
        if len(cells) != 6 or not cells[0] or not cells[5].strip():
            raise ValueError(
                f"{path}: line {number}: expected 6 cells with tabs between them ({_COLUMNS}), found {line!r:.200}"
            )
        rows.append((cells[0], cells[5].strip()))
    return rows
