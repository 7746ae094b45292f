"""Stages of work on a Ray cluster, by Ray Data: back-pressure, retries and lost nodes are its business.

Owns joining the cluster, and how values go through the stages. What the stages do is the callers'.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import logging
import math
import pickle
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from llave_jax.common import extras


def add_engine_argument(parser: argparse.ArgumentParser) -> None:
    """Adds `--engine`.

    Args:
      parser: of the command.
    """
    parser.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="ray: on the cluster of RAY_ADDRESS, or one of this machine; all nodes see the same files",
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds `--engine`, and which workers hold a model.

    Args:
      parser: of the command.
    """
    add_engine_argument(parser)
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="with ray: how many work at once; default: as many as the cluster has room for",
    )
    parser.add_argument(
        "--worker-resources",
        type=_resources,
        metavar="NAME=AMOUNT,...",
        help="with ray: what each of them holds, such as GPU=1, TPU=4 or CPU=8; default: GPU=1 if the cluster has "
        "GPUs, a node's TPU if it has these, otherwise CPU=1",
    )


def _resources(text: str) -> dict[str, float]:
    try:
        pairs = [part.partition("=") for part in text.split(",")]
        found = {name: float(amount) for name, _, amount in pairs if name}
    except ValueError:
        found = {}
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}: expected NAME=AMOUNT, such as GPU=1")
    return found


def workers(args: argparse.Namespace) -> tuple[int, dict[str, float]]:
    """How many workers hold what, by a command's flags and what the cluster has.

    Args:
      args: what a parser with `add_arguments` returned.

    Returns:
      Their number, and the resources of each. A CPU is left for tasks that read.

    Raises:
      ValueError: no node has what a worker should hold, or --workers leaves no CPU.
    """
    ray = connect()
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    resources = args.worker_resources
    if resources is None:
        resources = {"CPU": 1.0}
        for name in ("GPU", "TPU"):
            amounts = [node[name] for node in nodes if node.get(name)]
            if amounts:
                resources = {name: 1.0 if name == "GPU" else min(amounts)}
                break
    room = sum(
        min(int(node.get(name, 0) // amount) for name, amount in resources.items() if amount)
        for node in nodes
    )
    if not room:
        raise ValueError(f"no node of the cluster has {resources}; see --worker-resources")
    amount = resources.get("CPU", 0)
    if not amount:
        return args.workers or room, resources
    # A task that reads holds a CPU: on a node whose workers leave one over, or in the place of some of them.
    spare = any(node.get("CPU", 0) % amount >= 1 for node in nodes)
    most = room if spare else room - math.ceil(1 / amount)
    count = args.workers or most
    if not 1 <= count <= most:
        raise ValueError(
            f"{count or 1} workers with {resources} leave the cluster no CPU for tasks that read; it has room for "
            f"{max(0, most)}: see --workers and --worker-resources"
        )
    return count, resources


def connect() -> Any:
    """Joins the cluster that the environment names, or starts one on this machine.

    Returns:
      The module `ray`.

    Raises:
      MissingPackage: Ray is not installed.
    """
    extras.require("ray", "jobs on a cluster")
    ray = importlib.import_module("ray")
    importlib.import_module("ray.data")
    if not ray.is_initialized():
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    return ray


@dataclasses.dataclass(frozen=True)
class Stage:
    """What is done with each value.

    Attributes:
      make: called once in each worker; what it returns is called with each value. Picklable.
      resources: that a worker holds: CPU, GPU, or a resource that nodes were given (TPU).
      workers: how many at once; None: tasks, as many as there is room for.
    """

    make: Callable[[], Callable[[Any], Any]]
    resources: dict[str, float] = dataclasses.field(default_factory=lambda: {"CPU": 1.0})
    workers: int | None = None


def results(values: Iterable[Any], stages: Sequence[Stage]) -> Iterator[Any]:
    """Sends values through stages.

    Args:
      values: picklable, as is what comes out of a stage. Work is divided, and repeated after a loss, by these.
      stages: in order. Each may run twice for a value whose node was lost; what it writes has to allow that.

    Yields:
      What the last stage returned for each value, in the order in which they are done.
    """
    ray = connect()
    rows = [{"value": pickle.dumps(value)} for value in values]
    if not rows:
        return
    data = ray.data.from_items(rows, override_num_blocks=len(rows))
    for stage in stages:
        options = dict(stage.resources)
        arguments: dict[str, Any] = {
            "num_cpus": options.pop("CPU", 0),
            "num_gpus": options.pop("GPU", 0),
            "resources": options,
        }
        if stage.workers is not None:
            arguments["compute"] = ray.data.ActorPoolStrategy(size=stage.workers)
            data = data.map(_Worker, fn_constructor_args=(stage.make,), **arguments)
        else:
            data = data.map(_task(stage.make), **arguments)
    for row in data.iter_rows():
        yield pickle.loads(row["value"])


class _Worker:
    def __init__(self, make: Callable[[], Callable[[Any], Any]]):
        self._run = make()

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"value": pickle.dumps(self._run(pickle.loads(row["value"])))}


def _task(make: Callable[[], Callable[[Any], Any]]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def run(row: dict[str, Any]) -> dict[str, Any]:
        return {"value": pickle.dumps(make()(pickle.loads(row["value"])))}

    return run
