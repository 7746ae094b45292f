"""Any-resolution images: which canvas, which crops, which visual tokens (`anyres_max_9`).

This is LLaVA-OneVision's scheme as LLaVE uses it: a base crop of the whole image, and the image
letter-boxed on the best of several canvases, which is cut into tiles. Pillow makes the pixels, `taps.py`
the visual tokens.
"""

from __future__ import annotations

import math

import numpy as np
import PIL.Image

from llave_jax.inputs import taps as T
from llave_jax.inputs.config import InputConfig
from llave_jax.inputs.crops import CropGeometry, resize_to_crop


def best_canvas(width: int, height: int, pinpoints: tuple[tuple[int, int], ...]) -> tuple[int, int]:
    """The canvas that keeps most of an image's resolution.

    That is the canvas in which the fitted image has the largest area; area beyond the image's own does not
    count. Among equals, the canvas with the least empty area is taken, then the first.

    Args:
      width, height: of the image, in pixels.
      pinpoints: the canvases, as in `InputConfig`.

    Returns:
      (height, width) in pixels.
    """

    def merit(canvas: tuple[int, int]) -> tuple[int, int]:
        canvas_height, canvas_width = canvas
        scale = min(canvas_width / width, canvas_height / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - canvas_height * canvas_width

    return max(pinpoints, key=merit)


def letterbox(image: PIL.Image.Image, canvas: tuple[int, int]) -> PIL.Image.Image:
    """The image fitted inside a canvas, centred on black.

    Args:
      image: of mode "RGB".
      canvas: (height, width) in pixels.

    Returns:
      An image of the canvas's size.
    """
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


def tile_grid(width: int, height: int, config: InputConfig, crop: CropGeometry) -> tuple[int, int]:
    """The tiles that an image has: the one rule behind all numbers of crops and visual tokens.

    With the base crop, the image has 1 + rows * columns crops.

    Args:
      width: of the image, in pixels.
      height: of the image, in pixels.
      config: the model's input settings.
      crop: the geometry of its crops.

    Returns:
      (rows, columns) of the tiles; (0, 0) for a model without tiles.
    """
    if not config.pinpoints:
        return 0, 0
    canvas_height, canvas_width = best_canvas(width, height, config.pinpoints)
    return canvas_height // crop.size, canvas_width // crop.size


def num_crops(width: int, height: int, config: InputConfig, crop: CropGeometry) -> int:
    """How many crops an image has.

    Args:
      width: of the image, in pixels.
      height: of the image, in pixels.
      config: the model's input settings.
      crop: the geometry of its crops.

    Returns:
      The base crop and the tiles.
    """
    return 1 + math.prod(tile_grid(width, height, config, crop))


def image_crops(image: PIL.Image.Image, config: InputConfig, crop: CropGeometry) -> np.ndarray:
    """The crops of an image: the base crop (all of it), then its tiles row by row.

    Args:
      image: of mode "RGB".
      config: the model's input settings.
      crop: the geometry of its crops.

    Returns:
      uint8 [1 + tiles, size, size, 3].
    """
    base = resize_to_crop(image, crop.size)[None]
    rows, columns = tile_grid(*image.size, config, crop)
    if not rows:
        return base
    boxed = np.asarray(letterbox(image, (rows * crop.size, columns * crop.size)))
    tiles = boxed.reshape(rows, crop.size, columns, crop.size, 3).swapaxes(1, 2)
    return np.concatenate([base, tiles.reshape(-1, crop.size, crop.size, 3)])


def image_taps(width: int, height: int, config: InputConfig, crop: CropGeometry) -> T.Taps:
    """The visual tokens of an image, over the crops of `image_crops`.

    Base tokens come first, row by row. Then comes the tiles' map without its padding, resized to the limit of
    `anyres_max`, with a newline at the end of every row. Without tiles there are the base tokens and one
    newline.

    Args:
      width: of the image, in pixels.
      height: of the image, in pixels.
      config: the model's input settings.
      crop: the geometry of its crops.

    Returns:
      Taps [V].
    """
    rows, columns = tile_grid(width, height, config, crop)
    if not rows:
        return single_crop_taps(crop)
    base = T.crop_map(0, 1, 1, crop.patches_per_side).reshape(-1)
    tiles = unpad(T.crop_map(1, rows, columns, crop.patches_per_side), width, height)
    tiles = shrink(tiles, config.anyres_max, crop.num_patches)
    tiles = T.concatenate([tiles, T.newlines(tiles.shape[0], 1)], axis=1)
    return T.concatenate([base, tiles.reshape(-1)])


def single_crop_taps(crop: CropGeometry) -> T.Taps:
    """The visual tokens of an image of one crop: its patches row by row, and one newline.

    Args:
      crop: the geometry of the model's crops.

    Returns:
      Taps [P + 1].
    """
    return T.concatenate([T.crop_map(0, 1, 1, crop.patches_per_side).reshape(-1), T.newlines(1)])


def largest_image(config: InputConfig, crop: CropGeometry) -> tuple[int, int]:
    """What the largest image takes: one that fills its canvas, since its map is not cut.

    Args:
      config: the model's input settings.
      crop: the geometry of its crops.

    Returns:
      The most crops of any image, and the most taps of any image's visual token.
    """
    sizes = [(width, height) for height, width in config.pinpoints] or [(crop.size, crop.size)]
    return (
        max(num_crops(*size, config, crop) for size in sizes),
        max(image_taps(*size, config, crop).width for size in sizes),
    )


def unpad(tiles: T.Taps, width: int, height: int) -> T.Taps:
    """Takes the letter-box's padding off the map of an image's tiles.

    The padding is computed as in the authors' code, which truncates: rounding would give another grid.
    A very thin image can keep no row at all.

    Args:
      tiles: the map [rows, columns].
      width, height: of the image, in pixels.

    Returns:
      The part of the map that shows the image.
    """
    rows, columns = tiles.shape
    if width / height > columns / rows:
        pad = (rows - int(height * (columns / width))) // 2
        return tiles[pad : rows - pad]
    pad = (columns - int(width * (rows / height))) // 2
    return tiles[:, pad : columns - pad]


def shrink(tiles: T.Taps, anyres_max: int | None, num_patches: int) -> T.Taps:
    """Resizes a map that holds clearly more tokens than `anyres_max` crops would.

    Args:
      tiles: a map [rows, columns].
      anyres_max: crops; None: no limit.
      num_patches: tokens of a crop.

    Returns:
      A map [rows, columns] of fewer tokens, or `tiles` itself.
    """
    rows, columns = tiles.shape
    if anyres_max is None:
        return tiles
    times = math.sqrt(rows * columns / (anyres_max * num_patches))
    if times <= 1.1:
        return tiles
    return T.resize_bilinear(tiles, int(rows // times), int(columns // times))
