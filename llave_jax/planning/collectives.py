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

# What an exchange is for, by where it comes from in the program; the first match counts.
_PURPOSES = (
    (r"embed_tokens/", "token embedding lookup"),
    (r"transpose\(.*rematted_computation.*/sharding_constraint", "parameter gather"),
    (r"transpose\(", "gradient scatter"),
    (r"/sharding_constraint", "parameter gather"),
    (r"\)/shard_map/|/shard_map/all_gather", "embedding gather and loss"),
)
# An exchange of a few norms, biases and metrics: nothing to plan for.
SMALL_BYTES = 64 * 1024
UNACCOUNTED = "UNACCOUNTED"


def layer_shapes(model: Llave) -> set[tuple[int, ...]]:
    """Shapes of all parameters, of stacked layers one layer's."""
    flat = sharding.flatten(abstract_params(model))
    return {x.shape[1:] if "/layers/" in path else x.shape for path, x in flat.items()}


def purpose(collective: hlo.Collective, pool: int, whole: Collection[tuple[int, ...]]) -> str:
    """What an exchange is for.

    Some XLA makes without saying where they come from; these are known by their sizes. On slices
    whose links form rings in three dimensions XLA gathers by all-reduces of arrays that are zero
    but for a device's own part.

    Args:
      pool: number of values in the gathered embeddings of one side.
      whole: shapes of parameters, as of `layer_shapes`.
    """
    for pattern, name in _PURPOSES:
        if re.search(pattern, collective.op_name):
            return name
    if collective.result_bytes / collective.count <= SMALL_BYTES:
        return "scalars and vectors"
    dtypes, shapes = (set(values) for values in zip(*hlo.arrays(collective.shape), strict=True))
    if dtypes == {"s32"}:
        # Token ids: every device looks up its columns of everybody's tokens.
        return "token embedding lookup"
    if dtypes == {"f32"} and all(_is_pool(collective, dims, pool) for dims in shapes):
        return "embedding gather and loss"
    if collective.op_name:
        return UNACCOUNTED
    if collective.kind in ("all-reduce", "all-gather") and shapes <= set(whole):
        return "parameter gather"
    if collective.kind == "reduce-scatter" and all(
        any(_is_part(dims, full, collective.group) for full in whole) for dims in shapes
    ):
        return "gradient scatter"
    # Shards that are no whole tiles are shifted to their places.
    if collective.kind == "collective-permute" and all(
        any(_is_part(dims, full) for full in whole) for dims in shapes
    ):
        return "parameter gather"
    return UNACCOUNTED


def _is_pool(collective: hlo.Collective, dims: tuple[int, ...], pool: int) -> bool:
    """The embeddings of one side, or gradients of them; shares may be padded to tiles of 8 rows."""
    if not dims:
        return False
    parts = collective.group if collective.kind == "reduce-scatter" else 1
    rows, needed = parts * math.prod(dims[:-1]), pool / dims[-1]
    share = math.ceil(needed / collective.group / 8) * 8
    return needed <= rows <= share * collective.group


def _is_part(dims: tuple[int, ...], full: tuple[int, ...], parts: int | None = None) -> bool:
    """`full` cut along one dimension (into so many equal parts)."""
    if len(dims) != len(full):
        return False
    cut = [(part, size) for part, size in zip(dims, full, strict=True) if part != size]
    return len(cut) == 1 and parts in (None, cut[0][1] / cut[0][0])
