"""The optimiser: AdamW with warm-up and cosine decay, learning rates and freezing by path."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import optax

from llave_jax.models.parameters import decay_mask

# (path regex, multiplier of the learning rate). None freezes. The first rule whose regex matches the
# whole path decides.
RateRules = Sequence[tuple[str, float | None]]
# In front of the names of what the loss learns, beside the paths of the model's parameters.
LOSS = "loss/"


def lr_multipliers(paths: Sequence[str], rules: RateRules) -> dict[str, float | None]:
    """The multiplier of the learning rate for each parameter.

    Args:
      paths: of all parameters, "a/b/c".
      rules: in the order in which they are tried.

    Returns:
      path -> multiplier; None for a frozen parameter.

    Raises:
      ValueError: a parameter matches no rule, or a rule decides nothing.
    """
    multipliers: dict[str, float | None] = {}
    used: set[int] = set()
    for path in paths:
        for i, (pattern, multiplier) in enumerate(rules):
            if re.fullmatch(pattern, path):
                multipliers[path] = multiplier
                used.add(i)
                break
        else:
            raise ValueError(f"no learning-rate rule matches parameter {path!r}; add one")
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            raise ValueError(f"learning-rate rule {pattern!r} decides no parameter; remove it")
    return multipliers


def split_params(
    flat: Mapping[str, Any], multipliers: Mapping[str, float | None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Divides parameters into those that are trained and those that are frozen.

    Args:
      flat: path -> array.
      multipliers: see `lr_multipliers`.

    Returns:
      (trainable, frozen), both path -> array.
    """
    trainable = {path: x for path, x in flat.items() if multipliers[path] is not None}
    frozen = {path: x for path, x in flat.items() if multipliers[path] is None}
    return trainable, frozen


def with_prefix(learned: Mapping[str, Any] | None) -> dict[str, Any]:
    """What the loss learns, as the optimiser knows it.

    Args:
      learned: name -> array; None: nothing.

    Returns:
      "loss/NAME" -> array.
    """
    return {LOSS + name: value for name, value in (learned or {}).items()}


def without_learned(trainable: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Divides what is trained into the model's parameters and what the loss learns.

    Args:
      trainable: path -> array, with "loss/NAME" among them.

    Returns:
      The model's by path, and the loss's by name; None where it learns nothing.
    """
    learned = {
        path.removeprefix(LOSS): value for path, value in trainable.items() if path.startswith(LOSS)
    }
    model = {path: value for path, value in trainable.items() if not path.startswith(LOSS)}
    return model, learned or None


def learning_rate_schedule(peak: float, total_steps: int, warmup_fraction: float) -> optax.Schedule:
    """Linear warm-up from 0, then cosine decay to 0.

    Args:
      peak: the learning rate at the end of the warm-up.
      total_steps: optimiser steps of the whole run.
      warmup_fraction: share of all steps that warm up; 0.03 in the paper (appendix A.1).

    Returns:
      step -> learning rate.
    """
    warmup = math.ceil(warmup_fraction * total_steps)
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if warmup else peak,
        peak_value=peak,
        warmup_steps=warmup,
        # A run of a step or two can be all warm-up.
        decay_steps=max(total_steps, warmup + 1),
    )


def make_optimizer(
    schedule: optax.ScalarOrSchedule,
    multipliers: Mapping[str, float | None],
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW over the flat dict of trainable parameters (the paper, appendix A.1).

    Args:
      schedule: step -> learning rate.
      multipliers: see `lr_multipliers`.
      beta1, beta2, epsilon: of Adam.
      weight_decay: of the parameters that `decay_mask` names: matrices and embeddings.
      clip_norm: global norm to which gradients are clipped first; None: they are not.

    Returns:
      An optax chain whose parts have names, under which checkpoints keep their state.
    """
    steps: dict[str, optax.GradientTransformation] = {}
    if clip_norm is not None:
        steps["clip"] = optax.clip_by_global_norm(clip_norm)
    steps["adam"] = optax.scale_by_adam(beta1, beta2, epsilon)
    if weight_decay:
        steps["weight_decay"] = optax.add_decayed_weights(weight_decay, mask=_decays)
    steps["learning_rate"] = optax.scale_by_learning_rate(schedule)
    if any(factor not in (None, 1.0) for factor in multipliers.values()):

        def multiply(updates: Any, _: Any) -> dict[str, Any]:
            return {path: update * multipliers[path] for path, update in updates.items()}

        steps["rates"] = optax.stateless(multiply)
    return optax.named_chain(*steps.items())


def _decays(trainable: Mapping[str, Any]) -> dict[str, bool]:
    """As `decay_mask`; what the loss learns does not decay."""
    model, _ = without_learned(trainable)
    return dict.fromkeys(trainable, False) | decay_mask(model)
