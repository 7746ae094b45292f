"""What inputs know of a model: its input settings, the geometry of its crops, its vocabulary size.

The values come with the model (`models/config.py`, `weights/`); nothing here reads a file.
"""

from __future__ import annotations

import dataclasses

from llave_jax.common.ranges import ConfigError, check_whole
from llave_jax.inputs.crops import CropGeometry

NEWLINE_POSITIONS = ("grid", "frame", "one_token", "no_token")
POOL_MODES = ("bilinear", "average", "max")
# Far beyond any model, and small enough that no setting exhausts memory.
MAX_TOKENS = 1 << 24
MAX_PINPOINTS = 1024
MAX_CANVAS_SIDE = 1 << 16
MAX_VIDEO_FRAMES = 10_000


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
        for key, allowed in (("newline_position", NEWLINE_POSITIONS), ("pool_mode", POOL_MODES)):
            if getattr(self, key) not in allowed:
                raise ConfigError(key, f"is {getattr(self, key)!r:.60}; expected one of {allowed}")
        check_whole("pool_stride", self.pool_stride, 1, 1024)
        check_whole("max_text_length", self.max_text_length, 1, MAX_TOKENS)
        check_whole("max_length", self.max_length, 1, MAX_TOKENS)
        check_whole("max_frames", self.max_frames, 0, MAX_VIDEO_FRAMES)
        check_whole("frames_per_second", self.frames_per_second, 1, 1000)
        if self.anyres_max is not None:
            check_whole("anyres_max", self.anyres_max, 1, 10_000)
        if len(self.pinpoints) > MAX_PINPOINTS:
            raise ConfigError(
                "pinpoints", f"has {len(self.pinpoints)} canvases; expected at most {MAX_PINPOINTS}"
            )
        for canvas in self.pinpoints:
            if len(canvas) != 2:
                raise ConfigError("pinpoints", f"has {canvas!r:.60}; expected pairs of pixels")
            for side in canvas:
                check_whole("pinpoints", side, 1, MAX_CANVAS_SIDE)


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
