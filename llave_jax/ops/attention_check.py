"""Whether an implementation of attention computes attention, on the device at hand.

Owns the reference in float64, which runs on the host and shares nothing with what it judges, the rows that are
tried, and the bounds. Which implementation is then used is `attention_choice.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from llave_jax.common.text import shortened

# A result may be off by this many times its expected rounding error. Right implementations are off by 0.5 to
# 2 times, whatever they round; a block that is left out or counted twice by 50 times and more (bfloat16).
MARGIN = 8.0
# Tokens over which errors are averaged. A kernel that is wrong is wrong in at least one of its own blocks.
BLOCK = 64
# Lengths of the segments of the rows of a causal case: single tokens, both sides of the sizes of blocks, a
# segment that spans blocks, and tokens at the end that are not used. No length is a multiple of a block's.
PACKED_ROWS = ((1, 2, 127, 128, 129, 3, 300, 17), (513, 64, 1, 200, 255))
PACKED_LENGTH = 1100
# What is compared, as errors name it.
RESULTS = {
    "output": "output",
    "query": "gradient of queries",
    "key": "gradient of keys",
    "value": "gradient of values",
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Attention as one part of a model calls it.

    Attributes:
      heads: H.
      groups: J, key heads.
      head_dim: E.
      causal: whether a token sees none of the tokens after it.
      dtype: of queries, keys and values.
      rows: tokens of the segments of each row.
      length: T; what the segments leave is unused.
    """

    heads: int
    groups: int
    head_dim: int
    causal: bool
    dtype: str
    rows: tuple[tuple[int, ...], ...]
    length: int

    @classmethod
    def packed(cls, heads: int, groups: int, head_dim: int, dtype: str) -> Case:
        """A language model's: causal, in rows that are packed with sequences of many lengths.

        Args:
          heads, groups, head_dim, dtype: of the case.

        Returns:
          The case, of two rows.
        """
        return cls(heads, groups, head_dim, True, dtype, PACKED_ROWS, PACKED_LENGTH)

    @classmethod
    def crops(cls, heads: int, head_dim: int, patches: int, dtype: str) -> Case:
        """A vision tower's: every patch of a crop sees every other.

        Args:
          heads, head_dim, dtype: of the case.
          patches: of a crop.

        Returns:
          The case, of two crops.
        """
        return cls(heads, heads, head_dim, False, dtype, ((patches,),) * 2, patches)

    @property
    def segment_ids(self) -> np.ndarray:
        """int32 [R, T]: 1, 2, ... for the segments of a row, 0 for unused tokens."""
        ids = np.zeros((len(self.rows), self.length), np.int32)
        for row, lengths in zip(ids, self.rows, strict=True):
            packed = np.repeat(np.arange(1, len(lengths) + 1), lengths)
            row[: len(packed)] = packed
        return ids

    @property
    def longest(self) -> int:
        """Tokens of the longest segment."""
        return max(max(lengths) for lengths in self.rows)

    def __str__(self) -> str:
        kind = "packed rows" if self.causal else "crops"
        return f"{kind}, {self.heads}/{self.groups} heads of {self.head_dim}, {self.dtype}"


class Inputs(NamedTuple):
    """Arrays of a case, in its dtype.

    Attributes:
      query, cotangent: [R, T, H, E]; `cotangent` is the gradient of the output, 0 at unused tokens.
      key, value: [R, T, J, E].
    """

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    cotangent: np.ndarray


class Expected(NamedTuple):
    """What is expected of a case, by the keys of RESULTS.

    Attributes:
      values: float64.
      sizes: float64, of the same shapes: the root of the sum of the squares of the products of which a value is
        the sum. Each product is rounded by itself, so that the error of a value is about as large as the
        unit of rounding times this.
    """

    values: dict[str, np.ndarray]
    sizes: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How an implementation did in a case.

    Attributes:
      errors: by the keys of RESULTS, the largest error of any block, in units of what rounding explains; empty
        if it did not run.
      failure: why it did not run, or what of it is wrong; None: it passed.
    """

    errors: Mapping[str, float]
    failure: str | None

    @property
    def passed(self) -> bool:
        """Whether it ran and all results are within MARGIN."""
        return self.failure is None

    @property
    def worst(self) -> float | None:
        """The largest of `errors`; None if it did not run."""
        return max(self.errors.values(), default=None)


def check(attend: Callable[..., jax.Array], case: Case, device: Any | None = None) -> Outcome:
    """Compares an implementation, forward and backward, with the reference in float64.

    Args:
      attend: (query, key, value, segment_ids) -> output, as `ops.attention.attention`, to be compiled.
      case: what it is tried on.
      device: where it runs; None: the default device.

    Returns:
      How it did. That it cannot be compiled, raises or runs out of memory is an outcome, too.
    """
    inputs, expected = _inputs_and_expected(case)

    @jax.jit
    def run(query, key, value, segment_ids, cotangent):
        out, pull = jax.vjp(lambda *x: attend(*x, segment_ids), query, key, value)
        return out, *pull(cotangent)

    try:
        # Products of float32 numbers are rounded to fewer bits on most accelerators unless they are asked not to.
        with jax.default_matmul_precision("highest"):
            arrays = (*inputs[:3], case.segment_ids, inputs.cotangent)
            results = run(*(jax.device_put(x, device) for x in arrays))
        found = dict(zip(RESULTS, (np.asarray(x, np.float64) for x in results), strict=True))
    # A compiler can fail in any way. Whatever it is, the implementation is of no use here.
    except Exception as error:
        text = shortened(str(error)).strip().partition("\n")[0][:200]
        return Outcome({}, f"{type(error).__name__}: {text}")
    return _compare(found, expected, case)


def _compare(found: Mapping[str, np.ndarray], expected: Expected, case: Case) -> Outcome:
    errors, wrong = {}, []
    for name, value in found.items():
        errors[name], where = _largest_error(value, name, expected, case)
        if not errors[name] <= MARGIN:
            how = (
                "not finite" if math.isinf(errors[name]) else f"off by {errors[name]:.3g} roundings"
            )
            wrong.append(f"the {RESULTS[name]} is {how} in {where}")
    return Outcome(errors, "; ".join(wrong) or None)


def _largest_error(
    value: np.ndarray, name: str, expected: Expected, case: Case
) -> tuple[float, str]:
    """The largest error of a block, in units of what rounding explains, and which block that is."""
    if not np.isfinite(value).all():
        row, token, head, _ = np.argwhere(~np.isfinite(value))[0]
        return math.inf, f"row {row}, token {token}, head {head}"
    used = (case.segment_ids > 0)[..., None, None]
    difference = np.where(used, value - expected.values[name], 0)
    error, size = (_block_norms(x) for x in (difference, expected.sizes[name]))
    # Rounding to the case's dtype, and the rounding of sums in float32 (a random walk over their terms).
    unit = rounding_unit(case.dtype) + rounding_unit("float32") * math.sqrt(
        case.longest + case.head_dim
    )
    ratio = error / np.maximum(unit * size, np.finfo(np.float64).tiny)
    row, block, head = np.unravel_index(np.argmax(ratio), ratio.shape)
    start = int(block) * BLOCK
    tokens = f"tokens {start} to {min(start + BLOCK, case.length) - 1}"
    return float(ratio.max()), f"row {row}, {tokens}, head {head}"


def _block_norms(x: np.ndarray) -> np.ndarray:
    """[R, T, H, E] -> [R, blocks, H]: the norm over each block's tokens and a head's numbers."""
    rows, length, heads, head_dim = x.shape
    x = np.pad(x, ((0, 0), (0, -length % BLOCK), (0, 0), (0, 0)))
    return np.sqrt((x.reshape(rows, -1, BLOCK, heads, head_dim) ** 2).sum((2, 4)))


def rounding_unit(dtype: str) -> float:
    """The largest relative error of a number that is rounded to a dtype.

    Args:
      dtype: "float32" or "bfloat16".

    Returns:
      2^-24 or 2^-8.
    """
    return float(ml_dtypes.finfo(jnp.dtype(dtype)).eps) / 2


# The implementations of a case are checked one after another. Large models take a quarter of a GiB here.
@functools.lru_cache(maxsize=1)
def _inputs_and_expected(case: Case) -> tuple[Inputs, Expected]:
    inputs = make_inputs(case)
    return inputs, reference(inputs, case)


def make_inputs(case: Case) -> Inputs:
    """Random arrays for a case; the same ones each time.

    Args:
      case: the case.

    Returns:
      The arrays.
    """
    rng = np.random.default_rng(0)
    dtype = jnp.dtype(case.dtype)

    def normal(heads: int) -> np.ndarray:
        return rng.normal(size=(len(case.rows), case.length, heads, case.head_dim)).astype(dtype)

    query, key, value, cotangent = (
        normal(heads) for heads in (case.heads, case.groups, case.groups, case.heads)
    )
    used = (case.segment_ids > 0)[..., None, None]
    return Inputs(query, key, value, np.where(used, cotangent, np.zeros((), dtype)))


def reference(inputs: Inputs, case: Case) -> Expected:
    """Attention and its gradients in float64, segment by segment, by their formulas.

    Args:
      inputs: arrays of the case.
      case: the case.

    Returns:
      Values and sizes; 0 at unused tokens.

    References: Dao, FlashAttention-2 (arXiv 2307.08691), section 2.2.
    """
    query, key, value, cotangent = (x.astype(np.float64) for x in inputs)
    like = {"output": query, "query": query, "key": key, "value": value}
    values = {name: np.zeros(x.shape) for name, x in like.items()}
    squares = {name: np.zeros(x.shape) for name, x in like.items()}
    scale, repeats = 1 / math.sqrt(case.head_dim), case.heads // case.groups
    for row, lengths in enumerate(case.rows):
        ends = np.cumsum(lengths)
        for start, end in zip(ends - lengths, ends, strict=True):
            for head in range(case.heads):
                at = (row, slice(start, end), head)
                shared = (row, slice(start, end), head // repeats)
                q, do, k, v = query[at], cotangent[at], key[shared], value[shared]
                scores = scale * q @ k.T
                if case.causal:
                    scores = np.where(np.tri(len(q), dtype=bool), scores, -np.inf)
                p = np.exp(scores - scores.max(1, keepdims=True))
                p /= p.sum(1, keepdims=True)
                out = p @ v
                ds = scale * p * (do @ v.T - (do * out).sum(1, keepdims=True))
                values["output"][at] = out
                values["query"][at] = ds @ k
                values["key"][shared] += ds.T @ q
                values["value"][shared] += p.T @ do
                p2, q2, k2, v2, do2 = p**2, q**2, k**2, v**2, do**2
                ds2 = scale**2 * p2 * (do2 @ v2.T + (do2 * out**2).sum(1, keepdims=True))
                squares["output"][at] = p2 @ v2
                squares["query"][at] = ds2 @ k2
                squares["key"][shared] += ds2.T @ q2
                squares["value"][shared] += p2.T @ do2
    return Expected(values, {name: np.sqrt(x) for name, x in squares.items()})
