"""Batches of embedding: each sequence once, whatever the lengths, in few shapes."""

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from llave_jax.embedding import shapes
from llave_jax.inputs import anyres, video
from llave_jax.inputs import taps as T
from llave_jax.inputs.batch import budget_of
from llave_jax.inputs.config import InputConfig, InputSpec, grid_pinpoints
from llave_jax.inputs.crops import CropGeometry
from llave_jax.inputs.sequence import VISUAL_SLOT, TokenSequence

CROP = CropGeometry(size=4, patch_size=2)
SPEC = InputSpec(InputConfig(pinpoints=((4, 4),), max_length=1024), CROP, vocab_size=100)
COSTS = shapes.Costs(crop=2.5, key=1e-4)


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
    maker = shapes.BatchShapes(SPEC, num_shards, tokens_per_batch, COSTS)
    found, budgets = [], set()
    for packed, indices in maker.batches(enumerate(sequences), batch_size):
        assert indices.shape == packed.valid.shape
        np.testing.assert_array_equal(indices >= 0, packed.valid)
        if batch_size is not None:
            assert np.count_nonzero(indices >= 0) <= batch_size * num_shards
        for shard, row in enumerate(indices):
            for slot, index in enumerate(row):
                if index >= 0:
                    last = packed.pooled[shard, 0, slot]
                    assert packed.tokens[shard].ravel()[last] == index
                    found.append(index)
        budgets.add(budget_of(packed))
    assert sorted(found) == list(range(len(sequences)))
    assert budgets <= set(maker.ladder)


@settings(max_examples=60)
@given(sizes=SEQUENCES.filter(bool), num_shards=st.sampled_from([1, 2]))
def test_a_batch_holds_the_first_sequence(sizes, num_shards):
    sequences = [make_sequence(i, length, crops) for i, (length, crops) in enumerate(sizes)]
    maker = shapes.BatchShapes(SPEC, num_shards, 4096, COSTS)
    packed, indices = maker.pack(sequences)
    taken = indices[indices >= 0].tolist()
    assert 0 in taken
    assert len(set(taken)) == len(taken)
    assert budget_of(packed) in maker.ladder
    if not sizes[0][1]:
        assert packed.patches.shape[1] == 0, "a text waits for images"


# What real models have: LLaVE's images and videos, LLaVA-OneVision's larger canvases, a single crop.
MODELS = [
    InputConfig(grid_pinpoints(384, 2, 2), newline_position="grid"),
    InputConfig(grid_pinpoints(384, 2, 2), newline_position="grid", max_length=8192),
    InputConfig(grid_pinpoints(384, 6, 6), max_length=32768),
    InputConfig(grid_pinpoints(384, 6, 6), max_length=4096, pool_mode="max"),
    InputConfig((), max_frames=0, pool_stride=9),
]
# Width and height of pictures, some thin enough to lose all rows of their tiles.
PICTURES = st.lists(
    st.sampled_from([(500, 375), (384, 384), (3000, 3000), (9000, 10), (10, 9000), (700, 200)]),
    min_size=1,
    max_size=60,
)


@settings(max_examples=30)
@given(config=st.sampled_from(MODELS), pictures=PICTURES, frames=st.integers(1, 4500))
def test_every_sequence_of_a_model_fits_into_a_shape(config, pictures, frames):
    crop = CropGeometry(384, 14)
    ladder = shapes.ladder(InputSpec(config, crop, 100), 16_384)
    assert len(set(ladder)) == len(ladder) <= 20
    parts = [anyres.image_taps(*size, config, crop) for size in pictures]
    counts = [anyres.num_crops(*size, config, crop) for size in pictures]
    offsets = np.cumsum([0, *counts[:-1]]) * crop.num_patches
    index = [
        p.index.max(1) + (p.index.max(1) >= 0) * n for p, n in zip(parts, offsets, strict=True)
    ]
    widths = [max(p.width for p in parts)]
    clip = video.video_taps(frames, config, crop)
    for look_at, width in (
        (np.concatenate(index), widths[0]),
        (clip.index.max(1), clip.width),
    ):
        look_at = look_at[: config.max_length]
        size = shapes._Size(len(look_at), int(look_at.max()) // crop.num_patches + 1, width)
        assert any(size.fits(budget) for budget in ladder), size


def test_a_thousand_texts_need_few_programs():
    """The full-size batch, and few for what is left."""
    texts = [make_sequence(i % 90, 16 + i % 40, 0) for i in range(1000)]
    maker = shapes.BatchShapes(SPEC, 1, 4096, COSTS)
    batches = list(maker.batches(enumerate(texts)))
    assert len({packed.tokens.shape for packed, _ in batches}) <= 4
    # Rows are well filled: a batch is worth its time.
    used = sum(np.count_nonzero(packed.segment_ids) for packed, _ in batches)
    assert used > 0.8 * sum(packed.segment_ids.size for packed, _ in batches)
