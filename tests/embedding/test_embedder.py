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
        {"text": text, "image": np.asarray(picture.convert("RGB"))},
        [{"role": "user", "content": [{"type": "image", "image": path}, text]}],
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
    items = ["a", {"image": "nowhere.png"}, fine, {"txt": ""}, "<image> b"]
    vectors, failures = embedder.encode(items, on_error="skip")
    assert list(failures) == [1, 3, 4]
    assert "nowhere.png" in failures[1]
    assert "unknown key" in failures[3]
    np.testing.assert_array_equal(vectors[[1, 3, 4]], 0)
    np.testing.assert_allclose(vectors[[0, 2]], embedder.encode(["a", fine]), rtol=0, atol=1e-5)
    of_generator, again = embedder.encode(iter(items), on_error="skip")
    assert again == failures
    np.testing.assert_allclose(of_generator, vectors, rtol=0, atol=1e-5)
    streamed = list(embedder.encode_stream(items, on_error="skip"))
    assert [vector is None for vector in streamed] == [False, True, False, True, True]
    stream = embedder.encode_stream(items)
    np.testing.assert_allclose(next(stream), vectors[0], rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"item 1.*nowhere\.png"):
        next(stream)


def test_a_stream_keeps_the_order_and_holds_few_items(warm):
    """Texts and images wait for different batches."""
    given = answered = most = 0

    def items():
        nonlocal given, most
        for number in range(400):
            given += 1
            most = max(most, given - answered)
            text = f"number {number} " + "word " * (number % 40)
            yield {"text": text, "image": picture(60, 40)} if number % 7 == 3 else text

    vectors = []
    for vector in warm.encode_stream(items(), truncate_dim=16, precision="float16"):
        answered += 1
        vectors.append(vector)
    expected = warm.encode(items(), truncate_dim=16, precision="float16")
    np.testing.assert_allclose(np.array(vectors, np.float32), expected, rtol=0, atol=2e-3)
    assert expected.dtype == np.float16
    # What threads have read ahead, and what waits for four batches.
    assert most < 320 + 4 * warm.tokens_per_batch // 20


def test_prompts_and_precisions_as_sentence_transformers_has_them(golden_model, warm, golden):
    prompts = {"query": "Find an image: ", "passage": "Represent: ", "corpus": "no"}
    warm.prompts.update(prompts)
    try:
        text = "a dog"
        plain = warm.encode(text)
        query = warm.encode("Find an image: a dog")
        for vector in (
            warm.encode_query(text),
            warm.encode(text, prompt_name="query"),
            warm.encode(text, prompt_name="passage", prompt="Find an image: "),
            warm.encode_document([text], prompt_name="query")[0],
        ):
            np.testing.assert_allclose(vector, query, rtol=0, atol=1e-6)
        assert np.abs(query - plain).max() > 1e-3
        np.testing.assert_allclose(
            warm.encode_document(text), warm.encode("Represent: a dog"), rtol=0, atol=1e-6
        )
        with pytest.raises(ValueError, match="prompt_name is 'q'; this model's prompts are: query"):
            warm.encode(text, prompt_name="q")
    finally:
        warm.prompts.clear()
    np.testing.assert_allclose(warm.encode_query(text), plain, rtol=0, atol=1e-6)
    texts = ["a dog", "a cat", "a red car"]
    vectors = warm.encode(texts, show_progress_bar=False)
    np.testing.assert_array_equal(
        warm.encode(texts, precision="binary"), np.packbits(vectors > 0, axis=1).astype(int) - 128
    )
    assert warm.encode("a dog", precision="int8").dtype == np.int8
    assert warm.encode([], precision="binary").shape == (0, vectors.shape[1] // 8)
    short = warm.encode(texts, truncate_dim=8)
    np.testing.assert_allclose(np.linalg.norm(short, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(warm.similarity(short, short[1])[1], 1, atol=1e-6)
    np.testing.assert_allclose(
        warm.similarity_pairwise(vectors, warm.encode(texts, precision="int8")), 1, atol=1e-3
    )
    for options, message in (
        ({"precision": "int4"}, "precision is 'int4'"),
        ({"truncate_dim": 0}, "truncate_dim is 0"),
        ({"on_error": "ignore"}, "on_error is 'ignore'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            warm.encode(texts, **options)


@pytest.mark.slow  # imports PyTorch
def test_similarities_are_those_of_sentence_transformers():
    util = pytest.importorskip("sentence_transformers.util")
    first, second = np.random.default_rng(0).normal(size=(2, 5, 8)).astype(np.float32)
    expected = util.cos_sim(first, second[:3]).numpy()
    np.testing.assert_allclose(Embedder.similarity(first, second[:3]), expected, atol=1e-6)
    expected = util.pairwise_cos_sim(first, second).numpy()
    np.testing.assert_allclose(Embedder.similarity_pairwise(first, second), expected, atol=1e-6)


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
    # The same of an image alone, in any form.
    expected = warm.prepare({"text": "Answer: ", "image": path})
    message = {"role": "user", "content": [{"type": "image", "image": path}]}
    for item in ({"image": path}, message):
        prompted = warm.prepare(item, prompt="Answer: ")
        np.testing.assert_array_equal(prompted.tokens, expected.tokens)


@pytest.mark.parametrize("item", [{"image": "a.png"}, {"video": "a.mp4"}, {"video": [Path("a")]}])
def test_files_can_be_refused(item, warm):
    with pytest.raises(ValueError, match="item: names a file"):
        warm.prepare(item, allow_paths=False)
