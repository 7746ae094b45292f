"""Recall and ranks against the recorded ones and scipy."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats

from llave_jax.evaluation import video_retrieval as V

NAMES = dict(zip(V.METRICS, ("R1", "R5", "R10", "MedianR", "MeanR"), strict=True))


@pytest.mark.parametrize("case", ["square_0", "square_1", "square_2", "multi_0", "multi_1", "ties"])
def test_recorded_metrics(golden, case):
    recorded = json.loads((golden / "eval/retrieval.json").read_text())["cases"][case]
    arrays = np.load(golden / "eval/retrieval.npz")
    similarity = arrays[f"{case}/sim"]
    owners = np.arange(len(similarity))
    if case.startswith("multi"):
        counts = np.diff([0, *arrays[f"{case}/cut_off_points"]])
        owners = np.repeat(np.arange(len(counts)), counts)
    computed = dict(
        zip(("text_to_video", "video_to_text"), V.both_directions(similarity, owners), strict=True)
    )
    for direction in ("text_to_video", "video_to_text"):
        if direction not in recorded:
            continue
        for name, key in NAMES.items():
            scale = 100 if name.startswith("R@") else 1
            # Some of the recorded percentages went through float32.
            assert scale * computed[direction][name] == pytest.approx(
                recorded[direction][key], rel=1e-7
            )


def test_recorded_ranks(golden):
    recorded = json.loads((golden / "eval/retrieval.json").read_text())["cases"]
    arrays = np.load(golden / "eval/retrieval.npz")
    for case in ("square_0", "square_1", "square_2", "ties"):
        similarity = arrays[f"{case}/sim"]
        assert (V.tied_ranks(similarity) - 1).tolist() == recorded[case]["text_to_video"]["cols"]


matrices = st.tuples(st.integers(1, 7), st.integers(0, 6), st.integers(0, 10_000))


@hypothesis.given(matrices)
def test_ranks_agree_with_scipy_with_ties(shape):
    videos, extra, seed = shape
    rng = np.random.default_rng(seed)
    owners = rng.permutation([*range(videos), *rng.integers(0, videos, extra)])
    similarity = rng.integers(0, 4, (videos + extra, videos)).astype(np.float32)
    rows = np.arange(len(owners))
    ordinal = scipy.stats.rankdata(-similarity, method="ordinal", axis=1)
    assert np.array_equal(V.positional_ranks(similarity, owners), ordinal[rows, owners])

    square = similarity[:videos]
    # Newer versions of scipy rank in the input's dtype.
    low = np.diagonal(scipy.stats.rankdata(-square, method="min", axis=1)).astype(int)
    high = np.diagonal(scipy.stats.rankdata(-square, method="max", axis=1)).astype(int)
    spans = [range(a, b + 1) for a, b in zip(low, high, strict=True)]
    assert V.tied_ranks(square).tolist() == [rank for span in spans for rank in span]


@hypothesis.given(matrices)
def test_order_of_captions_does_not_matter_without_ties(shape):
    videos, extra, seed = shape
    rng = np.random.default_rng(seed)
    owners = np.array([*range(videos), *rng.integers(0, videos, extra)])
    similarity = rng.permutation((videos + extra) * videos).reshape(-1, videos) / 97
    order = rng.permutation(len(owners))
    assert V.both_directions(similarity, owners) == V.both_directions(
        similarity[order], owners[order]
    )


def test_owners_are_checked():
    with pytest.raises(ValueError, match="each of the 3 videos"):
        V.both_directions(np.zeros((3, 3)), np.array([0, 1, 1]))
