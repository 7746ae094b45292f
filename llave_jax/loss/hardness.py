"""The hardness-weighted contrastive loss of LLaVE: pure functions of a similarity matrix.

Owns the formula and the diagnostics of the matrix. It can be lifted out: it needs jax alone, and jaxtyping
for its annotations. A batch spread over devices is `cross_device.py`, a pool too large for its matrix is
`tiled.py`, another formula for the same matrix is `focal.py`, which candidates are negatives is `masks.py`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

# A number of a formula: known, or traced.
Number = int | float | jax.Array


def hardness_weighted_contrastive_loss(
    similarity: ArrayLike,
    *,
    alpha: Number = 9.0,
    temperature: Number = 0.02,
    valid: ArrayLike | None = None,
) -> Float[Array, ""]:
    """Symmetric InfoNCE in which a negative weighs more the closer it is to the query.

    For row i, with sg the stop-gradient,

        L_i = -log( exp(s_ii/t) / (exp(s_ii/t) + sum_{j != i} exp(s_ij/t + alpha * sg(s_ij))) )

    and the loss is the mean of L over the valid rows (query -> target) and over the valid columns
    (target -> query), averaged. `alpha=0` is plain InfoNCE.

    Value and gradient are finite for every finite float32 `alpha` and `temperature >= 1e-3` if
    the similarities are cosines (or smaller than 1e30 in magnitude). `alpha * s` is clipped to
    +-8e37.

    Args:
      similarity: [N, N] cosines; row i is query i, its positive is column i. Half precision is
        converted to float32.
      alpha: hardness; 9 in the paper, 0 for no weighting.
      temperature: positive, one for all or [N], one for each pair; 0.02 in the paper.
      valid: bool [N], False for empty slots. The row and the column of an empty slot may hold anything,
        nan included: they change neither value nor gradient. None: all are valid.

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
    """A kind of contrastive loss, as a pytree of its numbers.

    With temperature t, the loss of a row is

        L = -log( exp(p/t) / (exp(p/t) + sum_j w_j exp(n_j/t)) )

    where p = positive(s) for the similarity s of the positive, and n_j = negative(s_j) and
    log w_j = log_weight(s_j) for the similarity s_j of each negative.
    """

    @property
    def temperature(self) -> Number:
        """Divides `positive` and `negative`. One for all, or [n], one for each row."""
        ...

    def at(self, temperature: Number) -> Formula:
        """The same formula at another temperature.

        Args:
          temperature: in the place of the formula's own.

        Returns:
          The formula.
        """
        ...

    def positive(self, similarity: Float[Array, "..."]) -> Float[Array, "..."]:
        """What takes the place of a positive's cosine in the loss.

        Args:
          similarity: [...] cosines.

        Returns:
          [...], the values before division by the temperature.
        """
        ...

    def negative(self, similarity: Float[Array, "..."]) -> Float[Array, "..."]:
        """What takes the place of a negative's cosine in the loss.

        Args:
          similarity: [...] cosines.

        Returns:
          [...], the values before division by the temperature.
        """
        ...

    def log_weight(
        self, similarity: Float[Array, "..."], is_explicit: Bool[Array, "..."] | None = None
    ) -> Number:
        """The logarithm of a negative's weight, which is added to its logit.

        Args:
          similarity: [...] cosines.
          is_explicit: bool [...], where the negative is one that the row itself names; None: nowhere.

        Returns:
          [...], or one number for all.
        """
        ...

    def check(self) -> None:
        """Checks the formula's numbers. The caller checks traced ones.

        Raises:
          ValueError: a number is out of range.
        """
        ...


class Hardness(NamedTuple):
    """The formula of `hardness_weighted_contrastive_loss`.

    Attributes:
      alpha: hardness; 0 is InfoNCE.
      temperature: positive.
      explicit_alpha: hardness of the negatives that a row itself names. EmbeddingGemma (arXiv 2509.20354)
        has 5 for these and alpha = 0. None: alpha.
    """

    alpha: Number = 9.0
    temperature: Number = 0.02
    explicit_alpha: Number | None = None

    def at(self, temperature: Number) -> Hardness:
        """See `Formula.at`."""
        return self._replace(temperature=temperature)

    def positive(self, similarity: Float[Array, "..."]) -> Float[Array, "..."]:
        """s. See `Formula.positive`."""
        return similarity

    def negative(self, similarity: Float[Array, "..."]) -> Float[Array, "..."]:
        """s. See `Formula.negative`."""
        return similarity

    def log_weight(
        self, similarity: Float[Array, "..."], is_explicit: Bool[Array, "..."] | None = None
    ) -> Float[Array, "..."]:
        """alpha * sg(s), the logarithm of a negative's weight w = exp(alpha * sg(s)).

        It is added to the logit, because the exponential itself would overflow. It is clipped to a
        quarter of the largest number, so that sums and differences of logits stay finite.
        See `Formula.log_weight`.
        """
        limit = float(jnp.finfo(similarity.dtype).max) / 4
        alpha = self.alpha
        if self.explicit_alpha is not None and is_explicit is not None:
            alpha = jnp.where(is_explicit, self.explicit_alpha, alpha)
        return jnp.clip(alpha * jax.lax.stop_gradient(similarity), -limit, limit)

    def check(self) -> None:
        """See `Formula.check`."""
        check_finite(alpha=self.alpha)
        if self.explicit_alpha is not None:
            check_finite(explicit_alpha=self.explicit_alpha)
        check_temperature(self.temperature)


def infonce(formula: Formula) -> Hardness:
    """Plain InfoNCE at a formula's temperature, a measure that does not depend on its other numbers.

    Runs that weigh negatives differently are compared by it. It has no gradient.

    Args:
      formula: any formula.

    Returns:
      The formula of InfoNCE.
    """
    return Hardness(0.0, jax.lax.stop_gradient(formula.temperature))


def symmetric_loss(
    similarity: ArrayLike, formula: Formula, valid: ArrayLike | None = None
) -> Float[Array, ""]:
    """The mean of a formula's loss over rows and its mean over columns, averaged.

    Args:
      similarity, valid: as for `hardness_weighted_contrastive_loss`.
      formula: `Hardness(alpha, temperature)`, or another one.

    Returns:
      Scalar, float32 (float64 for float64 similarities); 0 if no pair is valid.

    Raises:
      ValueError: a shape does not fit, or a number of the formula is out of range.
      TypeError: `valid` is not bool.
    """
    matrix, is_valid = _check_pairs(similarity, valid)
    positive = jnp.arange(matrix.shape[0])
    query_to_target = row_losses(matrix, positive, formula, column_valid=is_valid)
    target_to_query = row_losses(matrix.T, positive, formula, column_valid=is_valid)
    return 0.5 * (masked_mean(query_to_target, is_valid) + masked_mean(target_to_query, is_valid))


def similarity_metrics(
    similarity: ArrayLike, *, valid: ArrayLike | None = None
) -> dict[str, jax.Array]:
    """What to watch during training, from the matrix that the loss sees. It has no gradient.

    Args:
      similarity: [N, N] cosines; row i is query i, its positive is column i.
      valid: bool [N], False for empty slots; None: all are valid.

    Returns:
      Scalars: `positive_similarity`, the mean over queries; `hard_negative_similarity` and
      `easy_negative_similarity`, the means over queries of the largest and the smallest similarity of a
      negative; `query_to_target_accuracy` and `target_to_query_accuracy`, the share of rows whose first
      maximum is the positive. A mean over nothing is 0.

    Raises:
      ValueError: a shape does not fit.
      TypeError: `valid` is not bool.
    """
    matrix, is_valid = _check_pairs(similarity, valid)
    positive = jnp.arange(matrix.shape[0])
    queries = row_statistics(matrix, positive, column_valid=is_valid)
    targets = row_statistics(matrix.T, positive, column_valid=is_valid)
    return metrics_from_rows(queries, targets.is_correct, is_valid)


def similarity_matrix(
    rows: Float[Array, "n D"], columns: Float[Array, "A D"]
) -> Float[Array, "n A"]:
    """Cosines of L2-normalised embeddings, in full float32 (or float64).

    By default accelerators round the factors to bfloat16. At temperature 0.02 that moves logits by 0.2.

    Args:
      rows: [n, D].
      columns: [A, D].

    Returns:
      [n, A].
    """
    return jnp.einsum("nD,AD->nA", rows, columns, precision=jax.lax.Precision.HIGHEST)


def row_losses(
    similarity: Float[Array, "n A"],
    positive: Int[Array, " n"],
    formula: Formula,
    *,
    column_valid: Bool[Array, " A"],
    can_be_negative: Bool[Array, "n A"] | None = None,
    is_explicit: Bool[Array, "n A"] | None = None,
) -> Float[Array, " n"]:
    """One direction of the loss for some rows of the matrix, such as those of one device.

    Args:
      similarity: [n, A] cosines of n queries and A candidates. A candidate may be nobody's positive (a
        hard negative).
      positive: int [n], the column of each row's positive, in range(A).
      formula: `Hardness(alpha, temperature)`, or another one.
      column_valid: bool [A], False for candidates that are empty slots.
      can_be_negative: bool [n, A], False where a candidate must not count as a negative of that row,
        because it is known to match. The entry of the positive itself is ignored. None: all can.
      is_explicit: bool [n, A], True for the negatives that the row itself names; None: there are none.

    Returns:
      [n] losses; 0 for a row whose positive is an empty slot, and for a row without negatives.

    Raises:
      ValueError: a shape does not fit, or a number of the formula is out of range.
    """
    formula.check()
    if jnp.ndim(formula.temperature) == 1:
        formula = formula.at(jnp.asarray(formula.temperature)[:, None])
    row_valid, is_positive, is_negative = _masks(
        similarity, positive, column_valid, can_be_negative
    )
    # Empty slots are masked before any arithmetic. A nan there would survive a later mask, if not in the
    # value then in the gradient of the temperature.
    similarity = jnp.where(is_positive | is_negative, similarity, 0)
    positives = jnp.sum(jnp.where(is_positive, similarity, 0), axis=1, keepdims=True)
    logits = (formula.negative(similarity) - formula.positive(positives)) / formula.temperature
    logits += formula.log_weight(similarity, is_explicit)
    logits = jnp.where(is_negative, logits, masked_logit(similarity.dtype))
    # log(1 + sum_j exp(logit_j)), logits relative to that of the positive: exact for small losses.
    return jnp.where(row_valid, jax.nn.softplus(jax.nn.logsumexp(logits, axis=1)), 0)


def masked_logit(dtype: jnp.dtype) -> float:
    """The logit of an entry that is not a negative: finite, and below every real logit.

    With -inf instead, the gradient of a row without negatives would be nan.

    Args:
      dtype: of the similarities.

    Returns:
      Minus half the largest number of the dtype.
    """
    return -float(jnp.finfo(dtype).max) / 2


class RowStatistics(NamedTuple):
    """Diagnostics of n rows. An entry is 0 or False where the row is an empty slot or has no negative.

    Attributes:
      positive: [n], similarity of the positive.
      hard_negative, easy_negative: [n], largest and smallest similarity of a negative.
      is_correct: bool [n], whether the first maximum of the row is its positive.
      has_negative: bool [n].
    """

    positive: Float[Array, " n"]
    hard_negative: Float[Array, " n"]
    easy_negative: Float[Array, " n"]
    is_correct: Bool[Array, " n"]
    has_negative: Bool[Array, " n"]


def row_statistics(
    similarity: Float[Array, "n A"],
    positive: Int[Array, " n"],
    *,
    column_valid: Bool[Array, " A"],
    can_be_negative: Bool[Array, "n A"] | None = None,
) -> RowStatistics:
    """Diagnostics of rows, without gradient.

    Args:
      similarity, positive, column_valid, can_be_negative: as for `row_losses`.

    Returns:
      The diagnostics of the n rows.

    Raises:
      ValueError: a shape does not fit.
    """
    row_valid, is_positive, is_negative = _masks(
        similarity, positive, column_valid, can_be_negative
    )
    similarity = jax.lax.stop_gradient(similarity)
    candidates = jnp.where(is_positive | is_negative, similarity, -jnp.inf)
    has_negative = jnp.any(is_negative, axis=1)
    hard = jnp.max(jnp.where(is_negative, similarity, -jnp.inf), axis=1)
    easy = jnp.min(jnp.where(is_negative, similarity, jnp.inf), axis=1)
    return RowStatistics(
        positive=jnp.sum(jnp.where(is_positive, similarity, 0), axis=1),
        hard_negative=jnp.where(has_negative, hard, 0),
        easy_negative=jnp.where(has_negative, easy, 0),
        is_correct=row_valid & (jnp.argmax(candidates, axis=1) == positive),
        has_negative=has_negative,
    )


def metrics_from_rows(
    queries: RowStatistics,
    target_is_correct: Bool[Array, " n"],
    valid: Bool[Array, " n"],
    axes: tuple[str, ...] = (),
) -> dict[str, jax.Array]:
    """Averages the diagnostics of rows.

    Args:
      queries: statistics of the query -> target rows.
      target_is_correct: bool [n], `is_correct` of the target -> query rows.
      valid: bool [n], False for empty slots.
      axes: mesh axes over which the rows are spread, inside `shard_map`; () for none.

    Returns:
      The scalars of `similarity_metrics`.
    """
    return {
        "positive_similarity": masked_mean(queries.positive, valid, axes),
        "hard_negative_similarity": masked_mean(queries.hard_negative, queries.has_negative, axes),
        "easy_negative_similarity": masked_mean(queries.easy_negative, queries.has_negative, axes),
        "query_to_target_accuracy": masked_mean(queries.is_correct, valid, axes),
        "target_to_query_accuracy": masked_mean(target_is_correct, valid, axes),
    }


def masked_mean(
    values: Float[Array, " n"] | Bool[Array, " n"],
    mask: Bool[Array, " n"],
    axes: tuple[str, ...] = (),
) -> Float[Array, ""]:
    """The mean of the values where a mask is True.

    Args:
      values: [n]; 0 (or False) where `mask` is False.
      mask: bool [n].
      axes: mesh axes over which the values are spread, inside `shard_map`; () for none.

    Returns:
      Scalar; 0 if the mask is False everywhere.
    """
    count = jnp.sum(mask)
    if axes:
        count = jax.lax.psum(count, axes)
    # Values are divided before they are summed: the sum of very large losses would overflow.
    total = jnp.sum(values / jnp.maximum(count, 1))
    return jax.lax.psum(total, axes) if axes else total


def _masks(
    similarity: jax.Array,
    positive: jax.Array,
    column_valid: jax.Array,
    can_be_negative: jax.Array | None,
) -> tuple[Bool[Array, " n"], Bool[Array, "n A"], Bool[Array, "n A"]]:
    """Which rows are valid, and which entries are their positives and their negatives."""
    n, size = similarity.shape
    if positive.shape != (n,) or column_valid.shape != (size,):
        raise ValueError(
            f"similarity is [{n}, {size}]: expected positive of shape ({n},) and column_valid of "
            f"shape ({size},), found {positive.shape} and {column_valid.shape}"
        )
    if can_be_negative is not None and can_be_negative.shape != (n, size):
        raise ValueError(
            f"similarity is [{n}, {size}], but can_be_negative is {can_be_negative.shape}"
        )
    row_valid = column_valid[positive]
    is_positive = jnp.arange(size) == positive[:, None]
    is_negative = ~is_positive & column_valid & row_valid[:, None]
    if can_be_negative is not None:
        is_negative &= can_be_negative
    return row_valid, is_positive & row_valid[:, None], is_negative


def _check_pairs(
    similarity: ArrayLike, valid: ArrayLike | None
) -> tuple[Float[Array, "N N"], Bool[Array, " N"]]:
    """The matrix in float32 or float64, and its mask."""
    matrix = jnp.asarray(similarity)
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not matrix.size:
        raise ValueError(
            f"similarity must be [N, N] with N >= 1, row i's positive at column i; "
            f"found shape {matrix.shape}"
        )
    # Logits reach 50 to 1000: half precision would round them to whole numbers.
    matrix = matrix.astype(jnp.promote_types(matrix.dtype, jnp.float32))
    size = matrix.shape[0]
    if valid is None:
        return matrix, jnp.ones(size, bool)
    mask = jnp.asarray(valid)
    if mask.dtype != jnp.bool_:
        raise TypeError(f"valid must be bool [{size}]; found dtype {mask.dtype}")
    if mask.shape != (size,):
        raise ValueError(f"similarity is [{size}, {size}], but valid has shape {mask.shape}")
    return matrix, mask


def check_finite(**values: Number) -> None:
    """Refuses numbers that are not finite in float32. The caller checks traced ones.

    Args:
      values: the numbers by name.

    Raises:
      ValueError: naming the first such number.
    """
    for name, value in values.items():
        if not isinstance(value, Tracer) and not abs(float(value)) <= _MAX_FLOAT32:
            raise ValueError(f"{name} must be a finite float32, found {value}")


def check_temperature(temperature: Number) -> None:
    """Refuses a temperature that is not positive and finite. The caller checks a traced one.

    Args:
      temperature: of the loss, one or an array of them.

    Raises:
      ValueError: it is not positive and finite.
    """
    if not isinstance(temperature, Tracer) and not np.all(
        (np.asarray(temperature) > 0) & np.isfinite(temperature)
    ):
        raise ValueError(f"temperature must be positive and finite, found {temperature}")


_MAX_FLOAT32 = float(jnp.finfo(jnp.float32).max)
