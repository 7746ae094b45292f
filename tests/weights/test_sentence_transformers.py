"""An export in the OneVision layout, loaded by sentence-transformers: the vectors are this package's."""

from __future__ import annotations

import json
import shutil

import numpy as np
import PIL.Image
import pytest

from tests.weights.pytorch_images import import_torchvision

import_torchvision()
sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6")

import transformers  # noqa: E402

from llave_jax import Embedder  # noqa: E402
from llave_jax.weights.to_hf import convert_to_hf  # noqa: E402

PROMPT = "Find me an everyday image that matches the given caption: "
TEXTS = [
    "A cat and a dog",
    " blanks around ",
    "Zwölf 猫\nin two lines",
    "a text of many words " * 20,
]


def picture(width, height):
    """Coarse random colours, enlarged: resizing it again rounds like a photo."""
    colours = np.random.default_rng(width).integers(
        0, 256, (height // 16, width // 16, 3), np.uint8
    )
    return PIL.Image.fromarray(colours).resize((width, height), PIL.Image.Resampling.BICUBIC)


# One crop's size, which is not resized; wide and high; one that needs all tiles, scaled down.
PICTURES = [picture(*size) for size in ((224, 224), (300, 200), (200, 500), (640, 480))]
QUESTION = "What is it?"


def parts(*content):
    """A message of texts and pictures."""
    return [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": part}
                if isinstance(part, str)
                else {"type": "image", "image": part}
                for part in content
            ],
        }
    ]


# What sentence-transformers is given, and the same item as this package takes it.
FORMS = {
    "image": (lambda picture: picture, lambda picture: {"image": picture}),
    "image and text": (
        lambda picture: {"image": picture, "text": QUESTION},
        lambda picture: {"image": picture, "text": QUESTION},
    ),
    "text before the image": (
        lambda picture: {"text": QUESTION, "image": picture},
        lambda picture: {"image": picture, "text": QUESTION},
    ),
    "MMEB's marker": (
        lambda picture: {"image": picture, "text": f"<|image_1|>\n{QUESTION}"},
        lambda picture: {"image": picture, "text": f"<|image_1|>\n{QUESTION}"},
    ),
    "image between texts": (
        lambda picture: parts("Look:", picture, QUESTION),
        lambda picture: {"image": picture, "text": f"Look:\n<image>\n{QUESTION}"},
    ),
}


@pytest.fixture(scope="module")
def export(golden_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "onevision"
    convert_to_hf(golden_model.directory, path, "onevision", show_progress=False)
    return path


@pytest.fixture(scope="module")
def theirs(export):
    return sentence_transformers.SentenceTransformer(str(export), device="cpu")


@pytest.fixture(scope="module")
def ours(golden_model):
    return Embedder.from_pretrained(golden_model.directory, dtype="float32")


def test_settings(theirs, golden_model):
    assert [type(module).__name__ for module in theirs] == ["Transformer", "Pooling", "Normalize"]
    assert theirs[1].pooling_mode == "lasttoken"
    assert theirs.similarity_fn_name == "cosine"
    assert theirs.max_seq_length == golden_model.config.inputs.max_length
    assert theirs.prompts == {"query": "", "document": ""}


def test_texts(ours, theirs):
    """Alone, and in a batch whose shorter texts are padded."""
    expected = ours.encode(TEXTS)
    np.testing.assert_allclose(theirs.encode(TEXTS), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs.encode(TEXTS[0]), expected[0], rtol=0, atol=1e-5)
    prompted = ours.encode([PROMPT + text for text in TEXTS])
    np.testing.assert_allclose(theirs.encode(TEXTS, prompt=PROMPT), prompted, rtol=0, atol=1e-5)
    assert np.abs(prompted - expected).max() > 1e-2


@pytest.fixture(scope="module")
def with_pillow(theirs, export):
    """The same model, whose images are resized by Pillow: as the authors' code and this package do."""
    usual = theirs[0].processor.image_processor
    theirs[0].processor.image_processor = transformers.AutoImageProcessor.from_pretrained(
        export, backend="pil"
    )
    yield theirs
    theirs[0].processor.image_processor = usual


@pytest.fixture(scope="module")
def expected(ours):
    """Form -> our vectors of PICTURES."""
    items = [form(picture) for _, form in FORMS.values() for picture in PICTURES]
    vectors = ours.encode(items).reshape(len(FORMS), len(PICTURES), -1)
    return dict(zip(FORMS, vectors, strict=True))


def test_images_resized_by_torchvision(theirs, expected):
    """What everyone gets without asking: few pixels differ, by one or two of 255."""
    found, ours = theirs.encode(PICTURES), expected["image"]
    np.testing.assert_allclose(found[0], ours[0], rtol=0, atol=1e-5)
    assert (found * ours).sum(axis=1).min() > 0.9999


@pytest.mark.parametrize("form", FORMS)
def test_images_resized_by_pillow(with_pillow, expected, form):
    found = with_pillow.encode([FORMS[form][0](picture) for picture in PICTURES])
    np.testing.assert_allclose(found, expected[form], rtol=0, atol=1e-5)


def test_a_batch_of_texts_and_images(with_pillow, ours):
    wide = PICTURES[1]
    found = with_pillow.encode(
        [{"image": wide, "text": QUESTION}, "A cat", wide, {"text": "A dog"}]
    )
    expected = ours.encode([{"image": wide, "text": QUESTION}, "A cat", {"image": wide}, "A dog"])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_prompts_of_images(with_pillow, ours):
    """A prompt stands behind the image and in front of the text."""
    item = {"image": PICTURES[1], "text": QUESTION}
    found = with_pillow.encode(item, prompt=PROMPT)
    expected = ours.encode({**item, "text": PROMPT + QUESTION})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_a_text_that_is_too_long(theirs, ours, golden_model):
    """Cut at the same token; sentence-transformers then puts the pooled token back, unless told not to."""
    text = "many words " * golden_model.config.inputs.max_length
    cut = theirs.encode(text, processing_kwargs={"chat_template": {"restore_suffix": False}})
    np.testing.assert_allclose(cut, ours.encode(text), rtol=0, atol=1e-5)
    assert theirs.encode(text) @ cut < 0.999


def test_several_images_differ(theirs, ours):
    """transformers gives each of several images one crop; docs/export.md says so."""
    item = {"image": PICTURES[1:3], "text": QUESTION}
    expected = ours.encode({"images": PICTURES[1:3], "text": QUESTION})
    assert theirs.encode(item) @ expected < 0.99


def test_videos_are_refused(theirs):
    """Their layout is another one in transformers: the vectors would be wrong."""
    with pytest.raises(Exception, match="'video' is not supported"):
        theirs.encode({"video": np.zeros((2, 32, 32, 3), np.uint8)})


def test_named_prompts(golden_model, ours, tmp_path):
    shutil.copytree(golden_model.directory, tmp_path / "ours")
    (tmp_path / "ours" / "prompts.json").write_text(json.dumps({"query": PROMPT}))
    convert_to_hf(tmp_path / "ours", tmp_path / "hf", "onevision", show_progress=False)
    theirs = sentence_transformers.SentenceTransformer(str(tmp_path / "hf"), device="cpu")
    prompted, plain = ours.encode([PROMPT + TEXTS[0], TEXTS[0]])
    for found in (theirs.encode_query(TEXTS[0]), theirs.encode(TEXTS[0], prompt_name="query")):
        np.testing.assert_allclose(found, prompted, rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs.encode_document(TEXTS[0]), plain, rtol=0, atol=1e-5)
