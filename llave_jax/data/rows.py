"""Rows of training data: their fields, and reading them from parquet, JSON and JSON lines.

Owns text only. What one row may say is `row_forms.py`. The images of a row are read by `image_store.py`. Rows
become pairs in `sources.py`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet

from llave_jax.common.content import short_hash
from llave_jax.common.json_text import LINE_TOO_LONG, json_lines, parse_json
from llave_jax.data import row_forms
from llave_jax.data.row_forms import FIELDS, OPTIONAL, REQUIRED, Rest, Side
from llave_jax.inputs.item import is_empty

# Its functions are made when it is imported: type checkers do not know them.
compute: Any = pyarrow.compute
# Rows that are turned into Python strings at a time.
_CHUNK = 4096
EMPTY_SIDE = "the query or the target has neither text nor image"
# `more` is that of `Row`. `problem` says why a row cannot be used, if that shows while the file is read. Either is
# null where there is nothing to say.
_SCHEMA = pa.schema([(field, pa.large_string()) for field in (*FIELDS, "more", "problem")])


class RowError(ValueError):
    """A row that cannot be used.

    Args:
      name: the file and the row.
      reason: what is wrong with it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name = name
        self.reason = reason

    def __reduce__(self):
        return RowError, (self.name, self.reason)


class Row(NamedTuple):
    """One training row as it is stored.

    Attributes:
      qry: text of the query.
      qry_image_path: image of the query, relative to the image root; "" if it has none. So are the others.
      pos_text: text of the target, the first one of several.
      pos_image_path: image of this target.
      neg_text: text of the hard negative, the first one of several; "" if there is none.
      neg_image_path: image of this hard negative.
      more: the other targets and hard negatives, and a teacher's scores, as `Rest.to_text` writes them; "" for a
        row of one target, at most one hard negative and no scores.
    """

    qry: str
    qry_image_path: str
    pos_text: str
    pos_image_path: str
    neg_text: str
    neg_image_path: str
    more: str = ""

    def digest(self) -> int:
        """64-bit hash of the content, the same wherever the row is stored.

        Returns:
          At least 0, less than 2**64.
        """
        return hash_texts(self if self.more else self[:-1])

    def rest(self) -> Rest:
        """What `more` holds."""
        return Rest.from_text(self.more)

    def positives(self) -> tuple[Side, ...]:
        """The targets, one at least."""
        return (Side(self.pos_text, self.pos_image_path), *self.rest().positives)

    def negatives(self) -> tuple[Side, ...]:
        """The hard negatives, in the row's order; often none."""
        first = Side(self.neg_text, self.neg_image_path)
        return () if first.is_empty() else (first, *self.rest().negatives)


def hash_texts(texts: Iterable[str]) -> int:
    """64-bit hash of several texts, the same on every machine.

    Args:
      texts: in order.

    Returns:
      At least 0, less than 2**64.
    """
    return int.from_bytes(short_hash("\x1f".join(texts).encode()), "little")


class Table:
    """The rows of one subset, in memory as Arrow columns (their text plus 8 bytes a field).

    Attributes:
      file: the rows' file or files, for messages.
      row_numbers: int64 [n], of each row in its file or files.
      left_out: numbers of the rows that are left out, since they have an empty side. MMEB-train's parquet
        files have such rows, and VLM2Vec's reader skips them, too.
    """

    def __init__(
        self, batch: pa.RecordBatch, file: str, row_numbers: np.ndarray, left_out: tuple[int, ...]
    ):
        self.file = file
        self.row_numbers = row_numbers
        self.left_out = left_out
        self._columns = [batch.column(field) for field in (*FIELDS, "problem")]
        more = batch.column("more")
        self._more = None if more.null_count == len(more) else more

    @property
    def has_more(self) -> bool:
        """Whether any row has several targets or hard negatives, or scores."""
        return self._more is not None

    def __len__(self) -> int:
        return len(self._columns[0])

    def texts(self, *fields: str) -> Iterator[tuple[str, ...]]:
        """These fields of all rows in turn: "" for a field that a row lacks. Fast, and it does not raise:
        rows that cannot be used come, too.

        Args:
          fields: names among FIELDS.

        Returns:
          An iterator of tuples, one for each row.
        """
        columns = [self._columns[FIELDS.index(field)] for field in fields]
        for start in range(0, len(self), _CHUNK):
            parts = [column.slice(start, _CHUNK).fill_null("") for column in columns]
            yield from zip(*map(_strings, parts), strict=True)

    def __getitem__(self, index: int) -> Row:
        """One row.

        Raises:
          RowError: it lacks a field, or has a side without content; the message names file and row.
        """
        name = self.name(index)
        try:
            *values, problem = (column[index].as_py() for column in self._columns)
        except UnicodeDecodeError as error:
            raise RowError(name, f"is not Unicode text: {error}") from error
        if problem is not None:
            raise RowError(name, problem)
        missing = [f for f, v in zip(REQUIRED, values, strict=False) if v is None]
        if missing:
            raise RowError(name, f"missing fields {missing}; a row has {list(REQUIRED)}")
        more = None if self._more is None else self._more[index].as_py()
        row = Row(*(value or "" for value in values), more=more or "")
        if is_empty(row.qry, row.qry_image_path):
            raise RowError(name, "the query has neither text nor an image")
        if is_empty(row.pos_text, row.pos_image_path):
            raise RowError(name, "the target has neither text nor an image")
        return row

    def name(self, index: int) -> str:
        """File and row, for messages.

        Args:
          index: of the row, in the table.

        Returns:
          Such as "rows.json row 7".
        """
        return f"{self.file} row {self.row_numbers[index]}"


def _strings(column: pa.Array) -> list[str]:
    try:
        return column.to_pylist()
    except UnicodeDecodeError:  # an error when the row is read
        texts = column.cast(pa.large_binary()).to_pylist()
        return [text.decode(errors="replace") for text in texts]


def read_table(files: list[Path], max_rows: int | None = None) -> Table:
    """Reads one subset, or its first `max_rows` rows.

    Parquet files are taken as the hub has them: null is an empty string, and rows with an empty side are
    left out. In JSON, which people write, both are errors once the row is read.

    Args:
      files: the parquet files of a split, in order, or one `.json` or `.jsonl` file.
      max_rows: rows to keep; None for all.

    Returns:
      The rows.

    Raises:
      ValueError: a file is not what its name says, or lacks the columns of MMEB-train.
    """
    file = files[0]
    left_out = np.zeros(0, np.int64)
    if file.suffix == ".parquet":
        table = _read_parquet(files, max_rows)
        left_out = _empty_rows(table)
        label = str(file) if len(files) == 1 else f"{file.parent}/{file.name.split('-')[0]}-*"
    else:
        records = _json_records(file)
        kept = [r for r, _ in zip(records, range(max_rows or 2**62), strict=False)]
        table = pa.Table.from_pylist(list(map(row_forms.read_record, kept)), schema=_SCHEMA)
        label = str(file)
    row_numbers = np.delete(np.arange(len(table)), left_out)
    if len(left_out):
        table = table.take(row_numbers)
    batches = table.combine_chunks().to_batches()
    batch = batches[0] if batches else pa.RecordBatch.from_pylist([], schema=_SCHEMA)
    return Table(batch, label, row_numbers, tuple(left_out.tolist()))


def _empty_rows(table: pa.Table) -> np.ndarray:
    """Numbers of the rows with an empty side."""
    empty = []
    for text_field, path_field in (("qry", "qry_image_path"), ("pos_text", "pos_image_path")):
        # Few rows have neither a path nor visible ASCII in their text, and only for those Python decides,
        # which is slow. Bytes are matched, since the texts need not be UTF-8.
        text, path = table[text_field], table[path_field]
        visible = compute.match_substring_regex(text.cast(pa.large_binary()), "[!-~]")
        candidates = compute.and_(compute.equal(path, ""), compute.invert(visible))
        candidates = compute.fill_null(candidates, False)  # a row with a problem has no fields
        for number in np.flatnonzero(candidates.to_numpy()).tolist():
            try:
                if is_empty(text[number].as_py()):
                    empty.append(number)
            except UnicodeDecodeError:  # raised again once the row is read
                continue
    return np.unique(np.array(empty, np.int64))


def _read_parquet(files: list[Path], max_rows: int | None) -> pa.Table:
    parts, remaining = [], max_rows
    for file in files:
        try:
            parquet = pyarrow.parquet.ParquetFile(file)
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not a readable parquet file: {error}") from error
        names = parquet.schema_arrow.names
        columns = row_forms.columns_to_read(names)
        if columns is None:
            missing = [field for field in REQUIRED if field not in names]
            raise ValueError(
                f"{file}: lacks columns {missing}; found {names}, expected {list(REQUIRED)} and optionally "
                f"{list(OPTIONAL)}; or, for rows of texts, {row_forms.NAMES_OF_TEXTS}"
            )
        try:
            part = parquet.read(columns=columns).slice(0, remaining)
            if set(columns) <= set(FIELDS) and not any(map(_is_list, part.schema.types)):
                part = _scalar_rows(part)
            else:
                part = _rows_of_lists(part)
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{file}: cannot be read as text columns: {error}") from error
        parts.append(part)
        if remaining is not None:
            remaining -= len(part)
            if remaining <= 0:
                break
    return pa.concat_tables(parts)


def _is_list(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.ListType | pa.LargeListType | pa.FixedSizeListType)


def _scalar_rows(part: pa.Table) -> pa.Table:
    """Rows of one target and at most one hard negative, in the columns of `_SCHEMA`."""
    fields = {
        name: compute.fill_null(part[name].cast(pa.large_string()), "")
        for name in part.column_names
    }
    for field in (*OPTIONAL, "more", "problem"):
        fields.setdefault(field, pa.nulls(len(part), pa.large_string()))
    return pa.table(fields).select(_SCHEMA.names)


def _rows_of_lists(part: pa.Table) -> pa.Table:
    """Rows of lists, of scores, or of other names, in the columns of `_SCHEMA`."""
    scalar = [field.name for field in part.schema if not _is_list(field.type)]
    scalar = [name for name in scalar if name not in row_forms.SCORES]
    for name in scalar:
        number = part.column_names.index(name)
        part = part.set_column(number, name, part[name].cast(pa.large_string()))
    batches = [
        pa.RecordBatch.from_pylist(
            [row_forms.read_record(record, null_is_empty=True) for record in _records(batch)],
            schema=_SCHEMA,
        )
        for batch in part.to_batches(_CHUNK)
    ]
    return pa.Table.from_batches(batches, schema=_SCHEMA)


def _records(batch: pa.RecordBatch) -> list[Any]:
    """The rows as dicts; what is not Unicode text becomes an error that says so."""
    try:
        return batch.to_pylist()
    except UnicodeDecodeError as error:
        if len(batch) == 1:
            return [error]
        return list(
            itertools.chain.from_iterable(_records(batch.slice(n, 1)) for n in range(len(batch)))
        )


def _json_records(file: Path) -> Iterator[Any]:
    """The records of a JSON list, or of a file with one JSON object a line."""
    try:
        if file.suffix == ".jsonl":
            with file.open("rb") as lines:
                for number, line in json_lines(lines):
                    if line is None:
                        raise ValueError(f"{file} line {number}: {LINE_TOO_LONG}")
                    yield _parse(line.decode("utf-8"), f"{file} line {number}")
            return
        records = _parse(file.read_text(encoding="utf-8"), str(file))
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text: {error}") from error
    if not isinstance(records, list):
        raise ValueError(
            f"{file}: expected a list of objects with {list(REQUIRED)}, "
            f"found {type(records).__name__}; one object a line goes into a .jsonl file"
        )
    yield from records


def _parse(text: str, where: str) -> Any:
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{where}: not JSON: {error}") from error
