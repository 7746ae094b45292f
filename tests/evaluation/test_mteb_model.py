"""mteb's own evaluation on tasks made here: retrieval over texts and images, no downloads."""

import doctest
import shutil

import numpy as np
import PIL.Image
import pytest

pytest.importorskip("mteb")

import datasets
import mteb
from mteb.abstasks.retrieval import AbsTaskRetrieval
from mteb.abstasks.task_metadata import TaskMetadata
from safetensors.numpy import load_file, save_file

from llave_jax.embedding.embedder import Embedder
from llave_jax.evaluation import mteb_model
from llave_jax.evaluation.mteb_model import MtebEncoder
from tests.evaluation.fake_encoder import hash_vector

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
INSTRUCTION = "Find an image of this colour."


def metadata(name, category, modalities):
    return TaskMetadata(
        name=name,
        description="Colours by their names.",
        dataset={"path": "nowhere/colours", "revision": "1"},
        type="Any2AnyRetrieval",
        category=category,
        modalities=modalities,
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="ndcg_at_10",
        prompt={"query": INSTRUCTION},
    )


class ColourRetrieval(AbsTaskRetrieval):
    metadata = metadata("ColourRetrieval", "t2i", ["text", "image"])

    def load_data(self, **kwargs):
        pictures = [PIL.Image.new("RGB", (8, 6), colour) for colour in COLOURS.values()]
        corpus = datasets.Dataset.from_dict(
            {"id": [f"d-{name}" for name in COLOURS], "image": pictures},
            features=datasets.Features({"id": datasets.Value("string"), "image": datasets.Image()}),
        )
        queries = datasets.Dataset.from_dict(
            {"id": [f"q-{name}" for name in COLOURS], "text": list(COLOURS)}
        )
        relevant = {f"q-{name}": {f"d-{name}": 1} for name in COLOURS}
        self.dataset = {
            "default": {
                "test": {
                    "corpus": corpus,
                    "queries": queries,
                    "relevant_docs": relevant,
                    "top_ranked": None,
                }
            }
        }
        self.data_loaded = True


class ColourEncoder:
    """Knows colours in texts and pictures; remembers the items."""

    def __init__(self):
        self.items = []

    def __call__(self, items):
        self.items += items
        return np.stack([hash_vector(self.colour(item).encode()) for item in items])

    @staticmethod
    def colour(item):
        if item.images:
            pixel = item.images[0].convert("RGB").getpixel((0, 0))
            return next(name for name, value in COLOURS.items() if value == pixel)
        return item.text.rsplit(" ", 1)[-1]


def make_model(encode):
    return MtebEncoder(encode, name="llave_jax/test", revision="1", dimension=16, max_length=512)


def test_retrieval_of_images_by_text():
    encode = ColourEncoder()
    results = mteb.evaluate(make_model(encode), ColourRetrieval(), cache=None, co2_tracker=False)
    (scores,) = results.task_results[0].scores["test"]
    assert scores["ndcg_at_10"] == 1.0
    texts = {item.text for item in encode.items}
    assert "Find an image of this colour: red" in texts
    assert "<image>\nRepresent the given image." in texts
    assert len(encode.items) == 6


def test_a_wrong_model_scores_low():
    def encode(items):
        return np.stack([hash_vector(f"{i}{item.text}".encode()) for i, item in enumerate(items)])

    results = mteb.evaluate(make_model(encode), ColourRetrieval(), cache=None, co2_tracker=False)
    assert results.task_results[0].scores["test"][0]["ndcg_at_10"] < 1.0


def test_models_of_one_name_share_no_results(golden_model, tmp_path, monkeypatch):
    """Two models in folders called alike, scored into one --output."""
    folders = [tmp_path / which / "model" for which in "ab"]
    for scale, folder in enumerate(folders, 1):
        shutil.copytree(golden_model.directory, folder)
        weights = load_file(folder / "model.safetensors")
        weights = {name: (scale * x).astype(x.dtype) for name, x in weights.items()}
        save_file(weights, folder / "model.safetensors")
    encoded = []
    encode = Embedder.encode
    monkeypatch.setattr(
        Embedder,
        "encode",
        lambda self, items, **k: encoded.append(len(items)) or encode(self, items),
    )
    monkeypatch.setattr(mteb, "get_tasks", lambda tasks: [ColourRetrieval()])
    counts = []
    for folder in [*folders, folders[0]]:
        mteb_model.main(["--model", str(folder), "--tasks", "x", "--output", str(tmp_path / "out")])
        counts.append(sum(encoded))
    assert counts == [6, 12, 12]
    assert len(list((tmp_path / "out").rglob("ColourRetrieval.json"))) == 2


def test_wording():
    assert doctest.testmod(mteb_model).failed == 0
    picture = PIL.Image.new("RGB", (4, 4))
    batch = {"text": ["a dog", None], "image": [picture, None], "id": ["1", "2"]}
    first, second = mteb_model.batch_items(batch, "", "task")
    assert (first.text, first.images) == ("<image>\na dog", (picture,))
    assert (second.text, second.images) == ("", ())


def test_other_modalities_are_refused():
    with pytest.raises(ValueError, match=r"task: inputs have columns \['audio'\]"):
        mteb_model.batch_items({"audio": [1]}, "", "task")
