"""Attention: every implementation against the formula, with values, gradients and masks.

Kernels run in interpret mode, on any machine; for TPUs they are also compiled in
test_compile_ahead.py.
"""

import collections
import functools

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu

from llave_jax.models.config import PRESETS
from llave_jax.models.remat import REMATS
from llave_jax.models.siglip import SiglipTower
from llave_jax.ops import attention as attention_lib
from llave_jax.ops import gpu_attention, tpu_attention
from llave_jax.ops.attention import attention, masked_attention, xla_attention
from llave_jax.ops.cpu_attention import blockwise_attention
from llave_jax.ops.gpu_attention import triton_attention
from llave_jax.ops.tpu_attention import LANES, Blocks, splash_attention
from llave_jax.parallel import sharding

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


@functools.cache
def compiled_attention(implementation, causal):
    return jax.jit(functools.partial(attention, causal=causal, implementation=implementation))


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.sampled_from([1, 40]),
    repeats=st.sampled_from([1, 3]),
    causal=st.booleans(),
    implementation=st.sampled_from(["xla", "blockwise"]),
)
@settings(max_examples=15)
def test_plain_forms_are_the_formula(seed, length, repeats, causal, implementation):
    rng = np.random.default_rng(seed)
    inputs = make_inputs(rng, 2, length, 2 * repeats, 2, 8)
    segments = make_segments(rng, 2, length)
    used = np.asarray(segments) > 0
    attend = compiled_attention(implementation, causal)
    actual = attend(*inputs, segment_ids=segments)
    expected = formula(*inputs, segments, causal)
    np.testing.assert_allclose(actual[used], expected[used], atol=TOLERANCE)
    alone = attend(*inputs)
    one_segment = np.ones((2, length))
    np.testing.assert_allclose(alone, formula(*inputs, one_segment, causal), atol=TOLERANCE)


@pytest.mark.slow
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
    monkeypatch.setattr("llave_jax.ops.attention.QUERY_BLOCK", 64)
    (_, actual), gradients = compute(*inputs)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
    for g, e in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(g, e, atol=TOLERANCE)


def assert_is_the_reference(kernel, inputs, segments, *, causal, **options):
    """Values and gradients of a kernel, at the tokens that are used."""
    used = (np.asarray(segments) > 0)[..., None, None]
    rng = np.random.default_rng(0)
    cotangent = jnp.asarray(rng.normal(size=inputs[0].shape) * used, jnp.float32)

    def run(function, **options):
        @jax.jit
        def both(inputs, segments, cotangent):
            def attend(*inputs):
                return function(*inputs, segments, causal=causal, **options)

            out, pull = jax.vjp(attend, *inputs)
            return out, pull(cotangent)

        out, gradients = both(inputs, segments, cotangent)
        return jnp.where(used, out, 0), gradients

    expected, expected_gradients = run(xla_attention)
    actual, gradients = run(kernel, **options)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
    for name, g, e in zip("qkv", gradients, expected_gradients, strict=True):
        assert np.linalg.norm(g - e) < TOLERANCE * np.linalg.norm(e), name


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
    segments = make_segments(rng, 1, length) if causal else jnp.ones((1, length), jnp.int32)
    assert_is_the_reference(KERNELS[kernel], inputs, segments, causal=causal, interpret=True)


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32 - 1),
    length=st.sampled_from([64, 333]),
    heads=st.sampled_from([(14, 2), (2, 2)]),
    ids=st.sampled_from(["ascending", "any"]),
    causal=st.booleans(),
)
@settings(max_examples=12)
def test_blockwise_is_the_reference(seed, length, heads, ids, causal):
    """Rows that end anywhere in a block, segments over several blocks, and segments that do not ascend."""
    rng = np.random.default_rng(seed)
    inputs = make_inputs(rng, 3, length, *heads, 16)
    segments = make_segments(rng, 3, length)
    if ids == "any":
        segments = jnp.asarray(rng.integers(0, 3, segments.shape), jnp.int32)
    assert_is_the_reference(blockwise_attention, inputs, segments, causal=causal)


def test_blockwise_looks_at_no_other_segments():
    """Values that are NaN spoil the blocks that hold a token of their segment; the others never read them."""
    inputs = make_inputs(np.random.default_rng(0), 1, 4096, 7, 1, 8)
    segments = jnp.repeat(jnp.arange(1, 5), 1024)[None]
    query, key, value = inputs
    value = value.at[0, :1024].set(jnp.nan)

    def run(query, key, value):
        out = blockwise_attention(query, key, value, segments, causal=True)
        return out[:, 1280:].sum(), out

    gradients, out = jax.grad(run, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    assert np.isnan(out[0, :1024]).all()
    assert np.isfinite(out[0, 1280:]).all()
    assert all(np.isfinite(g[0, 1280:]).all() for g in gradients)


@pytest.mark.parametrize(("heads", "groups"), [(14, 2), (6, 6), (12, 1)])
def test_splash_serves_any_number_of_heads(heads, groups, short_blocks):
    """Several groups to a step, several steps to a group, and more than one where that is possible."""
    rng = np.random.default_rng(heads)
    inputs = make_inputs(rng, 2, 200, heads, groups, 8)
    segments = make_segments(rng, 2, 200)
    assert_is_the_reference(splash_attention, inputs, segments, causal=True, interpret=True)
    splits = tpu_attention._splits(groups, heads // groups)
    chosen = tpu_attention.Heads.of(heads // (groups * splits), groups * splits)
    assert chosen.queries * chosen.chunks == heads
    assert chosen.chunks > 1
    assert chosen.queries <= tpu_attention.MAX_HEADS


@pytest.fixture
def short_blocks(monkeypatch):
    """So that a short row has many."""
    monkeypatch.setattr(tpu_attention, "QUERY_BLOCK", LANES)
    monkeypatch.setattr(tpu_attention, "KEY_BLOCK", 2 * LANES)
    monkeypatch.setattr(tpu_attention, "MAX_SINGLE_BLOCK", LANES)


@pytest.mark.parametrize(("length", "max_segment_length"), [(1200, 350), (1280, None)])
def test_splash_skips_blocks_of_other_segments(length, max_segment_length, short_blocks):
    """And needs memory for the longest segment only."""
    rng = np.random.default_rng(length)
    inputs = make_inputs(rng, 2, length, 2, 1, 32)
    ends = np.array([[130, 256, 600, 920], [90, 95, 384, 384]])
    segments = (np.arange(length) >= ends[..., None]).sum(1) + 1
    segments = np.where(segments == 5, 0, segments).astype(np.int32)
    visited = tpu_attention.visited_scores(
        segments, causal=True, max_segment_length=max_segment_length
    )
    assert visited < 0.35 * segments.size * length
    slots = tpu_attention._slots(2, Blocks.of(length), True, max_segment_length)
    assert slots == (5 if max_segment_length is None else 2)
    options = {"max_segment_length": max_segment_length, "interpret": True}
    assert_is_the_reference(splash_attention, inputs, jnp.asarray(segments), causal=True, **options)


def test_splash_reads_nothing_it_did_not_write(short_blocks):
    """On a simulated chip whose memory holds NaN to begin with."""
    rng = np.random.default_rng(0)
    inputs = make_inputs(rng, 2, 500, 2, 1, 64)
    segments = make_segments(rng, 2, 500)
    chip = pltpu.InterpretParams(uninitialized_memory="nan")
    assert_is_the_reference(
        splash_attention, inputs, segments, causal=True, max_segment_length=500, interpret=chip
    )


def test_splash_gives_nan_for_segments_longer_than_said(short_blocks):
    inputs = make_inputs(np.random.default_rng(0), 1, 600, 2, 1, 8)
    segments = jnp.ones((1, 600), jnp.int32)
    out = splash_attention(*inputs, segments, causal=True, max_segment_length=100, interpret=True)
    assert np.isnan(out).all()


def test_splash_is_reached_through_attention(monkeypatch):
    """With the length of the longest segment, which the other implementations do without."""
    given = {}

    def record(query, *inputs, **options):
        given.update(options)
        return query

    monkeypatch.setitem(attention_lib.KERNELS, "splash", record)
    query = jnp.zeros((1, 256, 2, 8))
    attention(query, query, query, causal=True, max_segment_length=100, implementation="splash")
    assert given == {"causal": True, "max_segment_length": 100}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("remat", "runs"), [("block", 2), ("attention", 1)])
def test_rematerialisation_keeps_what_it_says(kernel, remat, runs):
    """How often the forward kernel runs for one gradient."""
    inputs = make_inputs(np.random.default_rng(0), 1, 128, 2, 1, 32)
    segments = jnp.ones((1, 128), jnp.int32)

    def loss(*inputs):
        return jnp.sum(jnp.sin(KERNELS[kernel](*inputs, segments, causal=True)))

    kept = jax.checkpoint(loss, policy=REMATS[remat].block_policy)
    program = jax.make_jaxpr(jax.grad(kept, argnums=(0, 1, 2)))(*inputs)
    kernels = collections.Counter(kernels_used(program.jaxpr))
    assert kernels.pop(f"{kernel}_causal_fwd") == runs
    backward = {"splash": ["bwd"], "triton": ["bwd_queries", "bwd_keys"]}[kernel]
    assert kernels == {f"{kernel}_causal_{name}": 1 for name in backward}


def kernels_used(program):
    """Names of the kernels called whose results something reads: XLA drops the others."""
    read = {variable for e in program.eqns for variable in e.invars if not hasattr(variable, "val")}
    read.update(variable for variable in program.outvars if not hasattr(variable, "val"))
    for equation in program.eqns:
        if equation.primitive.name == "pallas_call":
            if not read.isdisjoint(equation.outvars):
                yield equation.params["name"]
            continue
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from kernels_used(inner)


@functools.cache
def compiled_plan(blocks, causal, max_segment_length):
    return jax.jit(
        functools.partial(
            tpu_attention.plan_visits, causal=causal, max_segment_length=max_segment_length
        )
    )


@given(
    seed=st.integers(0, 2**32 - 1),
    in_order=st.booleans(),
    causal=st.booleans(),
    blocks=st.sampled_from([(4, 4), (4, 8), (2, 8)]),
    max_segment_length=st.sampled_from([None, 24]),
)
def test_plan_visits_what_is_visible_and_keeps_gradients_apart(
    seed, in_order, causal, blocks, max_segment_length
):
    query_block, key_block = blocks
    rng = np.random.default_rng(seed)
    ids = np.asarray(make_segments(rng, 2, 48))
    if max_segment_length is not None:
        # No segment is longer, and one row is not used at all.
        ids = np.stack(
            [np.zeros(48, np.int32), np.minimum(np.arange(48) // max_segment_length + 1, 2)]
        )
    elif not in_order:
        ids = rng.permuted(ids, axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tpu_attention, "LANES", 1)
        patch.setattr(tpu_attention, "QUERY_BLOCK", query_block)
        patch.setattr(tpu_attention, "KEY_BLOCK", key_block)
        patch.setattr(tpu_attention, "MAX_SINGLE_BLOCK", 0)
        plan = compiled_plan(blocks, causal, max_segment_length)(ids)
        slots = tpu_attention._slots(2, Blocks.of(48), causal, max_segment_length)
    plan = jax.tree.map(np.asarray, plan)
    visits = list(zip(plan.row, plan.query, plan.key, strict=True))[: plan.count]

    visible = (ids[:, :, None] == ids[:, None, :]) & ((ids > 0)[:, None, :])
    if causal:
        visible &= np.tri(48, dtype=bool)
    shape = (2, 48 // query_block, query_block, 48 // key_block, key_block)
    exact = {tuple(visit) for visit in np.argwhere(visible.reshape(shape).any((2, 4)))}
    assert len(set(visits)) == len(visits)
    assert exact <= set(visits)
    if in_order or max_segment_length is not None:
        # Beyond those only blocks with unused tokens, with their own.
        assert all((ids[row, q * query_block : (q + 1) * query_block] == 0).any()
                   for row, q, _ in set(visits) - exact)  # fmt: skip
    assert {visit[:2] for visit in visits} == {(r, q) for r in (0, 1) for q in range(shape[1])}

    # What the kernels do with the tables.
    open_query, holder, closed = None, {}, []
    for n, (row, query, key) in enumerate(visits):
        assert bool(plan.first[n]) == (open_query is None)
        open_query = (row, query)
        slot = plan.slot[n]
        assert slot < slots
        if plan.key_first[n]:
            assert slot not in holder
            holder[slot] = (row, key)
        assert holder[slot] == (row, key)
        if plan.key_last[n]:
            assert (plan.done_row[n], plan.done_key[n]) == holder.pop(slot)
            closed.append((row, key))
        if plan.last[n]:
            assert plan.last[n] == 1
            open_query = None
        elif n + 1 < len(visits):
            assert visits[n + 1][:2] == (row, query)
    assert open_query is None
    assert not holder
    assert sorted(closed) == [(r, k) for r in (0, 1) for k in range(shape[3])]
    # The block announced changes only after the last visit of the one before.
    announced = list(zip(plan.done_row, plan.done_key, strict=True))[: plan.count]
    changes = [n for n in range(1, len(visits)) if announced[n] != announced[n - 1]]
    assert all(plan.key_last[n - 1] for n in changes)


@given(
    seed=st.integers(0, 2**32 - 1),
    in_order=st.booleans(),
    causal=st.booleans(),
    tile=st.sampled_from([(4, 4), (4, 8), (8, 4), (5, 7)]),
)
def test_triton_reads_every_block_with_a_visible_score(seed, in_order, causal, tile):
    """And between sequences packed in order, at most the blocks that hold an end of two."""
    rng = np.random.default_rng(seed)
    ids = np.asarray(make_segments(rng, 2, 50))
    if not in_order:
        ids = rng.permuted(ids, axis=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gpu_attention, "MIN_DOT_SIZE", 4)
        tile = gpu_attention.Tile(*tile, 1, 1)
        needed = gpu_attention._needed(
            gpu_attention._distinct(jnp.asarray(ids)), tile, causal=causal
        )
    visible = (ids[:, :, None] == ids[:, None, :]) & ((ids > 0)[:, None, :])
    if causal:
        visible &= np.tri(50, dtype=bool)
    blocks = -(-50 // tile.query), -(-50 // tile.key)
    widths = ((0, 0), (0, blocks[0] * tile.query - 50), (0, blocks[1] * tile.key - 50))
    exact = np.pad(visible, widths).reshape(2, blocks[0], tile.query, blocks[1], tile.key)
    exact = exact.any((2, 4))
    for which, blocks in ((needed, exact), (needed.swapaxes(1, 2), exact.swapaxes(1, 2))):
        runs = np.asarray(gpu_attention._runs(which))
        index = np.arange(blocks.shape[2])
        read = (runs[..., :1] <= index) & (index < runs[..., 1:])
        assert not (blocks & ~read).any()
        assert read.any(2).all()
        if in_order:
            # Beyond those only blocks with unused tokens.
            unused = np.pad(ids == 0, ((0, 0), (0, 50)))
            size = tile.query if which is needed else tile.key
            row, block, _ = np.nonzero(read & ~blocks)
            assert all(
                unused[r, b * size : (b + 1) * size].any() for r, b in zip(row, block, strict=True)
            )


def test_triton_computes_little_between_sequences():
    ids = np.repeat(np.arange(1, 9), 3000)[None].astype(np.int32)
    needed = 8 * 3000 * 3001 / 2
    for head_dim in (64, 128):
        visited = gpu_attention.visited_scores(ids, causal=True, head_dim=head_dim)
        assert needed < visited < 1.12 * needed
        unused = gpu_attention.visited_scores(np.zeros_like(ids), causal=True, head_dim=head_dim)
        assert unused < 0.2 * needed


@pytest.mark.parametrize(
    ("head_dim", "expected"),
    [(8, [(0, 16)]), (64, [(0, 64)]), (72, [(0, 64), (64, 16)]), (128, [(0, 128)])],
)
def test_triton_works_on_heads_in_powers_of_two(head_dim, expected):
    assert gpu_attention._parts(head_dim) == tuple(expected)


@pytest.mark.parametrize("kernel", KERNELS)
def test_vision_tower_pads_crops_for_kernels(kernel, monkeypatch):
    interpreted = {
        name: lambda *x, f=function, **o: f(*x, interpret=True, **o)
        for name, function in KERNELS.items()
    }
    monkeypatch.setattr("llave_jax.ops.attention.KERNELS", interpreted)
    patches = jnp.asarray(np.random.default_rng(0).integers(0, 255, (3, 4, 432), np.uint8))
    config = PRESETS["tiny"].vision
    zero_crops = jnp.array([False, True, False])
    params = SiglipTower(config).init(jax.random.key(0), patches, zero_crops)
    expected = SiglipTower(config).apply(params, patches, zero_crops)
    actual = SiglipTower(config, attention=kernel).apply(params, patches, zero_crops)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [*KERNELS, "blockwise"])
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
    used = np.asarray(segments) > 0
    np.testing.assert_allclose(actual[used], expected[used], atol=TOLERANCE)
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
    for name in ("fwd", "bwd_queries", "bwd_keys"):
        assert f"triton_causal_{name}" in text


@given(st.integers(1, 20_000))
def test_blocks_divide_the_padded_row(length):
    blocks = Blocks.of(length)
    assert blocks.length % blocks.key == 0
    assert blocks.key % blocks.query == 0
    assert blocks.query % LANES == 0
    assert 0 <= blocks.length - length < blocks.key


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


def test_annotations_of_shapes_are_checked_while_tests_run():
    """The import hook of conftest.py is at work: otherwise annotations could say anything."""
    query, key = jnp.zeros((1, 8, 2, 4)), jnp.zeros((1, 9, 2, 4))
    with pytest.raises(jaxtyping.TypeCheckError, match="visible"):
        masked_attention(query, key, key, jnp.ones((1, 9, 8), bool))
