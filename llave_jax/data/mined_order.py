"""The order of mined neighbours: rows that are each other's hard negatives follow one another, and share a step.

Owns the graph of neighbours, its division into clusters, and their order. Row numbers alone, like `order.py`, which
holds the uniform orders. Which rows are neighbours is found by `llave_jax.mine`.

References:
  Breaking the Batch Barrier (B3) of Contrastive Learning via Smart Batch Mining, arXiv 2505.11293.
"""

from __future__ import annotations

import heapq
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from llave_jax.common.progress import Progress
from llave_jax.data.order import HOLE, Cached, random_keys

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


def deal_clusters(
    contents: np.ndarray,
    path: str | os.PathLike,
    *,
    size: int,
    seed: int,
    process_index: int,
    process_count: int,
) -> np.ndarray:
    """The clusters that one process reads, the same in every epoch.

    Processes read at their own pace, so a cluster belongs to one of them as a whole. Rows of equal content belong to
    one process, too, which keeps them apart: the first one is in the cluster, the others are in clusters of such
    rows. All processes have about equally many rows.

    Args:
      contents: uint64 [n], from `PairSource.contents`.
      path: of the neighbours, as for `read_graph`.
      size: rows of a cluster.
      seed: of the clusters.
      process_index: this process, of `process_count`.
      process_count: processes that share the rows.

    Returns:
      int64 [clusters, size], HOLE where a cluster is not full.

    Raises:
      ValueError: as for `read_graph`.
    """
    distinct, inverse = np.unique(contents, return_inverse=True)
    # Every process has a cluster at least.
    most = min(size, len(distinct) // process_count)
    clusters = find_clusters(read_graph(path, distinct), most, seed)
    by_content = np.argsort(inverse, kind="stable")
    counts = np.bincount(inverse)
    firsts = np.cumsum(counts) - counts
    order = np.argsort(random_keys(len(clusters), seed, 10), kind="stable")
    loads = [(0, process) for process in range(process_count)]
    mine = []
    for number in order.tolist():
        load, process = loads[0]
        if process == process_index:
            mine.append(clusters[number])
        heapq.heapreplace(loads, (load + int(counts[clusters[number]].sum()), process))
    nodes = np.concatenate(mine)
    copies = by_content[_spread(firsts[nodes] + 1, counts[nodes] - 1)]
    copies = copies[np.argsort(random_keys(len(copies), seed, 11, process_index), kind="stable")]
    parts = [by_content[firsts[cluster]] for cluster in mine]
    parts += [copies[first : first + size] for first in range(0, len(copies), size)]
    rows = np.full((len(parts), size), HOLE, np.int64)
    for number, part in enumerate(parts):
        rows[number, : len(part)] = part
    return rows


class MinedOrder:
    """Position -> row: one process's clusters one after another, in another order in every epoch.

    Every row comes once an epoch.

    Attributes:
      size: positions of an epoch.

    Args:
      clusters: int64 [clusters, size], of the process, from `deal_clusters`.
      seed: of the shuffles.
      process_index: this process. Each has shuffles of its own.
      epochs: passes over all rows; None: endless.
    """

    def __init__(self, clusters: np.ndarray, *, seed: int, process_index: int, epochs: int | None):
        self._clusters = clusters
        self._streams = seed, process_index
        self.size = clusters.size
        self._length = sys.maxsize if epochs is None else epochs * self.size
        # Three, since threads read ahead past the end of an epoch.
        self._epoch = Cached(self._make_epoch, 3)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> np.int64:
        epoch, position = divmod(index, self.size)
        number, member = divmod(position, self._clusters.shape[1])
        return self._clusters[self._epoch(epoch)[number], member]

    def _make_epoch(self, epoch: int) -> np.ndarray:
        seed, process_index = self._streams
        keys = random_keys(len(self._clusters), seed, 9, epoch, process_index)
        return np.argsort(keys, kind="stable")
