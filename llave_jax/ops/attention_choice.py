"""What `attention: auto` means: the first implementation for the devices that agrees with the reference.

Owns the choice, its agreement among the processes of a job, and the file by which a kind of device is checked
once. How an implementation is checked is `attention_check.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from llave_jax.common.content import digest
from llave_jax.common.files import cache_folder, write_text
from llave_jax.ops import attention as attention_lib
from llave_jax.ops import cpu_attention
from llave_jax.ops.attention_check import MARGIN, Case, Outcome, check
from llave_jax.parallel import processes

log = logging.getLogger(__name__)

# What splash attention is told of checked rows, unless their segments are longer: a bound that none reaches.
MAX_SEGMENT_LENGTH = 600
# What was chosen in this process, by what it was chosen for.
_chosen: dict[tuple[Any, ...], str] = {}


def choose(implementation: str, mesh: jax.sharding.Mesh, case: Case) -> str:
    """The implementation of attention to use on a mesh.

    For "auto", the one for the devices' platform is checked first, unless this kind of device has passed
    before. If it does not agree with the reference in float64, a warning says so and the XLA form is checked and
    used in its place. All processes of a job call this together, and choose the same. Nothing is checked on
    CPUs, where "auto" is no kernel, nor for devices that are not there (compiling ahead).

    Args:
      implementation: one of `ops.attention.IMPLEMENTATIONS`; what is not "auto" is used unchecked.
      mesh: the devices, all of one kind.
      case: attention as the model will call it, with the heads of the whole model.

    Returns:
      The name of an implementation, not "auto".

    Raises:
      ValueError: there is no such implementation, or none agrees with the reference.
    """
    device = mesh.devices.flat[0]
    first = attention_lib.on_mesh(implementation, mesh)
    if (
        implementation != "auto"
        or first not in attention_lib.KERNELS
        or device not in jax.devices()
    ):
        return first
    case = _on_one_device(case, mesh)
    key = (first, device.device_kind, case)
    if key not in _chosen:
        _chosen[key] = _first_that_passes((first, "xla"), case, device.device_kind)
    return _chosen[key]


def _on_one_device(case: Case, mesh: jax.sharding.Mesh) -> Case:
    """The case with the heads that `sharding.map_rows_and_heads` leaves to each device."""
    parts = mesh.shape["tensor"]
    if case.heads % parts or case.groups % parts:
        return case
    return dataclasses.replace(case, heads=case.heads // parts, groups=case.groups // parts)


def _first_that_passes(names: tuple[str, ...], case: Case, kind: str) -> str:
    device = jax.local_devices()[0]
    for name in names:
        failures = processes.gather(_remembered(name, case, device).failure)
        failure = next((text for text in failures if text is not None), None)
        if failure is None:
            if name != names[0]:
                log.warning(
                    'attention "%s" is used in its place, which takes longer and is right', name
                )
            return name
        log.warning(
            'attention "%s" IS NOT USED: on %s it disagrees with the reference (%s): %s. Please report it '
            "with the file that `python -m llave_jax.check_device --output FILE.json` writes",
            *(name, kind, case, failure),
        )
    raise ValueError(
        f"no implementation of attention agrees with the reference on {kind}: tried {', '.join(names)}. "
        "python -m llave_jax.check_device shows by how much; --config.attention=NAME and "
        "--config.vision_attention=NAME use one unchecked"
    )


def _remembered(name: str, case: Case, device: Any) -> Outcome:
    """The outcome of a check, which is made unless an earlier one passed on this kind of device.

    What fails is checked again each time: it may have been for want of memory.
    """
    path = passed_file(name, case, device)
    try:
        return Outcome(json.loads(path.read_text(encoding="utf-8"))["errors"], None)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    log.info('checking attention "%s" on %s: %s', name, device.device_kind, case)
    outcome = check(implementation(name, case), case, device)
    if outcome.passed:
        log.info("it agrees with the reference (error %.2g, bound %g)", outcome.worst, MARGIN)
        values = {"implementation": name, "case": str(case), "device": device.device_kind}
        try:
            write_text(path, json.dumps({**values, "errors": outcome.errors}, indent=2))
        except OSError as error:
            log.info("this cannot be kept, so that the next run checks again: %s", error)
    return outcome


def implementation(name: str, case: Case, *, interpret: bool = False) -> Callable[..., jax.Array]:
    """An implementation of this package as `attention_check.check` takes it.

    Args:
      name: one of `ops.attention.IMPLEMENTATIONS`, but not "auto".
      case: what it will be tried on.
      interpret: run kernels in Pallas's interpreter; what is no kernel runs as it is.

    Returns:
      (query, key, value, segment_ids) -> output.
    """
    if name == "xla":
        return functools.partial(attention_lib.xla_attention, causal=case.causal)
    if name == "blockwise":
        return functools.partial(cpu_attention.blockwise_attention, causal=case.causal)
    kernel = functools.partial(attention_lib.KERNELS[name], causal=case.causal)
    if interpret:
        kernel = functools.partial(kernel, interpret=True)
    if name == "splash" and case.causal:
        kernel = functools.partial(kernel, max_segment_length=max(MAX_SEGMENT_LENGTH, case.longest))
    return kernel


def passed_file(name: str, case: Case, device: Any) -> Path:
    """The file that says that an implementation has passed.

    Args:
      name: of the implementation.
      case: that it was tried on.
      device: that it ran on.

    Returns:
      A path in the user's cache. It is another one for another kind of device, driver or version of jax, and for
      kernels with another source.
    """
    versions = (version("jax"), version("jaxlib"), device.client.platform_version)
    key = [name, dataclasses.astuple(case), device.device_kind, versions, _source_digest()]
    return (
        cache_folder() / "attention" / f"{name}-{digest(json.dumps(key).encode()).hex()[:32]}.json"
    )


@functools.cache
def _source_digest() -> str:
    """Of all that decides what kernels compute, and of the check itself."""
    files = sorted(Path(__file__).parent.glob("*.py"))
    return digest(*(file.read_bytes() for file in files)).hex()
