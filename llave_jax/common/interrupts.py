"""How a command ends that is told to: SIGTERM, and Ctrl-C (SIGINT).

The signal raises `Interrupted` in the main thread, so that temporary files are removed on the way out. A
process that does not come back to Python within seconds, as in a compiler, is ended by a thread; so it is by a
second signal. The exit status is 128 plus the signal's number, as shells say it. Training, which saves first,
takes the signals for itself.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Seconds that Python code has to end by itself.
GRACE = 5.0
# Seconds within which a repeated signal is the same: `timeout` and some shells send each one twice.
REPEAT = 0.3
_PACKAGE = Path(__file__).parents[1]


class Interrupted(BaseException):
    """A signal ends the command. No error: `except Exception` lets it pass.

    Attributes:
      number: of the signal.
    """

    def __init__(self, number: int):
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number

    @property
    def status(self) -> int:
        """The exit status."""
        return 128 + self.number


def quiet_while_starting() -> None:
    """Lets signals end a command of this package without a traceback while modules are still imported.

    In a process that runs something else nothing changes.
    """
    if _is_command() and threading.current_thread() is threading.main_thread():
        for number in SIGNALS:
            signal.signal(number, _leave_at_once)


def _is_command() -> bool:
    """Whether this process was started as `python -m llave_jax.NAME`, `llave-NAME` or `python tools/NAME.py`."""
    words = sys.orig_argv
    if "-m" in words[:-1]:
        module = words[words.index("-m") + 1]
        if module.startswith("llave_jax."):
            return True
    program = Path(sys.argv[0] if sys.argv else "")
    in_tools = program.parent.absolute() == _PACKAGE.parent / "tools"
    return in_tools or program.name.startswith("llave-")


def _leave_at_once(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """While the block runs, SIGTERM and SIGINT raise `Interrupted` in it.

    Only the main thread can take signals: in another one this changes nothing.

    Raises:
      Interrupted: a signal has come.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    global _active
    outer, _active = _active, _Taker()
    try:
        yield
    finally:
        _active.close()
        _active = outer


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """A short block within `interruptible` that is not left half done: a signal that comes raises at its end.

    Raises:
      Interrupted: a signal has come.
    """
    if _active is None:
        yield
        return
    _active.defers = True
    try:
        yield
    finally:
        _active.defers = False
    _active.raise_if_due()


def take_again() -> None:
    """Takes the signals back from a library, within `interruptible`: `jax.distributed` takes SIGTERM."""
    if _active is not None:
        _active.signals.take()


class SignalThread:
    """Takes SIGINT and SIGTERM until it is closed, also while the main thread does not come back to Python.

    Args:
      handler: runs in the main thread when Python gets to it, as one of `signal.signal`.
      first: runs in a thread of its own, with the number of the first signal.
      again: the same, with the number of a later one.
    """

    def __init__(
        self,
        handler: Callable[[int, FrameType | None], None],
        first: Callable[[int], None],
        again: Callable[[int], None],
    ):
        self._handler, self._first, self._again = handler, first, again
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before: dict[int, Any] = {number: signal.getsignal(number) for number in SIGNALS}
        self.take()
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._watch, name="signals", daemon=True)
        self._thread.start()

    def take(self) -> None:
        """Takes the signals back from a library."""
        for number in SIGNALS:
            signal.signal(number, self._handler)

    def close(self) -> None:
        """Gives the signals back to whoever had them before."""
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        os.close(self._write)
        if threading.current_thread() is not self._thread:
            self._thread.join(REPEAT)

    def _watch(self) -> None:
        told: float | None = None
        while numbers := os.read(self._read, 16):
            for number in numbers:
                # Others may have taken a signal for themselves meanwhile.
                if number not in SIGNALS or signal.getsignal(number) != self._handler:
                    continue
                now = time.monotonic()
                if told is None:
                    told = now
                    self._first(number)
                elif now - told > REPEAT:
                    self._again(number)
        os.close(self._read)


class _Taker:
    def __init__(self) -> None:
        self._number: int | None = None
        self._raised = False
        self.defers = False
        self._closed = False
        self.signals = SignalThread(self._raise, self._end_later, self._end)
        self._hook, sys.unraisablehook = sys.unraisablehook, self._report_unraisable

    def close(self) -> None:
        self.signals.close()
        sys.unraisablehook = self._hook
        if self._number is not None and _is_command():
            # The interpreter still waits for threads, and jax for other processes.
            self._end_later(self._number)
        else:
            self._closed = True

    def _raise(self, number: int, frame: FrameType | None) -> None:
        if self._number is None:
            self._number = number
            self.raise_if_due()

    def raise_if_due(self) -> None:
        if self._number is not None and not (self._raised or self.defers):
            self._raised = True
            raise Interrupted(self._number)

    def _report_unraisable(self, unraisable: Any) -> None:
        """Python cannot raise in some places, such as a destructor: the timer ends the process then."""
        if not isinstance(unraisable.exc_value, Interrupted):
            self._hook(unraisable)

    def _end_later(self, number: int) -> None:
        timer = threading.Timer(GRACE, self._end, (number,))
        timer.daemon = True
        timer.start()

    def _end(self, number: int) -> None:
        if self._closed:
            return
        for child in multiprocessing.active_children():
            child.kill()
        os._exit(128 + number)


_active: _Taker | None = None
