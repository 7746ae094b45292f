"""The contrastive loss of a batch whose pairs are spread over the devices of a mesh.

Owns the communication: gathering candidates from all devices and averaging over them. The formulas
are `loss.py` and `focal_loss.py`.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from llave_jax.loss.focal import Focal
from llave_jax.loss.hardness import (
    Formula,
    Hardness,
    RowStatistics,
    masked_mean,
    metrics_from_rows,
    row_losses,
    row_statistics,
    similarity_matrix,
)
from llave_jax.loss.tiled import Negatives, PoolMask, pool_sums

KINDS = ("hardness", "focal")

# Up to this many similarities per device their matrix is held (16 MiB, and value and gradient hold
# seven such); a larger one is computed in tiles, which is also faster: benchmarks/loss_memory.py.
LARGEST_MATRIX = 2**22
# Larger tiles are no faster and take a TPU's compiler minutes.
BLOCK_SIZE = 1024


def contrastive_loss(
    query: jax.Array,
    target: jax.Array,
    valid: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
    axes: tuple[str, ...] = ("data", "fsdp"),
    kind: str = "hardness",
    alpha: ArrayLike = 9.0,
    temperature: ArrayLike = 0.02,
    margin: ArrayLike = 0.3,
    cross_device: bool = True,
    extra_targets: jax.Array | None = None,
    extra_valid: jax.Array | None = None,
    target_ids: jax.Array | None = None,
    extra_ids: jax.Array | None = None,
    block_size: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Contrastive loss of the global batch, each device computing its own rows.

    Equals `hardness_weighted_contrastive_loss(query @ target.T, valid=valid)` of the whole batch
    (`focal_contrastive_loss` for kind "focal"), in value and in gradient, however the valid pairs
    are spread over the devices. Gradients flow through the gather: a device's embeddings are also
    negatives of the others' rows.

    With `cross_device=False` nothing is gathered: the pairs of each shard are a pool by themselves,
    and the result is the mean over all valid pairs of their losses there. Where all shards have
    equally many valid pairs that is the mean of the shards' losses, as the authors take it.

    Args:
      query: [N, D] L2-normalised embeddings of the global batch, sharded over `axes` (arrays with
        another sharding are resharded). N is a multiple of the number of shards.
      target: [N, D]; row i is the positive of query i.
      valid: bool [N], False for empty slots.
      mesh: the mesh; axes of it that are not in `axes` (tensor) do the same work redundantly.
      axes: the mesh axes that split the batch. An axis left out would not lose negatives, only
        repeat work.
      kind: one of KINDS.
      alpha: hardness, for kind "hardness"; 0 is InfoNCE. Like the temperature and the margin it may
        be traced and has a gradient.
      temperature: positive.
      margin: for kind "focal".
      cross_device: whether the targets of all shards are candidates of every query.
      extra_targets: [K, D] further negatives of every query (hard negatives), K a multiple of the
        number of shards. They are no rows: the target -> query direction does not see them.
      extra_valid: bool [K]; goes with `extra_targets`.
      target_ids: int32 [N]; targets of equal id are the same target, so neither is a negative
        for the other's query. None: every other pair is a negative, as in the authors' code.
      extra_ids: int32 [K]; goes with `extra_targets` if `target_ids` is given.
      block_size: compute the similarities in square tiles of this side, never holding a device's
        whole [N / shards, N + K] matrix. None: tiles of BLOCK_SIZE if that matrix has more than
        LARGEST_MATRIX entries, else the whole matrix.

    Returns:
      The loss, a float32 scalar (0 if no pair is valid), and the scalars of
      `loss.similarity_metrics` for the global batch.

    Raises:
      ValueError: a shape, an axis or a combination of arguments does not fit, or a number is out of
        range.
      TypeError: `valid` or `extra_valid` is not bool.

    References: LLaVE (arXiv 2503.04812), section 3.2, cross-device negative sample gathering.
    """
    formula = _formula(kind, alpha, temperature, margin)
    batch = {"embedding": target, "valid": valid, "ids": target_ids}
    extra = {"embedding": extra_targets, "valid": extra_valid, "ids": extra_ids}
    if block_size is not None and block_size < 1:
        raise ValueError(f"block_size must be at least 1, found {block_size}")
    shards = _check(query, batch, extra, mesh, axes)
    size = query.shape[0]
    candidates = size + (0 if extra_targets is None else extra_targets.shape[0])
    if not cross_device:
        candidates //= shards
    if block_size is None and size // shards * candidates > LARGEST_MATRIX:
        block_size = BLOCK_SIZE
    options = {"axes": axes, "pool_axes": axes if cross_device else ()}
    if block_size is None:
        local = functools.partial(_loss_of_rows, **options)
    else:
        local = functools.partial(_loss_in_blocks, **options, block_size=block_size)
    spec, everywhere = PartitionSpec(axes), PartitionSpec()
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec, spec, everywhere), out_specs=everywhere
    )
    return sharded(query, batch, extra, formula)


def _formula(kind: str, alpha: ArrayLike, temperature: ArrayLike, margin: ArrayLike) -> Formula:
    """The formula of that kind, its numbers checked and float32."""
    formulas = {"hardness": Hardness(alpha, temperature), "focal": Focal(margin, temperature)}
    if kind not in formulas:
        raise ValueError(f"kind is {kind!r}; expected one of {KINDS}")
    formulas[kind].check()
    return jax.tree.map(lambda number: jnp.asarray(number, jnp.float32), formulas[kind])


def _loss_of_rows(query, batch, extra, formula, *, axes, pool_axes):
    """One device's n = N / shards queries, and its n targets, against all candidates.

    `batch` holds the device's targets with their masks, `extra` its hard negatives; candidates come
    from the devices along `pool_axes`, the mean is taken over those along `axes`.
    """
    valid, ids = batch["valid"], batch["ids"]
    # An empty slot may hold anything; 0 * nan in the matrix product's gradient would be nan.
    query = jnp.where(valid[:, None], query.astype(jnp.float32), 0)
    targets = _gather_candidates(batch, extra, pool_axes)
    targets["embedding"] = jnp.where(targets["valid"][:, None], targets["embedding"], 0)
    queries = _gather(query, pool_axes)
    size = queries.shape[0]
    n = valid.shape[0]
    positive = _first_row(n, pool_axes) + jnp.arange(n)
    target = jax.lax.dynamic_slice_in_dim(targets["embedding"], positive[0], n)

    to_target = {"columns": targets["valid"], "negatives": None}
    to_query = {"columns": targets["valid"][:size], "negatives": None}
    if ids is not None:
        to_target["negatives"] = ids[:, None] != targets["ids"]
        to_query["negatives"] = to_target["negatives"][:, :size]
    query_to_target = similarity_matrix(query, targets["embedding"])
    target_to_query = similarity_matrix(target, queries)
    losses = row_losses(query_to_target, positive, formula, **to_target)
    losses += row_losses(target_to_query, positive, formula, **to_query)
    statistics = row_statistics(query_to_target, positive, **to_target)
    targets_correct = row_statistics(target_to_query, positive, **to_query).correct
    metrics = metrics_from_rows(statistics, targets_correct, valid, axes)
    return 0.5 * masked_mean(losses, valid, axes), metrics


def _loss_in_blocks(query, batch, extra, formula, *, axes, pool_axes, block_size):
    """The same from tiles of the device's n queries against all candidates.

    The rows of the target -> query direction are the columns of these tiles: each device holds a
    part of every target's logsumexp, and the parts are put together. Queries are not gathered.
    """
    valid = batch["valid"]
    n = valid.shape[0]
    targets = _gather_candidates(batch, extra, pool_axes)
    first = _first_row(n, pool_axes)
    # The rule of `pool_sums` gives each device's part of the numbers' gradient; pcast adds them up.
    formula = jax.tree.map(lambda number: jax.lax.pcast(number, axes, to="varying"), formula)
    pool = PoolMask(valid, targets["valid"], first, batch["ids"], targets["ids"])
    query = query.astype(jnp.float32)
    sums = pool_sums(query, targets["embedding"], pool, formula, block_size)
    of_targets = _merge_columns(sums.columns, n, pool_axes)

    logit = formula.positive(sums.positive) / formula.temperature
    losses = jax.nn.softplus(sums.rows.logsumexp - logit)
    losses += jax.nn.softplus(of_targets.logsumexp - logit)
    sums, of_targets = jax.lax.stop_gradient((sums, of_targets))
    has_negative = jnp.isfinite(sums.rows.hardest)
    index = first + jnp.arange(n)
    statistics = RowStatistics(
        positive=sums.positive,
        hard_negative=jnp.where(has_negative, sums.rows.hardest, 0),
        easy_negative=jnp.where(has_negative, sums.rows.easiest, 0),
        correct=valid & _is_first_maximum(sums.positive, index, sums.rows),
        has_negative=has_negative,
    )
    targets_correct = valid & _is_first_maximum(sums.positive, index, of_targets)
    metrics = metrics_from_rows(statistics, targets_correct, valid, axes)
    return 0.5 * masked_mean(losses, valid, axes), metrics


def _gather(arrays, axes: tuple[str, ...]):
    """The arrays of all devices along `axes`, one after the other; without axes the device's own."""
    return jax.lax.all_gather(arrays, axes, tiled=True) if axes else arrays


def _first_row(n: int, axes: tuple[str, ...]) -> jax.Array:
    """Where the device's own n rows begin in what `_gather` returns."""
    return jax.lax.axis_index(axes) * n if axes else jnp.int32(0)


def _gather_candidates(batch, extra, axes: tuple[str, ...]):
    """The devices' targets, followed by the devices' extra targets, float32."""
    batch = {**batch, "embedding": batch["embedding"].astype(jnp.float32)}
    candidates = _gather(batch, axes)
    if extra["embedding"] is None:
        return candidates
    extra = {**extra, "embedding": extra["embedding"].astype(jnp.float32)}
    gathered = _gather(extra, axes)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), candidates, gathered)


def _merge_columns(columns: Negatives, n: int, axes: tuple[str, ...]) -> Negatives:
    """Of what each device found in its rows for all columns, the total for its own n columns."""
    if not axes:
        return jax.tree.map(lambda x: x[:n], columns)
    first = _first_row(n, axes)
    size = n * jax.lax.axis_size(axes)

    def own(values):
        return jax.lax.dynamic_slice_in_dim(values, first, n)

    columns = jax.tree.map(lambda x: x[:size], columns)
    found = jax.lax.stop_gradient(columns)
    maximum = jax.lax.pmax(found.logsumexp, axes)
    shares = jnp.exp(columns.logsumexp - maximum)
    total = jax.lax.psum_scatter(shares, axes, tiled=True)
    hardest = jax.lax.pmax(found.hardest, axes)
    nowhere = jnp.iinfo(jnp.int32).max
    index = jax.lax.pmin(jnp.where(found.hardest == hardest, found.hardest_index, nowhere), axes)
    return Negatives(
        logsumexp=own(maximum) + jnp.log(total),
        hardest=own(hardest),
        hardest_index=own(index),
        easiest=own(jax.lax.pmin(found.easiest, axes)),
    )


def _is_first_maximum(positive: jax.Array, index: jax.Array, negatives: Negatives) -> jax.Array:
    ties = (positive == negatives.hardest) & (index < negatives.hardest_index)
    return (positive > negatives.hardest) | ties


def _check(query, batch, extra, mesh, axes) -> int:
    """Raises ValueError if the arrays do not fit together; the number of shards if they do."""
    missing = [axis for axis in axes if axis not in mesh.shape]
    if missing:
        raise ValueError(f"mesh has axes {tuple(mesh.shape)}, but the batch is split over {axes}")
    shards = math.prod(mesh.shape[axis] for axis in axes)
    if query.ndim != 2 or query.shape != batch["embedding"].shape:
        raise ValueError(
            "query and target must both be [N, D]; "
            f"found {query.shape} and {batch['embedding'].shape}"
        )
    has_extra = extra["embedding"] is not None
    if has_extra != (extra["valid"] is not None):
        raise ValueError("extra_targets and extra_valid go together; only one was given")
    if (has_extra and batch["ids"] is not None) != (extra["ids"] is not None):
        raise ValueError(
            "extra_ids is needed if extra_targets and target_ids are both given, and only then"
        )
    _check_sizes("pairs", len(query), shards, valid=batch["valid"], target_ids=batch["ids"])
    if has_extra:
        shape = extra["embedding"].shape
        if len(shape) != 2 or shape[1] != query.shape[1]:
            raise ValueError(f"extra_targets must be [K, {query.shape[1]}]; found {shape}")
        masks = {"extra_valid": extra["valid"], "extra_ids": extra["ids"]}
        _check_sizes("extra targets", shape[0], shards, **masks)
    return shards


def _check_sizes(what: str, size: int, shards: int, **arrays: jax.Array | None) -> None:
    if not size or size % shards:
        raise ValueError(f"{size} {what} do not split evenly over {shards} shards")
    for name, array in arrays.items():
        if array is not None and array.shape != (size,):
            raise ValueError(f"there are {size} {what}, but {name} has shape {array.shape}")
        if array is not None and name.endswith("valid") and array.dtype != jnp.bool_:
            raise TypeError(f"{name} must be bool, found {array.dtype}")
