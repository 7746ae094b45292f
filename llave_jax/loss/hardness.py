"""The hardness-weighted contrastive loss of LLaVE: pure functions of a similarity matrix.

Owns the formula and the diagnostics of the matrix. Knows nothing of devices or training: the loss
of a batch spread over a mesh is `contrastive.py`, of a pool without its matrix `blockwise_loss.py`.
Another formula for the same matrix is `focal_loss.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def hardness_weighted_contrastive_loss(
    similarity: ArrayLike,
    *,
    alpha: ArrayLike = 9.0,
    temperature: ArrayLike = 0.02,
    valid: ArrayLike | None = None,
) -> jax.Array:
    """Symmetric InfoNCE in which a negative weighs more the closer it is to the query.

    For row i, with sg the stop-gradient,

        L_i = -log( exp(s_ii/t) / (exp(s_ii/t) + sum_{j != i} exp(s_ij/t + alpha * sg(s_ij))) )

    and the loss is the mean of L over the valid rows (query -> target) and over the valid columns
    (target -> query), averaged. `alpha=0` is plain InfoNCE.

    Value and gradient are finite for every finite float32 `alpha` and `temperature >= 1e-3` if
    the similarities are cosines (or smaller than 1e30 in magnitude). A weight `alpha * s` beyond
    +-8e37 counts as +-8e37.

    Args:
      similarity: [N, N] cosines; row i is query i, its positive is column i. Half precision is
        computed in float32.
      alpha: hardness; 9 in the paper, 0 for no weighting.
      temperature: positive; 0.02 in the paper.
      valid: bool [N], False for empty slots. Row and column of an empty slot have no influence
        on value or gradient, whatever they hold, nan included. None: all are valid.

    Returns:
      Scalar, float32 (float64 for float64 similarities); 0 if no pair is valid.

    Raises:
      ValueError: a shape does not fit, `temperature` is not positive or `alpha` is not finite.
      TypeError: `valid` is not bool.

    References:
      LLaVE: Large Language and Vision Embedding Models with Hardness-Weighted Contrastive
      Learning (arXiv 2503.04812), section 3.1.

    >>> embeddings = jnp.eye(4)
    >>> loss = hardness_weighted_contrastive_loss(similarity_matrix(embeddings, embeddings))
    """
    return symmetric_loss(similarity, Hardness(alpha, temperature), valid)


@runtime_checkable
class Formula(Protocol):
    """A kind of contrastive loss; a pytree of its numbers. The loss of a row is, with temperature t,

        L = -log( exp(p/t) / (exp(p/t) + sum_j w_j exp(n_j/t)) )

    where p = positive(s) of the positive's similarity s, and n_j = negative(s_j) and
    log w_j = log_weight(s_j) of each negative's.
    """

    temperature: ArrayLike

    def positive(self, similarity: jax.Array) -> jax.Array: ...

    def negative(self, similarity: jax.Array) -> jax.Array: ...

    def log_weight(self, similarity: jax.Array) -> ArrayLike: ...

    def check(self) -> None:
        """Raises ValueError for a number out of range. Traced numbers are the caller's to check."""


class Hardness(NamedTuple):
    """The formula of `hardness_weighted_contrastive_loss`."""

    alpha: ArrayLike = 9.0
    temperature: ArrayLike = 0.02

    def positive(self, similarity: jax.Array) -> jax.Array:
        return similarity

    def negative(self, similarity: jax.Array) -> jax.Array:
        return similarity

    def log_weight(self, similarity: jax.Array) -> jax.Array:
        """alpha * sg(s), what a negative's weight w = exp(alpha * sg(s)) adds to its logit.

        The weight itself is never formed: the exponential would overflow. Saturates at a quarter of
        the largest number, so that sums and differences of logits stay finite.
        """
        limit = float(jnp.finfo(similarity.dtype).max) / 4
        return jnp.clip(self.alpha * jax.lax.stop_gradient(similarity), -limit, limit)

    def check(self) -> None:
        check_finite(alpha=self.alpha)
        check_temperature(self.temperature)


def symmetric_loss(
    similarity: ArrayLike, formula: Formula, valid: ArrayLike | None = None
) -> jax.Array:
    """The mean of a formula's loss over rows and over columns, averaged.

    Args, results and errors as of `hardness_weighted_contrastive_loss`.
    """
    similarity, valid = _check_pairs(similarity, valid)
    positive = jnp.arange(similarity.shape[0])
    query_to_target = row_losses(similarity, positive, formula, columns=valid)
    target_to_query = row_losses(similarity.T, positive, formula, columns=valid)
    return 0.5 * (masked_mean(query_to_target, valid) + masked_mean(target_to_query, valid))


def similarity_metrics(
    similarity: ArrayLike, *, valid: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """What to watch during training, from the matrix the loss sees; without gradient.

    Args:
      similarity: [N, N] cosines; row i is query i, its positive is column i.
      valid: bool [N], False for empty slots; None: all are valid.

    Returns:
      Scalars: `positive_similarity`, the mean over queries; `hard_negative_similarity` and
      `easy_negative_similarity`, the means of each query's largest and smallest negative;
      `query_to_target_accuracy` and `target_to_query_accuracy`, the share of rows whose first
      maximum is the positive. A mean over nothing is 0.
    """
    similarity, valid = _check_pairs(similarity, valid)
    positive = jnp.arange(similarity.shape[0])
    queries = row_statistics(similarity, positive, columns=valid)
    targets = row_statistics(similarity.T, positive, columns=valid)
    return metrics_from_rows(queries, targets.correct, valid)


def similarity_matrix(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """Cosines [n, M] of L2-normalised embeddings [n, D] and [M, D], in full float32 (or float64).

    At temperature 0.02 the bfloat16 products of accelerators' default would move logits by 0.2.
    """
    return jnp.einsum("nD,MD->nM", rows, columns, precision=jax.lax.Precision.HIGHEST)


def row_losses(
    similarity: ArrayLike,
    positive: ArrayLike,
    formula: Formula,
    *,
    columns: ArrayLike,
    negatives: ArrayLike | None = None,
) -> jax.Array:
    """One direction of the loss for some rows of the matrix, such as those of one device.

    Args:
      similarity: [n, M] cosines of n queries with M candidates; candidates that are nobody's
        positive (hard negatives) are fine.
      positive: int [n], the column of each row's positive, in 0..M-1.
      formula: `Hardness(alpha, temperature)`, or another one.
      columns: bool [M], False for candidates that are empty slots.
      negatives: bool [n, M], False where a candidate must not count as a negative of that row
        (it is known to match). The positive's own entry is ignored. None: all count.

    Returns:
      [n] losses; 0 for rows whose positive is an empty slot, and for rows without negatives.
    """
    formula.check()
    rows, is_positive, is_negative = _roles(similarity, positive, columns, negatives)
    # Before any arithmetic: a nan in an empty slot would survive a mask applied later, in the
    # gradient of the temperature if not in the value.
    similarity = jnp.where(is_positive | is_negative, similarity, 0)
    positives = jnp.sum(jnp.where(is_positive, similarity, 0), axis=1, keepdims=True)
    logits = (formula.negative(similarity) - formula.positive(positives)) / formula.temperature
    logits += formula.log_weight(similarity)
    logits = jnp.where(is_negative, logits, no_logit(similarity.dtype))
    # log(1 + sum_j exp(logit_j)) with logits relative to the positive's: exact for small losses.
    return jnp.where(rows, jax.nn.softplus(jax.nn.logsumexp(logits, axis=1)), 0)


def no_logit(dtype: jnp.dtype) -> float:
    """Stands for the logit of what is no negative: below every logit, but finite, since the
    gradient of a logsumexp over nothing but -inf is nan."""
    return -float(jnp.finfo(dtype).max) / 2


class RowStatistics(NamedTuple):
    """Diagnostics of n rows; an entry is 0 or False where `rows` (or `has_negative`) is False."""

    positive: jax.Array  # [n] similarity of the positive
    hard_negative: jax.Array  # [n] largest similarity of a negative
    easy_negative: jax.Array  # [n] smallest similarity of a negative
    correct: jax.Array  # bool [n], the row's first maximum is its positive
    has_negative: jax.Array  # bool [n]


def row_statistics(
    similarity: ArrayLike,
    positive: ArrayLike,
    *,
    columns: ArrayLike,
    negatives: ArrayLike | None = None,
) -> RowStatistics:
    """Diagnostics of the rows that `row_losses` takes, without gradient; same arguments."""
    rows, is_positive, is_negative = _roles(similarity, positive, columns, negatives)
    similarity = jax.lax.stop_gradient(similarity)
    candidates = jnp.where(is_positive | is_negative, similarity, -jnp.inf)
    has_negative = jnp.any(is_negative, axis=1)
    hard = jnp.max(jnp.where(is_negative, similarity, -jnp.inf), axis=1)
    easy = jnp.min(jnp.where(is_negative, similarity, jnp.inf), axis=1)
    return RowStatistics(
        positive=jnp.sum(jnp.where(is_positive, similarity, 0), axis=1),
        hard_negative=jnp.where(has_negative, hard, 0),
        easy_negative=jnp.where(has_negative, easy, 0),
        correct=rows & (jnp.argmax(candidates, axis=1) == positive),
        has_negative=has_negative,
    )


def metrics_from_rows(
    queries: RowStatistics,
    targets_correct: jax.Array,
    valid: jax.Array,
    axes: tuple[str, ...] = (),
) -> dict[str, jax.Array]:
    """The dictionary of `similarity_metrics` from per-row diagnostics.

    Args:
      queries: statistics of the query -> target rows.
      targets_correct: bool [n], `correct` of the target -> query rows.
      valid: bool [n].
      axes: mesh axes over which the rows are spread, inside `shard_map`; () for none.
    """
    return {
        "positive_similarity": masked_mean(queries.positive, valid, axes),
        "hard_negative_similarity": masked_mean(queries.hard_negative, queries.has_negative, axes),
        "easy_negative_similarity": masked_mean(queries.easy_negative, queries.has_negative, axes),
        "query_to_target_accuracy": masked_mean(queries.correct, valid, axes),
        "target_to_query_accuracy": masked_mean(targets_correct, valid, axes),
    }


def masked_mean(values: jax.Array, mask: jax.Array, axes: tuple[str, ...] = ()) -> jax.Array:
    """Mean of `values` [n] where `mask` [n], over all devices of `axes`; 0 over nothing.

    `values` must be 0 (or False) where `mask` is False.
    """
    count = jnp.sum(mask)
    if axes:
        count = jax.lax.psum(count, axes)
    # Divided first: a sum of very large losses would overflow although their mean does not.
    total = jnp.sum(values / jnp.maximum(count, 1))
    return jax.lax.psum(total, axes) if axes else total


def _roles(
    similarity: ArrayLike, positive: ArrayLike, columns: ArrayLike, negatives: ArrayLike | None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which rows are real [n], and which entries [n, M] are their positives and negatives."""
    n, m = similarity.shape
    if positive.shape != (n,) or columns.shape != (m,):
        raise ValueError(
            f"similarity is [{n}, {m}]: expected positive of shape ({n},) and columns of shape "
            f"({m},), found {positive.shape} and {columns.shape}"
        )
    if negatives is not None and negatives.shape != (n, m):
        raise ValueError(f"similarity is [{n}, {m}], but negatives is {negatives.shape}")
    rows = columns[positive]
    is_positive = jnp.arange(m) == positive[:, None]
    is_negative = ~is_positive & columns & rows[:, None]
    if negatives is not None:
        is_negative &= negatives
    return rows, is_positive & rows[:, None], is_negative


def _check_pairs(similarity: ArrayLike, valid: ArrayLike | None) -> tuple[jax.Array, jax.Array]:
    similarity = jnp.asarray(similarity)
    if similarity.ndim != 2 or similarity.shape[0] != similarity.shape[1] or not similarity.size:
        raise ValueError(
            f"similarity must be [N, N] with N >= 1, row i's positive at column i; "
            f"found shape {similarity.shape}"
        )
    # Logits reach 50 to 1000: half precision would round them to whole numbers.
    similarity = similarity.astype(jnp.promote_types(similarity.dtype, jnp.float32))
    size = similarity.shape[0]
    if valid is None:
        return similarity, jnp.ones(size, bool)
    valid = jnp.asarray(valid)
    if valid.dtype != jnp.bool_:
        raise TypeError(f"valid must be bool [{size}]; found dtype {valid.dtype}")
    if valid.shape != (size,):
        raise ValueError(f"similarity is [{size}, {size}], but valid has shape {valid.shape}")
    return similarity, valid


def check_finite(**values: ArrayLike) -> None:
    """Values that are known while tracing are checked; traced ones are the caller's to check."""
    for name, value in values.items():
        if not isinstance(value, jax.core.Tracer) and not abs(float(value)) <= _LARGEST:
            raise ValueError(f"{name} must be a finite float32, found {value}")


def check_temperature(temperature: ArrayLike) -> None:
    if not isinstance(temperature, jax.core.Tracer) and not 0 < float(temperature) < math.inf:
        raise ValueError(f"temperature must be positive and finite, found {temperature}")


_LARGEST = float(jnp.finfo(jnp.float32).max)
