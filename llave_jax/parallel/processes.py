"""Joining the processes of a job: TPU pods, SLURM, GKE, or processes started by hand."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which job a process belongs to."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed",
        action="store_true",
        help="join the job's other processes; TPU pods, SLURM and MPI are recognised",
    )
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="process 0, where no cluster tells it"
    )
    group.add_argument("--num-processes", type=int, help="processes of the job, with --coordinator")
    group.add_argument("--process-id", type=int, help="number of this process, with --coordinator")


def initialize(args: argparse.Namespace) -> None:
    """Joins the job's other processes. Call once, before anything touches a device.

    Args:
      args: what a parser with `add_arguments` returned.
    """
    if args.coordinator is not None:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    elif args.distributed:
        jax.distributed.initialize()


def from_first_process(array: np.ndarray) -> np.ndarray:
    """The first process's array, on every process.

    Args:
      array: of the same shape and dtype in every process.

    Returns:
      An array of that shape and dtype.
    """
    if jax.process_count() == 1:
        return array
    return np.asarray(multihost_utils.broadcast_one_to_all(array))


def on_first_process(action: Callable[[], int | None]) -> int:
    """Call `action` on the first process only; every process gets its result, or fails with it.

    Args:
      action: returns a number that is not negative, or None for 0.

    Returns:
      The number.

    Raises:
      ValueError, OSError: `action` raised it, on the first process; the others raise a ValueError.
    """
    value, failure = 0, None
    if jax.process_index() == 0:
        try:
            value = int(action() or 0)
        except (ValueError, OSError) as error:
            value, failure = -1, error
    value = int(from_first_process(np.array(value, np.int32)))
    if failure is not None:
        raise failure
    if value < 0:
        raise ValueError("stopped with the first process of the job, which says why")
    return value


def only_on_first(value: T | None) -> T:
    """A value that the first process alone has, for code that the first process alone runs.

    Args:
      value: None on the other processes.

    Raises:
      RuntimeError: called on another process.
    """
    if value is None:
        raise RuntimeError(
            f"process {jax.process_index()} has no results; the first process has them"
        )
    return value
