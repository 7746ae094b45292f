"""mteb's wrapper of OpenAI's API, against a server, scores as the adapter does that calls the model itself."""

import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("mteb")
pytest.importorskip("openai")

import datasets
import mteb
import openai
from mteb.abstasks.sts import AbsTaskSTS
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.model_implementations.openai_models import OpenAIModel

from llave_jax import Embedder
from llave_jax.evaluation.mteb_model import MtebEncoder, model_meta
from tests.serving.threaded import served

SENTENCE = "a red cat sat on the green mat and looked at seven small birds in the tree"


class Sentences(AbsTaskSTS):
    """Pairs of sentences made here: the more words they share, the more they are alike."""

    metadata = TaskMetadata(
        name="Sentences",
        description="Sentences that share some of their words.",
        dataset={"path": "nowhere/sentences", "revision": "1"},
        type="STS",
        category="t2t",
        modalities=["text"],
        eval_splits=["test"],
        eval_langs=["eng-Latn"],
        main_score="cosine_spearman",
    )

    def load_data(self, **kwargs):
        words = SENTENCE.split()
        pairs = [
            (words[n : n + 6], words[n + 2 * (n % 4) : n + 2 * (n % 4) + 6]) for n in range(10)
        ]
        rows = {
            "sentence1": [" ".join(a) for a, _ in pairs],
            "sentence2": [" ".join(b) for _, b in pairs],
            "score": [float(len(set(a) & set(b))) for a, b in pairs],
        }
        self.dataset = {"test": datasets.Dataset.from_dict(rows)}
        self.data_loaded = True


def scores_of(model):
    results = mteb.evaluate(model, Sentences(), cache=None, co2_tracker=False)
    (scores,) = results.task_results[0].scores["test"]
    return scores


def test_the_same_score_through_the_server(golden_model, monkeypatch):
    embedder = Embedder.from_pretrained(golden_model.directory)
    dimension, length = embedder.config.text.hidden_size, embedder.config.inputs.max_length
    meta = model_meta("llave_jax/test", "1", dimension=dimension, max_length=length)
    adapter = MtebEncoder(embedder.encode, meta)
    # The wrapper counts OpenAI's tokens to cut long texts, which these are not; its vocabulary is a download.
    words = SimpleNamespace(encode=str.split, decode=" ".join)
    stand_in = SimpleNamespace(get_encoding=lambda name: words, Encoding=SimpleNamespace)
    monkeypatch.setitem(sys.modules, "tiktoken", stand_in)
    with served(embedder) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        wrapper = OpenAIModel("tiny", max_tokens=length, embed_dim=dimension, client=client)
        wrapper.mteb_model_meta = adapter.mteb_model_meta
        through_server = scores_of(wrapper)
    direct = scores_of(adapter)
    assert set(through_server) == set(direct)
    for name in ("cosine_spearman", "cosine_pearson", "main_score"):
        assert through_server[name] == pytest.approx(direct[name], abs=1e-6)
    assert len({round(value, 4) for value in direct.values() if isinstance(value, float)}) > 1
