"""Retrieval over one's own corpus, in BEIR's file layout with images and videos.

    DIRECTORY/queries.jsonl   {"_id": "q1", "text": "...", "image": "path", "video": "path"}
    DIRECTORY/corpus.jsonl    the same; "title" is put in front of "text"
    DIRECTORY/qrels.tsv       query-id <tab> corpus-id <tab> score, with a header (or qrels/test.tsv)

Paths are relative to DIRECTORY. Owns the files; metrics are trec_eval's.
"""

from __future__ import annotations

import csv
import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.common.files import write_text
from llave_jax.common.json_text import LINE_TOO_LONG, json_lines, parse_json
from llave_jax.common.paths import below
from llave_jax.evaluation import output
from llave_jax.evaluation.benchmarks.base import Benchmark, Options
from llave_jax.evaluation.results import Suite
from llave_jax.evaluation.scoring import Result
from llave_jax.evaluation.task import Task, TaskInfo
from llave_jax.inputs.item import Item, as_item, with_prompt
from llave_jax.parallel.processes import only_on_first

NAME = "retrieval"
CUTOFFS = (1, 5, 10, 100)
METRICS = (
    "precision@1",
    *(f"recall@{k}" for k in CUTOFFS),
    *(f"nDCG@{k}" for k in CUTOFFS),
    f"MRR@{CUTOFFS[-1]}",
)
INFO = TaskInfo(NAME, NAME, metric="nDCG@10")


class Corpus(Benchmark):
    """Queries and a corpus of one's own.

    Args:
      data_dir: with the three files.
      options: prompts go before the texts of queries and documents.

    Raises:
      FileNotFoundError, ValueError: as for `read_task`.
    """

    suite = Suite(NAME, (INFO,))

    def __init__(self, data_dir: str | os.PathLike, options: Options | None = None):
        self._task = read_task(data_dir, options)

    def names(self) -> list[str]:
        """The one task."""
        return [NAME]

    def read(self, name: str) -> Task:
        """The task, as it was read."""
        return self._task

    def write(self, directory: Path, task: Task, result: Result) -> None:
        """Writes `retrieval_score.json` and `retrieval_run.tsv` (TREC's form)."""
        output.write_score(directory, NAME, result.metrics)
        answers = only_on_first(result.answers)
        lines = [
            f"{task.query_names[query]} Q0 {task.candidate_names[document]} {rank} {score:.7f} llave_jax\n"
            for query, row in enumerate(answers.ranking)
            for rank, (document, score) in enumerate(
                zip(row, answers.scores[query], strict=True), 1
            )
            if document >= 0
        ]
        write_text(directory / "retrieval_run.tsv", "".join(lines))


def make_task(
    info: TaskInfo,
    queries: Mapping[str, Item],
    documents: Mapping[str, Item],
    qrels: Mapping[str, Mapping[str, float]],
    metrics: tuple[str, ...] = METRICS,
    settings: Mapping[str, Any] | None = None,
) -> Task:
    """A task in which every query ranks the whole corpus.

    Args:
      info: of the task.
      queries: id -> item; those without judgements are left out.
      documents: id -> item.
      qrels: query id -> document id -> relevance; above 0 is relevant, and the gain in nDCG.
      metrics: of the task.
      settings: of the task.

    Returns:
      The task.
    """
    places = {name: index for index, name in enumerate(documents)}
    judged = [name for name in queries if name in qrels]
    relevant, gains = [], []
    for name in judged:
        found = {places[d]: gain for d, gain in qrels[name].items() if gain > 0}
        relevant.append(np.array(list(found), np.int32))
        gains.append(np.array(list(found.values()), np.float32))
    return Task(
        info=info,
        queries=[queries[name] for name in judged],
        candidates=list(documents.values()),
        relevant=relevant,
        gains=gains,
        metrics=metrics,
        query_names=judged,
        candidate_names=list(documents),
        settings=settings or {},
    )


def read_task(data_dir: str | os.PathLike, options: Options | None = None) -> Task:
    """Read a corpus of one's own. Queries without judgements are left out.

    Args:
      data_dir: with the three files.
      options: prompts go before the texts of queries and documents, behind the image markers at their start.

    Returns:
      The task; `settings` has the prompts that were used.

    Raises:
      FileNotFoundError, ValueError: data is missing or malformed; it names file and line.
    """
    data_dir, options = Path(data_dir), options or Options()
    qrels_path = data_dir / "qrels.tsv"
    if not qrels_path.is_file():
        qrels_path = data_dir / "qrels" / "test.tsv"
    queries = _read_items(data_dir / "queries.jsonl", data_dir)
    documents = _read_items(data_dir / "corpus.jsonl", data_dir)
    qrels = _read_qrels(qrels_path, queries, documents)
    prompts = {"query_prompt": options.query_prompt, "document_prompt": options.document_prompt}
    queries = {key: with_prompt(item, options.query_prompt) for key, item in queries.items()}
    documents = {key: with_prompt(item, options.document_prompt) for key, item in documents.items()}
    used = {name: prompt for name, prompt in prompts.items() if prompt}
    return make_task(INFO, queries, documents, qrels, settings=used)


def _read_items(path: Path, root: Path) -> dict[str, Item]:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; see llave_jax.evaluation.benchmarks.corpus"
        )
    items: dict[str, Item] = {}
    with path.open("rb") as file:
        for number, line in json_lines(file):
            where = f"{path}: line {number}"
            if line is None:
                raise ValueError(f"{where}: {LINE_TOO_LONG}")
            try:
                row = parse_json(line)
            except ValueError as error:
                raise ValueError(f"{where}: not a JSON object: {error}") from error
            key, item = _parse_item(row, where, root)
            if key in items:
                raise ValueError(f"{where}: _id {key!r} was given before; ids must be unique")
            items[key] = item
    if not items:
        raise ValueError(f"{path}: has no rows")
    return items


def _parse_item(row: Any, where: str, root: Path) -> tuple[str, Item]:
    if not isinstance(row, dict) or not isinstance(row.get("_id"), str):
        raise ValueError(f'{where}: expected an object with a string "_id", found {row!r:.200}')
    parts = [row.get(key) or "" for key in ("title", "text")]
    if not all(isinstance(part, str) for part in parts):
        raise ValueError(f"{where}: title and text must be strings, found {parts!r:.200}")
    text = " ".join(filter(None, parts))
    try:
        (text + row["_id"]).encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: is not Unicode text (it has half a surrogate pair)") from error
    visual = {key: row[key] or None for key in ("image", "images", "video") if key in row}
    item = as_item({"text": text, **visual}, where)

    def below_root(path: Any) -> str | None:
        if path is None:
            return None
        try:
            file = below(root, path, linked_folders=True) if isinstance(path, str) else None
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        if file is None or not file.is_file():
            raise FileNotFoundError(f"{where}: {path!r:.200} is not a file below {root}")
        return str(file)

    images = tuple(map(below_root, item.images))
    return row["_id"], dataclasses.replace(item, images=images, video=below_root(item.video))


def _read_qrels(
    path: Path, queries: dict[str, Item], documents: dict[str, Item]
) -> dict[str, dict[str, int]]:
    if not path.is_file():
        raise FileNotFoundError(f"neither {path.parent.parent / 'qrels.tsv'} nor {path} exists")
    qrels: dict[str, dict[str, int]] = {}
    try:
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines(), delimiter="\t"))
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a table in UTF-8 with tabs: {error}") from error
    for number, row in enumerate(rows, 1):
        where = f"{path}: line {number}"
        if len(row) != 3:
            raise ValueError(f"{where}: expected query-id, corpus-id, score; found {row!r:.200}")
        if number == 1 and row[2] == "score":
            continue
        query, document, score = row
        if query not in queries:
            raise ValueError(f"{where}: query {query!r} is not in queries.jsonl")
        if document not in documents:
            raise ValueError(f"{where}: document {document!r} is not in corpus.jsonl")
        try:
            qrels.setdefault(query, {})[document] = int(score)
        except ValueError as error:
            raise ValueError(f"{where}: score {score!r} is not an integer") from error
    if not qrels:
        raise ValueError(f"{path}: has no judgements")
    return qrels
