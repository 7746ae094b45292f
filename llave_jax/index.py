"""Command line: an index of images, texts and videos, and searching it.

    python -m llave_jax.index build --model DIR --input photos/ --output my.lance
    python -m llave_jax.index search --index my.lance --text "a cat on a chair"
    python -m llave_jax.index add --index my.lance --input more/ items.jsonl
    python -m llave_jax.index delete --index my.lance --id photos/1.jpg
    python -m llave_jax.index info --index my.lance
    python -m llave_jax.index compact --index my.lance

The index is a LanceDB table on disk with vectors, texts, paths, metadata and thumbnails. `build` makes it and, given
again, brings it up to date: new items and those that have changed are embedded, the others stay. What a killed
command has put in stays too, and the same command goes on. Docs: docs/search.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from llave_jax.common import command_line, extras
from llave_jax.common.files import write_text
from llave_jax.common.tables import align
from llave_jax.common.text import bytes_text
from llave_jax.embedding import item_sources
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.run_info import settings_of
from llave_jax.inputs.item import with_prompt
from llave_jax.search.build import Counts, add_items
from llave_jax.search.columns import VECTOR_TYPES, Hit
from llave_jax.search.index import Index, Settings, is_index
from llave_jax.search.query import load_model, query_item
from llave_jax.weights.fingerprint import model_fingerprint
from llave_jax.weights.resolve import resolve_model

SKIPPED = "skipped.txt"
# Reasons that are printed; all of them are in the file.
_REASONS = 10
_TEXT_WIDTH = 60
_APPROXIMATE = {"auto": None, "always": True, "never": False}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("llave_jax.index", __doc__)
    commands = parser.add_commands()

    build = commands.add_parser("build", help="make an index, or bring it up to date")
    command_line.add_model_argument(build)
    command_line.add_adapter_argument(build)
    build.add_argument("--output", required=True, help="directory of the index")
    item_sources.add_arguments(build)
    command_line.add_dtype_argument(build)
    build.add_argument("--max-length", type=int, help="tokens of an item; default: the model's")
    build.add_argument(
        "--prompt",
        metavar="TEXT",
        help="goes before the text of each item; default: the model's prompt for documents, if it has one",
    )
    build.add_argument(
        "--truncate-dim", type=int, metavar="N", help="keep only a vector's first N numbers"
    )
    build.add_argument(
        "--search-dim",
        type=int,
        metavar="N",
        help="search by a vector's first N numbers, then compare what is found by all that are kept",
    )
    build.add_argument(
        "--precision", choices=tuple(VECTOR_TYPES), help="of vectors on disk; default: float32"
    )
    build.add_argument(
        "--no-thumbnails", action="store_true", help="keep no small pictures in the index"
    )
    _add_writing_arguments(build)

    add = commands.add_parser("add", help="add items to an index that is there")
    _add_index_argument(add)
    _add_model_argument(add)
    item_sources.add_arguments(add)
    _add_writing_arguments(add)

    search = commands.add_parser("search", help="find what is most similar to a query")
    _add_index_argument(search)
    _add_model_argument(search)
    command_line.add_dtype_argument(search)
    search.add_argument("--text", help="what to look for, alone or with --image or --video")
    search.add_argument("--image", help="an image file")
    search.add_argument("--video", help="a video file")
    search.add_argument(
        "--prompt",
        metavar="TEXT",
        help="goes before the query's text; default: the model's prompt for queries, if it has one",
    )
    search.add_argument("--like", metavar="ID", help="look for items like this one of the index")
    search.add_argument(
        "--where", metavar="SQL", help="only items that pass: \"kind = 'image' AND year > 2020\""
    )
    search.add_argument("-k", type=int, default=10, help="how many results; default: 10")
    search.add_argument("--exact", action="store_true", help="compare with every vector")
    _add_json_argument(search)

    delete = commands.add_parser("delete", help="remove items")
    _add_index_argument(delete)
    delete.add_argument("--id", nargs="+", default=[], help="of the items")
    delete.add_argument("--where", metavar="SQL", help="items that pass this filter")

    info = commands.add_parser("info", help="say what an index is")
    _add_index_argument(info)
    _add_json_argument(info)

    compact = commands.add_parser("compact", help="merge small files, remove old versions")
    _add_index_argument(compact)
    _add_approximate_arguments(compact)
    return parser.parse_args(argv)


def _add_index_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--index", required=True, help="directory of the index")


def _add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print JSON")


def _add_model_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", help="the model that made the index; default: where it was at that time"
    )
    parser.add_argument(
        "--adapter", help="the adapter that was added to it, if any; default: where it was then"
    )


def _add_writing_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--on-error",
        choices=("raise", "skip"),
        default="skip",
        help=f"an item that cannot be used ends the job, or is left out and listed in {SKIPPED} (the default)",
    )
    _add_approximate_arguments(parser)


def _add_approximate_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--approximate",
        choices=tuple(_APPROXIMATE),
        default="auto",
        help="search approximately; default: if the index is large",
    )
    parser.add_argument(
        "--recall", type=float, default=0.98, help="recall@10 that is wanted then; default: 0.98"
    )


def _build(args: argparse.Namespace) -> None:
    source = item_sources.from_arguments(args)
    model = resolve_model(args.model)
    if is_index(args.output):
        opened = Index.open(args.output, write=True)
        with contextlib.ExitStack() as closing:
            closing.enter_context(opened)
            _check_unchanged(args, opened)
            embedder = load_model(
                opened,
                args.model,
                adapter=args.adapter,
                dtype=opened.settings.model.get("dtype"),
            )
            closing.pop_all()
    else:
        embedder = Embedder.from_pretrained(
            model, adapter=args.adapter, dtype=args.dtype, max_length=args.max_length
        )
        adapter = None if args.adapter is None else str(Path(args.adapter).absolute())
        fingerprint = model_fingerprint(model, embedder.model.dtype, embedder.config, adapter)
        name = str(Path(args.model).absolute()) if Path(args.model).exists() else args.model
        opened = Index.create(
            args.output,
            embedder.config.text.hidden_size,
            model={
                **settings_of(name, embedder, fingerprint, adapter),
                "prompt": _prompt(args, embedder),
            },
            truncate_dim=args.truncate_dim,
            search_dim=args.search_dim,
            precision=args.precision or "float32",
            thumbnails=not args.no_thumbnails,
        )
    with opened as index:
        _fill(args, index, embedder, source)


def _prompt(args: argparse.Namespace, embedder: Embedder) -> str:
    return embedder.prompts.get("document", "") if args.prompt is None else args.prompt


def _check_unchanged(args: argparse.Namespace, index: Index) -> None:
    settings = index.settings
    made = {
        "--dtype": (args.dtype, settings.model.get("dtype")),
        "--prompt": (args.prompt, settings.model.get("prompt")),
        "--max-length": (args.max_length, settings.model.get("max_length")),
        "--truncate-dim": (args.truncate_dim, settings.dimension),
        "--search-dim": (args.search_dim, settings.search_dimension),
        "--precision": (args.precision, settings.precision),
    }
    for flag, (given, there) in made.items():
        if given is not None and given != there:
            raise ValueError(
                f"{index.path}: was made with {flag} {there!r:.80}, not {given!r:.80}; use another --output"
            )


def _add(args: argparse.Namespace) -> None:
    source = item_sources.from_arguments(args)
    with Index.open(args.index, write=True) as index:
        embedder = load_model(
            index, args.model, adapter=args.adapter, dtype=index.settings.model.get("dtype")
        )
        _fill(args, index, embedder, source)


def _fill(
    args: argparse.Namespace, index: Index, embedder: Embedder, source: item_sources.ItemSource
) -> None:
    counts = add_items(
        index,
        embedder,
        source,
        total=source.count(),
        model=args.model or index.settings.model.get("model", ""),
        on_error=args.on_error,
    )
    settings = index.optimise(approximate=_APPROXIMATE[args.approximate], target=args.recall)
    print(_counts_text(index, counts))
    print(_search_text(settings))
    skipped = index.path / SKIPPED
    if counts.skipped:
        write_text(skipped, "\n".join(counts.skipped) + "\n")
        print(f"{len(counts.skipped)} items skipped, see {skipped}; the first:", file=sys.stderr)
        for reason in counts.skipped[:_REASONS]:
            print(f"  {reason}", file=sys.stderr)
    else:
        skipped.unlink(missing_ok=True)


def _counts_text(index: Index, counts: Counts) -> str:
    parts = [f"{counts.added} new"]
    parts += [f"{counts.changed} changed"] if counts.changed else []
    parts += [f"{counts.renewed} with new metadata or files"] if counts.renewed else []
    parts += [f"{counts.unchanged} unchanged"] if counts.unchanged else []
    return f"{len(index)} items in {index.path}: {', '.join(parts)}"


def _search_text(settings: Settings) -> str:
    ann = settings.ann
    if ann is None:
        return "search is exact"
    text = (
        f"search is approximate: recall@10 {ann['recall']:.3f} against exact search, measured with "
        f"{ann['sample']} items as queries; {ann['ann_ms']} ms a search, exact {ann['exact_ms']} ms"
    )
    if ann["recall"] < ann["target"]:
        text += f"; below {ann['target']}: search --exact, or compact --approximate never"
    return text


def _search(args: argparse.Namespace) -> None:
    with Index.open(args.index) as index:
        if args.like is not None:
            if args.text is not None or args.image is not None or args.video is not None:
                raise ValueError("--like takes no --text, --image or --video beside it")
            try:
                vector = index.vector(args.like)
            except KeyError as error:
                raise ValueError(f"{index.path}: has no item {args.like!r:.200}") from error
        else:
            query = query_item(args.text, args.image, args.video)
            model = load_model(index, args.model, adapter=args.adapter, dtype=args.dtype)
            prompt = model.prompts.get("query", "") if args.prompt is None else args.prompt
            vector = model.encode(with_prompt(query, prompt))
        hits = index.search(vector, args.k, where=args.where, exact=args.exact)
    if args.json:
        print(json.dumps([dataclasses.asdict(hit) for hit in hits], ensure_ascii=False, indent=2))
    else:
        print(_hits_text(hits) if hits else "nothing found")


def _hits_text(hits: Sequence[Hit]) -> str:
    rows = [["id", "text", "metadata", "kind", "score"]]
    for hit in hits:
        metadata = ", ".join(f"{name}={value}" for name, value in hit.metadata.items())
        cells = [_cell(hit.id, keep_end=True), _cell(hit.text), _cell(metadata)]
        rows.append([*cells, hit.kind, f"{hit.score:.4f}"])
    used = [i for i in range(5) if i in (0, 3, 4) or any(row[i] for row in rows[1:])]
    return align([[row[i] for i in used] for row in rows], left=len(used) - 1)


def _cell(text: str, *, keep_end: bool = False) -> str:
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(text) <= _TEXT_WIDTH:
        return text
    kept = _TEXT_WIDTH - 3
    return "..." + text[-kept:] if keep_end else text[:kept] + "..."


def _delete(args: argparse.Namespace) -> None:
    with Index.open(args.index, write=True) as index:
        gone = index.delete(args.id, where=args.where)
        print(f"{gone} items deleted, {len(index)} left in {index.path}")


def _info(args: argparse.Namespace) -> None:
    with Index.open(args.index) as index:
        facts, settings = index.info(), index.settings
    if args.json:
        print(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in facts["kinds"].items())
    columns = ", ".join(f"{name} ({kind})" for name, kind in facts["columns"].items())
    model = ", ".join(f"{name} {value}" for name, value in facts["model"].items())
    rows: list[tuple[str, Any]] = [
        ("items", f"{facts['items']} ({kinds})" if kinds else "none"),
        ("metadata", columns or "none"),
        ("vectors", _vectors_text(settings)),
        ("search", _search_text(settings).removeprefix("search is ")),
        ("model", model),
        ("disk", f"{bytes_text(facts['bytes'])} in {facts['fragments']} fragments"),
    ]
    if facts["not_in_ann"]:
        rows.append(("searched exactly", f"{facts['not_in_ann']} items that were added later"))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name.ljust(width)}  {value}" for name, value in rows))


def _vectors_text(settings: Settings) -> str:
    text = f"{settings.dimension} numbers of {settings.precision}"
    if settings.dimension < settings.model["dimension"]:
        text += f", the first of {settings.model['dimension']}"
    if settings.search_dimension < settings.dimension:
        text += f"; the first {settings.search_dimension} are searched, and results compared by all"
    return text


def _compact(args: argparse.Namespace) -> None:
    with Index.open(args.index, write=True) as index:
        settings = index.optimise(
            approximate=_APPROXIMATE[args.approximate], target=args.recall, compact=True
        )
        print(f"{len(index)} items in {index.path}")
        print(_search_text(settings))


_COMMANDS = {
    "build": _build,
    "add": _add,
    "search": _search,
    "delete": _delete,
    "info": _info,
    "compact": _compact,
}


def _command(args: argparse.Namespace) -> None:
    extras.require("lancedb", "indices")
    command_line.set_up_logging(args)
    _COMMANDS[args.command](args)


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
