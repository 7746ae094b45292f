"""Where a run's time goes, kept in WORKDIR/sessions.json over all its restarts.

Each process that trains in WORKDIR is a session. Its seconds are divided among setting up (with compilation,
up to the end of the first step's dispatch), waiting for data, steps, checkpoints and evaluation. Goodput is the
share of the time since the first session began that went into steps that were not repeated later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import resource
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from llave_jax.common.files import write_text
from llave_jax.common.tables import align

FILE = "sessions.json"
# What a session's seconds are divided into; "steps" is what is left over.
SET_UP, DATA_WAIT, STEPS, CHECKPOINT, EVALUATION = (
    *("set-up", "data wait", "steps"),
    *("checkpoint", "evaluation"),
)
PARTS = (SET_UP, DATA_WAIT, STEPS, CHECKPOINT, EVALUATION)
log = logging.getLogger(__name__)

# Seconds between two writes of the file. So much of a killed session is not accounted for.
_WRITE_EVERY = 10.0


@dataclasses.dataclass
class Session:
    """One process of a run.

    Attributes:
      host, pid: of the process.
      began, seen: seconds since the epoch; `seen` is the last time that it was written.
      start, step: steps done when it began to train, and last.
      pairs: that its steps have trained on.
      seconds: by part.
      ended: "complete", "stopped", or how else the session says that it ended; "" if it was killed.
    """

    host: str
    pid: int
    began: float
    seen: float
    start: int = 0
    step: int = 0
    pairs: int = 0
    seconds: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    ended: str = ""


class Clock:
    """Divides the time of this process among PARTS, and keeps the sessions of the run.

    Args:
      workdir: the run's directory.
      enabled: False writes nothing, as on processes other than the first.
    """

    def __init__(self, workdir: Path, *, enabled: bool = True):
        self._path = workdir / FILE
        self._enabled = enabled
        now = time.time()
        self._session = Session(socket.gethostname(), os.getpid(), now, now)
        self._earlier = _read(self._path) if enabled else []
        self._part, self._since = SET_UP, time.monotonic()
        self._written = -_WRITE_EVERY
        self._lines: dict[str, float] = dict(self._session.seconds)

    @contextlib.contextmanager
    def spent(self, part: str) -> Iterator[None]:
        """Counts the time of the block as this part's.

        Args:
          part: one of PARTS.
        """
        before = self.turn_to(part)
        try:
            yield
        finally:
            self.turn_to(before)

    def turn_to(self, part: str) -> str:
        """Counts the time from now on as this part's.

        Args:
          part: one of PARTS.

        Returns:
          The part that it was before.
        """
        now, before = time.monotonic(), self._part
        self._session.seconds[before] += now - self._since
        self._part, self._since = part, now
        return before

    def begin(self, start: int) -> None:
        """Says from where this session trains.

        Args:
          start: steps done.
        """
        self._session.start = self._session.step = start

    def step(self, step: int, pairs: int) -> None:
        """Counts a step that the device has finished.

        Args:
          step: steps done.
          pairs: of this step.
        """
        self._session.step = step
        self._session.pairs += pairs
        if time.monotonic() - self._written > _WRITE_EVERY:
            self._write()

    def since_last_line(self) -> dict[str, float]:
        """Seconds of each part since the last call, by their names in the metrics file."""
        self.turn_to(self._part)
        seconds = self._session.seconds
        split = {
            f"seconds/{part.replace(' ', '_').replace('-', '_')}": seconds[part] - self._lines[part]
            for part in PARTS
            if part != SET_UP
        }
        self._lines = dict(seconds)
        return split

    def end(self, how: str) -> None:
        """Writes the session's end.

        Args:
          how: "complete", "stopped" or the name of an error.
        """
        self._session.ended = how
        # What made no step, as a finished run that is started again, is no session.
        if self._session.step > self._session.start:
            self._write()

    def summary(self, best: str = "") -> str:
        """A table of the run so far, of all its sessions.

        Args:
          best: what is said of the best parameters.
        """
        sessions = list(self._earlier)
        if self._session.step > self._session.start or not sessions:
            self.turn_to(self._part)
            self._session.seen = time.time()
            sessions.append(self._session)
        return summary(sessions, best)

    def _write(self) -> None:
        self._written = time.monotonic()
        if not self._enabled:
            return
        self.turn_to(self._part)
        self._session.seen = time.time()
        sessions = [dataclasses.asdict(s) for s in (*self._earlier, self._session)]
        write_text(self._path, json.dumps(sessions, indent=1) + "\n")


def goodput(workdir: Path) -> float:
    """The share of a run's time that went into steps that were not repeated.

    Args:
      workdir: the run's directory.

    Returns:
      The share; 0 of a run that has not begun.
    """
    sessions = _read(workdir / FILE)
    return _account(sessions)[0] if sessions else 0.0


def _account(sessions: list[Session]) -> tuple[float, dict[str, float], float]:
    """Goodput; seconds by part, with "repeated steps" and "between sessions"; share of pairs that count."""
    seconds = dict.fromkeys((*PARTS, "repeated steps", "between sessions"), 0.0)
    pairs = 0.0
    for index, session in enumerate(sessions):
        # Steps that a later session had to do again: it began before this one's last.
        later = min((s.start for s in sessions[index + 1 :]), default=session.step)
        done = session.step - session.start
        lost = min(done, max(0, session.step - later)) / done if done else 0.0
        for part in PARTS:
            seconds[part] += session.seconds.get(part, 0.0)
        repeated = lost * session.seconds.get(STEPS, 0.0)
        seconds[STEPS] -= repeated
        seconds["repeated steps"] += repeated
        pairs += (1 - lost) * session.pairs
    wall = sessions[-1].seen - sessions[0].began
    seconds["between sessions"] = max(0.0, wall - sum(seconds.values()))
    return seconds[STEPS] / wall if wall > 0 else 0.0, seconds, pairs


def summary(sessions: list[Session], best: str = "") -> str:
    """A table of a run's sessions together.

    Args:
      sessions: at least one.
      best: what is said of the best parameters.

    Returns:
      The table's text.
    """
    share, seconds, pairs = _account(sessions)
    wall = max(sessions[-1].seen - sessions[0].began, 1e-9)
    rows = [
        ["steps", f"{sessions[-1].step}", ""],
        ["pairs", f"{pairs:.0f}", ""],
        ["wall time", _clock(wall), ""],
        ["goodput", f"{100 * share:.1f}%", "of it in steps that were not repeated"],
    ]
    rows += [
        [f"  {part}", f"{100 * value / wall:.1f}%", _clock(value)]
        for part, value in seconds.items()
        if part != STEPS and value >= 0.5
    ]
    rows.append(["restarts", f"{len(sessions) - 1}", ""])
    name, peak = peak_memory()
    rows.append([name.rpartition("/")[2].replace("_", " "), f"{peak / 2**30:.2f} GiB", ""])
    if best:
        rows.append(["best", best, ""])
    return align([["the run", "", ""], *rows])


def peak_memory() -> tuple[str, float]:
    """The most memory that this process has used, on its devices where they tell.

    Returns:
      The metric's name, which says whose memory it is, and bytes: of the fullest device, or of the host.
    """
    stats: list[Any] = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    if peaks:
        return "memory/device_peak", float(max(peaks))
    unit = 1 if sys.platform == "darwin" else 1024
    return "memory/host_rss_peak", float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def _read(path: Path) -> list[Session]:
    if not path.exists():
        return []
    try:
        return [Session(**session) for session in json.loads(path.read_text(encoding="utf-8"))]
    except (ValueError, TypeError) as error:
        log.warning("%s: cannot be read (%s); times are counted from now on", path, error)
        return []


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}"
