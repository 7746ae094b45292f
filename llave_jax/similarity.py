"""Command line: how evaluated models separate positives from negatives (the paper's Fig. 1, Table 1).

    python -m llave_jax.similarity --evaluations InfoNCE=DIR LLaVE=DIR --output DIR

Reads what `llave_jax.evaluate` wrote. Writes similarity.png, similarity.json and similarity.txt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llave_jax.evaluation.similarity_comparison import compare


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llave_jax.similarity",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--evaluations",
        nargs="+",
        required=True,
        metavar="LABEL=DIR",
        help="outputs of llave_jax.evaluate, with a name for each",
    )
    parser.add_argument("--subsets", help="comma-separated datasets; default: those in all outputs")
    parser.add_argument("--output", required=True, help="for similarity.png, .json and .txt")
    args = parser.parse_args(argv)
    pairs = [entry.partition("=") for entry in args.evaluations]
    if not all(label and directory for label, _, directory in pairs):
        parser.error(f"--evaluations takes LABEL=DIR, found {' '.join(args.evaluations)}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    pairs = [entry.partition("=") for entry in args.evaluations]
    subsets = args.subsets.split(",") if args.subsets else None
    try:
        print(compare({label: path for label, _, path in pairs}, subsets, args.output))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
