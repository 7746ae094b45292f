"""Videos that are saved as folders of frames: which pictures are frames, in which order, and which are used.

Owns the choice of frames and the list of missing ones. Where a task's folder is, unpacked from its archive if need be,
is `pixels.py`; how a model sees frames is `inputs/video.py`.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llave_jax.common.paths import OutsideRoot, below
from llave_jax.evaluation.benchmarks.builder import Make
from llave_jax.inputs.item import Item

SUFFIXES = (".jpg", ".jpeg", ".png")
# As in the runs whose scores VLM2Vec published.
DEFAULT_FRAMES = 8


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Sorts names as people do: runs of digits as numbers, all else without regard to case.

    Args:
      name: of a file.

    Returns:
      The key; names that differ in leading zeros or case alone are ordered as text.
    """
    parts: list[str | int] = []
    for place, part in enumerate(re.split(r"(\d+)", name)):
        parts.append(int(part) if place % 2 else part.lower())
    return parts, name


def sample(frames: Sequence[str], count: int | None) -> list[str]:
    """Some of a video's frames, evenly from the first to the last.

    Args:
      frames: of the video, in order.
      count: how many; None: all.

    Returns:
      `count` frames, or all where there are fewer.
    """
    if count is None or len(frames) < count:
        return list(frames)
    places = np.linspace(0, len(frames) - 1, count, dtype=int)
    return [frames[int(place)] for place in places]


class FrameFolders:
    """The folders of frames of one task. Pictures are read when the model reads an item.

    Folders that are missing or without frames are remembered, so that one message can count them (`missing`).

    Args:
      root: the folder that holds the task's folders.
      count: frames to use of a video; None: all.
    """

    def __init__(self, root: Path, count: int | None):
        self.root, self.count = root, count
        self._frames: dict[str, list[str]] = {}
        self._missing: dict[str, str] = {}
        self._empty: dict[str, str] = {}

    def video(self, text: str, folder: str, where: str) -> Make:
        """An item with a video.

        Args:
          text: of the item, with a marker for the video.
          folder: of its frames, below the root.
          where: the row that names it, for errors.

        Returns:
          What makes the item.

        Raises:
          ValueError: the folder is not below the root.
        """
        if folder not in self._frames:
            self._frames[folder] = self._list(folder, where)
        return functools.partial(Item, text, video=self._frames[folder], name=where)

    def picture(self, text: str, path: str, where: str) -> Make:
        """An item with a picture.

        Args:
          text: of the item, with a marker for the picture.
          path: of the picture, below the root.
          where: the row that names it, for errors.

        Returns:
          What makes the item.

        Raises:
          ValueError: the path is not below the root.
        """
        found = self._path(path, where)
        if not found.is_file():
            self._missing.setdefault(path, where)
        return functools.partial(Item, text, images=(str(found),), name=where)

    def folders(self, folder: str, where: str) -> list[str]:
        """Names of the folders in a folder, in natural order.

        Args:
          folder: below the root.
          where: the row that names it, for errors.

        Returns:
          The names; none if there is no such folder.

        Raises:
          ValueError: the folder is not below the root.
        """
        path = self._path(folder, where)
        if not path.is_dir():
            self._missing.setdefault(folder, where)
            return []
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if entry.is_dir() and entry.name[0] != "."]
        return sorted(names, key=natural_key)

    def missing(self) -> str:
        """What was asked for and is not there: the first folder or picture, and how many there are.

        Returns:
          A text; "" if all is there.
        """
        said = []
        for found, what in (
            (self._missing, "does not exist"),
            (self._empty, f"has no frames ({', '.join(SUFFIXES)})"),
        ):
            if found:
                path, where = next(iter(found.items()))
                said.append(
                    f"{len(found)} of its videos and pictures: {self.root / path} ({where}) {what}"
                )
        return "; ".join(said)

    def _path(self, path: str, where: str) -> Path:
        try:
            # Who keeps a large folder on another disk links it.
            return below(self.root, path, linked_folders=True)
        except OutsideRoot as error:
            raise ValueError(f"{where}: {error}") from error

    def _list(self, folder: str, where: str) -> list[str]:
        """Paths of the frames that are used; none if the folder is missing."""
        path = self._path(folder, where)
        if not path.is_dir():
            self._missing[folder] = where
            return []
        names = [n for n in os.listdir(path) if n.lower().endswith(SUFFIXES) and n[0] != "."]
        if not names:
            self._empty[folder] = where
        frames = sample(sorted(names, key=natural_key), self.count)
        return [str(path / name) for name in frames]
