"""The command: a real process with a real model, and the clients that people use."""

import base64
import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from llave_jax import Embedder, serve
from tests.serving.in_process import data_uri, image_part

ROOT = Path(__file__).parents[2]
KEY = "a-key-of-the-test"


@contextlib.contextmanager
def started(*flags, **environment):
    """A server that is ready, with its `url`."""
    command = [sys.executable, "-m", "llave_jax.serve", "--port", "0", *map(str, flags)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | environment, stderr=subprocess.PIPE, text=True
    )
    try:
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r"(http://\S+): ready", line):
                process.url = found[1]
                break
        else:
            pytest.fail("".join(said))
        yield process
    finally:
        process.kill()
        process.communicate()


def make_index(path, model, directory, images, vectors):
    pytest.importorskip("lancedb")
    from llave_jax.embedding.run_info import settings_of
    from llave_jax.search.columns import Row
    from llave_jax.search.index import Index
    from llave_jax.weights.fingerprint import model_fingerprint

    fingerprint = model_fingerprint(directory, model.model.dtype, model.config)
    made_by = settings_of(str(directory), model, fingerprint)
    rows = [Row(id=f"{n}.png", kind="image", thumbnail=image) for n, image in enumerate(images)]
    with Index.create(path, vectors.shape[1], model=made_by) as index:
        index.add(rows, vectors)
    return path


@pytest.mark.slow
def test_openais_client(golden_model, tmp_path):
    openai = pytest.importorskip("openai")
    texts = ["a cat", "two dogs and a very long text about them " * 3, "x"]
    images = [data_uri(color="red"), data_uri((90, 40), "blue", "jpeg")]
    model = Embedder.from_pretrained(golden_model.directory)
    encoded = [base64.b64decode(uri.split(",")[1]) for uri in images]
    expected_texts = model.encode(texts)
    expected_images = model.encode([{"image": image, "text": "What is it?"} for image in encoded])
    index = make_index(
        tmp_path / "i.lance", model, golden_model.directory, encoded, expected_images
    )
    flags = ("--model", golden_model.directory, "--index", index)
    with started(*flags, LLAVE_API_KEYS=KEY) as process:
        client = openai.OpenAI(base_url=process.url + "/v1", api_key=KEY)
        (served,) = client.models.list().data
        assert served.id == golden_model.directory.name
        answer = client.embeddings.create(model=served.id, input=texts)
        vectors = np.float32([entry.embedding for entry in answer.data])
        np.testing.assert_allclose(vectors, expected_texts, atol=1e-5)
        assert answer.usage.prompt_tokens == sum(len(model.prepare(text)) for text in texts)
        one = client.embeddings.create(
            model=served.id, input=texts[0], encoding_format="float", dimensions=5
        )
        first = expected_texts[0, :5] / np.linalg.norm(expected_texts[0, :5])
        np.testing.assert_allclose(np.float32(one.data[0].embedding), first, atol=1e-5)
        # Images: as items of a batch, and as vLLM's messages.
        contents = [[image_part(uri), {"type": "text", "text": "What is it?"}] for uri in images]
        answer = client.embeddings.create(model=served.id, input=contents)
        vectors = np.float32([entry.embedding for entry in answer.data])
        np.testing.assert_allclose(vectors, expected_images, atol=1e-5)
        answer = client.post(
            "/embeddings",
            cast_to=openai.types.CreateEmbeddingResponse,
            body={
                "messages": [{"role": "user", "content": contents[1]}],
                "encoding_format": "float",
            },
        )
        np.testing.assert_allclose(
            np.float32(answer.data[0].embedding), expected_images[1], atol=1e-5
        )
        with pytest.raises(
            openai.BadRequestError, match=r"input\[1\]: the data URI is not valid base64"
        ) as raised:
            client.embeddings.create(
                model=served.id, input=["a", [image_part("data:image/png;base64,?")]]
            )
        assert raised.value.param == "input[1]"
        with pytest.raises(openai.NotFoundError, match="is not served here"):
            client.embeddings.create(model="text-embedding-3-small", input="a")
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=process.url + "/v1", api_key="x").models.list()
        query = {"image": images[1], "text": "What is it?", "k": 2}
        headers = {"Authorization": f"Bearer {KEY}"}
        found = httpx.post(process.url + "/search", json=query, headers=headers, timeout=20).json()
        assert [hit["id"] for hit in found["results"]] == ["1.png", "0.png"]
        assert found["results"][0]["score"] == pytest.approx(1.0, abs=1e-5)
        thumbnail = httpx.get(process.url + found["results"][0]["thumbnail"], headers=headers)
        assert thumbnail.content == encoded[1]
        # No answer tells where the model lies.
        everything = httpx.get(
            process.url + "/v1/models", headers={"Authorization": f"Bearer {KEY}"}
        ).text
        assert str(golden_model.directory.parent) not in everything
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        assert "Traceback" not in errors


def the_one_error(flags, capsys):
    """The line that a command with a mistake ends with."""
    assert serve.main(flags) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    return line


def test_an_index_that_is_none_ends_the_command_with_one_line(golden_model, tmp_path, capsys):
    flags = ["--model", str(golden_model.directory), "--index", str(tmp_path)]
    has_library = importlib.util.find_spec("lancedb") is not None
    expected = "is no index" if has_library else "pip install 'llave_jax[search]'"
    assert expected in the_one_error(flags, capsys)


def test_mistakes_end_the_command_with_one_line(golden_model, tmp_path, capsys):
    (tmp_path / "keys").write_text("# no key\n\n")
    model = ["--model", str(golden_model.directory)]
    for flags, said in (
        ([*model, "--host", "no-such-host.invalid"], "is no address of this machine"),
        ([*model, "--api-keys", str(tmp_path / "keys")], "has no key; expected one a line"),
        ([*model, "--api-keys", str(tmp_path / "absent")], "No such file"),
        ([*model, "--allow-url", "http://a/b"], "--allow-url http://a/b: expected a host"),
        ([*model, "--max-items", "0"], "limit items: expected a positive number"),
        (["--model", str(tmp_path / "absent"), "--port", "0"], "absent"),
    ):
        assert said in the_one_error(flags, capsys)


def test_keys_come_from_a_file_or_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "keys"
    file.write_text("one\n# not this\n two \n")
    monkeypatch.setenv(serve.KEYS_VARIABLE, "three, four")
    assert serve._api_keys(str(file)) == ["one", "two"]
    assert serve._api_keys(None) == ["three", "four"]
    monkeypatch.delenv(serve.KEYS_VARIABLE)
    assert serve._api_keys(None) == []


@pytest.mark.parametrize(
    "flags", ["--port 65536", "--port -1", "--workers 0", "--deadline-ms -1", "--drain nan"]
)
def test_numbers_that_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as ended:
        serve.parse_args(["--model", "m", *flags.split()])
    assert ended.value.code == 2
    assert f"{flags}: expected" in capsys.readouterr().err


def test_host_names():
    def names(*flags):
        return serve._host_names(serve.parse_args(["--model", "m", *flags]))

    assert names() == ["localhost", "127.0.0.1", "[::1]", "127.0.0.1"]
    assert "photos.lan" in names("--host-name", "photos.lan")
    assert "[::1]" in names("--host", "::1")
    assert names("--host", "0.0.0.0") is None
    assert names("--host", "0.0.0.0", "--host-name", "a") == ["a"]
