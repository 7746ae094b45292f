"""Joining the processes of a job: TPU pods, SLURM, GKE, or processes started by hand."""

from __future__ import annotations

import argparse
from typing import Any

import jax
from absl import flags

flags.DEFINE_bool(
    "distributed", False, "Join the job's other processes; TPU pods, SLURM and MPI are recognised."
)
flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, where no cluster tells it.")
flags.DEFINE_integer("num_processes", None, "Processes of the job, with --coordinator.")
flags.DEFINE_integer("process_id", None, "Number of this process, with --coordinator.")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The same flags for a command line made with argparse."""
    for name in ("distributed", "coordinator", "num_processes", "process_id"):
        flag = flags.FLAGS[name]
        if flag.boolean:
            parser.add_argument(f"--{name}", action="store_true", help=flag.help)
        else:
            parser.add_argument(f"--{name}", type=flag.parser.parse, help=flag.help)


def initialize(values: Any = flags.FLAGS) -> None:
    """Call once, before anything touches a device.

    Args:
      values: absl's flags, or what an argparse parser with `add_arguments` returned.
    """
    if values.coordinator is not None:
        jax.distributed.initialize(values.coordinator, values.num_processes, values.process_id)
    elif values.distributed:
        jax.distributed.initialize()
