"""MSR-VTT and MSVD as they are downloaded: captions, and the video each belongs to.

Owns finding and reading the files; their tasks are `text_video.py`.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import fnmatch
import logging
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".webm", ".mov", ".mpg", ".m4v")


@dataclasses.dataclass(frozen=True)
class VideoDataset:
    """Videos and captions; `captions[i]` describes `videos[owners[i]]`.

    Attributes:
      name: of the dataset.
      videos: files.
      captions: at least one of each video.
      owners: int32 [captions], indices of videos.
    """

    name: str
    videos: tuple[Path, ...]
    captions: tuple[str, ...]
    owners: np.ndarray


def read_msrvtt(data_dir: str | os.PathLike) -> VideoDataset:
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
    found = _named(data_dir, "*.csv")
    tables = {path: _read_csv(path) for path in found}
    captions = {path: rows for path, rows in tables.items() if isinstance(rows, list)}
    if not captions:
        columns = "; ".join(f"{_below(path, data_dir)} has {tables[path]}" for path in found)
        raise ValueError(
            f"{data_dir}: no csv file has the columns video_id and sentence ({columns or 'none'})"
        )
    if len(_different(captions)) > 1:
        tests = {path: rows for path, rows in captions.items() if _is_1k_test(rows)}
        captions = tests or captions
    path, rows = _only(captions, data_dir, "captions of the test videos")
    if not _is_1k_test(rows):
        logging.getLogger(__name__).warning(
            "%s: has %d captions of %d videos; the 1k test split, to which published numbers belong, "
            "has 1000 of as many",
            path,
            len(rows),
            len({video for video, _ in rows}),
        )
    return _dataset("msrvtt", data_dir, path, rows)


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


def read_msvd(data_dir: str | os.PathLike) -> VideoDataset:
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
    lists = {
        path: path.read_text(encoding="utf-8").split() for path in _named(data_dir, "test_list.txt")
    }
    list_path, names = _only(lists, data_dir, "a test_list.txt")
    tables, refused = {}, []
    for path in _named(data_dir, "*.pkl"):
        try:
            tables[path] = _captions(path, names)
        except ValueError as error:
            refused.append(error)
    if not tables and refused:
        raise refused[0] if len(refused) == 1 else ValueError("\n".join(map(str, refused)))
    _, rows = _only(tables, data_dir, "a captions pickle (*.pkl)")
    return _dataset("msvd", data_dir, list_path, rows)


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


READERS: dict[str, Callable[[str | os.PathLike], VideoDataset]] = {
    "msrvtt": read_msrvtt,
    "msvd": read_msvd,
}


class _PlainUnpickler(pickle.Unpickler):
    """Loads str, bytes, numbers, list, tuple, dict and set. These need no import, so no code runs."""

    def find_class(self, module: str, name: str):
        """Refuses every import of a pickle."""
        raise pickle.UnpicklingError(
            f"refers to {module}.{name}; only text, numbers, lists, tuples and dicts are read"
        )


def load_plain_pickle(path: Path) -> Any:
    """Read a pickle of plain values, also one that Python 2 wrote, as the published file is.

    Args:
      path: of the file; its content need not be trusted.

    Returns:
      Text, numbers, lists, tuples, dicts and sets.

    Raises:
      ValueError: it holds anything else, or is not a pickle. Nothing in it has been run.
    """
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8", errors="replace").load()
        except Exception as error:  # broken opcodes can raise any exception
            raise ValueError(f"{path}: not a pickle of plain captions: {error}") from error


def _files(root: Path) -> Iterator[Path]:
    """All files below a folder, in order, links followed, without hidden files such as macOS's."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is not a directory")
    seen = set()
    for folder, folders, files in os.walk(root, followlinks=True):
        real = os.path.realpath(folder)
        # A folder that was seen is not entered again: a link to a folder above has no end.
        folders[:] = [] if real in seen else sorted(n for n in folders if not n.startswith("."))
        if real not in seen:
            yield from (Path(folder, name) for name in sorted(files) if not name.startswith("."))
        seen.add(real)


def _named(root: Path, pattern: str) -> list[Path]:
    return [path for path in _files(root) if fnmatch.fnmatch(path.name, pattern)]


def _different(contents: dict[Path, list]) -> dict[Path, list]:
    """The files without those whose content is that of an earlier one."""
    first: dict[tuple, Path] = {}
    for path, content in contents.items():
        first.setdefault(tuple(content), path)
    return {path: contents[path] for path in first.values()}


def _only(contents: dict[Path, list], root: Path, what: str) -> tuple[Path, list]:
    """The only file, or the first of copies of one file."""
    different = _different(contents)
    if len(different) == 1:
        return next(iter(different.items()))
    if not different:
        raise FileNotFoundError(f"{root}: expected {what} below it, found none")
    found = ", ".join(
        f"{_below(path, root)} ({len(content)} entries)" for path, content in different.items()
    )
    raise ValueError(
        f"{root}: {what} are in more than one file: {found}; leave the one to use below it"
    )


def _below(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _dataset(name: str, root: Path, source: Path, rows: Iterable[tuple[str, str]]) -> VideoDataset:
    """Rows of (video name, caption) with the video files found below `root` by their name."""
    files: dict[str, dict[str, Path]] = collections.defaultdict(dict)
    for path in _files(root):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            files[path.stem].setdefault(os.path.realpath(path), path)
    order: dict[str, int] = {}
    captions, owners = [], []
    for video, caption in rows:
        captions.append(caption)
        owners.append(order.setdefault(video, len(order)))
    missing = [video for video in order if video not in files]
    if missing:
        raise FileNotFoundError(
            f"{source}: {len(missing)} of {len(order)} videos are not below {root}, such as "
            f"{missing[0]!r}; looked for {', '.join(VIDEO_SUFFIXES)}"
        )
    twice = [video for video in order if len(files[video]) > 1]
    if twice:
        places = " and ".join(_below(path, root) for path in files[twice[0]].values())
        raise ValueError(
            f"{root}: {len(twice)} of {len(order)} videos are there more than once, such as {places}; "
            "leave one of each below it"
        )
    if not order:
        raise ValueError(f"{source}: names no videos")
    paths = tuple(next(iter(files[video].values())) for video in order)
    return VideoDataset(name, paths, tuple(captions), np.array(owners, np.int32))
