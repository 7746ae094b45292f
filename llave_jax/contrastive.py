"""The contrastive loss of a batch whose pairs are spread over the devices of a mesh.

Owns the communication: gathering candidates from all devices and averaging over them. The formula
is `loss.py`.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from llave_jax.loss import masked_mean, metrics_from_rows, row_losses, row_statistics


def contrastive_loss(
    query: jax.Array,
    target: jax.Array,
    valid: jax.Array,
    *,
    mesh: jax.sharding.Mesh,
    axes: tuple[str, ...] = ("data", "fsdp"),
    alpha: float = 9.0,
    temperature: float = 0.02,
    extra_targets: jax.Array | None = None,
    extra_valid: jax.Array | None = None,
    target_ids: jax.Array | None = None,
    extra_ids: jax.Array | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Hardness-weighted contrastive loss of the global batch, each device computing its own rows.

    Equals `hardness_weighted_contrastive_loss(query @ target.T, valid=valid)` of the whole batch,
    in value and in gradient, however the valid pairs are spread over the devices. Gradients flow
    through the gather: a device's embeddings are also negatives of the others' rows.

    Args:
      query: [N, D] L2-normalised embeddings of the global batch, sharded over `axes` (arrays with
        another sharding are resharded). N is a multiple of the number of shards.
      target: [N, D]; row i is the positive of query i.
      valid: bool [N], False for empty slots.
      mesh: the mesh; axes of it that are not in `axes` (tensor) do the same work redundantly.
      axes: the mesh axes that split the batch. An axis left out would not lose negatives, only
        repeat work.
      alpha: hardness; 0 is InfoNCE.
      temperature: positive.
      extra_targets: [K, D] further negatives of every query (hard negatives), K a multiple of the
        number of shards. They are no rows: the target -> query direction does not see them.
      extra_valid: bool [K]; goes with `extra_targets`.
      target_ids: int32 [N]; targets of equal id are the same target, so neither is a negative
        for the other's query. None: every other pair is a negative, as in the paper.
      extra_ids: int32 [K]; goes with `extra_targets` if `target_ids` is given.

    Returns:
      The loss, a float32 scalar (0 if no pair is valid), and the scalars of
      `loss.similarity_metrics` for the global batch.

    Raises:
      ValueError: a shape, an axis or a combination of arguments does not fit.

    References: LLaVE (arXiv 2503.04812), section 3, cross-device negative sample gathering.
    """
    batch = {"query": query, "target": target, "valid": valid, "ids": target_ids}
    extra = {"target": extra_targets, "valid": extra_valid, "ids": extra_ids}
    _check(batch, extra, mesh, axes)

    def local(batch, extra):
        return _local_loss(batch, extra, axes=axes, alpha=alpha, temperature=temperature)

    spec = PartitionSpec(axes)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=spec, out_specs=PartitionSpec())
    return sharded(batch, extra)


def _local_loss(batch, extra, *, axes, alpha, temperature):
    """The body of `contrastive_loss` on one device: n = N/shards rows in both directions."""
    valid = batch["valid"]
    # An empty slot may hold anything; 0 * nan in the matrix product's gradient would be nan.
    query = jnp.where(valid[:, None], batch["query"].astype(jnp.float32), 0)
    target = jnp.where(valid[:, None], batch["target"].astype(jnp.float32), 0)
    columns = {"query": query, "target": target, "valid": valid, "ids": batch["ids"]}
    columns = jax.lax.all_gather(columns, axes, tiled=True)
    candidates = {name: columns[name] for name in ("target", "valid", "ids")}
    if extra["target"] is not None:
        gathered = jax.lax.all_gather(extra, axes, tiled=True)
        masked = jnp.where(gathered["valid"][:, None], gathered["target"].astype(jnp.float32), 0)
        gathered = {**gathered, "target": masked}
        candidates = jax.tree.map(lambda *x: jnp.concatenate(x), candidates, gathered)

    n = valid.shape[0]
    positive = jax.lax.axis_index(axes) * n + jnp.arange(n)
    to_target = {"columns": candidates["valid"], "negatives": None}
    to_query = {"columns": columns["valid"], "negatives": None}
    if batch["ids"] is not None:
        to_target["negatives"] = batch["ids"][:, None] != candidates["ids"]
        to_query["negatives"] = batch["ids"][:, None] != columns["ids"]

    query_to_target = _similarity(query, candidates["target"])
    target_to_query = _similarity(target, columns["query"])
    options = {"alpha": alpha, "temperature": temperature}
    losses = row_losses(query_to_target, positive, **options, **to_target)
    losses += row_losses(target_to_query, positive, **options, **to_query)
    queries = row_statistics(query_to_target, positive, **to_target)
    targets = row_statistics(target_to_query, positive, **to_query)
    metrics = metrics_from_rows(queries, targets.correct, valid, axes)
    return 0.5 * masked_mean(losses, valid, axes), metrics


def _similarity(rows: jax.Array, columns: jax.Array) -> jax.Array:
    """ND,MD->NM in full float32: at temperature 0.02 bfloat16 products would move logits by 0.2."""
    return jnp.einsum("ND,MD->NM", rows, columns, precision=jax.lax.Precision.HIGHEST)


def _check(batch, extra, mesh, axes) -> None:
    missing = [axis for axis in axes if axis not in mesh.shape]
    if missing:
        raise ValueError(f"mesh has axes {tuple(mesh.shape)}, but the batch is split over {axes}")
    shards = math.prod(mesh.shape[axis] for axis in axes)
    query = batch["query"]
    if query.ndim != 2 or query.shape != batch["target"].shape:
        raise ValueError(
            f"query and target must both be [N, D]; found {query.shape} and {batch['target'].shape}"
        )
    if (extra["target"] is None) != (extra["valid"] is None):
        raise ValueError("extra_targets and extra_valid go together; only one was given")
    with_ids = batch["ids"] is not None and extra["target"] is not None
    if with_ids != (extra["ids"] is not None):
        raise ValueError(
            "extra_ids is needed if, and only if, extra_targets and target_ids are given"
        )
    _check_shapes("pairs", query.shape[0], shards, valid=batch["valid"], target_ids=batch["ids"])
    if extra["target"] is not None:
        if extra["target"].ndim != 2 or extra["target"].shape[1] != query.shape[1]:
            raise ValueError(
                f"extra_targets must be [K, {query.shape[1]}]; found {extra['target'].shape}"
            )
        _check_shapes(
            "extra targets",
            extra["target"].shape[0],
            shards,
            extra_valid=extra["valid"],
            extra_ids=extra["ids"],
        )


def _check_shapes(what: str, size: int, shards: int, **arrays: jax.Array | None) -> None:
    if not size or size % shards:
        raise ValueError(f"{size} {what} do not split evenly over {shards} shards")
    for name, array in arrays.items():
        if array is not None and array.shape != (size,):
            raise ValueError(f"there are {size} {what}, but {name} has shape {array.shape}")
