"""Kinds of hardness against `MultipleNegativesRankingLoss` of sentence-transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("sentence_transformers", minversion="6")

from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    MultipleNegativesRankingLoss,
)

from llave_jax.loss.cross_device import make_formula  # noqa: E402
from llave_jax.loss.hardness import row_losses, similarity_matrix  # noqa: E402

# Ours -> theirs.
MODES = {"all": "all_negatives", "in_batch": "in_batch_negatives", "explicit": "hard_negatives"}
PAIRS, NEGATIVES, DIM = 6, 2, 5
ALPHA, TEMPERATURE = 5.0, 0.05


@pytest.mark.parametrize("hardness_on", MODES)
def test_query_to_target_in_value_and_gradient(hardness_on):
    """Their loss weighs this direction alone."""
    random = np.random.default_rng(0)
    embeddings = random.normal(size=(2 + NEGATIVES, PAIRS, DIM)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    theirs = MultipleNegativesRankingLoss(
        torch.nn.Identity(),
        scale=1 / TEMPERATURE,
        hardness_mode=MODES[hardness_on],
        hardness_strength=ALPHA,
    )
    # Cosines are formed by them: the gradient is that of embeddings of any length, ours of these.
    sides = [torch.tensor(side, requires_grad=True) for side in embeddings]
    expected = theirs.compute_loss_from_embeddings(sides, None)
    expected.backward()

    def loss(embeddings):
        norm = jnp.linalg.norm(embeddings, axis=-1, keepdims=True)
        embeddings = embeddings / norm
        owner = jnp.tile(jnp.arange(PAIRS), 1 + NEGATIVES)
        return row_losses(
            similarity_matrix(embeddings[0], embeddings[1:].reshape(-1, DIM)),
            jnp.arange(PAIRS),
            make_formula("hardness", ALPHA, TEMPERATURE, 0.0, hardness_on),
            column_valid=jnp.ones(len(owner), bool),
            is_explicit=owner == jnp.arange(PAIRS)[:, None],
        ).mean()

    found, gradient = jax.jit(jax.value_and_grad(loss))(embeddings)
    np.testing.assert_allclose(found, expected.item(), rtol=1e-5)
    for side, by_side in zip(sides, gradient, strict=True):
        np.testing.assert_allclose(by_side, side.grad.numpy(), atol=2e-6)
