"""Any-resolution images: which canvas, which crops, which visual tokens (`anyres_max_9`).

LLaVA-OneVision's scheme as LLaVE uses it: a base crop of the whole image, then the image letter-boxed
on the best of several canvases and cut into tiles. Pixels by Pillow, layout by `taps.py`.
"""

from __future__ import annotations

import math

import numpy as np
import PIL.Image

from llave_jax.inputs import taps as T
from llave_jax.models.config import InputConfig


def best_canvas(width: int, height: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The canvas (height, width) that keeps most of the image's resolution.

    Effective resolution is the area of the image fitted inside, at most its own; ties go to the
    canvas that wastes least, then to the first.
    """

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        canvas_height, canvas_width = canvas
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas_height * canvas_width

    return max(pinpoints, key=merit)


def letterbox(image: PIL.Image.Image, canvas: tuple[int, int]) -> PIL.Image.Image:
    """The image fitted inside the canvas (height, width), centred on black."""
    height, width = canvas
    scale_x, scale_y = width / image.width, height / image.height
    if scale_x < scale_y:
        size = (width, min(math.ceil(image.height * scale_x), height))
    else:
        size = (min(math.ceil(image.width * scale_y), width), height)
    fitted = image.resize(size, PIL.Image.Resampling.BICUBIC)
    if size == (width, height):
        return fitted
    boxed = PIL.Image.new("RGB", (width, height))
    boxed.paste(fitted, ((width - size[0]) // 2, (height - size[1]) // 2))
    return boxed


def squash(image: PIL.Image.Image, size: int) -> np.ndarray:
    """The whole image as one crop, ignoring its aspect ratio: uint8 [size, size, 3]."""
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC))


def image_crops(image: PIL.Image.Image, config: InputConfig, size: int) -> np.ndarray:
    """Crops of an RGB image: uint8 [1 + tiles, size, size, 3], the base crop first."""
    base = squash(image, size)[None]
    if not config.pinpoints:
        return base
    boxed = np.asarray(letterbox(image, best_canvas(*image.size, config.pinpoints)))
    rows, columns = boxed.shape[0] // size, boxed.shape[1] // size
    tiles = boxed.reshape(rows, size, columns, size, 3).swapaxes(1, 2)
    return np.concatenate([base, tiles.reshape(rows * columns, size, size, 3)])


def image_taps(width: int, height: int, config: InputConfig, size: int, side: int) -> T.Taps:
    """Visual tokens of an image of width x height pixels, over the crops of `image_crops`: [V].

    Base tokens row by row; then the tiles' map without its padding, shrunk to the limit of
    `anyres_max`, a newline at the end of every row. Without tiles: base tokens and one newline.

    Args:
      size: a crop's side in pixels.
      side: a crop's side in patches.
    """
    if not config.pinpoints:
        return single_crop_taps(side)
    base = T.crop_map(0, 1, 1, side).reshape(-1)
    canvas = best_canvas(width, height, config.pinpoints)
    tiles = T.crop_map(1, canvas[0] // size, canvas[1] // size, side)
    tiles = shrink(unpad(tiles, width, height), config.anyres_max, side)
    tiles = T.concatenate([tiles, T.newlines(tiles.shape[0], 1)], axis=1)
    return T.concatenate([base, tiles.reshape(-1)])


def single_crop_taps(side: int) -> T.Taps:
    """Visual tokens of an image of one crop, side x side patches: its patches and one newline."""
    return T.concatenate([T.crop_map(0, 1, 1, side).reshape(-1), T.newlines(1)])


def unpad(tiles: T.Taps, width: int, height: int) -> T.Taps:
    """Take the letter-box off a map: the padding follows from the image's width and height.

    Truncating here (not rounding) decides the grid; a very thin image can keep no row at all.
    """
    rows, columns = tiles.shape
    if width / height > columns / rows:
        pad = (rows - int(height * (columns / width))) // 2
        return tiles[pad : rows - pad]
    pad = (columns - int(width * (rows / height))) // 2
    return tiles[:, pad : columns - pad]


def shrink(tiles: T.Taps, anyres_max: int | None, side: int) -> T.Taps:
    """Resize a map that holds clearly more tokens than `anyres_max` crops would."""
    rows, columns = tiles.shape
    if anyres_max is None:
        return tiles
    times = math.sqrt(rows * columns / (anyres_max * side**2))
    if times <= 1.1:
        return tiles
    return T.resize_bilinear(tiles, int(rows // times), int(columns // times))
