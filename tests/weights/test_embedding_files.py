"""What an export has for sentence-transformers and vLLM, and when; that it works: test_sentence_transformers.py."""

from __future__ import annotations

import json

import numpy as np
import pytest

from llave_jax.weights import model_dir
from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.hf_processor import CHAT_TEMPLATE
from llave_jax.weights.to_hf import convert_to_hf
from tests.weights.convert_checkpoints import write_hf

OF_CHATS = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def read(path):
    return json.loads(path.read_text())


def files(directory):
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of other weights than the OneVision checkpoint that it came from, which has templates everywhere."""
    path = tmp_path_factory.mktemp("trained")
    source = write_hf(path / "hf", "hub")
    for name in ("chat_template.json", "processor_config.json"):
        (source / name).write_text(json.dumps({"chat_template": OF_CHATS}))
    (source / "chat_template.jinja").write_text(OF_CHATS)
    assert "chat_template" in read(source / "tokenizer_config.json")
    convert_from_hf(source, path / "converted", show_progress=False)
    params = {
        name: np.asarray(array) * np.float32(1.5)
        for name, array in model_dir.open_params(path / "converted").items()
    }
    config = model_dir.load_config(path / "converted")
    model_dir.write_model_dir(path / "ours", config, params, source=path / "converted")
    convert_to_hf(path / "ours", path / "onevision", "onevision", show_progress=False)
    convert_to_hf(path / "ours", path / "llave", "llave", show_progress=False)
    return path


def test_one_chat_template_is_left(trained):
    target = trained / "onevision"
    assert (target / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert not (target / "chat_template.json").exists()
    for name in ("tokenizer_config.json", "processor_config.json"):
        assert "chat_template" not in read(target / name)


def test_modules(trained):
    target = trained / "onevision"
    modules = read(target / "modules.json")
    assert [module["path"] for module in modules] == ["", "1_Pooling", "2_Normalize"]
    # Versions of vLLM that know no others look for these names, and take the first key that is true.
    assert modules[1]["type"] == "sentence_transformers.models.Pooling"
    assert modules[2]["type"] == "sentence_transformers.models.Normalize"
    pooling = read(target / "1_Pooling" / "config.json")
    assert next(key for key, value in pooling.items() if value is True) == "pooling_mode_lasttoken"
    assert pooling["word_embedding_dimension"] == 64
    longest = read(target / "sentence_bert_config.json")["max_seq_length"]
    assert longest == model_dir.load_config(trained / "ours").inputs.max_length


def test_the_authors_layout_has_none_of_it(trained):
    added = files(trained / "llave") & files(trained / "onevision")
    assert not any("Pooling" in name or "sentence" in name or "modules" in name for name in added)


def test_new_prompts_are_a_change(tmp_path):
    """A OneVision checkpoint that becomes an embedding model by its prompts alone."""
    convert_from_hf(write_hf(tmp_path / "hf", "hub"), tmp_path / "ours", show_progress=False)
    assert convert_to_hf(tmp_path / "ours", tmp_path / "same", "onevision", show_progress=False)
    prompts = {"query": "Find: ", "document": ""}
    (tmp_path / "ours" / "prompts.json").write_text(json.dumps(prompts))
    assert not convert_to_hf(tmp_path / "ours", tmp_path / "new", "onevision", show_progress=False)
    settings = read(tmp_path / "new" / "config_sentence_transformers.json")
    assert settings["prompts"] == prompts
    assert settings["similarity_fn_name"] == "cosine"
