"""Metrics of rankings against ir-measures and scikit-learn, and against their definitions."""

import hypothesis
import hypothesis.strategies as st
import ir_measures
import numpy as np
import pytest
import sklearn.metrics
from ir_measures import RR, P, R, Success, nDCG

from llave_jax.evaluation import metrics, scoring
from llave_jax.evaluation.cache import Embedded
from llave_jax.evaluation.scoring import rank
from llave_jax.evaluation.task import Task, TaskInfo
from llave_jax.inputs.item import Item

NAMES = tuple(f"{kind}@{k}" for kind in metrics.AT_K for k in (1, 3, 8))


def ranked(similarity, relevant, gains=None, names=NAMES, **options):
    """Metrics and answers of queries with these cosines."""
    queries, candidates = similarity.shape
    task = Task(
        info=TaskInfo("t", "m", metric=names[0]),
        queries=[Item("q")] * queries,
        candidates=[Item("c")] * candidates,
        relevant=[np.array(r, np.int32) for r in relevant],
        gains=gains,
        metrics=names,
        **options,
    )
    # Products with unit vectors are exact.
    embedded = Embedded(np.eye(candidates, dtype=similarity.dtype), np.arange(candidates))
    return rank(task, Embedded(similarity, np.arange(queries)), embedded)


grades = st.lists(
    st.lists(st.integers(0, 3), min_size=12, max_size=12).filter(any), min_size=1, max_size=4
)


@hypothesis.settings(max_examples=30)
@hypothesis.given(grades, st.integers(0, 1000))
def test_independent_implementations_agree(relevances, seed):
    relevances = np.array(relevances)
    rng = np.random.default_rng(seed)
    similarity = rng.permuted(np.tile(np.linspace(-1, 1, 12), (len(relevances), 1)), axis=1)
    relevant = [np.flatnonzero(row) for row in relevances]
    gains = [row[row > 0] for row in relevances]
    found, answers = ranked(similarity, relevant, gains)
    assert (answers.ranking[:, 0] == similarity.argmax(1)).all()
    qrels = {f"q{q}": {f"d{d}": int(g) for d, g in enumerate(r)} for q, r in enumerate(relevances)}
    run = {f"q{q}": {f"d{d}": s for d, s in enumerate(r)} for q, r in enumerate(similarity)}
    for k in (1, 3, 8):
        theirs = ir_measures.calc_aggregate(
            [P @ k, R @ k, Success @ k, nDCG @ k, RR @ k], qrels, run
        )
        ours = [found[f"{kind}@{k}"] for kind in ("precision", "recall", "hit", "nDCG", "MRR")]
        expected = [theirs[measure] for measure in (P @ k, R @ k, Success @ k, nDCG @ k, RR @ k)]
        assert ours == pytest.approx(expected, abs=1e-6)
        assert found[f"ndcg_linear@{k}"] == found[f"nDCG@{k}"]
        assert found[f"mrr@{k}"] == found[f"MRR@{k}"]
        exponential = sklearn.metrics.ndcg_score(2.0**relevances - 1, similarity, k=k)
        assert found[f"ndcg_exponential@{k}"] == pytest.approx(exponential)


@hypothesis.settings(max_examples=30)
@hypothesis.given(grades, st.integers(0, 1000))
def test_average_precision_and_f1_are_their_definitions(relevances, seed):
    """VLM2Vec's: average precision is over at most k right answers."""
    rng = np.random.default_rng(seed)
    similarity = rng.permuted(np.tile(np.linspace(-1, 1, 12), (len(relevances), 1)), axis=1)
    relevant = [np.flatnonzero(row) for row in relevances]
    found, _ = ranked(similarity, relevant)
    for k in (1, 3, 8):
        average, f1 = [], []
        for row, right in zip(similarity, relevant, strict=True):
            hits = np.isin(np.argsort(-row)[:k], right)
            precisions = [hits[: i + 1].mean() for i in np.flatnonzero(hits)]
            average.append(sum(precisions) / min(len(right), k))
            precision, recall = hits.sum() / k, hits.sum() / len(right)
            f1.append(2 * precision * recall / (precision + recall) if hits.any() else 0)
        assert found[f"map@{k}"] == pytest.approx(np.mean(average))
        assert found[f"f1@{k}"] == pytest.approx(np.mean(f1))


@pytest.mark.parametrize("copy_cost", [0, 1 << 30], ids=["each pool", "all at once"])
@hypothesis.settings(max_examples=30)
@hypothesis.given(st.integers(1, 60), st.integers(1, 4), st.integers(0, 10**6), st.booleans())
def test_the_first_of_equal_scores_wins_at_any_size(copy_cost, candidates, values, seed, local):
    """A pool that repeats candidates ranks each of them once, at its first place."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "_COPY_COST", copy_cost)
        patch.setattr(scoring, "_BLOCK_SCORES", 2 * candidates)
        check_first_of_equal_scores(candidates, values, seed, local)


def check_first_of_equal_scores(candidates, values, seed, local):
    rng = np.random.default_rng(seed)
    similarity = rng.integers(0, values, (3, candidates)) / 8
    pools = [rng.integers(0, candidates, rng.integers(1, 90)) for _ in range(3)] if local else None
    relevant = [pool[:1] for pool in pools] if pools else [[0]] * 3
    options = {} if pools is None else {"pools": pools}
    _, answers = ranked(similarity, relevant, names=("hit@1",), **options)
    for query, row in enumerate(similarity):
        order = list(dict.fromkeys(pools[query].tolist())) if pools else range(candidates)
        expected = sorted(order, key=lambda answer, row=row: -row[answer])
        ranking = answers.ranking[query]
        assert ranking[ranking >= 0].tolist() == expected[: answers.ranking.shape[1]]
        positive = relevant[query][0]
        assert answers.better[query] == sum(row[a] > row[positive] for a in order)
        if pools is not None:
            assert answers.all_scores[query].tolist() == row[pools[query]].tolist()


def test_a_query_without_right_answers_counts_as_a_miss():
    names = (*NAMES, "R@5", "mean rank")
    found, answers = ranked(np.array([[0.5, 0.2], [0.1, 0.9]]), [[1], []], names=names)
    assert found["recall@3"] == found["hit@3"] == 0.5
    assert (found["R@5"], found["mean rank"]) == (1.0, 2.5)
    assert answers.positive.tolist() == [1, -1]


@pytest.mark.parametrize("name", ["hit", "hit@", "hit@0", "hits@1", "mean", "nDCG@x", "R"])
def test_what_is_no_metric_is_refused(name):
    with pytest.raises(ValueError, match="there is no metric"):
        metrics.parse(name)
