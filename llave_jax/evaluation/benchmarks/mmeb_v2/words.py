"""How MMEB-V2 puts an instruction and a content into one text. The instructions are with their readers."""

from __future__ import annotations

# LLaVE's marker of a picture, and of a video.
IMAGE = VIDEO = "<image>"


def compose(marker: str, instruction: str, text: str = "") -> str:
    """Marker, instruction and text, with a space between each.

    Args:
      marker: IMAGE, VIDEO, or "" for a text alone.
      instruction: of the task.
      text: what it is about; "" for none.

    Returns:
      The text.
    """
    composed = f"{marker} {instruction}" if marker else instruction
    return f"{composed} {text}" if text else composed
