"""Items as clients write them, through the real model's preparation."""

import dataclasses

import numpy as np
import pytest

from llave_jax import Embedder
from llave_jax.inputs.data_uri import decode_data_uri
from llave_jax.inputs.item import Item
from llave_jax.serving.engine import ModelEngine
from llave_jax.serving.items import ClientItem, ItemError, parse_content
from llave_jax.serving.settings import Limits
from tests.serving.in_process import TEXT_PART, data_uri, image_part


@pytest.fixture(scope="module")
def model(golden_model):
    return Embedder.from_pretrained(
        golden_model.directory, prompts={"query": "Find a picture of: "}
    )


@pytest.fixture(scope="module")
def engine(model):
    return ModelEngine(model, Limits())


def item(content, **changes):
    return dataclasses.replace(parse_content(content, "input[3]", Limits()), **changes)


def test_sequences_are_those_of_the_embedder(engine, model):
    _, encoded = decode_data_uri(data_uri())
    for content, expected in (
        ("a cat", "a cat"),
        ([TEXT_PART, image_part(data_uri())], Item("<image>\nWhat is in it?", (encoded,))),
        ([image_part(data_uri())], Item("", (encoded,))),
    ):
        for prompt in (None, "query"):
            ours = engine.prepare(item(content, prompt_name=prompt))
            theirs = model.prepare(expected, prompt_name=prompt)
            np.testing.assert_array_equal(ours.tokens, theirs.tokens)
            np.testing.assert_array_equal(ours.crops, theirs.crops)


def test_prompts(engine, model):
    ours = engine.prepare(item("a cat", prompt_name="query"))
    np.testing.assert_array_equal(ours.tokens, model.prepare("Find a picture of: a cat").tokens)


def test_long_items(engine, model):
    long = "a cat " * model.config.inputs.max_length
    with pytest.raises(
        ItemError, match=r"input\[3\]: has \d+ tokens, of which the model reads"
    ) as raised:
        engine.prepare(item(long))
    assert raised.value.code == "too_long"
    assert len(engine.prepare(item(long, truncate=True))) == model.config.inputs.max_length


def test_errors_name_the_field_once(engine):
    with pytest.raises(ItemError) as raised:
        engine.prepare(ClientItem("<image> and <image>", (data_uri(),), where="input[3]"))
    assert str(raised.value).startswith("input[3]: the text has 2 image marker(s) for 1 image(s)")


def test_no_file_of_the_server_is_read(engine, golden, monkeypatch):
    """Also if what reads a client's words should ever let a path through."""
    path = Item(images=(str(golden / "images" / "small.png"),))
    monkeypatch.setattr("llave_jax.serving.engine.load_item", lambda *arguments: path)
    with pytest.raises(ItemError, match="names a file"):
        engine.prepare(ClientItem(""))
