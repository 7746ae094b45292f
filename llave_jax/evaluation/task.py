"""What is scored: queries, what they are to find, and how the answers are measured.

Owns the form into which every benchmark is read. Reading is `benchmarks/`, scoring `scoring.py`, averages and
tables `results.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np

from llave_jax.evaluation import metrics
from llave_jax.inputs.item import Item


@dataclasses.dataclass(frozen=True)
class TaskInfo:
    """What is known of a task before it is read.

    Attributes:
      name: of the task, and of its files.
      meta_task: the group in which it is averaged.
      in_distribution: whether MMEB's training sets include it; None: the benchmark does not distinguish.
      metric: the one that averages and best checkpoints count, one of `Task.metrics`.
    """

    name: str
    meta_task: str
    in_distribution: bool | None = None
    metric: str = "precision@1"


class Items(Sequence[Item]):
    """Items that are made whenever they are asked for, so that their pictures need not stay in memory.

    Args:
      count: how many.
      make: index -> item.
    """

    def __init__(self, count: int, make: Callable[[int], Item]):
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Item: ...

    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...

    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._make(i) for i in range(*index.indices(self._count))]
        return self._make(range(self._count)[index])


@dataclasses.dataclass(frozen=True)
class Task:
    """Queries, the candidates that are ranked for each of them, and which of these are right.

    A candidate is what the benchmark counts as one: a content in MMEB-V1, a name in MMEB-V2, a document in a corpus.
    Equal scores rank in the order of `pools`, or of `candidates` where all are ranked.

    Attributes:
      info: name, meta-task and main metric.
      queries: Q items.
      candidates: M items.
      relevant: for each query int32 [r], the right candidates; of `groups`, where these are given.
      gains: for each query float32 [r], how relevant they are, above 0; None: all 1.
      pools: for each query int32 [c], the candidates that are ranked, also repeated ones; None: all of them.
      groups: int32 [M], candidates that count as one answer, with the score of the best of them. Without pools.
      metrics: names that `metrics.py` knows.
      query_names: for files and messages.
      candidate_names: the same; of `groups`, where these are given.
      all_tied: ranks count as in `metrics.measure`.
      settings: what a score depends on besides the model, such as the number of frames.
      skipped_queries: rows that cannot be scored.
      skipped_candidates: candidates of other rows that cannot be scored.

    Raises:
      ValueError: the parts do not fit together.
    """

    info: TaskInfo
    queries: Sequence[Item]
    candidates: Sequence[Item]
    relevant: Sequence[np.ndarray]
    gains: Sequence[np.ndarray] | None = None
    pools: Sequence[np.ndarray] | None = None
    groups: np.ndarray | None = None
    metrics: tuple[str, ...] = ("precision@1",)
    query_names: Sequence[str] = ()
    candidate_names: Sequence[str] = ()
    all_tied: bool = False
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    skipped_queries: int = 0
    skipped_candidates: int = 0

    def __post_init__(self):
        for name in ("relevant", "gains", "pools"):
            part = getattr(self, name)
            if part is not None and len(part) != len(self.queries):
                raise ValueError(
                    f"{self.info.name}: {name} is of {len(part)} queries; expected {len(self.queries)}"
                )
        if self.info.metric not in self.metrics:
            raise ValueError(
                f"{self.info.name}: the main metric {self.info.metric} is not among {self.metrics}"
            )
        if self.groups is not None and (self.pools is not None or len(self.groups) != self.count):
            raise ValueError(f"{self.info.name}: groups are of all candidates, without pools")
        for metric in self.metrics:
            metrics.parse(metric)

    @property
    def count(self) -> int:
        """M, the number of candidates."""
        return len(self.candidates)

    @property
    def answers(self) -> int:
        """How many different answers there are: candidates, or groups of them."""
        return self.count if self.groups is None else int(self.groups.max(initial=-1)) + 1

    @property
    def depth(self) -> int:
        """How many answers of each query the metrics look at; 10 at least, for predictions and reports."""
        return max(10, *(metrics.parse(name)[1] for name in self.metrics))

    def chance(self) -> float | None:
        """Expected value of the main metric for random scores; None where it has no simple form.

        A candidate that a pool repeats counts once, as its scores are equal.
        """
        if metrics.parse(self.info.metric) not in (("precision", 1), ("hit", 1)):
            return None
        found = []
        for query, right in enumerate(self.relevant):
            total, among = self.answers, len(right)
            if self.pools is not None:
                pool = np.unique(self.pools[query])
                total, among = len(pool), int(np.isin(right, pool).sum())
            found.append(among / total)
        return float(np.mean(found))
