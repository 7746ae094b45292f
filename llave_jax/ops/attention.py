"""Attention over packed rows: one function, several implementations.

The XLA form is the reference and runs everywhere. The kernels (`tpu_attention.py`, `gpu_attention.py`) are for
one kind of device each. What an implementation cannot do raises; none falls back silently.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp

from llave_jax.ops import gpu_attention, tpu_attention
from llave_jax.parallel import sharding

# By the platform of the devices; "auto" means these.
BY_PLATFORM = {"cpu": "xla", "tpu": "splash", "gpu": "triton"}
KERNELS = {"splash": tpu_attention.splash_attention, "triton": gpu_attention.triton_attention}
IMPLEMENTATIONS = ("auto", "xla", *KERNELS)

# Queries whose scores the XLA form holds at once.
BLOCK = 512
# `attention_at` computes the scores of all its queries with all keys if there are no more of a head,
# and otherwise copies the keys of a query's row: so many at once.
MOST_SCORES = 2**21
KEYS_AT_ONCE = 2**18


def attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    causal: bool,
    max_segment_length: int | None = None,
    implementation: str = "auto",
) -> jax.Array:
    """Softmax attention with scale 1 / sqrt(head size), softmax in float32.

    Kernels are not something XLA can split over devices, so on the mesh in use
    (`sharding.use_mesh`) each device calls them on its own rows and heads.

    Args:
      query: [B, T, H, D].
      key, value: [B, T, G, D]; H is a multiple of G (grouped-query attention).
      segment_ids: int32 [B, T], not negative; tokens see only tokens of their own segment. 0 marks
        unused tokens: what they get holds no meaning. None: all of a row is one segment.
      causal: tokens see none after them.
      max_segment_length: tokens of the longest segment, where that is known to be less than a row and segments
        ascend, as packed. Splash attention then needs memory for that many only; with longer segments
        than said all it gives is NaN.
      implementation: "xla"; "splash" (TPU); "triton" (GPU); or "auto", what suits the default
        device.

    Returns:
      [B, T, H, D] in the query's dtype.

    Raises:
      ValueError: no such implementation, or the shapes do not fit together.
    """
    _check(query, key, value, segment_ids)
    implementation = _resolve(implementation)
    if implementation == "xla":
        return xla_attention(query, key, value, segment_ids, causal=causal)
    if segment_ids is None:
        segment_ids = jnp.ones(query.shape[:2], jnp.int32)
    kernel = functools.partial(KERNELS[implementation], causal=causal)
    if implementation == "splash":
        kernel = functools.partial(kernel, max_segment_length=max_segment_length)
    return sharding.map_rows_and_heads(kernel, (query, key, value), (segment_ids,))


def on_mesh(implementation: str, mesh: jax.sharding.Mesh) -> str:
    """The implementation that "auto" means on the devices of a mesh; others as they are."""
    if implementation == "auto":
        return BY_PLATFORM[mesh.devices.flat[0].platform]
    return _resolve(implementation)


def padded_length(length: int, implementation: str) -> int:
    """What an implementation pads rows to. Longer rows of that length it need not copy."""
    implementation = _resolve(implementation)
    if implementation == "splash":
        return tpu_attention.Blocks.of(length).length
    return length


def _resolve(implementation: str) -> str:
    if implementation == "auto":
        return BY_PLATFORM[jax.default_backend()]
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {implementation!r}; expected one of {IMPLEMENTATIONS}")
    return implementation


def xla_attention(query, key, value, segment_ids, *, causal: bool) -> jax.Array:
    """Long rows go through in blocks of queries: memory is linear in the row's length, and of a
    causal mask only the keys up to the block's last query are looked at."""
    length = query.shape[1]

    def attend(start, query, key, value, query_segments, key_segments):
        visible = jnp.ones((1, query.shape[1], key.shape[1]), bool)
        if causal:
            position = start + jnp.arange(query.shape[1])
            visible = (position[:, None] >= jnp.arange(key.shape[1]))[None]
        if query_segments is not None:
            visible &= query_segments[:, :, None] == key_segments[:, None, :]
        return masked_attention(query, key, value, visible)

    if length > BLOCK:
        attend = jax.checkpoint(attend, static_argnums=0)
    blocks = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        seen = stop if causal else length
        segments = (None, None)
        if segment_ids is not None:
            segments = (segment_ids[:, start:stop], segment_ids[:, :seen])
        block = (query[:, start:stop], key[:, :seen], value[:, :seen])
        blocks.append(attend(start, *block, *segments))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def attention_at(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    query_indices: jax.Array,
    *,
    segment_ids: jax.Array,
    row_length: int,
) -> jax.Array:
    """Causal attention of single tokens, each over the keys of its own row.

    Args:
      query: [S, N, H, D], of the tokens `query_indices`.
      key, value: [S, R * T, G, D], rows of `row_length` tokens T one after the other.
      query_indices: int32 [S, N], indices in R * T.
      segment_ids: int32 [S, R * T].

    Returns:
      [S, N, H, D].
    """

    tokens = key.shape[1]
    if query_indices.shape[1] * tokens <= MOST_SCORES:
        # Few enough that the keys of other rows may be looked at in vain.
        row = jnp.arange(tokens) // row_length
        same_row = (query_indices // row_length)[..., None] == row
        same = (
            jnp.take_along_axis(segment_ids, query_indices, axis=1)[..., None]
            == segment_ids[:, None]
        )
        before = query_indices[..., None] >= jnp.arange(tokens)
        return masked_attention(query, key, value, same_row & same & before)

    def rows_of(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1, row_length, *x.shape[2:])

    rows = tuple(rows_of(x) for x in (key, value, segment_ids))

    def one(inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Queries [S, H, D] of one token of each shard, with a copy of its row's keys."""
        query, query_indices = inputs
        row, place = query_indices // row_length, query_indices % row_length
        key, value, segments = (jax.vmap(lambda x, n: x[n])(x, row) for x in rows)
        segment = jnp.take_along_axis(segments, place[:, None], axis=1)
        visible = (segments == segment) & (jnp.arange(row_length) <= place[:, None])
        return masked_attention(query[:, None], key, value, visible[:, None])[:, 0]

    at_once = max(1, KEYS_AT_ONCE // row_length)
    inputs = (query.swapaxes(0, 1), query_indices.T)
    return jax.lax.map(jax.checkpoint(one), inputs, batch_size=at_once).swapaxes(0, 1)


def masked_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, visible: jax.Array
) -> jax.Array:
    """Softmax attention of queries [B, T, H, D] over keys and values [B, S, G, D] where `visible`,
    bool [B or 1, T, S], is true; at least once for each query. All scores are held at once."""
    batch, length, heads, head_dim = query.shape
    groups, repeats = key.shape[2], heads // key.shape[2]
    # The query heads of a group as further rows of one product: batch axes first and nothing
    # repeated is several times faster on CPUs than heads left where they are.
    query = query.reshape(batch, length, groups, repeats, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, groups, repeats * length, head_dim)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = jnp.einsum("BGND,BGSD->BGNS", query, key, preferred_element_type=jnp.float32)
    scores *= 1.0 / math.sqrt(head_dim)
    scores = scores.reshape(batch, groups, repeats, length, -1)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, groups, repeats * length, -1)
    out = jnp.einsum("BGNS,BGSD->BGND", weights, value)
    out = out.reshape(batch, groups, repeats, length, head_dim).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, length, heads, head_dim)


def _check(query, key, value, segment_ids) -> None:
    batch, length, heads, head_dim = query.shape
    if key.shape != value.shape or key.shape != (batch, length, key.shape[2], head_dim):
        raise ValueError(
            f"attention: query {query.shape}, key {key.shape} and value {value.shape} must agree "
            "but for the number of heads, which key and value share"
        )
    if heads % key.shape[2]:
        raise ValueError(f"{heads} query heads do not divide by {key.shape[2]} key heads")
    if segment_ids is not None and segment_ids.shape != (batch, length):
        raise ValueError(f"segment_ids must be {(batch, length)}; found {segment_ids.shape}")
