"""How directories are made: others may look into them, but not write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


def make_directory(path: str | os.PathLike, *, private: bool = False) -> Path:
    """Makes a directory, and those above it, unless it is there. All of the package makes its directories here.

    Args:
      path: the directory.
      private: nobody else may look into it. Otherwise others may read, but not write, whatever the umask.

    Returns:
      The directory.

    Raises:
      OSError: it cannot be made.
    """
    path = Path(path)
    mode = 0o700 if private else 0o755
    missing = []
    for folder in (path, *path.parents):
        if folder.is_dir():
            break
        missing.append(folder)
    for folder in reversed(missing):
        # Another process may be quicker.
        folder.mkdir(mode=mode, exist_ok=True)
    path.mkdir(mode=mode, exist_ok=True)
    return path


@contextlib.contextmanager
def closed_to_other_writers() -> Iterator[None]:
    """While the block runs, what this process makes cannot be written by others, also what libraries make."""
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)
