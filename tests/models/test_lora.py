"""Adapters on the model: the sum of two products is that of merged weights, forwards and backwards."""

import dataclasses
import math

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from llave_jax.inputs.batch import Budget
from llave_jax.inputs.item import Item
from llave_jax.inputs.packing import Packer
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.models import lora, parameters
from llave_jax.models.lora import AdaptedLlave, Lora
from llave_jax.parallel import sharding

# Float32 sums of a few hundred terms in another order, through a few layers.
TOLERANCE = 2e-5
EVERYTHING = ".*"


@pytest.fixture(scope="module")
def batch(golden, golden_model):
    """A text and an image, as two sides of a pair."""
    image = golden / "images" / "small.png"
    return pack(golden_model, [Item("A cat?"), Item("What?", images=(image,))])


@pytest.fixture(scope="module")
def texts(golden_model):
    """A batch without crops, for what one tower shows."""
    return pack(golden_model, [Item("A cat?"), Item("A dog and a cat.")])


def pack(golden_model, items):
    builder = SequenceBuilder(golden_model.tokenizer, golden_model.config.input_spec)
    pair = [builder(item) for item in items]
    budget = Budget(1, sum(map(len, pair)), sum(len(s.crops) for s in pair), 1)
    packer = Packer(budget, 1, golden_model.config.vision.crop)
    assert packer.add(pair)
    return packer.emit()[0]


def adapted(golden_model, *, pattern=EVERYTHING, seed=1, remat="none", **settings):
    """A model with adapters, and its parameters; B is not zero."""
    adapters = Lora(lora.find_modules(pattern), **{"rank": 3, "alpha": 2.0, **settings})
    model = AdaptedLlave(golden_model.config, lora=adapters, remat=remat)
    flat = {}
    for i, (path, x) in enumerate(sorted(lora.init_adapters(adapters, model.config).items())):
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), x.shape)
        flat[path] = x + 0.05 * noise
    base = sharding.flatten(golden_model.params)
    return model, base, flat


def embed(model, flat, batch):
    return model.apply({"params": sharding.unflatten(flat)}, batch)


def merged(model, base, adapters):
    """Weights with the adapters added, by an einsum over all layers at once."""
    flat = dict(base)
    for module in model.lora.modules:
        a, b = (adapters[f"{module}/{name}"] for name in (parameters.LORA_A, parameters.LORA_B))
        stacked = parameters.weight_at(f"{module}/kernel").stacked
        shape = base[f"{module}/kernel"].shape
        layers = shape[0] if stacked else 1
        a, b = a.reshape(layers, -1, a.shape[-1]), b.reshape(layers, a.shape[-1], -1)
        added = model.lora.scale * jnp.einsum("nir,nro->nio", a, b)
        flat[f"{module}/kernel"] = base[f"{module}/kernel"] + added.reshape(shape)
    return flat


@pytest.mark.slow
def test_embeddings_and_gradients_are_those_of_merged_weights(golden_model, batch):
    model, base, adapters = adapted(golden_model)
    direction = jax.random.normal(jax.random.key(3), (golden_model.config.text.hidden_size,))

    def loss_of(weights_of):
        def loss(adapters):
            vectors = embed(model, weights_of(adapters), batch)
            return jnp.sum(vectors @ direction), vectors

        return jax.jit(jax.value_and_grad(loss, has_aux=True))

    (_, found), gradient = loss_of(lambda adapters: base | adapters)(adapters)
    (_, expected), expected_gradient = loss_of(lambda adapters: merged(model, base, adapters))(
        adapters
    )
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    assert np.abs(np.asarray(found) - embed(model, base, batch)).max() > 1e-2
    for path, array in expected_gradient.items():
        error = np.linalg.norm(gradient[path] - array) / np.linalg.norm(array)
        assert error < 1e-4, path


def test_no_array_as_large_as_a_kernel_is_computed_for_the_gradient(golden_model, texts):
    model, base, adapters = adapted(golden_model, pattern="language_model/.*")
    config = golden_model.config.text
    kernel = (config.hidden_size, config.intermediate_size)

    def products(trained):
        def loss(trained):
            return jnp.sum(embed(model, base | adapters | trained, texts)[..., 0])

        found = []

        def visit(jaxpr):
            for equation in jaxpr.eqns:
                if equation.primitive.name == "dot_general":
                    found.append(equation.outvars[0].aval.shape)
                for inner in jax.extend.core.jaxprs_in_params(equation.params):
                    visit(inner)

        visit(jax.make_jaxpr(jax.grad(loss))(trained).jaxpr)
        return found

    assert kernel not in products(adapters)
    assert kernel in products({p: x for p, x in base.items() if p.endswith("kernel")})


def with_key(model, base, adapters, key):
    params = sharding.unflatten(base | adapters)
    return sharding.flatten(lora.with_dropout(model, params, jax.random.key(key)))


def test_dropout_is_a_function_of_its_key_and_scales_up_what_it_keeps(golden_model, texts):
    model, base, adapters = adapted(golden_model, dropout=0.4)
    embedded = jax.jit(lambda flat: embed(model, flat, texts))
    first, again, other = (embedded(with_key(model, base, adapters, n)) for n in (0, 0, 1))
    assert jnp.array_equal(first, again)
    assert jnp.abs(first - other).max() > 1e-3
    x = jnp.ones((50, 400))
    dropped = np.asarray(lora._dropped(x, jax.random.key_data(jax.random.key(0)), 0.4))
    assert set(np.unique(dropped)) == {0.0, np.float32(1 / 0.6)}
    # 20 000 draws of a variance of 0.24: four standard deviations.
    assert abs((dropped == 0).mean() - 0.4) < 4 * math.sqrt(0.24 / dropped.size)
    keys = with_key(model, base, adapters, 0)["language_model/layers/mlp/up_proj/lora_key"]
    assert len(np.unique(np.asarray(keys), axis=0)) == golden_model.config.text.num_layers


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["attention", "both"])
def test_dropout_is_the_same_where_it_is_computed_again(golden_model, texts, remat):
    def gradient(remat):
        pattern = "language_model/.*"
        model, base, adapters = adapted(golden_model, pattern=pattern, dropout=0.4, remat=remat)

        def loss(adapters):
            return jnp.sum(embed(model, with_key(model, base, adapters, 0), texts)[..., 0])

        return jax.jit(jax.grad(loss))(adapters)

    kept, again = gradient("none"), gradient(remat)
    for path, array in kept.items():
        assert np.linalg.norm(again[path] - array) < 1e-5 * np.linalg.norm(array), path


def test_new_adapters_change_nothing_and_differ_from_one_another(golden_model, texts):
    model, base, _ = adapted(golden_model)
    fresh = lora.init_adapters(model.lora, model.config)
    assert jnp.array_equal(embed(model, base | fresh, texts), embed(model, base, texts))
    matrices = [np.ravel(x)[:8] for path, x in fresh.items() if path.endswith("lora_a")]
    assert len(np.unique(matrices, axis=0)) == len(matrices)
    for module in model.lora.modules:
        kernel, a = base[f"{module}/kernel"], np.asarray(fresh[f"{module}/lora_a"])
        row = parameters.weight_at(f"{module}/kernel")
        inputs = kernel.shape[row.stacked : row.stacked + parameters.input_axes(row)]
        # Uniform within 1 / sqrt(inputs), as torch draws it for peft.
        bound = 1 / math.sqrt(math.prod(inputs))
        assert 0.9 * bound < np.abs(a).max() <= bound


@pytest.mark.parametrize("module", parameters.linear_maps())
def test_rows_of_adapters_follow_from_their_kernels(golden_model, module):
    shapes = parameters.adapter_shapes([module], 5, golden_model.config)
    kernel = parameters.weight_at(f"{module}/kernel")
    whole = parameters.parameter_shapes(golden_model.config)[f"{module}/kernel"]
    (a_path, a), (b_path, b) = shapes.items()
    rows = [parameters.weight_at(path) for path in (a_path, b_path)]
    assert all(row.stacked == kernel.stacked and row.decay for row in rows)
    stack = kernel.stacked
    assert a[:stack] == b[:stack] == whole[:stack]
    assert (*a[stack:-1], *b[stack + 1 :]) == whole[stack:]
    assert a[-1] == b[stack] == 5
    assert (*rows[0].axes[:-1], *rows[1].axes[1:]) == kernel.axes
    assert (rows[0].axes[-1], rows[1].axes[0]) == (None, None)


def test_patterns_match_whole_paths():
    assert lora.find_modules("language_model/.*/(q|v)_proj") == (
        "language_model/layers/self_attn/q_proj",
        "language_model/layers/self_attn/v_proj",
    )
    assert not any("patch" in path or "embed" in path for path in lora.find_modules(".*"))
    with pytest.raises(
        ValueError, match=r"lora.targets 'q_proj' matches no module; there are lang"
    ):
        lora.find_modules("q_proj")


def test_only_adapters_are_kept_where_there_are_some(golden_model):
    model, base, adapters = adapted(golden_model)
    kept = lora.adapters_of(sharding.unflatten(base | adapters))
    assert sharding.flatten(kept).keys() == adapters.keys()
    assert sharding.flatten(lora.adapters_of(golden_model.params)).keys() == base.keys()
    assert dataclasses.replace(model.lora, rslora=True, rank=4).scale == 1.0
