"""Whether the state of a run is finite, asked of the devices before it is saved."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from llave_jax.parallel import sharding
from llave_jax.training.state import TrainState


def check_finite(state: TrainState) -> None:
    """Refuses parameters and optimiser state that are not finite. All processes of a job call this.

    Args:
      state: in its shards.

    Raises:
      FloatingPointError: it names some of the arrays that are not finite.
    """
    leaves, names = [], []
    trees = (state.params, state.opt_state, state.loss)
    for path, leaf in jax.tree_util.tree_leaves_with_path(trees):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            leaves.append(leaf)
            names.append(sharding.path_string(path[1:]))
    finite = np.asarray(_are_finite(leaves[0].sharding.mesh)(leaves))
    bad = [name for name, fine in zip(names, finite, strict=True) if not fine]
    if bad:
        raise FloatingPointError(
            f"step {int(state.step)}: {len(bad)} of {len(names)} arrays of the parameters and the optimiser are "
            f"not finite ({', '.join(bad[:3])}), though loss and gradient were: the update was too large "
            "(config.optim.learning_rate). This step is not saved; checkpoints that are there are kept"
        )


@functools.cache
def _are_finite(mesh: jax.sharding.Mesh):
    return jax.jit(
        lambda leaves: jnp.stack([jnp.all(jnp.isfinite(x)) for x in leaves]),
        out_shardings=sharding.replicated(mesh),
    )
