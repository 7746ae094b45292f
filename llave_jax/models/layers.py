"""The layers both towers are made of: projections, normalisation, scans of blocks.

Parameters are kept in `param_dtype` (float32 masters when training) and used in `dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from llave_jax.models.parameters import weight_at
from llave_jax.models.remat import find_remat
from llave_jax.parallel.sharding import constrain_rows, gather_for_use, mesh_in_use

Dtype = Any


class Projection(nn.Module):
    """Linear map over the trailing `in_axes` axes of its input to axes `features`.

    Kernel [*in, *features], bias [*features].
    """

    features: tuple[int, ...]
    in_axes: int = 1
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = x.shape[x.ndim - self.in_axes :]
        fan_in = math.prod(inputs)

        def initial(key, shape, dtype):
            return jax.random.normal(key, shape, dtype) / math.sqrt(fan_in)

        kernel = self.param("kernel", initial, (*inputs, *self.features), self.param_dtype)
        x = x.astype(self.dtype)
        # Tied to (a corner of) x, or all layers' parameters would be gathered ahead of a loop over
        # batches.
        corner = x[:, *(slice(1),) * (x.ndim - 1)]
        _, kernel = jax.lax.optimization_barrier((jax.lax.stop_gradient(corner), kernel))
        kernel = kernel.astype(self.dtype)
        if mesh_in_use():
            kernel = gather_for_use(kernel, weight_at("/".join((*self.path, "kernel"))).axes)
        axes = tuple(range(x.ndim - self.in_axes, x.ndim))
        y = jax.lax.dot_general(
            x,
            kernel,
            ((axes, tuple(range(self.in_axes))), ((), ())),
        )
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, self.features, self.param_dtype)
            y += bias.astype(self.dtype)
        return y


class RMSNorm(nn.Module):
    """Root-mean-square normalisation in float32, scaled: Qwen2's."""

    epsilon: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


def scan_blocks(
    block: nn.Module, length: int, x: jax.Array, *inputs: Any, remat: str = "none"
) -> jax.Array:
    """Apply `length` blocks like `block` one after another: parameters stacked on their first axis.

    Args:
      block: module with `__call__(x, *inputs) -> x`; all blocks get the same `inputs`.
      remat: a key of `remat.REMATS`; its `block_policy` applies.
    """

    def body(block: nn.Module, x: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
        return block(constrain_rows(x), *inputs), None

    scanned = nn.scan(
        _recomputed(body, remat),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=length,
    )
    return scanned(block, x, inputs)[0]


def scan_but_last(
    block: nn.Module,
    length: int,
    x: jax.Array,
    *inputs: Any,
    last: Callable[..., jax.Array],
    remat: str = "none",
) -> jax.Array:
    """As `scan_blocks` with parameters that it made, but for the last block, which is
    `last(block, x, *inputs)`."""

    def first_ones(block: nn.Module, x: jax.Array) -> jax.Array:
        return scan_blocks(block, length - 1, x, *inputs, remat=remat)

    def last_one(block: nn.Module, x: jax.Array) -> jax.Array:
        return _recomputed(last, remat)(block, constrain_rows(x), *inputs)

    def part(function: Callable, which: slice | int) -> Callable:
        def take(variables: Any) -> Any:
            return jax.tree.map(lambda stacked: stacked[which], variables)

        return nn.map_variables(function, "params", trans_in_fn=take)

    if length > 1:
        x = part(first_ones, slice(length - 1))(block, x)
    return part(last_one, length - 1)(block, x)


def _recomputed(function: Callable, remat: str) -> Callable:
    """A function of a module, recomputed in the backward pass as the setting's `block_policy` says."""
    policy = find_remat(remat).block_policy
    if policy is None:
        return function
    # In the body of a scan there is no other computation to merge the recomputation with.
    return nn.remat(function, policy=policy, prevent_cse=False)
