"""Time and peak memory of an exact search: 1 000 000 x 1 000 by default.

    python benchmarks/search.py [--rows 1000000] [--queries 1000] [--dim 896] [--k 100]

The corpus is random unit vectors in a temporary file, read as a memory map.
"""

import argparse
import resource
import tempfile
import time

import numpy as np

from llave_jax.embedding.search import search


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--dim", type=int, default=896)
    parser.add_argument("--k", type=int, default=100)
    args = parser.parse_args()

    rng = np.random.default_rng(0)
    with tempfile.NamedTemporaryFile(suffix=".f32") as file:
        corpus = np.memmap(file.name, np.float32, "w+", shape=(args.rows, args.dim))
        for start in range(0, args.rows, 10_000):
            rows = rng.standard_normal((min(10_000, args.rows - start), args.dim), np.float32)
            corpus[start : start + len(rows)] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        corpus.flush()
        corpus = np.memmap(file.name, np.float32, "r", shape=(args.rows, args.dim))
        queries = corpus[rng.integers(0, args.rows, args.queries)]
        queries = queries + 0.02 * rng.standard_normal(queries.shape, np.float32)
        start = time.monotonic()
        scores, indices = search(queries, corpus, args.k, show_progress=True)
        seconds = time.monotonic() - start
        checked = rng.integers(0, args.queries, 5)
        for query in checked:
            exact = corpus @ queries[query]
            expected = np.sort(exact)[::-1][: args.k]
            np.testing.assert_allclose(scores[query], expected, atol=1e-5)
            np.testing.assert_allclose(exact[indices[query]], scores[query], atol=1e-5)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(
        f"{args.rows} x {args.queries}, D {args.dim}, top {args.k}: {seconds:.1f} s, "
        f"{2 * args.rows * args.queries * args.dim / seconds / 1e9:.0f} GFLOP/s, "
        f"peak resident memory {peak:.2f} GiB (pages of the memory-mapped corpus included)"
    )


if __name__ == "__main__":
    main()
