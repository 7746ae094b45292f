"""Chat messages as one item: which message is the item, and where its images stand in the text.

The Embedder and the server read messages by these rules, and so does the chat template of exports. Which forms a
part may have is theirs (`item_forms.py`, `serving/items.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from llave_jax.inputs import chat


class MessageError(ValueError):
    """Messages that are no item. The text goes on behind the name of what is at fault ("messages[1]").

    Attributes:
      number: of the message that is at fault; None: all of them.
    """

    def __init__(self, number: int | None, text: str):
        super().__init__(text)
        self.number = number


class Content(NamedTuple):
    """The parts of a message, put together.

    Attributes:
      text: user content. It has markers if there is text whose place beside the images counts.
      images: in order.
      video: None without one.
    """

    text: str
    images: tuple[Any, ...]
    video: Any | None


def user_content(messages: Sequence[Any]) -> Any:
    """The content of the one user's message.

    The model was trained with one system prompt and one user's turn, whose empty answer is closed. A system message
    with that same prompt, and an empty answer at the end, change nothing.

    Args:
      messages: of the form {"role": ..., "content": ...}.

    Returns:
      The content: what the message has there, in any form.

    Raises:
      MessageError: there is not exactly one message of the user, or another that would change the prompt.
    """
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise MessageError(number, ': expected {"role": "user", "content": ...}')
        role, said = message["role"], message.get("content")
        if role == "user" and not found:
            found.append(said)
            continue
        frame = {"system": (0, chat.SYSTEM_PROMPT), "assistant": (len(messages) - 1, "")}
        if frame.get(role) == (number, _text(said)):
            continue
        reason = f" is of {role[:40]!r}; expected one user message"
        if role in ("system", "developer"):
            reason += (
                f". The model has a system prompt of its own ({chat.SYSTEM_PROMPT!r}); put instructions in front of "
                "the user's text"
            )
        raise MessageError(number, reason)
    if not found:
        raise MessageError(None, " have none of the user")
    return found[0]


def _text(said: Any) -> str | None:
    """The text of a message that is not the user's; None if it is of another form."""
    if isinstance(said, list | tuple):
        texts = [part.get("text") for part in said if isinstance(part, Mapping)]
        return "".join(text for text in texts if isinstance(text, str))
    return "" if said is None else said if isinstance(said, str) else None


def join_parts(parts: Sequence[tuple[str, Any]]) -> Content:
    """The parts of a message as one content: texts and images one a line, in the order of the parts.

    Markers that the user has written say where the images go. Without any text there are no markers, so that a
    prompt comes to stand as behind any other image.

    Args:
      parts: ("text" | "image" | "video", value).

    Returns:
      The content.

    Raises:
      ValueError: images and a video, several videos, or markers for another number of images.
    """
    texts = [value for kind, value in parts if kind == "text"]
    images = tuple(value for kind, value in parts if kind == "image")
    videos = [value for kind, value in parts if kind == "video"]
    if len(videos) > 1 or (videos and images):
        raise ValueError("expected images or one video, not both")
    markers, pictures = sum(map(chat.count_markers, texts)), len(images) + len(videos)
    if markers not in (0, pictures):
        raise ValueError(
            f"the text has {markers} image marker(s) for {pictures} image(s); write none, or one for each"
        )
    pieces = [value if kind == "text" else chat.IMAGE_MARKER for kind, value in parts]
    text = "\n".join(texts if markers or not texts else pieces)
    return Content(text, images, videos[0] if videos else None)
