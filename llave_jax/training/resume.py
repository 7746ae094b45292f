"""What of a run's config may change when the run is continued, key by key.

Every key has its place in one of the two tables here; docs/operations.md shows them. What a checkpoint
itself must agree with (processes, data, optimiser) is checked where it is read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from llave_jax.config import Config, default_config
from llave_jax.data.order import MINED

# What the keys decide -> the keys. These may change.
MAY_CHANGE: dict[str, tuple[str, ...]] = {
    "speed, memory, what is kept and shown": (
        "attention",
        "vision_attention",
        "remat",
        "data.num_workers",
        "data.stall_warning",
        "log_every",
        "log.wandb",
        "profile.start",
        "profile.steps",
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.best_metric",
        "eval.benchmark",
        "eval.datasets",
        "eval.every",
        "eval.patience",
    ),
    "how long the run is: from here on the learning rate follows the schedule of the new length": (
        "steps",
        "data.epochs",
    ),
    "how pairs share batches: none is lost or repeated": (
        "batch.row_length",
        "batch.tokens_per_pair",
        "batch.crops_per_pair",
        "batch.taps",
        "mesh.data",
        "mesh.fsdp",
        "mesh.tensor",
    ),
    "what becomes of rows that cannot be used": (
        "data.on_error",
        "data.max_skip_share",
    ),
    "what becomes of steps whose loss or gradient is not finite": (
        "nonfinite.action",
        "nonfinite.max_in_a_row",
        "nonfinite.max_in_all",
    ),
    "where the same data, model and tokenizer lie": (
        "data.path",
        "data.image_root",
        "model.path",
        "model.tokenizer",
    ),
}
# A change of these would make another run of it.
FIXED: dict[str, tuple[str, ...]] = {
    "the model and its inputs": (
        "model.preset",
        "model.inputs.pinpoints",
        "model.inputs.anyres_max",
        "model.inputs.newline_position",
        "model.inputs.pool_mode",
        "model.inputs.pool_stride",
        "model.inputs.max_text_length",
        "model.inputs.max_length",
        "model.inputs.max_frames",
        "model.inputs.frames_per_second",
        "dtype",
    ),
    "the adapters": (
        "lora.rank",
        "lora.alpha",
        "lora.dropout",
        "lora.targets",
        "lora.rslora",
        "lora.base_dtype",
    ),
    "which rows, and their order": (
        "seed",
        "data.subsets",
        "data.split",
        "data.max_rows",
        "data.order",
        "data.sub_batch",
        "data.weights",
        "data.held_out",
        "eval.max_pairs",
    ),
    "how full steps are expected to be, and so how many an epoch has": ("batch.fill",),
    "what a step learns from its pairs": (
        "batch.pairs",
        "batch.pairs_per_device",
        "batch.max_pairs",
        "batch.micro_batches",
        "loss.kind",
        "loss.alpha",
        "loss.margin",
        "loss.hardness_on",
        "loss.temperature",
        "loss.learn_temperature",
        "loss.temperature_per_subset",
        "loss.temperature_range",
        "loss.temperature_rate",
        "loss.pool",
        "loss.mask_false_negatives",
        "loss.mask_margin",
        "loss.in_batch_off",
        "loss.hard_negatives",
        "loss.negatives_per_row",
        "loss.dims",
        "loss.dim_weights",
        "loss.distill_weight",
        "loss.teacher_temperature",
        "optim.learning_rate",
        "optim.warmup_fraction",
        "optim.beta1",
        "optim.beta2",
        "optim.epsilon",
        "optim.weight_decay",
        "optim.clip_norm",
        "optim.rates",
    ),
}
# Fields of `batch` that are planned where they are left open.
PLANNED = (
    *("pairs", "micro_batches"),
    *("row_length", "tokens_per_pair", "crops_per_pair", "taps", "fill"),
)
# With pools of one device, the number of devices decides how many pairs a pool has.
FIXED_WITH_DEVICE_POOLS = ("mesh.data", "mesh.fsdp")


def keep_batch(config: Config, before: Mapping[str, Any]) -> None:
    """Sets the numbers of a batch that a config leaves open as the run began with them.

    Args:
      config: is changed.
      before: the config that the run began with, as read from JSON.
    """
    for key in PLANNED:
        began_with = before.get("batch", {}).get(key)
        if config.batch[key] is None and began_with is not None:
            config.batch[key] = began_with
    if "pairs_per_device" not in before.get("batch", {}):
        # The run began before there was this field, and has its pairs.
        config.batch.pairs_per_device = None


def refused_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """The changes of a config with which its run cannot be continued.

    Args:
      before, now: the run's config and the new one, as read from JSON.

    Returns:
      "KEY: OLD -> NEW" of each key that differs and may not. A run that began before there was a key has its
      default.
    """
    before, now = dict(leaves(before)), dict(leaves(now))
    defaults = dict(leaves(json.loads(default_config().to_json())))
    before = {key: value for key, value in defaults.items() if key in now} | before
    may_change = {key for keys in MAY_CHANGE.values() for key in keys}
    if all(str(config.get("data.order")).startswith(MINED) for config in (before, now)):
        # The file may lie elsewhere. The data position knows what it held.
        may_change.add("data.order")
    if now.get("loss.pool") == "device":
        may_change -= set(FIXED_WITH_DEVICE_POOLS)
    return [
        f"{key}: {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and key not in may_change
    ]


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The fields of a nested config.

    Args:
      values: nested dict.
      prefix: in front of the keys.

    Yields:
      (key, value), such as ("optim.learning_rate", 1e-5).
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def table() -> str:
    """The two tables in Markdown, as docs/operations.md has them."""
    lines = ["| may change | decides |", "|---|---|"]
    lines += [f"| {_listed(keys)} | {what} |" for what, keys in MAY_CHANGE.items()]
    lines += ["", "| may not change | decides |", "|---|---|"]
    lines += [f"| {_listed(keys)} | {what} |" for what, keys in FIXED.items()]
    return "\n".join(lines)


def _listed(keys: tuple[str, ...]) -> str:
    return ", ".join(f"`{key}`" for key in keys)
