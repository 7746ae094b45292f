"""MSVD as it is downloaded: a list of test videos, and a pickle of many captions for each."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from llave_jax.evaluation.benchmarks.video_files import (
    VideoDataset,
    load_plain_pickle,
    match_videos,
    named,
    only,
    read_words,
)


def read(data_dir: str | os.PathLike) -> VideoDataset:
    """MSVD: `test_list.txt`, a captions pickle {video: [caption or list of words]}, videos below.

    If there are several pickles, the one with captions of all test videos is read.

    Args:
      data_dir: with the files in it or in folders below it.

    Returns:
      The captions with their videos.

    Raises:
      FileNotFoundError, ValueError: files are missing, malformed or ambiguous; it names them.
    """
    data_dir = Path(data_dir)
    lists = {path: read_words(path) for path in named(data_dir, "test_list.txt")}
    list_path, names = only(lists, data_dir, "a test_list.txt")
    tables, refused = {}, []
    for path in named(data_dir, "*.pkl"):
        try:
            tables[path] = _captions(path, names)
        except ValueError as error:
            refused.append(error)
    if not tables and refused:
        raise refused[0] if len(refused) == 1 else ValueError("\n".join(map(str, refused)))
    _, rows = only(tables, data_dir, "a captions pickle (*.pkl)")
    return match_videos("msvd", data_dir, list_path, rows)


def _captions(path: Path, names: Iterable[str]) -> list[tuple[str, str]]:
    """(video, caption) of all captions of these videos."""
    captions = load_plain_pickle(path)
    if not isinstance(captions, dict):
        raise ValueError(f"{path}: holds {type(captions).__name__}; expected a dict of captions")
    missing = [name for name in names if not captions.get(name)]
    if missing:
        raise ValueError(f"{path}: no captions for {len(missing)} videos, such as {missing[0]!r}")
    return [
        (name, caption if isinstance(caption, str) else " ".join(caption))
        for name in names
        for caption in captions[name]
    ]
