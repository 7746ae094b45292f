"""The state of a training run between two steps, and where its arrays lie on a mesh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from llave_jax.models.llave import param_shardings
from llave_jax.parallel import sharding
from llave_jax.training import optim


class TrainState(NamedTuple):
    """What an optimiser step reads and replaces.

    Attributes:
      step: int32 scalar, optimiser steps done.
      params: the parameter tree, float32; where there are adapters, those and the base's as it is stored.
      opt_state: the optimiser's state of the trainable parameters, as a flat dict by path.
      loss: what the loss has learned, float32 arrays by name; None where it learns nothing. The optimiser
        knows it as "loss/NAME".
    """

    step: jax.Array
    params: Any
    opt_state: Any
    loss: Any = None


def init_state(
    params: Any,
    optimizer: optax.GradientTransformation,
    lr_multipliers: Mapping[str, float | None],
    learned: Mapping[str, jax.Array] | None = None,
) -> TrainState:
    """The state before the first step; traceable, so that it can be made in its shards.

    Args:
      params: the parameter tree.
      optimizer: over the flat dict of trainable parameters.
      lr_multipliers: by path, see `optim.lr_multipliers`.
      learned: what the loss begins with; None: it learns nothing.

    Returns:
      Step 0 and an optimiser that has seen no gradient.
    """
    trainable, _ = optim.split_params(sharding.flatten(params), lr_multipliers)
    trainable |= optim.with_prefix(learned)
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(trainable), learned)


def state_shardings(abstract: TrainState, mesh: jax.sharding.Mesh) -> Any:
    """The sharding of every array of a state.

    Args:
      abstract: shapes and dtypes of the state.
      mesh: the devices.

    Returns:
      A TrainState of shardings: optimiser moments lie beside their parameters, scalars are
      replicated.
    """
    by_path = sharding.flatten(param_shardings(abstract.params, mesh))
    everywhere = sharding.replicated(mesh)
    learned = jax.tree.map(lambda _: everywhere, abstract.loss)
    places = by_path | optim.with_prefix(learned)

    def place(path: Any, leaf: Any) -> jax.sharding.NamedSharding:
        return places[path[-1].key] if leaf.ndim else everywhere

    opt_state = jax.tree_util.tree_map_with_path(place, abstract.opt_state)
    shardings: Any = (everywhere, sharding.unflatten(by_path), opt_state, learned)
    return TrainState(*shardings)
