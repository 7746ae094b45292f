"""Scores of held-out pairs during training: losses and recall within one pool that is always the same.

The pool is the held-out pairs with the smallest digests, in the order of these. So it does not depend on
devices, processes, batches or the order of the rows, and its scores can be compared between steps and between
runs. When it is scored is `evaluation.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import overload

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from llave_jax.common.content import DIGEST_BYTES
from llave_jax.data.sources import PairSource
from llave_jax.embedding.embedder import Embedder
from llave_jax.inputs.content import item_key
from llave_jax.inputs.item import Item, Pair
from llave_jax.loss.cross_device import MAX_MATRIX_SIZE
from llave_jax.loss.hardness import Formula, infonce, row_losses, similarity_matrix
from llave_jax.loss.temperature import temperature_of
from llave_jax.parallel.processes import from_first_process

log = logging.getLogger(__name__)

CUTOFFS = (1, 5, 10)
DIRECTIONS = ("query_to_target", "target_to_query")
# Names of the scores, in the order in which tables show them.
SCORES = (
    "loss",
    "infonce_loss",
    *(f"recall@{k}" for k in CUTOFFS),
    *(f"{direction}_recall@{k}" for direction in DIRECTIONS for k in CUTOFFS),
)


class Validation:
    """A pool of held-out pairs.

    Args:
      source: the held-out pairs.
      formula: of the loss.
      max_pairs: of the pool; None: all of the source.
      skip_unusable: leave out pairs that cannot be read; otherwise they raise.

    Raises:
      ValueError: there are fewer than two pairs.
    """

    def __init__(
        self, source: PairSource, formula: Formula, *, max_pairs: int | None, skip_unusable: bool
    ):
        if len(source) < 2:
            raise ValueError(
                f"{len(source)} pairs are held out; validation needs 2 at least: raise config.data.held_out"
            )
        digests = np.array([source.digest(index) for index in range(len(source))], np.uint64)
        chosen = np.argsort(digests, kind="stable")[:max_pairs]
        self._items = _Items(source, chosen)
        numbers = {name: number for number, name in enumerate(source.subsets)}
        self._subsets = np.array([numbers[source.subset(int(index))] for index in chosen])
        self._formula = formula
        self._skip_unusable = skip_unusable
        self._warned = False

    def __len__(self) -> int:
        return len(self._items) // 2

    def score(
        self, embedder: Embedder, learned: Mapping[str, jax.Array] | None = None
    ) -> dict[str, float]:
        """Scores of the embedder's parameters. All processes call this, and all get the result.

        Args:
          embedder: has parameters.
          learned: what the loss has learned by name, `TrainState.loss`: its temperature takes the place of the
            formula's; by subset, each pair has that of its subset.

        Returns:
          The values of SCORES, as of `pool_scores`.

        Raises:
          ValueError: a pair cannot be read and is not to be skipped, or fewer than two can be read.
        """
        if self._skip_unusable:
            embeddings, failures = embedder.encode(self._items, on_error="skip")
        else:
            embeddings, failures = embedder.encode(self._items), {}
        is_usable = np.ones(len(self), bool)
        is_usable[[index // 2 for index in failures]] = False
        if failures and not self._warned:
            log.warning(
                "validation leaves out %d of %d held-out pairs; the first: %s",
                np.count_nonzero(~is_usable),
                len(self),
                next(iter(failures.values())),
            )
            self._warned = True
        if np.count_nonzero(is_usable) < 2:
            raise ValueError(f"fewer than two of {len(self)} held-out pairs can be used")
        query_ids, target_ids = self._items.content_ids()[:, is_usable]
        formula = self._formula
        if learned is not None:
            temperature = temperature_of(jnp.asarray(jax.device_get(learned["log_scale"])))
            by_pair = temperature[self._subsets[is_usable]] if temperature.ndim else temperature
            formula = formula.at(by_pair)
        scores = pool_scores(
            embeddings[0::2][is_usable],
            embeddings[1::2][is_usable],
            query_ids,
            target_ids,
            formula,
        )
        values = from_first_process(np.array([scores[name] for name in SCORES], np.float32))
        return dict(zip(SCORES, values.tolist(), strict=True))


class _Items(Sequence[Item]):
    """Query and target of each pair in turn, read when they are asked for.

    Each process of a job reads its own items. What it has read it knows the keys of.
    """

    def __init__(self, source: PairSource, indices: np.ndarray):
        self._source = source
        self._indices = indices
        self._keys = np.zeros((2 * len(indices), DIGEST_BYTES), np.uint8)
        self._last: tuple[int, Pair] | None = None

    def __len__(self) -> int:
        return 2 * len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Sequence[Item]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, side = divmod(index, 2)
        if self._last is None or self._last[0] != number:
            self._last = number, self._source[int(self._indices[number])]
        pair = self._last[1]
        item = pair.target if side else pair.query
        self._keys[index] = np.frombuffer(item_key(item), np.uint8)
        return item

    def content_ids(self) -> np.ndarray:
        """int [2, N], of queries and of targets: equal where the content is. All items have been read."""
        keys = self._keys
        if jax.process_count() > 1:
            keys = np.max(multihost_utils.process_allgather(keys), axis=0)
        _, ids = np.unique(keys, axis=0, return_inverse=True)
        return ids.reshape(-1, 2).T.astype(np.int32)


def pool_scores(
    query: np.ndarray,
    target: np.ndarray,
    query_ids: np.ndarray,
    target_ids: np.ndarray,
    formula: Formula,
    *,
    block: int | None = None,
) -> dict[str, float]:
    """Losses and recall of pairs that are each other's candidates.

    Pairs of the same target, or of the same query, match each other: a class name that is the target of
    many queries is a right answer to each, and in no loss a negative. A query is found at k if a right
    answer is among its k most similar candidates. Of equally similar candidates the wrong ones come first,
    or a model that maps everything to one point would find all.

    Args:
      query: float32 [N, D], L2-normalised.
      target: float32 [N, D]; row i is the target of query i.
      query_ids: int32 [N], equal for equal queries.
      target_ids: int32 [N], equal for equal targets.
      formula: of the loss; its temperature may be one for each pair, [N].
      block: rows of the matrix that are computed at once; None: as memory allows.

    Returns:
      The values of SCORES. The losses are means over both directions, as in training; "recall@k" is the
      mean of the recalls of both directions.
    """
    size = len(query)
    block = min(size, block or max(1, MAX_MATRIX_SIZE // size))
    sums = np.zeros((2, 2 + len(CUTOFFS)))
    temperature = jnp.asarray(formula.temperature, jnp.float32)
    for direction, (rows, columns) in enumerate([(query, target), (target, query)]):
        for begin in range(0, size, block):
            # The last block is moved back to have the same shape; its first rows are counted already.
            first = min(begin, size - block)
            part = slice(first, first + block)
            values = _block_scores(
                rows[part],
                columns,
                np.arange(first, first + block, dtype=np.int32),
                query_ids,
                target_ids,
                formula.at(temperature[part] if temperature.ndim else temperature),
            )
            sums[direction] += np.asarray(values, np.float64)[:, begin - first :].sum(axis=1)
    means = sums / size
    loss, plain, *recalls = means.mean(axis=0)
    found = [loss, plain, *recalls, *means[0, 2:], *means[1, 2:]]
    return dict(zip(SCORES, map(float, found), strict=True))


@jax.jit
def _block_scores(
    rows: jax.Array,
    columns: jax.Array,
    positive: jax.Array,
    query_ids: jax.Array,
    target_ids: jax.Array,
    formula: Formula,
) -> jax.Array:
    """[2 + CUTOFFS, n]: of each of n rows its loss, its plain InfoNCE, and whether it is found at k."""
    similarity = similarity_matrix(rows, columns)
    is_match = query_ids[positive][:, None] == query_ids
    is_match |= target_ids[positive][:, None] == target_ids
    mask = {"column_valid": jnp.ones(len(columns), bool), "can_be_negative": ~is_match}
    losses = [row_losses(similarity, positive, f, **mask) for f in (formula, infonce(formula))]
    best = jnp.max(jnp.where(is_match, similarity, -jnp.inf), axis=1)
    rank = 1 + jnp.sum(~is_match & (similarity >= best[:, None]), axis=1)
    return jnp.stack([*losses, *(1.0 * (rank <= k) for k in CUTOFFS)])


def summary(scores: dict[str, float], pairs: int) -> str:
    """The scores in one line of a log.

    Args:
      scores: as of `Validation.score`.
      pairs: of the pool.

    Returns:
      The line.
    """

    def recalls(direction: str) -> str:
        return "/".join(f"{100 * scores[f'{direction}_recall@{k}']:.1f}" for k in CUTOFFS)

    return (
        f"{pairs} held-out pairs: loss {scores['loss']:.4f}, InfoNCE {scores['infonce_loss']:.4f}, "
        f"recall@{'/'.join(map(str, CUTOFFS))} {recalls(DIRECTIONS[0])} % query to target, "
        f"{recalls(DIRECTIONS[1])} % target to query"
    )
