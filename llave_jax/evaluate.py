"""Command line: score a model on benchmarks.

    python -m llave_jax.evaluate --model DIR --benchmark mmeb --data DIR --output DIR

Writes scores, predictions, a table and a page to look at (report.html). Running the same command
again continues where it was stopped. With --check-data nothing is scored: what the chosen tasks lack
on disk is listed. Owns the sequence of steps; each benchmark is a module of
`llave_jax.evaluation.benchmarks`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llave_jax.common import command_line, interrupts
from llave_jax.common.files import remove_abandoned, write_text
from llave_jax.common.locks import only_writer
from llave_jax.digits import dataset as digits
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.precision import PRECISIONS
from llave_jax.embedding.run_info import settings_of
from llave_jax.evaluation import comparison, mteb_run, report, run
from llave_jax.evaluation.benchmarks.base import Benchmark, Options, describe
from llave_jax.evaluation.benchmarks.mmeb import Mmeb
from llave_jax.evaluation.benchmarks.registry import BENCHMARKS, open_benchmark
from llave_jax.evaluation.cache import EmbeddingCache, Encode
from llave_jax.evaluation.comparison import (
    SUMMARY,
    Evaluation,
    check_shared,
    from_summary,
    read_evaluations,
)
from llave_jax.evaluation.forms import Form, read_forms, to_json
from llave_jax.evaluation.results import Results
from llave_jax.inputs.item import Item
from llave_jax.parallel import peers, processes
from llave_jax.weights import model_dir
from llave_jax.weights.fingerprint import model_fingerprint
from llave_jax.weights.prompts import side_prompts
from llave_jax.weights.resolve import resolve_model

DIGITS = "digits"
# Flags of the other benchmarks; mteb has its own data, and prompts of its tasks are the model's.
_NOT_OF_MTEB = (
    *("data", "tasks", "check_data", "images", "frames", "query_prompt", "document_prompt"),
    *("dims", "precision", "baseline"),
)
NAMES = ("mmeb", DIGITS, *(name for name in BENCHMARKS if name != "mmeb"))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("llave_jax.evaluate", __doc__)
    given = sys.argv[1:] if argv is None else argv
    scores = not {"--check-data", "--check_data"} & set(given)
    command_line.add_model_argument(parser, required=scores)
    command_line.add_adapter_argument(parser)
    parser.add_argument(
        "--benchmark",
        required=True,
        help=f"one or several, with commas, of {', '.join(NAMES)}, and mteb:NAME for a task or a benchmark of mteb",
    )
    parser.add_argument("--output", required=scores, help="where scores and tables are written")
    parser.add_argument(
        "--data",
        nargs="+",
        help="the benchmark's directory (digits: built there if absent); of several benchmarks NAME=DIR NAME=DIR, "
        "or a directory with a folder for each",
    )
    parser.add_argument(
        "--query-prompt",
        help="retrieval: put before each query's text; default: the model's prompt `query`, if it has one",
    )
    parser.add_argument(
        "--document-prompt", help="retrieval: put before each document's text, in the same way"
    )
    parser.add_argument(
        "--images", help="mmeb, mmeb-v2: image folder or zip archive, if not in --data"
    )
    parser.add_argument(
        "--frames", type=int, help="mmeb-v2: saved frames of a video that are used; default: 8"
    )
    parser.add_argument(
        "--tasks",
        "--subsets",
        help="comma-separated tasks (datasets); default: all in --data, or all of mmeb-v2",
    )
    parser.add_argument(
        "--check-data",
        action="store_true",
        help="list what the tasks lack on disk, with the commands that fetch it, and score nothing; no --model and "
        "no --output then",
    )
    parser.add_argument(
        "--cache", help="directory of embeddings to reuse; default: <output>/embeddings"
    )
    parser.add_argument("--batch-size", type=int, help="items encoded together; default: automatic")
    parser.add_argument(
        "--max-length",
        type=int,
        help="tokens of an item; default: the model's, or what the benchmark's videos need",
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
    parser.add_argument(
        "--baseline",
        nargs="+",
        default=[],
        metavar="[LABEL=]DIR",
        help="--output of earlier evaluations; scores and differences are shown beside this run's",
    )
    command_line.add_dtype_argument(parser)
    processes.add_arguments(parser)
    args = parser.parse_args(argv)
    args.benchmark = _names(args.benchmark)
    args.mteb = [n.removeprefix(mteb_run.PREFIX) for n in args.benchmark if _is_mteb(n)]
    args.benchmark = [name for name in args.benchmark if not _is_mteb(name)]
    for name in args.benchmark:
        if name not in NAMES:
            parser.error(f"--benchmark {name!r} is none of {', '.join(NAMES)}, mteb:TASK")
        if args.data is None and name != DIGITS:
            parser.error(f"--benchmark {name} needs --data")
    if args.mteb and not args.benchmark:
        for flag in _NOT_OF_MTEB:
            if getattr(args, flag):
                parser.error(f"--{flag.replace('_', '-')} does not concern mteb's tasks")
    return args


def _names(text: str | None) -> list[str]:
    """Names between commas; not those in brackets, as mteb's "MTEB(eng, v2)" has them."""
    return [name.strip() for name in re.split(r",(?![^()]*\))", text or "") if name.strip()]


def _is_mteb(name: str) -> bool:
    return name.startswith(mteb_run.PREFIX)


def _command(args: argparse.Namespace) -> int | None:
    if args.check_data:
        return _check_data(args)
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
    return None


def _check_data(args: argparse.Namespace) -> int:
    """Prints what tasks lack on disk. Returns the exit status: 0 if they lack nothing."""
    benchmarks = {name: _open(name, args) for name in args.benchmark if name != DIGITS}
    tasks = _chosen_tasks(benchmarks, _names(args.tasks))
    missing = [
        entry for n, benchmark in benchmarks.items() for entry in benchmark.missing(tasks[n])
    ]
    lacking, total = len({entry.task for entry in missing}), sum(map(len, tasks.values()))
    if missing:
        print(describe(missing), end="\n\n")
    print(f"{total - lacking} of {total} tasks have all data that was looked for.")
    return command_line.USER_ERROR if missing else 0


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
      The tables of scores.

    Raises:
      ValueError, OSError: model or data are not what they should be.
    """
    output = Path(args.output)
    baselines: list[Evaluation] = []
    processes.on_first_process(lambda: baselines.extend(_baselines(args)))
    model = resolve_model(args.model)
    prompts = model_dir.load_prompts(model)
    benchmarks = {name: _open(name, args, prompts) for name in args.benchmark}
    chosen = mteb_run.find_tasks(args.mteb) if args.mteb else None
    if chosen is not None:
        mteb_run.require_decoder(chosen)
    tasks = _chosen_tasks(benchmarks, _names(args.tasks))
    benchmarks = {name: benchmark for name, benchmark in benchmarks.items() if tasks[name]}
    for name, benchmark in benchmarks.items():
        run.require_data(benchmark, tasks[name])
    lengths = [benchmark.max_length or 0 for benchmark in benchmarks.values()]
    lengths += [] if chosen is None else [chosen.max_length]
    opened = _open_model(args, model, args.max_length or max(lengths, default=0) or None)
    found = {
        name: run.evaluate(
            *(opened.encode, benchmark, tasks[name], _folder(args, name)),
            cache=opened.cache,
            settings=opened.settings,
            forms=opened.forms,
        )
        for name, benchmark in benchmarks.items()
    }
    tables = [
        "\n\n".join(filter(None, (table, _compared(name, results, baselines))))
        for name, results in found.items()
        for table in [f"{name}\n\n{results.table()}" if len(found) > 1 else results.table()]
    ]
    if chosen is not None:
        table = mteb_run.evaluate_mteb(
            opened.embedder,
            chosen,
            _folder(args, "mteb"),
            model=args.model,
            directory=model,
            settings=opened.settings,
            cache=opened.cache,
            batch_size=args.batch_size,
        )
        tables.append(table)
    if opened.settings is None:
        return "\n\n".join(tables)
    computed_by = _computed_by(opened.settings)
    for name, results in found.items():
        _write(_folder(args, name), name, results, opened.settings)
    entries = {name: (benchmarks[name], results) for name, results in found.items()}
    if entries:
        report.write_report(output / "report.html", entries, model=computed_by, baselines=baselines)
    return "\n\n".join([*tables, f"Model: {computed_by}."])


class _Opened(NamedTuple):
    """The model of an evaluation, and what is kept of it: of the first process alone `settings` and a kept cache."""

    embedder: Embedder
    encode: Encode
    cache: EmbeddingCache
    settings: dict[str, Any] | None
    forms: tuple[Form, ...]


def _open_model(args: argparse.Namespace, model: Path, max_length: int | None) -> _Opened:
    first = jax.process_index() == 0
    embedder = Embedder.from_pretrained(
        model, adapter=args.adapter, dtype=args.dtype, max_length=max_length
    )
    width = embedder.config.text.hidden_size
    if args.truncate_dim is not None and not 1 <= args.truncate_dim <= width:
        raise ValueError(f"--truncate-dim is {args.truncate_dim}; expected 1 to {width}")
    forms = read_forms(args.dims, args.precision, args.truncate_dim or width)
    cache, settings = EmbeddingCache(), None
    if first:
        fingerprint = model_fingerprint(model, embedder.model.dtype, embedder.config, args.adapter)
        cache = EmbeddingCache(
            args.cache or Path(args.output) / "embeddings",
            fingerprint,
            model=args.model,
            truncate_dim=args.truncate_dim,
        )
        settings = settings_of(args.model, embedder, fingerprint, args.adapter)
        settings["dimension"] = args.truncate_dim or width
        if args.truncate_dim is not None:
            settings["truncate_dim"] = args.truncate_dim

    def encode(items: Sequence[Item]) -> np.ndarray:
        return embedder.encode(items, batch_size=args.batch_size, show_progress=first)

    return _Opened(embedder, encode, cache, settings, forms)


def _baselines(args: argparse.Namespace) -> list[Evaluation]:
    baselines = read_evaluations(args.baseline)
    check_shared(baselines, args.benchmark)
    return baselines


def _compared(name: str, results: Results, baselines: Sequence[Evaluation]) -> str:
    own = from_summary(results.summary())
    return comparison.compared(own, comparison.of_benchmark(baselines, name))


def _open(
    name: str, args: argparse.Namespace, prompts: Mapping[str, str] | None = None
) -> Benchmark:
    data = _data(name, args.data)
    if name == DIGITS:
        output = _folder(args, name)
        return Mmeb(digits.build(data or output / "digits") / "eval", infos=digits.INFOS)
    assert data is not None
    query, document = side_prompts(prompts or {})
    options = Options(
        images=args.images,
        frames=args.frames,
        query_prompt=query if args.query_prompt is None else args.query_prompt,
        document_prompt=document if args.document_prompt is None else args.document_prompt,
    )
    return open_benchmark(name, data, options)


def _data(name: str, places: Sequence[str] | None) -> Path | None:
    """The directory of a benchmark: of NAME=DIR, or a folder of this name in DIR, or DIR."""
    named = dict(place.split("=", 1) for place in places or () if "=" in place)
    others = [Path(place) for place in places or () if "=" not in place]
    if name in named:
        return Path(named[name])
    if len(others) > 1:
        raise ValueError(f"--data has {len(others)} directories; expected one, or NAME=DIR of each")
    if not others:
        if name == DIGITS:
            return None
        raise ValueError(f"--data has no directory of {name}; give {name}=DIR")
    return others[0] / name if (others[0] / name).is_dir() else others[0]


def _folder(args: argparse.Namespace, name: str) -> Path:
    """Where a benchmark's files go: a folder of its own where the command names several."""
    several = len(args.benchmark) + bool(args.mteb) > 1
    return Path(args.output) / name if several else Path(args.output)


def _chosen_tasks(
    benchmarks: Mapping[str, Benchmark], chosen: Sequence[str]
) -> dict[str, list[str]]:
    """The tasks of each benchmark that are scored: those that are named, or all that are there."""
    there = {name: benchmark.names() for name, benchmark in benchmarks.items()}
    if not chosen:
        return there
    for name, benchmark in benchmarks.items():
        there[name] = [*there[name], *benchmark.variants]
    known = {task for tasks in there.values() for task in tasks}
    if unknown := [task for task in chosen if task not in known]:
        raise ValueError(
            f"--tasks names {', '.join(unknown)}; there are {', '.join(sorted(known))}"
        )
    return {name: [t for t in chosen if t in tasks] for name, tasks in there.items()}


def _write(output: Path, name: str, results: Results, settings: Mapping[str, Any]) -> None:
    summary = {"model": dict(settings), "benchmark": name, **results.summary()}
    write_text(output / SUMMARY, json.dumps(summary, indent=2) + "\n")
    if by_form := results.by_form():
        write_text(output / "forms.json", json.dumps(to_json(by_form), indent=2) + "\n")


def _computed_by(settings: Mapping[str, Any]) -> str:
    adapter = f" with {settings['adapter']}" if "adapter" in settings else ""
    first = f", first {settings['truncate_dim']} numbers" if "truncate_dim" in settings else ""
    return f"{settings['model']}{adapter} in {settings['dtype']}{first}"


if __name__ == "__main__":
    sys.exit(main())
