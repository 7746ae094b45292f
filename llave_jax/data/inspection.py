"""What `llave_jax.inspect_data` prints: figures of the measured subsets, and how batches would be filled.

Measuring is `measure.py`; the page of sample pairs is `inspection_page.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from llave_jax.common.tables import align
from llave_jax.data.measure import MeasuredSubset
from llave_jax.data.packing_simulation import PairSizes, simulate
from llave_jax.inputs.batch import Budget

_COLUMNS = (
    "subset",
    "rows",
    "text tokens",
    "image size",
    "tokens",
    "crops",
    "targets",
    "negatives",
    "scored",
    "unusable",
)
# Reasons that are shown for each subset with unusable rows.
_REASONS = 3


def subset_report(measured: Mapping[str, MeasuredSubset]) -> str:
    """A table of the subsets, with the first reasons why rows are unusable below it.

    Args:
      measured: by the subset's name.

    Returns:
      Lines of text.
    """
    rows = [[subset, *_cells(part)] for subset, part in measured.items()]
    reasons = [
        f"unusable: {name}: {why}"
        for part in measured.values()
        for name, why in list(part.unusable.items())[:_REASONS]
    ]
    return "\n".join(
        [
            "query / target (/ negative): mean (largest) of the measured rows",
            align([_COLUMNS, *rows]),
            *reasons,
        ]
    )


def _cells(part: MeasuredSubset) -> list[str]:
    usable, unusable = len(part.lengths), len(part.unusable)
    figures = ["-"] * (len(_COLUMNS) - 3)
    if usable:
        figures = [
            _by_side(part.text),
            _image_sizes(part.images),
            _by_side(part.lengths),
            " / ".join(f"{mean:.1f}" for mean in part.crops.mean(0)),
            _count(part.targets),
            _count(part.negatives),
            f"{part.scored / usable:.0%}",
        ]
    return [str(part.rows), *figures, f"{unusable} of {usable + unusable}"]


def _by_side(values: np.ndarray) -> str:
    pairs = zip(values.mean(0), values.max(0), strict=True)
    return " / ".join(f"{mean:.0f} ({largest})" for mean, largest in pairs)


def _count(values: np.ndarray) -> str:
    return f"{values.mean():.2g} ({values.max()})"


def _image_sizes(images: list[tuple[int, int]]) -> str:
    if not images:
        return "none"
    typical, largest = np.median(images, 0).astype(int), np.max(images, 0)
    return f"{typical[0]}x{typical[1]} ({largest[0]}x{largest[1]})"


def packing_report(
    sizes: PairSizes,
    budget: Budget,
    *,
    rows: int,
    steps: int,
    shards: int,
    micro_batches: int,
    group_size: int | None = None,
) -> str:
    """How batches of a budget would be filled, and how many of them an epoch takes.

    Args:
      sizes: of pairs drawn as training draws them.
      budget: of each shard of each micro-batch.
      rows: of the source.
      steps: of the run.
      shards: devices that the batch is split over.
      micro_batches: of a step.
      group_size: as for `simulate`.

    Returns:
      Lines of text.
    """
    lines = [
        f"a pair takes {sizes.lengths.sum(1).mean():.0f} tokens and {sizes.crops.sum(1).mean():.2f} crops "
        f"on average, the largest {sizes.lengths.sum(1).max()} and {sizes.crops.sum(1).max()}",
        f"a batch on {shards} devices: {micro_batches} x {shards} x {budget}",
    ]
    largest = {
        "row_length": sizes.lengths.max(),
        "crops": sizes.crops.sum(1).max(),
        "taps": sizes.taps,
    }
    short = {field: need for field, need in largest.items() if need > getattr(budget, field)}
    if short:
        needs = ", ".join(f"{field} {need}" for field, need in short.items())
        return "\n".join([*lines, f"TOO SMALL for some measured pairs, which need {needs}"])
    dealing = (
        {} if group_size is None else {"group_size": group_size, "micro_batches": micro_batches}
    )
    packing = simulate(sizes, budget, shards, **dealing)
    lines.append(
        f"filled, by simulation: {packing.tokens:.1%} of row tokens, {packing.crops:.1%} of crops, "
        f"{packing.pairs:.1%} of pair slots; {packing.carried:.1%} of pairs wait for another step, "
        f"{packing.carried_twice:.1%} for more than one"
    )
    if group_size is not None:
        lines.append(f"{rows} pairs in the order by modality take {steps} steps")
    else:
        slots = micro_batches * shards * budget.groups
        epoch = rows / (slots * packing.pairs)
        lines.append(
            f"an epoch of {rows} pairs takes about {math.ceil(epoch)} steps; a run of this config makes "
            f"{steps}, {steps / epoch:.2f} epochs"
        )
    return "\n".join(lines)
