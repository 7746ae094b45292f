"""The chat template of an export gives the prompt that the model was trained with, or refuses."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import PIL.Image
import pytest

from llave_jax.inputs import chat
from llave_jax.inputs.item import Item, with_prompt
from llave_jax.inputs.item_forms import read_item
from llave_jax.weights.hf_processor import CHAT_TEMPLATE

jinja2 = pytest.importorskip("jinja2")  # comes with PyTorch
sandbox = pytest.importorskip("jinja2.sandbox")

IMAGE = {"type": "image"}
# Texts as people write them, with markers of both kinds and what a template could stumble over.
PIECES = st.sampled_from(
    [
        "<image>",
        "<|image_1|>",
        "<|image_2|>",
        "a cat",
        " ",
        "\n",
        "{{ x }}",
        "{%- y -%}",
        "<|im_end|>",
        "é猫",
    ]
)
PROMPTS = st.sampled_from(
    ["Find: ", " ", "", "You are a helpful assistant.", "x\n", "{{"]
) | st.text(max_size=9)
TEXTS = st.lists(PIECES, max_size=6).map("".join) | st.text(max_size=20)


@pytest.fixture(scope="module")
def render():
    """The template as transformers and vLLM render it; `apply_chat_template` compiles it for every call."""

    def refuse(message):
        raise jinja2.TemplateError(message)

    environment = sandbox.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    environment.globals["raise_exception"] = refuse
    template = environment.from_string(CHAT_TEMPLATE)
    return lambda messages, **options: template.render(messages=messages, **options)


def text_part(text):
    return {"type": "text", "text": text}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def expected(text, images=0):
    return chat.chat_text(chat.place_markers(text, images))


@hypothesis.given(TEXTS, PROMPTS, st.integers(0, 3), st.booleans())
def test_images_in_front(render, text, prompt, images, generation):
    """As `inputs.chat` with a text whose images have markers in it, or none."""
    hypothesis.assume("<image>" not in prompt and "<|image_" not in prompt)
    messages = [user(*[IMAGE] * images, text_part(text))]
    if prompt.strip() and prompt.strip() != "You are a helpful assistant.":
        messages.insert(0, {"role": "system", "content": [text_part(prompt)]})
        text = with_prompt(Item(text), prompt).text
    markers = chat.count_markers(text)
    if markers and markers != images:
        with pytest.raises(jinja2.TemplateError, match=f"{markers} image marker"):
            render(messages)
        return
    assert render(messages, add_generation_prompt=generation) == expected(text, images)


@hypothesis.given(TEXTS, TEXTS, TEXTS)
def test_images_between_texts(render, first, second, third):
    hypothesis.assume(not any(map(chat.count_markers, (first, second, third))))
    assert render([user(*map(text_part, (first, second)))]) == expected(f"{first}\n{second}")
    parts = [text_part(first), IMAGE, text_part(second)]
    assert render([user(*parts)]) == expected(f"{first}\n<image>\n{second}", 1)
    parts += [IMAGE, text_part(third)]
    assert render([user(*parts)]) == expected(f"{first}\n<image>\n{second}\n<image>\n{third}", 2)


@hypothesis.given(
    st.lists(st.sampled_from(["picture", "a cat", "<image>", "two\nlines"]), min_size=1)
)
def test_messages_are_those_of_the_embedder(render, words):
    """The same list of parts is the same prompt here, in `Embedder.encode` and in the server."""
    picture = PIL.Image.new("RGB", (4, 4))
    parts = [
        {"type": "image", "image": picture} if word == "picture" else text_part(word)
        for word in words
    ]
    try:
        item = read_item([user(*parts)], "item")
        prompt = expected(item.text, len(item.images))
    except ValueError:
        with pytest.raises(jinja2.TemplateError):
            render([user(*parts)])
        return
    assert render([user(*parts)]) == prompt


def test_usual_messages_around_the_users(render, golden_model):
    """What other guides tell people to add by hand changes nothing."""
    alone = render([{"role": "user", "content": "A cat"}])
    assert alone == expected("A cat")
    # The way that users take.
    assert alone == golden_model.tokenizer.apply_chat_template(
        [{"role": "user", "content": "A cat"}], chat_template=CHAT_TEMPLATE, tokenize=False
    )
    system = {"role": "system", "content": "You are a helpful assistant."}
    turn = {"role": "assistant", "content": "\n"}
    assert render([system, {"role": "user", "content": "A cat"}, turn]) == alone
    assert render([user(text_part("A cat"))]) == alone


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "0 messages of the role user"),
        ([user(text_part("a")), user(text_part("b"))], "2 messages of the role user"),
        ([user(text_part("a")), {"role": "assistant", "content": "Yes."}], "holds text"),
        ([{"role": "query", "content": "a"}], "the role is query"),
        ([user({"type": "video"}, text_part("a"))], "type video"),
        ([{"role": "system", "content": [IMAGE]}, user(text_part("a"))], "type image"),
        ([{"role": "system", "content": "<image>"}, user(text_part("a"))], "has an image marker"),
        ([user(text_part("<image> What is it?"))], r"1 image marker\(s\) for 0"),
    ],
)
def test_what_no_embedding_is_made_of(render, messages, message):
    with pytest.raises(jinja2.TemplateError, match=message):
        render(messages)
