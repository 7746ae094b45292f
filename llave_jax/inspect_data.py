"""Look at training data before spending money on it: figures by subset, and a page of samples.

    python -m llave_jax.inspect_data --config NAME [--workdir DIR] [--rows 200]

Prints rows, lengths, image sizes, tokens, and how well batches of the config's budget would be
filled; writes WORKDIR/data.html with pairs as the model sees them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from llave_jax.common import command_line
from llave_jax.common.tables import align
from llave_jax.config import Config
from llave_jax.data.inspection_page import write_page
from llave_jax.data.measure import MeasuredSubset, measure_subsets, mixed_sizes
from llave_jax.data.packing_simulation import simulate
from llave_jax.data.rows import EMPTY_SIDE
from llave_jax.data.skips import by_subset, listed
from llave_jax.data.sources import PairSource
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.training import batch_shape, setup

_SIMULATED_STEPS = 20


def inspect(config: Config, workdir: Path, *, rows: int, samples: int, shards: int) -> str:
    """Measures the data of a config and writes the page; returns the printed report."""
    workdir.mkdir(parents=True, exist_ok=True)
    data_path, tokenizer_path = setup.locate_data(config, workdir)
    tokenizer = setup.load_tokenizer(config, tokenizer_path)
    builder = SequenceBuilder(tokenizer, setup.model_config(config).input_spec)
    source = setup.open_training_source(config, data_path)
    sides = 3 if config.loss.hard_negatives else 2
    measured = measure_subsets(source, builder, rows, sides)
    lines = subset_lines(measured)
    if source.left_out:
        lines.append(f"left out, as {EMPTY_SIDE}: {by_subset(listed(source.left_out))}")
    report = "\n".join([*lines, "", *packing_lines(config, source, measured, shards)])
    write_page(workdir / "data.html", report, source, builder, samples)
    return report


def subset_lines(measured: dict[str, MeasuredSubset]) -> list[str]:
    """A table of the subsets, with the first reasons why rows are unusable below it."""
    columns = ("rows", "text tokens", "image size", "tokens", "crops", "negatives", "unusable")
    rows = [["subset", *columns]]
    for subset, part in measured.items():
        count = len(part.lengths)
        cells = ["-"] * 5
        if count:
            crops = " / ".join(f"{mean:.1f}" for mean in part.crops.mean(0))
            negatives = f"{part.with_negative / count:.0%}"
            texts, images = _sides(part.text), _sizes(part.images)
            cells = [texts, images, _sides(part.lengths), crops, negatives]
        unusable = f"{len(part.unusable)} of {count + len(part.unusable)}"
        rows.append([subset, str(part.rows), *cells, unusable])
    lines = ["query / target (/ negative): mean (largest) of the measured rows", align(rows)]
    for part in measured.values():
        lines += [f"unusable: {name}: {why}" for name, why in list(part.unusable.items())[:3]]
    return lines


def packing_lines(
    config: Config, source: PairSource, measured: dict[str, MeasuredSubset], shards: int
) -> list[str]:
    """How the config's batches would be filled, and how many there are in an epoch."""
    budget = batch_shape.batch_budget(config, shards)
    step = config.batch.pairs
    sizes = mixed_sizes(measured, _SIMULATED_STEPS * step)
    per_pair = f"{sizes.lengths.sum(1).mean():.0f} tokens and {sizes.crops.sum(1).mean():.2f} crops"
    taps = max(part.taps for part in measured.values())
    lines = [
        f"a pair takes {per_pair} on average; the config has room for "
        f"{config.batch.tokens_per_pair:g} and {config.batch.crops_per_pair:g}",
        f"a batch on {shards} devices: {config.batch.micro_batches} x {shards} x {budget}",
    ]
    largest = {
        "row_length": sizes.lengths.max(),
        "crops": sizes.crops.sum(1).max(),
        "taps": taps,
    }
    short = {field: n for field, n in largest.items() if n > getattr(budget, field)}
    if short:
        needs = ", ".join(f"{field} {n}" for field, n in short.items())
        return [*lines, f"TOO SMALL for some measured pairs, which need {needs}"]
    packing = simulate(sizes, budget, shards, **batch_shape.dealing(config, shards))
    lines.append(
        f"filled, by simulation: {packing.tokens:.1%} of row tokens, {packing.crops:.1%} of crops, "
        f"{packing.pairs:.1%} of pair slots; {packing.carried:.1%} of pairs wait for another step, "
        f"{packing.carried_twice:.1%} for more than one"
    )
    run = batch_shape.total_steps(config, len(source))
    if config.data.order == "modality":
        return [*lines, f"{len(source)} pairs in the order by modality take {run} steps"]
    steps = len(source) / (step * packing.pairs)
    return [
        *lines,
        f"an epoch of {len(source)} pairs takes about {np.ceil(steps):.0f} steps; a run of this config "
        f"makes {run}, {run / steps:.2f} epochs (batch.fill {config.batch.fill:g} expected)",
    ]


def _sides(values: np.ndarray) -> str:
    pairs = zip(values.mean(0), values.max(0), strict=True)
    return " / ".join(f"{mean:.0f} ({largest})" for mean, largest in pairs)


def _sizes(images: list[tuple[int, int]]) -> str:
    if not images:
        return "none"
    typical, largest = np.median(images, 0).astype(int), np.max(images, 0)
    return f"{typical[0]}x{typical[1]} ({largest[0]}x{largest[1]})"


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
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
        "--shards", type=int, default=8, help="devices a batch is split over (default: %(default)s)"
    )
    return parser.parse_args(argv)


def command(args: argparse.Namespace) -> None:
    command_line.set_up_logging(args, first=False)
    print(
        inspect(args.config, args.workdir, rows=args.rows, samples=args.samples, shards=args.shards)
    )
    print(f"samples: {args.workdir / 'data.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    return command_line.run(command, parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
