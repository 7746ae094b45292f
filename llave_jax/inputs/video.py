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
    """Indices of the frames the model sees: `frames_per_second` of video, at most `max_frames`.

    A clip that would give more has `max_frames` taken evenly from its first to its last frame.
    `max_frames = 0` sets no limit.
    """
    if num_frames < 1:
        raise ValueError(f"the video has {num_frames} frames; expected at least one")
    step = max(round(average_fps / frames_per_second), 1)
    indices = list(range(0, num_frames, step))
    if max_frames and len(indices) > max_frames:
        indices = np.linspace(0, num_frames - 1, max_frames, dtype=int).tolist()
    return indices


def load_frames(video: VideoLike, config: InputConfig, name: str = "") -> list[PIL.Image.Image]:
    """RGB frames of a video: sampled from a file, or all of those that are given."""
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
    """Visual tokens of a video over one crop for each frame: [V].

    Each frame's map of side x side patches is pooled by `pool_stride`; newlines go where
    `newline_position` says: after every row (`grid`), after every frame (`frame`), at the very end
    (`one_token`) or nowhere (`no_token`).
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
