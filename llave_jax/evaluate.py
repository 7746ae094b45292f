"""Command line: score a model on a benchmark.

    python -m llave_jax.evaluate --model DIR --benchmark mmeb --data DIR --output DIR

Writes scores, predictions, a table and a page to look at (report.html). Running the same command
again continues where it was stopped. Owns the sequence of steps; each benchmark is a module of
`llave_jax.evaluation`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from llave_jax.common import command_line, interrupts
from llave_jax.common.files import remove_abandoned, write_text
from llave_jax.common.locks import only_writer
from llave_jax.digits import dataset as digits
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.precision import PRECISIONS
from llave_jax.embedding.run_info import settings_of
from llave_jax.evaluation import report, video_data, video_retrieval
from llave_jax.evaluation.cache import EmbeddingCache, Encode
from llave_jax.evaluation.forms import Form, read_forms, to_json
from llave_jax.evaluation.mmeb import evaluate_mmeb
from llave_jax.evaluation.retrieval import check_installed, evaluate_retrieval, read_task
from llave_jax.inputs import video_decode
from llave_jax.parallel import peers, processes
from llave_jax.weights.fingerprint import model_fingerprint
from llave_jax.weights.resolve import resolve_model

# What computed the results, for `run.json`; None on processes other than the first.
Run = dict[str, Any] | None
Forms = tuple[Form, ...]

BENCHMARKS = ("mmeb", "digits", "retrieval", *video_data.READERS)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("llave_jax.evaluate", __doc__)
    command_line.add_model_argument(parser)
    command_line.add_adapter_argument(parser)
    parser.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    parser.add_argument("--output", required=True, help="where scores and tables are written")
    parser.add_argument("--data", help="the benchmark's directory (digits: built there if absent)")
    parser.add_argument("--images", help="mmeb: image folder or zip archive, if not in --data")
    parser.add_argument("--subsets", help="mmeb: comma-separated datasets; default: all in --data")
    parser.add_argument(
        "--cache", help="directory of embeddings to reuse; default: <output>/embeddings"
    )
    parser.add_argument("--batch-size", type=int, help="items encoded together; default: automatic")
    parser.add_argument(
        "--max-length",
        type=int,
        help=f"tokens of an item; default: the model's, {video_retrieval.MAX_LENGTH} for "
        f"{', '.join(video_data.READERS)}",
    )
    parser.add_argument(
        "--truncate-dim",
        type=int,
        help="score the first numbers of each embedding, normalised again",
    )
    parser.add_argument("--dims", help="score these numbers of dimensions too, as 64,256,896")
    parser.add_argument(
        "--precision",
        help=f"score vectors stored in these too, as int8,binary; of {', '.join(PRECISIONS)}",
    )
    command_line.add_dtype_argument(parser)
    processes.add_arguments(parser)
    args = parser.parse_args(argv)
    if args.data is None and args.benchmark != "digits":
        parser.error(f"--benchmark {args.benchmark} needs --data")
    if args.max_length is None and args.benchmark in video_data.READERS:
        args.max_length = video_retrieval.MAX_LENGTH
    return args


def _command(args: argparse.Namespace) -> None:
    processes.initialize(args)
    interrupts.take_again()
    first = jax.process_index() == 0
    command_line.set_up_logging(args, first=first)
    with contextlib.ExitStack() as stack:
        processes.on_first_process(lambda: stack.enter_context(_output(Path(args.output))))
        table = evaluate(args)
        if first:
            print(table)
            write_text(Path(args.output) / "table.txt", table + "\n")


@contextlib.contextmanager
def _output(output: Path) -> Iterator[None]:
    """Keeps the output to this job, without what killed jobs have left in it."""
    with only_writer(output):
        remove_abandoned(output)
        yield


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(peers.sharing_failures(_command), parse_args(argv))


def evaluate(args: argparse.Namespace) -> str:
    """Does what the command line asks for.

    Args:
      args: of `parse_args`.

    Returns:
      The table of scores.

    Raises:
      ValueError, OSError: model or data are not what they should be.
    """
    if args.benchmark == "retrieval":
        check_installed()
    elif args.benchmark in video_data.READERS:
        video_decode.check_installed()
    first = jax.process_index() == 0
    model = resolve_model(args.model)
    embedder = Embedder.from_pretrained(
        model, adapter=args.adapter, dtype=args.dtype, max_length=args.max_length
    )
    width = embedder.config.text.hidden_size
    if args.truncate_dim is not None and not 1 <= args.truncate_dim <= width:
        raise ValueError(f"--truncate-dim is {args.truncate_dim}; expected 1 to {width}")
    forms = read_forms(args.dims, args.precision, args.truncate_dim or width)
    cache, run = EmbeddingCache(), None
    if first:
        fingerprint = model_fingerprint(model, embedder.model.dtype, embedder.config, args.adapter)
        cache = EmbeddingCache(
            args.cache or Path(args.output) / "embeddings",
            fingerprint,
            model=args.model,
            truncate_dim=args.truncate_dim,
        )
        run = settings_of(args.model, embedder, fingerprint, args.adapter)
        if args.truncate_dim is not None:
            run["truncate_dim"] = args.truncate_dim

    def encode(items):
        return embedder.encode(items, batch_size=args.batch_size, show_progress=first)

    if args.benchmark in video_data.READERS:
        table = _evaluate_videos(encode, cache, args, run, forms)
    elif args.benchmark == "retrieval":
        table = _evaluate_own_corpus(encode, cache, args, run, forms)
    else:
        table = _evaluate_rows(encode, cache, args, run, forms)
    return f"{table}\n\nModel: {_computed_by(run)}." if run is not None else table


def _computed_by(run: dict[str, Any]) -> str:
    adapter = f" with {run['adapter']}" if "adapter" in run else ""
    first = f", first {run['truncate_dim']} numbers" if "truncate_dim" in run else ""
    return f"{run['model']}{adapter} in {run['dtype']}{first}"


def _write_forms(output: Path, scores: Mapping[Form, Mapping[str, float | None]]) -> None:
    if scores:
        write_text(output / "forms.json", json.dumps(to_json(scores), indent=2) + "\n")


def _evaluate_rows(
    encode: Encode, cache: EmbeddingCache, args: argparse.Namespace, run: Run, forms: Forms
) -> str:
    """MMEB, or the bundled benchmark in its form. Returns the table."""
    output = Path(args.output)
    datasets = [name.strip() for name in args.subsets.split(",")] if args.subsets else None
    data, infos = args.data, None
    if args.benchmark == "digits":
        data = digits.build(data or output / "digits") / "eval"
        infos = digits.INFOS
    results = evaluate_mmeb(
        encode,
        data,
        datasets,
        output,
        images=args.images,
        cache=cache,
        infos=infos,
        settings=run,
        forms=forms,
    )
    if run is not None:
        _write_forms(output, results.by_form())
        page, title = output / "report.html", args.benchmark
        report.write_mmeb_report(
            page, results, data, images=args.images, title=title, model=_computed_by(run)
        )
    return results.table()


def _evaluate_videos(
    encode: Encode, cache: EmbeddingCache, args: argparse.Namespace, run: Run, forms: Forms
) -> str:
    """Text-video retrieval. Returns the table."""
    dataset = video_data.READERS[args.benchmark](args.data)
    result = video_retrieval.evaluate_video(
        encode, dataset, args.output, cache=cache, settings=run, forms=forms
    )
    if run is not None:
        _write_forms(Path(args.output), result.forms)
        report.write_video_report(
            Path(args.output) / "report.html", dataset, result, model=_computed_by(run)
        )
    return result.table()


def _evaluate_own_corpus(
    encode: Encode, cache: EmbeddingCache, args: argparse.Namespace, run: Run, forms: Forms
) -> str:
    """Retrieval in BEIR's layout. Returns the table."""
    task = read_task(args.data)
    result = evaluate_retrieval(encode, task, args.output, cache=cache, settings=run, forms=forms)
    if run is not None:
        _write_forms(Path(args.output), result.forms)
        report.write_retrieval_report(
            Path(args.output) / "report.html",
            task,
            result,
            title=args.data,
            model=_computed_by(run),
        )
    return result.table()


if __name__ == "__main__":
    sys.exit(main())
