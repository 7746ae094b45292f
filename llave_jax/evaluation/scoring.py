"""Ranks a task's candidates for each of its queries, exactly, and measures the rankings.

Owns the one way from embeddings to metrics. The metrics' arithmetic is `metrics.py`; embeddings come through
`cache.py`. Scores are computed in blocks of queries, so memory does not grow with their number.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from llave_jax.embedding.precision import truncate
from llave_jax.evaluation.cache import SHARD_ITEMS, Embedded, EmbeddingCache, Encode, embed
from llave_jax.evaluation.forms import Form
from llave_jax.evaluation.metrics import Ranking, measure
from llave_jax.evaluation.similarity import NEGATIVES, SimilarityStats
from llave_jax.evaluation.task import Items, Task, TaskInfo
from llave_jax.inputs.item import Item
from llave_jax.parallel.processes import json_from_first_process

# Scores that are in memory at a time: 256 MiB.
_BLOCK_SCORES = 1 << 26
# A video takes as long to encode as many texts. With small shards a killed run loses less.
_VIDEO_SHARD_ITEMS = 64
# Copying a vector out of a matrix takes about as long as multiplying so many.
_COPY_COST = 16


@dataclasses.dataclass(frozen=True)
class Answers:
    """Rankings, query by query.

    Attributes:
      ranking: int32 [Q, depth], the best answers (candidates, or groups of them); -1 behind the last one.
      scores: float32 [Q, depth], their cosines with the query; those of -1 are -inf.
      positive: int32 [Q], the best-ranked right answer; -1 where none is ranked.
      positive_score: float32 [Q].
      better: int [Q], answers that score higher than it.
      similarity: cosines of all queries with right answers, and with their most and least similar wrong ones; None
        where no query has a wrong one.
      all_scores: for each query float32 [c], in the order of its pool; None without pools.
    """

    ranking: np.ndarray
    scores: np.ndarray
    positive: np.ndarray
    positive_score: np.ndarray
    better: np.ndarray
    similarity: SimilarityStats | None
    all_scores: tuple[np.ndarray, ...] | None = None

    @property
    def right(self) -> np.ndarray:
        """bool [Q]: whether the first answer is right."""
        return self.ranking[:, 0] == self.positive


@dataclasses.dataclass(frozen=True)
class Result:
    """Scores of a task.

    Attributes:
      info: of the task.
      metrics: name -> mean over the queries; fractions, ranks from 1.
      queries: how many were scored.
      chance: expected main metric of random scores; None where it has no simple form.
      settings: of the task.
      forms: metrics where candidates are stored in a smaller form.
      skipped_queries, skipped_candidates: of the task.
      answers: None on processes other than the first.
    """

    info: TaskInfo
    metrics: Mapping[str, float]
    queries: int
    chance: float | None = None
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    forms: Mapping[Form, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    skipped_queries: int = 0
    skipped_candidates: int = 0
    answers: Answers | None = None

    @property
    def score(self) -> float:
        """The main metric."""
        return self.metrics[self.info.metric]


def score_task(
    encode: Encode, task: Task, cache: EmbeddingCache, forms: Sequence[Form] = ()
) -> Result:
    """Encode what is not cached, rank, and measure. With several processes all call this alike.

    Args:
      encode: items -> float32 [n, D], L2-normalised.
      task: what is scored.
      cache: takes and gives embeddings.
      forms: of stored candidates, which are scored too.

    Returns:
      The metrics on all processes; the first one's result also has the answers.

    Raises:
      ValueError: an item cannot be read, or its embedding is not finite; it names the item.
    """
    count = len(task.queries)

    def item(index: int) -> Item:
        return task.queries[index] if index < count else task.candidates[index - count]

    # Both sides together, so that batches are full.
    items = Items(count + task.count, item)
    embedded = embed(encode, items, cache, shard_items=_shard_items(task))
    values = np.zeros((1 + len(forms), len(task.metrics)))
    answers = None
    if embedded is not None:
        queries, candidates = (_part(embedded, side) for side in np.split(embedded.rows, [count]))
        found, answers = rank(task, queries, candidates)
        values[0] = list(found.values())
        for index, form in enumerate(forms, 1):
            found, _ = rank(task, queries, candidates, form)
            values[index] = list(found.values())
    # As text: arrays would lose bits on their way, as JAX has float32.
    sent = json_from_first_process(values.tolist())
    whole, *smaller = (dict(zip(task.metrics, row, strict=True)) for row in sent)
    return Result(
        info=task.info,
        metrics=whole,
        queries=len(task.queries),
        chance=task.chance(),
        settings=task.settings,
        forms=dict(zip(forms, smaller, strict=True)),
        skipped_queries=task.skipped_queries,
        skipped_candidates=task.skipped_candidates,
        answers=answers,
    )


def _part(embedded: Embedded, rows: np.ndarray) -> Embedded:
    """Of some items, with the vectors of these alone."""
    used, places = np.unique(rows, return_inverse=True)
    return Embedded(embedded.vectors[used], places.astype(np.int32))


def _shard_items(task: Task) -> int:
    """Items between two writes of the cache."""
    sides = [side[0] for side in (task.queries, task.candidates) if len(side)]
    return _VIDEO_SHARD_ITEMS if any(item.video is not None for item in sides) else SHARD_ITEMS


def rank(
    task: Task, queries: Embedded, candidates: Embedded, form: Form | None = None
) -> tuple[dict[str, float], Answers]:
    """Rankings of all queries, and their metrics.

    Args:
      task: what is scored.
      queries: embeddings of its queries.
      candidates: embeddings of its candidates.
      form: in which candidates are stored; None: float32, whole.

    Returns:
      (metrics by name, answers).
    """
    depth = task.depth
    rows = [
        _rank_one(task, depth, *row, similarities=form is None)
        for row in _score_rows(task, queries, candidates, form)
    ]
    ranking = Ranking(
        gains=np.stack([row.gains for row in rows]),
        ideal=np.stack([_ideal(task, query, depth) for query in range(len(rows))]),
        right=np.array([len(right) for right in task.relevant]),
        better=np.array([row.better for row in rows]),
        tied=np.array([row.tied for row in rows]),
        before=np.array([row.before for row in rows]),
    )
    answers = Answers(
        ranking=np.stack([row.ranking for row in rows]),
        scores=np.stack([row.scores for row in rows]),
        positive=np.array([row.positive for row in rows], np.int32),
        positive_score=np.array([row.positive_score for row in rows], np.float32),
        better=ranking.better,
        similarity=_similarity(rows),
        all_scores=None if task.pools is None else tuple(row.all_scores for row in rows),
    )
    return measure(task.metrics, ranking, all_tied=task.all_tied), answers


class _Row(NamedTuple):
    """One query of `rank`."""

    gains: np.ndarray
    ranking: np.ndarray
    scores: np.ndarray
    positive: int
    positive_score: float
    better: int
    tied: int
    before: int
    # Cosines with right answers, and with the most and least similar wrong ones.
    kinds: tuple[np.ndarray, np.ndarray, np.ndarray]
    all_scores: np.ndarray


def _score_rows(
    task: Task, queries: Embedded, candidates: Embedded, form: Form | None
) -> Iterator[tuple[int, np.ndarray, np.ndarray, np.ndarray]]:
    """(query, answers int [c], their scores float32 [c], scores in the order of the pool) of each query."""
    asked, stored = queries.vectors, candidates.vectors
    if form is not None:
        asked, stored = truncate(asked, form.dim), form.stored(stored)

    def scores(asked: np.ndarray, stored: np.ndarray) -> np.ndarray:
        return asked @ stored.T if form is None else form.scores(asked, stored, task.depth)

    if task.pools is not None:
        whole = _is_cheaper_whole(task.pools, len(stored)) and (form is None or not form.rescores)
        block = max(1, _BLOCK_SCORES // max(1, len(stored)))
        for query, pool in enumerate(task.pools):
            if whole:
                if query % block == 0:
                    products = scores(asked[queries.rows[query : query + block]], stored)
                found = products[query % block, candidates.rows[pool]]
            else:
                # A matrix product may round equal rows differently, depending on their position. Each content is
                # multiplied once, so that repeated candidates tie exactly.
                contents, places = np.unique(candidates.rows[pool], return_inverse=True)
                found = scores(asked[queries.rows[query]][None], stored[contents])[0, places]
            _, first = np.unique(pool, return_index=True)
            first.sort()
            yield query, pool[first], found[first], found
        return
    answers = np.arange(task.answers)
    block = max(1, _BLOCK_SCORES // max(1, len(candidates.rows)))
    for start in range(0, len(queries.rows), block):
        rows = queries.rows[start : start + block]
        found = scores(asked[rows], stored)[:, candidates.rows]
        for query, row in enumerate(found, start):
            if task.groups is not None:
                best = np.full(len(answers), -np.inf, np.float32)
                np.maximum.at(best, task.groups, row)
                row = best
            yield query, answers, row, row


def _is_cheaper_whole(pools: Sequence[np.ndarray], contents: int) -> bool:
    """Whether one product of all queries with all contents takes less time than each pool's vectors put together."""
    return _COPY_COST * sum(map(len, pools)) >= len(pools) * contents


def _rank_one(
    task: Task,
    depth: int,
    query: int,
    answers: np.ndarray,
    scores: np.ndarray,
    in_pool: np.ndarray,
    *,
    similarities: bool,
) -> _Row:
    order = _best(scores, depth)
    ranking, shown = np.full(depth, -1, np.int32), np.full(depth, -np.inf, np.float32)
    ranking[: len(order)], shown[: len(order)] = answers[order], scores[order]
    gains = (ranking[:, None] == task.relevant[query]) @ _gains(task, query)
    is_right = np.isin(answers, task.relevant[query])
    places = np.flatnonzero(is_right)
    if not len(places):
        none = np.zeros(0, np.float32)
        kinds = (none, none, none)
        return _Row(gains, ranking, shown, -1, -np.inf, len(answers), 0, 0, kinds, in_pool)
    best = places[scores[places].argmax()]
    tied = scores == scores[best]
    wrong = scores[~is_right] if similarities else scores[:0]
    return _Row(
        gains=gains,
        ranking=ranking,
        scores=shown,
        positive=int(answers[best]),
        positive_score=float(scores[best]),
        better=int(np.count_nonzero(scores > scores[best])),
        tied=int(np.count_nonzero(tied)),
        before=int(np.count_nonzero(tied[:best])),
        kinds=(scores[[best]], *_extremes(wrong)),
        all_scores=in_pool,
    )


def _best(scores: np.ndarray, depth: int) -> np.ndarray:
    """Positions of the highest scores, the highest first; equal ones by position."""
    places = np.arange(len(scores))
    if len(scores) > 4 * depth:
        least = np.partition(scores, len(scores) - depth)[len(scores) - depth]
        places = np.flatnonzero(scores >= least)
    return places[np.argsort(-scores[places], kind="stable")][:depth]


def _extremes(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The NEGATIVES highest and the NEGATIVES lowest scores, each in increasing order."""
    if len(scores) > 4 * NEGATIVES:
        high = np.partition(scores, len(scores) - NEGATIVES)[-NEGATIVES:]
        low = np.partition(scores, NEGATIVES)[:NEGATIVES]
        return np.sort(high), np.sort(low)
    ordered = np.sort(scores)
    return ordered[-NEGATIVES:], ordered[:NEGATIVES]


def _gains(task: Task, query: int) -> np.ndarray:
    if task.gains is None:
        return np.ones(len(task.relevant[query]))
    return np.asarray(task.gains[query], float)


def _ideal(task: Task, query: int, depth: int) -> np.ndarray:
    best = np.zeros(depth)
    gains = np.sort(_gains(task, query))[::-1][:depth]
    best[: len(gains)] = gains
    return best


def _similarity(rows: Sequence[_Row]) -> SimilarityStats | None:
    kinds = [
        np.concatenate(kind).astype(np.float32)
        for kind in zip(*(r.kinds for r in rows), strict=True)
    ]
    if not len(kinds[1]):
        return None
    return SimilarityStats(*kinds)
