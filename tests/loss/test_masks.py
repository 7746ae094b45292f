"""Kinds of hardness, masks and temperatures together, on one device and on eight, against float64 NumPy."""

import functools

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llave_jax.loss.cross_device import HARDNESS_ON, contrastive_loss, make_formula
from llave_jax.loss.hardness import Hardness, row_losses, symmetric_loss
from llave_jax.loss.masks import Slots, can_be_negative
from tests.loss import loss_reference as reference
from tests.loss.test_cross_device import DIM, make_mesh

PAIRS, EXTRA = 16, 16
MESHES = {1: {"data": 1, "fsdp": 1}, 8: {"data": 2, "fsdp": 4}}
ALPHA = 3.0


def draw_pool(seed, pairs=PAIRS, extra=EXTRA):
    """Embeddings whose products are exact, so that every device and tile masks the same; all rules are used."""
    random = np.random.default_rng(seed)
    embeddings = random.normal(size=(2 * pairs + extra, DIM))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    # Multiples of 1/8: cosines are multiples of 1/64, and no limit is one.
    embeddings = (np.round(8 * embeddings) / 8).astype(np.float32)
    shards = 8
    owners = np.arange(pairs).reshape(shards, -1).repeat(extra // pairs, axis=1)
    return {
        "query": embeddings[:pairs],
        "target": embeddings[pairs : 2 * pairs],
        "extra": embeddings[2 * pairs :],
        "valid": random.random(pairs + extra) < 0.8,
        "ids": random.integers(0, 2 * pairs, pairs + extra).astype(np.int32),
        # In each shard, an extra target is of any of the shard's pairs.
        "owners": random.permuted(owners, axis=1).reshape(-1).astype(np.int32),
        "own_only": random.random(pairs) < 0.3,
        "temperature": random.choice([0.05, 0.1, 0.5], pairs).astype(np.float32),
        "mask_margin": np.float32(random.choice([-0.201, 0.101, 0.501])),
        "alpha": np.float32(ALPHA),
    }


# Rules, and the arguments that switch them on.
RULES = {
    "ids": lambda b: {"target_ids": b["ids"][:PAIRS], "extra_ids": b["ids"][PAIRS:]},
    "mask_margin": lambda b: {"mask_margin": b["mask_margin"]},
    "own_only": lambda b: {"own_negatives_only": b["own_only"], "extra_owners": b["owners"]},
    "temperature": lambda b: {"temperature": b["temperature"]},
    "owners": lambda b: {"extra_owners": b["owners"]},
}
ALL = ("ids", "mask_margin", "own_only", "temperature")


@functools.cache
def compiled_loss(devices, rules, hardness_on="all", kind="hardness", **options):
    """((loss, metrics), gradients by query, target, extra, temperature and alpha) of a `draw_pool`."""
    mesh = make_mesh(**MESHES[devices])

    def loss(trained, pool):
        pool = {**pool, **trained}
        settings = {"temperature": 0.1}
        for rule in rules:
            settings |= RULES[rule](pool)
        return contrastive_loss(
            pool["query"],
            pool["target"],
            pool["valid"][:PAIRS],
            extra_targets=pool["extra"],
            extra_valid=pool["valid"][PAIRS:],
            mesh=mesh,
            kind=kind,
            alpha=pool["alpha"],
            hardness_on=hardness_on,
            **settings,
            **options,
        )

    compiled = jax.jit(jax.value_and_grad(loss, has_aux=True))

    def run(pool):
        trained = {
            name: pool[name] for name in ("query", "target", "extra", "temperature", "alpha")
        }
        return compiled(trained, pool)

    return run


def expected_loss(pool, rules, hardness_on="all", kind="hardness", pools=None):
    """The same in float64 NumPy."""
    query = pool["query"].astype(np.float64)
    candidates = np.concatenate([pool["target"], pool["extra"]]).astype(np.float64)
    owners = np.concatenate([np.arange(PAIRS), pool["owners"]])
    rules = {
        "valid": pool["valid"],
        "ids": pool["ids"] if "ids" in rules else None,
        "mask_margin": float(pool["mask_margin"]) if "mask_margin" in rules else None,
        "own_only": pool["own_only"] if "own_only" in rules else None,
        "owners": owners,
        "pools": pools,
        "extra": EXTRA,
    } | ({"temperature": pool["temperature"].astype(np.float64)} if "temperature" in rules else {})
    temperature = rules.pop("temperature", 0.1)
    similarity = query @ candidates.T
    loss, gradient, by_number = reference.symmetric_loss(
        similarity,
        float(pool["alpha"]),
        temperature,
        margin=0.3 if kind == "focal" else None,
        hardness_on=hardness_on,
        **rules,
    )
    metrics = reference.similarity_metrics(similarity, **rules)
    metrics["infonce_loss"], *_ = reference.symmetric_loss(similarity, 0, temperature, **rules)
    d_candidates = gradient.T @ query
    by_temperature = by_number["temperature"] if np.ndim(temperature) else np.zeros(PAIRS)
    gradients = {
        "query": gradient @ candidates,
        "target": d_candidates[:PAIRS],
        "extra": d_candidates[PAIRS:],
        "temperature": by_temperature,
        "alpha": by_number.get("alpha", 0),
    }
    return (loss, metrics), gradients


def assert_equal(found, expected, kind="hardness"):
    # The smallest temperature; embeddings of rounded coordinates are at most 1.2 long.
    t, longest = 0.05, 1.5
    margin = 0.3 if kind == "focal" else None
    error = longest * reference.logit_error(
        ALPHA, t, PAIRS + EXTRA, similarity_error=DIM * reference.UNIT, margin=margin
    )
    (loss, metrics), gradients = found
    (expected_loss, expected_metrics), expected_gradients = expected
    reference.assert_close_loss(loss, expected_loss, error)
    reference.assert_close_loss(metrics["infonce_loss"], expected_metrics["infonce_loss"], error)
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    slope = (2 * longest + 0.3) / t
    largest = {"temperature": 2 * slope / t, "alpha": longest}
    for name, gradient in expected_gradients.items():
        np.testing.assert_allclose(
            gradients[name],
            gradient,
            rtol=0,
            atol=4 * error * largest.get(name, slope),
            err_msg=name,
        )


@pytest.mark.parametrize("tile_size", [None, 3])
@pytest.mark.parametrize(
    ("devices", "kind", "hardness_on"),
    [(8, "hardness", on) for on in HARDNESS_ON]
    + [(8, "focal", "all"), (1, "hardness", "explicit")],
)
def test_all_rules_together(devices, kind, hardness_on, tile_size):
    settings = {"kind": kind, "hardness_on": hardness_on}
    found = compiled_loss(devices, ALL, tile_size=tile_size, **settings)

    @hypothesis.settings(max_examples=15)
    @hypothesis.given(st.integers(0, 2**32 - 1), st.sampled_from(["", "none", "all"]))
    def check(seed, own_only):
        pool = draw_pool(seed)
        if own_only:
            pool["own_only"] = np.full(PAIRS, own_only == "all")
        assert_equal(found(pool), expected_loss(pool, ALL, **settings), kind)

    check()


@pytest.mark.parametrize("tile_size", [None, 3])
@pytest.mark.parametrize(
    ("rules", "hardness_on"),
    [
        (("mask_margin",), "all"),
        (("own_only",), "all"),
        (("temperature",), "all"),
        (("owners",), "explicit"),
        (("owners", "ids", "mask_margin"), "in_batch"),
    ],
    ids=str,
)
def test_rules_alone(rules, hardness_on, tile_size):
    found = compiled_loss(1, rules, hardness_on=hardness_on, tile_size=tile_size)
    plain = expected_loss(draw_pool(0), ())[0][0]
    for seed in range(3):
        pool = draw_pool(seed)
        expected = expected_loss(pool, rules, hardness_on)
        assert_equal(found(pool), expected)
        assert seed or abs(expected[0][0] / plain - 1) > 1e-2


@pytest.mark.parametrize("tile_size", [None, 1])
def test_owners_in_pools_of_one_device(tile_size):
    """Of one shard's pairs, numbered in the whole batch."""
    found = compiled_loss(
        8, ("own_only",), hardness_on="explicit", cross_device=False, tile_size=tile_size
    )
    pools = np.concatenate([np.arange(8).repeat(size // 8) for size in (PAIRS, EXTRA)])
    for seed in range(3):
        pool = draw_pool(seed)
        pool["own_only"][:] = seed == 0
        assert_equal(found(pool), expected_loss(pool, ("own_only",), "explicit", pools=pools))


@pytest.mark.parametrize("tile_size", [None, 3])
def test_a_row_whose_negatives_are_all_masked_has_no_loss(tile_size):
    pool = draw_pool(0)
    pool["mask_margin"] = np.float32(-9)
    (loss, _), gradients = compiled_loss(1, ALL, tile_size=tile_size)(pool)
    assert loss == 0
    assert not any(np.any(gradient) for gradient in gradients.values())


@pytest.mark.parametrize("tile_size", [None, 3])
def test_the_margin_hides_no_nan(tile_size):
    pool = draw_pool(0)
    pool["valid"][:] = True
    pool["extra"][3, 0] = np.nan
    assert np.isnan(compiled_loss(1, ("mask_margin",), tile_size=tile_size)(pool)[0][0])


def test_temperatures_of_pairs_in_the_pure_loss():
    similarity = np.random.default_rng(0).uniform(-1, 1, (5, 5)).astype(np.float32)
    temperatures = np.array([0.05, 0.1, 0.1, 0.5, 1.0], np.float32)

    def loss(similarity, temperatures):
        return symmetric_loss(similarity, Hardness(ALPHA, temperatures))

    values = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(similarity, temperatures)
    expected, by_similarity, by_number = reference.symmetric_loss(similarity, ALPHA, temperatures)
    np.testing.assert_allclose(values[0], expected, rtol=1e-5)
    np.testing.assert_allclose(values[1][0], by_similarity, atol=1e-5)
    np.testing.assert_allclose(values[1][1], by_number["temperature"], atol=1e-4)


def test_rules_on_a_matrix():
    """One row of each rule, by hand."""
    similarity = jnp.array([[0.5, 0.9, 0.1], [0.2, 0.3, 0.6]], jnp.float32)
    columns = Slots(ids=jnp.array([1, 2, 1], jnp.int32), owner=jnp.array([0, 1, 1], jnp.int32))
    rows = Slots(ids=columns.ids[:2], owner=columns.owner[:2])
    assert can_be_negative(similarity, Slots(), Slots()) is None
    found = can_be_negative(similarity, rows, columns)
    np.testing.assert_array_equal(found, [[False, True, False], [True, False, True]])
    limit = jnp.array([0.6, 0.4], jnp.float32)
    found = can_be_negative(similarity, Slots(limit=limit), Slots())
    np.testing.assert_array_equal(found, [[True, False, True], [True, True, False]])
    alone = rows._replace(ids=None, own_only=jnp.array([True, False]))
    found = can_be_negative(similarity, alone, columns._replace(ids=None))
    np.testing.assert_array_equal(found, [[True, False, False], [True, True, True]])


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hardness_on": "hard"}, ValueError, r"hardness_on is 'hard'; expected one of"),
        ({"kind": "focal", "hardness_on": "explicit"}, ValueError, "'focal' has no hardness"),
        ({"hardness_on": "explicit"}, ValueError, "extra_owners is needed"),
        ({"extra_owners": np.zeros(16, np.int32)}, ValueError, "extra_owners is needed"),
        ({"own_negatives_only": np.zeros(16, bool)}, ValueError, "extra_owners is needed"),
        ({"own_negatives_only": np.zeros(16)}, TypeError, "own_negatives_only must be bool"),
        ({"temperature": np.full(7, 0.1)}, ValueError, r"temperature has shape \(7,\)"),
        ({"temperature": np.array([0.1] * 15 + [0.0])}, ValueError, "temperature must be positive"),
    ],
)
def test_bad_arguments_are_named(options, error, message):
    pool = jax.tree.map(jnp.asarray, draw_pool(0))
    options = {k: jnp.asarray(v) if isinstance(v, np.ndarray) else v for k, v in options.items()}
    with pytest.raises(error, match=message):
        contrastive_loss(
            pool["query"],
            pool["target"],
            pool["valid"][:PAIRS],
            mesh=make_mesh(**MESHES[1]),
            extra_targets=pool["extra"],
            extra_valid=pool["valid"][PAIRS:],
            **options,
        )


def test_hardness_on_says_which_alpha():
    assert make_formula("hardness", 5.0, 0.1, 0.3) == Hardness(5.0, 0.1)
    assert make_formula("hardness", 5.0, 0.1, 0.3, "explicit") == Hardness(0.0, 0.1, 5.0)
    assert make_formula("hardness", 5.0, 0.1, 0.3, "in_batch") == Hardness(5.0, 0.1, 0.0)


@pytest.mark.parametrize("hardness_on", HARDNESS_ON)
def test_gradient_of_rows_stops_at_the_weight(hardness_on):
    """Only explicit entries, or only others, are weighed; the derivative is that of a fixed weight."""
    similarity = np.random.default_rng(0).uniform(-1, 1, (3, 6)).astype(np.float32)
    explicit = np.zeros((3, 6), bool)
    explicit[:, 3:] = np.eye(3, dtype=bool)
    formula = make_formula("hardness", ALPHA, 0.1, 0.3, hardness_on)

    def losses(similarity):
        return row_losses(
            similarity,
            jnp.arange(3),
            formula,
            column_valid=jnp.ones(6, bool),
            is_explicit=jnp.asarray(explicit),
        ).sum()

    weighs = {"all": explicit | True, "in_batch": ~explicit, "explicit": explicit}[hardness_on]
    is_negative = ~np.eye(3, 6, dtype=bool)
    weight = np.where(weighs, similarity, 0)
    expected, gradient, _ = reference.rows_loss(
        similarity, range(3), is_negative, ALPHA, 0.1, weight=weight
    )
    value, found = jax.jit(jax.value_and_grad(losses))(similarity)
    np.testing.assert_allclose(value, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(found, gradient, atol=1e-5)
