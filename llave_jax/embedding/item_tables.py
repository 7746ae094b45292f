"""Items in parquet files: texts, pictures (bytes, or paths) and videos in columns."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from llave_jax.embedding import entries
from llave_jax.embedding.entries import Entry, Piece, Turns, failed_entry, make_entry, resolve_path

# Rows that are dealt out to shards together.
PART_ROWS = 1024
# Rows in memory at once, as they can hold pictures; and bytes of a column that are read at once.
_BATCH_ROWS, _BUFFER_BYTES = 32, 1 << 20


@dataclasses.dataclass(frozen=True)
class Columns:
    """Which columns of a table hold what.

    None: the column of the field's own name, if there is one. `image` may hold several pictures a row, too.

    Attributes:
      id: unique for each row, by choice of the user; None and no column `id`: the row's number in the input.
      text: user content.
      image: bytes of an image file, or a struct of `bytes` and `path` as Hugging Face has it, or a path relative to
        the table; or a list of these.
      video: a path.
      metadata: names of columns that are kept beside the vectors.
    """

    id: str | None = None
    text: str | None = None
    image: str | None = None
    video: str | None = None
    metadata: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class TablePiece(Piece):
    """Rows of one row group.

    Attributes:
      source: path of the table.
      group: number of the row group.
      parts: (start, stop) of the rows, counted from the row group's first; in order.
      first: rows of the file before the row group.
      position: entries of the whole input before the row group.
      roles: column -> "id", "text", "image", "images", "video".
      metadata: names of columns.
      row_bytes: of a row, on average.
      allow_urls: pictures may be URLs.
    """

    source: Path
    group: int
    parts: tuple[tuple[int, int], ...]
    first: int
    position: int
    roles: Mapping[str, str]
    metadata: tuple[str, ...]
    row_bytes: int
    allow_urls: bool

    def __len__(self) -> int:
        return sum(stop - start for start, stop in self.parts)

    def part(self, start: int, stop: int) -> TablePiece:
        parts, before = [], 0
        for first, last in self.parts:
            cut = max(first, first + start - before), min(last, first + stop - before)
            if cut[0] < cut[1]:
                parts.append(cut)
            before += last - first
        return dataclasses.replace(self, parts=tuple(parts))

    def weights(self) -> Iterator[tuple[int, int]]:
        kinds = set(self.roles.values())
        pictures = kinds & {"image", "images"}
        weight = entries.IMAGE_WEIGHT if pictures else 1
        if "video" in kinds:
            weight = entries.VIDEO_WEIGHT
        num_bytes = self.row_bytes if pictures else 0
        for _ in range(len(self)):
            yield weight, num_bytes

    def entries(self) -> Iterator[Entry]:
        columns = list(dict.fromkeys((*self.roles, *self.metadata)))
        parts = iter(self.parts)
        start, stop = next(parts)
        row = 0
        try:
            with pyarrow.parquet.ParquetFile(self.source, buffer_size=_BUFFER_BYTES) as file:
                for batch in file.iter_batches(_BATCH_ROWS, [self.group], columns):
                    for i in range(len(batch)):
                        if row >= stop:
                            try:
                                start, stop = next(parts)
                            except StopIteration:
                                return
                        if row >= start:
                            yield self._entry(batch, i, row)
                        row += 1
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{self.source}: row group {self.group} cannot be read: {error}"
            ) from error
        if row < self.parts[-1][1]:
            raise ValueError(
                f"{self.source}: row group {self.group} ends at row {row}, not {self.parts[-1][1]}; it has "
                "changed, or is damaged"
            )

    def _entry(self, batch: pyarrow.RecordBatch, index: int, row: int) -> Entry:
        number = self.first + row + 1
        where = f"{self.source}: row {number}"
        entry_id: Any = self.position + row
        try:
            values, metadata = {}, {}
            for column, role in self.roles.items():
                value = _value(batch, column, index, where)
                if role == "id":
                    if value is None:
                        raise ValueError(f"{where}: {column}, the id, is null")
                    entry_id = value
                elif role in ("image", "images") and isinstance(value, list):
                    pictures = [
                        _picture(v, column, self.source, where, self.allow_urls) for v in value
                    ]
                    values["images"] = [*values.get("images", ()), *pictures]
                elif role in ("image", "images"):
                    values["image"] = _picture(value, column, self.source, where, self.allow_urls)
                elif role == "video":
                    if value is not None:
                        value = resolve_path(column, value, self.source.parent, where)
                    values["video"] = value
                else:
                    values["text"] = value
            for column in self.metadata:
                metadata[column] = _value(batch, column, index, where)
        except ValueError as error:
            return failed_entry(where, number, entry_id, error)
        return make_entry(where, number, entry_id, values, metadata)


def _value(batch: pyarrow.RecordBatch, column: str, index: int, where: str) -> Any:
    try:
        return batch.column(column)[index].as_py()
    except (UnicodeDecodeError, pyarrow.ArrowException, OverflowError) as error:
        raise ValueError(f"{where}: {column} cannot be read: {error}") from error


def _picture(
    value: Any, column: str, source: Path, where: str, allow_urls: bool
) -> str | bytes | None:
    if isinstance(value, dict):
        path = value.get("path")
        value = value["bytes"] if value.get("bytes") is not None else path
    if isinstance(value, str):
        return resolve_path(column, value, source.parent, where, allow_urls)
    if value is not None and not value:
        raise ValueError(f"{where}: {column} holds a picture of 0 bytes")
    return value


class Table:
    """A parquet file of which only the footer has been read.

    Attributes:
      rows: in the file.
      metadata_fields: name and type of the columns that are kept beside the vectors.

    Args:
      source: the file.
      columns: which columns hold what.
      allow_urls: pictures may be URLs.

    Raises:
      ValueError: it is no parquet file, or a column is missing or of a type that cannot hold what it should.
      OSError: the file cannot be read.
    """

    def __init__(self, source: str | os.PathLike, columns: Columns, allow_urls: bool = False):
        self._allow_urls = allow_urls
        self._source = Path(source)
        try:
            with pyarrow.parquet.ParquetFile(self._source) as file:
                schema, footer = file.schema_arrow, file.metadata
                groups = [footer.row_group(i) for i in range(footer.num_row_groups)]
                self._groups = [group.num_rows for group in groups]
                self._bytes = [g.total_byte_size // max(1, g.num_rows) for g in groups]
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise ValueError(f"{source}: is not a readable parquet file: {error}") from error
        self._roles = self._find(schema, columns)
        self._metadata = tuple(columns.metadata)
        self.rows = sum(self._groups)
        self.metadata_fields = [schema.field(name) for name in columns.metadata]

    def pieces(self, position: int, turns: Turns) -> Iterator[TablePiece]:
        """The rows, in order.

        Args:
          position: entries of the whole input before the table.
          turns: deals out each row group's rows by PART_ROWS.

        Yields:
          The rows of each row group that are this shard's, if there are any.
        """
        first = 0
        for group, rows in enumerate(self._groups):
            starts = range(0, rows, PART_ROWS)
            parts = tuple((n, min(n + PART_ROWS, rows)) for n in starts if turns.mine())
            if parts:
                yield TablePiece(
                    *(self._source, group, parts, first, position + first),
                    *(self._roles, self._metadata, self._bytes[group], self._allow_urls),
                )
            first += rows

    def _find(self, schema: pyarrow.Schema, columns: Columns) -> dict[str, str]:
        twice = {name for name in schema.names if schema.names.count(name) > 1}
        roles: dict[str, str] = {}
        for role, checks in _TYPES.items():
            name = getattr(columns, role, None)
            if name is None and role in schema.names:
                # `images` is there for tables that call it so; a column that is named goes before it.
                name = role if role != "images" or columns.image is None else None
            if name is None:
                continue
            self._check_name(name, role, schema)
            if name in roles:
                raise ValueError(
                    f"{self._source}: column {name} is named for {roles[name]} and {role}"
                )
            kind = schema.field(name).type
            # A column without any value can have the type of none.
            if not (pyarrow.types.is_null(kind) or checks(kind)):
                raise ValueError(
                    f"{self._source}: column {name} is {kind}; expected {_EXPECTED[role]} "
                    f"({_flag(role)} names another one)"
                )
            roles[name] = role
        for name in columns.metadata:
            self._check_name(name, "metadata", schema)
        if twice & {*roles, *columns.metadata}:
            raise ValueError(f"{self._source}: has two columns called {sorted(twice)[0]}")
        if not set(roles.values()) - {"id"}:
            raise ValueError(
                f"{self._source}: has no column text, image, images or video; its columns are "
                f"{_listed(schema)}: name them with --text-column, --image-column or --video-column"
            )
        return roles

    def _check_name(self, name: str, role: str, schema: pyarrow.Schema) -> None:
        if name not in schema.names:
            raise ValueError(
                f"{self._source}: has no column {name} ({_flag(role)}); its columns are {_listed(schema)}"
            )


def _listed(schema: pyarrow.Schema) -> str:
    more = f" and {len(schema.names) - 20} more" if len(schema.names) > 20 else ""
    return ", ".join(schema.names[:20]) + more


def _flag(role: str) -> str:
    return {"images": "--image-column", "metadata": "--metadata-columns"}.get(
        role, f"--{role}-column"
    )


def _is_text(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def _is_id(kind: pyarrow.DataType) -> bool:
    return _is_text(kind) or pyarrow.types.is_integer(kind)


def _is_picture(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_struct(kind):
        inner = {field.name: field.type for field in kind.fields}
        return "bytes" in inner and all(
            types.is_null(inner[n]) or _is_text(inner[n]) or _is_bytes(inner[n])
            for n in ("bytes", "path")
            if n in inner
        )
    return _is_text(kind) or _is_bytes(kind)


def _is_bytes(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    return (
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_binary_view(kind)
        or types.is_fixed_size_binary(kind)
    )


def _is_pictures(kind: pyarrow.DataType) -> bool:
    types = pyarrow.types
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_picture(kind.value_type)
    return _is_picture(kind)


_TYPES = {
    "id": _is_id,
    "text": _is_text,
    "image": _is_pictures,
    "images": _is_pictures,
    "video": _is_text,
}
_PICTURE = "bytes, a struct of bytes and path, paths, or lists of these"
_EXPECTED = {
    "id": "texts or integers",
    "text": "texts",
    "image": _PICTURE,
    "images": _PICTURE,
    "video": "paths",
}
