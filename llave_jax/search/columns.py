"""What an index keeps of an item, and the columns that hold it.

Owns the form of rows and the types of metadata columns. The table itself is `index.py`.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

# Columns of every index; metadata columns have other names. `full_vector` is there only if fewer numbers of a
# vector are searched than are kept.
OWN = ("id", "kind", "text", "path", "vector", "full_vector", "thumbnail", "digest", "stamp")
VECTOR_TYPES = {"float32": pa.float32(), "float16": pa.float16()}
_WHOLE_NUMBERS = (-(2**63), 2**63 - 1)


@dataclasses.dataclass(frozen=True)
class Row:
    """An item as an index keeps it, without its vector.

    Attributes:
      id: unique in the index.
      kind: "text", "image", "video" or "mixed".
      text: of the item.
      path: of its first image or its video; "" without a file.
      metadata: values by the names of their columns. A value is a string, a number, a boolean, None or a list
        of strings; dates are kept as ISO text, anything else as JSON.
      thumbnail: a small JPEG file.
      digest: of what the model sees; equal digests have equal vectors.
      stamp: of the item's files without their content; equal stamps have equal digests.
    """

    id: str
    kind: str
    text: str = ""
    path: str = ""
    metadata: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    thumbnail: bytes | None = None
    digest: bytes = b""
    stamp: bytes = b""


@dataclasses.dataclass(frozen=True)
class Hit:
    """A search's result.

    Attributes:
      id: of the item.
      score: cosine similarity to the query.
      kind, text, path, metadata: as of `Row`; metadata without values that are None.
    """

    id: str
    score: float
    kind: str
    text: str
    path: str
    metadata: dict[str, Any]


def make_schema(
    dimension: int, search_dimension: int, precision: str, note: Mapping[str, str]
) -> pa.Schema:
    """The columns of a new index.

    Args:
      dimension: numbers of a vector that are kept.
      search_dimension: numbers that are searched.
      precision: a key of VECTOR_TYPES.
      note: kept with the column `id`.

    Returns:
      The schema, without metadata columns.
    """
    number = VECTOR_TYPES[precision]
    vectors = [pa.field("vector", pa.list_(number, search_dimension), nullable=False)]
    if search_dimension < dimension:
        vectors.append(pa.field("full_vector", pa.list_(number, dimension), nullable=False))
    return pa.schema(
        [
            pa.field("id", pa.string(), nullable=False, metadata=dict(note)),
            pa.field("kind", pa.string(), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("path", pa.string(), nullable=False),
            *vectors,
            pa.field("thumbnail", pa.binary()),
            pa.field("digest", pa.binary(), nullable=False),
            pa.field("stamp", pa.binary(), nullable=False),
        ]
    )


def metadata_fields(schema: pa.Schema) -> list[pa.Field]:
    """The metadata columns of an index.

    Args:
      schema: of its table.

    Returns:
      Their fields, in the table's order.
    """
    return [field for field in schema if field.name not in OWN]


def metadata_types(
    known: Mapping[str, pa.DataType], metadata: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, pa.DataType], dict[int, str]]:
    """Types of the metadata columns that some items need.

    Args:
      known: types of the columns that exist.
      metadata: of each item.

    Returns:
      types: by name, those of `known` included.
      failures: why an item's metadata do not fit, by the item's place.

    Raises:
      ValueError: a name that no column can have.
    """
    types, failures = dict(known), {}
    for place, values in enumerate(metadata):
        for name, value in values.items():
            _check_name(name)
            found = _type_of(value)
            if found is None:
                continue
            expected = types.setdefault(name, found)
            if found == expected or (found, expected) == (pa.int64(), pa.float64()):
                continue
            if (found, expected) == (pa.float64(), pa.int64()) and name not in known:
                types[name] = found
                continue
            failures[place] = (
                f"metadata {name} is {_plain(value)!r:.60}, {_described(found)}; this column of the index "
                f"holds {_described(expected)}"
            )
    return types, failures


def _check_name(name: str) -> None:
    if name in OWN or not name or name.startswith("_") or "." in name:
        raise ValueError(
            f"metadata {name!r:.60}: no column can have this name; rename it (taken are {', '.join(OWN)}; a "
            "name is not empty, does not begin with _ and has no dot)"
        )


def _plain(value: Any) -> Any:
    """A metadata value as its column keeps it."""
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, list | tuple) and all(isinstance(entry, str) for entry in value):
        return list(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _type_of(value: Any) -> pa.DataType | None:
    value = _plain(value)
    if value is None:
        return None
    if isinstance(value, bool):
        return pa.bool_()
    if isinstance(value, int):
        low, high = _WHOLE_NUMBERS
        return pa.int64() if low <= value <= high else pa.float64()
    if isinstance(value, float):
        return pa.float64()
    return pa.string() if isinstance(value, str) else pa.list_(pa.string())


def _described(kind: pa.DataType) -> str:
    if pa.types.is_list(kind):
        return "lists of texts"
    names = {"bool": "booleans", "int64": "whole numbers", "double": "numbers", "string": "texts"}
    return names.get(str(kind), str(kind))


def rows_table(
    rows: Sequence[Row], schema: pa.Schema, vectors: Mapping[str, np.ndarray] | None = None
) -> pa.Table:
    """Rows as a table.

    Args:
      rows: n of them.
      schema: of the index; all metadata of the rows have columns.
      vectors: by the schema's names, [n, numbers] of its precision. None: the table has neither vectors nor
        thumbnails.

    Returns:
      The table, with the schema's columns.
    """
    kept = ("id", "kind", "text", "path", "digest", "stamp", *(["thumbnail"] if vectors else []))
    columns: dict[str, pa.Array] = {
        name: pa.array([getattr(row, name) for row in rows], schema.field(name).type)
        for name in kept
    }
    for name, array in (vectors or {}).items():
        flat = pa.array(array.reshape(-1))
        columns[name] = pa.FixedSizeListArray.from_arrays(flat, array.shape[1])
    for field in metadata_fields(schema):
        values = [_plain(row.metadata.get(field.name)) for row in rows]
        if pa.types.is_floating(field.type):
            values = [None if value is None else float(value) for value in values]
        columns[field.name] = pa.array(values, field.type)
    fields = [field for field in schema if field.name in columns]
    return pa.table([columns[field.name] for field in fields], schema=pa.schema(fields))


def vectors_of(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    """The vectors of a column.

    Args:
      column: of fixed-size lists.

    Returns:
      float32 [n, D].
    """
    if isinstance(column, pa.ChunkedArray):
        column = column.combine_chunks()
    numbers = column.flatten().to_numpy(zero_copy_only=False)
    return numbers.reshape(len(column), -1).astype(np.float32, copy=False)
