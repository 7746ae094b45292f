"""ActivityNet Captions as paragraph retrieval: all sentences of a video together are one caption, as in CLIP4Clip.

Files are those of the captions' download: `val_1.json`, and `val_ids.json` where a list of videos is given.
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
    warn_of_size,
)

VIDEOS = 4917


def read(data_dir: str | os.PathLike) -> VideoDataset:
    """ActivityNet's split val1: `val_1.json`, {"v_ID": {"sentences": [...]}}, and videos `ID` or `v_ID` below.

    The sentences of a video are joined by spaces, in their order. With a `val_ids.json` only its videos count. Videos
    that are not there are left out with a warning, as many are no longer on YouTube.

    Args:
      data_dir: with the files in it or in folders below it.

    Returns:
      One caption for each video.

    Raises:
      FileNotFoundError, ValueError: files are missing, malformed or ambiguous; it names them.
    """
    data_dir = Path(data_dir)
    tables = {path: _paragraphs(path) for path in named(data_dir, "val_1.json")}
    source, rows = only(tables, data_dir, "a val_1.json")
    lists = {path: _ids(path) for path in named(data_dir, "val_ids.json")}
    if lists:
        paragraphs = dict(rows)
        chosen, ids = only(lists, data_dir, "a val_ids.json")
        if unknown := [video for video in ids if video not in paragraphs]:
            raise ValueError(
                f"{chosen}: {len(unknown)} of {len(ids)} videos have no sentences in {source}, such as {unknown[0]!r}"
            )
        rows = [(video, paragraphs[video]) for video in dict.fromkeys(ids)]
    warn_of_size(source, len(rows), VIDEOS, "val1")
    # Both forms of a file's name are in use.
    names = [(video.removeprefix("v_"), caption) for video, caption in rows]
    return match_videos("activitynet", data_dir, source, names, may_lack=True, prefix="v_")


def _paragraphs(path: Path) -> list[tuple[str, str]]:
    rows = []
    for video, entry in read_json_file(path, dict).items():
        sentences = entry.get("sentences") if isinstance(entry, dict) else None
        if not isinstance(sentences, list) or not all(isinstance(s, str) for s in sentences):
            raise ValueError(
                f"{path}: {video!r:.100}: expected sentences, a list of texts; found {entry!r:.200}"
            )
        if caption := paragraph(sentences):
            rows.append((video, caption))
    return rows


def _ids(path: Path) -> list[str]:
    ids = read_json_file(path, list)
    if bad := [value for value in ids if not isinstance(value, str)]:
        raise ValueError(f"{path}: expected a list of texts, found {bad[0]!r:.100} among them")
    return ids
