"""Command line: embed items of a JSON-lines file.

    python -m llave_jax.embed --model DIR --input items.jsonl --output DIR

A line is an object with any of `text`, `image`, `images`, `video`, and an optional `id`; paths are
relative to the file. Writes embeddings.npy (float32 [n, D], L2-normalised) and ids.jsonl, one id a
line, in the order of the input; run.json names the model and its precision. The same command continues
where it was stopped.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llave_jax import distributed
from llave_jax.benchmarks import cache as caching
from llave_jax.benchmarks.run_info import add_dtype_argument, record_run, settings_of
from llave_jax.embedder import Embedder, as_item
from llave_jax.files import write_text
from llave_jax.inputs.item import Item
from llave_jax.progress import Progress

# Items between two savings of the work done.
CHUNK = 2048


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
    add_dtype_argument(parser)
    distributed.add_arguments(parser)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    distributed.initialize(args)
    first = jax.process_index() == 0
    logging.basicConfig(level=logging.INFO if first else logging.WARNING, format="%(message)s")
    items, ids = read_items(Path(args.input))
    embedder = Embedder.from_pretrained(args.model, dtype=args.dtype, max_length=args.max_length)
    fingerprint = caching.model_fingerprint(args.model, embedder)
    try:
        path = embed_file(
            embedder, items, ids, Path(args.output), fingerprint, batch_size=args.batch_size
        )
    except ValueError as error:
        sys.exit(f"error: {error}")
    if first:
        record_run(args.output, path.name, settings_of(args.model, embedder, fingerprint))
        print(f"{len(items)} embeddings of {embedder.config.text.hidden_size} numbers in {path}")


def read_items(path: Path) -> tuple[list[Item], list[Any]]:
    """Items and their ids (the line's number from 0, where a line has none).

    Raises:
      ValueError: a line is not what it should be; it names file and line.
    """
    items, ids = [], []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            where = f"{path}:{number}"
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: is not JSON ({error}); expected one object") from error
            if not isinstance(values, dict):
                raise ValueError(f"{where}: is {type(values).__name__}; expected an object")
            ids.append(values.pop("id", len(ids)))
            items.append(as_item(_resolve(values, path.parent), where))
    if not items:
        raise ValueError(f"{path}: has no items")
    return items, ids


def _resolve(values: dict[str, Any], root: Path) -> dict[str, Any]:
    """Paths relative to the folder of the file that names them."""

    def resolve(value: Any) -> Any:
        if isinstance(value, list):
            return [resolve(entry) for entry in value]
        return str(root / value) if isinstance(value, str) else value

    return {key: value if key == "text" else resolve(value) for key, value in values.items()}


def embed_file(
    embedder: Embedder,
    items: list[Item],
    ids: list[Any],
    output: Path,
    fingerprint: str,
    *,
    batch_size: int | None = None,
) -> Path:
    """Encode items chunk by chunk into `output/embeddings.npy`; what an earlier call did is kept.

    Args:
      fingerprint: of the model; work of another model is not continued.

    Raises:
      ValueError: an item cannot be read (it is named; the chunks before it are kept), or `output`
        holds work on other items or of another model.
    """
    path, partial, state_path = (
        output / name for name in ("embeddings.npy", "embeddings.partial.npy", "progress.json")
    )
    first = jax.process_index() == 0
    done = _read_progress(state_path, items, ids, fingerprint)
    if not partial.exists() and not path.exists():
        done = 0
    if done == len(items) and path.exists() and not partial.exists():
        return path
    if first:
        output.mkdir(parents=True, exist_ok=True)
        shape = (len(items), embedder.config.text.hidden_size)
        array = _open_array(partial, path, shape, done)
    with Progress(len(items), "embedding", initial=done, enabled=first) as progress:
        for start in range(done, len(items), CHUNK):
            chunk = items[start : start + CHUNK]
            end = start + len(chunk)
            vectors = embedder.encode(chunk, batch_size=batch_size)
            if first:
                array[start:end] = vectors
                array.flush()
                state = {"done": end, "model": fingerprint, "items": _digest(items, ids, end)}
                write_text(state_path, json.dumps(state) + "\n")
            progress.update(len(chunk))
    if first:
        lines = [json.dumps(value, ensure_ascii=False) + "\n" for value in ids]
        write_text(output / "ids.jsonl", "".join(lines))
        del array
        partial.replace(path)
    return path


def _open_array(partial: Path, finished: Path, shape: tuple[int, int], done: int) -> np.memmap:
    """The array under work, its first `done` rows as they are in `partial`, else in `finished`."""
    before = partial if partial.exists() else finished
    if done and before == partial and np.load(partial, mmap_mode="r").shape == shape:
        return np.load(partial, mmap_mode="r+")
    kept = np.load(before)[:done] if done else None
    array = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float32, shape=shape)
    if done:
        array[:done] = kept
    return array


def _read_progress(path: Path, items: list[Item], ids: list[Any], fingerprint: str) -> int:
    """How many of the items are done."""
    if not path.exists():
        return 0
    state = json.loads(path.read_text())
    done = state["done"]
    if state["model"] != fingerprint:
        raise ValueError(f"{path.parent} holds embeddings of another model; use another --output")
    if done > len(items) or state["items"] != _digest(items, ids, done):
        raise ValueError(
            f"{path.parent} holds embeddings of other items than the first {done} of --input; "
            "use another --output"
        )
    return done


def _digest(items: list[Item], ids: list[Any], count: int) -> str:
    """Of the first `count` items as the input file gives them."""
    digest = hashlib.sha256()
    for item, item_id in zip(items[:count], ids[:count], strict=True):
        entry = [item_id, item.text, [str(image) for image in item.images], str(item.video)]
        digest.update(json.dumps(entry).encode() + b"\n")
    return digest.hexdigest()


if __name__ == "__main__":
    main()
