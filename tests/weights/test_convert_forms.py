"""Checkpoints in the forms in which they are met: whatever wrote them, they are the same model.

The golden checkpoint is rewritten as the authors' and other people's tools have saved checkpoints
of this layout over time. Each form converts, embeds to the reference's numbers and comes back byte
for byte.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from llave_jax.embedding.embedder import Embedder
from llave_jax.inputs.batch import Budget
from llave_jax.inputs.packing import Packer
from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.models.llave import Llave
from llave_jax.parallel import sharding
from llave_jax.weights import hf_config, hf_names, model_dir
from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.safetensors_io import CheckpointError
from llave_jax.weights.to_hf import convert_to_hf
from tests.test_golden import load_cases, make_item
from tests.weights import convert_checkpoints as checkpoints
from tests.weights.convert_checkpoints import assert_same_files, golden_tensors, write_hf

EMBEDDING = "language_model/embed_tokens/embedding"
CASES = ("text_caption", "image_wide", "image_tiny", "two_images", "video")


def convert(source, output, **options):
    return convert_from_hf(source, output, show_progress=False, **options)


def assert_comes_back(source, converted, back):
    convert_to_hf(converted, back, "llave", show_progress=False)
    assert_same_files(back, source)


@functools.cache
def jitted(config):
    return jax.jit(Llave(config).apply)


def embed(directory, golden, golden_model):
    """Embeddings of CASES as the model directory says they are laid out, float32 [n, D]."""
    config = model_dir.load_config(directory)
    builder = SequenceBuilder(model_dir.load_tokenizer(directory), config.input_spec)
    cases = {case["name"]: case for case in load_cases(golden)["cases"]}
    budget = Budget(rows=2, row_length=512, crops=32, groups=len(CASES), sides=1, taps=4)
    packer = Packer(budget, 1, config.vision.crop)
    for name in CASES:
        assert packer.add([builder(make_item(cases[name], golden))])
    # Neither what the host does with items nor tying is part of the program: forms share one.
    assert config.vision == golden_model.config.vision
    text = dataclasses.replace(config.text, tie_word_embeddings=True)
    program = jitted(dataclasses.replace(golden_model.config, text=text))
    return program({"params": model_dir.load_params(directory)}, packer.emit()[0])[0, 0]


def expected(golden, newline_position="grid"):
    embeddings = np.load(golden / "embeddings.npz")
    rows = [embeddings[f"{name}/embedding"] for name in CASES]
    if newline_position != "grid":
        name = f"variant_mm_newline_position={newline_position}/video"
        rows[CASES.index("video")] = embeddings[f"{name}/embedding"]
    return np.stack(rows)


def without(values, *keys):
    assert not set(keys) - values.keys()
    return {key: value for key, value in values.items() if key not in keys}


def saved_as(values, model_type):
    return checkpoints.saved_by_transformers(values, model_type)


GOLDEN_CONFIG = checkpoints.golden_config("llave")
PINPOINTS = [[224, 224], [224, 448], [448, 224], [448, 448]]

# What config.json can say without meaning another model.
CONFIGS = {
    "qwen2": saved_as(GOLDEN_CONFIG, "qwen2"),
    "llava": saved_as(GOLDEN_CONFIG, "llava"),
    "llava twice": saved_as(saved_as(GOLDEN_CONFIG, "llava"), "llava"),
    "qwen2 on disk, relabelled llava": GOLDEN_CONFIG | {"model_type": "llava"},
    "no model_type": without(GOLDEN_CONFIG, "model_type"),
    "model_type of another family": GOLDEN_CONFIG | {"model_type": "mistral"},
    "no architectures": without(GOLDEN_CONFIG, "architectures"),
    "architectures null": GOLDEN_CONFIG | {"architectures": None},
    "no tie_word_embeddings": without(GOLDEN_CONFIG, "tie_word_embeddings"),
    "tie_word_embeddings wrong": GOLDEN_CONFIG | {"tie_word_embeddings": False},
    "no vocab_size": without(GOLDEN_CONFIG, "vocab_size"),
    "vocab_size wrong": GOLDEN_CONFIG | {"vocab_size": 151_936},
    "pinpoints as range": GOLDEN_CONFIG | {"image_grid_pinpoints": "(1x1),...,(2x2)"},
    "pinpoints as text": GOLDEN_CONFIG | {"image_grid_pinpoints": str([tuple(p) for p in PINPOINTS])},
    "pinpoints as JSON text": GOLDEN_CONFIG | {"image_grid_pinpoints": json.dumps(PINPOINTS)},
    "training left its traces": GOLDEN_CONFIG
    | {
        "_name_or_path": "lmms-lab/llava-onevision-qwen2-0.5b-ov",
        "delay_load": True,
        "freeze_mm_mlp_adapter": False,
        "image_crop_resolution": 224,
        "image_seq_length": 576,
        "image_split_resolution": 224,
        "image_token_index": 151646,
        "mm_pooling_position": "before",
        "mm_projector_lr": 1e-5,
        "mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter,mm_language_model",
        "pad_token_id": 587,
        "pos_skipping_range": 4096,
        "sliding_window": None,
        "tune_mm_mlp_adapter": False,
        "use_pos_skipping": True,
    },
    "sparse": without(
        GOLDEN_CONFIG, "add_faster_video", "mm_spatial_pool_mode", "mm_spatial_pool_stride",
        "use_pos_skipping", "use_sliding_window", "rope_scaling", "attention_dropout",
        "tie_word_embeddings", "vocab_size", "mm_use_im_start_end", "mm_resampler_type",
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", CONFIGS)
def test_configurations(form, golden, golden_model, tmp_path):
    source = write_hf(tmp_path / "hf", config=CONFIGS[form])
    assert convert(source, tmp_path / "ours") == golden_model.config
    actual = embed(tmp_path / "ours", golden, golden_model)
    np.testing.assert_allclose(actual, expected(golden), rtol=0, atol=1e-5)
    assert_comes_back(source, tmp_path / "ours", tmp_path / "back")


def test_what_nested_configurations_are_silent_about(golden, tmp_path):
    """transformers does not write what its own classes assume."""
    from transformers import Qwen2Config, SiglipVisionConfig

    config = {
        "model_type": "llava_onevision",
        "image_grid_pinpoints": [[224, 224]],
        "text_config": {},
        "vision_config": {},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    shutil.copyfile(
        golden / "checkpoint" / "tokenizer_config.json", tmp_path / "tokenizer_config.json"
    )
    embedding = {"language_model.model.embed_tokens.weight": (77, 4096)}
    found = hf_config.read_hf_model(tmp_path, embedding).config
    text, vision = Qwen2Config(), SiglipVisionConfig()
    assert (found.text.hidden_size, found.text.num_layers, found.text.num_kv_heads) == (
        text.hidden_size, text.num_hidden_layers, text.num_key_value_heads,
    )  # fmt: skip
    assert (found.text.rope_theta, found.text.vocab_size) == (10_000, 77)
    assert (found.vision.hidden_size, found.vision.patch_size) == (
        vision.hidden_size, vision.patch_size,
    )  # fmt: skip


def test_what_a_configuration_is_silent_about(golden, golden_model, tmp_path):
    """Where the newline goes in videos and the length have the authors' defaults."""
    config = without(GOLDEN_CONFIG, "mm_newline_position", "tokenizer_model_max_length")
    source = write_hf(tmp_path / "hf", config=saved_as(config, "llava"))
    inputs = convert(source, tmp_path / "ours").inputs
    assert (inputs.newline_position, inputs.max_length) == ("one_token", 2048)
    actual = embed(tmp_path / "ours", golden, golden_model)
    np.testing.assert_allclose(actual, expected(golden, "one_token"), rtol=0, atol=1e-5)
    assert_comes_back(source, tmp_path / "ours", tmp_path / "back")


@pytest.mark.parametrize("form", ["llava twice", "sparse", "training left its traces"])
def test_through_the_other_layout(form, golden_model, tmp_path):
    """Nothing foreign is taken for a setting of the other layout."""
    source = write_hf(tmp_path / "hf", config=CONFIGS[form])
    convert(source, tmp_path / "ours")
    convert_to_hf(tmp_path / "ours", tmp_path / "onevision", "onevision", show_progress=False)
    assert convert(tmp_path / "onevision", tmp_path / "again") == golden_model.config
    convert_to_hf(tmp_path / "again", tmp_path / "llave", "llave", show_progress=False)
    assert convert(tmp_path / "llave", tmp_path / "third") == golden_model.config


def resized(tensors, rows):
    """As `resize_token_embeddings` leaves it: rows cut off or added, the head along with them."""
    changed = dict(tensors)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if name in tensors:
            array = tensors[name]
            added = np.full((max(0, rows - len(array)), array.shape[1]), 7, array.dtype)
            changed[name] = np.concatenate([array[:rows], added])
    return changed


def with_head(tensors, head):
    embedding = tensors["model.embed_tokens.weight"]
    values = {"copy": embedding.copy(), "own": embedding[::-1] * 2}
    return tensors | ({"lm_head.weight": values[head]} if head else {})


def with_layers(tensors, dropped, golden):
    """The checkpoint with what the authors' code drops of the tower."""
    if not dropped:
        return tensors
    tower = load_file(golden / "siglip-tiny-open-patch30-224" / "model.safetensors")
    prefix = "model.vision_tower.vision_tower."
    wanted = {"layer": ".encoder.layers.2.", "head": ""}[dropped]
    return {f"{prefix}{name}": array for name, array in tower.items() if wanted in name} | tensors


# The tokenizer has 590 tokens.
@pytest.mark.parametrize(("rows", "head"), [(590, None), (704, "copy"), (704, "own")])
def test_resized_vocabularies(rows, head, golden, golden_model, tmp_path):
    tensors = resized(with_head(golden_tensors(), head), rows)
    source = write_hf(tmp_path / "hf", tensors=tensors, config=CONFIGS["llava"])
    text = convert(source, tmp_path / "ours").text
    assert text == dataclasses.replace(
        golden_model.config.text, vocab_size=rows, tie_word_embeddings=head is None
    )
    actual = embed(tmp_path / "ours", golden, golden_model)
    np.testing.assert_allclose(actual, expected(golden), rtol=0, atol=1e-5)
    assert_comes_back(source, tmp_path / "ours", tmp_path / "back")
    carried = load_file(tmp_path / "ours" / "carried.safetensors")
    assert ("lm_head.weight" in carried) == (head == "own")


@pytest.mark.parametrize("marker", [True, False])
def test_more_tokens_than_rows(golden, tmp_path, caplog, marker):
    """Some checkpoints have a row less than tokens, where the last token is `<image>`."""
    source = write_hf(tmp_path / "hf", tensors=resized(golden_tensors(), 590))
    checkpoints.add_token(source, "<image>" if marker else "<|vision_start|>", 590)
    convert(source, tmp_path / "ours")
    if marker:
        assert "the embedding has" not in caplog.text
    else:
        assert "590 rows, none for 1 token(s) of the tokenizer: '<|vision_start|>' (590)" in (
            caplog.text
        )
    assert_comes_back(source, tmp_path / "ours", tmp_path / "back")


@pytest.mark.parametrize("given", ["beside", "flag"])
@pytest.mark.parametrize("dropped", [None, "layer", "head"])
def test_towers(dropped, given, golden, golden_model, tmp_path):
    tensors = with_layers(golden_tensors(), dropped, golden)
    tower = golden / "siglip-tiny-open-patch30-224" / "config.json"
    changes = {"mm_vision_tower": "/mnt/models/siglip"} if given == "flag" else {}
    source = write_hf(tmp_path / "hf", tensors=tensors, config=CONFIGS["qwen2"], changes=changes)
    options = {"vision_config": tower} if given == "flag" else {}
    assert convert(source, tmp_path / "ours", **options) == golden_model.config
    actual = embed(tmp_path / "ours", golden, golden_model)
    np.testing.assert_allclose(actual, expected(golden), rtol=0, atol=1e-5)
    assert_comes_back(source, tmp_path / "ours", tmp_path / "back")


ABSENT = (
    "tie_word_embeddings", "vocab_size", "mm_newline_position", "tokenizer_model_max_length",
    "architectures", "transformers_version", "mm_spatial_pool_stride", "rope_scaling",
)  # fmt: skip
FOREIGN = {
    "text_config": {"model_type": "llama"},
    "vision_config": {"model_type": "clip_vision_model", "image_size": 336, "vocab_size": 32000},
    "ignore_index": -100,
    "delay_load": True,
    "image_token_index": 32000,
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
    "quantization_config": None,
    "auto_map": {},
}


@hypothesis.settings(
    max_examples=40, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    model_type=st.sampled_from(["qwen2", "llava", "llava_qwen"]),
    absent=st.sets(st.sampled_from(ABSENT)),
    foreign=st.sets(st.sampled_from(sorted(FOREIGN))),
    rows=st.integers(590, 700),
    head=st.sampled_from([None, "copy", "own"]),
    dropped=st.sampled_from([None, "layer", "head"]),
    shards=st.integers(1, 3),
    dtype=st.sampled_from(sorted(checkpoints.DTYPES)),
)
def test_any_form(
    model_type, absent, foreign, rows, head, dropped, shards, dtype,
    golden, golden_model, tmp_path_factory,
):  # fmt: skip
    """All of it together: the same parameters, and the same files on the way back."""
    path = tmp_path_factory.mktemp("form")
    config = without(GOLDEN_CONFIG | {"model_type": model_type}, *absent)
    config |= {key: FOREIGN[key] for key in foreign}
    tensors = with_layers(resized(with_head(golden_tensors(), head), rows), dropped, golden)
    source = write_hf(path / "hf", tensors=tensors, config=config, shards=shards, dtype=dtype)

    reference = golden_model.config
    inputs = dataclasses.replace(
        reference.inputs,
        newline_position="one_token" if "mm_newline_position" in absent else "grid",
        max_length=2048 if "tokenizer_model_max_length" in absent else 512,
    )
    text = dataclasses.replace(reference.text, vocab_size=rows, tie_word_embeddings=head is None)
    assert convert(source, path / "ours") == dataclasses.replace(
        reference, text=text, inputs=inputs
    )
    ours = model_dir.open_params(path / "ours")
    theirs = model_dir.open_params(golden_model.directory)
    assert ours.keys() == theirs.keys()
    common = min(rows, reference.text.vocab_size)
    for name, array in theirs.items():
        found = ours[name][:common] if name == EMBEDDING else ours[name]
        array = array[:common] if name == EMBEDDING else array
        np.testing.assert_array_equal(found, array.astype(checkpoints.DTYPES[dtype]))
    assert_comes_back(source, path / "ours", path / "back")


def test_through_the_embedder(golden, tmp_path):
    """What a user does with a checkpoint of the hub's oddest form, as one call."""
    tensors = with_layers(resized(with_head(golden_tensors(), "copy"), 605), "head", golden)
    source = write_hf(tmp_path / "hf", tensors=tensors, config=CONFIGS["llava"], shards=2)
    convert(source, tmp_path / "ours")
    (case,) = (case for case in load_cases(golden)["cases"] if case["name"] == "image_wide")
    images = [str(golden / "images" / image) for image in case["images"]]
    mesh = sharding.make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[:1])
    model = Embedder.from_pretrained(tmp_path / "ours", mesh=mesh)
    (actual,) = model.encode([{"text": case["text"], "images": images}])
    reference = np.load(golden / "embeddings.npz")["image_wide/embedding"]
    np.testing.assert_allclose(actual, reference, rtol=0, atol=1e-5)


@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_layouts_are_known_by_their_tensors(layout):
    assert hf_names.layout_of(checkpoints.renamed(golden_tensors(), layout)) == (
        "llave" if layout == "llave" else "onevision"
    )


def test_checkpoint_of_something_else(tmp_path):
    tensors = {"transformer.h.0.attn.weight": np.zeros(3, np.float32)}
    source = write_hf(tmp_path / "hf", tensors=tensors, config={"architectures": ["GPT2LMHead"]})
    with pytest.raises(CheckpointError, match=r"neither a LLaVE.*transformer\.h\.0.*GPT2LMHead"):
        convert(source, tmp_path / "ours")


def test_same_names_of_another_language_model(tmp_path):
    """A Llama has no biases of queries, keys and values: the message says which tensors lack."""
    tensors = {
        name: array
        for name, array in golden_tensors().items()
        if not (name.startswith("model.layers.") and name.endswith(".bias"))
    }
    source = write_hf(
        tmp_path / "hf", tensors=tensors, config=without(GOLDEN_CONFIG, "architectures")
    )
    with pytest.raises(
        CheckpointError, match=r"missing: model\.layers\.0\.self_attn\.q_proj\.bias"
    ):
        convert(source, tmp_path / "ours")
