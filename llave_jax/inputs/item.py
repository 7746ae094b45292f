"""One side of a pair, as users and data sets give it: text, images or a video.

Owns the types only; reading image files is `images.py`, layout is `sequence.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Union

import PIL.Image

# A path, the bytes of an image file, or a decoded image.
ImageLike = Union[str, os.PathLike, bytes, PIL.Image.Image]
# A path of a video file, or its (already sampled) frames.
VideoLike = Union[str, os.PathLike, Sequence[ImageLike]]


@dataclasses.dataclass(frozen=True)
class Item:
    """What one embedding is made of.

    `text` is user content as in MMEB rows: it may hold one marker (`<image>` or `<|image_1|>`) for
    each image, in order. A single image without a marker is put in front of the text.
    A video takes the place of one marker; an item holds images or a video, not both.
    `name` says where the item comes from (file, row) in errors and logs.
    """

    text: str = ""
    images: tuple[ImageLike, ...] = ()
    video: VideoLike | None = None
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Pair:
    """A query with its target, and the hard negatives its row names (often none).

    `id` is unique within a data set ("SUBSET:ROW") and goes into logs and error messages.
    """

    id: str
    query: Item
    target: Item
    negatives: tuple[Item, ...] = ()
    subset: str = ""
