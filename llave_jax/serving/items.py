"""From the JSON of a request to items, and from an item to what the model's `prepare` takes.

Owns the forms in which clients write texts, images and videos, and their limits. Nothing a client writes is ever
taken for a path of this machine. URLs lead out only through `fetch.Fetcher`, which the operator has to ask for.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import PIL.Image

from llave_jax.inputs import images, video
from llave_jax.inputs.chat import IMAGE_MARKER, count_markers
from llave_jax.inputs.config import InputConfig
from llave_jax.inputs.data_uri import decode_base64, decode_data_uri
from llave_jax.inputs.item import Item
from llave_jax.inputs.messages import MessageError, join_parts, user_content
from llave_jax.serving.errors import invalid
from llave_jax.serving.settings import Limits


@dataclasses.dataclass(frozen=True)
class ClientItem:
    """An item as a client wrote it. Its images are not decoded yet.

    Attributes:
      text: user content with a marker for each image or video, where the client put it.
      images: data URIs, or URLs.
      video: a data URI or URL; None: none.
      prompt_name: of the model's prompts; None: none.
      truncate: cut what is longer than the model reads; otherwise that is an error.
      where: the field of the request, for errors: "input[3]".
    """

    text: str
    images: tuple[str, ...] = ()
    video: str | None = None
    prompt_name: str | None = None
    truncate: bool = False
    where: str = "input"


class ItemError(ValueError):
    """An item that cannot be embedded; the message names the field and is meant for the client."""

    def __init__(self, where: str, message: str, code: str | None = None):
        super().__init__(f"{where}: {message}")
        self.where = where
        self.code = code

    @classmethod
    def of(cls, item: ClientItem, error: ValueError) -> ItemError:
        """The error of an item that the model cannot take.

        Args:
          item: whose it is.
          error: of `Embedder.prepare`, which names the item by its field.

        Returns:
          The same error, for the client.
        """
        return cls(item.where, str(error).removeprefix(f"{item.where}: "))


def parse_content(content: Any, where: str, limits: Limits) -> ClientItem:
    """An item's content, as a text or as a list of parts in the form of chat messages.

    Args:
      content: a string, or a list of {"type": "text", "text": ...}, {"type": "image_url", "image_url": {"url": ...}}
        and {"type": "video_url", "video_url": {"url": ...}}.
      where: the field of the request.
      limits: of items.

    Returns:
      The item.

    Raises:
      ApiError: it is of another form, empty, or beyond a limit.
    """
    if isinstance(content, str):
        _check_text(content, where, limits)
        if count_markers(content):
            raise invalid(
                f"{where}: the text has an image marker ({IMAGE_MARKER} or <|image_1|>) but no image; give content as "
                "a list of parts with an image_url",
                where,
            )
        return ClientItem(content, where=where)
    if not isinstance(content, list):
        raise invalid(f"{where}: is {_kind(content)}; expected a string or a list of parts", where)
    parts = [_part(part, f"{where}[{number}]", where) for number, part in enumerate(content)]
    try:
        joined = join_parts(parts)
    except ValueError as error:
        raise invalid(f"{where}: {error}", where) from error
    if (count := len(joined.images)) > limits.images:
        raise invalid(f"{where}: has {count} images; the limit is {limits.images}", where)
    check = _check_characters if joined.images or joined.video else _check_text
    check(joined.text, where, limits)
    return ClientItem(*joined, where=where)


def parse_messages(messages: Any, where: str, limits: Limits) -> ClientItem:
    """One item from chat messages, as vLLM's embeddings API takes them.

    Which are accepted is `inputs.messages.user_content`'s.

    Args:
      messages: a list of {"role": ..., "content": ...}.
      where: the field of the request.
      limits: of items.

    Returns:
      The item.

    Raises:
      ApiError: they are of another form.
    """
    if not isinstance(messages, list) or not messages:
        raise invalid(f"{where}: expected a list of messages", where)
    try:
        content = user_content(messages)
    except MessageError as error:
        at = where if error.number is None else f"{where}[{error.number}]"
        raise invalid(f"{at}{error}", where) from error
    return parse_content(content, where, limits)


def parse_input(value: Any, limits: Limits) -> list[ClientItem]:
    """The items of OpenAI's `input`.

    Args:
      value: a string; or a list of strings, of lists of content parts, or of {"content": ...}, in any mixture.
      limits: of items.

    Returns:
      One item for each.

    Raises:
      ApiError: it is of another form.
    """
    if isinstance(value, str):
        return [parse_content(value, "input", limits)]
    if not isinstance(value, list):
        raise invalid(f"input: is {_kind(value)}; expected a string or a list", "input")
    if not value:
        raise invalid("input: the list is empty", "input")
    if len(value) > limits.items:
        raise invalid(f"input: has {len(value)} items; the limit is {limits.items}", "input")
    items = []
    for number, entry in enumerate(value):
        where = f"input[{number}]"
        if _is_number(entry) or (isinstance(entry, list) and entry and _is_number(entry[0])):
            raise invalid(
                f"{where}: lists of token ids are not accepted, as they belong to another model's tokenizer; send "
                "text (LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))",
                where,
            )
        if isinstance(entry, dict) and "type" in entry:
            raise invalid(
                f"{where}: is a single part; an item is a list of parts, so write input: [[part, ...], ...]",
                where,
            )
        if isinstance(entry, dict):
            if set(entry) != {"content"}:
                raise invalid(f'{where}: expected {{"content": ...}}', where)
            entry = entry["content"]
        items.append(parse_content(entry, where, limits))
    return items


def _part(part: Any, at: str, where: str) -> tuple[str, str]:
    """("text" | "image" | "video", its value) of a content part."""
    if not isinstance(part, dict):
        raise invalid(f"{at}: is {_kind(part)}; expected a part with a type", where)
    kind = part.get("type")
    match kind:
        case "text" | "input_text":
            value = part.get("text")
            if not isinstance(value, str):
                raise invalid(f"{at}: text is {_kind(value)}; expected a string", where)
            return "text", value
        case "image_url" | "input_image" | "video_url":
            value = part.get("video_url" if kind == "video_url" else "image_url")
            if isinstance(value, dict):
                value = value.get("url")
            if not isinstance(value, str) or not value:
                raise invalid(f'{at}: expected {{"url": "data:..."}} in {str(kind)[:40]}', where)
            return ("video" if kind == "video_url" else "image"), value
    raise invalid(
        f"{at}: the type {str(kind)[:40]!r} is not known; expected text, image_url or video_url",
        where,
    )


def _check_text(text: str, where: str, limits: Limits) -> None:
    if not text.strip():
        raise invalid(f"{where}: is empty; expected a text, an image or a video", where)
    _check_characters(text, where, limits)


def _check_characters(text: str, where: str, limits: Limits) -> None:
    if len(text) > limits.characters:
        raise invalid(
            f"{where}: has {len(text)} characters; the limit is {limits.characters}", where
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise invalid(f"{where}: is no Unicode text (half of a surrogate pair)", where) from error


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _kind(value: Any) -> str:
    """What a JSON value is, for people."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


Fetch = Callable[[str, int], bytes]


def load_item(
    item: ClientItem, config: InputConfig, limits: Limits, fetch: Fetch | None = None
) -> Item:
    """An item of images and frames.

    Args:
      item: as the client wrote it.
      config: says which frames of a video are read.
      limits: of items.
      fetch: (URL, most bytes) -> its content; None: URLs are refused.

    Returns:
      The item, named by its field of the request. Of its images the headers are read.

    Raises:
      ItemError: an image or the video cannot be read or is beyond a limit.
    """

    def picture(uri: str) -> PIL.Image.Image:
        return _open_image(_read(uri, limits.body_bytes, item.where, fetch), item.where, limits)

    frames = None
    if item.video is not None:
        frames = _frames(item.video, item.where, config, limits, fetch)
    return Item(item.text, tuple(map(picture, item.images)), frames, item.where)


def _open_image(encoded: bytes, where: str, limits: Limits) -> PIL.Image.Image:
    try:
        image = images.open_image(encoded, "the image")
    except images.ImageError as error:
        raise ItemError(where, str(error), "invalid_image") from error
    width, height = image.size
    if width * height > limits.pixels:
        raise ItemError(
            where,
            f"the image has {width} x {height} pixels; the limit is {limits.pixels} in all",
            "image_too_large",
        )
    return image


def _read(uri: str, most: int, where: str, fetch: Fetch | None) -> bytes:
    """The bytes behind a data URI or, if that is allowed, a URL."""
    scheme = uri[:8].lower()
    if scheme.startswith("data:"):
        return _decoded(lambda: decode_data_uri(uri)[1], where)
    if scheme.startswith(("http://", "https://")):
        if fetch is None:
            raise ItemError(
                where,
                "URLs are not fetched by this server; send the file itself as a data URI",
                "url_not_allowed",
            )
        try:
            return fetch(uri, most)
        except ValueError as error:
            raise ItemError(where, str(error), "url_not_allowed") from error
    raise ItemError(where, "expected a data URI: data:image/jpeg;base64,...", "invalid_url")


def _decoded(decode: Callable[[], bytes], where: str) -> bytes:
    try:
        return decode()
    except ValueError as error:
        raise ItemError(where, str(error), "invalid_url") from error


def _frames(
    uri: str, where: str, config: InputConfig, limits: Limits, fetch: Fetch | None
) -> Sequence[Any]:
    """Frames of a video: of a file, or of JPEGs with commas between them (data:video/jpeg;base64,A,B,...)."""
    most = min(config.max_frames or limits.frames, limits.frames)
    if uri[:15].lower().startswith("data:video/jpeg"):
        parts = [part for part in uri.split(",")[1:] if part]
        if not 1 <= len(parts) <= most:
            raise ItemError(
                where, f"the video has {len(parts)} frames; expected 1 to {most}", "invalid_video"
            )
        pictures = [_decoded(lambda part=part: decode_base64(part), where) for part in parts]
        return [_open_image(picture, where, limits) for picture in pictures]
    encoded = _read(uri, limits.video_bytes, where, fetch)
    if len(encoded) > limits.video_bytes:
        raise ItemError(
            where,
            f"the video has {len(encoded)} bytes; the limit is {limits.video_bytes}",
            "video_too_large",
        )
    from llave_jax.inputs import video_decode

    # FFmpeg reads files of this machine only; this one is ours.
    with tempfile.NamedTemporaryFile(prefix="llave-", suffix=".video") as file:
        file.write(encoded)
        file.flush()
        try:
            return video_decode.decode_frames(
                file.name,
                lambda count, rate: video.sample_frame_indices(
                    count, rate, frames_per_second=config.frames_per_second, max_frames=most
                ),
                "the video",
                limits.video_seconds,
            )
        except ValueError as error:
            reason = str(error).replace(f" ({file.name})", "").replace(file.name, "the video")
            raise ItemError(where, reason, "invalid_video") from error


def prompt_of(fields: Mapping[str, Any], names: Sequence[str]) -> str | None:
    """The prompt that a request names: `prompt_name`, or `input_type` as other services call it.

    Args:
      fields: of the request.
      names: of the model's prompts.

    Returns:
      A name that the model has; None: no prompt.

    Raises:
      ApiError: the model has no such prompt, or both fields are given and differ.
    """
    given = {
        key: fields[key] for key in ("prompt_name", "input_type") if fields.get(key) is not None
    }
    for key, value in given.items():
        if not isinstance(value, str):
            raise invalid(f"{key}: is {_kind(value)}; expected a string", key)
    if not given:
        return None
    if len(set(given.values())) > 1:
        raise invalid("prompt_name and input_type differ; give one", "prompt_name")
    (key, name), *_ = given.items()
    # search_query and search_document are Cohere's words, passage NVIDIA's.
    alias = {"search_query": "query", "search_document": "document", "passage": "document"}
    name = alias.get(name, name) if key == "input_type" else name
    if name in names:
        return name
    if key == "input_type" and name in ("query", "document"):
        return None
    listed = ", ".join(names) or "none"
    raise invalid(f"{key}: {str(name)[:60]!r} is not known; this model has {listed}", key)
