"""Evaluation within a training run, on its mesh and with its parameters: when, and what follows from it.

Scores of the benchmark (`benchmark.py`) and of held-out pairs (`validation.py`) go to the metrics file, the
benchmark's files to `WORKDIR/eval/step_N/`. The best parameters are kept, and a run that no longer gets
better may be stopped. At the end a table compares the trained with the untrained model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llave_jax.common.files import write_text
from llave_jax.common.tables import align
from llave_jax.config import Config
from llave_jax.embedding.embedder import Embedder
from llave_jax.parallel.processes import from_first_process
from llave_jax.training import validation
from llave_jax.training.benchmark import RunBenchmark
from llave_jax.training.best import BEST, BestCheckpoint, is_better
from llave_jax.training.metrics import BENCHMARK, VALIDATION, MetricsWriter, read_metrics
from llave_jax.training.validation import Validation

log = logging.getLogger(__name__)


class TrainingEvaluation:
    """`run` scores the parameters of one step; `report` sums the run up.

    Args:
      config: the run's.
      embedder: of the model that is trained, without parameters.
      workdir: the run's directory. Its metrics file has no lines of steps after `start`.
      start: steps done before this process began.
      benchmark: what is scored; None: no benchmark.
      held_out: the pairs that are scored; None: none.
      best: keeps the parameters that score best.

    Raises:
      ValueError: the config asks for the best parameters, or for an end, by scores that there are not.
    """

    def __init__(
        self,
        config: Config,
        embedder: Embedder,
        workdir: Path,
        start: int,
        benchmark: RunBenchmark | None = None,
        held_out: Validation | None = None,
        best: BestCheckpoint | None = None,
    ):
        self._config = config.eval
        self._metric = config.checkpoint.best_metric
        self._embedder = embedder
        self._workdir = workdir
        self._start = start
        self._benchmark = benchmark
        self._held_out = held_out
        self._best = best
        self._check()
        lines = read_metrics(workdir) if jax.process_index() == 0 else []
        names = {name for line in lines if line["step"] == start for name in line}
        scored = [any(n.startswith(prefix) for n in names) for prefix in (BENCHMARK, VALIDATION)]
        self._benchmark_scored, self._held_out_scored = from_first_process(np.array(scored))
        # Of the first process: the scores by which the run may end, by step.
        name = _in_file(self._metric or "")
        self._history = {int(line["step"]): line[name] for line in lines if name in line}
        self.has_stopped = self._must_stop()

    def _check(self) -> None:
        metric = self._metric
        if metric is None and self._config.patience is not None:
            raise ValueError(
                "config.eval.patience needs config.checkpoint.best_metric, the score that is to get better"
            )
        if metric is None:
            return
        if self._benchmark is None and self._held_out is None:
            raise ValueError(
                "config.checkpoint.best_metric needs config.eval.benchmark or config.data.held_out"
            )
        known = [VALIDATION + name for name in validation.SCORES] if self._held_out else []
        if metric not in known and (self._benchmark is None or metric.startswith(VALIDATION)):
            there = ", ".join(known) or "those of config.eval.benchmark"
            raise ValueError(f"config.checkpoint.best_metric is {metric!r}; there are {there}")

    def due(self, step: int, last_step: int) -> bool:
        """Whether this step is to be scored and has not been scored yet.

        Args:
          step: optimiser steps done.
          last_step: of the run.

        Returns:
          True at step 0, at the last step and every `eval.every` steps, if there is something to score that
          has no scores yet.
        """
        every = self._config.every
        if step not in (0, last_step) and not (every and step % every == 0):
            return False
        return bool(self._to_score(step))

    def _to_score(self, step: int) -> set[str]:
        """BENCHMARK and VALIDATION: what there is. At the first step, what has no line in the metrics file."""
        at_start = step == self._start
        parts = set()
        if self._benchmark is not None and not (at_start and self._benchmark_scored):
            parts.add(BENCHMARK)
        if self._held_out is not None and not (at_start and self._held_out_scored):
            parts.add(VALIDATION)
        return parts

    def run(
        self,
        params: Any,
        step: int,
        writer: MetricsWriter,
        committed: Callable[[], None] = lambda: None,
        learned: Mapping[str, jax.Array] | None = None,
    ) -> None:
        """Scores the parameters of a step, and keeps them if they are the best so far.

        Afterwards `has_stopped` says whether the run is to end.

        Args:
          params: the parameter tree, in its shards.
          step: optimiser steps done.
          writer: gets the scores as "eval/NAME" and "validation/NAME".
          committed: waits for the checkpoint of this step. Scores are written after it and after the best
            parameters, so that what a run that goes on finds written need not be done again.
          learned: what the loss has learned, `TrainState.loss`.

        Raises:
          ValueError: `checkpoint.best_metric` is none of the scores, or a pair or item cannot be read.
        """
        parts, scores = self._to_score(step), {}
        self._embedder.params = params
        if VALIDATION in parts:
            assert self._held_out is not None
            found = self._held_out.score(self._embedder, learned)
            log.info("step %d, %s", step, validation.summary(found, len(self._held_out)))
            scores |= {VALIDATION + name: value for name, value in found.items()}
        if BENCHMARK in parts:
            assert self._benchmark is not None
            found = self._benchmark.score(self._embedder.encode, self._directory(step))
            scores |= {BENCHMARK + name: value for name, value in found.items()}
        self._embedder.params = None
        if self._best is not None:
            self._offer(params, step, parts, scores)
        committed()
        writer.write(step, scores)
        self.has_stopped = self._must_stop()

    def _offer(self, params: Any, step: int, parts: set[str], scores: dict[str, float]) -> None:
        assert self._best is not None
        name = _in_file(str(self._metric))
        if name not in scores:
            # Where the benchmark joined a run that was continued, one of the two is scored alone.
            if len(parts) == 1 and not name.startswith(tuple(parts)):
                return
            there = ", ".join(sorted(n.removeprefix(BENCHMARK) for n in scores))
            raise ValueError(
                f"config.checkpoint.best_metric is {self._metric!r}, which is not scored; there are {there}"
            )
        self._best.offer(step, params, scores[name])
        self._history[step] = scores[name]

    def _must_stop(self) -> bool:
        """Whether the score has not become better `eval.patience` times in a row; alike in all processes."""
        patience = self._config.patience
        if patience is None:
            return False
        steps = sorted(self._history)
        best = self._best_step()
        stop = bool(steps) and len(steps) - 1 - steps.index(best) >= patience
        stop = bool(from_first_process(np.array(stop)))
        if stop and jax.process_index() == 0:
            log.info("%s", self._reason())
        return stop

    def _best_step(self) -> int:
        best = -1
        for step in sorted(self._history):
            if best < 0 or is_better(self._metric, self._history[step], self._history[best]):
                best = step
        return best

    def _reason(self) -> str:
        best = self._best_step()
        return (
            f"stopped early at step {max(self._history)}: {self._metric} was best at step {best} "
            f"({self._history[best]:.4f}) and has not become better in {self._config.patience} evaluations. "
            f"The parameters of step {best} are {self._workdir / BEST}. To go on, run again with a larger "
            "--config.eval.patience, or None"
        )

    def best(self) -> str:
        """What is said of the best parameters; nothing without `checkpoint.best_metric`."""
        if not self._history or self._metric is None:
            return ""
        step = self._best_step()
        return f"{self._metric} {self._history[step]:.4f}, step {step}"

    def close(self) -> None:
        """Waits for the best parameters to be written."""
        if self._best is not None:
            self._best.close()

    def report(self, last_step: int) -> None:
        """Prints and keeps the final tables; draws the similarity histograms.

        Args:
          last_step: of the run, or the one at which it was stopped; it has been scored.
        """
        if jax.process_index() != 0:
            return
        texts, note = [], ""
        if self._held_out is not None:
            texts.append(self._validation_table(last_step, len(self._held_out)))
        if self._benchmark is not None:
            directories = {
                "untrained": self._directory(0),
                "trained": self._directory(last_step),
            }
            table, note = self._benchmark.report(directories, self._workdir)
            texts.append(table)
        if self.has_stopped:
            texts.append(self._reason())
        if texts:
            text = "\n\n".join(texts)
            write_text(self._workdir / "results.txt", text + "\n")
            print(f"\n{text}\n\n{note}".rstrip())

    def _validation_table(self, last_step: int, pairs: int) -> str:
        lines = [line for line in read_metrics(self._workdir) if f"{VALIDATION}loss" in line]
        by_step = {int(line["step"]): line for line in lines}
        columns = {"untrained": 0, "trained": last_step}
        if self._best is not None and self._history:
            columns["best"] = self._best_step()
        columns = {label: step for label, step in columns.items() if step in by_step}
        rows = [["held-out pairs", *(f"{label} (step {s})" for label, s in columns.items())]]
        for name in validation.SCORES:
            values = [by_step[step][VALIDATION + name] for step in columns.values()]
            is_loss = name.endswith("loss")
            rows.append([name, *(f"{v:.4f}" if is_loss else f"{100 * v:.1f}" for v in values)])
        return f"{pairs} held-out pairs in one pool, recall in percent\n{align(rows)}"

    def _directory(self, step: int) -> Path:
        return self._workdir / "eval" / f"step_{step}"


def _in_file(metric: str) -> str:
    """The name in the metrics file of a `checkpoint.best_metric`."""
    return metric if metric.startswith((VALIDATION, BENCHMARK)) else BENCHMARK + metric
