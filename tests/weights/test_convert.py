"""Conversion of Hugging Face checkpoints: values, byte-identical round trips, and every error."""

from __future__ import annotations

import dataclasses
import json
import shutil
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from llave_jax.inputs.config import InputConfig
from llave_jax.models.config import PRESETS, LlaveConfig, TextConfig, VisionConfig
from llave_jax.models.parameters import EMBEDDING as EMBEDDING_ROW
from llave_jax.models.parameters import WEIGHTS, layer_shape, parameter_shapes
from llave_jax.weights import hf_config, hf_names, model_dir
from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.safetensors_io import CheckpointError, SafetensorsWriter
from llave_jax.weights.to_hf import convert_to_hf
from tests.weights import convert_checkpoints as checkpoints
from tests.weights.convert_checkpoints import assert_same_files, golden_tensors, renamed, write_hf
from tools import convert_hf

VISION = "model.vision_tower.vision_tower.vision_model"
EMBEDDING = "model.embed_tokens.weight"


def convert(source, output, **options):
    return convert_from_hf(source, output, show_progress=False, **options)


def export(source, output, layout, **options):
    convert_to_hf(source, output, layout, show_progress=False, **options)


@pytest.fixture(scope="module")
def converted(golden, tmp_path_factory):
    """The golden checkpoint as a model directory."""
    path = tmp_path_factory.mktemp("converted") / "model"
    convert(golden / "checkpoint", path)
    return path


# Values


def test_golden_configuration(converted):
    assert model_dir.load_config(converted) == LlaveConfig(
        vision=VisionConfig(48, 2, 4, 96, 224, 30),
        text=TextConfig(64, 3, 4, 2, 128, 600),
        inputs=InputConfig(
            # The authors' pairs are (width, height).
            pinpoints=((224, 224), (448, 224), (224, 448), (448, 448)),
            newline_position="grid",
            max_text_length=512,
            max_length=512,
        ),
    )


def test_golden_values(converted):
    """Each kind of tensor, against formulas of its own."""
    ours, theirs = load_file(converted / "model.safetensors"), golden_tensors()
    layer, tower = "model.layers.2", f"{VISION}.encoder.layers.1"
    attention = "language_model/layers/self_attn"
    vision = "vision_tower/layers"

    def assert_linear(kernel, bias, name, split):
        x = np.random.default_rng(0).normal(size=theirs[f"{name}.weight"].shape[1])
        expected = theirs[f"{name}.weight"] @ x
        flat = kernel.reshape(len(x), -1) if split == "out" else kernel.reshape(-1, len(expected))
        np.testing.assert_allclose(x @ flat, expected, rtol=1e-6, atol=1e-6)
        if bias is not None:
            np.testing.assert_array_equal(bias.reshape(-1), theirs[f"{name}.bias"])

    assert ours[f"{attention}/q_proj/kernel"].shape == (3, 64, 4, 16)
    assert ours[f"{attention}/o_proj/kernel"].shape == (3, 4, 16, 64)
    for name in ("q_proj", "k_proj", "v_proj"):
        kernel, bias = (ours[f"{attention}/{name}/{part}"][2] for part in ("kernel", "bias"))
        assert_linear(kernel, bias, f"{layer}.self_attn.{name}", "out")
    assert_linear(ours[f"{attention}/o_proj/kernel"][2], None, f"{layer}.self_attn.o_proj", "in")
    for name in ("gate_proj", "up_proj", "down_proj"):
        kernel = ours[f"language_model/layers/mlp/{name}/kernel"][2]
        assert_linear(kernel, None, f"{layer}.mlp.{name}", "out")
    for name, split in (("q_proj", "out"), ("out_proj", "in")):
        kernel, bias = (ours[f"{vision}/self_attn/{name}/{part}"][1] for part in ("kernel", "bias"))
        assert_linear(kernel, bias, f"{tower}.self_attn.{name}", split)
    for name in ("input_layernorm", "post_attention_layernorm"):
        scale = ours[f"language_model/layers/{name}/scale"][2]
        np.testing.assert_array_equal(scale, theirs[f"{layer}.{name}.weight"])
    # Pixels of a patch are (row, column, channel) in ours, (channel, row, column) in theirs.
    patch = np.random.default_rng(0).normal(size=(30, 30, 3))
    convolution = theirs[f"{VISION}.embeddings.patch_embedding.weight"]
    np.testing.assert_allclose(
        patch.reshape(-1) @ ours["vision_tower/patch_embedding/kernel"],
        np.einsum("hwc,ochw->o", patch, convolution),
        rtol=1e-5,
        atol=1e-5,
    )
    for path, name in (
        ("language_model/embed_tokens/embedding", "model.embed_tokens.weight"),
        ("language_model/norm/scale", "model.norm.weight"),
        ("image_newline", "model.image_newline"),
        ("vision_tower/position_embedding", f"{VISION}.embeddings.position_embedding.weight"),
    ):
        np.testing.assert_array_equal(ours[path], theirs[name])
    assert set(load_file(converted / "carried.safetensors")) == {
        f"{VISION}.post_layernorm.weight",
        f"{VISION}.post_layernorm.bias",
    }


# Round trips


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", checkpoints.DTYPES)
@pytest.mark.parametrize("layout", checkpoints.LAYOUTS)
def test_round_trip_is_byte_identical(tmp_path, layout, dtype, shards):
    source = write_hf(tmp_path / "hf", layout, dtype=dtype, shards=shards)
    (source / "README.md").write_text("a model card\n")
    (source / "assets").mkdir()
    (source / "assets" / "training_args.bin").write_bytes(bytes(range(256)))
    convert(source, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "llave" if layout == "llave" else "onevision")
    assert_same_files(tmp_path / "back", source)
    stored = load_file(tmp_path / "ours" / "model.safetensors")
    assert {array.dtype for array in stored.values()} == {np.dtype(checkpoints.DTYPES[dtype])}


def test_round_trip_of_the_golden_checkpoint(golden, converted, tmp_path):
    export(converted, tmp_path / "back", "llave")
    assert_same_files(tmp_path / "back", golden / "checkpoint")


def test_dtypes_may_differ_between_parameters(tmp_path):
    tensors = golden_tensors()
    norms = [name for name in tensors if "layernorm" in name or name == "model.norm.weight"]
    half = {name: tensors[name].astype(np.float16) for name in tensors if name not in norms}
    source = write_hf(tmp_path / "hf")
    checkpoints.save_weights(source, tensors | half)
    convert(source, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "back", "llave")
    assert_same_files(tmp_path / "back", source)


@pytest.mark.parametrize("layout", ["llave", "hub"])
def test_other_layout_and_back(tmp_path, layout):
    """Nothing of the model is lost on the way through the other layout."""
    source = write_hf(tmp_path / "hf", layout, dtype="bfloat16")
    here, there = ("llave", "onevision") if layout == "llave" else ("onevision", "llave")
    config = convert(source, tmp_path / "a")
    export(tmp_path / "a", tmp_path / "translated", there)
    assert convert(tmp_path / "translated", tmp_path / "b") == config
    export(tmp_path / "b", tmp_path / "back", here)
    assert convert(tmp_path / "back", tmp_path / "c") == config
    for name in ("a", "b", "c"):
        weights = (tmp_path / name / "model.safetensors").read_bytes()
        assert weights == (tmp_path / "a" / "model.safetensors").read_bytes()
    before, after = load_file(source / "model.safetensors"), {}
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(after[name], array)
    if layout == "llave":
        original = checkpoints.golden_config("llave")
        returned = json.loads((tmp_path / "back" / "config.json").read_text())
        assert {**returned, "mm_vision_tower": original["mm_vision_tower"]} == original | {
            "torch_dtype": "bfloat16"
        }


def test_shards_have_an_index(converted, tmp_path, monkeypatch):
    monkeypatch.setattr("llave_jax.weights.to_hf.SHARD_BYTES", 520_000)
    export(converted, tmp_path / "hf", "onevision")
    shards = sorted((tmp_path / "hf").glob("model-*.safetensors"))
    assert len(shards) == 4
    sizes = [sum(array.nbytes for array in load_file(shard).values()) for shard in shards]
    assert max(sizes) <= 520_000
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(sizes)
    assert convert(tmp_path / "hf", tmp_path / "again") == model_dir.load_config(converted)


def test_changed_input_settings_reach_the_hf_config(golden, converted, tmp_path):
    shutil.copytree(
        golden / "siglip-tiny-open-patch30-224", tmp_path / "siglip-tiny-open-patch30-224"
    )
    changed = tmp_path / "changed"
    config = model_dir.load_config(converted)
    inputs = dataclasses.replace(
        config.inputs, max_length=128, max_text_length=96, newline_position="frame"
    )
    params = model_dir.open_params(converted)
    model_dir.write_model_dir(
        changed, dataclasses.replace(config, inputs=inputs), params, source=converted
    )
    for layout in ("llave", "onevision"):
        export(changed, tmp_path / layout, layout)
        assert convert(tmp_path / layout, tmp_path / f"{layout}-again").inputs == inputs
    values = json.loads((tmp_path / "llave" / "config.json").read_text())
    assert values["tokenizer_model_max_length"] == 128
    values_of_tokenizer = json.loads((tmp_path / "llave" / "tokenizer_config.json").read_text())
    assert values_of_tokenizer["model_max_length"] == 96
    assert values["alpha"] == 9.0


# The name table


@pytest.mark.parametrize("layout", hf_names.LAYOUTS)
def test_every_name_matches_one_row(layout):
    tensors = hf_names.parameter_tensors(PRESETS["llave-0.5b"])
    tensors += [hf_names.HfTensor(weight) for weight in WEIGHTS if not weight.path]
    written = [hf_names.hf_name(tensor, layout) for tensor in tensors]
    assert len(set(written)) == len(written)
    assert [hf_names.find_tensor(name, layout) for name in written] == tensors


@hypothesis.given(name=st.from_regex(r"[a-z_.0-9]{0,60}", fullmatch=True))
def test_other_names_match_nothing(name):
    for layout in hf_names.LAYOUTS:
        tensor = hf_names.find_tensor(name, layout)
        assert tensor is None or name in {
            hf_names.hf_name(tensor, layout).replace(prefixes[0], prefix)
            for prefixes in hf_names.LAYOUTS[layout].values()
            for prefix in prefixes
        }


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.01.input_layernorm.weight",
        "model.layers.0.input_layernorm.weight.scale",
        "xmodel.norm.weight",
        "model.norm-weight",
        "model.layers.0.self_attn.o_proj.bias",
    ],
)
def test_similar_names_match_nothing(name):
    assert hf_names.find_tensor(name, "llave") is None


@pytest.mark.parametrize("weight", WEIGHTS, ids=lambda weight: weight.hf_name)
@hypothesis.settings(max_examples=5)
@hypothesis.given(data=st.data())
def test_transforms_invert_one_another(weight, data):
    size = st.integers(1, 3)
    heads, kv, head, v_heads, v_head = (data.draw(size) for _ in range(5))
    config = LlaveConfig(
        VisionConfig(v_heads * v_head, 1, v_heads, data.draw(size), 5, data.draw(size)),
        TextConfig(heads * kv * 2 * head, 1, heads * kv * 2, kv, data.draw(size), data.draw(size)),
        PRESETS["tiny"].inputs,
    )
    shape = hf_names.hf_shape(weight, config)
    theirs = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    ours = hf_names.from_hf(weight, theirs, config)
    assert ours.shape == layer_shape(weight, config)
    np.testing.assert_array_equal(hf_names.to_hf(weight, ours, config), theirs)


# Weights that do not fit

NEEDED = sorted(name for name in golden_tensors() if "post_layernorm" not in name)


def refused(tmp_path, tensors, layout="llave", **options):
    """The message of the error that a checkpoint of `tensors` gives; nothing is left behind."""
    source = write_hf(tmp_path / "hf", layout, tensors=tensors, **options)
    with pytest.raises(CheckpointError) as error:
        convert(source, tmp_path / "ours")
    kept = {source, tmp_path / "siglip-tiny-open-patch30-224"}
    assert set(tmp_path.iterdir()) <= kept
    return str(error.value)


@pytest.mark.parametrize("name", NEEDED[::7])
def test_missing_tensor(tmp_path, name):
    tensors = golden_tensors()
    shape = list(tensors.pop(name).shape)
    assert refused(tmp_path, tensors).splitlines()[1:] == [f"  missing: {name} {shape}"]


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.up_proj.weight",
        f"{VISION}.encoder.layers.3.mlp.fc1.weight",
        "model.norm.bias",
        "model.rotary.inv_freq",
    ],
)
def test_surplus_tensor(tmp_path, name):
    tensors = golden_tensors() | {name: np.zeros(5, np.float32)}
    (line,) = refused(tmp_path, tensors).splitlines()[1:]
    assert line == f"  surplus: {name} [5] is not part of the model"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("language_model.model.norm.weight", "model.language_model.norm.weight"),
        ("vision_tower.vision_model.embeddings.patch_embedding.bias",
         "vision_tower.embeddings.patch_embedding.bias"),
        ("image_newline", "model.image_newline"),
    ],
)  # fmt: skip
def test_doubly_matched_tensor(tmp_path, first, second):
    tensors = renamed(golden_tensors(), "hub")
    tensors[second] = tensors[first]
    (line,) = refused(tmp_path, tensors, "hub").splitlines()[1:]
    assert line.startswith("  double: ")
    assert first in line
    assert second in line


def test_name_of_two_rows_is_an_error_of_the_table(monkeypatch):
    doubled = (*WEIGHTS, dataclasses.replace(EMBEDDING_ROW, path="elsewhere"))
    monkeypatch.setattr(hf_names, "WEIGHTS", doubled)
    hf_names._patterns.cache_clear()
    with pytest.raises(ValueError, match="matches several rows of the table of weights"):
        hf_names.find_tensor("model.embed_tokens.weight", "llave")
    hf_names._patterns.cache_clear()


# Of the embedding only the width can be wrong: its rows are what they are.
@pytest.mark.parametrize("name", sorted(golden_tensors().keys() - {EMBEDDING})[::7])
def test_mis_shaped_tensor(tmp_path, name):
    tensors = golden_tensors()
    before = list(tensors[name].shape)
    tensors[name] = tensors[name][:-1]
    (line,) = refused(tmp_path, tensors).splitlines()[1:]
    assert line == f"  shape: {name} is {list(tensors[name].shape)}; expected {before}"


@pytest.mark.parametrize("name", [EMBEDDING, "lm_head.weight"])
def test_vocabulary_of_another_width(tmp_path, name):
    tensors = golden_tensors() | {name: np.zeros((600, 65), np.float32)}
    (line,) = refused(tmp_path, tensors).splitlines()[1:]
    assert line == f"  shape: {name} is [600, 65]; expected [600, 64]"


def test_transposed_tensor(tmp_path):
    tensors = golden_tensors()
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    assert f"shape: {name} is [128, 64]; expected [64, 128]" in refused(tmp_path, tensors)


@hypothesis.settings(
    max_examples=10, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
@hypothesis.given(
    missing=st.sets(st.sampled_from(NEEDED), max_size=3),
    surplus=st.sets(st.sampled_from(["a", "model.b", "model.layers.9.c"])),
    shaped=st.sets(st.sampled_from(NEEDED), max_size=3),
)
def test_all_faults_are_listed(tmp_path, missing, surplus, shaped):
    tensors = golden_tensors()
    tensors |= {name: tensors[name][None] for name in shaped}
    tensors |= {name: np.zeros(1, np.float32) for name in surplus}
    tensors = {name: array for name, array in tensors.items() if name not in missing}
    shaped -= missing
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    if not (missing or surplus or shaped):
        return
    lines = refused(tmp_path, tensors).splitlines()[1:]
    found = {tuple(line.split()[:2]) for line in lines}
    assert found == (
        {("missing:", name) for name in missing}
        | {("surplus:", name) for name in surplus}
        | {("shape:", name) for name in shaped}
    )


def test_mixed_dtypes_within_a_stack(tmp_path):
    tensors = golden_tensors()
    source = write_hf(tmp_path / "hf")
    name = "model.layers.1.mlp.up_proj.weight"
    checkpoints.save_weights(source, tensors | {name: tensors[name].astype(np.float16)})
    with pytest.raises(CheckpointError, match=rf"share one dtype, but .*{name} is F16"):
        convert(source, tmp_path / "ours")


def test_unknown_dtype(tmp_path):
    source = write_hf(tmp_path / "hf")
    tensors = golden_tensors() | {"model.norm.weight": np.zeros(64, np.int8)}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has dtype I8; expected one of"):
        convert(source, tmp_path / "ours")


# The LM head and the rest of the tower


def test_tied_head_is_kept_once(tmp_path):
    tensors = golden_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    source = write_hf(tmp_path / "hf", tensors=tensors)
    convert(source, tmp_path / "ours")
    assert "lm_head.weight" not in load_file(tmp_path / "ours" / "carried.safetensors")
    export(tmp_path / "ours", tmp_path / "back", "llave")
    assert_same_files(tmp_path / "back", source)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("layout", ["llave", "hub"])
def test_own_head_is_carried(tmp_path, tied, layout):
    tensors = golden_tensors()
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2
    config = checkpoints.golden_config(layout)
    (config if layout == "llave" else config["text_config"])["tie_word_embeddings"] = tied
    source = write_hf(tmp_path / "hf", layout, tensors=renamed(tensors, layout), config=config)
    convert(source, tmp_path / "ours")
    here, there = ("llave", "onevision") if layout == "llave" else ("onevision", "llave")
    export(tmp_path / "ours", tmp_path / "back", here)
    assert_same_files(tmp_path / "back", source)
    export(tmp_path / "ours", tmp_path / "translated", there)
    (head,) = (
        array
        for name, array in load_file(tmp_path / "translated" / "model.safetensors").items()
        if "lm_head" in name
    )
    np.testing.assert_array_equal(head, tensors["lm_head.weight"])
    values = json.loads((tmp_path / "translated" / "config.json").read_text())
    assert values["tie_word_embeddings"] is False


def full_tower(golden):
    """Tensors of the golden checkpoint with the layer and the head that LLaVE drops."""
    tower = load_file(golden / "siglip-tiny-open-patch30-224" / "model.safetensors")
    prefix = VISION.removesuffix("vision_model")
    dropped = {f"{prefix}{name}": array for name, array in tower.items()}
    return dropped | golden_tensors()


def test_full_tower_of_the_llave_layout(golden, tmp_path):
    source = write_hf(tmp_path / "hf", tensors=full_tower(golden))
    assert convert(source, tmp_path / "ours").vision.num_layers == 2
    carried = load_file(tmp_path / "ours" / "carried.safetensors")
    assert f"{VISION}.encoder.layers.2.mlp.fc1.weight" in carried
    assert f"{VISION}.head.probe" in carried
    export(tmp_path / "ours", tmp_path / "back", "llave")
    assert_same_files(tmp_path / "back", source)


@pytest.mark.parametrize(("layer", "running"), [(-1, 3), (-2, 2), (2, 2), (-3, 1)])
def test_feature_layer_of_the_onevision_layout(golden, tmp_path, layer, running):
    config = checkpoints.golden_config("hub") | {"vision_feature_layer": layer}
    config["vision_config"]["num_hidden_layers"] = 3
    tensors = renamed(full_tower(golden), "hub")
    source = write_hf(tmp_path / "hf", "hub", tensors=tensors, config=config)
    assert convert(source, tmp_path / "ours").vision.num_layers == running
    export(tmp_path / "ours", tmp_path / "back", "onevision")
    assert_same_files(tmp_path / "back", source)


# Configurations


def test_tower_configuration_is_asked_for(golden, tmp_path):
    source = write_hf(tmp_path / "hf", changes={"mm_vision_tower": "someone/tower"})
    with pytest.raises(CheckpointError, match=r"'someone/tower'.*--vision-config FILE"):
        convert(source, tmp_path / "ours")
    tower = golden / "siglip-tiny-open-patch30-224" / "config.json"
    config = convert(source, tmp_path / "ours", vision_config=tower)
    assert config.vision.num_heads == 4


def test_usual_tower_is_known_by_its_shapes(tmp_path):
    tensors = golden_tensors()
    source = write_hf(tmp_path / "hf", changes={
        "mm_vision_tower": "google/siglip-so400m-patch14-384",
        "image_grid_pinpoints": "(1x1),...,(2x3)",
    })  # fmt: skip
    shapes = {name: array.shape for name, array in tensors.items()}
    with pytest.raises(CheckpointError, match="--vision-config"):
        hf_config.read_hf_model(source, shapes)
    model = hf_config.read_hf_model(source, shapes | so400m_shapes(26))
    assert model.config.vision == PRESETS["llave-0.5b"].vision
    assert model.tower_layers == 27
    # (width, height), the height running fastest, to (height, width).
    assert model.config.inputs.pinpoints == (
        (384, 384), (768, 384), (1152, 384), (384, 768), (768, 768), (1152, 768),
    )  # fmt: skip


def so400m_shapes(layers):
    return {
        f"{VISION}.embeddings.patch_embedding.weight": (1152, 3, 14, 14),
        f"{VISION}.embeddings.position_embedding.weight": (729, 1152),
    } | {f"{VISION}.encoder.layers.{n}.mlp.fc1.weight": (4304, 1152) for n in range(layers)}


@pytest.mark.parametrize(("stored", "running"), [(3, 3), (25, 25), (26, 26), (27, 26), (28, 26)])
def test_layers_of_the_usual_tower_are_those_stored(tmp_path, caplog, stored, running):
    source = write_hf(tmp_path / "hf", changes={
        "mm_vision_tower": "/somewhere/else/siglip",
        "image_grid_pinpoints": "(1x1),...,(2x2)",
    })  # fmt: skip
    model = hf_config.read_hf_model(source, so400m_shapes(stored))
    assert model.config.vision.num_layers == running
    # The 27th is carried; an 28th would be surplus.
    assert model.tower_layers == 27
    assert ("the vision tower has" in caplog.text) == (stored < 26)


def test_settings_of_the_inputs(tmp_path):
    changes = {
        "image_aspect_ratio": "anyres",
        "image_grid_pinpoints": "[(224, 448), (448, 224)]",
        "mm_newline_position": None,
        "mm_spatial_pool_mode": "max",
        "mm_spatial_pool_stride": 4,
        "tokenizer_model_max_length": 4096,
    }
    source = write_hf(tmp_path / "hf", changes=changes)
    tokenizer = json.loads((source / "tokenizer_config.json").read_text())
    tokenizer["model_max_length"] = 10**30
    (source / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    assert convert(source, tmp_path / "ours").inputs == InputConfig(
        pinpoints=((448, 224), (224, 448)),
        anyres_max=None,
        newline_position="one_token",
        pool_mode="max",
        pool_stride=4,
        max_text_length=32768,
        max_length=4096,
    )
    # transformers has no unlimited tiling; the limit written never acts.
    export(tmp_path / "ours", tmp_path / "onevision", "onevision")
    values = json.loads((tmp_path / "onevision" / "config.json").read_text())
    assert values["vision_aspect_ratio"] == "anyres_max_2"


@pytest.mark.parametrize(
    ("layout", "changes", "message"),
    [
        ("llave", {"architectures": ["LlavaLlamaForCausalLM"]}, "only LlavaQwenForCausalLM is"),
        ("llave", {"mm_projector_type": "linear"}, 'mm_projector_type is "linear"'),
        ("llave", {"mm_patch_merge_type": "flat"}, 'mm_patch_merge_type is "flat"'),
        ("llave", {"mm_resampler_type": "perceiver"}, 'mm_resampler_type is "perceiver"'),
        ("llave", {"add_faster_video": True}, "add_faster_video is true"),
        ("llave", {"hidden_act": "gelu"}, 'hidden_act is "gelu"; only "silu"'),
        ("llave", {"use_sliding_window": True}, "use_sliding_window is true"),
        ("llave", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "of type 'yarn'"),
        ("llave", {"image_aspect_ratio": "pad"}, "by 'pad'; expected anyres or anyres_max_N"),
        ("llave", {"image_grid_pinpoints": None}, "image_grid_pinpoints is null; expected"),
        ("llave", {"image_grid_pinpoints": "any"}, 'image_grid_pinpoints is "any"; expected'),
        ("llave", {"image_grid_pinpoints": [[224, 300]]}, "300 x 224; expected multiples of"),
        ("llave", {"mm_newline_position": "never"}, "config.json: newline_position is 'never'"),
        ("llave", {"num_key_value_heads": 3}, "do not divide one another"),
        (
            "hub",
            {"architectures": ["LlavaNextForConditionalGeneration"], "model_type": "llava_next"},
            r'architectures \["LlavaNext.*"\], model_type "llava_next".* only LlavaOnevision',
        ),
        ("hub", {"projector_hidden_act": "relu"}, 'projector_hidden_act is "relu"'),
        ("hub", {"vision_feature_select_strategy": "default"}, 'strategy is "default"'),
        ("hub", {"vision_feature_layer": [-1, -2]}, r"vision_feature_layer is \[-1, -2\]"),
        ("hub", {"vision_feature_layer": 5}, "vision_feature_layer is 5; expected one layer"),
        ("hub", {"vision_config": {"model_type": "clip_vision_model"}}, "clip_vision_model"),
        ("hub", {"multimodal_projector_bias": False}, "multimodal_projector_bias is false"),
    ],
)
def test_unsupported_settings(tmp_path, layout, changes, message):
    source = write_hf(tmp_path / "hf", layout, changes=changes)
    with pytest.raises(ValueError, match=message):
        convert(source, tmp_path / "ours")
    assert not (tmp_path / "ours").exists()


def test_unsupported_normalisation(tmp_path):
    source = write_hf(tmp_path / "hf", "hub")
    (source / "preprocessor_config.json").write_text('{"image_mean": [0.48, 0.46, 0.41]}')
    with pytest.raises(CheckpointError, match=r"image_mean is \[0\.48, 0\.46, 0\.41\]; only"):
        convert(source, tmp_path / "ours")


def test_nested_rotary_settings(tmp_path):
    """transformers 5 writes `rope_parameters`."""
    config = checkpoints.golden_config("hub")
    del config["text_config"]["rope_theta"]
    config["text_config"]["rope_parameters"] = {"rope_theta": 5e5, "rope_type": "default"}
    source = write_hf(tmp_path / "hf", "hub", config=config)
    assert convert(source, tmp_path / "ours").text.rope_theta == 5e5


# Files


def test_pickled_weights_are_refused(tmp_path):
    source = write_hf(tmp_path / "hf")
    (source / "model.safetensors").unlink()
    (source / "pytorch_model.bin").write_bytes(b"\x80\x04 a pickle that must not be opened")
    with pytest.raises(CheckpointError, match=r"only pickled weights \(pytorch_model\.bin\).*safe"):
        convert(source, tmp_path / "ours")
    (source / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no weights; expected model\.safetensors"):
        convert(source, tmp_path / "ours")


def test_pickled_weights_beside_are_left_out(tmp_path, caplog):
    source = write_hf(tmp_path / "hf")
    (source / "pytorch_model.bin").write_bytes(b"not read")
    (source / ".cache").mkdir()
    (source / ".cache" / "download.json").write_text("{}")
    convert(source, tmp_path / "ours")
    assert "pytorch_model.bin" in caplog.text
    copied = {path.name for path in (tmp_path / "ours" / "source").rglob("*")}
    assert not copied & {"pytorch_model.bin", ".cache", "model.safetensors"}


def test_index_and_shards_must_agree(tmp_path):
    source = write_hf(tmp_path / "hf", shards=2)
    index = source / "model.safetensors.index.json"
    original = index.read_text()
    first, second = sorted(source.glob("model-*.safetensors"))

    def message():
        with pytest.raises(CheckpointError) as error:
            convert(source, tmp_path / "ours")
        return str(error.value)

    values = json.loads(original)
    del values["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(values))
    assert f"tensor model.norm.weight is listed in None, but is in {first.name}" in message()
    index.write_text(original)
    shutil.copyfile(first, source / "model-00003-of-00003.safetensors")
    assert "model-00003-of-00003.safetensors beside the weights" in message()
    (source / "model-00003-of-00003.safetensors").unlink()
    shutil.copyfile(first, second)
    assert f"is in both {first} and {second}" in message()
    second.unlink()
    assert f"names {second.name}, which {source} lacks" in message()


@pytest.mark.parametrize("name", ["tokenizer_config.json", "config.json"])
def test_missing_files(tmp_path, name):
    source = write_hf(tmp_path / "hf")
    (source / name).unlink()
    with pytest.raises(CheckpointError, match=rf"{name}: no such file"):
        convert(source, tmp_path / "ours")


def test_missing_vocabulary(tmp_path):
    source = write_hf(tmp_path / "hf")
    (source / "tokenizer.json").unlink()
    (source / "merges.txt").unlink()
    with pytest.raises(CheckpointError, match="no tokenizer; expected"):
        convert(source, tmp_path / "ours")


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("direction", ["from", "to"])
def test_interruption_leaves_nothing(golden, converted, tmp_path, monkeypatch, failure, direction):
    write, calls = SafetensorsWriter.write, []

    def fail_late(*arguments):
        calls.append(arguments)
        if len(calls) == 50:
            raise failure
        write(*arguments)

    monkeypatch.setattr(SafetensorsWriter, "write", fail_late)
    run = {
        "from": lambda: convert(golden / "checkpoint", tmp_path / "out"),
        "to": lambda: export(converted, tmp_path / "out", "llave"),
    }[direction]
    with pytest.raises(failure):
        run()
    assert list(tmp_path.iterdir()) == []


def test_output_is_not_overwritten_unasked(golden, tmp_path):
    output = tmp_path / "ours"
    output.mkdir()
    convert(golden / "checkpoint", output)  # an empty directory is free
    with pytest.raises(FileExistsError, match="--overwrite"):
        convert(golden / "checkpoint", output)
    (output / "mine.txt").write_text("x")
    convert(golden / "checkpoint", output, overwrite=True)
    assert not (output / "mine.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["ours"]


def test_output_that_is_no_model_is_never_overwritten(golden, tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(FileExistsError, match="holds no model"):
        convert(golden / "checkpoint", tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_output_within_input(tmp_path):
    source = write_hf(tmp_path / "hf")
    for output in (source, source / "ours", tmp_path):
        with pytest.raises(ValueError, match="lie within one another"):
            convert(source, output, overwrite=True)
    assert (source / "model.safetensors").exists()


def test_memory(tmp_path):
    """Less than twice the largest tensor, in both directions, whatever the model's size."""
    vocab = 40_000
    tensors = golden_tensors() | {"model.embed_tokens.weight": np.zeros((vocab, 64), np.float32)}
    largest = vocab * 64 * 4
    # Many tensors of a fourth of the largest: holding on to them would show.
    tensors |= {
        f"model.layers.{n}.mlp.{name}_proj.weight": np.ones(shape, np.float32)
        for n in range(3)
        for name, shape in (
            ("gate", (10_000, 64)), ("up", (10_000, 64)), ("down", (64, 10_000)),
        )
    }  # fmt: skip
    changes = {"vocab_size": vocab, "intermediate_size": 10_000}
    source = write_hf(tmp_path / "hf", tensors=tensors, changes=changes)
    del tensors

    def peak(function, *arguments):
        tracemalloc.start()
        function(*arguments)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    slack = 4 << 20
    assert peak(convert, source, tmp_path / "ours") < 2 * largest + slack
    assert peak(export, tmp_path / "ours", tmp_path / "back", "llave") < 2 * largest + slack
    assert_same_files(tmp_path / "back", source)


# Models made here, and trained ones


@pytest.mark.parametrize("layout", hf_names.LAYOUTS)
@pytest.mark.parametrize("tied", [True, False])
def test_model_without_origin(golden, tmp_path, layout, tied):
    preset = PRESETS["tiny"]
    config = dataclasses.replace(
        preset, text=dataclasses.replace(preset.text, vocab_size=1024, tie_word_embeddings=tied)
    )
    rng = np.random.default_rng(0)
    params = {
        path: rng.normal(size=shape).astype(np.float32)
        for path, shape in parameter_shapes(config).items()
    }
    model_dir.write_model_dir(tmp_path / "ours", config, params, tokenizer=golden / "checkpoint")
    export(tmp_path / "ours", tmp_path / "hf", layout)
    again = convert(tmp_path / "hf", tmp_path / "again")
    assert again.vision == config.vision
    # There is no LM head to write: tied, the directory is complete.
    assert again.text == dataclasses.replace(config.text, tie_word_embeddings=True)
    kept = ("pinpoints", "anyres_max", "newline_position", "pool_mode", "max_length")
    for key in kept:
        assert getattr(again.inputs, key) == getattr(config.inputs, key)
    for path, array in model_dir.open_params(tmp_path / "again").items():
        np.testing.assert_array_equal(array, params[path])


def test_placeholder_rows_are_added_where_they_are_missing(golden, tmp_path):
    """The tokenizer has 590 tokens; <image> and <video> come behind, with embeddings of zero."""
    tensors = golden_tensors()
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:591]
    source = write_hf(tmp_path / "hf", tensors=tensors, changes={"vocab_size": 591})
    convert(source, tmp_path / "ours")
    export(tmp_path / "ours", tmp_path / "onevision", "onevision")
    values = json.loads((tmp_path / "onevision" / "config.json").read_text())
    assert (values["image_token_index"], values["video_token_index"]) == (590, 591)
    assert values["text_config"]["vocab_size"] == 640
    written = load_file(tmp_path / "onevision" / "model.safetensors")
    embedding = written["language_model.model.embed_tokens.weight"]
    np.testing.assert_array_equal(embedding[:591], tensors["model.embed_tokens.weight"])
    assert embedding.shape == (640, 64)
    assert not embedding[591:].any()


def test_tokenizer_keeps_its_ids_and_gains_placeholders(golden, converted, tmp_path):
    from transformers import AutoTokenizer

    export(converted, tmp_path / "onevision", "onevision")
    before = model_dir.load_tokenizer(converted)
    after = AutoTokenizer.from_pretrained(tmp_path / "onevision")
    for case in json.loads((golden / "tokenizer_cases.json").read_text())["cases"]:
        if "<image>" not in case["text"]:
            assert after(case["text"]).input_ids == before(case["text"]).input_ids
    assert after("<image>\n<video>").input_ids[::2] == [590, 591]
    conversation = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
        {"role": "assistant", "content": "\n"},
    ]
    assert after.apply_chat_template(conversation, tokenize=False) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n\n<|im_end|>\n"
    )


def test_training_run(tmp_path):
    """A run's float32 weights go back into the dtype and the files of the checkpoint it began from."""
    import orbax.checkpoint as ocp

    source = write_hf(tmp_path / "hf", "hub", dtype="bfloat16", shards=2)
    run = tmp_path / "run"
    config = convert(source, tmp_path / "start")
    model_dir.write_model_dir(run / "model", config, source=tmp_path / "start")
    (run / "config.json").write_text('{"seed": 0}')
    with pytest.raises(CheckpointError, match="no checkpoint yet"):
        export(run, tmp_path / "back", "onevision")

    started = model_dir.load_params(tmp_path / "start", dtype=np.float32)
    trained = jax.tree.map(lambda x: x * 1.5, started)
    for step, params in ((1, started), (12, trained)):
        with ocp.CheckpointManager(run / "checkpoints") as manager:
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(params)))
    export(run, tmp_path / "back", "onevision")
    for file in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        before, after = load_file(source / file), load_file(tmp_path / "back" / file)
        assert before.keys() == after.keys()
        for name, array in before.items():
            factor = 1 if "post_layernorm" in name else 1.5
            expected = (array.astype(np.float32) * factor).astype(array.dtype)
            np.testing.assert_array_equal(after[name], expected)
            assert after[name].dtype == array.dtype


def test_float16_overflow_is_an_error(tmp_path):
    source = write_hf(tmp_path / "hf", dtype="float16")
    convert(source, tmp_path / "ours")
    params = {
        name: np.asarray(array).astype(np.float32)
        for name, array in model_dir.open_params(tmp_path / "ours").items()
    }
    params["image_newline"][3] = 1e5
    config = model_dir.load_config(tmp_path / "ours")
    model_dir.write_model_dir(tmp_path / "trained", config, params, source=tmp_path / "ours")
    with pytest.raises(CheckpointError, match=r"model\.image_newline has values up to 1e\+05"):
        export(tmp_path / "trained", tmp_path / "back", "llave")


# The command


def test_command(golden, tmp_path, capsys):
    ours, back = str(tmp_path / "ours"), str(tmp_path / "back")
    source = str(golden / "checkpoint")
    assert convert_hf.main(["--input", source, "--output", ours]) == 0
    assert convert_hf.main(["--to-hf", "llave", "--input", ours, "--output", back]) == 0
    assert_same_files(tmp_path / "back", golden / "checkpoint")
    capsys.readouterr()
    assert convert_hf.main(["--input", source, "--output", ours]) == 2
    assert "error: " in capsys.readouterr().err
    assert convert_hf.main(["--input", source, "--output", ours, "--overwrite"]) == 0
    assert convert_hf.main(["--to-hf", "llave", "--input", str(tmp_path), "--output", back]) == 2
    assert "neither a model directory nor a training run" in capsys.readouterr().err
