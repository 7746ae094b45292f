"""Which targets are hard negatives of a row: contents by number, what is never a negative, and filters by score.

Pure functions over NumPy arrays. Scores come from `embedding/search.py`; files are `parts.py` and `job.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from llave_jax.common.content import short_hash


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which of a query's nearest targets become its negatives.

    Attributes:
      first_rank, end_rank: the window of ranks, the end excluded. Rank 0 is the nearest target that is not known to
        be a positive.
      relative: a negative's score is below the positive's by this share of its size: s - (1 - relative) |s|,
        which is relative * s for a positive score (TopK-PercPos of NV-Retriever, arXiv 2407.15831); None: no bound.
      margin: a negative's score is below the positive's less this margin (TopK-MarginPos); None: no bound.
      negatives: of a row, at most.
      sample: take them by chance from what passes, each as likely; otherwise the best.
      seed: of the sampling.
      neighbours: of a row, at most, for an order of rows.
    """

    first_rank: int = 0
    end_rank: int = 100
    relative: float | None = 0.95
    margin: float | None = None
    negatives: int = 4
    sample: bool = False
    seed: int = 0
    neighbours: int = 32

    def __post_init__(self):
        if not 0 <= self.first_rank < self.end_rank:
            raise ValueError(
                f"ranks are {self.first_rank}:{self.end_rank}; expected FIRST:END with 0 <= FIRST < END"
            )
        for name in ("negatives", "neighbours"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} is {value}; expected a positive number")
        if self.relative is not None and not 0 < self.relative <= 1:
            raise ValueError(f"relative is {self.relative}; expected more than 0, at most 1")
        if self.margin is not None and not 0 <= self.margin <= 2:
            raise ValueError(f"margin is {self.margin}; expected 0 to 2, a difference of cosines")


def number_contents(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Numbers contents in the order in which they first occur.

    Args:
      keys: uint64 [n], equal for equal contents.

    Returns:
      numbers: int64 [n], from 0.
      first: int64 [contents], where each occurs first; increasing.
    """
    _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
    order = np.argsort(first)
    rank = np.empty(len(first), np.int64)
    rank[order] = np.arange(len(first))
    return rank[inverse.reshape(-1)], first[order]


class Groups:
    """Values by group, as `values[starts[g]:starts[g + 1]]`.

    Args:
      groups: int [p], of each value, from 0.
      values: int [p]; those of a group keep their order.
      count: groups.
    """

    def __init__(self, groups: np.ndarray, values: np.ndarray, count: int):
        self.values = values[np.argsort(groups, kind="stable")]
        self.starts = np.concatenate([[0], np.cumsum(np.bincount(groups, minlength=count))])

    def sizes(self, groups: np.ndarray) -> np.ndarray:
        """Args:
          groups: int [g].

        Returns:
          int64 [g], values of each.
        """
        return self.starts[groups + 1] - self.starts[groups]

    def of(self, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The values of several groups, one group after another.

        Args:
          groups: int [g], any number of times each.

        Returns:
          int64 [p] twice: places in `groups`, and the values.
        """
        sizes = self.sizes(groups)
        places = np.repeat(np.arange(len(groups)), sizes)
        inside = np.arange(len(places)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return places, self.values[self.starts[groups][places] + inside]

    def spread(self, groups: np.ndarray, turns: np.ndarray) -> np.ndarray:
        """One value of each group, another at each turn.

        Args:
          groups: int [g], none of them empty.
          turns: int [g], at least 0.

        Returns:
          int64 [g], value `turn` modulo the group's size.
        """
        return self.values[self.starts[groups] + turns % self.sizes(groups)]


def same_content(query_keys: np.ndarray, target_keys: np.ndarray) -> np.ndarray:
    """The target that shows what a query shows.

    Args:
      query_keys, target_keys: uint64, of each content by its number.

    Returns:
      int64 [queries], numbers of targets; -1 where there is none.
    """
    order = np.argsort(target_keys)
    places = np.minimum(np.searchsorted(target_keys[order], query_keys), len(order) - 1)
    found = order[places]
    return np.where(target_keys[found] == query_keys, found, -1)


def never_negatives(queries: np.ndarray, targets: np.ndarray, own: np.ndarray) -> Groups:
    """Targets that are no negatives of a query: those of all rows with this query, and its own content.

    Args:
      queries, targets: int64 [n], numbers of each row's contents.
      own: int64 [queries], of `same_content`.

    Returns:
      Numbers of targets by the query's number, increasing, each once.
    """
    same = np.flatnonzero(own >= 0)
    pairs = np.stack([np.concatenate([queries, same]), np.concatenate([targets, own[same]])])
    pairs = np.unique(pairs, axis=1)
    return Groups(pairs[0], pairs[1], len(own))


def below_positive(scores: np.ndarray, positive: np.ndarray, rules: Rules) -> np.ndarray:
    """Which scores keep the margin to the row's positive.

    Args:
      scores: float [n, k].
      positive: float [n], of each row's own target.
      rules: with `relative` and `margin`.

    Returns:
      bool [n, k].
    """
    bound = np.full(len(positive), np.inf)
    positive = positive.astype(np.float64)
    if rules.relative is not None:
        bound = np.minimum(bound, positive - (1 - rules.relative) * np.abs(positive))
    if rules.margin is not None:
        bound = np.minimum(bound, positive - rules.margin)
    return scores < bound[:, None]


@dataclasses.dataclass(frozen=True)
class Filtered:
    """What the filters make of ranked candidates.

    Attributes:
      passed: bool [n, k].
      outside_ranks: int64 [n], candidates in front of the window.
      above_margin: int64 [n], candidates of the window that are too similar to the query.
    """

    passed: np.ndarray
    outside_ranks: np.ndarray
    above_margin: np.ndarray


def filter_candidates(scores: np.ndarray, positive: np.ndarray, rules: Rules) -> Filtered:
    """Applies the rank window and the margin.

    Args:
      scores: float [n, k], best first, of targets that may be negatives; -inf where there are fewer.
      positive: float [n].
      rules: what passes.

    Returns:
      Which candidates pass, and why others do not.
    """
    exists = scores > -np.inf
    ranks = np.arange(scores.shape[1])
    window = exists & (ranks >= rules.first_rank) & (ranks < rules.end_rank)
    passed = window & below_positive(scores, positive, rules)
    return Filtered(
        passed,
        (exists & (ranks < rules.first_rank)).sum(axis=1),
        (window & ~passed).sum(axis=1),
    )


def choose(passed: np.ndarray, rules: Rules, names: Sequence[str]) -> list[np.ndarray]:
    """The negatives of each row.

    Args:
      passed: bool [n, k], candidates by rank.
      rules: how many, and whether by chance.
      names: of the rows, which decide what chance takes: neither other rows nor their number do.

    Returns:
      Of each row, int64: ranks of its negatives, best first; at most `rules.negatives`.
    """
    chosen = []
    for mask, name in zip(passed, names, strict=True):
        ranks = np.flatnonzero(mask)
        if rules.sample and len(ranks) > rules.negatives:
            seed = int.from_bytes(short_hash(f"{rules.seed} {name}".encode()), "little")
            picked = np.random.default_rng(seed).choice(ranks, rules.negatives, replace=False)
            ranks = np.sort(picked)
        chosen.append(ranks[: rules.negatives])
    return chosen
