"""Identity of an item: equal digests mean that the model sees the same content.

Owns what enters the digests. Who keeps them, and for what, is not known here.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable

import PIL.Image

from llave_jax.inputs.item import ImageLike, Item

DIGEST_BYTES = 32

PathDigest = Callable[[str | os.PathLike], bytes]


def item_key(item: Item) -> bytes:
    """Digest of what an item shows the model: its text and the content of its images or video.

    Paths and names do not enter: the same picture under two names is one item. A picture given as a
    file differs from the same picture given as pixels, since decoding is the model's business.

    Args:
      item: its files are read whole.

    Returns:
      DIGEST_BYTES bytes.

    Raises:
      OSError: a file cannot be read.
    """
    return _item_digest(item, _file_digest)


def item_stamp(item: Item) -> bytes:
    """Digest as of `item_key`, with path, size and time of change in the place of a file's content.

    Equal stamps show that nothing has changed, without reading files. Different stamps show nothing.

    Args:
      item: its files are looked up, but not read.

    Returns:
      DIGEST_BYTES bytes.

    Raises:
      OSError: a file does not exist.
    """
    return _item_digest(item, _file_stamp)


def _item_digest(item: Item, path_digest: PathDigest) -> bytes:
    digest = hashlib.sha256()

    def add(tag: bytes, value: bytes) -> None:
        digest.update(tag + len(value).to_bytes(8, "little") + value)

    add(b"text", item.text.encode("utf-8"))
    for image in item.images:
        if image is None:
            add(b"zero picture", b"")
        else:
            add(b"image", _image_digest(image, path_digest))
    if isinstance(item.video, str | os.PathLike):
        add(b"video", path_digest(item.video))
    elif item.video is not None:
        frames = (_image_digest(frame, path_digest) for frame in item.video)
        add(b"frames", b"".join(frames))
    return digest.digest()


def _image_digest(image: ImageLike, path_digest: PathDigest) -> bytes:
    if isinstance(image, PIL.Image.Image):
        rgb = image.convert("RGB")
        header = f"pixels {rgb.width} {rgb.height} ".encode()
        return hashlib.sha256(header + rgb.tobytes()).digest()
    if isinstance(image, bytes):
        return hashlib.sha256(image).digest()
    return path_digest(image)


def _file_digest(path: str | os.PathLike) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _file_stamp(path: str | os.PathLike) -> bytes:
    status = os.stat(path)
    stamp = f"{os.fspath(path)} {status.st_size} {status.st_mtime_ns}"
    return hashlib.sha256(os.fsencode(stamp)).digest()
