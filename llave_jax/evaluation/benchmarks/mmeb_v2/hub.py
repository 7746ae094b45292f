"""Tables of datasets from the hub, as they lie on disk: cloned repositories, the hub's cache, `save_to_disk` folders.

Owns finding a table's files below a data root, and reading rows from them. Nothing is fetched, and no table is held
in memory whole: a column of pictures is read a few rows at a time.
"""

from __future__ import annotations

import abc
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet
import yaml

from llave_jax.common.json_text import LINE_TOO_LONG, json_lines, parse_json, read_json_file
from llave_jax.common.paths import OutsideRoot, below

# The first kind that a folder has is read.
_SUFFIXES = (".parquet", ".jsonl", ".json")
# Files beside the data that are no data.
_FACTS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
# Rows that become Python values at a time.
_ROWS = 256
# Rows of pictures that are in memory at a time.
_BATCH = 8
_MAX_README = 1 << 20
# A clone without LFS has these in the place of files.
_POINTER = b"version https://git-lfs"


class Table(abc.ABC):
    """Rows of a dataset's split. Not for several threads.

    Attributes:
      source: the folder or file.
      columns: their names.
    """

    source: Path
    columns: tuple[str, ...]

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def _read(self, columns: list[str], first: int | None) -> Iterator[dict[str, Any]]: ...

    @abc.abstractmethod
    def _cell(self, row: int, column: str) -> Any: ...

    def rows(self, *columns: str, first: int | None = None) -> list[dict[str, Any]]:
        """Rows with some of their columns, which must be small enough for all rows to be in memory.

        Args:
          columns: their names.
          first: only so many rows; None: all.

        Returns:
          For each row a dict.

        Raises:
          ValueError: a column is absent, or the file is damaged; it names file and column.
        """
        self.require(*columns)
        return list(self._read(list(columns), first))

    def cell(self, row: int, column: str) -> Any:
        """One value. Rows in increasing order are read fastest.

        Args:
          row: from 0.
          column: its name.

        Returns:
          The value.

        Raises:
          ValueError: as for `rows`.
        """
        self.require(column)
        return self._cell(row, column)

    def require(self, *columns: str) -> None:
        """Checks that columns are there.

        Args:
          columns: their names.

        Raises:
          ValueError: one is not; it names the file and those that are.
        """
        for column in columns:
            if column not in self.columns:
                raise ValueError(
                    f"{self.source}: has no column {column!r}; found {', '.join(self.columns)}"
                )

    def where(self, row: int) -> str:
        """File and row, for errors.

        Args:
          row: from 0.
        """
        return f"{self.source}: row {row}"


class _Parquet(Table):
    """Parquet files, one after the other."""

    def __init__(self, source: Path, paths: Sequence[Path]):
        self.source = source
        self._paths = list(paths)
        # Row groups of all files: (file, row group), and the first row of each.
        self._groups: list[tuple[int, int]] = []
        counts = []
        for number, path in enumerate(self._paths):
            metadata = self._open(number).metadata
            names = tuple(metadata.schema.to_arrow_schema().names)
            if number == 0:
                self.columns = names
            elif set(names) != set(self.columns):
                raise ValueError(
                    f"{path}: has columns {names}; expected {self.columns}, as {self._paths[0]} has"
                )
            for group in range(metadata.num_row_groups):
                self._groups.append((number, group))
                counts.append(metadata.row_group(group).num_rows)
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        # Of each column: row group, batches that follow, first row of the batch, its values.
        self._cursors: dict[str, tuple[int, Iterator[pa.RecordBatch], int, pa.Array]] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def _open(self, number: int) -> pyarrow.parquet.ParquetFile:
        path = self._paths[number]
        try:
            # With a buffer a column is read piece by piece, not a whole row group at once.
            return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, "a parquet file", error) from error

    def _read(self, columns: list[str], first: int | None) -> Iterator[dict[str, Any]]:
        left = len(self) if first is None else first
        for number, path in enumerate(self._paths):
            if left <= 0:
                return
            try:
                size = min(_ROWS, left)
                for batch in self._open(number).iter_batches(size, columns=columns):
                    yield from batch.slice(0, left).to_pylist()
                    left -= batch.num_rows
                    if left <= 0:
                        return
            except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
                raise _unreadable(path, "a parquet file", error) from error

    def _cell(self, row: int, column: str) -> Any:
        row = range(len(self))[row]
        index = int(np.searchsorted(self._starts, row, "right")) - 1
        number, group = self._groups[index]
        try:
            found = self._cursors.get(column)
            if found is None or found[0] != index or row < found[2]:
                batches = self._open(number).iter_batches(
                    _BATCH, row_groups=[group], columns=[column]
                )
                found = (index, batches, int(self._starts[index]), next(batches).column(0))
            _, batches, start, values = found
            while row >= start + len(values):
                start += len(values)
                values = next(batches).column(0)
            self._cursors[column] = (index, batches, start, values)
            return values[row - start].as_py()
        except (pa.ArrowException, OSError, UnicodeDecodeError, StopIteration) as error:
            raise _unreadable(self._paths[number], "a parquet file", error) from error


class _Arrow(Table):
    """Arrow streams of `save_to_disk`. They are mapped into memory, so that a value costs what it is."""

    def __init__(self, source: Path, paths: Sequence[Path]):
        self.source = source
        self._path = paths[0]
        parts = []
        for path in paths:
            try:
                parts.append(pa.ipc.open_stream(pa.memory_map(str(path))).read_all())
            except (pa.ArrowException, OSError) as error:
                raise _unreadable(path, "an Arrow stream", error) from error
        try:
            self._table = pa.concat_tables(parts)
        except pa.ArrowException as error:
            raise ValueError(f"{source}: its files differ in their columns: {error}") from error
        self.columns = tuple(self._table.column_names)

    def __len__(self) -> int:
        return self._table.num_rows

    def _read(self, columns: list[str], first: int | None) -> Iterator[dict[str, Any]]:
        table = self._table.select(columns)
        for batch in (table if first is None else table.slice(0, first)).to_batches(_ROWS):
            try:
                yield from batch.to_pylist()
            except UnicodeDecodeError as error:
                raise _unreadable(self._path, "an Arrow stream of text", error) from error

    def _cell(self, row: int, column: str) -> Any:
        return self._table.column(column)[range(len(self))[row]].as_py()


class _Json(Table):
    """JSON lines, or a JSON list of objects. Held in memory: no dataset has pictures in it."""

    def __init__(self, source: Path, paths: Sequence[Path]):
        self.source = source
        self._rows = [row for path in paths for row in _json_rows(path)]
        self.columns = tuple(dict.fromkeys(key for row in self._rows for key in row))

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, columns: list[str], first: int | None) -> Iterator[dict[str, Any]]:
        for row in self._rows[:first]:
            yield {column: row.get(column) for column in columns}

    def _cell(self, row: int, column: str) -> Any:
        return self._rows[row].get(column)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(_POINTER):
        raise _unreadable(path, "JSON", ValueError("not JSON"))
    if head.lstrip().startswith(b"["):
        for number, row in enumerate(read_json_file(path, list)):
            if not isinstance(row, dict):
                raise ValueError(f"{path}: row {number}: expected an object, found {row!r:.100}")
            yield row
        return
    with path.open("rb") as file:
        for number, line in json_lines(file):
            try:
                row = None if line is None else parse_json(line)
            except ValueError as error:
                raise ValueError(f"{path}: line {number}: not a JSON object: {error}") from error
            if not isinstance(row, dict):
                found = LINE_TOO_LONG if line is None else f"expected an object, found {row!r:.100}"
                raise ValueError(f"{path}: line {number}: {found}")
            yield row


def _unreadable(path: Path, kind: str, error: Exception) -> ValueError:
    try:
        with path.open("rb") as file:
            if file.read(len(_POINTER)) == _POINTER:
                return ValueError(
                    f"{path}: is a pointer of Git LFS, not the file; run `git lfs pull` in its repository"
                )
    except OSError:
        pass
    return ValueError(f"{path}: not {kind} that can be read: {error or type(error).__name__}")


class HubData:
    """What lies below a data root of repositories of the hub.

    A repository OWNER/NAME is looked for as `OWNER/NAME`, `NAME`, `annotation/OWNER/NAME` and in the hub cache's form
    `datasets--OWNER--NAME/snapshots/HASH` (also below `hub/`), in this order, and then where the caller says.

    Args:
      root: of the data.

    Raises:
      FileNotFoundError: there is no such folder.
    """

    def __init__(self, root: str | os.PathLike):
        self.root = Path(root)
        if not self.root.is_dir():
            raise FileNotFoundError(f"benchmark directory {self.root} does not exist")

    def find(
        self, repository: str, config: str | None, split: str, local: Iterable[str] = ()
    ) -> list[Path] | None:
        """The files of a table.

        Args:
          repository: OWNER/NAME.
          config: of the dataset; None: its only one.
          split: of the dataset.
          local: folders or files below the root to look at besides.

        Returns:
          Files in the order of their rows; None if they are not there.

        Raises:
          ValueError: a folder of `save_to_disk` is damaged.
        """
        for place in self.places(repository, local):
            if place.is_file():
                return [place]
            if place.is_dir() and (found := _find_in(place, config, split)):
                return found
        return None

    def table(
        self, repository: str, config: str | None, split: str, local: Iterable[str] = ()
    ) -> Table:
        """A table's rows.

        Args:
          repository, config, split, local: as for `find`.

        Returns:
          The table.

        Raises:
          FileNotFoundError: it is not there; the message has the command that fetches it.
          ValueError: a file is damaged; it names the file.
        """
        paths = self.find(repository, config, split, local)
        if paths is None:
            what = f" (config {config})" if config else ""
            places = ", ".join(str(place) for place in self.places(repository, local))
            raise FileNotFoundError(
                f"dataset {repository}{what}, split {split}: not found; looked at {places}. Fetch it with "
                f"`{self.command(repository)}`"
            )
        source = paths[0] if len(paths) == 1 else paths[0].parent
        reader = {".parquet": _Parquet, ".arrow": _Arrow}.get(paths[0].suffix, _Json)
        return reader(source, paths)

    def command(self, repository: str, *files: str) -> str:
        """The command that fetches a dataset to where it is looked for.

        Args:
          repository: OWNER/NAME.
          files: patterns of those that are needed; none: all.

        Returns:
          A line for a shell.
        """
        words = ["hf", "download", repository, "--repo-type", "dataset"]
        for pattern in files:
            words += ["--include", pattern]
        folder = self.root if files else self.root / repository
        return shlex.join([*words, "--local-dir", str(folder)])

    def places(self, repository: str, local: Iterable[str] = ()) -> Iterator[Path]:
        """Where a repository may lie, whether or not it does.

        Args:
          repository: OWNER/NAME.
          local: folders or files below the root to look at besides.

        Yields:
          Folders or files.
        """
        owner, _, name = repository.partition("/")
        yield self.root / owner / name
        yield self.root / name
        yield self.root / "annotation" / owner / name
        for cache in (self.root, self.root / "hub"):
            repository_folder = cache / f"datasets--{owner}--{name}"
            if repository_folder.is_dir():
                yield from _snapshots(repository_folder)
        for path in local:
            yield self.root / path


def _snapshots(folder: Path) -> list[Path]:
    """Of a repository in the hub's cache: that of the branch main first, then the newest."""
    snapshots = sorted(
        (folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime, reverse=True
    )
    main = folder / "refs" / "main"
    if main.is_file():
        commit = main.read_text().strip()
        snapshots.sort(key=lambda path: path.name != commit)
    return snapshots


def _find_in(folder: Path, config: str | None, split: str) -> list[Path] | None:
    """The files of a table in the folder of a dataset."""
    if found := _saved(folder, config, split):
        return found
    if found := _declared(folder, config, split):
        return found
    if config is None:
        places = [folder / "data", folder, folder / "default"]
    else:
        places = [folder / config, folder / "data" / config]
    for place in places:
        if place.is_dir() and (found := _by_name(place, split, lone=config is not None)):
            return found
    if config is not None:
        for place in (folder, folder / "data", folder / "json"):
            for suffix in _SUFFIXES:
                if (place / f"{config}{suffix}").is_file():
                    return [place / f"{config}{suffix}"]
    return None


def _saved(folder: Path, config: str | None, split: str) -> list[Path] | None:
    """The files of `save_to_disk`: of a dataset, or of a dict of splits."""
    base = folder if config is None else folder / config
    for place in (base / split, base):
        state = place / "state.json"
        if not state.is_file():
            continue
        try:
            files = [entry["filename"] for entry in parse_json(state.read_bytes())["_data_files"]]
            paths = [below(place, name) for name in files]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{state}: expected the state of a saved dataset, with _data_files; found {error}"
            ) from error
        missing = [path for path in paths if not path.is_file()]
        if missing or not paths:
            raise ValueError(
                f"{state}: names {missing[0] if missing else 'no file'}"
                f"{', which does not exist' if missing else ''}; save the dataset again"
            )
        return paths
    return None


def _declared(folder: Path, config: str | None, split: str) -> list[Path] | None:
    """The files that the head of a repository's README.md declares for a config, as the hub reads it."""
    readme = folder / "README.md"
    if not readme.is_file():
        return None
    with readme.open(encoding="utf-8", errors="replace") as file:
        text = file.read(_MAX_README)
    head = re.match(r"\s*---\n(.*?)\n---", text, re.DOTALL)
    try:
        facts = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return None
    configs = facts.get("configs") if isinstance(facts, dict) else None
    configs = [entry for entry in configs or () if isinstance(entry, dict)]
    wanted = config or "default"
    chosen = [entry for entry in configs if entry.get("config_name", "default") == wanted]
    if not chosen and config is None and len(configs) == 1:
        chosen = configs
    for entry in chosen:
        patterns = list(_patterns(entry.get("data_files"), split))
        data = str(entry.get("data_dir") or "")
        found = [path for pattern in patterns for path in _glob(folder, data, pattern)]
        if found:
            return found
    return None


def _patterns(declared: Any, split: str) -> Iterator[str]:
    """Patterns of a split among the `data_files` of a config: one, a list, or by split."""
    if isinstance(declared, dict):
        declared = [{"split": name, "path": path} for name, path in declared.items()]
    for entry in declared if isinstance(declared, list) else [declared]:
        if isinstance(entry, str) and split == "train":  # files without a split
            yield entry
        elif isinstance(entry, dict) and entry.get("split") == split:
            paths = entry.get("path")
            yield from (str(path) for path in (paths if isinstance(paths, list) else [paths]))


def _glob(folder: Path, data: str, pattern: str) -> list[Path]:
    try:
        below(folder, f"{data}/{pattern}" if data else pattern)
        paths = sorted((folder / data).glob(pattern))
    except (OutsideRoot, ValueError, NotImplementedError):
        return []
    return [path for path in paths if path.suffix in _SUFFIXES and path.is_file()]


def _by_name(folder: Path, split: str, *, lone: bool) -> list[Path] | None:
    """Files of a folder whose names have the split's, or that lie in a folder of its name.

    With `lone` the folder is that of one config: if no file names a split, all are of it.
    """
    for suffix in _SUFFIXES:
        files = [
            path
            for path in sorted(folder.iterdir())
            if path.suffix == suffix and path.name not in _FACTS and path.is_file()
        ]
        word = re.compile(rf"(?:^|[^a-zA-Z0-9]){re.escape(split)}(?:[^a-zA-Z0-9]|$)")
        if found := [path for path in files if word.search(path.stem)]:
            return found
        inner = folder / split
        if inner.is_dir() and (found := sorted(inner.glob(f"*{suffix}"))):
            return found
        other = re.compile(r"(?:^|[^a-zA-Z0-9])(?:train|test|validation|val|dev)(?:[^a-zA-Z0-9]|$)")
        if lone and files and not any(other.search(path.stem) for path in files):
            return files
    return None
