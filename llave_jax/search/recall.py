"""How many of the true nearest neighbours an index's approximate search finds."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from llave_jax.search.index import Index

SAMPLE = 100
NEIGHBOURS = 10
# Partitions that are probed, in the order in which they are tried.
PROBES = (20, 50, 100, 200, 500)
# Scores are computed in another order than here.
_ROUNDING = 1e-5


def measure(index: Index, target: float) -> dict[str, Any]:
    """Compare approximate search with exact search, and choose how many partitions are probed.

    Items of the index are the queries, and do not count as their own neighbours. A found item counts if it is
    as similar as the tenth of the true neighbours. Queries of another kind than the items (texts for
    images) lie farther from them, and their recall can be lower.

    Args:
      index: with an approximate index.
      target: recall that is wanted.

    Returns:
      `recall` (recall@10, mean over `sample` items), `probes`, `target`, and the times of a search in
      milliseconds: `ann_ms` (median) and `exact_ms`.
    """
    ids, queries = index.sample(SAMPLE)
    least = _tenth_scores(index, queries)
    found, median = 0.0, 0.0
    probes = PROBES[0]
    for probes in PROBES:
        hits, times = [], []
        for id, query, bound in zip(ids, queries, least, strict=True):
            start = time.perf_counter()
            result = index.search(query, NEIGHBOURS + 1, probes=probes)
            times.append(time.perf_counter() - start)
            others = [hit for hit in result if hit.id != id][:NEIGHBOURS]
            hits.append(sum(hit.score >= bound - _ROUNDING for hit in others) / NEIGHBOURS)
        found, median = float(np.mean(hits)), float(np.median(times))
        if found >= target:
            break
    start = time.perf_counter()
    index.search(queries[0], NEIGHBOURS, exact=True)
    exact = time.perf_counter() - start
    return {
        "recall": round(found, 4),
        "sample": len(ids),
        "target": target,
        "probes": probes,
        "ann_ms": round(1e3 * median, 1),
        "exact_ms": round(1e3 * exact, 1),
    }


def _tenth_scores(index: Index, queries: np.ndarray) -> np.ndarray:
    """The score of each query's tenth neighbour, itself not counted."""
    best = np.full((len(queries), NEIGHBOURS + 1), -np.inf, np.float32)
    for vectors in index.vector_batches():
        scores = queries[:, : vectors.shape[1]] @ vectors.T
        both = np.concatenate([best, scores], axis=1)
        best = np.partition(both, both.shape[1] - NEIGHBOURS - 1, axis=1)[:, -NEIGHBOURS - 1 :]
    return best.min(axis=1)
