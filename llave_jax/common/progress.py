"""Progress of long work: a bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm

# Seconds between two lines, if stderr is not a terminal.
_LINE_SECONDS = 30.0


class Progress:
    """Counts units of work and shows how many are done, how fast, and how much time is left.

    Use as a context manager. On a terminal it is a tqdm bar; elsewhere a line to stderr every half minute
    and at the end.

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
            self._line(self._note)

    def skip(self, count: int) -> None:
        """Count units that an earlier run has done: they do not enter the rate.

        Args:
          count: number of units.
        """
        self._initial += count
        self._done += count
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
        if self._plain and now - self._last >= _LINE_SECONDS:
            self._last = now
            self._line(note)

    def _line(self, note: str = "") -> None:
        seconds = time.monotonic() - self._start
        rate = (self._done - self._initial) / seconds if seconds > 0 else 0.0
        text = f"{self._label}: {self._done}"
        if self._total is not None:
            text += f" of {self._total}"
        shown = f"{rate:.0f}" if rate >= 100 else f"{rate:.3g}"
        text += f" {self._unit}, {shown}/s"
        if self._total is not None and rate > 0 and self._done < self._total:
            text += f", {_clock((self._total - self._done) / rate)} left"
        else:
            text += f", {_clock(seconds)} in all"
        print(f"{text}  {note}".rstrip(), file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
