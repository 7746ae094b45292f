"""DiDeMo as paragraph retrieval: all sentences of a video together are one caption, as in CLIP4Clip's evaluation.

Files are LocalizingMoments' `test_data.json` (1037 videos) and collaborative-experts' `test_list.txt`: the 1004 of them
that published numbers belong to.
"""

from __future__ import annotations

import os
from pathlib import Path

from llave_jax.common.json_text import read_json_file
from llave_jax.evaluation.benchmarks.video_files import (
    VideoDataset,
    match_videos,
    named,
    only,
    paragraph,
    read_words,
    warn_of_size,
)

VIDEOS = 1004


def read(data_dir: str | os.PathLike) -> VideoDataset:
    """DiDeMo's test split: `test_data.json`, rows of a video and a sentence, and videos below.

    The sentences of a video are joined by spaces, in the order of the rows. With a `test_list.txt` only its videos
    count. Videos that are not there are left out with a warning, as many are no longer on Flickr.

    Args:
      data_dir: with the files in it or in folders below it.

    Returns:
      One caption for each video.

    Raises:
      FileNotFoundError, ValueError: files are missing, malformed or ambiguous; it names them.
    """
    data_dir = Path(data_dir)
    tables = {path: _sentences(path) for path in named(data_dir, "test_data.json")}
    source, rows = only(tables, data_dir, "a test_data.json")
    lists = {path: read_words(path) for path in named(data_dir, "test_list.txt")}
    listed = set(only(lists, data_dir, "a test_list.txt")[1]) if lists else None
    paragraphs: dict[str, list[str]] = {}
    for video, sentence in rows:
        if listed is None or video in listed:
            paragraphs.setdefault(video, []).append(sentence)
    warn_of_size(source, len(paragraphs), VIDEOS, "the test split")
    captions = [(video, paragraph(sentences)) for video, sentences in paragraphs.items()]
    return match_videos("didemo", data_dir, source, captions, may_lack=True)


def _sentences(path: Path) -> list[tuple[str, str]]:
    rows = read_json_file(path, list)
    for number, row in enumerate(rows):
        fields = row if isinstance(row, dict) else {}
        if not all(
            isinstance(fields.get(key), str) and fields[key].strip()
            for key in ("video", "description")
        ):
            raise ValueError(
                f"{path}: row {number}: expected texts video and description, found {row!r:.200}"
            )
    return [(row["video"], row["description"]) for row in rows]
