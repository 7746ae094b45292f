"""Videos: which frames are seen, and the visual tokens they become.

Decoding video files is `video_decode.py`.
"""

from __future__ import annotations

import math
import os

import numpy as np
import PIL.Image

from llave_jax.inputs import images
from llave_jax.inputs import taps as T
from llave_jax.inputs.config import InputConfig
from llave_jax.inputs.crops import CropGeometry
from llave_jax.inputs.item import VideoLike


def sample_frame_indices(
    num_frames: int, average_fps: float, *, frames_per_second: int = 3, max_frames: int = 32
) -> list[int]:
    """Indices of the frames that the model sees.

    They are one in every so many. If these are more than `max_frames`, so many frames are taken, evenly
    from the first to the last.

    Args:
      num_frames: of the video.
      average_fps: frames of the video in a second.
      frames_per_second: frames to take of each second.
      max_frames: the most frames to take; 0: no limit.

    Returns:
      Indices in increasing order, at least one.

    Raises:
      ValueError: the video has no frames.
    """
    if num_frames < 1:
        raise ValueError(f"the video has {num_frames} frames; expected at least one")
    step = max(round(average_fps / frames_per_second), 1)
    indices = list(range(0, num_frames, step))
    if max_frames and len(indices) > max_frames:
        indices = np.linspace(0, num_frames - 1, max_frames, dtype=int).tolist()
    return indices


def load_frames(video: VideoLike, config: InputConfig, name: str = "") -> list[PIL.Image.Image]:
    """The frames of a video: sampled from a file, or all of those that are given.

    Args:
      video: a path, or frames.
      config: says how a file is sampled.
      name: where the video comes from (file, row), for errors.

    Returns:
      Images of mode "RGB".

    Raises:
      ImageError: the file or a frame cannot be read.
      ValueError: there are no frames.
    """
    if isinstance(video, str | os.PathLike):
        from llave_jax.inputs import video_decode

        return video_decode.decode_frames(
            video,
            lambda num_frames, average_fps: sample_frame_indices(
                num_frames,
                average_fps,
                frames_per_second=config.frames_per_second,
                max_frames=config.max_frames,
            ),
            name,
        )
    frames = [images.load_image(frame, name) for frame in video]
    if not frames:
        raise ValueError(f"{name or 'item'}: the video has no frames")
    return frames


def video_taps(num_frames: int, config: InputConfig, crop: CropGeometry) -> T.Taps:
    """Visual tokens of a video that has one crop for each frame.

    The map of each frame's patches is pooled by `pool_stride`. Newlines go where `newline_position` says:
    after every row (`grid`), after every frame (`frame`), at the very end (`one_token`) or nowhere
    (`no_token`).

    Args:
      num_frames: of the video.
      config: the model's input settings.
      crop: the geometry of its crops.

    Returns:
      Taps [V].
    """
    side = crop.patches_per_side
    frame = T.crop_map(0, 1, 1, side)
    if config.pool_mode == "bilinear":
        pooled_side = math.ceil(side / config.pool_stride)
        frame = T.resize_bilinear(frame, pooled_side, pooled_side)
    else:
        frame = T.pool_windows(frame, config.pool_stride, take_max=config.pool_mode == "max")
    rows, columns = frame.shape
    offsets = np.arange(num_frames, dtype=np.int32)[:, None, None, None] * side**2
    frames = T.Taps(
        frame.index[None] + offsets,
        np.broadcast_to(frame.weight, (num_frames, *frame.weight.shape)),
    )
    match config.newline_position:
        case "grid":
            rows_of_newlines = T.newlines(num_frames, rows, 1)
            return T.concatenate([frames, rows_of_newlines], 2).reshape(-1)
        case "frame":
            frames = frames.reshape(num_frames, rows * columns)
            return T.concatenate([frames, T.newlines(num_frames, 1)], 1).reshape(-1)
        case "one_token":
            return T.concatenate([frames.reshape(-1), T.newlines(1)])
        case _:
            return frames.reshape(-1)
