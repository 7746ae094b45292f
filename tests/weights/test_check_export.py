"""check_vectors.json and tools/check_export.py: what agrees, what does not, and which mistake it names."""

from __future__ import annotations

import http.server
import json
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from llave_jax import Embedder
from llave_jax.embedding import check_vectors
from llave_jax.embedding.check_vectors import MISTAKES
from llave_jax.weights import model_dir
from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.hf_processor import CHAT_TEMPLATE
from llave_jax.weights.to_hf import CHECK_VECTORS, convert_to_hf
from tools import check_export, convert_hf

jinja2 = pytest.importorskip("jinja2")  # comes with PyTorch

TEMPLATE = jinja2.Environment().from_string(CHAT_TEMPLATE)


@pytest.fixture(scope="module")
def export(golden_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "onevision"
    arguments = ["--to-hf", "onevision", "--input", str(golden_model.directory)]
    assert convert_hf.main([*arguments, "--output", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def check(export):
    return check_vectors.read(export)


@pytest.fixture
def run(export, capsys):
    def run(*flags, model=export):
        status = check_export.main(["--model", str(model), *flags])
        return SimpleNamespace(status=status, **capsys.readouterr()._asdict())

    return run


def test_the_export_itself(run, check):
    """What was embedded from the model directory is embedded again from the exported files."""
    found = run()
    assert (found.status, found.out.count("  same")) == (0, len(check.items))
    assert found.out.endswith("All vectors agree to the precision of float32.\n")


def test_mistakes_are_told_apart(check):
    """Their vectors differ from the right one and from each other by more than half precision does."""
    vectors = np.stack([check.vectors[0], *(mistake.vector for mistake in check.mistakes)])
    cosines = vectors @ vectors.T - np.eye(len(vectors))
    assert cosines.max() < check_vectors.CLOSE
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    for mistake in check.mistakes:
        rows = [check_vectors.compare(check, 0, mistake.vector.astype(np.float16))]
        assert rows[0].reason == mistake.name
        assert MISTAKES[mistake.name][1] in check_vectors.explain(rows)[0]


def rows_of(check, vectors):
    return [check_vectors.compare(check, index, vector) for index, vector in enumerate(vectors)]


def turned(vectors, index, angle):
    """The vectors with one turned by an angle."""
    other = np.random.default_rng(index).normal(size=vectors.shape[1])
    other -= other @ vectors[index] * vectors[index]
    changed = vectors.astype(np.float64)
    changed[index] = np.cos(angle) * vectors[index] + np.sin(angle) * other / np.linalg.norm(other)
    return changed


@pytest.mark.parametrize(
    ("change", "verdicts", "words"),
    [
        (lambda v: v, "ssssss", "precision of float32"),
        (lambda v: v.astype(ml_dtypes.bfloat16), "cccccc", "half precision"),
        (lambda v: v[:, :32] / np.linalg.norm(v[:, :32], axis=1)[:, None], "ssssss", "float32"),
        (lambda v: 7.5 * v, "zzzzzz", "not normalised"),
        (lambda v: turned(v, 1, 0.3), "sdssss", "not by a mistake that this check knows"),
        (lambda v: turned(v, 3, 0.3), "sssdss", "texts agree, images do not"),
        (lambda v: turned(v, 5, 0.3), "sssssd", "Only the image that is resized"),
        (lambda v: turned(v, 5, 0.01), "sssssc", "resized by another library"),
        (lambda v: np.pad(v, [(0, 0), (0, 1)]), "rrrrrr", "expected 64 numbers"),
        (lambda v: np.zeros_like(v), "rrrrrr", "the vector is zero"),
        (lambda v: v[::-1], "dddddd", "The texts differ"),
    ],
)
def test_verdicts(check, change, verdicts, words):
    rows = rows_of(check, change(check.vectors))
    letters = {"same": "s", "close": "c", "differs": "d", "scaled": "z", "refused": "r"}
    assert "".join(letters[row.verdict] for row in rows) == verdicts
    assert words in " ".join(check_vectors.explain(rows))


def test_weights_of_the_exports_precision(golden, tmp_path):
    """The vectors are those of the weights that were written, not of a run's float32."""
    from tests.weights.convert_checkpoints import write_hf

    convert_from_hf(
        write_hf(tmp_path / "hf", dtype="bfloat16"), tmp_path / "ours", show_progress=False
    )
    rng = np.random.default_rng(0)
    params = {
        path: np.asarray(array, np.float32)
        * (1 + 0.01 * rng.normal(size=array.shape)).astype(np.float32)
        for path, array in model_dir.open_params(tmp_path / "ours").items()
    }
    config = model_dir.load_config(tmp_path / "ours")
    model_dir.write_model_dir(tmp_path / "trained", config, params, source=tmp_path / "ours")
    convert_to_hf(tmp_path / "trained", tmp_path / "export", "onevision", show_progress=False)
    made = check_vectors.make(tmp_path / "trained")
    check_vectors.write(tmp_path / "export", made)
    exported = Embedder.from_pretrained(tmp_path / "export", dtype="float32")
    items = [item.item() for item in made.items[:3]]
    np.testing.assert_allclose(exported.encode(items), made.vectors[:3], rtol=0, atol=1e-5)


def test_an_older_models_vectors_do_not_stay(golden_model, export, tmp_path):
    convert_from_hf(export, tmp_path / "ours", show_progress=False)
    assert (tmp_path / "ours" / "source" / CHECK_VECTORS).is_file()
    convert_to_hf(tmp_path / "ours", tmp_path / "same", "onevision", show_progress=False)
    assert (tmp_path / "same" / CHECK_VECTORS).read_bytes() == (export / CHECK_VECTORS).read_bytes()
    params = {
        path: 2 * np.asarray(a) for path, a in model_dir.open_params(tmp_path / "ours").items()
    }
    model_dir.write_model_dir(
        tmp_path / "trained", golden_model.config, params, source=tmp_path / "ours"
    )
    convert_to_hf(tmp_path / "trained", tmp_path / "new", "onevision", show_progress=False)
    assert not (tmp_path / "new" / CHECK_VECTORS).exists()


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda path, values: path.unlink(), "--write"),
        (lambda path, values: path.write_text("{"), "not JSON"),
        (lambda path, values: path.write_text("{}"), "format is None"),
        (lambda path, values: values["items"][0].pop("embedding"), "KeyError"),
        (lambda path, values: values["items"][0].update(embedding="AAAA"), "is damaged"),
        (
            lambda path, values: values["items"][4].update(image="https://example.org/a.png"),
            "damaged",
        ),
        (lambda path, values: values.update(items=[]), "is damaged"),
    ],
)
def test_damaged_files(run, export, tmp_path, break_it, words):
    path = tmp_path / CHECK_VECTORS
    path.write_bytes((export / CHECK_VECTORS).read_bytes())
    values = json.loads(path.read_text())
    break_it(path, values)
    if path.is_file() and path.read_text().startswith('{\n  "format"'):
        path.write_text(json.dumps(values))
    found = run(model=tmp_path)
    assert found.status == 2
    assert words in found.err
    assert found.err.count("\n") == 1


class Vllm(http.server.BaseHTTPRequestHandler):
    """Answers as vLLM does: the chat template for `messages`, no template for `input`."""

    def do_GET(self):
        self.answer(200, {"data": [{"id": "the-model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        assert body["model"] == "the-model"
        assert self.headers["authorization"] == "Bearer secret"
        if "input" in body:
            (vector,) = check_vectors._embed_prompts(self.server.model, body["input"])
        else:
            ((message,),) = [body["messages"]]
            types = [part["type"] for part in message["content"]]
            if "image_url" in types and self.server.text_only:
                self.answer(400, {"error": {"message": "At most 0 image(s) may be provided"}})
                return
            prompt = TEMPLATE.render(messages=body["messages"])
            (content,) = [prompt.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]]
            images = [
                part["image_url"]["url"] for part in message["content"] if "image_url" in part
            ]
            item = next(i for i in self.server.check.items if i.data_uri in (images or [None]))
            image = {"image": item.open()} if images else {}
            vector = self.server.model.encode({"text": content, **image})
        self.answer(200, {"data": [{"embedding": vector.tolist()}]})

    def answer(self, status, values):
        content = json.dumps(values).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module")
def server(golden_model, check):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Vllm)
    server.model = Embedder.from_pretrained(golden_model.directory, dtype="float32")
    server.check, server.text_only = check, False
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_server(run, server, check):
    url = f"http://127.0.0.1:{server.server_port}/v1/embeddings"
    found = run("--url", url, "--api-key", "secret")
    assert found.status == 1
    assert "differs: no chat template" in found.out
    assert "input: The texts differ: the text was embedded without the chat template." in found.out
    assert "messages: All vectors agree to the precision of float32." in found.out
    found = run("--url", url, "--api-key", "secret", "--form", "messages", "--name", "the-model")
    assert (found.status, found.out.count("  same")) == (0, len(check.items))


def test_a_server_without_images(run, server, monkeypatch):
    monkeypatch.setattr(server, "text_only", True)
    url = f"http://127.0.0.1:{server.server_port}/v1/embeddings"
    found = run("--url", url, "--api-key", "secret", "--form", "messages")
    assert found.status == 1
    assert found.out.count("At most 0 image(s)") == 3
    assert found.out.count("  same") == 3


def test_no_server(run):
    found = run("--url", "http://127.0.0.1:9/v1/embeddings")
    assert found.status == 2
    assert "http://127.0.0.1:9/v1/models: no answer" in found.err
