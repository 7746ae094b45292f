"""Mining of a training set, which may die at any moment and continues to the same files.

    OUTPUT/SUBSET.jsonl           the subset's rows with their hard negatives, for training
    OUTPUT/neighbours.parquet     for each row, which rows have its hard negatives as targets: an order of rows
    OUTPUT/mining/report.json     what became of the rows
    OUTPUT/mining/skipped.jsonl   rows that cannot be used, if there are any
    OUTPUT/mining/...             what a later start continues: contents, embeddings, parts of the output

Image paths stay as they are: what they are relative to is `data.image_root` of a run.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet

from llave_jax.common.content import digest
from llave_jax.common.directories import make_directory
from llave_jax.common.files import atomic_file, naming_full_disk, remove_abandoned, write_text
from llave_jax.common.json_text import parse_json
from llave_jax.common.locks import only_writer
from llave_jax.common.progress import Progress
from llave_jax.common.tables import align, percent
from llave_jax.data.sources import MmebSource
from llave_jax.embedding.bulk import Job, embed_items
from llave_jax.embedding.embedder import Embedder
from llave_jax.mining.candidates import (
    Groups,
    Rules,
    never_negatives,
    number_contents,
    same_content,
)
from llave_jax.mining.contents import Contents, read_contents
from llave_jax.mining.parts import PART_ROWS, Corpus, Counts, Part, Scope, mine_part
from llave_jax.mining.vectors import SideItems, Vectors

NEIGHBOURS = "neighbours.parquet"
WORK = "mining"
FORMAT = 1
logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Mining:
    """What is mined, and how.

    Attributes:
      source: the training rows.
      data: what the user calls them.
      output: directory of the results.
      fingerprint: of the model.
      model: as its user calls it.
      rules: which targets become negatives.
      across: look for negatives among the targets of all subsets, not of the row's own.
      memory: bytes that a device's block of similarities may take.
      on_error: "raise", or "skip" rows that cannot be used.
      batch_size: as for `Embedder.encode`.
    """

    source: MmebSource
    data: str
    output: Path
    fingerprint: str
    model: str = ""
    rules: Rules = dataclasses.field(default_factory=Rules)
    across: bool = False
    memory: int = 256 << 20
    on_error: str = "raise"
    batch_size: int | None = None

    def files(self) -> dict[str, Path]:
        """The file of each subset's rows."""
        return {name: self.output / f"{name}.jsonl" for name in self.source.subsets}


def mine(embedder: Embedder, mining: Mining) -> dict[str, Counts]:
    """Finds hard negatives of all rows and writes them, continuing what an earlier call did.

    Args:
      embedder: the model.
      mining: what, how, and where to.

    Returns:
      What became of the rows, by subset.

    Raises:
      ValueError: a row cannot be used, or `output` holds something else.
      OSError: the data cannot be read or the output cannot be written.
    """
    with only_writer(mining.output):
        work = mining.output / WORK
        before = _claim_output(mining)
        contents = read_contents(mining.source, work / "contents", mining.on_error)
        corpus, problems = _embed(embedder, mining, contents)
        parts = _Parts(mining, corpus)
        parts.find_all()
        counts = _write_rows(mining, parts)
        _write_neighbours(mining.output / NEIGHBOURS, parts)
        _write_report(mining, counts, problems)
        for name in before - {path.name for path in mining.files().values()}:
            (mining.output / name).unlink(missing_ok=True)
        return counts


def _claim_output(mining: Mining) -> set[str]:
    """Names of rows' files that earlier calls wrote. Refuses a directory with files that are not ours."""
    record = mining.output / WORK / "files.json"
    before: set[str] = set()
    if record.exists():
        before = set(parse_json(record.read_text(encoding="utf-8")))
    paths = [*mining.files().values(), mining.output / NEIGHBOURS]
    taken = [path for path in paths if path.exists() and path.name not in before | {NEIGHBOURS}]
    if not record.exists() and paths[-1].exists():
        taken.append(paths[-1])
    if taken or mining.output.resolve() == Path(mining.data).resolve():
        own = f"{mining.output}: is the data itself"
        why = f"{taken[0]}: was not written by llave_jax.mine" if taken else own
        raise ValueError(f"{why}; use another --output")
    make_directory(record.parent)
    write_text(record, json.dumps(sorted(before | {path.name for path in paths[:-1]})))
    return before


def _embed(embedder: Embedder, mining: Mining, contents: Contents) -> tuple[Corpus, dict[int, str]]:
    """Embeds the distinct contents; also why rows cannot be used, by index."""
    source, problems = mining.source, dict(contents.problems)
    usable = contents.counts > 0
    if not usable.any():
        reason = next(iter(problems.values()), "there are no rows")
        raise ValueError(f"{mining.data}: no row can be used: {reason}")
    rows = np.flatnonzero(usable)
    query = _embed_side(embedder, mining, "query", contents.queries[rows], rows, 0 * rows)
    rows = np.repeat(np.arange(len(usable)), contents.counts)
    starts = np.cumsum(contents.counts) - contents.counts
    places = np.arange(len(rows)) - starts[rows] + 1
    target = _embed_side(embedder, mining, "target", contents.targets, rows, places)
    for side in (query, target):
        failed = ~side.vectors.has(side.numbers)
        for row, number in zip(
            side.rows[failed].tolist(), side.numbers[failed].tolist(), strict=True
        ):
            usable[row] = False
            problems.setdefault(row, side.vectors.problems[number])
    queries = np.full(len(usable), -1, np.int64)
    kept = usable[query.rows]
    queries[query.rows[kept]] = query.numbers[kept]
    own = same_content(query.keys, target.keys)
    kept = usable[target.rows]
    owners, targets = target.rows[kept], target.numbers[kept]
    # A target whose rows cannot be used is no candidate: it is in no scope.
    corpus = Corpus(
        source,
        queries,
        Groups(owners, targets, len(usable)),
        target.rows[target.first],
        target.places[target.first] - 1,
        source.contents(),
        query.vectors,
        target.vectors,
        own,
        never_negatives(queries[owners], targets, own),
    )
    return corpus, problems


@dataclasses.dataclass(frozen=True)
class _Embedded:
    """Queries or targets of rows.

    Attributes:
      rows, places: int64 [n], of each.
      numbers: int64 [n], of its content.
      first: int64 [contents], where each content occurs first.
      keys: uint64 [contents].
      vectors: by number.
    """

    rows: np.ndarray
    places: np.ndarray
    numbers: np.ndarray
    first: np.ndarray
    keys: np.ndarray
    vectors: Vectors


def _embed_side(
    embedder: Embedder,
    mining: Mining,
    side: str,
    keys: np.ndarray,
    rows: np.ndarray,
    places: np.ndarray,
) -> _Embedded:
    """Embeds the distinct contents of queries or targets, whose keys, rows and places in the row are given."""
    numbers, first = number_contents(keys)
    logger.info("%d distinct contents of %d %s(s)", len(first), len(keys), side)
    name = str(Path(mining.data).resolve())
    job = Job(
        SideItems(mining.source, rows[first], places[first], name),
        mining.output / WORK / side,
        mining.fingerprint,
        on_error=mining.on_error,
        model=mining.model,
        batch_size=mining.batch_size,
    )
    if not embed_items(embedder, job).embedded:
        raise ValueError(f"{mining.data}: no {side} can be embedded")
    vectors = Vectors(job.output, len(first))
    return _Embedded(rows, places, numbers, first, keys[first], vectors)


class _Parts:
    """The parts of the output, each in a file.

    Args:
      mining: the job.
      corpus: of its rows.
    """

    def __init__(self, mining: Mining, corpus: Corpus):
        self._mining, self._corpus = mining, corpus
        settings = {
            "format": FORMAT,
            "rules": dataclasses.asdict(mining.rules),
            "across": mining.across,
            "memory": mining.memory,
            "subsets": {name: list(r) for name, r in _bounds(mining.source).items()},
            "vectors": [corpus.query_vectors.digest, corpus.target_vectors.digest],
        }
        targets = (corpus.targets.values, corpus.targets.starts)
        arrays = (corpus.contents, corpus.queries, *targets)
        key = digest(json.dumps(settings).encode(), *(array.tobytes() for array in arrays)).hex()
        self._directory = mining.output / WORK / f"parts-{key[:16]}"
        for other in self._directory.parent.glob("parts-*"):
            if other != self._directory:
                shutil.rmtree(other)
        make_directory(self._directory)
        remove_abandoned(self._directory)

    def find_all(self) -> None:
        """Finds the hard negatives of all rows that have none yet."""
        source, scope = self._mining.source, None
        if self._mining.across:
            scope = Scope(self._corpus, range(len(source)))
        with Progress(len(source), "searching", unit="rows") as progress:
            for name, subset in source.subsets.items():
                inside = scope
                for number, rows in enumerate(_divided(subset)):
                    if self._read(name, number) is not None:
                        progress.skip(len(rows))
                        continue
                    inside = inside or Scope(self._corpus, subset)
                    memory, rules = self._mining.memory, self._mining.rules
                    part = mine_part(self._corpus, inside, rows, rules, memory)
                    part.write(self._path(name, number))
                    progress.update(len(rows))

    def of(self, subset: str) -> Iterator[Part]:
        """The parts of a subset.

        Args:
          subset: its name.

        Yields:
          Each, in order.
        """
        for number, _ in enumerate(_divided(self._mining.source.subsets[subset])):
            part = self._read(subset, number)
            if part is None:
                raise OSError(
                    f"{self._path(subset, number)}: was removed or damaged while the job ran; run the same command "
                    "again"
                )
            yield part

    @property
    def subsets(self) -> list[str]:
        """Names, in order."""
        return list(self._mining.source.subsets)

    def _read(self, subset: str, number: int) -> Part | None:
        return Part.read(self._path(subset, number))

    def _path(self, subset: str, number: int) -> Path:
        return self._directory / f"{self.subsets.index(subset):04}-{number:06}.npz"


def _bounds(source: MmebSource) -> dict[str, tuple[int, int]]:
    return {name: (rows.start, rows.stop) for name, rows in source.subsets.items()}


def _divided(rows: range) -> list[range]:
    return [rows[start : start + PART_ROWS] for start in range(0, len(rows), PART_ROWS)]


def _write_rows(mining: Mining, parts: _Parts) -> dict[str, Counts]:
    counts = {}
    for name, path in mining.files().items():
        total = Counts()
        with atomic_file(path) as temporary, temporary.open("wb") as file:
            for part in parts.of(name):
                file.write(part.lines)
                total = total.plus(part.counts)
        counts[name] = total
    return counts


def _write_neighbours(path: Path, parts: _Parts) -> None:
    schema = pyarrow.schema(
        [
            pyarrow.field("content", pyarrow.uint64(), nullable=False),
            pyarrow.field("neighbours", pyarrow.list_(pyarrow.uint64()), nullable=False),
        ]
    )
    with (
        atomic_file(path) as temporary,
        pyarrow.parquet.ParquetWriter(temporary, schema, use_dictionary=False) as writer,
    ):
        for name in parts.subsets:
            for part in parts.of(name):
                if not len(part.contents):
                    continue
                offsets = np.concatenate([[0], np.cumsum(part.lengths)]).astype(np.int32)
                lists = pyarrow.ListArray.from_arrays(offsets, pyarrow.array(part.neighbours))
                columns = [pyarrow.array(part.contents), lists]
                writer.write_table(pyarrow.Table.from_arrays(columns, schema=schema))


def _write_report(
    mining: Mining, counts: Mapping[str, Counts], problems: Mapping[int, str]
) -> None:
    report: dict[str, Any] = {
        "model": mining.model,
        "fingerprint": mining.fingerprint,
        "data": mining.data,
        "image_root": str(mining.source.image_root),
        "rules": dataclasses.asdict(mining.rules) | {"across": mining.across},
        "subsets": {name: count._asdict() for name, count in counts.items()},
    }
    work = mining.output / WORK
    write_text(work / "report.json", json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    skipped = work / "skipped.jsonl"
    if not problems:
        skipped.unlink(missing_ok=True)
        return
    with atomic_file(skipped) as temporary, naming_full_disk(skipped):
        lines = []
        for index in sorted(problems):
            subset, row = mining.source.subset(index), mining.source.row_number(index)
            entry = {"subset": subset, "row": row, "reason": problems[index]}
            lines.append(json.dumps(entry) + "\n")
        temporary.write_text("".join(lines), encoding="utf-8")


def report_text(counts: Mapping[str, Counts], rules: Rules) -> str:
    """What became of the rows, for people.

    Args:
      counts: by subset.
      rules: of the job.

    Returns:
      A table, and what its columns mean.
    """
    heading = ("subset", "rows", "skipped", f"with {rules.negatives} (%)", "a row", "cos(q, pos)")
    heading += ("cos(q, neg)", "positives", "own content", "ranks", "margin")
    total = Counts()
    for count in counts.values():
        total = total.plus(count)
    rows = [heading, *(_cells(name, count) for name, count in counts.items())]
    if len(counts) > 1:
        rows.append(_cells("all", total))
    return align(rows) + (
        "\nleft out: other positives of the query; targets that show what the query shows; targets in front of the "
        "ranks;\ntargets within the ranks that are too similar"
    )


def _cells(name: str, c: Counts) -> tuple[str, ...]:
    def mean(total: float, count: int) -> str:
        return f"{total / count:.3f}" if count else "-"

    return (
        name,
        str(c.rows),
        str(c.rows - c.used),
        percent(c.full / c.used if c.used else None),
        mean(c.negatives, c.used),
        mean(c.positive_score, c.positives),
        mean(c.negative_score, c.negatives),
        *map(str, (c.other_positives, c.own_content, c.outside_ranks, c.above_margin)),
    )
