"""The loss as a function of a similarity matrix: the formula, its gradient, its limits."""

import json
import math

import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llave_jax.loss import hardness_weighted_contrastive_loss
from llave_jax.loss.focal import focal_contrastive_loss
from llave_jax.loss.hardness import (
    Hardness,
    row_losses,
    row_statistics,
    similarity_matrix,
    similarity_metrics,
)
from tests.conftest import GOLDEN
from tests.loss import loss_reference as reference

FLOAT32_MAX = float(np.finfo(np.float32).max)

sizes = st.sampled_from([1, 2, 3, 6])
alphas = st.floats(-50, 50, width=32)
temperatures = st.sampled_from([1e-3, 0.02, 0.1, 1.0, 10.0])


@st.composite
def matrices(draw, size=sizes):
    n = draw(size)
    cosines = st.floats(-1, 1, width=32, allow_subnormal=False)
    return draw(hnp.arrays(np.float32, (n, n), elements=cosines))


@st.composite
def masked_matrices(draw):
    similarity = draw(matrices())
    return similarity, draw(hnp.arrays(bool, len(similarity)))


@jax.jit
def value_and_grad(similarity, alpha, temperature, valid=None):
    def loss(similarity):
        return hardness_weighted_contrastive_loss(
            similarity, alpha=alpha, temperature=temperature, valid=valid
        )

    return jax.value_and_grad(loss)(similarity)


@hypothesis.given(masked_matrices(), alphas, temperatures)
def test_value_and_gradient_are_those_of_the_formula(case, alpha, temperature):
    similarity, valid = case
    loss, gradient = value_and_grad(similarity, alpha, temperature, valid)
    expected, expected_gradient, _ = reference.symmetric_loss(similarity, alpha, temperature, valid)
    error = reference.logit_error(alpha, temperature, len(similarity))
    reference.assert_close_loss(loss, expected, error)
    reference.assert_close_gradient(gradient, expected_gradient, error)


@jax.jit
def focal_value_and_grads(similarity, margin, temperature, valid):
    def loss(similarity, margin, temperature):
        return focal_contrastive_loss(
            similarity, margin=margin, temperature=temperature, valid=valid
        )

    return jax.value_and_grad(loss, argnums=(0, 1, 2))(similarity, margin, temperature)


@hypothesis.given(masked_matrices(), st.floats(-2, 2, width=32), temperatures)
def test_focal_value_and_gradients_are_those_of_the_formula(case, margin, temperature):
    similarity, valid = case
    loss, (gradient, *numbers) = focal_value_and_grads(similarity, margin, temperature, valid)
    expected, expected_gradient, expected_numbers = reference.symmetric_loss(
        similarity, 0, temperature, valid, margin=margin
    )
    size = len(similarity)
    error = reference.logit_error(0, temperature, size, margin=margin)
    reference.assert_close_loss(loss, expected, error)
    # 2 s + m cancels, so its error is measured by its terms; probabilities are at most 1.
    slope = (2 + abs(margin)) / temperature
    atol = (math.expm1(2 * error) + 4 * reference.UNIT) * slope
    np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=atol)
    # Sums over a row's negatives of a probability times s/t and times a logit over t.
    largest = {"margin": 1 / temperature, "temperature": (2 + abs(margin)) / temperature**2}
    for name, number in zip(("margin", "temperature"), numbers, strict=True):
        atol = (math.expm1(2 * error) + 2 * size * reference.UNIT) * largest[name]
        np.testing.assert_allclose(number, expected_numbers[name], rtol=0, atol=atol)


def test_focal_of_a_pair():
    """By hand: logits .8 * .8 / .5 and -.2 * (-.2 + .3) / .5, .4 * .7 / .5 and .6 * .6 / .5."""
    similarity = np.array([[0.8, -0.2], [0.4, 0.6]])
    positives, negatives = np.array([1.28, 0.72]), np.array([-0.04, 0.56])
    expected = np.mean(
        [np.log1p(np.exp(negatives[i] - positives[j])) for i, j in ((0, 0), (1, 1), (1, 0), (0, 1))]
    )
    loss = focal_contrastive_loss(similarity, margin=0.3, temperature=0.5)
    assert float(loss) == pytest.approx(expected, rel=1e-6)


@jax.jit
def gradients_of_numbers(similarity, alpha, temperature, valid):
    def loss(alpha, temperature):
        return hardness_weighted_contrastive_loss(
            similarity, alpha=alpha, temperature=temperature, valid=valid
        )

    return jax.grad(loss, argnums=(0, 1))(alpha, temperature)


@hypothesis.given(masked_matrices(), alphas, temperatures)
def test_gradients_of_the_numbers_are_those_of_the_formula(case, alpha, temperature):
    similarity, valid = case
    numbers = gradients_of_numbers(similarity, alpha, temperature, valid)
    *_, expected = reference.symmetric_loss(similarity, alpha, temperature, valid)
    size = len(similarity)
    error = reference.logit_error(alpha, temperature, size)
    # Sums over a row's negatives of a probability times s and times (s - p)/t^2.
    largest = {"alpha": 1, "temperature": 2 / temperature**2}
    for name, number in zip(("alpha", "temperature"), numbers, strict=True):
        atol = (math.expm1(2 * error) + 2 * size * reference.UNIT) * largest[name]
        np.testing.assert_allclose(number, expected[name], rtol=0, atol=atol)


@hypothesis.given(matrices(), temperatures)
def test_alpha_zero_is_info_nce(similarity, temperature):
    loss, gradient = value_and_grad(similarity, 0.0, temperature)
    logits = similarity.astype(np.float64) / temperature
    size = len(logits)
    rows = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    columns = logits - np.logaddexp.reduce(logits, axis=0)
    expected = -np.trace(rows + columns) / (2 * size)
    expected_gradient = (np.exp(rows) + np.exp(columns) - 2 * np.eye(size)) / (2 * size)
    # Differences of a logit and its logsumexp cancel, even in float64.
    floor = 1e-12 / temperature
    error = reference.logit_error(0, temperature, size)
    np.testing.assert_allclose(loss, expected, rtol=2 * error, atol=floor)
    np.testing.assert_allclose(
        gradient,
        expected_gradient / temperature,
        rtol=math.expm1(2 * error),
        atol=floor / temperature,
    )


def test_no_gradient_flows_through_the_weight():
    similarity = np.random.default_rng(0).uniform(-1, 1, (5, 5)).astype(np.float32)
    alpha, temperature, step = 9.0, 0.1, 1e-6

    def difference(i, j, detached):
        moved = [similarity.astype(np.float64) for _ in range(2)]
        moved[0][i, j] += step
        moved[1][i, j] -= step
        losses = [
            reference.symmetric_loss(
                m, alpha, temperature, weight=similarity.astype(np.float64) if detached else m
            )[0]
            for m in moved
        ]
        return (losses[0] - losses[1]) / (2 * step)

    _, gradient = value_and_grad(similarity, alpha, temperature)
    detached, attached = (
        np.array([[difference(i, j, d) for j in range(5)] for i in range(5)]) for d in (True, False)
    )
    # Central differences are off by step^2 times a third derivative of order 1/t^3, and by the
    # float64 rounding of a loss of order 10 over the step.
    np.testing.assert_allclose(gradient, detached, rtol=1e-4, atol=1e-7)
    assert np.abs(attached - detached).max() > 0.1


@hypothesis.given(masked_matrices(), alphas, temperatures, st.randoms(use_true_random=False))
def test_order_of_the_pairs_does_not_matter(case, alpha, temperature, random):
    similarity, valid = case
    order = np.array(random.sample(range(len(similarity)), len(similarity)))
    loss, gradient = value_and_grad(similarity, alpha, temperature, valid)
    permuted = value_and_grad(similarity[order][:, order], alpha, temperature, valid[order])
    error = reference.logit_error(alpha, temperature, len(similarity))
    reference.assert_close_loss(permuted[0], loss, error)
    reference.assert_close_gradient(permuted[1], np.asarray(gradient)[order][:, order], error)


@hypothesis.given(
    masked_matrices(), alphas, temperatures, st.sampled_from([np.nan, np.inf, -np.inf, 1e38, 0.5])
)
def test_empty_slots_have_no_influence(case, alpha, temperature, garbage):
    similarity, valid = case
    both = valid[:, None] & valid
    loss, gradient = value_and_grad(
        np.where(both, similarity, np.float32(garbage)), alpha, temperature, valid
    )
    assert not np.any(np.asarray(gradient)[~both])
    if not valid.any():
        assert loss == 0
        return
    kept, kept_gradient = value_and_grad(similarity[valid][:, valid], alpha, temperature)
    error = reference.logit_error(alpha, temperature, len(similarity))
    reference.assert_close_loss(loss, kept, error)
    reference.assert_close_gradient(np.asarray(gradient)[valid][:, valid], kept_gradient, error)


def test_empty_slots_have_no_influence_on_a_learned_temperature():
    similarity = np.random.default_rng(0).uniform(-1, 1, (5, 5)).astype(np.float32)
    valid = np.array([True, False, True, True, False])

    @jax.jit
    @jax.grad
    def slope(temperature, similarity):
        return hardness_weighted_contrastive_loss(similarity, temperature=temperature, valid=valid)

    garbage = np.where(valid[:, None] & valid, similarity, np.nan)
    assert slope(0.1, garbage) == slope(0.1, similarity) != 0


@hypothesis.given(
    masked_matrices(),
    st.floats(-FLOAT32_MAX, FLOAT32_MAX, width=32),
    st.floats(float(np.float32(1e-3)), 2.0**99, width=32),
)
@hypothesis.example((np.ones((6, 6), np.float32), np.ones(6, bool)), FLOAT32_MAX, 1e-3)
@hypothesis.example((np.ones((6, 6), np.float32), np.ones(6, bool)), -FLOAT32_MAX, 1e-3)
def test_nothing_overflows(case, alpha, temperature):
    similarity, valid = case
    loss, gradient = value_and_grad(similarity, alpha, temperature, valid)
    assert np.isfinite(loss)
    assert np.isfinite(gradient).all()
    # A row's softmax sums to at most 1: so does each half of the gradient, over the temperature.
    assert np.abs(gradient).sum() <= 2.001 / temperature
    if abs(alpha) <= 1e37:  # beyond, weights saturate
        expected, *_ = reference.symmetric_loss(similarity, alpha, temperature, valid)
        scale = 2 / temperature + abs(alpha) + 1
        assert abs(float(loss) - expected) <= 20 * reference.UNIT * scale


def test_nan_in_a_real_pair_is_not_hidden():
    similarity = np.eye(4, dtype=np.float32)
    similarity[1, 2] = np.nan
    assert np.isnan(value_and_grad(similarity, 9.0, 0.02)[0])


def test_half_precision_is_computed_in_float32():
    similarity = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (6, 6)), jnp.bfloat16)
    loss, gradient = value_and_grad(similarity, 9.0, 0.02)
    expected, _ = value_and_grad(similarity.astype(jnp.float32), 9.0, 0.02)
    assert loss == expected
    assert loss.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"similarity": np.zeros((3, 4))}, ValueError, r"\[N, N\].*\(3, 4\)"),
        ({"similarity": np.zeros(3)}, ValueError, r"\[N, N\].*\(3,\)"),
        ({"similarity": np.zeros((0, 0))}, ValueError, "N >= 1"),
        ({"valid": np.ones(2, bool)}, ValueError, r"\[3, 3\].*\(2,\)"),
        ({"valid": np.ones(3)}, TypeError, "bool"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive"),
        ({"temperature": -1.0}, ValueError, "temperature must be positive"),
        ({"temperature": math.nan}, ValueError, "temperature must be positive"),
        ({"alpha": math.inf}, ValueError, "alpha must be a finite float32"),
        ({"alpha": 1e39}, ValueError, "alpha must be a finite float32"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    arguments = {"similarity": np.zeros((3, 3)), **arguments}
    similarity = arguments.pop("similarity")
    with pytest.raises(error, match=message):
        jax.eval_shape(lambda s: hardness_weighted_contrastive_loss(s, **arguments), similarity)


def test_bad_margin_is_named():
    with pytest.raises(ValueError, match="margin must be a finite float32"):
        focal_contrastive_loss(np.zeros((3, 3)), margin=math.nan)
    with pytest.raises(ValueError, match="temperature must be positive"):
        focal_contrastive_loss(np.zeros((3, 3)), temperature=0.0)


def draw_rows(seed):
    """n rows of an n x m problem with hard-negative columns, empty slots and false negatives."""
    random = np.random.default_rng(seed)
    n, m = 4, 9
    similarity = random.uniform(-1, 1, (n, m)).astype(np.float32)
    positive = random.choice(m, n, replace=False)
    columns, negatives = random.random(m) < 0.8, random.random((n, m)) < 0.7
    rows = columns[positive]
    is_negative = rows[:, None] & columns & negatives & (np.arange(m) != positive[:, None])
    return similarity, positive, columns, negatives, rows, is_negative


@pytest.mark.parametrize("seed", range(8))
def test_rows_against_candidates_and_masks(seed):
    similarity, positive, columns, negatives, rows, is_negative = draw_rows(seed)

    @jax.jit
    def losses_of(similarity):
        formula = Hardness(alpha=9.0, temperature=0.1)
        masks = {
            "column_valid": jnp.asarray(columns),
            "can_be_negative": jnp.asarray(negatives),
        }
        return row_losses(similarity, jnp.asarray(positive), formula, **masks)

    losses, vjp = jax.vjp(losses_of, similarity)
    expected, gradient, _ = reference.rows_loss(similarity, positive, is_negative, 9.0, 0.1)
    error = reference.logit_error(9.0, 0.1, similarity.shape[1])
    reference.assert_close_loss(losses, np.where(rows, expected, 0), error)
    reference.assert_close_gradient(vjp(jnp.ones(4))[0], gradient * rows[:, None], error)


@pytest.mark.parametrize("seed", range(8))
def test_statistics_of_rows(seed):
    similarity, positive, columns, negatives, rows, is_negative = draw_rows(seed)
    similarity[:, 3] = similarity[:, 5]  # ties: the first maximum counts
    found = jax.jit(row_statistics)(
        similarity, positive, column_valid=columns, can_be_negative=negatives
    )
    for i, p in enumerate(positive):
        of_negatives = similarity[i][is_negative[i]]
        assert found.has_negative[i] == bool(len(of_negatives))
        assert found.positive[i] == (similarity[i, p] if rows[i] else 0)
        assert found.hard_negative[i] == max(of_negatives, default=0)
        assert found.easy_negative[i] == min(of_negatives, default=0)
        candidates = np.where(is_negative[i] | (np.arange(9) == p), similarity[i], -2)
        assert found.is_correct[i] == (rows[i] and np.argmax(candidates) == p)


def test_metrics_of_a_small_matrix():
    similarity = np.array(
        [[0.9, 0.2, 0.1, 9.0], [0.8, 0.8, -0.2, 9.0], [0.3, 0.4, 0.4, 9.0], [9.0, 9.0, 9.0, 9.0]],
        np.float32,
    )
    metrics = similarity_metrics(similarity, valid=np.array([True, True, True, False]))
    expected = {
        "positive_similarity": (0.9 + 0.8 + 0.4) / 3,
        "hard_negative_similarity": (0.2 + 0.8 + 0.4) / 3,
        "easy_negative_similarity": (0.1 - 0.2 + 0.3) / 3,
        "query_to_target_accuracy": 1 / 3,  # rows 1 and 2 have an equal candidate in front
        "target_to_query_accuracy": 3 / 3,  # column 1's maximum is on the diagonal, and unique
    }
    assert set(metrics) == set(expected)
    for name, value in expected.items():
        assert float(metrics[name]) == pytest.approx(value, abs=1e-6), name


def test_metrics_have_no_gradient_and_survive_an_empty_batch():
    similarity = np.full((3, 3), np.nan, np.float32)
    metrics = jax.jit(similarity_metrics)(similarity, valid=np.zeros(3, bool))
    assert all(value == 0 for value in metrics.values())
    gradient = jax.jit(jax.grad(lambda s: sum(similarity_metrics(s).values())))(np.eye(3))
    assert not np.any(gradient)


def golden_cases():
    cases = json.loads((GOLDEN / "loss.json").read_text())["cases"]
    return [case for case in cases if not case["key"].startswith("dist")]


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["key"])
def test_the_authors_losses_and_gradients(case):
    arrays = np.load(GOLDEN / "loss.npz")
    query, target, loss, d_query, d_target = (
        arrays[f"{case['key']}/{name}"]
        for name in ("query", "target", "loss", "grad_query", "grad_target")
    )

    def function(query, target):
        similarity = similarity_matrix(query, target)
        options = {"alpha": case["alpha"], "temperature": 1 / case["logit_scale"]}
        return hardness_weighted_contrastive_loss(similarity, **options)

    found, gradients = jax.jit(jax.value_and_grad(function, argnums=(0, 1)))(query, target)
    np.testing.assert_allclose(found, loss, rtol=1e-5, atol=1e-12)
    for gradient, expected in zip(gradients, (d_query, d_target), strict=True):
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())
