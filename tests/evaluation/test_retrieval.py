"""Retrieval in BEIR's layout: files, rankings, and metrics against independent computations."""

import json

import pytest

from llave_jax.evaluation import run
from llave_jax.evaluation.benchmarks import corpus
from llave_jax.evaluation.benchmarks.base import Options
from llave_jax.evaluation.benchmarks.corpus import Corpus
from llave_jax.inputs.content import item_key
from tests.evaluation.fake_encoder import HashEncoder, hash_vector


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
    read = corpus.read_task(task)
    results = run.evaluate(encode, Corpus(task), None, tmp_path / "out")
    result = results["retrieval"]
    assert len(encode.keys) == 6
    assert read.query_names == ["q1", "q2"]
    assert read.candidates[0].text == "A title and its text"
    for number, item in enumerate(read.queries):
        vector = hash_vector(item_key(item))
        scores = {
            i: float(vector @ hash_vector(item_key(d)))
            for i, d in zip(read.candidate_names, read.candidates, strict=True)
        }
        expected = sorted(scores, key=scores.get, reverse=True)
        ranking = result.answers.ranking[number]
        assert [read.candidate_names[i] for i in ranking[ranking >= 0]] == expected
    assert json.loads((tmp_path / "out/retrieval_score.json").read_text()) == result.metrics
    lines = (tmp_path / "out/retrieval_run.tsv").read_text().splitlines()
    assert len(lines) == 8
    assert lines[0].split()[0] == "q1"
    assert "nDCG@10" in results.table()


def test_equal_documents_rank_in_corpus_order(tmp_path):
    documents = [{"_id": name, "text": "same"} for name in ("b", "c", "a")]
    root = write_task(tmp_path, [{"_id": "q", "text": "x"}], documents, [("q", "c", 1)])
    result = run.evaluate(HashEncoder(), Corpus(root))["retrieval"]
    assert result.answers.ranking[0, :3].tolist() == [0, 1, 2]
    assert result.metrics["MRR@100"] == 0.5


def test_prompts_go_before_texts_and_are_recorded(task, tmp_path):
    options = Options(query_prompt="Q: ", document_prompt="D: ")
    read = corpus.read_task(task, options)
    assert [item.text for item in read.queries] == ["<image>\nQ: find it", "Q: a clip"]
    assert read.candidates[0].text == "D: A title and its text"
    settings = {"fingerprint": "f"}
    results = run.evaluate(HashEncoder(), Corpus(task, options), None, tmp_path, settings=settings)
    recorded = json.loads((tmp_path / "run.json").read_text())["retrieval"]
    assert recorded == {"fingerprint": "f", "query_prompt": "Q: ", "document_prompt": "D: "}
    assert results["retrieval"].settings == {"query_prompt": "Q: ", "document_prompt": "D: "}
    assert corpus.read_task(task).settings == {}


def test_qrels_in_beirs_folder_without_header(task):
    text = (task / "qrels.tsv").read_text().split("\n", 1)[1]
    (task / "qrels").mkdir()
    (task / "qrels/test.tsv").write_text(text)
    with_header = corpus.read_task(task)
    (task / "qrels.tsv").unlink()
    without = corpus.read_task(task)
    for found, expected in zip(without.relevant, with_header.relevant, strict=True):
        assert found.tolist() == expected.tolist()
    assert [gains.tolist() for gains in without.gains] == [[2, 1], [1]]


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
        corpus.read_task(task)
