"""The page of an evaluation: tables with published rows, bars, similarities, examples of answers.

Owns what is shown of benchmarks, all in the same way. How it looks is `report_html.py` and `drawing.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llave_jax.common.files import write_text
from llave_jax.common.tables import percent
from llave_jax.evaluation import report_html as html
from llave_jax.evaluation.benchmarks.base import Benchmark
from llave_jax.evaluation.drawing import histograms_svg
from llave_jax.evaluation.forms import Form, rows
from llave_jax.evaluation.report_html import Bar, Candidate, Card, Example
from llave_jax.evaluation.results import Results
from llave_jax.evaluation.scoring import Result
from llave_jax.evaluation.similarity import HEADING, SimilarityStats
from llave_jax.evaluation.task import Task
from llave_jax.inputs import video_decode
from llave_jax.inputs.item import Item
from llave_jax.parallel.processes import only_on_first

# Right and wrong answers shown for each task, and candidates for each of them.
EXAMPLES = 4
CANDIDATES = 5


def write_report(
    path: str | os.PathLike, entries: Sequence[tuple[Benchmark, Results]], *, model: str
) -> None:
    """Write the page of an evaluation. First process only: results need answers.

    Args:
      path: the HTML file.
      entries: benchmarks with what was scored of them.
      model: for the head of the page.
    """
    sections = []
    for benchmark, results in entries:
        before = f"{results.suite.name}: " if len(entries) > 1 else ""
        sections += [(before + heading, text) for heading, text in _sections(benchmark, results)]
    title = ", ".join(results.suite.name for _, results in entries)
    tasks = sum(len(results.tasks) for _, results in entries)
    queries = sum(result.queries for _, results in entries for result in results.tasks)
    subtitle = f"{model}: {tasks} {'task' if tasks == 1 else 'tasks'}, {queries} queries"
    write_text(Path(path), html.page(title, subtitle, sections))


def _sections(benchmark: Benchmark, results: Results) -> list[tuple[str, str]]:
    """(heading, HTML) of one benchmark."""
    if results.suite.averages:
        scores = [("Averages", _averages(results)), ("Tasks", _bars(results))]
    else:
        scores = [("Metrics", html.table(results.metric_rows()))]
    return [
        *scores,
        *_smaller_vectors(results.by_form()),
        ("Similarity of positives and negatives", _similarities(results)),
        ("Answers", _galleries(benchmark, results)),
    ]


def _smaller_vectors(
    scores: Mapping[Form, Mapping[str, float | None]],
) -> list[tuple[str, str]]:
    """The section on forms of vectors, where any were scored."""
    if not scores:
        return []
    note = html.paragraph(
        "What is found is stored in these forms; queries are not rounded. int8 is calibrated by dimension on "
        "what is stored. Binary vectors are searched by Hamming distance, and the best are rescored."
    )
    return [("Smaller vectors", html.table(rows(scores)) + note)]


def _averages(results: Results) -> str:
    averages = results.averages()
    content = html.tiles(
        [
            (
                average.label,
                percent(average.value),
                (f"chance {percent(average.chance)}" if average.chance is not None else "")
                if average.value is not None
                else f"{average.scored} of {average.scored + len(average.missing)} scored",
            )
            for average in averages
        ]
    )
    if any(reference.averages for reference in results.suite.references):
        content += html.table(results.comparison(), own=("this run",))
    missing = averages[-1].missing
    if missing:
        content += html.paragraph(
            f"Not scored: {', '.join(missing)}. An average is given only where all of its datasets "
            "were scored."
        )
    return content


def _bars(results: Results) -> str:
    published = next((r for r in results.suite.references if r.tasks), None)
    groups: dict[str, list[Bar]] = {}
    for result in results.tasks:
        info = result.info
        reference = published.tasks.get((info.name, info.metric)) if published else None
        chance = None if result.chance is None else 100 * result.chance
        bar = Bar(info.name, 100 * result.score, chance, reference)
        groups.setdefault(f"{info.meta_task} ({info.metric})", []).append(bar)
    note = "Dark tick: chance."
    if published is not None:
        note += f" Orange tick: {published.model} as published."
    return html.bars(groups) + html.paragraph(note)


def _similarities(results: Results) -> str:
    rows = [["dataset", *HEADING]]
    found = []
    for result in results.tasks:
        stats = only_on_first(result.answers).similarity
        if stats is not None:
            rows.append([result.info.name, *stats.cells()])
            found.append(stats)
    if not found:
        return html.paragraph("No query has a candidate besides its positive.")
    note = html.paragraph(
        "Cosine of queries with their positive, their 5 most similar other candidates (hard) and "
        "their 5 least similar ones (easy), over all datasets."
    )
    picture = histograms_svg({"all datasets": SimilarityStats.together(found)})
    return note + picture + html.folded("Means per dataset", html.table(rows))


def _galleries(benchmark: Benchmark, results: Results) -> str:
    content = html.paragraph(
        "Queries taken evenly from each dataset, with their best-ranked candidates. Green: the "
        "right answer; red: a wrong one that was chosen; below each its rank and cosine."
    )
    for number, result in enumerate(results.tasks):
        task, answers = benchmark.read(result.info.name), only_on_first(result.answers)

        def make(row: int, task=task, result=result) -> Example:
            return _example(task, result, row)

        right = answers.right
        note = f"{np.count_nonzero(right)} of {len(right)} right"
        content += _gallery(result.info.name, note, right, make, shown=number == 0)
    return content


def _gallery(
    name: str, note: str, right: np.ndarray, make: Callable[[int], Example], *, shown: bool
) -> str:
    groups = {
        label: [make(int(row)) for row in _spread(np.flatnonzero(right == value))]
        for label, value in (("Wrong", False), ("Right", True))
    }
    return html.gallery(name, note, groups, shown=shown)


def _spread(rows: np.ndarray) -> np.ndarray:
    """At most EXAMPLES of the rows, evenly spread."""
    if len(rows) <= EXAMPLES:
        return rows
    return rows[np.linspace(0, len(rows) - 1, EXAMPLES).astype(int)]


def _example(task: Task, result: Result, row: int) -> Example:
    """A query with its best answers, and with its best right one at any rank."""
    answers = only_on_first(result.answers)
    right = set(task.relevant[row].tolist())
    ranking = answers.ranking[row]
    found = [
        (int(answer), float(score), rank)
        for rank, (answer, score) in enumerate(zip(ranking, answers.scores[row], strict=True), 1)
        if answer >= 0
    ]
    shown = found[:CANDIDATES]
    positive = int(answers.positive[row])
    if positive >= 0 and positive not in [answer for answer, _, _ in shown]:
        rank = next(
            (rank for answer, _, rank in found if answer == positive), 1 + int(answers.better[row])
        )
        shown.append((positive, float(answers.positive_score[row]), rank))
    return Example(
        query=_item_card(task.queries[row]),
        candidates=[
            Candidate(_answer_card(task, answer), score, rank, positive=answer in right)
            for answer, score, rank in shown
        ],
    )


def _answer_card(task: Task, answer: int) -> Card:
    if task.groups is not None:
        answer = int(np.flatnonzero(task.groups == answer)[0])
    return _item_card(task.candidates[answer])


def _item_card(item: Item) -> Card:
    """Text with the first image, or the middle frame of the video."""
    pictures = [image for image in item.images if image is not None]
    if pictures:
        return Card(readable(item.text), html.thumbnail(pictures[0], item.name))
    if item.video is not None and not isinstance(item.video, str | os.PathLike):
        frames = list(item.video)
        return Card(readable(item.text), html.thumbnail(frames[len(frames) // 2], item.name))
    if item.video is not None:
        frames = video_decode.decode_frames(item.video, lambda n, fps: [n // 2], item.name)
        return Card(readable(item.text), html.thumbnail(frames[0], item.name))
    return Card(readable(item.text))


def readable(text: str) -> str:
    """User text without the markers that stand for images.

    Args:
      text: user content.

    Returns:
      The text, stripped.
    """
    for marker in ("<|image_1|>", "<image>"):
        text = text.replace(marker, "")
    return text.strip()
