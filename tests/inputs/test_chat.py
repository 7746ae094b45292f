"""Prompt text and image markers."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llave_jax.inputs import chat


@pytest.mark.parametrize(
    ("text", "images", "content"),
    [
        ("no image", 0, "no image"),
        ("<|image_1|>\nRepresent it.", 1, "<image>\nRepresent it."),
        ("<image> at the start", 1, "<image> at the start"),
        ("What is in <|image_1|> here?", 1, "<image>\nWhat is in  here?"),
        ("<|image_1|>", 1, "<image>"),
        ("<|image_1|> and <|image_2|>", 2, "<image> and <image>"),
        ("two in front", 2, "<image>\n<image>\ntwo in front"),
        ("", 1, "<image>"),
    ],
)
def test_markers(text, images, content):
    assert chat.place_markers(text, images) == content


@pytest.mark.parametrize(
    ("text", "images"), [("<image> x", 0), ("<image><image>", 1), ("<image>", 2)]
)
def test_wrong_number_of_markers(text, images):
    with pytest.raises(ValueError, match=r"row 7: the text has \d image marker"):
        chat.place_markers(text, images, "row 7")


@given(st.text(max_size=50).filter(lambda s: "<" not in s), st.integers(0, 3))
def test_one_marker_for_each_image(text, images):
    assert chat.place_markers(text, images).count(chat.IMAGE_MARKER) == images


def test_prompt_is_the_trained_one():
    assert chat.chat_text("Hi") == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"
    )


def test_an_image_is_one_token(golden_model):
    content = "<image>\nlong <image>"
    ids = chat.chat_ids(golden_model.tokenizer, content)
    assert (ids == chat.IMAGE_TOKEN).sum() == 2
    pieces = chat.chat_text(content).split(chat.IMAGE_MARKER)
    lengths = [len(golden_model.tokenizer.encode(p, add_special_tokens=False)) for p in pieces]
    assert len(ids) == sum(lengths) + 2


class Vocabulary:
    """As much of a tokenizer as the check reads."""

    name_or_path = "some/tokenizer"

    def __init__(self, **ids):
        self._ids = {"a": 0, "b": 1, **ids}

    def get_vocab(self):
        return self._ids


def test_a_tokenizer_may_have_the_image_marker_beyond_the_vocabulary():
    chat.check_vocabulary(Vocabulary(c=2, **{"<image>": 3}), 3)
    with pytest.raises(ValueError, match=r"some/tokenizer has tokens up to id 3 \('d'\)"):
        chat.check_vocabulary(Vocabulary(c=2, d=3), 3)
