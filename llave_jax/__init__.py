"""LLaVE: large language and vision embedding models in JAX.

from llave_jax import Embedder
from llave_jax.loss import hardness_weighted_contrastive_loss
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from llave_jax.common import interrupts

if TYPE_CHECKING:
    from llave_jax.embedding.embedder import Embedder

__all__ = ["Embedder"]

interrupts.quiet_while_starting()

# transformers says so in every process where PyTorch is absent; only its tokenizers are used here.
logging.getLogger("transformers").addFilter(
    lambda record: not record.getMessage().startswith("PyTorch was not found")
)


def __getattr__(name: str) -> Any:
    # The loss alone is of use without the model; importing it should not cost the model's imports.
    if name == "Embedder":
        from llave_jax.embedding.embedder import Embedder

        return Embedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
