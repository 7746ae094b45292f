"""The Embedder: order, forms of items, batches, items that cannot be read."""

import contextlib
import json
import weakref
from pathlib import Path

import jax
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llave_jax.embedding.embedder import Embedder
from llave_jax.embedding.shapes import ladder
from llave_jax.inputs.item import Item, as_item
from llave_jax.models.llave import Llave
from llave_jax.parallel import sharding


@pytest.fixture(scope="module")
def embedder(golden_model):
    return Embedder.from_pretrained(golden_model.directory)


@pytest.fixture(scope="module")
def reference(golden):
    """Cases of the authors' dataset code: items and their embeddings."""
    cases = json.loads((golden / "cases.json").read_text())["cases"]
    embeddings = np.load(golden / "embeddings.npz")
    cases = [
        case
        for case in cases
        if case["route"] in ("dataset", "multi") and not case["name"].startswith("quirk")
    ]
    items = [
        Item(case["text"], tuple(str(golden / "images" / name) for name in case["images"]))
        for case in cases
    ]
    return items, np.stack([embeddings[f"{case['name']}/embedding"] for case in cases])


def test_reference(embedder, reference):
    items, expected = reference
    actual = embedder.encode(items)
    assert actual.dtype == np.float32
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(actual, axis=1), 1, atol=1e-6)


@settings(max_examples=5)
@given(data=st.data(), batch_size=st.sampled_from([None, 1, 3]))
def test_any_mix_in_any_order(data, batch_size, embedder, reference):
    items, expected = reference
    chosen = data.draw(st.lists(st.integers(0, len(items) - 1), min_size=1, max_size=12))
    actual = embedder.encode([items[i] for i in chosen], batch_size=batch_size)
    np.testing.assert_allclose(actual, expected[chosen], rtol=0, atol=1e-5)


def test_forms_of_items(embedder, golden):
    path = golden / "images" / "small.png"
    picture = PIL.Image.open(path)
    text = "Represent the given image."
    forms = [
        {"text": text, "image": str(path)},
        {"text": text, "image": picture},
        {"text": f"<image>\n{text}", "images": [path]},
        {"text": f"<|image_1|>\n{text}", "images": [path.read_bytes()]},
        Item(text, images=(path,)),
    ]
    vectors = embedder.encode(forms)
    np.testing.assert_allclose(vectors, np.broadcast_to(vectors[0], vectors.shape), atol=1e-6)
    assert np.abs(embedder.encode([picture]) - vectors[:1]).max() > 1e-3


def test_one_item_gives_one_vector(embedder, golden):
    path = str(golden / "images" / "small.png")
    for item in (
        "A cat and a dog",
        {"image": path, "text": "Represent the given image."},
        PIL.Image.open(path),
        Item("Represent the given image.", images=(path,)),
    ):
        vector = embedder.encode(item)
        assert vector.shape == (embedder.config.text.hidden_size,)
        assert vector.dtype == np.float32
        np.testing.assert_allclose(vector, embedder.encode([item])[0], rtol=0, atol=1e-6)


@pytest.mark.parametrize("slip", [Path("cat.jpg"), b"A cat"])
def test_one_slip_is_one_item(embedder, slip):
    with pytest.raises(ValueError, match=f"item 0: is {type(slip).__name__}; expected a text"):
        embedder.encode(slip)


def test_items_of_a_generator_are_not_kept(embedder):
    """Alive at once: what is read ahead of the device, whatever the number of items."""
    made, most = [], 0

    def items():
        nonlocal most
        for i in range(60):
            picture = PIL.Image.new("RGB", (20, 20), (4 * i, 0, 0))
            made.append(weakref.ref(picture))
            most = max(most, sum(ref() is not None for ref in made))
            yield picture
            del picture

    vectors = embedder.encode(items())
    assert vectors.shape == (60, embedder.config.text.hidden_size)
    assert most < 60 // 2
    assert len(np.unique(vectors.round(5), axis=0)) == 60


def test_many_batches_are_those_of_few(golden_model):
    model = Llave(golden_model.config, freeze_vision=True)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    small = Embedder(model, golden_model.params, golden_model.tokenizer, mesh, tokens_per_batch=256)
    texts = [f"caption {i} " + "word " * (i % 40) for i in range(101)]
    shapes = []
    forward = small.forward
    small.forward = lambda batch: shapes.append(batch.tokens.shape) or forward(batch)
    vectors = small.encode(texts)
    assert len(shapes) > 8
    assert set(shapes) <= {(1, b.rows, b.row_length) for b in ladder(model.config.input_spec, 256)}
    alone = [small.encode(texts[i]) for i in (0, 39, 100)]
    np.testing.assert_allclose(vectors[[0, 39, 100]], alone, rtol=0, atol=1e-5)


def test_unreadable_items_are_skipped(embedder, golden):
    fine = {"image": str(golden / "images" / "small.png")}
    vectors, failures = embedder.encode_skipping(
        ["a", {"image": "nowhere.png"}, fine, {"txt": ""}, "<image> b"]
    )
    assert list(failures) == [1, 3, 4]
    assert "nowhere.png" in failures[1]
    assert "unknown key" in failures[3]
    np.testing.assert_array_equal(vectors[[1, 3, 4]], 0)
    np.testing.assert_allclose(vectors[[0, 2]], embedder.encode(["a", fine]), rtol=0, atol=1e-5)


def test_a_missing_image_is_the_zero_picture_in_its_markers_place(embedder, golden):
    cases = {c["name"]: c for c in json.loads((golden / "cases.json").read_text())["cases"]}
    text = cases["quirk_token_without_image"]["text"]
    forms = [
        {"text": text, "image": None},
        {"text": text, "images": [None]},
        {"text": text.splitlines()[1] + " <image>", "image": None, "images": None, "video": None},
        Item(text, images=(None,)),
    ]
    expected = np.load(golden / "embeddings.npz")["quirk_token_without_image/embedding"]
    vectors = embedder.encode(forms)
    np.testing.assert_allclose(vectors, np.stack([expected] * 4), rtol=0, atol=1e-5)


def test_one_of_two_images_is_missing(embedder, golden):
    path = str(golden / "images" / "small.png")
    text = "First <image> then <image>."
    one, other, both = embedder.encode(
        [{"text": text, "images": i} for i in ([path, None], [None, path], [path, path])]
    )
    assert min(np.abs(a - b).max() for a, b in ((one, other), (one, both), (other, both))) > 1e-3


def test_without_a_marker_a_missing_image_is_none(embedder, golden):
    path = str(golden / "images" / "small.png")
    vectors = embedder.encode(
        [
            "A brown dog",
            {"text": "A brown dog", "image": None},
            {"text": "A brown dog", "images": [None]},
            {"text": "A brown dog", "images": [path]},
            {"text": "A brown dog", "images": [None, path]},
        ]
    )
    np.testing.assert_allclose(vectors[1:3], vectors[[0, 0]], atol=1e-6)
    np.testing.assert_allclose(vectors[4], vectors[3], atol=1e-6)


EMPTY = ["", " \n", {}, {"text": None}, {"text": "  "}, {"text": "", "images": []}]
EMPTY += [{"image": None}, {"images": [None]}, {"text": "\t", "image": None, "video": None}]


@pytest.mark.parametrize("item", EMPTY, ids=repr)
def test_an_empty_item_is_named(item, embedder):
    with pytest.raises(ValueError, match="item 1: is empty; expected a text, an image or a video"):
        embedder.encode(["fine", item])


def test_only_an_item_that_is_made_by_hand_may_be_empty(embedder, golden):
    expected = np.load(golden / "embeddings.npz")["text_empty/embedding"]
    np.testing.assert_allclose(embedder.encode([Item("")]), expected[None], rtol=0, atol=1e-5)


def test_nothing_to_encode(embedder):
    assert embedder.encode([]).shape == (0, embedder.config.text.hidden_size)


@pytest.mark.parametrize(
    ("item", "message"),
    [
        (7, "row 3: is int"),
        ({"txt": "a"}, r"row 3: unknown key\(s\) \['txt'\]"),
        ({"image": "a.png", "images": ["b.png"]}, "row 3: has both"),
        ({"text": 3}, "row 3: text is int"),
        ({"images": "a.png"}, "row 3: images is str; expected a list"),
        ({"text": "<image> <image>", "image": None}, "row 3: the text has 2 .* for 0"),
    ],
)
def test_what_is_no_item(item, message, embedder):
    with pytest.raises(ValueError, match=message):
        embedder.builder(as_item(item, "row 3"))


def test_unreadable_item_is_named(embedder):
    with pytest.raises(ValueError, match=r"item 1.*nowhere\.png"):
        embedder.encode(["fine", {"image": "nowhere.png"}])


@pytest.fixture(scope="module")
def warm(golden_model):
    model = Llave(golden_model.config, freeze_vision=True)
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    warm = Embedder(model, golden_model.params, golden_model.tokenizer, mesh, tokens_per_batch=1024)
    warm.warm_up()
    return warm


@contextlib.contextmanager
def counting_compilations():
    """Counts the programs that are compiled while the block runs."""
    compiled = []

    def note(event, duration, **_):
        if "compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(note)
    try:
        yield compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(note)


def picture(width, height):
    return PIL.Image.new("RGB", (width, height), (width % 256, height % 256, 7))


MIXTURES = st.lists(
    st.one_of(
        st.text("ab \n", min_size=1, max_size=3000).filter(str.strip),
        st.builds(lambda w, h: {"text": "a", "image": picture(w, h)}, *[st.integers(1, 900)] * 2),
        st.builds(lambda n: {"images": [picture(900, 3)] * n, "text": "many"}, st.integers(1, 9)),
        st.builds(lambda n: {"video": [picture(40, 40)] * n}, st.integers(1, 40)),
        st.just({"text": "<image> what?", "image": None}),
    ),
    min_size=1,
    max_size=12,
)


def test_counting_compilations():
    with counting_compilations() as compiled:
        jax.jit(lambda x: x + 3)(np.zeros(3))
    assert compiled


@settings(max_examples=15)
@given(items=MIXTURES, batch_size=st.sampled_from([None, 2]))
def test_nothing_compiles_after_warm_up(items, batch_size, warm):
    with counting_compilations() as compiled:
        vectors = warm.encode(items, batch_size)
        sequences = [warm.prepare(item) for item in items]
        found = np.zeros_like(vectors)
        places = list(range(len(items)))
        while sequences:
            batch, indices = warm.pack(sequences)
            out = np.asarray(warm.forward(batch))
            filled = indices >= 0
            found[[places[i] for i in indices[filled]]] = out[filled]
            left = sorted(set(range(len(sequences))) - set(indices[filled].tolist()))
            sequences, places = [sequences[i] for i in left], [places[i] for i in left]
    assert not compiled
    np.testing.assert_allclose(found, vectors, rtol=0, atol=2e-5)


def test_a_prompt_goes_behind_leading_markers(warm, golden):
    path = str(golden / "images" / "small.png")
    prompted = warm.prepare({"text": "<|image_1|>\nWhat is it?", "image": path}, prompt="Answer: ")
    expected = warm.prepare({"text": "<image>\nAnswer: What is it?", "image": path})
    np.testing.assert_array_equal(prompted.tokens, expected.tokens)


@pytest.mark.parametrize("item", [{"image": "a.png"}, {"video": "a.mp4"}, {"video": [Path("a")]}])
def test_files_can_be_refused(item, warm):
    with pytest.raises(ValueError, match="item: names a file"):
        warm.prepare(item, allow_paths=False)
