"""Smaller embeddings: fewer numbers, or numbers of fewer bits. Pure NumPy; the vectors come from the Embedder."""

from __future__ import annotations

import numpy as np

PRECISIONS = ("float32", "float16", "int8", "binary")


def truncate(vectors: np.ndarray, dim: int | None) -> np.ndarray:
    """The first numbers of each vector, L2-normalised again.

    Args:
      vectors: float [..., D], L2-normalised.
      dim: numbers to keep; None: all.

    Returns:
      float [..., dim], of the dtype of `vectors`.

    Raises:
      ValueError: `dim` is not between 1 and D.

    References: Kusupati et al., Matryoshka Representation Learning (arXiv 2205.13147).
    """
    if dim is None or dim == vectors.shape[-1]:
        return vectors
    if not 1 <= dim <= vectors.shape[-1]:
        raise ValueError(f"truncate_dim is {dim}; expected 1 to {vectors.shape[-1]}")
    return normalised(vectors[..., :dim])


def normalised(vectors: np.ndarray) -> np.ndarray:
    """Vectors of length 1.

    Args:
      vectors: [..., D].

    Returns:
      The same directions, float; a vector of zeros stays one.
    """
    vectors = np.asarray(vectors)
    if not np.issubdtype(vectors.dtype, np.floating):
        vectors = vectors.astype(np.float32)
    norm = np.linalg.norm(vectors.astype(np.float32), axis=-1, keepdims=True)
    return (vectors / np.maximum(norm, 1e-12)).astype(vectors.dtype)


def quantise(vectors: np.ndarray, precision: str, ranges: np.ndarray | None = None) -> np.ndarray:
    """Vectors in a precision of PRECISIONS.

    `int8` needs no calibration: each vector is scaled by its own largest number, so that its int8 form does not
    depend on the others, cosines stay what they are up to rounding, and parts that were computed at different times
    fit together. With `ranges` it is sentence-transformers' form, which is calibrated on a sample: each dimension
    has 255 steps between the least and the largest number of the sample. `binary` is sentence-transformers' too:
    a bit for each number, whether it is positive, 8 in a byte from the highest bit on, less 128.

    Args:
      vectors: float [..., D].
      precision: one of PRECISIONS.
      ranges: float [2, D] of `calibration_ranges`, for int8.

    Returns:
      float32, float16 or int8 [..., D]; int8 [..., ceil(D / 8)] for binary.

    Raises:
      ValueError: there is no such precision, or `ranges` are of another size.
    """
    check_precision(precision)
    if precision in ("float32", "float16"):
        return vectors.astype(precision, copy=False)
    if precision == "binary":
        bits = np.packbits(vectors > 0, axis=-1)
        return (bits.astype(np.int16) - 128).astype(np.int8)
    if ranges is None:
        scale = np.abs(vectors).max(axis=-1, keepdims=True, initial=0)
        return np.rint(vectors * (127 / np.where(scale > 0, scale, 1))).astype(np.int8)
    if np.shape(ranges) != (2, vectors.shape[-1]):
        raise ValueError(f"ranges are {np.shape(ranges)}; expected {(2, vectors.shape[-1])}")
    least, largest = np.asarray(ranges, np.float32)
    step = (largest - least) / 255
    steps = np.floor((vectors - least) / np.where(step == 0, 1, step))
    return (np.clip(steps, 0, 255) - 128).astype(np.int8)


def calibration_ranges(sample: np.ndarray) -> np.ndarray:
    """The least and the largest number of each dimension, as sentence-transformers calibrates int8.

    Args:
      sample: float [n, D], of items like those that will be quantised: a thousand or more.

    Returns:
      float32 [2, D].

    Raises:
      ValueError: there are fewer than two vectors.
    """
    if len(sample) < 2:
        raise ValueError(f"calibration needs two vectors at least; found {len(sample)}")
    return np.stack([sample.min(axis=0), sample.max(axis=0)]).astype(np.float32)


def check_precision(precision: str) -> None:
    """Refuses what is no precision.

    Args:
      precision: as a user gives it.

    Raises:
      ValueError: it is not one of PRECISIONS.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; expected one of {', '.join(PRECISIONS)}")
