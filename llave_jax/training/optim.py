"""The optimiser: AdamW with warm-up and cosine decay, learning rates and freezing by path."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import optax

# (path regex, factor on the learning rate); None freezes. First full match wins.
RateRules = Sequence[tuple[str, float | None]]


def rate_factors(paths: Sequence[str], rules: RateRules) -> dict[str, float | None]:
    """Factor on the learning rate for each parameter; None where it is frozen.

    Raises:
      ValueError: a parameter matches no rule, or a rule decides nothing.
    """
    factors: dict[str, float | None] = {}
    used: set[int] = set()
    for path in paths:
        for i, (pattern, factor) in enumerate(rules):
            if re.fullmatch(pattern, path):
                factors[path] = factor
                used.add(i)
                break
        else:
            raise ValueError(f"no learning-rate rule matches parameter {path!r}; add one")
    for i, (pattern, _) in enumerate(rules):
        if i not in used:
            raise ValueError(f"learning-rate rule {pattern!r} decides no parameter; remove it")
    return factors


def split_params(
    flat: Mapping[str, Any], factors: Mapping[str, float | None]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Flat parameters -> (trainable, frozen)."""
    trainable = {path: x for path, x in flat.items() if factors[path] is not None}
    frozen = {path: x for path, x in flat.items() if factors[path] is None}
    return trainable, frozen


def learning_rate_schedule(peak: float, total_steps: int, warmup_fraction: float) -> optax.Schedule:
    """Linear warm-up from 0 over a fraction of all steps, then cosine decay to 0.

    The paper's models: 3% of one epoch's steps.
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
    factors: Mapping[str, float | None],
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
) -> optax.GradientTransformation:
    """AdamW over the flat dict of trainable parameters.

    Gradients are clipped by their global norm first. Weight decay applies to matrices and
    embeddings, not to biases, norms and the newline.
    """

    def decayed(params: Mapping[str, jax.Array]) -> dict[str, bool]:
        return {path: bool(re.search(r"(kernel|embedding)$", path)) for path in params}

    steps: dict[str, optax.GradientTransformation] = {}
    if clip_norm is not None:
        steps["clip"] = optax.clip_by_global_norm(clip_norm)
    steps["adam"] = optax.scale_by_adam(beta1, beta2, epsilon)
    if weight_decay:
        steps["weight_decay"] = optax.add_decayed_weights(weight_decay, mask=decayed)
    steps["learning_rate"] = optax.scale_by_learning_rate(schedule)
    if any(factor not in (None, 1.0) for factor in factors.values()):
        steps["rates"] = optax.stateless(
            lambda updates, _: {path: u * factors[path] for path, u in updates.items()}
        )
    # Checkpoints keep the state under these names.
    return optax.named_chain(*steps.items())
