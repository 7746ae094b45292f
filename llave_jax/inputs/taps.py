"""Visual tokens as weighted patch features ("taps"): index arithmetic on maps of patches.

A visual token is `sum_k weight[k] * feature[index[k]]`, which the device computes; its taps are the
indices and weights. A map is a grid of tokens. Tiling, cropping, resizing and newlines are operations on
maps; which of them an image or a video goes through is `anyres.py` and `video.py`.
"""

from __future__ import annotations

import dataclasses

import numpy as np

# Index of the learned newline vector. Packing replaces it by the last row of the shard's features.
NEWLINE = -1


@dataclasses.dataclass(frozen=True)
class Taps:
    """The taps of a grid of visual tokens.

    A token's weights sum to 1, with one exception: if K > 1 and all weights are 1, the token is the
    maximum of its taps (pool mode `max`).

    Attributes:
      index: int32 [..., K], crop * patches_per_crop + patch, or NEWLINE.
      weight: float32 [..., K].
    """

    index: np.ndarray
    weight: np.ndarray

    def reshape(self, *shape: int) -> Taps:
        """The same tokens in a grid of another shape.

        Args:
          shape: of the grid.

        Returns:
          Taps of that shape.
        """
        k = self.index.shape[-1]
        return Taps(self.index.reshape(*shape, k), self.weight.reshape(*shape, k))

    def __getitem__(self, key) -> Taps:
        return Taps(self.index[key], self.weight[key])

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the grid of tokens."""
        return self.index.shape[:-1]

    @property
    def width(self) -> int:
        """K, the number of taps of each token."""
        return self.index.shape[-1]


def crop_map(first_crop: int, rows: int, columns: int, side: int) -> Taps:
    """The map of crops that lie side by side in a grid. This is the order of the tiles.

    Args:
      first_crop: index of the crop at the top left; the others follow row by row.
      rows: of crops.
      columns: of crops.
      side: patches along a crop's side.

    Returns:
      Single taps [rows * side, columns * side].
    """
    y, x = np.meshgrid(np.arange(rows * side), np.arange(columns * side), indexing="ij")
    crop = first_crop + (y // side) * columns + x // side
    index = crop * side**2 + (y % side) * side + x % side
    return plain(index)


def plain(index: np.ndarray) -> Taps:
    """Tokens of a single patch each.

    Args:
      index: int [...], the patches.

    Returns:
      Taps [...] with K = 1 and weight 1.
    """
    return Taps(np.asarray(index, np.int32)[..., None], np.ones((*np.shape(index), 1), np.float32))


def newlines(*shape: int) -> Taps:
    """A grid of newlines.

    Args:
      shape: of the grid.

    Returns:
      Taps of that shape with K = 1.
    """
    return plain(np.full(shape, NEWLINE))


def widen(taps: Taps, width: int) -> Taps:
    """The same tokens with more taps each: the added taps have weight 0.

    Args:
      taps: [...].
      width: K of the result.

    Returns:
      Taps [...].

    Raises:
      ValueError: the tokens have more taps already.
    """
    extra = width - taps.width
    if extra == 0:
        return taps
    if extra < 0:
        raise ValueError(f"cannot narrow {taps.width} taps to {width}")
    pad = [(0, 0)] * len(taps.shape) + [(0, extra)]
    return Taps(np.pad(taps.index, pad, mode="edge"), np.pad(taps.weight, pad))


def concatenate(parts: list[Taps], axis: int = 0) -> Taps:
    """Joins maps; all get as many taps as the widest one has (see `widen`).

    Args:
      parts: maps, of equal shapes but for `axis`.
      axis: along which they are joined.

    Returns:
      One map.
    """
    width = max(part.width for part in parts)
    parts = [widen(part, width) for part in parts]
    return Taps(
        np.concatenate([p.index for p in parts], axis),
        np.concatenate([p.weight for p in parts], axis),
    )


def resize_bilinear(taps: Taps, height: int, width: int) -> Taps:
    """Resizes a map of single taps: bilinear, half-pixel centres, no antialiasing.

    This is `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`.

    Args:
      taps: a map [rows, columns].
      height: rows of the result.
      width: columns of the result.

    Returns:
      Taps [height, width] with K = 4.
    """
    (y0, y1, fy), (x0, x1, fx) = (
        _interpolate(n, m) for n, m in zip(taps.shape, (height, width), strict=True)
    )
    source = taps.index[..., 0]
    index = np.stack(
        [source[np.ix_(ys, xs)] for ys, xs in ((y0, x0), (y0, x1), (y1, x0), (y1, x1))], -1
    )
    weight = np.stack(
        [np.outer(wy, wx) for wy, wx in ((1 - fy, 1 - fx), (1 - fy, fx), (fy, 1 - fx), (fy, fx))],
        -1,
    )
    return Taps(index, weight.astype(np.float32))


def _interpolate(size: int, new_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each new position the old positions before and after it, and the second one's weight."""
    centre = np.maximum((np.arange(new_size) + 0.5) * (size / new_size) - 0.5, 0.0)
    low = np.minimum(centre.astype(np.int64), size - 1)
    return low, np.minimum(low + 1, size - 1), centre - low


def pool_windows(taps: Taps, stride: int, take_max: bool) -> Taps:
    """Average or maximum over windows of stride x stride; rows and columns left over are dropped.

    Args:
      taps: a map [rows, columns] of single taps.
      stride: of the windows.
      take_max: the maximum, in place of the average.

    Returns:
      Taps [rows // stride, columns // stride] with K = stride * stride.
    """
    rows, columns = (n // stride for n in taps.shape)
    source = taps.index[: rows * stride, : columns * stride, 0]
    index = source.reshape(rows, stride, columns, stride).transpose(0, 2, 1, 3)
    index = index.reshape(rows, columns, stride**2)
    weight = np.full(index.shape, 1.0 if take_max else 1.0 / stride**2, np.float32)
    return Taps(index, weight)
