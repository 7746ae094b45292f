"""Small JPEG pictures of items, for pages that show what was found."""

from __future__ import annotations

import io
import os

import PIL.Image
import PIL.ImageOps

from llave_jax.inputs.images import ImageError, load_image
from llave_jax.inputs.item import ImageLike, Item

SIDE = 256
_QUALITY = 80


def make_thumbnail(item: Item) -> bytes | None:
    """A picture of an item: its first image, or the middle frame of its video.

    It is turned upright as the camera says; what the model sees is not.

    Args:
      item: of any kind.

    Returns:
      A JPEG file of at most SIDE x SIDE pixels; None for a text, and for a picture that cannot be read.
    """
    try:
        picture = _picture(item)
    except (ImageError, OSError, ImportError):
        return None
    if picture is None:
        return None
    small = picture.copy()
    small.thumbnail((SIDE, SIDE))
    small = PIL.ImageOps.exif_transpose(small)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _picture(item: Item) -> PIL.Image.Image | None:
    images: list[ImageLike] = [image for image in item.images if image is not None]
    if images:
        return load_image(images[0])
    if item.video is None:
        return None
    if isinstance(item.video, str | os.PathLike):
        from llave_jax.inputs.video_decode import decode_frames

        return decode_frames(item.video, lambda count, rate: [count // 2])[0]
    frames = list(item.video)
    return load_image(frames[len(frames) // 2]) if frames else None
