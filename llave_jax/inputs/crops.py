"""Crops, the square images that the vision tower reads: their geometry, and their pixels as patches.

Which crops an image has is `anyres.py`. Pixels stay uint8 here: they become floats on the device, in
`models.siglip.normalise`.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import PIL.Image


@dataclasses.dataclass(frozen=True)
class CropGeometry:
    """Sizes of a crop, in pixels.

    Attributes:
      size: a crop's side.
      patch_size: a patch's side.
    """

    size: int
    patch_size: int

    @property
    def patches_per_side(self) -> int:
        """The patch convolution is "valid": remaining pixels at the right and bottom are dropped."""
        return self.size // self.patch_size

    @property
    def num_patches(self) -> int:
        """Patches of a crop."""
        return self.patches_per_side**2

    @property
    def patch_dim(self) -> int:
        """Numbers that a patch consists of: its pixels' three channels."""
        return self.patch_size**2 * 3


def resize_to_crop(image: PIL.Image.Image, size: int) -> np.ndarray:
    """The whole image as one crop, ignoring its aspect ratio.

    Args:
      image: of mode "RGB".
      size: the crop's side in pixels.

    Returns:
      uint8 [size, size, 3].
    """
    return np.asarray(image.resize((size, size), PIL.Image.Resampling.BICUBIC))


def patchify(crops: np.ndarray, patch_size: int) -> np.ndarray:
    """Cuts crops into patches; pixels beyond the last whole patch are dropped.

    This is done on the host: on a TPU an array with a last axis of 3 takes 40 times its size.

    Args:
      crops: uint8 [C, size, size, 3].
      patch_size: a patch's side in pixels.

    Returns:
      uint8 [C, P, patch_size * patch_size * 3], patches row by row, each by row, column, channel.
    """
    count, size = crops.shape[:2]
    side = size // patch_size
    grid = crops[:, : side * patch_size, : side * patch_size]
    grid = grid.reshape(count, side, patch_size, side, patch_size, 3)
    return grid.swapaxes(2, 3).reshape(count, side * side, patch_size * patch_size * 3)
