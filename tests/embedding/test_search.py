"""Blocked search against a full sort."""

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest

from llave_jax.embedding.search import search


def full_sort(queries, corpus, k):
    similarity = queries.astype(np.float32) @ corpus.astype(np.float32).T
    order = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(similarity, order, 1), order


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    n=st.integers(1, 5),
    m=st.integers(1, 60),
    k=st.integers(1, 12),
    block=st.integers(1, 70),
    devices=st.sampled_from([1, 3, 8]),
    seed=st.integers(0, 1000),
)
def test_equals_a_full_sort_with_ties(n, m, k, block, devices, seed):
    rng = np.random.default_rng(seed)
    # Small integers: products are exact, and many scores tie.
    queries, corpus = rng.integers(-2, 3, (n, 3)), rng.integers(-2, 3, (m, 3))
    scores, indices = search(queries, corpus, k, block_rows=block, devices=jax.devices()[:devices])
    expected_scores, expected = full_sort(queries, corpus, k)
    assert np.array_equal(indices, expected)
    assert np.array_equal(scores, expected_scores)
    assert indices.shape == (n, min(k, m))


@hypothesis.settings(max_examples=15)
@hypothesis.given(
    n=st.integers(1, 5),
    m=st.integers(1, 60),
    k=st.integers(1, 12),
    block=st.integers(1, 70),
    devices=st.sampled_from([1, 3]),
    share=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
def test_excluded_pairs_are_no_results(n, m, k, block, devices, share, seed):
    rng = np.random.default_rng(seed)
    queries, corpus = rng.integers(-2, 3, (n, 3)), rng.integers(-2, 3, (m, 3))
    excluded = np.nonzero(rng.random((n, m)) < share)
    similarity = (queries @ corpus.T).astype(np.float32)
    similarity[excluded] = -np.inf
    expected = np.argsort(-similarity, axis=1, kind="stable")[:, :k]
    expected_scores = np.take_along_axis(similarity, expected, 1)
    expected[np.isneginf(expected_scores)] = -1
    shuffled = rng.permutation(len(excluded[0]))
    scores, indices = search(
        queries,
        corpus,
        k,
        block_rows=block,
        devices=jax.devices()[:devices],
        excluded=(excluded[0][shuffled], excluded[1][shuffled]),
    )
    assert np.array_equal(indices, expected)
    assert np.array_equal(scores, expected_scores)


def test_memory_map_of_half_precision(tmp_path):
    rng = np.random.default_rng(0)
    corpus = np.memmap(tmp_path / "c", np.float16, "w+", shape=(1000, 8))
    corpus[:] = rng.standard_normal((1000, 8))
    queries = rng.standard_normal((4, 8)).astype(np.float32)
    scores, indices = search(queries, corpus, 10, block_rows=32)
    expected_scores, expected = full_sort(queries, corpus, 10)
    assert np.array_equal(indices, expected)
    # Sums of 8 products of numbers below 4.
    np.testing.assert_allclose(scores, expected_scores, atol=8 * 16 * 2**-23)


def test_shapes_are_checked():
    with pytest.raises(ValueError, match=r"queries \(2, 3\) and corpus \(5, 4\)"):
        search(np.zeros((2, 3)), np.zeros((5, 4)), 1)
    with pytest.raises(ValueError, match="for 0 of 5 rows"):
        search(np.zeros((2, 3)), np.zeros((5, 3)), 0)
