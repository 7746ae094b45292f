"""The index on disk: what it finds, changes, keeps through a kill, and refuses."""

import datetime
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("lancedb")

from llave_jax.common.locks import OutputInUse
from llave_jax.search import index as index_module
from llave_jax.search import recall
from llave_jax.search.columns import Row
from llave_jax.search.index import Index

D = 24
MODEL = {"model": "models/tiny", "fingerprint": "f" * 32}


def vectors_of(count, seed=0, dimension=D):
    vectors = np.random.default_rng(seed).standard_normal((count, dimension)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def rows_of(count, first=0):
    return [
        Row(
            f"item {i}",
            ("text", "image")[i % 2],
            text=f"text {i}",
            path=f"{i}.jpg" if i % 2 else "",
            metadata={"year": 2000 + i % 10, "label": f"it's {i % 3}"},
            thumbnail=bytes([i % 256]) if i % 2 else None,
            digest=i.to_bytes(4, "big"),
            stamp=b"s",
        )
        for i in range(first, first + count)
    ]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    path = tmp_path_factory.mktemp("index") / "items.lance"
    vectors = vectors_of(300)
    with Index.create(path, D, model=MODEL) as index:
        index.add(rows_of(200), vectors[:200])
        index.add(rows_of(100, 200), vectors[200:])
    with Index.open(path) as index:
        yield index, vectors


def test_search_is_numpys(filled):
    index, vectors = filled
    for query in vectors_of(20, seed=1):
        hits = index.search(3 * query, 7)
        scores = vectors @ query
        assert [hit.id for hit in hits] == [f"item {i}" for i in np.argsort(-scores)[:7]]
        np.testing.assert_allclose(
            [hit.score for hit in hits], np.sort(scores)[::-1][:7], atol=1e-5
        )
    first = index.search(vectors[5], 1)[0]
    assert (first.kind, first.text, first.path) == ("image", "text 5", "5.jpg")
    assert first.metadata == {"year": 2005, "label": "it's 2"}


def test_filters_choose_before_the_search(filled):
    index, vectors = filled
    query = vectors_of(1, seed=2)[0]
    allowed = [i for i in range(300) if i % 2 and i % 10 > 6 and i % 3 == 1]
    hits = index.search(query, 8, where="kind = 'image' AND year > 2006 AND label = 'it''s 1'")
    best = sorted(allowed, key=lambda i: -vectors[i] @ query)[:8]
    assert [hit.id for hit in hits] == [f"item {i}" for i in best]
    assert index.search(query, 8, where="year > 3000") == []


@pytest.mark.parametrize(
    ("where", "said"),
    [
        ("yeer > 3", "No field named yeer"),
        ("year >", "Expected: an expression"),
        ("year = 'a'", "Int64"),
        ("", "Expected: an expression"),
        ("label", "boolean"),
        ("sleep(10)", "Invalid function 'sleep'"),
    ],
)
def test_filters_that_cannot_be_read(filled, where, said):
    with pytest.raises(ValueError, match=said) as caught:
        filled[0].search(vectors_of(1)[0], where=where)
    text = str(caught.value)
    assert text.startswith(f"the filter {where!r}")
    assert "\n" not in text
    assert ".rs" not in text


def test_one_item(filled):
    index, vectors = filled
    np.testing.assert_allclose(index.vector("item 7"), vectors[7], atol=1e-6)
    assert index.thumbnail("item 7") == bytes([7])
    assert index.thumbnail("item 8") is None
    assert index.present(["item 7", "none"]) == {"item 7": ((7).to_bytes(4, "big"), b"s")}
    for read in (index.vector, index.thumbnail):
        with pytest.raises(KeyError):
            read("it's not there")
    facts = index.info()
    assert (facts["items"], facts["kinds"]) == (300, {"text": 150, "image": 150})
    assert facts["columns"] == {"year": "int64", "label": "string"}
    assert facts["model"] == {**MODEL, "dimension": D}


def test_what_is_shown_before_a_search(filled, tmp_path):
    index, _ = filled
    shown = index.examples(12)
    assert len({hit.id for hit in shown}) == 12
    assert shown == index.examples(12)
    rows = {row.id: row for row in rows_of(300)}
    assert all(hit.metadata == rows[hit.id].metadata for hit in shown)
    assert len(index.examples(1000)) == 300
    labels = ["it's 0", "it's 1", "it's 2"]
    assert index.values() == {"year": list(range(2000, 2010)), "label": labels}
    assert index.values(most=5) == {"label": labels}
    with Index.create(tmp_path / "empty.lance", D, model=MODEL) as empty:
        assert (empty.examples(5), empty.values()) == ([], {})


def test_what_is_refused(filled, tmp_path):
    index, vectors = filled
    with pytest.raises(ValueError, match=r"\[23\].*expected \[24\]"):
        index.search(vectors[0, :-1])
    with pytest.raises(ValueError, match="no direction"):
        index.search(np.zeros(D))
    with pytest.raises(ValueError, match="open for reading"):
        index.add(rows_of(1), vectors[:1])
    with pytest.raises(ValueError, match="is an index already"):
        Index.create(index.path, D, model=MODEL)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"")
    for path in (tmp_path / "photos", tmp_path / "photos" / "a.jpg"):
        with pytest.raises(ValueError, match="is no index"):
            Index.create(path, D, model=MODEL)
        with pytest.raises(ValueError, match="is no index"):
            Index.open(path)
    with pytest.raises(ValueError, match="is no index"):
        Index.open(tmp_path / "absent")
    assert not (tmp_path / "absent").exists()
    for wrong in ({"truncate_dim": 25}, {"search_dim": 0}, {"precision": "int4"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Index.create(tmp_path / "new.lance", D, model=MODEL, **wrong)
    with Index.create(tmp_path / "new.lance", D, model=MODEL) as new:
        with pytest.raises(OutputInUse):
            Index.open(tmp_path / "new.lance", write=True)
        with pytest.raises(ValueError, match="'item 1' is there twice"):
            new.add(rows_of(2) + rows_of(1, 1), vectors[:3])
        with pytest.raises(ValueError, match="item 1: its vector"):
            new.add(rows_of(2), vectors[:2] * np.array([[1], [np.nan]]))
        for name in ("vector", "_score", "a.b", ""):
            with pytest.raises(ValueError, match="no column can have this name"):
                new.add([Row("a", "text", metadata={name: 1})], vectors[:1])
        new.add([Row("a", "text", metadata={"year": 1})], vectors[:1])
        with pytest.raises(ValueError, match=r"b: metadata year is 'x', texts; .* whole numbers"):
            new.add([Row("b", "text", metadata={"year": "x"})], vectors[:1])
        with pytest.raises(ValueError, match="ids or by a filter"):
            new.delete()
        assert len(new) == 1


def test_metadata_of_all_kinds(tmp_path):
    with Index.create(tmp_path / "a.lance", D, model=MODEL) as index:
        index.add([Row("a", "text"), Row("b", "text", metadata={"n": None})], vectors_of(2))
        many = {"n": 1, "tags": ["x", "it's"], "ok": True, "Size Of": 2.5, "other": {"a": [1]}}
        index.add([Row("c", "text", metadata=many), Row("d", "text")], vectors_of(2, seed=1))
        index.add([Row("e", "text", metadata={"Size Of": 3, "big": 2**70})], vectors_of(1, seed=2))
        found = {hit.id: hit.metadata for hit in index.search(vectors_of(1)[0], 9)}
        assert found["a"] == found["b"] == found["d"] == {}
        assert found["c"] == {**many, "other": '{"a": [1]}'}
        assert found["e"] == {"Size Of": 3.0, "big": 2.0**70}
        for where, ids in (
            ("array_has(tags, 'x') AND ok", ["c"]),
            ("`Size Of` > 2.7", ["e"]),
            ("n IS NULL AND id < 'c'", ["a", "b"]),
        ):
            hits = index.search(vectors_of(1)[0], 9, where=where)
            assert sorted(hit.id for hit in hits) == ids


operations = st.lists(
    st.one_of(
        st.tuples(
            st.just("add"), st.lists(st.integers(0, 15), min_size=1, max_size=6, unique=True)
        ),
        st.tuples(st.just("delete"), st.lists(st.integers(0, 15), min_size=1, max_size=4)),
        st.tuples(st.just("where"), st.integers(2000, 2009)),
        st.tuples(st.just("optimise"), st.booleans()),
    ),
    max_size=6,
)


@settings(max_examples=12)
@given(operations=operations, precision=st.sampled_from(["float32", "float16"]))
def test_additions_and_deletions(tmp_path_factory, operations, precision):
    """After any changes the index holds what a dict would, and finds what NumPy finds."""
    path = tmp_path_factory.mktemp("changes") / "a.lance"
    expected = {}
    query = vectors_of(1, seed=99)[0]
    with Index.create(path, D, model=MODEL, precision=precision) as index:
        for number, (kind, value) in enumerate(operations):
            if kind == "add":
                rows = [rows_of(1, i)[0] for i in value]
                vectors = vectors_of(len(value), seed=number)
                replaced = index.add(rows, vectors)
                assert replaced == sum(row.id in expected for row in rows)
                expected |= {row.id: (row, v) for row, v in zip(rows, vectors, strict=True)}
            elif kind == "delete":
                gone = {f"item {i}" for i in value} & set(expected)
                assert index.delete([f"item {i}" for i in value]) == len(gone)
                expected = {id: entry for id, entry in expected.items() if id not in gone}
            elif kind == "where":
                gone = {id for id, (row, _) in expected.items() if row.metadata["year"] == value}
                if any(op == "add" for op, _ in operations[:number]):
                    assert index.delete(where=f"year = {value}") == len(gone)
                    expected = {id: entry for id, entry in expected.items() if id not in gone}
            else:
                index.optimise(compact=value)
        hits = Index.open(path).search(query, 16)
    assert {hit.id for hit in hits} == set(expected)
    wanted = sorted((float(v @ query) for _, v in expected.values()), reverse=True)
    tolerance = 1e-5 if precision == "float32" else 2e-3
    np.testing.assert_allclose([hit.score for hit in hits], wanted, atol=tolerance)
    for hit in hits:
        row, vector = expected[hit.id]
        assert (hit.text, hit.metadata) == (row.text, row.metadata)
        assert abs(hit.score - vector @ query) <= tolerance


@pytest.mark.parametrize("kind", [{"search_dim": 8}, {"truncate_dim": 12}])
def test_fewer_numbers(tmp_path, kind):
    vectors, query = vectors_of(40), vectors_of(1, seed=1)[0]
    with Index.create(tmp_path / "a.lance", D, model=MODEL, **kind) as index:
        index.add(rows_of(40), vectors)
        hits = index.search(query, 4)
        kept = index.vector("item 3")
        exact = index.search(query, 4, exact=True)
        rebuilt = index.optimise(approximate=None)
    assert rebuilt.ann is None
    dimension = kind.get("truncate_dim", D)
    part = vectors[:, :dimension] / np.linalg.norm(vectors[:, :dimension], axis=1, keepdims=True)
    part_query = query[:dimension] / np.linalg.norm(query[:dimension])
    np.testing.assert_allclose(kept[:dimension], part[3], atol=1e-6)
    assert not kept[dimension:].any()
    scores = part @ part_query
    assert [hit.id for hit in exact] == [f"item {i}" for i in np.argsort(-scores)[:4]]
    for hit in hits:
        assert hit.score == pytest.approx(scores[int(hit.id.split()[1])], abs=1e-5)
    if "search_dim" in kind:
        short = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
        candidates = np.argsort(-(short @ query[:8]))[: 4 * index_module.REFINE]
        best = candidates[np.argsort(-scores[candidates])][:4]
        assert [hit.id for hit in hits] == [f"item {i}" for i in best]


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """3000 clustered items with an approximate index."""
    return make_large(tmp_path_factory.mktemp("large") / "a.lance")


def make_large(path, spread=0.1, **options):
    rng = np.random.default_rng(0)
    centres = vectors_of(30, seed=1)
    vectors = centres[rng.integers(0, 30, 3000)] + spread * rng.standard_normal((3000, D))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    with Index.create(path, D, model=MODEL, **options) as index:
        index.add(rows_of(3000), vectors)
        index.optimise(approximate=True)
    return path, vectors


@pytest.mark.parametrize("search_dim", [None, 6])
def test_recall_is_measured(large, tmp_path, monkeypatch, search_dim):
    """With few numbers to search by, neighbours are missed, and the recall says how many."""
    monkeypatch.setattr(recall, "PROBES", (20, 50))
    path, vectors = large
    if search_dim is not None:
        path, vectors = make_large(tmp_path / "a.lance", search_dim=search_dim)
    with Index.open(path) as index:
        ann = index.settings.ann
        assert (ann["items"], ann["sample"], index.info()["not_in_ann"]) == (3000, 100, 0)
        ids, queries = index.sample(100)
        shares = []
        for id, query in zip(ids, queries, strict=True):
            own = int(id.split()[1])
            np.testing.assert_allclose(query, vectors[own], atol=1e-6)
            scores = vectors @ query
            scores[own] = -2
            found = [h.id for h in index.search(query, 11) if h.id != id][:10]
            true = {f"item {i}" for i in np.argsort(-scores)[:10]}
            shares.append(len(true & set(found)) / 10)
        exact = index.search(queries[0], 11, exact=True)
        scores = vectors @ queries[0]
        assert {h.id for h in exact} == {f"item {i}" for i in np.argsort(-scores)[:11]}
        assert ann["recall"] == pytest.approx(np.mean(shares), abs=0.005)
        if search_dim is None:
            assert ann["recall"] >= ann["target"]
        else:
            assert 0.2 < ann["recall"] < 0.95
        hits = index.search(vectors[3], 5, where="kind = 'text'")
        scores = np.where(np.arange(3000) % 2, -2, vectors @ vectors[3])
        assert hits[0].score == pytest.approx(scores.max(), abs=1e-5)


def test_as_few_partitions_as_reach_the_recall(tmp_path, monkeypatch):
    from lancedb.index import IvfSq

    def train(index):
        index._table.create_index("vector", config=IvfSq("cosine", num_partitions=25))

    monkeypatch.setattr(Index, "_train", train)
    monkeypatch.setattr(recall, "PROBES", (1, 3, 25))
    path, _ = make_large(tmp_path / "a.lance", spread=0.3)
    with Index.open(path, write=True) as index:
        best = index.settings.ann
        assert best["recall"] >= best["target"]
        few = index.optimise(approximate=True, target=0.3).ann
        none = index.optimise(approximate=True, target=1.1).ann
    assert (few["probes"], none["probes"]) == (1, 25)
    assert 0.3 < few["recall"] < best["recall"] <= none["recall"]


def test_new_items_are_found_before_and_after_they_enter_the_approximate_index(large, tmp_path):
    shutil.copytree(large[0], tmp_path / "a.lance")
    new = vectors_of(5, seed=7)
    with Index.open(tmp_path / "a.lance", write=True) as index:
        index.add(rows_of(5, 5000), new)
        index.add([Row("item 1", "text", text="other")], vectors_of(1, seed=8))
        index.renew([Row("item 7", "image", text="renewed", metadata={"year": 1})])
        for first in (True, False):
            hit = index.search(large[1][7], 1)[0]
            assert (hit.id, hit.text, hit.metadata) == ("item 7", "renewed", {"year": 1})
            assert (index.thumbnail("item 7"), index.thumbnail("item 9")) == (
                bytes([7]),
                bytes([9]),
            )
            assert index.search(new[2], 1)[0].id == "item 5002"
            assert index.search(vectors_of(1, seed=8)[0], 1)[0].text == "other"
            assert len(index) == 3005
            assert index.info()["not_in_ann"] == (6 if first else 0)
            assert index.optimise(approximate=True, compact=True).ann["items"] == 3005
        assert index.delete(["item 5002"]) == 1
        assert index.search(new[2], 1)[0].id != "item 5002"
        assert index.optimise().ann is None
        assert index.search(new[3], 1)[0].id == "item 5003"


def test_the_approximate_index_is_trained_anew(tmp_path, monkeypatch):
    """Once it lacks more than a share of the items; not before, and then its recall is not measured either."""
    path, _ = make_large(tmp_path / "a.lance")
    monkeypatch.setattr(index_module, "_UNTRAINED_NUMBERS", 0)
    with Index.open(path, write=True) as index:
        for count, lacking, items in ((100, 100, 3000), (100, 0, 3200)):
            index.add(rows_of(count, first=len(index)), vectors_of(count, seed=count + items))
            assert index.optimise(approximate=True).ann["items"] == items
            assert index.info()["not_in_ann"] == lacking


def test_many_small_additions_are_merged(tmp_path):
    with Index.create(tmp_path / "a.lance", D, model=MODEL) as index:
        for number in range(66):
            index.add(rows_of(1, number), vectors_of(1, seed=number))
        assert index.info()["fragments"] == 66
        index.optimise()
        assert index.info()["fragments"] == 1
        assert len(index.search(vectors_of(1)[0], 100)) == 66


def test_searches_go_on_while_another_writes(tmp_path, monkeypatch):
    """Also when it removes the version that is being searched."""
    monkeypatch.setattr(index_module, "_KEPT", datetime.timedelta(milliseconds=1))
    path = tmp_path / "a.lance"
    failures, ends = [], threading.Event()
    with Index.create(path, D, model=MODEL) as index, Index.open(path) as reader:
        index.add(rows_of(50), vectors_of(50))

        def read():
            while not ends.is_set():
                try:
                    hits = reader.search(vectors_of(1, seed=1)[0], 100)
                    assert len(hits) in (0, 50)
                    assert reader.thumbnail("item 7") == bytes([7])
                except Exception as error:
                    failures.append(error)

        time.sleep(1.1)
        thread = threading.Thread(target=read)
        thread.start()
        for seed in range(8):
            index.add(rows_of(50), vectors_of(50, seed=seed))
            index.optimise(compact=True)
        ends.set()
        thread.join()
    assert not failures


WRITER = """
import sys
import lancedb
import numpy as np
from llave_jax.search.columns import Row
from llave_jax.search.index import Index, is_index

path, create = sys.argv[1], sys.argv[2] == "create"
print("go", flush=True)
while True:
    if create:
        index = Index.create(path, 8, model={})
    else:
        index = Index.open(path, write=True)
    with index:
        first = len(index)
        if first > 600:
            index.delete(where="id >= 'b'")
        rows = [Row(f"b{i}", "text", metadata={f"m{first % 7}": i}) for i in range(40)]
        rows += [Row(f"a{i}", "text") for i in range(10)]
        index.add(rows, np.random.default_rng(first).standard_normal((50, 8)))
        index.optimise(approximate=bool(first % 2), compact=True)
    create = False
"""


@pytest.mark.slow
def test_killed_writers_leave_an_index(tmp_path):
    """SIGKILL at random moments, the first ones while the index is made: what is there is whole commits."""
    path = tmp_path / "a.lance"
    rng = np.random.default_rng(0)
    made = 0
    for turn in range(6):
        kind = "open" if index_module.is_index(path) else "create"
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, path, kind], stdout=subprocess.PIPE, text=True
        )
        assert writer.stdout.readline() == "go\n"
        time.sleep(rng.uniform(0, 0.3) if turn < 2 else rng.uniform(0.2, 0.5))
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        if not index_module.is_index(path):
            continue
        made += 1
        with Index.open(path) as index:
            assert len(index) in (0, 10, 50)
            hits = index.search(np.ones(8), 100)
            assert len(hits) == len({hit.id for hit in hits}) == len(index)
    assert made
    with Index.open(path, write=True) as index:
        index.add([Row("last", "text")], np.ones((1, 8)))
        index.optimise(compact=True)
        assert index.search(np.ones(8), 1)[0].id == "last"
