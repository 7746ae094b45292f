"""One optimiser step: from a packed batch to new parameters.

`build_step` is the one place that compiles it: training, compiling ahead, benchmarks and tests run the
same program. Its loss is `step_loss.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from llave_jax.inputs.batch import Budget, PackedBatch, PairLabels, empty_batch
from llave_jax.loss.matryoshka import check_dims
from llave_jax.models import lora
from llave_jax.models.llave import Llave, abstract_params
from llave_jax.parallel import sharding
from llave_jax.training import optim
from llave_jax.training.state import TrainState, init_state, state_shardings
from llave_jax.training.step_loss import LossConfig, make_loss


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
      ValueError: as for `make_loss`, or `dims` do not suit the model.
    """
    if loss_config.dims:
        check_dims(loss_config.dims, model.config.text.hidden_size)

    def init(params: Any) -> TrainState:
        return init_state(params, optimizer, lr_multipliers, loss_config.initial())

    abstract = jax.eval_shape(init, abstract_params(model))
    places = state_shardings(abstract, mesh)
    of_batch = sharding.batch_sharding(mesh, leading_axes=1)
    return TrainStep(
        run=jax.jit(
            _train_step(
                *(make_loss(model, mesh, loss_config), loss_config),
                functools.partial(lora.step_key, model),
                *(optimizer, lr_multipliers, skip_nonfinite),
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
    loss_config: LossConfig,
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
        trainable |= optim.with_prefix(state.loss)

        def trainable_loss(trainable: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
            params, learned = optim.without_learned(trainable)
            params = sharding.unflatten({**flat, **params})
            return loss(params, batch, labels, key_of(state.step), learned)

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
        _, learned = optim.without_learned(trainable)
        if learned is not None:
            learned = loss_config.in_range(learned)
            metrics = {**metrics, **loss_config.learned_metrics(state.loss)}
        metrics = {
            "loss": value,
            **metrics,
            "grad_norm": grad_norm,
            "pairs": jnp.sum(batch.valid),
            "real_tokens": jnp.mean(batch.segment_ids > 0),
        }
        return TrainState(state.step + 1, params, opt_state, learned), metrics

    return train_step


def _where(condition: jax.Array, these: Any, others: Any) -> Any:
    """One of two trees, array by array."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), these, others)
