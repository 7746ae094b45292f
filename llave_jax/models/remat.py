"""Rematerialisation: what the backward pass of a training step computes again instead of keeping.

Owns the one list of settings, `REMATS`. Blocks apply the policy in `layers.py`; the training step
recomputes whole micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from llave_jax.ops.constants import RESIDUALS


class Remat(NamedTuple):
    """What one setting recomputes.

    Attributes:
      block_policy: what each transformer block keeps of its forward pass besides its input, as a policy
        of `jax.checkpoint`; None: all its activations.
      micro_batch: each micro-batch as a whole is computed again, except the features of a frozen vision
        tower.
    """

    block_policy: Callable | None = None
    micro_batch: bool = False


_NOTHING = jax.checkpoint_policies.nothing_saveable

REMATS: dict[str, Remat] = {
    # All activations are kept: the fastest, with the most memory.
    "none": Remat(),
    # A block keeps its input and what the backward pass of its attention kernel reads.
    "attention": Remat(jax.checkpoint_policies.save_only_these_names(RESIDUALS)),
    # A block keeps its input.
    "block": Remat(_NOTHING),
    # The activations of one micro-batch at a time are held, and all of them.
    "micro_batch": Remat(micro_batch=True),
    # Both: the least memory, the most computation.
    "both": Remat(_NOTHING, micro_batch=True),
}


def find_remat(name: str) -> Remat:
    """Looks up a setting.

    Args:
      name: a key of REMATS.

    Returns:
      The setting.

    Raises:
      ValueError: there is none of this name.
    """
    if name not in REMATS:
        raise ValueError(f"remat is {name!r}; expected one of {tuple(REMATS)}")
    return REMATS[name]
