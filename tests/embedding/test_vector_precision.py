"""Smaller embeddings: what is kept, and what sentence-transformers makes of the same vectors."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from llave_jax.embedding import precision

VECTORS = hnp.arrays(np.int8, (40, 19)).map(precision.normalised)


@pytest.mark.slow  # imports PyTorch
@settings(max_examples=25)
@given(vectors=VECTORS)
def test_what_sentence_transformers_makes(vectors):
    quantization = pytest.importorskip("sentence_transformers.util.quantization")
    ranges = precision.calibration_ranges(vectors[:20])
    expected = quantization.quantize_embeddings(vectors, "int8", ranges=ranges)
    np.testing.assert_array_equal(precision.quantise(vectors, "int8", ranges), expected)
    expected = quantization.quantize_embeddings(vectors, "binary")
    actual = precision.quantise(vectors, "binary")
    assert actual.dtype == expected.dtype
    np.testing.assert_array_equal(actual, expected)


@settings(max_examples=25)
@given(vectors=VECTORS)
def test_int8_keeps_cosines_and_needs_no_other_vectors(vectors):
    small = precision.quantise(vectors, "int8")
    assert small.dtype == np.int8
    np.testing.assert_array_equal(small[3], precision.quantise(vectors[3], "int8"))
    exact = vectors @ vectors.T
    kept = precision.normalised(small) @ precision.normalised(small).T
    # Each number is off by half a step of max / 127 at most.
    assert np.abs(exact - kept).max() < np.sqrt(19) / 127


@given(vectors=VECTORS, dim=st.integers(1, 19))
def test_truncated_vectors_have_length_one(vectors, dim):
    short = precision.truncate(vectors, dim)
    assert short.shape == (40, dim)
    length = np.linalg.norm(short, axis=1)
    filled = vectors[:, :dim].any(axis=1)
    np.testing.assert_allclose(length[filled], 1, atol=1e-5)
    scale = np.linalg.norm(vectors[:, :dim], axis=1, keepdims=True)
    np.testing.assert_allclose(short * scale, vectors[:, :dim], atol=1e-6)


@pytest.mark.parametrize("dim", [0, -1, 20])
def test_no_such_dimension(dim):
    with pytest.raises(ValueError, match=f"truncate_dim is {dim}; expected 1 to 19"):
        precision.truncate(np.ones((2, 19), np.float32), dim)


def test_no_such_precision():
    with pytest.raises(ValueError, match="precision is 'int4'; expected one of float32, "):
        precision.quantise(np.ones((2, 19), np.float32), "int4")
    with pytest.raises(ValueError, match=r"ranges are \(2, 3\); expected \(2, 19\)"):
        precision.quantise(np.ones((2, 19), np.float32), "int8", np.ones((2, 3)))
    with pytest.raises(ValueError, match="two vectors at least; found 1"):
        precision.calibration_ranges(np.ones((1, 19), np.float32))
