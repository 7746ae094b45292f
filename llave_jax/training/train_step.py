"""One optimiser step: from a packed batch to new parameters.

`build_step` is the one place that compiles it: training, compiling ahead, benchmarks and tests run the
same program.

The whole batch goes through the model in micro-batches; the loss sees one pool of pairs, the whole
batch (`pool="global"`, exact gradients), each micro-batch by itself (`pool="micro"`, the authors'
gradient accumulation) or each device's part of a micro-batch (`pool="device"`, no negatives from
other devices). The loss is the mean over all pairs of the step, in every kind of pool.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llave_jax.inputs.batch import Budget, PackedBatch, PairLabels, empty_batch
from llave_jax.loss.cross_device import KINDS, contrastive_loss
from llave_jax.models import lora
from llave_jax.models.llave import VISION_FEATURES, Llave, abstract_params
from llave_jax.models.remat import find_remat
from llave_jax.parallel import sharding
from llave_jax.training import optim
from llave_jax.training.state import TrainState, init_state, state_shardings

POOLS = ("global", "micro", "device")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The settings of the loss, `config.loss` without `hard_negatives`.

    Attributes:
      kind, alpha, temperature, margin: as for `loss.cross_device.contrastive_loss`.
      pool: which pairs are each other's negatives, one of POOLS: all of a step, those of one micro-batch,
        or those of one device's part of it.
      mask_false_negatives: targets of equal content are not negatives of each other's queries.

    Raises:
      ValueError: `kind` or `pool` is unknown.
    """

    kind: str = "hardness"
    alpha: float = 9.0
    temperature: float = 0.02
    margin: float = 0.3
    pool: str = "global"
    mask_false_negatives: bool = False

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"loss.kind is {self.kind!r}; expected one of {KINDS}")
        if self.pool not in POOLS:
            raise ValueError(f"loss.pool is {self.pool!r}; expected one of {POOLS}")


class PoolEmbeddings(NamedTuple):
    """Pairs that are each other's negatives. S shards, Z sides, G slots.

    Attributes:
      embeddings: float32 [S, Z, G, D].
      present: bool [S, Z, G], False for empty slots and for sides that a group lacks.
      ids: int32 [S, Z - 1, G], equal for equal targets; None where equal targets are negatives.
    """

    embeddings: jax.Array
    present: jax.Array
    ids: jax.Array | None


def make_loss(
    model: Llave, mesh: jax.sharding.Mesh, config: LossConfig
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """The loss of a step as a function of the parameters.

    Args:
      model: the module.
      mesh: the devices.
      config: the settings.

    Returns:
      `loss(params, batch, labels=None, key=None) -> (scalar, metrics)`. Batch arrays are [M, S, ...] with M
      micro-batches; `labels`, `PairLabels`, are needed with `mask_false_negatives`. Sides beyond query and
      target are hard negatives, which every query of the pool sees. `key`, of `lora.step_key`, is what the
      dropout of adapters is drawn from; None: nothing is dropped.

    Raises:
      ValueError: the model's `remat` is not a key of `models.remat.REMATS`.

    References: LLaVE (arXiv 2503.04812), section 3; GradCache (arXiv 2101.06983) for the pool "global".
    """

    def embed(params: Any, micro_batch: PackedBatch, key: jax.Array | None) -> jax.Array:
        if key is not None:
            params = lora.with_dropout(model, params, key)
        with sharding.use_mesh(mesh):
            return cast(jax.Array, model.apply({"params": params}, micro_batch))

    if find_remat(model.remat).micro_batch:
        policy = jax.checkpoint_policies.save_only_these_names(
            *((VISION_FEATURES,) if model.freeze_vision else ())
        )
        embed = jax.checkpoint(embed, policy=policy, prevent_cse=False)

    def pool_loss(pool: PoolEmbeddings) -> tuple[jax.Array, dict]:
        sides = pool.embeddings.shape[1]
        settings = {}
        if pool.ids is not None:
            settings["target_ids"] = pool.ids[:, 0].reshape(-1)
        if sides > 2:
            settings["extra_targets"] = _join(pool.embeddings[:, 2:])
            settings["extra_valid"] = pool.present[:, 2:].reshape(-1)
            if pool.ids is not None:
                settings["extra_ids"] = pool.ids[:, 1:].reshape(-1)
        return contrastive_loss(
            _join(pool.embeddings[:, 0]),
            _join(pool.embeddings[:, 1]),
            pool.present[:, 0].reshape(-1),
            mesh=mesh,
            axes=sharding.BATCH_AXES,
            kind=config.kind,
            alpha=config.alpha,
            temperature=config.temperature,
            margin=config.margin,
            cross_device=config.pool != "device",
            **settings,
        )

    def global_loss(params: Any, batch: PackedBatch, ids: Any, keys: Any) -> tuple[jax.Array, dict]:
        _, embeddings = jax.lax.scan(
            lambda carry, inputs: (carry, embed(params, *inputs)), None, (batch, keys)
        )
        pools = PoolEmbeddings(embeddings, _present(batch), ids)
        return pool_loss(jax.tree.map(_merge_micro_batches, pools))

    def micro_loss(params: Any, batch: PackedBatch, ids: Any, keys: Any) -> tuple[jax.Array, dict]:
        def one(carry: None, inputs: tuple[PackedBatch, Any, Any]) -> tuple[None, Any]:
            micro_batch, ids, key = inputs
            pool = PoolEmbeddings(embed(params, micro_batch, key), _present(micro_batch), ids)
            return carry, (jnp.sum(micro_batch.valid), pool_loss(pool))

        _, (pairs, values) = jax.lax.scan(one, None, (batch, ids, keys))
        weight = pairs / jnp.maximum(jnp.sum(pairs), 1)
        return jax.tree.map(lambda x: jnp.sum(x * weight), values)

    pooled_loss = global_loss if config.pool == "global" else micro_loss

    def loss(
        params: Any,
        batch: PackedBatch,
        labels: PairLabels | None = None,
        key: jax.Array | None = None,
    ) -> tuple[jax.Array, dict]:
        keys = None if key is None else jax.random.split(key, len(batch.valid))
        if not config.mask_false_negatives:
            return pooled_loss(params, batch, None, keys)
        if labels is None:
            raise ValueError("mask_false_negatives needs the batch's labels")
        return pooled_loss(params, batch, labels.target_ids, keys)

    return loss


def _present(batch: PackedBatch) -> jax.Array:
    """bool [..., S, Z, G]: which slots hold a sequence."""
    return (jnp.asarray(batch.pooled) >= 0) & jnp.asarray(batch.valid)[..., None, :]


def _join(embeddings: jax.Array) -> jax.Array:
    """[S, ..., D] -> [N, D]."""
    return embeddings.reshape(-1, embeddings.shape[-1])


def _merge_micro_batches(x: jax.Array) -> jax.Array:
    """[M, S, Z, G, ...] -> [S, Z, M * G, ...]: a shard's slots stay on it."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


@dataclasses.dataclass(frozen=True)
class TrainStep:
    """A compiled training step and the state it works on.

    Attributes:
      run: `(state, batch, labels) -> (state, metrics)`, jitted with the shardings of a mesh; the state
        that is given is donated: its arrays must not be used again. Batch and labels are those of the loss of
        `make_loss`; labels may be None.
      init: `params -> state`, jitted: the state before the first step, made in its shards.
      state: shapes, dtypes and shardings of the state.
    """

    run: Callable[..., tuple[TrainState, dict[str, jax.Array]]]
    init: Callable[[Any], TrainState]
    state: TrainState


def build_step(
    model: Llave,
    mesh: jax.sharding.Mesh,
    optimizer: optax.GradientTransformation,
    lr_multipliers: Mapping[str, float | None],
    loss_config: LossConfig,
    skip_nonfinite: bool = False,
) -> TrainStep:
    """The training step of a model on a mesh, of real devices or of a topology.

    Args:
      model: the module.
      mesh: the devices.
      optimizer: over the flat dict of trainable parameters.
      lr_multipliers: path -> learning-rate multiplier of each parameter; None where it is frozen.
      loss_config: the settings of the loss.
      skip_nonfinite: leave parameters and moments as they are where loss, gradient or update is not finite;
        the metric "finite" says whether they all were.

    Returns:
      The compiled step, and what begins a run.

    Raises:
      ValueError: as for `make_loss`.
    """

    def init(params: Any) -> TrainState:
        return init_state(params, optimizer, lr_multipliers)

    abstract = jax.eval_shape(init, abstract_params(model))
    places = state_shardings(abstract, mesh)
    of_batch = sharding.batch_sharding(mesh, leading_axes=1)
    return TrainStep(
        run=jax.jit(
            _train_step(
                make_loss(model, mesh, loss_config),
                functools.partial(lora.step_key, model),
                optimizer,
                lr_multipliers,
                skip_nonfinite,
            ),
            in_shardings=(places, of_batch, of_batch),
            out_shardings=(places, sharding.replicated(mesh)),
            donate_argnums=0,
        ),
        init=jax.jit(init, out_shardings=places),
        state=sharding.with_shardings(abstract, places),
    )


def abstract_batch(
    model: Llave, mesh: jax.sharding.Mesh, budget: Budget, leading: tuple[int, ...]
) -> tuple[PackedBatch, PairLabels]:
    """Shapes, dtypes and shardings of a batch of a budget and of its labels.

    Args:
      model: the module.
      mesh: the devices.
      budget: of one shard of one micro-batch.
      leading: axes in front of the shards: (micro_batches,) for training, () for embedding.

    Returns:
      The batch and the labels, of `jax.ShapeDtypeStruct`, with the axes `leading` in front.
    """
    vision = model.config.vision
    batch = empty_batch(budget, 1, vision.crop)
    by_target = (1, budget.sides - 1, budget.groups)
    labels = PairLabels(
        np.zeros(by_target, np.int32),
        np.zeros((1, budget.groups), np.int32),
        np.zeros(by_target, np.float32),
    )
    shards, place = sharding.num_shards(mesh), sharding.batch_sharding(mesh, len(leading))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*leading, shards, *x.shape[1:]), x.dtype, sharding=place),
        (batch, labels),
    )


def _train_step(
    loss: Callable[..., tuple[jax.Array, dict[str, jax.Array]]],
    key_of: Callable[[jax.Array], jax.Array | None],
    optimizer: optax.GradientTransformation,
    lr_multipliers: Mapping[str, float | None],
    skip_nonfinite: bool,
) -> Callable[..., tuple[TrainState, dict[str, jax.Array]]]:
    def train_step(
        state: TrainState, batch: PackedBatch, labels: PairLabels | None
    ) -> tuple[TrainState, dict]:
        flat = sharding.flatten(state.params)
        trainable, frozen = optim.split_params(flat, lr_multipliers)

        def trainable_loss(trainable: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
            params = sharding.unflatten({**flat, **trainable})
            return loss(params, batch, labels, key_of(state.step))

        (value, metrics), gradient = jax.value_and_grad(trainable_loss, has_aux=True)(trainable)
        updates, opt_state = optimizer.update(gradient, state.opt_state, trainable)
        grad_norm = optax.tree.norm(gradient)
        before: Any = trainable
        trainable: Any = optax.apply_updates(trainable, updates)
        if skip_nonfinite:
            norms = jnp.stack([value, grad_norm, optax.tree.norm(updates)])
            finite = jnp.all(jnp.isfinite(norms))
            metrics = {**metrics, "finite": finite}
            trainable = _where(finite, trainable, before)
            # The learning rate goes by all steps, skipped or not.
            new: Any = opt_state
            kept = _where(finite, new, state.opt_state)
            opt_state = type(new)({**kept, "learning_rate": new["learning_rate"]})
        params = sharding.unflatten({path: {**frozen, **trainable}[path] for path in flat})
        metrics = {
            "loss": value,
            **metrics,
            "grad_norm": grad_norm,
            "pairs": jnp.sum(batch.valid),
            "real_tokens": jnp.mean(batch.segment_ids > 0),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def _where(condition: jax.Array, these: Any, others: Any) -> Any:
    """One of two trees, array by array."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), these, others)
