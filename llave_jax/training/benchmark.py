"""The benchmark that a run is scored on: MMEB's form, digits, or a corpus of one's own.

Owns what `config.eval.benchmark` may name, and what is reported of it. When it is scored is `evaluation.py`.
What it needs is looked up when it is opened, before the first step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from llave_jax.common.files import write_text
from llave_jax.common.tables import align
from llave_jax.evaluation import drawing, mmeb, mmeb_data, retrieval
from llave_jax.evaluation.cache import Encode
from llave_jax.evaluation.forms import Form
from llave_jax.evaluation.mmeb_data import DatasetInfo
from llave_jax.evaluation.similarity_comparison import read_similarity
from llave_jax.parallel.processes import from_first_process

_SUMMARY = "summary.json"


class Benchmark(Protocol):
    """What `evaluation.py` asks of a benchmark."""

    def score(self, encode: Encode, directory: Path) -> dict[str, float]:
        """Scores a model.

        Args:
          encode: items -> float32 [n, D], L2-normalised.
          directory: where the first process keeps what `report` needs.

        Returns:
          Fractions, by name.
        """
        ...

    def report(self, directories: Mapping[str, Path], workdir: Path) -> tuple[str, str]:
        """The table of a run, and where more is to be seen; for the first process.

        Args:
          directories: label ("untrained", "trained") -> a directory of `score`, the trained model last.
            Where the benchmark joined a run that was continued, the untrained model has no scores.
          workdir: the run's, where pictures may be drawn.

        Returns:
          The table, and a line about pictures; "" if there are none.
        """
        ...


def open_benchmark(
    directory: Path,
    datasets: Sequence[str],
    infos: Sequence[DatasetInfo] | None,
    dims: Sequence[int] = (),
) -> Benchmark:
    """The benchmark in a directory.

    Args:
      directory: in MMEB's form, or with the files of `evaluation.retrieval`.
      datasets: names, of MMEB's form; empty: all that are there.
      infos: the datasets' meta-tasks, where it is not MMEB.
      dims: prefixes of the embeddings that are scored too, as "average/overall@DIM" or "nDCG@10@DIM".

    Returns:
      The benchmark; nothing has been scored.

    Raises:
      FileNotFoundError, ValueError: there is no benchmark in the directory, or a file of it is not as it
        should be, or a package that it needs is not installed.
    """
    if (directory / "queries.jsonl").is_file():
        return _Retrieval(directory, dims)
    return _Mmeb(directory, datasets, infos, dims)


def _by_dim(
    name: str,
    of_form: str,
    forms: Sequence[Form],
    scores: Mapping[Form, Mapping[str, float | None]],
) -> dict[str, float]:
    """One score of each form by "NAME@DIM", in all processes; the first has the scores."""
    found = np.full(len(forms), np.nan)
    for index, form in enumerate(forms if scores else ()):
        value = scores[form][of_form]
        found[index] = np.nan if value is None else value
    values = zip(forms, from_first_process(found).tolist(), strict=True)
    return {f"{name}@{form.dim}": value for form, value in values if not np.isnan(value)}


class _Mmeb:
    def __init__(
        self,
        directory: Path,
        datasets: Sequence[str],
        infos: Sequence[DatasetInfo] | None,
        dims: Sequence[int],
    ):
        there = mmeb_data.dataset_names(directory, infos or mmeb_data.MMEB_DATASETS)
        if not there:
            raise FileNotFoundError(
                f"config.eval.benchmark {directory} has neither datasets in MMEB's form "
                "(<dataset>/test-*.parquet or <dataset>.json) nor a corpus of one's own (queries.jsonl)"
            )
        if missing := [name for name in datasets if name not in there]:
            raise ValueError(
                f"config.eval.datasets names {missing}; {directory} has {', '.join(there)}"
            )
        self._directory, self._datasets, self._infos = directory, datasets, infos
        self._forms = [Form(dim) for dim in dims]

    def score(self, encode: Encode, directory: Path) -> dict[str, float]:
        results = mmeb.evaluate_mmeb(
            *(encode, self._directory, self._datasets or None, directory),
            infos=self._infos,
            forms=self._forms,
        )
        if jax.process_index() == 0:
            summary = {
                result.info.name: {
                    "meta_task": result.info.meta_task,
                    "accuracy": result.accuracy,
                    "chance": result.chance,
                }
                for result in results.datasets
            }
            write_text(directory / _SUMMARY, json.dumps(summary, indent=2) + "\n")
        by_dim = _by_dim("average/overall", "overall", self._forms, results.by_form())
        return results.metrics() | by_dim

    def report(self, directories: Mapping[str, Path], workdir: Path) -> tuple[str, str]:
        summaries = {
            label: json.loads((path / _SUMMARY).read_text()) if (path / _SUMMARY).exists() else {}
            for label, path in directories.items()
        }
        *_, last = summaries.values()
        rows = [["dataset", "meta-task", "chance", *summaries]]
        for name, entry in last.items():
            scores = [
                f"{100 * summary[name]['accuracy']:.1f}" if name in summary else "-"
                for summary in summaries.values()
            ]
            rows.append([name, entry["meta_task"], f"{100 * entry['chance']:.1f}", *scores])
        stats = {
            label: read_similarity(path, list(last))
            for label, path in directories.items()
            if last.keys() <= summaries[label].keys()
        }
        picture = workdir / "similarity.png"
        drawing.write_histograms(stats, picture)
        note = f"similarity of positives and of hard and easy negatives: {picture}"
        return f"precision@1 in percent\n{align(rows)}", note


class _Retrieval:
    def __init__(self, directory: Path, dims: Sequence[int]):
        retrieval.check_installed()
        self._task = retrieval.read_task(directory)
        self._forms = [Form(dim) for dim in dims]

    def score(self, encode: Encode, directory: Path) -> dict[str, float]:
        result = retrieval.evaluate_retrieval(encode, self._task, directory, forms=self._forms)
        return result.metrics | _by_dim("nDCG@10", "nDCG@10", self._forms, result.forms)

    def report(self, directories: Mapping[str, Path], workdir: Path) -> tuple[str, str]:
        metrics = {
            label: retrieval.read_metrics(path) if path.exists() else {}
            for label, path in directories.items()
        }
        *_, last = metrics.values()
        rows = [["metric", *metrics]]
        for name in last:
            scores = [f"{100 * m[name]:.1f}" if name in m else "-" for m in metrics.values()]
            rows.append([name, *scores])
        return f"retrieval in percent\n{align(rows)}", ""
