"""Small pictures of a page: images, pages of documents, frames of videos, within a number of bytes and of seconds.

Owns how they are read, made smaller and encoded. Which ones are shown is `report_examples.py`.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import PIL.Image

from llave_jax.common.extras import MissingPackage
from llave_jax.inputs import video_decode
from llave_jax.inputs.images import ImageError, load_image
from llave_jax.inputs.item import ImageLike, Item

# Of all pictures of a page together, as base64.
TOTAL_BYTES = 8 << 20
# One picture gets no more, even if there are few.
_MOST_BYTES = 16 << 10
# (longest side in pixels, quality): the first whose file is small enough is taken, or the last.
_SIZES = ((256, 80), (256, 65), (192, 70), (144, 75), (144, 60), (112, 55), (80, 45), (48, 30))
# Pictures of fewer pixels a side are kept as they are, and shown in whole multiples.
_TINY = 72
_TINY_SHOWN = 144
# Reading pictures ends after so many seconds: the scores are known, and a page is not worth waiting for.
SECONDS = 180.0
_THREADS = 4


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture in the page.

    Attributes:
      source: a data URI.
      width, height: pixels in which it is shown.
      tiny: whether these are a multiple of its own.
    """

    source: str
    width: int
    height: int
    tiny: bool = False


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The pictures of one item.

    Attributes:
      shown: none for a text.
      what: in words, such as "frames of a video"; "" for a text.
      note: why pictures are absent that should be there; "" if none are.
    """

    shown: tuple[Picture, ...] = ()
    what: str = ""
    note: str = ""


class Reader:
    """Reads the pictures of a page.

    Args:
      count: items with pictures that there may be; those of which several frames are shown count twice.
      total_bytes: of all pictures together.
      seconds: for all of them together.

    Attributes:
      late: items whose pictures were left out, because the time was over.
    """

    def __init__(self, count: int, total_bytes: int = TOTAL_BYTES, seconds: float = SECONDS):
        # Three bytes are four characters of base64.
        self._bytes = min(_MOST_BYTES, total_bytes * 3 // 4 // max(1, count))
        self._end = time.monotonic() + seconds
        self.late = 0

    def read(self, items: Sequence[Item], frames: Sequence[int]) -> list[Pictures]:
        """Pictures of some items; several are read at a time.

        Args:
          items: with images, a video, or neither.
          frames: for each how many frames of a video are shown: 1 (the middle one) or more, evenly spread.

        Returns:
          What is shown of each, in order.
        """
        with ThreadPoolExecutor(_THREADS) as pool:
            found = list(pool.map(self._one, items, frames))
        self.late += sum(pictures.note == _LATE for pictures in found)
        return found

    def _one(self, item: Item, frames: int) -> Pictures:
        images = [image for image in item.images if image is not None]
        if not images and item.video is None:
            return Pictures()
        left = self._end - time.monotonic()
        if left <= 0:
            return Pictures(note=_LATE)
        try:
            if images:
                what = "image" if len(images) == 1 else f"first of {len(images)} images"
                return Pictures((self._small(load_image(images[0], item.name), 1),), what)
            found = _frames(item, frames, left)
        except MissingPackage as error:
            return Pictures(note=str(error))
        except (ImageError, OSError):
            return Pictures(note="The picture cannot be read.")
        what = "middle frame of a video" if len(found) == 1 else f"{len(found)} frames of a video"
        return Pictures(tuple(self._small(frame, len(found)) for frame in found), what)

    def _small(self, picture: PIL.Image.Image, share: int) -> Picture:
        """One of `share` pictures of an item, in its part of the bytes."""
        limit = self._bytes if share == 1 else 2 * self._bytes // share
        longest = max(picture.size)
        if longest <= _TINY:
            encoded = _encode(picture, "PNG")
            if len(encoded) <= limit:
                factor = max(1, _TINY_SHOWN // longest)
                width, height = picture.width * factor, picture.height * factor
                return Picture(_uri("png", encoded), width, height, tiny=True)
        encoded, small = b"", picture.copy()
        for side, quality in _SIZES:
            small.thumbnail((side, side))
            encoded = _encode(small, "JPEG", quality=quality)
            if len(encoded) <= limit:
                break
        return Picture(_uri("jpeg", encoded), *small.size)


_LATE = "The picture was left out: reading pictures took too long."


def _encode(picture: PIL.Image.Image, kind: str, **options: int) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def _uri(kind: str, encoded: bytes) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}"


def _frames(item: Item, wanted: int, seconds: float) -> list[PIL.Image.Image]:
    def places(count: int) -> list[int]:
        return sorted({(2 * n + 1) * count // (2 * wanted) for n in range(wanted)})

    video = item.video
    assert video is not None
    if isinstance(video, str | os.PathLike):
        return video_decode.decode_frames(
            video, lambda count, rate: places(count), item.name, max_seconds=seconds
        )
    frames: Sequence[ImageLike] = video
    return [load_image(frames[place], item.name) for place in places(len(frames))]
