"""The routes, in process and with an engine without a model: forms of requests and answers, errors, limits."""

import asyncio
import base64
import dataclasses
import json

import numpy as np
import PIL.Image
import pytest

from llave_jax.serving.app import Model
from llave_jax.serving.guard import HEADERS
from tests.serving.fake_engine import DIMENSION, LONGEST, vector_of
from tests.serving.in_process import SMALL, TEXT_PART, data_uri, error_of, image_part


def test_texts(serve):
    server = serve()
    one = server.post(input="a cat", model="tiny", user="somebody").json()
    assert one["object"] == "list"
    assert one["model"] == "tiny"
    (entry,) = one["data"]
    assert (entry["object"], entry["index"]) == ("embedding", 0)
    np.testing.assert_array_equal(np.float32(entry["embedding"]), vector_of("None a cat []"))
    texts = [f"text {n}" for n in range(13)]
    several = server.post(input=texts, encoding_format="base64").json()
    assert [entry["index"] for entry in several["data"]] == list(range(13))
    for text, entry in zip(texts, several["data"], strict=True):
        vector = np.frombuffer(base64.b64decode(entry["embedding"]), "<f4")
        np.testing.assert_array_equal(vector, vector_of(f"None {text} []"))
    tokens = sum(len(f"None {text} []") for text in texts)
    assert several["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}


def test_dimensions_are_normalised_again(serve):
    server = serve()
    whole = np.float32(server.post(input="a").json()["data"][0]["embedding"])
    part = np.float32(server.post(input="a", dimensions=3).json()["data"][0]["embedding"])
    np.testing.assert_allclose(part, whole[:3] / np.linalg.norm(whole[:3]), rtol=1e-6)
    for wrong in (0, DIMENSION + 1, "3", 2.0, True):
        assert error_of(server.post(input="a", dimensions=wrong))["param"] == "dimensions"


def test_prompts_are_named(serve):
    server = serve()

    def vector(**fields):
        return np.float32(server.post(input="a", **fields).json()["data"][0]["embedding"])

    for fields in (
        {"prompt_name": "query"},
        {"input_type": "query"},
        {"input_type": "search_query"},
    ):
        np.testing.assert_array_equal(vector(**fields), vector_of("query a []"))
    # The model has no prompt for documents: they are embedded as they are.
    np.testing.assert_array_equal(vector(input_type="document"), vector_of("None a []"))
    assert (
        "this model has query" in error_of(server.post(input="a", prompt_name="other"))["message"]
    )


def test_images_in_messages_and_in_batches(serve):
    server = serve()
    red, blue = data_uri(color="red"), data_uri(color="blue")

    def content(text, *colors):
        shown = [PIL.Image.new("RGB", (20, 10), color).tobytes() for color in colors]
        return vector_of(f"None {text} {shown}")

    user = {"role": "user", "content": [image_part(red), TEXT_PART]}
    system = {"role": "system", "content": "You are a helpful assistant."}
    expected = content("<image>\nWhat is in it?", "red")
    for messages in ([user], [system, user], [user, {"role": "assistant", "content": ""}]):
        answer = server.post(messages=messages, add_generation_prompt=True, encoding_format="float")
        np.testing.assert_array_equal(np.float32(answer.json()["data"][0]["embedding"]), expected)
    batch = [
        "a cat",
        [image_part(red)],
        {"content": [TEXT_PART, image_part(blue)]},
        [
            {"type": "text", "text": "<|image_1|> or <|image_2|>?"},
            image_part(red),
            image_part(blue),
        ],
    ]
    data = server.post(input=batch).json()["data"]
    for entry, vector in zip(
        data,
        [
            content("a cat"),
            content("", "red"),
            content("What is in it?\n<image>", "blue"),
            content("<|image_1|> or <|image_2|>?", "red", "blue"),
        ],
        strict=True,
    ):
        np.testing.assert_array_equal(np.float32(entry["embedding"]), vector)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({}, "expected either input or messages"),
        ({"input": "a", "messages": []}, "expected either"),
        ({"input": "a", "tools": []}, "the field 'tools' is not known"),
        ({"input": ""}, "input: is empty"),
        ({"input": ["a", " \n"]}, r"input[1]: is empty"),
        ({"input": []}, "the list is empty"),
        ({"input": 7}, "input: is a number"),
        ({"input": ["a"] * 21}, "input: has 21 items; the limit is 20"),
        ({"input": [1, 2, 3]}, "input[0]: lists of token ids"),
        ({"input": [[1, 2, 3]]}, "check_embedding_ctx_length=False"),
        ({"input": [None]}, "input[0]: is null"),
        ({"input": [TEXT_PART]}, "input[0]: is a single part"),
        ({"input": [{"text": "a"}]}, 'expected {"content": ...}'),
        ({"input": ["<image> what is this"]}, "input[0]: the text has an image marker"),
        ({"input": [[{"type": "audio"}]]}, "input[0][0]: the type 'audio' is not known"),
        ({"input": [[image_part("x.png")]]}, "input[0]: expected a data URI"),
        ({"input": [[image_part("/etc/passwd")]]}, "input[0]: expected a data URI"),
        ({"input": [[image_part("file:///etc/passwd")]]}, "input[0]: expected a data URI"),
        (
            {"input": [[image_part("http://localhost/a.png")]]},
            "URLs are not fetched by this server",
        ),
        ({"input": [[image_part("data:image/png;base64,%%%")]]}, "is not valid base64"),
        ({"input": [[image_part("data:image/png;base64,")]]}, "is empty"),
        ({"input": [[image_part("data:image/png;base64,AAAA")]]}, "not an image of a known format"),
        ({"input": [[image_part(data_uri((101, 100)))]]}, "101 x 100 pixels; the limit is 10000"),
        ({"input": [[image_part(data_uri())] * 3]}, "has 3 images; the limit is 2"),
        (
            {"input": "a", "encoding_format": "int8"},
            "encoding_format: expected one of float, base64",
        ),
        ({"input": "a", "encoding_format": ["float"]}, "encoding_format: expected one of"),
        ({"input": "x" * (LONGEST + 1)}, "input: is too long"),
        ({"input": "a", "truncate_prompt_tokens": 5}, "expected -1 or 200"),
        ({"input": "a", "truncate": "yes"}, "truncate: expected true or false"),
        ({"messages": "a"}, "messages: expected a list"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "expected one user message"),
        (
            {"messages": [{"role": "system", "content": "Be brief."}]},
            "has a system prompt of its own",
        ),
    ],
)
def test_requests_that_are_refused(serve, fields, said):
    error = error_of(serve().post(**fields))
    assert said in error["message"]
    assert error["type"] == "invalid_request_error"


def test_long_items_are_cut_only_if_the_client_says_so(serve):
    server = serve()
    for fields in ({"truncate": True}, {"truncate_prompt_tokens": -1}):
        assert server.post(input="x" * (LONGEST + 1), **fields).status_code == 200


def test_one_bad_item(serve):
    server = serve()
    items = ["good", [image_part("data:image/png;base64,AAAA")], "also good"]
    error = error_of(server.post(input=items))
    assert error["param"] == "input[1]"
    assert error["code"] == "invalid_image"
    data = server.post(input=items, on_error="skip").json()["data"]
    assert [entry["index"] for entry in data] == [0, 1, 2]
    assert data[1]["embedding"] is None
    assert data[1]["error"]["message"] == error["message"]
    np.testing.assert_array_equal(np.float32(data[2]["embedding"]), vector_of("None also good []"))


def test_models(serve):
    server = serve()
    (model,) = server.get("/v1/models").json()["data"]
    assert model["id"] == "tiny"
    assert model["max_model_len"] == LONGEST
    assert server.get("/v1/models/tiny").json() == model
    for response in (server.post(input="a", model="gpt"), server.get("/v1/models/a/b")):
        error = error_of(response, 404)
        assert error["code"] == "model_not_found"
        assert "'tiny'" in error["message"]


def test_other_routes_and_methods(serve):
    server = serve()
    assert "there is no such route" in error_of(server.get("/nothing"), 404)["message"]
    response = server.get("/v1/embeddings")
    assert "the route has other methods" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"
    for path in ("/docs", "/openapi.json", "/..%2f..%2fetc/passwd", "//etc/passwd"):
        assert server.get(path).status_code == 404


def test_bodies_that_are_refused(serve):
    server = serve()

    def post(content, kind="application/json", **headers):
        return server.call(
            "POST", "/v1/embeddings", content=content, headers={"content-type": kind, **headers}
        )

    assert "is not valid JSON" in error_of(post(b"{"))["message"]
    assert "is not valid JSON" in error_of(post(b"\xff\xfe\x00"))["message"]
    assert "nested more than" in error_of(post(b"[" * 5000))["message"]
    assert "twice" in error_of(post(b'{"input": "a", "input": "b"}'))["message"]
    assert "not a JSON object" in error_of(post(b"[]"))["message"]
    for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert "Content-Type: application/json" in error_of(post(b"{}", kind), 415)["message"]
    error_of(post(b"{}", **{"content-encoding": "gzip"}), 415)
    large = json.dumps({"input": "x" * 100_000}).encode()
    assert error_of(post(large), 413)["code"] == "request_too_large"

    async def pieces():
        for _ in range(11):
            yield b" " * 10_000

    assert error_of(post(pieces()), 413)["code"] == "request_too_large"
    # Nothing is held afterwards.
    assert server.app._held._held == 0
    assert post(b'{"input": "a"}', "application/json; charset=utf-8").status_code == 200


def test_a_body_that_does_not_come(serve):
    limits = dataclasses.replace(SMALL, body_seconds=0.05)
    server = serve(limits)

    async def slow():
        yield b"{"
        await asyncio.sleep(20)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    sent = []

    async def call():
        waiting = slow()

        async def receive():
            return {"type": "http.request", "body": await anext(waiting), "more_body": True}

        async def send(message):
            sent.append(message)

        await server.app.asgi(scope, receive, send)

    asyncio.run(call())
    assert sent[0]["status"] == 408
    assert server.app._held._held == 0


def test_requests_beyond_the_memory_for_bodies(serve):
    limits = dataclasses.replace(SMALL, held_bytes=100)
    server = serve(limits)
    response = server.post(input="x" * 200, truncate=True)
    assert error_of(response, 429)["code"] == "queue_full"
    assert int(response.headers["retry-after"]) >= 1
    assert server.post(input="a").status_code == 200


def test_a_full_queue(serve):
    server = serve(deadline=0.0, workers=1)
    engine = server.engine
    engine.tokens_per_batch = 1
    engine.gate.clear()

    async def calls():
        tasks = [
            asyncio.create_task(
                server.request("POST", "/v1/embeddings", json={"input": ["a"] * 20})
            )
            for _ in range(12)
        ]
        await asyncio.wait(tasks, timeout=1.0)
        refused = [task.result() for task in tasks if task.done()]
        engine.gate.set()
        return refused, await asyncio.gather(*tasks)

    refused, answers = asyncio.run(calls())
    assert refused
    for response in refused:
        assert error_of(response, 429)["code"] == "queue_full"
        assert int(response.headers["retry-after"]) >= 1
    assert {response.status_code for response in answers} == {200, 429}
    assert server.batcher.unfinished == 0


def test_a_client_that_leaves_gives_up_its_items(serve):
    server = serve(deadline=0.0)
    server.engine.gate.clear()
    body = json.dumps({"input": [f"gone {n}" for n in range(20)]}).encode()
    scope = {
        "type": "http", "method": "POST", "path": "/v1/embeddings", "headers": [(b"content-type", b"application/json")],
    }  # fmt: skip
    sent = []

    async def call():
        messages = [{"type": "http.request", "body": body}]

        async def receive():
            if messages:
                return messages.pop()
            await asyncio.sleep(0.05)
            return {"type": "http.disconnect"}

        async def send(message):
            sent.append(message)

        await server.app.asgi(scope, receive, send)

    asyncio.run(call())
    assert not sent
    assert server.batcher.unfinished == server.batcher.waiting == 0
    server.engine.gate.set()
    assert server.post(input="a").status_code == 200
    text = server.get("/metrics").text
    assert 'llave_requests_total{route="embeddings",status="499"} 1.0' in text
    assert 'llave_items_total{kind="text",outcome="cancelled"} 20.0' in text


def test_a_request_that_takes_too_long(serve):
    server = serve(dataclasses.replace(SMALL, request_seconds=0.05))
    server.engine.gate.clear()
    assert error_of(server.post(input="a"), 504)["code"] == "timeout"
    assert server.batcher.unfinished == 0
    server.engine.gate.set()


def test_a_device_that_fails_is_the_servers_error(serve):
    server = serve()
    server.engine.broken = "forward"
    error = error_of(server.post(input="POISON"), 500)
    assert error["type"] == "server_error"
    assert "out of memory" not in error["message"]
    assert server.post(input="a").status_code == 200


def test_an_error_of_the_server_tells_nothing(serve, monkeypatch, caplog):
    server = serve()
    monkeypatch.setattr(server.batcher, "submit", lambda *_, **__: 1 / 0)
    error = error_of(server.post(input="a"), 500)
    assert error["message"] == "the server failed to answer; its log says why"
    assert "ZeroDivisionError" in caplog.text


def test_before_it_is_ready_and_when_it_ends(serve):
    server = serve(start=False)
    assert server.get("/health").status_code == 200
    for response in (server.get("/ready"), server.post(input="a"), server.get("/v1/models")):
        assert error_of(response, 503)["code"] == "loading"
        assert response.headers["retry-after"] == "5"
    server.app.start(Model("tiny", DIMENSION, LONGEST), server.batcher)
    assert server.get("/ready").status_code == 200
    server.app.drain()
    assert server.get("/health").status_code == 200
    for response in (server.get("/ready"), server.post(input="a")):
        assert error_of(response, 503)["code"] == "shutting_down"


def test_health_notices_a_dead_thread(serve):
    server = serve()
    server.batcher.close(1.0)
    assert server.get("/health").status_code == 500


def test_api_keys(serve):
    server = serve(keys=["first-key", "second-key"])
    for path in ("/health", "/ready"):
        assert server.get(path).status_code == 200
    for path in ("/v1/models", "/metrics", "/nothing"):
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic first-key"},
            {"authorization": "Bearer"},
            {"authorization": b"Bearer \xff\xfe"},
        ):
            response = server.get(path, headers=headers)
            assert error_of(response, 401)["code"] == "invalid_api_key"
            assert response.headers["www-authenticate"] == "Bearer"
    for key in ("first-key", "second-key"):
        assert (
            server.get("/v1/models", headers={"authorization": f"Bearer {key}"}).status_code == 200
        )


def test_a_name_that_leads_here_from_elsewhere(serve):
    server = serve(hosts=("localhost", "127.0.0.1", "[::1]"))
    for name in ("localhost", "LOCALHOST:8000", "127.0.0.1:80", "[::1]", "[::1]:8000"):
        assert server.get("/health", headers={"host": name}).status_code == 200
    for name in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost:x"):
        assert server.get("/health", headers={"host": name}).status_code == 421
    assert serve().get("/health", headers={"host": "any.example"}).status_code == 200


def test_headers_of_every_response(serve):
    server = serve()
    responses = [
        server.get("/health"),
        server.get("/nothing"),
        server.post(input=""),
        server.get("/metrics"),
    ]
    for response in responses:
        for name, value in HEADERS.items():
            assert response.headers[name] == value
        assert not [name for name in response.headers if name.startswith("access-control")]
        assert "server" not in response.headers
    policy = dict(
        rule.strip().split(" ", 1) for rule in HEADERS["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'"
    assert "http" not in " ".join(policy.values())


def test_metrics(serve):
    server = serve()
    server.post(input=["a", "b", [image_part(data_uri())]])
    server.post(input="")
    text = server.get("/metrics").text
    for line in (
        'llave_requests_total{route="embeddings",status="200"} 1.0',
        'llave_requests_total{route="embeddings",status="400"} 1.0',
        'llave_items_total{kind="text",outcome="ok"} 2.0',
        'llave_items_total{kind="image",outcome="ok"} 1.0',
        "llave_queue_items 0.0",
        "llave_ready 1.0",
        'llave_request_seconds_count{route="embeddings"} 2.0',
        'llave_stage_seconds_count{stage="prepare"} 3.0',
    ):
        assert line in text
    assert "llave_batch_fill_bucket" in text
    assert "process_resident_memory_bytes" in text


def test_a_video(serve):
    server = serve()
    frames = [data_uri(color=c, kind="jpeg").split(",")[1] for c in ("red", "blue")]
    part = {"type": "video_url", "video_url": {"url": "data:video/jpeg;base64," + ",".join(frames)}}
    assert server.post(input=[[part, TEXT_PART]]).status_code == 200
    for broken, said in (
        ("A" * 8, "not an image"),
        ("", "has 0 frames"),
        (",".join("A" * 99), "99 frames"),
    ):
        part = {"type": "video_url", "video_url": {"url": f"data:video/jpeg;base64,{broken}"}}
        assert said in error_of(server.post(input=[[part]]))["message"]
    pytest.importorskip("av")
    part = {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAAAAAA"}}
    error = error_of(server.post(messages=[{"role": "user", "content": [part]}]))
    assert "not a readable video" in error["message"]
    assert "llave-" not in error["message"]


def test_the_page_is_served_if_there_is_one(serve, tmp_path, monkeypatch):
    assert serve().get("/").status_code in (200, 404)
    for name, text in {"index.html": "<p>hello", "page.js": "1", "_draft.js": "2"}.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("llave_jax.serving.app.PAGE", tmp_path)
    server = serve(keys=["key"])
    assert server.get("/").text == server.get("/index.html").text == "<p>hello"
    assert server.get("/").headers["content-type"].startswith("text/html")
    assert server.get("/page.js").headers["content-type"].startswith("text/javascript")
    assert server.get("/_draft.js").status_code == 401
