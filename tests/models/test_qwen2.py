"""The language model at single tokens against itself at all tokens; golden values are test_golden's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llave_jax.models.config import PRESETS
from llave_jax.models.qwen2 import Qwen2, take_tokens
from llave_jax.ops import attention
from llave_jax.planning import flops


@pytest.mark.parametrize(("layers", "remat", "at_once"), [(1, "none", None), (3, "block", 3)])
def test_pooled_tokens_are_those_of_all_tokens(layers, remat, at_once, monkeypatch):
    """Values and gradients, for tokens in any row, several of one segment, unused ones."""
    if at_once is not None:
        monkeypatch.setattr(attention, "MAX_MASKED_SCORES", 0)
        monkeypatch.setattr(attention, "MAX_COPIED_KEYS", at_once * 16)
    config = dataclasses.replace(PRESETS["tiny"].text, num_layers=layers)
    shards, rows, length = 2, 3, 16
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(shards, rows, length, config.hidden_size)), jnp.float32)
    segments = np.sort(rng.integers(1, 4, (shards, rows, length)))
    segments[:, 1, 10:] = 0
    positions = jnp.broadcast_to(jnp.arange(length), segments.shape)
    segments = jnp.asarray(segments)
    query_indices = jnp.array([[0, 5, 15, 30], [47, 47, 16, 29]])
    cotangent = jnp.asarray(rng.normal(size=(shards, 4, config.hidden_size)), jnp.float32)
    model = Qwen2(config, remat=remat)

    def by_row(array):
        return jnp.asarray(array).reshape(shards * rows, *array.shape[2:])

    arguments = (by_row(positions), by_row(segments))
    params = jax.jit(model.init)(jax.random.key(0), by_row(x), *arguments)

    def all_tokens(params, x):
        out = model.apply(params, by_row(x), *arguments)
        return take_tokens(out.reshape(shards, rows * length, -1), query_indices)

    def pooled(params, x):
        return model.apply(params, x, positions, segments, query_indices, method=Qwen2.pooled)

    @functools.partial(jax.jit, static_argnums=0)
    def values_and_gradients(function, params, x):
        out, pull = jax.vjp(function, params, x)
        return out, pull(cotangent)

    actual, gradients = values_and_gradients(pooled, params, x)
    expected, expected_gradients = values_and_gradients(all_tokens, params, x)
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)
    both = (jax.tree.leaves(gradients), jax.tree.leaves(expected_gradients))
    for a, e in zip(*both, strict=True):
        np.testing.assert_allclose(a, e, atol=1e-5 * max(1, float(jnp.abs(e).max())))


def test_last_layer_computes_no_more_than_it_needs():
    """XLA's count of operations of one layer, against that of flops.py."""
    preset = PRESETS["tiny"]
    config = dataclasses.replace(preset.text, num_layers=1)
    model, tokens = Qwen2(config), 256
    x = jnp.zeros((1, 1, tokens, config.hidden_size))
    ids = jnp.ones((1, 1, tokens), jnp.int32)
    params = model.init(jax.random.key(0), x[0], ids[0], ids[0])

    def pooled(x):
        return model.apply(params, x, ids, ids, jnp.array([[255]]), method=Qwen2.pooled)

    counted = jax.jit(pooled).lower(x).compile().cost_analysis()["flops"]
    necessary = flops.text_forward(dataclasses.replace(preset, text=config), np.array([tokens]))
    # Norms, rotations and the softmax are counted too.
    assert necessary < counted < 1.6 * necessary
