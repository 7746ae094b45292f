"""Command line: score a model on a benchmark.

    python -m llave_jax.evaluate --model DIR --benchmark mmeb --data DIR --output DIR

Owns the sequence of steps; each benchmark is a module of `llave_jax.benchmarks`.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

import jax

from llave_jax.benchmarks import cache as caching
from llave_jax.benchmarks import digits
from llave_jax.benchmarks.files import write_text
from llave_jax.benchmarks.mmeb import evaluate_mmeb
from llave_jax.benchmarks.mmeb_data import DatasetInfo
from llave_jax.embedder import Embedder

BENCHMARKS = ("mmeb", "digits")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m llave_jax.evaluate", description=__doc__)
    parser.add_argument(
        "--model", required=True, help="converted model directory, or a training run's directory"
    )
    parser.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    parser.add_argument("--output", required=True, help="where scores and tables are written")
    parser.add_argument("--data", help="the benchmark's directory (digits: built there if absent)")
    parser.add_argument("--images", help="image folder or zip archive, if it is not in --data")
    parser.add_argument("--subsets", help="comma-separated dataset names; default: all present")
    parser.add_argument(
        "--cache", help="directory of embeddings to reuse; default: <output>/embeddings"
    )
    parser.add_argument("--batch_size", type=int, help="items encoded together; default: automatic")
    args = parser.parse_args(argv)
    if args.data is None and args.benchmark != "digits":
        parser.error(f"--benchmark {args.benchmark} needs --data")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    first = jax.process_index() == 0
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    output = Path(args.output)

    embedder = Embedder.from_pretrained(args.model)
    cache = caching.EmbeddingCache(
        (args.cache or output / "embeddings") if first else None,
        caching.fingerprint(caching.model_files(args.model), embedder.model.dtype),
    )

    def encode(items):
        return embedder.encode(items, batch_size=args.batch_size, show_progress=first)

    datasets = [name.strip() for name in args.subsets.split(",")] if args.subsets else None
    data, infos = args.data, None
    if args.benchmark == "digits":
        data = digits.build(data or output / "digits") / "eval"
        infos = tuple(DatasetInfo(name, task) for name, task in digits.SUBSETS.items())
    results = evaluate_mmeb(
        encode, data, datasets, output, images=args.images, cache=cache, infos=infos
    )
    if first:
        print(results.table())
        write_text(output / "table.txt", results.table() + "\n")


if __name__ == "__main__":
    main()
