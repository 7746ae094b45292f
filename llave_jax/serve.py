"""Command line: an HTTP server of embeddings, and of search in an index.

    python -m llave_jax.serve --model DIR [--index photos.lance] [--port 8000]

It speaks OpenAI's /v1/embeddings (texts), with vLLM's `messages` for images and videos, and batches requests of all
clients together. /health answers from the beginning, /ready once the model is loaded and compiled. SIGTERM and
Ctrl-C finish what is being answered and end with status 0. docs/serving.md describes routes, limits and metrics.
"""

from __future__ import annotations

import argparse
import dataclasses
import ipaddress
import logging
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llave_jax.common import command_line, extras

if TYPE_CHECKING:
    from llave_jax.embedding.embedder import Embedder
    from llave_jax.search.index import Index

log = logging.getLogger(__name__)

KEYS_VARIABLE = "LLAVE_API_KEYS"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("llave_jax.serve", __doc__)
    command_line.add_model_argument(parser)
    command_line.add_adapter_argument(parser)
    parser.add_argument(
        "--index",
        help="directory of an index (llave_jax.index), which /search and the page search; --model is the one that made "
        "it",
    )
    parser.add_argument(
        "--model-name", help="how clients call the model; default: the last part of --model"
    )
    parser.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0: all of this machine")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--api-keys",
        metavar="FILE",
        help=f"file with the keys that clients need, one a line; or name them in the variable {KEYS_VARIABLE}, with "
        "commas between them. Default: none is needed",
    )
    parser.add_argument(
        "--host-name",
        action="append",
        default=[],
        help="a name by which clients may call the server, as often as needed; default: on a loopback address only "
        "localhost and that address, otherwise any",
    )
    parser.add_argument(
        "--allow-url",
        action="append",
        default=[],
        metavar="HOST",
        help="a host from which images and videos are fetched by their URL (images.example.com, *.example.com), as "
        "often as needed; default: none. Private addresses are never fetched from",
    )
    parser.add_argument("--max-length", type=int, help="tokens of an item; default: the model's")
    parser.add_argument(
        "--deadline-ms",
        type=float,
        default=5.0,
        help="how long an item waits for others to fill its batch",
    )
    parser.add_argument("--max-queue", type=int, help="items that wait; more are answered 429")
    parser.add_argument("--max-items", type=int, help="items of a request")
    parser.add_argument("--max-body-mb", type=float, help="megabytes of a request")
    parser.add_argument("--max-megapixels", type=float, help="of an image")
    parser.add_argument(
        "--workers", type=int, help="threads that read items; default: one for each core"
    )
    parser.add_argument(
        "--drain", type=float, default=30.0, help="seconds to finish requests after SIGTERM"
    )
    command_line.add_dtype_argument(parser)
    args = parser.parse_args(argv)
    if not 0 <= args.port < 65_536:
        parser.error(f"--port {args.port}: expected 0 to 65535; 0: any that is free")
    for flag, least in (("workers", 1), ("deadline_ms", 0), ("drain", 0)):
        value = getattr(args, flag)
        if value is not None and not least <= value < float("inf"):
            parser.error(f"--{flag.replace('_', '-')} {value:g}: expected {least} or more")
    return args


def _command(args: argparse.Namespace) -> None:
    for module in ("starlette", "uvicorn", "prometheus_client"):
        extras.require(module, "HTTP servers")
    from llave_jax.common.fetch import Fetcher
    from llave_jax.serving import process
    from llave_jax.serving.app import App, Model
    from llave_jax.serving.batcher import Batcher
    from llave_jax.serving.engine import ModelEngine
    from llave_jax.serving.guard import Keys

    command_line.set_up_logging(args, times=True)
    limits = _limits(args)
    fetch = Fetcher(args.allow_url) if args.allow_url else None
    app = App(limits, Keys(_api_keys(args.api_keys)), _host_names(args))
    index = _open_index(args)
    listening = process.listen(args.host, args.port)
    with process.HttpServer(app.asgi, listening, limits, args.drain) as http:
        log.info("%s: loading %s", http.url, args.model)
        embedder = _load(args, index)
        embedder.warm_up()
        batcher = Batcher(
            ModelEngine(embedder, limits, fetch),
            max_waiting=limits.waiting,
            deadline=args.deadline_ms / 1000,
            workers=args.workers or os.cpu_count() or 1,
            observer=app.metrics,
        )
        model = Model(
            args.model_name or _name_of(args.model),
            embedder.config.text.hidden_size,
            embedder.config.inputs.max_length,
            sorted(embedder.prompts),
        )
        app.start(model, batcher, index)
        log.info("%s: ready, as %s", http.url, model.name)
        process.run_until_told(http, app, batcher, args.drain)


def _open_index(args: argparse.Namespace) -> Index | None:
    if args.index is None:
        return None
    from llave_jax.search.index import Index

    index = Index.open(args.index)
    made = index.settings.model.get("max_length")
    if args.max_length not in (None, made):
        raise ValueError(
            f"--max-length {args.max_length}: {args.index} was made with {made}, and its queries are read alike; leave "
            "the flag out"
        )
    if any(os.path.isabs(id) for id in index.sample(1)[0]):
        log.warning(
            "%s: its items are named by paths of this machine, which clients are told; an index that is built from "
            "relative paths has others",
            args.index,
        )
    return index


def _load(args: argparse.Namespace, index: Index | None) -> Embedder:
    if index is not None:
        from llave_jax.search.query import load_model

        return load_model(index, args.model, adapter=args.adapter, dtype=args.dtype)
    from llave_jax.embedding.embedder import Embedder

    return Embedder.from_pretrained(
        args.model, adapter=args.adapter, dtype=args.dtype, max_length=args.max_length
    )


def _name_of(model: str) -> str:
    """How clients call a model that was given without a name: no path of this machine."""
    if os.path.exists(model):
        return os.path.basename(os.path.abspath(model))
    return model


def _limits(args: argparse.Namespace):
    from llave_jax.serving.settings import Limits

    given = {
        "waiting": args.max_queue,
        "items": args.max_items,
        "body_bytes": args.max_body_mb and int(args.max_body_mb * 1e6),
        "pixels": args.max_megapixels and int(args.max_megapixels * 1e6),
    }
    limits = {key: value for key, value in given.items() if value is not None}
    if "waiting" in limits and "items" not in limits:
        limits["items"] = min(Limits.items, limits["waiting"])
    if "items" in limits and "waiting" not in limits:
        limits["waiting"] = max(Limits.waiting, limits["items"])
    if "body_bytes" in limits:
        limits["held_bytes"] = max(Limits.held_bytes, 2 * limits["body_bytes"])
    return dataclasses.replace(Limits(), **limits)


def _api_keys(file: str | None) -> list[str]:
    """The keys of the file, or of the environment."""
    given = os.environ.get(KEYS_VARIABLE, "").split(",")
    where = KEYS_VARIABLE
    if file is not None:
        where = f"--api-keys {file}"
        path = Path(file)
        if path.stat().st_mode & (stat.S_IRGRP | stat.S_IROTH):
            log.warning("%s can be read by others; chmod 600 keeps the keys to yourself", file)
        given = path.read_text().splitlines()
    keys = [key.strip() for key in given if key.strip() and not key.strip().startswith("#")]
    if file is not None and not keys:
        raise ValueError(f"{where}: has no key; expected one a line")
    for number, key in enumerate(keys, 1):
        if not key.isascii() or not key.isprintable() or " " in key:
            raise ValueError(f"{where}: key {number} has characters that no header can carry")
    return keys


def _host_names(args: argparse.Namespace) -> list[str] | None:
    from llave_jax.serving.guard import LOOPBACK

    try:
        local = ipaddress.ip_address(args.host).is_loopback
    except ValueError:
        local = args.host == "localhost"
    if not local:
        return args.host_name or None
    own = f"[{args.host}]" if ":" in args.host else args.host
    return [*LOOPBACK, own, *args.host_name]


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
