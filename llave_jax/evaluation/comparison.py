"""A run's scores beside those of earlier runs: what `summary.json` files say, and tables of differences.

Owns which scores may be compared and the cells of the tables. The page is `report.py`; similarities of several
runs are compared by `similarity_comparison.py`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.common.tables import align, percent
from llave_jax.evaluation import metrics

SUMMARY = "summary.json"
THIS_RUN = "this run"


@dataclasses.dataclass(frozen=True)
class TaskScores:
    """What is compared of a task.

    Attributes:
      meta_task: the group in which it is averaged.
      metric: the main one, a key of `metrics`.
      metrics: name -> fraction, or a rank from 1.
      chance: the main metric of random scores; None where it has no simple form.
      queries: how many were scored.
      settings: what the scores depend on besides the model.
    """

    meta_task: str
    metric: str
    metrics: Mapping[str, float]
    chance: float | None
    queries: int
    settings: Mapping[str, Any]

    @property
    def score(self) -> float:
        """The main metric."""
        return self.metrics[self.metric]


@dataclasses.dataclass(frozen=True)
class Scores:
    """What is compared of a benchmark.

    Attributes:
      tasks: by name.
      averages: label -> names of the tasks that it is over.
      directory: where `<task>_similarity.npz` are; None: nowhere.
    """

    tasks: Mapping[str, TaskScores]
    averages: Mapping[str, tuple[str, ...]]
    directory: Path | None = None

    def value(self, task: str, metric: str) -> float | None:
        """A metric of a task; None if it was not measured."""
        return self.tasks[task].metrics.get(metric) if task in self.tasks else None

    def average(self, tasks: Sequence[str], by: Mapping[str, TaskScores]) -> float | None:
        """Mean over tasks of the metric that another run counts.

        Args:
          tasks: names.
          by: the other run's tasks, which say the metric of each.

        Returns:
          The mean; None if one of the tasks was not scored, in either run.
        """
        values = [self.value(name, by[name].metric) if name in by else None for name in tasks]
        known = [value for value in values if value is not None]
        return float(np.mean(known)) if values and len(known) == len(values) else None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A finished evaluation.

    Attributes:
      label: as tables call it.
      model: that was evaluated.
      benchmarks: scores by the benchmark's name.
    """

    label: str
    model: str
    benchmarks: Mapping[str, Scores]


def from_summary(summary: Mapping[str, Any], directory: Path | None = None) -> Scores:
    """Scores of a benchmark from what its `summary.json` holds.

    Args:
      summary: as `Results.summary` has it.
      directory: of the file.

    Returns:
      The scores.

    Raises:
      ValueError: a part is missing or is not what it should be.
    """
    try:
        tasks = {
            str(name): TaskScores(
                meta_task=str(task["meta_task"]),
                metric=str(task["metric"]),
                metrics={str(k): _number(v) for k, v in task["metrics"].items()},
                chance=None if task["chance"] is None else _number(task["chance"]),
                queries=int(task["queries"]),
                settings=dict(task.get("settings", {})),
            )
            for name, task in summary["tasks"].items()
        }
        averages = {str(k): tuple(map(str, v)) for k, v in summary.get("averages_of", {}).items()}
        for name, task in tasks.items():
            for metric in task.metrics:
                metrics.parse(metric)
            if task.metric not in task.metrics:
                raise ValueError(f"{name} has no {task.metric}, its main metric")
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{type(error).__name__} {error}") from error
    return Scores(tasks, averages, directory)


def _number(value: Any) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"expected a number, found {value!r}")
    return float(value)


def read_evaluations(places: Sequence[str]) -> list[Evaluation]:
    """Reads what evaluations wrote.

    Args:
      places: outputs of `llave_jax.evaluate`, as DIR or LABEL=DIR. The label of DIR is its name.

    Returns:
      The evaluations, in order.

    Raises:
      FileNotFoundError: there is no `summary.json` in DIR or in a folder of it.
      ValueError: such a file is not what an evaluation writes, or two have one label.
    """
    found: list[Evaluation] = []
    for place in places:
        label, _, directory = place.rpartition("=") if not Path(place).is_dir() else ("", "", place)
        evaluation = read_evaluation(directory, label or Path(directory).resolve().name)
        if evaluation.label in [THIS_RUN, *(other.label for other in found)]:
            raise ValueError(
                f"{place}: {evaluation.label!r} is the label of another run; give LABEL=DIR"
            )
        found.append(evaluation)
    return found


def read_evaluation(directory: str | os.PathLike, label: str) -> Evaluation:
    """Reads what one evaluation wrote.

    Args:
      directory: its output: with the files of one benchmark, or a folder for each.
      label: as tables call it.

    Returns:
      The evaluation.

    Raises:
      FileNotFoundError, ValueError: as for `read_evaluations`.
    """
    folder = Path(directory)
    paths = [
        path for path in (folder / SUMMARY, *sorted(folder.glob(f"*/{SUMMARY}"))) if path.is_file()
    ]
    if not paths:
        raise FileNotFoundError(
            f"{folder}: no {SUMMARY} here or in a folder of it; expected the --output of llave_jax.evaluate"
        )
    benchmarks, model = {}, ""
    for path in paths:
        try:
            summary = json.loads(path.read_text(encoding="utf-8"))
            scores, name = from_summary(summary, path.parent), str(summary["benchmark"])
            model = str(summary["model"]["model"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}: not written by this version of llave_jax.evaluate ({error}); run the evaluation again, "
                "which is quick with its cache"
            ) from error
        if name in benchmarks:
            raise ValueError(f"{folder}: two of its {SUMMARY} are of {name}; expected one of each")
        benchmarks[name] = scores
    return Evaluation(label, model, benchmarks)


def of_benchmark(evaluations: Sequence[Evaluation], name: str) -> dict[str, Scores]:
    """The evaluations that scored a benchmark.

    Args:
      evaluations: finished ones.
      name: of the benchmark.

    Returns:
      Label -> scores.
    """
    return {e.label: e.benchmarks[name] for e in evaluations if name in e.benchmarks}


def check_shared(evaluations: Sequence[Evaluation], names: Sequence[str]) -> None:
    """Refuses an evaluation that has nothing to compare with.

    Args:
      evaluations: the baselines.
      names: benchmarks of the run.

    Raises:
      ValueError: one of them scored none of the benchmarks.
    """
    for evaluation in evaluations:
        if not set(names) & set(evaluation.benchmarks):
            raise ValueError(
                f"the baseline {evaluation.label} has {', '.join(evaluation.benchmarks)}; expected scores of "
                f"{', '.join(names)}"
            )


def signed(difference: float | None, scale: float = 100) -> str:
    """A difference with its sign: "+1.2", "-0.3", "0.0", or "-" for None.

    Args:
      difference: of fractions, or of ranks with a scale of 1.
      scale: of the values.
    """
    if difference is None:
        return "-"
    # Adding zero turns -0.0 into 0.0.
    rounded = round(scale * difference, 1) + 0.0
    return f"{rounded:+.1f}" if rounded else "0.0"


def minus(value: float | None, other: float | None) -> float | None:
    """value - other; None if one of them is."""
    return None if value is None or other is None else value - other


def average_rows(
    own: Scores, others: Mapping[str, Scores], label: str = THIS_RUN
) -> list[list[str]]:
    """Averages of a run, of others over the same tasks, and the run's differences to each of these, in points.

    Args:
      own: scores of the run.
      others: label -> scores of another run.
      label: of the run.

    Returns:
      Rows of cells, the heading first; none if the benchmark has no averages.
    """
    values = {
        name: [scores.average(tasks, own.tasks) for scores in (own, *others.values())]
        for name, tasks in own.averages.items()
    }
    rows = [[name, *_cells(found)] for name, found in values.items()]
    return [["average", *_heading(label, others)], *rows] if rows else []


def task_rows(own: Scores, others: Mapping[str, Scores], label: str = THIS_RUN) -> list[list[str]]:
    """The same of each task that any of the runs scored, by its main metric; of a benchmark without averages, by all.

    Args:
      own, others, label: as for `average_rows`.

    Returns:
      Rows of cells, the heading first.
    """
    rows = [["dataset", "metric", *_heading(label, others)]]
    for name, task in _all_tasks([own, *others.values()]).items():
        for metric in [task.metric] if own.averages else task.metrics:
            found = [scores.value(name, metric) for scores in (own, *others.values())]
            rows.append([name, metric, *_cells(found, 1 if metrics.is_rank(metric) else 100)])
    return rows


def _all_tasks(runs: Iterable[Scores]) -> dict[str, TaskScores]:
    """Tasks by name, each as the first run that scored it has it."""
    found: dict[str, TaskScores] = {}
    for scores in runs:
        found = {**found, **{k: v for k, v in scores.tasks.items() if k not in found}}
    return found


def _heading(label: str, others: Iterable[str]) -> list[str]:
    return [label, *(cell for other in others for cell in (other, "difference"))]


def _cells(values: Sequence[float | None], scale: float = 100) -> list[str]:
    own, *others = values
    cells = [percent(own, scale)]
    for other in others:
        cells += [percent(other, scale), signed(minus(own, other), scale)]
    return cells


def unlike(own: Scores, others: Mapping[str, Scores]) -> list[str]:
    """What makes scores of a task differ besides the model: other queries, other settings.

    Args:
      own, others: as for `average_rows`.

    Returns:
      Sentences.
    """
    found = []
    for label, scores in others.items():
        for name, task in own.tasks.items():
            other = scores.tasks.get(name)
            if other is None:
                continue
            here, there = ({"queries": t.queries, **t.settings} for t in (task, other))
            parts = [
                f"{key} {here.get(key, '-')} here, {there.get(key, '-')} there"
                for key in dict.fromkeys([*here, *there])
                if here.get(key) != there.get(key)
            ]
            if parts:
                found.append(f"{name} of {label}: {'; '.join(parts)}.")
    return found


def compared(own: Scores, others: Mapping[str, Scores], label: str = THIS_RUN) -> str:
    """The tables as text; "" if there is nothing to compare with.

    Args:
      own, others, label: as for `average_rows`.
    """
    if not others:
        return ""
    averages = average_rows(own, others, label)
    tables = [
        align(task_rows(own, others, label), left=2),
        *([align(averages)] if averages else []),
    ]
    return "\n\n".join(tables + (["\n".join(lines)] if (lines := unlike(own, others)) else []))
