"""Reading and writing safetensors files one tensor at a time.

The format: 8 bytes with the header's length (little-endian), a JSON header with the dtype, shape and
offsets of every tensor, then the data without holes. Conversion must write files that are larger than
memory, and must keep a header's exact bytes. The safetensors package can do neither.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from llave_jax.common.files import naming_full_disk
from llave_jax.common.json_text import RepeatedKey, parse_json

DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

_LENGTH_BYTES = 8
# A model of 70 billion parameters has 100 kB and 1000 tensors. The safetensors package takes 100 MB, which as
# Python objects are gigabytes.
_MAX_HEADER = 16 << 20
_MAX_TENSORS = 20_000
_MAX_AXES, _MAX_AXIS = 8, 1 << 40


class CheckpointError(ValueError):
    """A checkpoint or model directory that cannot be used; the message says what is wrong where."""


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """One tensor of a file.

    Attributes:
      dtype: of its elements.
      shape: of the tensor.
      start: its first byte, counted from the beginning of the data.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


def encode_header(
    tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
) -> str:
    """The header of a file.

    Tensors are laid out by falling item size, then by name, so that all are aligned.

    Args:
      tensors: name -> (dtype, shape).
      metadata: entries of free text, the header's `__metadata__`.

    Returns:
      JSON text, padded with spaces to a multiple of 8 bytes.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    start = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        end = start + math.prod(shape) * dtype.itemsize
        header[name] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False)
    return text + " " * (-len(text.encode()) % 8)


def parse_header(text: str, where: str) -> dict[str, TensorInfo]:
    """Read a header.

    Args:
      text: the header.
      where: the file, for messages.

    Returns:
      name -> tensor, in the order of the data.

    Raises:
      CheckpointError: not a header, an unknown dtype, or data with holes or overlaps.
    """
    try:
        entries = parse_json(text)
    except RepeatedKey as error:
        raise CheckpointError(f"{where}: the header {error}") from error
    except ValueError as error:
        raise CheckpointError(f"{where}: the header is not JSON ({error})") from error
    if not isinstance(entries, dict) or len(entries) > _MAX_TENSORS:
        raise CheckpointError(
            f"{where}: the header is not a safetensors header: expected an object of at most {_MAX_TENSORS} tensors"
        )
    tensors = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        _check_entry(name, entry, where)
        start, end = entry["data_offsets"]
        info = TensorInfo(DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
        if end - start != info.nbytes:
            raise CheckpointError(
                f"{where}: tensor {name} of shape {info.shape} and dtype {entry['dtype']} takes "
                f"{info.nbytes} bytes, but its data_offsets span {end - start}"
            )
        tensors[name] = info
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].nbytes)))
    position = 0
    for name, info in tensors.items():
        if info.start != position:
            raise CheckpointError(
                f"{where}: tensor {name} begins at byte {info.start} of the data; expected "
                f"{position}, where the one before it ends"
            )
        position += info.nbytes
    return tensors


def _check_entry(name: str, entry: Any, where: str) -> None:
    """Refuses a tensor's entry of a header that has another form than dtype, shape and offsets."""

    def numbers(key: str, most: int) -> bool:
        values = entry.get(key)
        return (
            isinstance(values, list)
            and len(values) <= _MAX_AXES
            and all(type(value) is int and 0 <= value <= most for value in values)
        )

    if not isinstance(entry, dict) or not (
        isinstance(entry.get("dtype"), str)
        and numbers("shape", _MAX_AXIS)
        and numbers("data_offsets", 1 << 60)
        and len(entry["data_offsets"]) == 2
    ):
        raise CheckpointError(
            f"{where}: tensor {name:.100} is {entry!r:.120}; expected dtype, shape and data_offsets"
        )
    if entry["dtype"] not in DTYPES:
        raise CheckpointError(
            f"{where}: tensor {name} has dtype {entry['dtype']:.20}; expected one of "
            f"{', '.join(DTYPES)}. Save the checkpoint in one of these first."
        )


def check_finite(array: np.ndarray, name: str, where: str | os.PathLike) -> None:
    """Refuses a tensor with NaN or infinite values: they would be in every embedding.

    Args:
      array: of one of DTYPES.
      name: the tensor, for the message.
      where: its file, for the message.

    Raises:
      CheckpointError: a value is not finite.
    """
    # A value whose exponent has all bits set is no number. Integers are compared: the temporary array is not
    # larger than the piece, and bfloat16 needs no conversion.
    unsigned = np.dtype(f"u{array.dtype.itemsize}")
    exponent = {"float32": 0x7F80_0000, "float16": 0x7C00, "bfloat16": 0x7F80}[array.dtype.name]
    flat = array.reshape(-1).view(unsigned)
    for start in range(0, flat.size, 1 << 22):
        found = (flat[start : start + (1 << 22)] & unsigned.type(exponent)) == exponent
        if found.any():
            place = start + int(found.argmax())
            value = float(array.reshape(-1)[place])
            raise CheckpointError(
                f"{where}: tensor {name} has the value {value} (element {place} of {flat.size}); the checkpoint is "
                "damaged, or its training has diverged"
            )


class SafetensorsFile:
    """A file that is open for reading. Only its header is in memory.

    Attributes:
      header: the header's exact text, padding included.
      tensors: name -> TensorInfo in the order of the data.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        status = self.path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{self.path}: is not a regular file")
        size = status.st_size
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(size - _LENGTH_BYTES, _MAX_HEADER):
                raise CheckpointError(
                    f"{self.path}: not a safetensors file, or cut off: {size} bytes, "
                    f"a header of {length}"
                )
            try:
                self.header = file.read(length).decode()
            except UnicodeDecodeError as error:
                raise CheckpointError(
                    f"{self.path}: not a safetensors file: the header is not UTF-8 text"
                ) from error
        self.tensors = parse_header(self.header, str(self.path))
        self._data_start = _LENGTH_BYTES + length
        expected = self._data_start + sum(info.nbytes for info in self.tensors.values())
        if size != expected:
            raise CheckpointError(
                f"{self.path}: {size} bytes; expected {expected} from its header. "
                "An interrupted download or copy? Fetch it again."
            )

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """Read a tensor, or one layer of it, into memory.

        Args:
          name: the tensor.
          layer: index on its first axis; None: the whole tensor.

        Returns:
          A new array in the file's dtype.

        Raises:
          CheckpointError: the file ends within the tensor.
        """
        info = self.tensors[name]
        shape = info.shape if layer is None else info.shape[1:]
        data = np.empty(math.prod(shape) * info.dtype.itemsize, np.uint8)
        with open(self.path, "rb") as file:
            file.seek(self._data_start + info.start + (layer or 0) * data.nbytes)
            if file.readinto(data.data) != data.nbytes:
                raise CheckpointError(f"{self.path}: ends within tensor {name}")
        return data.view(info.dtype).reshape(shape)

    def chunks(self, name: str, size: int = 1 << 24) -> Iterator[bytes]:
        """The bytes of a tensor, piece by piece.

        Args:
          name: the tensor.
          size: bytes of a piece; the last may be shorter.

        Yields:
          The pieces in order.
        """
        info = self.tensors[name]
        with open(self.path, "rb") as file:
            file.seek(self._data_start + info.start)
            for start in range(0, info.nbytes, size):
                yield file.read(min(size, info.nbytes - start))

    def view(self, name: str) -> np.ndarray:
        """Maps a tensor from the file into memory. Only what is indexed is read.

        Args:
          name: the tensor.

        Returns:
          A read-only array in the file's dtype.
        """
        info = self.tensors[name]
        if info.nbytes == 0:
            return np.empty(info.shape, info.dtype)
        start = self._data_start + info.start
        data = np.memmap(self.path, np.uint8, mode="r", offset=start, shape=(info.nbytes,))
        return data.view(info.dtype).reshape(info.shape)


class SafetensorsWriter:
    """A file that is written tensor by tensor or layer by layer, in any order.

    A context manager: at the end of the block it checks that every byte was written. The file has its
    full size from the beginning.

    Args:
      path: of the file, which must not exist.
      header: text of the header, of `encode_header` or read from another file.

    Raises:
      FileExistsError: the file exists.
      DiskFull: the disk has no room for the whole file.
      CheckpointError: the header is not valid.
    """

    def __init__(self, path: str | os.PathLike, header: str):
        self.path = Path(path)
        self.tensors = parse_header(header, str(path))
        encoded = header.encode()
        self._data_start = _LENGTH_BYTES + len(encoded)
        self._written = dict.fromkeys(self.tensors, 0)
        size = self._data_start + sum(info.nbytes for info in self.tensors.values())
        self._file = open(self.path, "xb")  # noqa: SIM115, closed in __exit__
        try:
            with naming_full_disk(self.path, size):
                self._file.write(len(encoded).to_bytes(_LENGTH_BYTES, "little") + encoded)
                if hasattr(os, "posix_fallocate"):
                    # A full disk is an error now, not after an hour of copying.
                    os.posix_fallocate(self._file.fileno(), 0, size)
                else:
                    self._file.truncate(size)
        except BaseException:
            self._file.close()
            raise

    def write(self, name: str, array: np.ndarray, layer: int | None = None) -> None:
        """Write a tensor, or one layer of it.

        Args:
          name: the tensor.
          array: of its dtype and shape; for a layer without the first axis.
          layer: index on its first axis; None: the whole tensor.

        Raises:
          CheckpointError: another dtype or shape.
        """
        info = self.tensors[name]
        shape = info.shape if layer is None else info.shape[1:]
        if array.shape != shape or array.dtype != info.dtype:
            raise CheckpointError(
                f"{self.path}: tensor {name}: expected {info.dtype} {shape}, "
                f"found {array.dtype} {array.shape}"
            )
        self._file.seek(self._data_start + info.start + (layer or 0) * array.nbytes)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        self._written[name] += array.nbytes

    def write_slice(self, name: str, start: int, values: np.ndarray) -> None:
        """Write consecutive elements of a tensor, each of them once.

        Args:
          name: the tensor.
          start: the first element's place among all, counted row by row.
          values: of its dtype, one axis.

        Raises:
          CheckpointError: another dtype, or elements beyond its end.
        """
        info = self.tensors[name]
        if values.dtype != info.dtype or start + values.size > math.prod(info.shape):
            raise CheckpointError(
                f"{self.path}: tensor {name}: expected {info.dtype} {info.shape}, "
                f"found {values.dtype} elements up to {start + values.size}"
            )
        self._file.seek(self._data_start + info.start + start * values.itemsize)
        self._file.write(np.ascontiguousarray(values).view(np.uint8).data)
        self._written[name] += values.nbytes

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        if error is None:
            for name, info in self.tensors.items():
                if self._written[name] != info.nbytes:
                    raise CheckpointError(
                        f"{self.path}: {self._written[name]} of {info.nbytes} bytes of tensor "
                        f"{name} were written"
                    )
