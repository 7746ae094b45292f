"""Checkpoints and model directories that are broken or made to do harm: refused with their file and reason,
before anything is allocated, run, or written elsewhere."""

from __future__ import annotations

import json
import os
import shutil

import numpy as np
import pytest

from llave_jax.weights import model_dir
from llave_jax.weights.from_hf import convert_from_hf
from llave_jax.weights.safetensors_io import CheckpointError, SafetensorsFile
from llave_jax.weights.to_hf import convert_to_hf
from llave_jax.weights.tokenizer_files import load_tokenizer
from tests.weights.convert_checkpoints import golden_config, golden_tensors, write_hf


def refused(source, tmp_path) -> str:
    """The message of the conversion's error; nothing is left behind."""
    with pytest.raises(CheckpointError) as error:
        convert_from_hf(source, tmp_path / "ours", show_progress=False)
    assert not list(tmp_path.glob("*ours*"))
    assert len(str(error.value)) < 1000
    return str(error.value)


NUMBERS = [0, -1, "3", 1.5, True, [3], 10**9, 10**30]


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "tokenizer_model_max_length",
        "mm_spatial_pool_stride",
    ],
)
def test_numbers_of_a_configuration(tmp_path, key):
    source = write_hf(tmp_path / "hf")
    for value in NUMBERS:
        (source / "config.json").write_text(json.dumps(golden_config("llave") | {key: value}))
        message = refused(source, tmp_path)
        named = key in message or "pool_stride" in message
        # What is a number of the range does not fit the tensors.
        assert named or "do not fit" in message, (value, message)


CHANGES = [
    ({"rope_theta": float("nan")}, "NaN is not a number of JSON"),
    ({"rope_theta": "1e6"}, "config.json: rope_theta is '1e6'; expected a number from 1"),
    ({"rope_theta": -1.0}, "rope_theta is -1.0"),
    ({"rms_norm_eps": -1e-6}, "rms_norm_eps is -1e-06"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; expected a whole number"),
    ({"image_grid_pinpoints": [[0, 0]]}, "image_grid_pinpoints is 0"),
    ({"image_grid_pinpoints": [[224, -224]]}, "image_grid_pinpoints is -224"),
    ({"image_grid_pinpoints": [["a", "b"]]}, "image_grid_pinpoints is 'b'"),
    ({"image_grid_pinpoints": [[224]]}, "expected a list of pairs"),
    ({"image_grid_pinpoints": [[224 * 100, 224 * 100]]}, "at most 400 tiles"),
    ({"image_grid_pinpoints": "(1x1),...,(9999x9999)"}, "at most 1024 canvases"),
    ({"image_aspect_ratio": "anyres_max_0"}, "anyres_max is 0"),
    ({"image_aspect_ratio": ["anyres"]}, "expected anyres or anyres_max_N"),
    ({"architectures": "LlavaQwenForCausalLM"}, "architectures is 'Llava.*a list of names"),
    ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; expected an object"),
    ({"tokenizer_model_max_length": "long"}, "tokenizer_model_max_length is 'long'"),
    ({"deep": [[]]}, "nested more than 100 levels"),
]


@pytest.mark.parametrize(("changes", "message"), CHANGES, ids=lambda value: str(value)[:40])
def test_settings_of_a_configuration(tmp_path, changes, message):
    source = write_hf(tmp_path / "hf")
    text = json.dumps(golden_config("llave") | changes)
    if "deep" in changes:
        text = text.replace("[[]]", "[" * 5000 + "]" * 5000)
    (source / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=message):
        convert_from_hf(source, tmp_path / "ours", show_progress=False)


@pytest.mark.parametrize("change", ["text", "vision", "list"])
def test_sections_of_a_configuration(tmp_path, change):
    changes = {
        "text": {"text_config": 5},
        "vision": {"vision_config": "siglip"},
        "list": {"image_grid_pinpoints": {"height": 224}},
    }[change]
    source = write_hf(tmp_path / "hf", "hub", changes=changes)
    assert str(source / "config.json") in refused(source, tmp_path)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("model.layers.1.mlp.up_proj.weight", np.nan),
        ("model.vision_tower.vision_tower.vision_model.post_layernorm.bias", np.inf),
        ("model.image_newline", -np.inf),
    ],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_that_are_no_numbers(tmp_path, name, value, dtype):
    tensors = golden_tensors()
    tensors[name].reshape(-1)[-1] = value
    source = write_hf(tmp_path / "hf", tensors=tensors, dtype=dtype)
    message = refused(source, tmp_path)
    assert f"model.safetensors: tensor {name} has the value {value}" in message


def test_weights_of_a_model_directory_that_are_no_numbers(golden_model, tmp_path):
    copy = tmp_path / "model"
    shutil.copytree(golden_model.directory, copy)
    file = SafetensorsFile(copy / "model.safetensors")
    info = file.tensors["image_newline"]
    with open(file.path, "rb+") as data:
        data.seek(file.path.stat().st_size - sum(t.nbytes for t in file.tensors.values()))
        data.seek(info.start, os.SEEK_CUR)
        data.write(np.float32(np.nan).tobytes())
    message = "tensor image_newline has the value nan"
    with pytest.raises(CheckpointError, match=message):
        model_dir.load_params(copy)
    with pytest.raises(CheckpointError, match=r"image_newline has the value nan"):
        convert_to_hf(copy, tmp_path / "hf", "llave", show_progress=False)
    assert not (tmp_path / "hf").exists()


# Headers of safetensors


def entry(**changes):
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes


HEADERS = [
    [],
    {"x": 5},
    {"x": {}},
    {"x": entry(dtype=["F32"])},
    {"x": entry(shape=[-2])},
    {"x": entry(shape=["2"])},
    {"x": entry(shape=[True, 2])},
    {"x": entry(shape=[10**30])},
    {"x": entry(shape=[1] * 40)},
    {"x": entry(shape=2)},
    {"x": entry(data_offsets=[0])},
    {"x": entry(data_offsets=[8, 0])},
    {"x": entry(data_offsets=[-8, 0])},
    {"x": entry(data_offsets=[0, 8.0])},
    {"x": entry(data_offsets=[10**17, 10**17 + 8])},
    {"x": entry(shape=[10**11], data_offsets=[0, 4 * 10**11])},
    {"x": entry(), "y": entry()},
]


@pytest.mark.parametrize("header", HEADERS, ids=lambda header: json.dumps(header)[:60])
def test_headers(tmp_path, header):
    path = tmp_path / "model.safetensors"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError) as error:
        SafetensorsFile(path)
    assert str(path) in str(error.value)


# Tokenizers


def change_json(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


TOKENIZERS = {
    "cut": lambda d: os.truncate(d / "tokenizer.json", (d / "tokenizer.json").stat().st_size // 2),
    "half": lambda d: change_json(
        d / "tokenizer.json",
        lambda v: v["model"].update(vocab=dict(list(v["model"]["vocab"].items())[:300])),
    ),
    "no vocabulary": lambda d: change_json(d / "tokenizer.json", lambda v: v["model"].clear()),
    "no tokens": lambda d: change_json(d / "tokenizer.json", lambda v: v.pop("added_tokens")),
    "ids": lambda d: change_json(
        d / "tokenizer.json", lambda v: v["added_tokens"][0].update(id=2**60)
    ),
    "no rules": lambda d: change_json(d / "tokenizer.json", lambda v: v.update(pre_tokenizer=5)),
    "limit": lambda d: change_json(
        d / "tokenizer_config.json", lambda v: v.update(model_max_length="512")
    ),
    "not text": lambda d: (d / "tokenizer_config.json").write_bytes(b"\xff\xfe{}"),
}


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_damaged_tokenizers(tmp_path, kind):
    source = write_hf(tmp_path / "hf")
    TOKENIZERS[kind](source)
    assert "token" in refused(source, tmp_path)


def test_code_of_a_checkpoint_is_never_run(tmp_path, monkeypatch):
    source = write_hf(tmp_path / "hf")
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\nfrom transformers import Qwen2TokenizerFast as Evil\n"
    (source / "evil.py").write_text(code)
    (source / "config.json").write_text(
        json.dumps(golden_config("llave") | {"auto_map": {"AutoConfig": "evil.Evil"}})
    )
    change_json(
        source / "tokenizer_config.json",
        lambda v: v.update(auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
    )
    # Whoever would be asked says yes.
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    assert "auto_map names code" in refused(source, tmp_path)
    with pytest.raises(CheckpointError, match="never run"):
        load_tokenizer(source)
    assert not ran.exists()


# Paths and links


@pytest.fixture
def model(golden_model, tmp_path):
    copy = tmp_path / "in" / "model"
    shutil.copytree(golden_model.directory, copy)
    return copy


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "{tmp}/x.safetensors",
        ".x.safetensors",
        "a/b.safetensors",
        "x",
        "",
        5,
        None,
    ],
)
def test_weight_files_are_written_nowhere_else(model, tmp_path, name):
    name = name.replace("{tmp}", str(tmp_path)) if isinstance(name, str) else name
    change_json(model / "source/layout.json", lambda v: v["weights"][0].update(file=name))
    before = set(tmp_path.rglob("*"))
    with pytest.raises(CheckpointError, match=r"layout\.json: lists the weight file"):
        convert_to_hf(model, tmp_path / "out" / "hf", "llave", show_progress=False)
    assert set(tmp_path.rglob("*")) - before <= {tmp_path / "out"}


def claim_a_large_tensor(values):
    header = json.loads(values["weights"][0]["header"])
    entries = {"claimed": {"dtype": "F32", "shape": [10**11], "data_offsets": [0, 4 * 10**11]}}
    values["weights"][0]["header"] = json.dumps(entries | {"__metadata__": header["__metadata__"]})


LAYOUTS = {
    "large": claim_a_large_tensor,
    "layout": lambda v: v.update(layout="../llave"),
    "weights": lambda v: v.update(weights={"file": "x"}),
    "header": lambda v: v["weights"][0].update(header=["x"]),
    "none": lambda v: v.update(weights=[]),
    "twice": lambda v: v["weights"].append(v["weights"][0]),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_layouts_that_do_not_fit_the_model(model, tmp_path, kind):
    change_json(model / "source/layout.json", LAYOUTS[kind])
    with pytest.raises(CheckpointError, match=r"layout\.json"):
        convert_to_hf(model, tmp_path / "hf", "llave", show_progress=False)
    assert not (tmp_path / "hf").exists()


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", 5, ["model.safetensors"]])
def test_shards_that_an_index_names_elsewhere(tmp_path, name):
    source = write_hf(tmp_path / "hf", shards=2)
    index = source / "model.safetensors.index.json"
    change_json(index, lambda v: v["weight_map"].update({"model.norm.weight": name}))
    assert f"{index}: names {name!r}" in refused(source, tmp_path)


@pytest.mark.parametrize("link", ["README.md", "folder", "config.json", "more/note.txt"])
def test_links_out_of_a_checkpoint(tmp_path, link):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("secret")
    source = write_hf(tmp_path / "hf")
    (source / "more").mkdir()
    (source / link).unlink(missing_ok=True)
    (source / link).symlink_to(outside if link == "folder" else outside / "secret.txt")
    assert f"{source / link}: a link to {outside}" in refused(source, tmp_path)


def test_links_within_a_checkpoint_and_of_the_hubs_cache(tmp_path):
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / "abc"
    source = write_hf(tmp_path / "hf")
    (repo / "blobs").mkdir(parents=True)
    snapshot.mkdir(parents=True)
    shutil.move(tmp_path / "siglip-tiny-open-patch30-224", snapshot)
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(repo / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (snapshot / "same.txt").symlink_to("config.json")
    convert_from_hf(snapshot, tmp_path / "ours", show_progress=False)
    assert not any(path.is_symlink() for path in (tmp_path / "ours").rglob("*"))
    (snapshot / "other.txt").symlink_to("../../../elsewhere")
    assert "other.txt: a link to" in refused(snapshot, tmp_path / "nothing")


@pytest.mark.parametrize("link", ["source/README.md", "tokenizer/more", "carried.safetensors"])
@pytest.mark.parametrize("layout", ["llave", "onevision"])
def test_links_out_of_a_model_directory_are_not_published(model, tmp_path, link, layout):
    secret = tmp_path / "secret"
    secret.write_text("secret")
    (model / link).unlink(missing_ok=True)
    (model / link).symlink_to(secret)
    with pytest.raises(CheckpointError, match=r"a link to|not a safetensors file"):
        convert_to_hf(model, tmp_path / "hf", layout, show_progress=False)
    assert not (tmp_path / "hf").exists()


def test_a_pipe_in_place_of_a_file(tmp_path):
    source = write_hf(tmp_path / "hf")
    (source / "tokenizer_config.json").unlink()
    os.mkfifo(source / "tokenizer_config.json")
    assert "tokenizer_config.json: neither a file nor a folder" in refused(source, tmp_path)


def test_the_card_of_a_checkpoint_is_not_parsed_as_yaml(model, tmp_path):
    bomb = "a: &a [x, x]\n" + "".join(
        f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}, *{a}]\n"
        for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    card = f"---\nlicense: *i\nlicense_name: !!python/object/apply:os.getcwd []\n{bomb}base_model:\n- org/base\n---\n"
    (model / "source" / "README.md").write_text(card)
    convert_to_hf(model, tmp_path / "hf", "onevision", show_progress=False)
    written = (tmp_path / "hf" / "README.md").read_text()
    assert "license: apache-2.0\n" in written
    assert "org/base" in written
    assert "python" not in written.split("---")[1]


CONFIGS = {
    "layers": lambda v: v["text"].update(num_layers=10**9),
    "width": lambda v: v["vision"].update(hidden_size=10**9),
    "theta": lambda v: v["text"].update(rope_theta="x"),
    "length": lambda v: v["inputs"].update(max_length=-5),
    "grid": lambda v: v["inputs"].update(pinpoints=[[0, 0]]),
    "odd grid": lambda v: v["inputs"].update(pinpoints=[[225, 224]]),
    "frames": lambda v: v["inputs"].update(frames_per_second=0),
    "section": lambda v: v.update(text=[1]),
    "format": lambda v: v.update(llave_jax_format=[1]),
    "another": lambda v: v["text"].update(num_layers=4),
}


@pytest.mark.parametrize("kind", CONFIGS)
def test_configurations_of_a_model_directory(model, kind):
    change_json(model / "config.json", CONFIGS[kind])
    with pytest.raises(CheckpointError) as error:
        model_dir.open_params(model)
    assert str(model) in str(error.value)
