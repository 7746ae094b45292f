"""Puts a task together from rows, where a candidate is known by its name.

Owns the rule of MMEB-V2 and of most leaderboards: candidates of one name are one, the first of them counts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from llave_jax.evaluation.task import Items, Task, TaskInfo
from llave_jax.inputs.item import Item

# Makes an item whenever it is needed, so that its pictures need not stay in memory.
Make = Callable[[], Item]


class TaskBuilder:
    """Collects queries and candidates, in the order of the rows.

    Args:
      info: of the task.
      metrics: of the task.
      local: whether each query ranks candidates of its own; otherwise all are ranked for every query.
    """

    def __init__(self, info: TaskInfo, metrics: tuple[str, ...], *, local: bool):
        self._info, self._metrics, self._local = info, metrics, local
        self._places: dict[str, int] = {}
        self._candidates: list[Make] = []
        self._queries: list[Make] = []
        self._names: list[str] = []
        self._labels: list[Mapping[str, float]] = []
        self._pools: list[np.ndarray] = []

    def add_candidate(self, name: str, make: Make) -> int:
        """Adds a candidate, unless there is one of this name.

        Args:
          name: of the candidate.
          make: gives its item.

        Returns:
          Its index.
        """
        if name not in self._places:
            self._places[name] = len(self._candidates)
            self._candidates.append(make)
        return self._places[name]

    def add_query(
        self,
        name: str,
        make: Make,
        labels: Mapping[str, float],
        pool: Sequence[int] | None = None,
    ) -> None:
        """Adds a query.

        Args:
          name: of the query, for files and messages.
          make: gives its item.
          labels: names of the right candidates, which may be added later, with how relevant they are (above 0).
          pool: the candidates that are ranked, where each query has its own.
        """
        assert (pool is not None) == self._local
        self._queries.append(make)
        self._names.append(name)
        self._labels.append(dict(labels))
        if pool is not None:
            self._pools.append(np.array(pool, np.int32))

    def task(self, settings: Mapping[str, Any] | None = None, where: str = "") -> Task:
        """The task of all that was added.

        Args:
          settings: what scores depend on besides the model.
          where: the files, for errors.

        Returns:
          The task.

        Raises:
          ValueError: there are no queries, or a query has no right candidate, or one that was not added or that is
            not in its pool; it names the query.
        """
        where = where or self._info.name
        if not self._queries:
            raise ValueError(f"{where}: has no queries")
        relevant, gains = [], []
        for number, (name, labels) in enumerate(zip(self._names, self._labels, strict=True)):
            missing = [label for label in labels if label not in self._places]
            if missing or not labels:
                found = f"{missing[0]!r:.120}, which is no candidate" if missing else "none"
                raise ValueError(
                    f"{where}: query {name!r:.120}: expected right answers among the candidates; found {found}"
                )
            places = np.array([self._places[label] for label in labels], np.int32)
            if self._local and not np.isin(places, self._pools[number]).any():
                raise ValueError(
                    f"{where}: query {name!r:.120}: its own candidates have no right answer; expected "
                    f"{next(iter(labels))!r:.120} among them"
                )
            relevant.append(places)
            gains.append(np.array(list(labels.values()), np.float32))
        graded = any((values != 1).any() for values in gains)
        return Task(
            info=self._info,
            queries=_items(self._queries),
            candidates=_items(self._candidates),
            relevant=relevant,
            gains=gains if graded else None,
            pools=self._pools if self._local else None,
            metrics=self._metrics,
            query_names=self._names,
            candidate_names=list(self._places),
            settings=settings or {},
        )


def _items(makes: Sequence[Make]) -> Items:
    return Items(len(makes), functools.partial(_make, makes))


def _make(makes: Sequence[Make], index: int) -> Item:
    return makes[index]()
