"""The order of mined neighbours: rows that are each other's hard negatives share a batch.

Owns the graph of neighbours, its division into clusters, and batches made of clusters. Row numbers alone, like
`order.py`, which holds the uniform orders. Which rows are neighbours is found by `llave_jax.mine`.

References:
  Breaking the Batch Barrier (B3) of Contrastive Learning via Smart Batch Mining, arXiv 2505.11293.
"""

from __future__ import annotations

import functools
import heapq
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from llave_jax.common.progress import Progress
from llave_jax.data.order import HOLE, random_keys

COLUMNS = ("content", "neighbours")
# A file that lists a smaller share of the rows was mined from other rows.
LEAST_SHARE = 0.5
# Rows of a file that are read at a time.
_CHUNK = 1 << 15


class Graph(NamedTuple):
    """n nodes, and from each some links to others.

    Attributes:
      starts: int64 [n + 1].
      links: int32; those of node i are `links[starts[i] : starts[i + 1]]`, best first.
    """

    starts: np.ndarray
    links: np.ndarray


def read_graph(path: str | os.PathLike, contents: np.ndarray) -> Graph:
    """Reads which contents are hard negatives of which.

    Args:
      path: a parquet file with the columns `content` (uint64) and `neighbours` (list of uint64): for each row the
        contents of the rows whose targets are its hard candidates, best first. `llave_jax.mine` writes it.
      contents: uint64 [n], of the rows that are trained on, each once and in order.

    Returns:
      Links between the contents, by their number in `contents`. Contents that are not trained on have none.

    Raises:
      ValueError: there is no such file, it has other columns, or it lists fewer than LEAST_SHARE of the contents.
    """
    if not Path(path).is_file():
        raise ValueError(
            f'data.order is "mined:{path}": there is no such file; llave_jax.mine writes it (neighbours.parquet)'
        )
    try:
        file = pyarrow.parquet.ParquetFile(path)
        _check_columns(path, file.schema_arrow)
        parts = list(_read_links(file, contents))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a readable parquet file: {error}") from error
    nodes, counts = (np.concatenate([part[i] for part in parts]) for i in range(2))
    share = len(np.unique(nodes)) / len(contents)
    if share < LEAST_SHARE:
        raise ValueError(
            f"{path} lists {share:.1%} of the different rows of config.data.path, {LEAST_SHARE:.0%} are needed: it "
            "was mined from other rows; mine these (llave_jax.mine)"
        )
    # Rows of equal content are listed several times: the first one counts.
    unique, first = np.unique(nodes, return_index=True)
    degrees = np.zeros(len(contents), np.int64)
    degrees[unique] = counts[first]
    starts = np.concatenate([[0], np.cumsum(degrees)])
    links = np.empty(starts[-1], np.int32)
    is_first = np.zeros(len(nodes), bool)
    is_first[first] = True
    row = 0
    for part_nodes, part_counts, part_links in parts:
        kept = is_first[row : row + len(part_nodes)]
        row += len(part_nodes)
        part_links = part_links[np.repeat(kept, part_counts)]
        links[_spread(starts[part_nodes[kept]], part_counts[kept])] = part_links
    return Graph(starts, links)


def _check_columns(path: str | os.PathLike, schema: pa.Schema) -> None:
    for name, expected in (("content", "uint64"), ("neighbours", "list<uint64>")):
        kind: Any = schema.field(name).type if name in schema.names else "not there"
        is_list = isinstance(kind, pa.ListType | pa.LargeListType)
        found = f"list<{kind.value_type}>" if is_list else str(kind)
        if found != expected:
            raise ValueError(
                f"{path}: the column {name} is {found}; expected {expected}, as in llave_jax.mine's neighbours.parquet"
            )


def _read_links(
    file: pyarrow.parquet.ParquetFile, contents: np.ndarray
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Of parts of a file: nodes, numbers of links of each, and all links of these nodes, one after another."""
    yield np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int32)
    for batch in file.iter_batches(_CHUNK, columns=list(COLUMNS)):
        nodes = _numbers(batch.column("content"), contents)
        lists = batch.column("neighbours")
        degrees = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
        links = _numbers(lists.flatten(), contents)  # pyright: ignore[reportAttributeAccessIssue]
        of = np.repeat(np.arange(len(nodes)), degrees)
        kept = (links >= 0) & (nodes[of] >= 0) & (links != nodes[of])
        counts = np.bincount(of[kept], minlength=len(nodes))
        yield nodes[nodes >= 0], counts[nodes >= 0], links[kept].astype(np.int32)


def _numbers(values: pa.Array, contents: np.ndarray) -> np.ndarray:
    """int64, the number of each content; -1 for one that there is not."""
    there = values.is_valid().to_numpy(zero_copy_only=False)
    found = values.fill_null(0).to_numpy(zero_copy_only=False)
    numbers = np.minimum(np.searchsorted(contents, found), len(contents) - 1)
    return np.where(there & (contents[numbers] == found), numbers, -1)


def _spread(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """starts[0], starts[0] + 1, ..., of each as many numbers as its count says."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - (ends - counts), counts)


def reversed_graph(graph: Graph, most: int) -> Graph:
    """The links the other way round.

    Args:
      graph: of n nodes.
      most: links that are kept of a node, those from nodes of low number.

    Returns:
      Of each node, which nodes link to it.
    """
    count = len(graph.starts) - 1
    by_target = np.argsort(graph.links, kind="stable")
    sources = np.repeat(np.arange(count, dtype=np.int32), np.diff(graph.starts))[by_target]
    degrees = np.bincount(graph.links, minlength=count)
    kept = np.minimum(degrees, most)
    firsts = np.cumsum(degrees) - degrees
    links = sources[_spread(firsts, kept)]
    return Graph(np.concatenate([[0], np.cumsum(kept)]), links)


def find_clusters(graph: Graph, size: int, seed: int) -> list[np.ndarray]:
    """Divides nodes into clusters that have many of each other's links, all of one size.

    Each cluster grows from a node drawn at random, by the free node that has the most links with it, in either
    direction. What is left where no free node has any is put together to full clusters, larger pieces first.
    B3 divides by METIS; growth takes no other library, and a minute for a million nodes.

    Args:
      graph: of n nodes; nodes without links fill up.
      size: nodes of a cluster.
      seed: of the nodes that clusters begin with.

    Returns:
      int32 [size] for each cluster, of the last one what is left. Every node is in one.
    """
    count = len(graph.starts) - 1
    degrees = np.diff(graph.starts)
    # A node that very many link to would make its cluster's growth slow.
    most = max(64, 2 * int(degrees.max(initial=1)))
    sides = [(g.starts.tolist(), g.links) for g in (graph, reversed_graph(graph, most))]
    free = np.ones(count, bool)
    # Links of a free node with the cluster that grows.
    common = np.zeros(count, np.int32)
    pieces: list[np.ndarray] = []
    order = np.argsort(random_keys(count, seed, 8), kind="stable")
    with Progress(count, "clustering rows", unit="rows", enabled=count >= 100_000) as progress:
        for start in order.tolist():
            if free[start]:
                pieces.append(_grow(start, size, sides, free, common))
                progress.update(len(pieces[-1]))
    return _put_together(pieces, size)


def _grow(
    node: int,
    size: int,
    sides: Sequence[tuple[list[int], np.ndarray]],
    free: np.ndarray,
    common: np.ndarray,
) -> np.ndarray:
    """The cluster that begins with a node. Its nodes are not `free` any more; `common` is 0 again."""
    members = [node]
    free[node] = False
    candidates = np.zeros(0, np.int32)
    touched = []
    while len(members) < size:
        for starts, links in sides:
            near = links[starts[node] : starts[node + 1]]
            near = near[free[near]]
            new = near[common[near] == 0]
            common[near] += 1
            candidates = np.concatenate([candidates, new])
            touched.append(new)
        candidates = candidates[free[candidates]]
        if not len(candidates):
            break
        node = int(candidates[np.argmax(common[candidates])])
        free[node] = False
        members.append(node)
    for nodes in touched:
        common[nodes] = 0
    return np.array(members, np.int32)


def _put_together(pieces: list[np.ndarray], size: int) -> list[np.ndarray]:
    """Clusters of one size, made of pieces of at most that size, and of what is left in the end."""
    clusters = [piece for piece in pieces if len(piece) == size]
    by_size: list[list[np.ndarray]] = [[] for _ in range(size)]
    for piece in reversed(pieces):
        if len(piece) < size:
            by_size[len(piece)].append(piece)
    left: list[np.ndarray] = []
    for largest in range(size - 1, 0, -1):
        while by_size[largest]:
            parts, room = [], size
            for length in range(largest, 0, -1):
                while length <= room and by_size[length]:
                    parts.append(by_size[length].pop())
                    room -= length
            (left if room else clusters).append(np.concatenate(parts))
    rest = np.concatenate(left) if left else np.zeros(0, np.int32)
    return clusters + [rest[first : first + size] for first in range(0, len(rest), size)]


class MinedOrder:
    """Every row once an epoch; rows that are each other's hard negatives share a batch.

    A batch has slots, which are divided into lanes of one cluster each. A cluster belongs to a lane and its rows to
    slots of the lane, the same in every epoch; in which batches the lane has its clusters is shuffled anew. Rows of
    equal content have the same slot, and the second one comes by itself in a batch of its lane. So two copies of a
    row are never in one batch, not even across the end of an epoch where processes lag behind each other: a slot
    belongs to one process. Batches do not depend on the number of processes.

    If a content has more copies than an epoch has batches without copies, the others never come.

    Attributes:
      batch_size: slots.
      batches_per_epoch: at least 1.

    Args:
      contents: uint64 [n], from `PairSource.contents`.
      path: of the neighbours, as for `read_graph`.
      num_slots: slots of a batch.
      cluster: rows of a cluster; if a batch does not divide into clusters, its last one is smaller.
      seed: of clusters and shuffles.

    Raises:
      ValueError: as for `read_graph`.
    """

    def __init__(
        self,
        contents: np.ndarray,
        path: str | os.PathLike,
        *,
        num_slots: int,
        cluster: int,
        seed: int,
    ):
        self._seed = seed
        self.batch_size = num_slots
        distinct, inverse = np.unique(contents, return_inverse=True)
        size = min(cluster, num_slots)
        clusters = find_clusters(read_graph(path, distinct), size, seed)
        copies = _Copies(inverse, most=-(-len(contents) // num_slots))
        widths = [size] * (num_slots // size)
        if num_slots % size:
            widths.append(num_slots % size)
        lanes = _deal(clusters, copies.extra, widths, seed)
        columns = [lane.rows(copies) for lane in lanes]
        self.batches_per_epoch = max(1, *(len(rows) for rows in columns))
        self._rows = np.full((self.batches_per_epoch, num_slots), HOLE, np.int64)
        self._lanes = np.repeat(np.arange(len(widths)), widths)
        for number, rows in enumerate(columns):
            self._rows[: len(rows), self._lanes == number] = rows
        self._make_cache()

    def _make_cache(self) -> None:
        # Three, since threads read ahead past the end of an epoch.
        self._epoch = functools.lru_cache(maxsize=3)(self._make_epoch)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_epoch"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._make_cache()

    def rows(self, number: int) -> np.ndarray:
        """The rows of a batch.

        Args:
          number: of the batch, counted over all epochs.

        Returns:
          int64 [batch_size], HOLE where a slot has no row.
        """
        epoch, index = divmod(number, self.batches_per_epoch)
        return self._epoch(epoch)[index]

    def _make_epoch(self, epoch: int) -> np.ndarray:
        shape = self.batches_per_epoch, int(self._lanes[-1]) + 1
        keys = random_keys(shape[0] * shape[1], self._seed, 9, epoch).reshape(shape)
        places = np.argsort(keys, axis=0, kind="stable")[:, self._lanes]
        return np.take_along_axis(self._rows, places, axis=0)


class _Copies:
    """Which rows have which content.

    Attributes:
      extra: int64 [contents], rows of a content beyond the first one that come in an epoch.
    """

    def __init__(self, inverse: np.ndarray, most: int):
        self._rows = np.argsort(inverse, kind="stable")
        counts = np.bincount(inverse)
        self._starts = np.cumsum(counts) - counts
        self.extra = np.minimum(counts, most) - 1

    def row(self, node: np.ndarray, copy: int | np.ndarray) -> np.ndarray:
        """The row of a content's copy, for arrays of contents."""
        return self._rows[self._starts[node] + copy]


class _Lane:
    """The clusters of one lane, and in which columns their contents are.

    Attributes:
      width: slots.
      height: batches that it has rows for.
    """

    def __init__(self, width: int):
        self.width = width
        self._clusters: list[np.ndarray] = []
        self._extra = np.zeros(width, np.int64)

    @property
    def height(self) -> int:
        return len(self._clusters) + int(self._extra.max())

    def add(self, cluster: np.ndarray, extra: np.ndarray) -> None:
        """Takes a cluster of at most `width` contents, of which `extra` have so many copies besides."""
        placed = np.full(self.width, -1, np.int64)
        columns = np.arange(len(cluster))
        if extra.any():  # the content of most copies goes where there are the fewest
            columns = np.argsort(self._extra, kind="stable")[: len(cluster)]
            cluster = cluster[np.argsort(-extra, kind="stable")]
            self._extra[columns] += np.sort(extra)[::-1]
        placed[columns] = cluster
        self._clusters.append(placed)

    def rows(self, copies: _Copies) -> np.ndarray:
        """int64 [height, width]: a row of each content for each cluster, then the other copies by column."""
        rows = np.full((self.height, self.width), HOLE, np.int64)
        if not self._clusters:
            return rows
        nodes = np.stack(self._clusters)
        there = nodes >= 0
        first = rows[: len(nodes)]
        first[there] = copies.row(nodes[there], 0)
        for column in np.flatnonzero(self._extra):
            several = nodes[there[:, column], column]
            several = several[copies.extra[several] > 0]
            counts = copies.extra[several]
            others = copies.row(
                np.repeat(several, counts), _spread(np.ones(len(counts), np.int64), counts)
            )
            rows[len(nodes) : len(nodes) + len(others), column] = others
        return rows


def _deal(
    clusters: list[np.ndarray], extra: np.ndarray, widths: Sequence[int], seed: int
) -> list[_Lane]:
    """Lanes of about the same height. A lane that is narrower than a cluster gets clusters cut to pieces."""
    lanes = [_Lane(width) for width in widths]
    order = np.argsort(random_keys(len(clusters), seed, 10), kind="stable")
    shuffled = [clusters[number] for number in order]
    if widths[-1] < widths[0]:
        rows = sum(map(len, clusters)) * widths[-1] / sum(widths)
        cut = shuffled[: round(rows / widths[0])]
        shuffled = shuffled[len(cut) :]
        nodes = np.concatenate(cut) if cut else np.zeros(0, np.int32)
        for first in range(0, len(nodes), widths[-1]):
            piece = nodes[first : first + widths[-1]]
            lanes[-1].add(piece, extra[piece])
        wide = lanes[:-1]
    else:
        wide = lanes
    # Those with copies come first: they take more than one batch.
    shuffled.sort(key=lambda cluster: -int(extra[cluster].max()))
    heights = [(0, number) for number in range(len(wide))]
    for cluster in shuffled:
        lane = wide[heights[0][1]]
        lane.add(cluster, extra[cluster])
        heapq.heapreplace(heights, (lane.height, heights[0][1]))
    return lanes
