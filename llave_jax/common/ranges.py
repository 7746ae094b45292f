"""Numbers that a configuration may have."""

from __future__ import annotations

import numbers
from typing import Any


class ConfigError(ValueError):
    """A field of a configuration with a value that it cannot have.

    Args:
      key: the field.
      reason: what is wrong, and what is expected.
    """

    def __init__(self, key: str, reason: str):
        super().__init__(f"{key} {reason}")
        self.key = key
        self.reason = reason

    def __reduce__(self):
        return ConfigError, (self.key, self.reason)


def check_whole(key: str, value: Any, low: int, high: int) -> None:
    """Refuses what is not a whole number of a range.

    Args:
      key: the field, for the message.
      value: its value.
      low, high: the smallest and the largest number that it may be.

    Raises:
      ConfigError: it is another number, or none.
    """
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not low <= int(value) <= high:
        raise ConfigError(key, f"is {value!r:.60}; expected a whole number from {low} to {high}")


def check_real(key: str, value: Any, low: float, high: float) -> None:
    """Refuses what is not a finite number of a range.

    Args:
      key: the field, for the message.
      value: its value.
      low, high: the smallest and the largest number that it may be.

    Raises:
      ConfigError: it is another number, NaN, or none.
    """
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    # NaN is within no range.
    if not real or not low <= float(value) <= high:
        raise ConfigError(key, f"is {value!r:.60}; expected a number from {low:g} to {high:g}")
