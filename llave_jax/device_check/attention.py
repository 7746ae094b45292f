"""Every implementation of attention that can run here, against the reference and against the clock.

Ours have to pass; those of others (`peers.py`) are there to compare with.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llave_jax.device_check.peers import CannotRun, peers
from llave_jax.device_check.report import Row
from llave_jax.models.config import PRESETS, LlaveConfig
from llave_jax.models.llave import attention_cases
from llave_jax.ops.attention import AUTO, KERNELS
from llave_jax.ops.attention_check import MARGIN, Case, check
from llave_jax.ops.attention_choice import implementation

# Rows for CPUs, where kernels run in Pallas's interpreter, a thousand times slower.
_SHORT_ROWS, _SHORT_LENGTH = ((1, 2, 60, 70), (130, 9)), 145
RELEASED = ("llave-0.5b", "llave-2b", "llave-7b")
REPEATS = 5


def cases(model: LlaveConfig, dtype: str, platform: str, *, short: bool) -> list[Case]:
    """What implementations are tried on.

    Args:
      model: of the config that is checked with.
      dtype: of its activations.
      platform: of the devices.
      short: only what that model needs.

    Returns:
      The model's own attention; unless `short`, that of the released models as well, in float32 and bfloat16.
      On CPUs rows are short, and heads few.
    """
    dtypes = (dtype,) if short else ("bfloat16", "float32")
    models = [model] if short else [model, *(PRESETS[name] for name in RELEASED)]
    found = [case for d in dtypes for m in models for case in attention_cases(m, d)]
    if platform == "cpu":
        found = [_few(case) for case in found]
    return list(dict.fromkeys(found))


def _few(case: Case) -> Case:
    if not case.causal:
        return dataclasses.replace(case, heads=1, groups=1, rows=((70,), (70,)), length=70)
    return dataclasses.replace(case, heads=2, groups=1, rows=_SHORT_ROWS, length=_SHORT_LENGTH)


def ours(platform: str) -> tuple[str, ...]:
    """The implementations of this package that a platform can run; on CPUs, kernels in the interpreter.

    Args:
      platform: of the devices.

    Returns:
      Their names, the one that "auto" takes first.
    """
    return tuple(dict.fromkeys((AUTO[platform], *(KERNELS if platform == "cpu" else ()), "xla")))


def agreement(model_cases: list[Case], device: Any, *, with_peers: bool) -> Iterator[Row]:
    """Forward and backward passes of each implementation in each case.

    Args:
      model_cases: of `cases`.
      device: to run on.
      with_peers: try the implementations of others, too.

    Yields:
      A finding for each implementation and case.
    """
    interpret = device.platform == "cpu"
    for case in model_cases:
        for name in ours(device.platform):
            outcome = check(implementation(name, case, interpret=interpret), case, device)
            yield _row(name, case, outcome, is_ours=True)
        for name, make in peers(device.platform).items() if with_peers else ():
            try:
                outcome = check(make(case), case, device)
            except CannotRun as error:
                yield Row("attention", f"{name}: {case}", None, f"not tried: {error}")
                continue
            yield _row(name, case, outcome, is_ours=False)


def _row(name: str, case: Case, outcome: Any, *, is_ours: bool) -> Row:
    if outcome.passed:
        text = f"error {outcome.worst:.2g} of {MARGIN:g} roundings"
    else:
        text = outcome.failure
    passed = outcome.passed if is_ours else None
    subject = f"{name}: {case}"
    if not is_ours and not outcome.passed:
        text = f"disagrees or does not run (it is not used): {text}"
    values = {"errors": dict(outcome.errors), "agrees": outcome.passed}
    return Row("attention", subject, passed, text, values)


def speed(case: Case, device: Any) -> Iterator[Row]:
    """How long each implementation takes on rows as training packs them.

    Args:
      case: with the rows of a real batch.
      device: to run on; on CPUs kernels are left out, which the interpreter runs.

    Yields:
      A finding for each implementation.
    """
    names: dict[str, Callable[[Case], Any]] = {
        name: functools.partial(implementation, name)
        for name in ours(device.platform)
        if name not in KERNELS or device.platform != "cpu"
    }
    others = peers(device.platform)
    if device.platform == "cpu":
        others = {"jax.nn": others["jax.nn"]}
    shape = [len(case.rows), case.length]
    keys = jax.random.split(jax.random.key(0), 4)
    heads = (case.heads, case.groups, case.groups, case.heads)
    arrays = [
        jax.device_put(
            jax.random.normal(k, (*shape, h, case.head_dim), jnp.dtype(case.dtype)), device
        )
        for k, h in zip(keys, heads, strict=True)
    ]
    ids = jax.device_put(case.segment_ids, device)
    for name, make in {**names, **others}.items():
        subject = f"{name}: {len(case.rows)} x {case.length}, {case}"
        try:
            forward, both = _programs(make(case))
            seconds = [
                measured(forward, *arrays[:3], ids),
                measured(both, *arrays, ids),
            ]
        except CannotRun as error:
            yield Row("speed of attention", subject, None, f"not tried: {error}")
            continue
        except Exception as error:  # a peer, or its compiler, may fail in any way
            yield Row("speed of attention", subject, None, f"{type(error).__name__}: {error}"[:120])
            continue
        text = f"{1e3 * seconds[0]:.2f} ms, with gradients {1e3 * seconds[1]:.2f} ms"
        values = {"forward_seconds": seconds[0], "gradient_seconds": seconds[1]}
        yield Row("speed of attention", subject, None, text, values)


def _programs(attend: Callable[..., jax.Array]) -> tuple[Callable, Callable]:
    def both(query, key, value, cotangent, ids):
        out, pull = jax.vjp(lambda *x: attend(*x, ids), query, key, value)
        return out, pull(cotangent)

    return jax.jit(attend), jax.jit(both)


def measured(run: Callable[..., Any], *arguments: Any) -> float:
    """Median seconds of a call, after one that compiles.

    Args:
      run: returns arrays.
      arguments: of the call.

    Returns:
      Seconds.
    """
    jax.block_until_ready(run(*arguments))
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        jax.block_until_ready(run(*arguments))
        times.append(time.perf_counter() - start)
    return float(np.median(times))
