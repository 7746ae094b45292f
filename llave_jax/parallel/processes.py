"""Joining the processes of a job: TPU pods, SLURM, GKE, or processes started by hand."""

from __future__ import annotations

import argparse
import itertools
import json
import signal
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax._src import distributed  # the job's key-value store has no public name
from jax.experimental import multihost_utils

from llave_jax.parallel import peers

T = TypeVar("T")

# How long a process waits for another one that lives: it may be reading a large checkpoint.
_LONGEST_WAIT_MS = 2 * 60 * 60 * 1000
_gathered = itertools.count()

# Exit status of a run that SIGTERM has stopped before its last step. Shells say the same of a process that it
# has ended; schedulers and the scripts of launch/ start such a job again.
STOPPED = 128 + signal.SIGTERM


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that say which job a process belongs to.

    Args:
      parser: of the command.
    """
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
    group.add_argument(
        "--heartbeat-timeout",
        type=int,
        default=100,
        metavar="SECONDS",
        help="a process whose host is silent for so long is lost, and the others end (default: 100); one that "
        "is killed is noticed within seconds",
    )


def initialize(args: argparse.Namespace) -> None:
    """Joins the job's other processes. Call once, before anything touches a device.

    Args:
      args: what a parser with `add_arguments` returned.
    """
    limit = {"heartbeat_timeout_seconds": args.heartbeat_timeout}
    if args.coordinator is not None:
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id, **limit)
    elif args.distributed:
        jax.distributed.initialize(**limit)
    peers.watch()


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


def json_from_first_process(values: Any) -> Any:
    """The first process's values, on every process.

    Args:
      values: what JSON can hold; read on the first process only.

    Returns:
      The values, as JSON gives them back.
    """
    if jax.process_count() == 1:
        return json.loads(json.dumps(values))
    text = json.dumps(values).encode() if jax.process_index() == 0 else b""
    size = int(from_first_process(np.array(len(text), np.int32)))
    sent = np.frombuffer(text.ljust(size), np.uint8)
    return json.loads(from_first_process(sent).tobytes())


def gather(value: Any) -> list[Any]:
    """A value of every process, in every process. All processes call it, and wait for each other.

    It goes through the service by which the processes found each other, and needs no device.

    Args:
      value: what JSON can hold, up to a megabyte.

    Returns:
      The values in the order of the processes, as JSON gives them back.
    """
    text, job = json.dumps(value), distributed.global_state
    if job.client is None:
        return [json.loads(text)]
    key = f"llave_jax/gather/{next(_gathered)}"
    job.client.key_value_set(f"{key}/{job.process_id}", text)
    job.client.wait_at_barrier(key, _LONGEST_WAIT_MS)
    found = {int(name.rpartition("/")[2]): text for name, text in job.client.key_value_dir_get(key)}
    return [json.loads(found[process]) for process in range(job.num_processes)]


def require_same(values: Mapping[str, Any], advice: str) -> None:
    """Refuses a job whose processes were started differently. All processes call it.

    Args:
      values: name -> what must be the same in all processes; what JSON can hold.
      advice: ends the message.

    Raises:
      ValueError: in every process, naming what differs and in which processes.
    """
    by_process = gather(dict(values))
    differences = []
    for name in sorted({name for found in by_process for name in found}):
        processes: dict[str, list[int]] = {}
        for process, found in enumerate(by_process):
            processes.setdefault(json.dumps(found.get(name)), []).append(process)
        if len(processes) > 1:
            different = ", ".join(f"{value} in {_numbers(of)}" for value, of in processes.items())
            differences.append(f"{name}: {different}")
    if differences:
        raise ValueError(
            f"the processes of this job differ: {'; '.join(differences[:8])}. {advice}"
        )


def _numbers(processes: Sequence[int]) -> str:
    listed = ", ".join(map(str, processes[:8])) + (", ..." if len(processes) > 8 else "")
    return f"process{'es' if len(processes) > 1 else ''} {listed}"


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

    Returns:
      The value.

    Raises:
      RuntimeError: called on another process.
    """
    if value is None:
        raise RuntimeError(
            f"process {jax.process_index()} has no results; the first process has them"
        )
    return value
