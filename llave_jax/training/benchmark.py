"""The benchmark that a run is scored on.

Owns what `config.eval.benchmark` may name, and what is reported of it. When it is scored is `evaluation.py`.
What it needs is looked up when it is opened, before the first step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import jax

from llave_jax.common.files import write_text
from llave_jax.common.tables import align, percent
from llave_jax.evaluation import drawing, metrics, run
from llave_jax.evaluation.benchmarks.base import Benchmark, Options
from llave_jax.evaluation.benchmarks.corpus import Corpus
from llave_jax.evaluation.benchmarks.mmeb import Mmeb
from llave_jax.evaluation.benchmarks.registry import BENCHMARKS, open_benchmark
from llave_jax.evaluation.cache import Encode
from llave_jax.evaluation.forms import Form
from llave_jax.evaluation.similarity_comparison import has_similarity, read_similarity
from llave_jax.evaluation.task import TaskInfo
from llave_jax.weights.prompts import side_prompts

_SUMMARY = "summary.json"


class RunBenchmark:
    """A benchmark, scored and reported for a run that trains.

    Args:
      benchmark: whose files were found.
      datasets: names of its tasks; empty: all that are there.
      dims: prefixes of the embeddings that are scored too, as "average/overall@DIM" or "nDCG@10@DIM".

    Raises:
      FileNotFoundError, ValueError: a file of the benchmark is not as it should be, or there is no such task.
    """

    def __init__(
        self, benchmark: Benchmark, datasets: Sequence[str] = (), dims: Sequence[int] = ()
    ):
        there = benchmark.names()
        known = (*there, *benchmark.variants)
        if missing := [name for name in datasets if name not in known]:
            raise ValueError(
                f"config.eval.datasets names {missing}; {benchmark.suite.name} has {', '.join(known)}"
            )
        self._benchmark, self._tasks = benchmark, list(datasets) or there
        self._forms = [Form(dim) for dim in dims]
        run.require_data(benchmark, self._tasks)
        benchmark.read(self._tasks[0])

    def score(self, encode: Encode, directory: Path) -> dict[str, float]:
        """Scores a model. With several processes all call this alike.

        Args:
          encode: items -> float32 [n, D], L2-normalised.
          directory: where the first process keeps what `report` needs.

        Returns:
          Fractions, by name, on all processes.
        """
        results = run.evaluate(encode, self._benchmark, self._tasks, directory, forms=self._forms)
        if jax.process_index() == 0:
            write_text(directory / _SUMMARY, json.dumps(results.summary(), indent=2) + "\n")
        scores = results.metrics()
        for form, values in results.by_form().items():
            for name in ("overall", results.tasks[0].info.metric):
                if values.get(name) is not None:
                    prefix = "average/" if name == "overall" else ""
                    scores[f"{prefix}{name}@{form.dim}"] = values[name] or 0.0
        return scores

    def report(self, directories: Mapping[str, Path], workdir: Path) -> tuple[str, str]:
        """The table of a run, and where more is to be seen; for the first process.

        Args:
          directories: label ("untrained", "trained") -> a directory of `score`, the trained model last.
            Where the benchmark joined a run that was continued, the untrained model has no scores.
          workdir: the run's, where pictures may be drawn.

        Returns:
          The table, and a line about pictures; "" if there are none.
        """
        summaries = {
            label: json.loads((path / _SUMMARY).read_text())["tasks"]
            if (path / _SUMMARY).exists()
            else {}
            for label, path in directories.items()
        }
        *_, last = summaries.values()
        if not self._benchmark.suite.averages:
            return _metric_table(summaries, last), ""
        rows = [["dataset", "meta-task", "chance", *summaries]]
        for name, entry in last.items():
            scores = [
                percent(summary[name]["score"]) if name in summary else "-"
                for summary in summaries.values()
            ]
            rows.append([name, entry["meta_task"], percent(entry["chance"]), *scores])
        kinds = ", ".join(dict.fromkeys(entry["metric"] for entry in last.values()))
        table = f"{kinds} in percent\n{align(rows)}"
        stats = {
            label: read_similarity(path, list(last))
            for label, path in directories.items()
            if has_similarity(path, last)
        }
        if not stats:
            return table, ""
        picture = workdir / "similarity.png"
        drawing.write_histograms(stats, picture)
        return table, f"similarity of positives and of hard and easy negatives: {picture}"


def _metric_table(summaries: Mapping[str, Mapping], last: Mapping[str, Mapping]) -> str:
    """All metrics of a benchmark without averages."""
    rows = [["metric", *summaries]]
    for task, entry in last.items():
        for name in entry["metrics"]:
            scale = 1 if metrics.is_rank(name) else 100
            values = [
                percent(summary[task]["metrics"].get(name), scale) if task in summary else "-"
                for summary in summaries.values()
            ]
            rows.append([name if len(last) == 1 else f"{task} {name}", *values])
    return f"{', '.join(last)} in percent\n{align(rows)}"


def open_run_benchmark(
    name: str,
    datasets: Sequence[str],
    infos: Sequence[TaskInfo] | None = None,
    dims: Sequence[int] = (),
    prompts: Mapping[str, str] | None = None,
) -> RunBenchmark:
    """The benchmark that `config.eval.benchmark` names.

    Args:
      name: a directory in MMEB's form or with the files of `benchmarks/corpus.py`, or "NAME:DIR" with the name of a
        benchmark that `llave_jax.evaluate` knows.
      datasets: names of its tasks; empty: all that are there.
      infos: the tasks of MMEB's form with their meta-tasks, where they are not MMEB.
      dims: prefixes of the embeddings that are scored too.
      prompts: of the model that is trained; a benchmark without words of its own takes those of queries and documents.

    Returns:
      The benchmark; nothing has been scored.

    Raises:
      FileNotFoundError, ValueError: there is no benchmark in the directory, or a file of it is not as it
        should be, or a package that it needs is not installed.
    """
    kind, colon, place = name.partition(":")
    query, document = side_prompts(prompts or {})
    options = Options(query_prompt=query, document_prompt=document)
    if colon and kind in BENCHMARKS:
        return RunBenchmark(open_benchmark(kind, Path(place), options), datasets, dims)
    directory = Path(name)
    if (directory / "queries.jsonl").is_file():
        return RunBenchmark(Corpus(directory, options), datasets, dims)
    benchmark = Mmeb(directory, infos=infos)
    try:
        benchmark.names()
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"config.eval.benchmark {directory} has neither datasets in MMEB's form "
            "(<dataset>/test-*.parquet or <dataset>.json) nor a corpus of one's own (queries.jsonl)"
        ) from error
    return RunBenchmark(benchmark, datasets, dims)
