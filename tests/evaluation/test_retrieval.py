"""Retrieval in BEIR's layout: files, rankings, and metrics against independent computations."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import sklearn.metrics

from llave_jax.evaluation import retrieval
from llave_jax.inputs.content import item_key
from tests.evaluation.fake_encoder import HashEncoder, hash_vector

pytest.importorskip("ir_measures")


def write_task(root, queries, corpus, qrels, header=True):
    root.mkdir(parents=True, exist_ok=True)
    for name, rows in (("queries", queries), ("corpus", corpus)):
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = ["query-id\tcorpus-id\tscore"] if header else []
    lines += ["\t".join(map(str, row)) for row in qrels]
    (root / "qrels.tsv").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture
def task(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture a")
    (tmp_path / "v.mp4").write_bytes(b"video v")
    queries = [
        {"_id": "q1", "text": "<image>\nfind it", "image": "a.png"},
        {"_id": "unjudged", "text": "nobody asked"},
        {"_id": "q2", "text": "a clip"},
    ]
    corpus = [
        {"_id": "d1", "title": "A title", "text": "and its text"},
        {"_id": "d2", "video": "v.mp4"},
        {"_id": "d3", "images": ["a.png", "a.png"], "text": "two"},
        {"_id": "d4", "text": "two"},
    ]
    qrels = [("q1", "d3", 2), ("q1", "d1", 1), ("q2", "d2", 1), ("q2", "d4", 0)]
    return write_task(tmp_path, queries, corpus, qrels)


def test_items_and_ranking(task, tmp_path):
    encode = HashEncoder()
    read = retrieval.read_task(task)
    result = retrieval.evaluate_retrieval(encode, read, tmp_path / "out", cutoffs=(1, 3))
    assert len(encode.keys) == 6
    assert read.query_ids == ("q1", "q2")
    assert read.documents[0].text == "A title and its text"
    for query, item in zip(read.query_ids, read.queries, strict=True):
        vector = hash_vector(item_key(item))
        scores = {
            i: float(vector @ hash_vector(item_key(d)))
            for i, d in zip(read.document_ids, read.documents, strict=True)
        }
        expected = sorted(scores, key=scores.get, reverse=True)[:3]
        assert [document for document, _ in result.ranking[query]] == expected
    assert list(result.metrics) == [
        "precision@1", "recall@1", "recall@3", "nDCG@1", "nDCG@3", "MRR@3"
    ]  # fmt: skip
    assert json.loads((tmp_path / "out/retrieval_score.json").read_text()) == result.metrics
    run = (tmp_path / "out/retrieval_run.tsv").read_text().splitlines()
    assert len(run) == 6
    assert run[0].split()[0] == "q1"


def reference_metrics(relevance, order, cutoffs):
    """From the definitions; nDCG by scikit-learn."""
    relevant = {document for document, value in relevance.items() if value > 0}
    ranks = [rank for rank, document in enumerate(order, 1) if document in relevant]
    gains = np.array([[relevance.get(document, 0) for document in order]])
    values = {"precision@1": float(order[0] in relevant)}
    for k in cutoffs:
        values[f"recall@{k}"] = sum(rank <= k for rank in ranks) / len(relevant)
    for k in cutoffs:
        position = -np.arange(len(order))[None]
        values[f"nDCG@{k}"] = sklearn.metrics.ndcg_score(gains, position, k=k, ignore_ties=True)
    values[f"MRR@{max(cutoffs)}"] = 1 / ranks[0] if ranks else 0.0
    return values


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    st.lists(
        st.lists(st.integers(0, 3), min_size=8, max_size=8).filter(any), min_size=1, max_size=4
    ),
    st.integers(0, 1000),
)
def test_metrics_agree_with_independent_ones(relevances, seed):
    """Document ids fall in another order than ranks: trec_eval's own tie-break must not show."""
    rng = np.random.default_rng(seed)
    names = [f"d{i}" for i in range(8)]
    qrels, order, expected = {}, {}, []
    for number, relevance in enumerate(relevances):
        qrels[f"q{number}"] = dict(zip(names, relevance, strict=True))
        order[f"q{number}"] = [names[i] for i in rng.permutation(8)]
        expected.append(reference_metrics(qrels[f"q{number}"], order[f"q{number}"], (1, 3, 8)))
    computed = retrieval.ranking_metrics(qrels, order, (1, 3, 8))
    for name, value in computed.items():
        assert value == pytest.approx(np.mean([row[name] for row in expected]), abs=1e-6)


def test_equal_documents_rank_in_corpus_order(tmp_path):
    corpus = [{"_id": name, "text": "same"} for name in ("b", "c", "a")]
    root = write_task(tmp_path, [{"_id": "q", "text": "x"}], corpus, [("q", "c", 1)])
    result = retrieval.evaluate_retrieval(HashEncoder(), retrieval.read_task(root))
    assert [document for document, _ in result.ranking["q"]] == ["b", "c", "a"]
    assert result.metrics["MRR@100"] == 0.5


def test_qrels_in_beirs_folder_without_header(task):
    text = (task / "qrels.tsv").read_text().split("\n", 1)[1]
    (task / "qrels").mkdir()
    (task / "qrels/test.tsv").write_text(text)
    with_header = retrieval.read_task(task).qrels
    (task / "qrels.tsv").unlink()
    assert retrieval.read_task(task).qrels == with_header


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("queries.jsonl", "{broken", "queries.jsonl: line 4: not a JSON object"),
        ("queries.jsonl", '{"text": "x"}', 'line 4: expected an object with a string "_id"'),
        ("corpus.jsonl", '{"_id": "d1", "text": "x"}', "line 5: _id 'd1' was given before"),
        ("corpus.jsonl", '{"_id": "d9"}', "line 5: is empty"),
        ("corpus.jsonl", '{"_id": "d9", "image": "no.png"}', "line 5: 'no.png' is not a file"),
        ("qrels.tsv", "q9\td1\t1", "line 6: query 'q9' is not in queries.jsonl"),
        ("qrels.tsv", "q1\td9\t1", "line 6: document 'd9' is not in corpus.jsonl"),
        ("qrels.tsv", "q1\td1\thigh", "line 6: score 'high' is not an integer"),
        ("qrels.tsv", "q1 d1 1", "line 6: expected query-id"),
    ],
)
def test_malformed_files_are_named(task, file, line, message):
    with (task / file).open("a") as stream:
        stream.write(line + "\n")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        retrieval.read_task(task)
