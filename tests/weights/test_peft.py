"""Adapters in PEFT's format: parity with peft on transformers' LlavaOnevision, both ways, and what is refused."""

import json
import shutil

import numpy as np
import pytest

from llave_jax.inputs.sequence import SequenceBuilder
from llave_jax.models import lora
from llave_jax.models.lora import Lora
from llave_jax.models.parameters import adapter_shapes, linear_maps
from llave_jax.weights import adapted, model_dir, peft_format
from llave_jax.weights.hf_names import LAYOUTS
from llave_jax.weights.safetensors_io import (
    CheckpointError,
    SafetensorsFile,
    SafetensorsWriter,
    encode_header,
)

# Of components of vectors of length 1.
TOLERANCE = 1e-5


def drawn(config, own):
    """path -> adapters of a trained size."""
    rng = np.random.default_rng(7)
    return {
        path: rng.normal(size=shape).astype(np.float32) * (0.5 if path.endswith("b") else 0.1)
        for path, shape in adapter_shapes(own.modules, own.rank, config).items()
    }


@pytest.fixture(scope="module")
def written(golden_model, tmp_path_factory):
    """An adapter on all linear maps of the golden model, in both layouts."""
    own = Lora(lora.find_modules(".*"), rank=3, alpha=6.0)
    arrays, folder = drawn(golden_model.config, own), tmp_path_factory.mktemp("adapters")
    for layout in LAYOUTS:
        peft_format.write_peft(folder / layout, arrays, own, layout)
    return own, arrays, folder


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapter_that_is_written_is_read_again(golden_model, written, layout):
    own, arrays, folder = written
    deltas = peft_format.read_peft(folder / layout, golden_model.config).deltas
    counted = 0
    for module in linear_maps():
        a, b = (arrays[f"{module}/{name}"] for name in ("lora_a", "lora_b"))
        stacked = "/layers/" in module
        for layer in range(len(a)) if stacked else (None,):
            delta = deltas[f"{module}/kernel", layer]
            np.testing.assert_array_equal(delta.a, a if layer is None else a[layer])
            np.testing.assert_array_equal(delta.b, b if layer is None else b[layer])
            assert delta.scale == own.scale
            counted += 1
    assert counted == len(deltas)


def test_parts_of_a_merged_parameter_are_those_of_the_whole(golden_model, written):
    _, arrays, folder = written
    merged = model_dir.open_params(golden_model.directory, folder / "llave")
    plain = model_dir.open_params(golden_model.directory)
    for path, whole in merged.items():
        array = np.asarray(whole)
        assert (array.shape, array.dtype) == (plain[path].shape, plain[path].dtype)
        assert np.array_equal(array, plain[path]) == (
            path.removesuffix("/kernel") not in linear_maps()
        )
        half = tuple(slice(size // 2, None) for size in array.shape)
        np.testing.assert_array_equal(whole[half], array[half])
        np.testing.assert_array_equal(whole[:1], array[:1])
    a, b = (
        arrays[f"projector/linear_1/{name}"].astype(np.float64) for name in ("lora_a", "lora_b")
    )
    kernel = np.asarray(plain["projector/linear_1/kernel"], np.float64)
    np.testing.assert_allclose(merged["projector/linear_1/kernel"], kernel + 2 * a @ b, atol=1e-6)


def edited(source, target, tensors=lambda tensors: None, **settings):
    """A copy of an adapter with other settings or tensors."""
    shutil.copytree(source, target)
    values = json.loads((target / "adapter_config.json").read_text())
    (target / "adapter_config.json").write_text(json.dumps(values | settings))
    file = SafetensorsFile(target / "adapter_model.safetensors")
    arrays = {name: file.read(name) for name in file.tensors}
    tensors(arrays)
    file.path.unlink()
    infos = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(file.path, encode_header(infos, {})) as writer:
        for name, array in arrays.items():
            writer.write(name, array)
    return target


UP = "base_model.model.model.layers.0.mlp.up_proj"


def renamed(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, r"peft_type is 'LOHA'; expected 'LORA'. train a plain"),
        ({"use_dora": True}, r"use_dora is True, which is not read; train a plain LoRA, or merge"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\], which is not read"),
        ({"bias": "all"}, r"bias is 'all', which is not read"),
        ({"init_lora_weights": "pissa"}, r"init_lora_weights is 'pissa', which is not read"),
        ({"trainable_token_indices": [3]}, r"trainable_token_indices is \[3\]"),
        ({"lora_alpha": "many"}, r"lora_alpha is 'many'"),
        ({"alpha_pattern": {"(": 1}}, r"alpha_pattern '\(': missing \)"),
        (
            {"alpha_pattern": {"([a-z_.0-9]+)+!": 1}},
            r"alpha_pattern .* is too intricate; expected names",
        ),
        ({"alpha_pattern": {".*.*.*.*!": 1}}, r"alpha_pattern .* is too intricate"),
        (
            {"tensors": renamed(f"{UP}.lora_A.weight", f"{UP}.lora_magnitude_vector")},
            r"up_proj.lora_magnitude_vector is not a factor of a LoRA",
        ),
        (
            {
                "tensors": renamed(
                    f"{UP}.lora_A.weight", "base_model.model.model.embed.lora_A.weight"
                )
            },
            r"has lora_(A|B) alone",
        ),
        (
            {"tensors": lambda t: t.update({f"{UP}.lora_A.weight": t[f"{UP}.lora_B.weight"]})},
            r"up_proj has factors .*; expected \[rank, \d+\] and \[\d+, rank\]",
        ),
        (
            {"tensors": lambda t: t[f"{UP}.lora_A.weight"].fill(np.nan)},
            r"up_proj.lora_A.weight has the value nan",
        ),
    ],
)
def test_what_is_no_plain_lora_is_refused_by_name(golden_model, written, tmp_path, change, message):
    folder = edited(written[2] / "llave", tmp_path / "adapter", **change)
    with pytest.raises(CheckpointError, match=message):
        peft_format.read_peft(folder, golden_model.config)


def test_modules_of_another_model_are_refused(golden_model, written, tmp_path):
    def move(tensors):
        for side in "AB":
            name = f"{UP}.lora_{side}.weight"
            tensors[name.replace("layers.0", "layers.99")] = tensors.pop(name)

    folder = edited(written[2] / "llave", tmp_path / "deep", move)
    with pytest.raises(
        CheckpointError, match=r"model.layers.99.mlp.up_proj: the model has \d layers"
    ):
        peft_format.read_peft(folder, golden_model.config)

    def other(tensors):
        for side in "AB":
            name = f"{UP}.lora_{side}.weight"
            tensors[name.replace("up_proj", "experts")] = tensors.pop(name)

    folder = edited(written[2] / "llave", tmp_path / "other", other)
    with pytest.raises(
        CheckpointError, match=r"model.layers.0.mlp.experts is no module of the model"
    ):
        peft_format.read_peft(folder, golden_model.config)


def test_what_is_no_adapter_is_refused(golden_model, tmp_path):
    for path in (golden_model.directory, tmp_path):
        with pytest.raises(
            CheckpointError, match=r"neither an adapter \(adapter_config.json\) nor"
        ):
            adapted.open_adapter(path, golden_model.directory)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(
        CheckpointError, match=r"pickled weights can run code when read, and are not"
    ):
        adapted.open_adapter(tmp_path, golden_model.directory)


# Parity with peft.


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """transformers' tiny model, and the same converted."""
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    from benchmarks import parity_onevision as parity
    from llave_jax.weights.from_hf import convert_from_hf

    folder = tmp_path_factory.mktemp("peft")
    hf = parity.save(parity.random_model("tiny"), folder / "hf")
    convert_from_hf(hf, folder / "ours", show_progress=False)
    return folder


def vectors(folder, model, params):
    """Embeddings of a text and an image: transformers', and ours."""
    from benchmarks import parity_onevision as parity

    config = model_dir.load_config(folder / "ours")
    builder = SequenceBuilder(model_dir.load_tokenizer(folder / "ours"), config.input_spec)
    found = []
    for name in ("text", "wide"):
        item = parity.items(config.vision.image_size)[name]
        sequence = builder(item)
        pair = (
            parity.torch_stages(model, sequence, item)["hidden"][-1],
            parity.our_stages(config, params, sequence)["hidden"][-1],
        )
        found.append([vector / np.linalg.norm(vector) for vector in pair])
    return np.swapaxes(found, 0, 1)


TOWER = r"model\.vision_tower\.encoder\.layers\.\d+\.(mlp\.fc1|self_attn\.(q_proj|out_proj))"
PEFT = {
    "language model": {"target_modules": ["q_proj", "o_proj", "up_proj", "down_proj", "linear_2"]},
    "tower, rslora": {"target_modules": TOWER, "use_rslora": True},
    "patterns": {
        "target_modules": "all-linear",
        "rank_pattern": {"q_proj": 2, r"layers\.0\.mlp\..*": 7},
        "alpha_pattern": {"up_proj": 3},
    },
}


@pytest.mark.parametrize("name", PEFT)
def test_an_adapter_of_peft_gives_the_same_embeddings_here(theirs, tmp_path, name):
    import peft
    import torch

    from benchmarks import parity_onevision as parity

    model = parity.random_model("tiny")
    settings = {"r": 4, "lora_alpha": 8, **PEFT[name]}
    model = peft.get_peft_model(model, peft.LoraConfig(**settings)).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                parameter.copy_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    params = model_dir.load_params(theirs / "ours", adapter=tmp_path)
    expected, found = vectors(theirs, model.base_model.model, params)
    _, plain = vectors(theirs, model.base_model.model, model_dir.load_params(theirs / "ours"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
    # Texts do not pass through the tower.
    assert np.abs(plain - expected).max() > 100 * TOLERANCE


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_from_here_gives_the_same_embeddings_in_peft(theirs, tmp_path, rslora):
    import peft

    from benchmarks import parity_onevision as parity

    config = model_dir.load_config(theirs / "ours")
    own = Lora(lora.find_modules(".*"), rank=3, alpha=2.0, rslora=rslora)
    arrays = drawn(config, own)
    peft_format.write_peft(tmp_path / "adapter", arrays, own, "onevision")
    model = parity.random_model("tiny")
    model = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    from safetensors.torch import load_file

    loaded = {key for key in model.state_dict() if "lora_" in key}
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert loaded == {key.replace(".weight", ".default.weight") for key in stored}
    params = model_dir.load_params(theirs / "ours", adapter=tmp_path / "adapter")
    expected, found = vectors(theirs, model.base_model.model, params)
    np.testing.assert_allclose(found, expected, rtol=0, atol=TOLERANCE)
