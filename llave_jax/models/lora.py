"""Low-rank adapters (LoRA) on a model whose modules know nothing of them.

Owns which modules have adapters, how they are added while the model runs, what they begin as, and the masks of
their dropout. Their shapes and places are those of the table of weights (`parameters.py`).
"""

from __future__ import annotations

import dataclasses
import math
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llave_jax.inputs.batch import PackedBatch
from llave_jax.models.config import LlaveConfig
from llave_jax.models.layers import Projection
from llave_jax.models.llave import Llave
from llave_jax.models.parameters import (
    LORA_A,
    LORA_B,
    adapter_shapes,
    input_axes,
    linear_maps,
    num_layers,
    weight_at,
)
from llave_jax.parallel import sharding

# What a module's mask is drawn from: uint32 [2], of a stacked module [layers, 2]. Without it nothing is dropped.
DROPOUT_KEY = "lora_key"


@dataclasses.dataclass(frozen=True)
class Lora:
    """The adapters of a model.

    Attributes:
      modules: paths of the modules that have one, of `parameters.linear_maps`.
      rank: of the adapters.
      alpha: with the rank, what they are multiplied with.
      rslora: divide alpha by the root of the rank, not by the rank.
      dropout: share of an adapter's inputs that a training step leaves out.
      seed: of what they begin as, and of the masks.

    References: Hu et al., LoRA (arXiv 2106.09685); Kalajdzievski, rsLoRA (arXiv 2312.03732).
    """

    modules: tuple[str, ...]
    rank: int
    alpha: float
    rslora: bool = False
    dropout: float = 0.0
    seed: int = 0

    @property
    def scale(self) -> float:
        """What the product of the two factors is multiplied with."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


class AdaptedLlave(Llave):
    """The embedding model with adapters: y = W x + scale * B A x at each adapted module.

    The sum W + scale * B A is never made: its gradient would be as large as W.

    Attributes:
      lora: the adapters.
      base_dtypes: path -> dtype of a parameter of the base, where it is not `param_dtype`. Adapters are float32.
    """

    lora: Lora = Lora((), 1, 1.0)
    base_dtypes: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __call__(self, batch: PackedBatch) -> Float[Array, "S Z G D"]:
        """Embeddings of all sequences of a batch, as of `Llave`."""
        with nn.intercept_methods(_adding_adapters(self.lora)):
            return super().__call__(batch)

    @nn.nowrap
    def abstract_parameters(self) -> dict[str, jax.ShapeDtypeStruct]:
        """What the model reads: path -> shape and dtype of each parameter, base and adapters."""
        base = super().abstract_parameters()
        base |= {p: jax.ShapeDtypeStruct(base[p].shape, d) for p, d in self.base_dtypes.items()}
        shapes = adapter_shapes(self.lora.modules, self.lora.rank, self.config)
        return base | {p: jax.ShapeDtypeStruct(s, jnp.float32) for p, s in shapes.items()}


def _adding_adapters(lora: Lora) -> Callable[..., Any]:
    """What is called in place of every method of a module: adds the adapter to what a `Projection` returns."""

    def intercept(call: Callable, args: tuple, kwargs: dict, context: nn.module.InterceptorContext):
        y = call(*args, **kwargs)
        module = context.module
        is_map = isinstance(module, Projection) and context.method_name == "__call__"
        if not is_map or not module.has_variable("params", LORA_A):
            return y
        key = None
        if module.has_variable("params", DROPOUT_KEY):
            key = module.get_variable("params", DROPOUT_KEY)
        factors = []
        for name in (LORA_A, LORA_B):
            factor = module.get_variable("params", name).astype(module.dtype)
            if sharding.mesh_in_use():
                axes = weight_at("/".join((*module.path, name))).axes
                factor = sharding.gather_for_use(factor, axes)
            factors.append(factor)
        x = args[0].astype(module.dtype)
        if key is not None:
            x = _dropped(x, key, lora.dropout)
        low = jnp.tensordot(x, factors[0], module.in_axes) * jnp.asarray(lora.scale, x.dtype)
        return y + jnp.tensordot(low, factors[1], 1)

    return intercept


def _dropped(x: jax.Array, key: jax.Array, rate: float) -> jax.Array:
    """x with a share `rate` of its values 0 and the others scaled up; the same for the same key."""
    kept = jax.random.bernoulli(jax.random.wrap_key_data(key), 1 - rate, x.shape)
    kept = sharding.constrain_rows(kept)
    return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


def find_modules(pattern: str) -> tuple[str, ...]:
    """The modules that a pattern names.

    Args:
      pattern: regular expression that matches the whole path.

    Returns:
      Their paths, in the order of the table of weights.

    Raises:
      ValueError: it names none.
    """
    found = tuple(path for path in linear_maps() if re.fullmatch(pattern, path))
    if not found:
        raise ValueError(
            f"lora.targets {pattern!r} matches no module; there are {', '.join(linear_maps())}"
        )
    return found


def init_adapters(lora: Lora, config: LlaveConfig) -> dict[str, jax.Array]:
    """What adapters begin as: A uniform within 1 / sqrt(inputs), as peft draws it, and B zero.

    Args:
      lora: the adapters.
      config: of the model.

    Returns:
      path -> float32 array, flat.
    """
    arrays = {}
    for path, shape in adapter_shapes(lora.modules, lora.rank, config).items():
        if path.endswith(LORA_A):
            count = input_axes(weight_at(path))
            bound = 1 / math.sqrt(math.prod(shape[-1 - count : -1]))
            arrays[path] = jax.random.uniform(_key(lora, path), shape, jnp.float32, -bound, bound)
        else:
            arrays[path] = jnp.zeros(shape, jnp.float32)
    return arrays


def adapters_of(params: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a parameter tree that a run keeps: all of it, or the adapters where there are some.

    Args:
      params: nested dict; its leaves do not matter.

    Returns:
      Nested dict.
    """
    flat = sharding.flatten(params)
    adapters = {p: leaf for p, leaf in flat.items() if p.rsplit("/", 1)[-1] in (LORA_A, LORA_B)}
    return sharding.unflatten(adapters or flat)


def step_key(model: Llave, step: jax.Array) -> jax.Array | None:
    """What the dropout of one step is drawn from.

    Args:
      model: the module.
      step: int32 scalar, optimiser steps done.

    Returns:
      A key; None if nothing is dropped.
    """
    if not isinstance(model, AdaptedLlave) or not model.lora.dropout:
        return None
    return jax.random.fold_in(jax.random.key(model.lora.seed), step)


def with_dropout(model: Llave, params: Mapping[str, Any], key: jax.Array) -> dict[str, Any]:
    """Parameters with what each adapted module draws its mask from.

    The masks are a function of the parameters: computed again in the backward pass, they are the same.

    Args:
      model: with adapters.
      params: the parameter tree.
      key: of the micro-batch.

    Returns:
      The tree with a leaf DROPOUT_KEY beside each adapter.
    """
    assert isinstance(model, AdaptedLlave)
    flat = sharding.flatten(params)
    for module in model.lora.modules:
        own = jax.random.fold_in(key, zlib.crc32(module.encode()))
        layers = num_layers(weight_at(f"{module}/kernel"), model.config)
        if layers is not None:
            own = jax.random.split(own, layers)
        flat[f"{module}/{DROPOUT_KEY}"] = jax.random.key_data(own)
    return sharding.unflatten(flat)


def _key(lora: Lora, path: str) -> jax.Array:
    return jax.random.fold_in(jax.random.key(lora.seed), zlib.crc32(path.encode()))
