"""Command line: how evaluated models separate positives from negatives (the paper's Fig. 1, Table 1).

    python -m llave_jax.similarity --evaluations InfoNCE=DIR LLaVE=DIR --output DIR

Reads what `llave_jax.evaluate` wrote. Writes similarity.png, similarity.json and similarity.txt.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from llave_jax.common import command_line
from llave_jax.evaluation.similarity_comparison import compare


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("llave_jax.similarity", __doc__)
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


def _show(args: argparse.Namespace) -> None:
    command_line.set_up_logging(args)
    pairs = [entry.partition("=") for entry in args.evaluations]
    subsets = args.subsets.split(",") if args.subsets else None
    print(compare({label: path for label, _, path in pairs}, subsets, args.output))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(_show, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
