"""Finding the files of a text-video data set: captions by name, videos by theirs, wherever they were unpacked.

Owns the search below a folder, and safe reading of pickles. What captions look like is each data set's own; the tasks
are `text_video.py`.
"""

from __future__ import annotations

import collections
import dataclasses
import fnmatch
import logging
import os
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

log = logging.getLogger(__name__)

VIDEO_SUFFIXES = (
    *(".mp4", ".avi", ".mkv", ".webm", ".mov", ".mpg", ".mpeg", ".m4v"),
    *(".3gp", ".3g2", ".wmv", ".flv", ".mts", ".m2ts", ".ogv"),
)


@dataclasses.dataclass(frozen=True)
class VideoDataset:
    """Videos and captions; `captions[i]` describes `videos[owners[i]]`.

    Attributes:
      name: of the dataset.
      videos: files.
      captions: at least one of each video.
      owners: int32 [captions], indices of videos.
      missing: videos of the data set that are not there and were left out.
    """

    name: str
    videos: tuple[Path, ...]
    captions: tuple[str, ...]
    owners: np.ndarray
    missing: int = 0


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


def all_files(root: Path) -> Iterator[Path]:
    """All files below a folder, in order, links followed, without hidden files such as macOS's.

    Args:
      root: the folder.

    Yields:
      Paths.

    Raises:
      FileNotFoundError: there is no such folder.
    """
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


def named(root: Path, pattern: str) -> list[Path]:
    """Files below a folder by their names.

    Args:
      root: the folder.
      pattern: such as "*.csv".

    Returns:
      Paths, in order.
    """
    return [path for path in all_files(root) if fnmatch.fnmatch(path.name, pattern)]


def read_words(path: Path) -> list[str]:
    """What a list of names holds.

    Args:
      path: of a text file.

    Returns:
      Its words.

    Raises:
      ValueError: it is not text in UTF-8; it names the file.
    """
    try:
        return path.read_text(encoding="utf-8").split()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not text in UTF-8: {error}") from error


def different(contents: dict[Path, list]) -> dict[Path, list]:
    """The files without those whose content is that of an earlier one.

    Args:
      contents: by path.

    Returns:
      The first file of each content.
    """
    first: dict[tuple, Path] = {}
    for path, content in contents.items():
        first.setdefault(tuple(content), path)
    return {path: contents[path] for path in first.values()}


def only(contents: dict[Path, list], root: Path, what: str) -> tuple[Path, list]:
    """The only file, or the first of copies of one file.

    Args:
      contents: what candidates hold, by path.
      root: the folder, for errors.
      what: is looked for.

    Returns:
      The file, and what it holds.

    Raises:
      FileNotFoundError, ValueError: there is none, or there are several that differ.
    """
    unlike = different(contents)
    if len(unlike) == 1:
        return next(iter(unlike.items()))
    if not unlike:
        raise FileNotFoundError(f"{root}: expected {what} below it, found none")
    found = ", ".join(
        f"{below(path, root)} ({len(content)} entries)" for path, content in unlike.items()
    )
    raise ValueError(
        f"{root}: {what} are in more than one file: {found}; leave the one to use below it"
    )


def below(path: Path, root: Path) -> str:
    """A path relative to a folder, for messages.

    Args:
      path: below the folder.
      root: the folder.
    """
    return path.relative_to(root).as_posix()


def match_videos(
    name: str,
    root: Path,
    source: Path,
    rows: Iterable[tuple[str, str]],
    *,
    may_lack: bool = False,
    prefix: str = "",
) -> VideoDataset:
    """A data set of captions, with the video files found below a folder by their names.

    A file is a video's if it has the video's name, with one of `VIDEO_SUFFIXES` added, or in place of the name's own.
    Only where there is none, a file of that very name counts whatever its suffix, as downloads keep a site's names.

    Args:
      name: of the data set.
      root: the folder.
      source: the file of the captions, for errors.
      rows: (name of a video, with or without its suffix; caption).
      may_lack: videos that are not there are left out with a warning, as of data sets whose videos vanish from the
        sites that show them. Otherwise they are an error.
      prefix: that a file's name may have before the video's.

    Returns:
      The data set.

    Raises:
      FileNotFoundError: videos are missing, or all are.
      ValueError: a video is there more than once, or there are no rows; it names them.
    """
    rows = list(rows)
    names = dict.fromkeys(video for video, _ in rows)
    files: dict[str, dict[str, Path]] = collections.defaultdict(dict)
    others: dict[str, dict[str, Path]] = collections.defaultdict(dict)
    for path in all_files(root):
        if path.suffix.lower() in VIDEO_SUFFIXES:
            for called in {path.name, path.stem, path.stem.removeprefix(prefix)}:
                files[called].setdefault(os.path.realpath(path), path)
        elif path.name in names:
            others[path.name].setdefault(os.path.realpath(path), path)
    found = {video: _of_name(video, files) or others.get(video, {}) for video in names}
    if not found:
        raise ValueError(f"{source}: names no videos")
    missing = [video for video, paths in found.items() if not paths]
    if missing:
        text = (
            f"{source}: {len(missing)} of {len(found)} videos are not below {root}, such as {missing[0]!r}; looked for "
            f"{', '.join(VIDEO_SUFFIXES)}"
        )
        if not may_lack or len(missing) == len(found):
            raise FileNotFoundError(text)
        log.warning(
            "%s. They are left out: scores compare with those of the same videos only", text
        )
    twice = [paths for paths in found.values() if len(paths) > 1]
    if twice:
        places = " and ".join(below(path, root) for path in twice[0].values())
        raise ValueError(
            f"{root}: {len(twice)} of {len(found)} videos are there more than once, such as {places}; "
            "leave one of each below it"
        )
    there = {video: next(iter(paths.values())) for video, paths in found.items() if paths}
    order = {video: number for number, video in enumerate(there)}
    kept = [(order[video], caption) for video, caption in rows if video in order]
    owners = np.array([owner for owner, _ in kept], np.int32)
    captions = tuple(caption for _, caption in kept)
    return VideoDataset(name, tuple(there.values()), captions, owners, len(missing))


def _of_name(video: str, files: Mapping[str, dict[str, Path]]) -> dict[str, Path]:
    """The files of a video; where its own name has a suffix, also those that were converted to another format."""
    stem, dot, suffix = video.rpartition(".")
    if video in files:
        return files[video]
    return files.get(stem, {}) if dot and f".{suffix.lower()}" in VIDEO_SUFFIXES else {}


def paragraph(sentences: Iterable[str]) -> str:
    """The sentences of a video as one caption.

    Args:
      sentences: in their order.

    Returns:
      All of them, with one space wherever there is any space, as CLIP's tokenizer reads a text. It is empty if they are.
    """
    return " ".join(" ".join(sentences).split())


def warn_of_size(source: Path, found: int, expected: int, split: str) -> None:
    """Says that a file is not the split that published numbers belong to.

    Args:
      source: the file.
      found: videos in it.
      expected: videos of the split.
      split: its name.
    """
    if found != expected:
        log.warning(
            "%s: has %d videos; %s, to which published numbers belong, has %d",
            source,
            found,
            split,
            expected,
        )
