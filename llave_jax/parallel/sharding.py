"""The device mesh, and where parameters and batches lie on it.

The table of weights (`llave_jax.models.parameters`) says how each parameter is split; this module
applies it. Batches are split over `data` and `fsdp`, so that each device has one shard of its own
(devices along `tensor` share theirs).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Shaped

MESH_AXES = ("data", "fsdp", "tensor")
# A batch is split over these. The loss must gather over the same axes, or negatives are lost.
BATCH_AXES = ("data", "fsdp")


def make_mesh(axes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """Arrange devices as a mesh.

    Args:
      axes: size of each of MESH_AXES; one may be -1: all remaining devices.
      devices: the devices to use; None: all devices of the job.

    Returns:
      The mesh, with axes in the order of MESH_AXES.

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


def num_shards(mesh: Mesh | AbstractMesh) -> int:
    """How many shards a batch has on a mesh: the devices along BATCH_AXES.

    Args:
      mesh: the mesh.

    Returns:
      The number.
    """
    return math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def path_string(path: tuple[Any, ...]) -> str:
    """The path of a leaf as text.

    Args:
      path: of `jax.tree_util`.

    Returns:
      Its keys joined by "/".
    """
    return jax.tree_util.keystr(path, simple=True, separator="/")


def flatten(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict as a flat one.

    Args:
      tree: nested dict.

    Returns:
      {"a/b/c": leaf}, with the keys of each dict sorted.
    """
    return {path_string(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `flatten`.

    Args:
      flat: {"a/b/c": leaf}.

    Returns:
      Nested dict.
    """
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def param_spec(
    axes: Sequence[str | None], shape: Sequence[int], mesh: Mesh | AbstractMesh
) -> PartitionSpec:
    """How one parameter is split.

    A dimension that its mesh axis does not divide (2 key heads over 4 devices) stays whole.

    Args:
      axes: mesh axis of each of the last dimensions; None leaves a dimension whole. A layer axis in
        front of them stays whole.
      shape: of the parameter.
      mesh: the mesh.

    Returns:
      The mesh axis of every dimension.

    Raises:
      ValueError: one mesh axis is given for two dimensions, or more axes than there are dimensions.
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
    """The sharding of an array that every device has whole.

    Args:
      mesh: the mesh.

    Returns:
      The sharding.
    """
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, leading_axes: int = 0) -> NamedSharding:
    """The sharding of a batch's arrays.

    Args:
      mesh: the mesh.
      leading_axes: axes in front of the shard axis, which are not split.

    Returns:
      The sharding, which splits the shard axis over BATCH_AXES.
    """
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading_axes, BATCH_AXES))


def local_shards(mesh: Mesh) -> range:
    """The batch shards that this process loads.

    Args:
      mesh: the mesh.

    Returns:
      Their indices.

    Raises:
      ValueError: they are not consecutive, or other processes have them too: the tensor axis crosses
        processes.
    """
    total = num_shards(mesh)
    indices = batch_sharding(mesh).addressable_devices_indices_map((total,)).values()
    starts = sorted({index[0].start or 0 for index in indices if index is not None})
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
    """Whether the computation that is being traced is for a mesh; see `use_mesh`."""
    return not jax.sharding.get_abstract_mesh().empty


def use_mesh(mesh: Mesh) -> AbstractContextManager:
    """A context in which computations are traced for a mesh.

    `constrain_rows`, `gather_for_use` and `map_rows_and_heads` split arrays over its axes. Outside
    such a context XLA decides how arrays are split.

    Args:
      mesh: the mesh.

    Returns:
      The context.
    """
    return jax.sharding.use_abstract_mesh(mesh.abstract_mesh)


def rows_per_device(x: Shaped[Array, "B ..."]) -> int:
    """How many rows of an array each device of the mesh in use has.

    Args:
      x: [B, ...].

    Returns:
      The number of rows, at least 1; B without a mesh.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return x.shape[0] if mesh.empty else max(1, x.shape[0] // num_shards(mesh))


def constrain_rows(x: Shaped[Array, "B ..."]) -> Shaped[Array, "B ..."]:
    """Keep activations split by rows over BATCH_AXES, and over no other axis.

    Without this XLA may gather activations and keep parameters split. Parameters are fewer bytes, and
    their gathers can start early.

    Args:
      x: [B, ...].

    Returns:
      The array, with its sharding fixed if a mesh is in use.
    """
    if not mesh_in_use():
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(BATCH_AXES))


def gather_for_use(x: Float[Array, "*param"], axes: Sequence[str | None]) -> Float[Array, "*param"]:
    """All-gather a layer's parameter over every mesh axis but `tensor`; scatter its gradient back.

    The explicit gather sends the parameter once per use, in the dtype of `x`. Without it XLA splits
    the matrix product into one per shard, each too thin for the matrix units.

    Args:
      x: the parameter, in the dtype in which it is to be sent.
      axes: as for `param_spec`, of the mesh in use.

    Returns:
      The parameter, split over `tensor` only.
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
    """Apply a function on each device to its own rows and heads.

    Args:
      function: maps arrays `with_heads` and `without_heads` to [B, T, H, E].
      with_heads: [B, T, heads, E]; their numbers of heads may differ.
      without_heads: [B, T].

    Returns:
      [B, T, H, E].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function(*with_heads, *without_heads)
    divides = all(x.shape[2] % mesh.shape["tensor"] == 0 for x in with_heads)
    # If the heads do not divide, every device along the tensor axis computes all of them.
    heads = PartitionSpec(BATCH_AXES, None, "tensor" if divides else None)
    specs = (*(heads for _ in with_heads), *(PartitionSpec(BATCH_AXES) for _ in without_heads))
    # Kernels do not declare over which axes their results vary, so JAX cannot check it.
    mapped = jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=heads, check_vma=False)
    return mapped(*with_heads, *without_heads)


def device_put_batch(batch: Any, mesh: Mesh, leading_axes: int = 0) -> Any:
    """Put a batch on its devices.

    Args:
      batch: tree of host arrays [..., S, ...] with this process's shards only.
      mesh: the mesh.
      leading_axes: axes in front of the shard axis.

    Returns:
      The tree of global arrays with all processes' shards.
    """
    sharding = batch_sharding(mesh, leading_axes)
    total = num_shards(mesh)

    def put(x: np.ndarray) -> jax.Array:
        shape = (*x.shape[:leading_axes], total, *x.shape[leading_axes + 1 :])
        return jax.make_array_from_process_local_data(sharding, x, shape)

    return jax.tree.map(put, batch)


def abstract_batch(batch: Any, mesh: Mesh) -> Any:
    """The shapes of a batch on its devices, as `device_put_batch` puts it there.

    Args:
      batch: tree of host arrays [S, ...] with this process's shards only.
      mesh: the mesh.

    Returns:
      Tree of `jax.ShapeDtypeStruct` of all processes' shards.
    """
    place, total = batch_sharding(mesh), num_shards(mesh)
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((total, *x.shape[1:]), x.dtype, sharding=place), batch
    )


def with_shardings(abstract: Any, shardings: Any) -> Any:
    """Add shardings to a tree of shapes.

    Args:
      abstract: tree of arrays or `jax.ShapeDtypeStruct`.
      shardings: tree of the same structure.

    Returns:
      Tree of `jax.ShapeDtypeStruct`.
    """
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), abstract, shardings
    )
