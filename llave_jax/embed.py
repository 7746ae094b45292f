"""Command line: embed items of files and folders.

    python -m llave_jax.embed --model DIR --input items.jsonl --output DIR
    python -m llave_jax.embed --model DIR --input photos/ --output DIR

Reads JSON lines (objects with any of `text`, `image`, `images`, `video`, and an optional `id`), parquet files
with columns of these names or others, and pictures; paths are relative to the file that names them. Writes embeddings.npy (float32 [n, D], L2-normalised) and ids.jsonl
(one id a line; a picture's is its path, any other item without one has its number, from 0), both in the order of the
input. With --format parquet or lance, ids, vectors and metadata are columns of a parquet data set or a Lance data
set; jobs with --shard share its directory; --engine ray embeds on a Ray cluster. With --on-error skip, items that cannot be read are left out and listed.
run.json names the model and its precision.

The same command continues a job that was stopped in any way. It embeds items that were added to the
input, and embeds items again whose text, images or videos have changed, with the rest of their chunk.
Files are compared by size, times and inode first; if one of these differs, by their content. What stands in DIR
is compared with its checksums, and what was cut off or changed is embedded again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llave_jax.common import command_line, extras, interrupts, ray_engine
from llave_jax.embedding import item_sources
from llave_jax.embedding.bulk import Job, Result, embed_items
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.part_store import shard_suffix
from llave_jax.embedding.parts import FORMATS
from llave_jax.embedding.precision import PRECISIONS
from llave_jax.embedding.run_info import record_run, settings_of
from llave_jax.parallel import peers, processes
from llave_jax.weights import model_dir
from llave_jax.weights.fingerprint import model_fingerprint
from llave_jax.weights.prompts import find_prompt
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
    command_line.add_adapter_argument(parser)
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument(
        "--format",
        choices=("npy", *FORMATS),
        help="default: lance if --output ends in .lance, otherwise npy",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        default=(0, 1),
        metavar="I/N",
        help="embed the I-th of N parts of the items, I from 0; all write to the same --output (parquet, lance)",
    )
    parser.add_argument("--batch-size", type=int, help="items encoded together; default: automatic")
    parser.add_argument("--max-length", type=int, help="tokens of an item; default: the model's")
    parser.add_argument(
        "--prompt-name",
        help="one of the model's prompts goes in front of each text (query, document)",
    )
    parser.add_argument("--prompt", help="this text goes in front of each text")
    parser.add_argument(
        "--truncate-dim",
        type=int,
        metavar="DIM",
        help="keep the first DIM numbers, normalised again",
    )
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="float32", help="of the numbers that are written"
    )
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="raise",
        help="an item that cannot be read ends the job, or is left out and listed",
    )
    command_line.add_dtype_argument(parser)
    item_sources.add_arguments(parser)
    parser.add_argument(
        "--allow-urls",
        action="store_true",
        help="fetch pictures that lines and tables name by http(s) URLs, from public addresses only",
    )
    ray_engine.add_arguments(parser)
    processes.add_arguments(parser)
    return parser.parse_args(argv)


def _command(args: argparse.Namespace) -> None:
    if args.engine == "ray":
        _on_ray(args)
        return
    processes.initialize(args)
    if args.allow_urls and jax.process_count() > 1:
        raise ValueError("--allow-urls needs a single process: use --shard for several jobs")
    interrupts.take_again()
    first = jax.process_index() == 0
    command_line.set_up_logging(args, first=first)
    model = resolve_model(args.model)
    embedder = Embedder.from_pretrained(
        model, adapter=args.adapter, dtype=args.dtype, max_length=args.max_length
    )
    fingerprint = model_fingerprint(model, embedder.model.dtype, embedder.config, args.adapter)
    job = _job(args, fingerprint, embedder.prompts)
    result = embed_items(embedder, job)
    if first:
        _report(job, result, settings_of(args.model, embedder, fingerprint, args.adapter))


def _on_ray(args: argparse.Namespace) -> None:
    command_line.set_up_logging(args)
    extras.require("ray", "jobs on a cluster")
    from llave_jax.embedding import ray_bulk

    path = resolve_model(args.model)
    actors, resources = ray_engine.workers(args)
    model = ray_bulk.find_model(path, args.dtype, args.max_length, resources, args.adapter)
    job = _job(args, model.fingerprint, model_dir.load_prompts(path))
    result = ray_bulk.embed_on_ray(model, job, actors=actors, resources=resources)
    settings = {"model": args.model, "fingerprint": model.fingerprint, "dtype": model.dtype}
    settings |= {} if args.adapter is None else {"adapter": args.adapter}
    _report(job, result, settings | {"max_length": model.max_length})


def _job(args: argparse.Namespace, fingerprint: str, prompts: Mapping[str, str]) -> Job:
    return Job(
        item_sources.from_arguments(args, args.shard, args.allow_urls),
        Path(args.output),
        fingerprint,
        format=args.format or ("lance" if args.output.rstrip("/").endswith(".lance") else "npy"),
        on_error=args.on_error,
        model=args.model,
        batch_size=args.batch_size,
        prompt=find_prompt(prompts, args.prompt_name, args.prompt),
        truncate_dim=args.truncate_dim,
        precision=args.precision,
    )


def _report(job: Job, result: Result, settings: dict[str, Any]) -> None:
    names = ("truncate_dim", "precision", "prompt")
    settings = settings | {name: getattr(job, name) for name in names if getattr(job, name)}
    suffix = shard_suffix(job.source.shard)
    file = "run.json" if job.format == "npy" else f"_run{suffix}.json"
    record_run(job.output, result.path.name, settings, file)
    print(f"{result.embedded} embeddings of {result.dimension} numbers in {result.path}")
    if result.skipped:
        print(f"{result.skipped} items skipped, see {result.skipped_list}")


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(
            f"{text!r}: expected I/N, such as 0/4, with I from 0 to N - 1"
        )
    return int(index), int(count)


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
