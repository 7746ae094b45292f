"""One model from several of the same sizes: weighted means, or points on the arc between them.

Both are linear combinations of the parents' tensors, with factors that follow from the tensors' inner products. So
each tensor is read twice, slice by slice, and no model is ever in memory. Model soups: arXiv 2203.05482; spherical
merging of embedding models: Qwen3-Embedding, arXiv 2506.05176.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.common.content import file_digest
from llave_jax.common.files import staged_directory
from llave_jax.common.locks import only_writer
from llave_jax.common.progress import Progress
from llave_jax.models.config import LlaveConfig
from llave_jax.weights import model_dir
from llave_jax.weights.safetensors_io import (
    CheckpointError,
    SafetensorsFile,
    SafetensorsWriter,
    check_finite,
    encode_header,
)

METHODS = ("linear", "slerp")
# Elements of a tensor that are in memory at once, of each parent.
SLICE = 1 << 20
# Sine of the angle between two tensors below which the arc between them is a line: the two differ by less than the
# square of it.
SMALLEST_SINE = 1e-6

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Likeness:
    """How near a parent is to the merged model.

    Attributes:
      cosine: of all weights, as one vector, before they are rounded to the file's dtype.
      lowest: of the tensor where it is smallest.
      tensor: its path.
    """

    cosine: float
    lowest: float
    tensor: str


@dataclasses.dataclass(frozen=True)
class Merged:
    """What `merge_models` made.

    Attributes:
      parents: of each parent, in order.
      linear: paths of tensors that were merged linearly although the method was "slerp".
    """

    parents: tuple[Likeness, ...]
    linear: tuple[str, ...]


def merge_models(
    paths: Sequence[str | os.PathLike],
    weights: Sequence[float],
    method: str,
    output: str | os.PathLike,
    *,
    overwrite: bool = False,
    show_progress: bool = True,
) -> Merged:
    """Writes a model directory with merged weights; all else in it is the first model's.

    Args:
      paths: at least two model directories or training runs, of the same sizes. Of a run, one parameter at a time is
        in memory, and a copy of it on the disk.
      weights: of each model, at least 0; they sum to 1.
      method: "linear", the weighted mean; or "slerp" (`slerp_factors`).
      output: the directory to make; appears when it is complete. Tensors have the first model's dtypes; sums are
        formed in float32.
      overwrite: replace a model directory that exists.
      show_progress: show a progress bar.

    Returns:
      What was made.

    Raises:
      ValueError: the models differ in their sizes, or an argument is not possible.
      CheckpointError: a model cannot be used, or a weight is not finite.
      FileExistsError: `output` exists.
    """
    check_weights(weights, len(paths))
    if method not in METHODS:
        raise ValueError(f"method is {method!r}; expected one of {', '.join(METHODS)}")
    directories = [model_dir.locate(path) for path in paths]
    configs = [model_dir.load_config(directory) for directory in directories]
    for path, directory, config in zip(paths, directories, configs, strict=True):
        _compare(paths[0], directories[0], configs[0], path, directory, config)
    parents = [model_dir.open_params(path) for path in paths]
    with only_writer(output, inside=False):
        for directory in directories:
            model_dir.check_output(Path(output), overwrite=overwrite, keep=directory)
        with staged_directory(output) as staged:
            model_dir.write_config(staged, configs[0])
            model_dir.take_over(directories[0], staged)
            sources = [
                _Source(path, directory, params, staged)
                for path, directory, params in zip(paths, directories, parents, strict=True)
            ]
            return _write(staged / model_dir.WEIGHTS, sources, weights, method, show_progress)


def check_weights(weights: Sequence[float], models: int) -> None:
    """Refuses weights with which models cannot be merged.

    Args:
      weights: of each model.
      models: how many there are.

    Raises:
      ValueError: fewer than two models, another number of weights, or weights that are no shares of 1.
    """
    if models < 2:
        raise ValueError(f"{models} model(s) to merge; expected at least 2")
    if len(weights) != models:
        raise ValueError(f"{len(weights)} weights for {models} models; expected one for each")
    if not all(0 <= weight <= 1 for weight in weights) or abs(math.fsum(weights) - 1) > 1e-6:
        raise ValueError(
            f"weights are {', '.join(map(str, weights))}; expected numbers of at least 0 that sum to 1"
        )


def _compare(
    first_path: str | os.PathLike,
    first: Path,
    first_config: LlaveConfig,
    path: str | os.PathLike,
    directory: Path,
    config: LlaveConfig,
) -> None:
    """Refuses a model of other sizes than the first, and warns of what else differs."""
    ours, theirs = _flat(first_config.to_dict()), _flat(config.to_dict())
    differences = {
        key: f"{key} ({ours.get(key)} and {theirs.get(key)})"
        for key in sorted(ours.keys() | theirs.keys())
        if ours.get(key) != theirs.get(key)
    }
    inputs = [text for key, text in differences.items() if key.startswith("inputs.")]
    sizes = [text for key, text in differences.items() if not key.startswith("inputs.")]
    if sizes:
        raise ValueError(f"{first_path} and {path} are models of other sizes: {', '.join(sizes)}")
    if inputs:
        logger.warning(
            "%s and %s lay inputs out differently: %s; the first model's settings are taken",
            first_path,
            path,
            ", ".join(inputs),
        )
    if _tokenizer(first) != _tokenizer(directory):
        logger.warning(
            "%s and %s have other tokenizer files; the first model's are taken", first_path, path
        )


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _tokenizer(directory: Path) -> dict[str, bytes]:
    files = sorted((directory / model_dir.TOKENIZER).glob("*"))
    return {file.name: file_digest(file) for file in files if file.is_file()}


class _Source:
    """The tensors of one model, read in slices. Mapped pages would stay in memory, so nothing is mapped.

    Args:
      path: of the model.
      directory: its model directory.
      params: of `model_dir.open_params`.
      scratch: a directory for copies of a run's parameters.
    """

    def __init__(
        self, path: str | os.PathLike, directory: Path, params: Mapping[str, Any], scratch: Path
    ):
        self.where, self.params = path, params
        self._scratch = scratch
        is_file = directory == Path(path)
        self._file = SafetensorsFile(directory / model_dir.WEIGHTS) if is_file else None

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[_Tensor]:
        """A tensor, to be read any number of times.

        Args:
          name: its path.

        Yields:
          The tensor.
        """
        if self._file is not None:
            yield _Tensor(self, name, self._file)
            return
        with tempfile.NamedTemporaryFile(dir=self._scratch, prefix=".parameter") as copy:
            array = np.ascontiguousarray(np.asarray(self.params[name]))
            copy.write(array.reshape(-1).view(np.uint8).data)
            copy.flush()
            dtype = array.dtype
            del array
            yield _Tensor(self, name, (Path(copy.name), dtype))


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor of a model: in its safetensors file, or in a file of its own with this dtype."""

    source: _Source
    name: str
    place: SafetensorsFile | tuple[Path, np.dtype]

    def slices(self) -> Iterator[np.ndarray]:
        """SLICE elements after another, in float32.

        Raises:
          CheckpointError: a value is not finite, or the file was cut off.
        """
        if isinstance(self.place, SafetensorsFile):
            dtype = self.place.tensors[self.name].dtype
            pieces = self.place.chunks(self.name, SLICE * dtype.itemsize)
        else:
            path, dtype = self.place
            pieces = _pieces(path, SLICE * dtype.itemsize)
        for piece in pieces:
            values = np.frombuffer(piece, dtype)
            check_finite(values, self.name, self.source.where)
            yield values.astype(np.float32)


def _pieces(path: Path, size: int) -> Iterator[bytes]:
    with path.open("rb") as file:
        while piece := file.read(size):
            yield piece


def _write(
    path: Path, sources: Sequence[_Source], weights: Sequence[float], method: str, show: bool
) -> Merged:
    first = sources[0].params
    layout = {name: (np.dtype(array.dtype), tuple(array.shape)) for name, array in first.items()}
    total = sum(-(-math.prod(shape) // SLICE) for _, shape in layout.values())
    products: dict[str, np.ndarray] = {}
    factors: dict[str, np.ndarray] = {}
    linear: list[str] = []
    with (
        SafetensorsWriter(path, encode_header(layout, model_dir.METADATA)) as writer,
        Progress(2 * total, "merging", unit="slices", enabled=show) as progress,
    ):
        for name in writer.tensors:
            with contextlib.ExitStack() as stack:
                tensors = [stack.enter_context(source.open(name)) for source in sources]
                products[name] = np.zeros((len(sources), len(sources)))
                for slices in _together(tensors):
                    products[name] += inner_products(slices)
                    progress.update()
                factors[name] = np.array(weights, np.float64)
                if method == "slerp":
                    factors[name], is_line = slerp_factors(products[name], weights)
                    if is_line:
                        linear.append(name)
                start = 0
                for slices in _together(tensors):
                    merged = combine(slices, factors[name], layout[name][0])
                    check_finite(merged, name, path)
                    writer.write_slice(name, start, merged)
                    start += merged.size
                    progress.update()
    parents = [_likeness(i, products, factors) for i in range(len(sources))]
    return Merged(tuple(parents), tuple(linear))


def _together(tensors: Sequence[_Tensor]) -> Iterator[list[np.ndarray]]:
    for slices in zip(*(tensor.slices() for tensor in tensors), strict=True):
        if len({values.size for values in slices}) > 1:
            raise CheckpointError(f"{tensors[0].name}: a file was cut off while it was read")
        yield list(slices)


def inner_products(slices: Sequence[np.ndarray]) -> np.ndarray:
    """Inner products of all pairs of vectors.

    Args:
      slices: float32 [n] each.

    Returns:
      float64 [models, models].
    """
    rows = np.stack([values.astype(np.float64) for values in slices])
    return rows @ rows.T


def combine(slices: Sequence[np.ndarray], factors: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A linear combination, formed in float32.

    Args:
      slices: float32 [n] each.
      factors: float64 [models].
      dtype: of the result.

    Returns:
      [n] of this dtype; infinite where it is too narrow.
    """
    total = np.zeros_like(slices[0])
    for values, factor in zip(slices, factors, strict=True):
        total += np.float32(factor) * values
    with np.errstate(over="ignore"):
        return total.astype(dtype)


def slerp_factors(products: np.ndarray, weights: Sequence[float]) -> tuple[np.ndarray, bool]:
    """The factors by which spherical merging multiplies the tensors.

    Two tensors a and b at an angle x, with weight t for b, become (sin((1 - t) x) a + sin(t x) b) / sin(x). Of more
    than two, each next one is merged into what the ones before it gave, with t its share of the weights so far; so
    their order matters a little. Where two are nearly parallel, nearly opposite, or zero, they are merged linearly.

    Args:
      products: float64 [models, models], the tensors' inner products.
      weights: of each model.

    Returns:
      factors: float64 [models].
      linear: whether a pair was merged linearly.
    """
    factors, total, linear = np.zeros(len(weights)), 0.0, False
    for i, weight in enumerate(weights):
        total += weight
        if weight == 0:
            continue
        share = weight / total
        if share == 1:
            factors[i] = 1.0
            continue
        lengths = math.sqrt(max(factors @ products @ factors, 0) * products[i, i])
        cosine = min(1.0, max(-1.0, float(factors @ products[:, i]) / lengths)) if lengths else 1.0
        sine = math.sqrt(1 - cosine**2)
        old, new = 1 - share, share
        if sine < SMALLEST_SINE:
            linear = True
        else:
            angle = math.atan2(sine, cosine)
            old, new = math.sin(old * angle) / sine, math.sin(new * angle) / sine
        factors = old * factors
        factors[i] = new
    return factors, linear


def _likeness(
    i: int, products: Mapping[str, np.ndarray], factors: Mapping[str, np.ndarray]
) -> Likeness:
    """Of parent i, from the inner products alone."""
    sums, cosines = np.zeros(3), {}
    for name, product in products.items():
        factor = factors[name]
        terms = np.array([factor @ product[:, i], factor @ product @ factor, product[i, i]])
        sums += terms
        cosines[name] = _cosine(*terms)
    tensor = min(cosines, key=lambda name: cosines[name])
    return Likeness(_cosine(*sums), cosines[tensor], tensor)


def _cosine(product: float, square: float, other_square: float) -> float:
    lengths = math.sqrt(max(square, 0) * other_square)
    # A tensor of zeros is as near as it can be to one of zeros.
    return float(product / lengths) if lengths else float(square == other_square)
