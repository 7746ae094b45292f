"""The similarity analysis against its definition, written out once more, and its files."""

import json
import math

import hypothesis.strategies as st
import numpy as np
import PIL.Image
import pytest
from hypothesis import given

from llave_jax.evaluation import published
from llave_jax.evaluation.drawing import write_histograms
from llave_jax.evaluation.similarity import (
    EDGES,
    NEGATIVES,
    SimilarityStats,
    similarity_overlap,
)
from llave_jax.evaluation.similarity_comparison import comparison_rows, write_numbers

KINDS = ("positive", "hard", "easy")


def cosines(**options):
    return st.floats(-1, 1, width=32, **options)


@st.composite
def queries(draw):
    """Scores of some queries, uneven; the positive's place; ids that repeat, score for score."""
    rows, positives, ids = [], [], []
    for _ in range(draw(st.integers(1, 6))):
        different = draw(st.lists(cosines(), min_size=2, max_size=14))
        row_ids = draw(st.lists(st.sampled_from(range(len(different))), max_size=6))
        row_ids = draw(st.permutations([*range(len(different)), *row_ids]))
        ids.append(np.array(row_ids))
        rows.append(np.array([different[i] for i in row_ids], np.float32))
        positives.append(draw(st.integers(0, len(row_ids) - 1)))
    return rows, positives, ids


def by_definition(rows, positives, ids) -> dict[str, list[float]]:
    found = {kind: [] for kind in KINDS}
    for row, positive, row_ids in zip(rows, positives, ids, strict=True):
        negatives = {i: s for i, s in zip(row_ids, row, strict=True) if i != row_ids[positive]}
        ranked = sorted(negatives.values())
        found["positive"].append(row[positive])
        found["hard"] += sorted(ranked, reverse=True)[:NEGATIVES]
        found["easy"] += ranked[:NEGATIVES]
    return found


@given(queries())
def test_negatives_are_the_paper_s(case):
    rows, positives, ids = case
    stats = similarity_overlap(rows, positives, candidates=ids)
    for kind, expected in by_definition(rows, positives, ids).items():
        np.testing.assert_array_equal(np.sort(getattr(stats, kind)), np.sort(expected))
        assert stats.mean(kind) == pytest.approx(np.mean(expected, dtype=np.float64), abs=1e-12)


@given(queries())
def test_without_ids_all_candidates_differ(case):
    rows, positives, _ = case
    ids = [np.arange(len(row)) for row in rows]
    plain = similarity_overlap(rows, positives)
    for kind, expected in by_definition(rows, positives, ids).items():
        np.testing.assert_array_equal(np.sort(getattr(plain, kind)), np.sort(expected))


def test_a_matrix_is_a_list_of_its_rows():
    scores = np.random.default_rng(0).uniform(-1, 1, (20, 30)).astype(np.float32)
    whole, rows = (similarity_overlap(s, np.arange(20)) for s in (scores, list(scores)))
    for kind in KINDS:
        np.testing.assert_array_equal(getattr(whole, kind), getattr(rows, kind))
    np.testing.assert_array_equal(whole.positive, np.diag(scores))
    assert len(whole.hard) == len(whole.easy) == 20 * NEGATIVES


def test_a_query_without_negatives_gives_its_positive_only():
    rows = [np.array([0.5, 0.1]), np.array([0.25, 0.25])]
    stats = similarity_overlap(rows, [0, 1], candidates=[np.array([3, 4]), np.array([7, 7])])
    np.testing.assert_array_equal(stats.positive, np.float32([0.5, 0.25]))
    np.testing.assert_array_equal(stats.hard, np.float32([0.1]))


@given(*[st.lists(cosines(), min_size=1, max_size=50) for _ in KINDS])
def test_overlap_is_an_overlap(positive, hard, easy):
    stats = SimilarityStats(*(np.array(values, np.float32) for values in (positive, hard, easy)))
    for first in KINDS:
        assert stats.histogram(first).sum() == pytest.approx(1)
        assert stats.overlap(first, first) == pytest.approx(1)
        for second in KINDS:
            assert 0 <= stats.overlap(first, second) <= 1 + 1e-12
            assert stats.overlap(first, second) == stats.overlap(second, first)
    if min(positive) > max(hard) + (EDGES[1] - EDGES[0]):
        assert stats.overlap("positive", "hard") == 0


def test_overlap_of_two_normals_is_the_textbook_s():
    # Equal spread s, means d apart: the overlap coefficient is 2 * Phi(-d / 2s).
    rng = np.random.default_rng(0)
    spread, distance, count = 0.15, 0.2, 200_000
    positive, hard = (rng.normal(m, spread, count).astype(np.float32) for m in (distance, 0.0))
    stats = SimilarityStats(positive, hard, hard)
    expected = math.erfc(distance / (2 * spread) / math.sqrt(2))
    # Sampling noise is about 0.002; within a bin of a quarter spread the curves hardly bend.
    assert stats.overlap("positive", "hard") == pytest.approx(expected, abs=0.01)


def test_cosines_a_rounding_error_beyond_one_are_counted():
    row = np.float32([1.0000002, -1.0000002, 0.0])
    stats = similarity_overlap([row], [0])
    assert stats.histogram("positive")[-1] == 1
    assert stats.histogram("easy")[0] == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("scores", "positives", "candidates", "message"),
    [
        (
            [np.zeros(3), np.array([0.0, np.nan])],
            [0, 0],
            None,
            "query 1: scores must be cosines.*nan",
        ),
        ([np.array([0.0, 23.5])], [0], None, r"query 0: scores must be cosines, found 23\.5"),
        ([np.zeros(3)], [3], None, "query 0: expected scores .* index 3"),
        ([np.zeros(3)], [-1], None, "query 0: expected scores .* index -1"),
        ([np.zeros((2, 3))], [0], None, "query 0: expected scores"),
        ([np.zeros(3)], [0, 0], None, "scores are of 1 queries, positives of 2"),
        ([np.zeros(3)], [0], [], "candidates of 0"),
        ([np.zeros(3)], [0], [np.arange(2)], "query 0: .* candidate ids"),
        ([np.zeros(1)], [0], None, "no query has a negative"),
        ([], [], None, "no query has a negative"),
    ],
)
def test_errors_name_the_query(scores, positives, candidates, message):
    with pytest.raises(ValueError, match=message):
        similarity_overlap(scores, positives, candidates=candidates)


def stats_like(positive: float, hard: float, easy: float, seed: int = 0) -> SimilarityStats:
    rng = np.random.default_rng(seed)
    means = (positive, hard, easy)
    return SimilarityStats(
        *(rng.normal(m, 0.05, 300).clip(-1, 1).astype(np.float32) for m in means)
    )


@pytest.mark.parametrize("panels", [1, 4, 5])
def test_picture(tmp_path, panels):
    stats = {f"model {i}": stats_like(0.7, 0.5, 0.1 * i) for i in range(panels)}
    write_histograms(stats, tmp_path / "new" / "a.png")
    write_histograms(stats, tmp_path / "new" / "b.png")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["a.png", "b.png"]
    first, second = ((tmp_path / "new" / name).read_bytes() for name in ("a.png", "b.png"))
    assert first == second
    image = PIL.Image.open(tmp_path / "new" / "a.png")
    assert image.format == "PNG"
    columns = {1: 1, 2: 2, 4: 2, 5: 3}[panels]
    # 4.6 inches a panel at 150 dots an inch.
    assert image.width == columns * 690
    # Something of each colour is drawn.
    pixels = np.asarray(image.convert("RGB"))
    for colour in [(0x1B, 0x6C, 0xA8), (0xD9, 0x5F, 0x02), (0x8A, 0x8F, 0x98)]:
        assert np.any(np.all(pixels == colour, axis=-1))


def test_picture_of_nothing(tmp_path):
    with pytest.raises(ValueError, match="at least one label"):
        write_histograms({}, tmp_path / "a.png")


def test_numbers(tmp_path):
    stats = {"InfoNCE": stats_like(0.7, 0.6, 0.4), "LLaVE": stats_like(0.65, 0.5, 0.0)}
    write_numbers(stats, tmp_path / "similarity.json")
    numbers = json.loads((tmp_path / "similarity.json").read_text())
    assert numbers["edges"] == EDGES.tolist()
    assert list(numbers["stats"]) == list(stats)
    for label, expected in stats.items():
        found = numbers["stats"][label]
        assert found["queries"] == 300
        for kind in KINDS:
            assert found[kind]["mean"] == pytest.approx(expected.mean(kind))
            assert found[kind]["std"] == pytest.approx(0.05, abs=0.01)
            assert len(found[kind]["histogram"]) == len(EDGES) - 1
        assert found["overlap"]["positive_hard"] == expected.overlap("positive", "hard")
    # What the paper reports: weighting by hardness sets positives and hard negatives apart.
    overlaps = [numbers["stats"][label]["overlap"]["positive_hard"] for label in stats]
    assert overlaps[1] < overlaps[0]


def test_published_means_stand_below_a_run_s():
    means = {"positive": 0.5, "hard": 0.25, "easy": -0.125}
    stats = SimilarityStats(**{kind: np.full(4, mean, np.float32) for kind, mean in means.items()})
    rows = comparison_rows({"SUN397": {"mine": stats}, "Own": {"mine": stats}})
    assert rows[1:] == [
        ["SUN397", "mine", "0.50", "0.25", "-0.12", "0.00"],
        ["SUN397", "InfoNCE published", "0.71", "0.65", "0.36", "-"],
        ["SUN397", "LLaVE published", "0.66", "0.51", "0.03", "-"],
        ["Own", "mine", "0.50", "0.25", "-0.12", "0.00"],
    ]
    for by_loss in published.SIMILARITY.values():
        # What the table is about: harder negatives stand off further from the positive.
        assert (
            by_loss["LLaVE"][0] - by_loss["LLaVE"][1]
            > by_loss["InfoNCE"][0] - by_loss["InfoNCE"][1]
        )
