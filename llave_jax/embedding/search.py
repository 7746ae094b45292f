"""Exact nearest neighbours by cosine. The corpus is compared block by block, so that memory does not
grow with it.

Owns the search only; rankings of benchmarks are scored by `evaluation/scoring.py`.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from llave_jax.common.progress import Progress

# Corpus rows that a device compares at once. The similarities of a block take 64 KiB for each query.
BLOCK_ROWS = 16_384
# Room for excluded pairs of a block.
_FEWEST_PAIRS = 256


def search(
    queries: np.ndarray,
    corpus: Corpus,
    k: int,
    *,
    block_rows: int = BLOCK_ROWS,
    excluded: tuple[np.ndarray, np.ndarray] | None = None,
    devices: Sequence[Any] | None = None,
    show_progress: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """The k corpus rows most similar to each query, best first. Of equal scores the lower row comes first.

    Every device keeps the best k rows of the blocks that it compared; these are merged at the end. The
    corpus may be a memory map larger than memory: it is read once, block by block.

    Args:
      queries: [n, D], any float type.
      corpus: [m, D], or what has its shape and gives rows by slices.
      k: at most m are returned.
      block_rows: corpus rows a device compares at once.
      excluded: int [p] rows of `queries` and int [p] rows of `corpus`: pairs that are no results. None: no pair.
      devices: of JAX; None: all local ones.
      show_progress: show a progress bar.

    Returns:
      scores: float32 [n, min(k, m)]; -inf where excluded pairs leave fewer results.
      indices: int32 [n, min(k, m)], rows of the corpus; -1 where the score is -inf.

    Raises:
      ValueError: shapes that do not fit, or nothing to search in or for.
    """
    if queries.ndim != 2 or len(corpus.shape) != 2 or queries.shape[1] != corpus.shape[1]:
        raise ValueError(
            f"queries {queries.shape} and corpus {corpus.shape}: expected [n, D] and [m, D]"
        )
    k = min(k, len(corpus))
    if k < 1 or not len(queries):
        raise ValueError(f"search for {k} of {len(corpus)} rows with {len(queries)} queries")
    devices = list(devices or jax.local_devices())
    block_rows = max(min(block_rows, -(-len(corpus) // len(devices))), k)
    mesh = Mesh(np.array(devices), ("devices",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("devices"))
    step = _make_step(mesh, k)
    pairs = None if excluded is None else _Pairs(*excluded, len(devices), block_rows)

    on_device = jax.device_put(queries.astype(np.float32), NamedSharding(mesh, PartitionSpec()))
    best_shape = (len(devices), len(queries), k)
    best = (
        jax.device_put(np.full(best_shape, -np.inf, np.float32), split),
        jax.device_put(np.zeros(best_shape, np.int32), split),
    )
    stride = block_rows * len(devices)
    with Progress(len(corpus), "searching", unit="rows", enabled=show_progress) as progress:
        for start in range(0, len(corpus), stride):
            rows = corpus[start : start + stride]
            block = np.zeros((stride, corpus.shape[1]), np.float32)
            block[: len(rows)] = rows
            marked = () if pairs is None else jax.device_put(pairs.of_blocks(start), (split, split))
            best = step(best, on_device, jax.device_put(block, split), marked, start, len(corpus))
            # Without waiting, blocks are read faster than they are compared, and held until then.
            jax.block_until_ready(best)
            progress.update(len(rows))
    scores, indices = (np.concatenate(np.asarray(array), axis=1) for array in best)
    order = np.lexsort((indices, -scores), axis=1)[:, :k]
    scores, indices = (np.take_along_axis(array, order, 1) for array in (scores, indices))
    return scores, np.where(np.isneginf(scores), -1, indices)


class Corpus(Protocol):
    """What is searched in: an array, a memory map, or some rows of one."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


class _Pairs:
    """Pairs of a query and a corpus row, by the blocks that the rows lie in.

    Args:
      rows, columns: int [p], of the queries and the corpus.
      devices: that compare a block each.
      block_rows: rows of a block.
    """

    def __init__(self, rows: np.ndarray, columns: np.ndarray, devices: int, block_rows: int):
        order = np.argsort(columns, kind="stable")
        self._rows, self._columns = rows[order], columns[order]
        self._devices, self._block_rows = devices, block_rows

    def of_blocks(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """The pairs of the blocks from a corpus row on, one block a device.

        Args:
          start: the row.

        Returns:
          int32 [devices, p'] twice: queries, and rows of the block. Unused places point behind the block.
        """
        edges = start + self._block_rows * np.arange(self._devices + 1)
        ends = np.searchsorted(self._columns, edges)
        # Powers of two: each length is compiled once.
        room = max(_FEWEST_PAIRS, 1 << int(np.diff(ends).max() - 1).bit_length())
        rows = np.zeros((self._devices, room), np.int32)
        columns = np.full((self._devices, room), self._block_rows, np.int32)
        for device, (first, last) in enumerate(itertools.pairwise(ends.tolist())):
            rows[device, : last - first] = self._rows[first:last]
            columns[device, : last - first] = self._columns[first:last] - edges[device]
        return rows, columns


@functools.cache
def _make_step(mesh: Mesh, k: int):
    """A function that merges one block a device into the best rows found so far on that device."""

    def step(best, queries, block, excluded, start, total):
        best_scores, best_indices = (array[0] for array in best)
        similarity = jnp.einsum("nd,bd->nb", queries, block, precision=jax.lax.Precision.HIGHEST)
        if excluded:
            rows, columns = (array[0] for array in excluded)
            similarity = similarity.at[rows, columns].set(-jnp.inf, mode="drop")
        first = start + jax.lax.axis_index("devices") * len(block)
        # The last block is padded with rows that do not exist.
        exists = first + jnp.arange(len(block)) < total
        scores, indices = jax.lax.top_k(jnp.where(exists, similarity, -jnp.inf), k)
        # Among equals top_k takes the earlier position. Rows found before have lower indices, so they
        # come first.
        scores = jnp.concatenate([best_scores, scores], axis=1)
        indices = jnp.concatenate([best_indices, first + indices], axis=1)
        scores, places = jax.lax.top_k(scores, k)
        return scores[None], jnp.take_along_axis(indices, places, axis=1)[None]

    devices, whole = PartitionSpec("devices"), PartitionSpec()
    return jax.jit(
        jax.shard_map(
            step,
            mesh=mesh,
            in_specs=(devices, whole, devices, devices, whole, whole),
            out_specs=devices,
        ),
        donate_argnums=0,
    )
