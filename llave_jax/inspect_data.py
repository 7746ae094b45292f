"""Look at training data before spending money on it: figures by subset, and a page of samples.

    python -m llave_jax.inspect_data --config NAME [--workdir DIR] [--rows 200]

Prints rows, lengths, image sizes, tokens, how well batches of the config's budget would be filled, and
the flags that set this budget by hand; writes WORKDIR/data.html with pairs as the model sees them.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from llave_jax.common import command_line
from llave_jax.common.directories import make_directory
from llave_jax.config import Config
from llave_jax.data.batch_plan import BatchPlan
from llave_jax.data.inspection import packing_report, subset_report
from llave_jax.data.inspection_page import write_page
from llave_jax.data.measure import measure_subsets, mixed_sizes
from llave_jax.data.packing_simulation import PairSizes
from llave_jax.data.rows import EMPTY_SIDE
from llave_jax.data.skips import by_subset, listed
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.models.config import LlaveConfig
from llave_jax.parallel import sharding
from llave_jax.training import batch_shape, setup
from llave_jax.training.batch_search import BatchSearch, with_batch, with_batch_by_hand
from llave_jax.training.config_check import check_config

_SIMULATED_STEPS = 20
# Devices of the paper's runs.
_SHARDS = 8


def inspect(
    config: Config, workdir: Path, *, rows: int, samples: int, shards: int | None = None
) -> str:
    """Measures the data of a config and writes the page.

    Args:
      config: of a run.
      workdir: where the page is written.
      rows: rows to measure in each subset.
      samples: pairs of each subset on the page.
      shards: devices that a batch is split over. None: those of this machine where the batch depends
        on them, otherwise 8.

    Returns:
      The printed report.

    Raises:
      ValueError, OSError: the config does not describe a run, or its data cannot be read.
    """
    check_config(config)
    make_directory(workdir)
    config = setup.with_local_model(config)
    data_path, tokenizer_path = setup.locate_data(config, workdir)
    tokenizer = setup.load_tokenizer(config, tokenizer_path)
    llave_config = setup.model_config(config)
    builder = SequenceBuilder(tokenizer, llave_config.input_spec)
    source = setup.open_training_source(config, data_path)
    measured = measure_subsets(source, builder, rows, batch_shape.sides(config))
    measure = functools.cache(functools.partial(setup.measure_data, config, source, builder))
    config, shards = _with_known_batch(config, llave_config, len(source), measure, shards)
    sizes = mixed_sizes(
        measured, _SIMULATED_STEPS * config.batch.pairs, weights=dict(config.data.weights) or None
    )
    left_out = f"left out, as {EMPTY_SIDE}: {by_subset(listed(source.left_out))}"
    plan = _find_plan(config, llave_config, shards, measure)
    packing = packing_report(
        sizes,
        plan.budget,
        rows=len(source),
        steps=batch_shape.total_steps(config, len(source), plan.fill),
        shards=shards,
        micro_batches=config.batch.micro_batches,
        group_size=batch_shape.dealing(config, shards).get("group_size"),
    )
    parts = [
        subset_report(measured),
        *([left_out] if source.left_out else []),
        "",
        f"{plan.pairs} pairs a step in {plan.micro_batches} micro-batch(es); a device has {plan} in each",
        packing,
        "the same by hand:",
        *batch_shape.flags_by_hand(config, llave_config, shards, plan, measure),
    ]
    report = "\n".join(parts)
    write_page(workdir / "data.html", report, source, builder, samples)
    return report


def _with_known_batch(
    config: Config,
    llave_config: LlaveConfig,
    rows: int,
    measure: Callable[[], PairSizes],
    shards: int | None,
) -> tuple[Config, int]:
    """The config with the pairs and micro-batches that training would have here, and the shards."""
    by_hand = shards or (None if config.batch.pairs is None else _SHARDS)
    if by_hand and (known := with_batch_by_hand(config, by_hand)):
        return known, by_hand
    mesh = setup.make_mesh(config)
    here = sharding.num_shards(mesh)
    if known := with_batch_by_hand(config, here):
        return known, here
    if shards not in (None, here):
        raise ValueError(
            f"--shards is {shards}: config.batch.pairs and micro_batches are planned by the memory of the "
            f"devices, of which there are {here} here; set both, or leave --shards out"
        )
    plan = BatchSearch(config, llave_config, mesh, rows, measure).find()
    return with_batch(config, plan.pairs, plan.micro_batches), here


def _find_plan(
    config: Config, llave_config: LlaveConfig, shards: int, measure: Callable[[], PairSizes]
) -> BatchPlan:
    """The batches that training would make; also those, set by hand, that it would refuse."""
    try:
        return batch_shape.make_plan(config, llave_config, shards, measure)
    except ValueError:
        batch = config.batch
        if None in (batch.row_length, batch.tokens_per_pair, batch.crops_per_pair):
            raise
        return batch_shape.plan_by_hand(config, shards)


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the flags.

    Args:
      argv: the command line without the program; None: the process's.

    Returns:
      The flags' values.
    """
    parser = command_line.Parser("llave_jax.inspect_data", __doc__, takes_config=True)
    parser.add_argument(
        "--workdir",
        type=Path,
        default=Path("inspected_data"),
        help="where the page is written (default: %(default)s)",
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=200,
        help="rows to measure in each subset (default: %(default)s)",
    )
    parser.add_argument(
        "--samples",
        type=int,
        default=3,
        help="pairs of each subset on the page (default: %(default)s)",
    )
    parser.add_argument(
        "--shards",
        type=int,
        help="devices a batch is split over (default: 8; where the config leaves pairs or micro-batches "
        "open, the devices of this machine)",
    )
    return parser.parse_args(argv)


def _command(args: argparse.Namespace) -> None:
    command_line.set_up_logging(args, first=False)
    print(
        inspect(args.config, args.workdir, rows=args.rows, samples=args.samples, shards=args.shards)
    )
    print(f"samples: {args.workdir / 'data.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: as for `parse_args`.

    Returns:
      The exit status.
    """
    return command_line.run(_command, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
