"""MSR-VTT 1k as it is downloaded: a csv of captions, one for each video."""

from __future__ import annotations

import csv
import logging
import os
from collections.abc import Iterator
from pathlib import Path

from llave_jax.evaluation.benchmarks.video_files import (
    VideoDataset,
    below,
    different,
    match_videos,
    named,
    only,
)

log = logging.getLogger(__name__)


def read(data_dir: str | os.PathLike) -> VideoDataset:
    """MSR-VTT 1k: a csv with columns `video_id` and `sentence`, videos `<video_id>.mp4` below.

    The download has the test csv (MSRVTT_JSFUSION_test.csv) beside lists of training videos, which have no
    sentences. If several csv files have both columns, the one with 1000 captions of 1000 videos is read.

    Args:
      data_dir: with the files in it or in folders below it.

    Returns:
      The captions with their videos.

    Raises:
      FileNotFoundError, ValueError: files are missing, malformed or ambiguous; it names them.
    """
    data_dir = Path(data_dir)
    found = named(data_dir, "*.csv")
    tables = {path: _read_csv(path) for path in found}
    captions = {path: rows for path, rows in tables.items() if isinstance(rows, list)}
    if not captions:
        columns = "; ".join(f"{below(path, data_dir)} has {tables[path]}" for path in found)
        raise ValueError(
            f"{data_dir}: no csv file has the columns video_id and sentence ({columns or 'none'})"
        )
    if len(different(captions)) > 1:
        tests = {path: rows for path, rows in captions.items() if _is_1k_test(rows)}
        captions = tests or captions
    path, rows = only(captions, data_dir, "captions of the test videos")
    if not _is_1k_test(rows):
        log.warning(
            "%s: has %d captions of %d videos; the 1k test split, to which published numbers belong, "
            "has 1000 of as many",
            path,
            len(rows),
            len({video for video, _ in rows}),
        )
    return match_videos("msrvtt", data_dir, path, rows)


def _read_csv(path: Path) -> list[tuple[str, str]] | tuple[str, ...]:
    """(video_id, sentence) of all rows; the names of the columns if these two are not among them."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            if {"video_id", "sentence"} <= set(reader.fieldnames or ()):
                return list(_csv_rows(path, reader))
            return tuple(reader.fieldnames or ())
    except (UnicodeDecodeError, csv.Error) as error:
        return (f"not a csv file in UTF-8: {error}",)


def _csv_rows(path: Path, reader: csv.DictReader) -> Iterator[tuple[str, str]]:
    for row in reader:
        if not row["video_id"] or not row["sentence"]:
            raise ValueError(
                f"{path}: line {reader.line_num}: expected a video_id and a sentence, found "
                f"{row['video_id']!r} and {row['sentence']!r}"
            )
        yield row["video_id"], row["sentence"]


def _is_1k_test(rows: list[tuple[str, str]]) -> bool:
    return len(rows) == 1000 == len({video for video, _ in rows})
