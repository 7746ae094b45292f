"""The contrastive loss of a batch whose pairs are spread over the devices of a mesh.

Owns the communication: the gather of candidates from all devices and the mean over them. The formulas are
`hardness.py` and `focal.py`, which candidates are negatives is `masks.py`.
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
from llave_jax.loss.masks import Slots, can_be_negative, is_own
from llave_jax.loss.tiled import Negatives, PoolMask, Temperatures, pool_sums

# Targets with what is known of them: "embedding" [..., D], "valid" bool [...], "ids" and "owner" int32 [...];
# of the pairs' own targets "own_only" bool [...] and "temperature" [...], too. What is not known is None.
Targets = dict[str, Any]
KINDS = ("hardness", "focal")
# The negatives that hardness weighs: all, those of other pairs, or those that the row itself names.
HARDNESS_ON = ("all", "in_batch", "explicit")

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
    hardness_on: str = "all",
    mask_margin: Number | None = None,
    cross_device: bool = True,
    own_negatives_only: jax.Array | None = None,
    extra_targets: jax.Array | None = None,
    extra_valid: jax.Array | None = None,
    target_ids: jax.Array | None = None,
    extra_ids: jax.Array | None = None,
    extra_owners: jax.Array | None = None,
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
      temperature: positive, one for all or [N], one for each pair: its query's row and its target's column
        have it.
      margin: for kind "focal".
      hardness_on: one of HARDNESS_ON, for kind "hardness": the negatives that are weighed by alpha. From
        target to query all negatives are of other pairs.
      mask_margin: a candidate that is more similar than the row's positive plus this is no negative of the
        row; likewise from target to query. None: all are. It has no gradient. Qwen3-VL-Embedding has 0.1
        (arXiv 2601.04720).
      cross_device: whether the targets of all shards are candidates of every query.
      own_negatives_only: bool [N], True for pairs whose query has no negatives but the extra targets of this
        pair, and whose target has none. Their targets are candidates of other queries all the same. None: of
        no pair.
      extra_targets: [Y, D], further negatives of every query (hard negatives); Y is a multiple of the
        number of shards. They have no queries, so the target -> query direction does not use them.
      extra_valid: bool [Y]; goes with `extra_targets`.
      target_ids: int32 [N]; targets of equal id are the same target, so neither is a negative
        for the other's query. None: every other pair is a negative, as in the authors' code.
      extra_ids: int32 [Y]; goes with `extra_targets` if `target_ids` is given.
      extra_owners: int32 [Y], the number among the N of the pair that an extra target belongs to, on the same
        shard. Needed with `own_negatives_only` and where hardness is not on all, and only then.
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
      TypeError: `valid`, `extra_valid` or `own_negatives_only` is not bool.

    References: LLaVE (arXiv 2503.04812), section 3.2, cross-device negative sample gathering.
    """
    formula = make_formula(kind, alpha, temperature, margin, hardness_on)
    by_pair = temperature if jnp.ndim(temperature) else None
    if by_pair is not None:
        formula = formula.at(1.0)
    formula, mask_margin, by_pair = jax.tree.map(
        lambda number: jnp.asarray(number, jnp.float32), (formula, mask_margin, by_pair)
    )
    batch = {"embedding": target, "valid": valid, "ids": target_ids}
    batch |= {"own_only": own_negatives_only, "temperature": by_pair}
    extra = {"embedding": extra_targets, "valid": extra_valid, "ids": extra_ids}
    extra |= {"owner": extra_owners}
    if tile_size is not None and tile_size < 1:
        raise ValueError(f"tile_size must be at least 1, found {tile_size}")
    shards = _check(query, batch, extra, mesh, axes)
    _check_owners(batch, extra, hardness_on)
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
    return sharded(query, batch, extra, (formula, mask_margin))


def make_formula(
    kind: str, alpha: Number, temperature: Number, margin: Number, hardness_on: str = "all"
) -> Formula:
    """The formula of a kind of loss.

    Args:
      kind, alpha, temperature, margin, hardness_on: as of `contrastive_loss`.

    Returns:
      The formula with these numbers.

    Raises:
      ValueError: there is no such kind or such `hardness_on`, they do not go together, or a number is out of
        range.
    """
    by_negatives = {"all": (alpha, None), "in_batch": (alpha, 0.0), "explicit": (0.0, alpha)}
    if hardness_on not in by_negatives:
        raise ValueError(f"hardness_on is {hardness_on!r}; expected one of {HARDNESS_ON}")
    if kind == "focal" and hardness_on != "all":
        raise ValueError(
            f"kind 'focal' has no hardness; hardness_on is {hardness_on!r}, expected 'all'"
        )
    in_batch, explicit = by_negatives[hardness_on]
    formulas: dict[str, Formula] = {
        "hardness": Hardness(in_batch, temperature, explicit),
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
    numbers: tuple[Formula, jax.Array | None],
    *,
    axes: tuple[str, ...],
    pool_axes: tuple[str, ...],
) -> tuple[Float[Array, ""], dict[str, jax.Array]]:
    """The loss of one device's n queries and n targets, from the matrix of their similarities.

    Args:
      query: [n, D].
      batch: the device's n targets.
      extra: its extra targets.
      numbers: the formula, whose numbers are float32 arrays, and `mask_margin`.
      axes: mesh axes over which the mean is taken.
      pool_axes: mesh axes whose devices contribute candidates.
    """
    formula, mask_margin = numbers
    valid = batch["valid"]
    # An empty slot may hold nan, and 0 * nan in the gradient of the matrix product would be nan.
    query = jnp.where(valid[:, None], query.astype(jnp.float32), 0)
    n = valid.shape[0]
    positive = _first_row(n, pool_axes) + jnp.arange(n)
    targets = _gather_candidates(batch, extra, positive, axes, pool_axes)
    targets["embedding"] = jnp.where(targets["valid"][:, None], targets["embedding"], 0)
    queries = _gather(query, pool_axes)
    size = queries.shape[0]
    target = jax.lax.dynamic_slice_in_dim(targets["embedding"], positive[0], n)
    if batch["temperature"] is not None:
        formula = formula.at(batch["temperature"])

    query_to_target = similarity_matrix(query, targets["embedding"])
    target_to_query = similarity_matrix(target, queries)
    rows = Slots(
        ids=batch["ids"],
        owner=None if targets["owner"] is None else positive,
        limit=_limits(query, target, mask_margin),
        own_only=batch["own_only"],
    )
    columns = Slots(ids=targets["ids"], owner=targets["owner"])
    pairs = jax.tree.map(lambda x: x[:size], columns)
    to_target = {
        "column_valid": targets["valid"],
        "can_be_negative": can_be_negative(query_to_target, rows, columns),
    }
    to_query = {
        "column_valid": targets["valid"][:size],
        "can_be_negative": can_be_negative(target_to_query, rows, pairs),
    }
    explicit = is_own(rows, columns)
    losses = row_losses(query_to_target, positive, formula, **to_target, is_explicit=explicit)
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
    numbers: tuple[Formula, jax.Array | None],
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
    formula, mask_margin = numbers
    valid = batch["valid"]
    n = valid.shape[0]
    first = _first_row(n, pool_axes)
    index = first + jnp.arange(n)
    targets = _gather_candidates(batch, extra, index, axes, pool_axes)
    # `pool_sums` gives each device's part of the gradient of the formula's numbers. The gradient of
    # pcast is the sum of the parts.
    formula = jax.tree.map(lambda number: jax.lax.pcast(number, axes, to="varying"), formula)
    query = query.astype(jnp.float32)
    limit = _limits(query, batch["embedding"].astype(jnp.float32), mask_margin)

    def of_columns(values: jax.Array | None, of_extra: float | bool) -> jax.Array | None:
        """What is known of pairs, for all A columns: extra targets are no rows of the other direction."""
        if values is None:
            return None
        gathered = _gather(values, pool_axes)
        spare = targets["valid"].shape[0] - gathered.shape[0]
        return jnp.pad(gathered, (0, spare), constant_values=of_extra)

    mask = PoolMask(
        row_valid=valid,
        column_valid=targets["valid"],
        first_positive=first,
        rows=Slots(
            ids=batch["ids"],
            owner=None if targets["owner"] is None else index,
            limit=limit,
            own_only=batch["own_only"],
        ),
        columns=Slots(
            ids=targets["ids"],
            owner=targets["owner"],
            limit=of_columns(limit, math.inf),
            own_only=of_columns(batch["own_only"], False),
        ),
    )
    temperatures = None
    if batch["temperature"] is not None:
        all_temperatures = of_columns(batch["temperature"], 1.0)
        assert all_temperatures is not None
        temperatures = Temperatures(batch["temperature"], all_temperatures)
    sums = pool_sums(query, targets["embedding"], mask, formula, temperatures, tile_size)
    columns = _merge_columns(sums.columns, n, pool_axes)

    if temperatures is not None:
        formula = formula.at(temperatures.rows)
    logit = formula.positive(sums.positive) / formula.temperature
    losses = jax.nn.softplus(sums.rows.logsumexp - logit)
    losses += jax.nn.softplus(columns.logsumexp - logit)
    sums, columns = jax.lax.stop_gradient((sums, columns))
    plain_logit = sums.positive / infonce(formula).temperature
    plain_losses = jax.nn.softplus(sums.rows.plain_logsumexp - plain_logit)
    plain_losses += jax.nn.softplus(columns.plain_logsumexp - plain_logit)
    has_negative = jnp.isfinite(sums.rows.hardest)
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


def _limits(
    query: Float[Array, "n D"], target: Float[Array, "n D"], mask_margin: jax.Array | None
) -> Float[Array, " n"] | None:
    """The largest similarity that a negative of each pair may have, in both directions.

    It does not come from the matrix, whose rounding depends on how it is cut: every device and every tile
    compares with the same number.
    """
    if mask_margin is None:
        return None
    positive = jnp.einsum("nD,nD->n", query, target, precision=jax.lax.Precision.HIGHEST)
    return jax.lax.stop_gradient(positive + mask_margin)


def _gather(arrays, axes: tuple[str, ...]):
    """Concatenates the arrays of all devices along `axes`. Without axes, returns the device's own."""
    return jax.lax.all_gather(arrays, axes, tiled=True) if axes else arrays


def _first_row(n: int, axes: tuple[str, ...]) -> Int32[Array, ""]:
    """The index of the device's own first row in the result of `_gather`."""
    return jax.lax.axis_index(axes) * n if axes else jnp.int32(0)


def _gather_candidates(
    batch: Targets,
    extra: Targets,
    index: Int32[Array, " n"],
    axes: tuple[str, ...],
    pool_axes: tuple[str, ...],
) -> Targets:
    """The targets of all devices in float32, then the extra targets of all devices.

    "owner" is the number of a pair in the pool, `index` for the device's own n, where a rule needs owners.
    """
    batch = {
        "embedding": batch["embedding"].astype(jnp.float32),
        "valid": batch["valid"],
        "ids": batch["ids"],
        "owner": index if batch["own_only"] is not None or extra["owner"] is not None else None,
    }
    candidates = _gather(batch, pool_axes)
    if extra["embedding"] is None:
        return candidates
    extra = {**extra, "embedding": extra["embedding"].astype(jnp.float32)}
    if extra["owner"] is not None:
        n = index.shape[0]
        extra["owner"] = extra["owner"] + _first_row(n, pool_axes) - _first_row(n, axes)
    gathered = _gather(extra, pool_axes)
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
    of_pairs = {"valid": batch["valid"], "target_ids": batch["ids"]}
    of_pairs |= {"own_negatives_only": batch["own_only"], "temperature": batch["temperature"]}
    _check_sizes("pairs", len(query), shards, **of_pairs)
    if has_extra:
        shape = extra["embedding"].shape
        if len(shape) != 2 or shape[1] != query.shape[1]:
            raise ValueError(f"extra_targets must be [Y, {query.shape[1]}]; found {shape}")
        masks = {"extra_valid": extra["valid"], "extra_ids": extra["ids"]}
        masks |= {"extra_owners": extra["owner"]}
        _check_sizes("extra targets", shape[0], shards, **masks)
    return shards


def _check_owners(batch: Targets, extra: Targets, hardness_on: str) -> None:
    """Refuses extra targets whose owners are needed and not given.

    Raises:
      ValueError: they are needed and not given, or the other way round.
    """
    needed = batch["own_only"] is not None or hardness_on != "all"
    if (needed and extra["embedding"] is not None) != (extra["owner"] is not None):
        raise ValueError(
            "extra_owners is needed if extra_targets is given with own_negatives_only or with hardness_on "
            "other than 'all', and only then"
        )


def _check_sizes(what: str, size: int, shards: int, **arrays: jax.Array | None) -> None:
    if not size or size % shards:
        raise ValueError(f"{size} {what} do not split evenly over {shards} shards")
    for name, array in arrays.items():
        if array is not None and array.shape != (size,):
            raise ValueError(f"there are {size} {what}, but {name} has shape {array.shape}")
        is_mask = name.endswith(("valid", "only"))
        if array is not None and is_mask and array.dtype != jnp.bool_:
            raise TypeError(f"{name} must be bool, found {array.dtype}")
