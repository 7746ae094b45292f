"""Which candidates of a pool are negatives of which rows. It needs jax alone.

Owns the rules for one tile or one whole matrix. Empty slots and the positives themselves are masked where the
losses are computed, in `hardness.py` and `tiled.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
from jaxtyping import Array, Bool, Float, Int32


class Slots(NamedTuple):
    """What the rules know of the rows, or of the columns, of a matrix. A rule whose field is None is off.

    Attributes:
      ids: int32 [slots]; of equal ids, neither is a negative of the other.
      owner: int32 [slots], the number in the pool of the pair that the slot belongs to: a query, a target, or a
        hard negative that the pair's row names.
      limit: [slots], the largest similarity that a negative of this slot may have.
      own_only: bool [slots], whether only hard negatives of the slot's own pair are its negatives; goes with
        `owner`.
    """

    ids: Int32[Array, " slots"] | None = None
    owner: Int32[Array, " slots"] | None = None
    limit: Float[Array, " slots"] | None = None
    own_only: Bool[Array, " slots"] | None = None


def can_be_negative(
    similarity: Float[Array, "n A"], rows: Slots, columns: Slots
) -> Bool[Array, "n A"] | None:
    """All rules together, as `row_losses` takes them.

    Args:
      similarity: [n, A] of n rows and A candidates.
      rows: of the rows, whose losses are computed.
      columns: of the candidates; `limit` and `own_only` are not used.

    Returns:
      False where a candidate must not be a negative of the row; None if no rule is on.
    """
    by_ids, by_pair = differs(rows, columns), allowed(similarity, rows, columns)
    if by_ids is None or by_pair is None:
        return by_pair if by_ids is None else by_ids
    return by_ids & by_pair


def differs(rows: Slots, columns: Slots) -> Bool[Array, "n A"] | None:
    """The rule on ids. It is the same in both directions.

    Args:
      rows, columns: as for `can_be_negative`.

    Returns:
      True where ids differ; None if ids are not known.
    """
    return None if rows.ids is None else rows.ids[:, None] != columns.ids


def allowed(
    similarity: Float[Array, "n A"], rows: Slots, columns: Slots
) -> Bool[Array, "n A"] | None:
    """The rules on similarity and on ownership, of the rows' losses.

    Args:
      similarity, rows, columns: as for `can_be_negative`.

    Returns:
      False where a candidate must not be a negative of the row; None if neither rule is on.
    """
    found = None
    if rows.limit is not None:
        # Not "<=": a nan among the similarities of real pairs must reach the loss.
        found = ~(jax.lax.stop_gradient(similarity) > rows.limit[:, None])
    if rows.own_only is not None:
        own = is_own(rows, columns)
        assert own is not None
        own |= ~rows.own_only[:, None]
        found = own if found is None else found & own
    return found


def is_own(rows: Slots, columns: Slots) -> Bool[Array, "n A"] | None:
    """Which candidates the row's own pair has brought: its positive, and the hard negatives it names.

    Args:
      rows, columns: as for `can_be_negative`.

    Returns:
      The mask; None if owners are not known.
    """
    return None if rows.owner is None else rows.owner[:, None] == columns.owner
