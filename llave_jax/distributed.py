"""Joining the processes of a job: TPU pods, SLURM, GKE, or processes started by hand."""

from __future__ import annotations

import jax
from absl import flags

flags.DEFINE_bool(
    "distributed", False, "Join the job's other processes; TPU pods, SLURM and MPI are recognised."
)
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster tells it.")
flags.DEFINE_integer("num_processes", None, "Processes of the job, with --coordinator.")
flags.DEFINE_integer("process_id", None, "Number of this process, with --coordinator.")


def initialize() -> None:
    """Call once, before anything touches a device."""
    values = flags.FLAGS
    if values.coordinator is not None:
        jax.distributed.initialize(values.coordinator, values.num_processes, values.process_id)
    elif values.distributed:
        jax.distributed.initialize()
