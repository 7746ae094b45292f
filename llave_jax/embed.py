"""Command line: embed items of files and folders.

    python -m llave_jax.embed --model DIR --input items.jsonl --output DIR
    python -m llave_jax.embed --model DIR --input photos/ --output DIR

Reads JSON lines (objects with any of `text`, `image`, `images`, `video`, and an optional `id`), parquet files
with columns of these names or others, and pictures; paths are relative to the file that names them. Writes embeddings.npy (float32 [n, D], L2-normalised) and ids.jsonl (one id a
line; a picture's is its path, any other item without one has its number, from 0), both in the order of the input. With --on-error
skip, items that cannot be read are left out of both files and listed in skipped.jsonl. run.json names
the model and its precision.

The same command continues a job that was stopped in any way. It embeds items that were added to the
input, and embeds items again whose text, images or videos have changed, with the rest of their chunk.
Files are compared by size, times and inode first; if one of these differs, by their content. What stands in DIR
is compared with its checksums, and what was cut off or changed is embedded again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import jax

from llave_jax.common import command_line, interrupts
from llave_jax.embedding import item_sources
from llave_jax.embedding.bulk import embed_file
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.run_info import record_run, settings_of
from llave_jax.parallel import peers, processes
from llave_jax.weights.fingerprint import model_fingerprint
from llave_jax.weights.resolve import resolve_model


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("llave_jax.embed", __doc__)
    command_line.add_model_argument(parser)
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--batch-size", type=int, help="items encoded together; default: automatic")
    parser.add_argument("--max-length", type=int, help="tokens of an item; default: the model's")
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="an item that cannot be read ends the job, or is left out and listed",
    )
    command_line.add_dtype_argument(parser)
    item_sources.add_arguments(parser)
    processes.add_arguments(parser)
    return parser.parse_args(argv)


def _command(args: argparse.Namespace) -> None:
    processes.initialize(args)
    interrupts.take_again()
    first = jax.process_index() == 0
    command_line.set_up_logging(args, first=first)
    model = resolve_model(args.model)
    embedder = Embedder.from_pretrained(model, dtype=args.dtype, max_length=args.max_length)
    fingerprint = model_fingerprint(model, embedder.model.dtype, embedder.config)
    result = embed_file(
        embedder,
        item_sources.from_arguments(args),
        args.output,
        fingerprint,
        model=args.model,
        batch_size=args.batch_size,
        on_error=args.on_error,
    )
    if first:
        settings = settings_of(args.model, embedder, fingerprint)
        record_run(args.output, result.path.name, settings)
        dimension = embedder.config.text.hidden_size
        print(f"{result.embedded} embeddings of {dimension} numbers in {result.path}")
        if result.skipped:
            print(f"{result.skipped} items skipped, see {result.path.with_name('skipped.jsonl')}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(peers.sharing_failures(_command), parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
