"""Files and directories that appear whole or not at all.

Content goes to a temporary name beside the target, is synced to the disk, and the temporary name is
renamed. A job that dies leaves the target as it was. The temporary file of a killed job is
overwritten by the next write to the same target. Formats of files belong to other modules.
"""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file whose library wants a path: the block writes to the path that it is given.

    Args:
      path: the file to make or replace; its directory is made.

    Yields:
      The temporary path, `partial_path(path)`. It takes the name `path` at the end of the block, and
      is removed if the block raises.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = partial_path(path)
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def partial_path(path: str | os.PathLike) -> Path:
    """The temporary name of a file: hidden, and without the suffix by which readers find files.

    Args:
      path: the file.

    Returns:
      A path in the same directory.
    """
    path = Path(path)
    return path.with_name(f".{path.name}.partial")


def write_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file, whole or not at all.

    Args:
      path: the file to make or replace.
      text: written in UTF-8.
    """
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Writes a file, whole or not at all.

    Args:
      path: the file to make or replace.
      content: its bytes.
    """
    with atomic_file(path) as temporary:
        temporary.write_bytes(content)


def write_array(path: str | os.PathLike, array: np.ndarray) -> None:
    """Writes one array as a .npy file, whole or not at all.

    Args:
      path: the file to make or replace.
      array: of any shape and dtype but object.
    """
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        np.save(file, array)


def write_arrays(path: str | os.PathLike, *, compress: bool = False, **arrays: np.ndarray) -> None:
    """Writes arrays as a .npz file, whole or not at all.

    Args:
      path: the file to make or replace.
      compress: compress the arrays.
      arrays: by their names in the file.
    """
    save: Any = np.savez_compressed if compress else np.savez
    with atomic_file(path) as temporary, temporary.open("wb") as file:
        save(file, **arrays)


@contextlib.contextmanager
def scratch_directory(path: str | os.PathLike) -> Iterator[Path]:
    """An empty directory beside `path`, on the same file system; removed at the end of the block.

    A block that renames the directory keeps it: see `replace_directory`.

    Args:
      path: the directory that the scratch directory is for. It need not exist.

    Yields:
      The scratch directory.
    """
    path = Path(path).absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    scratch.mkdir()
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def partial_directories(path: str | os.PathLike) -> list[Path]:
    """What killed jobs have left of `scratch_directory(path)`. The directories of living jobs are among them.

    Args:
      path: as for `scratch_directory`.

    Returns:
      The directories, sorted.
    """
    path = Path(path).absolute()
    return sorted(path.parent.glob(f".{glob.escape(path.name)}.*.partial"))


def replace_directory(path: str | os.PathLike, new: Path) -> None:
    """Renames a directory to a name that may be taken.

    What stands at `path` is removed once `new` is in its place, and put back if that fails.

    Args:
      path: the name.
      new: the directory, which lies beside `path`.
    """
    path = Path(path).absolute()
    if not path.exists():
        new.rename(path)
        return
    old = new.with_suffix(".replaced")
    path.rename(old)
    try:
        new.rename(path)
    except BaseException:
        old.rename(path)
        raise
    shutil.rmtree(old)


@contextlib.contextmanager
def staged_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A directory to fill, which takes the name `path` at the end of the block.

    It replaces what stands at `path`; the caller decides whether it may. If the block raises, `path` stays
    as it was.

    Args:
      path: the directory to make or replace.

    Yields:
      The directory to fill.
    """
    with scratch_directory(path) as staged:
        yield staged
        replace_directory(path, staged)


def _sync(path: Path) -> None:
    """Flush a file's content to the disk, so that its rename cannot get there first."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
