"""Loading processes: one that stalls or dies is named with the row it was at; all end with their parent."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llave_jax.common.workers import follow_parent

log = logging.getLogger(__name__)

# Seconds between two looks at the row that is waited for.
_POLL = 1.0
# grain's error when a worker process has ended.
_ENDED = "terminated unexpectedly with exit code"


class WorkerLost(RuntimeError):
    """A loading process has ended, most often since the system ran out of memory."""


def prepare_worker(worker: int, workers: int) -> None:
    """Called in a worker process as it starts.

    It lives on after SIGTERM, which SLURM sends to every process of a job: training then makes a few more steps,
    saves, and ends its workers itself.

    Args:
      worker: number of the worker process.
      workers: how many there are.
    """
    follow_parent()


class Waiting:
    """Watches the rows that a stream waits for. It warns of one that does not come.

    Args:
      workers: loading processes; 0: threads of this process.
      start: the stream's first position. Positions go to the workers in turn.
      limit: seconds until the first warning; each further one comes after twice as many. 0: none.
      row_name: position -> the row's name.
    """

    def __init__(self, workers: int, start: int, limit: float, row_name: Callable[[int], str]):
        self._workers, self._start, self._limit, self._row_name = workers, start, limit, row_name
        self._pids: dict[int, int] = {}
        self._at: tuple[int, float] | None = None
        self._closed = threading.Event()
        if limit:
            threading.Thread(target=self._watch, name="stalled_rows", daemon=True).start()

    @contextlib.contextmanager
    def row(self, position: int) -> Iterator[None]:
        """The block waits for the row at a position.

        Args:
          position: in the order.

        Raises:
          WorkerLost: a worker has ended; it names the worker and the row.
        """
        self._at = (position, time.monotonic())
        try:
            yield
        except RuntimeError as error:
            if _ENDED not in str(error):
                raise
            code = str(error).partition(_ENDED)[2].split(".")[0].strip()
            raise WorkerLost(
                f"{self._who(position)} has ended with status {code}; the row waited for is "
                f"{self._row_name(position)}. If the system ran out of memory (status -9), lower "
                "config.data.num_workers"
            ) from error
        finally:
            self._at = None

    def came(self, position: int, pid: int) -> None:
        """Notes which process has loaded the row at a position.

        Args:
          position: in the order.
          pid: of the process.
        """
        self._pids[self._worker(position)] = pid

    def close(self) -> None:
        """Ends the watch."""
        self._closed.set()

    def _worker(self, position: int) -> int:
        return (position - self._start) % self._workers if self._workers else 0

    def _who(self, position: int) -> str:
        if not self._workers:
            return "loading in this process"
        pid = self._pids.get(self._worker(position))
        known = f" (pid {pid}{_state(pid)})" if pid else ""
        return f"loading process {self._worker(position)} of {self._workers}{known}"

    def _watch(self) -> None:
        warned, limit = None, self._limit
        while not self._closed.wait(min(_POLL, self._limit)):
            at = self._at
            if at != warned:
                warned, limit = at, self._limit
            if at is not None and time.monotonic() - at[1] > limit:
                limit = 2 * limit
                log.warning(
                    "no row has come for %.0f s: %s is at %s",
                    time.monotonic() - at[1],
                    self._who(at[0]),
                    self._row_name(at[0]),
                )


def _state(pid: int) -> str:
    """What Linux says of a process that does not run as it should."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
    words = {"T": ", stopped", "t": ", stopped", "D": ", waiting for a disk", "Z": ", ended"}
    return words.get(state, "")
