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


@pytest.fixture
def in_process(monkeypatch):
    """Shards are written in this process: starting workers takes seconds."""
    from llave_jax.data import prepare  # slow to import

    class Pool:
        def __init__(self, max_workers, mp_context, initializer, initargs):
            initializer(*initargs)

        def __enter__(self):
            return self

        def __exit__(self, *exc):
            pass

        def submit(self, function, *arguments):
            future = prepare.concurrent.futures.Future()
            try:
                future.set_result(function(*arguments))
            except Exception as error:
                future.set_exception(error)
            return future

        def shutdown(self, **options):
            pass

    monkeypatch.setattr(prepare.concurrent.futures, "ProcessPoolExecutor", Pool)
