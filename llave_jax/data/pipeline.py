"""The stream of training batches: put together from a source, an order, loading and packing, on grain.

Which rows there are is `sources.py`. The order in which they are read is `order.py`, `modality_order.py` and
`mined_order.py`. Loading is `loading.py`, packing them into steps `step_iterators.py`.

Processes do not talk to each other. At every step each process takes its part of one batch of the order,
or as much of it as fits. So the number of steps that an epoch takes is not known beforehand, and differs a
little between processes. Training on several processes therefore counts steps over an endless stream
(`epochs=None`): after every step all processes have made the same number of batches.

Two copies of a row, or rows of equal content, never share a step: each would be a negative of the
other. A copy waits for a later step.
"""

from __future__ import annotations

import functools
import os

import grain
import numpy as np

from llave_jax.common.content import short_hash
from llave_jax.data.loading import RowLoader
from llave_jax.data.mined_order import MinedOrder, deal_clusters
from llave_jax.data.modality_order import ModalityOrder, ModalityPart
from llave_jax.data.order import (
    UNIFORM,
    Composition,
    Members,
    Turns,
    UniformOrder,
    UniformPart,
    positions_of_subsets,
    row_order,
    rows_of_process,
)
from llave_jax.data.skips import SkipLog
from llave_jax.data.sources import PairSource
from llave_jax.data.step_iterators import (
    ModalityIterator,
    StepDataset,
    TrainBatch,
    UniformIterator,
)
from llave_jax.inputs.batch import Budget
from llave_jax.inputs.packing import Packer, default_lookahead
from llave_jax.inputs.sequence import SequenceBuilder

POLICIES = ("raise", "skip")


def train_iterator(
    source: PairSource,
    builder: SequenceBuilder,
    budget: Budget,
    *,
    seed: int,
    num_shards: int,
    micro_batches: int = 1,
    process_index: int = 0,
    process_count: int = 1,
    num_workers: int = 0,
    epochs: int | None = None,
    composition: Composition = UNIFORM,
    group_size: int | None = None,
    order_slots: int | None = None,
    on_error: str = "raise",
    skip_file: str | os.PathLike | None = None,
    max_skip_share: float = 0.01,
    lookahead: int | None = None,
    prefetch: int = 2,
    stall_warning: float = 60.0,
) -> grain.DatasetIterator[TrainBatch]:
    """An iterator of `TrainBatch`es for one process.

    `get_state()` gives a small dictionary for JSON. `set_state()` with it continues with exactly the batches
    that would have come, whatever the number of workers. orbax saves the iterator itself
    (`grain.checkpoint.CheckpointSave`).

    Args:
      source: pairs, the same in every process.
      builder: of the model's sequences.
      budget: of one shard of one micro-batch; `sides` is 2, and one for each negative to use of a row.
      seed: of the shuffle, at least 0.
      num_shards: shards (devices) of this process.
      micro_batches: packs a step.
      process_index, process_count: number of this process, and of all processes.
      num_workers: worker processes that load rows; 0 loads in threads of this process.
      epochs: stop after so many passes, the last batch padded with empty slots; for a single
        process. None: an endless stream.
      composition: uniform shuffle, sub-batches of one subset, weights, by modality, or mined neighbours.
      group_size: pairs that the modality order deals to one shard of one micro-batch; the budget
        should have room for more, since not every group fits. None: as many as the budget has slots.
      order_slots: slots of a batch of the uniform shuffle, a multiple of the processes. They decide which
        row comes when, so a run that goes on with another budget keeps them. None: those of the budget.
      on_error: "raise" or "skip" rows that cannot be used.
      skip_file: lists rows that are skipped, and on the first process those that the source leaves
        out: one JSON object a line. Needed with "skip".
      max_skip_share: with "skip", stop when more than this share of all rows is skipped. Several
        processes do not stop by themselves: the caller adds up what they skipped (`skip_limit`,
        `TrainBatch.skipped`), so that all stop at the same step.
      lookahead: pairs that may wait for a later batch while smaller ones fill the current one; None:
        `packing.default_lookahead`. By modality, so many that wait are kept in memory.
      prefetch: batches made ahead in a background thread.
      stall_warning: seconds without a row until a warning names it and the process that loads it; 0: never.

    Returns:
      An iterator of the process's batches.

    Raises:
      ValueError: arguments that do not go together. While iterating: `RowError`, `ImageError` or
        another ValueError for a row that cannot be used, `TooManySkips`.
    """
    if on_error not in POLICIES:
        raise ValueError(f"on_error is {on_error!r}; expected one of {POLICIES}")
    if on_error == "skip" and skip_file is None:
        raise ValueError('on_error="skip" needs a skip_file, which lists the rows')
    by_modality = composition.order == "modality"
    if epochs is not None and (process_count > 1 or composition.weights or by_modality):
        raise ValueError(
            "a fixed number of epochs needs one process and the uniform order without weights; count "
            "steps instead"
        )
    contents = source.contents()
    different = len(np.unique(contents))
    if different < process_count:
        raise ValueError(
            f"{len(source)} rows (equal ones counted once: {different}) do not reach for "
            f"{process_count} processes; use fewer"
        )
    process = {"process_index": process_index, "process_count": process_count}
    parts = process_count * num_shards * micro_batches
    num_subsets = len(source.subsets)
    batch_size = None
    if by_modality:
        part = ModalityPart(
            ModalityOrder(
                *source.queries(),
                num_groups=parts,
                group_size=group_size or budget.groups,
                seed=seed,
            ),
            micro_batches=micro_batches,
            num_shards=num_shards,
            **process,
        )
        order, batch_size = grain.MapDataset.source(part), part.order.batch_size
        positions = [part.order.batches_per_epoch * part.size] * num_subsets
        batches = functools.partial(ModalityIterator, part=part)
    elif composition.is_shuffle:
        starts = np.array([rows.start for rows in source.subsets.values()])
        batch_size = order_slots or parts * budget.groups
        uniform = UniformOrder(contents, starts, num_slots=batch_size, seed=seed)
        part = UniformPart(uniform, epochs=epochs, **process)
        order = grain.MapDataset.source(part)
        epoch = uniform.batches_per_epoch * part.size
        positions = [epoch] * num_subsets
        batches = functools.partial(UniformIterator, batch=part.size, epoch=epoch)
    elif composition.mined:
        clusters = deal_clusters(
            contents, composition.mined, size=composition.sub_batch, seed=seed, **process
        )
        part = MinedOrder(clusters, seed=seed, process_index=process_index, epochs=epochs)
        order = grain.MapDataset.source(part)
        positions = [part.size] * num_subsets
        batches = functools.partial(UniformIterator, epoch=part.size)
    else:
        subsets = rows_of_process(source, contents, seed=seed, **process)
        groups = row_order(subsets, seed=seed, epochs=epochs, composition=composition)
        order = Members(groups, composition.sub_batch)
        positions = positions_of_subsets(subsets, composition)
        batches = functools.partial(UniformIterator, epoch=sum(map(len, subsets.values())))
    skips = None
    if skip_file is not None:
        left_out = source.left_out if process_index == 0 else None
        limit = skip_limit(source, max_skip_share) if process_count == 1 else len(source)
        skips = SkipLog(skip_file, limit, left_out)
    dataset = StepDataset(
        batches,
        order,
        load=RowLoader(source, builder, budget.sides, skip=on_error == "skip", seed=seed),
        turns=Turns(list(source.subsets.values()), positions),
        packers=lambda: [
            Packer(budget, num_shards, builder.spec.crop) for _ in range(micro_batches)
        ],
        lookahead=lookahead or default_lookahead(budget, num_shards),
        num_workers=num_workers,
        contents=contents,
        skips=skips if on_error == "skip" else None,
        num_rows=len(source),
        stall_warning=stall_warning,
        identity={
            "seed": seed,
            "processes": process_count,
            "order": composition.name(source, batch_size),
            "rows": rows_fingerprint(source, contents),
        },
    )
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch)
    )


def rows_fingerprint(source: PairSource, contents: np.ndarray) -> str:
    """Tells rows that were rewritten from those that a run has read, wherever they lie.

    All queries and targets count, texts and image paths, in order; of a sample of 64 rows the negatives as
    well. Not counted is what image files hold.

    Args:
      source: of the rows.
      contents: its `contents()`.

    Returns:
      16 hexadecimal digits.
    """
    sample = np.linspace(0, len(contents) - 1, min(64, len(contents)), dtype=np.int64)
    digests = np.array([source.digest(int(index)) for index in sample], np.uint64)
    return short_hash(contents.astype("<u8").tobytes() + digests.astype("<u8").tobytes()).hex()


def skip_limit(source: PairSource, max_skip_share: float) -> int:
    """How many rows a run may skip.

    Args:
      source: of the run.
      max_skip_share: of its rows.

    Returns:
      A number of rows.
    """
    return int(max_skip_share * len(source))
