"""Mesh and placement: parameters by their axes, and activations that stay with their batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from llave_jax.models.config import PRESETS
from llave_jax.models.llave import Llave, abstract_params, param_shardings
from llave_jax.models.parameters import weight_at
from llave_jax.parallel import sharding
from llave_jax.parallel.sharding import param_spec
from llave_jax.training import optim
from llave_jax.training.state import init_state, state_shardings


def mesh_of(data, fsdp, tensor):
    return sharding.make_mesh({"data": data, "fsdp": fsdp, "tensor": tensor})


@pytest.mark.parametrize("preset", PRESETS)
def test_every_parameter_has_a_place(preset):
    params = abstract_params(Llave(PRESETS[preset]))
    places = sharding.flatten(param_shardings(params, mesh_of(2, 4, 1)))
    shapes = sharding.flatten(params)
    whole = sum(leaf.size for path, leaf in shapes.items() if "fsdp" not in places[path].spec)
    # What is kept whole on every device is negligible.
    assert whole < 0.02 * sum(leaf.size for leaf in shapes.values())


def test_optimizer_state_lies_with_its_parameters():
    mesh = mesh_of(1, 4, 2)
    params = abstract_params(Llave(PRESETS["tiny"]))
    multipliers = optim.lr_multipliers(list(sharding.flatten(params)), ((".*", 1.0),))
    optimizer = optim.make_optimizer(1e-3, multipliers)
    state = jax.eval_shape(lambda p: init_state(p, optimizer, multipliers), params)
    places = state_shardings(state, mesh)
    by_path = sharding.flatten(places.params)
    moments = [
        (path[-1].key, place)
        for path, place in jax.tree_util.tree_leaves_with_path(places.opt_state)
        if hasattr(path[-1], "key")
    ]
    assert len(moments) == 2 * len(by_path)
    assert all(place == by_path[key] for key, place in moments)


def test_axes_that_do_not_divide_leave_a_dimension_whole():
    mesh = mesh_of(1, 2, 4)
    axes = weight_at("language_model/layers/self_attn/k_proj/kernel").axes
    assert param_spec(axes, (3, 64, 2, 16), mesh) == PartitionSpec(None, "fsdp", None, None)
    assert param_spec(axes, (3, 64, 4, 16), mesh) == PartitionSpec(None, "fsdp", "tensor", None)


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("fsdp", "fsdp"), "split two dimensions over one axis"),
        (("fsdp", None, None), "3 mesh axes .* for a parameter"),
    ],
)
def test_wrong_axes_are_refused(axes, message):
    with pytest.raises(ValueError, match=message):
        param_spec(axes, (8, 8), mesh_of(2, 4, 1))


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({"data": -1, "fsdp": 1, "tensor": 1}, (8, 1, 1)),
        ({"data": 2, "fsdp": -1, "tensor": 2}, (2, 2, 2)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2)),
    ],
)
def test_mesh(axes, expected):
    assert tuple(sharding.make_mesh(axes).shape.values()) == expected


@pytest.mark.parametrize(
    "axes",
    [
        {"data": 3, "fsdp": 1, "tensor": 1},
        {"data": -1, "fsdp": 3, "tensor": 1},
        {"data": -1, "fsdp": -1, "tensor": 1},
        {"data": 16, "fsdp": 1, "tensor": 1},
    ],
)
def test_mesh_must_use_all_devices(axes):
    with pytest.raises(ValueError, match="does not use 8 devices"):
        sharding.make_mesh(axes)


def test_mesh_must_fit_the_links_of_the_slice(monkeypatch):
    def refuse(*arguments, **options):
        raise NotImplementedError("Failed to find assignment for logical_axis_index 1 of size 4")

    monkeypatch.setattr(jax, "make_mesh", refuse)
    with pytest.raises(ValueError, match=r"'data': 2, 'fsdp': 4.*does not fit the slice's links"):
        sharding.make_mesh({"data": 2, "fsdp": 4, "tensor": 1})


def test_mesh_axes_have_names():
    with pytest.raises(ValueError, match=r"axes are \['batch'\]; expected"):
        sharding.make_mesh({"batch": 8})


def test_batches_lie_on_their_shards():
    mesh = mesh_of(2, 2, 2)
    assert sharding.num_shards(mesh) == 4
    assert sharding.local_shards(mesh) == range(4)
    batch = np.arange(3 * 4 * 5).reshape(3, 4, 5)
    placed = sharding.device_put_batch(batch, mesh, leading_axes=1)
    np.testing.assert_array_equal(placed, batch)
    for shard in placed.addressable_shards:
        assert shard.data.shape == (3, 1, 5)


def test_parameters_are_gathered_and_gradients_go_back():
    """Products see whole parameters, in the dtype they were cast to; no activation travels."""
    mesh = mesh_of(1, 8, 1)
    axes = weight_at("language_model/layers/mlp/gate_proj/kernel").axes
    x = jax.device_put(jnp.ones((16, 64)), sharding.batch_sharding(mesh))
    spec = param_spec(axes, (64, 128), mesh)
    place = jax.sharding.NamedSharding(mesh, spec)
    kernel = jax.device_put(jnp.ones((64, 128)), place)

    def loss(kernel, x):
        with sharding.use_mesh(mesh):
            x = sharding.constrain_rows(x)
            whole = sharding.gather_for_use(kernel.astype(jnp.bfloat16), axes)
            y = sharding.constrain_rows(x.astype(jnp.bfloat16) @ whole)
        return jnp.sum(y.astype(jnp.float32) ** 2)

    step = jax.jit(jax.grad(loss), out_shardings=place)
    np.testing.assert_allclose(step(kernel, x), np.full((64, 128), 2 * 16 * 64.0))
    text = step.lower(kernel, x).compile().as_text()
    gathers = [line for line in text.splitlines() if " all-gather(" in line]
    assert len(gathers) == 1
    assert "[64,128]" in gathers[0] or "[8,8,128]" in gathers[0]
    assert "all-to-all" not in text
