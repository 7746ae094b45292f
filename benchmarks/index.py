"""Time, memory, disk and recall of an index over generated clustered vectors, 1 000 000 of them by default.

    python benchmarks/index.py [--rows 1000000] [--dim 128] [--precision float32] [--search-dim N]

The vectors lie around 10 000 centres, with a spectrum that decays like that of real embeddings. Queries are new
vectors around the same centres. The peer is NumPy: one matrix in memory, compared with each query. It
has to have that matrix; the index reads from the disk.
"""

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil

from llave_jax.common.tables import align
from llave_jax.search.columns import Row
from llave_jax.search.index import Index

CENTRES = 10_000
CHUNK = 10_000
QUERIES = 100
K = 10


class Vectors:
    """Generated vectors, a chunk at a time, the same ones each time."""

    def __init__(self, dimension: int):
        rng = np.random.default_rng(0)
        self._spectrum = (1 + np.arange(dimension, dtype=np.float32)) ** -0.5
        self._centres = rng.standard_normal((CENTRES, dimension), np.float32)

    def chunk(self, number: int, count: int = CHUNK) -> np.ndarray:
        """Unit vectors float32 [count, D]."""
        rng = np.random.default_rng([1, number])
        noise = rng.standard_normal((count, len(self._spectrum)), np.float32)
        vectors = (self._centres[rng.integers(0, CENTRES, count)] + 1.2 * noise) * self._spectrum
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _truth(vectors: Vectors, queries: np.ndarray, rows: int) -> list[set[str]]:
    """The ids of each query's nearest rows."""
    scores = np.full((len(queries), K), -np.inf, np.float32)
    places = np.zeros((len(queries), K), np.int64)
    for number in range(rows // CHUNK):
        new = queries @ vectors.chunk(number).T
        scores = np.concatenate([scores, new], axis=1)
        here = np.broadcast_to(number * CHUNK + np.arange(CHUNK), new.shape)
        places = np.concatenate([places, here], axis=1)
        best = np.argpartition(-scores, K, axis=1)[:, :K]
        scores = np.take_along_axis(scores, best, 1)
        places = np.take_along_axis(places, best, 1)
    return [{f"item {place}" for place in row} for row in places]


def _resident() -> str:
    return f"{psutil.Process().memory_info().rss / 2**30:.2f}"


def _timed(search, queries, truth) -> list[str]:
    times, recall = [], []
    for query, true in zip(queries, truth, strict=True):
        start = time.perf_counter()
        found = search(query)
        times.append(1e3 * (time.perf_counter() - start))
        recall.append(len(true & found) / K)
    return [
        f"{np.median(times):.1f}",
        f"{np.percentile(times, 99):.1f}",
        f"{np.mean(recall):.3f}",
    ]


def _build(path: Path, vectors: Vectors, args: argparse.Namespace) -> Index:
    index = Index.create(
        path, args.dim, model={}, precision=args.precision, search_dim=args.search_dim
    )
    start = time.monotonic()
    steps = [["rows", "s", "resident GiB"]]
    generating = 0.0
    for number in range(args.rows // CHUNK):
        begin = time.monotonic()
        chunk = vectors.chunk(number)
        generating += time.monotonic() - begin
        rows = [
            Row(f"item {number * CHUNK + i}", "text", metadata={"part": i % 10})
            for i in range(CHUNK)
        ]
        index.add(rows, chunk)
        done = (number + 1) * CHUNK
        if done % (args.rows // 5) == 0:
            seconds = time.monotonic() - start - generating
            steps.append([str(done), f"{seconds:.1f}", _resident()])
    print(align(steps), flush=True)
    start = time.monotonic()
    ann = index.optimise(approximate=True).ann
    print(f"approximate index and its recall: {time.monotonic() - start:.1f} s: {ann}", flush=True)
    return index


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--precision", choices=("float32", "float16"), default="float32")
    parser.add_argument("--search-dim", type=int)
    args = parser.parse_args()
    args.rows -= args.rows % CHUNK
    vectors = Vectors(args.dim)
    queries = vectors.chunk(-1 % 2**32, QUERIES)
    truth = _truth(vectors, queries, args.rows)
    folder = Path(tempfile.mkdtemp())
    try:
        index = _build(folder / "items.lance", vectors, args)
        size = index.info()["bytes"] / 2**30
        print(f"{size:.2f} GiB on disk")
        table = [["search", "median ms", "p99 ms", "recall@10"]]

        def searching(**options):
            return lambda query: {hit.id for hit in index.search(query, K, **options)}

        some, few = queries[:10], truth[:10]
        _timed(searching(), some, few)  # warm
        table.append(["approximate", *_timed(searching(), queries, truth)])
        table.append(["exact, from disk", *_timed(searching(exact=True), some, few)])
        filtered = _timed(searching(where="part = 3"), queries, truth)
        table.append(["approximate, part = 3", *filtered[:2], "-"])
        print(f"resident after searching: {_resident()} GiB", flush=True)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        matrix = np.concatenate([vectors.chunk(number) for number in range(args.rows // CHUNK)])

        def by_numpy(query):
            scores = matrix @ query
            return {f"item {i}" for i in np.argpartition(-scores, K)[:K]}

        table.append(["NumPy, in memory", *_timed(by_numpy, queries, truth)])
        print(align(table))
        print(f"peak resident: {peak:.2f} GiB; NumPy's matrix: {matrix.nbytes / 2**30:.2f} GiB")
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
