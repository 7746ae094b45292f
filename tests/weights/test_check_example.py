"""tools/check_example.py: what it compares with what, and how it ends."""

from __future__ import annotations

import numpy as np
import pytest

from llave_jax.weights import model_dir
from tools import check_example
from tools.check_example import ANIMALS, CAPTION, PICTURE, PUBLISHED, QUESTION


class Released:
    """Embeds the example so that its cosines are those that the authors publish."""

    def __init__(self, published, error=0.0):
        self.published = published
        self.error = error

    def encode(self, items):
        values = dict(zip(ANIMALS, self.published.image_to_text, strict=True))
        captions = map(CAPTION.format, ANIMALS)
        values |= dict(zip(captions, self.published.text_to_image, strict=True))

        def vector(item):
            # On the axis of the picture: texts have their published cosine with it.
            if isinstance(item, dict):
                axis = {QUESTION: 0, PICTURE: 1}[item["text"]]
                return np.eye(3)[axis]
            cosine, axis = values[item] + self.error, int(item not in ANIMALS)
            return cosine * np.eye(3)[axis] + np.sqrt(1 - cosine**2) * np.eye(3)[2]

        return np.stack([vector(item) for item in items])


def run(monkeypatch, golden_model, golden, model=None, *flags):
    if model is not None:
        monkeypatch.setattr(check_example.Embedder, "from_pretrained", lambda *_, **__: model)
    picture = golden / "images" / "small.png"
    arguments = ["--model", str(golden_model.directory), "--image", str(picture), *flags]
    return check_example.main(arguments)


@pytest.mark.parametrize("size", PUBLISHED)
@pytest.mark.parametrize(("error", "status"), [(0.0, 0), (0.009, 0), (-0.009, 0), (0.011, 1)])
def test_agreement(monkeypatch, golden_model, golden, capsys, size, error, status):
    model = Released(PUBLISHED[size], error)
    assert run(monkeypatch, golden_model, golden, model, "--size", size) == status
    printed = capsys.readouterr().out
    for cosine in (*PUBLISHED[size].image_to_text, *PUBLISHED[size].text_to_image):
        assert f"{cosine + error:.4f}" in printed
        assert f"{cosine:.4f}" in printed
    assert printed.count("differs") == (5 if status else 0)


@pytest.mark.parametrize("direction", ["image_to_text", "text_to_image"])
def test_each_direction_counts(monkeypatch, golden_model, golden, direction):
    published = PUBLISHED["2B"]
    model = Released(published._replace(**{direction: (0.9, getattr(published, direction)[1])}))
    assert run(monkeypatch, golden_model, golden, model, "--size", "2B") == 1


def test_models_of_another_size_do_not_agree(monkeypatch, golden_model, golden):
    model = Released(PUBLISHED["7B"])
    assert run(monkeypatch, golden_model, golden, model, "--size", "2B") == 1


@pytest.mark.parametrize(("hidden_size", "size"), [(896, "0.5B"), (1536, "2B"), (3584, "7B")])
def test_the_size_is_told_by_the_embeddings(hidden_size, size):
    assert check_example.size_of(hidden_size) == size


@pytest.mark.parametrize(
    "dtype",
    ["bfloat16", *(pytest.param(d, marks=pytest.mark.slow) for d in ("float32", "float16"))],
)
def test_random_weights_differ(monkeypatch, golden_model, golden, capsys, dtype):
    assert run(monkeypatch, golden_model, golden, None, "--size", "0.5B", "--dtype", dtype) == 1
    out = capsys.readouterr().out
    assert "differs by more than 0.01" in out
    assert dtype in out
    assert "nan" not in out


def test_what_cannot_be_compared(monkeypatch, golden_model, golden, tmp_path, capsys):
    assert run(monkeypatch, golden_model, golden) == 2
    assert "have 64 dimensions, those of the released models 896 (0.5B)" in capsys.readouterr().err
    arguments = ["--model", str(tmp_path), "--image", "x.jpg"]
    assert check_example.main(arguments) == 2
    assert "neither a model directory nor a training run" in capsys.readouterr().err
    assert model_dir.is_model_dir(golden_model.directory)
    arguments = ["--model", str(golden_model.directory), "--image", "x.jpg", "--size", "7B"]
    assert check_example.main(arguments) == 2
    assert "x.jpg" in capsys.readouterr().err
