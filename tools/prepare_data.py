"""Writes MMEB training data, or rows of one's own, as array records for fast random access.

    python tools/prepare_data.py --input MMEB-train --output prepared --num-workers 8

Can be stopped at any moment and run again with the same arguments: complete shards are verified by
their checksums and kept. Training then takes `--config.data.path=prepared`.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from llave_jax.common import command_line, ray_engine
from llave_jax.common.files import remove_abandoned
from llave_jax.common.locks import only_writer
from llave_jax.data.prepare import prepare
from llave_jax.data.skips import SkipLog, TooManySkips, by_subset, listed
from llave_jax.data.sources import MmebSource, open_source


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("tools/prepare_data.py", __doc__)
    parser.add_argument("--input", type=Path, required=True, help="rows: a folder or a JSON file")
    parser.add_argument("--output", type=Path, required=True, help="where records are written")
    parser.add_argument("--split", default="original", help="original or diverse_instruction")
    parser.add_argument("--subsets", default="", help="comma-separated; all by default")
    parser.add_argument(
        "--max-rows", type=int, help="the first rows of each subset; all by default"
    )
    parser.add_argument("--image-root", type=Path, help="what image paths are relative to: INPUT")
    parser.add_argument("--rows-per-shard", type=int, default=1024)
    parser.add_argument("--num-workers", type=int, default=os.cpu_count())
    parser.add_argument(
        "--on-error", choices=("raise", "skip"), default="raise", help="for rows that are broken"
    )
    parser.add_argument("--max-skip-share", type=float, default=0.01, help="with skip")
    parser.add_argument(
        "--trust-images", action="store_true", help="do not decode every image to check it"
    )
    ray_engine.add_engine_argument(parser)
    return parser.parse_args(argv)


def _write_records(args: argparse.Namespace) -> None:
    command_line.set_up_logging(args)
    source = open_source(
        args.input,
        subsets=args.subsets.split(",") if args.subsets else None,
        split=args.split,
        max_rows=args.max_rows,
        image_root=args.image_root,
    )
    if not isinstance(source, MmebSource):
        raise ValueError(f"--input {args.input} is prepared already")
    with only_writer(args.output):
        _prepare(args, source)


def _prepare(args: argparse.Namespace, source: MmebSource) -> None:
    remove_abandoned(args.output)
    limit = int(args.max_skip_share * len(source))
    skips = SkipLog(args.output / f"skipped-{args.split}.jsonl", limit, source.left_out)
    prepare(
        source,
        args.output,
        split=args.split,
        rows_per_shard=args.rows_per_shard,
        num_workers=args.num_workers,
        check_images=not args.trust_images,
        skips=skips if args.on_error == "skip" else None,
        engine=args.engine,
    )
    rows, subsets = len(source) - len(skips), len(source.subsets)
    print(f"{rows} rows of {subsets} subsets are in {args.output}")
    if skips.pair_ids:
        print(f"{len(skips)} rows could not be used: {by_subset(skips.pair_ids)}")
    if source.left_out:
        left_out = listed(source.left_out)
        print(f"{len(left_out)} rows have an empty side: {by_subset(left_out)}")
    if skips.pair_ids or source.left_out:
        print(f"these are left out and listed in {skips.path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(_write_records, parse_args(argv), (ValueError, OSError, TooManySkips))


if __name__ == "__main__":
    sys.exit(main())
