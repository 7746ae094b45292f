"""The loss over a mesh, held as a matrix or in tiles, against the whole batch on one device."""

import functools
import json

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from llave_jax.loss import cross_device
from llave_jax.loss.cross_device import contrastive_loss
from tests.conftest import GOLDEN
from tests.loss import loss_reference as reference

DIM = 6


@functools.cache
def make_mesh(**sizes):
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    types = (AxisType.Auto,) * len(sizes)
    return jax.make_mesh(tuple(sizes.values()), tuple(sizes), axis_types=types, devices=devices)


def draw_batch(seed, pairs, extra=0):
    """Random unit embeddings, empty slots (all of the first shard's among them), repeated ids."""
    random = np.random.default_rng(seed)
    embeddings = random.normal(size=(2 * pairs + extra, DIM)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    valid = random.random(pairs + extra) < 0.7
    valid[: pairs // 8] = False
    return {
        "query": embeddings[:pairs],
        "target": embeddings[pairs : 2 * pairs],
        "extra": embeddings[2 * pairs :],
        "valid": valid,
        "ids": random.integers(0, pairs // 2 + 1, pairs + extra).astype(np.int32),
    }


# The numbers of the two formulas; all are traced, and all have a gradient.
HARDNESS = {"alpha": 9.0, "temperature": 0.1}
FOCAL = {"margin": 0.3, "temperature": 0.1}


@functools.cache
def compiled_loss(mesh, axes, *, extra=False, ids=False, **options):
    """((loss, metrics), gradients) as a function of a batch of `draw_batch` and a formula's numbers.

    Gradients are those by query, target, extra and {name: number}.
    """

    def loss(embeddings, numbers, valid, ids_of):
        query, target, extras = embeddings
        pairs = len(query)
        more = dict(options)
        if extra:
            more |= {"extra_targets": extras, "extra_valid": valid[pairs:]}
        if ids:
            more |= {"target_ids": ids_of[:pairs]}
        if ids and extra:
            more |= {"extra_ids": ids_of[pairs:]}
        if "margin" in numbers:
            more |= {"kind": "focal"}
        return contrastive_loss(
            query, target, valid[:pairs], mesh=mesh, axes=axes, **numbers, **more
        )

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))

    def run(b, numbers=HARDNESS):
        embeddings = b["query"], b["target"], b["extra"]
        value, (gradients, by_number) = compiled(embeddings, numbers, b["valid"], b["ids"])
        return value, (*gradients, by_number)

    return run


def whole_batch(batch, numbers=HARDNESS, *, extra=False, ids=False, shards=None):
    """((loss, metrics), gradients) of the whole batch in float64 NumPy.

    shards: None for one pool, else a pool for each of so many shards.
    """
    query, target = (batch[name].astype(np.float64) for name in ("query", "target"))
    pairs = len(query)
    width = len(batch["valid"]) if extra else pairs
    candidates = np.concatenate([target, batch["extra"]])[:width]
    options = {
        "valid": batch["valid"][:width],
        "ids": batch["ids"][:width] if ids else None,
        "extra": width - pairs,
        "pools": None,
    }
    if shards:
        sizes = (pairs, len(batch["valid"]) - pairs)
        pools = [np.repeat(np.arange(shards), size // shards) for size in sizes]
        options["pools"] = np.concatenate(pools)[:width]
    similarity = query @ candidates.T
    loss, gradient, by_number = reference.symmetric_loss(
        similarity, **{"alpha": 0.0, **numbers}, **options
    )
    metrics = reference.similarity_metrics(similarity, **options)
    temperature = numbers["temperature"]
    metrics["infonce_loss"], _, _ = reference.symmetric_loss(similarity, 0, temperature, **options)
    d_candidates = gradient.T @ query
    d_extra = d_candidates[pairs:] if extra else np.zeros_like(batch["extra"])
    return (loss, metrics), (gradient @ candidates, d_candidates[:pairs], d_extra, by_number)


def assert_equal_loss(found, expected, numbers=HARDNESS, width=40):
    """Equal but for the rounding of float32, with DIM-term dot products of unit vectors."""
    t, margin = numbers["temperature"], numbers.get("margin")
    error = reference.logit_error(
        numbers.get("alpha", 0), t, width, similarity_error=DIM * reference.UNIT, margin=margin
    )
    (loss, metrics), (*gradients, by_number) = found
    (expected_loss, expected_metrics), (*expected_gradients, expected_by_number) = expected
    reference.assert_close_loss(loss, expected_loss, error)
    assert set(metrics) == set(expected_metrics)
    plain_error = reference.logit_error(0, t, width, similarity_error=DIM * reference.UNIT)
    reference.assert_close_loss(
        metrics["infonce_loss"], expected_metrics["infonce_loss"], plain_error
    )
    for name in metrics.keys() - {"infonce_loss"}:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], atol=1e-6, err_msg=name)
    # Of a logit, relative to the positive's, by similarities and by numbers.
    slope = (1 if margin is None else 2 + margin) / t
    by = {"alpha": 1, "margin": 1 / t, "temperature": 2 * slope / t}
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        # A sum of `width` terms of either sign and at most `slope` (over the pairs: the mean) each.
        np.testing.assert_allclose(gradient, expected_gradient, rtol=0, atol=4 * error * slope)
    assert set(by_number) == set(expected_by_number) == set(numbers)
    for name, value in by_number.items():
        # Means over rows of means, by probability, of what is at most `by[name]`.
        np.testing.assert_allclose(
            value, expected_by_number[name], rtol=0, atol=4 * error * by[name], err_msg=name
        )


# One device is below, in tiles; 2 and 4 devices are compared with the authors' numbers.
MESHES = [
    ({"data": 8}, ("data",)),
    ({"data": 2, "fsdp": 4}, ("data", "fsdp")),
    ({"data": 4, "fsdp": 2}, ("data", "fsdp")),
    ({"data": 2, "fsdp": 2, "tensor": 2}, ("data", "fsdp")),
]


@pytest.mark.parametrize("tile_size", [None, 3])
@pytest.mark.parametrize(
    ("sizes", "axes", "numbers"),
    [*((*mesh, HARDNESS) for mesh in MESHES), (*MESHES[-1], FOCAL)],
    ids=str,
)
def test_every_mesh_gives_the_loss_of_the_whole_batch(sizes, axes, tile_size, numbers):
    loss = compiled_loss(make_mesh(**sizes), axes, extra=True, ids=True, tile_size=tile_size)
    for seed in range(3):
        batch = draw_batch(seed, pairs=16, extra=8)
        expected = whole_batch(batch, numbers, extra=True, ids=True)
        assert_equal_loss(loss(batch, numbers), expected, numbers)


@pytest.mark.parametrize("tile_size", [None, 3])
def test_numbers_are_not_part_of_the_program(tile_size):
    loss = compiled_loss(make_mesh(data=8), ("data",), extra=True, ids=True, tile_size=tile_size)
    batch = draw_batch(0, pairs=16, extra=8)

    @hypothesis.settings(max_examples=20)
    @hypothesis.given(st.floats(-20, 20, width=32), st.sampled_from([0.02, 0.1, 1.0]))
    def check(alpha, temperature):
        numbers = {"alpha": alpha, "temperature": temperature}
        expected = whole_batch(batch, numbers, extra=True, ids=True)
        assert_equal_loss(loss(batch, numbers), expected, numbers)

    check()


@pytest.mark.parametrize("tile_size", [None, 3])
@pytest.mark.parametrize(
    ("sizes", "axes", "numbers", "options"),
    [
        (*MESHES[0], HARDNESS, {}),
        (*MESHES[-1], HARDNESS, {"extra": True, "ids": True}),
        (*MESHES[-1], FOCAL, {"extra": True, "ids": True}),
    ],
    ids=str,
)
def test_pools_of_one_device(sizes, axes, tile_size, numbers, options):
    shards = int(np.prod([sizes[axis] for axis in axes]))
    loss = compiled_loss(
        make_mesh(**sizes), axes, tile_size=tile_size, cross_device=False, **options
    )
    for seed in range(3):
        batch = draw_batch(seed, pairs=4 * shards, extra=2 * shards)
        expected = whole_batch(batch, numbers, shards=shards, **options)
        assert_equal_loss(loss(batch, numbers), expected, numbers)


@pytest.mark.parametrize("tile_size", [None, 3])
def test_full_pools_of_one_device_are_averaged_over_the_devices(tile_size):
    """As the authors do: the mean over devices of the means over their own rows."""
    batch = draw_batch(0, pairs=32)
    batch["valid"][:] = True
    loss = compiled_loss(make_mesh(data=8), ("data",), tile_size=tile_size, cross_device=False)
    parts = [{k: v[i : i + 4] for k, v in batch.items()} for i in range(0, 32, 4)]
    own = [whole_batch(part)[0][0] for part in parts]
    np.testing.assert_allclose(loss(batch)[0][0], np.mean(own), rtol=1e-5)
    assert abs(np.mean(own) / whole_batch(batch)[0][0] - 1) > 0.1


@pytest.mark.parametrize("options", [{"extra": True}, {"ids": True}], ids=str)
@pytest.mark.parametrize("tile_size", [None, 3])
def test_options_alone(options, tile_size):
    loss = compiled_loss(make_mesh(data=4), ("data",), tile_size=tile_size, **options)
    batch = draw_batch(0, pairs=16, extra=8)
    assert_equal_loss(loss(batch), whole_batch(batch, **options))


@pytest.mark.parametrize("tile_size", [None, 3])
def test_of_equal_candidates_the_first_is_the_answer(tile_size):
    batch = draw_batch(0, pairs=16)
    axis = np.arange(16) % DIM  # unit vectors: equal similarities are equal to the last bit
    batch["target"] = np.eye(DIM, dtype=np.float32)[axis]
    axis[0] = 1
    batch["query"] = np.eye(DIM, dtype=np.float32)[axis]
    batch["valid"][[0, 1]] = True
    loss = compiled_loss(make_mesh(data=2, fsdp=2), ("data", "fsdp"), tile_size=tile_size)
    (expected, metrics), gradients = whole_batch(batch)
    assert 0 < metrics["query_to_target_accuracy"] < 1
    assert 0 < metrics["target_to_query_accuracy"] < 1
    assert_equal_loss(loss(batch), ((expected, metrics), gradients))


@pytest.mark.parametrize("tile_size", [1, 6, 64])
def test_tiles_equal_the_matrix(tile_size):
    mesh = make_mesh(data=1)
    held = compiled_loss(mesh, ("data",), extra=True, ids=True)
    tiles = compiled_loss(mesh, ("data",), extra=True, ids=True, tile_size=tile_size)

    @hypothesis.settings(max_examples=20)
    @hypothesis.given(
        st.integers(0, 2**32 - 1),
        st.lists(st.booleans(), min_size=20, max_size=20),
        st.lists(st.integers(0, 5), min_size=20, max_size=20),
        st.sets(st.integers(0, 12)),
    )
    def check(seed, valid, ids, duplicates):
        batch = draw_batch(seed, pairs=13, extra=7)
        batch["valid"] = np.array(valid)
        batch["ids"] = np.array(ids, np.int32)
        batch["target"][list(duplicates)] = batch["target"][0]
        for name in ("query", "target", "extra"):  # exact products: ties are ties in every tile
            batch[name] = np.round(8 * batch[name]) / 8
        assert_equal_loss(tiles(batch), held(batch))

    check()


@pytest.mark.parametrize("alpha", [-4.0, 1e4, 3e38])
def test_tiles_take_hardness_of_any_size(alpha):
    batch = draw_batch(1, pairs=16, extra=8)
    numbers = HARDNESS | {"alpha": alpha}
    loss = compiled_loss(make_mesh(data=2), ("data",), tile_size=3)
    found = loss(batch, numbers)
    (value, _), gradients = found
    assert np.isfinite(value)
    assert all(np.isfinite(gradient).all() for gradient in jax.tree.leaves(gradients))
    if abs(alpha) < 10:
        assert_equal_loss(found, whole_batch(batch, numbers), numbers)
    elif abs(alpha) < 1e30:
        (expected, _), _ = whole_batch(batch, numbers)
        assert abs(float(value) - expected) <= 4 * DIM * reference.UNIT * (2 / 0.1 + abs(alpha))


@pytest.mark.parametrize("tile_size", [None, 3])
def test_empty_slots_have_no_influence_whatever_they_hold(tile_size):
    loss = compiled_loss(make_mesh(data=4), ("data",), extra=True, tile_size=tile_size)
    batch = draw_batch(2, pairs=16, extra=8)
    expected = loss(batch)
    empty = ~batch["valid"]
    for garbage in (np.nan, np.inf, 1e38):
        batch["query"][empty[:16]] = garbage
        batch["target"][empty[:16]] = -garbage
        batch["extra"][empty[16:]] = garbage
        found = loss(batch)
        jax.tree.map(np.testing.assert_array_equal, found, expected)
    for gradient, slots in zip(found[1][:3], (empty[:16], empty[:16], empty[16:]), strict=True):
        assert not np.asarray(gradient)[slots].any()


@pytest.mark.parametrize("tile_size", [None, 3])
def test_nothing_valid_gives_zero(tile_size):
    loss = compiled_loss(make_mesh(data=4), ("data",), extra=True, tile_size=tile_size)
    batch = draw_batch(3, pairs=16, extra=8)
    batch["valid"][:] = False
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(loss(batch)))


@pytest.mark.parametrize("tile_size", [None, 3])
def test_nan_in_a_real_pair_is_not_hidden(tile_size):
    loss = compiled_loss(make_mesh(data=4), ("data",), extra=True, tile_size=tile_size)
    batch = draw_batch(3, pairs=16, extra=8)
    batch["valid"][5] = True
    batch["query"][5, 0] = np.nan
    assert np.isnan(loss(batch)[0][0])


def golden_cases():
    cases = json.loads((GOLDEN / "loss.json").read_text())["cases"]
    return [case for case in cases if case["key"].startswith("dist")]


@pytest.mark.parametrize("tile_size", [None, 3])
@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["key"])
def test_the_authors_losses_and_gradients_over_processes(case, tile_size):
    arrays = np.load(GOLDEN / "loss.npz")
    query, target, loss, d_query, d_target = (
        arrays[f"{case['key']}/{name}"]
        for name in ("query", "target", "mean_loss", "grad_query_mean", "grad_target_mean")
    )
    pairs = np.concatenate(query), np.concatenate(target)
    batch = {
        "query": pairs[0],
        "target": pairs[1],
        "extra": np.zeros((0, case["d"]), np.float32),
        "valid": np.ones(len(pairs[0]), bool),
        "ids": np.zeros(len(pairs[0]), np.int32),
    }
    function = compiled_loss(
        make_mesh(data=case["world"]),
        ("data",),
        tile_size=tile_size,
    )
    numbers = {"alpha": case["alpha"], "temperature": 1 / case["logit_scale"]}
    (found, _), gradients = function(batch, numbers)
    np.testing.assert_allclose(found, loss, rtol=1e-5)
    for gradient, expected in zip(gradients, (d_query, d_target), strict=False):
        expected = np.concatenate(expected)
        np.testing.assert_allclose(gradient, expected, atol=1e-5 * np.abs(expected).max())


def test_sharded_inputs_stay_sharded():
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    sharding = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    batch = draw_batch(0, pairs=16)
    placed = {name: jax.device_put(array, sharding) for name, array in batch.items()}
    found = compiled_loss(mesh, ("data", "fsdp"))(placed)
    assert_equal_loss(found, whole_batch(batch))
    assert found[1][0].sharding.is_equivalent_to(sharding, 2)


def test_half_precision_embeddings_are_compared_in_float32():
    batch = draw_batch(0, pairs=16)
    halves = {name: jnp.asarray(batch[name], jnp.bfloat16) for name in ("query", "target")}
    (loss, _), gradients = compiled_loss(make_mesh(data=2), ("data",), tile_size=3)(batch | halves)
    exact = {name: np.asarray(array, np.float32) for name, array in halves.items()}
    (expected, _), _ = whole_batch(batch | exact)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert gradients[0].dtype == jnp.bfloat16


def test_a_large_pool_is_computed_without_its_matrix():
    pairs = 2 * int(cross_device.MAX_MATRIX_SIZE**0.5)
    mesh = make_mesh(data=1)
    shape = jax.ShapeDtypeStruct((pairs, DIM), jnp.float32)

    def loss(query, target):
        return contrastive_loss(query, target, jnp.ones(pairs, bool), mesh=mesh, axes=("data",))[0]

    compiled = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(shape, shape).compile()
    block = 4 * cross_device.TILE_SIZE**2
    assert compiled.memory_analysis().temp_size_in_bytes < 8 * block < 4 * pairs**2


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": np.zeros((8, 5))}, ValueError, r"\(8, 4\) and \(8, 5\)"),
        ({"query": np.zeros((2, 4, 4))}, ValueError, r"\[N, D\]"),
        ({"valid": np.ones(7, bool)}, ValueError, r"8 pairs, but valid has shape \(7,\)"),
        ({"valid": np.ones(8)}, TypeError, "valid must be bool"),
        ({"axes": ("data", "rows")}, ValueError, r"('data',).*\('data', 'rows'\)"),
        ({"extra_targets": np.zeros((2, 4))}, ValueError, "go together"),
        (
            {"extra_targets": np.zeros((3, 4)), "extra_valid": np.ones(3, bool)},
            ValueError,
            "3 extra targets do not split evenly over 2 shards",
        ),
        (
            {"extra_targets": np.zeros((2, 3)), "extra_valid": np.ones(2, bool)},
            ValueError,
            r"extra_targets must be \[Y, 4\]",
        ),
        (
            {
                "extra_targets": np.zeros((2, 4)),
                "extra_valid": np.ones(2, bool),
                "target_ids": np.zeros(8, np.int32),
            },
            ValueError,
            "extra_ids is needed",
        ),
        ({"target_ids": np.zeros(4, np.int32)}, ValueError, "target_ids has shape"),
        ({"temperature": 0.0}, ValueError, "temperature"),
        ({"alpha": float("nan")}, ValueError, "alpha"),
        ({"kind": "focal", "margin": float("inf")}, ValueError, "margin"),
        ({"kind": "infonce"}, ValueError, r"kind is 'infonce'; expected one of"),
        ({"tile_size": 0}, ValueError, "tile_size"),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    batch = {"query": np.zeros((8, 4)), "target": np.zeros((8, 4)), "valid": np.ones(8, bool)}
    arrays = {
        k: jnp.asarray(v) if isinstance(v, np.ndarray) else v
        for k, v in {**batch, **arguments}.items()
    }
    options = {"mesh": make_mesh(data=2), "axes": ("data",), **arrays}
    with pytest.raises(error, match=message):
        contrastive_loss(**options)
