"""What smaller vectors cost: scores of fewer numbers, or of numbers of fewer bits, from embeddings that are there.

Owns how a search with stored vectors of a form ranks. How vectors are cut and rounded is `embedding/precision.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llave_jax.common.tables import percent
from llave_jax.embedding.precision import (
    PRECISIONS,
    calibration_ranges,
    check_precision,
    normalised,
    quantise,
    truncate,
)

# Binary vectors are searched by Hamming distance, and so many times the wanted number is rescored by the query in
# full; 10 are wanted at least. Both are what sentence-transformers has.
RESCORED, LEAST_WANTED = 4, 10


class Form(NamedTuple):
    """A form in which the vectors of documents are stored. Queries keep their precision.

    Attributes:
      dim: numbers that are kept, L2-normalised again.
      precision: one of PRECISIONS. int8 is calibrated on the documents.
    """

    dim: int
    precision: str = "float32"

    @property
    def bytes(self) -> int:
        """Bytes of a vector."""
        bits = {"float32": 32, "float16": 16, "int8": 8, "binary": 1}[self.precision]
        return -(-self.dim * bits // 8)

    @property
    def rescores(self) -> bool:
        """Whether scores depend on which others are searched, as the best of them are rescored."""
        return self.precision == "binary"

    def stored(self, documents: np.ndarray) -> np.ndarray:
        """What the stored vectors of documents stand for.

        Args:
          documents: float32 [m, D], L2-normalised.

        Returns:
          float32 [m, dim], L2-normalised; of binary vectors, numbers of two values.
        """
        vectors = truncate(documents, self.dim)
        if self.precision == "float32":
            return vectors
        if self.precision == "binary":
            return _signs(vectors) / np.float32(self.dim**0.5)
        if self.precision == "int8" and len(vectors) >= 2:
            least, largest = ranges = calibration_ranges(vectors)
            steps = quantise(vectors, "int8", ranges).astype(np.float32) + 128.5
            return normalised(least + steps * ((largest - least) / 255))
        return normalised(quantise(vectors, self.precision).astype(np.float32))

    def scores(self, queries: np.ndarray, stored: np.ndarray, wanted: int) -> np.ndarray:
        """Scores by which a search ranks stored vectors.

        Args:
          queries: float32 [b, dim], L2-normalised.
          stored: of `stored`, [m, dim].
          wanted: answers that are looked at; of binary vectors, RESCORED times as many are rescored.

        Returns:
          float32 [b, m]: cosines; of binary vectors that are not rescored, numbers below -1 by Hamming distance.
        """
        cosines = queries @ stored.T
        if not self.rescores:
            return cosines
        equal = _signs(queries) @ _signs(stored).T
        best = np.argsort(-equal, axis=1, kind="stable")
        best = best[:, : RESCORED * max(wanted, LEAST_WANTED)]
        found = equal / self.dim - 3
        np.put_along_axis(found, best, np.take_along_axis(cosines, best, 1), 1)
        return found


def _signs(vectors: np.ndarray) -> np.ndarray:
    """1 where a number is above 0, else -1, as bits are; products of these are whole, and so exact."""
    return np.where(vectors > 0, np.float32(1), np.float32(-1))


def read_forms(dims: str | None, precisions: str | None, width: int) -> tuple[Form, ...]:
    """The forms that flags ask for: every number of dims in every precision.

    Args:
      dims: such as "64,256"; None: the whole width alone.
      precisions: such as "int8,binary", besides float32; None: float32 alone.
      width: numbers of an embedding.

    Returns:
      The forms, the whole in float32 first; () if both are None.

    Raises:
      ValueError: what is given are no dims of such embeddings, or no precisions.
    """
    if dims is None and precisions is None:
        return ()
    sizes = [width]
    for text in (dims or "").split(",") if dims else ():
        if not text.strip().isdigit() or not 1 <= int(text) <= width:
            raise ValueError(f"--dims is {dims!r}; expected numbers from 1 to {width}, as 64,256")
        sizes.append(int(text))
    names = ["float32"]
    for name in (precisions or "").split(",") if precisions else ():
        check_precision(name.strip())
        names.append(name.strip())
    return tuple(
        Form(dim, name)
        for name in sorted(set(names), key=PRECISIONS.index)
        for dim in sorted(set(sizes), reverse=True)
    )


def rows(scores: Mapping[Form, Mapping[str, float | None]]) -> list[list[str]]:
    """Cells of a table, the heading first.

    Args:
      scores: of each form by name, as fractions.

    Returns:
      One row for each form.
    """
    names = list(next(iter(scores.values())))
    table = [["numbers", "precision", "bytes", *names]]
    for form, values in scores.items():
        cells = [percent(values[name]) for name in names]
        table.append([str(form.dim), form.precision, str(form.bytes), *cells])
    return table


def to_json(scores: Mapping[Form, Mapping[str, float | None]]) -> list[dict[str, Any]]:
    """The same for a file.

    Args:
      scores: as for `rows`.

    Returns:
      {"numbers", "precision", "bytes", "scores"} of each form.
    """
    return [
        {**dict(zip(("numbers", "precision"), form, strict=True)), "bytes": form.bytes}
        | {"scores": dict(values)}
        for form, values in scores.items()
    ]
