"""Focal-InfoNCE, which the paper's Table 3 compares with hardness weighting.

Owns the formula alone. Rows, masks and the two directions are those of `hardness.py`.
"""

from __future__ import annotations

from typing import NamedTuple

from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from llave_jax.loss.hardness import Number, check_finite, check_temperature, symmetric_loss


class Focal(NamedTuple):
    """The formula of `focal_contrastive_loss`.

    Attributes:
      margin: added to the similarity that scales a negative.
      temperature: positive.
    """

    margin: Number = 0.3
    temperature: Number = 0.02

    def at(self, temperature: Number) -> Focal:
        """See `Formula.at`."""
        return self._replace(temperature=temperature)

    def positive(self, similarity: Float[Array, "..."]) -> Float[Array, "..."]:
        """s^2. See `Formula.positive`."""
        return similarity * similarity

    def negative(self, similarity: Float[Array, "..."]) -> Float[Array, "..."]:
        """s (s + margin). See `Formula.negative`."""
        return similarity * (similarity + self.margin)

    def log_weight(
        self, similarity: Float[Array, "..."], is_explicit: Bool[Array, "..."] | None = None
    ) -> float:
        """0: all negatives weigh the same. See `Formula.log_weight`."""
        return 0.0

    def check(self) -> None:
        """See `Formula.check`."""
        check_finite(margin=self.margin)
        check_temperature(self.temperature)


def focal_contrastive_loss(
    similarity: ArrayLike,
    *,
    margin: Number = 0.3,
    temperature: Number = 0.02,
    valid: ArrayLike | None = None,
) -> Float[Array, ""]:
    """Symmetric InfoNCE whose logits are scaled by the similarity itself.

    For row i,

        L_i = -log( exp(s_ii^2/t) / (exp(s_ii^2/t) + sum_{j != i} exp(s_ij (s_ij + m)/t)) )

    and the loss is the mean of L over the valid rows and over the valid columns, averaged. The
    gradient flows through both factors. The authors of Focal-InfoNCE use the query -> target direction
    alone, with temperature 0.05. LLaVE's authors do not say which margin they used.

    Args:
      similarity: [N, N] cosines; row i is query i, its positive is column i.
      margin: m, added to the similarity that scales a negative; 0.3 in the example of the method's
        authors.
      temperature: positive, one for all or [N], one for each pair.
      valid: bool [N], False for empty slots, which have no influence. None: all are valid.

    Returns:
      Scalar, float32 (float64 for float64 similarities); 0 if no pair is valid.

    Raises:
      ValueError: a shape does not fit, `temperature` is not positive or `margin` is not finite.
      TypeError: `valid` is not bool.

    References:
      Hou and Li, Improving Contrastive Learning of Sentence Embeddings with Focal-InfoNCE
      (arXiv 2310.06918, Findings of EMNLP 2023), and its code, github.com/puerrrr/Focal-InfoNCE.
    """
    return symmetric_loss(similarity, Focal(margin, temperature), valid)
