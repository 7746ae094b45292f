"""Items and pairs of items, as users and data sets give them: text, images or a video.

Owns the types, and the rules of what is an item. Reading image files is `images.py`, layout is
`sequence.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any, Union

import numpy as np
import PIL.Image

from llave_jax.inputs import chat

# A path, the bytes of an image file, or a decoded image.
ImageLike = Union[str, os.PathLike, bytes, PIL.Image.Image]
# A path of a video file, or its (already sampled) frames.
VideoLike = Union[str, os.PathLike, Sequence[ImageLike]]


@dataclasses.dataclass(frozen=True)
class Item:
    """What one embedding is made of.

    Attributes:
      text: user content as in MMEB rows. It may hold one marker (`<image>` or `<|image_1|>`) for each
        image, in order. Images of a text without markers are put in front of it.
      images: None stands for the zero picture: one crop of zeros after normalisation, which the authors'
        code puts in the place of a marker whose image is missing. Only a marker can hold it, so the Nones
        of an item without markers, or with a video, are dropped.
      video: takes the place of one marker. An item has images or a video, not both.
      name: where the item comes from (file, row), for errors and logs.
    """

    text: str = ""
    images: tuple[ImageLike | None, ...] = ()
    video: VideoLike | None = None
    name: str = ""

    def __post_init__(self):
        pictures = tuple(image for image in self.images if image is not None)
        if len(pictures) < len(self.images) and (
            self.video is not None or not chat.count_markers(self.text)
        ):
            object.__setattr__(self, "images", pictures)


@dataclasses.dataclass(frozen=True)
class Pair:
    """A query with its target, and the hard negatives that its row names (often none).

    Attributes:
      id: "SUBSET:ROW", unique within a data set; goes into logs and error messages.
      query: what is searched with.
      target: what is to be found.
      negatives: the hard negatives.
      subset: name of the subset; "" without subsets.
      scores: a teacher's scores of the target and of each negative, in this order; () without.
      num_targets: how many targets the row names. This pair has one of them.
    """

    id: str
    query: Item
    target: Item
    negatives: tuple[Item, ...] = ()
    subset: str = ""
    scores: tuple[float, ...] = ()
    num_targets: int = 1

    def sides(self, count: int) -> list[Item | None]:
        """The items of a pair as a fixed number of sides.

        Args:
          count: Z, at least 2.

        Returns:
          Query, target, and Z - 2 negatives; None for each negative that the pair lacks.
        """
        negatives = list(self.negatives[: count - 2])
        return [self.query, self.target, *negatives] + [None] * (count - 2 - len(negatives))


# What users give: a text; an image, as a path, bytes, pixels or of Pillow; a dict with any of the keys below;
# chat messages; or an Item. `item_forms.read_item` takes all of these, `as_item` what files of items hold.
ItemLike = Union[
    str,
    bytes,
    os.PathLike,
    np.ndarray,
    PIL.Image.Image,
    Mapping[str, Any],
    Sequence[Mapping[str, Any]],
    Item,
]
_KEYS = ("text", "image", "images", "video")


def as_item(item: ItemLike, name: str) -> Item:
    """A text, an image or a dict as an Item.

    In a dict, None is the same as no key. As `image`, or in `images`, it is a missing image: the zero
    picture takes its marker's place.

    Args:
      item: an Item is returned as it is, even an empty one.
      name: where the item comes from (file, row), for errors.

    Returns:
      The item.

    Raises:
      ValueError: it is none of these forms, or has neither text nor image nor video.
    """
    if isinstance(item, Item):
        return item
    if isinstance(item, str):
        return _not_empty(Item(item, name=name))
    if isinstance(item, PIL.Image.Image):
        return Item(images=(item,), name=name)
    if not isinstance(item, Mapping):
        raise ValueError(
            f"{name}: is {type(item).__name__}; expected a text, an image, or a dict with any of "
            f"{', '.join(_KEYS)}"
        )
    unknown = set(item) - set(_KEYS)
    if unknown:
        raise ValueError(f"{name}: unknown key(s) {sorted(unknown)}; known are {', '.join(_KEYS)}")
    text, images = item.get("text"), item.get("images")
    text = "" if text is None else text
    if not isinstance(text, str):
        raise ValueError(f"{name}: text is {type(text).__name__}; expected a string")
    if images is not None and not isinstance(images, list | tuple):
        raise ValueError(
            f"{name}: images is {type(images).__name__}; expected a list, or give one as image"
        )
    images = tuple(images or ())
    if item.get("image") is not None:
        if images:
            raise ValueError(f"{name}: has both image and images; give one")
        images = (item["image"],)
    elif "image" in item and not images:
        images = missing_image(text)
    return _not_empty(Item(text, images=images, video=item.get("video"), name=name))


def with_prompt(item: Item, prompt: str) -> Item:
    """An item with an instruction in front of its text, behind the image markers that it begins with.

    So MMEB's rows have it: `<image>`, a newline, the instruction, the text.

    Args:
      item: any item.
      prompt: put before the text as it is; "" leaves the item alone.

    Returns:
      The item with the prompt.
    """
    if not prompt:
        return item
    start = chat.end_of_leading_markers(item.text)
    return dataclasses.replace(item, text=item.text[:start] + prompt + item.text[start:])


def refuse_paths(item: Item) -> None:
    """Checks that an item names no file.

    Args:
      item: any item.

    Raises:
      ValueError: an image, the video or a frame of it is a path.
    """
    frames = () if item.video is None or isinstance(item.video, str | os.PathLike) else item.video
    if isinstance(item.video, str | os.PathLike) or any(
        isinstance(image, str | os.PathLike) for image in (*item.images, *frames)
    ):
        raise ValueError(f"{item.name or 'item'}: names a file; give the content of images instead")


def missing_image(text: str) -> tuple[None, ...]:
    """The images of a text whose one image is missing.

    Args:
      text: user content.

    Returns:
      The zero picture if the text has a marker for it, otherwise nothing.
    """
    return (None,) if chat.count_markers(text) == 1 else ()


def is_empty(text: str, *pictures: object) -> bool:
    """Whether one side of a pair says and shows nothing: blank text, and no image or video.

    All that users and data sets give goes through this rule. Only an `Item` that a program makes itself
    may be empty.

    Args:
      text: of the side.
      pictures: its images or videos, or what stands for them; false values are none.

    Returns:
      True if there is nothing.
    """
    return not text.strip() and not any(pictures)


def _not_empty(item: Item) -> Item:
    if is_empty(item.text, item.images, item.video is not None):
        raise ValueError(f"{item.name or 'item'}: is empty; expected a text, an image or a video")
    return item
