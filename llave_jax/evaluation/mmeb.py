"""MMEB's evaluation: encode each content once, rank candidates by cosine, precision@1, score files.

Owns the score of a dataset and the files that are written for it. The benchmark's own files are
`mmeb_data.py`, averages and tables `results.py`, kept embeddings `cache.py`.
"""

from __future__ import annotations

import json
import logging
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llave_jax.common.files import write_arrays, write_text
from llave_jax.data.image_store import ImageStore
from llave_jax.embedding.precision import truncate
from llave_jax.embedding.run_info import record_run
from llave_jax.evaluation import mmeb_data
from llave_jax.evaluation.cache import EmbeddingCache, Encode, embed
from llave_jax.evaluation.forms import Form
from llave_jax.evaluation.mmeb_data import MMEB_DATASETS, DatasetInfo, EvalDataset
from llave_jax.evaluation.results import DatasetResult, Results
from llave_jax.parallel.processes import from_first_process, only_on_first


def evaluate_mmeb(
    encode: Encode,
    data_dir: str | os.PathLike,
    datasets: Sequence[str] | None = None,
    output_dir: str | os.PathLike | None = None,
    *,
    images: str | os.PathLike | None = None,
    cache: EmbeddingCache | None = None,
    infos: Sequence[DatasetInfo] | None = None,
    settings: Mapping[str, Any] | None = None,
    forms: Sequence[Form] = (),
) -> Results:
    """Score datasets of MMEB's form, one after the other.

    With several processes all call this with the same arguments. All return the same accuracies. The
    first one also has the scores and writes the files.

    Args:
      encode: items -> float32 [n, D], L2-normalised.
      data_dir: holds `<dataset>/test-*.parquet` or `<dataset>.json`, and the images.
      datasets: names; all that are in the directory if None or empty.
      output_dir: where `<dataset>_score.json`, `<dataset>_predictions.jsonl` and
        `<dataset>_scores.npz` go; nothing is written if None.
      images: image folder or zip archive, if it is not `data_dir`'s `images/` or `images.zip`.
      cache: embeddings of earlier runs; None: kept in memory. Contents that datasets share are encoded
        once in either case.
      infos: the benchmark's datasets with their meta-tasks. Averages are over these; other datasets are
        scored but enter no average. None: MMEB's 36, or, if none of these is scored, all datasets that
        are.
      settings: what `encode` is, kept in `run.json` beside the scores.
      forms: of stored candidates, which are scored too.

    Returns:
      Results of the datasets, in order.

    Raises:
      FileNotFoundError, ValueError: data is missing or malformed; it names file and row.

    Reference: VLM2Vec (arXiv 2410.05160).
    """
    names = list(datasets or mmeb_data.dataset_names(data_dir, infos or MMEB_DATASETS))
    if not names:
        raise FileNotFoundError(
            f"{data_dir}: no datasets (<dataset>/test-*.parquet or <dataset>.json)"
        )
    if infos is None:
        ours = {info.name for info in MMEB_DATASETS}
        infos = MMEB_DATASETS if ours & set(names) else mmeb_data.describe(names)
    store = mmeb_data.open_images(data_dir, images)
    cache = EmbeddingCache() if cache is None else cache
    results = []
    for number, info in enumerate(mmeb_data.describe(names, infos), 1):
        dataset = mmeb_data.read_dataset(data_dir, info.name)
        if dataset.skipped_rows or dataset.skipped_candidates:
            logging.getLogger(__name__).warning(
                "%s: skipped %d of %d rows whose query or positive has neither text nor image, and %d "
                "such candidates of other rows",
                info.name,
                dataset.skipped_rows,
                dataset.skipped_rows + len(dataset),
                dataset.skipped_candidates,
            )
        result = evaluate_dataset(encode, dataset, store, cache, info, forms)
        results.append(result)
        logging.getLogger(__name__).info(
            "%s (%d of %d): precision@1 %.1f%% of %d",
            info.name,
            number,
            len(names),
            100 * result.accuracy,
            result.num_pred,
        )
        if output_dir is not None and jax.process_index() == 0:
            record_run(output_dir, info.name, None)
            write_dataset(Path(output_dir), dataset, result)
            record_run(output_dir, info.name, settings)
    return Results(tuple(results), tuple(infos))


def evaluate_dataset(
    encode: Encode,
    dataset: EvalDataset,
    store: ImageStore,
    cache: EmbeddingCache,
    info: DatasetInfo,
    forms: Sequence[Form] = (),
) -> DatasetResult:
    """Encode what is not cached and score every row. With several processes all call this alike.

    Args:
      encode: items -> float32 [n, D], L2-normalised.
      dataset: the rows.
      store: of the images.
      cache: takes and gives embeddings.
      info: meta-task of the dataset.
      forms: of stored candidates, which are scored too.

    Returns:
      Predictions on all processes; the first one's result also has the scores, and those of the forms.
    """
    embeddings = embed(
        encode,
        len(dataset.contents),
        lambda index: mmeb_data.make_item(dataset, index, store),
        cache,
    )
    scores, predictions = None, np.zeros(len(dataset), np.int32)
    by_form = {}
    if embeddings is not None:
        scores = score_rows(embeddings, dataset)
        # argmax takes the first maximum, so a later copy of the positive does not win over it.
        predictions = np.array([row.argmax() for row in scores], np.int32)
        by_form = {form: form_predictions(embeddings, dataset, form) for form in forms}
    return DatasetResult(
        info=info,
        predictions=from_first_process(predictions),
        chance=mmeb_data.chance(dataset),
        scores=scores,
        candidates=dataset.target_ids,
        skipped_rows=dataset.skipped_rows,
        skipped_candidates=dataset.skipped_candidates,
        forms=by_form,
    )


def form_predictions(embeddings: np.ndarray, dataset: EvalDataset, form: Form) -> np.ndarray:
    """The chosen candidate of each row where candidates are stored in a form.

    Args:
      embeddings: float32 [contents, D], L2-normalised.
      dataset: the rows over these contents.
      form: of the candidates.

    Returns:
      int32 [rows].
    """
    asked = truncate(embeddings, form.dim)
    documents, places = np.unique(np.concatenate(dataset.target_ids), return_inverse=True)
    stored = form.stored(embeddings[documents])
    ends = np.cumsum([len(targets) for targets in dataset.target_ids])[:-1]
    found = []
    for query, candidates in zip(dataset.query_ids, np.split(places, ends), strict=True):
        unique, inverse = np.unique(candidates, return_inverse=True)
        found.append(form.scores(asked[query], stored[unique])[inverse].argmax())
    return np.array(found, np.int32)


def score_rows(embeddings: np.ndarray, dataset: EvalDataset) -> tuple[np.ndarray, ...]:
    """Cosine of each row's query with its candidates.

    Args:
      embeddings: float32 [contents, D], L2-normalised.
      dataset: the rows over these contents.

    Returns:
      For each row float32 [candidates].
    """
    scores = []
    for query, targets in zip(dataset.query_ids, dataset.target_ids, strict=True):
        # A matrix product may round equal rows differently, depending on their position. Repeated
        # candidates must tie exactly, so each unique candidate is multiplied once.
        unique, inverse = np.unique(targets, return_inverse=True)
        scores.append((embeddings[unique] @ embeddings[query])[inverse])
    return tuple(scores)


def write_dataset(output_dir: Path, dataset: EvalDataset, result: DatasetResult) -> None:
    """Write the score file in the leaderboard's form, the predictions, and all scores.

    Args:
      output_dir: is made.
      dataset: the rows.
      result: of these rows, with scores.
    """
    score = {
        "acc": result.accuracy,
        "num_correct": result.num_correct,
        "num_pred": result.num_pred,
    }
    name = dataset.name
    write_text(output_dir / f"{name}_score.json", json.dumps(score, indent=4) + "\n")
    lines = [json.dumps(row, ensure_ascii=False) for row in _prediction_rows(dataset, result)]
    write_text(output_dir / f"{name}_predictions.jsonl", "".join(f"{line}\n" for line in lines))
    _write_scores(output_dir / f"{name}_scores.npz", result)


def _prediction_rows(dataset: EvalDataset, result: DatasetResult) -> list[dict]:
    rows = []
    for index, (prediction, scores) in enumerate(
        zip(result.predictions, only_on_first(result.scores), strict=True)
    ):
        targets = dataset.target_ids[index]
        rows.append(
            {
                "row": int(dataset.row_numbers[index]),
                "query": dataset.contents[dataset.query_ids[index]],
                "prediction": int(prediction),
                "predicted": dataset.contents[targets[prediction]],
                "score": float(scores[prediction]),
                "positive_score": float(scores[0]),
                "positive_rank": 1 + int(np.count_nonzero(scores > scores[0])),
            }
        )
    return rows


def _write_scores(path: Path, result: DatasetResult) -> None:
    """All rows in one file: `scores`, `candidates` [total] and `offsets` int64 [rows + 1]."""
    scores = only_on_first(result.scores)
    write_arrays(
        path,
        compress=True,
        scores=np.concatenate(scores),
        candidates=np.concatenate(result.candidates),
        offsets=np.cumsum([0, *map(len, scores)]),
    )


def read_scores(path: str | os.PathLike, values: str = "scores") -> tuple[np.ndarray, ...]:
    """Read a `<dataset>_scores.npz`.

    Args:
      path: the file.
      values: "scores" (float32 cosines) or "candidates" (int32 ids, equal for repeated contents).

    Returns:
      For each row one array [candidates].

    Raises:
      ValueError: the file is damaged.
    """
    try:
        with np.load(path) as file:
            return tuple(np.split(file[values], file["offsets"][1:-1]))
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); evaluate this dataset again, which is quick with the cache"
        ) from error
