"""Command line: embed items of a JSON-lines file.

    python -m llave_jax.embed --model DIR --input items.jsonl --output DIR

A line is an object with any of `text`, `image`, `images`, `video`, and an optional `id`; paths are
relative to the file. Writes embeddings.npy (float32 [n, D], L2-normalised) and ids.jsonl, one id a
line (without an id the item's number, from 0), in the order of the input. With --on_error skip, items
that cannot be read are left out of both and listed in skipped.jsonl. run.json names the model and its
precision.

The same command continues where it was stopped, however it was stopped. Lines added to the input are
embedded as well. Items whose text, pictures or videos have changed are embedded again, with the rest
of their chunk; a file counts as changed if size or time differ, and then its content does too.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import itertools
import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from llave_jax.common.progress import Progress
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.store import Store
from llave_jax.evaluation import cache as caching
from llave_jax.evaluation.run_info import add_dtype_argument, record_run, settings_of
from llave_jax.inputs.item import Item, as_item
from llave_jax.parallel import processes
from llave_jax.weights.fingerprint import model_fingerprint

# Items are saved in chunks, which is what a killed job loses at most: 8192 texts, 1024 pictures or 64
# videos. Small chunks would end in many small batches.
CHUNK = 8192
IMAGE_WEIGHT, VIDEO_WEIGHT = 8, 128

# Threads that look at files: they wait for the disk or the network.
FILE_THREADS = 32


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m llave_jax.embed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--model", required=True, help="converted model directory, or a training run's directory"
    )
    parser.add_argument("--input", required=True, help="JSON-lines file of items")
    parser.add_argument("--output", required=True, help="directory to write")
    parser.add_argument("--batch_size", type=int, help="items encoded together; default: automatic")
    parser.add_argument("--max_length", type=int, help="tokens of an item; default: the model's")
    parser.add_argument(
        "--on_error",
        choices=("raise", "skip"),
        default="raise",
        help="an item that cannot be read ends the job, or is left out and listed",
    )
    add_dtype_argument(parser)
    processes.add_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    processes.initialize(args)
    first = jax.process_index() == 0
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    try:
        embedder = Embedder.from_pretrained(
            args.model, dtype=args.dtype, max_length=args.max_length
        )
        fingerprint = model_fingerprint(args.model, embedder.model.dtype, embedder.config)
        result = embed_file(
            embedder,
            args.input,
            args.output,
            fingerprint,
            batch_size=args.batch_size,
            on_error=args.on_error,
        )
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if first:
        settings = settings_of(args.model, embedder, fingerprint)
        record_run(args.output, result.path.name, settings)
        dimension = embedder.config.text.hidden_size
        print(f"{result.embedded} embeddings of {dimension} numbers in {result.path}")
        if result.skipped:
            print(f"{result.skipped} items skipped, see {result.path.with_name('skipped.jsonl')}")


class Result(NamedTuple):
    """Where the array is, its rows, and how many items were left out (0 but on the first process)."""

    path: Path
    embedded: int
    skipped: int


@dataclasses.dataclass(frozen=True)
class Line:
    """One item of the input, or why the line is none."""

    number: int
    id: Any
    item: Item | None
    error: str = ""

    @property
    def weight(self) -> int:
        """What it counts for the size of a chunk."""
        if self.item is None or self.item.video is None:
            return max(1, IMAGE_WEIGHT * len(self.item.images) if self.item else 0)
        return VIDEO_WEIGHT


def embed_file(
    embedder: Embedder,
    source: str | os.PathLike,
    output: str | os.PathLike,
    fingerprint: str,
    *,
    batch_size: int | None = None,
    on_error: str = "raise",
) -> Result:
    """Embed a JSON-lines file into a directory, continuing what an earlier call did.

    The input is read once, a chunk at a time; nothing that grows with it is held but a short entry for
    each chunk. With several processes all call this alike, and the first writes.

    Args:
      source: file of items.
      output: directory of the results.
      fingerprint: of the model; work of another model is not continued.
      on_error: "raise", or "skip" items that cannot be read.

    Raises:
      ValueError: an item cannot be read (it is named; the chunks before it are kept), an embedding is
        not finite, or `output` holds work on other items or of another model.
      OSError: the input cannot be read or the output cannot be written.
    """
    source = Path(source)
    dimension = embedder.config.text.hidden_size
    with _Output(source, Path(output), fingerprint, dimension, on_error) as out:
        lines, index = read_lines(source), 0
        while chunk := _take(lines, out.recorded_size(index)):
            if on_error == "raise":
                for line in chunk:
                    if line.error:
                        raise ValueError(line.error)
            if not out.keep(index, chunk):
                out.add(index, chunk, *_encode(embedder, chunk, batch_size, on_error))
            index += 1
        return out.finish(index)


def read_lines(source: Path) -> Iterator[Line]:
    """The items of a JSON-lines file, one at a time; empty lines count for nothing."""
    position = 0
    with open(source, "rb") as file:
        for number, text in enumerate(file, 1):
            if text.strip():
                yield _parse(text, f"{source}:{number}", number, position, source.parent)
                position += 1


def _parse(text: bytes, where: str, number: int, position: int, root: Path) -> Line:
    item_id = position
    try:
        try:
            values = json.loads(text)
        except ValueError as error:
            raise ValueError(f"{where}: is not JSON ({error}); expected one object") from error
        if not isinstance(values, dict):
            raise ValueError(f"{where}: is {type(values).__name__}; expected an object")
        item_id = values.pop("id", position)
        item = as_item(_resolve(values, root, where), where)
        item.text.encode("utf-8")  # half a surrogate pair is no text
    except ValueError as error:
        message = str(error)
        return Line(number, item_id, None, message if where in message else f"{where}: {message}")
    return Line(number, item_id, item)


def _resolve(values: dict[str, Any], root: Path, where: str) -> dict[str, Any]:
    """Paths relative to the folder of the file that names them."""

    def resolve(key: str, value: Any) -> Any:
        if value is None:
            return None
        if isinstance(value, str) and value:
            return str(root / value)
        if value == "":
            raise ValueError(f"{where}: {key} has an empty path; leave it out, or say null")
        raise ValueError(f"{where}: {key} holds {type(value).__name__}; expected a path")

    resolved = {}
    for key, value in values.items():
        if key not in ("image", "images", "video"):
            resolved[key] = value
        elif isinstance(value, list):
            resolved[key] = [resolve(key, entry) for entry in value]
        else:
            resolved[key] = resolve(key, value)
    return resolved


def _take(lines: Iterator[Line], size: int) -> list[Line]:
    """The next `size` items, or if that is 0 a chunk's worth."""
    if size:
        return list(itertools.islice(lines, size))
    chunk, weight = [], 0
    for line in lines:
        chunk.append(line)
        weight += line.weight
        if weight >= CHUNK:
            break
    return chunk


def _encode(
    embedder: Embedder, chunk: list[Line], batch_size: int | None, on_error: str
) -> tuple[np.ndarray, list[tuple[int, str]]]:
    """Vectors of a chunk's readable items, and (index, reason) of the others."""
    places = [i for i, line in enumerate(chunk) if line.item is not None]
    items = [chunk[i].item for i in places]
    failures: dict[int, str] = {}
    if on_error == "skip":
        vectors, failures = embedder.encode_skipping(items, batch_size)
    else:
        vectors = embedder.encode(items, batch_size)
    fine = [i for i in range(len(items)) if i not in failures]
    vectors = vectors[fine]
    caching.check_embeddings(vectors, [items[i] for i in fine])
    skipped = {i: line.error for i, line in enumerate(chunk) if line.item is None}
    skipped |= {places[i]: reason for i, reason in failures.items()}
    return vectors, sorted(skipped.items())


class _Output:
    """The store on the first process. The others have none and do as the first one decides."""

    def __init__(self, source: Path, output: Path, model: str, dimension: int, on_error: str):
        self._source, self._path, self._on_error = source, output, on_error
        self._store: Store | None = None
        self._closing = contextlib.ExitStack()

        def start() -> None:
            # Before anything is written: is there any input?
            total = count_items(source)
            self._store = self._closing.enter_context(
                Store(output, model=model, dimension=dimension, source=str(source.resolve()))
            )
            self._threads = self._closing.enter_context(ThreadPoolExecutor(FILE_THREADS))
            self._progress = self._closing.enter_context(Progress(total, "embedding"))

        _on_first_process(start)

    def __enter__(self) -> _Output:
        return self

    def __exit__(self, *exc) -> None:
        self._closing.close()

    def recorded_size(self, index: int) -> int:
        """Items that a chunk had when it was embedded; 0 for a new one."""

        def size() -> int:
            chunk = self._store.chunks.get(index)
            return chunk.items if chunk else 0

        return _on_first_process(size)

    def keep(self, index: int, chunk: list[Line]) -> bool:
        """Whether the vectors of these items are there already."""

        def check() -> bool:
            old = self._store.chunks.get(index)
            # Digests are taken before the model sees the files: should one be replaced meanwhile, the
            # next start finds a difference.
            stamp = self._digest(chunk, caching.item_stamp)
            content = None
            same = old is not None and old.items == len(chunk) and old.stamp == stamp
            if not same:
                content = self._digest(chunk, caching.item_key)
                same = old is not None and old.items == len(chunk) and old.content == content
            if same and old.skipped and self._on_error == "raise":
                raise ValueError(old.skipped[0][1])
            if same:
                if old.stamp != stamp:
                    self._store.renew(index, stamp)
                self._list(index, chunk)
                self._progress.skip(len(chunk))
                return True
            if old is not None and old.content:
                self._note_change(chunk)
            self._digests = {"stamp": stamp, "content": content}
            return False

        return bool(_on_first_process(check))

    def add(
        self,
        index: int,
        chunk: list[Line],
        vectors: np.ndarray,
        skipped: list[tuple[int, str]],
    ) -> None:
        """Keep new vectors of the chunk that was asked for last."""

        def write() -> None:
            self._store.add(index, vectors, skipped=skipped, **self._digests)
            self._list(index, chunk)
            note = f"{self._store.num_skipped} skipped" if self._store.num_skipped else ""
            self._progress.update(len(chunk), note)

        _on_first_process(write)

    def finish(self, count: int) -> Result:
        """All chunks of the input have been kept or added."""

        def end() -> None:
            if not count:
                raise ValueError(f"{self._source}: has no items")
            self._store.finish(count)

        _on_first_process(end)
        store = self._store
        numbers = (store.num_rows, store.num_skipped) if store else (0, 0)
        return Result(self._path / "embeddings.npy", *numbers)

    def _list(self, index: int, chunk: list[Line]) -> None:
        self._store.list_items(index, [line.number for line in chunk], [line.id for line in chunk])

    def _note_change(self, chunk: list[Line]) -> None:
        if self._store.source != str(self._source.resolve()):
            raise ValueError(
                f"{self._path} holds embeddings of other items, from {self._store.source}; use "
                "another --output"
            )
        logging.getLogger(__name__).info(
            "%s: items of lines %d to %d have changed; they are embedded again",
            self._source,
            chunk[0].number,
            chunk[-1].number,
        )

    def _digest(self, chunk: list[Line], digest_of: Callable[[Item], bytes]) -> str:
        """Of a chunk's items in order; what cannot be read has a digest too."""

        def digest(line: Line) -> bytes:
            if line.item is None:
                return hashlib.sha256(line.error.encode("utf-8", "backslashreplace")).digest()
            try:
                return digest_of(line.item)
            except (OSError, ValueError) as error:  # ValueError: a null byte in a path
                return hashlib.sha256(f"unreadable: {type(error).__name__}".encode()).digest()

        has_files = any(line.weight > 1 for line in chunk)
        digests = self._threads.map(digest, chunk) if has_files else map(digest, chunk)
        return hashlib.sha256(b"".join(digests)).hexdigest()


def count_items(source: Path) -> int | None:
    """Lines that are not empty; None for a pipe, which can be read only once."""
    if not source.is_file():
        # Raises where there is nothing at all.
        source.stat()
        return None
    with open(source, "rb") as file:
        return sum(1 for line in file if line.strip())


def _on_first_process(action: Callable[[], Any]) -> int:
    """What `action` gives on the first process, as a number, on all; if it fails there, all fail."""
    value, failure = 0, None
    if jax.process_index() == 0:
        try:
            value = int(action() or 0)
        except (ValueError, OSError) as error:
            value, failure = -1, error
    value = int(caching.from_first_process(np.int32(value)))
    if failure is not None:
        raise failure
    if value < 0:
        raise ValueError("stopped with the first process of the job, which says why")
    return value


if __name__ == "__main__":
    main()
