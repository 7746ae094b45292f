"""The page of an evaluation: scores beside baselines and published ones, bars, similarities, examples of answers.

Owns what is shown of benchmarks, all in the same way. How it looks is `report_html.py` and `report_drawing.py`; which
answers are shown is `report_examples.py`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llave_jax.common.files import write_text
from llave_jax.common.tables import percent
from llave_jax.evaluation import metrics, report_examples
from llave_jax.evaluation import report_drawing as drawing
from llave_jax.evaluation import report_html as html
from llave_jax.evaluation.benchmarks.base import Benchmark
from llave_jax.evaluation.comparison import (
    THIS_RUN,
    Evaluation,
    Scores,
    average_rows,
    from_summary,
    minus,
    of_benchmark,
    signed,
    task_rows,
    unlike,
)
from llave_jax.evaluation.forms import Form, rows
from llave_jax.evaluation.report_html import Bar, Cell, Chapter, Mark, Section
from llave_jax.evaluation.results import Reference, Results
from llave_jax.evaluation.similarity import SimilarityStats
from llave_jax.evaluation.similarity_comparison import (
    comparison_rows,
    has_similarity,
    read_similarity,
)
from llave_jax.parallel.processes import only_on_first

# Baselines and published models that have a mark on the bars; tables have all.
_MARKED = 2
# With more tasks than these, galleries have headings by meta-task.
_UNGROUPED = 10


@dataclasses.dataclass(frozen=True)
class _Part:
    """What is shown of a benchmark's scores.

    Attributes:
      name: of the benchmark.
      label: of the run.
      own: scores of the run.
      others: label -> scores of baselines.
      references: published scores.
      similarities: of the run, by task.
    """

    name: str
    label: str
    own: Scores
    others: Mapping[str, Scores]
    references: Sequence[Reference]
    similarities: Mapping[str, SimilarityStats]

    @property
    def detailed(self) -> list[Reference]:
        """Published models with scores of tasks, not of averages alone."""
        return [reference for reference in self.references if reference.tasks]

    def average(self, label: str, scores: Scores) -> float | None:
        """Of this run or of a baseline, over the run's tasks."""
        return scores.average(self.own.averages[label], self.own.tasks)


def write_report(
    path: str | os.PathLike,
    entries: Mapping[str, tuple[Benchmark, Results]],
    *,
    model: str,
    baselines: Sequence[Evaluation] = (),
) -> None:
    """Write the page of an evaluation. First process only: results need answers.

    Args:
      path: the HTML file.
      entries: benchmark's name -> the benchmark, and what was scored of it.
      model: for the head of the page.
      baselines: finished evaluations to compare with.
    """
    gallery = report_examples.Gallery(sum(len(results.tasks) for _, results in entries.values()))
    parts, chapters = [], []
    for name, (benchmark, results) in entries.items():
        found = {r.info.name: only_on_first(r.answers).similarity for r in results.tasks}
        part = _Part(
            name=name,
            label=THIS_RUN,
            own=from_summary(results.summary()),
            others=of_benchmark(baselines, name),
            references=results.suite.references,
            similarities={task: stats for task, stats in found.items() if stats is not None},
        )
        parts.append(part)
        sections = [
            *_scores(part),
            *_smaller_vectors(results.by_form()),
            Section("Similarity of positives and negatives", _similarities(part)),
            Section("Answers", _galleries(benchmark, results, gallery)),
        ]
        chapters.append(Chapter(name, sections))
    _write(path, parts, chapters, model, baselines)


def write_comparison(
    path: str | os.PathLike, evaluation: Evaluation, baselines: Sequence[Evaluation]
) -> None:
    """Write a page of a finished evaluation beside others, from their files. It has no answers.

    Args:
      path: the HTML file.
      evaluation: whose scores are compared.
      baselines: with which.
    """
    parts, chapters = [], []
    for name, own in evaluation.benchmarks.items():
        similarities = {
            task: read_similarity(own.directory, [task])
            for task in own.tasks
            if own.directory is not None and has_similarity(own.directory, [task])
        }
        others = of_benchmark(baselines, name)
        part = _Part(name, evaluation.label, own, others, (), similarities)
        parts.append(part)
        similar = Section("Similarity of positives and negatives", _similarities(part))
        chapters.append(Chapter(name, [*_scores(part), similar]))
    _write(path, parts, chapters, evaluation.model, baselines)


def _write(
    path: str | os.PathLike,
    parts: Sequence[_Part],
    chapters: Sequence[Chapter],
    model: str,
    baselines: Sequence[Evaluation],
) -> None:
    tasks = [task for part in parts for task in part.own.tasks.values()]
    queries = sum(task.queries for task in tasks)
    subtitle = f"{model}: {len(tasks)} {'task' if len(tasks) == 1 else 'tasks'}, {queries} queries"
    lead = "".join(html.paragraph(f"{other.label}: {other.model}") for other in baselines)
    lead += html.print_note("Parts that are folded are not printed.")
    if len(parts) > 1:
        lead += _overview(parts, [other.label for other in baselines])
    title = f"Evaluation: {', '.join(part.name for part in parts)}"
    write_text(Path(path), html.page(title, subtitle, chapters, lead))


def _overview(parts: Sequence[_Part], labels: Sequence[str]) -> str:
    """One table over all benchmarks: the last average of each, or the main metric of each task."""
    has_published = any(part.references for part in parts)
    compared = [cell for label in labels for cell in (label, "difference")]
    head = ["benchmark", "score", parts[0].label, *compared, "chance", "tasks"]
    rows = [[*head, *(["published"] if has_published else [])]]
    for part in parts:
        own, others = part.own, [part.others.get(label) for label in labels]
        lines: list[
            tuple[str, list[float | None], float | None, list[tuple[str, float | None]]]
        ] = []
        if own.averages:
            label = list(own.averages)[-1]
            values = [s and part.average(label, s) for s in (own, *others)]
            found = [(r.model, r.averages.get(label)) for r in part.detailed]
            lines.append((label, values, _chance(part, label), found))
        else:
            for name, task in own.tasks.items():
                values = [s and s.value(name, task.metric) for s in (own, *others)]
                found = [(r.model, r.tasks.get((name, task.metric))) for r in part.detailed]
                lines.append((f"{name} {task.metric}", values, task.chance, found))
        for score, values, chance, found in lines:
            cells = [percent(values[0])]
            for value in values[1:]:
                cells += [percent(value), signed(minus(values[0], value))]
            published = ", ".join(f"{v:.1f} {model}" for model, v in found if v is not None)
            last = [published or "-"] if has_published else []
            rows.append([part.name, score, *cells, percent(chance), str(len(own.tasks)), *last])
    return html.table(_coloured(rows), name="All benchmarks", left=2)


def _chance(part: _Part, label: str) -> float | None:
    found = [
        part.own.tasks[name].chance for name in part.own.averages[label] if name in part.own.tasks
    ]
    known = [chance for chance in found if chance is not None]
    complete = len(known) == len(part.own.averages[label])
    return float(np.mean(known)) if known and complete else None


def _coloured(
    rows: Sequence[Sequence[str]], metric_column: int | None = None
) -> list[list[str | Cell]]:
    """Differences in green where they are gains, in red where they are losses."""
    head, *body = rows
    coloured: list[list[str | Cell]] = [list(head)]
    for row in body:
        less_is_better = metric_column is not None and metrics.is_rank(row[metric_column])
        cells: list[str | Cell] = []
        for name, cell in zip(head, row, strict=True):
            gain = name == "difference" and cell[0] in "+-" and len(cell) > 1
            better = (cell[0] == "+") != less_is_better if gain else False
            cells.append(Cell(cell, "good" if better else "bad") if gain else cell)
        coloured.append(cells)
    return coloured


def _scores(part: _Part) -> list[Section]:
    if not part.own.averages:
        return [Section("Metrics", _task_table(part) + _unlike(part))]
    tasks = html.folded("Table of all datasets", _task_table(part))
    return [
        Section("Averages", _averages(part)),
        Section("Datasets", _bars(part) + _unlike(part) + tasks),
    ]


def _unlike(part: _Part) -> str:
    return "".join(html.paragraph(line) for line in unlike(part.own, part.others))


def _averages(part: _Part) -> str:
    own, tiles, absent = part.own, [], []
    for label, tasks in own.averages.items():
        value, missing = part.average(label, own), [name for name in tasks if name not in own.tasks]
        absent = missing
        if value is None:
            scored = f"{len(tasks) - len(missing)} of {len(tasks)}"
            tiles.append((label, "-", [("scored", scored)]))
            continue
        notes = [(o, _against(value, part.average(label, s))) for o, s in part.others.items()]
        chance = _chance(part, label)
        notes += [] if chance is None else [("chance", percent(chance))]
        tiles.append((label, percent(value), notes))
    content = html.tiles(tiles)
    if part.others:
        compared = _coloured(average_rows(own, part.others, part.label))
        title = "Table of averages and differences"
        content += html.folded(title, html.table(compared, name=title))
    if any(reference.averages for reference in part.references):
        content += html.table(
            _published_rows(part), own=(part.label,), name="Averages beside published ones"
        )
    if absent:
        content += html.paragraph(
            f"Not scored: {', '.join(absent)}. An average is given only where all of its datasets "
            "were scored."
        )
    return content


def _against(value: float, other: float | None) -> str:
    return "-" if other is None else f"{percent(other)} ({signed(minus(value, other))})"


def _published_rows(part: _Part) -> list[list[str]]:
    """Averages of published models, of baselines, and of this run."""
    labels = list(part.own.averages)
    found = [["model", *labels]]
    for reference in part.references:
        if reference.averages:
            cells = [percent(reference.averages.get(label), 1) for label in labels]
            found.append([reference.model, *cells])
    for name, scores in {**part.others, part.label: part.own}.items():
        found.append([name, *(percent(part.average(label, scores)) for label in labels)])
    return found


def _task_table(part: _Part) -> str:
    """Scores and differences with chance, numbers of queries and published scores."""
    own, published = part.own, part.detailed
    head, *body = task_rows(own, part.others, part.label)
    with_chance = any(task.chance is not None for task in own.tasks.values())
    names = [*(["chance"] if with_chance else []), "queries"]
    found = [[*head, *names, *(f"{r.model} published" for r in published)]]
    for row in body:
        name, metric = row[:2]
        task = own.tasks.get(name)
        chance = task.chance if task is not None and metric == task.metric else None
        queries = "-" if task is None else str(task.queries)
        references = [percent(r.tasks.get((name, metric)), 1) for r in published]
        chances = [percent(chance)] if with_chance else []
        found.append([*row, *chances, queries, *references])
    return html.table(_coloured(found, 1), name="Scores of all datasets", left=2)


def _bars(part: _Part) -> str:
    own = part.own
    others, published = list(part.others.items())[:_MARKED], part.detailed[:_MARKED]
    marks = [Mark("chance", "chance", written=False)]
    marks += [Mark(label, f"base{n}") for n, (label, _) in enumerate(others)]
    styles = ("first", "second")
    marks += [Mark(r.model, style) for style, r in zip(styles, published, strict=False)]
    groups: dict[str, list[Bar]] = {}
    for name, task in own.tasks.items():
        values = [scores.value(name, task.metric) for _, scores in others]
        found = [_percent(value) for value in (task.chance, *values)]
        found += [reference.tasks.get((name, task.metric)) for reference in published]
        heading = f"{task.meta_task} ({task.metric})"
        groups.setdefault(heading, []).append(Bar(name, _percent(task.score), found))
    for heading, bars in groups.items():
        label = own.tasks[bars[0].label].meta_task
        value = part.average(label, own) if label in own.averages else None
        if len(bars) > 1 and value is not None:
            found = [_chance(part, label), *(part.average(label, scores) for _, scores in others)]
            means = [*map(_percent, found), *(r.averages.get(label) for r in published)]
            groups[heading] = [*bars, Bar("mean", _percent(value), means, mean=True)]
    return html.bars(groups, marks, part.label)


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _smaller_vectors(scores: Mapping[Form, Mapping[str, float | None]]) -> Iterable[Section]:
    """The section on forms of vectors, where any were scored."""
    if not scores:
        return
    names = list(next(iter(scores.values())))
    # The last average is the one over all tasks; of metrics the first one counts.
    name = "overall" if "overall" in names else names[0]
    series: dict[str, list[tuple[int, float]]] = {}
    for form, values in scores.items():
        value = values[name]
        if value is not None:
            series.setdefault(form.precision, []).append((form.dim, 100 * value))
    content = ""
    if len({size for found in series.values() for size, _ in found}) >= 3:
        content += html.legend([(drawing.line_swatch(n), label) for n, label in enumerate(series)])
        content += html.figures({f"{name} in percent": drawing.lines(series, name)})
    content += html.table(rows(scores), name="Scores by form of vectors", left=2)
    content += html.paragraph(
        "What is found is stored in these forms; queries are not rounded. int8 is calibrated by dimension on "
        "what is stored. Binary vectors are searched by Hamming distance, and the best are rescored."
    )
    yield Section("Smaller vectors", content)


def _similarities(part: _Part) -> str:
    found = part.similarities
    if not found:
        return html.paragraph("No query has a candidate besides its positive.")
    folders = {label: s.directory for label, s in part.others.items() if s.directory is not None}
    folders = {
        label: folder
        for label, folder in folders.items()
        if any(has_similarity(folder, [name]) for name in found)
    }
    shared = [n for n in found if all(has_similarity(f, [n]) for f in folders.values())]
    if not shared:
        folders, shared = {}, list(found)
    stats = {
        name: {
            part.label: found[name],
            **{label: read_similarity(folder, [name]) for label, folder in folders.items()},
        }
        for name in shared
    }
    together = {
        label: SimilarityStats.together([by_label[label] for by_label in stats.values()])
        for label in (part.label, *folders)
    }
    axes = drawing.limits(together.values())
    which = "all datasets" if len(shared) == len(part.own.tasks) else f"{len(shared)} datasets"
    note = html.paragraph(
        "Cosine of queries with their positive, their 5 most similar other candidates (hard) and "
        f"their 5 least similar ones (easy), over {which}. Dashed: means."
    )
    kinds = html.legend([(drawing.kind_swatch(k), text) for k, text in drawing.LABELS.items()])
    pictures = {
        f"{label}: mean positive {positive}, hard {hard}, easy {easy}; overlap of positive and hard {overlap}": (
            drawing.histogram(together[label], axes)
        )
        for label in together
        for positive, hard, easy, overlap in [together[label].cells()]
    }
    table = comparison_rows({"all": together, **stats} if len(stats) > 1 else stats)
    return (
        note
        + kinds
        + html.figures(pictures)
        + html.folded("Means per dataset", html.table(table, name="Mean cosines", left=2))
    )


def _galleries(benchmark: Benchmark, results: Results, gallery: report_examples.Gallery) -> str:
    content = html.paragraph(
        "Wrong answers by how far the chosen candidate leads over the right one, and right answers taken evenly from "
        "each dataset, with their best-ranked candidates. Solid green frame: right; dashed red frame: chosen, "
        "and wrong. Below each its rank and cosine."
    )
    grouped, meta_task = len(results.tasks) > _UNGROUPED, ""
    for number, result in enumerate(results.tasks):
        info, answers = result.info, only_on_first(result.answers)
        if grouped and info.meta_task != meta_task:
            meta_task = info.meta_task
            content += f"<h4>{html.escape(meta_task)}</h4>"
        task = benchmark.read(info.name)
        groups = gallery.examples(task, answers)
        note = f"{np.count_nonzero(answers.right)} of {result.queries} right"
        if info.metric not in ("precision@1", "hit@1", "R@1"):
            note += f", {info.metric} {percent(result.score)}"
        content += html.gallery(info.name, note, groups, shown=number == 0)
    if gallery.pictures.late:
        content += html.paragraph(
            f"Reading pictures took too long: {gallery.pictures.late} items are shown without theirs."
        )
    return content
