"""Locks between processes: one job at a time writes to an output.

A lock is the kernel's (`flock`), so that it ends with its process, whatever ends that. A file system or a
platform without such locks is treated as if nobody else were there.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from llave_jax.common.directories import make_directory

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class OutputInUse(ValueError):
    """Another process writes to the output; the message says which."""


@contextlib.contextmanager
def only_writer(
    output: str | os.PathLike,
    *,
    inside: bool = True,
    flag: str = "--output",
    name: str = ".lock",
) -> Iterator[None]:
    """Keeps an output to this process while the block runs.

    Args:
      output: the directory that is written. With `inside` it is made.
      inside: the lock lies in the directory, and otherwise beside it, for a directory that is replaced.
      flag: that names the output, for the message.
      name: of the file inside the directory; jobs that share an output have each their own.

    Raises:
      OutputInUse: another process holds it.
      OSError: the directory cannot be made or written to.
    """
    output = Path(output).absolute()
    file = output / name if inside else output.with_name(f".{output.name}.lock")
    make_directory(file.parent)
    descriptor = _open_locked(file, output, flag)
    try:
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "since": now}
        # A full disk need not keep a job from beginning: the record is only for messages.
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, (json.dumps(holder) + "\n").encode(), 0)
        yield
    finally:
        try:
            # Still locked: who has opened it meanwhile sees that the name is gone.
            file.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _open_locked(file: Path, output: Path, flag: str) -> int:
    while True:
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        if not try_lock(descriptor):
            holder = _holder(os.pread(descriptor, 1000, 0))
            os.close(descriptor)
            raise OutputInUse(
                f"{output}: another job is writing to it: {holder}; wait for it or stop it, or use another "
                f"{flag}"
            )
        if is_same_file(descriptor, file):
            return descriptor
        os.close(descriptor)


def _holder(record: bytes) -> str:
    try:
        values = json.loads(record)
        return f"process {values['pid']} on {values['host']}, since {values['since']}"
    except (ValueError, KeyError, TypeError):
        return "a process that has not yet said which"


def try_lock(descriptor: int, *, without: bool = True) -> bool:
    """Takes the lock of an open file or directory, if it is free; closing the file gives it back.

    Args:
      descriptor: of the file.
      without: the answer where there are no locks.

    Returns:
      Whether this process has it now.
    """
    if fcntl is None:
        return without
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return without
    return True


def is_same_file(descriptor: int, path: str | os.PathLike) -> bool:
    """Whether a path still leads to an open file, which another process may have renamed or removed.

    Args:
      descriptor: of the file.
      path: the name under which it was opened.

    Returns:
      True if it does.
    """
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False
