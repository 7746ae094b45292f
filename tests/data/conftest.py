"""What tests of training data share."""

import dataclasses
from pathlib import Path

import pytest
import transformers

from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.models.config import PRESETS


@pytest.fixture(scope="session")
def builder(golden) -> SequenceBuilder:
    return new_builder(golden)


def new_builder(golden: Path) -> SequenceBuilder:
    """Of the tiny model's sizes, with the golden checkpoint's tokenizer of 590 tokens."""
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(golden / "checkpoint/tokenizer.json"), pad_token="<|endoftext|>"
    )
    return SequenceBuilder(
        tokenizer, dataclasses.replace(PRESETS["tiny"].input_spec, vocab_size=590)
    )
