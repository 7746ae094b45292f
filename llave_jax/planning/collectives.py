"""What the collectives of a compiled program are for, read off their names, shapes and sizes.

Owns the purposes that reports name. Counting collectives and their bytes is `hlo.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection

from llave_jax.models.llave import Llave, abstract_params
from llave_jax.parallel import sharding
from llave_jax.planning import hlo

# What a collective is for, by the name of the traced operation that it comes from. The first match counts.
_PURPOSES = (
    (r"embed_tokens/", "token embedding lookup"),
    (r"transpose\(.*rematted_computation.*/sharding_constraint", "parameter gather"),
    (r"transpose\(", "gradient scatter"),
    (r"/sharding_constraint", "parameter gather"),
    (r"\)/shard_map/|/shard_map/all_gather", "embedding gather and loss"),
)
# A collective of at most this many bytes exchanges norms, biases and metrics: nothing to plan for.
SMALL_BYTES = 64 * 1024
# The purpose of a collective that no rule recognises.
UNACCOUNTED = "UNACCOUNTED"


def layer_shapes(model: Llave) -> set[tuple[int, ...]]:
    """The shapes by which `purpose` recognises parameters.

    Args:
      model: the model that the program runs.

    Returns:
      Shapes of all parameters; of stacked ones, the shape of one layer.
    """
    flat = sharding.flatten(abstract_params(model))
    return {x.shape[1:] if "/layers/" in path else x.shape for path, x in flat.items()}


def purpose(collective: hlo.Collective, pool: int, parameters: Collection[tuple[int, ...]]) -> str:
    """What a collective is for.

    XLA makes some collectives without the name of an operation. They are recognised by their sizes. On
    slices whose links form rings in three dimensions, XLA gathers by all-reduce: each device contributes
    an array that is zero outside its own part.

    Args:
      collective: of the compiled program.
      pool: number of values in the gathered embeddings of one side.
      parameters: shapes, of `layer_shapes`.

    Returns:
      The purpose, or UNACCOUNTED.
    """
    for pattern, name in _PURPOSES:
        if re.search(pattern, collective.op_name):
            return name
    if collective.result_bytes / collective.count <= SMALL_BYTES:
        return "scalars and vectors"
    dtypes, shapes = (set(values) for values in zip(*hlo.arrays(collective.shape), strict=True))
    if dtypes == {"s32"}:
        # Token ids: each device looks up its own columns of the embeddings of all tokens.
        return "token embedding lookup"
    if dtypes == {"f32"} and all(_is_pool(collective, dims, pool) for dims in shapes):
        return "embedding gather and loss"
    if collective.op_name:
        return UNACCOUNTED
    if collective.kind in ("all-reduce", "all-gather") and shapes <= set(parameters):
        return "parameter gather"
    if collective.kind == "reduce-scatter" and all(
        any(_is_part(dims, full, collective.group) for full in parameters) for dims in shapes
    ):
        return "gradient scatter"
    # XLA moves shards that are not whole tiles to their place by a permute.
    if collective.kind == "collective-permute" and all(
        any(_is_part(dims, full) for full in parameters) for dims in shapes
    ):
        return "parameter gather"
    return UNACCOUNTED


def _is_pool(collective: hlo.Collective, dims: tuple[int, ...], pool: int) -> bool:
    """Whether an array holds the embeddings of one side or their gradients, padded to tiles of 8 rows."""
    if not dims:
        return False
    parts = collective.group if collective.kind == "reduce-scatter" else 1
    rows, needed = parts * math.prod(dims[:-1]), pool / dims[-1]
    share = math.ceil(needed / collective.group / 8) * 8
    return needed <= rows <= share * collective.group


def _is_part(dims: tuple[int, ...], full: tuple[int, ...], parts: int | None = None) -> bool:
    """Whether `dims` is `full` cut along one dimension, into `parts` equal parts if that is given."""
    if len(dims) != len(full):
        return False
    cut = [(part, size) for part, size in zip(dims, full, strict=True) if part != size]
    return len(cut) == 1 and parts in (None, cut[0][1] / cut[0][0])
