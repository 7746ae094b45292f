"""Frames of a video file by their index, with PyAV (extra `video`).

Owns opening and decoding; which frames are read is `video.py`. Frame i is the i-th frame the
decoder shows, in presentation order. Time stamps, and so a variable frame rate, have no influence.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Collection, Iterator
from fractions import Fraction
from typing import Any

import PIL.Image

from llave_jax.common import extras
from llave_jax.inputs.images import ImageError

try:
    import av as _av
except ImportError:
    _av = None
# Any: the names that it exports are unknown to type checkers.
av: Any = _av

# Containers that hold their frames themselves: FFmpeg's names of formats. Others, such as playlists (m3u8, concat,
# mpd), name further files or addresses, and may have no end.
CONTAINERS = (
    *(
        "mov",
        "mp4",
        "m4a",
        "3gp",
        "3g2",
        "mj2",
        "matroska",
        "webm",
        "avi",
        "mpeg",
        "mpegts",
        "mpegvideo",
    ),
    *("m4v", "h264", "hevc", "ivf", "flv", "asf", "ogg", "gif", "wav", "mxf", "nut"),
)
# Limits of a file. A film of two hours has 216 000 frames; 8K has 33 million pixels.
MAX_FRAMES = 1_000_000
MAX_FRAME_PIXELS = 40_000_000
MAX_FRAMES_READ = 10_000
# Seconds for one reading of a file, unless the caller allows fewer. A damaged file can keep a decoder busy without end.
MAX_SECONDS = 1800.0

# (number of frames, average frames per second) -> indices of the frames to read, ascending.
IndicesFn = Callable[[int, float], Collection[int]]


def check_installed() -> None:
    """Looks for the package that reads video files.

    Raises:
      MissingPackage: it is not installed.
    """
    if av is None:
        raise extras.missing("av", "video files")


def decode_frames(
    path: str | os.PathLike,
    indices_fn: IndicesFn,
    name: str = "",
    max_seconds: float | None = None,
) -> list[PIL.Image.Image]:
    """RGB frames of the file's first video stream, at the indices asked for.

    The file is read once to count its frames and once to decode them. Should fewer decode than it
    announces (a truncated file), the indices are asked for again with the number that do.

    Args:
      path: a video file in one of CONTAINERS, with any codec that FFmpeg reads.
      indices_fn: called with the number of frames and the stream's average rate.
      name: where the video comes from (file, row), for errors.
      max_seconds: for one reading of the file; None: MAX_SECONDS.

    Returns:
      Images of mode "RGB", one for each index.

    Raises:
      ImageError: missing or unreadable file, no video stream, no frame that decodes, or one of the limits above
        is exceeded.
      MissingPackage: PyAV is not installed.
    """
    check_installed()
    max_seconds = MAX_SECONDS if max_seconds is None else max_seconds
    path = os.fspath(path)
    where = f"{name} ({path})" if name and path not in name else path
    if not os.path.isfile(path):
        raise ImageError(where, "the video file does not exist")
    announced, fps = _count(path, where, max_seconds)
    indices = list(indices_fn(announced, fps))
    if len(indices) > MAX_FRAMES_READ:
        raise ImageError(
            where,
            f"{len(indices)} frames would be read; the limit is {MAX_FRAMES_READ} (max_frames of the model)",
        )
    frames, decoded = _decode(path, where, set(indices), max_seconds)
    if decoded == 0:
        raise ImageError(where, f"none of its {announced} video frames can be decoded")
    if decoded != announced:
        logging.getLogger(__name__).warning(
            "%s: %d of %d frames decode; sampling from those", where, decoded, announced
        )
        again = list(indices_fn(decoded, fps))
        if again != indices:
            indices = again
            frames, _ = _decode(path, where, set(indices), max_seconds)
    return [frames[index] for index in indices]


def _open(path: str, where: str, max_seconds: float):
    # An absolute path has no prefix such as "concat:" that FFmpeg would take for a protocol.
    options = {"format_whitelist": ",".join(CONTAINERS), "protocol_whitelist": "file"}
    try:
        container = av.open(os.path.abspath(path), options=options, timeout=max_seconds)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise ImageError(
            where, f"not a readable video in a container such as mp4, mkv, webm or avi: {error}"
        ) from error
    if not container.streams.video:
        container.close()
        raise ImageError(where, "the file has no video stream")
    context = container.streams.video[0].codec_context
    try:
        if context is None:
            raise ImageError(where, "its codec is not known")
        _check_pixels(context.width, context.height, where)
        # The frames themselves may be larger than the file says.
        context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
    except ImageError:
        container.close()
        raise
    return container


def _check_pixels(width: int, height: int, where: str) -> None:
    if width * height > MAX_FRAME_PIXELS:
        raise ImageError(
            where, f"frames of {width} x {height} pixels; the limit is {MAX_FRAME_PIXELS} in all"
        )


class _Limit:
    """Counts frames or packets of one reading, and its time."""

    def __init__(self, where: str, seconds: float):
        self._where = where
        self._count = 0
        self._seconds = seconds
        self._end = time.monotonic() + seconds

    def add(self) -> None:
        """One more; raises ImageError at a limit."""
        self._count += 1
        if self._count > MAX_FRAMES:
            raise ImageError(self._where, f"more than {MAX_FRAMES} frames, the limit of a video")
        if time.monotonic() > self._end:
            raise ImageError(self._where, f"is not read within {self._seconds:.0f} seconds")


def _count(path: str, where: str, max_seconds: float) -> tuple[int, float]:
    """Frames announced by the container's packets, and the average frame rate."""
    with _open(path, where, max_seconds) as container:
        stream = container.streams.video[0]
        rate: Fraction | None = stream.average_rate or stream.guessed_rate
        count = 0
        try:
            limit = _Limit(where, max_seconds)
            for packet in container.demux(stream):
                limit.add()
                # The demuxer ends with an empty packet; edit lists mark packets not to be shown.
                count += bool(packet.size) and not packet.is_discard
        except av.FFmpegError as error:
            logging.getLogger(__name__).warning("%s: reading stops early: %s", where, error)
    if count == 0:
        raise ImageError(where, "the video stream is empty")
    if not rate:
        raise ImageError(where, "the file does not say its frame rate; remux it with one")
    return count, float(rate)


def _decode(
    path: str, where: str, indices: set[int], max_seconds: float
) -> tuple[dict[int, PIL.Image.Image], int]:
    """The frames at `indices` by their index, and how many frames the file decodes to."""
    frames: dict[int, PIL.Image.Image] = {}
    decoded = 0
    with _open(path, where, max_seconds) as container:
        for frame in _shown_frames(container, where, max_seconds):
            if decoded in indices:
                _check_pixels(frame.width, frame.height, where)
                frames[decoded] = frame.to_image()
            decoded += 1
    return frames, decoded


def _shown_frames(container, where: str, max_seconds: float) -> Iterator[Any]:
    """Frames in presentation order; what is damaged is left out and logged."""
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    packets = container.demux(stream)
    limit = _Limit(where, max_seconds)
    while True:
        limit.add()
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.FFmpegError:
            # Already reported by the count. The decoder still holds frames.
            yield from stream.codec_context.decode(None)
            return
        try:
            shown = packet.decode()
        except av.FFmpegError as error:
            # A damaged packet costs its own frame; decoding goes on at the next.
            logging.getLogger(__name__).warning("%s: broken packet: %s", where, error)
            continue
        yield from shown
