"""`Index`: embedded items in a LanceDB table on disk, to be searched by vectors.

Every change is one commit of the table: a process that is killed leaves the commits before. Owns the table,
its settings and how it is searched. How good approximate search is,
`recall.py` measures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.common import extras
from llave_jax.common.files import naming_full_disk
from llave_jax.common.locks import only_writer
from llave_jax.search import recall
from llave_jax.search.columns import (
    OWN,
    VECTOR_TYPES,
    Hit,
    Row,
    make_schema,
    metadata_fields,
    metadata_types,
    rows_table,
    vectors_of,
)
from llave_jax.search.id_set import IdSet

TABLE = "items"
KINDS = ("text", "image", "video", "mixed")
# The largest table that is searched exactly, in numbers of its vectors: 256 MiB of float32, of which two
# cores compare 1.3 GB a second.
EXACT_NUMBERS = 64 << 20
# Candidates that are compared with the vectors as they are kept, for each result that is asked for.
REFINE = 5
# The approximate index is trained anew when it lacks more than this many numbers and this share of all vectors.
# Until then what it lacks is searched exactly.
_UNTRAINED_NUMBERS = EXACT_NUMBERS // 4
_UNTRAINED_SHARE = 1 / 20
# Fragments are merged if there are more than so many with fewer rows than that on average. Merging rewrites the
# table, which is not worth it for the fragments of a large job.
_MAX_FRAGMENTS = 64
_FRAGMENT_ROWS = 512
# Older versions are removed, also those that a search is reading: it begins again (`_fetch`).
_KEPT = datetime.timedelta(seconds=5)
_NOTE = "llave_jax"
_FORMAT = 1
_SOURCE_POSITION = re.compile(r",? *[\w./-]*/[\w./-]+\.rs:\d+(:\d+)?")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What an index was made with; kept in its table.

    Attributes:
      dimension: numbers of an embedding that are kept: the first ones.
      search_dimension: numbers that are searched. If these are fewer, results are compared once more by all
        that are kept.
      precision: of the vectors on disk, "float32" or "float16".
      thumbnails: items have thumbnails.
      model: which model made the vectors: at least `fingerprint` and `dimension` (of the model).
      ann: the approximate index: what `recall.measure` found, at how many `items`;
        None while the search is exact.
    """

    dimension: int
    search_dimension: int
    precision: str
    thumbnails: bool
    model: Mapping[str, Any]
    ann: Mapping[str, Any] | None = None


class Index:
    """Items with their vectors on disk. Made by `Index.create` or `Index.open`; use as a context manager.

    Searching is safe from several threads, and while another process writes: a search sees whole commits, at
    most a second old.

    >>> with Index.open("photos.lance") as index:                        # doctest: +SKIP
    ...     hits = index.search(vector, 10, where="kind = 'image'")

    Attributes:
      path: its directory, which is a LanceDB database with the table `items`.
    """

    path: Path

    def __init__(self, path: Path, table: Any, closing: contextlib.ExitStack, writable: bool):
        self.path = path
        self._table = table
        self._closing = closing
        self._writable = writable
        # Of a writer, which is the only one: questions for new ids are answered without the table.
        self._ids: IdSet | None = None

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        dimension: int,
        *,
        model: Mapping[str, Any],
        truncate_dim: int | None = None,
        search_dim: int | None = None,
        precision: str = "float32",
        thumbnails: bool = True,
    ) -> Index:
        """Make an empty index, open for writing.

        Args:
          path: its directory: absent, empty, or left by a process that was killed while it made one.
          dimension: D of the model.
          model: which model makes the vectors, for `Settings`.
          truncate_dim: keep the first numbers of each vector only; None: all.
          search_dim: search by the first numbers of each vector only, and compare what is found once more by
            all that are kept; None: by all.
          precision: of the vectors on disk.
          thumbnails: items have thumbnails.

        Returns:
          The index.

        Raises:
          MissingPackage: LanceDB is not installed.
          ValueError: there is an index or something else already, or a setting has no sense.
          OutputInUse: another process makes it.
        """
        lancedb = _lancedb()
        path = Path(path).absolute()
        kept = _fraction("truncate_dim", truncate_dim, dimension)
        searched = _fraction("search_dim", search_dim, kept)
        if precision not in VECTOR_TYPES:
            raise ValueError(f"precision {precision}: expected one of {', '.join(VECTOR_TYPES)}")
        settings = Settings(
            kept, searched, precision, thumbnails, {**model, "dimension": dimension}
        )
        with contextlib.ExitStack() as closing:
            _check_room(path)
            closing.enter_context(only_writer(path))
            _check_room(path)
            with _library_errors(path):
                database = lancedb.connect(path)
                schema = make_schema(kept, searched, precision, {_NOTE: _dump(settings)})
                table = database.create_table(TABLE, schema=schema)
            return cls(path, table, closing.pop_all(), writable=True)

    @classmethod
    def open(cls, path: str | os.PathLike, *, write: bool = False) -> Index:
        """Open an index.

        Args:
          path: its directory.
          write: to change it; only one process at a time may.

        Returns:
          The index.

        Raises:
          MissingPackage: LanceDB is not installed.
          ValueError: there is no index, or one of another form.
          OutputInUse: another process writes to it.
        """
        lancedb = _lancedb()
        path = Path(path).absolute()
        if not is_index(path):
            raise ValueError(f"{path}: is no index; make one: python -m llave_jax.index build")
        with contextlib.ExitStack() as closing:
            fresh = datetime.timedelta(seconds=1)
            if write:
                closing.enter_context(only_writer(path, flag="--index"))
                fresh = datetime.timedelta(0)
            with _library_errors(path):
                database = lancedb.connect(path, read_consistency_interval=fresh)
                index = cls(path, database.open_table(TABLE), closing, write)
                index.settings  # noqa: B018  raises for another form
            index._closing = closing.pop_all()
            return index

    @property
    def settings(self) -> Settings:
        """What the index was made with."""
        schema = self._schema()
        try:
            note = json.loads((schema.field("id").metadata or {})[_NOTE.encode()])
            if note.pop("format") != _FORMAT:
                raise ValueError("another version made it")
            return Settings(**note)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{self.path}: is a LanceDB table that this version cannot read as an index ({error})"
            ) from error

    def __enter__(self) -> Index:
        return self

    def __exit__(self, *exc) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes write to the index."""
        self._closing.close()

    def __len__(self) -> int:
        with _library_errors(self.path):
            return self._table.count_rows()

    def _schema(self) -> Any:
        with _library_errors(self.path):
            return self._table.schema

    def _check_writable(self) -> None:
        if not self._writable:
            raise ValueError(f"{self.path}: is open for reading; Index.open(..., write=True)")

    # Changes

    def present(self, ids: Sequence[str]) -> dict[str, tuple[bytes, bytes]]:
        """Which of some items are in the index.

        Args:
          ids: of the items.

        Returns:
          Digest and stamp of those that are, by id.
        """
        if self._writable:
            ids = self._known_ids().among(ids)
        if not len(ids):
            return {}
        with _library_errors(self.path):
            query = self._table.search().where(_among(ids)).select(["id", "digest", "stamp"])
            found = query.limit(len(ids)).to_arrow()
        names, *digests = (found[name].to_pylist() for name in ("id", "digest", "stamp"))
        return dict(zip(names, zip(*digests, strict=True), strict=True))

    def _known_ids(self) -> IdSet:
        if self._ids is None:
            ids = IdSet()
            with _library_errors(self.path):
                for batch in self._table.search().select(["id"]).to_batches():
                    ids.add(batch.column("id").to_pylist())
            self._ids = ids
        return self._ids

    def metadata_failures(self, metadata: Sequence[Mapping[str, Any]]) -> dict[int, str]:
        """Why the metadata of items do not fit the columns of the index.

        Args:
          metadata: of each item.

        Returns:
          The reasons, by the item's place.

        Raises:
          ValueError: a name that no column can have.
        """
        known = {field.name: field.type for field in metadata_fields(self._schema())}
        return metadata_types(known, metadata)[1]

    def add(self, rows: Sequence[Row], vectors: np.ndarray) -> int:
        """Add items. Those with the id of an item that is there replace it. One commit, or none.

        Args:
          rows: n items.
          vectors: float [n, D], of any length but zero; D is the model's.

        Returns:
          How many of them replaced another.

        Raises:
          ValueError: two items with one id, vectors of another shape or without direction, metadata that do
            not fit.
          DiskFull: there is no room.
        """
        self._check_writable()
        settings = self.settings
        vectors = np.asarray(vectors)
        model_dimension = settings.model["dimension"]
        if vectors.shape != (len(rows), model_dimension):
            raise ValueError(
                f"{len(rows)} items with vectors {list(vectors.shape)}; expected "
                f"[{len(rows)}, {model_dimension}]"
            )
        if not len(rows):
            return 0
        ids = [row.id for row in rows]
        if len(set(ids)) < len(ids):
            twice = next(name for name in ids if ids.count(name) > 1)
            raise ValueError(f"the id {twice!r:.80} is there twice; ids are unique")
        full = _unit(vectors[:, : settings.dimension], ids)
        searched = _unit(full[:, : settings.search_dimension], ids)
        number = np.dtype(settings.precision)
        columns = {"vector": searched.astype(number)}
        if settings.search_dimension < settings.dimension:
            columns["full_vector"] = full.astype(number)
        self._fit_columns(rows)
        table = rows_table(rows, self._schema(), columns)
        replaced = len(self.present(ids))
        with _library_errors(self.path):
            if replaced:
                merge = self._table.merge_insert("id").when_matched_update_all()
                merge.when_not_matched_insert_all().execute(table)
            else:
                self._table.add(table)
        self._known_ids().add(ids)
        return replaced

    def renew(self, rows: Sequence[Row]) -> None:
        """Change all of some items but their vectors and thumbnails. One commit.

        Args:
          rows: of items that are in the index.

        Raises:
          ValueError, DiskFull: as for `add`.
        """
        self._check_writable()
        if not len(rows):
            return
        self._fit_columns(rows)
        with _library_errors(self.path):
            merge = self._table.merge_insert("id").when_matched_update_all()
            merge.execute(rows_table(rows, self._schema()))

    def _fit_columns(self, rows: Sequence[Row]) -> None:
        import pyarrow as pa

        known = {field.name: field.type for field in metadata_fields(self._schema())}
        types, failures = metadata_types(known, [row.metadata for row in rows])
        for place, reason in failures.items():
            raise ValueError(f"{rows[place].id}: {reason}")
        new = [pa.field(name, kind) for name, kind in types.items() if name not in known]
        if new:
            with _library_errors(self.path):
                self._table.add_columns(new)

    def delete(self, ids: Sequence[str] = (), *, where: str | None = None) -> int:
        """Remove items. One commit.

        Args:
          ids: of the items; those that are not there are no error.
          where: a filter of LanceDB's language, in place of ids.

        Returns:
          How many were removed.

        Raises:
          ValueError: the filter cannot be read, or neither or both are given.
        """
        self._check_writable()
        if bool(len(ids)) == (where is not None):
            raise ValueError("items are deleted by their ids or by a filter: give one of them")
        with _library_errors(self.path, where):
            return self._table.delete(_among(ids) if where is None else where).num_deleted_rows

    def optimise(
        self, *, approximate: bool | None = None, target: float = 0.98, compact: bool = False
    ) -> Settings:
        """Prepare the index for searching, after items were added or deleted.

        Trains the approximate index, if the table is large enough for one and has none, or one that lacks more
        than a few items; then measures its recall. Merges fragments if there are many small ones.

        Args:
          approximate: have an approximate index; None: above EXACT_NUMBERS.
          target: the recall@10 that is wanted; as few partitions as reach it are probed.
          compact: merge fragments and remove old versions in any case.

        Returns:
          The settings with the new measures.

        Raises:
          DiskFull: there is no room. The index stays as it was.
        """
        self._check_writable()
        settings, rows = self.settings, len(self)
        if approximate is None:
            approximate = rows * settings.search_dimension > EXACT_NUMBERS
        with _library_errors(self.path):
            ann = self._vector_index()
            train = approximate and self._is_outdated(ann, rows)
            if train:
                self._train()
            elif not approximate and ann is not None:
                self._table.drop_index(ann.name)
            if compact or (train and ann is not None) or self._is_scattered(rows):
                # Files without a version were left by a killed process: this is the only writer.
                self._table.optimize(cleanup_older_than=_KEPT, delete_unverified=True)
        if not approximate:
            return self._keep(dataclasses.replace(settings, ann=None))
        measured = settings.ann
        if train or compact or measured is None or measured["target"] != target:
            measured = {"type": "IVF_SQ", "items": rows, **recall.measure(self, target)}
        return self._keep(dataclasses.replace(settings, ann=measured))

    def _is_outdated(self, ann: Any, rows: int) -> bool:
        if ann is None:
            return True
        new = self._table.index_stats(ann.name).num_unindexed_rows
        numbers = new * self.settings.search_dimension
        return numbers > _UNTRAINED_NUMBERS and new > _UNTRAINED_SHARE * rows

    def _is_scattered(self, rows: int) -> bool:
        fragments = self._table.stats()["fragment_stats"]["num_fragments"]
        return fragments > _MAX_FRAGMENTS and rows < _FRAGMENT_ROWS * fragments

    def _train(self) -> None:
        from lancedb.index import BTree, IvfSq  # pyright: ignore[reportMissingImports]

        self._table.create_index("vector", config=IvfSq(distance_type="cosine"))
        # Finds items by their id, in place of a scan.
        self._table.create_index("id", config=BTree())

    def _vector_index(self) -> Any:
        for index in self._table.list_indices():
            if "vector" in index.columns:
                return index
        return None

    def _keep(self, settings: Settings) -> Settings:
        if settings != self.settings:
            with _library_errors(self.path):
                self._table.update_field_metadata(
                    {"path": "id", "metadata": {_NOTE: _dump(settings)}}
                )
        return settings

    # Searching

    def search(
        self,
        vector: np.ndarray,
        k: int = 10,
        *,
        where: str | None = None,
        exact: bool = False,
        probes: int | None = None,
    ) -> list[Hit]:
        """The items most similar to a vector, best first.

        Args:
          vector: float [D], D of the model.
          k: how many are wanted.
          where: a filter of LanceDB's language over the columns; only items that pass are searched.
          exact: compare with every vector, also where there is an approximate index.
          probes: partitions of the approximate index that are looked at; None: as many as reached the recall
            that was wanted.

        Returns:
          At most k items. Approximate search can find fewer where a filter leaves few.

        Raises:
          ValueError: a vector of another shape or without direction, or a filter that cannot be read.
        """
        if k < 1:
            raise ValueError(f"search for {k} items; expected at least 1")
        settings = self.settings
        vector = np.asarray(vector)
        if vector.shape != (settings.model["dimension"],):
            raise ValueError(
                f"a vector {list(vector.shape)}; expected [{settings.model['dimension']}], of the model that "
                "made the index"
            )
        query = _unit(vector[None, : settings.dimension], ["the query"])
        schema = self._schema()
        two_steps = settings.search_dimension < settings.dimension
        rescore = two_steps and not exact
        column = "full_vector" if two_steps and exact else "vector"
        names = ["id", "kind", "text", "path", *(f.name for f in metadata_fields(schema))]
        part = query if column == "full_vector" else query[:, : settings.search_dimension]
        with _library_errors(self.path, where):
            search = self._table.search(
                part[0].astype(settings.precision), vector_column_name=column
            )
            search = search.distance_type("cosine").limit(k * REFINE if rescore else k)
            search = search.select([*names, "_distance", *(["full_vector"] if rescore else [])])
            if where is not None:
                search = search.where(where, prefilter=True)
            if probes is None and settings.ann is not None:
                probes = settings.ann["probes"]
            if exact or probes is None:
                search = search.bypass_vector_index()
            else:
                search = search.nprobes(probes).refine_factor(REFINE)
            found = self._fetch(search)
        if rescore:
            scores = vectors_of(found["full_vector"]) @ query[0] if len(found) else np.zeros(0)
        else:
            scores = 1 - found["_distance"].to_numpy()
        best = np.argsort(-scores, kind="stable")[:k]
        return _hits(found.select(names).take(best), scores[best])

    def _fetch(self, query: Any) -> Any:
        """Runs a query, again if its version of the table was removed meanwhile."""
        version = self._table.version
        try:
            return query.to_arrow()
        except Exception:
            self._table.checkout_latest()
            if self._table.version == version:
                raise
            return query.to_arrow()

    def vector(self, id: str) -> np.ndarray:
        """The vector of an item, to search for more like it.

        Args:
          id: of the item.

        Returns:
          float32 [D], normalised; zeros for numbers that the index does not keep.

        Raises:
          KeyError: there is no such item.
        """
        settings = self.settings
        name = "full_vector" if settings.search_dimension < settings.dimension else "vector"
        kept = vectors_of(self._column(id, name))[0]
        vector = np.zeros(settings.model["dimension"], np.float32)
        vector[: len(kept)] = kept
        return vector

    def thumbnail(self, id: str) -> bytes | None:
        """The thumbnail of an item.

        Args:
          id: of the item.

        Returns:
          A JPEG file; None if it has none.

        Raises:
          KeyError: there is no such item.
        """
        return self._column(id, "thumbnail")[0].as_py()

    def _column(self, id: str, name: str) -> Any:
        with _library_errors(self.path):
            query = self._table.search().where(_among([id])).select([name]).limit(1)
            found = self._fetch(query)
        if not len(found):
            raise KeyError(id)
        return found[name]

    def sample(self, count: int, seed: int = 0) -> tuple[list[str], np.ndarray]:
        """Some items at random, the same ones for the same table.

        Args:
          count: how many, at most.
          seed: of the choice.

        Returns:
          ids, and vectors float32 [count, D], zeros for numbers that the index does not keep.
        """
        settings = self.settings
        name = "full_vector" if settings.search_dimension < settings.dimension else "vector"
        found = self._take(count, seed, ["id", name])
        vectors = np.zeros((len(found), settings.model["dimension"]), np.float32)
        vectors[:, : settings.dimension] = vectors_of(found[name])
        return found["id"].to_pylist(), vectors

    def examples(self, count: int, seed: int = 0) -> list[Hit]:
        """Some items at random, the same ones for the same table, to be shown before anything is searched.

        Args:
          count: how many, at most.
          seed: of the choice.

        Returns:
          The items, with a score of 0.
        """
        names = ["id", "kind", "text", "path", *self.columns]
        found = self._take(count, seed, names)
        return _hits(found, np.zeros(len(found)))

    def values(self, count: int = 2000, most: int = 20) -> dict[str, list[Any]]:
        """Values of the metadata columns that have few, as `count` items at random show them.

        Args:
          count: how many items are looked at.
          most: values of a column; one with more is left out.

        Returns:
          Sorted values by column, None not among them. Of a column of lists: what is in the lists. Columns
          of fractions are left out.
        """
        import pyarrow as pa

        few = {}
        found = self._take(count, 0, list(self.columns))
        for name, column in zip(found.column_names, found.columns, strict=True):
            if pa.types.is_floating(column.type):
                continue
            if pa.types.is_list(column.type):
                column = column.combine_chunks().flatten()
            values = set(column.unique().to_pylist()) - {None}
            if len(values) <= most:
                few[name] = sorted(values)
        return few

    def _take(self, count: int, seed: int, names: list[str]) -> Any:
        """The columns `names` of up to `count` items at random, as a table."""
        rows = len(self)
        if not rows or not names:
            return self._schema().empty_table().select(names)
        places = np.random.default_rng(seed).choice(rows, min(count, rows), replace=False)
        with _library_errors(self.path):
            return self._table.take_offsets(sorted(places.tolist())).select(names).to_arrow()

    def vector_batches(self) -> Iterator[np.ndarray]:
        """All vectors as they are kept, in parts.

        Yields:
          float32 [n, dimension] of `settings`.
        """
        settings = self.settings
        name = "full_vector" if settings.search_dimension < settings.dimension else "vector"
        with _library_errors(self.path):
            for batch in self._table.search().select([name]).to_batches():
                yield vectors_of(batch.column(name))

    @property
    def columns(self) -> dict[str, str]:
        """The metadata columns that filters may name: Arrow types by name."""
        return {field.name: str(field.type) for field in metadata_fields(self._schema())}

    def info(self) -> dict[str, Any]:
        """What the index is.

        Returns:
          Plain values, for JSON.
        """
        settings = self.settings
        with _library_errors(self.path):
            stats = self._table.stats()
            kinds = {kind: self._table.count_rows(f"kind = '{kind}'") for kind in KINDS}
            ann = self._vector_index()
            unindexed = 0
            if ann is not None:
                unindexed = self._table.index_stats(ann.name).num_unindexed_rows
            version = self._table.version
        size = sum(file.stat().st_size for file in self.path.rglob("*") if file.is_file())
        return {
            "path": str(self.path),
            "items": stats["num_rows"],
            "kinds": {kind: count for kind, count in kinds.items() if count},
            **dataclasses.asdict(settings),
            "not_in_ann": unindexed,
            "columns": self.columns,
            "fragments": stats["fragment_stats"]["num_fragments"],
            "version": version,
            "bytes": size,
        }


def is_index(path: str | os.PathLike) -> bool:
    """Whether a directory holds an index that was made whole.

    Args:
      path: the directory.

    Returns:
      True if it can be opened, as far as its names say.
    """
    versions = Path(path) / f"{TABLE}.lance" / "_versions"
    return versions.is_dir() and any(versions.glob("*.manifest"))


def _check_room(path: Path) -> None:
    if is_index(path):
        raise ValueError(f"{path}: is an index already; open it, or use another directory")
    if path.exists() and (
        not path.is_dir() or {entry.name for entry in path.iterdir()} - {f"{TABLE}.lance", ".lock"}
    ):
        raise ValueError(f"{path}: is there and is no index; use another --output")


def _fraction(name: str, value: int | None, whole: int) -> int:
    if value is None:
        return whole
    if not 1 <= value <= whole:
        raise ValueError(f"{name} {value}: expected a number from 1 to {whole}")
    return value


def _unit(vectors: np.ndarray, ids: Sequence[str]) -> np.ndarray:
    """Vectors divided by their lengths, in float32."""
    vectors = vectors.astype(np.float32)
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    fine = np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)
    if not fine.all():
        raise ValueError(
            f"{ids[int(np.argmin(fine))]}: its vector is zero or not finite, so that it has no direction"
        )
    return vectors / lengths


def _among(ids: Sequence[str]) -> str:
    return "id IN ({})".format(", ".join("'{}'".format(id.replace("'", "''")) for id in ids))


def _hits(found: Any, scores: np.ndarray) -> list[Hit]:
    hits = []
    for values, score in zip(found.to_pylist(), scores.tolist(), strict=True):
        own = {name: values.pop(name) for name in OWN if name in values}
        metadata = {name: value for name, value in values.items() if value is not None}
        hits.append(Hit(score=score, metadata=metadata, **own))
    return hits


def _dump(settings: Settings) -> str:
    return json.dumps({"format": _FORMAT, **dataclasses.asdict(settings)}, ensure_ascii=False)


def _lancedb() -> Any:
    extras.require("lancedb", "indices")
    # Otherwise it warns each time that a later version will do the same.
    os.environ.setdefault("LANCE_INCLUDE_VECTOR_CENTROIDS", "false")
    import lancedb  # pyright: ignore[reportMissingImports]

    return lancedb


@contextlib.contextmanager
def _library_errors(path: Path, where: str | None = None) -> Iterator[None]:
    """Turns LanceDB's errors into one line that names the index, and the filter if there is one."""
    try:
        with naming_full_disk(path):
            yield
    except Exception as error:
        # A damaged file can make the library panic.
        if type(error) not in (ValueError, RuntimeError) and type(error).__name__ != "RustPanic":
            raise
        text = _SOURCE_POSITION.sub("", str(error)).replace("Invalid input, ", "")
        text = text.strip().partition("\n")[0]
        if where is not None and isinstance(error, ValueError):
            raise ValueError(f"the filter {where!r:.200} cannot be used: {text}") from error
        raise ValueError(f"{path}: {text}") from error
