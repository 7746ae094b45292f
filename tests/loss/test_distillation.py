"""Soft labels and prefixes: rows and embeddings at their limits. The step's tests compare both with NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llave_jax.loss.distillation import distillation_losses
from llave_jax.loss.matryoshka import check_dims, prefix, shares

NAN = np.nan
SIMILARITY = np.array([[0.5, 0.2, 0.1], [0.3, 0.4, NAN], [0.9, 0.1, 0.2], [NAN] * 3], np.float32)
SCORES = np.array([[2.0, 1.0, 0.5], [1.0, 3.0, 9.0], [1.0, NAN, NAN], [1.0, 2.0, 3.0]], np.float32)
PRESENT = np.array([[1, 1, 1], [1, 1, 0], [1, 1, 1], [0, 0, 0]], bool)


@jax.jit
def losses_and_gradients(similarity, temperature):
    def total(similarity, temperature):
        losses, has_loss = distillation_losses(
            similarity,
            jnp.asarray(SCORES),
            jnp.asarray(PRESENT),
            temperature=temperature,
            teacher_temperature=0.5,
        )
        return losses.sum(), (losses, has_loss)

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(similarity, temperature)


def divergence(scores, similarity, temperature):
    p, q = np.exp(np.float64(scores) / 0.5), np.exp(np.float64(similarity) / temperature)
    p, q = p / p.sum(), q / q.sum()
    return np.sum(p * np.log(p / q)), (q - p) / temperature


def test_rows_of_any_number_of_candidates():
    (_, (losses, has_loss)), (gradient, by_temperature) = losses_and_gradients(SIMILARITY, 0.1)
    np.testing.assert_array_equal(has_loss, [True, True, False, False])
    expected = np.zeros_like(SIMILARITY)
    for row, count in ((0, 3), (1, 2)):
        loss, expected[row, :count] = divergence(SCORES[row, :count], SIMILARITY[row, :count], 0.1)
        assert losses[row] == pytest.approx(loss, rel=1e-5)
    np.testing.assert_array_equal(losses[2:], 0)
    np.testing.assert_allclose(gradient, expected, atol=1e-5)
    assert np.isfinite(by_temperature)


def test_the_teachers_own_distribution_has_no_divergence():
    similarity = SCORES / 0.5 * 0.1
    (_, (losses, _)), (gradient, _) = losses_and_gradients(similarity, 0.1)
    np.testing.assert_allclose(losses, 0, atol=1e-6)
    np.testing.assert_allclose(np.nan_to_num(gradient), 0, atol=1e-5)


def test_prefixes_have_length_one():
    embeddings = np.random.default_rng(0).normal(size=(3, 5, 8)).astype(np.float32)
    first = prefix(jnp.asarray(embeddings), 3)
    np.testing.assert_allclose(np.linalg.norm(first, axis=-1), 1, rtol=1e-6)
    cosine = np.sum(first * embeddings[..., :3], axis=-1)
    np.testing.assert_allclose(cosine, np.linalg.norm(embeddings[..., :3], axis=-1), rtol=1e-5)
    whole = jnp.asarray(embeddings)
    assert prefix(whole, 8) is whole


def test_prefixes_of_empty_slots_have_a_gradient():
    gradient = jax.grad(lambda x: prefix(x, 2).sum())(jnp.zeros((1, 4)))
    assert np.isfinite(gradient).all()


def test_shares_and_dims():
    assert shares((4, 8)) == (0.5, 0.5)
    assert shares((4, 8), (1.0, 3.0)) == (0.25, 0.75)
    check_dims((4, 8), 8)
    for weights in ((1.0,), (1.0, 0.0)):
        with pytest.raises(ValueError, match="dim_weights"):
            shares((4, 8), weights)
    for dims in ((), (4,), (8, 4), (4, 4, 8), (0, 8)):
        with pytest.raises(ValueError, match="model's width: 8"):
            check_dims(dims, 8)
