"""Checkpoints: the optimiser's state is found again by name, whatever order a library keeps it in."""

from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from llave_jax.parallel import sharding
from llave_jax.training import optim
from llave_jax.training.checkpoint import Checkpoints
from llave_jax.training.state import TrainState

PARAMS = {
    "image_newline": np.ones(3, np.float32),
    "projector": {"linear_1": {"kernel": np.ones((2, 3), np.float32)}},
}
FACTORS = {"projector/linear_1/kernel": 1.0, "image_newline": 0.5}


def iterator():
    return iter(grain.MapDataset.range(10).to_iter_dataset())


def trained(optimizer, steps=3):
    """State after a few steps of different gradients."""
    params = sharding.flatten(PARAMS)
    opt_state = optimizer.init(params)
    for step in range(steps):
        gradient = {path: jnp.full(x.shape, 0.1 * (step + 1)) for path, x in params.items()}
        updates, opt_state = optimizer.update(gradient, opt_state, params)
        params = optax.apply_updates(params, updates)
    return TrainState(jnp.int32(steps), sharding.unflatten(params), opt_state)


def target_of(state):
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), state)


def save(workdir, state):
    checkpoints = Checkpoints(workdir, keep=1)
    checkpoints.save(state, iterator())
    checkpoints.close()


def restore(workdir, target):
    checkpoints = Checkpoints(workdir, keep=1)
    try:
        return checkpoints.restore(target, iterator())
    finally:
        checkpoints.close()


def adamw():
    return optim.make_optimizer(1e-2, FACTORS, weight_decay=0.1)


class Reordered(NamedTuple):
    """Adam's state as a later version of its library might order it."""

    nu: Any
    mu: Any
    count: Any


def reordered_adamw():
    """As `adamw`; the fields of Adam's state come in another order, as do the parts."""
    optimizer = adamw()

    def init(params):
        state = optimizer.init(params)
        adam = state["adam"]
        moved = Reordered(adam.nu, adam.mu, adam.count)
        return {"learning_rate": state["learning_rate"], **state, "adam": moved}

    return optax.GradientTransformation(init, lambda *_: None)


def test_moments_are_not_swapped_by_a_new_order_of_fields(tmp_path):
    state = trained(adamw())
    save(tmp_path, state)
    target = target_of(TrainState(state.step, state.params, reordered_adamw().init(FLAT)))
    found = restore(tmp_path, target)
    assert int(found.step) == int(found.opt_state["adam"].count) == 3
    for field in ("mu", "nu"):
        expected = getattr(state.opt_state["adam"], field)
        actual = getattr(found.opt_state["adam"], field)
        for path in FLAT:
            np.testing.assert_array_equal(actual[path], expected[path])
    # Were they equal, the test could not tell.
    assert not np.array_equal(
        found.opt_state["adam"].mu["image_newline"], found.opt_state["adam"].nu["image_newline"]
    )


FLAT = sharding.flatten(PARAMS)


def test_state_is_stored_under_the_names_of_its_fields(tmp_path):
    save(tmp_path, trained(adamw()))
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata(tmp_path / "checkpoints/3/optimizer").item_metadata.tree
    assert set(sharding.flatten(tree)) == {
        "step",
        "opt_state/adam/count",
        *(f"opt_state/adam/{moment}/{path}" for moment in ("mu", "nu") for path in FLAT),
    }


def test_state_by_position_is_refused_with_what_to_do(tmp_path):
    """As runs begun with earlier versions have it."""
    state = trained(adamw())
    save(tmp_path, state)
    folder = tmp_path / "checkpoints/3/optimizer"
    by_position = {f"{i:06}": x for i, x in enumerate(jax.tree.leaves(state.opt_state))}
    with ocp.StandardCheckpointer() as checkpointer:
        item = {"step": state.step, "opt_state": by_position}
        checkpointer.save(folder.resolve(), item, force=True)
    with pytest.raises(ValueError, match=r"3/optimizer has .* by position.* another --workdir"):
        restore(tmp_path, target_of(state))


def test_another_optimiser_is_refused_by_the_names_that_differ(tmp_path):
    state = trained(adamw())
    save(tmp_path, state)
    momentum = optax.named_chain(("momentum", optax.trace(0.9)))
    target = target_of(TrainState(state.step, state.params, momentum.init(FLAT)))
    with pytest.raises(
        ValueError, match=r"lacks \['momentum/trace/image_newline'.* has \['adam/count'"
    ):
        restore(tmp_path, target)


def test_parts_of_an_optimiser_without_a_name_are_refused(tmp_path):
    with pytest.raises(TypeError, match=r"position for a name.*named_chain"):
        save(tmp_path, trained(optax.chain(optax.scale_by_adam(), optax.scale(0.1))))
