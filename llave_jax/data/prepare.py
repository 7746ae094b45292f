"""Writes training data as array records: one file read instead of one image file for each image.

    OUTPUT/SUBSET/mmeb_train-SPLIT.array_record-00000-of-00049   rows with their encoded images
    OUTPUT/SUBSET/mmeb_train-SPLIT.array_record-00000-of-00049.json   counts and checksum of a shard
    OUTPUT/SUBSET/rows-SPLIT.npz                       row numbers, content hashes, facts for ordering
    OUTPUT/SUBSET/{features,dataset_info}.json         tensorflow-datasets' own description

A shard gets its name once it is complete and has been read back, and the description comes last. So a run
that was killed is continued by running it again. Records are read by `sources.RecordSource`, or in any
program by `tensorflow_datasets.builder_from_directory`; TensorFlow is not needed.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import functools
import json
import logging
import multiprocessing
from collections.abc import Generator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from llave_jax.common import files, ray_engine, workers
from llave_jax.common.content import digest, file_digest, short_hash
from llave_jax.common.directories import make_directory
from llave_jax.common.progress import Progress
from llave_jax.data.row_forms import FIELDS
from llave_jax.data.skips import SkipLog
from llave_jax.data.sources import IMAGES, INDEX_FACTS, MORE_IMAGES, MmebSource
from llave_jax.inputs.images import load_image

NAME = "mmeb_train"
logger = logging.getLogger(__name__)
# A chunk holds one record, so that any record can be read alone. Pictures are compressed already.
_WRITER_OPTIONS = "group_size:1,uncompressed"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One output file.

    Attributes:
      path: of the file.
      indices: its rows' indices in the source.
    """

    path: Path
    indices: range  # of the source

    @property
    def record_path(self) -> Path:
        """The shard's counts and checksum; it exists only beside a complete shard."""
        return self.path.with_name(self.path.name + ".json")


def features(has_more: bool = False) -> tfds.features.FeaturesDict:
    """What a record holds; images are the bytes of their files, b"" where a side has none.

    Args:
      has_more: some rows have several targets or hard negatives, or scores.

    Returns:
      The features of a record, by name.
    """
    image = tfds.features.Tensor(shape=(), dtype=np.object_)
    names: dict[str, Any] = {field: tfds.features.Text() for field in FIELDS}
    names |= {"row": np.int64, **dict.fromkeys(IMAGES, image)}
    if has_more:
        names |= {"more": tfds.features.Text(), MORE_IMAGES: tfds.features.Sequence(image)}
    return tfds.features.FeaturesDict(names)


def prepare(
    source: MmebSource,
    output: Path,
    *,
    split: str,
    rows_per_shard: int = 1024,
    num_workers: int = 1,
    check_images: bool = True,
    skips: SkipLog | None = None,
    engine: str = "local",
) -> None:
    """Writes all rows of a source below `output`, continuing what is there.

    Args:
      source: of the rows.
      output: a folder, which is made.
      split: the name that the rows get.
      rows_per_shard: rows a file; with MMEB's images about 100 MB for 1024.
      num_workers: processes; each reads, checks and writes one shard at a time.
      check_images: decode every image. Otherwise images are only read.
      skips: lists rows that cannot be used, which are left out; None: such a row is an error.
      engine: "local", or "ray" for tasks on a Ray cluster whose nodes see the same files.

    Raises:
      RowError, ImageError: a row cannot be used.
      TooManySkips: more than `skips` allows.
      ValueError: `output` holds shards of other rows.
      DiskFull: there is no room for a shard. Complete ones stay.
      OSError: a worker process has died.
    """
    plans = {
        subset: plan_shards(output / subset, indices, split, rows_per_shard)
        for subset, indices in source.subsets.items()
    }
    for subset in plans:
        make_directory(output / subset)
        files.remove_abandoned(output / subset)
        _check_other_splits(output / subset, split, source.has_more(subset))
    options = (check_images, skips is not None)
    work = [(subset, shard) for subset, shards in plans.items() for shard in shards]
    written = (
        _on_ray(source, options, work)
        if engine == "ray"
        else _in_processes(source, options, work, num_workers, output)
    )
    with (
        Progress(len(source), "preparing", unit="rows") as progress,
        contextlib.closing(written),  # an error here ends the workers
    ):
        for subset, shard, record in written:
            for row, reason in record["skipped"]:
                assert skips is not None  # without it, a row that cannot be used is an error
                skips.record(f"{subset}:{row}", reason)
            progress.update(len(shard.indices))
    facts = dict(zip(INDEX_FACTS, (source.contents(), *source.queries()), strict=True))
    for subset, shards in plans.items():
        indices = source.subsets[subset]
        part = {fact: values[indices.start : indices.stop] for fact, values in facts.items()}
        _write_index(
            output / subset,
            split,
            shards,
            row_numbers=source.row_numbers(subset),
            left_out=source.left_out.get(subset, ()),
            facts=part,
        )
        _write_description(output / subset, source.has_more(subset))


# A shard with the subset that it belongs to.
_Work = tuple[str, Shard]


def _in_processes(
    source: MmebSource,
    options: tuple[bool, bool],
    work: Sequence[_Work],
    num_workers: int,
    output: Path,
) -> Generator[tuple[str, Shard, dict[str, Any]]]:
    """Writes shards in processes of this machine: (subset, shard, record) of each, as they are done."""
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    with concurrent.futures.ProcessPoolExecutor(
        max_workers=num_workers,
        mp_context=context,
        initializer=_set_task,
        initargs=(source, options, stop),
    ) as pool:
        try:
            with workers.starting_workers():
                pending = {pool.submit(_run_task, shard): (subset, shard) for subset, shard in work}
            for future in concurrent.futures.as_completed(pending):
                yield *pending[future], future.result()
        except BrokenProcessPool as error:
            raise OSError(
                f"{output}: a worker process has died, perhaps of too little memory; run the same command again, "
                "with a smaller --num-workers: complete shards stay"
            ) from error
        except BaseException:
            stop.set()
            pool.shutdown(wait=True, cancel_futures=True)
            raise


def _on_ray(
    source: MmebSource, options: tuple[bool, bool], work: Sequence[_Work]
) -> Generator[tuple[str, Shard, dict[str, Any]]]:
    """As `_in_processes`, in tasks of a Ray cluster."""
    stage = ray_engine.Stage(functools.partial(functools.partial, _ray_task, source, options))
    for subset, shard, record in ray_engine.results(work, [stage]):
        if isinstance(record, str):
            raise ValueError(record)
        yield subset, shard, record


def _ray_task(
    source: MmebSource, options: tuple[bool, bool], work: _Work
) -> tuple[str, Shard, dict[str, Any] | str]:
    subset, shard = work
    try:
        return subset, shard, write_shard(source, shard, *options)
    except (ValueError, OSError) as error:
        return subset, shard, str(error)


def plan_shards(folder: Path, indices: range, split: str, rows_per_shard: int) -> list[Shard]:
    """The shards of one subset.

    Args:
      folder: of the subset.
      indices: its rows, in the source.
      split: the name that the rows get.
      rows_per_shard: of each shard but the last.

    Returns:
      The shards, in the order of their rows.

    Raises:
      ValueError: the folder holds this split in another number of shards.
    """
    count = -(-len(indices) // rows_per_shard)
    stem = f"{NAME}-{split}.array_record"
    shards = []
    for number in range(count):
        part = indices[number * rows_per_shard : (number + 1) * rows_per_shard]
        name = f"{stem}-{number:05}-of-{count:05}"
        shards.append(Shard(folder / name, part))
    others = set(folder.glob(f"{stem}-*-of-?????")) - {shard.path for shard in shards}
    if others:
        raise ValueError(
            f"{folder} holds {min(others).name}, but these rows make {count} shards; "
            "choose another output, or delete that split's files there"
        )
    return shards


def write_shard(
    source: MmebSource, shard: Shard, check_images: bool, skip: bool, stop: Event | None = None
) -> dict[str, Any]:
    """Writes a shard, unless a complete one of the same rows is there.

    Args:
      source: of the rows.
      shard: the file, and which rows it gets.
      check_images: as for `prepare`.
      skip: leave out rows that cannot be used.
      stop: ends the work at the next row.

    Returns:
      The shard's record: counts, checksum and row digests.

    Raises:
      RowError, ImageError: a row cannot be used, and `skip` is false.
      ValueError: the file holds other rows.
      OSError: the file does not hold what was written to it.
    """
    fingerprint = _fingerprint(source, shard)
    done = _read_record(shard)
    if done is not None:
        if done["fingerprint"] != fingerprint:
            raise ValueError(
                f"{shard.path} holds other rows than the source has now; "
                "choose another output, or delete the file"
            )
        if _is_sound(done, source, shard) and file_digest(shard.path).hex() == done["sha256"]:
            return done
        logger.warning("%s: is not what was written to it; it is written again", shard.path)
    has_more = source.has_more(source.subset(shard.indices.start))
    serializer = features(has_more)
    written: list[bytes] = []
    kept, skipped = [], []
    with files.atomic_file(shard.path) as temporary:
        writer = ArrayRecordWriter(str(temporary), _WRITER_OPTIONS)
        for index in shard.indices:
            if stop is not None and stop.is_set():
                raise _Stopped
            row_number = source.row_number(index)
            try:
                record = _record(source, index, row_number, check_images, has_more)
            except ValueError as error:
                if not skip:
                    raise
                skipped.append((row_number, str(error)))
                continue
            serialized = serializer.serialize_example(serializer.encode_example(record))
            written.append(digest(serialized))
            writer.write(serialized)
            kept.append((row_number, source.digest(index)))
        writer.close()
        _read_back(temporary, written)
        record = {
            "fingerprint": fingerprint,
            "sha256": file_digest(temporary).hex(),
            "bytes": temporary.stat().st_size,
            "rows": [row for row, _ in kept],
            "digests": [f"{value:016x}" for _, value in kept],
            "skipped": skipped,
        }
    files.write_text(shard.record_path, json.dumps(record))
    return record


def _record(
    source: MmebSource, index: int, row_number: int, check_images: bool, has_more: bool
) -> dict[str, Any]:
    row, images = source.read(index)
    if check_images:
        pair = source.make(index, row, images)
        others = [source.make(index, row, images, n).target for n in range(1, pair.num_targets)]
        for item in (pair.query, pair.target, *others, *pair.negatives):
            for image in item.images:
                if image is not None:
                    load_image(image, item.name)
    values = row._asdict() if has_more else {field: getattr(row, field) for field in FIELDS}
    first, others = images[: len(IMAGES)], images[len(IMAGES) :]
    more = {MORE_IMAGES: list(others)} if has_more else {}
    return {"row": row_number, **values, **dict(zip(IMAGES, first, strict=True)), **more}


def _read_back(path: Path, written: list[bytes]) -> None:
    """Raises OSError if a file does not hold the records that were written; `written`: their digests."""
    reader = ArrayRecordReader(str(path))
    found = [digest(reader.read()) for _ in range(reader.num_records())]
    reader.close()
    if found != written:
        raise OSError(
            f"{path}: {len(written)} records were written, {len(found)} are read back"
            + ("" if len(found) != len(written) else " with other content")
            + "; check the disk"
        )


def _fingerprint(source: MmebSource, shard: Shard) -> str:
    """Says which rows a shard is made of."""
    digests = [source.digest(index).to_bytes(8, "little") for index in shard.indices]
    # Shards of a subset have the same fields.
    fields = b"more" if source.has_more(source.subset(shard.indices.start)) else b""
    return short_hash(b"".join(digests) + fields, 16).hex()


def _read_record(shard: Shard) -> dict[str, Any] | None:
    if not shard.record_path.exists() or not shard.path.exists():
        return None
    try:
        record = json.loads(shard.record_path.read_text(encoding="utf-8"))
    except ValueError:
        record = None
    if isinstance(record, dict) and isinstance(record.get("fingerprint"), str):
        return record
    logger.warning("%s: cannot be read; the shard is written again", shard.record_path)
    return None


def _is_sound(record: dict[str, Any], source: MmebSource, shard: Shard) -> bool:
    """Whether what a record says of its shard can be true."""
    try:
        expected = {source.row_number(i): f"{source.digest(i):016x}" for i in shard.indices}
        kept = dict(zip(record["rows"], record["digests"], strict=True))
        left_out = {row for row, _ in record["skipped"]}
        whole = kept.keys() | left_out == expected.keys() and not kept.keys() & left_out
        whole &= record["rows"] == sorted(kept) and record["bytes"] == shard.path.stat().st_size
        return whole and kept.items() <= expected.items() and isinstance(record["sha256"], str)
    except (KeyError, TypeError, ValueError):
        return False


def _write_index(
    folder: Path,
    split: str,
    shards: list[Shard],
    *,
    row_numbers: np.ndarray,
    left_out: Sequence[int],
    facts: dict[str, np.ndarray],
) -> None:
    """Writes `rows-SPLIT.npz`. `row_numbers` and `facts` (INDEX_FACTS) are those of all rows of the subset."""
    records = [json.loads(shard.record_path.read_text()) for shard in shards]
    rows = np.array([row for record in records for row in record["rows"]], np.int64)
    digests = [int(value, 16) for record in records for value in record["digests"]]
    kept = np.searchsorted(row_numbers, rows)
    arrays: dict[str, Any] = {fact: values[kept] for fact, values in facts.items()}
    files.write_arrays(
        folder / f"rows-{split}.npz",
        row=rows,
        digest=np.array(digests, np.uint64),
        left_out=np.array(left_out, np.int64),
        **arrays,
    )


def _check_other_splits(folder: Path, split: str, has_more: bool) -> None:
    """Refuses a split whose records have other fields than those of the splits that lie in the folder."""
    description = folder / "features.json"
    others = {path.stem.removeprefix("rows-") for path in folder.glob("rows-*.npz")} - {split}
    if others and (f'"{MORE_IMAGES}"' in description.read_text(encoding="utf-8")) != has_more:
        rows = "several targets or hard negatives, or scores"
        raise ValueError(
            f"{folder} holds the split(s) {sorted(others)}: of those and {split!r}, only one has rows with {rows}; "
            "choose another output"
        )


def _write_description(folder: Path, has_more: bool) -> None:
    """tensorflow-datasets' description of all complete splits of a folder."""
    splits = sorted(path.stem.removeprefix("rows-") for path in folder.glob("rows-*.npz"))
    with files.scratch_directory(folder / "dataset_info") as scratch:
        template = tfds.core.ShardedFileTemplate(
            data_dir=str(scratch),  # pyright: ignore[reportArgumentType]
            template="{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
            dataset_name=NAME,
            filetype_suffix="array_record",
        )
        infos = []
        for split in splits:
            paths = sorted(folder.glob(f"{NAME}-{split}.array_record-*.json"))
            records = [json.loads(path.read_text()) for path in paths]
            infos.append(
                tfds.core.SplitInfo(
                    name=split,
                    shard_lengths=[len(record["rows"]) for record in records],
                    num_bytes=sum(record["bytes"] for record in records),
                    filename_template=template.replace(split=split),
                )
            )
            for path in paths:  # the library finds splits and shards by the names of files
                (scratch / path.stem).touch()
        tfds.folder_dataset.write_metadata(
            data_dir=str(scratch),
            features=features(has_more),
            split_infos=infos,
            filename_template=template,
            check_data=False,
            description="MMEB training rows with their encoded images.",
        )
        for name in ("features.json", "dataset_info.json"):  # readers look for the last one
            (scratch / name).replace(folder / name)


class _Stopped(Exception):
    """Ends a worker's shard: the parent has ended the work."""


# The source, the options and the end of a worker process, which are set once, when it starts.
_task: tuple[MmebSource, tuple[bool, bool], Event] | None = None


def _set_task(source: MmebSource, options: tuple[bool, bool], stop: Event) -> None:
    global _task
    workers.follow_parent()
    _task = source, options, stop


def _run_task(shard: Shard) -> dict[str, Any]:
    assert _task is not None
    source, (check_images, skip), stop = _task
    return write_shard(source, shard, check_images, skip, stop)
