"""Parity with the authors' code, case by case: tokens, crops, layout, features, embeddings.

A failure names its place: the same forward pass is compared after each stage.
"""

import dataclasses
import functools
import hashlib
import json

import jax
import numpy as np
import PIL.Image
import pytest
from safetensors.numpy import load_file

from llave_jax.inputs import chat, video
from llave_jax.inputs.anyres import best_canvas
from llave_jax.inputs.batch import Budget
from llave_jax.inputs.config import grid_pinpoints
from llave_jax.inputs.item import Item, missing_image
from llave_jax.inputs.packing import Packer
from llave_jax.inputs.sequence import VISUAL_SLOT, SequenceBuilder
from llave_jax.models.llave import Llave

EMBEDDING_TOLERANCE = 1e-5  # absolute; the reference's own float32 noise is 5e-6
RELATIVE_TOLERANCE = 1e-4  # of the largest value of the array

# Our behaviour differs on purpose: see the tests of their own below.
REFUSED = {"quirk_two_tokens_one_image"}
IMAGE_IN_FRONT = {"quirk_image_without_token"}
# The reference pools one token early when a literal padding token stands in a text without images.
PAD_SHIFTS_POOLING = {"quirk_pad_in_text_query"}


def load_cases(golden):
    return json.loads((golden / "cases.json").read_text())


def case_names():
    from tests.conftest import GOLDEN

    return [case["name"] for case in load_cases(GOLDEN)["cases"]]


@pytest.fixture(scope="module")
def cases(golden):
    return {case["name"]: case for case in load_cases(golden)["cases"]}


@pytest.fixture(scope="module")
def embeddings(golden):
    return np.load(golden / "embeddings.npz")


@pytest.fixture(scope="module")
def pixels(golden):
    return np.load(golden / "pixels.npz")


@pytest.fixture(scope="module")
def intermediates(golden):
    return load_file(golden / "intermediates.safetensors")


def make_item(case, golden):
    """The item a user would give for a case."""
    name, paths = case["name"], [golden / "images" / image for image in case["images"]]
    match case["route"]:
        case "video":
            strip = PIL.Image.open(paths[0])
            height = strip.height // 8
            frames = [strip.crop((0, i * height, strip.width, (i + 1) * height)) for i in range(8)]
            return Item("<image>\nRepresent the given video.", video=frames, name=name)
        case "video_query":
            text = f"Find me an video that matches the given caption: {case['text']}"
            return Item(text, name=name)
        case _:
            images = tuple(paths) or missing_image(case["text"])
            return Item(case["text"], images=images, name=name)


def case_config(config, name):
    """`variant_KEY=VALUE/...` cases override one setting of the checkpoint."""
    if not name.startswith("variant_"):
        return config
    key, value = name.removeprefix("variant_").split("/")[0].split("=")
    field = {"mm_newline_position": "newline_position", "mm_spatial_pool_mode": "pool_mode"}[key]
    return dataclasses.replace(config, inputs=dataclasses.replace(config.inputs, **{field: value}))


def build(golden_model, case, golden):
    config = case_config(golden_model.config, case["name"])
    return config, SequenceBuilder(golden_model.tokenizer, config.input_spec)(
        make_item(case, golden)
    )


def pack_alone(sequence, config):
    """One row of one sequence, in one of few shapes so that few programs are compiled."""
    budget = Budget(
        rows=1,
        row_length=128 if len(sequence) <= 128 else 512,
        crops=8 if len(sequence.crops) else 0,
        groups=1,
        sides=1,
        taps=sequence.taps.width,
    )
    if len(sequence.crops) > budget.crops:
        budget = dataclasses.replace(budget, crops=16)
    packer = Packer(budget, 1, config.vision.crop)
    assert packer.add([sequence])
    return packer.emit()[0]


@functools.cache
def jitted(config, method=None):
    return jax.jit(functools.partial(Llave(config).apply, method=method))


def collapse(tokens):
    """Token ids with every run of visual slots as the reference's single image token."""
    visual = tokens == VISUAL_SLOT
    first = visual & ~np.concatenate([[False], visual[:-1]])
    return np.where(first, chat.IMAGE_TOKEN, tokens)[~visual | first]


def assert_relative(actual, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0, atol=RELATIVE_TOLERANCE * scale)


def test_tokenizer(golden, golden_model):
    for case in json.loads((golden / "tokenizer_cases.json").read_text())["cases"]:
        assert golden_model.tokenizer.encode(case["text"], add_special_tokens=False) == case["ids"]


@pytest.mark.parametrize("name", [n for n in case_names() if n not in REFUSED])
def test_case(name, golden, golden_model, cases, embeddings, pixels):
    case = cases[name]
    config, sequence = build(golden_model, case, golden)
    if name in IMAGE_IN_FRONT:
        assert (sequence.tokens == VISUAL_SLOT).any()
        return

    expected_ids = embeddings[f"{name}/input_ids"]
    expected_ids = expected_ids[expected_ids != golden_model.tokenizer.pad_token_id]
    if not case.get("truncated_after_splice"):
        np.testing.assert_array_equal(collapse(sequence.tokens), expected_ids)
        assert (sequence.tokens == VISUAL_SLOT).sum() == case.get("n_visual_tokens", 0)
    if name not in PAD_SHIFTS_POOLING:
        assert len(sequence) - 1 == case["pooled_index"]
    if "pixel_sha256_uint8" in case and not case.get("truncated_after_splice"):
        assert crop_hashes(make_item(case, golden), config) == case["pixel_sha256_uint8"]
    if name in pixels:
        np.testing.assert_array_equal(sequence.crops.transpose(0, 3, 1, 2), pixels[name])

    if name in PAD_SHIFTS_POOLING:
        return
    batch = pack_alone(sequence, config)
    embedding = jitted(config)({"params": golden_model.params}, batch)[0, 0, 0]
    np.testing.assert_allclose(
        embedding, embeddings[f"{name}/embedding"], rtol=0, atol=EMBEDDING_TOLERANCE
    )


def crop_hashes(item, config):
    """sha256 of each image's crops as the reference stores them: uint8 [n, 3, S, S]."""
    from llave_jax.inputs import anyres
    from llave_jax.inputs.crops import resize_to_crop
    from llave_jax.inputs.images import load_image

    if item.video is not None:
        groups = [
            np.stack(
                [
                    resize_to_crop(frame.convert("RGB"), config.vision.image_size)
                    for frame in item.video
                ]
            )
        ]
    else:
        groups = [
            anyres.image_crops(load_image(path), config.inputs, config.vision.crop)
            for path in item.images
        ]
    return [
        hashlib.sha256(np.ascontiguousarray(g.transpose(0, 3, 1, 2)).tobytes()).hexdigest()
        for g in groups
    ]


@pytest.mark.parametrize(
    "name",
    ["text_dataset", "image_tiny", "image_wide", "two_images", "image_text_truncated", "video"],
)
def test_intermediates(name, golden, golden_model, cases, intermediates):
    config, sequence = build(golden_model, cases[name], golden)
    batch = pack_alone(sequence, config)
    variables = {"params": golden_model.params}
    crops, length = len(sequence.crops), len(sequence)

    if f"{name}/vision_out" in intermediates and crops:
        vision = jitted(config, Llave.vision_features)(variables, batch.patches, batch.zero_crops)
        assert_relative(vision[0, :crops], intermediates[f"{name}/vision_out"])
        projected = jitted(config, project)(variables, vision)
        assert_relative(projected[0, :crops], intermediates[f"{name}/projector_out"])
    embeds = jitted(config, Llave.inputs_embeds)(variables, batch)
    assert_relative(embeds[0, 0, :length], intermediates[f"{name}/inputs_embeds"])
    hidden = jitted(config, Llave.hidden_states)(variables, batch)
    assert_relative(hidden[0, 0, :length], intermediates[f"{name}/last_hidden_state"])


def project(model, features):
    return model.projector(features)


@pytest.mark.parametrize("batch", ["batch_mixed", "batch_text_dummies"])
def test_batch(batch, golden, golden_model, cases, embeddings):
    """The reference's padded batches, as one packed batch."""
    info = load_cases(golden)["batches"][batch]
    members = [m for m in info["members"] if m not in IMAGE_IN_FRONT]
    sequences = [build(golden_model, cases[m], golden)[1] for m in members]
    budget = Budget(rows=2, row_length=1024, crops=16, groups=len(members), sides=1)
    packer = Packer(budget, 1, golden_model.config.vision.crop)
    for sequence in sequences:
        assert packer.add([sequence])
    actual = jitted(golden_model.config)({"params": golden_model.params}, packer.emit()[0])
    rows = [info["members"].index(m) for m in members]
    np.testing.assert_allclose(
        actual[0, 0], embeddings[f"{batch}/embedding"][rows], rtol=0, atol=EMBEDDING_TOLERANCE
    )


def test_the_zero_picture_is_no_grey_picture(golden_model, cases, embeddings):
    """So that the case of a marker without an image tells zero from the uint8 values around it."""
    text, size = cases["quirk_token_without_image"]["text"], golden_model.config.vision.image_size
    config = dataclasses.replace(
        golden_model.config, inputs=dataclasses.replace(golden_model.config.inputs, pinpoints=())
    )
    builder = SequenceBuilder(golden_model.tokenizer, config.input_spec)
    for value in (127, 128):
        grey = PIL.Image.new("RGB", (size, size), (value,) * 3)
        batch = pack_alone(builder(Item(text, images=(grey,))), config)
        embedding = jitted(config)({"params": golden_model.params}, batch)[0, 0, 0]
        difference = np.abs(embedding - embeddings["quirk_token_without_image/embedding"]).max()
        assert difference > 10 * EMBEDDING_TOLERANCE


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused(name, golden, golden_model, cases):
    """The reference takes the first image again; here it is an error."""
    with pytest.raises(ValueError, match=rf"{name}.*marker.*image"):
        build(golden_model, cases[name], golden)


def test_pad_in_text_is_dropped(golden_model):
    builder = SequenceBuilder(golden_model.tokenizer, golden_model.config.input_spec)
    tokens = builder(Item("A brown dog<|endoftext|> looks")).tokens
    assert golden_model.tokenizer.pad_token_id not in tokens
    assert len(tokens) == len(builder(Item("A brown dog")).tokens) + len(
        golden_model.tokenizer.encode(" looks")
    )


def test_frame_sampling(golden):
    for case in load_cases(golden)["video_frame_sampling"]:
        if case["force_sample"]:
            continue  # an option of the authors' code that LLaVE does not use
        indices = video.sample_frame_indices(
            case["total_frames"],
            case["fps"],
            frames_per_second=case["video_fps"],
            max_frames=case["frames_upbound"],
        )
        assert indices == case["frame_idx"]


def test_best_canvas(golden):
    table = load_cases(golden)["best_resolution_table"]
    for grid, width, height, best_width, best_height in table["rows"]:
        pinpoints = grid_pinpoints(table["tower_image_size"], grid, grid)
        assert best_canvas(width, height, pinpoints) == (best_height, best_width)


def test_order_of_a_batch_changes_nothing(golden, golden_model, cases):
    names = ["text_caption", "image_wide", "image_tiny", "text_empty", "image_square"]
    sequences = {n: build(golden_model, cases[n], golden)[1] for n in names}

    def embed(order):
        packer = Packer(Budget(2, 400, 12, len(names), sides=1), 1, golden_model.config.vision.crop)
        for name in order:
            assert packer.add([sequences[name]], name)
        batch, ids = packer.emit()
        result = jitted(golden_model.config)({"params": golden_model.params}, batch)[0, 0]
        return {name: result[ids[0].index(name)] for name in names}

    forward, backward = embed(names), embed(names[::-1])
    for name in names:
        np.testing.assert_allclose(forward[name], backward[name], rtol=0, atol=1e-6)
