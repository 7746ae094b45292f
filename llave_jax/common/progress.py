"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

# Seconds between two lines, if stderr is not a terminal.
_LINE_SECONDS = 30.0


class Progress:
    """Counts units of work and shows how many are done, how fast, and how much time is left.

    Use as a context manager. On a terminal it is a tqdm bar; elsewhere a line to stderr every half minute, with the
    rate since the line before (what was slow at the start, such as compiling, says nothing of the rest), and one at
    the end with that of all.

    Args:
      total: number of units; None if it is not known.
      label: of the work, in front of the numbers.
      unit: what is counted, in the plural.
      enabled: False for no output, as on processes other than the first.
      initial: units that an earlier run has done.
    """

    def __init__(
        self,
        total: int | None,
        label: str,
        *,
        unit: str = "items",
        enabled: bool = True,
        initial: int = 0,
    ):
        self._total, self._label, self._unit = total, label, unit
        self._initial = self._done = initial
        self._start = self._last = time.monotonic()
        self._last_done = initial
        self._note = ""
        self._plain = enabled and not sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=initial,
            desc=label,
            unit=f" {unit}",
            disable=not enabled or self._plain,
            dynamic_ncols=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *exc) -> None:
        self._bar.close()
        if self._plain:
            seconds = time.monotonic() - self._start
            self._line(self._done - self._initial, seconds, f"{_clock(seconds)} in all", self._note)

    def skip(self, count: int) -> None:
        """Count units that an earlier run has done: they do not enter the rate.

        Args:
          count: number of units.
        """
        self._initial += count
        self._done += count
        self._last_done += count
        self._start = time.monotonic()
        if not self._bar.disable:
            self._bar.initial += count
            self._bar.n += count
            self._bar.last_print_n += count
            self._bar.unpause()
            self._bar.refresh()

    def update(self, count: int = 1, note: str = "") -> None:
        """Count units that are done.

        Args:
          count: number of units.
          note: shown behind the rate.
        """
        self._done += count
        self._bar.update(count)
        self._note = note
        if note:
            self._bar.set_postfix_str(note, refresh=False)
        now = time.monotonic()
        done, seconds = self._done - self._last_done, now - self._last
        if self._plain and done and seconds >= _LINE_SECONDS:
            time_said = f"{_clock(now - self._start)} in all"
            if self._total is not None and self._done < self._total:
                time_said = f"{_clock((self._total - self._done) * seconds / done)} left"
            self._line(done, seconds, time_said, note)
            self._last, self._last_done = now, self._done

    def _line(self, done: int, seconds: float, time_said: str, note: str) -> None:
        rate = done / seconds if seconds > 0 else 0.0
        text = f"{self._label}: {self._done}"
        if self._total is not None:
            text += f" of {self._total}"
        shown = f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
        text += f" {self._unit}, {shown}/s"
        print(f"{text}, {time_said}  {note}".rstrip(), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
