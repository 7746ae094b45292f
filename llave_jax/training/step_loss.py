"""The loss of one step as a function of the parameters, and what its settings mean.

The whole batch goes through the model in micro-batches; the loss sees one pool of pairs, the whole
batch (`pool="global"`, exact gradients), each micro-batch by itself (`pool="micro"`, the authors'
gradient accumulation) or each device's part of a micro-batch (`pool="device"`, no negatives from
other devices). The loss is the mean over all pairs of the step, in every kind of pool.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from llave_jax.inputs.batch import PackedBatch, PairLabels
from llave_jax.loss.cross_device import HARDNESS_ON, KINDS, contrastive_loss
from llave_jax.loss.distillation import distillation_losses
from llave_jax.loss.matryoshka import prefix, shares
from llave_jax.loss.temperature import clamp, initial_log_scale, temperature_of
from llave_jax.models import lora
from llave_jax.models.llave import VISION_FEATURES, Llave
from llave_jax.models.remat import find_remat
from llave_jax.parallel import sharding

POOLS = ("global", "micro", "device")


@dataclasses.dataclass(frozen=True)
class LossConfig:
    """The settings of the loss, `config.loss` without those of rows and of the optimiser.

    Attributes:
      kind, alpha, temperature, margin, hardness_on, mask_margin: as for
        `loss.cross_device.contrastive_loss`. A learned temperature begins at `temperature`.
      pool: which pairs are each other's negatives, one of POOLS: all of a step, those of one micro-batch,
        or those of one device's part of it.
      mask_false_negatives: targets of equal content are not negatives of each other's queries.
      in_batch_off: subsets whose pairs have no negatives but their own rows'.
      learn_temperature: train it with the model.
      temperature_per_subset: one learned temperature for each subset.
      temperature_range: the least and the largest learned temperature.
      dims: prefixes of the embeddings that are trained, ascending to the whole; (): the whole alone.
      dim_weights: of `dims` in the loss; (): all count the same.
      distill_weight: share of the divergence from a teacher's scores in the loss, from 0 to 1.
      teacher_temperature: of the teacher's scores.
      subsets: names of the data's subsets, in the order in which labels number them.

    Raises:
      ValueError: a name is unknown, or settings do not go together.
    """

    kind: str = "hardness"
    alpha: float = 9.0
    temperature: float = 0.02
    margin: float = 0.3
    pool: str = "global"
    mask_false_negatives: bool = False
    hardness_on: str = "all"
    mask_margin: float | None = None
    in_batch_off: tuple[str, ...] = ()
    learn_temperature: bool = False
    temperature_per_subset: bool = False
    temperature_range: tuple[float, float] = (0.01, 1.0)
    dims: tuple[int, ...] = ()
    dim_weights: tuple[float, ...] = ()
    distill_weight: float = 0.0
    teacher_temperature: float = 1.0
    subsets: tuple[str, ...] = ()

    def __post_init__(self):
        for name, known in (("kind", KINDS), ("pool", POOLS), ("hardness_on", HARDNESS_ON)):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"loss.{name} is {value!r}; expected one of {known}")
        if self.temperature_per_subset and not self.learn_temperature:
            raise ValueError("loss.temperature_per_subset needs loss.learn_temperature=True")
        unknown = [name for name in self.in_batch_off if name not in self.subsets]
        if unknown:
            raise ValueError(
                f"loss.in_batch_off names {', '.join(unknown)}; the data's subsets are "
                f"{', '.join(self.subsets) or 'not known'}"
            )
        if self.dims or self.dim_weights:
            shares(self.dims, self.dim_weights)

    def initial(self) -> dict[str, jax.Array] | None:
        """What the loss has learned before the first step: parameters by name; None where it learns nothing."""
        if not self.learn_temperature:
            return None
        subsets = len(self.subsets) if self.temperature_per_subset else None
        return {"log_scale": initial_log_scale(self.temperature, subsets)}

    @property
    def asks_subsets(self) -> bool:
        """Whether the loss depends on the pairs' subsets."""
        return bool(self.in_batch_off) or self.temperature_per_subset

    @property
    def asks_owners(self) -> bool:
        """Whether the loss depends on whose negative a hard negative is."""
        return bool(self.in_batch_off) or self.hardness_on != "all"

    def in_range(self, learned: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What the loss has learned, moved back into its range after an update.

        Args:
          learned: as of `initial`.

        Returns:
          The same, in range.
        """
        return {name: clamp(value, self.temperature_range) for name, value in learned.items()}

    def learned_metrics(self, learned: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        """What is logged of what the loss has learned.

        Args:
          learned: as of `initial`.

        Returns:
          "temperature"; by subset also "temperature/NAME", of which it is the mean.
        """
        temperature = temperature_of(learned["log_scale"])
        if not self.temperature_per_subset:
            return {"temperature": temperature}
        by_subset = dict(zip(self.subsets, temperature, strict=True))
        named = {f"temperature/{name}": value for name, value in by_subset.items()}
        return {"temperature": jnp.mean(temperature), **named}


class PoolEmbeddings(NamedTuple):
    """Pairs that are each other's negatives. S shards, Z sides, G slots.

    Attributes:
      embeddings: float32 [S, Z, G, D].
      present: bool [S, Z, G], False for empty slots and for sides that a group lacks.
      ids: int32 [S, Z - 1, G], equal for equal targets; None where equal targets are negatives.
      subsets: int32 [S, 1, G], of the pairs; None where the loss does not ask.
      scores: float32 [S, Z - 1, G], a teacher's, nan where there is none; None where the loss does not ask.
    """

    embeddings: jax.Array
    present: jax.Array
    ids: jax.Array | None
    subsets: jax.Array | None
    scores: jax.Array | None


class PoolLosses(NamedTuple):
    """What a pool gives, each a mean over what is counted.

    Attributes:
      contrastive: by dimension, over the pairs.
      metrics: of the whole embeddings, over the pairs.
      distillation: by dimension, over the rows with scores; () where the loss does not ask.
      scored: how many rows have scores; None where the loss does not ask.
    """

    contrastive: tuple[jax.Array, ...]
    metrics: dict[str, jax.Array]
    distillation: tuple[jax.Array, ...] = ()
    scored: jax.Array | None = None


def make_loss(
    model: Llave, mesh: jax.sharding.Mesh, config: LossConfig
) -> Callable[..., tuple[jax.Array, dict[str, jax.Array]]]:
    """The loss of a step as a function of the parameters.

    Args:
      model: the module.
      mesh: the devices.
      config: the settings.

    Returns:
      `loss(params, batch, labels=None, key=None, learned=None) -> (scalar, metrics)`. Batch arrays are
      [M, S, ...] with M micro-batches; `labels`, `PairLabels`, are needed where settings ask for ids, subsets
      or scores. Sides beyond query and target are hard negatives, which every query of the pool sees. `key`,
      of `lora.step_key`, is what the dropout of adapters is drawn from; None: nothing is dropped. `learned` is
      what `LossConfig.initial` begins with.

    Raises:
      ValueError: the model's `remat` is not a key of `models.remat.REMATS`.

    References: LLaVE (arXiv 2503.04812), section 3; GradCache (arXiv 2101.06983) for the pool "global".
    """

    def embed(params: Any, micro_batch: PackedBatch, key: jax.Array | None) -> jax.Array:
        if key is not None:
            params = lora.with_dropout(model, params, key)
        with sharding.use_mesh(mesh):
            return cast(jax.Array, model.apply({"params": params}, micro_batch))

    if find_remat(model.remat).micro_batch:
        policy = jax.checkpoint_policies.save_only_these_names(
            *((VISION_FEATURES,) if model.freeze_vision else ())
        )
        embed = jax.checkpoint(embed, policy=policy, prevent_cse=False)

    pool_losses = functools.partial(_pool_losses, config, mesh)

    def global_losses(
        params: Any, batch: PackedBatch, labels: Any, keys: Any, learned: Any
    ) -> PoolLosses:
        _, embeddings = jax.lax.scan(
            lambda carry, inputs: (carry, embed(params, *inputs)), None, (batch, keys)
        )
        pools = PoolEmbeddings(embeddings, _present(batch), *labels)
        return pool_losses(jax.tree.map(_merge_micro_batches, pools), learned)

    def micro_losses(
        params: Any, batch: PackedBatch, labels: Any, keys: Any, learned: Any
    ) -> PoolLosses:
        def one(carry: None, inputs: tuple[PackedBatch, Any, Any]) -> tuple[None, Any]:
            micro_batch, labels, key = inputs
            pool = PoolEmbeddings(embed(params, micro_batch, key), _present(micro_batch), *labels)
            return carry, (jnp.sum(micro_batch.valid), pool_losses(pool, learned))

        _, (pairs, found) = jax.lax.scan(one, None, (batch, labels, keys))

        def mean(values: Any, counts: jax.Array) -> Any:
            weight = counts / jnp.maximum(jnp.sum(counts), 1)
            return jax.tree.map(lambda x: jnp.sum(x * weight), values)

        contrastive, metrics = mean((found.contrastive, found.metrics), pairs)
        if found.scored is None:
            return PoolLosses(contrastive, metrics)
        return PoolLosses(contrastive, metrics, mean(found.distillation, found.scored))

    step_losses = global_losses if config.pool == "global" else micro_losses

    def loss(
        params: Any,
        batch: PackedBatch,
        labels: PairLabels | None = None,
        key: jax.Array | None = None,
        learned: Mapping[str, jax.Array] | None = None,
    ) -> tuple[jax.Array, dict]:
        asked = {
            "target_ids": config.mask_false_negatives,
            "subsets": config.asks_subsets,
            "scores": bool(config.distill_weight),
        }
        if labels is None and any(asked.values()):
            names = ", ".join(name for name, is_asked in asked.items() if is_asked)
            raise ValueError(f"the settings of the loss need the batch's labels: {names}")
        known: Any = [
            getattr(labels, name) if is_asked else None for name, is_asked in asked.items()
        ]
        if known[1] is not None:
            known[1] = known[1][..., None, :]
        keys = None if key is None else jax.random.split(key, len(batch.valid))
        return _combined(step_losses(params, batch, tuple(known), keys, learned), config)

    return loss


def _temperature(config: LossConfig, pool: PoolEmbeddings, learned: Any) -> Any:
    """One for all, or [N], one for each pair."""
    if learned is None:
        return config.temperature
    found = temperature_of(learned["log_scale"])
    return found[_slots(pool.subsets)] if config.temperature_per_subset else found


def _contrastive(
    config: LossConfig, mesh: jax.sharding.Mesh, pool: PoolEmbeddings, learned: Any
) -> tuple[jax.Array, dict]:
    """The loss of one dimension of the embeddings, and its metrics."""
    shards, sides, groups = pool.present.shape
    settings = {}
    if pool.ids is not None:
        settings["target_ids"] = pool.ids[:, 0].reshape(-1)
    if config.in_batch_off:
        off = np.isin(config.subsets, config.in_batch_off)
        settings["own_negatives_only"] = jnp.asarray(off)[_slots(pool.subsets)]
    if sides > 2:
        settings["extra_targets"] = _join(pool.embeddings[:, 2:])
        settings["extra_valid"] = pool.present[:, 2:].reshape(-1)
        if pool.ids is not None:
            settings["extra_ids"] = pool.ids[:, 1:].reshape(-1)
        if config.asks_owners:
            pairs = jnp.arange(shards * groups, dtype=jnp.int32).reshape(shards, 1, groups)
            owners = jnp.broadcast_to(pairs, (shards, sides - 2, groups))
            settings["extra_owners"] = owners.reshape(-1)
    return contrastive_loss(
        _join(pool.embeddings[:, 0]),
        _join(pool.embeddings[:, 1]),
        pool.present[:, 0].reshape(-1),
        mesh=mesh,
        axes=sharding.BATCH_AXES,
        kind=config.kind,
        alpha=config.alpha,
        temperature=_temperature(config, pool, learned),
        margin=config.margin,
        hardness_on=config.hardness_on,
        mask_margin=config.mask_margin,
        cross_device=config.pool != "device",
        **settings,
    )


def _distillation(
    config: LossConfig, pool: PoolEmbeddings, learned: Any
) -> tuple[jax.Array, jax.Array]:
    """The sum over the rows that have scores, and their number."""
    # An empty slot may hold nan.
    embeddings = jnp.where(pool.present[..., None], pool.embeddings, 0)
    query, candidates = embeddings[:, 0], embeddings[:, 1:]
    precision = jax.lax.Precision.HIGHEST
    similarity = jnp.einsum("SGD,SZGD->SGZ", query, candidates, precision=precision)

    def rows(x: jax.Array | None) -> jax.Array:
        assert x is not None
        return jnp.swapaxes(x, 1, 2).reshape(-1, x.shape[1])

    at = _temperature(config, pool, learned)
    losses, has_loss = distillation_losses(
        similarity.reshape(-1, similarity.shape[-1]),
        rows(pool.scores),
        rows(pool.present[:, 1:]),
        temperature=at[:, None] if config.temperature_per_subset else at,
        teacher_temperature=config.teacher_temperature,
    )
    return jnp.sum(losses), jnp.sum(has_loss)


def _pool_losses(
    config: LossConfig, mesh: jax.sharding.Mesh, pool: PoolEmbeddings, learned: Any
) -> PoolLosses:
    pools = [pool._replace(embeddings=prefix(pool.embeddings, dim)) for dim in config.dims] or [
        pool
    ]
    found = [_contrastive(config, mesh, p, learned) for p in pools]
    losses = PoolLosses(tuple(loss for loss, _ in found), found[-1][1])
    if not config.distill_weight:
        return losses
    sums, counts = zip(*(_distillation(config, p, learned) for p in pools), strict=True)
    means = tuple(total / jnp.maximum(counts[0], 1) for total in sums)
    return losses._replace(distillation=means, scored=counts[0])


def _combined(found: PoolLosses, config: LossConfig) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The loss of a step and its metrics."""
    by_dim, metrics = found.contrastive, dict(found.metrics)
    if found.distillation:
        weight = config.distill_weight
        metrics["contrastive_loss"] = by_dim[-1]
        metrics["distill_loss"] = found.distillation[-1]
        pairs = zip(by_dim, found.distillation, strict=True)
        by_dim = tuple((1 - weight) * loss + weight * distilled for loss, distilled in pairs)
    if not config.dims:
        return by_dim[0], metrics
    metrics |= {f"loss@{dim}": loss for dim, loss in zip(config.dims, by_dim, strict=True)}
    weights = shares(config.dims, config.dim_weights)
    return sum((w * loss for w, loss in zip(weights, by_dim, strict=True)), jnp.zeros(())), metrics


def _slots(values: jax.Array | None) -> jax.Array:
    """[S, 1, G] of pairs -> [N], as `_join` puts them."""
    assert values is not None
    return values.reshape(-1)


def _present(batch: PackedBatch) -> jax.Array:
    """bool [..., S, Z, G]: which slots hold a sequence."""
    return (jnp.asarray(batch.pooled) >= 0) & jnp.asarray(batch.valid)[..., None, :]


def _join(embeddings: jax.Array) -> jax.Array:
    """[S, ..., D] -> [N, D]."""
    return embeddings.reshape(-1, embeddings.shape[-1])


def _merge_micro_batches(x: jax.Array) -> jax.Array:
    """[M, S, Z, G, ...] -> [S, Z, M * G, ...]: a shard's slots stay on it."""
    x = jnp.moveaxis(x, 0, 2)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])
