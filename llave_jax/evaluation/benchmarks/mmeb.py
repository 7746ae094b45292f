"""MMEB (V1): 36 data sets of rows with a query and candidates, the first of which is right.

Owns the files as users have them on disk (parquet or JSON, images in a folder or archive), and the score files that
the leaderboard reads. Data sets of one's own in the same form are read in the same way.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet

from llave_jax.common.json_text import read_json_file
from llave_jax.common.paths import is_plain_name
from llave_jax.data.image_store import ImageStore
from llave_jax.evaluation import output, published
from llave_jax.evaluation.benchmarks.base import Benchmark, Options
from llave_jax.evaluation.results import Reference, Suite, by_meta_task
from llave_jax.evaluation.scoring import Answers, Result
from llave_jax.evaluation.task import Items, Task, TaskInfo
from llave_jax.inputs.item import Item, is_empty, missing_image
from llave_jax.parallel.processes import only_on_first

COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


def _infos(meta_task: str, in_distribution: str, out_of_distribution: str) -> list[TaskInfo]:
    return [TaskInfo(name, meta_task, True) for name in in_distribution.split()] + [
        TaskInfo(name, meta_task, False) for name in out_of_distribution.split()
    ]


# The 36 datasets of MMEB (VLM2Vec, arXiv 2410.05160, table 1), in the order of its tables.
MMEB_DATASETS: tuple[TaskInfo, ...] = tuple(
    _infos(
        "classification",
        "ImageNet-1K N24News HatefulMemes VOC2007 SUN397",
        "Place365 ImageNet-A ImageNet-R ObjectNet Country211",
    )
    + _infos(
        "vqa",
        "OK-VQA A-OKVQA DocVQA InfographicsVQA ChartQA Visual7W",
        "ScienceQA VizWiz GQA TextVQA",
    )
    + _infos(
        "retrieval",
        "VisDial CIRR VisualNews_t2i VisualNews_i2t MSCOCO_t2i MSCOCO_i2t NIGHTS WebQA",
        "FashionIQ Wiki-SS-NQ OVEN EDIS",
    )
    + _infos("grounding", "MSCOCO", "RefCOCO RefCOCO-Matching Visual7W-Pointing")
)


def _references() -> Iterator[Reference]:
    for row in (*published.MMEB, *published.ABLATIONS.values()):
        values = {label: getattr(row, label.lower()) for label in by_meta_task(MMEB_DATASETS)}
        tasks = published.LLAVE_7B_DATASETS if row.model == "LLaVE-7B" else {}
        yield Reference(
            row.model,
            {(name, "precision@1"): value for name, value in tasks.items()},
            {label: value for label, value in values.items() if value is not None},
        )


SUITE = Suite("mmeb", MMEB_DATASETS, by_meta_task(MMEB_DATASETS), tuple(_references()))


class Mmeb(Benchmark):
    """MMEB, or data sets of one's own in its form.

    Args:
      data_dir: holds `<dataset>/test-*.parquet` or `<dataset>.json`, and the images.
      options: `images` is a folder or zip archive, if it is not `data_dir`'s `images/` or `images.zip`.
      infos: the benchmark's datasets with their meta-tasks. Averages are over these; other datasets are
        scored but enter no average. None: MMEB's 36, or, if none of these is there, all datasets that are.

    Raises:
      FileNotFoundError: there is no such directory, or no images where `options` says.

    Reference: VLM2Vec (arXiv 2410.05160).
    """

    def __init__(
        self,
        data_dir: str | os.PathLike,
        options: Options | None = None,
        infos: Sequence[TaskInfo] | None = None,
    ):
        self._data = Path(data_dir)
        self._there = dataset_names(data_dir, infos or MMEB_DATASETS)
        self._images = open_images(data_dir, (options or Options()).images)
        self.suite = SUITE
        if infos is None and not {info.name for info in MMEB_DATASETS} & set(self._there):
            infos = tuple(TaskInfo(name, "other") for name in self._there)
        if infos is not None:
            self.suite = Suite(self._data.name, tuple(infos), by_meta_task(infos))
        self._infos = {info.name: info for info in self.suite.tasks}

    def names(self) -> list[str]:
        """The data sets that are there, MMEB's first."""
        if not self._there:
            raise FileNotFoundError(
                f"{self._data}: no datasets (<dataset>/test-*.parquet or <dataset>.json)"
            )
        return self._there

    def read(self, name: str) -> Task:
        """Reads the rows of a data set. See `read_rows`."""
        rows = read_rows(self._data, name)
        return make_task(rows, self._infos.get(name, TaskInfo(name, "other")), self._images)

    def write(self, directory: Path, task: Task, result: Result) -> None:
        """Writes the score file in the leaderboard's form, a line for each row, and all cosines."""
        assert isinstance(task, MmebTask)
        right = round(result.score * result.queries)
        score = {"acc": result.score, "num_correct": right, "num_pred": result.queries}
        output.write_score(directory, task.info.name, score)
        path = directory / f"{task.info.name}_predictions.jsonl"
        output.write_lines(path, _prediction_rows(task, only_on_first(result.answers)))
        output.write_all_scores(directory, task, result)


def _prediction_rows(task: MmebTask, answers: Answers) -> Iterator[dict[str, Any]]:
    rows = task.rows
    for index, chosen in enumerate(answers.ranking[:, 0]):
        scores = only_on_first(answers.all_scores)[index]
        content = task.targets[chosen]
        yield {
            "row": int(rows.row_numbers[index]),
            "query": rows.contents[rows.query_ids[index]],
            # The first maximum, so a later copy of the positive does not win over it.
            "prediction": int(np.argmax(rows.target_ids[index] == content)),
            "predicted": rows.contents[content],
            "score": float(answers.scores[index, 0]),
            "positive_score": float(scores[0]),
            "positive_rank": 1 + int(np.count_nonzero(scores > scores[0])),
        }


class Content(NamedTuple):
    """One side of a row.

    Attributes:
      text: as in the row, with its image marker.
      image: path relative to the image root; "" for none.
    """

    text: str
    image: str


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one dataset. They refer to its unique contents by index.

    A content without text and image cannot be scored. Rows with such a query or positive are skipped, and
    such candidates of other rows.

    Attributes:
      name: of the dataset.
      source: the file or folder it was read from.
      contents: all different ones.
      query_ids: int32 [rows].
      target_ids: for each row int32 [candidates]; the first is the positive.
      first_row: int32 [contents], a row of the file that holds the content, for messages.
      row_numbers: int32 [rows], of the file.
      skipped_rows: rows that were skipped.
      skipped_candidates: candidates that were skipped in the rows that are left.
    """

    name: str
    source: Path
    contents: tuple[Content, ...]
    query_ids: np.ndarray
    target_ids: tuple[np.ndarray, ...]
    first_row: np.ndarray
    row_numbers: np.ndarray
    skipped_rows: int = 0
    skipped_candidates: int = 0

    def __len__(self) -> int:
        return len(self.query_ids)


def open_images(data_dir: str | os.PathLike, images: str | os.PathLike | None = None) -> ImageStore:
    """The images of a benchmark directory.

    Args:
      data_dir: of the benchmark.
      images: folder or zip archive that image paths are relative to; None: `images/`, `eval_images/` or
        `images.zip` in `data_dir`, or else `data_dir` itself.

    Returns:
      The store.

    Raises:
      FileNotFoundError: `images` does not exist.
    """
    data_dir = Path(data_dir)
    if images is not None:
        if not Path(images).exists():
            raise FileNotFoundError(f"image folder or archive {images} does not exist")
        return ImageStore(images)
    for name in ("images", "eval_images", "images.zip"):
        if (data_dir / name).exists():
            return ImageStore(data_dir / name)
    return ImageStore(data_dir)


def dataset_names(
    data_dir: str | os.PathLike, infos: Sequence[TaskInfo] = MMEB_DATASETS
) -> list[str]:
    """Names of the datasets in a directory.

    Args:
      data_dir: of the benchmark.
      infos: the benchmark's datasets.

    Returns:
      Those of the benchmark in its order, then the others, sorted.

    Raises:
      FileNotFoundError: there is no such directory.
    """
    data_dir = Path(data_dir)
    if not data_dir.is_dir():
        raise FileNotFoundError(f"benchmark directory {data_dir} does not exist")
    found = {path.parent.name for path in data_dir.glob("*/test-*.parquet")}
    found |= {path.stem for path in data_dir.glob("*.json") if _is_row_file(path)}
    order = [info.name for info in infos]
    return [name for name in order if name in found] + sorted(found - set(order))


def _is_row_file(path: Path) -> bool:
    """Whether a JSON file holds a list; results and metadata beside the datasets are objects."""
    with path.open("rb") as file:
        return file.read(64).lstrip().startswith(b"[")


def read_rows(data_dir: str | os.PathLike, name: str) -> Rows:
    """Read `<data_dir>/<name>/test-*.parquet`, or `<data_dir>/<name>.json`.

    Args:
      data_dir: of the benchmark.
      name: of the dataset.

    Returns:
      Its rows, without those that cannot be scored.

    Raises:
      FileNotFoundError: neither exists.
      ValueError: a row does not have MMEB's form, or no row is left; it names file, row and column.
    """
    data_dir = Path(data_dir)
    if not is_plain_name(name):
        raise ValueError(
            f"dataset {name[:100]!r}: expected the name of a dataset in {data_dir}, not a path; present: "
            f"{', '.join(dataset_names(data_dir)) or 'none'}"
        )
    parts = sorted((data_dir / name).glob("test-*.parquet"))
    json_path = data_dir / f"{name}.json"
    if parts:
        rows = [row for part in parts for row in _read_parquet(part)]
        source = data_dir / name
    elif json_path.is_file():
        rows, source = read_json_file(json_path, list), json_path
    else:
        raise FileNotFoundError(
            f"dataset {name!r}: neither {data_dir / name}/test-*.parquet nor {json_path} exists; "
            f"present: {', '.join(dataset_names(data_dir)) or 'none'}"
        )
    return _index_rows(name, source, rows)


def _read_parquet(path: Path) -> list[dict[str, Any]]:
    try:
        present = pyarrow.parquet.read_schema(path).names
        missing = [column for column in COLUMNS if column not in present]
        if missing:
            raise ValueError(
                f"{path}: missing columns {missing}; MMEB-eval rows have {list(COLUMNS)}"
            )
        return pyarrow.parquet.read_table(path, columns=list(COLUMNS)).to_pylist()
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a readable parquet file of text: {error}") from error


def _index_rows(name: str, source: Path, rows: Sequence[dict[str, Any]]) -> Rows:
    ids: dict[Content, int] = {}
    first_row: list[int] = []
    query_ids, target_ids, row_numbers = [], [], []
    skipped_candidates = 0

    def index(content: Content, row: int) -> int:
        if content not in ids:
            ids[content] = len(ids)
            first_row.append(row)
        return ids[content]

    for number, row in enumerate(rows):
        query, targets = _parse_row(row, f"{source}: row {number}")
        if is_empty(*query) or is_empty(*targets[0]):
            continue
        kept = [target for target in targets if not is_empty(*target)]
        skipped_candidates += len(targets) - len(kept)
        query_ids.append(index(query, number))
        target_ids.append(np.array([index(target, number) for target in kept], np.int32))
        row_numbers.append(number)
    if not row_numbers:
        raise ValueError(
            f"{source}: has no rows" + (" whose query and positive are not empty" if rows else "")
        )
    return Rows(
        name=name,
        source=source,
        contents=tuple(ids),
        query_ids=np.array(query_ids, np.int32),
        target_ids=tuple(target_ids),
        first_row=np.array(first_row, np.int32),
        row_numbers=np.array(row_numbers, np.int32),
        skipped_rows=len(rows) - len(row_numbers),
        skipped_candidates=skipped_candidates,
    )


def _parse_row(row: dict[str, Any], where: str) -> tuple[Content, list[Content]]:
    if not isinstance(row, dict) or any(column not in row for column in COLUMNS):
        raise ValueError(f"{where}: expected an object with {list(COLUMNS)}, found {row!r:.200}")
    query = Content(row["qry_text"] or "", row["qry_img_path"] or "")
    texts, images = row["tgt_text"], row["tgt_img_path"]
    # Some datasets give one text for a list of images, or one image for a list of texts.
    if isinstance(texts, str) and isinstance(images, list):
        texts = [texts] * len(images)
    elif isinstance(images, str) and isinstance(texts, list):
        images = [images] * len(texts)
    if (
        not (isinstance(texts, list) and isinstance(images, list))
        or len(texts) != len(images)
        or not texts
    ):
        raise ValueError(
            f"{where}: tgt_text and tgt_img_path must be lists of one length, at least 1; found "
            f"{texts!r:.100} and {images!r:.100}"
        )
    targets = [Content(text or "", image or "") for text, image in zip(texts, images, strict=True)]
    bad = [
        value for value in (*query, *(v for t in targets for v in t)) if not isinstance(value, str)
    ]
    if not bad:
        bad = [
            value for content in (query, *targets) for value in content if not _is_unicode(value)
        ]
    if bad:
        raise ValueError(f"{where}: texts and image paths must be strings, found {bad[0]!r:.100}")
    return query, targets


def _is_unicode(text: str) -> bool:
    """JSON can hold half a surrogate pair, which no file can."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def make_item(rows: Rows, index: int, images: ImageStore) -> Item:
    """The item of one content.

    A marker without an image path, as in queries of WebQA and EDIS, holds the zero picture.

    Args:
      rows: of the data set.
      index: of the content.
      images: where its image is looked up.

    Returns:
      The item. Its files are not read yet.

    Raises:
      ImageError: the image is missing; it names file and row.
    """
    content = rows.contents[index]
    name = f"{rows.source}: row {rows.first_row[index]}"
    if not content.image:
        return Item(text=content.text, images=missing_image(content.text), name=name)
    return Item(text=content.text, images=(images.find(content.image, name),), name=name)


@dataclasses.dataclass(frozen=True)
class MmebTask(Task):
    """A task with the rows that it was made of.

    Attributes:
      rows: of the data set.
      targets: int32 [M], the content of each candidate.
    """

    rows: Rows = dataclasses.field(kw_only=True)
    targets: np.ndarray = dataclasses.field(kw_only=True)


def make_task(rows: Rows, info: TaskInfo, images: ImageStore) -> MmebTask:
    """The task of a data set: each row ranks its own candidates.

    Args:
      rows: of the data set.
      info: its meta-task.
      images: where images are looked up.

    Returns:
      The task. No picture is read yet.
    """
    targets, places = np.unique(np.concatenate(rows.target_ids), return_inverse=True)
    ends = np.cumsum([len(ids) for ids in rows.target_ids])[:-1]
    pools = np.split(places.astype(np.int32), ends)

    def item(index: int) -> Item:
        return make_item(rows, int(index), images)

    return MmebTask(
        info=info,
        queries=Items(len(rows), lambda i: item(rows.query_ids[i])),
        candidates=Items(len(targets), lambda i: item(targets[i])),
        relevant=[pool[:1] for pool in pools],
        pools=pools,
        skipped_queries=rows.skipped_rows,
        skipped_candidates=rows.skipped_candidates,
        rows=rows,
        targets=targets,
    )
