"""Settings with which no run can work, refused before anything is read or built.

Owns one table: field, which values it may have, and how an error says so. What depends on the data, the model
or the devices is checked where it is used.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from llave_jax.config import Config
from llave_jax.data.order import MINED, ORDERS, is_order
from llave_jax.data.pipeline import POLICIES
from llave_jax.inputs.config import NEWLINE_POSITIONS, POOL_MODES
from llave_jax.loss.cross_device import HARDNESS_ON, KINDS
from llave_jax.models.config import PRESETS
from llave_jax.models.remat import REMATS
from llave_jax.ops.attention import IMPLEMENTATIONS
from llave_jax.training.step_loss import POOLS

DTYPES = ("float32", "bfloat16")
NONFINITE_ACTIONS = ("stop", "skip")


class Values(NamedTuple):
    """The values that a field may have.

    Attributes:
      allow: says of a value that is not None whether it is one of them.
      expected: what an error says was expected.
      optional: None is one of them, too.
    """

    allow: Callable[[Any], bool]
    expected: str
    optional: bool = False

    def or_none(self) -> Values:
        """The same values, and None."""
        return Values(self.allow, f"{self.expected}, or None", optional=True)


def _number(allow: Callable[[float], bool], expected: str) -> Values:
    """Finite numbers of which `allow` holds."""
    return Values(lambda value: math.isfinite(value) and allow(value), expected)


def _at_least(least: int) -> Values:
    return _number(lambda value: value >= least, f"at least {least}")


def _one_of(names: Sequence[str]) -> Values:
    return Values(lambda value: value in names, f"one of {', '.join(names)}")


def _are_weights(value: Any) -> bool:
    return all(
        isinstance(entry, Sequence)
        and len(entry) == 2
        and isinstance(entry[0], str)
        and _is_number(entry[1])
        and entry[1] > 0
        for entry in value
    )


def _are_rates(value: Any) -> bool:
    return len(value) > 0 and all(
        isinstance(entry, Sequence)
        and len(entry) == 2
        and _is_regex(entry[0])
        and (entry[1] is None or (_is_number(entry[1]) and entry[1] >= 0))
        for entry in value
    )


def _are_dims(value: Any) -> bool:
    return all(isinstance(dim, int) and dim >= 1 for dim in value) and list(value) == sorted(
        set(value)
    )


def _are_positive(value: Any) -> bool:
    return all(_is_number(entry) and entry > 0 for entry in value)


def _are_bounds(value: Any) -> bool:
    return len(value) == 2 and _are_positive(value) and value[0] <= value[1]


def _are_names(value: Any) -> bool:
    return not isinstance(value, str) and all(isinstance(entry, str) for entry in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _is_regex(value: Any) -> bool:
    try:
        re.compile(value)
    except (re.error, TypeError):
        return False
    return isinstance(value, str)


_POSITIVE = _number(lambda value: value > 0, "more than 0, and finite")
_NOT_NEGATIVE = _number(lambda value: value >= 0, "at least 0, and finite")
_FINITE = _number(lambda value: True, "a finite number")
_BETA = _number(lambda value: 0 <= value < 1, "at least 0 and less than 1")
_SHARE = _number(lambda value: 0 <= value <= 1, "a share from 0 to 1")
_AXIS = _number(lambda value: value == -1 or value >= 1, "at least 1, or -1 for the rest")

TABLE: dict[str, Values] = {
    "seed": _at_least(0),
    "steps": _at_least(1).or_none(),
    "model.preset": _one_of(tuple(PRESETS)).or_none(),
    "model.inputs.anyres_max": _at_least(1).or_none(),
    "model.inputs.newline_position": _one_of(NEWLINE_POSITIONS).or_none(),
    "model.inputs.pool_mode": _one_of(POOL_MODES).or_none(),
    "model.inputs.pool_stride": _at_least(1).or_none(),
    "model.inputs.max_text_length": _at_least(1).or_none(),
    "model.inputs.max_length": _at_least(1).or_none(),
    "model.inputs.max_frames": _at_least(0).or_none(),
    "model.inputs.frames_per_second": _at_least(1).or_none(),
    "data.max_rows": _at_least(1).or_none(),
    "data.epochs": _at_least(1),
    "data.num_workers": _at_least(0),
    "data.order": Values(is_order, f"one of {', '.join(ORDERS)}, {MINED}FILE"),
    "data.sub_batch": _at_least(1),
    "data.weights": Values(_are_weights, "(subset, weight) pairs with weights of more than 0"),
    "data.on_error": _one_of(POLICIES),
    "data.max_skip_share": _SHARE,
    "data.stall_warning": _NOT_NEGATIVE,
    "data.held_out": _number(lambda value: 0 <= value < 1, "a share of at least 0 and less than 1"),
    "batch.pairs": _at_least(1).or_none(),
    "batch.pairs_per_device": _at_least(1).or_none(),
    "batch.max_pairs": _at_least(1),
    "batch.micro_batches": _at_least(1).or_none(),
    "batch.row_length": _at_least(1).or_none(),
    "batch.tokens_per_pair": _POSITIVE.or_none(),
    "batch.crops_per_pair": _NOT_NEGATIVE.or_none(),
    "batch.taps": _at_least(1).or_none(),
    "batch.fill": _number(lambda value: 0 < value <= 1, "more than 0 and at most 1").or_none(),
    "loss.kind": _one_of(KINDS),
    "loss.alpha": _FINITE,
    "loss.margin": _FINITE,
    "loss.hardness_on": _one_of(HARDNESS_ON),
    "loss.temperature": _POSITIVE,
    "loss.temperature_range": Values(_are_bounds, "(least, largest), both more than 0"),
    "loss.temperature_rate": _NOT_NEGATIVE,
    "loss.mask_margin": _FINITE.or_none(),
    "loss.in_batch_off": Values(_are_names, "a tuple of names of subsets"),
    "loss.pool": _one_of(POOLS),
    "loss.negatives_per_row": _at_least(1),
    "loss.dims": Values(_are_dims, "ascending whole numbers of at least 1"),
    "loss.dim_weights": Values(_are_positive, "numbers of more than 0"),
    "loss.distill_weight": _SHARE,
    "loss.teacher_temperature": _POSITIVE,
    "optim.learning_rate": _NOT_NEGATIVE,
    "optim.warmup_fraction": _SHARE,
    "optim.beta1": _BETA,
    "optim.beta2": _BETA,
    "optim.epsilon": _POSITIVE,
    "optim.weight_decay": _NOT_NEGATIVE,
    "optim.clip_norm": _POSITIVE.or_none(),
    "optim.rates": Values(_are_rates, "(path regex, factor of at least 0 or None) pairs"),
    "lora.rank": _at_least(1).or_none(),
    "lora.alpha": _POSITIVE,
    "lora.dropout": _number(lambda value: 0 <= value < 1, "a share of at least 0 and less than 1"),
    "lora.targets": Values(_is_regex, "a regular expression"),
    "lora.base_dtype": _one_of(DTYPES).or_none(),
    "nonfinite.action": _one_of(NONFINITE_ACTIONS),
    "nonfinite.max_in_a_row": _at_least(0),
    "nonfinite.max_in_all": _at_least(0),
    "mesh.data": _AXIS,
    "mesh.fsdp": _AXIS,
    "mesh.tensor": _AXIS,
    "dtype": _one_of(DTYPES),
    "attention": _one_of(IMPLEMENTATIONS),
    "vision_attention": _one_of(IMPLEMENTATIONS),
    "remat": _one_of(tuple(REMATS)),
    "checkpoint.every": _at_least(1),
    "checkpoint.keep": _at_least(1),
    "log_every": _at_least(1),
    "profile.start": _at_least(1).or_none(),
    "profile.steps": _at_least(1),
    "eval.every": _at_least(0),
    "eval.max_pairs": _at_least(2).or_none(),
    "eval.patience": _at_least(1).or_none(),
}


def check_config(config: Config) -> None:
    """Refuses a config with which no run can work.

    Args:
      config: of a run.

    Raises:
      ValueError: of every field that is wrong, its flag, its value and what is expected.
    """
    wrong = []
    for field, values in TABLE.items():
        value: Any = config
        for name in field.split("."):
            value = value[name]
        is_allowed = values.optional if value is None else values.allow(value)
        if not is_allowed:
            wrong.append(f"--config.{field} is {value!r}; expected {values.expected}")
    batch, pool = config.batch, config.loss.pool
    if batch.micro_batches is None and pool != "global":
        wrong.append(
            f"--config.batch.micro_batches is None; with --config.loss.pool={pool} it decides how many pairs "
            "a pool has, so expected a number"
        )
    wrong += _loss_mistakes(config.loss)
    if wrong:
        raise ValueError(". ".join(wrong))


def _loss_mistakes(loss: Config) -> list[str]:
    """What is wrong with settings of the loss that go together."""
    wrong = []
    if loss.kind == "focal" and loss.hardness_on != "all":
        wrong.append(
            f"--config.loss.hardness_on is {loss.hardness_on!r}; --config.loss.kind=focal has no hardness, "
            "expected 'all'"
        )
    if loss.hardness_on == "explicit" and not loss.hard_negatives:
        wrong.append(
            "--config.loss.hardness_on is 'explicit'; without --config.loss.hard_negatives=True there are no "
            "such negatives"
        )
    if loss.in_batch_off and not loss.hard_negatives:
        wrong.append(
            "--config.loss.in_batch_off leaves pairs without negatives; expected "
            "--config.loss.hard_negatives=True"
        )
    if loss.temperature_per_subset and not loss.learn_temperature:
        wrong.append(
            "--config.loss.temperature_per_subset is True; expected --config.loss.learn_temperature=True too"
        )
    least, largest = (
        loss.temperature_range if _are_bounds(loss.temperature_range) else (0, math.inf)
    )
    if loss.learn_temperature and not least <= loss.temperature <= largest:
        wrong.append(
            f"--config.loss.temperature is {loss.temperature}, with which the learned temperature begins; "
            f"expected {least} to {largest} (--config.loss.temperature_range)"
        )
    if len(loss.dim_weights) not in (0, len(loss.dims)):
        wrong.append(
            f"--config.loss.dim_weights is {loss.dim_weights!r}; expected one for each of "
            f"--config.loss.dims, {loss.dims!r}"
        )
    if loss.distill_weight and not loss.hard_negatives:
        wrong.append(
            f"--config.loss.distill_weight is {loss.distill_weight}; a target alone has no distribution, expected "
            "--config.loss.hard_negatives=True"
        )
    return wrong
