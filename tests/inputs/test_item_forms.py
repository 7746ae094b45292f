"""Forms of items: what each one is to the model, and what is refused with which words."""

import base64
import io
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import PIL.Image
import pytest
from hypothesis import given

from llave_jax.common.fetch import Fetcher
from llave_jax.inputs.data_uri import decode_data_uri
from llave_jax.inputs.images import load_image
from llave_jax.inputs.item import Item
from llave_jax.inputs.item_forms import is_one_item, is_text, read_item

PIXELS = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
PICTURE = PIL.Image.fromarray(PIXELS)
_file = io.BytesIO()
PICTURE.save(_file, "PNG")
PNG = _file.getvalue()
URI = "data:image/png;base64," + base64.b64encode(PNG).decode()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a picture.PNG"
    path.write_bytes(PNG)
    return path


@pytest.fixture(scope="module")
def url():
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(PNG)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/a.png"
    server.shutdown()


def test_every_form_of_an_image_has_the_same_pixels(path, url):
    fetch = Fetcher(None, may_connect=lambda address: True)
    images = [path, str(path), PNG, bytearray(PNG), memoryview(PNG), PICTURE, PIXELS, URI, url]
    images += [PIL.Image.fromarray(np.dstack([PIXELS, PIXELS[..., 0]])), URI.replace("=", "")]
    for image in images:
        item = read_item({"text": "a", "image": image}, "row", fetch)
        np.testing.assert_array_equal(np.asarray(load_image(item.images[0])), PIXELS)
        assert read_item({"images": [image]}, "row", fetch).images == item.images or image is PIXELS
        frames = read_item({"video": [image, PIXELS]}, "row", fetch).video
        np.testing.assert_array_equal(np.asarray(load_image(frames[0])), PIXELS)
        if not isinstance(image, str):
            np.testing.assert_array_equal(
                np.asarray(load_image(read_item(image, "row").images[0])), PIXELS
            )
    assert read_item(Path("a/clip.MP4"), "row").video == Path("a/clip.MP4")
    assert len(read_item({"video": np.stack([PIXELS] * 4)}, "row").video) == 4


def test_a_string_is_a_text(path, url, caplog):
    for text in ("photo.jpg", url, "data:"):
        assert read_item(text, "row") == Item(text, name="row")
    assert not caplog.records
    read_item(str(path), "row 3")
    (record,) = caplog.records
    assert "row 3: the text" in record.message
    assert "pathlib.Path" in record.message


PARTS = {
    "text": {"type": "text", "text": "What is it?"},
    "image_url": {"type": "image_url", "image_url": {"url": URI}},
    "plain image_url": {"type": "image_url", "image_url": URI},
    "input_image": {"type": "input_image", "image_url": URI},
    "image": {"type": "image", "image": PICTURE},
    "video": {"type": "video", "video": [PICTURE]},
}


@pytest.mark.parametrize("kind", ["image_url", "plain image_url", "input_image", "image"])
@pytest.mark.parametrize("around", [False, True])
def test_messages(kind, around):
    user = {"role": "user", "content": [PARTS[kind], PARTS["text"]]}
    messages = [user]
    if around:
        system = [{"type": "text", "text": "You are a helpful assistant."}]
        messages = [
            {"role": "system", "content": system},
            user,
            {"role": "assistant", "content": ""},
        ]
    for form in (messages, {"messages": messages}, user if not around else messages):
        item = read_item(form, "row")
        assert item.text == "<image>\nWhat is it?"
        np.testing.assert_array_equal(np.asarray(load_image(item.images[0])), PIXELS)
    text = {"role": "user", "content": "hello"}
    assert read_item([text], "row") == Item("hello", name="row")
    marked = {"type": "text", "text": "before <image> after"}
    item = read_item([{"role": "user", "content": [PARTS[kind], marked]}], "row")
    assert item.text == marked["text"]
    assert read_item([{"role": "user", "content": [PARTS["video"]]}], "row").video == [PICTURE]


@given(data=st.binary(min_size=1, max_size=99), url_safe=st.booleans(), padded=st.booleans())
def test_data_uris(data, url_safe, padded):
    encode = base64.urlsafe_b64encode if url_safe else base64.b64encode
    text = encode(data).decode()
    text = text if padded else text.rstrip("=")
    assert decode_data_uri(f"data:Image/PNG;base64,{text[:2]}\n {text[2:]}") == ("image/png", data)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (7, "row: is int; expected a text"),
        (None, "row: is NoneType; expected a text"),
        (PIXELS.transpose(2, 0, 1), r"row: .*\(3, 5, 7\), which looks like \[channels, H, W\]"),
        (PIXELS.astype(np.float32), "row: the image is of float32; expected uint8"),
        (PIXELS[None], r"row: the image has shape \(1, 5, 7, 3\); expected \[H, W, 3\]"),
        (PIXELS[:0], "row: the image has shape"),
        ({"image": 7}, "row: an image is int; expected a path"),
        ({"images": [PNG, {}]}, "row: an image is dict; expected a path"),
        ({"image": "data:image/png;base64,!"}, "row: the data URI is not valid base64"),
        ({"image": "data:image/png"}, "row: not a data URI"),
        ({"image": "https://a.test/b.png"}, "row: the image is a URL .*: allow_urls=True"),
        ({"video": "https://a.test/b.mp4"}, "row: the video is https://a.test"),
        ({"video": PIXELS}, r"row: the video has shape \(5, 7, 3\); expected \[frames"),
        ({"video": 3}, "row: the video is int; expected the path"),
        (URI, r"row: a text that is the data URI of an image .*; write {\"image\": ...}"),
        (["a", "b"], "row: message 0: expected"),
        ([], "row: the messages have none of the user"),
        ([{"role": "user", "content": "a"}] * 2, "row: message 1 is of 'user'; expected one"),
        ([{"role": "system", "content": "Be brief."}], "row: message 0 is of 'system'"),
        ([{"role": "user", "content": [{"type": "audio"}]}], "row: a part of the content"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "row: a part of the content"),
        (
            [{"role": "user", "content": [PARTS["video"], PARTS["image"]]}],
            "row: expected images or",
        ),
        ([{"role": "user", "content": 3}], "row: content is int"),
        ({"messages": [], "text": "a"}, "row: has messages and other keys"),
        ([{"role": "user", "content": ""}], "row: is empty"),
    ],
)
def test_what_is_refused(value, message):
    with pytest.raises(ValueError, match=message) as raised:
        read_item(value, "row")
    assert len(str(raised.value)) < 400


def test_private_addresses_are_not_fetched_from(url):
    with pytest.raises(
        ValueError, match=r"row: http.*: 127\.0\.0\.1 is not on the public internet"
    ):
        read_item({"image": url}, "row", Fetcher(None))


def test_one_item_or_several():
    message = {"role": "user", "content": "a"}
    one = ["a", b"a", Path("a"), PICTURE, PIXELS, {"text": "a"}, Item("a"), [message], (message,)]
    several = [["a"], [], [[message]], np.array(["a", "b"]), np.stack([PIXELS] * 2), iter("ab")]
    assert all(map(is_one_item, one))
    assert not any(map(is_one_item, several))
    assert all(map(is_text, ("a", {"text": "a", "image": None}, Item("a"))))
    assert not any(
        map(is_text, (PIXELS, {"image": "a"}, [message], Item(images=(None,), text="<image>")))
    )
