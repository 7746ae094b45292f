"""Command line: find hard negatives of training rows with a model.

    python -m llave_jax.mine --model DIR --data pairs/ --output mined/
    python -m llave_jax.train ... --config.data.path=mined --config.data.image_root=pairs

Embeds the distinct queries and targets of the rows, searches exactly, and gives each row the targets that are
similar to its query but not its own. What counts as a positive is never taken: targets of other rows with the same query, and equal
contents under other names. Writes SUBSET.jsonl, rows for training with `neg_text` and `neg_image_path` lists, and
neighbours.parquet, an order of rows. Image paths stay as they are.

The same command continues a job that was stopped in any way, to the same files. With other flags for what becomes a
negative it keeps the embeddings.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from llave_jax.common import command_line
from llave_jax.data.sources import MmebSource, open_source
from llave_jax.embedding.embedder import Embedder
from llave_jax.mining.candidates import Rules
from llave_jax.mining.job import WORK, Mining, mine, report_text
from llave_jax.weights.fingerprint import model_fingerprint
from llave_jax.weights.resolve import resolve_model


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("llave_jax.mine", __doc__)
    command_line.add_model_argument(parser)
    parser.add_argument("--data", type=Path, required=True, help="rows: a folder or a JSON file")
    parser.add_argument("--output", type=Path, required=True, help="directory to write")
    parser.add_argument("--split", default="original", help="original or diverse_instruction")
    parser.add_argument("--subsets", default="", help="comma-separated; all by default")
    parser.add_argument(
        "--max-rows", type=int, help="the first rows of each subset; all by default"
    )
    parser.add_argument("--image-root", type=Path, help="what image paths are relative to: DATA")
    rules = parser.add_argument_group("what becomes a negative")
    rules.add_argument(
        "--across", action="store_true", help="targets of all subsets, not of the row's own only"
    )
    rules.add_argument(
        "--ranks",
        type=_ranks,
        default=(0, 100),
        metavar="FIRST:END",
        help="window of ranks among what is no known positive, from 0, END excluded (default: 0:100)",
    )
    bound = rules.add_mutually_exclusive_group()
    bound.add_argument(
        "--relative",
        type=float,
        help="cosines below this share of the positive's (default: 0.95)",
    )
    bound.add_argument("--margin", type=float, help="cosines below the positive's less this")
    rules.add_argument(
        "--negatives", type=int, default=4, help="of a row, at most (default: %(default)s)"
    )
    rules.add_argument(
        "--sample", action="store_true", help="by chance from what is left; otherwise the best"
    )
    rules.add_argument("--seed", type=int, default=0, help="of --sample")
    rules.add_argument(
        "--neighbours",
        type=int,
        default=32,
        help="of a row in neighbours.parquet, at most (default: %(default)s)",
    )
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="a row that cannot be used ends the job, or is left out and listed",
    )
    parser.add_argument(
        "--memory",
        type=int,
        default=256,
        metavar="MIB",
        help="of each device, for similarities that are compared at once (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, help="items encoded together; default: automatic")
    parser.add_argument("--max-length", type=int, help="tokens of an item; default: the model's")
    command_line.add_dtype_argument(parser)
    args = parser.parse_args(argv)
    if args.memory < 1:
        parser.error(f"--memory is {args.memory}; expected a positive number of MiB")
    return args


def _ranks(text: str) -> tuple[int, int]:
    first, colon, end = text.partition(":")
    if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end)):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected FIRST:END, such as 10:100, with FIRST < END"
        )
    return int(first), int(end)


def _command(args: argparse.Namespace) -> None:
    command_line.set_up_logging(args)
    rules = Rules(
        first_rank=args.ranks[0],
        end_rank=args.ranks[1],
        relative=0.95 if args.margin is None and args.relative is None else args.relative,
        margin=args.margin,
        negatives=args.negatives,
        sample=args.sample,
        seed=args.seed,
        neighbours=args.neighbours,
    )
    source = open_source(
        args.data,
        subsets=args.subsets.split(",") if args.subsets else None,
        split=args.split,
        max_rows=args.max_rows,
        image_root=args.image_root,
    )
    if not isinstance(source, MmebSource):
        raise ValueError(
            f"--data {args.data} is prepared; expected the rows that it was prepared from"
        )
    model = resolve_model(args.model)
    embedder = Embedder.from_pretrained(model, dtype=args.dtype, max_length=args.max_length)
    mining = Mining(
        source,
        str(args.data),
        args.output,
        model_fingerprint(model, embedder.model.dtype, embedder.config),
        model=args.model,
        rules=rules,
        across=args.across,
        memory=args.memory << 20,
        on_error=args.on_error,
        batch_size=args.batch_size,
    )
    counts = mine(embedder, mining)
    print(report_text(counts, rules))
    skipped = sum(count.rows - count.used for count in counts.values())
    if skipped:
        print(f"{skipped} rows skipped, see {args.output / WORK / 'skipped.jsonl'}")
    root = source.image_root.absolute()
    print(f"train with --config.data.path={args.output} --config.data.image_root={root}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(_command, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
