"""Scores a benchmark's tasks, one after the other, and writes what is found.

Owns the loop that every benchmark goes through, in the command and while a model trains.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llave_jax.embedding.run_info import record_run
from llave_jax.evaluation.benchmarks.base import Benchmark, describe
from llave_jax.evaluation.cache import EmbeddingCache, Encode
from llave_jax.evaluation.forms import Form
from llave_jax.evaluation.output import write_similarity
from llave_jax.evaluation.results import Results
from llave_jax.evaluation.scoring import score_task
from llave_jax.parallel.processes import on_first_process

log = logging.getLogger(__name__)

# Things that an error about missing data names; a screen has room for them.
_NAMED = 4


def require_data(benchmark: Benchmark, tasks: Sequence[str]) -> None:
    """Checks that tasks lack nothing on disk. With several processes all call this alike, and the first one looks.

    Args:
      benchmark: whose files were found.
      tasks: names.

    Raises:
      FileNotFoundError: something is missing; it says what, and what fetches it.
      ValueError: there is no such task, or data is malformed.
    """

    def check() -> None:
        missing = benchmark.missing(tasks)
        if not missing:
            return
        lacking = {entry.task for entry in missing}
        things = list(dict.fromkeys((entry.what, entry.command) for entry in missing))
        named = [entry for entry in missing if (entry.what, entry.command) in things[:_NAMED]]
        more = len(things) - _NAMED
        raise FileNotFoundError(
            f"{len(lacking)} of {len(tasks)} tasks lack data on disk; --tasks scores others, --check-data lists "
            f"everything:\n{describe(named)}" + (f"\nand {more} more" if more > 0 else "")
        )

    on_first_process(check)


def evaluate(
    encode: Encode,
    benchmark: Benchmark,
    tasks: Sequence[str] | None = None,
    output_dir: str | os.PathLike | None = None,
    *,
    cache: EmbeddingCache | None = None,
    settings: Mapping[str, Any] | None = None,
    forms: Sequence[Form] = (),
) -> Results:
    """Score tasks of a benchmark.

    With several processes all call this with the same arguments. All return the same metrics. The first one
    also has the answers and writes the files.

    Args:
      encode: items -> float32 [n, D], L2-normalised.
      benchmark: from `benchmarks.open_benchmark`.
      tasks: names; None or empty: those of `Benchmark.names`.
      output_dir: where scores and predictions go; nothing is written if None.
      cache: embeddings of earlier runs; None: kept in memory. Contents that tasks share are encoded once in
        either case.
      settings: what `encode` is, kept in `run.json` beside the scores.
      forms: of stored candidates, which are scored too.

    Returns:
      Results of the tasks, in order.

    Raises:
      FileNotFoundError, ValueError: data is missing or malformed; it names file and row.
    """
    names = list(tasks or benchmark.names())
    cache = EmbeddingCache() if cache is None else cache
    results = []
    for number, name in enumerate(names, 1):
        task = benchmark.read(name)
        if task.skipped_queries or task.skipped_candidates:
            log.warning(
                "%s: skipped %d of %d rows whose query or positive has neither text nor image, and %d "
                "such candidates of other rows",
                name,
                task.skipped_queries,
                task.skipped_queries + len(task.queries),
                task.skipped_candidates,
            )
        result = score_task(encode, task, cache, forms)
        results.append(result)
        log.info(
            "%s (%d of %d): %s %.1f%% of %d",
            name,
            number,
            len(names),
            result.info.metric,
            100 * result.score,
            result.queries,
        )
        if output_dir is not None and jax.process_index() == 0:
            record_run(output_dir, name, None)
            benchmark.write(Path(output_dir), task, result)
            write_similarity(Path(output_dir), result)
            record_run(
                output_dir, name, None if settings is None else {**settings, **task.settings}
            )
    found = Results(benchmark.suite, tuple(results))
    if output_dir is not None and jax.process_index() == 0:
        benchmark.finish(Path(output_dir), found, settings)
    return found
