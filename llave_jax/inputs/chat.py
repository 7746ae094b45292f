"""Chat text and its token ids: the prompt around an item's text and images.

Owns the prompt format and the image markers. How visual tokens take a marker's place is `sequence.py`.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np

IMAGE_MARKER = "<image>"
# Stands for one image or video in token ids, as in the authors' code.
IMAGE_TOKEN = -200

_NUMBERED_MARKER = re.compile(r"<\|image_\d+\|>")

_LEADING_MARKERS = re.compile(r"\s*(?:(?:<image>|<\|image_\d+\|>)\s*)+")

# The assistant's turn is a single newline: the embedding is read at the newline after its end.
SYSTEM_PROMPT = "You are a helpful assistant."
_BEFORE = f"<|im_start|>system\n{SYSTEM_PROMPT}<|im_end|>\n<|im_start|>user\n"
_AFTER = "<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"


def count_markers(text: str) -> int:
    """How many image markers (`<image>`, `<|image_1|>`, ...) a text holds.

    Args:
      text: user content.

    Returns:
      Their number.
    """
    return text.count(IMAGE_MARKER) + len(_NUMBERED_MARKER.findall(text))


def end_of_leading_markers(text: str) -> int:
    """Where a text goes on behind the image markers that it begins with.

    Args:
      text: user content.

    Returns:
      Index of the first character behind them and the space around them; 0 if it begins with none.
    """
    match = _LEADING_MARKERS.match(text)
    return match.end() if match else 0


def place_markers(text: str, num_images: int, name: str = "") -> str:
    """User content with exactly one `<image>` for each image.

    MMEB's `<|image_1|>` becomes `<image>`. As in the authors' preprocessing, a single marker that is not
    at the start is moved there: `<image>`, a newline, and the stripped rest. Several markers stay where
    they are. If the text has no markers, the images go in front, one a line.

    Args:
      text: user content, with or without markers.
      num_images: of the item; a video counts as one.
      name: of the item, for errors.

    Returns:
      The text that goes into the prompt.

    Raises:
      ValueError: the text has markers, but not one for each image.
    """
    text = _NUMBERED_MARKER.sub(IMAGE_MARKER, text)
    markers = text.count(IMAGE_MARKER)
    if markers == 0:
        return (f"{IMAGE_MARKER}\n" * num_images + text).strip() if num_images else text
    if markers != num_images:
        raise ValueError(
            f"{name or 'item'}: the text has {markers} image marker(s) for {num_images} image(s); "
            f"write one <image> or <|image_1|> for each image, or none to put the images in front"
            f" (text: {text[:80]!r})"
        )
    if markers == 1 and not text.startswith(IMAGE_MARKER):
        rest = text.replace(IMAGE_MARKER, "").strip()
        return f"{IMAGE_MARKER}\n{rest}".strip()
    return text


def chat_text(content: str) -> str:
    """The whole prompt, as the model was trained on it.

    Args:
      content: user content.

    Returns:
      The text that is tokenised.
    """
    return _BEFORE + content + _AFTER


def check_vocabulary(tokenizer: Any, vocab_size: int) -> None:
    """Refuses a tokenizer with tokens that the model has no embedding for.

    The first such token in the data would make the loss NaN. `<image>` may have any id: the marker is
    taken out of the text before the tokenizer reads it.

    Args:
      tokenizer: a Hugging Face tokenizer.
      vocab_size: rows of the model's token embedding.

    Raises:
      ValueError: it has such tokens.
    """
    ids = {id: token for token, id in tokenizer.get_vocab().items() if token != IMAGE_MARKER}
    if max(ids) >= vocab_size:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has tokens up to id {max(ids)} "
            f"({ids[max(ids)]!r}), the model has embeddings for {vocab_size}; name a tokenizer that "
            "belongs to the model (config.model.tokenizer)"
        )


def chat_ids(tokenizer: Any, content: str) -> np.ndarray:
    """Token ids of the whole prompt.

    Args:
      tokenizer: a Hugging Face fast tokenizer of the model.
      content: user content from `place_markers`.

    Returns:
      int32 [T], with one IMAGE_TOKEN for each `<image>`.
    """
    ids: list[int] = []
    for i, piece in enumerate(chat_text(content).split(IMAGE_MARKER)):
        if i:
            ids.append(IMAGE_TOKEN)
        ids.extend(tokenizer.encode(piece, add_special_tokens=False, verbose=False))
    return np.asarray(ids, dtype=np.int32)
