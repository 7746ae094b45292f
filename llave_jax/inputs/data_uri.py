"""Data URIs: files that are written out where their address is expected."""

from __future__ import annotations

import base64
import binascii
from urllib.parse import unquote_to_bytes

PREFIX = "data:"


def decode_data_uri(uri: str) -> tuple[str, bytes]:
    """The media type and the content of a data URI.

    Args:
      uri: data:[type][;parameters][;base64],content. White space in base64 is skipped; padding may lack.

    Returns:
      The type in lower case, "" if there is none, and the bytes.

    Raises:
      ValueError: it is not a data URI, not base64, or empty.
    """
    head, comma, content = uri[len(PREFIX) :].partition(",")
    if uri[: len(PREFIX)].lower() != PREFIX or not comma or len(head) > 200:
        raise ValueError("not a data URI; expected data:image/jpeg;base64,...")
    media_type, *parameters = head.lower().replace(" ", "").split(";")
    if "base64" in parameters:
        decoded = decode_base64(content)
    else:
        decoded = unquote_to_bytes(content)
    if not decoded:
        raise ValueError("the data URI is empty")
    return media_type, decoded


def decode_base64(content: str) -> bytes:
    """The bytes of base64 text, also of its form for URLs.

    Args:
      content: white space is skipped; padding may lack.

    Returns:
      The bytes.

    Raises:
      ValueError: it is not base64.
    """
    try:
        text = "".join(content.split()) if any(c in content for c in " \n\r\t") else content
        text = text.replace("-", "+").replace("_", "/").rstrip("=")
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError("the data URI is not valid base64") from error
