"""A Qwen2-style tokenizer for the digits benchmark, so that nothing has to be downloaded.

It is a byte-level BPE, which can tokenise any text. Every word of the benchmark and of the chat prompt
is one token. The files are those of Qwen2 checkpoints.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import tokenizers

from llave_jax.common.files import write_text
from llave_jax.digits import dataset as digits
from llave_jax.digits import scenes
from llave_jax.inputs import chat

VOCABULARY = 512  # at most; as in the "tiny" preset
MAX_LENGTH = 128  # tokens, without the visual ones; as in the "tiny" preset
PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"

# The pattern by which Qwen2 splits a text into words. Bytes are merged within words only.
QWEN2_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def build_tokenizer(directory: str | os.PathLike) -> Path:
    """Write the tokenizer to a directory, for `transformers.AutoTokenizer`.

    The files are the same every time, byte for byte.

    Args:
      directory: is made; files of the same names are replaced.

    Returns:
      The directory.
    """
    directory = Path(directory)
    tokenizer = _train()
    model = json.loads(tokenizer.to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    ids = tokenizer.get_vocab(with_added_tokens=True)
    special = {token: ids[token] for token in (PAD, START, END)}
    files = {
        "tokenizer.json": tokenizer.to_str(pretty=True),
        "vocab.json": json.dumps(model["vocab"], ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
        "added_tokens.json": json.dumps(special, indent=2),
        "special_tokens_map.json": json.dumps(
            {"additional_special_tokens": [START, END], "eos_token": END, "pad_token": PAD},
            indent=2,
        ),
        "tokenizer_config.json": json.dumps(_settings(special), indent=2),
    }
    for name, text in files.items():
        write_text(directory / name, text)
    return directory


def corpus() -> Iterator[str]:
    """All instructions, questions, answers, captions and labels, of scenes that show all digits.

    Yields:
      Texts; together they hold every word of the benchmark and of the chat prompt.
    """
    yield from chat.chat_text("").replace(START, END).split(END)
    yield from (digits.CLASSIFY, digits.FIND_CAPTION, digits.IMAGE, digits.CROP)
    for digit in range(10):
        scene = scenes.Scene(tuple((digit + step) % 10 for step in range(4)), (0, 1, 2, 3))
        yield digits.CLASS.format(scenes.DIGITS[digit])
        yield digits.FIND_IMAGE.format(scenes.caption(scenes.describe(scene, range(4))))
        yield scenes.caption(scenes.describe(scene, range(4)))
        for pairs in scenes.questions(scene).values():
            for question, answer in pairs:
                yield digits.ANSWER.format(question)
                yield answer
        for cell in range(4):
            yield from (digits.SELECT.format(label) for label in scenes.labels(scene, cell))


def _train() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.normalizer = tokenizers.normalizers.NFC()
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(QWEN2_WORDS), behavior="isolated"),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    special = [tokenizers.AddedToken(t, normalized=False, special=True) for t in (PAD, START, END)]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(special),
        min_frequency=1,
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = [text.replace("<|image_1|>", "") for text in corpus()]
    tokenizer.train_from_iterator(texts, trainer)
    # Added after training, so that special tokens have the last ids, as in Qwen2.
    tokenizer.add_special_tokens(special)
    return tokenizer


def _settings(special: dict[str, int]) -> dict[str, object]:
    """tokenizer_config.json."""
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "added_tokens_decoder": {
            str(index): {"content": token, **flags, "special": True}
            for token, index in special.items()
        },
        "additional_special_tokens": [START, END],
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": END,
        "errors": "replace",
        "model_max_length": MAX_LENGTH,
        "pad_token": PAD,
        "padding_side": "right",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
