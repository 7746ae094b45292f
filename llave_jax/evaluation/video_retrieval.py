"""Zero-shot text-video retrieval: MSR-VTT 1k and MSVD as published, recall and ranks both ways.

Owns the metrics. Files are read by `video_data.py`. Videos are decoded by `inputs/video_decode.py` (extra
`video`); `inputs/video.py` chooses the frames.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llave_jax.common.files import write_array, write_text
from llave_jax.common.tables import align
from llave_jax.embedding.precision import truncate
from llave_jax.embedding.run_info import record_run
from llave_jax.evaluation import published
from llave_jax.evaluation.cache import EmbeddingCache, Encode, embed
from llave_jax.evaluation.forms import Form, rows
from llave_jax.evaluation.video_data import VideoDataset
from llave_jax.inputs.item import Item
from llave_jax.parallel.processes import from_first_process, only_on_first

# The authors' wording, with "an video": the model was trained on it as an instruction.
QUERY = "Find me an video that matches the given caption: {}"
TARGET = "<image>\nRepresent the given video."

# 32 frames of 14 x 15 tokens, with the prompt, exceed the 4096 tokens that suffice for images.
MAX_LENGTH = 8192

METRICS: tuple[str, ...] = ("R@1", "R@5", "R@10", "median rank", "mean rank")


@dataclasses.dataclass(frozen=True)
class VideoResult:
    """Metrics of both directions.

    Attributes:
      name: of the dataset.
      text_to_video: by the names in METRICS; recalls are fractions, ranks count from 1.
      video_to_text: the same.
      similarity: float32 [captions, videos]; None on processes other than the first.
      forms: recalls in both directions where what is found is stored in a smaller form; {} on processes other
        than the first.
    """

    name: str
    text_to_video: dict[str, float]
    video_to_text: dict[str, float]
    similarity: np.ndarray | None
    forms: Mapping[Form, Mapping[str, float]] = dataclasses.field(default_factory=dict)

    def table(self) -> str:
        """The tables as text."""
        return align(self.rows()) + ("\n\n" + align(rows(self.forms)) if self.forms else "")

    def rows(self) -> list[list[str]]:
        """Cells of the table, the heading first; recalls in percent."""
        rows = [[self.name, *METRICS]]
        for label, metrics in (
            ("text -> video", self.text_to_video),
            ("video -> text", self.video_to_text),
        ):
            recalls = [f"{100 * metrics[name]:.1f}" for name in METRICS[:3]]
            rows.append([label, *recalls, *(f"{metrics[name]:.1f}" for name in METRICS[3:])])
        if self.name in published.LLAVE_7B_VIDEO:
            values = [f"{value:.1f}" for value in published.LLAVE_7B_VIDEO[self.name]]
            rows.append(["LLaVE-7B published, text -> video", *values, "-", "-"])
        return rows


def evaluate_video(
    encode: Encode,
    dataset: VideoDataset,
    output_dir: str | os.PathLike | None = None,
    *,
    cache: EmbeddingCache | None = None,
    settings: Mapping[str, Any] | None = None,
    forms: Sequence[Form] = (),
) -> VideoResult:
    """Encode captions and videos, and rank the videos for each caption and the reverse.

    With several processes all call this alike; all return the metrics, the first writes the files.

    Args:
      encode: items -> float32 [n, D], L2-normalised, up to `MAX_LENGTH` tokens an item.
      dataset: from one of `video_data.READERS`.
      output_dir: where `<name>_score.json` and `<name>_similarity.npy` (float32 [captions, videos])
        go, if given.
      cache: embeddings of earlier runs.
      settings: what `encode` is, kept in `run.json` beside the scores.
      forms: of stored videos, and of stored captions in the other direction, which are scored too.

    Returns:
      The metrics of both directions.

    Reference: LLaVE (arXiv 2503.04812), zero-shot text-video retrieval.
    """
    cache = EmbeddingCache() if cache is None else cache

    def caption_item(i: int) -> Item:
        return Item(QUERY.format(dataset.captions[i]), name=f"{dataset.name}: caption {i}")

    def video_item(i: int) -> Item:
        return Item(TARGET, video=str(dataset.videos[i]), name=f"{dataset.name}: video {i}")

    captions = embed(encode, len(dataset.captions), caption_item, cache)
    # A video takes as long to encode as many texts. With small shards a killed run loses less.
    videos = embed(encode, len(dataset.videos), video_item, cache, shard_items=64)
    values, similarity, by_form = np.zeros((2, len(METRICS))), None, {}
    if captions is not None and videos is not None:
        by_form = {form: _form_recalls(captions, videos, dataset.owners, form) for form in forms}
        similarity = captions @ videos.T
        both = both_directions(similarity, dataset.owners)
        values = np.array([[metrics[name] for name in METRICS] for metrics in both])
    values = from_first_process(values)
    text_to_video, video_to_text = (dict(zip(METRICS, row.tolist(), strict=True)) for row in values)
    result = VideoResult(dataset.name, text_to_video, video_to_text, similarity, by_form)
    if output_dir is not None and jax.process_index() == 0:
        output_dir = Path(output_dir)
        record_run(output_dir, dataset.name, None)
        scores = {"text_to_video": result.text_to_video, "video_to_text": result.video_to_text}
        write_text(output_dir / f"{dataset.name}_score.json", json.dumps(scores, indent=2) + "\n")
        write_array(output_dir / f"{dataset.name}_similarity.npy", only_on_first(similarity))
        record_run(output_dir, dataset.name, settings)
    return result


def _form_recalls(
    captions: np.ndarray, videos: np.ndarray, owners: np.ndarray, form: Form
) -> dict[str, float]:
    def scores(queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        asked, stored = truncate(queries, form.dim), form.stored(documents)
        return np.stack([form.scores(query, stored) for query in asked])

    forth, _ = both_directions(scores(captions, videos), owners)
    _, back = both_directions(scores(videos, captions).T, owners)
    named = {"text -> video": forth, "video -> text": back}
    return {f"{label} {k}": values[k] for label, values in named.items() for k in METRICS[:1]}


def both_directions(
    similarity: np.ndarray, owners: np.ndarray
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics text -> video and video -> text, by the conventions of the papers' evaluation code.

    With one caption a video, a tied match counts with every rank that it could take.

    With several captions a video, each caption is a query of its own. A tied match ranks by its position,
    and the median of an even number of ranks is the lower of the middle two. For video -> text, the
    captions of a video count as one text with the score of the best of them.

    Args:
      similarity: float [captions, videos].
      owners: int [captions], the video that each caption describes.

    Returns:
      text_to_video: by the names in METRICS; recalls are fractions, ranks count from 1.
      video_to_text: the same.

    Raises:
      ValueError: `owners` does not name every video for as many captions as there are.
    """
    captions, videos = similarity.shape
    if owners.shape != (captions,) or not np.array_equal(np.unique(owners), np.arange(videos)):
        raise ValueError(f"owners must name each of the {videos} videos for {captions} captions")
    if captions == videos:
        grouped = similarity[np.argsort(owners)]
        text_ranks = tied_ranks(grouped)
        median = np.median
    else:
        grouped = np.full((videos, videos), -np.inf, similarity.dtype)
        np.maximum.at(grouped, owners, similarity)
        text_ranks = positional_ranks(similarity, owners)
        median = _lower_median
    return _summary(text_ranks, median), _summary(tied_ranks(grouped.T), np.median)


def tied_ranks(similarity: np.ndarray) -> np.ndarray:
    """Ranks of the diagonal in its rows, from 1.

    Args:
      similarity: float [n, n].

    Returns:
      int [at least n]: a tied match has all ranks that the tie spans.
    """
    match = np.diagonal(similarity)[:, None]
    better = np.count_nonzero(similarity > match, axis=1)
    equal = np.count_nonzero(similarity == match, axis=1)
    return np.concatenate([1 + b + np.arange(e) for b, e in zip(better, equal, strict=True)])


def positional_ranks(similarity: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Rank of one column in each row, from 1. Equal scores rank by position.

    Args:
      similarity: float [n, m].
      columns: int [n].

    Returns:
      int [n].
    """
    match = np.take_along_axis(similarity, columns[:, None], axis=1)
    before = np.arange(similarity.shape[1])[None] < columns[:, None]
    return 1 + np.count_nonzero((similarity > match) | ((similarity == match) & before), axis=1)


def _lower_median(ranks: np.ndarray) -> float:
    return np.sort(ranks)[(len(ranks) - 1) // 2]


def _summary(ranks: np.ndarray, median: Callable[[np.ndarray], Any]) -> dict[str, float]:
    values = [float(np.mean(ranks <= k)) for k in (1, 5, 10)]
    return dict(zip(METRICS, [*values, float(median(ranks)), float(np.mean(ranks))], strict=True))
