"""Hard negatives of some consecutive rows: search, filters, and the part of the output that comes of them.

Owns what a part holds and its file. Which rows are a part, and the output made of all parts, are `job.py`.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llave_jax.common.files import write_arrays
from llave_jax.data.row_forms import Side
from llave_jax.data.rows import Row
from llave_jax.data.sources import MmebSource
from llave_jax.embedding.search import search
from llave_jax.mining.candidates import Groups, Rules, choose, filter_candidates
from llave_jax.mining.vectors import Vectors

# Rows of a part: their queries are searched for together.
PART_ROWS = 1024
# Memory of one similarity in a block: itself, its copy without excluded pairs, and what top_k sorts.
SCORE_BYTES = 16


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The training rows and their embeddings.

    Attributes:
      source: of the rows.
      queries: int64 [n], number of each row's content; -1 for rows that cannot be used.
      targets: numbers of each row's targets; none for rows that cannot be used.
      first_row, first_place: int64 [targets], a row that has this target, and which of its targets it is.
      contents: uint64 [n], of `PairSource.contents`.
      query_vectors, target_vectors: by number.
      own: int64 [queries], the target that shows what the query shows; -1 for none.
      never: targets that are no negatives, by the query's number.
    """

    source: MmebSource
    queries: np.ndarray
    targets: Groups
    first_row: np.ndarray
    first_place: np.ndarray
    contents: np.ndarray
    query_vectors: Vectors
    target_vectors: Vectors
    own: np.ndarray
    never: Groups

    def usable(self, rows: range) -> np.ndarray:
        """Args:
          rows: of the source.

        Returns:
          int64, those of them that can be used.
        """
        return rows.start + np.flatnonzero(self.queries[rows.start : rows.stop] >= 0)


class Scope:
    """Rows whose targets are searched together: those of a subset, or all.

    Args:
      corpus: of all rows.
      rows: which of them.
    """

    def __init__(self, corpus: Corpus, rows: range):
        usable = corpus.usable(rows)
        places, targets = corpus.targets.of(usable)
        # int64 [m], increasing: the number of the target in each row of what is searched.
        self.targets = np.unique(targets)
        self.rows_of = Groups(targets, usable[places], len(corpus.first_row))
        self.vectors = corpus.target_vectors.some(self.targets)

    def columns(self, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where targets lie in what is searched.

        Args:
          targets: int64 [p].

        Returns:
          int64 [p], their columns, and bool [p], whether they are there at all.
        """
        if not len(self.targets):
            return np.zeros(len(targets), np.int64), np.zeros(len(targets), bool)
        columns = np.minimum(np.searchsorted(self.targets, targets), len(self.targets) - 1)
        return columns, self.targets[columns] == targets


class Counts(NamedTuple):
    """What became of rows; sums over parts are sums of these.

    Attributes:
      rows: of the source.
      used: with an embedding of both sides.
      full: with as many negatives as were asked for.
      positives: targets of all rows.
      negatives: of all rows.
      other_positives: targets left out as they belong to another row of the same query.
      own_content: targets left out as they show what the query shows.
      outside_ranks: candidates in front of the window of ranks.
      above_margin: candidates of the window that are too similar.
      positive_score, negative_score: sums of cosines.
    """

    rows: int = 0
    used: int = 0
    full: int = 0
    positives: int = 0
    negatives: int = 0
    other_positives: int = 0
    own_content: int = 0
    outside_ranks: int = 0
    above_margin: int = 0
    positive_score: float = 0.0
    negative_score: float = 0.0

    def plus(self, other: Counts) -> Counts:
        """Args:
          other: of other rows.

        Returns:
          Those of both.
        """
        sums: list[Any] = [a + b for a, b in zip(self, other, strict=True)]
        return Counts(*sums)


@dataclasses.dataclass(frozen=True)
class Part:
    """The output of some rows.

    Attributes:
      lines: JSON lines of the rows with their negatives.
      contents: uint64 [n] of these rows.
      neighbours: uint64, of all these rows, one after another.
      lengths: int64 [n], how many each has.
      counts: what became of the rows.
    """

    lines: bytes
    contents: np.ndarray
    neighbours: np.ndarray
    lengths: np.ndarray
    counts: Counts

    def write(self, path: Path) -> None:
        """Writes the part, whole or not at all.

        Args:
          path: of the file.
        """
        write_arrays(
            path,
            lines=np.frombuffer(self.lines, np.uint8),
            contents=self.contents,
            neighbours=self.neighbours,
            lengths=self.lengths,
            counts=np.frombuffer(json.dumps(self.counts).encode(), np.uint8),
        )

    @classmethod
    def read(cls, path: Path) -> Part | None:
        """Reads a part.

        Args:
          path: of the file.

        Returns:
          The part; None if there is none, or if it was damaged.
        """
        try:
            with np.load(path, allow_pickle=False) as arrays:
                return cls(
                    arrays["lines"].tobytes(),
                    arrays["contents"],
                    arrays["neighbours"],
                    arrays["lengths"],
                    Counts(*json.loads(arrays["counts"].tobytes())),
                )
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None


def mine_part(corpus: Corpus, scope: Scope, rows: range, rules: Rules, memory: int) -> Part:
    """Finds the hard negatives of some rows.

    Args:
      corpus: of all rows.
      scope: where negatives are looked for.
      rows: at most PART_ROWS.
      rules: which targets become negatives.
      memory: bytes that a device's block of similarities may take.

    Returns:
      The rows' part of the output. Rows that cannot be used are not in it.
    """
    used = corpus.usable(rows)
    owners, own_targets = corpus.targets.of(used)
    positives = np.einsum(
        "nd,nd->n",
        corpus.query_vectors.of(corpus.queries[used][owners]),
        corpus.target_vectors.of(own_targets),
        dtype=np.float64,
    )
    scores, targets = _nearest(corpus, scope, corpus.queries[used], rules, memory)
    filtered = filter_candidates(scores, _lowest(positives, owners, len(used)), rules)
    names = [corpus.source.pair_id(index) for index in used.tolist()]
    chosen = choose(filtered.passed, rules, names)
    own_scores = np.split(positives, np.searchsorted(owners, np.arange(1, len(used))))
    lines = []
    for place, index in enumerate(used.tolist()):
        picked = chosen[place]
        negatives = [_side(corpus, target) for target in targets[place, picked].tolist()]
        row = corpus.source.row(index)
        line = _line(row, negatives, own_scores[place], scores[place, picked])
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    near = filtered.passed & (np.cumsum(filtered.passed, axis=1) <= rules.neighbours)
    places, ranks = np.nonzero(near)
    neighbours = scope.rows_of.spread(targets[places, ranks], used[places])
    counts = Counts(
        rows=len(rows),
        used=len(used),
        full=sum(len(picked) == rules.negatives for picked in chosen),
        positives=len(positives),
        negatives=sum(map(len, chosen)),
        **_left_out(corpus, scope, used),
        outside_ranks=int(filtered.outside_ranks.sum()),
        above_margin=int(filtered.above_margin.sum()),
        positive_score=float(positives.sum()),
        negative_score=float(
            sum(scores[i, picked].sum(dtype=np.float64) for i, picked in enumerate(chosen))
        ),
    )
    return Part(
        "".join(lines).encode(),
        corpus.contents[used],
        corpus.contents[neighbours],
        near.sum(axis=1),
        counts,
    )


def _lowest(positives: np.ndarray, owners: np.ndarray, count: int) -> np.ndarray:
    """Of each row the score of its least similar target: whichever is trained with, the margin holds."""
    lowest = np.full(count, np.inf)
    np.minimum.at(lowest, owners, positives)
    return lowest


def _side(corpus: Corpus, target: int) -> Side:
    row = corpus.source.row(int(corpus.first_row[target]))
    return row.positives()[corpus.first_place[target]]


def _nearest(
    corpus: Corpus, scope: Scope, numbers: np.ndarray, rules: Rules, memory: int
) -> tuple[np.ndarray, np.ndarray]:
    """Scores and targets of the candidates of each query, best first."""
    count = min(rules.end_rank, len(scope.targets))
    if not len(numbers):
        return np.zeros((0, count), np.float32), np.zeros((0, count), np.int64)
    distinct, place = np.unique(numbers, return_inverse=True)
    queries = np.zeros((PART_ROWS, corpus.query_vectors.dimension), np.float32)
    queries[: len(distinct)] = corpus.query_vectors.of(distinct)
    which, targets = corpus.never.of(distinct)
    columns, there = scope.columns(targets)
    scores, found = search(
        queries,
        scope.vectors,
        count,
        block_rows=max(1, memory // (SCORE_BYTES * PART_ROWS)),
        excluded=(which[there], columns[there]),
    )
    place = place.reshape(-1)
    return scores[place], scope.targets[found][place]


def _left_out(corpus: Corpus, scope: Scope, used: np.ndarray) -> dict[str, int]:
    """How many targets are no candidates of these rows, beside each row's own."""
    numbers = corpus.queries[used]
    which, targets = corpus.never.of(numbers)
    owners, own_targets = corpus.targets.of(used)
    count = len(corpus.first_row)
    is_own = np.isin(which * count + targets, owners * count + own_targets)
    others = scope.columns(targets)[1] & ~is_own
    own = others & (targets == corpus.own[numbers[which]])
    return {"other_positives": int((others & ~own).sum()), "own_content": int(own.sum())}


def _line(
    row: Row, negatives: list[Side], positives: np.ndarray, scores: np.ndarray
) -> dict[str, Any]:
    texts, paths = (list(values) for values in zip(*row.positives(), strict=True))
    several = len(texts) > 1
    return {
        "qry": row.qry,
        "qry_image_path": row.qry_image_path,
        "pos_text": texts if several else texts[0],
        "pos_image_path": paths if several else paths[0],
        "neg_text": [negative.text for negative in negatives],
        "neg_image_path": [negative.image_path for negative in negatives],
        "pos_scores": [round(float(score), 6) for score in positives],
        "neg_scores": [round(float(score), 6) for score in scores],
    }
