"""Retrieval over one's own corpus, in BEIR's file layout with images and videos (extra `retrieval`).

    DIRECTORY/queries.jsonl   {"_id": "q1", "text": "...", "image": "path", "video": "path"}
    DIRECTORY/corpus.jsonl    the same; "title" is put in front of "text"
    DIRECTORY/qrels.tsv       query-id <tab> corpus-id <tab> score, with a header (or qrels/test.tsv)

Paths are relative to DIRECTORY. Owns the files and the ranking's metrics (ir-measures, which runs
trec_eval). The search is `embedding/search.py`.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llave_jax.common import extras
from llave_jax.common.files import write_text
from llave_jax.common.json_text import LINE_TOO_LONG, json_lines, parse_json
from llave_jax.common.paths import below
from llave_jax.common.tables import align
from llave_jax.embedding.run_info import record_run
from llave_jax.embedding.search import search
from llave_jax.evaluation.cache import EmbeddingCache, Encode, embed
from llave_jax.evaluation.forms import Form, rows
from llave_jax.inputs.item import Item, as_item
from llave_jax.parallel.processes import from_first_process, only_on_first

CUTOFFS = (1, 5, 10, 100)
_SCORE = "retrieval_score.json"


@dataclasses.dataclass(frozen=True)
class RetrievalTask:
    """Queries, a corpus and judgements.

    Attributes:
      query_ids: of the judged queries.
      queries: the same, as items.
      document_ids: of the corpus.
      documents: the same, as items.
      qrels: query id -> document id -> relevance; 0 is judged and not relevant.
    """

    query_ids: tuple[str, ...]
    queries: tuple[Item, ...]
    document_ids: tuple[str, ...]
    documents: tuple[Item, ...]
    qrels: dict[str, dict[str, int]]


@dataclasses.dataclass(frozen=True)
class RetrievalResult:
    """Metrics, and the rankings that they measure.

    Attributes:
      metrics: by name, as fractions.
      ranking: query id -> document ids with scores, best first; None on processes other than the first.
      forms: metrics of the corpus in smaller forms; {} on processes other than the first.
    """

    metrics: dict[str, float]
    ranking: dict[str, list[tuple[str, float]]] | None
    forms: Mapping[Form, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def by_form(self) -> dict[Form, dict[str, float | None]]:
        """The metrics of each form that its table shows, as fractions."""
        return {
            form: {
                name: values[name]
                for name in ("recall@1", "recall@10", "nDCG@10")
                if name in values
            }
            for form, values in self.forms.items()
        }

    def rows(self) -> list[list[str]]:
        """Cells of the table, the heading first, in percent."""
        return [["metric", "%"], *([n, f"{100 * v:.1f}"] for n, v in self.metrics.items())]

    def table(self) -> str:
        """The tables as text."""
        by_form = self.by_form()
        more = "\n\n" + align(rows(by_form)) if by_form else ""
        return align(self.rows()) + more


def evaluate_retrieval(
    encode: Encode,
    task: RetrievalTask,
    output_dir: str | os.PathLike | None = None,
    *,
    cache: EmbeddingCache | None = None,
    cutoffs: Sequence[int] = CUTOFFS,
    settings: Mapping[str, Any] | None = None,
    forms: Sequence[Form] = (),
) -> RetrievalResult:
    """Rank the corpus for every judged query and measure the rankings.

    Equal scores rank in the order of the corpus. With several processes all call this alike.

    Args:
      encode: items -> float32 [n, D], L2-normalised.
      task: of `read_task`.
      output_dir: where `retrieval_score.json` and `retrieval_run.tsv` (TREC's form) go, if given.
      cache: embeddings of earlier runs.
      cutoffs: of recall and nDCG; the largest is the depth of the ranking.
      settings: what `encode` is, kept in `run.json` beside the scores.
      forms: of the stored corpus, which are scored too.

    Returns:
      The metrics, on all processes; the first one's also has the rankings.
    """
    cache = EmbeddingCache() if cache is None else cache
    queries = embed(encode, len(task.queries), task.queries.__getitem__, cache)
    documents = embed(encode, len(task.documents), task.documents.__getitem__, cache)
    names = _metric_names(cutoffs)
    values, ranking, by_form = np.zeros(len(names)), None, {}
    if queries is not None and documents is not None:
        for form in forms:
            _, indices = form.search(queries, documents, max(cutoffs))
            order = {
                query: [task.document_ids[i] for i in row]
                for query, row in zip(task.query_ids, indices, strict=True)
            }
            by_form[form] = ranking_metrics(task.qrels, order, cutoffs)
        scores, indices = search(queries, documents, max(cutoffs))
        ranking = {
            query: [(task.document_ids[i], float(s)) for i, s in zip(row, row_scores, strict=True)]
            for query, row, row_scores in zip(task.query_ids, indices, scores, strict=True)
        }
        order = {query: [document for document, _ in row] for query, row in ranking.items()}
        values = np.array([*ranking_metrics(task.qrels, order, cutoffs).values()])
    values = from_first_process(values)
    result = RetrievalResult(dict(zip(names, values.tolist(), strict=True)), ranking, by_form)
    if output_dir is not None and jax.process_index() == 0:
        record_run(output_dir, "retrieval", None)
        _write(Path(output_dir), result)
        record_run(output_dir, "retrieval", settings)
    return result


def _metric_names(cutoffs: Sequence[int]) -> list[str]:
    """Names of the metrics of `ranking_metrics`, in its order."""
    return [
        "precision@1",
        *(f"recall@{k}" for k in cutoffs),
        *(f"nDCG@{k}" for k in cutoffs),
        f"MRR@{max(cutoffs)}",
    ]


def ranking_metrics(
    qrels: dict[str, dict[str, int]], order: dict[str, list[str]], cutoffs: Sequence[int]
) -> dict[str, float]:
    """Means over the queries of `qrels` of precision@1, recall@k, nDCG@k and reciprocal rank.

    A query without relevant documents has no defined recall; trec_eval counts it as 0.

    Args:
      qrels: query id -> document id -> relevance; above 0 is relevant, and the gain in nDCG.
      order: query id -> document ids, best first; `max(cutoffs)` of them, or the whole corpus.
      cutoffs: of recall and nDCG.

    Returns:
      Metric -> mean, as a fraction: precision@1, recall and nDCG at each cutoff, MRR at the largest.

    Raises:
      MissingPackage: ir-measures is not installed.
    """
    check_installed()
    import ir_measures
    from ir_measures import RR, P, R, nDCG

    # trec_eval sorts by score and breaks ties by document id. Negative ranks as scores leave no ties.
    run = {q: {doc: -float(rank) for rank, doc in enumerate(docs)} for q, docs in order.items()}
    measures = [P @ 1, *(R @ k for k in cutoffs), *(nDCG @ k for k in cutoffs), RR]
    values = ir_measures.calc_aggregate(measures, qrels, run)
    return {
        name: float(values[measure])
        for name, measure in zip(_metric_names(cutoffs), measures, strict=True)
    }


def check_installed() -> None:
    """Looks for the package that computes the metrics.

    Raises:
      MissingPackage: it is not installed.
    """
    extras.require("ir_measures", "retrieval metrics")


def read_task(data_dir: str | os.PathLike) -> RetrievalTask:
    """Read a corpus of one's own. Queries without judgements are left out.

    Args:
      data_dir: with the three files.

    Returns:
      Queries, corpus and judgements.

    Raises:
      FileNotFoundError, ValueError: data is missing or malformed; it names file and line.
    """
    data_dir = Path(data_dir)
    qrels_path = data_dir / "qrels.tsv"
    if not qrels_path.is_file():
        qrels_path = data_dir / "qrels" / "test.tsv"
    queries = _read_items(data_dir / "queries.jsonl", data_dir)
    documents = _read_items(data_dir / "corpus.jsonl", data_dir)
    qrels = _read_qrels(qrels_path, queries, documents)
    judged = {key: item for key, item in queries.items() if key in qrels}
    return RetrievalTask(
        tuple(judged), tuple(judged.values()), tuple(documents), tuple(documents.values()), qrels
    )


def _read_items(path: Path, root: Path) -> dict[str, Item]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist; see llave_jax.evaluation.retrieval")
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


def read_metrics(output_dir: str | os.PathLike) -> dict[str, float]:
    """The metrics that `evaluate_retrieval` wrote.

    Args:
      output_dir: the directory it wrote to.

    Returns:
      Fractions by name.
    """
    return json.loads((Path(output_dir) / _SCORE).read_text())


def _write(output_dir: Path, result: RetrievalResult) -> None:
    write_text(output_dir / _SCORE, json.dumps(result.metrics, indent=2) + "\n")
    lines = [
        f"{query} Q0 {document} {rank} {score:.7f} llave_jax\n"
        for query, row in only_on_first(result.ranking).items()
        for rank, (document, score) in enumerate(row, 1)
    ]
    write_text(output_dir / "retrieval_run.tsv", "".join(lines))
