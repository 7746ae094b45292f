"""Checkpoints: found again whole or not used; the optimiser's state by name, whatever order a library has."""

import json
import os
import re
import resource
import shutil
from pathlib import Path
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
from llave_jax.weights.checkpoint_seal import find_damage
from llave_jax.weights.run_params import latest_params
from llave_jax.weights.safetensors_io import CheckpointError

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


def test_what_the_loss_has_learned_is_kept_where_there_is_any(tmp_path):
    state = trained(adamw())
    learned = {"log_scale": jnp.array([2.0, 2.5, 3.0], jnp.float32)}
    save(tmp_path / "with", state._replace(loss=learned))
    save(tmp_path / "without", state)
    found = restore(tmp_path / "with", target_of(state._replace(loss=learned)))
    np.testing.assert_array_equal(found.loss["log_scale"], learned["log_scale"])
    assert restore(tmp_path / "without", target_of(state)).loss is None
    with pytest.raises(CheckpointError, match=r"loss/log_scale is float32.*not there"):
        restore(tmp_path / "with", target_of(state))
    with pytest.raises(CheckpointError, match="loss/log_scale is not there"):
        restore(tmp_path / "without", target_of(state._replace(loss=learned)))


def test_state_by_position_is_refused_with_what_to_do(tmp_path):
    """As runs begun with earlier versions have it, whose checkpoints do not list their files."""
    state = trained(adamw())
    save(tmp_path, state)
    (tmp_path / "checkpoints/3/checkpoint.json").unlink()
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


# Damage. Two checkpoints, of steps 3 and 4, of which the newer is damaged.


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder of a run, its state at step 3)."""
    workdir = tmp_path_factory.mktemp("saved")
    states = {step: trained(adamw(), step) for step in (3, 4)}
    checkpoints = Checkpoints(workdir, keep=2, about={"config": {"seed": 7}})
    for state in states.values():
        checkpoints.save(state, iterator())
    checkpoints.close()
    return workdir, states[3]


@pytest.fixture
def run(saved, tmp_path):
    """A copy of it to be damaged."""
    shutil.copytree(saved[0], tmp_path / "run")
    return tmp_path / "run"


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


FILE_DAMAGE = {
    "missing": Path.unlink,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"0"),
    "flipped": flip,
}


@pytest.mark.parametrize("kind", FILE_DAMAGE)
def test_damage_of_any_file_is_found_and_the_file_named(kind, saved):
    folder = saved[0] / "checkpoints/4"
    assert find_damage(folder) is None
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if kind == "missing" and path.name.startswith("checksums_"):
            continue  # as after a kill before it was written: the sizes are known
        content = path.read_bytes()
        FILE_DAMAGE[kind](path)
        try:
            assert path.name in (find_damage(folder) or "nothing found")
        finally:
            path.write_bytes(content)
    assert find_damage(folder) is None


def test_processes_that_share_the_reading_find_what_one_would(saved):
    folder = saved[0] / "checkpoints/4"
    path = largest(folder / "optimizer")
    content = path.read_bytes()
    flip(path)
    try:
        found = [find_damage(folder, process=i, count=3) for i in range(3)]
    finally:
        path.write_bytes(content)
    (damage,) = [damage for damage in found if damage]
    assert path.name in damage


def half_removed(folder):
    shutil.rmtree(folder / "params")
    (folder / "checkpoint.json").unlink()


def another_shape(folder):
    """Whole, but of another model."""
    shutil.rmtree(folder)
    params = {**PARAMS, "image_newline": np.ones(4, np.float32)}
    state = TrainState(jnp.int32(4), params, adamw().init(sharding.flatten(params)))
    save(folder.parents[1] / "other", state)
    (folder.parents[1] / "other/checkpoints/4").rename(folder)


def empty(folder):
    shutil.rmtree(folder)
    folder.mkdir()


FOLDER_DAMAGE = {
    "a moment of the optimiser flipped": (
        lambda folder: flip(largest(folder / "optimizer")),
        r"4/optimizer/\S* has changed since it was written",
    ),
    "the position in the data truncated": (
        lambda folder: FILE_DAMAGE["truncated"](largest(folder / "data")),
        r"4/data/\S* has \d+ bytes, not the \d+",
    ),
    "a file missing": (
        lambda folder: largest(folder / "params").unlink(),
        r"4/params/\S* is missing",
    ),
    "the list of files flipped": (lambda folder: flip(folder / "checkpoint.json"), r"4/checkpoint"),
    "half removed": (half_removed, r"4/checkpoint\.json is missing"),
    "empty": (empty, r"4/checkpoint\.json is missing"),
    "another shape": (another_shape, r"4/params: image_newline is float32\[4\]; .* float32\[3\]"),
}


@pytest.mark.parametrize("kind", FOLDER_DAMAGE)
def test_the_checkpoint_before_a_damaged_one_is_used_and_both_are_kept(kind, run, saved, caplog):
    damage, said = FOLDER_DAMAGE[kind]
    damage(run / "checkpoints/4")
    before = sorted(p.name for p in (run / "checkpoints/4").rglob("*"))
    checkpoints = Checkpoints(run, keep=2)
    try:
        found = checkpoints.restore(target_of(saved[1]), iterator())
        (warning,) = [r.message for r in caplog.records if r.name.startswith("llave_jax")]
        assert int(found.step) == checkpoints.latest_step == 3
        jax.tree.map(np.testing.assert_array_equal, found, saved[1])
        assert re.search(said + ".*; the checkpoint of step 3 is used instead", warning)
        # The damaged one is kept, and its number is free.
        assert sorted(p.name for p in (run / "checkpoints/4.damaged").rglob("*")) == before
        checkpoints.save(trained(adamw(), 4), iterator())
    finally:
        checkpoints.close()
    assert find_damage(run / "checkpoints/4") is None
    assert latest_params(run).parent.name == "4"


def test_without_any_whole_checkpoint_one_error_names_what_is_wrong_with_each(run, saved):
    for step in (3, 4):
        flip(largest(run / f"checkpoints/{step}/params"))
    for _ in range(2):  # a restart says it again; it does not begin anew
        with pytest.raises(
            CheckpointError,
            match=r"none .* can be used: \S*/4/params\S* has changed .*"
            r"; \S*/3/params/.* --workdir",
        ):
            restore(run, target_of(saved[1]))
    with pytest.raises(CheckpointError, match=r"no checkpoint can be used: .*4/params.*3/params"):
        latest_params(run)


def test_a_model_is_read_from_the_newest_checkpoint_whose_parameters_are_whole(run, caplog):
    flip(largest(run / "checkpoints/4/optimizer"))
    assert latest_params(run).parent.name == "4"
    flip(largest(run / "checkpoints/4/params"))
    for _ in range(2):
        assert latest_params(run).parent.name == "3"
    (warning,) = caplog.messages
    assert re.search(r"4/params/\S* has changed .*; the checkpoint of step 3 is used", warning)


def test_a_checkpoint_of_an_earlier_version_is_used_if_it_can_be_read(run, saved):
    shutil.rmtree(run / "checkpoints/4")
    for path in (run / "checkpoints/3").glob("check*"):
        path.unlink()
    assert int(restore(run, target_of(saved[1])).step) == 3
    largest(run / "checkpoints/3/params").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoints/3 cannot be read"):
        restore(run, target_of(saved[1]))


def test_a_checkpoint_holds_config_and_versions(saved):
    values = json.loads((saved[0] / "checkpoints/4/checkpoint.json").read_text())
    assert values["config"] == {"seed": 7}
    assert values["step"] == 4
    assert values["versions"]["jax"] == jax.__version__


def test_the_last_n_are_kept_and_nothing_of_those_removed(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(1, 6):
        checkpoints.save(trained(adamw(), step), iterator())
    checkpoints.close()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]


MESHES = ({"data": 8}, {"data": 2, "fsdp": 4}, {"fsdp": 4, "tensor": 2}, {"data": 1})


@pytest.mark.parametrize("after", MESHES, ids=str)
def test_parameters_and_optimiser_are_the_same_on_another_mesh(after, tmp_path):
    """Of 8 devices, divided in another way, or of one."""
    rng = np.random.default_rng(0)
    flat = {
        "image_newline": rng.random(8, np.float32),
        "projector/linear_1/kernel": rng.random((8, 16), np.float32),
    }
    places = {"image_newline": ("fsdp",), "projector/linear_1/kernel": ("fsdp", "tensor")}

    def target_on(mesh_axes, state):
        count = int(np.prod(list(mesh_axes.values())))
        mesh = sharding.make_mesh(
            {"data": 1, "fsdp": 1, "tensor": 1, **mesh_axes}, jax.devices()[:count]
        )

        def place(path, x):
            name = next((n for n in places if sharding.path_string(path).endswith(n)), None)
            spec = jax.sharding.PartitionSpec(*(places[name] if name and x.ndim else ()))
            target = jax.sharding.NamedSharding(mesh, spec)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=target)

        return jax.tree_util.tree_map_with_path(place, state)

    opt_state = adamw().init(flat)
    gradients = {path: jnp.asarray(rng.random(x.shape, np.float32)) for path, x in flat.items()}
    _, opt_state = adamw().update(gradients, opt_state, flat)
    state = TrainState(jnp.int32(1), sharding.unflatten(flat), opt_state)
    before = jax.tree.map(
        lambda x, target: jax.device_put(x, target.sharding),
        state,
        target_on({"data": 2, "fsdp": 4}, state),
    )
    save(tmp_path, before)
    target = target_on(after, state)
    found = restore(tmp_path, target)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    places_found, places_wanted = (
        jax.tree.map(lambda x: x.sharding, tree) for tree in (found, target)
    )
    assert places_found == places_wanted


# A folder that cannot be written.


def test_a_checkpoint_that_does_not_fit_is_said_and_the_one_before_is_kept(tmp_path):
    noise = np.random.default_rng(0).random(1_000_000, np.float32)
    large = TrainState(jnp.int32(4), {"image_newline": noise}, {})
    checkpoints = Checkpoints(tmp_path, keep=2)
    checkpoints.save(trained(adamw(), 3), iterator())
    checkpoints.wait()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        checkpoints.save(large, iterator())
        with pytest.raises(
            OSError,
            match=r"checkpoints: the checkpoint of step 4 could not be written: File too large\. "
            r"That of step 3 is kept",
        ):
            checkpoints.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]
    assert find_damage(tmp_path / "checkpoints/3") is None


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(
        OSError, match=r"checkpoints: checkpoints cannot be written here: File exists"
    ):
        Checkpoints(tmp_path, keep=2)
