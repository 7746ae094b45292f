"""Proof before a pod is rented: a config is compiled for a TPU slice or a host of GPUs that need not exist.

Owns compiling without the hardware. What the compiled program takes and how fast it will be is
`prediction.py`; the devices are `chips.py`.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax

from llave_jax.config import Config
from llave_jax.embedding.embedding_step import build_embedding_step
from llave_jax.inputs.batch import Budget
from llave_jax.models.llave import Llave, abstract_params, param_shardings
from llave_jax.parallel import sharding
from llave_jax.planning.chips import CHIPS, Chip, topology_devices
from llave_jax.training import batch_shape, setup, train_step


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program for a topology, before anything is read off it."""

    program: Any
    mesh: jax.sharding.Mesh
    kind: str
    budget: Budget
    model: Llave
    config: Config

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]


class DoesNotFit(Exception):
    """The program needs more memory than a device has; says what XLA says, largest buffers too."""


def compile_train_step(config: Config, topology: str) -> Compiled:
    """The whole training step of a config, compiled for a slice.

    Raises:
      DoesNotFit: it needs more memory than the chips have.
      ValueError: as of `batch_shape.check_budget`.
    """
    devices, kind = topology_devices(topology)
    mesh = sharding.make_mesh(dict(config.mesh), devices)
    lowered, training, budget = lower_train_step(config, mesh)
    return Compiled(_compile(lowered), mesh, kind, budget, training.model, config)


def lower_train_step(
    config: Config, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Lowered, setup.Training, Budget]:
    """The program that training runs on a mesh, before XLA compiles it."""
    llave_config = setup.model_config(config)
    batch_shape.check_budget(config, llave_config, sharding.num_shards(mesh))
    # The number of steps is a constant of the schedule and changes nothing else.
    training = setup.build_training(config, llave_config, mesh, config.steps or 1000)
    budget = batch_shape.batch_budget(config, sharding.num_shards(mesh))
    leading = (config.batch.micro_batches,)
    batch = train_step.abstract_batch(training.model, mesh, budget, leading)
    return training.step.run.lower(training.step.state, *batch), training, budget


def compile_embedding_step(config: Config, topology: str) -> Compiled:
    """The forward pass alone, with bfloat16 parameters, on one micro-batch of the config's budget."""
    devices, kind = topology_devices(topology)
    mesh = sharding.make_mesh(dict(config.mesh), devices)
    model = setup.build_training(config, setup.model_config(config), mesh, 1000).model
    model = model.clone(param_dtype=model.dtype)
    params = abstract_params(model)
    budget = batch_shape.batch_budget(config, sharding.num_shards(mesh))
    batch, _ = train_step.abstract_batch(model, mesh, budget, ())
    places = param_shardings(params, mesh)
    lowered = build_embedding_step(model, mesh).lower(
        sharding.with_shardings(params, places), batch
    )
    return Compiled(_compile(lowered), mesh, kind, budget, model, config)


def _compile(lowered: jax.stages.Lowered) -> Any:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_out_of_memory_message(str(error))) from None


def _out_of_memory_message(text: str) -> str:
    """XLA's account of an overflow: totals, then the largest buffers."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    wanted = re.compile(
        r"RESOURCE_EXHAUSTED|Used|Program hbm|Exceeded|Size:|Shape:|Operator:|\d+\."
    )
    return "\n".join(line for line in lines if wanted.search(line))[:4000]
