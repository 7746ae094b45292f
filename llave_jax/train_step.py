"""One optimiser step: from a packed batch to new parameters.

The whole batch goes through the model in micro-batches; the loss sees one pool of pairs, the whole
batch (`pool="global"`, exact gradients) or each micro-batch by itself (`pool="micro"`, the authors'
gradient accumulation).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llave_jax import optim, sharding
from llave_jax.contrastive import contrastive_loss
from llave_jax.inputs.packing import PackedBatch
from llave_jax.models.llave import VISION_FEATURES, Llave

POOLS = ("global", "micro")
# What is recomputed in the backward pass instead of kept:
#   none         nothing
#   block        each transformer block, from its input
#   micro_batch  each micro-batch as a whole, but for the features of a frozen vision tower
#   both         each micro-batch, and each block within it: the least memory, the most computation
REMATS = ("none", "block", "micro_batch", "both")


class TrainState(NamedTuple):
    """`step` int32 scalar: optimiser steps done; `params` the parameter tree; `opt_state` of the
    trainable parameters, as a flat dict by path."""

    step: jax.Array
    params: Any
    opt_state: Any


@dataclasses.dataclass(frozen=True)
class LossConfig:
    alpha: float = 9.0
    temperature: float = 0.02
    pool: str = "global"

    def __post_init__(self):
        if self.pool not in POOLS:
            raise ValueError(f"loss.pool is {self.pool!r}; expected one of {POOLS}")


def init_state(
    params: Any, optimizer: optax.GradientTransformation, factors: Mapping[str, float | None]
) -> TrainState:
    """State before the first step; traceable, so that it can be made in its shards."""
    trainable, _ = optim.split_params(sharding.flatten(params), factors)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trainable))


def state_shardings(
    abstract: TrainState, mesh: jax.sharding.Mesh, rules: sharding.Rules = sharding.PARAM_RULES
) -> TrainState:
    """Where a state lives: optimiser moments beside their parameters, scalars everywhere."""
    by_path = sharding.flatten(sharding.param_shardings(abstract.params, mesh, rules))

    def place(path: Any, leaf: Any) -> jax.sharding.NamedSharding:
        return by_path[path[-1].key] if leaf.ndim else sharding.replicated(mesh)

    return TrainState(
        step=sharding.replicated(mesh),
        params=sharding.unflatten(by_path),
        opt_state=jax.tree_util.tree_map_with_path(place, abstract.opt_state),
    )


def make_loss(
    model: Llave, mesh: jax.sharding.Mesh, config: LossConfig, remat: str
) -> Callable[[Any, PackedBatch], tuple[jax.Array, dict[str, jax.Array]]]:
    """`loss(params, batch) -> (scalar, metrics)`; batch arrays are [M, S, ...], M micro-batches."""
    if remat not in REMATS:
        raise ValueError(f"remat is {remat!r}; expected one of {REMATS}")

    def embed(params: Any, micro_batch: PackedBatch) -> jax.Array:
        with sharding.use_mesh(mesh):
            return model.apply({"params": params}, micro_batch)

    if remat in ("micro_batch", "both"):
        policy = jax.checkpoint_policies.save_only_these_names(
            *((VISION_FEATURES,) if model.freeze_vision else ())
        )
        embed = jax.checkpoint(embed, policy=policy, prevent_cse=False)

    def pool_loss(embeddings: jax.Array, valid: jax.Array) -> tuple[jax.Array, dict]:
        """embeddings [S, Z, G, D], valid [S, G] of one pool."""
        flat = jnp.moveaxis(embeddings, 1, 0).reshape(embeddings.shape[1], -1, embeddings.shape[-1])
        return contrastive_loss(
            flat[0],
            flat[1],
            valid.reshape(-1),
            mesh=mesh,
            axes=sharding.BATCH_AXES,
            alpha=config.alpha,
            temperature=config.temperature,
        )

    def global_loss(params: Any, batch: PackedBatch) -> tuple[jax.Array, dict]:
        _, embeddings = jax.lax.scan(
            lambda carry, micro_batch: (carry, embed(params, micro_batch)), None, batch
        )
        # [M, S, Z, G, D] -> [S, Z, M * G, D]: a shard's pairs stay together.
        embeddings = jnp.moveaxis(embeddings, 0, 2)
        embeddings = embeddings.reshape(*embeddings.shape[:2], -1, embeddings.shape[-1])
        valid = jnp.moveaxis(batch.valid, 0, 1).reshape(batch.valid.shape[1], -1)
        return pool_loss(embeddings, valid)

    def micro_loss(params: Any, batch: PackedBatch) -> tuple[jax.Array, dict]:
        def one(carry: None, micro_batch: PackedBatch) -> tuple[None, Any]:
            values = pool_loss(embed(params, micro_batch), micro_batch.valid)
            return carry, (jnp.sum(micro_batch.valid), values)

        _, (pairs, values) = jax.lax.scan(one, None, batch)
        weight = pairs / jnp.maximum(jnp.sum(pairs), 1)
        return jax.tree.map(lambda x: jnp.sum(x * weight), values)

    return global_loss if config.pool == "global" else micro_loss


def make_train_step(
    model: Llave,
    mesh: jax.sharding.Mesh,
    optimizer: optax.GradientTransformation,
    factors: Mapping[str, float | None],
    loss_config: LossConfig,
    remat: str = "none",
) -> Callable[[TrainState, PackedBatch], tuple[TrainState, dict[str, jax.Array]]]:
    """`step(state, batch) -> (state, metrics)`, to be jitted with its state donated."""
    loss = make_loss(model, mesh, loss_config, remat)

    def train_step(state: TrainState, batch: PackedBatch) -> tuple[TrainState, dict]:
        flat = sharding.flatten(state.params)
        trainable, frozen = optim.split_params(flat, factors)

        def trainable_loss(trainable: dict[str, jax.Array]) -> tuple[jax.Array, dict]:
            return loss(sharding.unflatten({**flat, **trainable}), batch)

        (value, metrics), gradient = jax.value_and_grad(trainable_loss, has_aux=True)(trainable)
        updates, opt_state = optimizer.update(gradient, state.opt_state, trainable)
        trainable = optax.apply_updates(trainable, updates)
        params = sharding.unflatten({path: {**frozen, **trainable}[path] for path in flat})
        metrics = {
            "loss": value,
            **metrics,
            "grad_norm": optax.tree.norm(gradient),
            "pairs": jnp.sum(batch.valid),
            "real_tokens": jnp.mean(batch.segment_ids > 0),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step
