"""What inputs know of a model: its input settings, the geometry of its crops, its vocabulary size.

The values come with the model (`models/config.py`, `weights/`); nothing here reads a file.
"""

from __future__ import annotations

import dataclasses

from llave_jax.inputs.crops import CropGeometry

NEWLINE_POSITIONS = ("grid", "frame", "one_token", "no_token")
POOL_MODES = ("bilinear", "average", "max")


@dataclasses.dataclass(frozen=True)
class InputConfig:
    """How items become token sequences (LLaVE section 4.1; LLaVA-OneVision, Higher AnyRes).

    Attributes:
      pinpoints: the candidate canvases as (height, width) in pixels, in the order of the checkpoint's
        `image_grid_pinpoints`, which decides ties. Empty: images have no tiles.
      anyres_max: tiles that an image's visual tokens may fill; more are resized to so many. It is the 9
        of `anyres_max_9`. None: no limit, as in plain `anyres`.
      newline_position: where a video's newline tokens go, one of NEWLINE_POSITIONS.
      pool_mode: how a video frame's patches are pooled, one of POOL_MODES.
      pool_stride: patches pooled into one, along each side of a frame.
      max_text_length: token ids that are kept before visual tokens are inserted (the tokenizer's
        `model_max_length`).
      max_length: tokens that are kept of the whole sequence.
      max_frames: frames that are read of a video file; 0: no limit.
      frames_per_second: of video that are read, unless they are more than `max_frames`.
    """

    pinpoints: tuple[tuple[int, int], ...]
    anyres_max: int | None = 9
    newline_position: str = "one_token"
    pool_mode: str = "bilinear"
    pool_stride: int = 2
    max_text_length: int = 32768
    max_length: int = 4096
    max_frames: int = 32
    frames_per_second: int = 3

    def __post_init__(self):
        if self.newline_position not in NEWLINE_POSITIONS:
            raise ValueError(
                f"newline_position is {self.newline_position!r}; expected one of {NEWLINE_POSITIONS}"
            )
        if self.pool_mode not in POOL_MODES:
            raise ValueError(f"pool_mode is {self.pool_mode!r}; expected one of {POOL_MODES}")


@dataclasses.dataclass(frozen=True)
class InputSpec:
    """What `SequenceBuilder` must know of a model.

    Attributes:
      config: the model's input settings.
      crop: the geometry of the vision tower's crops.
      vocab_size: rows of the model's token embedding: token ids are smaller.
    """

    config: InputConfig
    crop: CropGeometry
    vocab_size: int


def grid_pinpoints(tile: int, rows: int, columns: int) -> tuple[tuple[int, int], ...]:
    """All canvases of 1..rows by 1..columns tiles, as (height, width) in pixels.

    The order is the authors': they list (width, height) with the height running fastest.

    Args:
      tile: pixels of a tile's side.
      rows: most tiles from top to bottom.
      columns: most tiles from left to right.

    Returns:
      `InputConfig.pinpoints`.
    """
    return tuple((r * tile, c * tile) for c in range(1, columns + 1) for r in range(1, rows + 1))
