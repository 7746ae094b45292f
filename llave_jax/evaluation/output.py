"""What an evaluation writes of a task: its score, its predictions, all cosines.

Owns the files that benchmarks share. A leaderboard's own form is with its reader in `benchmarks/`.
"""

from __future__ import annotations

import contextlib
import json
import os
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.common.files import write_arrays, write_text
from llave_jax.evaluation.scoring import Answers, Result
from llave_jax.evaluation.similarity import SimilarityStats
from llave_jax.evaluation.task import Task
from llave_jax.parallel.processes import only_on_first

SCORES, SIMILARITY = "_scores.npz", "_similarity.npz"


def write_score(directory: Path, name: str, score: Mapping[str, Any]) -> None:
    """Write `<name>_score.json`.

    Args:
      directory: is made.
      name: of the task.
      score: plain values.
    """
    write_text(directory / f"{name}_score.json", json.dumps(score, indent=4) + "\n")


def write_lines(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines.

    Args:
      path: of the file.
      rows: plain values.
    """
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(path, "".join(f"{line}\n" for line in lines))


def prediction_rows(task: Task, answers: Answers) -> Iterable[dict[str, Any]]:
    """For each query the names of its best answers, of the right ones, and how relevant these are.

    Args:
      task: with names of candidates.
      answers: of the task.

    Yields:
      {"query", "prediction", "scores", "label", "rel_scores", "positive_rank"}; "rel_scores" is None where all right
      answers are alike.
    """
    names = task.candidate_names
    for query, ranking in enumerate(answers.ranking):
        found = ranking[ranking >= 0]
        gains = None if task.gains is None else np.asarray(task.gains[query]).tolist()
        has_positive = answers.positive[query] >= 0
        yield {
            "query": task.query_names[query] if task.query_names else str(query),
            "prediction": [names[answer] for answer in found],
            "scores": [round(float(score), 6) for score in answers.scores[query, : len(found)]],
            "label": [names[answer] for answer in task.relevant[query]],
            "rel_scores": gains,
            "positive_rank": 1 + int(answers.better[query]) if has_positive else None,
        }


def write_all_scores(directory: Path, task: Task, result: Result) -> None:
    """Write `<task>_scores.npz`: `scores`, `candidates` [total] and `offsets` int64 [rows + 1]; nothing without pools.

    Args:
      directory: is made.
      task: with pools.
      result: of the task, with answers.
    """
    scores = only_on_first(result.answers).all_scores
    if scores is None or task.pools is None:
        return
    write_arrays(
        directory / f"{task.info.name}{SCORES}",
        compress=True,
        scores=np.concatenate(scores),
        candidates=np.concatenate(task.pools),
        offsets=np.cumsum([0, *map(len, scores)]),
    )


def write_similarity(directory: Path, result: Result) -> None:
    """Write `<task>_similarity.npz`: cosines `positive`, `hard`, `easy` of `SimilarityStats`; nothing if there are none.

    Args:
      directory: is made.
      result: of the task, with answers.
    """
    stats = only_on_first(result.answers).similarity
    if stats is not None:
        path = directory / f"{result.info.name}{SIMILARITY}"
        write_arrays(path, compress=True, positive=stats.positive, hard=stats.hard, easy=stats.easy)


def read_similarity_file(path: str | os.PathLike) -> SimilarityStats:
    """Read a `<task>_similarity.npz`.

    Args:
      path: the file.

    Returns:
      The cosines of all queries by kind.

    Raises:
      ValueError: the file is damaged.
    """
    with _arrays(path) as file:
        return SimilarityStats(file["positive"], file["hard"], file["easy"])


def read_scores(path: str | os.PathLike, values: str = "scores") -> tuple[np.ndarray, ...]:
    """Read a `<task>_scores.npz`.

    Args:
      path: the file.
      values: "scores" (float32 cosines) or "candidates" (int32 ids, equal for repeated candidates).

    Returns:
      For each row one array [candidates].

    Raises:
      ValueError: the file is damaged.
    """
    with _arrays(path) as file:
        return tuple(np.split(file[values], file["offsets"][1:-1]))


@contextlib.contextmanager
def _arrays(path: str | os.PathLike) -> Iterator[Any]:
    try:
        with np.load(path) as file:
            yield file
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); evaluate this dataset again, which is quick with the cache"
        ) from error
