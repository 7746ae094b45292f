"""The 24 visual document tasks of MMEB-V2: a text query ranks all pages of a corpus.

Owns the wording and the files in BEIR's form (configs queries, qrels, corpus). A page's picture is the one in the
corpus table; where that has none, it is an unpacked file.
"""

from __future__ import annotations

import functools
import hashlib
from pathlib import PurePosixPath
from typing import Any

from llave_jax.data.image_store import ImageStore
from llave_jax.evaluation.benchmarks.builder import TaskBuilder
from llave_jax.evaluation.benchmarks.mmeb_v2 import fields
from llave_jax.evaluation.benchmarks.mmeb_v2.hub import HubData, Table
from llave_jax.evaluation.benchmarks.mmeb_v2.pixels import Pixels
from llave_jax.evaluation.benchmarks.mmeb_v2.tasks import METRICS, Spec
from llave_jax.evaluation.task import Task
from llave_jax.inputs.item import Item, missing_image

QUERY = "Find a document image that matches the given query:"
TARGET = "<image> Understand the content of the provided document image."

# As the tables have them: numbers or texts, which differ from each other.
Id = int | str


def read(spec: Spec, data: HubData, pixels: Pixels) -> Task:
    """Reads a task. With several processes all call this alike.

    Args:
      spec: the task.
      data: where its tables are.
      pixels: where its pictures are, if the corpus table has none.

    Returns:
      The task. No page is read yet.

    Raises:
      FileNotFoundError, ValueError: data is missing or malformed; it names file and row.
    """
    queries, qrels, corpus = (
        data.table(spec.repository, config, spec.split, spec.local) for config in spec.configs
    )
    judged = _read_qrels(qrels)
    builder = TaskBuilder(spec.info, METRICS, local=False)
    pages = _ids(corpus, "corpus-id")
    store = None
    if pages and (picture := first_picture(spec, data)):
        store = pixels.store(spec, picture)
    for row, page in enumerate(pages):
        make = functools.partial(_page, corpus, row, store, file_name(spec, page))
        builder.add_candidate(str(page), make)
    known = set(pages)
    columns = ("query-id", "query", *(("language",) if spec.language else ()))
    for row, values in enumerate(queries.rows(*columns)):
        if spec.language and values["language"] != spec.language:
            continue
        where, query = queries.where(row), values["query"]
        if not isinstance(query, str):
            raise ValueError(f"{where}: query must be a text; found {query!r:.100}")
        labels = judged.get(_id(values["query-id"], "query-id", where), {})
        for page in labels:
            if page not in known:
                raise ValueError(
                    f"{qrels.source}: corpus-id {page!r:.100} ({type(page).__name__}) is not in {corpus.source}, "
                    f"whose ids are as {pages[0] if pages else None!r:.100}"
                )
        make = functools.partial(_query, fields.join(QUERY, query), where)
        builder.add_query(
            str(values["query-id"]), make, {str(page): gain for page, gain in labels.items()}
        )
    return builder.task(where=str(qrels.source))


def first_picture(spec: Spec, data: HubData) -> str:
    """The file of the first page, if pages are read from files.

    Args:
      spec: the task.
      data: where its tables are.

    Returns:
      Its path below the picture folder; "" if the corpus table has the pictures.

    Raises:
      FileNotFoundError, ValueError: tables are missing or malformed.
    """
    corpus = data.table(spec.repository, "corpus", spec.split, spec.local)
    if not len(corpus) or _encoded(corpus, 0) is not None:
        return ""
    return file_name(spec, _id(corpus.cell(0, "corpus-id"), "corpus-id", corpus.where(0)))


def file_name(spec: Spec, page: Id) -> str:
    """The file of a page in the pixel repository.

    Args:
      spec: the task.
      page: id of the page; of VisRAG it is a file name, which may be long.

    Returns:
      Its path below the picture folder.
    """
    if spec.parser == "vidore":
        return f"{page}.png"
    name = str(page)
    suffix = PurePosixPath(name).suffix
    stem = name.removesuffix(suffix)
    code = hashlib.md5(name.encode(), usedforsecurity=False).hexdigest()
    return f"{stem[:50]}_{code[:8]}{suffix}"


def _read_qrels(table: Table) -> dict[Id, dict[Id, float]]:
    """Query -> page -> relevance above 0, the largest where a pair is given twice."""
    found: dict[Id, dict[Id, float]] = {}
    for row, values in enumerate(table.rows("query-id", "corpus-id", "score")):
        where, score = table.where(row), values["score"]
        if not isinstance(score, int | float) or isinstance(score, bool) or score != score:
            raise ValueError(f"{where}: score must be a number; found {score!r:.100}")
        query, page = (_id(values[key], key, where) for key in ("query-id", "corpus-id"))
        if score > 0:
            pages = found.setdefault(query, {})
            pages[page] = max(pages.get(page, 0.0), float(score))
    return found


def _ids(table: Table, column: str) -> list[Id]:
    return [
        _id(values[column], column, table.where(row))
        for row, values in enumerate(table.rows(column))
    ]


def _id(value: Any, column: str, where: str) -> Id:
    if isinstance(value, bool) or not isinstance(value, int | str) or value == "":
        raise ValueError(f"{where}: {column} must be a number or a text; found {value!r:.100}")
    return value


def _encoded(corpus: Table, row: int) -> bytes | None:
    """The picture of a page in its table, a struct of bytes and path; None if only the path is there, or nothing."""
    if "image" not in corpus.columns:
        return None
    value = corpus.cell(row, "image")
    encoded = value.get("bytes") if isinstance(value, dict) else value
    if encoded is not None and not isinstance(encoded, bytes):
        raise ValueError(
            f"{corpus.where(row)}: image must be bytes, or a struct with bytes and path; found {encoded!r:.100}"
        )
    return encoded or None


def _query(text: str, where: str) -> Item:
    return Item(text, images=missing_image(text), name=where)


def _page(corpus: Table, row: int, store: ImageStore | None, picture: str) -> Item:
    where = corpus.where(row)
    encoded = _encoded(corpus, row)
    if encoded is None and store is None:
        raise ValueError(
            f"{where}: has no picture, unlike the rows before it; expected image to hold the bytes of one"
        )
    image = encoded if encoded is not None or store is None else store.find(picture, where)
    return Item(TARGET, images=(image,), name=where)
