"""Soft labels: a teacher's scores of a row's own candidates, as a distribution that the model learns.

Owns the divergence of rows. It needs jax alone, and nothing of other rows or devices.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from llave_jax.loss.hardness import Number


def distillation_losses(
    similarity: Float[Array, "n c"],
    scores: Float[Array, "n c"],
    present: Bool[Array, "n c"],
    *,
    temperature: Number,
    teacher_temperature: Number,
) -> tuple[Float[Array, " n"], Bool[Array, " n"]]:
    """KL(softmax(scores / teacher_temperature) || softmax(similarity / temperature)) of each row.

    Args:
      similarity: [n, c] cosines of a query with its own candidates: its target, and its hard negatives.
      scores: [n, c], the teacher's; nan where it has given none. Such candidates are left out.
      present: bool [n, c], False for candidates that the row lacks; these may hold anything.
      temperature: of the model; one, or [n, 1], one for each row.
      teacher_temperature: of the teacher, positive.

    Returns:
      (losses [n], has_loss bool [n]): rows with fewer than two candidates that have scores have no loss, and 0.

    References: Hinton et al., Distilling the Knowledge in a Neural Network (arXiv 1503.02531), section 2.
    """
    known = present & ~jnp.isnan(scores)
    has_loss = jnp.sum(known, axis=1) >= 2
    known &= has_loss[:, None]
    # What is unknown is masked before any arithmetic, or it would make gradients nan.
    teacher = jnp.where(known, jnp.where(known, scores, 0) / teacher_temperature, _MASKED)
    model = jnp.where(known, jnp.where(known, similarity, 0) / temperature, _MASKED)
    teacher, model = jax.nn.log_softmax(teacher, axis=1), jax.nn.log_softmax(model, axis=1)
    terms = jnp.where(known, jnp.exp(teacher) * (teacher - model), 0)
    return jnp.sum(terms, axis=1), has_loss


# Below every logit, and finite: rows without candidates have no nan.
_MASKED = -1e30
