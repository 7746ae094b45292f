"""Metrics of rankings, by name: "hit@1", "nDCG@10", "R@5", "median rank".

Owns the arithmetic. Rankings come from `scoring.py`. Definitions are trec_eval's where it has the metric; those of
MMEB-V2 ("ndcg_linear@5", "map@10") are VLM2Vec's, which tests compare on the same rankings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What metrics are computed from.

    Attributes:
      gains: float [Q, depth], of the answers in the order of their ranks; 0 where an answer is wrong, or where there
        is none.
      ideal: float [Q, depth], gains of all right answers, the largest first, filled up with 0.
      right: int [Q], how many right answers there are.
      better: int [Q], answers that score higher than the best right one.
      tied: int [Q], answers with its score, itself included; 0 where no right answer is ranked.
      before: int [Q], those of them that are ranked before it.
    """

    gains: np.ndarray
    ideal: np.ndarray
    right: np.ndarray
    better: np.ndarray
    tied: np.ndarray
    before: np.ndarray

    @property
    def hits(self) -> np.ndarray:
        """bool [Q, depth]: whether an answer is right."""
        return self.gains > 0


def _precision(ranking: Ranking, k: int) -> np.ndarray:
    return ranking.hits[:, :k].sum(1) / k


def _hit(ranking: Ranking, k: int) -> np.ndarray:
    return ranking.hits[:, :k].any(1).astype(float)


def _recall(ranking: Ranking, k: int) -> np.ndarray:
    return ranking.hits[:, :k].sum(1) / np.maximum(ranking.right, 1)


def _f1(ranking: Ranking, k: int) -> np.ndarray:
    precision, recall = _precision(ranking, k), _recall(ranking, k)
    return 2 * precision * recall / np.maximum(precision + recall, 1e-300)


def _average_precision(ranking: Ranking, k: int) -> np.ndarray:
    hits = ranking.hits[:, :k]
    precisions = np.cumsum(hits, 1) / np.arange(1, hits.shape[1] + 1)
    return (precisions * hits).sum(1) / np.maximum(np.minimum(ranking.right, k), 1)


def _reciprocal_rank(ranking: Ranking, k: int) -> np.ndarray:
    hits = ranking.hits[:, :k]
    return np.where(hits.any(1), 1 / (1 + hits.argmax(1)), 0)


def _discounted(gains: np.ndarray) -> np.ndarray:
    return (gains / np.log2(np.arange(2, gains.shape[1] + 2))).sum(1)


def _ndcg(ranking: Ranking, k: int) -> np.ndarray:
    best = _discounted(ranking.ideal[:, :k])
    return _discounted(ranking.gains[:, :k]) / np.where(best > 0, best, 1)


def _ndcg_exponential(ranking: Ranking, k: int) -> np.ndarray:
    raised = dataclasses.replace(ranking, gains=2**ranking.gains - 1, ideal=2**ranking.ideal - 1)
    return _ndcg(raised, k)


# Name -> (ranking, k) -> one number a query. The metric is their mean.
AT_K: dict[str, Callable[[Ranking, int], np.ndarray]] = {
    "precision": _precision,
    "hit": _hit,
    "recall": _recall,
    "f1": _f1,
    "map": _average_precision,
    "mrr": _reciprocal_rank,
    "MRR": _reciprocal_rank,
    "nDCG": _ndcg,
    "ndcg_linear": _ndcg,
    "ndcg_exponential": _ndcg_exponential,
}
# Of the rank of the best right answer, by the conventions of text-video retrieval.
_BY_RANK = ("R", "median rank", "mean rank")


def parse(name: str) -> tuple[str, int]:
    """The kind of a metric, and its cutoff.

    Args:
      name: such as "nDCG@10" or "mean rank".

    Returns:
      Kind and cutoff; 0 where the metric has none.

    Raises:
      ValueError: there is no such metric.
    """
    kind, at, cutoff = name.partition("@")
    if name in _BY_RANK[1:]:
        return name, 0
    if (kind in AT_K or kind == "R") and at and cutoff.isdigit() and int(cutoff) > 0:
        return kind, int(cutoff)
    known = ", ".join([f"{kind}@K" for kind in (*AT_K, "R")] + list(_BY_RANK[1:]))
    raise ValueError(f"there is no metric {name!r}; known are {known}")


def is_rank(name: str) -> bool:
    """Whether a metric is a rank from 1, of which less is better, and not a share.

    Args:
      name: of the metric.
    """
    return parse(name)[0] in _BY_RANK[1:]


def measure(names: Sequence[str], ranking: Ranking, *, all_tied: bool = False) -> dict[str, float]:
    """Metrics of a ranking.

    Args:
      names: of the metrics.
      ranking: of all queries; at least as deep as the largest cutoff, or as the answers are many.
      all_tied: "R@K" and the ranks count a right answer at every rank that its tie spans, as CLIP4Clip's evaluation
        does with one caption a video. Otherwise ties rank by position, and the median of an even number of ranks is
        the lower of the middle two, as it is there with many captions.

    Returns:
      name -> mean over the queries; recalls as fractions, ranks from 1.

    Raises:
      ValueError: there is no such metric.
    """
    ranks = _ranks(ranking, all_tied)
    found = {}
    for name in names:
        kind, k = parse(name)
        if kind == "R":
            found[name] = float(np.mean(ranks <= k))
        elif kind == "mean rank":
            found[name] = float(np.mean(ranks))
        elif kind == "median rank":
            median = np.median(ranks) if all_tied else np.sort(ranks)[(len(ranks) - 1) // 2]
            found[name] = float(median)
        else:
            found[name] = float(np.mean(AT_K[kind](ranking, k)))
    return found


def _ranks(ranking: Ranking, all_tied: bool) -> np.ndarray:
    """Ranks of the best right answers from 1: int [Q], or [at least Q] with all that ties span."""
    if all_tied:
        spans = zip(ranking.better, ranking.tied, strict=True)
        return np.concatenate([1 + better + np.arange(tied) for better, tied in spans])
    return 1 + ranking.better + ranking.before
