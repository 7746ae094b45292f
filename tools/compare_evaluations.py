"""Compare finished evaluations: scores, differences and similarities, as tables and as a page.

    python tools/compare_evaluations.py --evaluation mine=results/mine --baseline base=results/base --output compared

Reads what `llave_jax.evaluate` wrote, and needs neither model nor data. Writes table.txt and report.html. Differences
are the evaluation's scores less the baseline's.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llave_jax.common import command_line
from llave_jax.common.files import write_text
from llave_jax.evaluation.comparison import (
    check_shared,
    compared,
    of_benchmark,
    read_evaluations,
)
from llave_jax.evaluation.report import write_comparison


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("tools/compare_evaluations.py", __doc__)
    parser.add_argument(
        "--evaluation",
        required=True,
        metavar="[LABEL=]DIR",
        help="--output of an evaluation; the label is the folder's name if none is given",
    )
    parser.add_argument(
        "--baseline",
        nargs="+",
        required=True,
        metavar="[LABEL=]DIR",
        help="--output of the evaluations that it is compared with",
    )
    parser.add_argument("--output", required=True, help="for table.txt and report.html")
    return parser.parse_args(argv)


def _compare(args: argparse.Namespace) -> None:
    command_line.set_up_logging(args)
    evaluation, *baselines = read_evaluations([args.evaluation, *args.baseline])
    check_shared(baselines, list(evaluation.benchmarks))
    tables = []
    for name, own in evaluation.benchmarks.items():
        others = of_benchmark(baselines, name)
        if others:
            tables.append(f"{name}\n\n{compared(own, others, evaluation.label)}")
    table = "\n\n".join(tables)
    write_text(Path(args.output) / "table.txt", table + "\n")
    write_comparison(Path(args.output) / "report.html", evaluation, baselines)
    print(table)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(_compare, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
