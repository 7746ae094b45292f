"""Scores of a benchmark run: per dataset, their averages, and the table that is printed.

Owns the arithmetic of averages and the tables' cells. How answers are scored is `mmeb.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llave_jax.common.tables import align, percent
from llave_jax.evaluation import forms, published
from llave_jax.evaluation.forms import Form
from llave_jax.evaluation.mmeb_data import META_TASKS, MMEB_DATASETS, DatasetInfo


@dataclasses.dataclass(frozen=True)
class DatasetResult:
    """Answers for one dataset.

    Attributes:
      info: name and meta-task of the dataset.
      predictions: int32 [rows], position of the chosen candidate in the row's list.
      chance: expected precision@1 of random scores.
      scores: for each row float32 [candidates], cosine with the query; None on processes other than
        the first.
      candidates: for each row int32 [candidates]; equal ids are one content that is given twice.
      skipped_rows: rows that are not scored: their query or positive has neither text nor image.
      skipped_candidates: candidates without text and image in the rows that are scored.
      forms: predictions, int32 [rows], with candidates stored in a smaller form; {} on processes other than the
        first.
    """

    info: DatasetInfo
    predictions: np.ndarray
    chance: float
    scores: tuple[np.ndarray, ...] | None = None
    candidates: tuple[np.ndarray, ...] = ()
    skipped_rows: int = 0
    skipped_candidates: int = 0
    forms: Mapping[Form, np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def num_pred(self) -> int:
        """Rows that were scored."""
        return len(self.predictions)

    @property
    def num_correct(self) -> int:
        """Rows whose positive, candidate 0, was chosen."""
        return int(np.count_nonzero(self.predictions == 0))

    @property
    def accuracy(self) -> float:
        """Precision@1, as a fraction."""
        return self.num_correct / self.num_pred


class Average(NamedTuple):
    """Unweighted mean over a group of datasets.

    Attributes:
      label: of the group.
      value: precision@1 as a fraction; None unless all datasets of the group were scored.
      chance: the same of random scores.
      scored: how many of its datasets were scored.
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
      datasets: their results, in the order in which they were scored.
      infos: all datasets of the benchmark.
    """

    datasets: tuple[DatasetResult, ...]
    infos: tuple[DatasetInfo, ...] = MMEB_DATASETS

    @property
    def is_mmeb(self) -> bool:
        """Whether these are results for MMEB, so that published numbers compare with them."""
        return self.infos == MMEB_DATASETS

    def __getitem__(self, name: str) -> DatasetResult:
        for result in self.datasets:
            if result.info.name == name:
                return result
        raise KeyError(f"{name!r} was not scored; scored: {[r.info.name for r in self.datasets]}")

    def average(self, label: str, infos: Sequence[DatasetInfo]) -> Average:
        """Unweighted mean over some datasets.

        Args:
          label: of the group.
          infos: the datasets of the group.

        Returns:
          The mean, without a value if a dataset was not scored.
        """
        scored = {result.info.name: result for result in self.datasets}
        missing = tuple(info.name for info in infos if info.name not in scored)
        present = [scored[info.name] for info in infos if info.name in scored]
        if missing or not infos:
            return Average(label, None, None, len(present), missing)
        value = float(np.mean([result.accuracy for result in present]))
        chance = float(np.mean([result.chance for result in present]))
        return Average(label, value, chance, len(present), ())

    def averages(self) -> tuple[Average, ...]:
        """By meta-task; then IND and OOD, if the benchmark distinguishes them; then overall."""
        tasks = dict.fromkeys(info.meta_task for info in self.infos)
        order = [t for t in META_TASKS if t in tasks] + [t for t in tasks if t not in META_TASKS]
        groups = [(task, [i for i in self.infos if i.meta_task == task]) for task in order]
        for label, value in (("IND", True), ("OOD", False)):
            groups.append((label, [i for i in self.infos if i.in_distribution is value]))
        groups = [(label, infos) for label, infos in groups if infos]
        groups.append(("overall", list(self.infos)))
        return tuple(self.average(label, infos) for label, infos in groups)

    def by_form(self) -> dict[Form, dict[str, float | None]]:
        """Averages as fractions by label, of each form in which candidates were stored."""
        found = {}
        for form in self.datasets[0].forms if self.datasets else ():
            datasets = (dataclasses.replace(r, predictions=r.forms[form]) for r in self.datasets)
            averages = Results(tuple(datasets), self.infos).averages()
            found[form] = {average.label: average.value for average in averages}
        return found

    def metrics(self) -> dict[str, float]:
        """Accuracies and averages as fractions, by name, for a metrics file. Incomplete averages are left
        out.
        """
        values = {f"{r.info.meta_task}/{r.info.name}": r.accuracy for r in self.datasets}
        values |= {f"average/{a.label}": a.value for a in self.averages() if a.value is not None}
        return values

    def table(self) -> str:
        """Tables as text: datasets, averages and, for MMEB, published results. In percent."""
        rows = [["dataset", "meta-task", "precision@1", "chance", "correct"]]
        rows += [
            [
                result.info.name,
                result.info.meta_task,
                f"{100 * result.accuracy:.1f}",
                f"{100 * result.chance:.1f}",
                f"{result.num_correct}/{result.num_pred}",
            ]
            for result in self.datasets
        ]
        if self.is_mmeb:
            rows[0].append("LLaVE-7B published")
            for row in rows[1:]:
                row.append(percent(published.LLAVE_7B_DATASETS.get(row[0]), 1))
        text = align(rows) + "\n\n" + align(self._average_rows())
        if self.is_mmeb:
            text += "\n\n" + align(self.comparison())
        if by_form := self.by_form():
            text += "\n\n" + align(forms.rows(by_form))
        lines = [*self._skipped_lines(), *self._missing_lines()]
        return text + "".join(f"\n{line}" for line in lines)

    def _average_rows(self) -> list[list[str]]:
        rows = [["average", "", "precision@1", "chance", "datasets"]]
        for average in self.averages():
            total = average.scored + len(average.missing)
            rows.append(
                [
                    average.label,
                    "",
                    percent(average.value),
                    percent(average.chance),
                    f"{average.scored}/{total}",
                ]
            )
        return rows

    def _skipped_lines(self) -> list[str]:
        skipped = [
            f"{r.info.name} {r.skipped_rows} rows, {r.skipped_candidates} candidates"
            for r in self.datasets
            if r.skipped_rows or r.skipped_candidates
        ]
        return (
            ["", f"Skipped, with neither text nor image: {'; '.join(skipped)}."] if skipped else []
        )

    def _missing_lines(self) -> list[str]:
        (overall,) = (a for a in self.averages() if a.label == "overall")
        if not overall.missing:
            return []
        return [
            "",
            f"Not scored: {', '.join(overall.missing)}.",
            "An average is given only where all of its datasets were scored.",
        ]

    def comparison(self) -> list[list[str]]:
        """Averages that papers report for MMEB, this run's below them.

        Returns:
          Rows of cells, the heading first.
        """
        labels = (*META_TASKS, "IND", "OOD", "overall")
        own = {average.label: average.value for average in self.averages()}
        rows = [["model", *labels]]
        for row in (*published.MMEB, *published.ABLATIONS.values()):
            values = [getattr(row, label.lower()) for label in labels]
            rows.append([row.model, *(percent(value, 1) for value in values)])
        rows.append(["this run", *(percent(own[label]) for label in labels)])
        return rows
