"""The page of an evaluation: tables with published rows, bars, similarities, examples of answers.

Owns what is shown for each benchmark. How it looks is `report_html.py` and `drawing.py`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from llave_jax.common.files import write_text
from llave_jax.common.tables import percent
from llave_jax.data.image_store import ImageStore
from llave_jax.evaluation import mmeb_data, published
from llave_jax.evaluation import report_html as html
from llave_jax.evaluation.drawing import histograms_svg
from llave_jax.evaluation.forms import Form, rows
from llave_jax.evaluation.report_html import Bar, Candidate, Card, Example
from llave_jax.evaluation.results import DatasetResult, Results
from llave_jax.evaluation.retrieval import RetrievalResult, RetrievalTask
from llave_jax.evaluation.similarity import HEADING, SimilarityStats, similarity_overlap
from llave_jax.evaluation.video_data import VideoDataset
from llave_jax.evaluation.video_retrieval import VideoResult
from llave_jax.inputs import video_decode
from llave_jax.inputs.item import Item
from llave_jax.parallel.processes import only_on_first

# Right and wrong answers shown for each dataset, and candidates for each of them.
EXAMPLES = 4
CANDIDATES = 5


def write_mmeb_report(
    path: str | os.PathLike,
    results: Results,
    data_dir: str | os.PathLike,
    *,
    images: str | os.PathLike | None = None,
    title: str,
    model: str,
) -> None:
    """Write the page of an MMEB-like evaluation. First process only: `results` need scores.

    Args:
      path: the HTML file.
      results: of `evaluate_mmeb` on `data_dir`, with the same `images`.
      data_dir: of the benchmark.
      images: as for `evaluate_mmeb`.
      title, model: for the head of the page.
    """
    rows = sum(result.num_pred for result in results.datasets)
    subtitle = f"{model}: {len(results.datasets)} datasets, {rows} queries, precision@1 in percent"
    store = mmeb_data.open_images(data_dir, images)
    sections = [
        ("Averages", _averages(results)),
        *_smaller_vectors(results.by_form()),
        ("Datasets", _dataset_bars(results)),
        ("Similarity of positives and negatives", _similarities(results)),
        ("Answers", _galleries(results, data_dir, store)),
    ]
    write_text(Path(path), html.page(title, subtitle, sections))


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
                f"chance {percent(average.chance)}"
                if average.value is not None
                else f"{average.scored} of {average.scored + len(average.missing)} scored",
            )
            for average in averages
        ]
    )
    if results.is_mmeb:
        content += html.table(results.comparison(), own=("this run",))
    missing = averages[-1].missing
    if missing:
        content += html.paragraph(
            f"Not scored: {', '.join(missing)}. An average is given only where all of its datasets "
            "were scored."
        )
    return content


def _dataset_bars(results: Results) -> str:
    groups: dict[str, list[Bar]] = {}
    for result in results.datasets:
        groups.setdefault(result.info.meta_task, []).append(
            Bar(
                result.info.name,
                100 * result.accuracy,
                100 * result.chance,
                published.LLAVE_7B_DATASETS.get(result.info.name),
            )
        )
    note = "Dark tick: chance."
    if results.is_mmeb:
        note += " Orange tick: LLaVE-7B as published."
    return html.bars(groups) + html.paragraph(note)


def _similarities(results: Results) -> str:
    rows = [["dataset", *HEADING]]
    for result in results.datasets:
        stats = _stats([result])
        if stats is not None:
            rows.append([result.info.name, *stats.cells()])
    total = _stats(results.datasets)
    if total is None:
        return html.paragraph("No query has a candidate besides its positive.")
    note = html.paragraph(
        "Cosine of queries with their positive, their 5 most similar other candidates (hard) and "
        "their 5 least similar ones (easy), over all datasets."
    )
    picture = histograms_svg({"all datasets": total})
    return note + picture + html.folded("Means per dataset", html.table(rows))


def _stats(results: Sequence[DatasetResult]) -> SimilarityStats | None:
    """None where no row has a negative."""
    rows = [
        pair
        for result in results
        for pair in zip(only_on_first(result.scores), result.candidates, strict=True)
    ]
    if all(len(np.unique(ids)) == 1 for _, ids in rows):
        return None
    scores, candidates = zip(*rows, strict=True)
    return similarity_overlap(scores, [0] * len(scores), candidates=candidates)


def _galleries(results: Results, data_dir: str | os.PathLike, store: ImageStore) -> str:
    content = html.paragraph(
        "Queries taken evenly from each dataset, with their best-ranked candidates. Green: the "
        "right answer; red: a wrong one that was chosen; below each its rank and cosine."
    )
    for number, result in enumerate(results.datasets):
        dataset = mmeb_data.read_dataset(data_dir, result.info.name)

        def make(row: int, result=result, dataset=dataset) -> Example:
            return _mmeb_example(row, result, dataset, store)

        content += _gallery(
            result.info.name,
            f"{result.num_correct} of {result.num_pred} right",
            result.predictions == 0,
            make,
            shown=number == 0,
        )
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


def _mmeb_example(
    row: int, result: DatasetResult, dataset: mmeb_data.EvalDataset, store: ImageStore
) -> Example:
    targets, scores = dataset.target_ids[row], only_on_first(result.scores)[row]

    def card(content_id: int) -> Card:
        return _item_card(mmeb_data.make_item(dataset, int(content_id), store))

    # A repeated candidate is one answer. It is shown once, at its first position.
    _, first = np.unique(targets, return_index=True)
    places = first[np.lexsort((first, -scores[first]))]
    ranked = [
        (place, rank) for rank, place in enumerate(places, 1) if rank <= CANDIDATES or place == 0
    ]
    return Example(
        query=card(dataset.query_ids[row]),
        candidates=[
            Candidate(card(targets[place]), float(scores[place]), rank, positive=place == 0)
            for place, rank in ranked
        ],
    )


def write_video_report(
    path: str | os.PathLike, dataset: VideoDataset, result: VideoResult, *, model: str
) -> None:
    """Write the page of a text-video evaluation. First process only.

    Args:
      path: the HTML file.
      dataset: the captions with their videos.
      result: of `evaluate_video` on the dataset.
      model: for the head of the page.
    """
    similarity, owners = only_on_first(result.similarity), dataset.owners
    matches = np.take_along_axis(similarity, owners[:, None], axis=1)
    right = np.count_nonzero(similarity > matches, axis=1) == 0

    @functools.cache
    def frame(video: int) -> str:
        source = dataset.videos[video]
        (picture,) = video_decode.decode_frames(source, lambda count, fps: [count // 2])
        return html.thumbnail(picture, str(source))

    def make(row: int) -> Example:
        order = np.argsort(-similarity[row], kind="stable")
        ranked = [
            (int(video), rank)
            for rank, video in enumerate(order, 1)
            if rank <= CANDIDATES or video == owners[row]
        ]
        return Example(
            query=Card(dataset.captions[row]),
            candidates=[
                Candidate(
                    Card(dataset.videos[video].stem, frame(video)),
                    float(similarity[row, video]),
                    rank,
                    positive=video == owners[row],
                )
                for video, rank in ranked
            ],
        )

    note = f"{np.count_nonzero(right)} of {len(right)} captions find their video first"
    sections = [("Metrics", html.table(result.rows())), *_smaller_vectors(result.forms)]
    if len(dataset.videos) > 1:
        stats = similarity_overlap(similarity, owners)
        sections.append(
            ("Similarity of positives and negatives", histograms_svg({dataset.name: stats}))
        )
    sections.append(("Answers", _gallery("Text to video", note, right, make, shown=True)))
    subtitle = f"{model}: {len(dataset.captions)} captions, {len(dataset.videos)} videos"
    write_text(Path(path), html.page(dataset.name, subtitle, sections))


def write_retrieval_report(
    path: str | os.PathLike,
    task: RetrievalTask,
    result: RetrievalResult,
    *,
    title: str,
    model: str,
) -> None:
    """Write the page of a retrieval over one's own corpus. First process only.

    Args:
      path: the HTML file.
      task: queries, corpus and judgements.
      result: of `evaluate_retrieval` on the task.
      title, model: for the head of the page.
    """
    rankings = only_on_first(result.ranking)
    documents = dict(zip(task.document_ids, task.documents, strict=True))

    def relevant(query: str, document: str) -> bool:
        return task.qrels[query].get(document, 0) > 0

    def make(row: int) -> Example:
        query = task.query_ids[row]
        ranking = list(enumerate(rankings[query], 1))
        found = [entry for entry in ranking if relevant(query, entry[1][0])]
        # The best relevant document is shown at any rank.
        entries = ranking[:CANDIDATES] + [e for e in found[:1] if e[0] > CANDIDATES]
        return Example(
            query=_item_card(task.queries[row]),
            candidates=[
                Candidate(_item_card(documents[document]), score, rank, relevant(query, document))
                for rank, (document, score) in entries
            ],
        )

    first = [rankings[query][0][0] for query in task.query_ids]
    right = np.array(list(map(relevant, task.query_ids, first)))
    note = f"{np.count_nonzero(right)} of {len(right)} queries find a relevant document first"
    sections = [
        ("Metrics", html.table(result.rows())),
        *_smaller_vectors(result.by_form()),
        ("Answers", _gallery("Rankings", note, right, make, shown=True)),
    ]
    subtitle = f"{model}: {len(task.queries)} queries, {len(documents)} documents"
    write_text(Path(path), html.page(title, subtitle, sections))


def _item_card(item: Item) -> Card:
    """Text with the first image, or the middle frame of the video."""
    pictures = [image for image in item.images if image is not None]
    if pictures:
        return Card(readable(item.text), html.thumbnail(pictures[0], item.name))
    if isinstance(item.video, str):
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
