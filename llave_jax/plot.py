"""Command line: curves of training runs, over one another.

    python -m llave_jax.plot RUN [RUN ...] [--output DIR]

Draws loss, recall, similarity, learning rate and speed over the steps. Writes curves.html, curves.png and
metrics.csv, of runs that are done or still going on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llave_jax.common import command_line
from llave_jax.training.curves import read_runs, write_curves


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("llave_jax.plot", __doc__)
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="the --workdir of a training run, or LABEL=DIR to call it something else",
    )
    parser.add_argument(
        "--output", type=Path, help="where files are written; default with one run: RUN/curves"
    )
    args = parser.parse_args(argv)
    if args.output is None and len(args.runs) > 1:
        parser.error("several runs need --output")
    return args


def draw(args: argparse.Namespace) -> None:
    """Draws what the flags say, and prints the files.

    Args:
      args: of `parse_args`.
    """
    directories = [_labelled(run) for run in args.runs]
    output = args.output or directories[0][1] / "curves"
    for path in write_curves(read_runs(directories), output):
        print(path)


def _labelled(run: str) -> tuple[str | None, Path]:
    """LABEL=DIR, unless there is a directory of this name ("sweep/rate=1e-5")."""
    label, equals, directory = run.partition("=")
    if equals and label and directory and not Path(run).exists():
        return label, Path(directory)
    return None, Path(run)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as of `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(draw, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
