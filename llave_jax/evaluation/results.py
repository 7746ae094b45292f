"""Scores of a benchmark: its tasks, their averages, and the tables that are printed.

Owns the arithmetic of averages and the tables' cells. How a task is scored is `scoring.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llave_jax.common.tables import align, percent
from llave_jax.evaluation import forms, metrics
from llave_jax.evaluation.forms import Form
from llave_jax.evaluation.scoring import Result
from llave_jax.evaluation.task import TaskInfo


@dataclasses.dataclass(frozen=True)
class Reference:
    """Published scores of another model, in percent.

    Attributes:
      model: as tables call it.
      tasks: (task, metric) -> score.
      averages: label of an average -> score.
    """

    model: str
    tasks: Mapping[tuple[str, str], float] = dataclasses.field(default_factory=dict)
    averages: Mapping[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Suite:
    """What a benchmark consists of.

    Attributes:
      name: of the benchmark, for tables and files.
      tasks: all of its tasks, in the order of its tables.
      averages: label -> names of the tasks it is over; with a plain mean of their main metrics. None: none.
      references: published scores to stand beside a run's.
    """

    name: str
    tasks: tuple[TaskInfo, ...]
    averages: Mapping[str, tuple[str, ...]] = dataclasses.field(default_factory=dict)
    references: tuple[Reference, ...] = ()


def by_meta_task(tasks: Sequence[TaskInfo]) -> dict[str, tuple[str, ...]]:
    """Averages by meta-task; then IND and OOD, if the benchmark distinguishes them; then overall.

    Args:
      tasks: of the benchmark.

    Returns:
      Label -> names of tasks.
    """
    groups: dict[str, tuple[str, ...]] = {
        meta: tuple(task.name for task in tasks if task.meta_task == meta)
        for meta in dict.fromkeys(task.meta_task for task in tasks)
    }
    for label, value in (("IND", True), ("OOD", False)):
        names = tuple(task.name for task in tasks if task.in_distribution is value)
        groups |= {label: names} if names else {}
    return groups | {"overall": tuple(task.name for task in tasks)}


class Average(NamedTuple):
    """Unweighted mean of the main metrics of a group of tasks.

    Attributes:
      label: of the group.
      value: as a fraction; None unless all tasks of the group were scored.
      chance: the same of random scores; None where a task has none.
      scored: how many of its tasks were scored.
      missing: names of the others.
    """

    label: str
    value: float | None
    chance: float | None
    scored: int
    missing: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run scored of a benchmark.

    Attributes:
      suite: the benchmark.
      tasks: results, in the order in which they were scored.
    """

    suite: Suite
    tasks: tuple[Result, ...]

    def __getitem__(self, name: str) -> Result:
        for result in self.tasks:
            if result.info.name == name:
                return result
        raise KeyError(f"{name!r} was not scored; scored: {[r.info.name for r in self.tasks]}")

    def averages(self, form: Form | None = None) -> tuple[Average, ...]:
        """Means over groups of tasks, each without a value if a task of it was not scored.

        Args:
          form: in which candidates are stored; None: whole, in float32.
        """
        scored = {result.info.name: result for result in self.tasks}
        return tuple(
            _average(label, names, scored, form) for label, names in self.suite.averages.items()
        )

    def by_form(self) -> dict[Form, dict[str, float | None]]:
        """Averages as fractions by label, or the metrics of a benchmark without averages, of each form of candidates."""
        found: dict[Form, dict[str, float | None]] = {}
        for form in self.tasks[0].forms if self.tasks else ():
            if self.suite.averages:
                found[form] = {average.label: average.value for average in self.averages(form)}
            else:
                found[form] = {
                    name if len(self.tasks) == 1 else f"{result.info.name} {name}": value
                    for result in self.tasks
                    for name, value in result.forms[form].items()
                    if name in _SHORT
                }
        return found

    def metrics(self) -> dict[str, float]:
        """Scores by name, for a metrics file: "META-TASK/TASK" and "average/LABEL", or a single task's own metrics.

        Incomplete averages are left out.
        """
        if not self.suite.averages:
            if len(self.tasks) == 1:
                return dict(self.tasks[0].metrics)
            return {f"{r.info.name}/{k}": v for r in self.tasks for k, v in r.metrics.items()}
        values = {f"{r.info.meta_task}/{r.info.name}": r.score for r in self.tasks}
        values |= {f"average/{a.label}": a.value for a in self.averages() if a.value is not None}
        return values

    def summary(self) -> dict[str, Any]:
        """All scores, for a JSON file that reports of later runs compare with."""
        return {
            "tasks": {
                r.info.name: {
                    "meta_task": r.info.meta_task,
                    "metric": r.info.metric,
                    "score": r.score,
                    "chance": r.chance,
                    "queries": r.queries,
                    "metrics": dict(r.metrics),
                    **({"settings": dict(r.settings)} if r.settings else {}),
                }
                for r in self.tasks
            },
            "averages": {a.label: a.value for a in self.averages() if a.value is not None},
            "averages_of": {label: list(names) for label, names in self.suite.averages.items()},
        }

    def table(self) -> str:
        """Tables as text. Of a benchmark with averages: tasks, averages, published results. Otherwise all metrics."""
        if not self.suite.averages:
            tables = [align(self.metric_rows())]
        else:
            tables = [align(self._task_rows(), left=2), align(self._average_rows())]
            if any(reference.averages for reference in self.suite.references):
                tables.append(align(self.comparison()))
        if by_form := self.by_form():
            tables.append(align(forms.rows(by_form)))
        lines = [*self._skipped_lines(), *self._missing_lines()]
        return "\n\n".join(tables) + "".join(f"\n{line}" for line in lines)

    def metric_rows(self) -> list[list[str]]:
        """Cells of a table of all metrics, a column for each task and published model; the heading first."""
        references = [
            (reference, result)
            for result in self.tasks
            for reference in self.suite.references
            if any(task == result.info.name for task, _ in reference.tasks)
        ]
        single = len(self.tasks) == 1
        names = ["%" if single else r.info.name for r in self.tasks]
        rows = [["metric", *names, *(f"{r.model} published, {t.info.name}" for r, t in references)]]
        for name in dict.fromkeys(name for result in self.tasks for name in result.metrics):
            cells = [_cell(name, result.metrics.get(name)) for result in self.tasks]
            published = [r.tasks.get((t.info.name, name)) for r, t in references]
            rows.append([name, *cells, *(percent(value, 1) for value in published)])
        return rows

    def _task_rows(self) -> list[list[str]]:
        kinds = {result.info.metric for result in self.tasks}
        single = len(kinds) == 1
        published = [r for r in self.suite.references if r.tasks]
        head = ["dataset", "meta-task", *([] if single else ["metric"])]
        rows = [
            [
                *head,
                kinds.pop() if single else "%",
                "chance",
                "queries",
                *(f"{r.model} published" for r in published),
            ]
        ]
        for result in self.tasks:
            info = result.info
            cells = [info.name, info.meta_task, *([] if single else [info.metric])]
            cells += [percent(result.score), percent(result.chance), str(result.queries)]
            cells += [percent(r.tasks.get((info.name, info.metric)), 1) for r in published]
            rows.append(cells)
        return rows

    def _average_rows(self) -> list[list[str]]:
        rows = [["average", "%", "chance", "datasets"]]
        for average in self.averages():
            total = average.scored + len(average.missing)
            share = f"{average.scored}/{total}"
            rows.append([average.label, percent(average.value), percent(average.chance), share])
        return rows

    def _skipped_lines(self) -> list[str]:
        skipped = [
            f"{r.info.name} {r.skipped_queries} rows, {r.skipped_candidates} candidates"
            for r in self.tasks
            if r.skipped_queries or r.skipped_candidates
        ]
        return (
            ["", f"Skipped, with neither text nor image: {'; '.join(skipped)}."] if skipped else []
        )

    def _missing_lines(self) -> list[str]:
        scored = {result.info.name for result in self.tasks}
        missing = [task.name for task in self.suite.tasks if task.name not in scored]
        if not missing or not self.suite.averages:
            return []
        return [
            "",
            f"Not scored: {', '.join(missing)}.",
            "An average is given only where all of its datasets were scored.",
        ]

    def comparison(self) -> list[list[str]]:
        """Averages that papers report, this run's below them.

        Returns:
          Rows of cells, the heading first.
        """
        own = {average.label: average.value for average in self.averages()}
        rows = [["model", *own]]
        for reference in self.suite.references:
            if reference.averages:
                cells = [percent(reference.averages.get(label), 1) for label in own]
                rows.append([reference.model, *cells])
        return [*rows, ["this run", *map(percent, own.values())]]


# Metrics that tables of smaller vectors show of a benchmark without averages.
_SHORT = ("R@1", "recall@1", "recall@10", "nDCG@10")


def _average(
    label: str, names: Sequence[str], scored: Mapping[str, Result], form: Form | None
) -> Average:
    missing = tuple(name for name in names if name not in scored)
    present = [scored[name] for name in names if name in scored]
    if missing or not names:
        return Average(label, None, None, len(present), missing)
    values = [
        result.score if form is None else result.forms[form][result.info.metric]
        for result in present
    ]
    chances = [result.chance for result in present if result.chance is not None]
    chance = float(np.mean(chances)) if len(chances) == len(present) else None
    return Average(label, float(np.mean(values)), chance, len(present), ())


def _cell(metric: str, value: float | None) -> str:
    return percent(value, 1 if metrics.is_rank(metric) else 100)
