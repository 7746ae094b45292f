"""Scores of smaller vectors: from the embeddings that are there, as a search with them would rank."""

import json

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from llave_jax import evaluate
from llave_jax.embedding.precision import PRECISIONS, calibration_ranges, quantise
from llave_jax.evaluation import run
from llave_jax.evaluation.benchmarks.corpus import Corpus
from llave_jax.evaluation.benchmarks.mmeb import Mmeb
from llave_jax.evaluation.cache import Embedded, EmbeddingCache
from llave_jax.evaluation.forms import Form, read_forms, rows, to_json
from llave_jax.evaluation.scoring import rank, score_task
from llave_jax.evaluation.task import Task, TaskInfo
from llave_jax.inputs.item import Item
from llave_jax.training import benchmark
from tests.evaluation.fake_encoder import HashEncoder
from tests.evaluation.mmeb_eval_tree import score_mmeb
from tests.evaluation.test_evaluate import model as model
from tests.evaluation.test_retrieval import task as task

FORMS = read_forms("4,8", "int8,binary", 16)


def draw(seed, count, dim):
    vectors = np.random.default_rng(seed).normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@hypothesis.settings(max_examples=30)
@hypothesis.given(
    st.integers(0, 2**32 - 1), st.integers(1, 200), st.integers(1, 24), st.sampled_from(PRECISIONS)
)
def test_stored_vectors_are_what_their_bits_say(seed, count, dim, precision):
    vectors = draw(seed, count, 24)
    if precision == "int8":
        # A dimension that dwarfs the others: without calibration it would take their steps.
        vectors[:, 0] += 30 * dim**-0.5
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    form = Form(dim, precision)
    stored = form.stored(vectors)
    cut = vectors[:, :dim] / np.linalg.norm(vectors[:, :dim], axis=1, keepdims=True)
    np.testing.assert_allclose(np.linalg.norm(stored, axis=1), 1, rtol=1e-5)
    if precision == "binary":
        packed = quantise(cut, "binary")
        bits = np.unpackbits((packed.astype(np.int16) + 128).astype(np.uint8), axis=1)[:, :dim]
        np.testing.assert_array_equal(stored > 0, bits.astype(bool))
    elif precision == "int8" and count >= 2:
        least, largest = calibration_ranges(cut)
        # Half a step each way before the vector is normalised again, and as much after.
        error = np.linalg.norm((largest - least) / 255) + 1e-5
        assert np.linalg.norm(stored - cut, axis=1).max() <= error
    else:
        atol = {"float32": 1e-6, "float16": 1e-3, "int8": 0.5 * dim**0.5 / 127 + 1e-5}[precision]
        np.testing.assert_allclose(stored, cut, atol=atol)


def test_bytes():
    found = [Form(896, precision).bytes for precision in ("float32", "float16", "int8", "binary")]
    assert found == [3584, 1792, 896, 112]
    assert Form(9, "binary").bytes == 2


def test_binary_vectors_are_searched_by_hamming_distance_and_rescored():
    queries, documents = draw(0, 5, 16), draw(1, 300, 16)
    form = Form(12, "binary")
    stored = form.stored(documents)
    asked = queries[:, :12] / np.linalg.norm(queries[:, :12], axis=1, keepdims=True)
    scores = form.scores(asked, stored, 10)
    for query, every in zip(asked, scores, strict=True):
        hamming = np.count_nonzero((query > 0) != (stored > 0), axis=1)
        nearest = np.argsort(hamming, kind="stable")[:40]
        cosines = stored @ query
        np.testing.assert_allclose(every[nearest], cosines[nearest], rtol=1e-5, atol=1e-6)
        assert set(np.argsort(-every)[:40]) == set(nearest)
        assert every[np.setdiff1d(np.arange(300), nearest)].max() < -1
    # Rescoring finds what the bits alone do not.
    best = np.argmax(asked @ stored.T, axis=1)
    assert (best == scores.argmax(1)).sum() >= 4
    # More are rescored where more are looked at.
    assert (form.scores(asked, stored, 20) > -1).sum() == 5 * 80


def test_every_form_is_scored_from_the_same_embeddings(golden):
    encode, cache = HashEncoder(), EmbeddingCache()
    results = score_mmeb(encode, golden / "eval", cache=cache, forms=FORMS)
    assert len(encode.keys) == len(set(encode.keys)) == len(cache)
    whole = Form(16)
    for result in results.tasks:
        assert list(result.forms) == list(FORMS)
        assert result.forms[whole] == result.metrics
    by_form = results.by_form()
    assert by_form[whole]["overall"] == results.averages()[-1].value
    assert len({scores["overall"] for scores in by_form.values()}) > 1
    table = results.table()
    assert "numbers  precision  bytes" in table
    for form in FORMS:
        assert any(
            line.split()[:3] == [str(form.dim), form.precision, str(form.bytes)]
            for line in table.splitlines()
        )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_rows_rank_their_own_stored_candidates(golden, form):
    task = Mmeb(golden / "eval").read("TinyT2I")
    queries, candidates = draw(0, len(task.queries), 16), draw(1, len(task.candidates), 16)
    # int8 is calibrated on all candidates of the task, not on those of a row.
    stored = form.stored(candidates)
    embedded = (Embedded(vectors, np.arange(len(vectors))) for vectors in (queries, candidates))
    _, answers = rank(task, *embedded, form)
    for row, pool in enumerate(task.pools):
        asked = queries[row, : form.dim] / np.linalg.norm(queries[row, : form.dim])
        pool = np.array(list(dict.fromkeys(pool.tolist())))
        scores = form.scores(asked[None], stored[pool], 10)[0]
        assert scores[list(pool).index(answers.ranking[row, 0])] == pytest.approx(
            scores.max(), abs=1e-6
        )


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_pool_is_a_search_of_its_own(form):
    """More candidates than binary vectors have rescored: which are depends on the pool, not on all candidates."""
    queries, candidates = draw(0, 6, 16), draw(1, 300, 16)
    rng = np.random.default_rng(2)
    pools = [np.sort(rng.permutation(300)[:180]).astype(np.int32) for _ in range(6)]
    task = Task(
        TaskInfo("t", "m", metric="hit@1"),
        [Item("q")] * 6,
        [Item("c")] * 300,
        [pool[:1] for pool in pools],
        pools=pools,
        metrics=("hit@1",),
    )
    embedded = (Embedded(vectors, np.arange(len(vectors))) for vectors in (queries, candidates))
    _, answers = rank(task, *embedded, form)
    stored = form.stored(candidates)
    for row, pool in enumerate(pools):
        asked = queries[row, : form.dim] / np.linalg.norm(queries[row, : form.dim])
        scores = form.scores(asked[None], stored[pool], 10)[0]
        np.testing.assert_allclose(answers.all_scores[row], scores, atol=1e-6)


def test_stored_vectors_are_calibrated_on_candidates_alone():
    queries, candidates = draw(0, 6, 16), draw(1, 50, 16)
    # Far from all candidates in one dimension.
    queries[:, 3] += 9
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    candidates[:, 3] /= 50
    candidates /= np.linalg.norm(candidates, axis=1, keepdims=True)
    vectors = {f"q{n}": v for n, v in enumerate(queries)} | {
        f"c{n}": v for n, v in enumerate(candidates)
    }
    form = Form(16, "int8")
    task = Task(
        TaskInfo("t", "m", metric="hit@1"),
        [Item(f"q{n}") for n in range(6)],
        [Item(f"c{n}") for n in range(50)],
        [np.array([n], np.int32) for n in (queries @ form.stored(candidates).T).argmax(1)],
        metrics=("hit@1",),
    )

    def encode(items):
        return np.stack([vectors[item.text] for item in items])

    assert score_task(encode, task, EmbeddingCache(), [form]).forms[form] == {"hit@1": 1.0}


def test_a_corpus_in_every_form(task):
    results = run.evaluate(HashEncoder(), Corpus(task), forms=FORMS)
    found = results["retrieval"]
    assert list(found.forms) == list(FORMS)
    assert found.forms[Form(16)] == found.metrics
    assert "numbers  precision  bytes  recall@1" in results.table()


def test_a_command_scores_dims_and_precisions(model, golden, tmp_path, capsys):
    directory, encoder = model
    command = ["--model", directory, "--benchmark", "mmeb", "--data", str(golden / "eval")]
    output = tmp_path / "out"
    evaluate.main(
        [*command, "--output", str(output), "--truncate-dim=8", "--dims=4", "--precision=int8"]
    )
    table = (output / "table.txt").read_text()
    assert table in capsys.readouterr().out
    forms = json.loads((output / "forms.json").read_text())
    assert [(f["numbers"], f["precision"], f["bytes"]) for f in forms] == [
        (8, "float32", 32), (4, "float32", 16), (8, "int8", 8), (4, "int8", 4)
    ]  # fmt: skip
    assert "first 8 numbers" in table
    assert json.loads((output / "run.json").read_text())["TinyCls"]["truncate_dim"] == 8
    assert "Smaller vectors" in (output / "report.html").read_text()
    # The cache has the whole embeddings: another form needs none again.
    count = len(encoder.keys)
    evaluate.main([*command, "--output", str(output)])
    assert len(encoder.keys) == count
    assert "truncate_dim" not in json.loads((output / "run.json").read_text())["TinyCls"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--dims=0", "--dims is '0'; expected numbers from 1 to"),
        ("--dims=a,4", "--dims is 'a,4'"),
        ("--dims=100000", "--dims is '100000'"),
        ("--precision=int4", "precision is 'int4'; expected one of"),
        ("--truncate-dim=0", "--truncate-dim is 0; expected 1 to"),
    ],
)
def test_what_is_no_form_is_refused(model, golden, tmp_path, capsys, flags, message):
    command = ["--model", model[0], "--benchmark", "mmeb", "--data", str(golden / "eval")]
    assert evaluate.main([*command, "--output", str(tmp_path / "out"), flags])
    assert message in capsys.readouterr().err


def test_a_run_scores_its_dims(golden, task, tmp_path):
    opened = benchmark.open_run_benchmark(str(golden / "eval"), (), None, (4, 8))
    found = opened.score(HashEncoder(), tmp_path / "mmeb")
    forms = [Form(4), Form(8)]
    results = score_mmeb(HashEncoder(), golden / "eval", forms=forms)
    for form in forms:
        assert found[f"average/overall@{form.dim}"] == results.by_form()[form]["overall"]
    assert found["average/overall"] == results.metrics()["average/overall"]
    found = benchmark.open_run_benchmark(str(task), (), None, (4,)).score(
        HashEncoder(), tmp_path / "own"
    )
    assert {"nDCG@10", "nDCG@10@4"} <= found.keys()


def test_tables():
    assert read_forms(None, None, 16) == ()
    assert read_forms("8", None, 16) == (Form(16), Form(8))
    assert read_forms(None, "binary", 16) == (Form(16), Form(16, "binary"))
    scores = {Form(16): {"overall": 0.5}, Form(8, "int8"): {"overall": None}}
    assert rows(scores)[1:] == [["16", "float32", "64", "50.0"], ["8", "int8", "8", "-"]]
    assert to_json(scores)[1] == {
        "numbers": 8, "precision": "int8", "bytes": 8, "scores": {"overall": None}
    }  # fmt: skip
