"""An export in the OneVision layout, loaded by sentence-transformers: the vectors are this package's."""

from __future__ import annotations

import numpy as np
import pytest

from tests.weights.pytorch_images import import_torchvision

import_torchvision()
sentence_transformers = pytest.importorskip("sentence_transformers", minversion="6")

from llave_jax import Embedder  # noqa: E402
from llave_jax.weights.to_hf import convert_to_hf  # noqa: E402

PROMPT = "Find me an everyday image that matches the given caption: "
TEXTS = [
    "A cat and a dog",
    " blanks around ",
    "Zwölf 猫\nin two lines",
    "a text of many words " * 20,
]


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
    """Alone and in a batch whose shorter texts are padded."""
    expected = ours.encode(TEXTS)
    np.testing.assert_allclose(theirs.encode(TEXTS), expected, rtol=0, atol=1e-5)
    np.testing.assert_allclose(theirs.encode(TEXTS[0]), expected[0], rtol=0, atol=1e-5)
    prompted = ours.encode([PROMPT + text for text in TEXTS])
    np.testing.assert_allclose(theirs.encode(TEXTS, prompt=PROMPT), prompted, rtol=0, atol=1e-5)
    assert np.abs(prompted - expected).max() > 1e-2
