"""Attention: every implementation against the formula, with values, gradients and masks.

Kernels run in interpret mode, on any machine; for TPUs they are also compiled in
test_compile_ahead.py.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llave_jax import sharding
from llave_jax.models.config import PRESETS
from llave_jax.models.layers import REMAT_POLICIES
from llave_jax.models.siglip import SiglipTower
from llave_jax.ops import splash
from llave_jax.ops.attention import attention, xla_attention
from llave_jax.ops.splash import LARGEST_BLOCK, TILE, splash_attention, tiling
from llave_jax.ops.triton import triton_attention

# Rounding of float32 sums over at most 1000 terms of order 1.
TOLERANCE = 2e-5
KERNELS = {"splash": splash_attention, "triton": triton_attention}


def formula(query, key, value, segment_ids, causal):
    """softmax(q k^T / sqrt(D) + mask) v, in float64, head by head and row by row."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    batch, length, heads, head_dim = query.shape
    out = np.zeros(query.shape)
    for b in range(batch):
        seen = np.asarray(segment_ids)[b, :, None] == np.asarray(segment_ids)[b, None, :]
        if causal:
            seen &= np.tri(length, dtype=bool)
        for h in range(heads):
            g = h * key.shape[2] // heads
            scores = query[b, :, h] @ key[b, :, g].T / np.sqrt(head_dim)
            weights = np.where(seen, np.exp(scores - scores.max()), 0)
            out[b, :, h] = weights / weights.sum(1, keepdims=True) @ value[b, :, g]
    return out


def make_inputs(rng, batch, length, heads, groups, head_dim):
    def normal(h):
        return jnp.asarray(rng.normal(size=(batch, length, h, head_dim)), jnp.float32)

    return normal(heads), normal(groups), normal(groups)


def make_segments(rng, batch, length):
    """Runs of ids 1, 2, ..., then 0 for unused tokens."""
    ids = np.zeros((batch, length), np.int32)
    for row in ids:
        ends = np.sort(rng.integers(1, length + 1, size=rng.integers(1, 5)))
        for segment, start in enumerate([0, *ends[:-1]]):
            row[start : ends[segment]] = segment + 1
    return jnp.asarray(ids)


@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.sampled_from([1, 40]),
    repeats=st.sampled_from([1, 3]),
    causal=st.booleans(),
)
@settings(max_examples=15)
def test_xla_is_the_formula(seed, length, repeats, causal):
    rng = np.random.default_rng(seed)
    inputs = make_inputs(rng, 2, length, 2 * repeats, 2, 8)
    segments = make_segments(rng, 2, length)
    actual = attention(*inputs, segment_ids=segments, causal=causal, implementation="xla")
    np.testing.assert_allclose(actual, formula(*inputs, segments, causal), atol=TOLERANCE)
    alone = attention(*inputs, causal=causal, implementation="xla")
    one_segment = np.ones((2, length))
    np.testing.assert_allclose(alone, formula(*inputs, one_segment, causal), atol=TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
def test_xla_in_blocks_is_xla(causal, monkeypatch):
    rng = np.random.default_rng(0)
    inputs = make_inputs(rng, 1, 150, 4, 2, 8)
    segments = make_segments(rng, 1, 150)

    def weighted(query, key, value):
        out = xla_attention(query, key, value, segments, causal=causal)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    compute = jax.value_and_grad(weighted, argnums=(0, 1, 2), has_aux=True)
    (_, expected), expected_gradients = compute(*inputs)
    monkeypatch.setattr("llave_jax.ops.attention.BLOCK", 64)
    (_, actual), gradients = compute(*inputs)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
    for g, e in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(g, e, atol=TOLERANCE)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("length", "heads", "groups", "head_dim", "causal"),
    [
        pytest.param(1000, 2, 1, 64, True, id="0.5b"),
        pytest.param(300, 3, 1, 128, True, id="2b-ragged"),
        pytest.param(729, 1, 1, 72, False, id="siglip"),
        pytest.param(40, 2, 1, 32, True, id="tiny"),
    ],
)
def test_kernel_is_the_reference(kernel, length, heads, groups, head_dim, causal):
    rng = np.random.default_rng(length)
    inputs = make_inputs(rng, 1, length, heads, groups, head_dim)
    segments = make_segments(rng, 1, length) if causal else jnp.zeros((1, length), jnp.int32)
    cotangent = jnp.asarray(rng.normal(size=inputs[0].shape), jnp.float32)

    def run(function, **options):
        out, pull = jax.vjp(lambda *x: function(*x, segments, causal=causal, **options), *inputs)
        return out, pull(cotangent)

    expected, expected_gradients = jax.jit(lambda: run(xla_attention))()
    actual, gradients = jax.jit(lambda: run(KERNELS[kernel], interpret=True))()
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
    for name, g, e in zip("qkv", gradients, expected_gradients, strict=True):
        assert np.linalg.norm(g - e) < TOLERANCE * np.linalg.norm(e), name


@pytest.mark.parametrize("length", [600, 700], ids=["5-blocks", "6-blocks"])
def test_splash_skips_blocks_of_other_segments(length, monkeypatch):
    """Short blocks, so that a row has many that are not needed, in both kernels."""
    monkeypatch.setattr(splash, "LARGEST_BLOCK", TILE)
    rng = np.random.default_rng(length)
    inputs = make_inputs(rng, 2, length, 2, 1, 32)
    ends = np.array([[130, 256, 300, 520], [90, 95, 384, 384]])
    segments = (np.arange(length) >= ends[..., None]).sum(1) + 1
    segments = jnp.asarray(np.where(segments == 5, 0, segments), jnp.int32)
    forward, backward = splash.visited_shares(segments)
    assert forward < 0.45
    assert backward < 0.55
    cotangent = jnp.asarray(rng.normal(size=inputs[0].shape), jnp.float32)

    def run(function, **options):
        out, pull = jax.vjp(lambda *x: function(*x, segments, causal=True, **options), *inputs)
        return out, pull(cotangent)

    expected, expected_gradients = jax.jit(lambda: run(xla_attention))()
    actual, gradients = jax.jit(lambda: run(splash.splash_attention, interpret=True))()
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
    for name, g, e in zip("qkv", gradients, expected_gradients, strict=True):
        assert np.linalg.norm(g - e) < TOLERANCE * np.linalg.norm(e), name


@pytest.mark.parametrize(("policy", "runs"), [("full", 2), ("attention", 1)])
def test_rematerialisation_keeps_what_it_says(policy, runs):
    """How often the forward kernel runs for one gradient."""
    inputs = make_inputs(np.random.default_rng(0), 1, 128, 2, 1, 32)
    segments = jnp.ones((1, 128), jnp.int32)

    def loss(*inputs):
        return jnp.sum(jnp.sin(splash_attention(*inputs, segments, causal=True)))

    kept = jax.checkpoint(loss, policy=REMAT_POLICIES[policy])
    program = str(jax.make_jaxpr(jax.grad(kept, argnums=(0, 1, 2)))(*inputs))
    assert len(re.findall(r"name=splash_mha_fwd\w+", program)) == runs
    assert len(re.findall(r"name=splash_mha_dkv\w+", program)) == 1


@given(
    seed=st.integers(0, 2**32 - 1),
    in_order=st.booleans(),
    blocks=st.sampled_from([(4, 4), (4, 8), (8, 4)]),
)
def test_needed_blocks_are_those_with_visible_keys(seed, in_order, blocks):
    """Exactly those for segments as packed, with unused tokens as one more; never fewer otherwise."""
    query_block, key_block = blocks
    rng = np.random.default_rng(seed)
    ids = np.asarray(make_segments(rng, 1, 48))[0]
    if not in_order:
        ids = rng.permutation(ids)
    visible = (ids[:, None] == ids[None, :]) & np.tri(48, dtype=bool)
    exact = visible.reshape(48 // query_block, query_block, 48 // key_block, key_block).any((1, 3))
    needed = np.asarray(splash.needed_blocks(jnp.asarray(ids), query_block, key_block))
    assert (needed >= exact).all()
    if in_order:
        np.testing.assert_array_equal(needed, exact)


@pytest.mark.parametrize("kernel", KERNELS)
def test_vision_tower_pads_crops_for_kernels(kernel, monkeypatch):
    interpreted = {
        name: lambda *x, f=function, **o: f(*x, interpret=True, **o)
        for name, function in KERNELS.items()
    }
    monkeypatch.setattr("llave_jax.ops.attention.KERNELS", interpreted)
    patches = np.random.default_rng(0).integers(0, 255, (3, 4, 432), np.uint8)
    config = PRESETS["tiny"].vision
    params = SiglipTower(config).init(jax.random.key(0), patches)
    expected = SiglipTower(config).apply(params, patches)
    actual = SiglipTower(config, attention=kernel).apply(params, patches)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("groups", [2, 1], ids=["heads-split", "heads-whole"])
def test_kernels_run_on_a_mesh(kernel, groups, monkeypatch):
    """Each device on its rows, and on its heads where the tensor axis divides them."""
    interpreted = {
        name: lambda *x, f=function, **o: f(*x, interpret=True, **o)
        for name, function in KERNELS.items()
    }
    monkeypatch.setattr("llave_jax.ops.attention.KERNELS", interpreted)
    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    rng = np.random.default_rng(0)
    inputs = make_inputs(rng, 4, 64, 2, groups, 16)
    segments = make_segments(rng, 4, 64)

    @jax.jit
    def run(*inputs):
        with sharding.use_mesh(mesh):
            return attention(*inputs, segment_ids=segments, causal=True, implementation=kernel)

    expected = xla_attention(*inputs, segments, causal=True)
    actual = run(*jax.device_put(inputs, sharding.batch_sharding(mesh)))
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
    assert actual.sharding.spec[0] == sharding.BATCH_AXES


@pytest.mark.skipif(
    jax.__version_info__ >= (0, 11),
    reason="this jax lowers Triton kernels only for a GPU that is there or described",
)
def test_triton_kernel_is_accepted_by_its_compiler():
    """Lowered for a GPU, forward and backward, which checks the kernel but does not run it."""
    shape = jax.ShapeDtypeStruct((1, 4096, 14, 64), jnp.bfloat16)
    keys = jax.ShapeDtypeStruct((1, 4096, 2, 64), jnp.bfloat16)
    segments = jax.ShapeDtypeStruct((1, 4096), jnp.int32)

    def loss(query, key, value, segments):
        return triton_attention(query, key, value, segments, causal=True).astype(jnp.float32).sum()

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(shape, keys, keys, segments)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert text.count("mha_forward") >= 1
    assert text.count("mha_backward") >= 1


@given(st.integers(1, 20_000))
def test_blocks_divide_the_padded_row(length):
    block, padded = tiling(length)
    assert padded % block == 0
    assert block % TILE == 0
    assert 0 < block <= LARGEST_BLOCK
    assert 0 <= padded - length < TILE * padded // block


def test_what_does_not_fit_is_refused():
    query, key = jnp.zeros((1, 8, 3, 4)), jnp.zeros((1, 8, 2, 4))
    with pytest.raises(ValueError, match=r"3 query heads do not divide by 2"):
        attention(query, key, key, causal=True)
    with pytest.raises(ValueError, match=r"expected one of"):
        attention(query, query, query, causal=True, implementation="flash")
    with pytest.raises(ValueError, match=r"segment_ids must be \(1, 8\)"):
        attention(query, query, query, segment_ids=jnp.zeros((1, 7), int), causal=True)
    with pytest.raises(ValueError, match=r"must agree"):
        attention(query, key, key[:, :4], causal=True)
