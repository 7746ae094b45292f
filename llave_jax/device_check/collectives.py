"""What devices exchange, along every axis of the mesh: whether it arrives, and how fast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from llave_jax.device_check.attention import measured
from llave_jax.device_check.report import Row

# float32 numbers that each device has, for what is timed.
LARGE = 2**23
SMALL = 2**10

# Name -> (what a device does along an axis; bytes that it receives, in its part's bytes, of n devices).
_EXCHANGES: dict[str, tuple[Callable[..., jax.Array], Callable[[int], float]]] = {
    "all_gather": (
        lambda x, axis: jax.lax.all_gather(x, axis, tiled=True),
        lambda n: n - 1,
    ),
    "reduce_scatter": (
        lambda x, axis: jax.lax.psum_scatter(x, axis, tiled=True),
        lambda n: (n - 1) / n,
    ),
    "psum": (lambda x, axis: jax.lax.psum(x, axis), lambda n: 2 * (n - 1) / n),
}


def exchanges(mesh: jax.sharding.Mesh) -> Iterator[Row]:
    """Each collective along each axis that has more than one device.

    The numbers are whole, and their sums below 2^24, so that results have to be exact.

    Args:
      mesh: of all devices of the job; all processes call this.

    Yields:
      A finding for each collective and axis.
    """
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    if not axes:
        yield Row("collectives", "one device", None, "nothing to exchange")
    large = LARGE if mesh.devices.flat[0].platform != "cpu" else SMALL
    for axis in axes:
        for name, (exchange, received) in _EXCHANGES.items():
            yield _row(mesh, axis, name, exchange, received, large)


def _row(mesh, axis, name, exchange, received, large) -> Row:
    subject, count = f"{name} along {axis} ({mesh.shape[axis]})", mesh.shape[axis]
    try:
        is_right = _is_right(mesh, axis, name, exchange)
        part = large // count * count
        run, x = _program(mesh, exchange, axis), _parts(mesh, part)
        seconds = measured(run, x)
    except jax.errors.JaxRuntimeError as error:
        return Row("collectives", subject, False, str(error).partition("\n")[0][:160])
    rate = 4 * part * received(count) / seconds
    text = f"{rate / 1e9:.3g} GB/s a device" if is_right else "what arrives is not what was sent"
    return Row("collectives", subject, is_right, text, {"bytes_per_second": rate})


def _parts(mesh: jax.sharding.Mesh, part: int) -> jax.Array:
    """float32 [devices * part]: device d has d, d + 1, ..., modulo 1021."""
    sharded = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    total = mesh.devices.size * part

    def values(index: Any) -> np.ndarray:
        start, stop, _ = index[0].indices(total)
        return ((np.arange(stop - start) + start // part) % 1021).astype(np.float32)

    return jax.make_array_from_callback((total,), sharded, values)


def _program(mesh: jax.sharding.Mesh, exchange: Callable, axis: str) -> Callable:
    everywhere = PartitionSpec(mesh.axis_names)
    mapped = jax.shard_map(
        lambda x: exchange(x, axis),
        mesh=mesh,
        in_specs=everywhere,
        out_specs=everywhere,
        check_vma=False,
    )
    return jax.jit(mapped)


def _is_right(mesh: jax.sharding.Mesh, axis: str, name: str, exchange: Callable) -> bool:
    """Whether every device of this process has what the collective should give it."""
    count = mesh.shape[axis]
    part = SMALL // count * count
    out = _program(mesh, exchange, axis)(_parts(mesh, part))
    numbers = np.arange(mesh.devices.size).reshape(mesh.devices.shape)
    places = {device: place for place, device in np.ndenumerate(mesh.devices)}
    position = mesh.axis_names.index(axis)
    for shard in out.addressable_shards:
        place = places[shard.device]
        along = (*place[:position], slice(None), *place[position + 1 :])
        sent = [(np.arange(part) + device) % 1021 for device in numbers[along]]
        expected = np.concatenate(sent) if name == "all_gather" else np.sum(sent, axis=0)
        if name == "reduce_scatter":
            expected = expected.reshape(count, -1)[place[position]]
        if not np.array_equal(np.asarray(shard.data), expected.astype(np.float32)):
            return False
    return True
