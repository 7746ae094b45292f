"""Files and directories that appear whole or not at all.

Content goes to a temporary name beside the target, is synced to the disk, and the temporary name is
renamed. A job that dies leaves the target as it was. While a process writes, it holds a lock on the
temporary name. What a killed job has left has no lock: it is overwritten or removed by the next write to the
same target, and by `remove_abandoned`. A full disk is an error that names the target. Formats of files belong
to other modules.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.common.directories import make_directory
from llave_jax.common.locks import is_same_file, try_lock
from llave_jax.common.text import bytes_text

_REPLACED = ".replaced"
# What is said of a file that cannot grow. Libraries that raise errors of their own repeat the system's text.
_FULL = {
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "a file must not grow so large here (ulimit -f, or the file system's limit)",
}


class DiskFull(OSError):
    """A file that the disk has no room for. The message names the file, and what to do."""


@contextlib.contextmanager
def naming_full_disk(path: str | os.PathLike, needed: int | None = None) -> Iterator[None]:
    """Turns a block's error about a full disk, also one of a library, into one that names the file.

    Args:
      path: what the block writes.
      needed: bytes of it, if they are known.

    Raises:
      DiskFull: there is no room, or a limit of the file's size.
    """
    try:
        yield
    except DiskFull:
        raise
    except Exception as error:
        number = _number_of_full_disk(error)
        if number is None:
            raise
        facts = [] if needed is None else [f"needs {bytes_text(needed)}"]
        if number == errno.ENOSPC:
            facts.append(_free(Path(path)))
        size = f" ({', '.join(facts)})" if facts else ""
        raise DiskFull(
            f"{os.fspath(path)}: {_FULL[number]}{size}; make room and run the same command again: what is "
            "complete stays"
        ) from error


def _number_of_full_disk(error: BaseException | None) -> int | None:
    while error is not None:
        for number in _FULL:
            if getattr(error, "errno", None) == number or os.strerror(number) in str(error):
                return number
        error = error.__cause__ or error.__context__
    return None


def _free(path: Path) -> str:
    folder = path.absolute().parent
    while not folder.exists():
        folder = folder.parent
    return f"{bytes_text(shutil.disk_usage(folder).free)} are free in {folder}"


def cache_folder() -> Path:
    """Where the user's caches lie: LLAVE_JAX_CACHE, by default XDG_CACHE_HOME/llave_jax or ~/.cache/llave_jax.

    Returns:
      The folder, which need not exist.
    """
    if given := os.environ.get("LLAVE_JAX_CACHE"):
        return Path(given).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "llave_jax"


@contextlib.contextmanager
def atomic_file(path: str | os.PathLike) -> Iterator[Path]:
    """Write a file whose library wants a path: the block writes to the path that it is given.

    Args:
      path: the file to make or replace; its directory is made.

    Yields:
      The temporary path: `partial_path(path)`, or another one if a living process writes there. It takes
      the name `path` at the end of the block, and is removed if the block raises.

    Raises:
      DiskFull: there is no room for the file.
    """
    path = Path(path)
    with naming_full_disk(path):
        make_directory(path.parent)
        temporary, lock = _claim(path)
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        finally:
            os.close(lock)


def _claim(path: Path) -> tuple[Path, int]:
    """An empty temporary file for `path`, and a descriptor that holds its lock."""
    temporary = partial_path(path)
    while True:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o666)
        if try_lock(descriptor):
            if is_same_file(descriptor, temporary):
                os.ftruncate(descriptor, 0)
                return temporary, descriptor
        else:  # Another one writes the same target.
            temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        os.close(descriptor)


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

    A block that renames the directory keeps it: see `replace_directory`. What killed jobs have left of such
    directories is removed first.

    Args:
      path: the directory that the scratch directory is for. It need not exist.

    Yields:
      The scratch directory.

    Raises:
      DiskFull: there is no room for its files.
    """
    path = Path(path).absolute()
    with naming_full_disk(path):
        make_directory(path.parent)
        _remove_leftovers(path)
        scratch, lock = _claim_directory(path)
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
            os.close(lock)


def _claim_directory(path: Path) -> tuple[Path, int]:
    while True:
        scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        scratch.mkdir(mode=0o755)
        # Another process may take it for abandoned until it is locked.
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(scratch, os.O_RDONLY)
            if try_lock(descriptor) and is_same_file(descriptor, scratch):
                return scratch, descriptor
            os.close(descriptor)


def _remove_leftovers(path: Path) -> None:
    """Removes what killed jobs have left of scratch directories of `path`, and completes what they replaced."""
    name = glob.escape(path.name)
    for old in sorted(path.parent.glob(f".{name}.*{_REPLACED}")):
        if path.exists():
            _remove_if_abandoned(old)
        else:
            with _unless_living(old) as abandoned:
                if abandoned:
                    old.rename(path)
    for scratch in sorted(path.parent.glob(f".{name}.*.partial")):
        if scratch.is_dir():
            _remove_if_abandoned(scratch)


def remove_abandoned(directory: str | os.PathLike, pattern: str = ".*.partial") -> None:
    """Removes the temporary files and directories that killed jobs have left in a directory.

    What a living process writes stays, as does everything on a file system without locks.

    Args:
      directory: its own entries are looked at; it need not exist.
      pattern: of their names.
    """
    for path in sorted(Path(directory).glob(pattern)):
        _remove_if_abandoned(path)


def _remove_if_abandoned(path: Path) -> None:
    with _unless_living(path) as abandoned:
        if abandoned and path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        elif abandoned:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def _unless_living(path: Path) -> Iterator[bool]:
    """Whether no process holds a temporary path; while the block runs, none can take it."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        yield False
        return
    try:
        yield try_lock(descriptor, without=False) and is_same_file(descriptor, path)
    finally:
        os.close(descriptor)


def replace_directory(path: str | os.PathLike, new: Path) -> None:
    """Renames a directory to a name that may be taken.

    What stands at `path` is removed once `new` is in its place, and put back if that fails. After a kill in
    between, the next `scratch_directory` puts it back.

    Args:
      path: the name.
      new: the directory, which lies beside `path`.
    """
    path = Path(path).absolute()
    if not path.exists():
        new.rename(path)
        return
    old = new.with_suffix(_REPLACED)
    lock = os.open(path, os.O_RDONLY)
    try:
        try_lock(lock)
        path.rename(old)
        try:
            new.rename(path)
        except BaseException:
            old.rename(path)
            raise
        shutil.rmtree(old)
    finally:
        os.close(lock)


@contextlib.contextmanager
def staged_directory(path: str | os.PathLike) -> Iterator[Path]:
    """A directory to fill, which takes the name `path` at the end of the block.

    It replaces what stands at `path`; the caller decides whether it may. If the block raises, `path` stays
    as it was.

    Args:
      path: the directory to make or replace.

    Yields:
      The directory to fill.

    Raises:
      DiskFull: there is no room for its files.
    """
    with scratch_directory(path) as staged:
        yield staged
        for file in staged.rglob("*"):
            if file.is_file():
                _sync(file)
        replace_directory(path, staged)


def _sync(path: Path) -> None:
    """Flush a file's content to the disk, so that its rename cannot get there first."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
