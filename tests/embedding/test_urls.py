"""Pictures that lines name by URLs, from a server on this machine."""

import functools
import http.server
import io
import json
import threading

import numpy as np
import PIL.Image
import pytest

from llave_jax.common.fetch import Fetcher
from llave_jax.embedding import bulk
from llave_jax.embedding.item_sources import open_items
from llave_jax.inputs.content import item_key
from llave_jax.inputs.item import Item
from tests.embedding.test_embed import FakeEmbedder
from tests.evaluation.fake_encoder import hash_vector


def picture(colour):
    file = io.BytesIO()
    PIL.Image.new("RGB", (4, 4), (colour, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def served():
    """The address of a server, and what it was asked for."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            name = self.path.strip("/")
            self.send_response(200 if name.isdigit() else 404)
            self.end_headers()
            if name.isdigit():
                self.wfile.write(picture(int(name)))

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_pictures_are_fetched_once(served, tmp_path, monkeypatch):
    root, asked = served
    lines = [{"image": f"{root}/{i}", "id": i} for i in range(5)]
    lines[2]["image"] = f"{root}/nothing"
    (tmp_path / "i.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    source = open_items(tmp_path / "i.jsonl", allow_urls=True)

    def run(**options):
        return bulk.embed_file(FakeEmbedder(), source, tmp_path / "out", "model", **options)

    # This machine is no public address.
    with pytest.raises(ValueError, match=r"i\.jsonl:1: http://127\.0\.0\.1"):
        run()
    assert asked == []
    fetcher = functools.partial(Fetcher, may_connect=lambda address: True)
    monkeypatch.setattr(bulk, "Fetcher", fetcher)
    with pytest.raises(ValueError, match=r"i\.jsonl:3: http://.*/nothing: .* answers 404"):
        run()
    asked.clear()
    assert run(on_error="skip")[1:3] == (4, 1)
    assert sorted(asked) == ["/0", "/1", "/3", "/4", "/nothing"]
    expected = [hash_vector(item_key(Item(images=(picture(i),)))) for i in (0, 1, 3, 4)]
    np.testing.assert_array_equal(np.load(tmp_path / "out" / "embeddings.npy"), expected)
    asked.clear()
    assert run(on_error="skip")[1:3] == (4, 1)
    assert asked == []
    # Another URL is another picture.
    (tmp_path / "i.jsonl").write_text(json.dumps({"image": f"{root}/7"}) + "\n")
    assert run()[1:3] == (1, 0)
    assert asked == ["/7"]
