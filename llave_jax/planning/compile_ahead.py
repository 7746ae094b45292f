"""Compiles a config for a TPU slice or a host of GPUs that need not exist: proof before a pod is rented.

Owns compiling without the hardware. What the compiled program takes and how fast it will be is
`prediction.py`; the devices are `chips.py`.
"""

from __future__ import annotations

import dataclasses
import re

import jax

from llave_jax.config import Config
from llave_jax.data.batch_plan import BatchPlan
from llave_jax.data.packing_simulation import PairSizes
from llave_jax.embedding.embedding_step import build_embedding_step
from llave_jax.inputs.batch import Budget
from llave_jax.models.config import LlaveConfig
from llave_jax.models.llave import Llave, abstract_params, param_shardings
from llave_jax.parallel import sharding
from llave_jax.planning import workload
from llave_jax.planning.chips import CHIPS, Gpu, Tpu, topology_devices
from llave_jax.training import batch_shape, memory, setup, train_step
from llave_jax.training.batch_search import BatchSearch, with_batch

# Pairs drawn from the assumed data. Their sizes stand for all, and their packing is simulated.
SAMPLE = 4000


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A program compiled for a topology.

    Attributes:
      program: XLA's executable.
      mesh: over the devices of the topology.
      kind: of chip, a key of `chips.CHIPS`.
      budget: room of one shard in one micro-batch.
      model: the model that the program runs.
      config: of the run.
    """

    program: jax.stages.Compiled
    mesh: jax.sharding.Mesh
    kind: str
    budget: Budget
    model: Llave
    config: Config

    @property
    def chip(self) -> Tpu | Gpu:
        """Figures of the chip."""
        return CHIPS[self.kind]

    @property
    def text(self) -> str:
        """The optimised program, in the text form that `hlo.py` reads."""
        text = self.program.as_text()
        if text is None:
            raise RuntimeError("this version of jax does not give the text of a compiled program")
        return text


class DoesNotFit(Exception):
    """The program needs more memory than a device has. The message is XLA's, with the largest buffers."""


def compile_train_step(config: Config, topology: str) -> Compiled:
    """Compiles the whole training step of a config.

    Args:
      config: of the run.
      topology: as for `chips.topology_devices`.

    Returns:
      The program.

    Raises:
      DoesNotFit: it needs more memory than the chips have.
      ValueError: the batch has no room for an item of the model, or the topology is not known.
      NoCompilerError: the compiler for this kind of chip is not installed.
    """
    devices, kind = topology_devices(topology)
    mesh = sharding.make_mesh(dict(config.mesh), devices)
    config = _with_known_batch(config, mesh, kind)
    lowered, training, budget = lower_train_step(config, mesh)
    return Compiled(_compile(lowered), mesh, kind, budget, training.model, config)


def lower_train_step(
    config: Config, mesh: jax.sharding.Mesh
) -> tuple[jax.stages.Lowered, setup.Training, Budget]:
    """The program that training runs on a mesh, before XLA compiles it.

    Args:
      config: of the run.
      mesh: the devices that the program is for.

    Returns:
      The lowered program, what the training consists of, and the room of one shard in one micro-batch.

    Raises:
      ValueError: the batch has no room for an item of the model.
    """
    llave_config = setup.model_config(config)
    # The number of steps is one constant of the schedule. It does not matter which.
    training = setup.build_training(config, llave_config, mesh, config.steps or 1000)
    budget = _plan(config, llave_config, mesh).budget
    lowered = setup.lower_step(training, mesh, budget, config.batch.micro_batches)
    return lowered, training, budget


def compile_embedding_step(config: Config, topology: str) -> Compiled:
    """Compiles the forward pass alone, with bfloat16 parameters and adapters merged, on one micro-batch.

    Args:
      config: of the run.
      topology: as for `chips.topology_devices`.

    Returns:
      The program.

    Raises:
      DoesNotFit: it needs more memory than the chips have.
      ValueError: the topology is not known.
      NoCompilerError: the compiler for this kind of chip is not installed.
    """
    devices, kind = topology_devices(topology)
    mesh = sharding.make_mesh(dict(config.mesh), devices)
    config = _with_known_batch(config, mesh, kind)
    config = config.copy_and_resolve_references()
    config.lora.rank = None
    model = setup.build_training(config, setup.model_config(config), mesh, 1000).model
    model = model.clone(param_dtype=model.dtype)
    params = abstract_params(model)
    budget = _plan(config, model.config, mesh).budget
    batch, _ = train_step.abstract_batch(model, mesh, budget, ())
    shardings = param_shardings(params, mesh)
    lowered = build_embedding_step(model, mesh).lower(
        sharding.with_shardings(params, shardings), batch
    )
    return Compiled(_compile(lowered), mesh, kind, budget, model, config)


def _with_known_batch(config: Config, mesh: jax.sharding.Mesh, kind: str) -> Config:
    """The config with its pairs and micro-batches; what it leaves open is planned for the chip's memory."""
    if None not in (config.batch.pairs, config.batch.micro_batches):
        return config
    llave_config = setup.model_config(config)
    rows = sum(subset.rows for subset in workload.SUBSETS.values())
    limit = int(memory.ACCELERATOR_SHARE * CHIPS[kind].hbm)
    search = BatchSearch(
        config,
        llave_config,
        mesh,
        rows,
        lambda: workload.sample_pairs(llave_config.input_spec, SAMPLE),
        lambda: limit,
    )
    plan = search.find()
    return with_batch(config, plan.pairs, plan.micro_batches)


def _plan(config: Config, llave_config: LlaveConfig, mesh: jax.sharding.Mesh) -> BatchPlan:
    """The shape of batches; what the config leaves open is planned for the assumed workload."""

    def assumed() -> PairSizes:
        return workload.sample_pairs(llave_config.input_spec, SAMPLE)

    return batch_shape.make_plan(config, llave_config, sharding.num_shards(mesh), assumed)


def _compile(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise DoesNotFit(_out_of_memory_message(str(error))) from None


def _out_of_memory_message(text: str) -> str:
    """The lines of XLA's error that say the totals and the largest buffers."""
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    pattern = re.compile(
        r"RESOURCE_EXHAUSTED|Used|Program hbm|Exceeded|Size:|Shape:|Operator:|\d+\."
    )
    return "\n".join(line for line in lines if pattern.search(line))[:4000]
