"""Training pairs by index: MMEB-train as cloned, JSON files of one's own, prepared array records.

Every source gives the same `Pair`s, with images as their encoded bytes. The order in which pairs are read
is `order.py`. Writing array records is `prepare.py`.
"""

from __future__ import annotations

import abc
import bisect
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from llave_jax.common.json_text import parse_json
from llave_jax.data.image_store import ImageStore
from llave_jax.data.rows import Row, RowError, Table, hash_texts, read_table
from llave_jax.inputs.item import Item, Pair, missing_image

# The training subsets of MMEB (VLM2Vec, arXiv 2410.05160, table 1), in the order of its tables.
# fmt: off
MMEB_TRAIN_SUBSETS = (
    "ImageNet_1K", "HatefulMemes", "SUN397", "N24News", "VOC2007",
    "OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W",
    "VisDial", "CIRR", "NIGHTS", "WebQA", "VisualNews_i2t", "VisualNews_t2i", "MSCOCO_t2i",
    "MSCOCO_i2t", "MSCOCO",
)
# fmt: on
# Arrays of prepared data's `rows-SPLIT.npz` beside row numbers and digests: what `PairSource.contents` and
# `PairSource.queries` return.
INDEX_FACTS = ("content", "image_query", "words")
# Images of a record of prepared data. The last is a list: of the other targets, then of the other hard negatives.
IMAGES = ("qry_image", "pos_image", "neg_image")
MORE_IMAGES = "more_images"


class PairSource(abc.ABC):
    """Pairs by index; those of a subset follow one another. Picklable, for worker processes.

    Attributes:
      subsets: name -> range of indices. Together the ranges cover `range(len(source))`, in order.
      left_out: name -> numbers of the rows that the source leaves out, since one of their sides has
        neither text nor image. Such rows have no index.
    """

    subsets: dict[str, range]
    left_out: Mapping[str, Sequence[int]] = MappingProxyType({})

    def __len__(self) -> int:
        return sum(len(indices) for indices in self.subsets.values())

    @abc.abstractmethod
    def __getitem__(self, index: int) -> Pair:
        """Reads a pair and its images' bytes.

        Raises:
          RowError: the row has missing fields or no content.
          ImageError: an image path leaves the root or the file cannot be read.
        """

    def draw(self, index: int, positive: int, negatives: int | None = None) -> Pair:
        """Reads a pair as it comes into a step: with one of its row's targets, and some hard negatives.

        Args:
          index: of the pair.
          positive: number of the target, at least 0, counted on from the first one after the last one.
          negatives: the most hard negatives to read; None: all.

        Returns:
          The pair. A source whose rows have one target each reads them as ever.

        Raises:
          RowError, ImageError: as for an index.
        """
        del positive, negatives
        return self[index]

    @abc.abstractmethod
    def pair_id(self, index: int) -> str:
        """The name of a pair. Pairs that cannot be read have one, too.

        Args:
          index: of the pair.

        Returns:
          "SUBSET:ROW".
        """

    @abc.abstractmethod
    def digest(self, index: int) -> int:
        """A hash of the row's content, the same in every kind of source; cheap.

        Args:
          index: of the pair.

        Returns:
          At least 0, less than 2**64.
        """

    def contents(self) -> np.ndarray:
        """Hashes that are equal for rows of the same query and first target (text and image path).

        Such rows are kept out of each other's pools, where they would be each other's negatives. A source
        that cannot tell gives hashes that are equal only if the hard negatives are equal as well.

        Returns:
          uint64 [n].
        """
        return np.array([self.digest(index) for index in range(len(self))], np.uint64)

    def queries(self) -> tuple[np.ndarray, np.ndarray]:
        """What the order by modality is made from.

        Returns:
          bool [n], the query has an image (a marker without an image path is none); and int32 [n], the
          number of words of the query, its marker included, as in the authors' code.

        Raises:
          ValueError: the source does not know.
        """
        raise ValueError(
            f"{type(self).__name__} has no queries(): it cannot be read by modality; use "
            'data.order "uniform"'
        )

    def subset(self, index: int) -> str:
        """The subset of a pair.

        Args:
          index: of the pair.

        Returns:
          Its name.
        """
        starts = [indices.start for indices in self.subsets.values()]
        return list(self.subsets)[bisect.bisect_right(starts, index) - 1]


class MmebSource(PairSource):
    """Rows held as Arrow columns, images read from folders or zip archives.

    Args:
      tables: subset -> its rows.
      images: where image paths lead.
    """

    def __init__(self, tables: Mapping[str, Table], images: ImageStore):
        self._tables = dict(tables)
        self._images = images
        self.subsets = _consecutive({name: len(table) for name, table in tables.items()})
        self.left_out = {name: t.left_out for name, t in tables.items() if t.left_out}

    def row(self, index: int) -> Row:
        """The text and paths of a row.

        Args:
          index: of the pair.

        Returns:
          The row as it is stored.

        Raises:
          RowError: it cannot be used.
        """
        subset = self.subset(index)
        return self._tables[subset][index - self.subsets[subset].start]

    def row_numbers(self, subset: str) -> np.ndarray:
        """The numbers of a subset's rows.

        Args:
          subset: its name.

        Returns:
          int64 [n], of each row in its file or files.
        """
        return self._tables[subset].row_numbers

    def row_number(self, index: int) -> int:
        """The number of a row.

        Args:
          index: of the pair.

        Returns:
          Its number in its file or files.
        """
        subset = self.subset(index)
        return int(self.row_numbers(subset)[index - self.subsets[subset].start])

    def pair_id(self, index: int) -> str:
        return f"{self.subset(index)}:{self.row_number(index)}"

    def digest(self, index: int) -> int:
        try:
            return self.row(index).digest()
        except RowError:
            return (
                2**64 - 1
            )  # unusable rows stay with the training rows, where data.on_error applies

    def contents(self) -> np.ndarray:
        hashes = np.empty(len(self), np.uint64)
        rows = (
            texts
            for table in self._tables.values()
            for texts in table.texts("qry", "qry_image_path", "pos_text", "pos_image_path")
        )
        for index, texts in enumerate(rows):
            # Rows without any content do not count as copies of each other: each of them is reported.
            hashes[index] = hash_texts(texts if any(texts) else (self.pair_id(index),))
        return hashes

    def queries(self) -> tuple[np.ndarray, np.ndarray]:
        image, words = np.empty(len(self), bool), np.empty(len(self), np.int32)
        rows = (
            texts
            for table in self._tables.values()
            for texts in table.texts("qry", "qry_image_path")
        )
        for index, (text, path) in enumerate(rows):
            image[index], words[index] = bool(path), len(text.split())
        return image, words

    def has_more(self, subset: str) -> bool:
        """Whether any row of a subset has several targets or hard negatives, or scores.

        Args:
          subset: its name.

        Returns:
          True if one has.
        """
        return self._tables[subset].has_more

    def read(self, index: int) -> tuple[Row, tuple[bytes, ...]]:
        """Reads a row and its images.

        Args:
          index: of the pair.

        Returns:
          The row, and the encoded images of all its sides as `make_pair` takes them.

        Raises:
          RowError: the row cannot be used.
          ImageError: an image cannot be read.
        """
        row = self.row(index)
        return row, self._read_images(index, _paths(row))

    def _read_images(self, index: int, paths: Sequence[str]) -> tuple[bytes, ...]:
        name = self._name(index)
        return tuple(self._images.read(path, name) if path else b"" for path in paths)

    def query_and_targets(self, index: int) -> tuple[Item, ...]:
        """The query and all targets of a row, without reading the images that are files.

        Args:
          index: of the pair.

        Returns:
          The query, then the targets. Their images are paths of files, or bytes if they lie in an archive.

        Raises:
          RowError: the row cannot be used.
          ImageError: an image is not there.
        """
        row, name = self.row(index), self._name(index)

        def item(side: str, text: str, path: str) -> Item:
            where = f"{name}, {side}"
            images = (self._images.find(path, where),) if path else missing_image(text)
            return Item(text=text, images=images, name=f"{where} ({path})" if path else where)

        targets = row.positives()
        names = (
            ["target"] if len(targets) == 1 else [f"target {n + 1}" for n in range(len(targets))]
        )
        return (
            item("query", row.qry, row.qry_image_path),
            *(item(side, *target) for side, target in zip(names, targets, strict=True)),
        )

    @property
    def image_root(self) -> Path:
        """What the rows' image paths are relative to."""
        return self._images.root

    def make(self, index: int, row: Row, images: Sequence[bytes], positive: int = 0) -> Pair:
        """Makes the pair of what `read` gave.

        Args:
          index: of the pair.
          row: its text and paths.
          images: its encoded images.
          positive: as for `draw`.

        Returns:
          The pair.
        """
        return make_pair(self.pair_id(index), self._name(index), row, images, positive)

    def __getitem__(self, index: int) -> Pair:
        return self.draw(index, 0)

    def draw(self, index: int, positive: int, negatives: int | None = None) -> Pair:
        row = self.row(index)
        paths = _paths(row)
        if row.more or negatives is not None:
            read = _Places(row, positive, negatives).all()
            paths = [path if place in read else "" for place, path in enumerate(paths)]
        images = self._read_images(index, paths)
        return make_pair(self.pair_id(index), self._name(index), row, images, positive, negatives)

    def _name(self, index: int) -> str:
        subset = self.subset(index)
        return self._tables[subset].name(index - self.subsets[subset].start)


class RecordSource(PairSource):
    """Prepared array records (`tools/prepare_data.py`), read through tensorflow-datasets.

    Args:
      folders: name -> the subset's folder.
      split: of the records.
      limits: name -> the row number from which on rows are left out; None for none.

    Raises:
      FileNotFoundError: a folder has no such split.
    """

    def __init__(self, folders: Mapping[str, Path], split: str, limits: Mapping[str, int | None]):
        # The import takes seconds, and the other sources do without it.
        import tensorflow_datasets as tfds

        self._records, self._rows, self._digests, self._names = {}, {}, {}, {}
        self._facts: dict[str, dict[str, np.ndarray]] = {}
        self.left_out = {}
        for subset, folder in folders.items():
            _check_features(folder)
            builder = tfds.builder_from_directory(folder)
            if split not in builder.info.splits:
                raise FileNotFoundError(
                    f"{folder} has no split {split!r}; it has {sorted(builder.info.splits)}"
                )
            with np.load(folder / f"rows-{split}.npz") as index:
                rows, digests = index["row"], index["digest"]
                facts = {fact: index[fact] for fact in INDEX_FACTS if fact in index}
                left_out = index["left_out"].tolist() if "left_out" in index else []
            limit = limits[subset] or sys.maxsize
            left_out = [row for row in left_out if row < limit]
            if left_out:
                self.left_out[subset] = left_out
            kept = int(np.searchsorted(rows, limit))
            self._rows[subset], self._digests[subset] = rows[:kept], digests[:kept]
            self._facts[subset] = {fact: values[:kept] for fact, values in facts.items()}
            self._records[subset] = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
            self._names[subset] = f"{folder}/{split}"
        self.subsets = _consecutive({name: len(rows) for name, rows in self._rows.items()})

    def _locate(self, index: int) -> tuple[str, int]:
        """The subset of an index, and its index there."""
        subset = self.subset(index)
        return subset, index - self.subsets[subset].start

    def pair_id(self, index: int) -> str:
        subset, inside = self._locate(index)
        return f"{subset}:{self._rows[subset][inside]}"

    def digest(self, index: int) -> int:
        subset, inside = self._locate(index)
        return int(self._digests[subset][inside])

    def contents(self) -> np.ndarray:
        if all("content" in facts for facts in self._facts.values()):
            return self._fact("content")
        return np.concatenate(list(self._digests.values()))

    def queries(self) -> tuple[np.ndarray, np.ndarray]:
        for subset, facts in self._facts.items():
            if len(facts) < len(INDEX_FACTS):
                raise ValueError(
                    f"{self._names[subset]} was prepared by a version that did not note which queries "
                    "have an image; run tools/prepare_data.py again with the same --input and --output "
                    '(it keeps the records), or use data.order "uniform"'
                )
        return self._fact("image_query"), self._fact("words")

    def _fact(self, fact: str) -> np.ndarray:
        return np.concatenate([facts[fact] for facts in self._facts.values()])

    def __getitem__(self, index: int) -> Pair:
        return self.draw(index, 0)

    def draw(self, index: int, positive: int, negatives: int | None = None) -> Pair:
        subset, inside = self._locate(index)
        record = self._records[subset][inside]
        # Records of rows without more do not have the field.
        row = Row(*(record.get(field, b"").decode() for field in Row._fields))
        name = f"{self._names[subset]} row {self._rows[subset][inside]}"
        images = [record[image] for image in IMAGES] + list(record.get(MORE_IMAGES, ()))
        return make_pair(self.pair_id(index), name, row, images, positive, negatives)


def _check_features(folder: Path) -> None:
    """tensorflow-datasets imports the classes that features.json names: refuses any but its own."""
    file = folder / "features.json"
    try:
        waiting = [parse_json(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: not prepared data: features.json: {error}") from error
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            name = value.get("pythonClassName", _FEATURES)
            if not isinstance(name, str) or not name.startswith(_FEATURES):
                raise ValueError(
                    f"{file}: names the class {name!r:.100}; expected one of {_FEATURES}*"
                )
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value


_FEATURES = "tensorflow_datasets.core.features."


class SelectedSource(PairSource):
    """Some rows of another source, in its order.

    Args:
      parent: the source that is selected from.
      indices: int64, increasing.
    """

    def __init__(self, parent: PairSource, indices: np.ndarray):
        self._parent = parent
        self.left_out = parent.left_out
        self._indices = np.asarray(indices, np.int64)
        self.subsets = _consecutive(
            {
                name: int(np.searchsorted(self._indices, rows.stop))
                - int(np.searchsorted(self._indices, rows.start))
                for name, rows in parent.subsets.items()
            }
        )

    def __getitem__(self, index: int) -> Pair:
        return self._parent[int(self._indices[index])]

    def draw(self, index: int, positive: int, negatives: int | None = None) -> Pair:
        return self._parent.draw(int(self._indices[index]), positive, negatives)

    def pair_id(self, index: int) -> str:
        return self._parent.pair_id(int(self._indices[index]))

    def digest(self, index: int) -> int:
        return self._parent.digest(int(self._indices[index]))

    def contents(self) -> np.ndarray:
        return self._parent.contents()[self._indices]

    def queries(self) -> tuple[np.ndarray, np.ndarray]:
        image, words = self._parent.queries()
        return image[self._indices], words[self._indices]


def _paths(row: Row) -> list[str]:
    """Image paths in the order in which a row's images are stored: query, first target, first hard negative ("" if
    there is none), the other targets, the other hard negatives."""
    rest = row.rest()
    others = [side.image_path for side in (*rest.positives, *rest.negatives)]
    return [row.qry_image_path, row.pos_image_path, row.neg_image_path, *others]


class _Places:
    """Where the sides of a pair are among the stored images of its row.

    Attributes:
      positive: number of the target.
      target: its place.
      negatives: place of each hard negative.
    """

    def __init__(self, row: Row, positive: int, negatives: int | None):
        positives = len(row.positives())
        self.positive = positive % positives
        self.target = 1 if self.positive == 0 else 2 + self.positive
        others = range(2 + positives, 1 + positives + len(row.negatives()))
        self.negatives = [2, *others][: len(row.negatives())][:negatives]

    def all(self) -> set[int]:
        """Of the query, the target and the hard negatives."""
        return {0, self.target, *self.negatives}


def make_pair(
    pair_id: str,
    name: str,
    row: Row,
    images: Sequence[bytes],
    positive: int = 0,
    negatives: int | None = None,
) -> Pair:
    """The pair of a row. A marker without an image path, as in WebQA's queries, holds the zero picture.

    Args:
      pair_id: "SUBSET:ROW".
      name: file and row, for messages.
      row: its texts and paths.
      images: the encoded images of query, first target and first hard negative, of the other targets, and of the
        other hard negatives; b"" for those it lacks, and those of sides that the pair does not have.
      positive: number of the target, counted on from the first one after the last one.
      negatives: the most hard negatives that the pair gets; None: all.

    Returns:
      The pair.
    """

    def item(side: str, text: str, path: str, image: bytes) -> Item:
        where = f"{name}, {side}" + (f" ({path})" if path else "")
        return Item(text=text, images=(image,) if path else missing_image(text), name=where)

    def numbered(side: str, number: int, count: int) -> str:
        return side if count == 1 else f"{side} {number + 1}"

    places = _Places(row, positive, negatives)
    targets, against, rest = row.positives(), row.negatives(), row.rest()
    number = places.positive
    scores = rest.pos_scores and (rest.pos_scores[number], *rest.neg_scores)
    return Pair(
        id=pair_id,
        query=item("query", row.qry, row.qry_image_path, images[0]),
        target=item(
            numbered("target", number, len(targets)), *targets[number], images[places.target]
        ),
        negatives=tuple(
            item(numbered("negative", n, len(against)), *against[n], images[place])
            for n, place in enumerate(places.negatives)
        ),
        subset=pair_id.rpartition(":")[0],
        scores=scores[: 1 + len(places.negatives)],
        num_targets=len(targets),
    )


def open_source(
    path: str | os.PathLike,
    *,
    subsets: Sequence[str] | None = None,
    split: str = "original",
    max_rows: int | Mapping[str, int] | None = None,
    image_root: str | os.PathLike | None = None,
) -> PairSource:
    """Opens training data of any of the forms this package reads, by what lies at `path`.

    - a folder with `SUBSET/SPLIT-*.parquet`: MMEB-train as cloned, images in folders or archives;
    - a folder with `SUBSET.json` or `SUBSET.jsonl`, or one such file: rows of one's own;
    - a folder that `tools/prepare_data.py` wrote: array records.

    Args:
      path: a folder or a file.
      subsets: names to read, in this order; None for all, MMEB's own first and in MMEB's order.
      split: of the parquet files and of the array records; JSON files have no splits.
      max_rows: the first rows to keep of each subset (the paper: 50000), or of those named.
      image_root: what image paths are relative to; by default the folder itself.

    Returns:
      The pairs.

    Raises:
      FileNotFoundError: nothing to read there, or a subset or split is missing.
      ValueError: a file is not what its name says, or a source would be empty.
    """
    path = Path(path)
    found = find_subsets(path, split)
    if not found:
        raise FileNotFoundError(
            f"{path}: no training data; expected SUBSET/{split}-*.parquet, SUBSET.json, "
            "SUBSET.jsonl, a .json or .jsonl file, or the output of tools/prepare_data.py"
        )
    names = list(subsets) if subsets else _in_mmeb_order(found)
    missing = [name for name in names if name not in found]
    if missing:
        raise FileNotFoundError(f"{path}: no subsets {missing}; it has {_in_mmeb_order(found)}")

    limits = dict(max_rows) if isinstance(max_rows, Mapping) else dict.fromkeys(names, max_rows)
    limits = {name: limits.get(name) for name in names}
    if found[names[0]][0].name == "dataset_info.json":
        folders = {name: found[name][0].parent for name in names}
        return RecordSource(folders, split, limits)
    tables = {name: read_table(found[name], limits[name]) for name in names}
    empty = [name for name, table in tables.items() if len(table) == 0]
    if empty:
        left_out = sum(len(tables[name].left_out) for name in empty)
        reason = f" but {left_out} of which a side has neither text nor image" if left_out else ""
        raise ValueError(f"{path}: subsets {empty} have no rows{reason}")
    root = image_root or (path if path.is_dir() else path.parent)
    return MmebSource(tables, ImageStore(root))


def find_subsets(path: Path, split: str) -> dict[str, list[Path]]:
    """The subsets that lie at a path.

    Args:
      path: a folder or a file.
      split: of parquet files.

    Returns:
      Name -> its files: parquet files in order, one JSON file, or one `dataset_info.json`.
    """
    if path.is_file():
        return {path.stem: [path]}
    prepared = {file.parent.name: [file] for file in path.glob("*/dataset_info.json")}
    if prepared:  # other files there are no rows, such as the list of skipped ones
        return prepared
    parquet: dict[str, list[Path]] = {}
    for file in sorted(path.glob(f"*/{split}-*.parquet")):
        parquet.setdefault(file.parent.name, []).append(file)
    return (
        {file.stem: [file] for file in path.glob("*.json") if _is_list(file)}
        | {file.stem: [file] for file in path.glob("*.jsonl")}
        | parquet
    )


def _is_list(file: Path) -> bool:
    """Whether a JSON file holds a list, as rows do. Metadata and results may lie beside them."""
    with file.open("rb") as start:
        return start.read(64).lstrip().startswith(b"[")


def split_held_out(source: PairSource, share: float) -> tuple[PairSource, PairSource]:
    """Divides rows into training rows and held-out rows, by the hash of each row's content.

    Which rows are held out does not depend on their order, their number or the kind of source. Copies of a
    row are on the same side.

    Args:
      source: of all rows.
      share: of the rows that are held out, on average.

    Returns:
      The training rows, and those held out.

    Raises:
      ValueError: `share` is not a share.
    """
    if not 0 <= share < 1:
        raise ValueError(f"held-out share is {share}; expected at least 0 and less than 1")
    digests = np.array([source.digest(i) for i in range(len(source))], np.uint64)
    held = digests < np.uint64(int(share * 2**64))
    training, held_out = (SelectedSource(source, np.flatnonzero(part)) for part in (~held, held))
    return training, held_out


def _consecutive(sizes: Mapping[str, int]) -> dict[str, range]:
    ends = np.cumsum([0, *sizes.values()]).tolist()
    return {name: range(a, b) for name, a, b in zip(sizes, ends, ends[1:], strict=False)}


def _in_mmeb_order(names: Mapping[str, object]) -> list[str]:
    known = [name for name in MMEB_TRAIN_SUBSETS if name in names]
    return known + sorted(set(names) - set(known))
