"""Attention of others, to check and to time beside ours: jax's, cuDNN's, tokamax's.

Owns how packed rows are put to each of them. None is used by a model. What an implementation cannot compute it
refuses (`CannotRun`), as where its mask would take the square of a row's length.
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np

from llave_jax.ops.attention_check import Case

# Scores of one row up to which a mask is made for implementations that want it whole.
MAX_MASK = 2**26
_LANES = 128


class CannotRun(Exception):
    """An implementation does not do this, here. The message says why."""


Attend = Callable[..., jax.Array]


def peers(platform: str) -> dict[str, Callable[[Case], Attend]]:
    """The implementations of others that a platform may have.

    Args:
      platform: of the devices: "cpu", "gpu" or "tpu". On CPUs kernels run in Pallas's interpreter.

    Returns:
      name -> a function that makes (query, key, value, segment_ids) -> output for a case, or raises CannotRun.
    """
    found = {"jax.nn": _jax_nn}
    if platform == "gpu":
        found["cudnn"] = _cudnn
    if platform in ("gpu", "cpu"):
        found["jax triton"] = functools.partial(_jax_triton, interpret=platform == "cpu")
    if platform in ("tpu", "cpu"):
        found["jax splash"] = functools.partial(_jax_splash, interpret=platform == "cpu")
    if importlib.util.find_spec("tokamax"):
        found["tokamax"] = _tokamax
    return found


def _mask(case: Case) -> np.ndarray | None:
    """bool [R, 1, T, T]; None if every token sees every other."""
    if not case.causal:
        return None
    if case.length**2 > MAX_MASK:
        raise CannotRun(f"a mask of {case.length} x {case.length} would be needed")
    ids = case.segment_ids
    visible = (ids[:, :, None] == ids[:, None, :]) & np.tri(case.length, dtype=bool)
    return visible[:, None]


def _jax_nn(case: Case) -> Attend:
    mask = _mask(case)

    def attend(query, key, value, segment_ids):
        return jax.nn.dot_product_attention(query, key, value, mask=mask, implementation="xla")

    return attend


def _tokamax(case: Case) -> Attend:
    import tokamax  # pyright: ignore[reportMissingImports]

    mask = _mask(case)

    def attend(query, key, value, segment_ids):
        return tokamax.dot_product_attention(query, key, value, mask=mask)

    return attend


def _cudnn(case: Case) -> Attend:
    """cuDNN knows no segments: each gets a row of its own, padded to the longest."""
    if case.dtype == "float32":
        raise CannotRun("it computes in 16 bits only")
    places, lengths = _own_rows(case)

    def attend(query, key, value, segment_ids):
        def apart(x):
            return x.reshape(-1, *x.shape[2:])[places]

        out = jax.nn.dot_product_attention(
            apart(query), apart(key), apart(value),
            query_seq_lengths=lengths, key_value_seq_lengths=lengths,
            is_causal=case.causal, implementation="cudnn",
        )  # fmt: skip
        real = np.arange(places.shape[1]) < lengths[:, None]
        together = jnp.zeros((query.shape[0] * query.shape[1], *query.shape[2:]), query.dtype)
        return together.at[places[real]].set(out[real]).reshape(query.shape)

    return attend


def _own_rows(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """int32 [segments, longest] indices of tokens in R * T, and the lengths of segments."""
    lengths = np.concatenate([np.asarray(row, np.int32) for row in case.rows])
    starts = np.concatenate(
        [i * case.length + np.cumsum([0, *row[:-1]]) for i, row in enumerate(case.rows)]
    )
    offsets = np.arange(case.longest)
    return np.where(offsets < lengths[:, None], starts[:, None] + offsets, 0), lengths


def _jax_triton(case: Case, *, interpret: bool) -> Attend:
    from jax.experimental.pallas.ops.gpu.attention import mha

    repeats, padding = case.heads // case.groups, -case.length % _LANES

    def attend(query, key, value, segment_ids):
        key, value = (jnp.repeat(x, repeats, axis=2) for x in (key, value))
        pad = ((0, 0), (0, padding), (0, 0), (0, 0))
        query, key, value = (jnp.pad(x, pad) for x in (query, key, value))
        ids = jnp.pad(segment_ids, ((0, 0), (0, padding)))
        scale = 1 / math.sqrt(case.head_dim)
        options = {"sm_scale": scale, "causal": case.causal, "interpret": interpret}
        return cast(jax.Array, mha(query, key, value, ids, **options))[:, : case.length]

    return attend


def _jax_splash(case: Case, *, interpret: bool) -> Attend:
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    length = -(-case.length // _LANES) * _LANES
    make = splash.CausalMask if case.causal else splash.FullMask
    mask = splash.MultiHeadMask([make((length, length)) for _ in range(case.heads)])
    kernel = splash.make_splash_mha_single_device(mask, interpret=interpret)

    def attend(query, key, value, segment_ids):
        # Heads narrower than a register are padded with zeros, which add nothing to a score.
        pad = ((0, 0), (0, length - case.length), (0, 0), (0, -case.head_dim % _LANES))
        query = query * jnp.asarray(1 / math.sqrt(case.head_dim), query.dtype)
        query, key, value = (jnp.pad(x, pad).swapaxes(1, 2) for x in (query, key, value))
        ids = jnp.pad(segment_ids, pad[:2])
        ids = splash.SegmentIds(ids, ids)
        out = cast(jax.Array, jax.vmap(kernel)(query, key, value, ids))
        return out.swapaxes(1, 2)[:, : case.length, :, : case.head_dim]

    return attend
