"""Contrastive losses: the formulas, pools in tiles, pools over many devices."""

from llave_jax.loss.hardness import (
    hardness_weighted_contrastive_loss,
    similarity_matrix,
    similarity_metrics,
)

__all__ = ["hardness_weighted_contrastive_loss", "similarity_matrix", "similarity_metrics"]
