"""From a config to what a run consists of: the model, its schedule and its compiled step.

Training and compiling ahead both build it here, so that they run the same program. What the fields
mean is `config.py`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from llave_jax.config import Config
from llave_jax.models.config import LlaveConfig
from llave_jax.models.llave import Llave, abstract_params
from llave_jax.ops import attention
from llave_jax.parallel import sharding
from llave_jax.training import optim, train_step


@dataclasses.dataclass(frozen=True)
class Training:
    """What a training run consists of, besides its data.

    Attributes:
      model: the module, on the attention kernels of the mesh's devices.
      schedule: step -> learning rate.
      step: the compiled step and the state it works on.
    """

    model: Llave
    schedule: optax.Schedule
    step: train_step.TrainStep


def build_training(
    config: Config, llave_config: LlaveConfig, mesh: jax.sharding.Mesh, total_steps: int
) -> Training:
    """The training that a config describes.

    Args:
      llave_config: as of `config.model_config`.
      mesh: of real devices, or of a topology's to compile for.
      total_steps: optimiser steps of the whole run, over which the learning rate decays.
    """
    paths = sharding.flatten(abstract_params(Llave(llave_config)))
    multipliers = optim.lr_multipliers(list(paths), config.optim.rates)
    freeze_vision = all(
        multiplier is None
        for path, multiplier in multipliers.items()
        if path.startswith("vision_tower/")
    )
    model = Llave(
        llave_config,
        dtype=jnp.dtype(config.dtype),
        attention=attention.on_mesh(config.attention, mesh),
        vision_attention=attention.on_mesh(config.vision_attention, mesh),
        remat=config.remat,
        freeze_vision=freeze_vision,
    )
    schedule = optim.learning_rate_schedule(
        config.optim.learning_rate, total_steps, config.optim.warmup_fraction
    )
    optimizer = optim.make_optimizer(
        schedule, multipliers, **_without(config.optim, "learning_rate", "warmup_fraction", "rates")
    )
    loss = train_step.LossConfig(**_without(config.loss, "hard_negatives"))
    step = train_step.build_step(model, mesh, optimizer, multipliers, loss)
    return Training(model, schedule, step)


def _without(values: Config, *keys: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in keys}
