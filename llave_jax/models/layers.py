"""The layers that both towers are made of: projections, normalisation, scans over blocks.

Parameters are kept in `param_dtype` (in training, float32) and used in `dtype`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from llave_jax.models.parameters import weight_at
from llave_jax.models.remat import find_remat
from llave_jax.parallel.sharding import constrain_rows, gather_for_use, mesh_in_use

Dtype = Any


class Projection(nn.Module):
    """Linear map of the last axes of its input.

    Its kernel has shape [*in, *features] and its bias [*features].

    Attributes:
      features: sizes of the axes that it maps to.
      in_axes: how many axes of the input it maps.
      use_bias: whether it adds a bias.
      dtype: of the product.
      param_dtype: of kernel and bias.
    """

    features: tuple[int, ...]
    in_axes: int = 1
    use_bias: bool = True
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "..."]) -> Float[Array, "..."]:
        """Applies the map.

        Args:
          x: [..., *in].

        Returns:
          [..., *features] in `dtype`.
        """
        inputs = x.shape[x.ndim - self.in_axes :]
        fan_in = math.prod(inputs)

        def initial(key, shape, dtype):
            return jax.random.normal(key, shape, dtype) / math.sqrt(fan_in)

        kernel = self.param("kernel", initial, (*inputs, *self.features), self.param_dtype)
        x = x.astype(self.dtype)
        # The barrier makes this layer's gather depend on x. Otherwise XLA moves the gathers of all
        # layers out of the loop over micro-batches, and all parameters are in memory at once. A corner
        # of x is enough to depend on.
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
    """Root-mean-square normalisation over the last axis, scaled; computed in float32.

    Attributes:
      epsilon: added to the mean square.
      dtype: of the result.
      param_dtype: of the scale.

    References: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467).
    """

    epsilon: float
    dtype: Dtype = jnp.float32
    param_dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*hidden"]) -> Float[Array, "*hidden"]:
        """Normalises the last axis.

        Args:
          x: [...] of any dtype.

        Returns:
          An array of the same shape in `dtype`.
        """
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * scale.astype(jnp.float32)).astype(self.dtype)


def scan_blocks(
    block: nn.Module,
    length: int,
    x: Float[Array, "B T _"],
    *inputs: Any,
    remat: str = "none",
) -> Float[Array, "B T _"]:
    """Apply blocks one after another.

    Each parameter of `block` is stacked: its first axis counts the blocks.

    Args:
      block: module with `__call__(x, *inputs) -> x`.
      length: how many blocks.
      x: what the first block gets.
      inputs: further arguments, the same for all blocks.
      remat: a key of `remat.REMATS`; its `block_policy` applies.

    Returns:
      The last block's result.
    """

    def body(block: nn.Module, x: jax.Array, inputs: tuple) -> tuple[jax.Array, None]:
        return block(constrain_rows(x), *inputs), None

    scanned = nn.scan(
        _recomputed(body, remat),
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,  # pyright: ignore[reportArgumentType], flax annotates too little
        length=length,
    )
    return scanned(block, x, inputs)[0]


def scan_but_last(
    block: nn.Module,
    length: int,
    x: Float[Array, "B T D"],
    *inputs: Any,
    last: Callable[..., jax.Array],
    remat: str = "none",
) -> Float[Array, "..."]:
    """Apply blocks one after another, the last one in another way.

    `scan_blocks` must have made the parameters.

    Args:
      block, length, x, inputs, remat: as for `scan_blocks`.
      last: applies the last block: `last(block, x, *inputs)`.

    Returns:
      The result of `last`.
    """

    def all_but_last(block: nn.Module, x: jax.Array) -> jax.Array:
        return scan_blocks(block, length - 1, x, *inputs, remat=remat)

    def only_last(block: nn.Module, x: jax.Array) -> jax.Array:
        return _recomputed(last, remat)(block, constrain_rows(x), *inputs)

    def with_layers(function: Callable, layers: slice | int) -> Callable:
        """`function` of a block whose parameters are those of some layers."""

        def take(variables: Any) -> Any:
            return jax.tree.map(lambda stacked: stacked[layers], variables)

        return nn.map_variables(function, "params", trans_in_fn=take)

    if length > 1:
        x = with_layers(all_but_last, slice(length - 1))(block, x)
    return with_layers(only_last, length - 1)(block, x)


def _recomputed(function: Callable, remat: str) -> Callable:
    """A function of a module, recomputed in the backward pass as the setting's `block_policy` says."""
    policy = find_remat(remat).block_policy
    if policy is None:
        return function
    # In a scan, forward and backward pass are two loops: XLA cannot merge the recomputation away.
    return nn.remat(function, policy=policy, prevent_cse=False)
