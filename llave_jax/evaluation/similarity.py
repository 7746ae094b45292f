"""How well similarities separate positives from negatives: LLaVE's Fig. 1 and Table 1.

Each query has cosines with its positive, with its most similar and with its least similar negatives.
Owns their distributions, means and overlaps, as numbers. The cosines come from `mmeb.py`, the picture
is `drawing.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

# Negatives of each kind and query, as in the paper.
NEGATIVES = 5
# Bins of all histograms: 0.04 wide, over all cosines.
EDGES = np.linspace(-1, 1, 51)

KINDS = ("positive", "hard", "easy")
# Heading of `SimilarityStats.cells`.
HEADING = (*KINDS, "overlap of positive and hard")


@dataclasses.dataclass(frozen=True)
class SimilarityStats:
    """Cosines of queries with candidates.

    Attributes:
      positive: float32 [queries].
      hard: float32 [n], up to NEGATIVES most similar negatives of each query.
      easy: float32 [n], up to NEGATIVES least similar negatives of each query.
    """

    positive: np.ndarray
    hard: np.ndarray
    easy: np.ndarray

    @classmethod
    def together(cls, parts: Sequence[SimilarityStats]) -> SimilarityStats:
        """Statistics over the queries of several data sets; every query counts alike.

        Args:
          parts: at least one.

        Returns:
          All cosines by kind.
        """
        return cls(*(np.concatenate([getattr(part, kind) for part in parts]) for kind in KINDS))

    def mean(self, kind: str) -> float:
        """Mean cosine of one kind, as in the paper's Table 1.

        Args:
          kind: one of KINDS.

        Returns:
          The mean.
        """
        return float(np.mean(getattr(self, kind), dtype=np.float64))

    def overlap(self, first: str, second: str) -> float:
        """Overlap coefficient of two kinds: the area that their histograms have in common.

        Args:
          first, second: two of KINDS.

        Returns:
          0 if a threshold separates them, 1 if their distributions are equal.
        """
        return float(np.minimum(self.histogram(first), self.histogram(second)).sum())

    def histogram(self, kind: str) -> np.ndarray:
        """Share of the cosines in each bin of EDGES.

        Args:
          kind: one of KINDS.

        Returns:
          float64 [bins], sums to 1.
        """
        values = getattr(self, kind)
        # Rounding can bring a cosine beyond 1 by an ulp or two.
        counts, _ = np.histogram(np.clip(values, EDGES[0], EDGES[-1]), EDGES)
        return counts / len(values)

    def cells(self) -> list[str]:
        """Means of the kinds and the overlap of positives and hard negatives, for tables."""
        # Adding zero turns -0.00 into 0.00.
        means = [f"{round(self.mean(kind), 2) + 0.0:.2f}" for kind in KINDS]
        return [*means, f"{self.overlap('positive', 'hard'):.2f}"]

    def to_dict(self) -> dict[str, Any]:
        """Means, spreads, overlaps and histograms, for JSON."""
        numbers: dict[str, Any] = {"queries": len(self.positive)}
        for kind in KINDS:
            values = getattr(self, kind)
            numbers[kind] = {
                "count": len(values),
                "mean": self.mean(kind),
                "std": float(np.std(values, dtype=np.float64)),
                "histogram": self.histogram(kind).tolist(),
            }
        numbers["overlap"] = {
            "positive_hard": self.overlap("positive", "hard"),
            "positive_easy": self.overlap("positive", "easy"),
            "hard_easy": self.overlap("hard", "easy"),
        }
        return numbers


def similarity_overlap(
    scores: Sequence[np.ndarray] | np.ndarray,
    positives: Sequence[int] | np.ndarray,
    *,
    candidates: Sequence[np.ndarray] | np.ndarray | None = None,
) -> SimilarityStats:
    """Collect each query's positive, its hard negatives and its easy negatives.

    A query with fewer than 2 * NEGATIVES negatives has some of them in both kinds. A query without
    negatives gives its positive only.

    Args:
      scores: cosines of each query with its candidates: [queries, candidates], or for each query an
        array [c] of its own length.
      positives: int [queries], position of each query's positive among its candidates.
      candidates: int ids shaped like `scores`. Candidates of a query with equal ids are one candidate
        that is given twice: a repeated negative counts once, and a repeated positive is not a negative.
        None: all candidates of a query differ.

    Returns:
      The cosines of all queries by kind.

    Raises:
      ValueError: shapes that do not fit, values that are not cosines, or no negatives at all; it names
        the query.

    Reference: LLaVE (arXiv 2503.04812), Fig. 1 and Table 1.
    """
    if len(scores) != len(positives) or (candidates is not None and len(candidates) != len(scores)):
        raise ValueError(
            f"scores are of {len(scores)} queries, positives of {len(positives)}"
            + ("" if candidates is None else f", candidates of {len(candidates)}")
        )
    found: dict[str, list[np.ndarray]] = {kind: [] for kind in KINDS}
    for query, (row, positive) in enumerate(zip(scores, positives, strict=True)):
        row = _check_row(row, positive, query)
        ids = np.arange(len(row)) if candidates is None else np.asarray(candidates[query])
        if ids.shape != row.shape:
            raise ValueError(
                f"query {query}: {ids.shape} candidate ids for {row.shape} scores; expected as many"
            )
        unique, first = np.unique(ids, return_index=True)
        negatives = np.sort(row[first[unique != ids[positive]]])
        found["positive"].append(row[[positive]])
        found["hard"].append(negatives[-NEGATIVES:])
        found["easy"].append(negatives[:NEGATIVES])
    if not any(len(row) for row in found["hard"]):
        raise ValueError("no query has a negative: there is nothing to compare the positives with")
    return SimilarityStats(**{kind: np.concatenate(rows) for kind, rows in found.items()})


def _check_row(row: np.ndarray, positive: int, query: int) -> np.ndarray:
    row = np.asarray(row, np.float32)
    if row.ndim != 1 or not 0 <= positive < len(row):
        raise ValueError(
            f"query {query}: expected scores [c] with the positive at an index below c, found "
            f"scores {row.shape} and index {positive}"
        )
    # `not all(<=)` is also true for NaN. float32 dot products of unit vectors exceed 1 by far less than
    # 1e-3.
    if not np.all(np.abs(row) <= 1 + 1e-3):
        raise ValueError(
            f"query {query}: scores must be cosines, found {row[np.argmax(~(np.abs(row) <= 1.001))]};"
            " L2-normalise the embeddings"
        )
    return row
