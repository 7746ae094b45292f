"""Worker processes that end with the process that started them, and leave signals to it."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections.abc import Iterator

from llave_jax.common.interrupts import SIGNALS, deferred


@contextlib.contextmanager
def starting_workers() -> Iterator[None]:
    """A block that starts workers. Ctrl-C, which a terminal sends to all, finds them deaf from the beginning.

    Raises:
      Interrupted: a signal has come to this process; its workers are all known to it.
    """
    with deferred():
        if not hasattr(signal, "pthread_sigmask"):
            yield
            return
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


def follow_parent() -> None:
    """To be called first in a worker: SIGINT and SIGTERM are the parent's matter, whose death ends this process."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
