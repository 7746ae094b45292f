"""What is never a negative, and the filters by rank and score, against plain Python."""

import collections

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llave_jax.mining.candidates import (
    Groups,
    Rules,
    below_positive,
    choose,
    filter_candidates,
    never_negatives,
    number_contents,
    same_content,
)

small = st.lists(st.integers(0, 6), min_size=1, max_size=30)


@hypothesis.given(small)
def test_contents_are_numbered_as_they_first_occur(keys):
    numbers, first = number_contents(np.array(keys, np.uint64))
    known = list(dict.fromkeys(keys))
    assert numbers.tolist() == [known.index(key) for key in keys]
    assert first.tolist() == [keys.index(key) for key in known]


@hypothesis.given(small, st.integers(0, 1000))
def test_groups(groups, seed):
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 100, len(groups))
    expected = collections.defaultdict(list)
    for group, value in zip(groups, values.tolist(), strict=True):
        expected[group].append(value)
    made = Groups(np.array(groups), values, 8)
    asked = rng.integers(0, 8, 5)
    places, found = made.of(asked)
    assert list(zip(places.tolist(), found.tolist(), strict=True)) == [
        (place, value) for place, group in enumerate(asked.tolist()) for value in expected[group]
    ]
    filled = np.array([group for group in asked if expected[int(group)]], np.int64)
    turns = rng.integers(0, 100, len(filled))
    assert made.spread(filled, turns).tolist() == [
        expected[g][t % len(expected[g])]
        for g, t in zip(filled.tolist(), turns.tolist(), strict=True)
    ]


@hypothesis.given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20)
)
def test_never_negatives_of_a_query(rows):
    """Keys 0 to 5 are contents; queries and targets may show the same."""
    queries, first_query = number_contents(np.array([q for q, _ in rows], np.uint64))
    targets, first_target = number_contents(np.array([t for _, t in rows], np.uint64))
    query_keys = np.array([rows[i][0] for i in first_query], np.uint64)
    target_keys = np.array([rows[i][1] for i in first_target], np.uint64)
    own = same_content(query_keys, target_keys)
    never = never_negatives(queries, targets, own)
    for number, key in enumerate(query_keys.tolist()):
        _, found = never.of(np.array([number]))
        expected = {t for q, t in rows if q == key} | ({key} & set(target_keys.tolist()))
        assert sorted(target_keys[found].tolist()) == sorted(expected)
        assert own[number] == (
            target_keys.tolist().index(key) if key in target_keys.tolist() else -1
        )


@hypothesis.given(
    st.lists(st.floats(-1, 1), min_size=0, max_size=12),
    st.floats(-1, 1),
    st.sampled_from(
        [(None, None), (0.95, None), (0.5, None), (1.0, None), (None, 0.0), (0.9, 0.2)]
    ),
    st.integers(0, 3),
    st.integers(1, 9),
    st.integers(0, 3),
)
def test_filters(scores, positive, bounds, first, length, missing):
    relative, margin = bounds
    rules = Rules(first_rank=first, end_rank=first + length, relative=relative, margin=margin)
    ranked = sorted(scores, reverse=True) + [-np.inf] * missing
    filtered = filter_candidates(np.array([ranked]), np.array([positive]), rules)
    window = [r for r in range(len(scores)) if first <= r < first + length]
    passed = [
        r
        for r in window
        if (relative is None or ranked[r] < positive - (1 - relative) * abs(positive))
        and (margin is None or ranked[r] < positive - margin)
    ]
    assert np.flatnonzero(filtered.passed[0]).tolist() == passed
    assert filtered.outside_ranks.tolist() == [min(first, len(scores))]
    assert filtered.above_margin.tolist() == [len(window) - len(passed)]


def test_the_share_of_a_negative_positive_is_below_it():
    rules = Rules(relative=0.9)
    # 0.9 * -0.5 is -0.45, which is above the positive.
    assert below_positive(np.array([[-0.5, -0.54, -0.56]]), np.array([-0.5]), rules).tolist() == [
        [False, False, True]
    ]


def test_sampling_depends_on_the_row_alone_and_is_even():
    rules = Rules(negatives=2, sample=True, seed=3)
    names = [f"rows:{i}" for i in range(2000)]
    passed = np.ones((len(names), 5), bool)
    chosen = choose(passed, rules, names)
    assert all(len(set(ranks.tolist())) == 2 and ranks[0] < ranks[1] for ranks in chosen)
    again = choose(passed[::-1], rules, names[::-1])[::-1]
    assert all(np.array_equal(a, b) for a, b in zip(chosen, again, strict=True))
    other = choose(passed, Rules(negatives=2, sample=True, seed=4), names)
    assert any(not np.array_equal(a, b) for a, b in zip(chosen, other, strict=True))
    # Each of 5 ranks is taken 800 times on average, with a deviation of sqrt(2000 * 0.4 * 0.6) = 22.
    counts = np.bincount(np.concatenate(chosen), minlength=5)
    assert np.abs(counts - 800).max() < 5 * 22


def test_fewer_candidates_than_asked_are_all_taken():
    passed = np.array([[False, True, False, True], [False] * 4])
    for sample in (False, True):
        chosen = choose(passed, Rules(negatives=3, sample=sample), ["a", "b"])
        assert [ranks.tolist() for ranks in chosen] == [[1, 3], []]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"first_rank": 5, "end_rank": 5}, "ranks are 5:5"),
        ({"negatives": 0}, "negatives is 0"),
        ({"neighbours": 0}, "neighbours is 0"),
        ({"relative": 1.1}, "relative is 1.1"),
        ({"margin": -0.1}, "margin is -0.1"),
    ],
)
def test_rules_that_cannot_be(options, message):
    with pytest.raises(ValueError, match=message):
        Rules(**options)
