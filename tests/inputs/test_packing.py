"""Packing: fixed budgets, nothing lost, and no influence on any embedding."""

import collections

import jax
import numpy as np
import PIL.Image
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llave_jax.inputs import taps as T
from llave_jax.inputs.batch import Budget
from llave_jax.inputs.crops import patchify
from llave_jax.inputs.item import Item
from llave_jax.inputs.packing import Packer, Planner
from llave_jax.inputs.sequence import VISUAL_SLOT, SequenceBuilder, TokenSequence
from llave_jax.models.llave import Llave

WORDS = [
    "a brown dog",
    "two cats",
    "the red bicycle",
    "by the harbour wall",
    "at dawn",
    "in autumn",
]


def make_items():
    rng = np.random.default_rng(0)

    def picture(width, height):
        return PIL.Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))

    items = [Item(" ".join(rng.choice(WORDS, n))) for n in (0, 1, 2, 5, 9)]
    items += [Item("Represent the image.", images=(picture(*s),)) for s in ((40, 30), (300, 80))]
    items += [Item("<image> or <image>?", images=(picture(50, 60), picture(90, 20)))]
    items += [Item("<image>\nWhich picture?", images=(None,))]
    items += [Item("<image> or <image>?", images=images) for images in ((picture(9, 9), None),)]
    items += [
        Item("<image>\nRepresent the given video.", video=[picture(32, 32)] * n) for n in (1, 3)
    ]
    return items


@pytest.fixture(scope="module")
def sequences(golden_model):
    builder = SequenceBuilder(golden_model.tokenizer, golden_model.config.input_spec)
    return [builder(item) for item in make_items()]


@pytest.fixture(scope="module")
def embed(golden_model):
    apply = jax.jit(Llave(golden_model.config).apply)
    return lambda batch: np.asarray(apply({"params": golden_model.params}, batch))


@pytest.fixture(scope="module")
def alone(sequences, embed, golden_model):
    """Each item's embedding in a batch of its own."""
    rows = []
    for sequence in sequences:
        packer = Packer(Budget(1, 512, 8, 1, sides=1, taps=4), 1, golden_model.config.vision.crop)
        assert packer.add([sequence])
        rows.append(embed(packer.emit()[0])[0, 0, 0])
    return rows


@pytest.mark.slow
@settings(max_examples=25)
@given(data=st.data())
def test_packing_changes_nothing(data, sequences, alone, embed, golden_model):
    """Any mix of items, in any order, under any of several budgets, pairs or single items."""
    budget = data.draw(
        st.sampled_from(
            [
                Budget(2, 512, 16, 6, sides=1, taps=4),
                Budget(1, 1024, 12, 4, sides=2, taps=4),
                Budget(3, 256, 9, 5, sides=1, taps=4),
            ]
        )
    )
    shards = data.draw(st.sampled_from([1, 2]))
    chosen = data.draw(
        st.lists(
            st.tuples(*[st.integers(0, len(sequences) - 1)] * budget.sides), min_size=1, max_size=8
        )
    )
    packer = Packer(budget, shards, golden_model.config.vision.crop)
    placed = [
        i for i, group in enumerate(chosen) if packer.add([sequences[g] for g in group], str(i))
    ]
    batch, ids = packer.emit()
    result = embed(batch)
    found = {}
    for shard, names in enumerate(ids):
        for slot, name in enumerate(names):
            assert batch.valid[shard, slot] == bool(name)
            if name:
                found[int(name)] = result[shard, :, slot]
    assert sorted(found) == placed
    for i in placed:
        for side, member in enumerate(chosen[i]):
            np.testing.assert_allclose(found[i][side], alone[member], rtol=0, atol=1e-5)


def fake(length, crops=0):
    """A sequence of sizes only."""
    tokens = np.arange(length, dtype=np.int32)
    return TokenSequence(tokens, np.zeros((crops, 1, 1, 3), np.uint8), T.newlines(0))


sizes = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(0, 3)), max_size=60)


@given(sizes, st.integers(1, 4), st.integers(1, 3))
def test_planner_keeps_to_its_budget(groups, shards, rows):
    budget = Budget(rows=rows, row_length=64, crops=4, groups=5)
    planner = Planner(budget, shards)
    taken = collections.Counter()
    tokens = set()
    for first, second, crops in groups:
        placement = planner.place([first, second], crops)
        if placement is None:
            continue
        taken[placement.shard] += 1
        assert placement.slot == taken[placement.shard] - 1
        assert placement.first_crop + crops <= budget.crops
        for length, (row, start, _) in zip((first, second), placement.spans, strict=True):
            assert start + length <= budget.row_length
            span = {(placement.shard, row, t) for t in range(start, start + length)}
            assert not span & tokens
            tokens |= span
    assert max(taken.values(), default=0) <= budget.groups


def test_segments_and_positions(golden_model, sequences):
    packer = Packer(Budget(1, 512, 8, 3, sides=1, taps=4), 1, golden_model.config.vision.crop)
    for sequence in sequences[:3]:
        assert packer.add([sequence])
    batch, _ = packer.emit()
    lengths = [len(s) for s in sequences[:3]]
    expected = np.repeat([1, 2, 3, 0], [*lengths, 512 - sum(lengths)])
    np.testing.assert_array_equal(batch.segment_ids[0, 0], expected)
    for segment, length in enumerate(lengths, 1):
        positions = batch.positions[0, 0][batch.segment_ids[0, 0] == segment]
        np.testing.assert_array_equal(positions, np.arange(length))
    np.testing.assert_array_equal(batch.pooled[0, 0], np.cumsum(lengths) - 1)


@pytest.mark.parametrize(
    ("sequence", "message"),
    [
        (fake(65), "row_length 65.*has 64"),
        (fake(10, crops=5), "crops 5.*has 4"),
    ],
)
def test_what_never_fits_is_an_error(sequence, message, golden_model):
    packer = Packer(Budget(1, 64, 4, 5, sides=1), 1, golden_model.config.vision.crop)
    with pytest.raises(ValueError, match=f"row 3: needs {message}"):
        packer.add([sequence], "row 3")


def test_wrong_number_of_sides(golden_model):
    packer = Packer(Budget(1, 64, 4, 5, sides=2), 1, golden_model.config.vision.crop)
    with pytest.raises(ValueError, match="1 sequences; the budget has 2 sides"):
        packer.add([fake(3)], "row 3")


def test_pair_that_never_fits_together(golden_model):
    packer = Packer(Budget(1, 64, 4, 5, sides=2), 1, golden_model.config.vision.crop)
    with pytest.raises(ValueError, match="do not fit together"):
        packer.add([fake(40), fake(40)], "row 3")


@given(st.integers(1, 3), st.integers(4, 40), st.integers(2, 9))
def test_patchify(count, size, patch):
    if patch > size:
        return
    crops = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), np.uint8)
    side = size // patch
    patches = patchify(crops, patch)
    assert patches.shape == (count, side * side, patch * patch * 3)
    for y, x in ((0, 0), (side - 1, 0), (side // 2, side - 1)):
        block = crops[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
        np.testing.assert_array_equal(patches[:, y * side + x], block.reshape(count, -1))


def test_visual_slots_point_into_the_shard(golden_model, sequences):
    budget = Budget(2, 512, 16, 6, sides=1, taps=4)
    packer = Packer(budget, 1, golden_model.config.vision.crop)
    for sequence in sequences[5:]:
        packer.add([sequence])
    batch, _ = packer.emit()
    newline = budget.crops * golden_model.config.vision.num_patches
    visual = batch.tokens == VISUAL_SLOT
    assert batch.tap_index.max() <= newline
    assert batch.tap_index.min() >= 0
    assert (batch.tap_weight[visual].sum(-1) > 0).all()
    assert not batch.tap_weight[~visual].any()
