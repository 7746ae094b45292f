"""Evaluation within a training run, on its mesh and with its parameters.

Scores go to the metrics file and to `WORKDIR/eval/step_N/`. At the end a table compares the trained
with the untrained model and with chance, and a picture shows the similarities of both models.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from llave_jax.common.files import write_text
from llave_jax.common.tables import align
from llave_jax.config import Config
from llave_jax.embedding.embedder import Embedder
from llave_jax.evaluation import drawing, mmeb
from llave_jax.evaluation.mmeb_data import DatasetInfo
from llave_jax.evaluation.results import Results
from llave_jax.evaluation.similarity import SimilarityStats
from llave_jax.evaluation.similarity_comparison import read_similarity
from llave_jax.models.llave import Llave
from llave_jax.training.checkpoint import BestCheckpoint
from llave_jax.training.metrics import MetricsWriter


class TrainingEvaluation:
    """`run` scores the parameters of one step; `report` sums the run up.

    Args:
      config: the run's `config.eval`.
      model, tokenizer: what is trained.
      mesh: where its parameters lie.
      workdir: the run's directory.
      data_dir: the benchmark's directory, in MMEB's form; None: no evaluation.
      infos: its datasets' meta-tasks, where it is not MMEB.
      best: keeps the parameters that score best.
    """

    def __init__(
        self,
        config: Config,
        model: Llave,
        tokenizer: Any,
        mesh: jax.sharding.Mesh,
        workdir: Path,
        data_dir: Path | None,
        infos: Sequence[DatasetInfo] | None = None,
        best: BestCheckpoint | None = None,
    ):
        self._config = config
        self._data_dir = data_dir
        self._infos = infos
        self._directory = workdir / "eval"
        self._workdir = workdir
        self._best = best
        self._embedder = Embedder(model, None, tokenizer, mesh)

    def due(self, step: int, last_step: int) -> bool:
        """Whether this step is to be scored and has not been scored yet.

        A run that was interrupted after its scores were written does not score the step again.

        Args:
          step: optimiser steps done.
          last_step: of the run.

        Returns:
          True at step 0, at the last step and every `eval.every` steps, if there is a benchmark and the
          step has no scores yet.
        """
        if self._data_dir is None:
            return False
        every = self._config.every
        scored = step in (0, last_step) or bool(every and step % every == 0)
        return scored and not self._summary(step).exists()

    def run(self, params: Any, step: int, writer: MetricsWriter) -> None:
        """Scores the parameters of a step, and keeps them if they are the best so far.

        Args:
          params: the parameter tree, in its shards.
          step: optimiser steps done.
          writer: gets the scores as "eval/NAME".

        Raises:
          KeyError: `checkpoint.best_metric` is none of the scores.
        """
        assert self._data_dir is not None  # or no step would be due
        self._embedder.params = params
        results = mmeb.evaluate_mmeb(
            self._embedder.encode,
            self._data_dir,
            self._config.datasets or None,
            self._summary(step).parent,
            infos=self._infos,
        )
        self._embedder.params = None
        scores = results.metrics()
        writer.write(step, {f"eval/{name}": value for name, value in scores.items()})
        if jax.process_index() == 0:
            _write_summary(self._summary(step), results)
        if self._best is not None:
            self._best.offer(step, params, scores)

    def close(self) -> None:
        """Waits for the best parameters to be written."""
        if self._best is not None:
            self._best.close()

    def report(self, last_step: int) -> None:
        """Prints and keeps the final table; draws the similarity histograms.

        Args:
          last_step: of the run; it has been scored.
        """
        if self._data_dir is None or jax.process_index() != 0:
            return
        # If the benchmark was added when the run was continued, the untrained model has no scores.
        first = json.loads(self._summary(0).read_text()) if self._summary(0).exists() else {}
        last = json.loads(self._summary(last_step).read_text())
        rows = [["dataset", "meta-task", "chance", "untrained", "trained"]]
        rows += [
            [
                name,
                entry["meta_task"],
                f"{100 * entry['chance']:.1f}",
                f"{100 * first[name]['accuracy']:.1f}" if name in first else "-",
                f"{100 * entry['accuracy']:.1f}",
            ]
            for name, entry in last.items()
        ]
        table = "precision@1 in percent\n" + align(rows)
        write_text(self._workdir / "results.txt", table + "\n")
        stats = {"trained": self._similarity(last_step, list(last))}
        if last.keys() <= first.keys():
            stats = {"untrained": self._similarity(0, list(last)), **stats}
        picture = self._workdir / "similarity.png"
        drawing.write_histograms(stats, picture)
        print(f"\n{table}\n\nsimilarity of positives and of hard and easy negatives: {picture}")

    def _similarity(self, step: int, names: list[str]) -> SimilarityStats:
        return read_similarity(self._summary(step).parent, names)

    def _summary(self, step: int) -> Path:
        return self._directory / f"step_{step}" / "summary.json"


def _write_summary(path: Path, results: Results) -> None:
    summary = {
        result.info.name: {
            "meta_task": result.info.meta_task,
            "accuracy": result.accuracy,
            "chance": result.chance,
        }
        for result in results.datasets
    }
    write_text(path, json.dumps(summary, indent=2) + "\n")
