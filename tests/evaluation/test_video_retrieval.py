"""Recall and ranks of text-video retrieval against the recorded ones and scipy."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import scipy.stats

from llave_jax.evaluation import metrics
from llave_jax.evaluation.benchmarks.text_video import METRICS
from tests.evaluation.test_metrics import ranked

NAMES = dict(zip(METRICS, ("R1", "R5", "R10", "MedianR", "MeanR"), strict=True))


def both_directions(similarity, owners):
    """As the tasks of `TextVideo` are made."""
    one_each = len(owners) == similarity.shape[1]
    videos = np.arange(similarity.shape[1])
    forth, _ = ranked(similarity, owners[:, None], names=METRICS, all_tied=one_each)
    back, _ = ranked(similarity.T, videos[:, None], names=METRICS, groups=owners, all_tied=True)
    return forth, back


@pytest.mark.parametrize("case", ["square_0", "square_1", "square_2", "multi_0", "multi_1", "ties"])
def test_recorded_metrics(golden, case):
    recorded = json.loads((golden / "eval/retrieval.json").read_text())["cases"][case]
    arrays = np.load(golden / "eval/retrieval.npz")
    similarity = arrays[f"{case}/sim"]
    owners = np.arange(len(similarity))
    if case.startswith("multi"):
        counts = np.diff([0, *arrays[f"{case}/cut_off_points"]])
        owners = np.repeat(np.arange(len(counts)), counts)
    forth, back = both_directions(similarity, owners)
    for direction, computed in (("text_to_video", forth), ("video_to_text", back)):
        if direction not in recorded:
            continue
        for name, key in NAMES.items():
            scale = 100 if name.startswith("R@") else 1
            # Some of the recorded percentages went through float32.
            assert scale * computed[name] == pytest.approx(recorded[direction][key], rel=1e-7)


matrices = st.tuples(st.integers(1, 7), st.integers(0, 6), st.integers(0, 10_000))


@hypothesis.given(matrices)
def test_ranks_agree_with_scipy_with_ties(shape):
    videos, extra, seed = shape
    rng = np.random.default_rng(seed)
    owners = rng.permutation([*range(videos), *rng.integers(0, videos, extra)])
    similarity = rng.integers(0, 4, (videos + extra, videos)).astype(np.float32)
    rows = np.arange(len(owners))
    ordinal = scipy.stats.rankdata(-similarity, method="ordinal", axis=1)[rows, owners]
    found, _ = ranked(similarity, owners[:, None], names=METRICS)
    assert found["mean rank"] == pytest.approx(ordinal.mean())
    assert found["R@5"] == pytest.approx((ordinal <= 5).mean())
    # The lower of the middle two.
    assert found["median rank"] == np.sort(ordinal)[(len(ordinal) - 1) // 2]

    found, _ = ranked(similarity, owners[:, None], names=METRICS, all_tied=True)
    # Newer versions of scipy rank in the input's dtype.
    low, high = (
        scipy.stats.rankdata(-similarity, method=method, axis=1)[rows, owners].astype(int)
        for method in ("min", "max")
    )
    spans = [rank for a, b in zip(low, high, strict=True) for rank in range(a, b + 1)]
    assert found["mean rank"] == pytest.approx(np.mean(spans))
    assert found["median rank"] == np.median(spans)
    assert found["R@1"] == pytest.approx(np.mean(np.array(spans) <= 1))


@hypothesis.given(matrices)
def test_captions_of_a_video_count_as_the_best_of_them(shape):
    videos, extra, seed = shape
    rng = np.random.default_rng(seed)
    owners = rng.permutation([*range(videos), *rng.integers(0, videos, extra)])
    similarity = rng.integers(0, 4, (videos + extra, videos)).astype(np.float32)
    best = np.stack([similarity[owners == video].max(0) for video in range(videos)])
    own = np.arange(videos)[:, None]
    expected, _ = ranked(best.T, own, names=METRICS, all_tied=True)
    assert both_directions(similarity, owners)[1] == expected


@hypothesis.given(matrices)
def test_order_of_captions_does_not_matter_without_ties(shape):
    videos, extra, seed = shape
    rng = np.random.default_rng(seed)
    owners = np.array([*range(videos), *rng.integers(0, videos, extra)])
    similarity = rng.permutation((videos + extra) * videos).reshape(-1, videos) / 97
    order = rng.permutation(len(owners))
    found, again = (
        both_directions(similarity, owners),
        both_directions(similarity[order], owners[order]),
    )
    for direction, same in zip(found, again, strict=True):
        assert direction == pytest.approx(same)


def test_names():
    assert [metrics.parse(name)[0] for name in METRICS] == ["R"] * 3 + ["median rank", "mean rank"]
