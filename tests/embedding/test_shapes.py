"""Batches of embedding: each sequence once, whatever the lengths, in few shapes."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from llave_jax.embedding import shapes
from llave_jax.inputs import taps as T
from llave_jax.inputs.config import InputConfig, InputSpec
from llave_jax.inputs.crops import CropGeometry
from llave_jax.inputs.sequence import VISUAL_SLOT, TokenSequence

CROP = CropGeometry(size=4, patch_size=2)
SPEC = InputSpec(InputConfig(pinpoints=((4, 4),), max_length=1024), CROP, vocab_size=100)


def make_sequence(number: int, length: int, crops: int) -> TokenSequence:
    """Tokens that say which sequence they belong to; one visual token a patch."""
    visual = min(crops * CROP.num_patches, length - 1)
    tokens = np.full(length, number, np.int32)
    tokens[:visual] = VISUAL_SLOT
    index = np.arange(visual, dtype=np.int32)[:, None]
    taps = T.Taps(index, np.ones(index.shape, np.float32))
    return TokenSequence(tokens, np.zeros((crops, 4, 4, 3), np.uint8), taps, name=f"{number}")


SEQUENCES = st.lists(
    st.tuples(
        st.one_of(st.integers(16, 64), st.integers(16, 1024)),
        st.one_of(st.just(0), st.integers(0, 9)),
    ),
    max_size=60,
)


@settings(max_examples=60)
@given(
    sizes=SEQUENCES,
    num_shards=st.sampled_from([1, 2, 8]),
    tokens_per_batch=st.sampled_from([64, 1024, 4096]),
    batch_size=st.sampled_from([None, 1, 3]),
)
def test_each_sequence_once_in_few_shapes(sizes, num_shards, tokens_per_batch, batch_size):
    sequences = [make_sequence(i, length, crops) for i, (length, crops) in enumerate(sizes)]
    maker = shapes.BatchShapes(SPEC, num_shards, tokens_per_batch, batch_size)
    found, row_lengths = [], set()
    for packed, indices in maker.batches(enumerate(sequences)):
        assert indices.shape == packed.valid.shape
        np.testing.assert_array_equal(indices >= 0, packed.valid)
        for shard, row in enumerate(indices):
            if batch_size is not None:
                assert len(row) <= batch_size
            for slot, index in enumerate(row):
                if index >= 0:
                    last = packed.pooled[shard, 0, slot]
                    assert packed.tokens[shard].ravel()[last] == index
                    found.append(index)
        row_lengths.add(packed.tokens.shape[2])
    assert sorted(found) == list(range(len(sequences)))
    # Powers of two up to the model's length, at least 64.
    assert row_lengths <= {64, 128, 256, 512, 1024}


def test_a_thousand_texts_need_two_programs():
    """The full-size batch, and one for what is left."""
    texts = [make_sequence(i % 90, 16 + i % 40, 0) for i in range(1000)]
    maker = shapes.BatchShapes(SPEC, 1, 4096, None)
    batches = list(maker.batches(enumerate(texts)))
    assert len(batches) > shapes.FULL_BATCHES_BEFORE_REST
    assert len({packed.tokens.shape for packed, _ in batches}) <= 2
    # Rows are well filled: a batch is worth its time.
    used = sum(np.count_nonzero(packed.segment_ids) for packed, _ in batches[:-1])
    assert used > 0.8 * sum(packed.segment_ids.size for packed, _ in batches[:-1])
