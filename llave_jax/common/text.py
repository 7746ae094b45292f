"""Text for messages that people read."""

from __future__ import annotations

import re

# Paths are shorter, as a rule. What is longer without a space is data: a URI, an image in base64.
_LONG = 400
_KEPT = 60


def shortened(text: str) -> str:
    """A message in which each word of more than 400 characters is cut to its first 60.

    Args:
      text: a message that quotes what a user's file holds, whatever its length.

    Returns:
      The message; a word that was cut is followed by its length.
    """
    if len(text) <= _LONG:
        return text
    return re.sub(
        rf"\S{{{_LONG + 1},}}", lambda m: f"{m[0][:_KEPT]}... ({len(m[0])} characters)", text
    )


def bytes_text(count: int) -> str:
    """A number of bytes for people.

    Args:
      count: bytes.

    Returns:
      Such as "3.2 GB"; rounded, in powers of 1000.
    """
    value, units = float(count), ["bytes", "kB", "MB", "GB", "TB"]
    while value >= 999.5 and len(units) > 1:
        value /= 1000
        units.pop(0)
    return f"{value:.3g} {units[0]}"
