"""Attention over packed rows: one function, `attention`, with several implementations.

Owns the choice of implementation and the XLA form, which is the reference and runs everywhere. Those for
one kind of device each are `tpu_attention.py`, `gpu_attention.py` and `cpu_attention.py`. An
implementation that cannot compute a call raises an error; none falls back to another.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from llave_jax.ops import cpu_attention, gpu_attention, tpu_attention
from llave_jax.parallel import sharding

# What "auto" means on devices of a platform.
AUTO = {"cpu": "blockwise", "tpu": "splash", "gpu": "triton"}
# Written in Pallas, each for one kind of device.
KERNELS = {"splash": tpu_attention.splash_attention, "triton": gpu_attention.triton_attention}
IMPLEMENTATIONS = ("auto", "xla", "blockwise", *KERNELS)

# The XLA form holds the scores of this many queries at once.
QUERY_BLOCK = 512
# Up to this many scores of one head and shard, `attention_at` computes the scores of all its queries with
# all keys of the shard, and masks those of other rows.
MAX_MASKED_SCORES = 2**21
# Beyond that, it copies the keys of each query's row, and holds this many copied keys at once.
MAX_COPIED_KEYS = 2**18


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
    """Softmax attention with scale 1 / sqrt(E), softmax in float32.

    XLA cannot split a kernel over devices. So each device of the mesh in use (`sharding.use_mesh`)
    calls the kernel on its own rows and heads.

    Args:
      query: [B, T, H, E].
      key, value: [B, T, J, E]; H is a multiple of J (grouped-query attention).
      segment_ids: int32 [B, T], not negative. A token sees only tokens of its own segment. 0 marks
        unused tokens, whose results hold no meaning. None: each row is one segment.
      causal: whether a token sees none of the tokens after it.
      max_segment_length: tokens of the longest segment, if segments ascend along a row (as packing
        leaves them) and this is known to be less than a row. It limits the memory of splash
        attention. If a longer segment occurs, all results of splash attention are NaN.
      implementation: one of IMPLEMENTATIONS: "xla"; "blockwise" (CPU); "splash" (TPU); "triton" (GPU);
        "auto", the one for the default device.

    Returns:
      [B, T, H, E] in the query's dtype.

    Raises:
      ValueError: no such implementation, or the shapes do not fit together.

    References: Vaswani et al., Attention Is All You Need (arXiv 1706.03762), section 3.2.1;
      Ainslie et al., GQA (arXiv 2305.13245).
    """
    _check(query, key, value, segment_ids)
    implementation = _resolve(implementation)
    if implementation == "xla":
        return xla_attention(query, key, value, segment_ids, causal=causal)
    if implementation == "blockwise":
        kernel = functools.partial(cpu_attention.blockwise_attention, causal=causal)
        ids = () if segment_ids is None else (segment_ids,)
        return sharding.map_rows_and_heads(kernel, (query, key, value), ids)
    if segment_ids is None:
        segment_ids = jnp.ones(query.shape[:2], jnp.int32)
    kernel = functools.partial(KERNELS[implementation], causal=causal)
    if implementation == "splash":
        kernel = functools.partial(kernel, max_segment_length=max_segment_length)
    return sharding.map_rows_and_heads(kernel, (query, key, value), (segment_ids,))


def on_mesh(implementation: str, mesh: jax.sharding.Mesh) -> str:
    """The implementation to use on the devices of a mesh.

    Args:
      implementation: one of IMPLEMENTATIONS.
      mesh: whose devices have one platform.

    Returns:
      For "auto", the implementation of the devices' platform; otherwise the argument.

    Raises:
      ValueError: no such implementation.
    """
    if implementation == "auto":
        return AUTO[mesh.devices.flat[0].platform]
    return _resolve(implementation)


def padded_length(length: int, implementation: str) -> int:
    """The length to which an implementation pads rows of `length` tokens.

    A caller that pads its rows to this length once saves a copy in each call.

    Args:
      length: tokens of a row.
      implementation: one of IMPLEMENTATIONS.

    Returns:
      Tokens of a padded row; `length` itself if the implementation pads nothing.

    Raises:
      ValueError: no such implementation.
    """
    implementation = _resolve(implementation)
    if implementation == "splash":
        return tpu_attention.Blocks.of(length).length
    return length


def _resolve(implementation: str) -> str:
    if implementation == "auto":
        return AUTO[jax.default_backend()]
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention is {implementation!r}; expected one of {IMPLEMENTATIONS}")
    return implementation


def xla_attention(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B T J E"],
    value: Float[Array, "B T J E"],
    segment_ids: Int[Array, "B T"] | None,
    *,
    causal: bool,
) -> Float[Array, "B T H E"]:
    """The reference implementation, in plain XLA.

    Long rows are computed in blocks of queries, so memory is linear in the length of a row. Under a
    causal mask, a block skips the keys after its last query.

    Args:
      query, key, value, segment_ids, causal: as for `attention`.

    Returns:
      [B, T, H, E] in the dtype of `value`.
    """
    length = query.shape[1]

    def attend(start, query, key, value, query_segments, key_segments):
        visible = jnp.ones((1, query.shape[1], key.shape[1]), bool)
        if causal:
            position = start + jnp.arange(query.shape[1])
            visible = (position[:, None] >= jnp.arange(key.shape[1]))[None]
        if query_segments is not None:
            visible &= query_segments[:, :, None] == key_segments[:, None, :]
        return masked_attention(query, key, value, visible)

    if length > QUERY_BLOCK:
        attend = jax.checkpoint(attend, static_argnums=0)
    blocks = []
    for start in range(0, length, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, length)
        seen = stop if causal else length
        segments = (None, None)
        if segment_ids is not None:
            segments = (segment_ids[:, start:stop], segment_ids[:, :seen])
        block = (query[:, start:stop], key[:, :seen], value[:, :seen])
        blocks.append(attend(start, *block, *segments))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def attention_at(
    query: Float[Array, "S I H E"],
    key: Float[Array, "S L J E"],
    value: Float[Array, "S L J E"],
    query_indices: Int[Array, "S I"],
    *,
    segment_ids: Int[Array, "S L"],
    row_length: int,
) -> Float[Array, "S I H E"]:
    """Causal attention of single tokens, each over the keys of its own row.

    Args:
      query: [S, I, H, E], the queries of the tokens at `query_indices`.
      key, value: [S, L, J, E], of all tokens of a shard: its rows one after another.
      query_indices: int32 [S, I], in range(L).
      segment_ids: int32 [S, L].
      row_length: tokens of a row; divides L.

    Returns:
      [S, I, H, E].
    """
    tokens = key.shape[1]
    if query_indices.shape[1] * tokens <= MAX_MASKED_SCORES:
        row = jnp.arange(tokens) // row_length
        same_row = (query_indices // row_length)[..., None] == row
        query_segments = jnp.take_along_axis(segment_ids, query_indices, axis=1)
        same_segment = query_segments[..., None] == segment_ids[:, None]
        not_after = query_indices[..., None] >= jnp.arange(tokens)
        return masked_attention(query, key, value, same_row & same_segment & not_after)

    def split_rows(x: jax.Array) -> jax.Array:
        return x.reshape(len(x), -1, row_length, *x.shape[2:])

    rows = tuple(split_rows(x) for x in (key, value, segment_ids))

    def attend(inputs: tuple[Float[Array, "S H E"], Int[Array, " S"]]) -> Float[Array, "S H E"]:
        """One token of each shard, with a copy of the keys of its row."""
        query, index = inputs
        row, position = index // row_length, index % row_length
        key, value, segments = (jax.vmap(lambda x, n: x[n])(x, row) for x in rows)
        segment = jnp.take_along_axis(segments, position[:, None], axis=1)
        visible = (segments == segment) & (jnp.arange(row_length) <= position[:, None])
        return masked_attention(query[:, None], key, value, visible[:, None])[:, 0]

    batch_size = max(1, MAX_COPIED_KEYS // row_length)
    inputs = (query.swapaxes(0, 1), query_indices.T)
    return jax.lax.map(jax.checkpoint(attend), inputs, batch_size=batch_size).swapaxes(0, 1)


def masked_attention(
    query: Float[Array, "B T H E"],
    key: Float[Array, "B U J E"],
    value: Float[Array, "B U J E"],
    visible: Bool[Array, "#B T U"],
) -> Float[Array, "B T H E"]:
    """Softmax attention under any mask, with all scores in memory at once.

    Args:
      query: [B, T, H, E].
      key, value: [B, U, J, E].
      visible: bool [B or 1, T, U], whether a query sees a key; each query must see at least one.

    Returns:
      [B, T, H, E] in the dtype of `value`.
    """
    batch, length, heads, head_dim = query.shape
    groups, repeats = key.shape[2], heads // key.shape[2]
    # Queries of all heads that share keys become the rows of one product, [B, J, H / J * T, E]. With
    # batch axes in front and no key repeated, CPUs are several times faster than with heads in place.
    query = query.reshape(batch, length, groups, repeats, head_dim).transpose(0, 2, 3, 1, 4)
    query = query.reshape(batch, groups, repeats * length, head_dim)
    key, value = key.swapaxes(1, 2), value.swapaxes(1, 2)
    scores = jnp.einsum("BJTE,BJUE->BJTU", query, key, preferred_element_type=jnp.float32)
    scores *= 1.0 / math.sqrt(head_dim)
    scores = scores.reshape(batch, groups, repeats, length, -1)
    scores = jnp.where(visible[:, None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    weights = weights.reshape(batch, groups, repeats * length, -1)
    out = jnp.einsum("BJTU,BJUE->BJTE", weights, value)
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
