"""The table of weights against the modules, which make the parameters, and what it is asked for."""

import re

import jax
import jax.numpy as jnp
import pytest

from llave_jax.models.config import PRESETS
from llave_jax.models.llave import Llave, abstract_params, example_batch, param_shardings
from llave_jax.models.parameters import (
    WEIGHTS,
    decay_mask,
    layer_shape,
    parameter_shapes,
    weight_at,
)
from llave_jax.parallel import sharding

PATHS = [weight.path for weight in WEIGHTS if weight.path]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("preset", PRESETS)
def test_modules_make_the_parameters_of_the_table(preset, dtype):
    """Paths, shapes and dtypes, at full size."""
    config = PRESETS[preset]
    model = Llave(config, param_dtype=dtype)
    batch = example_batch(config)
    made = jax.eval_shape(lambda key: model.init(key, batch), jax.random.key(0))["params"]
    assert abstract_params(model) == made
    assert sharding.flatten(made).keys() == set(PATHS)


@pytest.mark.parametrize("path", PATHS)
def test_every_dimension_has_a_mesh_axis_or_none(path):
    weight = weight_at(path)
    config = PRESETS["llave-7b"]
    assert len(weight.axes) == len(layer_shape(weight, config))
    assert set(weight.axes) <= {None, "fsdp", "tensor"}
    assert not weight.stacked or re.search(r"/layers/", path)


def test_weight_decay_is_for_matrices_and_embeddings():
    mask = decay_mask(parameter_shapes(PRESETS["tiny"]))
    assert mask == {
        path: path.endswith(("kernel", "embed_tokens/embedding", "position_embedding"))
        for path in PATHS
    }


def test_parameters_without_a_row_are_an_error():
    mesh = sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})
    params = {"adapter": {"kernel": jax.ShapeDtypeStruct((8, 8), jnp.float32)}}
    for use in (decay_mask, lambda flat: param_shardings(sharding.unflatten(flat), mesh)):
        with pytest.raises(ValueError, match="'adapter/kernel' has no row in the table of weights"):
            use(sharding.flatten(params))
