"""Every form in which users of the Embedder give an item: paths, bytes, arrays, data URIs, chat messages, URLs.

Owns how these become an `Item`. A plain string is always a text, also if it looks like a path. Files of items
have fewer forms: `item.as_item`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from llave_jax.inputs.data_uri import PREFIX, decode_data_uri
from llave_jax.inputs.item import Item, ItemLike, as_item
from llave_jax.inputs.messages import MessageError, join_parts, user_content

# (URL, most bytes) -> the file's content.
Fetch = Callable[[str, int], bytes]
MOST_FETCHED_BYTES = 64 << 20

_URLS = ("http://", "https://")
_VIDEOS = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".wmv", ".flv")
_PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")

log = logging.getLogger(__name__)


def is_one_item(items: Any) -> bool:
    """Whether what a user gives is one item, rather than several.

    Args:
      items: the argument of `Embedder.encode`.

    Returns:
      True for a text, bytes, a path, an image (also as an array of at most three axes), a dict, an Item, and for
      a list of chat messages. Other iterables are several items.
    """
    if isinstance(items, np.ndarray):
        return items.dtype.kind not in "UO" and items.ndim < 4
    if isinstance(items, list | tuple):
        return bool(items) and _is_message(items[0])
    return isinstance(
        items, str | bytes | bytearray | memoryview | os.PathLike | PIL.Image.Image | Mapping | Item
    )


def is_text(value: Any) -> bool:
    """Whether an item has no image or video to be read.

    Args:
      value: in any form.

    Returns:
      True if it is quick to read.
    """
    if isinstance(value, Item):
        return not value.images and value.video is None
    if isinstance(value, Mapping):
        return all(key == "text" or part is None for key, part in value.items())
    return isinstance(value, str)


def read_item(value: ItemLike, name: str, fetch: Fetch | None = None) -> Item:
    """An item in any form, as an Item. Files of this machine are not read yet; URLs are.

    Args:
      value: a text; a path, the bytes or the pixels (uint8 [H, W, 3], as of Pillow) of an image; a dict as
        of `as_item`, in which images may be in these forms, data URIs or URLs too; chat messages, as a list
        or as {"messages": ...}, with parts as of OpenAI, vLLM and transformers. An Item is returned as it is.
      name: where the item comes from, for errors.
      fetch: reads URLs; None: they are refused.

    Returns:
      The item.

    Raises:
      ValueError: it is in none of these forms, is empty, or has a URL that cannot be read.
    """
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        _check_text(value, name)
        return as_item(value, name)
    if isinstance(value, os.PathLike):
        kind = "video" if Path(value).suffix.lower() in _VIDEOS else "image"
        return as_item({kind: value}, name)
    if isinstance(value, Mapping) and _is_message(value):
        value = [value]
    if isinstance(value, Mapping) and "messages" in value:
        if len(value) > 1:
            raise ValueError(f"{name}: has messages and other keys; expected messages alone")
        value = value["messages"]
    if isinstance(value, list | tuple):
        value = _from_messages(value, name)
    elif isinstance(value, bytes | bytearray | memoryview) or _is_array(value):
        value = {"image": value}
    if isinstance(value, Mapping):
        fields = dict(value)
        if "image" in fields:
            fields["image"] = _image(fields["image"], name, fetch)
        if isinstance(fields.get("images"), list | tuple):
            fields["images"] = [_image(image, name, fetch) for image in fields["images"]]
        if fields.get("video") is not None:
            fields["video"] = _video(fields["video"], name, fetch)
        return as_item(fields, name)
    return as_item(value, name)


def _image(value: Any, name: str, fetch: Fetch | None) -> Any:
    """A path, encoded bytes or a Pillow image."""
    if value is None or isinstance(value, os.PathLike | PIL.Image.Image | bytes):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if _is_array(value):
        return _from_array(np.asarray(value), name)
    if not isinstance(value, str):
        raise ValueError(
            f"{name}: an image is {type(value).__name__}; expected a path, bytes, pixels, a Pillow image or a "
            "data URI"
        )
    if value[: len(PREFIX)].lower() == PREFIX:
        try:
            return decode_data_uri(value)[1]
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if value.lower().startswith(_URLS):
        if fetch is None:
            raise ValueError(
                f"{name}: the image is a URL ({value[:80]}), which is only fetched if asked for: allow_urls=True"
            )
        try:
            return fetch(value, MOST_FETCHED_BYTES)
        except ValueError as error:
            raise ValueError(f"{name}: {value[:80]}: {error}") from error
    return value


def _video(value: Any, name: str, fetch: Fetch | None) -> Any:
    """A path, or frames."""
    if isinstance(value, str | os.PathLike):
        if str(value).lower().startswith((PREFIX, *_URLS)):
            raise ValueError(
                f"{name}: the video is {str(value)[:20]}...; expected the path of a file, or a list of frames"
            )
        return value
    if _is_array(value):
        value = np.asarray(value)
        if value.ndim != 4:
            raise ValueError(
                f"{name}: the video has shape {value.shape}; expected [frames, H, W, 3]"
            )
    elif not isinstance(value, list | tuple):
        raise ValueError(
            f"{name}: the video is {type(value).__name__}; expected the path of a file, or a list of frames"
        )
    return [_image(frame, name, fetch) for frame in value]


def _is_array(value: Any) -> bool:
    return hasattr(value, "__array__") and not isinstance(value, PIL.Image.Image | np.generic)


def _from_array(pixels: np.ndarray, name: str) -> PIL.Image.Image:
    shape = pixels.shape
    if pixels.ndim == 3 and shape[0] in (1, 3, 4) and shape[2] not in (3, 4):
        raise ValueError(
            f"{name}: the image has shape {shape}, which looks like [channels, H, W]; expected [H, W, 3]: "
            "transpose(1, 2, 0)"
        )
    if not (pixels.ndim == 2 or (pixels.ndim == 3 and shape[2] in (3, 4))) or not pixels.size:
        raise ValueError(f"{name}: the image has shape {shape}; expected [H, W, 3]")
    if pixels.dtype != np.uint8:
        raise ValueError(f"{name}: the image is of {pixels.dtype}; expected uint8, 0 to 255")
    return PIL.Image.fromarray(np.ascontiguousarray(pixels))


def _check_text(text: str, name: str) -> None:
    if text[:11].lower() == "data:image/" and ";base64," in text[:100]:
        raise ValueError(
            f'{name}: a text that is the data URI of an image ({text[:30]}...); write {{"image": ...}}'
        )
    if text.lower().endswith(_PICTURES + _VIDEOS) and len(text) < 1024 and os.path.isfile(text):
        log.warning(
            "%s: the text %r is embedded as a text. To embed the file of that name, give pathlib.Path(...) or "
            '{"image": ...}',
            name,
            text,
        )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value and "content" in value


def _from_messages(messages: Sequence[Any], name: str) -> dict[str, Any]:
    """A dict of one conversation: a user's message, and what the chat format has around it anyway."""
    try:
        content = user_content(messages)
    except MessageError as error:
        at = "the messages" if error.number is None else f"message {error.number}"
        several = isinstance(messages, list) and not any(map(_is_message, messages))
        hint = (
            "; of several items, each has its own place in the list" if several and messages else ""
        )
        raise ValueError(f"{name}: {at}{error}{hint}") from error
    if isinstance(content, str):
        return {"text": content}
    if not isinstance(content, list | tuple):
        raise ValueError(
            f"{name}: content is {type(content).__name__}; expected a text or a list of parts"
        )
    parts = [_part(part, name) for part in content]
    try:
        text, images, video = join_parts(parts)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    fields: dict[str, Any] = {"text": text}
    if images:
        fields["images"] = images
    if video is not None:
        fields["video"] = video
    return fields


def _part(part: Any, name: str) -> tuple[str, Any]:
    """("text" | "image" | "video", its value) of a content part."""
    if isinstance(part, str):
        return "text", part
    kind = part.get("type") if isinstance(part, Mapping) else None
    match kind:
        case "text" | "input_text" if isinstance(part.get("text"), str):
            return "text", part["text"]
        case "image_url" | "input_image" | "video_url":
            value = part.get("video_url" if kind == "video_url" else "image_url")
            value = value.get("url") if isinstance(value, Mapping) else value
            if isinstance(value, str) and value:
                return ("video" if kind == "video_url" else "image"), value
        case "image" | "video":
            given = [part[key] for key in (kind, "path", "url") if part.get(key) is not None]
            if len(given) == 1:
                return kind, given[0]
    raise ValueError(
        f"{name}: a part of the content is {part!r:.80}; expected text, image_url, image or video, with its value"
    )
