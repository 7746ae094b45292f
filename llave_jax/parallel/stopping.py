"""How a job ends that is told to: SIGTERM and Ctrl-C (SIGINT), in one process and in many.

A thread takes the signal, so that it counts whatever the main thread is busy with. It does one of three things:

- between two steps: `at` says after which step the loop is to save and end, in all processes the same;
- where there is nothing to save (`interruptible`: set-up, compilation, evaluation), the job ends at once;
- at a second signal the process ends at once, whatever it does.

The exit status is 128 plus the number of the signal, as shells say it.
"""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import jax
from jax._src import distributed

from llave_jax.common.interrupts import GRACE, SignalThread
from llave_jax.parallel import peers
from llave_jax.parallel.processes import STOPPED

log = logging.getLogger(__name__)

# Seconds that a step may wait for its data once the job is told to stop.
DATA_LIMIT = 30.0
# Seconds that the processes of a job wait for each other, and between two questions whether one was told.
AGREEMENT_LIMIT, POLL = 60.0, 1.0


class StopRequested(BaseException):
    """Ends what is going on, where nothing is to be saved. No error: `except Exception` lets it pass."""


class Stopping:
    """Whether, why and when the job is to stop. `listen` makes it.

    Attributes:
      number: of the signal that came, to this process or another one of the job; None: none has come.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        # Guards what processes agree on. Who holds it keeps the main thread from going on to another step.
        self._lock = threading.Lock()
        self._step = -1
        self._stop_at: int | None = None
        # Of the interruptible section that the main thread is in: what is to be done first. And a number
        # that changes with every section.
        self._leaving: Callable[[], None] | None = None
        self._section = 0
        self._raised = False
        self._leave_at_once = False
        self._waits_since: float | None = None
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        self._signals: SignalThread | None = None
        self._client: Any = None

    @property
    def status(self) -> int:
        """The exit status of a job that has stopped before it was complete."""
        return 128 + self.number if self.number else STOPPED

    def at(self, step: int) -> bool:
        """Whether the loop is to save and end after this step. Call once a step.

        Args:
          step: steps done; in every process of the job the same numbers.

        Returns:
          The same in all processes.
        """
        with self._lock:
            self._step = step
            if self._client is None:
                return self.number is not None
            return self._stop_at is not None and step >= self._stop_at

    @contextlib.contextmanager
    def interruptible(self, before: Callable[[], None] | None = None) -> Iterator[None]:
        """A section that a signal ends at once. All processes of a job enter the same ones.

        Args:
          before: is called before the process is ended, as to wait for a checkpoint that is being written.
            It may be called from another thread.

        Raises:
          StopRequested: a signal has come.
        """
        outer = self._leaving
        with self._lock:
            if self._stop_at is not None or (self._client is None and self.number is not None):
                raise StopRequested
            self._leaving = before or (lambda: None)
            self._section += 1
        try:
            yield
            if self._raised:  # Code that catches everything has swallowed it.
                raise StopRequested
        finally:
            with self._lock:
                self._leaving = outer
                self._section += 1

    @contextlib.contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """A section in which the loop may hang. If it does when the job is to stop, the job ends unsaved."""
        self._waits_since = time.monotonic()
        try:
            yield
        finally:
            self._waits_since = None

    def take_signals(self) -> None:
        """Takes SIGTERM and SIGINT, until `close`. Only the main thread can."""
        self._signals = SignalThread(self._handle, self._first, self._again)

    def close(self) -> None:
        """Gives the signals back, and ends the threads."""
        if self._signals is not None:
            self._signals.close()
        self._closed.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(2 * POLL)

    def join_processes(self) -> None:
        """Takes part in what the processes of the job agree on; call after `processes.initialize`."""
        client = distributed.global_state.client
        if self._signals is not None and client is not None and self._client is None:
            self._client = client
            self._key = f"llave_jax/stop/{_count()}"
            # jax has taken SIGTERM for its own notice, which knows neither SIGINT nor a second signal.
            self._signals.take()
            self._start(self._poll)

    def hold(self) -> None:
        """Waits for the end of a process that is about to leave with the others, after an error of any of them."""
        if self._client is not None and self.number is not None:
            self._closed.wait(AGREEMENT_LIMIT)

    # What follows runs in the main thread when Python gets to it.

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._client is not None:
            return
        if self.number is None:
            # The thread says it, too, but may be late.
            self.number = number
        if self._leaving is not None and not self._raised:
            self._raised = True
            raise StopRequested

    # What follows runs in threads.

    def _start(self, target: Callable[[], None]) -> None:
        thread = threading.Thread(target=target, name=f"stopping{target.__name__}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _first(self, number: int) -> None:
        if self.number is None or self._client is None:
            self.number = number
            self._start(self._begin)

    def _again(self, number: int) -> None:
        self._end(f"{signal.Signals(number).name} came again: ended at once")

    def _begin(self) -> None:
        """The first signal has come to this process."""
        log.warning(
            "%s: the run saves and ends; a second one ends it at once",
            signal.Signals(self.number or 0).name,
        )
        if self._client is None:
            self._watch_over()
            return
        # The thread that polls reads it, as in the other processes.
        with contextlib.suppress(Exception):
            self._client.key_value_set(self._key, str(self.number), allow_overwrite=True)

    def _poll(self) -> None:
        """Of several processes: waits until one is told to stop, and agrees with the others when."""
        client = self._client
        while not self._closed.wait(POLL):
            try:
                found = client.key_value_try_get(self._key)
            except Exception as error:
                if "NOT_FOUND" in str(error):
                    continue
                return  # The job's coordinator is gone; jax ends this process.
            self.number = int(found)
            with self._lock:
                self._agree(client)
            self._watch_over()
            return

    def _agree(self, client: Any) -> None:
        """The step after which all end: the first that none has begun to go beyond."""
        index, count = jax.process_index(), jax.process_count()
        mine = f"{self._step} {int(self._leaving is not None)}"
        limit = int(1000 * AGREEMENT_LIMIT)
        try:
            client.key_value_set(f"{self._key}/at/{index}", mine)
            client.wait_at_barrier(f"{self._key}/known", limit)
            said = [
                client.blocking_key_value_get(f"{self._key}/at/{i}", limit) for i in range(count)
            ]
        except Exception as error:
            log.warning("the processes could not agree on a step to stop at: %s", error)
            self._leave_at_once = True
            return
        steps, busy = zip(*(map(int, text.split()) for text in said), strict=True)
        self._leave_at_once = any(busy)
        self._stop_at = max(steps) + 1

    def _watch_over(self) -> None:
        """Ends the process where the main thread cannot."""
        began, section = time.monotonic(), self._section
        while not self._closed.wait(0.05):
            now = time.monotonic()
            if self._client is not None:
                # Others may wait for this process inside a collective: none may go on alone.
                if self._leave_at_once or self._leaving is not None:
                    self._leave()
            elif self._leaving is not None:
                # A library may not come back to Python for minutes, as a compiler.
                if self._section != section:
                    began, section = now, self._section
                elif now - began > GRACE:
                    self._leave()
            waits = self._waits_since
            if waits is not None and now - max(began, waits) > DATA_LIMIT:
                self._end(
                    f"told to stop, and no data has come in {DATA_LIMIT:.0f} s: ended without saving"
                )

    def _leave(self) -> None:
        if self._leaving is not None:
            self._leaving()
        if self._client is not None:
            peers.leaving()
            threading.Timer(2 * GRACE, os._exit, (self.status,)).start()
            # The first process goes last: the others take its absence for a failure.
            with contextlib.suppress(Exception):
                self._client.wait_at_barrier(f"{self._key}/left", int(1000 * GRACE))
            if jax.process_index() == 0:
                time.sleep(0.5)
        self._end("told to stop where there was nothing to save: the same command goes on")

    def _end(self, message: str) -> None:
        # Nobody may read what is written.
        threading.Timer(2.0, os._exit, (self.status,)).start()
        log.warning("%s", message)
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(self.status)


_active: Stopping | None = None
_listens = 0


def _count() -> int:
    """Of the times that this process has listened; all processes of a job listen equally often."""
    global _listens
    _listens += 1
    return _listens


@contextlib.contextmanager
def listen() -> Iterator[Stopping]:
    """Takes SIGTERM and SIGINT while the block runs. Within such a block it returns that block's own.

    Only the main thread can take signals: in another one this changes nothing.

    Yields:
      What the job is told.
    """
    global _active
    if _active is not None:
        _active.join_processes()
        yield _active
        return
    stopping = Stopping()
    if threading.current_thread() is not threading.main_thread():
        yield stopping
        return
    stopping.take_signals()
    _active = stopping
    try:
        stopping.join_processes()
        yield stopping
    finally:
        _active = None
        stopping.close()
