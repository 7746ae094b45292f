"""Where arrays live: the device mesh, and the placement of parameters and batches on it.

How each parameter is split says the table of weights (`llave_jax.models.parameters`); this module
applies it. Batches are split over the data-like axes, one shard a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MESH_AXES = ("data", "fsdp", "tensor")
# A batch is split over both; the loss gathers over both, or negatives would be lost.
BATCH_AXES = ("data", "fsdp")


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Mesh with axes `data`, `fsdp`, `tensor`; one of them may be -1: all remaining devices.

    Raises:
      ValueError: the sizes do not use all devices, or cannot be laid out on a slice's links.
    """
    count = len(devices) if devices is not None else jax.device_count()
    if set(axes) != set(MESH_AXES):
        raise ValueError(f"mesh: axes are {sorted(axes)}; expected {list(MESH_AXES)}")
    sizes = [axes[name] for name in MESH_AXES]
    if sizes.count(-1) == 1:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = count // known
    if math.prod(sizes) != count or min(sizes) < 1:
        raise ValueError(
            f"mesh: {dict(axes)} does not use {count} devices; the sizes' product must be {count} "
            "(one axis may be -1: the rest)"
        )
    types = (AxisType.Auto,) * len(MESH_AXES)
    try:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=types, devices=devices)
    except NotImplementedError as error:
        raise ValueError(
            f"mesh: {dict(zip(MESH_AXES, sizes, strict=True))} does not fit the slice's links: each "
            f"axis must be a product of the slice's own dimensions (of 4x4x4: 4, 16, 64). {error}"
        ) from error


def num_shards(mesh: Mesh) -> int:
    """Shards of a batch: devices along the data-like axes."""
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def path_string(path: Sequence[Any]) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}, in order."""
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b/c": leaf} -> nested dict."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def param_spec(axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """Placement of one parameter.

    An axis that does not divide its dimension (2 key heads over 4 devices) leaves it whole.

    Args:
      axes: mesh axis of each of the trailing dimensions, None to leave one whole; leading
        dimensions, which layers are stacked on, are left whole.
      shape: of the parameter.

    Raises:
      ValueError: one axis for two dimensions, or more axes than dimensions.
    """
    named = [axis for axis in axes if axis is not None]
    if len(set(named)) != len(named):
        raise ValueError(f"mesh axes {tuple(axes)} split two dimensions over one axis")
    if len(axes) > len(shape):
        raise ValueError(f"{len(axes)} mesh axes {tuple(axes)} for a parameter {tuple(shape)}")
    full = (None,) * (len(shape) - len(axes)) + tuple(axes)
    return PartitionSpec(
        *(
            axis if axis is not None and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(full, shape, strict=True)
        )
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading_axes: int = 0) -> NamedSharding:
    """Sharding of arrays [..., S, ...] whose shard axis comes after `leading_axes` others."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading_axes, BATCH_AXES))


def local_shards(mesh: Mesh) -> range:
    """The batch shards that this process loads.

    Raises:
      ValueError: they are not a run of their own (the tensor axis crosses processes).
    """
    total = num_shards(mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((total,)).values()
    starts = sorted({index[0].start or 0 for index in indices})
    if (
        starts != list(range(starts[0], starts[-1] + 1))
        or len(starts) * jax.process_count() != total
    ):
        raise ValueError(
            f"mesh {dict(mesh.shape)}: {jax.process_count()} processes do not each have a run of "
            f"the {total} batch shards; the tensor axis must lie within a process"
        )
    return range(starts[0], starts[-1] + 1)


def mesh_in_use() -> bool:
    """Whether the computation being traced is to run on a mesh (`use_mesh`)."""
    return not jax.sharding.get_abstract_mesh().empty


def use_mesh(mesh: Mesh) -> AbstractContextManager:
    """Context for tracing a computation that is to run on this mesh: what `constrain_rows` and
    `map_rows_and_heads` split arrays over. Without it they leave everything to XLA."""
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def rows_per_device(x: jax.Array) -> int:
    """Of an array [rows, ...] split over the batch axes of the mesh in use."""
    mesh = jax.sharding.get_abstract_mesh()
    return x.shape[0] if mesh.empty else max(1, x.shape[0] // num_shards(mesh))


def constrain_rows(x: jax.Array) -> jax.Array:
    """Keep an array [rows, ...] split over the batch axes, and only those.

    Left alone, XLA may gather activations to keep parameters split; with this it gathers
    parameters, which are fewer bytes and can be fetched ahead.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def gather_for_use(x: jax.Array, axes: Sequence[str | None]) -> jax.Array:
    """All-gather a layer's parameter over every mesh axis but "tensor"; scatter its gradient back.

    The explicit gather sends the parameter once per use, in the dtype of `x`. Without it XLA cuts
    the matrix product into one per shard, too thin for the matrix units.

    Args:
      x: the parameter, in the dtype to send.
      axes: mesh axis of each of its dimensions, as for `param_spec`, of the mesh in use.
    """
    spec = param_spec(axes, x.shape, jax.sharding.get_abstract_mesh())
    whole = PartitionSpec(*(axis if axis == "tensor" else None for axis in spec))
    constrain = jax.lax.with_sharding_constraint

    @jax.custom_vjp
    def gather(x: jax.Array) -> jax.Array:
        return constrain(constrain(x, spec), whole)

    def scatter(_, gradient: jax.Array) -> tuple[jax.Array]:
        return (constrain(constrain(gradient, whole), spec),)

    gather.defvjp(lambda x: (gather(x), None), scatter)
    return gather(x)


def map_rows_and_heads(
    function: Callable[..., jax.Array],
    with_heads: Sequence[jax.Array],
    without_heads: Sequence[jax.Array],
) -> jax.Array:
    """`function(*with_heads, *without_heads)`, each device on its own rows and heads.

    Args:
      function: maps arrays [B, T, H, D] (the number of heads may differ) and [B, T] to [B, T, H, D].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*with_heads, *without_heads)
    divides = all(x.shape[2] % mesh.shape["tensor"] == 0 for x in with_heads)
    # Heads that do not divide are computed by every device of the tensor axis.
    heads = PartitionSpec(BATCH_AXES, None, "tensor" if divides else None)
    specs = (*(heads for _ in with_heads), *(PartitionSpec(BATCH_AXES) for _ in without_heads))
    # Kernels do not say over which axes their results vary, so that cannot be checked.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return mapped(*with_heads, *without_heads)


def device_put_batch(batch: Any, mesh: Mesh, leading_axes: int = 0) -> Any:
    """Host arrays of this process's shards -> global arrays, split over the batch axes."""
    sharding = batch_sharding(mesh, leading_axes)
    total = num_shards(mesh)

    def put(x: np.ndarray) -> jax.Array:
        shape = (*x.shape[:leading_axes], total, *x.shape[leading_axes + 1 :])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(put, batch)


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Shapes and dtypes (arrays or ShapeDtypeStructs), placed."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, shardings
    )
