"""/search over a real index: queries, filters that cannot become SQL, thumbnails, what is not told."""

import contextlib
import io
import json

import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("lancedb")

from llave_jax.search.columns import Row
from llave_jax.search.index import Index
from llave_jax.serving import filters
from llave_jax.serving.app import App, Model
from llave_jax.serving.errors import ApiError
from llave_jax.serving.settings import Limits
from tests.serving.fake_engine import DIMENSION, LONGEST, vector_of
from tests.serving.in_process import data_uri, error_of

LABELS = [
    "it's",
    "a\\'b",
    "' OR 1=1 --",
    "plain",
    '"quoted"',
    "`ticks`",
    "line\nbreak",
    "nul\0",
    "ümläut",
]
IDS = ["a b/c?d#e.jpg", "..", "100%", *(f"item {n}" for n in range(3, 9))]
QUERY = "query a cat []"


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "photos.lance"
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), "red").save(buffer, "jpeg")
    rows = [
        Row(
            id=id,
            kind="image" if n < 4 else "text",
            text=f"text {n}",
            path=f"/secret/folder/photo{n}.jpg" if n < 4 else "",
            metadata={
                "label": label,
                "year": 2000 + n,
                "size": n / 2,
                "tags": ["all", label],
                "new": n > 5,
            }
            if n
            else {},
            thumbnail=buffer.getvalue() if n < 3 else None,
        )
        for n, (id, label) in enumerate(zip(IDS, LABELS, strict=True))
    ]
    vectors = np.stack([vector_of(QUERY), *(vector_of(str(n)) for n in range(1, 9))])
    with Index.create(path, DIMENSION, model={"fingerprint": "x"}) as made:
        made.add(rows, vectors)
    with Index.open(path) as opened:
        yield opened


@pytest.fixture
def server(serve, index):
    server = serve(start=False)
    server.app.start(Model("tiny", DIMENSION, LONGEST, ["query"]), server.batcher, index)
    return server


def ids(response):
    assert response.status_code == 200, response.text
    return [result["id"] for result in response.json()["results"]]


def test_results(server):
    response = server.post("/search", text="a cat", k=9)
    results = response.json()["results"]
    assert results[0] == {
        "id": IDS[0], "score": 1.0, "kind": "image", "text": "text 0", "name": "photo0.jpg", "metadata": {},
        "thumbnail": "/items/a%20b%2Fc%3Fd%23e.jpg/thumbnail",
    }  # fmt: skip
    assert sorted(ids(response)) == sorted(IDS)
    scores = [result["score"] for result in results]
    assert scores == sorted(scores, reverse=True)
    assert "/secret" not in response.text
    by_id = {result["id"]: result for result in results}
    assert by_id["item 5"]["metadata"]["tags"] == ["all", LABELS[5]]
    assert by_id["item 5"]["thumbnail"] is None
    assert len(ids(server.post("/search", text="a cat"))) == 9
    assert len(ids(server.post("/search", text="a cat", k=2))) == 2


def test_what_can_be_searched_for(server):
    picture = {"type": "image_url", "image_url": {"url": data_uri()}}
    for fields in (
        {"image": data_uri()},
        {"image": data_uri(), "text": "a cat"},
        {"content": [picture]},
    ):
        assert len(ids(server.post("/search", k=3, **fields))) == 3
    assert ids(server.post("/search", like=IDS[4], k=1)) == [IDS[4]]
    # Without the prompt the query is another one.
    plain = server.post("/search", text="a cat", input_type="document", k=1).json()["results"]
    assert plain[0]["score"] < 0.99
    assert ids(server.post("/search", text="a cat", prompt_name="query", k=1)) == [IDS[0]]


@pytest.mark.parametrize("place", range(1, 9))
def test_filters_take_any_text_as_text(server, place):
    label = LABELS[place]
    for condition in (label, [label], {"eq": label}, {"contains": label}, {"in": [label, "other"]}):
        assert ids(server.post("/search", text="a cat", where={"label": condition})) == [IDS[place]]
    for condition in ({"contains": label}, {"in": [label]}):
        assert ids(server.post("/search", text="a cat", where={"tags": condition})) == [IDS[place]]
    others = ids(server.post("/search", text="a cat", where={"label": {"ne": label}}))
    assert sorted(others) == sorted(set(IDS[1:]) - {IDS[place]})
    assert ids(server.post("/search", text="a cat", where={"id": IDS[place]})) == [IDS[place]]


@pytest.mark.parametrize(
    ("where", "places"),
    [
        ({}, range(9)),
        ({"year": {"gte": 2003, "lt": 2005}}, [3, 4]),
        ({"year": 2003.0}, [3]),
        ({"year": {"not_in": [2001, 2002]}}, range(3, 9)),
        ({"size": {"gt": 3, "lte": 3.5}}, [7]),
        ({"new": True}, [6, 7, 8]),
        ({"new": False, "kind": "text"}, [4, 5]),
        ({"year": None}, [0]),
        ({"year": {"ne": None}, "kind": ["image"]}, [1, 2, 3]),
        ({"tags": {"contains": "all"}, "text": {"contains": "xt 5"}}, [5]),
        ({"tags": {"not_in": ["plain"]}, "year": {"lt": 2004}}, [1, 2]),
    ],
)
def test_filters(server, where, places):
    found = ids(server.post("/search", text="a cat", where=where))
    assert sorted(found) == sorted(IDS[place] for place in places)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "expected one of: text, image"),
        ({"text": "a", "like": "b"}, "expected one of"),
        ({"text": ["a"]}, "text: expected a string"),
        ({"image": 7}, "image: expected a string"),
        ({"text": " "}, "text: is empty"),
        ({"image": "/etc/passwd"}, "image: expected a data URI"),
        ({"text": "a", "k": 0}, "k: expected a number from 1 to"),
        ({"text": "a", "k": 10**9}, "k: expected"),
        ({"text": "a", "k": "5"}, "k: expected"),
        ({"text": "a", "vector": []}, "the field 'vector' is not known"),
        ({"text": "a", "where": "label = 'x'"}, "where: expected an object"),
        (
            {"text": "a", "where": {"label; DROP": 1}},
            "is no column of this index; it has id, kind, label",
        ),
        ({"text": "a", "where": {"path": "x"}}, "is no column"),
        ({"text": "a", "where": {"vector": None}}, "is no column"),
        ({"text": "a", "where": {"label": 5}}, "the column holds texts"),
        ({"text": "a", "where": {"label": "\ud800"}}, "no Unicode"),
        ({"text": "a", "where": {"year": "2000 OR 1=1"}}, "the column holds whole numbers"),
        ({"text": "a", "where": {"year": 1.5}}, "the column holds whole numbers"),
        ({"text": "a", "where": {"year": 10**30}}, "the column holds whole numbers"),
        ({"text": "a", "where": {"size": True}}, "the column holds numbers"),
        ({"text": "a", "where": {"new": 1}}, "the column holds booleans"),
        (
            {"text": "a", "where": {"year": {"= 1 OR 1": 1}}},
            "for a column of whole numbers there are",
        ),
        ({"text": "a", "where": {"tags": {"lt": "a"}}}, "there are contains"),
        ({"text": "a", "where": {"year": {}}}, "has an empty condition"),
        ({"text": "a", "where": {"year": []}}, "expected a list of 1 to 1000"),
    ],
)
def test_searches_that_are_refused(server, fields, said):
    response = server.call(
        "POST", "/search", content=json.dumps(fields), headers={"content-type": "application/json"}
    )
    assert said in error_of(response)["message"]


def test_items_that_are_not_there(server):
    assert error_of(server.post("/search", like="nothing"), 404)["code"] == "not_found"
    for id in ("nothing", "x' OR '1'='1", "../../etc/passwd"):
        path = (
            "/items/"
            + id.replace("/", "%2F").replace(" ", "%20").replace("'", "%27")
            + "/thumbnail"
        )
        error_of(server.get(path), 404)
    assert (
        error_of(server.get("/items/item%203/thumbnail"), 404)["message"]
        == "the item has no thumbnail"
    )


def test_thumbnails(server):
    response = server.get(server.post("/search", text="a cat").json()["results"][0]["thumbnail"])
    assert response.headers["content-type"] == "image/jpeg"
    assert PIL.Image.open(io.BytesIO(response.content)).size == (8, 8)


def test_what_is_told_of_the_index(server):
    response = server.get("/index")
    told = response.json()
    examples = told.pop("examples")
    assert sorted(example["id"] for example in examples) == sorted(IDS)
    assert set(examples[0]) == {"id", "kind", "text", "name", "metadata", "thumbnail"}
    assert "/secret" not in response.text
    assert told == {
        "items": 9,
        "kinds": {"text": 5, "image": 4},
        "columns": {
            "id": "text", "kind": "text", "text": "text", "label": "text", "year": "whole number", "size": "number",
            "tags": "list of texts", "new": "boolean",
        },
        "thumbnails": True,
        "approximate": False,
        "model": "tiny",
        # Not of fractions.
        "values": {
            "label": sorted(LABELS[1:]), "year": list(range(2001, 2009)), "tags": sorted(["all", *LABELS[1:]]),
            "new": [False, True],
        },
        "limits": {"body_bytes": 100_000, "pixels": 10_000, "results": 1000},
    }  # fmt: skip


def test_a_server_without_an_index(serve):
    server = serve()
    for response in (
        server.post("/search", text="a"),
        server.get("/index"),
        server.get("/items/a/thumbnail"),
    ):
        assert error_of(response, 404)["code"] == "no_index"


@settings(max_examples=25)
@given(
    st.text(max_size=12)
    | st.sampled_from(["'", "''", "\\'", "%", "_", "`", "--", "/*", '"', "\\", "a' OR 'a'='a"])
)
def test_no_text_changes_a_filter(index, text):
    """Whatever is compared: only items with that text are found, and LanceDB understands the filter."""
    where = filters.build({"label": text, "tags": {"not_in": [text]}}, index.columns)
    assert not index.search(
        np.ones(DIMENSION), 20, where=where
    )  # each label is among its item's tags
    where = filters.build({"label": {"in": [text, "plain"]}}, index.columns)
    found = {hit.metadata["label"] for hit in index.search(np.ones(DIMENSION), 20, where=where)}
    assert found == {"plain", *({text} & set(LABELS[1:]))}


@settings(max_examples=100)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["eq", "ne", "lt", "gte", "in", "not_in", "contains", "x"]),
                inner,
                max_size=2,
            )
        ),
        max_leaves=4,
    ),
    st.sampled_from(["label", "year", "size", "tags", "new", "kind", "id", "path", "x` = 1 OR `y"]),
)
def test_any_condition_is_refused_or_understood(index, condition, column):
    where = None
    with contextlib.suppress(ApiError):
        where = filters.build({column: condition}, index.columns)
    if where is not None:
        index.search(np.ones(DIMENSION), 20, where=where)


def test_searches_wait_for_the_model():
    assert App(Limits()).asgi is not None
    with pytest.raises(ApiError, match="where"):
        filters.build({f"c{n}": 1 for n in range(33)}, {})
