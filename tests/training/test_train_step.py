"""The training step: three optimiser steps of the authors' code, and what must not change results.

Batches cut into micro-batches, recomputation and the mesh are choices of memory and time only.
"""

import dataclasses
import functools
import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from llave_jax.inputs.batch import Budget, PairLabels, empty_batch, stack_batches
from llave_jax.inputs.item import Item, missing_image
from llave_jax.inputs.packing import Packer
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.models.llave import Llave
from llave_jax.parallel import sharding
from llave_jax.training import optim, train_step
from llave_jax.weights import hf_names
from tests.loss import loss_reference as reference_loss

FROZEN_VISION = (("vision_tower/.*", None), (".*", 1.0))
ALL_TRAINED = ((".*", 1.0),)
LEARNING_RATE = 1e-3
# What the authors' code gives in float32, eager against sdpa attention, differs by up to 3e-5.
GOLDEN_TOLERANCE = 1e-4
# Sums of a few hundred float32 terms in another order, through three layers.
SUMMATION_TOLERANCE = 1e-5

MESHES = {
    "single": (1, 1, 1),
    "data": (8, 1, 1),
    "fsdp": (2, 4, 1),
    "tensor": (2, 2, 2),
}


@functools.cache
def mesh_of(name):
    sizes = dict(zip(sharding.MESH_AXES, MESHES[name], strict=True))
    return sharding.make_mesh(sizes, jax.devices()[: np.prod(MESHES[name])])


@pytest.fixture(scope="module")
def reference(golden):
    """The recorded run: settings, numbers, and how to read its arrays in our layout."""
    return SimpleNamespace(
        settings=json.loads((golden / "train.json").read_text()),
        numbers=np.load(golden / "train.npz"),
    )


def recorded(reference, kind, config):
    """[(path, layer or None, array in our layout)] of all arrays `kind/...` of the recorded run."""
    found = []
    for key in reference.numbers.files:
        if key.startswith(f"{kind}/"):
            hit = hf_names.find_tensor(key.removeprefix(f"{kind}/"), "llave")
            array = hf_names.from_hf(hit.weight, reference.numbers[key], config)
            found.append((hit.weight.path, hit.layer, array))
    assert found
    return found


@pytest.fixture(scope="module")
def pairs(golden, golden_model):
    """The recorded run's four pairs, as sequences."""
    builder = SequenceBuilder(golden_model.tokenizer, golden_model.config.input_spec)

    def sequence(text, image):
        return builder(Item(text, images=(golden / image,) if image else ()))

    rows = json.loads((golden / "train_pairs.json").read_text())
    return [
        (sequence(r["qry"], r["qry_image_path"]), sequence(r["pos_text"], r["pos_image_path"]))
        for r in rows
    ]


def make_batch(pairs, config, shards, micro_batches=1):
    """Arrays [M, S, ...]; the pairs are dealt evenly, so that every split has the same ones."""
    groups = -(-len(pairs) // (shards * micro_batches))
    size = [len(s) for pair in pairs for s in pair]
    crops = max(sum(len(s.crops) for s in pair) for pair in pairs)
    budget = Budget(2, max(max(size), sum(size) * groups // len(pairs)), groups * crops, groups)
    per_micro_batch = -(-len(pairs) // micro_batches)
    batches = []
    for i in range(micro_batches):
        packer = Packer(budget, shards, config.vision.crop)
        for pair in pairs[i * per_micro_batch : (i + 1) * per_micro_batch]:
            assert packer.add(pair)
        batches.append(packer.emit()[0])
    return stack_batches(batches)


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run of a few steps on one batch."""

    mesh: str = "single"
    micro_batches: int = 1
    remat: str = "none"
    pool: str = "global"
    rules: tuple = FROZEN_VISION
    steps: int = 1


def record_gradient():
    """Keeps the gradient, before clipping, as its state."""
    return optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params), lambda updates, *_: (updates, updates)
    )


def run(golden_model, pairs, r):
    """Metrics of each step, first gradient (before clipping) and last parameters, flat by path."""
    mesh = mesh_of(r.mesh)
    batch = make_batch(pairs, golden_model.config, sharding.num_shards(mesh), r.micro_batches)
    model = Llave(
        golden_model.config,
        remat=r.remat,
        freeze_vision=r.rules == FROZEN_VISION,
    )
    multipliers = optim.lr_multipliers(list(sharding.flatten(golden_model.params)), r.rules)
    optimizer = optax.chain(record_gradient(), optim.make_optimizer(LEARNING_RATE, multipliers))
    loss = train_step.LossConfig(alpha=9.0, temperature=0.02, pool=r.pool)

    step = train_step.build_step(model, mesh, optimizer, multipliers, loss)
    places = jax.tree.map(lambda x: x.sharding, step.state)
    state = step.init(jax.device_put(golden_model.params, places.params))
    batch = sharding.device_put_batch(batch, mesh, leading_axes=1)

    history, gradients = [], []
    for _ in range(r.steps):
        state, metrics = step.run(state, batch, None)
        history.append(jax.tree.map(float, metrics))
        gradients.append(jax.tree.map(np.asarray, state.opt_state[0]))
    params = jax.tree.map(np.asarray, sharding.flatten(state.params))
    return SimpleNamespace(history=history, gradient=gradients[0], params=params)


def relative_error(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def assert_same_gradients(actual, expected, tolerance=SUMMATION_TOLERANCE):
    errors = {path: relative_error(actual[path], g) for path, g in expected.items() if g.any()}
    assert max(errors.values()) < tolerance, errors


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def run_once(golden_model, pairs):
    """`run`, remembered: most tests compare with the same plain run."""
    return functools.cache(functools.partial(run, golden_model, pairs))


@pytest.mark.parametrize("mesh", ["single", "tensor", slow("data"), slow("fsdp")])
def test_three_steps_of_the_reference(mesh, reference, golden_model, run_once):
    result = run_once(Run(mesh=mesh, steps=3))
    for key, name in {"loss": "losses", "grad_norm": "grad_norms"}.items():
        actual = [metrics[key] for metrics in result.history]
        np.testing.assert_allclose(actual, reference.numbers[name], rtol=GOLDEN_TOLERANCE)
    for path, layer, expected in recorded(reference, "grad_step1", golden_model.config):
        gradient = result.gradient[path] if layer is None else result.gradient[path][layer]
        assert relative_error(gradient, expected) < GOLDEN_TOLERANCE, (path, layer)
    initial = sharding.flatten(golden_model.params)
    for path, layer, expected in recorded(reference, "after3", golden_model.config):
        index = () if layer is None else layer
        actual = result.params[path][index]
        assert relative_error(actual, expected) < GOLDEN_TOLERANCE, (path, layer)
        # Adam divides by the gradient's size: what is noise in a small gradient moves parameters.
        change = np.linalg.norm(expected - initial[path][index])
        assert np.linalg.norm(actual - expected) < 5e-3 * change, (path, layer)


def test_a_marker_without_an_image_is_trained_on(golden, golden_model):
    """The loss over the recorded embeddings, with WebQA's kind of query among them."""
    queries = ("quirk_token_without_image", "image_wide", "text_caption", "image_tiny")
    targets = ("image_square", "text_dataset", "two_images", "text_unicode")
    cases = {c["name"]: c for c in json.loads((golden / "cases.json").read_text())["cases"]}
    builder = SequenceBuilder(golden_model.tokenizer, golden_model.config.input_spec)

    def sequence(name):
        text, images = cases[name]["text"], cases[name]["images"]
        paths = tuple(golden / "images" / image for image in images)
        return builder(Item(text, images=paths or missing_image(text)))

    pairs = [(sequence(q), sequence(t)) for q, t in zip(queries, targets, strict=True)]
    assert [s.zero_crops for s in pairs[0]] == [(0,), ()]
    embeddings = np.load(golden / "embeddings.npz")
    query, target = (
        np.stack([embeddings[f"{name}/embedding"] for name in names]).astype(np.float64)
        for names in (queries, targets)
    )
    expected, *_ = reference_loss.symmetric_loss(query @ target.T, alpha=9.0, temperature=0.02)
    result = run(golden_model, pairs, Run(micro_batches=2))
    assert result.history[0]["loss"] == pytest.approx(expected, rel=GOLDEN_TOLERANCE)
    assert np.isfinite(result.history[0]["grad_norm"])


def test_frozen_parameters_do_not_move(golden_model, run_once):
    result = run_once(Run(steps=3))
    for path, value in sharding.flatten(golden_model.params).items():
        changed = not np.array_equal(result.params[path], value)
        assert changed != path.startswith("vision_tower/"), path
        assert (path in result.gradient) == changed


@pytest.mark.parametrize(
    "r",
    [
        Run(rules=ALL_TRAINED),
        slow(Run(rules=ALL_TRAINED, mesh="fsdp", micro_batches=2, remat="both")),
    ],
    ids=["plain", "recomputed"],
)
def test_unfrozen_tower_has_the_gradient_of_the_reference(r, reference, golden_model, run_once):
    result = run_once(r)
    expected = reference.settings["unfrozen"]
    assert result.history[0]["loss"] == pytest.approx(expected["loss"], rel=GOLDEN_TOLERANCE)
    norm = result.history[0]["grad_norm"]
    assert norm == pytest.approx(expected["grad_norm"], rel=GOLDEN_TOLERANCE)
    for path, layer, gradient in recorded(reference, "unfrozen_grad_step1", golden_model.config):
        actual = result.gradient[path] if layer is None else result.gradient[path][layer]
        assert relative_error(actual, gradient) < GOLDEN_TOLERANCE, (path, layer)


@pytest.mark.parametrize(
    "r",
    [
        Run(micro_batches=2),
        Run(micro_batches=2, mesh="tensor", remat="both"),
        slow(Run(micro_batches=4, remat="micro_batch")),
        slow(Run(micro_batches=2, remat="both")),
        slow(Run(remat="block")),
        slow(Run(micro_batches=2, remat="attention")),
        slow(Run(micro_batches=2, mesh="data", remat="micro_batch")),
        slow(Run(micro_batches=2, mesh="fsdp", remat="block")),
    ],
    ids=str,
)
def test_one_pool_however_it_is_computed(r, run_once):
    """Micro-batches, recomputation and mesh change neither loss nor gradient of the global pool."""
    plain, other = run_once(Run(steps=3)), run_once(r)
    assert other.history[0]["pairs"] == 4
    assert other.history[0]["loss"] == pytest.approx(plain.history[0]["loss"], rel=1e-6)
    assert_same_gradients(other.gradient, plain.gradient)


@pytest.mark.slow
def test_micro_pools_are_the_mean_of_their_losses(golden_model, pairs, run_once):
    together = run_once(Run(micro_batches=2, pool="micro", remat="both"))
    halves = [run(golden_model, pairs[i : i + 2], Run()) for i in (0, 2)]
    loss = np.mean([half.history[0]["loss"] for half in halves])
    assert together.history[0]["loss"] == pytest.approx(loss, rel=1e-6)
    gradients = [half.gradient for half in halves]
    mean = {path: (g + gradients[1][path]) / 2 for path, g in gradients[0].items()}
    assert_same_gradients(together.gradient, mean)
    whole = run_once(Run(steps=3)).history[0]["loss"]
    assert abs(loss / whole - 1) > 1e-3


class LookUp:
    """A model whose embeddings are parameters: those that `pooled` counts."""

    freeze_vision, remat = True, "none"

    def apply(self, variables, micro_batch):
        return variables["params"]["embeddings"][jnp.maximum(micro_batch.pooled, 0)]


@pytest.mark.parametrize("kind", ["hardness", "focal"])
@pytest.mark.parametrize("pool", train_step.POOLS)
def test_pools_in_value_and_gradient(pool, kind, golden_model):
    """Pools of unequal size, hard negatives that some pairs lack, and equal targets."""
    micro_batches, shards, sides, groups = 3, 4, 3, 3
    random = np.random.default_rng(0)
    shape = (micro_batches, shards, sides, groups)
    embeddings = random.normal(size=(np.prod(shape), 6))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    pooled = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
    pooled[:, :, 2][random.random((micro_batches, shards, groups)) < 0.4] = -1
    valid = random.random((micro_batches, shards, groups)) < 0.7
    ids = random.integers(0, 12, (micro_batches, shards, sides - 1, groups)).astype(np.int32)
    vision = golden_model.config.vision
    labels = PairLabels(ids, np.zeros(valid.shape, np.int32), np.zeros(ids.shape, np.float32))
    one = empty_batch(Budget(1, 8, 0, groups, sides), shards, vision.crop)
    batch = stack_batches([one] * micro_batches)._replace(pooled=pooled, valid=valid)

    mesh = sharding.make_mesh({"data": 2, "fsdp": 2, "tensor": 1}, jax.devices()[:4])
    numbers = {"alpha": 5.0, "temperature": 0.1, "margin": 0.4}
    config = train_step.LossConfig(kind, pool=pool, mask_false_negatives=True, **numbers)
    loss = train_step.make_loss(LookUp(), mesh, config)
    params = {"embeddings": jnp.asarray(embeddings, jnp.float32)}
    (found, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(params, batch, labels)

    pairs = pooled[:, :, 0].reshape(-1)
    targets, extra = pooled[:, :, 1].reshape(-1), pooled[:, :, 2].reshape(-1)
    candidates = np.concatenate([targets, extra])
    every = np.arange(micro_batches * shards).repeat(groups)
    pool_of = {"global": 0 * every, "micro": every // shards, "device": every}[pool]
    expected, by_similarity, _ = reference_loss.symmetric_loss(
        embeddings[pairs] @ embeddings[candidates].T,
        numbers["alpha"],
        numbers["temperature"],
        valid=np.concatenate([valid.reshape(-1), valid.reshape(-1) & (extra >= 0)]),
        ids=np.concatenate([ids[:, :, 0].reshape(-1), ids[:, :, 1].reshape(-1)]),
        pools=np.concatenate([pool_of, pool_of]),
        extra=len(extra),
        margin=numbers["margin"] if kind == "focal" else None,
    )
    expected_gradient = np.zeros_like(embeddings)
    np.add.at(expected_gradient, pairs, by_similarity @ embeddings[candidates])
    np.add.at(expected_gradient, candidates, by_similarity.T @ embeddings[pairs])
    assert float(found) == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(gradient["embeddings"], expected_gradient, atol=1e-5)


def test_unknown_settings_are_refused(golden_model):
    with pytest.raises(ValueError, match=r"remat.*expected one of"):
        train_step.make_loss(
            Llave(golden_model.config, remat="all"), mesh_of("single"), train_step.LossConfig()
        )
    with pytest.raises(ValueError, match=r"loss\.pool.*expected one of"):
        train_step.LossConfig(pool="local")
    with pytest.raises(ValueError, match=r"loss\.kind.*expected one of"):
        train_step.LossConfig(kind="triplet")
