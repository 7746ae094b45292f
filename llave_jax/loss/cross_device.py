"""The contrastive loss of a batch whose pairs are spread over the devices of a mesh.

Owns the communication: the gather of candidates from all devices and the mean over them. The formulas are
`hardness.py` and `focal.py`.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from llave_jax.loss.focal import Focal
from llave_jax.loss.hardness import (
    Formula,
    Hardness,
    Number,
    RowStatistics,
    infonce,
    masked_mean,
    metrics_from_rows,
    row_losses,
    row_statistics,
    similarity_matrix,
)
from llave_jax.loss.tiled import Negatives, PoolMask, pool_sums

# Targets with what is known of them: "embedding" [..., D], "valid" bool [...], "ids" int32 [...]. What is
# not known is None.
Targets = dict[str, Any]
KINDS = ("hardness", "focal")

# A device holds its matrix of similarities if it has at most this many entries, 16 MiB. Value and gradient
# hold eight arrays of that size. A larger matrix is computed in tiles, which is also faster:
# benchmarks/loss_memory.py.
MAX_MATRIX_SIZE = 2**22
# Larger tiles are not faster, and a TPU's compiler takes minutes for them.
TILE_SIZE = 1024


def contrastive_loss(
    query: jax.Array,
    target: jax.Array,
    valid: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
    axes: tuple[str, ...] = ("data", "fsdp"),
    kind: str = "hardness",
    alpha: Number = 9.0,
    temperature: Number = 0.02,
    margin: Number = 0.3,
    cross_device: bool = True,
    extra_targets: jax.Array | None = None,
    extra_valid: jax.Array | None = None,
    target_ids: jax.Array | None = None,
    extra_ids: jax.Array | None = None,
    tile_size: int | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Contrastive loss of the global batch, in which each device computes the rows of its own pairs.

    It equals `hardness_weighted_contrastive_loss(query @ target.T, valid=valid)` of the whole batch
    (`focal_contrastive_loss` for kind "focal") in value and in gradient, however the valid pairs are
    spread over the devices. Gradients flow through the gather, because a device's embeddings are
    negatives of the other devices' rows too.

    With `cross_device=False` nothing is gathered. The pairs of each shard are a pool of their own, and the
    result is the mean over all valid pairs of their losses in these pools. If all shards have equally many
    valid pairs, it is the mean of the shards' losses, as the authors compute it.

    Args:
      query: [N, D] L2-normalised embeddings of the global batch, sharded over `axes` (arrays with
        another sharding are resharded). N is a multiple of the number of shards.
      target: [N, D]; row i is the positive of query i.
      valid: bool [N], False for empty slots.
      mesh: the mesh. Devices along an axis that is not in `axes` (tensor) repeat the same work.
      axes: the mesh axes that split the batch. Leaving one out repeats work, but loses no negatives.
      kind: one of KINDS.
      alpha: hardness, for kind "hardness"; 0 is InfoNCE. Alpha, temperature and margin may be traced,
        and have gradients.
      temperature: positive.
      margin: for kind "focal".
      cross_device: whether the targets of all shards are candidates of every query.
      extra_targets: [Y, D], further negatives of every query (hard negatives); Y is a multiple of the
        number of shards. They have no queries, so the target -> query direction does not use them.
      extra_valid: bool [Y]; goes with `extra_targets`.
      target_ids: int32 [N]; targets of equal id are the same target, so neither is a negative
        for the other's query. None: every other pair is a negative, as in the authors' code.
      extra_ids: int32 [Y]; goes with `extra_targets` if `target_ids` is given.
      tile_size: side of the square tiles in which similarities are computed, so that a device never
        holds its whole [N / shards, N + Y] matrix. None: TILE_SIZE if that matrix has more than
        MAX_MATRIX_SIZE entries; otherwise the whole matrix is held.

    Returns:
      (loss, metrics): a float32 scalar, 0 if no pair is valid; the scalars of
      `loss.similarity_metrics` for the global batch, and `infonce_loss`, the plain InfoNCE of the same
      pools, which does not depend on kind, alpha and margin. Metrics have no gradient.

    Raises:
      ValueError: a shape, an axis or a combination of arguments does not fit, or a number is out of
        range.
      TypeError: `valid` or `extra_valid` is not bool.

    References: LLaVE (arXiv 2503.04812), section 3.2, cross-device negative sample gathering.
    """
    formula = make_formula(kind, alpha, temperature, margin)
    formula = jax.tree.map(lambda number: jnp.asarray(number, jnp.float32), formula)
    batch = {"embedding": target, "valid": valid, "ids": target_ids}
    extra = {"embedding": extra_targets, "valid": extra_valid, "ids": extra_ids}
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, found {tile_size}")
    shards = _check(query, batch, extra, mesh, axes)
    size = query.shape[0]
    candidates = size + (0 if extra_targets is None else extra_targets.shape[0])
    if not cross_device:
        candidates //= shards
    if tile_size is None and size // shards * candidates > MAX_MATRIX_SIZE:
        tile_size = TILE_SIZE
    options = {"axes": axes, "pool_axes": axes if cross_device else ()}
    if tile_size is None:
        local = functools.partial(_loss_from_matrix, **options)
    else:
        local = functools.partial(_loss_from_tiles, **options, tile_size=tile_size)
    spec, everywhere = PartitionSpec(axes), PartitionSpec()
    sharded = jax.shard_map(
        local, mesh=mesh, in_specs=(spec, spec, spec, everywhere), out_specs=everywhere
    )
    return sharded(query, batch, extra, formula)


def make_formula(kind: str, alpha: Number, temperature: Number, margin: Number) -> Formula:
    """The formula of a kind of loss.

    Args:
      kind, alpha, temperature, margin: as of `contrastive_loss`.

    Returns:
      The formula with these numbers.

    Raises:
      ValueError: there is no such kind, or a number is out of range.
    """
    formulas: dict[str, Formula] = {
        "hardness": Hardness(alpha, temperature),
        "focal": Focal(margin, temperature),
    }
    if kind not in formulas:
        raise ValueError(f"kind is {kind!r}; expected one of {KINDS}")
    formulas[kind].check()
    return formulas[kind]


def _loss_from_matrix(
    query: Float[Array, "n D"],
    batch: Targets,
    extra: Targets,
    formula: Formula,
    *,
    axes: tuple[str, ...],
    pool_axes: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """The loss of one device's n queries and n targets, from the matrix of their similarities.

    Args:
      query: [n, D].
      batch: the device's n targets.
      extra: its extra targets.
      formula: its numbers are float32 arrays.
      axes: mesh axes over which the mean is taken.
      pool_axes: mesh axes whose devices contribute candidates.
    """
    valid, ids = batch["valid"], batch["ids"]
    # An empty slot may hold nan, and 0 * nan in the gradient of the matrix product would be nan.
    query = jnp.where(valid[:, None], query.astype(jnp.float32), 0)
    targets = _gather_candidates(batch, extra, pool_axes)
    targets["embedding"] = jnp.where(targets["valid"][:, None], targets["embedding"], 0)
    queries = _gather(query, pool_axes)
    size = queries.shape[0]
    n = valid.shape[0]
    positive = _first_row(n, pool_axes) + jnp.arange(n)
    target = jax.lax.dynamic_slice_in_dim(targets["embedding"], positive[0], n)

    to_target = {"column_valid": targets["valid"], "can_be_negative": None}
    to_query = {"column_valid": targets["valid"][:size], "can_be_negative": None}
    if ids is not None:
        to_target["can_be_negative"] = ids[:, None] != targets["ids"]
        to_query["can_be_negative"] = to_target["can_be_negative"][:, :size]
    query_to_target = similarity_matrix(query, targets["embedding"])
    target_to_query = similarity_matrix(target, queries)
    losses = row_losses(query_to_target, positive, formula, **to_target)
    losses += row_losses(target_to_query, positive, formula, **to_query)
    statistics = row_statistics(query_to_target, positive, **to_target)
    target_is_correct = row_statistics(target_to_query, positive, **to_query).is_correct
    metrics = metrics_from_rows(statistics, target_is_correct, valid, axes)
    plain = infonce(formula)
    similarities = jax.lax.stop_gradient((query_to_target, target_to_query))
    plain_losses = row_losses(similarities[0], positive, plain, **to_target)
    plain_losses += row_losses(similarities[1], positive, plain, **to_query)
    metrics["infonce_loss"] = 0.5 * masked_mean(plain_losses, valid, axes)
    return 0.5 * masked_mean(losses, valid, axes), metrics


def _loss_from_tiles(
    query: Float[Array, "n D"],
    batch: Targets,
    extra: Targets,
    formula: Formula,
    *,
    axes: tuple[str, ...],
    pool_axes: tuple[str, ...],
    tile_size: int,
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """The same as `_loss_from_matrix`, from tiles of the matrix.

    The rows of the target -> query direction are the columns of the query -> target matrix. Each device
    computes a part of every column, and `_merge_columns` puts the parts together. So queries are not
    gathered.
    """
    valid = batch["valid"]
    n = valid.shape[0]
    targets = _gather_candidates(batch, extra, pool_axes)
    first = _first_row(n, pool_axes)
    # `pool_sums` gives each device's part of the gradient of the formula's numbers. The gradient of
    # pcast is the sum of the parts.
    formula = jax.tree.map(lambda number: jax.lax.pcast(number, axes, to="varying"), formula)
    mask = PoolMask(valid, targets["valid"], first, batch["ids"], targets["ids"])
    query = query.astype(jnp.float32)
    sums = pool_sums(query, targets["embedding"], mask, formula, tile_size)
    columns = _merge_columns(sums.columns, n, pool_axes)

    logit = formula.positive(sums.positive) / formula.temperature
    losses = jax.nn.softplus(sums.rows.logsumexp - logit)
    losses += jax.nn.softplus(columns.logsumexp - logit)
    sums, columns = jax.lax.stop_gradient((sums, columns))
    plain_logit = sums.positive / infonce(formula).temperature
    plain_losses = jax.nn.softplus(sums.rows.plain_logsumexp - plain_logit)
    plain_losses += jax.nn.softplus(columns.plain_logsumexp - plain_logit)
    has_negative = jnp.isfinite(sums.rows.hardest)
    index = first + jnp.arange(n)
    statistics = RowStatistics(
        positive=sums.positive,
        hard_negative=jnp.where(has_negative, sums.rows.hardest, 0),
        easy_negative=jnp.where(has_negative, sums.rows.easiest, 0),
        is_correct=valid & _is_first_maximum(sums.positive, index, sums.rows),
        has_negative=has_negative,
    )
    target_is_correct = valid & _is_first_maximum(sums.positive, index, columns)
    metrics = metrics_from_rows(statistics, target_is_correct, valid, axes)
    metrics["infonce_loss"] = 0.5 * masked_mean(plain_losses, valid, axes)
    return 0.5 * masked_mean(losses, valid, axes), metrics


def _gather(arrays, axes: tuple[str, ...]):
    """Concatenates the arrays of all devices along `axes`. Without axes, returns the device's own."""
    return jax.lax.all_gather(arrays, axes, tiled=True) if axes else arrays


def _first_row(n: int, axes: tuple[str, ...]) -> Int32[Array, ""]:
    """The index of the device's own first row in the result of `_gather`."""
    return jax.lax.axis_index(axes) * n if axes else jnp.int32(0)


def _gather_candidates(batch: Targets, extra: Targets, axes: tuple[str, ...]) -> Targets:
    """The targets of all devices in float32, then the extra targets of all devices."""
    batch = {**batch, "embedding": batch["embedding"].astype(jnp.float32)}
    candidates = _gather(batch, axes)
    if extra["embedding"] is None:
        return candidates
    extra = {**extra, "embedding": extra["embedding"].astype(jnp.float32)}
    gathered = _gather(extra, axes)
    return jax.tree.map(lambda *parts: jnp.concatenate(parts), candidates, gathered)


def _merge_columns(columns: Negatives, n: int, axes: tuple[str, ...]) -> Negatives:
    """Combines the devices' column statistics: each device has A partial ones, and gets its n complete.

    The sums of exponentials are combined by psum_scatter, relative to the maximum over devices.
    """
    if not axes:
        return jax.tree.map(lambda x: x[:n], columns)
    first = _first_row(n, axes)
    size = n * jax.lax.axis_size(axes)

    def own(values):
        return jax.lax.dynamic_slice_in_dim(values, first, n)

    columns = jax.tree.map(lambda x: x[:size], columns)
    found = jax.lax.stop_gradient(columns)

    def total(logsumexp):
        maximum = jax.lax.pmax(jax.lax.stop_gradient(logsumexp), axes)
        partial = jnp.exp(logsumexp - maximum)
        return own(maximum) + jnp.log(jax.lax.psum_scatter(partial, axes, tiled=True))

    hardest = jax.lax.pmax(found.hardest, axes)
    nowhere = jnp.iinfo(jnp.int32).max
    index = jax.lax.pmin(jnp.where(found.hardest == hardest, found.hardest_index, nowhere), axes)
    return Negatives(
        logsumexp=total(columns.logsumexp),
        plain_logsumexp=total(found.plain_logsumexp),
        hardest=own(hardest),
        hardest_index=own(index),
        easiest=own(jax.lax.pmin(found.easiest, axes)),
    )


def _is_first_maximum(
    positive: Float[Array, " n"], index: Int32[Array, " n"], negatives: Negatives
) -> Bool[Array, " n"]:
    """Whether the positive, at column `index` of its row, comes before every equal or larger negative."""
    ties = (positive == negatives.hardest) & (index < negatives.hardest_index)
    return (positive > negatives.hardest) | ties


def _check(
    query: jax.Array,
    batch: Targets,
    extra: Targets,
    mesh: jax.sharding.Mesh,
    axes: tuple[str, ...],
) -> int:
    """Returns the number of shards.

    Raises:
      ValueError: the arrays do not fit together.
      TypeError: a mask is not bool.
    """
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
            raise ValueError(f"extra_targets must be [Y, {query.shape[1]}]; found {shape}")
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
