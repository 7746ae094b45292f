"""Paths that a file names, which need not be trusted: they stay below their root.

A path that the user writes himself (a flag, a config, his own list of items) goes anywhere; it does not come here.
"""

from __future__ import annotations

import os
from pathlib import Path, PurePosixPath


class OutsideRoot(ValueError):
    """A path that leaves the folder it belongs to; the message says how."""


def check_relative(path: str, root: str = "its root") -> None:
    """Refuses a path that is absolute or climbs, by its text alone.

    Args:
      path: as a file gives it, with forward slashes.
      root: what the path is relative to, for the message.

    Raises:
      OutsideRoot: it is empty, absolute, or has a part `..` or a null byte.
    """
    parts = PurePosixPath(path).parts
    if path.startswith("/") or ".." in parts or "\0" in path or not parts:
        raise OutsideRoot(f"{path[:200]!r} leaves {root}; paths are relative to it")


def below(root: str | os.PathLike, path: str, *, linked_folders: bool = False) -> Path:
    """The path of a file that data names, if it lies below the data's root.

    Args:
      root: the folder, which may itself be a link.
      path: as a file gives it, relative to `root`.
      linked_folders: follow links to folders that lie directly in `root`, wherever they lead: who keeps a large
        folder on another disk links it there.

    Returns:
      `root / path`. Nothing need be there.

    Raises:
      OutsideRoot: the path's text or a link on the way leads out of `root`.
    """
    check_relative(path, str(root))
    full = Path(root) / path
    parts = PurePosixPath(path).parts
    real = os.path.realpath(full)
    if _is_within(real, os.path.realpath(root)):
        return full
    if linked_folders and len(parts) > 1:
        folder = os.path.realpath(os.path.join(root, parts[0]))
        if os.path.isdir(folder) and _is_within(real, folder):
            return full
    raise OutsideRoot(
        f"{path[:200]!r} is or passes a link that leads out of {root}; copy the file there"
    )


def _is_within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def is_plain_name(name: object) -> bool:
    """Whether something is the name of one file or folder: no path, no hidden file.

    Args:
      name: as data gives it.

    Returns:
      True for a text of at most 200 printable characters, without slashes, that does not begin with a dot.
    """
    return (
        isinstance(name, str)
        and 0 < len(name) <= 200
        and name.isprintable()
        and not name.startswith(".")
        and not set(name) & {"/", "\\"}
    )


def check_links(folder: str | os.PathLike, root: str | os.PathLike | None = None) -> None:
    """Refuses a folder in which a link leads out of it, or that holds pipes or devices. It can then be copied.

    Args:
      folder: its files and those of all folders below it are looked at.
      root: where links may lead; None: `folder` only.

    Raises:
      OutsideRoot: naming the link, or what is no file.
    """
    real_root = os.path.realpath(folder if root is None else root)
    waiting = [os.fspath(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_symlink():
                    target = os.path.realpath(entry.path)
                    if not _is_within(target, real_root):
                        raise OutsideRoot(
                            f"{entry.path}: a link to {target}, outside of {folder}; put a copy of the file "
                            "there if you trust it"
                        )
                    if not os.path.exists(entry.path):
                        raise OutsideRoot(f"{entry.path}: a link that leads nowhere; remove it")
                elif entry.is_dir(follow_symlinks=False):
                    waiting.append(entry.path)
                elif not entry.is_file(follow_symlinks=False):
                    raise OutsideRoot(f"{entry.path}: neither a file nor a folder; remove it")
