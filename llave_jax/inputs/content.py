"""Identity of an item: equal digests mean that the model sees the same content.

Owns what enters the digests, not where they are kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import PIL.Image

from llave_jax.common.content import digest, file_digest
from llave_jax.inputs.item import ImageLike, Item

PathDigest = Callable[[str | os.PathLike], bytes]


def item_key(item: Item) -> bytes:
    """Digest of what an item shows the model: its text and the content of its images or video.

    Paths and names do not enter: the same picture under two names is one item. A picture given as a
    file differs from the same picture given as pixels, since files are not decoded here.

    Args:
      item: its files are read whole.

    Returns:
      `common.content.DIGEST_BYTES` bytes.

    Raises:
      OSError: a file cannot be read.
    """
    return _item_digest(item, file_digest)


def content_id(item: Item | None) -> int:
    """32 bits of an item's `item_key`, by which the device recognises equal targets.

    A zero picture is not the same as no picture.

    Args:
      item: None for a side that a pair lacks.

    Returns:
      A number that fits into int32; 0 for None.

    Raises:
      OSError: a file cannot be read.
    """
    return 0 if item is None else int.from_bytes(item_key(item)[:4], "little", signed=True)


def item_stamp(item: Item) -> bytes:
    """Digest of an item as `item_key`, but of a file's path, size, times and inode, not its content.

    Equal stamps show that nothing has changed, without reading files. Different stamps show nothing. A file that
    was replaced has another inode, and one that was written to another time of change of the inode, also where
    its size and the time of its content are kept or set back.

    Args:
      item: its files are looked up, but not read.

    Returns:
      `common.content.DIGEST_BYTES` bytes.

    Raises:
      OSError: a file does not exist.
    """
    return _item_digest(item, _file_stamp)


def _item_digest(item: Item, path_digest: PathDigest) -> bytes:
    parts: list[bytes] = []

    def add(tag: bytes, value: bytes) -> None:
        parts.append(tag + len(value).to_bytes(8, "little") + value)

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
    return digest(*parts)


def _image_digest(image: ImageLike, path_digest: PathDigest) -> bytes:
    if isinstance(image, PIL.Image.Image):
        rgb = image.convert("RGB")
        header = f"pixels {rgb.width} {rgb.height} ".encode()
        return digest(header, rgb.tobytes())
    if isinstance(image, bytes):
        return digest(image)
    return path_digest(image)


def _file_stamp(path: str | os.PathLike) -> bytes:
    status = os.stat(path)
    facts = (status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)
    stamp = f"{os.fspath(path)} {facts}"
    return digest(os.fsencode(stamp))
