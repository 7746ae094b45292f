"""How many pairs a step has, and in how many micro-batches, where the config leaves that open.

Pairs follow from the number of rows. Micro-batches are as few as the memory of a device allows, which is
measured by compiling the step itself for a few candidates. Rows and crops of a micro-batch are planned by
`data/batch_plan.py`, memory is read by `memory.py`.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax

from llave_jax.config import Config
from llave_jax.data.batch_plan import BatchPlan
from llave_jax.data.packing_simulation import PairSizes
from llave_jax.models.config import LlaveConfig
from llave_jax.parallel import processes, sharding
from llave_jax.training import batch_shape, memory, setup

log = logging.getLogger(__name__)

T = TypeVar("T")

# Rows of an epoch make so many steps or more, unless a step would have fewer than the least pairs: with too
# few steps there is nothing to train, with too few pairs nothing to tell apart.
_STEPS_AN_EPOCH, _LEAST_PAIRS = 8, 8
_GIB = 2**30


class BatchSearch:
    """Finds the batch of a run. All processes of a job make the same calls: each compiles, the first decides.

    Attributes:
      tried: bytes that a device needs, by (pairs, micro-batches) of every step that was compiled; None
        where the compiler found that they are more than there are.
    """

    def __init__(
        self,
        config: Config,
        llave_config: LlaveConfig,
        mesh: jax.sharding.Mesh,
        rows: int,
        measure: Callable[[], PairSizes],
        limit: Callable[[], int] | None = None,
        subsets: Sequence[str] | None = None,
    ):
        """Args:
        config: of the run.
        llave_config: the model that is trained.
        mesh: of the devices to train on.
        rows: pairs of the training data.
        measure: gives the sizes of a sample of them. It is called at most once, on the first process.
        limit: gives the bytes that a step may take on a device; None: what this machine's devices have.
        subsets: names of the data's subsets, as for `setup.build_training`.
        """
        self._config, self._llave_config, self._mesh = config, llave_config, mesh
        self._rows, self._measure = rows, functools.cache(measure)
        self._limit = functools.cache(limit or self._limit_here)
        self._shards, self._subsets = sharding.num_shards(mesh), subsets
        self._trainings: dict[tuple[int, int, int], setup.Training] = {}
        self.tried: dict[tuple[int, int], int | None] = {}

    def find(self, pairs: int | None = None) -> BatchPlan:
        """The batch with the most pairs, and of these the one with the fewest micro-batches, that fits.

        Nothing is compiled if the config sets both.

        Args:
          pairs: of a step, as the run began with; None: what the config sets, or as many as suit the data.

        Raises:
          ValueError: not even the smallest batch fits into the devices' memory, or the config's numbers do
            not go together.
        """
        batch = self._config.batch
        asked = asked_pairs(self._config, self._shards) if pairs is None else pairs
        if asked is not None and batch.micro_batches is not None:
            return self._plan((asked, batch.micro_batches))
        candidates = [asked] if asked else pairs_candidates(self._config, self._rows, self._shards)
        # For most data the first compilation is the last: the most pairs in the fewest micro-batches.
        first = (candidates[0], self._micro_batches(candidates[0])[0])
        if self._fits(first):
            return self._found(first)

        def smallest_parts(pairs: int) -> tuple[int, int]:
            return pairs, self._micro_batches(pairs)[-1]

        most = _first(candidates, lambda pairs: self._fits(smallest_parts(pairs)))
        if most is None:
            raise ValueError(self._too_large(smallest_parts(candidates[-1])))
        parts = _first(self._micro_batches(most), lambda parts: self._fits((most, parts)))
        return self._found((most, parts or smallest_parts(most)[1]))

    def training(self, config: Config, plan: BatchPlan, total_steps: int) -> setup.Training:
        """The program of a plan: the one that was compiled to find it, where that was necessary.

        Args:
          config: of the run, with the plan's pairs and micro-batches.
          plan: as of `find`, or as the run began with.
          total_steps: of the run.
        """
        found = self._trainings.get((plan.pairs, plan.micro_batches, total_steps))
        return found or self._build(config, total_steps)

    def _build(self, config: Config, total_steps: int) -> setup.Training:
        model = self._llave_config
        return setup.build_training(config, model, self._mesh, total_steps, self._subsets)

    def _found(self, sizes: tuple[int, int]) -> BatchPlan:
        self._trainings = {k: v for k, v in self._trainings.items() if k[:2] == sizes}
        log.info(
            "planned: %d pairs a step in %d micro-batch(es), which take %.2f of %.2f GiB a device",
            *(*sizes, (self.tried[sizes] or 0) / _GIB, self._limit() / _GIB),
        )
        return self._plan(sizes)

    def _limit_here(self) -> int:
        return memory.device_limit(jax.local_devices()[0])

    def _micro_batches(self, pairs: int) -> list[int]:
        """In how many parts so many pairs may go through the model, the fewest first."""
        asked = self._config.batch.micro_batches
        if asked is not None:
            return [asked]
        if pairs % self._shards:
            raise ValueError(
                f"batch.pairs is {pairs}: it does not divide over {self._shards} devices; make it a "
                f"multiple of {self._shards}"
            )
        group = pairs // self._shards
        parts = [n for n in range(1, group + 1) if group % n == 0]
        # By numbers set by hand, small parts may have no room for an item of the model.
        by_hand = any(vars(batch_shape.settings_of(self._config)).values())
        while by_hand and len(parts) > 1:
            try:
                self._plan((pairs, parts[-1]))
                break
            except ValueError:
                parts.pop()
        return parts

    @functools.cache  # noqa: B019
    def _plan(self, sizes: tuple[int, int]) -> BatchPlan:
        """The room of a batch of so many pairs and micro-batches; the first process plans it."""
        plan: BatchPlan | None = None

        def make() -> None:
            nonlocal plan
            config = with_batch(self._config, *sizes)
            plan = batch_shape.make_plan(config, self._llave_config, self._shards, self._measure)

        processes.on_first_process(make)
        values = processes.json_from_first_process(None if plan is None else plan.to_dict())
        return BatchPlan.from_dict(values)

    def _fits(self, sizes: tuple[int, int]) -> bool:
        if sizes not in self.tried:
            self._compile(sizes)
        needed = self.tried[sizes]
        enough = bool(
            processes.on_first_process(lambda: needed is not None and needed <= self._limit())
        )
        if not enough:
            log.info(
                "%d pairs a step in %d micro-batch(es) need %s a device, more than there are", *sizes,
                "more GiB than the compiler allows" if needed is None else f"{needed / _GIB:.2f} GiB",
            )  # fmt: skip
        return enough

    def _compile(self, sizes: tuple[int, int]) -> None:
        plan = self._plan(sizes)
        config = with_batch(self._config, *sizes)
        steps = batch_shape.total_steps(config, self._rows, plan.fill)
        training = self._build(config, steps)
        lowered = setup.lower_step(training, self._mesh, plan.budget, plan.micro_batches)
        if not self.tried:
            log.info("compiling the step, to see how many pairs fit into memory")
        try:
            self.tried[sizes] = memory.step_bytes(lowered.compile())
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            self.tried[sizes] = None
        self._trainings[*sizes, steps] = training

    def _too_large(self, sizes: tuple[int, int]) -> str:
        needed, devices = self.tried[sizes], self._mesh.devices.size
        needs = "more memory than" if needed is None else f"{needed / _GIB:.2f} GiB, more than"
        return (
            f"the model does not fit: {sizes[0]} pairs a step in {sizes[1]} micro-batch(es), "
            f"{sizes[0] // (self._shards * sizes[1])} a device, need {needs} the "
            f"{self._limit() / _GIB:.2f} GiB that a training step may take on each of {devices} "
            "device(s). Use more devices or memory, --config.remat=both, smaller inputs "
            "(--config.model.inputs.max_length, --config.model.inputs.pinpoints) or freeze more "
            "(--config.optim.rates)"
        )


def with_batch(config: Config, pairs: int, micro_batches: int) -> Config:
    """The config of a run whose batch is known.

    Args:
      config: of the run; it is not changed.
      pairs: of a step.
      micro_batches: of a step.

    Returns:
      A copy with these numbers.
    """
    config = config.copy_and_resolve_references()
    config.batch.pairs, config.batch.micro_batches = pairs, micro_batches
    return config


def asked_pairs(config: Config, shards: int) -> int | None:
    """Pairs of a step as the config sets them.

    Args:
      config: of the run.
      shards: devices that a step is split over.

    Returns:
      The number; None where it is to be planned.
    """
    batch = config.batch
    if batch.pairs is None and batch.pairs_per_device is not None:
        return batch.pairs_per_device * shards
    return batch.pairs


def with_batch_by_hand(config: Config, shards: int) -> Config | None:
    """The config with its pairs, where it sets pairs and micro-batches.

    Args:
      config: of the run; it is not changed.
      shards: devices that a step is split over.

    Returns:
      A copy with both numbers; None where one of them is to be planned.
    """
    pairs, micro_batches = asked_pairs(config, shards), config.batch.micro_batches
    if pairs is None or micro_batches is None:
        return None
    return with_batch(config, pairs, micro_batches)


def pairs_candidates(config: Config, rows: int, shards: int) -> list[int]:
    """Pairs that a step may have, the most first: `batch.max_pairs`, halved and halved again.

    The most are those that leave an epoch of enough steps; the least are a few, one for each device.

    Args:
      config: of the run.
      rows: pairs of the training data.
      shards: devices that a step is split over; pairs are a multiple of them.

    Returns:
      At least one number.
    """
    batch = config.batch
    unit = shards * (batch.micro_batches or 1)
    found, pairs = [], batch.max_pairs
    while pairs >= min(_LEAST_PAIRS, batch.max_pairs):
        if pairs * _STEPS_AN_EPOCH <= rows:
            found.append(pairs)
        pairs //= 2
    found = found or [min(_LEAST_PAIRS, batch.max_pairs)]
    rounded = [-(-pairs // unit) * unit for pairs in found]
    return sorted(set(rounded), reverse=True)


def _first(values: Sequence[T], is_enough: Callable[[T], bool]) -> T | None:
    """The first value that is enough, where those behind it are, too; None: none is. By bisection.

    It begins with the first one, which mostly is enough.
    """
    low, high, middle = 0, len(values), 0
    while low < high:
        if is_enough(values[middle]):
            high = middle
        else:
            low = middle + 1
        middle = (low + high) // 2
    return values[low] if low < len(values) else None
