"""A planned batch has room for every measured pair, and is as full as the plan says."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from llave_jax.data.batch_plan import BatchPlan, BatchSettings, plan_batch
from llave_jax.data.packing_simulation import PairSizes, simulate
from llave_jax.inputs.anyres import largest_image
from llave_jax.inputs.config import InputConfig, InputSpec, grid_pinpoints
from llave_jax.inputs.crops import CropGeometry
from llave_jax.inputs.packing import Planner
from llave_jax.models.config import PRESETS
from llave_jax.planning import workload

SPEC = InputSpec(
    InputConfig(grid_pinpoints(28, 2, 2), max_length=256, max_text_length=256),
    CropGeometry(28, 4),
    vocab_size=100,
)

# A plan takes a second: shrinking a failure would take many minutes.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)


def draw_sizes(seed, share_of_images, sides=2, count=600):
    """Queries of up to 200 tokens, of which some are images of 1 to 5 crops; short targets."""
    rng = np.random.default_rng(seed)
    image = rng.random(count) < share_of_images
    crops = np.zeros((count, sides), int)
    crops[:, 0] = image * rng.integers(1, 6, count)
    lengths = rng.integers(5, 40, (count, sides))
    lengths[:, 0] += 30 * crops[:, 0]
    if sides == 3:  # most pairs lack a hard negative
        lengths[rng.random(count) < 0.7, 2] = 0
    return PairSizes(lengths, crops, image, lengths[:, 0], taps=1)


plans = st.fixed_dictionaries(
    {
        "pairs": st.sampled_from([1, 2, 3, 6, 20]),
        "shards": st.sampled_from([1, 3, 8]),
        "micro_batches": st.sampled_from([1, 2]),
        "by_modality": st.booleans(),
        "for_any_item": st.booleans(),
    }
)


def times_parts(arguments):
    """`pairs` of the arguments are those of one shard of one micro-batch."""
    parts = arguments["shards"] * arguments["micro_batches"]
    return {**arguments, "pairs": arguments["pairs"] * parts}


@settings(max_examples=8, deadline=None, phases=NO_SHRINKING)
@given(plans, st.integers(0, 99), st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([2, 3]))
def test_every_pair_fits_and_no_more_come_than_asked_for(arguments, seed, images, sides):
    sizes = draw_sizes(seed, images, sides)
    plan = plan_batch(sizes, SPEC, **times_parts(arguments))
    planner = Planner(plan.budget, 1)
    for lengths, crops in zip(sizes.lengths.tolist(), sizes.crops.sum(1).tolist(), strict=True):
        planner.check(lengths, crops, sizes.taps, "pair")
    assert 0.98 <= plan.fill <= 1
    assert plan.carried <= 1
    assert (plan.budget.crops == 0) == (images == 0)
    if arguments["for_any_item"]:
        assert plan.budget.row_length >= SPEC.config.max_length
        if images:
            crops, taps = largest_image(SPEC.config, SPEC.crop)
            assert plan.budget.crops >= crops
            assert plan.budget.taps >= taps
    assert BatchPlan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


@pytest.mark.parametrize("for_any_item", [False, True])
def test_the_one_large_pair_of_a_sample_fits(for_any_item):
    """It is in the sample, but hardly among the pairs that the simulation draws from it."""
    sizes = draw_sizes(0, 0.5, count=20_000)
    sizes.lengths[7], sizes.crops[7] = (250, 240), (5, 9)
    plan = plan_batch(sizes, SPEC, pairs=8, shards=8, micro_batches=1, for_any_item=for_any_item)
    Planner(plan.budget, 1).check([250, 240], 14, 1, "the pair")


@settings(max_examples=4, deadline=None, phases=NO_SHRINKING)
@given(st.integers(0, 99), st.sampled_from([2, 6, 12]))
def test_batches_of_other_pairs_are_as_full_as_planned(seed, pairs):
    shards = 4
    sample, rest = draw_sizes(seed, 0.6, count=2000), draw_sizes(seed + 100, 0.6, count=4000)
    plan = plan_batch(sample, SPEC, pairs=pairs * shards, shards=shards, micro_batches=1)
    packing = simulate(rest, plan.budget, shards)
    assert packing.pairs * plan.budget.groups / pairs == pytest.approx(plan.fill, abs=0.05)
    assert packing.tokens == pytest.approx(plan.tokens, abs=0.05)
    assert packing.crops == pytest.approx(plan.crops, abs=0.05)
    assert packing.carried_twice < 0.05


@pytest.mark.slow
@settings(max_examples=2, deadline=None, phases=NO_SHRINKING)
@given(st.integers(0, 99), st.booleans())
def test_more_pairs_get_more_room(seed, by_modality):
    sizes = draw_sizes(seed, 0.6)
    rooms = []
    for pairs in (4, 12, 32):
        budget = plan_batch(
            sizes, SPEC, pairs=4 * pairs, shards=4, micro_batches=1, by_modality=by_modality
        ).budget
        rooms.append((budget.rows * budget.row_length, budget.crops, budget.groups))
    assert rooms == sorted(rooms)
    assert [crops for _, crops, _ in rooms] == sorted(crops for _, crops, _ in rooms)


def test_numbers_set_by_hand_win():
    sizes = draw_sizes(0, 0.5)
    arguments = {"pairs": 64, "shards": 4, "micro_batches": 2}
    by_hand = BatchSettings(
        row_length=512, tokens_per_pair=300.0, crops_per_pair=4.0, taps=4, fill=0.9
    )
    plan = plan_batch(sizes, SPEC, **arguments, settings=by_hand)
    assert dataclasses.astuple(plan.budget) == (5, 512, 32, 8, 2, 4)
    assert plan.fill == 0.9
    for field, expected in (("row_length", 512), ("taps", 4)):
        alone = BatchSettings(**{field: expected})
        assert (
            getattr(plan_batch(sizes, SPEC, **arguments, settings=alone).budget, field) == expected
        )
    some = plan_batch(sizes, SPEC, **arguments, settings=BatchSettings(crops_per_pair=3.0))
    assert some.budget.crops == 24
    free = plan_batch(sizes, SPEC, **arguments)
    assert free == plan_batch(sizes, SPEC, **arguments)
    assert free.budget.rows * free.budget.row_length <= 5 * 512


def test_more_room_by_hand_is_no_less_full():
    sizes = draw_sizes(0, 0.5)
    fills = [
        plan_batch(
            sizes,
            SPEC,
            pairs=64,
            shards=4,
            micro_batches=1,
            settings=BatchSettings(256, tokens, 4.0),
        ).fill
        for tokens in (50.0, 65.0, 80.0, 100.0, 240.0)
    ]
    assert fills == sorted(fills)
    assert fills[0] < 0.8
    assert fills[-1] > 0.99


def test_what_does_not_fit_by_hand_is_named():
    with pytest.raises(ValueError, match=r"a measured pair: needs row_length .* budget has 64"):
        plan_batch(
            draw_sizes(0, 1.0), SPEC, pairs=8, shards=1, micro_batches=1,
            settings=BatchSettings(row_length=64),
        )  # fmt: skip
    with pytest.raises(ValueError, match="9 pairs a step do not divide over 2 shards x 2"):
        plan_batch(draw_sizes(0, 1.0), SPEC, pairs=9, shards=2, micro_batches=2)


@pytest.mark.parametrize(
    ("model", "pairs", "shards", "by_modality", "tokens", "crops"),
    [
        ("llave-0.5b", 256, 8, True, 0.85, 0.85),
        ("llave-7b", 256, 16, True, 0.7, 0.7),
        ("llave-2b", 256, 8, False, 0.9, 0.85),
        ("llave-2b", 4096, 64, False, 0.93, 0.9),
    ],
)
def test_plans_for_mmeb_pad_little(model, pairs, shards, by_modality, tokens, crops):
    spec = PRESETS[model].input_spec
    sizes = workload.sample_pairs(spec, 3000)
    plan = plan_batch(
        sizes, spec, pairs=pairs, shards=shards, micro_batches=8, by_modality=by_modality
    )
    assert plan.tokens > tokens
    assert plan.crops > crops
    assert plan.fill > 0.99
    assert plan.carried < 0.05 or not by_modality
