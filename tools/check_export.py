"""Compare the vectors that a library or a server gives for an export with those that are kept in it.

    python tools/check_export.py --model EXPORT
    python tools/check_export.py --model EXPORT --library sentence-transformers
    python tools/check_export.py --model EXPORT --url http://localhost:8000/v1/embeddings
    python tools/check_export.py --model EXPORT --write

EXPORT is a directory that `tools/convert_hf.py --to-hf onevision` has written: a few texts and images with this
package's vectors are in its check_vectors.json. Without --library and --url this package embeds them again from the
export. The table says of each item whether the vectors agree, and the lines below it what a difference means.

Exit status: 0 if all agree, 1 if one differs or is missing, 2 if the check could not be made.
"""

from __future__ import annotations

import argparse
import json
import sys
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from llave_jax.common import command_line
from llave_jax.common.text import shortened
from llave_jax.embedding import check_vectors
from llave_jax.embedding.check_vectors import CheckVectors, Row
from llave_jax.weights.resolve import resolve_model
from llave_jax.weights.to_hf import CHECK_VECTORS

# How a server can be asked: OpenAI's form, for texts, and vLLM's.
FORMS = ("input", "messages")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("tools/check_export.py", __doc__)
    parser.add_argument("--model", required=True, metavar="EXPORT", help="the exported directory")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--library", choices=("sentence-transformers",), help="compare what this library gives"
    )
    what.add_argument("--url", help="compare what a server gives: its /v1/embeddings")
    what.add_argument(
        "--write", action="store_true", help="make the export's check_vectors.json again"
    )
    parser.add_argument(
        "--form",
        choices=FORMS,
        action="append",
        help="with --url: how items are sent, `input` for texts or `messages` (default: both)",
    )
    parser.add_argument(
        "--name", help="with --url: the model's name there (default: the first one that it lists)"
    )
    parser.add_argument("--api-key", default="EMPTY", help="with --url (default: %(default)s)")
    parser.add_argument(
        "--timeout", type=float, default=60, help="with --url: seconds for an answer (default: 60)"
    )
    args = parser.parse_args(argv)
    if args.url is None and (args.form or args.name):
        parser.error("--form and --name are of use only with --url")
    if args.url is not None and urllib.parse.urlsplit(args.url).scheme not in ("http", "https"):
        parser.error(f"--url {args.url}: expected http://HOST:PORT/v1/embeddings")
    return args


def _own(export: Path, check: CheckVectors) -> list[Row]:
    from llave_jax import Embedder

    model = Embedder.from_pretrained(export, dtype="float32")
    vectors = model.encode([item.item() for item in check.items])
    return [check_vectors.compare(check, index, vector) for index, vector in enumerate(vectors)]


def _sentence_transformers(export: Path, check: CheckVectors) -> list[Row]:
    try:
        import sentence_transformers  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ValueError(
            f"--library sentence-transformers: {error}. Install it: pip install 'sentence-transformers[image]>=6'"
        ) from error
    try:
        model: Any = sentence_transformers.SentenceTransformer(
            str(export), model_kwargs={"dtype": "float32"}
        )
    except ImportError as error:
        raise ValueError(" ".join(str(error).split())) from error
    rows = []
    for index, item in enumerate(check.items):
        given: Any = item.item()
        given = next(iter(given.values())) if len(given) == 1 else given
        try:
            vector = model.encode(given)
        except Exception as error:  # whatever the library raises is its answer
            rows.append(check_vectors.refused("", item, _one_line(error)))
        else:
            rows.append(check_vectors.compare(check, index, vector))
    return rows


def _one_line(error: object) -> str:
    return shortened(" ".join(str(error).split()) or type(error).__name__)[:300]


class _Server:
    """The embeddings of a server.

    Args:
      url: of its embeddings.
      key: sent as a bearer token.
      timeout: seconds.
    """

    def __init__(self, url: str, key: str, timeout: float):
        self._url, self._timeout = url, timeout
        self._headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}

    def first_model(self) -> str:
        """The name of the first model that the server lists.

        Raises:
          ValueError: it lists none, or does not answer.
        """
        url = self._url.removesuffix("/").removesuffix("/embeddings") + "/models"
        answer = self._ask(url, None)
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError):
            raise ValueError(f"{url}: lists no model; name it with --name") from None

    def embed(self, name: str, body: dict[str, Any]) -> np.ndarray:
        """The first vector of an answer.

        Raises:
          _Refused: the server says no.
          ValueError: it does not answer, or in another form.
        """
        answer = self._ask(self._url, {"model": name, "encoding_format": "float", **body})
        try:
            return np.asarray(answer["data"][0]["embedding"], np.float64)
        except (KeyError, IndexError, TypeError, ValueError):
            raise ValueError(
                f"{self._url}: answers {json.dumps(answer):.200}; expected data[0].embedding, a list of numbers"
            ) from None

    def _ask(self, url: str, body: dict[str, Any] | None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, self._headers)
        try:
            with urllib.request.urlopen(request, timeout=self._timeout) as response:
                return json.loads(response.read())
        except urllib.error.HTTPError as error:
            said = _one_line(error.read().decode(errors="replace"))
            if body is not None and error.code in (400, 413, 415, 422):
                raise _Refused(said) from error
            raise ValueError(f"{url}: {error.code} {error.reason}: {said}") from error
        except (OSError, ValueError) as error:
            raise ValueError(f"{url}: no answer that is JSON ({_one_line(error)})") from error


class _Refused(Exception):
    """The server answers that it does not take such an item."""


def _server(args: argparse.Namespace, check: CheckVectors) -> list[Row]:
    server = _Server(args.url, args.api_key, args.timeout)
    name = args.name or server.first_model()
    rows = []
    for form in args.form or FORMS:
        for index, item in enumerate(check.items):
            if form == "input" and item.image is not None:
                continue
            content: list[dict[str, Any]] = []
            if item.image is not None:
                content.append({"type": "image_url", "image_url": {"url": item.data_uri}})
            if item.text:
                content.append({"type": "text", "text": item.text})
            body: dict[str, Any] = {"messages": [{"role": "user", "content": content}]}
            if form == "input":
                body = {"input": [item.text]}
            try:
                rows.append(check_vectors.compare(check, index, server.embed(name, body), form))
            except _Refused as error:
                rows.append(check_vectors.refused(form, item, str(error)))
    return rows


def _check(args: argparse.Namespace) -> int:
    export = Path(args.model)
    if args.write:
        check_vectors.write(export, check_vectors.make(resolve_model(export)))
        print(f"written: {export / CHECK_VECTORS}")
        return 0
    check = check_vectors.read(export)
    if args.library:
        rows = _sentence_transformers(export, check)
    elif args.url:
        rows = _server(args, check)
    else:
        rows = _own(export, check)
    print(check_vectors.table(rows), end="\n\n")
    print("\n".join(check_vectors.explain(rows)))
    return 0 if all(row.verdict in ("same", "close") for row in rows) else 1


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(_check, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
