"""Adapters (LoRA) of a model on disk: what each adds to a weight, and weights with that added.

Owns the sum W + scale * A B, layer by layer, each part to the bit as in the whole. Which base and which adapters a path stands for is
`adapted.py`; PEFT's format is `peft_format.py`; adapters in training are `models/lora.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.models.config import LlaveConfig
from llave_jax.models.lora import Lora
from llave_jax.models.parameters import LORA_A, LORA_B, adapter_shapes, weight_at
from llave_jax.weights.safetensors_io import CheckpointError, check_finite

# A layer's sum is made in pieces, as it takes 8 bytes a value while it is made.
_VALUES_AT_ONCE = 4 * 2**20


@dataclasses.dataclass(frozen=True)
class Delta:
    """What is added to the kernel of one layer: scale * a b.

    Attributes:
      a: float32 [*in, rank].
      b: float32 [rank, *out].
      scale: of the product.
    """

    a: np.ndarray
    b: np.ndarray
    scale: float


@dataclasses.dataclass(frozen=True)
class Adapter:
    """An adapter of a model, in memory.

    Attributes:
      deltas: (path of a kernel, layer or None) -> what is added to it.
    """

    deltas: Mapping[tuple[str, int | None], Delta]

    def add(
        self, path: str, layer: int | None, weight: np.ndarray, part: Sequence[slice] = ()
    ) -> np.ndarray:
        """A weight with what the adapter adds to it.

        Args:
          path: of the parameter.
          layer: of a stacked parameter; None otherwise.
          weight: of that layer, or a part of it.
          part: which part, a slice for each axis of the layer; empty: all of it.

        Returns:
          The sum with the precision of float32, cast to the dtype of `weight`; `weight` itself if nothing is added.
          A part equals that part of the whole to the bit, so that hosts may read any parts.
        """
        delta = self.deltas.get((path, layer))
        if delta is None:
            return weight
        a, b = delta.a, delta.b
        if part:
            count = a.ndim - 1
            a, b = a[tuple(part[:count])], b[(slice(None), *part[count:])]
        rank = b.shape[0]
        a, b = a.reshape(-1, rank), b.reshape(rank, -1)
        bits = (53 - math.ceil(math.log2(rank))) // 2
        a, b = _on_a_grid(a, 1, bits), _on_a_grid(b, 0, bits)
        added = np.empty(weight.shape, weight.dtype)
        rows, sums = weight.reshape(len(a), b.shape[1]), added.reshape(len(a), b.shape[1])
        at_once = max(1, _VALUES_AT_ONCE // max(1, b.shape[1]))
        for start in range(0, len(rows), at_once):
            some = slice(start, start + at_once)
            sums[some] = (rows[some].astype(np.float64) + delta.scale * (a[some] @ b)).astype(
                np.float32
            )
        return added


def _on_a_grid(factor: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """A factor of a product over `axis` whose sums are exact in float64, and so equal in any order.

    A matrix product adds in an order that depends on the shapes and on the CPU. Here each row (or column) is rounded to
    integers of `bits` bits times a power of two. Products then have 2 * bits bits and sums of `rank` of them
    2 * bits + log2(rank), which float64's 53 hold.

    Args:
      factor: float32 [rows, rank] or [rank, columns].
      axis: of the rank.
      bits: with the rank up to 32, as many as float32 has or one less.

    Returns:
      float64, same shape.
    """
    exponent = np.frexp(np.abs(factor).max(axis, keepdims=True))[1]
    step = np.ldexp(1.0, exponent - bits)
    return np.rint(factor / step) * step


def adapter_of(
    arrays: Mapping[str, Any], lora: Lora, config: LlaveConfig, where: str | Path
) -> Adapter:
    """An adapter from the parameters that training keeps.

    Args:
      arrays: path -> array in the shapes of `parameters.adapter_shapes`, layers stacked; read one by one.
      lora: what was trained.
      config: of the model.
      where: for messages.

    Returns:
      The adapter.

    Raises:
      CheckpointError: the arrays are not those of `lora`, or have values that are not finite.
    """
    expected = adapter_shapes(lora.modules, lora.rank, config)
    for path in sorted(expected.keys() | arrays.keys()):
        found = tuple(arrays[path].shape) if path in arrays else "none"
        if found != expected.get(path):
            raise CheckpointError(
                f"{where}: adapter {path}: expected shape {expected.get(path, 'none')}, found {found}"
            )
    deltas: dict[tuple[str, int | None], Delta] = {}
    for module in lora.modules:
        both = []
        for name in (LORA_A, LORA_B):
            array = np.asarray(arrays[f"{module}/{name}"]).astype(np.float32)
            check_finite(array, f"{module}/{name}", where)
            both.append(array)
        kernel = f"{module}/kernel"
        if weight_at(kernel).stacked:
            for layer, (a, b) in enumerate(zip(*both, strict=True)):
                deltas[kernel, layer] = Delta(a, b, lora.scale)
        else:
            deltas[kernel, None] = Delta(both[0], both[1], lora.scale)
    return Adapter(deltas)


@dataclasses.dataclass(frozen=True)
class MergedParam:
    """One parameter with adapters added. Only what is indexed is computed.

    Attributes:
      path: of the parameter.
      base: without adapters: an array, or what NumPy reads as one.
      adapters: added one after another, each sum cast to the dtype of `base`.
    """

    path: str
    base: Any
    adapters: tuple[Adapter, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter, with the layer axis."""
        return tuple(self.base.shape)

    @property
    def dtype(self) -> np.dtype:
        """That of `base`."""
        return np.dtype(self.base.dtype)

    def __getitem__(self, index: Any) -> np.ndarray:
        """A part of the parameter.

        Args:
          index: slices of the first axes.

        Returns:
          A new array.
        """
        index = index if isinstance(index, tuple) else (index,)
        parts = tuple(
            slice(*part.indices(size))
            for part, size in zip(index, self.shape[: len(index)], strict=True)
        ) + tuple(slice(0, size) for size in self.shape[len(index) :])
        if not weight_at(self.path).stacked:
            return self._added(None, np.asarray(self.base[parts]), parts)
        layers = range(parts[0].start, parts[0].stop)
        merged = [self._added(n, np.asarray(self.base[n][parts[1:]]), parts[1:]) for n in layers]
        return np.stack(merged)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        whole = dataclasses.replace(self, base=np.asarray(self.base))[:]
        return whole if dtype is None else whole.astype(dtype)

    def _added(self, layer: int | None, weight: np.ndarray, part: Sequence[slice]) -> np.ndarray:
        for adapter in self.adapters:
            weight = adapter.add(self.path, layer, weight, part)
        return weight
