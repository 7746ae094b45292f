"""Image files become RGB pixels, or an error that names the file.

Owns reading and decoding only. Pixels are those that the authors' code sees: decoded by Pillow, first
frame, no EXIF rotation, alpha dropped. Cutting into crops is `anyres.py`. What training does with a row
whose image is broken is `data/loading.py`.
"""

from __future__ import annotations

import io
import os
import stat

import numpy as np
import PIL.Image

from llave_jax.common.text import shortened
from llave_jax.inputs.item import ImageLike

# Pillow refuses images beyond twice its MAX_IMAGE_PIXELS; the number is repeated here so that a
# program which switches Pillow's check off does not change what this package accepts.
MAX_PIXELS = 178_956_970
MAX_FILE_BYTES = 512 * 1024**2

# Decoders for pictures only. Pillow's full list would also hand a file called .jpg to Ghostscript
# (EPS), or open video containers and icon collections. Some builds of Pillow lack the last three.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "TIFF", "PPM", "WEBP", "JPEG2000", "AVIF")
PIL.Image.init()
FORMATS = tuple(name for name in FORMATS if name in PIL.Image.OPEN)


class ImageError(ValueError):
    """An image that cannot be used.

    A row may hold the image itself where its path is expected: name and reason are `shortened`.

    Args:
      name: of the item or the file; "" if it has none.
      reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        name, reason = shortened(name), shortened(reason)
        super().__init__(f"{name or 'image'}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self):
        # Worker processes send their exceptions back pickled, which replays `args`.
        return ImageError, (self.name, self.reason)


def read_image_file(path: str | os.PathLike, name: str = "") -> bytes:
    """Reads an image file without decoding it.

    Args:
      path: a regular file of at most `MAX_FILE_BYTES`.
      name: where the image comes from, for errors; the path is added.

    Returns:
      The encoded bytes.

    Raises:
      ImageError: missing, unreadable, empty, too large, or not a regular file.
    """
    try:
        path = os.fspath(path)
        refuse_data_uri(path, name)
        status = os.stat(path)
        # Opening a pipe or a device may block without end.
        if not stat.S_ISREG(status.st_mode):
            raise ImageError(_join(name, path), "is not a regular file")
        if status.st_size == 0:
            raise ImageError(_join(name, path), "the file is empty (0 bytes)")
        if status.st_size > MAX_FILE_BYTES:
            raise ImageError(
                _join(name, path),
                f"the file has {status.st_size} bytes; the limit is {MAX_FILE_BYTES}",
            )
        with open(path, "rb") as file:
            return file.read()
    except FileNotFoundError as error:
        raise ImageError(_join(name, path), "the file does not exist") from error
    except ImageError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        raise ImageError(_join(name, path), f"cannot be read: {error}") from error


def refuse_data_uri(path: str, name: str = "") -> None:
    """Refuses an image that is given in place of its path.

    Args:
      path: as a row or an item gives it.
      name: where the path was found, for the error.

    Raises:
      ImageError: the path is a data URI.
    """
    if path.startswith("data:"):
        raise ImageError(
            _join(name, path),
            "a data URI; expected a path: write the image to a file and name that",
        )


def load_image(image: ImageLike, name: str = "") -> PIL.Image.Image:
    """Decodes an image to 8-bit RGB, the way the authors' code does.

    The file's content decides its format, not its name. An animation gives its first
    frame, a stored EXIF rotation is not applied, alpha is dropped without blending. 16-bit
    greyscale keeps its upper 8 bits (Pillow alone would clip it to white).

    Args:
      image: a path, the bytes of an image file, or a Pillow image.
      name: where the image comes from (file, row), for errors.

    Returns:
      A decoded Pillow image of mode "RGB"; a Pillow image that already is one comes back itself.

    Raises:
      ImageError: missing, unreadable, not an image, truncated, corrupt, more than `MAX_PIXELS`,
        without pixels, or of a pixel type that has no defined range (float, 32-bit integer).
    """
    return _to_rgb(*_open(image, name))


def open_image(encoded: bytes, name: str = "") -> PIL.Image.Image:
    """Reads the header of an image; its pixels are decoded when they are asked for.

    Args:
      encoded: an image file.
      name: where the image comes from, for errors.

    Returns:
      A Pillow image, for `load_image`.

    Raises:
      ImageError: as for `image_size`.
    """
    image, name = _open(encoded, name)
    _check_size(image, name)
    return image


def image_size(image: ImageLike, name: str = "") -> tuple[int, int]:
    """The size of an image, from its header alone.

    Args:
      image: a path, the bytes of an image file, or a Pillow image.
      name: where the image comes from (file, row), for errors.

    Returns:
      Width and height in pixels.

    Raises:
      ImageError: as for `load_image`, except that damage behind the header is not seen.
    """
    opened, name = _open(image, name)
    _check_size(opened, name)
    return opened.size


def _open(image: ImageLike, name: str) -> tuple[PIL.Image.Image, str]:
    """The image with its header read, and its full name for errors."""
    if isinstance(image, PIL.Image.Image):
        return image, name
    if isinstance(image, (str, os.PathLike)):
        encoded, name = read_image_file(image, name), _join(name, os.fspath(image))
    elif isinstance(image, (bytes, bytearray, memoryview)):
        encoded = bytes(image)
    else:
        raise TypeError(
            f"{name or 'image'}: expected a path, encoded bytes or a PIL image, "
            f"found {type(image).__name__}"
        )
    if not encoded:
        raise ImageError(name, "the file is empty (0 bytes)")
    return _open_encoded(encoded, name), name


def _open_encoded(encoded: bytes, name: str) -> PIL.Image.Image:
    try:
        return PIL.Image.open(io.BytesIO(encoded), formats=FORMATS)
    except PIL.UnidentifiedImageError as error:
        raise ImageError(name, f"not an image of a known format ({_describe(encoded)})") from error
    except PIL.Image.DecompressionBombError as error:
        raise ImageError(name, f"too many pixels: {error}") from error
    except MemoryError:
        raise
    except Exception as error:  # a broken header can make decoders raise any exception
        raise ImageError(name, f"broken image header: {error}") from error


def _check_size(image: PIL.Image.Image, name: str) -> None:
    width, height = image.size
    if width == 0 or height == 0:
        raise ImageError(name, f"the image has no pixels ({width} x {height})")
    if width * height > MAX_PIXELS:
        raise ImageError(
            name, f"too many pixels: {width} x {height}; the limit is {MAX_PIXELS} in all"
        )


def _to_rgb(image: PIL.Image.Image, name: str) -> PIL.Image.Image:
    _check_size(image, name)
    try:
        image.load()
        if image.mode == "RGB":
            return image
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PPM", "PNG")):
            return _from_16_bits(image)
        if image.mode in ("I", "F"):
            raise ImageError(
                name, f"pixels of mode {image.mode!r} have no defined range; store 8 or 16 bits"
            )
        return image.convert("RGB")
    except (ImageError, MemoryError):
        raise
    except Exception as error:  # broken data can make decoders raise any exception
        raise ImageError(name, f"corrupt or truncated: {error}") from error


def _from_16_bits(image: PIL.Image.Image) -> PIL.Image.Image:
    """Greyscale of 16 bits a pixel to RGB by its upper 8 bits, as Pillow reads 16-bit colour."""
    values = np.asarray(image).astype(np.uint16)
    return PIL.Image.fromarray((values >> 8).astype(np.uint8)).convert("RGB")


def _describe(encoded: bytes) -> str:
    head = bytes(encoded[:16])
    return f"{len(encoded)} bytes starting with {head!r}"


def _join(name: str, path: str | os.PathLike) -> str:
    path = os.fspath(path)
    return f"{name} ({path})" if name and path not in name else name or path
