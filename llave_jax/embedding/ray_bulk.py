"""`bulk.py` on a Ray cluster: tasks read chunks, actors that hold the model embed them and write their parts.

The first process (the driver) plans the chunks, keeps the log, and never sees a vector. Chunks, digests and parts are
those of `bulk.py`: either engine continues what the other has begun. Retries and lost nodes are Ray's.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from llave_jax.common import ray_engine
from llave_jax.common.progress import Progress
from llave_jax.embedding import bulk, entries
from llave_jax.embedding.bulk import Job, Result, State
from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.entries import Entry, Piece
from llave_jax.embedding.part_store import PartStore, relabelled, with_vectors
from llave_jax.embedding.parts import Part, PartWriter
from llave_jax.embedding.store import Chunk
from llave_jax.inputs.images import read_image_file
from llave_jax.inputs.item import Item
from llave_jax.weights import model_dir
from llave_jax.weights.fingerprint import model_fingerprint


@dataclasses.dataclass(frozen=True)
class Model:
    """What the actors load, and what is known of it before.

    Attributes:
      path: a model directory that all nodes see.
      dtype: of parameters and activations.
      max_length: tokens of the longest sequence; None: as the model was trained.
      fingerprint: as of `model_fingerprint`.
      dimension: D.
      adapter: as for `Embedder.from_pretrained`, that all nodes see.
    """

    path: str
    dtype: str
    max_length: int | None
    fingerprint: str
    dimension: int
    adapter: str | None = None


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """A chunk on its way.

    Attributes:
      index: its number.
      pieces: what it consists of.
      old: what was embedded under its number.
      entries: what was read, with pictures as bytes; () before that and after it was embedded.
      state: how it compares with `old`.
      part: what was written; None if the old part stays.
      rows: of its vectors.
      skipped: (index, reason) of items without a vector.
      left_out: line and id of each of these.
      error: why the job has to end; "" if it has not.
    """

    index: int
    pieces: tuple[Piece, ...]
    old: Chunk | None
    entries: tuple[Entry, ...] = ()
    state: State | None = None
    part: Part | None = None
    rows: int = 0
    skipped: tuple[tuple[int, str], ...] = ()
    left_out: tuple[tuple[int, Any], ...] = ()
    error: str = ""


def find_model(
    path: str | os.PathLike,
    dtype: str | None,
    max_length: int | None,
    resources: dict[str, float],
    adapter: str | os.PathLike | None = None,
) -> Model:
    """Looks at a model where it will run: the devices there decide its dtype.

    Args:
      path: a model directory or a training run that all nodes see.
      dtype, max_length: as for `Embedder.from_pretrained`.
      resources: that an actor with the model holds.
      adapter: as for `Embedder.from_pretrained`, that all nodes see.

    Returns:
      The model.

    Raises:
      ValueError: it cannot be read there.
    """
    stage = ray_engine.Stage(lambda: _describe, resources)
    adapter = None if adapter is None else os.path.realpath(adapter)
    asked = (os.path.realpath(path), dtype, max_length, adapter)
    (found,) = ray_engine.results([asked], [stage])
    if isinstance(found, str):
        raise ValueError(found)
    return found


def _describe(model: tuple[str, str | None, int | None, str | None]) -> Model | str:
    path, dtype, max_length, adapter = model
    if dtype is None:
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    try:
        config = model_dir.load_config(path)
        if max_length is not None:
            inputs = dataclasses.replace(config.inputs, max_length=max_length)
            config = dataclasses.replace(config, inputs=inputs)
        fingerprint = model_fingerprint(path, jnp.dtype(dtype), config, adapter)
    except (ValueError, OSError) as error:
        return str(error)
    return Model(path, dtype, max_length, fingerprint, config.text.hidden_size, adapter)


def embed_on_ray(
    model: Model, job: Job, *, actors: int = 1, resources: dict[str, float] | None = None
) -> Result:
    """`bulk.embed_items` on a Ray cluster.

    Args:
      model: what `find_model` returned.
      job: what is embedded, into parts; all nodes see its files and its output.
      actors: that hold the model.
      resources: of each of them; None: a CPU.

    Returns:
      As `embed_items`.

    Raises:
      ValueError, OSError: as `embed_items`.
    """
    if job.format == "npy":
        raise ValueError(
            "embeddings.npy has one writer; --engine ray needs --format parquet or lance"
        )
    total = job.source.count()
    if total is None:
        raise ValueError(
            f"{job.source.name}: a pipe can be read by one process only; expected files with --engine ray"
        )
    job = dataclasses.replace(job, output=Path(os.path.abspath(job.output)))
    with (
        job.open_store(model.dimension, total) as store,
        Progress(total, "embedding") as progress,
    ):
        assert isinstance(store, PartStore)
        plan = entries.plan_chunks(
            job.source.pieces(), lambda i: store.chunks[i].items if i in store.chunks else 0
        )
        # Pickled one by one, so that lines are not held.
        chunks = (_Chunk(i, pieces, store.chunks.get(i)) for i, pieces in enumerate(plan))
        store.begin()
        foreign = None
        if store.source not in (None, job.source.resolved()):
            foreign = f"{job.output} holds embeddings of other items, from {store.source}; use another --output"
        writer = job.writer(model.dimension)
        stages = [
            ray_engine.Stage(functools.partial(_reader, job, writer, foreign)),
            ray_engine.Stage(
                functools.partial(_embedder, model, job, writer), resources or {"CPU": 1.0}, actors
            ),
        ]
        left_out = {}
        for chunk in ray_engine.results(chunks, stages):
            if chunk.error:
                raise ValueError(chunk.error)
            _enter(store, progress, chunk)
            left_out[chunk.index] = chunk.left_out
        if not left_out and job.source.shard[1] == 1:
            raise ValueError(f"{job.source.name}: has no items")
        for index in sorted(left_out):
            store.list_skipped(index, left_out[index])
        store.finish(len(left_out))
        return bulk.result_of(job, store, model.dimension)


def _enter(store: PartStore, progress: Progress, chunk: _Chunk) -> None:
    assert chunk.state is not None
    _, stamp, content = chunk.state
    if chunk.part is not None:
        store.enter(
            *(chunk.index, chunk.part, chunk.rows),
            stamp=stamp,
            content=content or (chunk.old.content if chunk.old else ""),
            skipped=chunk.skipped,
        )
    elif content:
        store.renew(chunk.index, stamp)
    if chunk.state.kept:
        progress.skip(chunk.rows + len(chunk.skipped))
    else:
        progress.update(chunk.rows + len(chunk.skipped))


def _reader(job: Job, writer: PartWriter, foreign: str | None) -> Callable[[_Chunk], _Chunk]:
    return functools.partial(_read, job, writer, foreign)


def _read(job: Job, writer: PartWriter, foreign: str | None, chunk: _Chunk) -> _Chunk:
    """Reads a chunk's items, unless its vectors are there."""
    try:
        found = [entry for piece in chunk.pieces for entry in piece.entries()]
        if job.on_error == "raise":
            bulk.refuse_errors(found)
        with ThreadPoolExecutor(bulk.FILE_THREADS) as threads:
            state = bulk.compare(found, chunk.old, threads)
            if state.kept and chunk.old is not None:
                return _kept(job, writer, chunk, chunk.old, found, state)
            if foreign and chunk.old is not None and chunk.old.content:
                raise ValueError(foreign)
            found = list(threads.map(_with_bytes, found)) if _has_room(found) else found
    except (ValueError, OSError) as error:
        return dataclasses.replace(chunk, pieces=(), error=str(error))
    return dataclasses.replace(chunk, pieces=(), entries=tuple(found), state=state)


def _kept(
    job: Job,
    writer: PartWriter,
    chunk: _Chunk,
    old: Chunk,
    found: Sequence[Entry],
    state: State,
) -> _Chunk:
    if old.skipped and job.on_error == "raise":
        raise ValueError(old.skipped[0][1])
    part = None
    if old.labels != writer.labels(with_vectors(found, old.skipped)):
        part = relabelled(writer, chunk.index, found, old)
    return dataclasses.replace(
        chunk,
        pieces=(),
        state=state,
        part=part,
        rows=old.rows,
        skipped=old.skipped,
        left_out=tuple((found[i].number, found[i].id) for i, _ in old.skipped),
    )


def _has_room(found: Sequence[Entry]) -> bool:
    """Whether the files of a chunk's pictures fit into one value; otherwise the actor reads them itself."""
    size = 0
    for entry in found:
        for image in entry.item.images if entry.item else ():
            if isinstance(image, str):
                try:
                    size += os.path.getsize(image)
                except (OSError, ValueError):
                    continue
    return size <= entries.CHUNK_BYTES


def _with_bytes(entry: Entry) -> Entry:
    """The entry with its pictures read; one that cannot be read stays a path, and fails beside the model."""
    if entry.item is None or not any(isinstance(image, str) for image in entry.item.images):
        return entry
    item: Item = entry.item
    try:
        images = tuple(
            read_image_file(image, item.name) if isinstance(image, str) else image
            for image in item.images
        )
    except ValueError:
        return entry
    # Errors name the file, which bytes do not.
    name = item.name
    if entry.path and entry.path not in name:
        name = f"{name} ({entry.path})"
    return dataclasses.replace(entry, item=dataclasses.replace(item, images=images, name=name))


def _embedder(model: Model, job: Job, writer: PartWriter) -> Callable[[_Chunk], _Chunk]:
    """Loads the model, once in each actor."""
    embedder = Embedder.from_pretrained(
        model.path, adapter=model.adapter, dtype=model.dtype, max_length=model.max_length
    )
    return functools.partial(_embed, embedder, job, writer)


def _embed(embedder: Embedder, job: Job, writer: PartWriter, chunk: _Chunk) -> _Chunk:
    if chunk.error or (chunk.state is not None and chunk.state.kept):
        return chunk
    found = chunk.entries
    try:
        vectors, skipped = bulk.encode_chunk(embedder, found, job)
        part = writer.write(chunk.index, with_vectors(found, skipped), vectors)
    except (ValueError, OSError) as error:
        return dataclasses.replace(chunk, entries=(), error=str(error))
    return dataclasses.replace(
        chunk,
        entries=(),
        part=part,
        rows=len(vectors),
        skipped=tuple(skipped),
        left_out=tuple((found[i].number, found[i].id) for i, _ in skipped),
    )
