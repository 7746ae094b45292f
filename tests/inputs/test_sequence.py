"""From an item to a sequence: what is cut, what is said of it, and missing images."""

import dataclasses
import logging
import re

import numpy as np
import PIL.Image
import pytest

from llave_jax.embedding.embedder import Embedder
from llave_jax.inputs import cuts
from llave_jax.inputs import taps as T
from llave_jax.inputs.chat import chat_ids
from llave_jax.inputs.cuts import CutWarnings
from llave_jax.inputs.item import Item
from llave_jax.inputs.sequence import VISUAL_SLOT, SequenceBuilder, TokenSequence

LONG = "the red bicycle by the harbour wall " * 200


def with_inputs(config, **changes):
    return dataclasses.replace(config, inputs=dataclasses.replace(config.inputs, **changes))


def picture(width, height, value=40):
    return PIL.Image.new("RGB", (width, height), (value,) * 3)


@pytest.fixture(scope="module")
def builder(golden_model):
    return SequenceBuilder(golden_model.tokenizer, golden_model.config.input_spec)


ITEMS = [
    Item(LONG),
    Item("<image>\n" + LONG, (None,)),
    Item("<image>\n" + LONG, (picture(300, 300),)),
    Item(LONG + "<image> and <image>", (picture(30, 30), None)),
    Item("<image> and <image>", (picture(300, 300), picture(300, 300))),
    Item("A brown dog<|endoftext|> " + LONG),
    Item("<image>\nRepresent the given video.", video=[picture(20, 20)] * 30),
    Item("short"),
    Item("<image>\nshort<|endoftext|>", (None,)),
]


@pytest.mark.parametrize("limits", [(512, 512), (40, 512), (512, 100), (10**6, 20), (20, 10**6)])
def test_tokens_that_are_cut_are_counted(golden_model, builder, limits):
    """A text beyond its own limit as well as a sequence beyond the model's."""
    whole = SequenceBuilder(
        golden_model.tokenizer,
        with_inputs(golden_model.config, max_text_length=10**6, max_length=10**6).input_spec,
    )
    text_length, length = limits
    config = with_inputs(golden_model.config, max_text_length=text_length, max_length=length)
    cutting = SequenceBuilder(golden_model.tokenizer, config.input_spec)
    for item in ITEMS:
        expected, sequence = whole(item), cutting(item)
        assert expected.num_cut == 0
        assert sequence.num_cut == len(expected) - len(sequence)
        # Cutting a text first can only take away what comes after the cut.
        np.testing.assert_array_equal(sequence.tokens, expected.tokens[: len(sequence)])
        assert len(sequence) <= length


def test_a_cut_takes_zero_pictures_with_it(golden_model):
    text, images = "<image> a <image> b <image>", (None, picture(20, 20), None)
    patches = golden_model.config.vision.num_patches
    whole = SequenceBuilder(golden_model.tokenizer, golden_model.config.input_spec)(
        Item(text, images)
    )
    assert len(whole.crops) == 4
    assert whole.zero_crops == (0, 3)
    visual = np.flatnonzero(whole.tokens == VISUAL_SLOT)
    assert len(visual) == 2 * (patches + 1) + 2 * patches + 8 - 1
    for end, crops, zero in ((visual[-1] - 3, 4, (0, 3)), (visual[-patches - 1], 3, (0,))):
        config = with_inputs(golden_model.config, max_length=int(end))
        sequence = SequenceBuilder(golden_model.tokenizer, config.input_spec)(Item(text, images))
        assert (len(sequence.crops), sequence.zero_crops) == (crops, zero)
    config = with_inputs(golden_model.config, max_length=int(visual[0]) + 5)
    sequence = SequenceBuilder(golden_model.tokenizer, config.input_spec)(Item(text, images))
    assert (len(sequence.crops), sequence.zero_crops) == (1, (0,))


def test_a_text_beyond_its_limit_is_cut_with_a_warning(golden_model, caplog):
    embedder = Embedder.from_pretrained(golden_model.directory)
    texts = [LONG + "cat", "short", LONG + "airplane"]
    vectors = embedder.encode(texts)
    np.testing.assert_allclose(vectors[0], vectors[2], atol=1e-6)
    tokenizer, limit = embedder.builder.tokenizer, embedder.config.inputs.max_text_length
    for index, message in zip((0, 2), caplog.messages, strict=True):
        total = len(chat_ids(tokenizer, texts[index]))
        assert message.startswith(f"item {index}: {total - limit} of {total} tokens are cut off")
        assert "the embedding is read at the last one that remains" in message


def test_a_token_without_embedding_is_an_error_that_names_the_item(golden_model):
    tokenizer = golden_model.tokenizer
    largest = max(tokenizer.get_vocab().values())
    spec = golden_model.config.input_spec
    build = SequenceBuilder(tokenizer, dataclasses.replace(spec, vocab_size=largest))
    text = tokenizer.convert_ids_to_tokens(largest)
    with pytest.raises(ValueError, match=rf"row 7: .*{re.escape(text)}.*id {largest}"):
        build(Item(f"a dog {text}", name="row 7"))
    build = SequenceBuilder(tokenizer, dataclasses.replace(spec, vocab_size=largest + 1))
    assert largest in build(Item(f"a dog {text}")).tokens


def cut_sequence(name):
    return TokenSequence(
        np.zeros(4, np.int32), np.zeros((0, 1, 1, 3), np.uint8), T.newlines(0), name, num_cut=3
    )


def test_thousands_of_warnings_become_a_count(caplog):
    caplog.set_level(logging.WARNING)
    warnings = CutWarnings()
    for i in range(5000):
        warnings.note(cut_sequence(f"item {i}"))
    warnings.report()
    warnings.report()
    named = [m for m in caplog.messages if m.startswith("item ")]
    assert named[0].startswith("item 0: 3 of 7 tokens are cut off")
    assert len(named) == cuts.NAMED_ITEMS
    counts = [int(m.split()[0]) for m in caplog.messages[cuts.NAMED_ITEMS :]]
    assert counts == [10, 100, 1000, 5000 - cuts.NAMED_ITEMS]


@pytest.mark.parametrize(("items_repeat", "lines"), [(True, 2), (False, 6)])
def test_an_item_of_the_next_epoch_is_not_named_again(caplog, items_repeat, lines):
    warnings = CutWarnings(items_repeat=items_repeat)
    for name in ("a", "b") * 3:
        warnings.note(cut_sequence(name))
    warnings.note(dataclasses.replace(cut_sequence("c"), num_cut=0))
    warnings.report()
    assert len(caplog.messages) == lines
